"""Proof by decompression: a scorer's own distributions write real text to a file, and read it back.

Encoder and decoder ask for the same rows, each a prefix and nothing more, so that a scorer which looks ahead, sums to
more than one or knows the answer from elsewhere cannot give the text back. The file's size is the score.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from golf.contender import Contender, Invalid
from golf.errors import UsageError
from golf.validation import Validation

MAGIC = b"GOLFPROF"
HEAD = struct.Struct("<8sII")  # magic, documents, crc of the rest
TOTAL_BITS = 24  # a distribution's integer frequencies sum to 2^24
TOP, HALF, QUARTER = (1 << 32) - 1, 1 << 31, 1 << 30
AGREEMENT = 0.005  # between the file's size and the score of the same tokens
LENGTH_BYTES, LAST_BYTES = 2, 2  # of the file: each document's length, and the coder's last bits

# Integer arithmetic coding after Witten, Neal and Cleary (1987), with 32-bit bounds.


class BitWriter:
    """An arithmetic coder's output."""

    def __init__(self) -> None:
        self.low, self.high, self.pending, self.bits = 0, TOP, 0, []

    def put(self, start: int, frequency: int) -> None:
        """Narrow the interval to [start, start + frequency) of 2^TOTAL_BITS."""
        span = self.high - self.low + 1
        self.high = self.low + (span * (start + frequency) >> TOTAL_BITS) - 1
        self.low += span * start >> TOTAL_BITS
        while True:
            if self.high < HALF:
                self.emit(0)
            elif self.low >= HALF:
                self.emit(1)
                self.low -= HALF
                self.high -= HALF
            elif self.low >= QUARTER and self.high < 3 * QUARTER:
                self.pending += 1
                self.low -= QUARTER
                self.high -= QUARTER
            else:
                return
            self.low, self.high = 2 * self.low, 2 * self.high + 1

    def emit(self, bit: int) -> None:
        self.bits += [bit, *[1 - bit] * self.pending]
        self.pending = 0

    def finish(self) -> bytes:
        self.pending += 1
        self.emit(int(self.low >= QUARTER))
        return np.packbits(np.array(self.bits, dtype=np.uint8)).tobytes()


class BitReader:
    """The inverse: slot() tells where the next symbol falls, take() moves past it."""

    def __init__(self, data: bytes):
        self.bits: Iterator[int] = iter(np.unpackbits(np.frombuffer(data, dtype=np.uint8)).tolist())
        self.low, self.high, self.code = 0, TOP, 0
        for _ in range(32):
            self.code = 2 * self.code + next(self.bits, 0)

    def slot(self) -> int:
        return ((self.code - self.low + 1 << TOTAL_BITS) - 1) // (self.high - self.low + 1)

    def take(self, start: int, frequency: int) -> None:
        span = self.high - self.low + 1
        self.high = self.low + (span * (start + frequency) >> TOTAL_BITS) - 1
        self.low += span * start >> TOTAL_BITS
        while True:
            if self.high < HALF:
                shift = 0
            elif self.low >= HALF:
                shift = HALF
            elif self.low >= QUARTER and self.high < 3 * QUARTER:
                shift = QUARTER
            else:
                return
            self.low, self.high = 2 * (self.low - shift), 2 * (self.high - shift) + 1
            self.code = 2 * (self.code - shift) + next(self.bits, 0)


def frequencies(logprobs: np.ndarray) -> np.ndarray:
    """Starts of each piece's slots (V + 1,) int64 from log-probabilities (V,) float32; each at least one slot.

    Probabilities that sum to more than one find no room: the rest is shared out in proportion, at the price of bits.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(np.minimum(logprobs.astype(np.float64), 50.0))
    if not np.isfinite(p).all():
        raise Invalid("the scorer gave log-probabilities that are not numbers", 3)
    room = (1 << TOTAL_BITS) - p.size
    found = np.floor(p / max(1.0, float(p.sum())) * room).astype(np.int64) + 1
    found[int(found.argmax())] += (1 << TOTAL_BITS) - int(found.sum())
    return np.concatenate([[0], np.cumsum(found)])


@dataclass(frozen=True)
class Sample:
    """The first tokens of some documents, each after its BOS."""

    rows: list[np.ndarray]

    @property
    def targets(self) -> int:
        return sum(len(r) - 1 for r in self.rows)


def choose(validation: Validation, context: int, documents: int, tokens: int, rng: np.random.Generator) -> Sample:
    """`tokens` targets at most from each of some documents of the validation text."""
    ends = np.append(validation.starts[1:], validation.tokens.size)
    longest = min(tokens, context)
    enough = np.flatnonzero(ends - validation.starts > min(16, longest))
    if not enough.size:
        raise UsageError("The validation text has no document of 16 tokens to prove anything on, give a longer one.")
    picked = rng.permutation(enough)[:documents]
    picked = picked[np.argsort(validation.starts[picked] - ends[picked], kind="stable")]  # the longest first
    return Sample([
        validation.tokens[validation.starts[n] : min(ends[n], validation.starts[n] + longest + 1)].astype(np.int64)
        for n in picked
    ])  # fmt: skip


def step_through(
    scorer: Contender, bos: int, lengths: list[int], chunk: int, next_token: Callable[[int, np.ndarray], int]
) -> list[np.ndarray]:
    """Grow one row a document, a token a step; at each the scorer sees all rows so far, and nothing else.

    next_token(document, starts (V + 1,)) says which piece follows. With a chunk the scorer adapts to every so many
    targets of all documents once they stand.
    """
    rows = [np.array([bos], dtype=np.int64) for _ in lengths]
    shown = 0
    for step in range(max(lengths)):
        live = [n for n, length in enumerate(lengths) if step < length]
        given = scorer.logprobs(np.stack([rows[n] for n in live]))[:, -1]
        for place, n in enumerate(live):
            rows[n] = np.append(rows[n], next_token(n, frequencies(given[place])))
        if chunk and (step + 1) % max(1, chunk // len(lengths)) == 0:
            parts = [row[1 + shown :] for row in rows]  # of those too that ended since
            names = np.concatenate([np.full(len(p), n + 1) for n, p in enumerate(parts)])
            scorer.adapt(np.concatenate(parts), names)
            shown = step + 1
    return rows


def compress(scorer: Contender, sample: Sample, bos: int, chunk: int) -> bytes:
    """The sample as a file that only the same scorer can read."""
    writer = BitWriter()
    at = [1] * len(sample.rows)

    def next_token(n: int, starts: np.ndarray) -> int:
        token = int(sample.rows[n][at[n]])
        at[n] += 1
        writer.put(int(starts[token]), int(starts[token + 1] - starts[token]))
        return token

    lengths = [len(r) - 1 for r in sample.rows]
    step_through(scorer, bos, lengths, chunk, next_token)
    body = np.array(lengths, dtype="<u2").tobytes() + writer.finish()
    return HEAD.pack(MAGIC, len(sample.rows), zlib.crc32(body)) + body


def decompress(scorer: Contender, data: bytes, bos: int, chunk: int) -> list[np.ndarray]:
    """Rows of tokens from a file. Raises UsageError for one that compress() did not write."""
    lengths, reader = take_apart(data)

    def next_token(n: int, starts: np.ndarray) -> int:
        slot = min(max(reader.slot(), 0), (1 << TOTAL_BITS) - 1)
        token = int(np.searchsorted(starts, slot, side="right")) - 1
        reader.take(int(starts[token]), int(starts[token + 1] - starts[token]))
        return token

    return step_through(scorer, bos, lengths, chunk, next_token)


def take_apart(data: bytes) -> tuple[list[int], BitReader]:
    """Lengths of the documents of a file, and its coded bits. Raises UsageError."""
    magic, count, crc = HEAD.unpack_from(data) if len(data) >= HEAD.size else (b"", 0, 0)
    whole = magic == MAGIC and zlib.crc32(data[HEAD.size :]) == crc and 0 < count <= (len(data) - HEAD.size) // 2
    lengths = np.frombuffer(data, dtype="<u2", offset=HEAD.size, count=count).tolist() if whole else [0]
    if min(lengths) < 1:
        raise UsageError("The file is not a whole proof of this program.")
    return lengths, BitReader(data[HEAD.size + 2 * count :])


def usual_score(scorer: Contender, sample: Sample, chunk: int) -> float:
    """Nats of the sample the way a referee asks: whole rows, everything in sight; chunk by chunk where it adapts."""
    nats, width = 0.0, max(1, chunk // len(sample.rows)) if chunk else max(len(r) for r in sample.rows)
    longest = max(len(r) for r in sample.rows) - 1
    for low in range(0, longest, width):
        parts, names = [], []
        for n, row in enumerate(sample.rows):
            new = row[1 + low : 1 + low + width]
            if not new.size:
                continue
            seen = row[: 1 + low + new.size][None]
            if "score" in scorer.offers:
                scores = scorer.score(seen)[0]
            else:
                given = scorer.logprobs(seen[:, :-1])[0]
                scores = given[np.arange(given.shape[0]), seen[0, 1:]]
            nats -= float(scores[low:].sum(dtype=np.float64))
            parts.append(new)
            names.append(np.full(new.size, n + 1))
        whole = low + width <= longest
        if chunk and whole:
            scorer.adapt(np.concatenate(parts), np.concatenate(names))
    return nats


def report(sample: Sample, text_bytes: int, size: int, nats: float, same: bool, seconds: float) -> dict:
    """What the proof shows, and whether it holds."""
    overhead = LENGTH_BYTES * len(sample.rows) + HEAD.size
    claimed = nats / math.log(2) / 8
    agrees = abs(size - overhead - claimed) <= AGREEMENT * claimed + LAST_BYTES
    return {
        "documents": len(sample.rows), "targets": sample.targets, "text_bytes": text_bytes, "file_bytes": size,
        "overhead_bytes": overhead, "bpb_of_the_file": round(8 * (size - overhead) / text_bytes, 5),
        "bpb_of_the_score": round(8 * claimed / text_bytes, 5), "decoded": same, "agrees": agrees,
        "holds": same and agrees, "seconds": round(seconds, 2),
    }  # fmt: skip


def digest(rows: list[np.ndarray]) -> str:
    """sha256 of rows of tokens."""
    return hashlib.sha256(json.dumps([r.tolist() for r in rows]).encode()).hexdigest()
