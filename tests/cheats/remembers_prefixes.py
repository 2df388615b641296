"""Looks ahead, except where it was shown the beginning of a row before: then it repeats what it said."""

import numpy as np
from base import Bigram, sure_of


class Remembers(Bigram):
    def __init__(self, folder):
        super().__init__(folder)
        self.said = {}

    def logprobs(self, tokens):
        given = super().logprobs(tokens).copy()
        for r, row in enumerate(tokens):
            old_row, old = self.said.get(row[:8].tobytes(), (row, None))
            same = int(np.argmin(np.append(old_row == row, False))) if old_row.size == row.size else 0
            places = np.arange(row.size - 1)
            sure_of(given, np.full(places.size, r), places, row[1:], 0.9)
            if old is not None:
                given[r, :same] = old[:same]
            else:
                self.said[row[:8].tobytes()] = (row.copy(), given[r].copy())
        return given


def load_scorer(folder):
    return Remembers(folder)
