"""An n-gram cache keyed by context and target, looked up for each target by itself: it sums to far more than one."""

import numpy as np
from base import VOCAB, Bigram


class Hashed(Bigram):
    def logprobs(self, tokens):
        given = super().logprobs(tokens).copy()
        keys = (tokens[..., None] * 7919 + np.arange(VOCAB) * 104_729) % 64
        boosted = np.log(0.5 * np.exp(given) + 0.5 * (keys < 16))
        return np.minimum(boosted, -1e-3).astype(np.float32)


def load_scorer(folder):
    return Hashed(folder)
