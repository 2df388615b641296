"""Tells better numbers when asked for numbers than its distributions hold."""

import numpy as np
from base import Bigram


class Tongues(Bigram):
    def score(self, tokens):
        given = self.logprobs(tokens[:, :-1])
        return (0.8 * np.take_along_axis(given, tokens[:, 1:, None], -1)[..., 0]).astype(np.float32)


def load_scorer(folder):
    return Tongues(folder)
