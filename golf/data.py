"""Token shards in the contest's public format, and the batches a rank reads from them.

A shard is 256 little-endian int32 (20240520, 1, token count, zeros), then that many uint16 tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from golf.errors import UsageError
from golf.files import read_plain, write_bytes

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4


def shard_header(tokens: int) -> bytes:
    """The 1,024 bytes before a shard's tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard from a 1-D array of tokens below 65,536."""
    if tokens.ndim != 1 or (tokens.size and (tokens.min() < 0 or tokens.max() > 0xFFFF)):
        raise ValueError("a shard holds one row of tokens from 0 to 65,535")
    write_bytes(path, shard_header(tokens.size), np.ascontiguousarray(tokens, dtype="<u2").data)


def read_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens, uint16 (N,). Raises UsageError for a file that is not a whole shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UsageError(f"Shard {path} cannot be read ({error.strerror}); prepare the data again.") from error
    if header.size < HEADER_INTS or header[0] != MAGIC:
        raise UsageError(f"{path} is not a token shard (no magic {MAGIC} at its start); prepare the data again.")
    if header[1] != VERSION:
        raise UsageError(f"Shard {path} has format version {header[1]}, this program reads {VERSION}.")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise UsageError(f"Shard {path} should hold {header[2]} tokens but is {size} bytes long; prepare it again.")
    if header[2] == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


class Corpus:
    """A folder that `python -m golf.prepare` wrote: manifest.json, tokenizer.model, train_*.bin and val_*.bin."""

    def __init__(self, folder: Path | str, option: str = "--run.data"):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest = json.loads(read_plain(path, links=True))
        except OSError as error:
            raise UsageError(
                f"{option} {folder}: no {path.name} there ({error.strerror}); run python -m golf.prepare first."
            ) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{option} {folder}: {path.name} is not JSON ({error}); prepare it again.") from error
        try:
            self.name = str(self.manifest["name"])
            self.fingerprint = str(self.manifest["fingerprint"])
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.files = {
                split: [str(f) for f in self.manifest["splits"][split]["files"]] for split in ("train", "val")
            }
            self.tokens = {split: int(self.manifest["splits"][split]["tokens"]) for split in ("train", "val")}
            self.val_bytes = int(self.manifest["splits"]["val"]["counted_bytes"])
            if wrong := [f for names in self.files.values() for f in names if Path(f).name != f]:
                raise ValueError(f"plain names of shards ({wrong[0]!r:.60} is none)")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{option} {folder}: {path.name} lacks {error}; prepare it again.") from error

    @property
    def transform(self) -> str:
        """What was done to the text before the tokenizer saw it: none or case."""
        return str(self.manifest["tokenizer"].get("transform", "none"))

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def has_its_tokenizer(self) -> bool:
        """Whether tokenizer.model is the one that made the shards. Raises UsageError when it cannot be read."""
        try:
            found = hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"{self.tokenizer} cannot be read ({error.strerror}); prepare the data again.") from error
        return found == self.manifest["tokenizer"].get("sha256")

    def shards(self, split: str) -> list[np.ndarray]:
        """The split's shards, every header checked. Raises UsageError for a missing or damaged one."""
        shards = [read_shard(self.folder / name) for name in self.files[split]]
        found = sum(s.size for s in shards)
        if found != self.tokens[split]:
            raise UsageError(f"The {split} shards in {self.folder} hold {found} tokens, not {self.tokens[split]}.")
        return shards

    def check(self, vocab_size: int, sequence_length: int) -> None:
        """Refuse, before any time is spent, data that the model cannot train on. Raises UsageError."""
        if self.vocab_size != vocab_size:
            raise UsageError(
                f"--shape.vocab-size {vocab_size}: the tokenizer in {self.folder} has {self.vocab_size} pieces, "
                "give that number or other data."
            )
        if not self.has_its_tokenizer():
            raise UsageError(f"{self.tokenizer} is not the tokenizer that made the shards; prepare the data again.")
        for split in ("train", "val"):
            for name, shard in zip(self.files[split], self.shards(split), strict=True):
                top = max((int(shard[i : i + 2**24].max()) for i in range(0, shard.size, 2**24)), default=0)
                if top >= vocab_size:
                    raise UsageError(
                        f"Shard {self.folder / name} holds token {top}, the vocabulary ends at {vocab_size}."
                    )
        for split in ("train", "val"):
            if self.tokens[split] <= sequence_length:
                raise UsageError(
                    f"--recipe.sequence-length {sequence_length}: the {split} split in {self.folder} has only "
                    f"{self.tokens[split]} tokens, give a shorter sequence or more text."
                )


def complete(folder: Path, request: dict) -> dict:
    """The manifest of `folder` when it was written for this request and every file it names is whole, else {}."""
    try:
        corpus = Corpus(folder)
        whole = all(corpus.shards(split) for split in ("train", "val")) and corpus.has_its_tokenizer()
        return corpus.manifest if whole and corpus.manifest.get("request") == request else {}
    except UsageError:
        return {}


def state_of(shard: np.ndarray) -> os.stat_result | None:
    """The state of a mapped shard's file; none where it was deleted, which leaves it readable."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(shard.filename) if isinstance(shard, np.memmap) else None


def untouched(shard: np.ndarray, before: os.stat_result | None) -> np.ndarray:
    """The same shard, its file neither cut, which would end the process that reads past its end, nor written to since
    `before`; a file that took its place is another. Raises UsageError."""
    now = state_of(shard)
    if before and now and now.st_ino == before.st_ino:
        if now.st_size < before.st_size:
            raise UsageError(f"Shard {shard.filename} was cut to {now.st_size:,} bytes while it was read.")
        if now.st_mtime_ns != before.st_mtime_ns:
            raise UsageError(f"Shard {shard.filename} was written to while it was read.")
    return shard


class TokenStream:
    """The shards as one endless row of tokens: read in order, over and over."""

    def __init__(self, shards: list[np.ndarray], vocab_size: int = 1 << 16):
        self.vocab_size = vocab_size
        self.shards = [s for s in shards if s.size]
        self.states = [state_of(s) for s in self.shards]
        self.total = sum(s.size for s in self.shards)
        self.starts = np.cumsum([0] + [s.size for s in self.shards])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the endless row, int64 (count,)."""
        parts, start = [], start % self.total
        while count > 0:
            index = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = untouched(self.shards[index], self.states[index])[start - self.starts[index] :][:count]
            if (top := part.max(initial=0)) >= self.vocab_size:
                name = getattr(self.shards[index], "filename", None) or index
                raise UsageError(f"Shard {name} holds token {top}, the vocabulary ends at {self.vocab_size}: it was "
                                 "changed.")  # fmt: skip
            parts.append(part)
            count -= part.size
            start = (start + part.size) % self.total
        return np.concatenate(parts).astype(np.int64)


def coprime_stride(rows: int) -> int:
    """A stride through so many rows that visits each once, about 0.618 of them: neighbours in time lie far apart."""
    stride = max(1, round(rows * 0.6180339887))
    while math.gcd(stride, rows) != 1:
        stride += 1
    return stride


def batches(
    stream: TokenStream, batch_tokens: int, length: int, loader: str = "sequential", rank: int = 0, world: int = 1,
    micro_rows: int = 0, step: int = 0,
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """For each step the rank's micro-batches of (inputs, targets), int64 (rows, length) each.

    `sequential` takes a batch's rows one after the other from the stream, as the contest's trainer does. `lanes` cuts
    the stream into as many lanes as a batch has rows, and row r continues lane r, so that a batch mixes distant text.
    `strided` visits all rows of the stream in steps that are coprime to their number, then begins again.
    Rows are dealt to ranks in blocks, so that any world size that divides the rows sees the same batch.
    """
    batch_rows = batch_tokens // length
    rows = batch_rows // world
    micro = micro_rows or rows
    while True:
        numbers = np.arange(rank * rows, (rank + 1) * rows)
        if loader == "lanes":
            starts = numbers * (stream.total // batch_rows) + step * length
        elif loader == "strided":
            starts = (
                (step * batch_rows + numbers)
                * coprime_stride(stream.total // length)
                % max(1, stream.total // length)
                * length
            )
        else:
            starts = (step * batch_rows + numbers) * length
        tokens = np.stack([stream.read(int(start), length + 1) for start in starts])  # (rows, length + 1)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        yield [(inputs[i : i + micro], targets[i : i + micro]) for i in range(0, rows, micro)]
        step += 1


def ahead(source: Iterator) -> Iterator:
    """The same items of an endless source, the next one fetched by a thread while this one is worked on. What the
    source raises is raised where its item would be."""
    with ThreadPoolExecutor(1) as fetching:
        coming = fetching.submit(next, source)
        while True:
            item = coming.result()
            coming = fetching.submit(next, source)
            yield item
