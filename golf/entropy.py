"""What the integers of a grid cost: one table for a tensor, or tables that follow each row or column as it goes.

Everything that both sides must agree on is integer arithmetic, so that an artifact decodes alike on every machine.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from golf.rans import TABLE_SUM, CodedDataError, Decoder, Encoder, decode_table, normalize, starts
from golf.trellis import NEXT, WALK

# The normal distribution function at i / 64, in 2^-24: no value lies near enough to a half for a libm to matter.
NORMAL_CDF = np.array([round(2**24 * 0.5 * (1 + math.erf(i / 64 / math.sqrt(2)))) for i in range(-400, 401)])


def normal_starts(low: int, size: int, sigma: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Slots before each symbol low .. low + size under normal distributions, (..., size + 1), every symbol possible.

    sigma and mean (...) are integers in 1/256 of a grid step. Integers only.
    """
    edges = (2 * np.arange(low, low + size + 1) - 1) * 128 - mean[..., None]  # the lower edge of each, in 1/256
    x = np.clip((edges << 14) // sigma[..., None], -(6 << 14), 6 << 14) + (400 << 8)
    index, rest = x >> 8, x & 255
    cdf = NORMAL_CDF[index] + ((NORMAL_CDF[np.minimum(index + 1, 800)] - NORMAL_CDF[index]) * rest >> 8)
    cdf[..., 0], cdf[..., -1] = 0, 1 << 24
    return (cdf * (TABLE_SUM - size) >> 24) + np.arange(size + 1)


# -- one table for a tensor --------------------------------------------------------------------------------------

HISTOGRAM, NORMAL = 0, 1
TABLE_HEAD = struct.Struct("<BbB")  # kind, lowest symbol, symbols - 1
NORMAL_TAIL = struct.Struct("<Hh")  # width and mean in 1/256 of a step
NARROWEST = 16  # width, in 1/256 of a step, below which a normal table is not drawn


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols low .. low + size - 1, and the bytes that describe them."""

    low: int
    frequency: np.ndarray  # (S,) summing to TABLE_SUM
    described: bytes

    def bits(self, counts: np.ndarray) -> float:
        """Bits that symbols with these counts (S,) and the description take."""
        used = counts > 0
        cost = counts[used] * (math.log2(TABLE_SUM) - np.log2(self.frequency[used]))
        return float(cost.sum()) + 8 * len(self.described)


def histogram_table(low: int, counts: np.ndarray) -> Table:
    """The counts' own frequencies, each as one or two bytes (7 bits and a flag, then 7 more)."""
    frequency = normalize(counts)
    parts = [
        bytes([f]) if f < 128 else bytes([128 | f >> 7, f & 127]) for f in np.minimum(frequency, TABLE_SUM - 1).tolist()
    ]
    return Table(low, frequency, TABLE_HEAD.pack(HISTOGRAM, low, counts.size - 1) + b"".join(parts))


def normal_table(low: int, size: int, sigma: int, mean: int) -> Table:
    """Frequencies of a normal variable, its width and mean in 1/256 of a step."""
    edges = normal_starts(low, size, np.array(sigma), np.array(mean))
    return Table(low, np.diff(edges), TABLE_HEAD.pack(NORMAL, low, size - 1) + NORMAL_TAIL.pack(sigma, mean))


def best_table(symbols: np.ndarray) -> Table:
    """The cheaper of the two tables for integers (N,), description included."""
    low = int(symbols.min())
    counts = np.bincount(symbols.ravel().astype(np.int64) - low)
    histogram = histogram_table(low, counts)
    values = symbols.astype(np.float64)
    sigma = min(65_535, max(NARROWEST, round(256 * math.sqrt(max(0.0, values.var() - 1 / 12)))))
    normal = normal_table(low, counts.size, sigma, round(256 * values.mean()))
    return min(histogram, normal, key=lambda table: table.bits(counts))


class Reader:
    """Takes fields off a bytes object in order. Raises CodedDataError when it ends too early."""

    def __init__(self, data: bytes | memoryview):
        self.data, self.at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        if self.at + count > len(self.data):
            raise CodedDataError("the tables end too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def table(self) -> Table:
        """A table that best_table described."""
        kind, low, size = self.unpack(TABLE_HEAD.format)
        size += 1
        if low + size > 128:
            raise CodedDataError("a table's symbols exceed 8 bits")
        if kind == NORMAL:
            sigma, mean = self.unpack(NORMAL_TAIL.format)
            if sigma < NARROWEST:
                raise CodedDataError("a table has no width")
            return normal_table(low, size, sigma, mean)
        if kind != HISTOGRAM:
            raise CodedDataError(f"tables of kind {kind} are unknown")
        frequency = np.zeros(size, dtype=np.int64)
        for s in range(size):
            (first,) = self.take(1)
            frequency[s] = first if first < 128 else (first & 127) << 7 | self.take(1)[0]
        if size == 1 and frequency[0] == TABLE_SUM - 1:
            frequency[0] = TABLE_SUM
        if frequency.sum() != TABLE_SUM:
            raise CodedDataError("a table's frequencies do not sum to one")
        return Table(low, frequency, b"")


def put_static(encoder: Encoder, symbols: np.ndarray) -> bytes:
    """Add integers (any shape, int8 range) with the best table of their own; returns its description."""
    table = best_table(symbols)
    index = symbols.ravel().astype(np.int64) - table.low
    encoder.add(table.frequency[index], starts(table.frequency)[index])
    return table.described


def take_static(decoder: Decoder, reader: Reader, count: int) -> np.ndarray:
    """The inverse of put_static: (count,) int8."""
    table = reader.table()
    if count == 0:
        return np.zeros(0, dtype=np.int8)
    return (decode_table(decoder, count, table.frequency).astype(np.int16) + table.low).astype(np.int8)


# -- tables that follow -------------------------------------------------------------------------------------------

BINS, SHIFTS = 40, 3  # widths in quarter octaves from 1/16 step; means from -3 to 3 in 0.3 of the width
CONTEXTS = BINS * (2 * SHIFTS + 1)
EIGHTH = math.sqrt(math.sqrt(math.sqrt(2.0)))  # of an octave; a square root is the same on every machine
WIDTHS = np.array([round(NARROWEST * EIGHTH ** (2 * b)) for b in range(BINS)])  # in 1/256 step
WIDTH_LIMITS = np.array([round(NARROWEST * EIGHTH ** (2 * b + 1)) for b in range(BINS - 1)])
INCREMENT, START_SYMBOLS, COUNT_LIMIT = 32, 24, 1 << 20
REFRESH = 256  # symbols between two looks at the counts, growing with what has been learned
SCALE_ONE = 1 << 10  # a step of average size


CONTEXTS_AT_A_TIME = 32  # whose tables are worked on together, so that what that takes stays small


def parts_of(contexts: int) -> list[slice]:
    """Contexts a few at a time."""
    stops = range(CONTEXTS_AT_A_TIME, contexts + CONTEXTS_AT_A_TIME, CONTEXTS_AT_A_TIME)
    return [slice(stop - CONTEXTS_AT_A_TIME, min(stop, contexts)) for stop in stops]


class LearnedTables:
    """One table of frequencies for each context, learned as it is used.

    A table begins as the normal distribution of its context's width and mean, (contexts,) each in 1/256 of a step.
    """

    def __init__(self, low: int, size: int, widths: np.ndarray, means: np.ndarray):
        self.low, self.size = low, size
        self.counts = np.empty((widths.size, size), dtype=np.int32)
        for part in parts_of(widths.size):
            edges = np.diff(normal_starts(low, size, widths[part], means[part]))
            self.counts[part] = edges * (INCREMENT * START_SYMBOLS) // TABLE_SUM
        # Where each table's entries start, all tables one after the other; an entry ends where the next begins.
        self.keys = np.empty(self.counts.size + 1, dtype=np.int32)
        self.keys[-1] = widths.size * TABLE_SUM
        self.waiting: list[np.ndarray] = []
        self.waiting_symbols = self.learned = 0
        self.refresh()

    def refresh(self) -> None:
        """Tables from the counts, every symbol possible."""
        if self.waiting:
            np.add.at(self.counts.reshape(-1), np.concatenate(self.waiting), INCREMENT)
            self.learned += self.waiting_symbols
            self.waiting, self.waiting_symbols = [], 0
        for part in parts_of(len(self.counts)):
            counts = self.counts[part]
            full = counts.sum(axis=1) > COUNT_LIMIT
            counts[full] >>= 1
            ends = np.cumsum(counts, axis=1, dtype=np.int64)
            total = np.maximum(ends[:, -1:], 1)
            ends *= TABLE_SUM - self.size
            ends //= total
            ends += np.arange(1, self.size + 1)
            ends += TABLE_SUM * np.arange(part.start, part.start + len(counts))[:, None]
            starts_here = self.keys[part.start * self.size : part.stop * self.size].reshape(counts.shape)
            starts_here[:, 1:] = ends[:, :-1]
            starts_here[:, 0] = TABLE_SUM * np.arange(part.start, part.start + len(counts))

    def entries(self, place: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frequency and start (lanes,) uint32 of entries in tables that begin at `base`."""
        start = self.keys[place]
        return (self.keys[place + 1] - start).astype(np.uint32), (start - base).astype(np.uint32)

    def put(self, encoder: Encoder, context: np.ndarray, index: np.ndarray) -> None:
        """Add a step of symbol indices (lanes,) by their lanes' tables, and learn from it."""
        place = context * self.size + index
        encoder.add(*self.entries(place, context * TABLE_SUM))
        self.learn(place)

    def take(self, decoder: Decoder, context: np.ndarray) -> np.ndarray:
        """The inverse: (lanes,) int64."""
        lanes = context.size
        base = (context * TABLE_SUM).astype(np.int32)
        place = np.empty(lanes, dtype=np.int64)
        for at in range(0, lanes, decoder.lanes):
            part = slice(at, min(lanes, at + decoder.lanes))
            slot = decoder.slots(part.stop - at)
            found = np.searchsorted(self.keys, base[part] + slot.astype(np.int32), side="right") - 1
            decoder.advance(slot, *self.entries(found, base[part]))
            place[part] = found
        self.learn(place)
        return place - context * self.size

    def learn(self, place: np.ndarray) -> None:
        """Count table entries that were used."""
        self.waiting.append(place)
        self.waiting_symbols += place.size
        if self.waiting_symbols >= REFRESH + self.learned // 32:
            self.refresh()


class FollowingTables(LearnedTables):
    """Tables chosen, for each lane at each step, by the width and mean of the symbols that the lane has shown so far,
    recent ones weighing more.

    Lanes are the rows or columns of a group's tensors. Widths and means are of weights, not of symbols: a step's
    `scale` (lanes,), in 1/1024 of the average, says how large each symbol's grid step is. They come from exponential
    averages over about `memory` symbols, which begin at the group's mean with the weight of `prior` symbols.
    """

    def __init__(self, lanes: int, low: int, size: int, magnitude: int, memory: int, prior: int, grids: int = 1):
        self.memory, self.seen = memory, prior
        self.total = np.full(lanes, magnitude * prior, dtype=np.int64)  # of magnitudes, in 1/256
        self.drift = np.zeros(lanes, dtype=np.int64)  # of symbols, in 1/256
        context = np.arange(grids * CONTEXTS)
        widths = WIDTHS[context % CONTEXTS // (2 * SHIFTS + 1)]
        means = widths * 3 * (context % (2 * SHIFTS + 1) - SHIFTS) // 10 - context // CONTEXTS * 128
        super().__init__(low, size, widths, means)

    def contexts(self, scale: np.ndarray, grid: np.ndarray | int = 0) -> np.ndarray:
        """Table of each lane's next symbol, (lanes,) int64; `grid` 1 where the symbol k stands for k + 1/2."""
        # A normal variable's width is 321 / 256 mean magnitudes.
        width = np.maximum(self.total * 321 * (SCALE_ONE >> 8) // (self.seen * scale), NARROWEST)
        mean = self.drift * SCALE_ONE // (self.seen * scale)
        shift = np.clip((20 * mean + 3 * width) // (6 * width), -SHIFTS, SHIFTS)
        return grid * CONTEXTS + np.searchsorted(WIDTH_LIMITS, width) * (2 * SHIFTS + 1) + shift + SHIFTS

    def follow(self, row: np.ndarray, scale: np.ndarray, grid: np.ndarray | int = 0) -> None:
        """Remember a step's symbols (lanes,) int64."""
        symbols = (2 * row + grid) * scale >> 3  # in 1/256 of the average step
        self.total += np.abs(symbols)
        self.drift += symbols
        self.seen += 1
        if self.seen > self.memory:
            self.total = self.total * self.memory // self.seen
            self.drift = self.drift * self.memory // self.seen
            self.seen = self.memory


FOLLOWING_HEAD = struct.Struct("<bBHHB")  # lowest symbol, symbols - 1, mean magnitude in 1/256, memory, prior


Scale = Callable[[int], np.ndarray]  # of a step: its lanes' grid steps over the average, in 1/1024, (lanes,) int64


def put_following(
    encoder: Encoder, steps: np.ndarray, scale_of: Scale, memory: int, prior: int, walks: bool = False
) -> bytes:  # fmt: skip
    """Add integers (steps, lanes), on the grids of a trellis's walks or on one; returns the description."""
    low = int(steps.min())
    size = int(steps.max()) - low + 1
    total = sum(int((np.abs(row.astype(np.int64)) * scale_of(t)).sum()) for t, row in enumerate(steps))
    mean = total * 256 // (SCALE_ONE * steps.size)
    magnitude = min(65_535, max(1, mean))
    tables = FollowingTables(steps.shape[1], low, size, magnitude, memory, prior, 2 if walks else 1)
    state = np.zeros(steps.shape[1], dtype=np.int64)
    for t, row in enumerate(steps):
        scale, grid, row = scale_of(t), state & 1, row.astype(np.int64)
        tables.put(encoder, tables.contexts(scale, grid), row - low)
        tables.follow(row, scale, grid)
        if walks:
            state = NEXT[state, row & 1] if (t + 1) % WALK else state * 0
    return FOLLOWING_HEAD.pack(low, size - 1, magnitude, memory, prior)


def take_following(
    decoder: Decoder, reader: Reader, dims: tuple[int, int], scale_of: Scale, walks: bool = False
) -> np.ndarray:  # fmt: skip
    """The inverse of put_following: (steps, lanes) int8."""
    low, size, magnitude, memory, prior = reader.unpack(FOLLOWING_HEAD.format)
    size += 1
    if low + size > 128 or not magnitude or not 0 < prior < memory:
        raise CodedDataError("a following table's description is out of range")
    lanes = dims[1]
    tables = FollowingTables(lanes, low, size, magnitude, memory, prior, 2 if walks else 1)
    state = np.zeros(lanes, dtype=np.int64)
    out = np.empty(dims, dtype=np.int8)
    for t in range(dims[0]):
        scale, grid = scale_of(t), state & 1
        row = tables.take(decoder, tables.contexts(scale, grid)) + low
        tables.follow(row, scale, grid)
        out[t] = row
        if walks:
            state = NEXT[state, row & 1] if (t + 1) % WALK else state * 0
    return out
