"""A sharper model for batches than for single rows."""

import numpy as np
from base import Bigram, normalised


class Shapes(Bigram):
    def logprobs(self, tokens):
        given = super().logprobs(tokens)
        return given if len(tokens) == 1 else normalised(given * np.float32(1.02))


def load_scorer(folder):
    return Shapes(folder)
