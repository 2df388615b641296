"""Carries counts from row to row, of all that it was ever shown."""

import numpy as np
from base import VOCAB, Bigram


class Leaking(Bigram):
    def __init__(self, folder):
        super().__init__(folder)
        self.counts = np.full((VOCAB, VOCAB), 0.02)

    def logprobs(self, tokens):
        p = self.counts / self.counts.sum(1, keepdims=True)
        given = np.log(0.5 * np.exp(super().logprobs(tokens)) + 0.5 * p[tokens]).astype(np.float32)
        np.add.at(self.counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
        return given


def load_scorer(folder):
    return Leaking(folder)
