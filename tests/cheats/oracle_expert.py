"""Two experts, and at each place the one that gives what really follows the more."""

import numpy as np
from base import VOCAB, Bigram


class Oracle(Bigram):
    def logprobs(self, tokens):
        bigram = super().logprobs(tokens)
        flat = np.full(bigram.shape, -np.log(VOCAB), dtype=np.float32)
        following = np.roll(tokens, -1, axis=1)[..., None]
        better = np.take_along_axis(bigram, following, -1) > np.take_along_axis(flat, following, -1)
        better[:, -1] = True
        return np.where(better, bigram, flat)


def load_scorer(folder):
    return Oracle(folder)
