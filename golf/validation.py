"""The text that a score is about: its tokens, its documents, and its bytes counted from the original text."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from golf import casing
from golf.bpb import ByteTable, bytes_of_documents, decoded_bytes, documents
from golf.contender import Invalid
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import lines_of
from golf.submission import PUBLISHED_TOKENIZERS, Submission, tokenizer_bytes
from golf.tokenizer_file import excess, lean

BYTES_BOS = 256  # opens a document where tokens are bytes
ENCODED_AGAIN = 20_000_000  # bytes of text up to which shards are decoded and encoded again
SHARDS_MODE = "score it on published shards with their own tokenizer (--data FOLDER of shards) instead"


class ByteVocabulary:
    """Bytes as tokens, and 256 before each document."""

    vocab_size, bos = 257, BYTES_BOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: np.ndarray) -> bytes:
        return bytes(int(t) for t in tokens if t < 256)

    def count(self, previous: np.ndarray, targets: np.ndarray) -> int:
        return int((targets < 256).sum())


class Tokenizer:
    """A declared tokenizer as the referee runs it. Scorers get `shown`: the file itself where it is the data's own or
    published, else its vocabulary alone, of which what is more than a vocabulary of the text counts."""

    def __init__(self, submission: Submission, given: bytes):
        self.model = tokenizer_bytes(submission, given)
        self.kind, self.transform = submission.tokenizer.kind, submission.tokenizer.transform
        try:
            self.table = ByteVocabulary() if self.kind == "bytes" else ByteTable(self.model)
        except UsageError as error:
            raise Invalid(f"{str(error)[0].lower()}{str(error)[1:-1]}", 7) from error
        self.vocab_size, self.bos = self.table.vocab_size, self.table.bos
        if self.bos < 0:
            raise Invalid("the tokenizer has no piece that opens a document (BOS)", 7)
        known = self.model == given or hashlib.sha256(self.model).hexdigest() in PUBLISHED_TOKENIZERS
        try:
            self.shown = self.model if known or self.kind == "bytes" else lean(self.model)
        except ValueError as error:
            raise Invalid(f"the tokenizer cannot be read ({error})", 7) from error
        self.known = known or self.kind == "bytes"

    def excess(self, tokens: np.ndarray) -> int:
        """Bytes of what is shown that count: more than pieces of the text usually take."""
        return 0 if self.known else excess(self.shown, np.unique(tokens).size)

    def encode(self, text: str) -> list[int]:
        return self.table.encode(casing.lower(text) if self.transform == "case" else text)

    def decode(self, tokens: np.ndarray | list[int]) -> bytes:
        found = self.table.decode(tokens)
        if self.transform != "case":
            return found
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(found)  # one that is cut at its end waits
        return casing.restore(text).encode()


@dataclass(frozen=True)
class Validation:
    """The whole validation text as one stream of tokens."""

    tokens: np.ndarray  # (N,) uint16 or uint32; a BOS opens each document
    starts: np.ndarray  # (D,) where the documents begin
    bytes: int
    """Of the original text of all targets."""
    counted: np.ndarray  # (D,) int64 bytes of each document
    source: str
    """shards, text of shards, or documents."""
    tokenizer: Tokenizer
    evidence: str
    """How the round trip went."""
    corpus: str = ""
    corpus_fingerprint: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest()

    def bytes_of(self, targets: int) -> int:
        """Bytes of the first so many targets."""
        if targets == self.tokens.size - 1:
            return self.bytes
        whole = int(np.searchsorted(self.starts, targets + 1)) - 1  # documents that end before them
        first = int(self.starts[whole])
        return int(self.counted[:whole].sum()) + len(self.tokenizer.decode(self.tokens[first : targets + 1]))


def read_documents(path: Path) -> Iterator[str]:
    """Texts of a JSON-lines file, plain or .zst. Raises UsageError for a line that holds none."""
    try:
        with zstandard.open(path, "rb") if path.suffix == ".zst" else open(path, "rb") as stream:
            for number, line in enumerate(lines_of(io.BufferedReader(stream)), 1):
                try:
                    text = json.loads(line)["text"]
                    text.encode()
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise UsageError(f"--data {path}: line {number} has no readable text ({error!r:.80}).") from error
                yield text
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise UsageError(f"--data {path}: it cannot be read ({error}).") from error


def from_texts(texts: Iterator[str], tokenizer: Tokenizer, source: str, **about: str) -> Validation:
    """Encode documents, each decoded again and compared with the original. Raises Invalid where bytes are lost."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows, starts, counted, lost, at = [], [], [], 0, 0
    for text in texts:
        tokens = np.array([tokenizer.bos, *tokenizer.encode(text)], dtype=kind)
        original = text.encode()
        lost += tokenizer.decode(tokens) != original
        rows.append(tokens)
        starts.append(at)
        counted.append(len(original))
        at += tokens.size
    if not rows:
        raise UsageError("The validation text has no documents, give --data with some.")
    if lost:
        raise Invalid(
            f"the tokenizer does not give back {lost:,} of {len(rows):,} documents byte for byte; {SHARDS_MODE}", 7
        )
    evidence = f"{len(rows):,} of {len(rows):,} documents come back byte for byte"
    return Validation(
        np.concatenate(rows), np.array(starts), sum(counted), np.array(counted), source, tokenizer, evidence, **about
    )  # fmt: skip


def from_shards(corpus: Corpus, tokenizer: Tokenizer) -> Validation:
    """Published tokens as they are, their bytes counted from the decoded text and from the table, which must agree."""
    table = tokenizer.table
    tokens = np.concatenate(corpus.shards("val"))
    if int(tokens.max(initial=0)) >= table.vocab_size:
        raise UsageError(
            f"--data {corpus.folder}: a validation token exceeds the tokenizer's {table.vocab_size} pieces."
        )
    by_text = decoded_bytes(table, tokens)
    starts = np.flatnonzero(tokens == tokenizer.bos)
    if not starts.size or starts[0]:
        starts = np.concatenate([[0], starts])
    counted = bytes_of_documents(table, tokens, starts)
    by_table = int(counted.sum())
    if by_table != by_text:
        raise UsageError(
            f"The validation text decodes to {by_text:,} bytes but the token table counts {by_table:,}; "
            "the tokenizer does not fit these shards."
        )
    differing = again = seen = 0
    for document in documents(tokens, tokenizer.bos):
        if seen > ENCODED_AGAIN:
            break
        text = table.processor.decode(document.tolist())
        differing += table.encode(text) != document.tolist()
        again += 1
        seen += len(text)
    told = f"{by_text:,} bytes by the decoded text and by the table; {differing:,} of {again:,} documents encode "
    told += "differently again" + ("" if again == starts.size else f" ({starts.size - again:,} not tried)")
    return Validation(
        tokens, starts, by_text, counted, "shards", tokenizer, told, corpus.name, corpus.fingerprint
    )  # fmt: skip


def load(data: Path, submission: Submission) -> Validation:
    """The validation text in `data`, a prepared folder or a JSON-lines file, as the submission's tokenizer cuts it.

    Raises UsageError for data that cannot be read or hold no text, and Invalid for a tokenizer that loses bytes.
    """
    text = read_text(data, submission)
    if not text.bytes:
        raise UsageError(f"--data {data}: its validation text is empty, give some.")
    return text


def read_text(data: Path, submission: Submission) -> Validation:
    if data.is_file():
        return from_texts(read_documents(data), Tokenizer(submission, b""), "documents", corpus=data.name)
    corpus = Corpus(data, "--data")
    canonical = corpus.tokenizer.read_bytes() if corpus.tokenizer.is_file() else b""
    tokenizer = Tokenizer(submission, canonical)
    if tokenizer.model == canonical and tokenizer.transform == corpus.transform == "none":
        return from_shards(corpus, tokenizer)
    table = ByteTable(canonical)
    stream = documents(np.concatenate(corpus.shards("val")), table.bos)
    texts = (table.processor.decode(d.tolist()) for d in stream)
    if corpus.transform == "case":
        texts = map(casing.restore, texts)
    return from_texts(
        texts, tokenizer, "text of shards", corpus=corpus.name, corpus_fingerprint=corpus.fingerprint
    )  # fmt: skip
