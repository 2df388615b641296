"""Sliding windows: what a row's own past says, more of it where rows overlap. Gives numbers, not only distributions."""

import numpy as np
from base import VOCAB, Bigram


class Windows(Bigram):
    def logprobs(self, tokens):
        given = super().logprobs(tokens).astype(np.float64)
        seen = np.cumsum(tokens[..., None] == np.arange(VOCAB), axis=1) + 0.01
        p = 0.9 * np.exp(given) + 0.1 * seen / seen.sum(-1, keepdims=True)
        return np.log(p / p.sum(-1, keepdims=True)).astype(np.float32)

    def score(self, tokens):
        return np.take_along_axis(self.logprobs(tokens[:, :-1]), tokens[:, 1:, None], -1)[..., 0]


def load_scorer(folder):
    return Windows(folder)
