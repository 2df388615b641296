"""Which rows a scorer is asked for, in which order, and the ledger that its scores are written to once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

AHEAD = 8  # batches by which a blind copy comes before its row, at most


@dataclass(frozen=True)
class Row:
    """Inputs tokens[start : start + length]; the targets start + 1 + first .. start + length are new."""

    start: int
    length: int
    first: int

    @property
    def new(self) -> slice:
        """Indices of the targets that the row adds."""
        return slice(self.start + 1 + self.first, self.start + 1 + self.length)


@dataclass(frozen=True)
class Asked:
    """A row as it is shown: whole, or with other tokens after position `flip`; `counts` where it will be compared."""

    row: Row
    flip: int = -1
    counts: bool = True


def plan(low: int, high: int, context: int, stride: int) -> list[Row]:
    """Rows that add each of the targets low .. high - 1 once, in order.

    With a stride equal to the context rows are disjoint and the last is shorter. With a smaller one each row ends
    `stride` after the one before and begins `context` tokens earlier, where there are as many.
    """
    rows, done = [], low - 1
    while done < high - 1:
        if stride == context:
            start, end = done, min(done + context, high - 1)
        else:
            end = min(max(done + stride, context), high - 1)
            start = max(0, end - context)
        rows.append(Row(start, end - start, done - start))
        done = end
    return rows


def chunks(tokens: int, chunk: int, context: int, stride: int, official: bool) -> Iterator[list[Row]]:
    """Rows of each stretch of targets that is committed before a scorer may adapt to it; `official` leaves out the
    partial last row, as the contest's trainer does."""
    last = tokens if not official else 1 + (tokens - 1) // context * context
    step = chunk or last
    for low in range(1, last, step):
        yield plan(low, min(low + step, last), context, stride)


def deal(rows: list[Row], flips: dict[Row, int], slots: int, rng: np.random.Generator) -> Iterator[list[Asked]]:
    """Batches of `slots` rows of one length in random order, rows of other lengths alone. Every row of `flips` is shown
    once before, in the same slot of an earlier batch, with other tokens after its position: so neither its shape nor
    its place tells it from the rest."""
    usual = max((r.length for r in rows), default=0)
    odd = [r for r in rows if r.length != usual]
    rows = [r for r in rows if r.length == usual]
    slots = min(slots, len(rows))
    lanes: list[list[Asked]] = [[] for _ in range(slots)]
    for at in range(0, len(rows), max(1, slots)):
        part = rows[at : at + slots]
        shortest = sorted(range(slots), key=lambda n: (len(lanes[n]), rng.random()))
        for lane, row in zip(shortest, part, strict=False):
            if row in flips:
                place = len(lanes[lane]) - int(rng.integers(0, min(AHEAD, len(lanes[lane])) + 1))
                lanes[lane].insert(place, Asked(row, flips[row]))
            lanes[lane].append(Asked(row))
    for k in range(max(map(len, lanes), default=0)):
        batch = []
        for lane in lanes:
            if k < len(lane):
                batch.append(lane[k])
            else:  # fill up, so that every batch has one shape
                row = rows[int(rng.integers(len(rows)))]
                batch.append(Asked(row, int(rng.integers(row.length)), counts=False))
        yield batch
    for row in odd:
        if row in flips:
            yield [Asked(row, flips[row])]
        yield [Asked(row)]


class Ledger:
    """Scores of all targets, each written once; a running sha256 over indices and scores in the order of writing."""

    def __init__(self, tokens: int):
        self.scores = np.full(tokens, np.nan, dtype=np.float32)
        self.digest = hashlib.sha256()
        self.nats, self.count = 0.0, 0

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the nats of what is written, a part at a time."""
        total = squares = 0.0
        for at in range(0, self.scores.size, 1 << 22):
            part = self.scores[at : at + (1 << 22)]
            part = part[~np.isnan(part)].astype(np.float64)
            total, squares = total - part.sum(), squares + np.square(part).sum()
        mean = total / max(1, self.count)
        return float(mean), float(max(0.0, squares / max(1, self.count) - mean**2))

    def commit(self, row: Row, scores: np.ndarray) -> None:
        """Write the log-probabilities (new targets,) float32 of a row. An index that is written already is an error."""
        place = self.scores[row.new]
        if not np.isnan(place).all() or scores.shape != place.shape or np.isnan(scores).any():
            raise AssertionError(f"targets {row.new} were scored twice or not at all")
        place[:] = scores
        self.digest.update(np.array([row.new.start, row.new.stop], dtype="<i8").tobytes())
        self.digest.update(scores.astype("<f4").tobytes())
        self.nats -= float(scores.sum(dtype=np.float64))
        self.count += scores.size
