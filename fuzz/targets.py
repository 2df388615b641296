"""What a stranger's bytes may reach: each target takes bytes and may only return, or raise UsageError.

Where a file carries a checksum the target puts a right one in, so that mutations get past it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import codec, lint, log_file, prove, records, report, run_list, search, submission, verdicts
from golf.bpb import ByteTable
from golf.checkpoint import read_tensors
from golf.data import Corpus, read_shard
from golf.errors import UsageError
from golf.plan import read_plan
from golf.sources import read_file
from golf.texts import read_topics
from golf.tokenizer_file import lean
from golf.validation import read_documents

PLACE = Path(tempfile.mkdtemp(prefix="golf-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def file_of(data: bytes, name: str) -> Path:
    """The bytes as a file, alone in an empty folder of its name."""
    folder = PLACE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data)
    return folder / name


def artifact(data: bytes) -> None:
    """A packed model: refused, or finite weights of the declared shapes."""
    if len(data) > codec.PREFIX.size:
        data = data[:12] + hashlib.sha256(data[codec.PREFIX.size - 4 :]).digest() + data[44:]
    shape, weights = codec.decode(data)
    assert {n: w.shape for n, w in weights.items()} == shape.parameters()
    assert all(np.isfinite(w).all() for w in weights.values())
    codec.with_note(data, {"scoring": {}})


def shard(data: bytes) -> None:
    """A file of tokens."""
    tokens = read_shard(file_of(data, "train_0.bin"))
    assert tokens.size == 0 or int(tokens.max()) < 1 << 16


def manifest(data: bytes) -> None:
    """What stands beside shards."""
    corpus = Corpus(file_of(data, "manifest.json").parent)
    assert isinstance(corpus.transform, str)


def submission_json(data: bytes) -> None:
    """A record, and what a referee reads of it."""
    folder = file_of(data, "submission.json").parent
    (folder / "verdict.json").write_bytes(data)
    record = records.read(folder)
    verdicts.read(folder)
    record.closing(), record.claimed_bpb
    submission.read(folder)


def run_folder(data: bytes) -> None:
    """A log beside a record: its page, its row in a list."""
    head, _, log = data.partition(b"\n")
    path = file_of(log, "log.jsonl")
    (path.parent / "submission.json").write_bytes(head)
    log_file.read_log(path), run_list.end_of(path), run_list.started(path.parent.parent)
    assert "<script" not in report.page(report.read(path.parent)).lower()


def contest_log(data: bytes) -> None:
    """A contest-format folder: a log and submission.json, of one input."""
    folder = file_of(data, "train_seed1.log").parent
    (folder / "submission.json").write_bytes(data.partition(b"\n\n")[0])
    (folder / "train_gpt.py").write_bytes(data[-200:])
    assert all(len(str(found)) < 100_000 for found in lint.lint(folder))


def documents(data: bytes) -> None:
    """Documents as JSON lines: plain, with topics, and as the referee reads them; compressed or not."""
    plain, packed, zipped = (file_of(data, f"docs.jsonl{suffix}") for suffix in ("", ".zst", ".gz"))
    reads = [(read_file, packed), (read_documents, packed), (read_file, zipped), (read_topics, plain),
             (read_documents, plain), (read_file, plain)]  # fmt: skip
    refused = [in_a_sentence(lambda read=read, path=path: list(read(path))) for read, path in reads]
    if refused[-1]:
        raise refused[-1]


def tokenizer(data: bytes) -> None:
    """A SentencePiece model, whole and without what a referee takes out."""
    table = ByteTable(data)
    table.decode(table.encode("a b"))
    lean(data)


def plan(data: bytes) -> None:
    """Plans of comparisons and searches."""
    path = file_of(data, "plan.toml")
    refused = [in_a_sentence(lambda read=read: read(path)) for read in (search.read, read_plan)]
    if all(refused):
        raise refused[-1]


def proof(data: bytes) -> None:
    """A proof's file, its checksum put right."""
    size = prove.HEAD.size
    if len(data) > size:
        data = data[: size - 4] + zlib.crc32(data[size:]).to_bytes(4, "little") + data[size:]
    prove.take_apart(data)


def weights(data: bytes) -> None:
    """Weights as safetensors."""
    read_tensors(file_of(data, "weights.safetensors"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "artifact": artifact, "shard": shard, "manifest": manifest, "submission_json": submission_json,
    "run_folder": run_folder, "contest_log": contest_log, "documents": documents, "tokenizer": tokenizer, "plan": plan,
    "proof": proof, "weights": weights,
}  # fmt: skip


def in_a_sentence(work: Callable[[], object]) -> UsageError | None:
    """Run something: its refusal, if it makes one, which must be a sentence."""
    try:
        work()
    except UsageError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 2000, f"no single sentence: {str(error)[:300]!r}"
        return error
    return None


def held(target: Callable[[bytes], None], data: bytes) -> bool:
    """Run a target: whether it took the bytes; False when it refused them in one sentence."""
    return in_a_sentence(lambda: target(data)) is None
