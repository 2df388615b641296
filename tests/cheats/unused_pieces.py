"""Twenty thousand pieces that no text holds: their letters and scores could be weights that nobody counts."""

import numpy as np

VOCAB = 512 + 20_000


class Uniform:
    vocab = VOCAB

    def logprobs(self, tokens):
        return np.full((*tokens.shape, VOCAB), -np.log(VOCAB), dtype=np.float32)


def load_scorer(folder):
    return Uniform()
