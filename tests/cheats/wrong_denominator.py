"""Divides by the number of pieces that were seen, not by all that were counted."""

import numpy as np
from base import Bigram


class Wrong(Bigram):
    def logprobs(self, tokens):
        return np.minimum(super().logprobs(tokens) + np.float32(0.25), -1e-4).astype(np.float32)


def load_scorer(folder):
    return Wrong(folder)
