"""Documents on disk, their hashes in memory, and the split into train and validation."""

from __future__ import annotations

import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from golf.console import Stage
from golf.errors import UsageError
from golf.files import write_bytes
from golf.sources import Document

TIMES_UNIT = 1000  # of how often a document is trained on
VALIDATION_LEAST, VALIDATION_MOST = 300_000, 3_000_000


def digest(text: str) -> int:
    """64-bit hash of a document, equal for texts that differ in white space only."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


class Spool:
    """Documents in one file, with offset, length, hashes and topic of each in memory (some 40 bytes a document)."""

    COLUMNS = ("length", "content", "whole", "key", "topic", "given", "times")

    def __init__(self, path: Path):
        self.path = path
        self.topics: list[str] = []
        self.fingerprint = hashlib.sha256()

    def write(self, train: Iterator[Document], held_out: Iterator[Document], cut: int, stage: Stage) -> None:
        """Spool all documents; `given` marks those the user chose for validation."""
        columns = {name: array("Q") for name in self.COLUMNS}
        topics: dict[str, int] = {}
        with open(self.path, "wb") as out:
            for given, documents in ((0, train), (1, held_out)):
                for document in documents:
                    data = document.text.encode()
                    if not data.strip():
                        continue
                    self.fingerprint.update(len(data).to_bytes(8, "little") + data)
                    whole = digest(document.text)
                    key = digest(document.key) if document.key else whole
                    for piece in cut_pieces(document.text, cut) if cut and not given else [document.text]:
                        encoded = piece.encode()
                        out.write(encoded)
                        columns["length"].append(len(encoded))
                        columns["content"].append(whole if len(encoded) == len(data) else digest(piece))
                        columns["whole"].append(whole)
                        columns["key"].append(key)
                        columns["topic"].append(topics.setdefault(document.topic, len(topics)))
                        columns["given"].append(given)
                        columns["times"].append(round(document.times * TIMES_UNIT))
                    stage.advance(len(data))
        self.topics = list(topics)
        self.set_columns({name: np.frombuffer(c, dtype=np.uint64) for name, c in columns.items()})

    def set_columns(self, columns: dict[str, np.ndarray]) -> None:
        for name in self.COLUMNS:
            setattr(self, name, columns[name])
        self.offset = np.concatenate([[0], np.cumsum(self.length, dtype=np.uint64)])[:-1]

    def save(self) -> None:
        """Keep the index, so that an interrupted preparation need not read the documents again."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in self.COLUMNS})
        write_bytes(self.path.with_suffix(".npz"), buffer.getvalue())
        about = {"topics": self.topics, "fingerprint": self.hexdigest()}
        write_bytes(self.path.with_suffix(".json"), json.dumps(about).encode())

    @classmethod
    def load(cls, path: Path) -> Spool | None:
        """The spool of an interrupted preparation, if it was whole."""
        about = path.with_suffix(".json")
        if not about.exists():
            return None
        spool = cls(path)
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            spool.set_columns({name: stored[name] for name in cls.COLUMNS})
        stored = json.loads(about.read_text("utf-8"))
        spool.topics, spool.stored_fingerprint = stored["topics"], stored["fingerprint"]
        return spool

    stored_fingerprint = ""

    def forget(self) -> None:
        """What only the split needs."""
        for name in ("content", "whole", "key", "given", "times"):
            delattr(self, name)

    def hexdigest(self) -> str:
        return self.stored_fingerprint or self.fingerprint.hexdigest()

    def texts(self, indices: np.ndarray) -> Iterator[str]:
        """Documents by index, read from the file without mapping it, so that they do not count as memory."""
        with open(self.path, "rb") as stream:
            for i in indices:
                yield os.pread(stream.fileno(), int(self.length[i]), int(self.offset[i])).decode()


def cut_pieces(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters, cut after a line's end, else after a space; together they are the text."""
    start = 0
    while len(text) - start > size * 3 // 2:
        end = start + size
        near = text.rfind("\n", start + size // 2, end) + 1 or text.rfind(" ", start + size // 2, end) + 1 or end
        yield text[start:near]
        start = near
    yield text[start:]


def choose_validation(spool: Spool, share: float, threshold: int | None) -> tuple[np.ndarray, int]:
    """Mask of the validation documents and the hash threshold that chose them.

    Documents whose key hashes below the threshold are held out. The threshold is the smallest that gives the share of
    the bytes, clamped to 300 kB..3 MB; one that an earlier preparation of the folder used is kept, so that no
    document changes sides when others are added.
    """
    if threshold is None:
        free = np.flatnonzero(spool.given == 0)
        total = int(spool.length[free].sum())
        target = min(max(share * total, VALIDATION_LEAST), VALIDATION_MOST, total / 2)
        order = free[np.argsort(spool.key[free], kind="stable")]
        reached = np.cumsum(spool.length[order])
        last = min(int(np.searchsorted(reached, target)), order.size - 1)
        if last and reached[last] > max(target, VALIDATION_MOST):
            last -= 1  # a long document would pass the bound
        threshold = int(spool.key[order[last]])
    return spool.key <= np.uint64(threshold), threshold


def split(
    spool: Spool, share: float, threshold: int | None, also: bool = False
) -> tuple[np.ndarray, np.ndarray, int, int | None]:
    """Indices of train and validation documents, how many train documents were dropped, and the threshold.

    Validation is what the user gave, else a share; with `also` it is both. A train document equal, up to white space,
    to a validation document is dropped; one that is trained on k times and a part more stands k or k + 1 times.
    """
    held_out = spool.given.astype(bool)
    if also or not held_out.any():
        chosen, threshold = choose_validation(spool, share, threshold)
        held_out = held_out | chosen
    else:
        threshold = None
    train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    doubled = np.isin(spool.content[train], spool.content[validation])
    doubled |= np.isin(spool.whole[train], spool.whole[validation])  # also when one of them was cut
    train = train[~doubled]
    if not train.size or not validation.size:
        raise UsageError(
            f"{spool.length.size} documents cannot be split into train and validation; add text, "
            "or give the validation documents with --validation."
        )
    times = spool.times[train].astype(np.int64)
    part = np.random.default_rng(0).permutation(train.size) * TIMES_UNIT // max(1, train.size)
    repeats = times // TIMES_UNIT + (times % TIMES_UNIT > part)
    return np.repeat(train, repeats), validation, int(doubled.sum()), threshold
