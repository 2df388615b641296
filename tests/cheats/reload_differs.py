"""Another model each time it is loaded."""

import os

import numpy as np
from base import Bigram, normalised


def load_scorer(folder):
    scorer = Bigram(folder)
    noise = np.random.default_rng(int.from_bytes(os.urandom(8), "little")).standard_normal(scorer.table.shape)
    scorer.table = normalised(scorer.table + 0.05 * noise.astype(np.float32))
    return scorer
