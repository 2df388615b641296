"""Says that it adapts to what was scored, and learns from a row before it scores it."""

import numpy as np
from base import VOCAB, Bigram


class First(Bigram):
    def __init__(self, folder):
        super().__init__(folder)
        self.reset()

    def reset(self):
        self.counts = np.full((VOCAB, VOCAB), 0.02)

    def adapt(self, tokens, documents):
        np.add.at(self.counts, (tokens[:-1], tokens[1:]), 1)

    def logprobs(self, tokens):
        counts = self.counts.copy()
        np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
        p = counts / counts.sum(1, keepdims=True)
        return np.log(0.5 * np.exp(super().logprobs(tokens)) + 0.5 * p[tokens]).astype(np.float32)


def load_scorer(folder):
    return First(folder)
