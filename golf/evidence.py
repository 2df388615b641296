"""Checks that need no scorer: sizes and claims, documents on both sides of the split, text stored in a submission."""

from __future__ import annotations

import base64
import binascii
import bz2
import hashlib
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from golf import folders
from golf.contender import Contender
from golf.data import Corpus
from golf.errors import UsageError
from golf.judging import Sheet
from golf.submission import Submission
from golf.validation import Validation

PUBLISHED_TOKENIZERS = {  # sha256 of models that are public, so that nothing can hide in their pieces
    "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a": "fineweb_1024_bpe",
    "0518df93315eaff6bc75ad4d9711b01c1b5e9ac32e8b3da603c040d8653f7f03": "fineweb_8192_bpe",
    "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d": "fineweb_8192_bpe_caseops",
}
WINDOW = 32  # bytes that must be equal for stored text, and between two looks at the validation text
MOST_TEXT = 64_000_000  # bytes of validation text that are looked for
STORED = 32  # windows, about a kilobyte, that a submission may share with the validation text by chance
OVERLAP_TOKENS, OVERLAP_SHARE = 32, 0.01  # a document is double when all its windows of so many tokens are
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
    measured = folders.sizes(submission.folder)
    sheet.see(9, measured.total <= limits.bytes_cap,
              f"{measured.total:,} bytes, {limits.bytes_cap:,} allowed (decimal)")  # fmt: skip
    strays = [n for n in measured.files if Path(n).suffix not in (".py", ".bin", ".zip")]
    also = f", among them {', '.join(strays[:3])}" if strays else ""
    sheet.note(9, f"{measured.total:,} of {limits.bytes_cap:,} bytes in {len(measured.files)} files{also}")
    sheet.see(10, record.train_seconds <= limits.train_seconds,
              f"it was trained for {record.train_seconds:g} s, {limits.train_seconds:g} allowed")  # fmt: skip


def hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for each window of `length` tokens, (N - length + 1,) uint64."""
    count = max(0, tokens.size - length + 1)
    found = np.zeros(count, dtype=np.uint64)
    for k in range(length):
        found *= ODD
        found += tokens[k : k + count].astype(np.uint64) + np.uint64(1)
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
        places = np.stack([starts + 1, (starts + 1 + ends - OVERLAP_TOKENS) // 2, ends - OVERLAP_TOKENS])  # (3, D)
        wanted = hashes(tokens, OVERLAP_TOKENS)[places]
        seen = np.zeros(wanted.size, dtype=bool)
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


def unpacked(data: bytes, depth: int = 3) -> Iterator[bytes]:
    """Data, and whatever decompressing it gives, as far as common formats go."""
    yield data
    if depth == 0:
        return
    for open_it in (
        lambda d: zlib.decompressobj().decompress(d, UNPACKED_LIMIT),
        lambda d: zlib.decompressobj(31).decompress(d, UNPACKED_LIMIT),
        lambda d: lzma.LZMADecompressor().decompress(d, UNPACKED_LIMIT),
        lambda d: bz2.BZ2Decompressor().decompress(d, UNPACKED_LIMIT),
        lambda d: zstandard.ZstdDecompressor().decompressobj().decompress(d)[:UNPACKED_LIMIT],
    ):
        try:
            inner = open_it(data)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, zstandard.ZstdError, MemoryError):
            continue
        if inner:
            yield from unpacked(inner, depth - 1)
    for literal in re.findall(rb"[\"']([!-~]{64,})[\"']", data):
        for decode in (base64.b85decode, base64.b64decode):
            try:
                yield from unpacked(decode(literal), depth - 1)
            except (ValueError, binascii.Error):
                continue


def shared_windows(data: bytes, text: np.ndarray) -> int:
    """How many WINDOW-byte pieces of `text`, taken end to end, stand anywhere in `data`."""
    count = text.size // WINDOW
    if count == 0 or len(data) < WINDOW:
        return 0
    pieces = text[: count * WINDOW].reshape(count, WINDOW)
    varied = (np.sort(pieces, axis=1)[:, 1:] != np.sort(pieces, axis=1)[:, :-1]).sum(axis=1) >= 8
    pieces = np.unique(pieces[varied], axis=0)
    if not len(pieces):
        return 0
    words = np.ascontiguousarray(pieces[:, :8]).view("<u8")[:, 0]
    order = np.argsort(words)
    words, pieces = words[order], pieces[order]
    raw = np.frombuffer(data, dtype=np.uint8)
    found = set()
    for shift in range(8):
        part = raw[shift : shift + (raw.size - shift) // 8 * 8].view("<u8")
        at = np.searchsorted(words, part).clip(max=words.size - 1)
        for n in np.flatnonzero(words[at] == part):
            place, index = shift + 8 * int(n), int(at[n])
            here = raw[place : place + WINDOW]
            while index < words.size and words[index] == part[n]:
                if here.size == WINDOW and np.array_equal(pieces[index], here):
                    found.add(index)
                index += 1
    return len(found)


def stored_text(submission: Submission, validation: Validation, corpus: Corpus | None, sheet: Sheet) -> None:
    """Check 13: pieces of the validation text in the files, or in a tokenizer's pieces."""
    if 13 in sheet.off:
        return
    tokens = validation.tokens[:MOST_TEXT]
    needles = {
        "text": validation.tokenizer.decode(tokens)[:MOST_TEXT] if validation.tokenizer.transform == "none" else b"",
        "tokens": tokens.astype("<u2").tobytes()[:MOST_TEXT],
    }
    control = b""
    if corpus is not None and corpus.tokens["train"]:
        first = next((s for s in corpus.shards("train") if s.size), np.zeros(0, "<u2"))
        try:
            control = validation.tokenizer.decode(first[: tokens.size])
        except (IndexError, UnicodeDecodeError):
            control = b""
    files = [p.read_bytes() for p in folders.counted(submission.folder)]
    hidden = [("the files", part) for data in files for part in unpacked(data)]
    name = PUBLISHED_TOKENIZERS.get(hashlib.sha256(validation.tokenizer.model).hexdigest())
    canonical = corpus is not None and validation.source == "shards"
    if validation.tokenizer.kind == "sentencepiece" and not name and not canonical:
        hidden.append(("the tokenizer's pieces", b"\n".join(validation.tokenizer.table.text)))
    by_chance = sum(shared_windows(part, np.frombuffer(control, dtype=np.uint8)) for _, part in hidden)
    total = 0
    for where, part in hidden:
        for kind, needle in needles.items():
            found = shared_windows(part, np.frombuffer(needle, dtype=np.uint8))
            total = max(total, found)
            sheet.see(13, found < STORED or found < 5 * (by_chance + 1),
                      f"{found:,} pieces of {WINDOW} bytes of the validation {kind} stand in {where}")  # fmt: skip
    which = name or ("the data's own tokenizer" if canonical else "its pieces were searched")
    sheet.note(13, f"{total} shared pieces of {WINDOW} bytes ({by_chance} with training text); {which}")


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
    windows = hashes(tokens, NGRAM)
    _, first = np.unique(windows, return_index=True)
    new = np.zeros(windows.size, dtype=bool)
    new[first] = True
    inside = np.concatenate([np.arange(a + 1, max(a + 2, b + 2 - NGRAM)) for a, b in runs.tolist()])
    inside = inside[(inside < windows.size) & new[inside.clip(max=windows.size - 1)]]
    wanted = np.unique(windows[inside])
    if corpus is not None and wanted.size and np.array_equal(tokens[:64], np.concatenate(corpus.shards("val"))[:64]):
        for part in train_hashes(corpus, NGRAM):
            at = np.searchsorted(wanted, part).clip(max=wanted.size - 1)
            wanted = np.delete(wanted, np.unique(at[wanted[at] == part]))
            if not wanted.size:
                break
    unseen = int(np.isin(windows[inside], wanted).sum())
    fault = f"{unseen:,} targets in runs of up to {longest:,} cost nothing, and their text never came before"
    sheet.see(13, unseen < UNSEEN, fault)
    sheet.note(13, f"{len(runs)} runs of near-zero loss, the longest {longest:,}; {unseen} of their targets unseen")


def shut_in(contender: Contender, sheet: Sheet) -> None:
    """Check 11: by namespaces it holds; a watched process can only be seen not to have been caught."""
    if contender.isolation == "isolated":
        sheet.see(11, True, "")
        sheet.note(11, "isolated: no network, and no file but the Python installation, system libraries and the "
                       "counted ones (namespaces)")  # fmt: skip
    else:
        sheet.note(11, f"only watched ({contender.reason}): this verdict does not say that it is self-contained")
