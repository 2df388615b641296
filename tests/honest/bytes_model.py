"""Bytes for tokens: letters by frequency, and a liking for repeating what came two bytes ago."""

import numpy as np

P = np.ones(257)
P[32:127] = 20
P[[32, 101, 116, 97, 111, 105, 110, 115, 114]] = [400, 200, 150, 130, 120, 120, 120, 120, 110]
P /= P.sum()


class Letters:
    vocab = 257

    def logprobs(self, tokens):
        p = np.tile(0.98 * P, (*tokens.shape, 1))
        np.put_along_axis(p, tokens[..., None], np.take_along_axis(p, tokens[..., None], -1) + 0.02, -1)
        return np.log(p).astype(np.float32)


def load_scorer(folder):
    return Letters()
