"""Bits per byte: nats from the model, bytes from the original text.

The contest counts a piece's UTF-8 bytes, a leading U+2581 as one byte, a byte-fallback piece as one, a control
piece as none. Here those counts are also checked against the decoded text, so that a tokenizer which loses bytes
is found and refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf.errors import UsageError

SPACE = "\u2581"
PART = 1000  # documents counted at a time


@dataclass(frozen=True)
class Score:
    """Summed nats over `tokens` targets that stand for `bytes` bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits a byte."""
        return self.nats / math.log(2) / self.bytes


class ByteTable:
    """What each piece of a SentencePiece model stands for, in bytes.

    Raises UsageError for a tokenizer that cannot count bytes: no byte fallback, or no piece for a bare space.
    """

    def __init__(self, model: bytes | Path):
        import sentencepiece

        try:
            proto = model.read_bytes() if isinstance(model, Path) else model
            self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        except OSError as error:
            raise UsageError(f"Tokenizer {model} cannot be read ({error.strerror}).") from error
        except (RuntimeError, ValueError) as error:
            name = model if isinstance(model, Path) else "given"
            raise UsageError(f"Tokenizer {name} is not a SentencePiece model.") from error
        self.vocab_size = len(pieces)
        if SPACE not in pieces:
            raise UsageError(
                "The tokenizer has no piece for a bare space (U+2581), so bytes counted from its pieces are wrong; "
                "use one that has it."
            )
        if not any(sp.is_byte(i) for i in range(self.vocab_size)):
            raise UsageError(
                "The tokenizer has no byte fallback, so characters it does not know are lost; use one that has it."
            )
        self.text = [self.piece_bytes(i, piece) for i, piece in enumerate(pieces)]
        self.boundary = np.array([sp.is_control(i) or sp.is_unused(i) for i in range(self.vocab_size)])
        self.unknown = sp.unk_id()
        self.bos = sp.bos_id()
        self.length = np.array([len(t) for t in self.text], dtype=np.int32)
        self.spaced = np.array([p.startswith(SPACE) and not sp.is_byte(i) for i, p in enumerate(pieces)])
        # With a dummy prefix the first space of a document is the tokenizer's, not the text's.
        spaced = int(np.argmax(self.spaced))
        self.drops_first_space = not sp.decode([spaced]).startswith(" ")

    def piece_bytes(self, index: int, piece: str) -> bytes:
        sp = self.processor
        if sp.is_control(index) or sp.is_unused(index) or sp.is_unknown(index):
            return b""
        if sp.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Tokens of a document, without BOS. A literal U+2581, which the model would take for a space, is bytes."""
        if SPACE not in text:
            return self.processor.encode(text)
        fallback = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        tokens: list[int] = []
        for index, part in enumerate(text.split(SPACE)):
            tokens += (fallback if index else []) + (self.processor.encode(part) if part else [])
        return tokens

    def decode(self, tokens: list[int] | np.ndarray) -> bytes:
        """The bytes that tokens of one document stand for; control pieces stand for none."""
        text = b"".join(self.text[t] for t in tokens)
        first = next((t for t in tokens if not self.boundary[t]), None)
        if self.drops_first_space and first is not None and self.spaced[first]:
            text = text[1:]
        return text

    def count(self, previous: np.ndarray, targets: np.ndarray) -> int:
        """Bytes of `targets`, each after its token in `previous`; any shape. Raises UsageError on an unknown piece."""
        return int(self.sizes(previous, targets).sum(dtype=np.int64))

    def sizes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes of each of `targets`, each after its token in `previous`: int32 of their shape. Raises UsageError on an
        unknown piece."""
        if (targets == self.unknown).any():
            raise UsageError("The tokens hold the unknown piece, which loses bytes; use one with byte fallback.")
        found = self.length[targets]
        return found - (self.spaced[targets] & self.boundary[previous]) if self.drops_first_space else found


def documents(tokens: np.ndarray, bos: int) -> Iterator[np.ndarray]:
    """Cut a row of tokens at each BOS; the pieces come without it."""
    starts = np.flatnonzero(tokens == bos)
    if tokens.size and (not starts.size or starts[0] != 0):
        yield tokens[: starts[0] if starts.size else tokens.size]
    for start, end in zip(starts, [*starts[1:], tokens.size], strict=True):
        yield tokens[start + 1 : end]


def bytes_of_documents(table: ByteTable, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Bytes of each document of a stream as the table counts them, (D,) int64; `starts` (D,) is where they begin. The
    stream's first token is never a target. Raises UsageError on an unknown piece."""
    found = np.zeros(starts.size, dtype=np.int64)
    for at in range(0, starts.size, PART):
        low = int(starts[at])
        high = int(starts[at + PART]) if at + PART < starts.size else tokens.size
        first = max(low, 1)
        lengths = np.zeros(high - low, dtype=np.int64)
        lengths[first - low :] = table.sizes(tokens[first - 1 : high - 1], tokens[first:high])
        found[at : at + PART] = np.add.reduceat(lengths, starts[at : at + PART] - low)
    return found


def decoded_bytes(table: ByteTable, tokens: np.ndarray) -> int:
    """Bytes of the text as the tokenizer's own library decodes it, document by document."""
    total, rows = 0, documents(np.asarray(tokens), table.bos)
    while batch := [d.tolist() for d in itertools.islice(rows, PART)]:
        total += sum(len(text.encode()) for text in table.processor.decode(batch))
    return total


def windows(tokens: np.ndarray, length: int, rows: int, whole_only: bool = False) -> Iterator[tuple[np.ndarray, ...]]:
    """Disjoint rows over a stream of tokens, each target exactly once: (inputs, targets), int64 (B, T) each.

    The last row is shorter; `whole_only` leaves it out, as the contest's trainer does.
    """
    targets = tokens.size - 1
    full = targets // length
    for first in range(0, full, rows):
        count = min(rows, full - first)
        part = np.asarray(tokens[first * length : (first + count) * length + 1], dtype=np.int64)
        yield part[:-1].reshape(count, length), part[1:].reshape(count, length)
    if full * length < targets and not whole_only:
        part = np.asarray(tokens[full * length :], dtype=np.int64)
        yield part[None, :-1], part[None, 1:]
