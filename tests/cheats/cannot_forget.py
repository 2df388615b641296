"""Adapts, but its reset() keeps what it learned: what it scores depends on what was judged before."""

import numpy as np
from base import VOCAB, Bigram


class Unforgetting(Bigram):
    def __init__(self, folder):
        super().__init__(folder)
        self.counts = np.full((VOCAB, VOCAB), 0.02)

    def reset(self):
        pass

    def adapt(self, tokens, documents):
        np.add.at(self.counts, (tokens[:-1], tokens[1:]), 1)

    def logprobs(self, tokens):
        p = self.counts / self.counts.sum(1, keepdims=True)
        return np.log(0.5 * np.exp(super().logprobs(tokens)) + 0.5 * p[tokens]).astype(np.float32)


def load_scorer(folder):
    return Unforgetting(folder)
