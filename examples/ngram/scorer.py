"""A stranger's submission: pairs of pieces counted on the training text, interpolated with single pieces."""

import numpy as np


class Scorer:
    def __init__(self, folder):
        with np.load(f"{folder}/weights.bin", allow_pickle=False) as stored:
            single = stored["single"].astype(np.float64)
            starts, following = stored["starts"], stored["following"]
            share = stored["share"].astype(np.float64) / 65_535
        self.vocab = single.size
        before = np.repeat(np.arange(self.vocab), np.diff(starts))
        table = np.zeros((self.vocab, self.vocab))
        table[before, following] = share
        left = 1 - table.sum(axis=1, keepdims=True)  # what the pairs leave goes to the single pieces
        table += left * (single / single.sum())
        self.table = np.log(table / table.sum(axis=1, keepdims=True)).astype(np.float32)

    def logprobs(self, tokens):
        """tokens (B, T) int64 -> natural-log probabilities (B, T, V) float32 of the piece after each position."""
        return self.table[tokens]


def load_scorer(folder):
    return Scorer(folder)
