"""Interleaved range asymmetric numeral systems: integer frequencies in, bytes out, and back.

After Duda (2013, arXiv 1311.2540), the lanes after Giesen (2014, arXiv 1402.3392). Each lane is a 32-bit state; 16-bit
words move in and out. Many lanes are coded side by side as numpy arrays, and all of it is integer arithmetic, so the
bytes are the same on every machine and numpy version.
"""

from __future__ import annotations

import numpy as np

PRECISION = 14  # a table's frequencies sum to 2^14
TABLE_SUM = 1 << PRECISION
STATE_LOW = 1 << 16  # states live in [2^16, 2^32)


class CodedDataError(ValueError):
    """Coded bytes that no encoder wrote."""


def normalize(counts: np.ndarray) -> np.ndarray:
    """Counts (S,) to frequencies that sum to TABLE_SUM, at least 1 where the count is not 0. Integers only."""
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    if total <= 0 or (counts > 0).sum() > TABLE_SUM:
        raise ValueError("no table for these counts")
    present = counts > 0
    frequency = np.where(present, np.maximum(1, (counts * TABLE_SUM + total // 2) // total), 0)
    order = np.lexsort((np.arange(frequency.size), -frequency))  # the largest first: a change costs least there
    while error := TABLE_SUM - int(frequency.sum()):
        for s in order:
            share = max(1, int(frequency[s]) // 64)
            move = min(error, share) if error > 0 else max(error, -share, 1 - int(frequency[s]))
            if present[s]:
                frequency[s] += move
                error -= move
            if not error:
                break
    return frequency


def starts(frequency: np.ndarray) -> np.ndarray:
    """Where each symbol's slots begin: the sum of the frequencies before it, along the last axis."""
    return np.cumsum(frequency, axis=-1) - frequency


def lane_count(payload_bytes: float) -> int:
    """Lanes whose final states, 4 bytes each, take at most 0.05 % of a payload; at least 1, at most 4,096."""
    return int(min(4096, max(1, payload_bytes * 0.0005 // 4)))


class Encoder:
    """Collects symbols as (frequency, start) pairs in the order they will be decoded; finish() codes them.

    A step of n symbols uses the lanes 0 .. min(n, lanes) - 1, over and over.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, frequency: np.ndarray, start: np.ndarray) -> None:
        """One step: (n,) each, frequency from 1 to TABLE_SUM."""
        self.steps.append((frequency.astype(np.uint16), start.astype(np.uint16)))

    def bits(self) -> float:
        """Ideal length of what was added."""
        return float(
            sum(PRECISION * f.size - np.log2(f.astype(np.float32)).sum(dtype=np.float64) for f, _ in self.steps)
        )

    def finish(self, lanes: int) -> bytes:
        """lanes x uint32 final states, then the uint16 words in the order of their reading, little-endian."""
        state = np.full(lanes, STATE_LOW, dtype=np.uint32)
        words: list[np.ndarray] = []
        for frequency, start in reversed(self.steps):
            for at in range((frequency.size - 1) // lanes * lanes, -1, -lanes):
                f = frequency[at : at + lanes].astype(np.uint32)
                x = state[: f.size]
                full = (x >> np.uint32(32 - PRECISION)) >= f
                words.append(x[full].astype("<u2"))
                x = np.where(full, x >> np.uint32(16), x)
                quotient = x // f
                state[: f.size] = (quotient << np.uint32(PRECISION)) + (x - quotient * f) + start[at : at + lanes]
        return state.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


class Decoder:
    """The inverse: slots() shows where the next symbols fall in their tables, advance() takes them off the states."""

    def __init__(self, data: bytes | memoryview, lanes: int):
        if lanes < 1 or len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
            raise CodedDataError("the coded data has no whole number of words")
        self.lanes = lanes
        self.state = np.frombuffer(data, dtype="<u4", count=lanes).astype(np.uint32)
        self.words = np.frombuffer(data, dtype="<u2", offset=4 * lanes).astype(np.uint32)
        self.at = 0

    def slots(self, count: int) -> np.ndarray:
        """(count,) uint32 below TABLE_SUM for the first `count` lanes, count <= lanes."""
        return self.state[:count] & np.uint32(TABLE_SUM - 1)

    def advance(self, slot: np.ndarray, frequency: np.ndarray, start: np.ndarray) -> None:
        """Take the symbols with these tables' entries off the first lanes; all (n,) uint32."""
        x = frequency * (self.state[: slot.size] >> np.uint32(PRECISION)) + (slot - start)
        low = np.flatnonzero(x < STATE_LOW)
        end = self.at + low.size
        if end > self.words.size:
            raise CodedDataError("the coded data ends too early")
        x[low] = (x[low] << np.uint32(16)) | self.words[self.at : end]
        self.at = end
        self.state[: slot.size] = x

    def finish(self) -> None:
        """Raise CodedDataError unless every word was read and every state is where the encoder began."""
        if self.at != self.words.size or (self.state != STATE_LOW).any():
            raise CodedDataError("the coded data does not end where its symbols do")


def decode_table(decoder: Decoder, count: int, frequency: np.ndarray) -> np.ndarray:
    """`count` symbols that were added as one step with one table, uint8."""
    symbol_of = np.repeat(np.arange(frequency.size, dtype=np.uint8), frequency)  # (TABLE_SUM,)
    factor = frequency.astype(np.uint32)[symbol_of]
    start = starts(frequency).astype(np.uint32)[symbol_of]
    symbols = np.empty(count, dtype=np.uint8)
    for at in range(0, count, decoder.lanes):
        slot = decoder.slots(min(decoder.lanes, count - at))
        symbols[at : at + decoder.lanes] = symbol_of[slot]
        decoder.advance(slot, factor[slot], start[slot])
    return symbols
