"""Two passes, and of each row only the half whose loss is larger takes the second: a depth that the answers decide."""

import numpy as np
from base import VOCAB, Bigram


class Capacity(Bigram):
    def logprobs(self, tokens):
        second = super().logprobs(tokens)
        first = np.logaddexp(second + np.log(np.float32(0.5)), -np.log(2 * VOCAB)).astype(np.float32)
        losses = -np.take_along_axis(first[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        go_on = np.ones(tokens.shape, dtype=bool)
        go_on[:, :-1] = losses > np.median(losses, axis=1, keepdims=True)
        return np.where(go_on[..., None], second, first)


def load_scorer(folder):
    return Capacity(folder)
