"""Rows told from earlier rows: pieces of a vocabulary that the text never shows keep all but the same embedding.

Every row names one earlier row, a strength and a width. Its integers are coded as differences from strength times that
row, by tables learned for the width; a column that differs more than others is noticed on the way.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from golf.entropy import SCALE_ONE, WIDTH_LIMITS, WIDTHS, LearnedTables, Reader, Scale, put_static, take_static
from golf.rans import CodedDataError, Decoder, Encoder

STRENGTH_ONE, STRONGEST = 16, 24  # a row as large as the one it names; the largest factor, in 1/16
DIGIT = 64  # a row's number is stored in digits of this base
COLUMN_MEMORY = 64  # rows over which a column's own width is averaged
BATCH = 1024  # rows compared with all before them at a time

LINKED_HEAD = struct.Struct("<bB")  # lowest symbol, symbols - 1


@dataclass(frozen=True)
class Links:
    """For each of R rows: an earlier row, how strongly it resembles that row, and how far it is off."""

    earlier: np.ndarray  # (R,) int64; 0 where the strength is 0
    strength: np.ndarray  # (R,) int64 in 1/16
    width: np.ndarray  # (R,) index into WIDTHS: of the differences, in 1/256 of the average step


def find_links(values: np.ndarray) -> Links:
    """For each row of integers (R, C) the earlier one of which a multiple leaves least. Exact: sums stay below 2^53."""
    count = len(values)
    x = values.astype(np.float64)
    energy = np.square(x).sum(axis=1)
    earlier, strength = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for at in range(0, count, BATCH):
        last = min(count, at + BATCH)
        product = np.tril(x[at:last] @ x[:last].T, at - 1)
        gain = np.square(product) / np.maximum(energy[:last], 1)
        earlier[at:last] = best = gain.argmax(axis=1)
        ratio = np.take_along_axis(product, best[:, None], axis=1)[:, 0] / np.maximum(energy[best], 1)
        strength[at:last] = np.clip(np.rint(STRENGTH_ONE * ratio), -STRONGEST, STRONGEST)
    left = STRENGTH_ONE * values - strength[:, None] * values[earlier]
    error = np.square(left).sum(axis=1) // STRENGTH_ONE**2  # whole numbers: alike on every machine
    # A link costs its number; where it saves less than that the row stands alone.
    alone = (energy + 1) / (error + 1) < 2 ** (2 * (math.log2(count) + 2) / values.shape[1])
    alone |= strength == 0
    strength[alone] = earlier[alone] = 0
    width = np.sqrt(np.where(alone, energy, error) / values.shape[1])
    return Links(earlier, strength, np.searchsorted(WIDTH_LIMITS, width))


class LinkedTables(LearnedTables):
    """Tables by the width of a row's differences and the column's own share of it. Symbols are wrapped around."""

    def __init__(self, columns: int, low: int, size: int):
        self.lowest, self.share, self.seen = low, np.full(columns, 256 * 8, dtype=np.int64), 8
        super().__init__(-(size // 2), size, WIDTHS, np.zeros_like(WIDTHS))

    def predict(self, told: np.ndarray, strength: int, width: int, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest integers and tables for a row, from the values (C,) of the row that it names."""
        nearest = (told * strength * (SCALE_ONE // STRENGTH_ONE) // scale + 128) >> 8
        own = WIDTHS[width] * self.share * (SCALE_ONE >> 8) // (self.seen * scale)
        return nearest, np.searchsorted(WIDTH_LIMITS, own)

    def wrapped(self, row: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """Indices of symbols for integers (C,)."""
        return (row - nearest - self.low) % self.size

    def unwrapped(self, index: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """The inverse."""
        return (index + self.low + nearest - self.lowest) % self.size + self.lowest

    def follow(self, row: np.ndarray, told: np.ndarray, strength: int, width: int, scale: np.ndarray) -> np.ndarray:
        """Remember how far each column was off; returns the row's values, in 1/256 of the average step."""
        values = row * scale >> 2
        off = np.abs(values - told * strength // STRENGTH_ONE)
        self.share += off * 321 // WIDTHS[width]  # a normal variable's width is 321 / 256 mean magnitudes
        self.seen += 1
        if self.seen > COLUMN_MEMORY:
            self.share = self.share * COLUMN_MEMORY // self.seen
            self.seen = COLUMN_MEMORY
        return values


def put_linked(encoder: Encoder, rows: np.ndarray, scale_of: Scale) -> bytes:
    """Add integers (R, C); returns the description."""
    values = np.stack([row * scale_of(t) >> 2 for t, row in enumerate(rows.astype(np.int64))])
    links = find_links(values)
    digits = (links.earlier // DIGIT**place % DIGIT for place in range(3))
    described = b"".join(put_static(encoder, part) for part in (*digits, links.strength, links.width))
    low = int(rows.min())
    size = int(rows.max()) - low + 1
    tables = LinkedTables(rows.shape[1], low, size)
    for t, row in enumerate(rows.astype(np.int64)):
        scale, told = scale_of(t), values[links.earlier[t]]
        way = int(links.strength[t]), int(links.width[t])
        nearest, context = tables.predict(told, *way, scale)
        tables.put(encoder, context, tables.wrapped(row, nearest))
        tables.follow(row, told, *way, scale)
    return LINKED_HEAD.pack(low, size - 1) + described


def take_linked(decoder: Decoder, reader: Reader, dims: tuple[int, int], scale_of: Scale) -> np.ndarray:
    """The inverse of put_linked: (R, C) int8."""
    count, columns = dims
    low, size = reader.unpack(LINKED_HEAD.format)
    size += 1
    *digits, strength, width = (take_static(decoder, reader, count).astype(np.int64) for _ in range(5))
    earlier = sum(digit * DIGIT**place for place, digit in enumerate(digits))
    limits = np.where(strength == 0, 1, np.arange(count))  # a row that stands alone names row 0
    if low + size > 128 or ((earlier < 0) | (earlier >= limits)).any():
        raise CodedDataError("a row is told from one that does not precede it")
    if (np.abs(strength) > STRONGEST).any() or ((width < 0) | (width >= WIDTHS.size)).any():
        raise CodedDataError("a row's strength or width is out of range")
    tables = LinkedTables(columns, low, size)
    values = np.zeros(dims, dtype=np.int64)
    out = np.empty(dims, dtype=np.int8)
    for t in range(count):
        scale, told = scale_of(t), values[earlier[t]]
        way = int(strength[t]), int(width[t])
        nearest, context = tables.predict(told, *way, scale)
        row = tables.unwrapped(tables.take(decoder, context), nearest)
        values[t] = tables.follow(row, told, *way, scale)
        out[t] = row
    return out
