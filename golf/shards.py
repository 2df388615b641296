"""Documents' tokens as numbered shards, and the original bytes of transformed ones beside them."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from golf import casing
from golf.bpb import SPACE, ByteTable
from golf.console import Stage
from golf.data import write_shard
from golf.errors import UsageError
from golf.files import write_bytes
from golf.shape import BOS
from golf.spool import Spool

BATCH_BYTES = 4_000_000  # text tokenised at a time
SIDECAR = "val_bytes_000000.bin"


def transformed(text: str, transform: str) -> str:
    """What the tokenizer sees of a text."""
    return casing.lower(text) if transform == "case" else text


@dataclass
class Counts:
    """What one split holds."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    counted_bytes: int = 0
    """Bytes that the tokens stand for: fewer than `bytes` where the tokenizer loses some; of transformed training text
    the transformed bytes, of validation text always the original ones."""
    lossy_documents: int = 0
    """Documents that do not decode to themselves."""
    files: list[str] = field(default_factory=list)


class ShardWriter:
    """Tokens of one split into numbered shards, with a note after each so that a rerun continues there."""

    def __init__(self, out: Path, name: str, shard_tokens: int, work: Path):
        self.out, self.name, self.shard_tokens = out, name, shard_tokens
        self.note = work / f"{name}.npz"
        self.counts, self.held = Counts(), 0
        self.tokens = np.empty(shard_tokens + BATCH_BYTES, dtype=np.uint16)  # memory only where it is written to
        if self.note.exists():
            with np.load(self.note, allow_pickle=False) as stored:
                self.counts = Counts(**json.loads(stored["counts"].tobytes()))
                self.add(stored["rest"])

    def add(self, tokens: np.ndarray) -> None:
        end = self.held + tokens.size
        if end > self.tokens.size:
            self.tokens = np.concatenate([self.tokens[: self.held], np.empty(end, dtype=np.uint16)])
        self.tokens[self.held : end] = tokens
        self.held = end

    def flush(self, last: bool = False) -> None:
        """Write full shards, and with `last` the rest; then note what is done."""
        if self.held < self.shard_tokens and not last:
            return
        while self.held >= self.shard_tokens or (last and self.held):
            count = min(self.held, self.shard_tokens)
            file = f"{self.name}_{len(self.counts.files):06d}.bin"
            write_shard(self.out / file, self.tokens[:count])
            self.counts.files.append(file)
            rest = self.tokens[count : self.held].copy()
            self.held = rest.size
            self.tokens[: self.held] = rest
        buffer = io.BytesIO()
        counts = np.frombuffer(json.dumps(asdict(self.counts)).encode(), dtype=np.uint8)
        np.savez(buffer, counts=counts, rest=self.tokens[: self.held])
        write_bytes(self.note, buffer.getvalue())


def encode_batch(table: ByteTable, texts: list[str]) -> list[list[int]]:
    """Tokens of each document, without BOS; documents with a literal U+2581 go the slow way."""
    rows = table.processor.encode([t if SPACE not in t else "" for t in texts], num_threads=os.cpu_count() or 1)
    for i, text in enumerate(texts):
        if SPACE in text:
            rows[i] = table.encode(text)
    return rows


def token_bytes(table: ByteTable, text: str, tokens: np.ndarray) -> np.ndarray:
    """Bytes of the original text that each token of transformed text stands for, uint16 (N,), BOS's included.

    Raises UsageError when the tokens are not those of the text.
    """
    characters = casing.lower(text)
    of_byte = np.zeros(len(characters.encode()), dtype=np.int64)
    starts = np.cumsum([0, *(len(c.encode()) for c in characters)])[:-1]
    of_byte[starts] = casing.widths(text)
    sums = np.concatenate(([0], np.cumsum(of_byte)))
    ends = np.concatenate(([0], np.cumsum(table.length[tokens])))
    if ends[-1] != of_byte.size:
        raise UsageError("The tokenizer loses bytes of the transformed text; use one with identity normalisation.")
    return np.diff(sums[ends]).astype(np.uint16)


def write_sidecar(spool: Spool, indices: np.ndarray, table: ByteTable, out: Path) -> tuple[str, int]:
    """Beside validation tokens of transformed text: the original bytes of each, as one shard. Its name and the sum."""
    parts = []
    for text in spool.texts(indices):
        tokens = np.array([BOS, *table.encode(casing.lower(text))])
        parts.append(token_bytes(table, text, tokens))
    found = np.concatenate(parts)
    write_shard(out / SIDECAR, found)
    return SIDECAR, int(found.sum())


def write_split(
    spool: Spool, indices: np.ndarray, table: ByteTable, writer: ShardWriter, stage: Stage, transform: str = "none"
) -> Counts:
    """Tokenise documents in order and write them as shards, BOS before each."""
    counts = writer.counts
    indices = indices[counts.documents :]
    stage.advance(counts.bytes)
    batch: list[str] = []
    size = 0

    def encode() -> None:
        rows = encode_batch(table, [transformed(text, transform) for text in batch])
        decoded = table.processor.decode(rows, num_threads=os.cpu_count() or 1)
        for text, row, back in zip(batch, rows, decoded, strict=True):
            tokens = np.array([BOS, *row], dtype=np.uint16)
            length = len(text.encode())
            counted = table.count(tokens[:-1], tokens[1:])
            counts.documents += 1
            counts.bytes += length
            counts.tokens += tokens.size
            counts.counted_bytes += counted
            counts.lossy_documents += back != transformed(text, transform)
            writer.add(tokens)
        writer.flush()
        stage.advance(size)
        batch.clear()

    for text in spool.texts(indices):
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            encode()
            size = 0
    if batch:
        encode()
    writer.flush(last=True)
    return counts
