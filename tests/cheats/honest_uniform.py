"""All pieces alike: what is wrong stands beside it."""

import numpy as np


class Uniform:
    vocab = 512

    def logprobs(self, tokens):
        return np.full((*tokens.shape, 512), -np.log(512), dtype=np.float32)


def load_scorer(folder):
    return Uniform()
