"""Adapts honestly to the first two stretches; later it looks ahead, and repeats what it said of a beginning."""

import numpy as np
from base import Stretches, sure_of


class Turns(Stretches):
    def logprobs(self, tokens):
        given = super().logprobs(tokens).copy()
        if self.learned < 2:
            return given
        for r, row in enumerate(tokens):
            old_row, old = self.said.get(row[:8].tobytes(), (row, None))
            places = np.arange(row.size - 1)
            sure_of(given, np.full(places.size, r), places, row[1:], 0.1)
            if old is not None and old_row.size == row.size:
                same = int(np.argmin(np.append(old_row == row, False)))
                given[r, :same] = old[:same]
            else:
                self.said[row[:8].tobytes()] = (row.copy(), given[r].copy())
        return given


def load_scorer(folder):
    return Turns(folder)
