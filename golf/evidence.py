"""Checks that need no scorer: sizes and claims, documents on both sides of the split, text stored in a submission."""

from __future__ import annotations

import base64
import binascii
import bz2
import contextlib
import hashlib
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from golf import casing, folders
from golf.bpb import ByteTable, documents
from golf.contender import Contender
from golf.data import Corpus
from golf.errors import UsageError
from golf.sheet import Sheet
from golf.submission import PUBLISHED_TOKENIZERS, Submission
from golf.tokenizer_file import USUAL_BYTES
from golf.validation import Tokenizer, Validation

WINDOW = 32  # bytes that must be equal for stored text, and between two looks at the validation text
MOST_AT_ONCE = 1 << 16  # places in a file that are compared at a time
MOST_TEXT = 64_000_000  # bytes of validation text that are looked for
STORED = 32  # windows, about a kilobyte, that a submission may share with the validation text by chance
OVERLAP_TOKENS, OVERLAP_SHARE = 32, 0.01  # a document is double when all its windows of so many tokens are
MOST_RUNS = 100_000  # of certainty, whose text is looked up
MOST_TRAIN = 50_000_000  # tokens of training text that are compared
SURE, LONG_RUN, NGRAM = 0.05, 24, 8  # nats, targets, tokens: runs of certainty over text that was never seen
UNSEEN = 256  # targets in such runs that an honest model may have
UNPACKED_LIMIT = 256_000_000
CLAIM = 1e-3  # relative, between a claimed score and the measured one
ODD = np.uint64(0x9E3779B97F4A7C15)


def claims(submission: Submission, validation: Validation, sheet: Sheet, official: bool) -> None:
    """Checks 7 to 10 as far as they are counting."""
    record, limits = submission.record, submission.limits
    sheet.see(7, record.val_bytes in (None, validation.bytes) or official,
              f"it claims {record.val_bytes} bytes, the text has {validation.bytes:,}")  # fmt: skip
    sheet.note(7, validation.evidence)
    targets = validation.tokens.size - 1
    sheet.see(8, record.val_tokens in (None, targets) or official,
              f"it claims {record.val_tokens} targets, the validation text has {targets:,}")  # fmt: skip
    left_out = ", without the partial last row" if official else ", the tail included"
    sheet.note(8, f"{validation.starts.size:,} documents, {targets:,} targets{left_out}, "
                  f"sha256 {validation.sha256[:12]}, {validation.source}")  # fmt: skip
    measured, stuffed = folders.sizes(submission.folder), validation.tokenizer.excess(validation.tokens)
    total = measured.total + stuffed
    sheet.see(9, total <= limits.bytes_cap, f"{total:,} bytes, {limits.bytes_cap:,} allowed (decimal)")
    strays = [n for n in measured.files if Path(n).suffix not in (".py", ".bin", ".zip")]
    also = f", among them {', '.join(strays[:3])}" if strays else ""
    sheet.note(9, f"{total:,} of {limits.bytes_cap:,} bytes in {len(measured.files)} files{also}")
    if stuffed:
        sheet.note(9, f"{stuffed:,} of them in a tokenizer of its own, beyond {USUAL_BYTES} a piece of the text")
    sheet.see(10, record.train_seconds <= limits.train_seconds,
              f"it was trained for {record.train_seconds:g} s, {limits.train_seconds:g} allowed")  # fmt: skip
    sheet.note(10, f"it says that it was trained for {record.train_seconds:g} of {limits.train_seconds:g} s")


def hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for each window of `length` tokens, (N - length + 1,) uint64."""
    count = max(0, tokens.size - length + 1)
    return mixed(np.zeros(count, dtype=np.uint64), (tokens[k : k + count] for k in range(length)))


def hashes_at(tokens: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """The same for the windows that begin at `places` only, uint64 of their shape."""
    return mixed(np.zeros(places.shape, dtype=np.uint64), (tokens[places + k] for k in range(length)))


def mixed(found: np.ndarray, columns: Iterable[np.ndarray]) -> np.ndarray:
    """Windows' first, second, ... tokens into their numbers, in place."""
    for column in columns:
        found *= ODD
        found += column.astype(np.uint64) + np.uint64(1)
    return found


def train_hashes(corpus: Corpus, length: int) -> Iterator[np.ndarray]:
    """Hashes of the training shards' windows, up to MOST_TRAIN tokens."""
    left = MOST_TRAIN
    for shard in corpus.shards("train"):
        for at in range(0, min(shard.size, left), 1 << 22):
            yield hashes(shard[at : at + (1 << 22) + length - 1], length)
        left -= shard.size
        if left <= 0:
            return


def disjoint(corpus: Corpus, sheet: Sheet) -> None:
    """Check 12: no validation document stands in the training shards."""
    if 12 in sheet.off:
        return
    try:
        tokens = np.concatenate(corpus.shards("val"))
        manifest = corpus.manifest.get("tokenizer", {})
        starts = np.flatnonzero(tokens == int(manifest.get("bos", 1)))
        ends = np.append(starts[1:], tokens.size)
        long_enough = ends - starts > OVERLAP_TOKENS
        starts, ends = starts[long_enough], ends[long_enough]
        if not starts.size:
            sheet.note(12, f"no validation document has more than {OVERLAP_TOKENS} tokens")
            return
        places = np.stack([starts + 1, (starts + 1 + ends - OVERLAP_TOKENS) // 2, ends - OVERLAP_TOKENS])  # (3, D)
        wanted = hashes_at(tokens, places, OVERLAP_TOKENS)
        ordered, back = np.unique(wanted, return_inverse=True)
        found = np.zeros(ordered.size, dtype=bool)
        looked = 0
        for part in train_hashes(corpus, OVERLAP_TOKENS):
            at = np.searchsorted(ordered, part).clip(max=ordered.size - 1)
            found[at[ordered[at] == part]] = True
            looked += part.size
    except UsageError as error:
        sheet.note(12, f"no training shards to look at ({error})")
        return
    seen = found[back].reshape(wanted.shape)
    double = int(seen.all(axis=0).sum())
    sheet.see(12, double <= OVERLAP_SHARE * starts.size,
              f"{double:,} of {starts.size:,} validation documents stand in the training shards")  # fmt: skip
    whole = "all" if looked >= corpus.tokens["train"] - OVERLAP_TOKENS * 8 else "the first"
    sheet.note(12, f"{double:,} of {starts.size:,} documents in {whole} {looked:,} training tokens")


class Room:
    """Bytes that unpacking one submission may give in all; what stands beyond is not searched."""

    def __init__(self, left: int = UNPACKED_LIMIT):
        self.left = left

    def take(self, data: bytes) -> bytes:
        data = data[: self.left]
        self.left -= len(data)
        return data


def unpacked(data: bytes, room: Room, depth: int = 3) -> Iterator[bytes]:
    """Data, and whatever decompressing it gives, as far as common formats and the room go; one at a time."""
    yield data
    if depth == 0:
        return
    for open_it in (
        lambda d, most: zlib.decompressobj().decompress(d, most),
        lambda d, most: zlib.decompressobj(31).decompress(d, most),
        lambda d, most: lzma.LZMADecompressor(memlimit=UNPACKED_LIMIT).decompress(d, most),
        lambda d, most: bz2.BZ2Decompressor().decompress(d, most),
        lambda d, most: zstandard.ZstdDecompressor(max_window_size=UNPACKED_LIMIT).stream_reader(d).read(most),
    ):
        if room.left < 1:
            return
        try:
            inner = room.take(open_it(data, room.left))
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, zstandard.ZstdError, MemoryError):
            continue
        if inner:
            yield from unpacked(inner, room, depth - 1)
    for literal in re.findall(rb"[\"']([!-~]{64,})[\"']", data):
        for decode in (base64.b85decode, base64.b64decode):
            try:
                yield from unpacked(room.take(decode(literal)), room, depth - 1)
            except (ValueError, binascii.Error):
                continue


def windows_of(text: bytes) -> np.ndarray:
    """Different WINDOW-byte pieces of a text, taken end to end, (N, WINDOW) uint8, by their first eight bytes as a
    number; those of few different characters left out."""
    count = len(text) // WINDOW
    pieces = np.frombuffer(text, dtype=np.uint8, count=count * WINDOW).reshape(count, WINDOW)
    varied = (np.sort(pieces, axis=1)[:, 1:] != np.sort(pieces, axis=1)[:, :-1]).sum(axis=1) >= 8
    pieces = np.unique(pieces[varied], axis=0)
    return pieces[np.argsort(first_words(pieces), kind="stable")]


def first_words(pieces: np.ndarray) -> np.ndarray:
    """The first eight bytes of pieces (N, WINDOW) as numbers, (N,) uint64."""
    return np.ascontiguousarray(pieces[:, :8]).view("<u8")[:, 0]


def shared_windows(data: bytes, pieces: np.ndarray) -> set[int]:
    """Which of a text's pieces stand anywhere in `data`."""
    if not len(pieces) or len(data) < WINDOW:
        return set()
    words = first_words(pieces)
    index = {piece.tobytes(): n for n, piece in enumerate(pieces)}
    raw = np.frombuffer(data, dtype=np.uint8)
    found: set[int] = set()
    for shift in range(8):
        part = raw[shift : shift + (raw.size - shift) // 8 * 8].view("<u8")
        at = np.searchsorted(words, part).clip(max=words.size - 1)
        places = shift + 8 * np.flatnonzero(words[at] == part)
        places = places[places <= raw.size - WINDOW]
        for some in np.array_split(places, places.size // MOST_AT_ONCE + 1):  # a file may hold one beginning 1e7 times
            here = np.ascontiguousarray(raw[some[:, None] + np.arange(WINDOW)]).view(f"V{WINDOW}")
            found.update(index[piece] for piece in set(here.ravel().tolist()) if piece in index)
    return found


def text_of(tokens: np.ndarray, tokenizer: Tokenizer | ByteTable) -> Iterator[bytes]:
    """The documents' text; one that was cut inside a character is left out."""
    for document in documents(tokens, tokenizer.bos):
        with contextlib.suppress(UnicodeDecodeError):
            yield tokenizer.decode(document)


def stored_text(submission: Submission, validation: Validation, corpus: Corpus | None, sheet: Sheet) -> None:
    """Check 13: pieces of the validation text in the files, or in a tokenizer's pieces. What the training text has too
    is no sign of anything."""
    if 13 in sheet.off:
        return
    tokens = validation.tokens[:MOST_TEXT]
    text = b"".join(text_of(tokens, validation.tokenizer))[:MOST_TEXT]
    needles = {"text": windows_of(text), "tokens": windows_of(tokens.astype("<u2").tobytes()[:MOST_TEXT])}
    found: dict[tuple[str, str], set[int]] = {}

    def look(where: str, part: bytes) -> None:
        for kind, pieces in needles.items():
            found.setdefault((kind, where), set()).update(shared_windows(part, pieces))

    room = Room()
    for path in folders.counted(submission.folder):
        for part in unpacked(path.read_bytes(), room):
            look("the files", part)
    name = PUBLISHED_TOKENIZERS.get(hashlib.sha256(validation.tokenizer.model).hexdigest())
    canonical = corpus is not None and validation.source == "shards"
    if validation.tokenizer.kind == "sentencepiece" and not name and not canonical:
        look("the tokenizer's pieces", b"\n".join(validation.tokenizer.table.text))
    usual = 0
    for (kind, where), pieces in found.items():
        known = in_training(needles[kind], pieces, corpus) if kind == "text" and len(pieces) >= STORED else set()
        usual, left = usual + len(known), len(pieces - known)
        sheet.see(13, left < STORED, f"{left:,} pieces of {WINDOW} bytes of the validation {kind} stand in {where}")
    most = max(map(len, found.values()), default=0)
    which = name or ("the data's own tokenizer" if canonical else "its pieces were searched")
    full = "" if room.left else f"; unpacked to {UNPACKED_LIMIT:,} bytes and no further"
    sheet.note(13, f"{most} shared pieces of {WINDOW} bytes ({usual} of them in the training text){full}; {which}")


def in_training(pieces: np.ndarray, found: set[int], corpus: Corpus | None) -> set[int]:
    """Which of the pieces that were found stand in the training text, up to MOST_TRAIN tokens of it."""
    if corpus is None:
        return set()
    table, here, known, left = ByteTable(corpus.tokenizer), sorted(found), set(), MOST_TRAIN
    for shard in corpus.shards("train"):
        for at in range(0, min(shard.size, left), 1 << 20):
            texts = text_of(shard[at : at + (1 << 20)], table)
            if corpus.transform == "case":
                texts = (casing.restore(t.decode(errors="replace")).encode() for t in texts)
            known |= shared_windows(b"".join(texts), pieces[here])
        left -= shard.size
        if left <= 0:
            break
    return {here[n] for n in known}


def certain_runs(scores: np.ndarray, tokens: np.ndarray, corpus: Corpus | None, sheet: Sheet) -> None:
    """Check 13: no long run of near-zero loss over text whose n-grams came neither before nor in training."""
    if 13 in sheet.off:
        return
    sure = np.concatenate([[False], -scores[1:] < SURE, [False]])
    edges = np.flatnonzero(np.diff(sure.astype(np.int8)))
    runs = edges.reshape(-1, 2)
    runs = runs[runs[:, 1] - runs[:, 0] >= LONG_RUN]
    longest = int((runs[:, 1] - runs[:, 0]).max(initial=0))
    if not len(runs):
        sheet.see(13, True, "")
        sheet.note(13, f"no run of {LONG_RUN} targets under {SURE} nats")
        return
    inside = np.concatenate([np.arange(a + 1, max(a + 2, b + 2 - NGRAM)) for a, b in runs[:MOST_RUNS].tolist()])
    inside = inside[inside <= tokens.size - NGRAM]
    windows = hashes_at(tokens, inside, NGRAM)
    known, place = np.unique(windows, return_inverse=True)
    first = np.full(known.size, tokens.size)  # where each stands for the first time
    for start in range(0, tokens.size, 1 << 22):
        part = hashes(tokens[start : start + (1 << 22) + NGRAM - 1], NGRAM)
        at = np.searchsorted(known, part).clip(max=known.size - 1)
        here = np.flatnonzero(known[at] == part)
        np.minimum.at(first, at[here], start + here)
    windows = windows[first[place] == inside]
    wanted = np.unique(windows)
    if corpus is not None and wanted.size and np.array_equal(tokens[:64], np.concatenate(corpus.shards("val"))[:64]):
        for part in train_hashes(corpus, NGRAM):
            at = np.searchsorted(wanted, part).clip(max=wanted.size - 1)
            wanted = np.delete(wanted, np.unique(at[wanted[at] == part]))
            if not wanted.size:
                break
    unseen = int(np.isin(windows, wanted).sum())
    fault = f"{unseen:,} targets in runs of up to {longest:,} cost nothing, and their text never came before"
    sheet.see(13, unseen < UNSEEN, fault)
    sheet.note(13, f"{len(runs)} runs of near-zero loss, the longest {longest:,}; {unseen} of their targets unseen")


def shut_in(contender: Contender, validation: Validation, sheet: Sheet) -> None:
    """Check 11: by namespaces it holds; a watched process can only be seen not to have been caught."""
    if validation.corpus_fingerprint.startswith("python"):
        sheet.note(11, f"{contender.isolation}, but the text is Python's own library, without which no scorer runs: "
                       "this verdict does not say that it is self-contained")  # fmt: skip
    elif contender.isolation == "isolated":
        sheet.see(11, True, "")
        sheet.note(11, "isolated: no network, and no file but the Python installation, system libraries and the "
                       "counted ones (namespaces)")  # fmt: skip
    else:
        sheet.note(11, f"only watched ({contender.reason}): this verdict does not say that it is self-contained")
