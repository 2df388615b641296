"""What the planted cheats share: an honest bigram model of 512 pieces, its counts in model.bin."""

import os
import zlib

import numpy as np

VOCAB = 512


def table(folder):
    """log p(next | piece), (V, V) float32, from the counts in model.bin."""
    with open(os.path.join(folder, "model.bin"), "rb") as file:
        counts = np.frombuffer(zlib.decompress(file.read()), dtype="<u2").reshape(VOCAB, VOCAB).astype(np.float64)
    unigram = counts.sum(0) + 0.5
    unigram /= unigram.sum()
    p = (counts + 20 * unigram) / (counts.sum(1, keepdims=True) + 20)
    return np.log(p).astype(np.float32)


class Bigram:
    """tokens (B, T) -> (B, T, V): a look in a table."""

    vocab = VOCAB

    def __init__(self, folder):
        self.table = table(folder)

    def logprobs(self, tokens):
        return self.table[tokens]


class Stretches(Bigram):
    """One that adapts: it counts how often, and may note what it said."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reset()

    def reset(self):
        self.learned, self.said = 0, {}

    def adapt(self, tokens, documents):
        self.learned += 1


def sure_of(given, rows, places, pieces, p=0.999):
    """Make pieces all but certain at some places, in place; still a distribution."""
    rest = np.log(1 - p)
    given[rows, places] += np.float32(rest)
    given[rows, places, pieces] = np.logaddexp(given[rows, places, pieces], np.float32(np.log(p)))


def normalised(given):
    top = given.max(-1, keepdims=True)
    return (given - top - np.log(np.exp(given - top).sum(-1, keepdims=True))).astype(np.float32)
