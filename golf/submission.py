"""What a submission says of itself in submission.json: its tokenizer, and how it wants to be asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from golf import records
from golf.config import TRACKS, Track
from golf.errors import UsageError
from golf.files import read_plain

PUBLISHED_TOKENIZERS = {  # sha256 of models that are public, so that nothing can hide in them
    "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a": "fineweb_1024_bpe",
    "0518df93315eaff6bc75ad4d9711b01c1b5e9ac32e8b3da603c040d8653f7f03": "fineweb_8192_bpe",
    "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d": "fineweb_8192_bpe_caseops",
}
KINDS, TRANSFORMS, PRECISIONS = ("sentencepiece", "bytes"), ("none", "case"), ("float32", "bfloat16")
LONGEST = 1 << 20  # tokens a row
TOKENIZER_BYTES = 1 << 26


@dataclass(frozen=True)
class Declared:
    """A tokenizer: its kind, the model file in the folder, that file's sha256, and a transform of the text before."""

    kind: str = "sentencepiece"
    file: str = "tokenizer.model"
    sha256: str = ""
    transform: str = "none"


@dataclass(frozen=True)
class Submission:
    """A folder and what it declares."""

    folder: Path
    record: records.Record
    tokenizer: Declared
    context: int
    """Tokens of a row at most."""
    stride: int
    """Targets that each row adds; less than the context for sliding windows."""
    chunk: int
    """Targets between two calls of adapt; 0 asks for all at once."""
    adapts: bool
    precision: str
    """float32, or bfloat16 where sums depend on the shape of a batch by more."""
    content_shapes: bool
    """Whether the scorer's inner shapes depend on what it reads, as with gathered adaptive depth."""

    @property
    def limits(self) -> Track:
        return TRACKS[self.record.track]


def choice(folder: Path, name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise UsageError(f"{folder}/submission.json: {name} is {value!r:.60}, give one of {', '.join(allowed)}.")


def number(folder: Path, name: str, value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{folder}/submission.json: {name} {value!r:.60} is not from {least} to {most}.")
    return value


def declared_tokenizer(folder: Path, record: records.Record) -> Declared:
    """The tokenizer that a record declares; older records give its sha256 alone. Raises UsageError."""
    told = record.tokenizer
    unknown = sorted(set(told) - {"kind", "file", "sha256", "transform"})
    if unknown or any(not isinstance(v, str) for v in told.values()):
        raise UsageError(f"{folder}/submission.json: tokenizer has {unknown or 'values that are not text'}.")
    declared = Declared(**{"sha256": record.tokenizer_sha256, **told})
    choice(folder, "tokenizer.kind", declared.kind, KINDS)
    choice(folder, "tokenizer.transform", declared.transform, TRANSFORMS)
    if Path(declared.file).name != declared.file or declared.file.startswith(".") or not declared.file.isprintable():
        raise UsageError(f"{folder}/submission.json: tokenizer.file {declared.file!r:.60} is not a plain name.")
    return declared


def read(folder: Path) -> Submission:
    """A submission's declarations. Raises UsageError for those that no referee can follow."""
    record = records.read(folder)
    choice(folder, "track", record.track, tuple(TRACKS))
    context = number(folder, "context", record.context, 2, LONGEST)
    stride = number(folder, "stride", record.stride or context, 1, context)
    chunk = number(folder, "chunk", record.chunk, 0, 1 << 40)
    if record.adapts and not chunk:
        raise UsageError(f"{folder}/submission.json: it adapts, so chunk must say after how many tokens.")
    choice(folder, "precision", record.precision, PRECISIONS)
    return Submission(
        folder, record, declared_tokenizer(folder, record), context, stride, chunk if record.adapts else 0,
        record.adapts, record.precision, record.content_shapes,
    )  # fmt: skip


def tokenizer_bytes(submission: Submission, given: bytes) -> bytes:
    """The model file that was declared: the data's own, `given`, where the hash says so, else the folder's.

    Raises UsageError when neither is the one that was declared.
    """
    declared = submission.tokenizer
    if declared.kind == "bytes":
        return b""
    if declared.sha256 in ("", hashlib.sha256(given).hexdigest()):
        return given
    path = submission.folder / declared.file
    try:
        own = read_plain(path, TOKENIZER_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(own).hexdigest() != declared.sha256:
        raise UsageError(f"{path}: its sha256 is not the declared tokenizer's {declared.sha256[:12]}...")
    return own
