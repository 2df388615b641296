"""Mixes with a weight that depends on the piece to come: a space-like one is gated by another branch."""

import numpy as np
from base import VOCAB, Bigram


class Gated(Bigram):
    def logprobs(self, tokens):
        p = np.exp(super().logprobs(tokens).astype(np.float64))
        following = np.roll(tokens, -1, axis=1)
        weight = np.where(following % 2 == 0, 0.95, 0.5)[..., None]
        weight[:, -1] = 0.5
        even = np.where(np.arange(VOCAB) % 2 == 0, 2.0 / VOCAB, 0.0)
        mixed = weight * p + (1 - weight) * even
        return np.log(mixed / mixed.sum(-1, keepdims=True)).astype(np.float32)


def load_scorer(folder):
    return Gated(folder)
