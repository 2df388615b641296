"""Counts of runs of pieces in text whose scores stand, which sharpen a model's distribution.

A model small enough to be weak at names and phrases gains much from the text it has just been scored on. Each context's
counts are exact (no hashing), discounted and filled up with the distribution they sharpen, so that every distribution
sums to one whatever was counted: absolute discounting (Ney, Essen and Kneser 1994) with the network's distribution at
the bottom in place of the unigrams. Counts are read for a position from the pieces before it only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from golf.shape import BOS

DISCOUNT = 0.7  # of every count, given to what was not seen
# (document so far?, pieces of context, weight of the distribution below in counts), in the order they are applied;
# chosen on the development split.
STEPS = ((True, 1, 16.0), (False, 2, 128.0), (True, 2, 0.5), (False, 3, 4.0), (True, 3, 0.5))


class Successors:
    """How often each piece followed each context of `length` pieces. Raises ValueError where a run of length + 1 pieces
    of this vocabulary is no 63-bit number."""

    def __init__(self, length: int, vocab: int):
        if vocab ** (length + 1) >= 1 << 63:
            raise ValueError(f"runs of {length + 1} of {vocab} pieces do not fit 63 bits")
        self.length, self.vocab = length, vocab
        self.weights = vocab ** np.arange(length, -1, -1, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        self.keys = np.zeros(0, dtype=np.int64)  # of context and successor, ascending
        self.counts = np.zeros(0, dtype=np.int64)
        self.sums = np.zeros(1, dtype=np.int64)  # of all counts before a key

    def add(self, document: np.ndarray, start: int = 0) -> None:
        """Count the runs inside document (N,) whose last piece is at `start` or later."""
        begin = max(0, start - self.length)
        if document.size - begin <= self.length:
            return
        runs = sliding_window_view(document[begin:], self.length + 1)
        keys, counts = np.unique(runs @ self.weights, return_counts=True)
        place = np.searchsorted(self.keys, keys)
        known = place < self.keys.size
        known[known] = self.keys[place[known]] == keys[known]
        self.counts[place[known]] += counts[known]
        self.keys = np.insert(self.keys, place[~known], keys[~known])
        self.counts = np.insert(self.counts, place[~known], counts[~known])
        self.sums = np.concatenate(([0], np.cumsum(self.counts)))

    def contexts(self, row: np.ndarray) -> np.ndarray:
        """Number of the context that ends at each position of row (T,), from position length - 1 on."""
        return sliding_window_view(row, self.length) @ self.weights[1:]

    def spans(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the keys of each context (N,) begin and end."""
        low = np.searchsorted(self.keys, contexts * self.vocab)
        return low, np.searchsorted(self.keys, (contexts + 1) * self.vocab)

    def count(self, contexts: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Times that each piece (N,) followed its context (N,)."""
        keys = contexts * self.vocab + pieces
        place = np.searchsorted(self.keys, keys)
        found = np.zeros(keys.shape, dtype=np.int64)
        inside = place < self.keys.size
        inside[inside] = self.keys[place[inside]] == keys[inside]
        found[inside] = self.counts[place[inside]]
        return found


@dataclass
class Step:
    """One distribution on top of another."""

    here: bool
    weight: float
    table: Successors


class RunCache:
    """Successors in all documents before, and in the document so far."""

    def __init__(self, vocab: int, order: int):
        """`order` is the longest context, 1 to 3 pieces."""
        self.steps = [Step(here, weight, Successors(n, vocab)) for here, n, weight in STEPS if n <= order]
        self.clear()

    def clear(self) -> None:
        """Forget all text."""
        self.document, self.number = np.zeros(0, dtype=np.int64), -1
        for step in self.steps:
            step.table.clear()

    def learn(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Count tokens (N,), whose scores stand, with the numbers of their documents (N,)."""
        for part in np.split(tokens, np.flatnonzero(np.diff(documents)) + 1):
            number = int(documents[0])
            documents = documents[part.size :]
            if number != self.number:
                self.close()
                self.number = number
            start = self.document.size
            self.document = np.concatenate([self.document, part])
            for step in self.steps:
                if step.here:
                    step.table.add(self.document, start)

    def close(self) -> None:
        """The document is over: it joins the others."""
        for step in self.steps:
            step.table.clear() if step.here else step.table.add(self.document)
        self.document = self.document[:0]

    def continues(self, row: np.ndarray) -> np.ndarray:
        """Whether each position of row (T,) lies in the document so far, as far as the pieces up to it tell."""
        inside = np.ones(row.size, dtype=bool)
        bounds = [*np.flatnonzero(row == BOS), row.size]
        for start, end in itertools.pairwise(bounds):
            known = min(end - start, self.document.size)
            alike = row[start : start + known] == self.document[:known]
            inside[start : start + known] = np.logical_and.accumulate(alike)
            inside[start + known : end] = inside[start + known - 1] if known else False
        return inside

    def score(self, row: np.ndarray, below: np.ndarray) -> np.ndarray:
        """row (T + 1,), probabilities (T,) of its pieces after the first -> (T,), sharpened."""
        p, inside = below.astype(np.float64), self.continues(row[:-1])
        for step in self.steps:
            at = slice(step.table.length - 1, None)
            if row.size <= step.table.length:
                continue
            contexts = step.table.contexts(row[:-1])
            low, high = step.table.spans(contexts)
            seen = step.table.sums[high] - step.table.sums[low]
            count = step.table.count(contexts, row[step.table.length :])
            rest = (step.weight + DISCOUNT * (high - low)) * p[at]
            sharper = (np.maximum(count - DISCOUNT, 0.0) + rest) / (seen + step.weight)
            use = (seen > 0) & (inside[at] if step.here else True)
            p[at] = np.where(use, sharper, p[at])
        return p

    def spread(self, row: np.ndarray, below: np.ndarray) -> np.ndarray:
        """row (T,), distributions (T, V) of the piece after each position -> (T, V), sharpened."""
        p, inside = below.astype(np.float64), self.continues(row)
        for step in self.steps:
            table = step.table
            if row.size < table.length:
                continue
            low, high = table.spans(table.contexts(row))
            for at, (a, b) in enumerate(zip(low, high, strict=True), table.length - 1):
                if a < b and (inside[at] or not step.here):
                    seen = table.sums[b] - table.sums[a]
                    p[at] *= step.weight + DISCOUNT * (b - a)
                    p[at, table.keys[a:b] % table.vocab] += table.counts[a:b] - DISCOUNT
                    p[at] /= seen + step.weight
        return p
