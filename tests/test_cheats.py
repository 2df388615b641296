"""Every planted cheat is caught by the check that is there for it, and without that check it gets through; every honest
submission passes."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import socket
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run, small_corpus

import eval_bpb
from golf.contender import Limits
from golf.data import Corpus, write_shard
from golf.prepare import train_tokenizer
from golf.tokenizer_file import PIECES, message

HERE = Path(__file__).resolve().parent
VOCAB = 512


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, library_texts) -> Path:
    """Validation text of a dozen documents, so that one of them can be stolen and the score still moves."""
    return small_corpus(tmp_path_factory.mktemp("corpus"), library_texts, 80_000)


@dataclass(frozen=True)
class Entry:
    """A submission: what it declares, what its folder is given beside the code, and what it is judged on."""

    check: int = 0
    """The check that is there for it; 0 where its scorer simply fails."""
    keys: dict = field(default_factory=dict)
    prepare: Callable[[Path, Path], Path | None] = lambda folder, corpus: None
    """Writes more files; may return other data to judge on."""
    seconds: float = 120.0
    probe_seconds: float = 600.0
    grace: float = 30.0
    source: str = ""
    """Its code, where it is not a file of its own name: a model without fault beside which something is wrong."""


def counts_of(corpus: Path) -> bytes:
    """Bigram counts of the training split, compressed."""
    counts = np.zeros((VOCAB, VOCAB), dtype=np.int64)
    for shard in Corpus(corpus).shards("train"):
        np.add.at(counts, (shard[:-1].astype(int), shard[1:].astype(int)), 1)
    return zlib.compress(np.minimum(counts, 65_535).astype("<u2").tobytes(), 9)


def val_tokens(corpus: Path) -> np.ndarray:
    return np.concatenate(Corpus(corpus).shards("val")).astype(np.int64)


def text_bytes(corpus: Path) -> int:
    return Corpus(corpus).val_bytes


def declare(folder: Path, **keys: object) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def knowledge(folder: Path, corpus: Path) -> None:
    text = val_tokens(corpus)[:40_000]
    key = np.zeros(text.size, dtype=np.int64)
    for back in range(5):
        key = (key * 1_000_003 + np.concatenate([np.zeros(back, int), text[: text.size - back]])) % (1 << 31)
    order = np.argsort(key[:-1], kind="stable")
    out = io.BytesIO()
    np.savez_compressed(out, hashes=np.stack([key[:-1][order], text[1:][order]]))
    (folder / "knowledge.bin").write_bytes(out.getvalue())


def prefix(folder: Path, corpus: Path) -> None:
    (folder / "prefix.bin").write_bytes(lzma.compress(val_tokens(corpus)[:20_000].astype("<u2").tobytes()))


def claim_bytes(share: float) -> Callable:
    return lambda folder, corpus: declare(folder, val_bytes=round(share * text_bytes(corpus)))


def constant_bytes(folder: Path, corpus: Path) -> None:
    declare(folder, val_bytes=round(3.5 * (val_tokens(corpus).size - 1)))


def truncated(folder: Path, corpus: Path) -> None:
    declare(folder, val_tokens=(val_tokens(corpus).size - 1) // 5)


def mebibytes(folder: Path, corpus: Path) -> None:
    (folder / "padding.bin").write_bytes(np.random.default_rng(0).bytes(400_000 - 2_000))


def overlapping(folder: Path, corpus: Path) -> Path:
    """Data whose training shards hold a tenth of the validation documents."""
    data = folder.parent / f"{folder.name}-data"
    shutil.copytree(corpus, data)
    manifest = json.loads((data / "manifest.json").read_text())
    name = manifest["splits"]["train"]["files"][-1]
    train, val = Corpus(data).shards("train")[-1], Corpus(data).shards("val")[0]
    joined = np.concatenate([train, val[: val.size // 3]])
    write_shard(data / name, joined)
    manifest["splits"]["train"]["tokens"] += joined.size - train.size
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


def friend(folder: Path, corpus: Path) -> None:
    """A server on this machine that would answer."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(4):
            connection, _ = server.accept()
            connection.sendall(b"x")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    (folder / "friend.txt").write_text(str(server.getsockname()[1]))


def place(folder: Path, corpus: Path) -> None:
    (folder / "place.txt").write_text(str(next(corpus.glob("val_*.bin")).resolve()))


def readme(folder: Path, corpus: Path) -> None:
    (folder / "README.md").write_bytes(b"x" * 200_000)


def own_tokenizer(folder: Path, model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    sha = hashlib.sha256(model).hexdigest()
    declare(folder, tokenizer={"kind": "sentencepiece", "file": "tokenizer.model", "sha256": sha, "transform": "none"})


def spm(texts: list[str], **options: object) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        max_sentence_length=1 << 28, required_chars="\u2581", **options,
    )  # fmt: skip
    return model.getvalue()


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (corpus / "val.jsonl").read_text("utf-8").splitlines()]


def folding(folder: Path, corpus: Path) -> None:
    own_tokenizer(folder, spm(texts_of(corpus), normalization_rule_name="nmt_nfkc_cf"))


def stuffed(folder: Path, corpus: Path) -> None:
    """A tokenizer of one's own with pieces of 300 characters of the validation text."""
    text = texts_of(corpus)[0]
    pieces = [text[i : i + 300] for i in range(0, 6000, 300)]
    own_tokenizer(folder, spm(texts_of(corpus), normalization_rule_name="identity", user_defined_symbols=pieces))


def swollen(folder: Path, corpus: Path) -> None:
    """A tokenizer of one's own with long pieces of noise, which the scorer could read."""
    rng = np.random.default_rng(0)
    noise = ["".join(chr(int(c)) for c in rng.integers(0x4E00, 0x9FA5, 1500)) for _ in range(150)]
    own_tokenizer(folder, spm(texts_of(corpus), normalization_rule_name="identity", user_defined_symbols=noise))


def unused(folder: Path, corpus: Path) -> None:
    """A tokenizer of one's own with thousands of short pieces that never occur, each of which holds what one likes."""
    rng = np.random.default_rng(0)
    letters = ["".join(chr(int(c)) for c in rng.integers(33, 127, 12)).encode() for _ in range(20_000)]
    floats = rng.standard_normal(20_000).astype("<f4")
    more = [
        message(PIECES, [b"\x0a\x0d\x7f" + piece, b"\x15" + score.tobytes()])
        for piece, score in zip(letters, floats, strict=True)
    ]
    own_tokenizer(folder, (corpus / "tokenizer.model").read_bytes() + b"".join(more))


def among_training(folder: Path, corpus: Path) -> None:
    """Validation text among a hundred times as much of the training text."""
    from golf.bpb import ByteTable

    table = ByteTable(corpus / "tokenizer.model")
    train = table.decode(Corpus(corpus).shards("train")[0][:150_000])
    (folder / "notes.bin").write_bytes(zlib.compress(train + "".join(texts_of(corpus))[:3000].encode(), 9))


CHEATS = {
    "memorised": Entry(13, prepare=knowledge),
    "paid_prefix": Entry(13, prepare=prefix),
    "last_epoch": Entry(1),
    "rescoring": Entry(5),
    "target_in_key": Entry(3),
    "wrong_denominator": Entry(3),
    "oracle_expert": Entry(2),
    "depth_by_capacity": Entry(1),
    "target_gated": Entry(2),
    "scored_positions": Entry(1),
    "spaces_twice": Entry(7, prepare=claim_bytes(1.167), source="honest_bigram"),
    "byte_fallback_three": Entry(7, prepare=claim_bytes(1.0413), source="honest_bigram"),
    "constant_bytes": Entry(7, prepare=constant_bytes, source="honest_bigram"),
    "clamped_targets": Entry(8),
    "lossy": Entry(7, prepare=folding, source="honest_uniform"),
    "stuffed_tokenizer": Entry(13, prepare=stuffed, source="honest_uniform"),
    "train_val_overlap": Entry(12, prepare=overlapping, source="honest_bigram"),
    "truncated_validation": Entry(8, prepare=truncated, source="honest_bigram"),
    "mebibytes": Entry(9, prepare=mebibytes, source="honest_bigram"),
    "over_the_clock": Entry(10, seconds=1.5),
    "trained_too_long": Entry(10, keys={"train_seconds": 60.4}, source="honest_bigram"),
    "opens_the_network": Entry(11, prepare=friend),
    "reads_outside": Entry(11, prepare=place),
    "second_file": Entry(0, prepare=readme),
    "spots_probes": Entry(2),
    "remembers_prefixes": Entry(1),
    "shows_nothing": Entry(4),
    "knows_the_judge": Entry(2),
    "turns_later": Entry(2, keys={"adapts": True, "chunk": 1024}),
    "answers_first": Entry(0),
    "swollen_tokenizer": Entry(9, prepare=swollen, source="honest_uniform"),
    "unused_pieces": Entry(9, prepare=unused),
    "sums_over": Entry(3),
    "sleeps_away": Entry(0, keys={"adapts": True, "chunk": 1024}, seconds=30, probe_seconds=3),
    "works_when_probed": Entry(10, keys={"adapts": True, "chunk": 1024}, seconds=20, grace=1),
    "chosen_training_text": Entry(13, prepare=among_training, source="honest_bigram"),
    "leaks_state": Entry(15),
    "batch_neighbours": Entry(14),
    "two_tongues": Entry(4),
    "rounds_up": Entry(4, keys={"precision": "bfloat16"}),
    "depends_on_shape": Entry(14),
    "adapts_first": Entry(1, keys={"adapts": True, "chunk": 4096}),
    "cannot_forget": Entry(5, keys={"adapts": True, "chunk": 4096}),
    "counts_calls": Entry(16),
    "reload_differs": Entry(16),
    "claimed_score": Entry(16, keys={"val_bpb": 1.0}, source="honest_bigram"),
}
# For each check a cheat, and the other checks that would catch it too: without those it is caught by this one alone.
ALONE = {
    1: ("scored_positions", {2}), 2: ("target_gated", set()), 3: ("wrong_denominator", set()),
    4: ("two_tongues", set()),
    5: ("cannot_forget", {1, 2, 16}), 7: ("spaces_twice", set()), 8: ("truncated_validation", set()),
    9: ("mebibytes", set()),
    10: ("trained_too_long", set()), 11: ("reads_outside", set()), 12: ("train_val_overlap", set()),
    13: ("paid_prefix", set()), 14: ("depends_on_shape", set()), 15: ("leaks_state", {1, 2, 5, 14, 16}),
    16: ("claimed_score", set()),
}  # fmt: skip


def make(name: str, entry: Entry, kind: str, place: Path, corpus: Path, counts: bytes) -> tuple[Path, Path]:
    """The submission's folder, and the data to judge it on."""
    folder = place / name
    folder.mkdir()
    shutil.copyfile(HERE / kind / f"{entry.source or name}.py", folder / "scorer.py")
    shutil.copyfile(HERE / "cheats" / "base.py", folder / "base.py")
    (folder / "model.bin").write_bytes(counts)
    about = {"name": name, "track": "smoke", "context": 64, "corpus": "tiny", "author": "a stranger", **entry.keys}
    (folder / "submission.json").write_text(json.dumps(about))
    return folder, entry.prepare(folder, corpus) or corpus


def failed(verdict: dict) -> set[int]:
    return {row["number"] for row in verdict["checks"] if row["status"] == "failed"}


@pytest.fixture(scope="module")
def counts(corpus: Path) -> bytes:
    return counts_of(corpus)


def judge(name: str, entry: Entry, kind: str, place: Path, corpus: Path, counts: bytes, off: frozenset = frozenset()):
    folder, data = make(name, entry, kind, place, corpus, counts)
    limits = Limits(entry.seconds if 10 not in off else 600, entry.probe_seconds, grace=entry.grace)
    return eval_bpb.judge(folder, data, off=off, limits=limits)


def test_there_is_a_cheat_in_the_list_for_every_file():
    written = {p.stem for p in (HERE / "cheats").glob("*.py")} - {"base"}
    assert written == {entry.source or name for name, entry in CHEATS.items()} and len(CHEATS) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_every_cheat_is_caught(name, tmp_path, corpus, counts):
    entry = CHEATS[name]
    verdict = judge(name, entry, "cheats", tmp_path, corpus, counts)
    assert not verdict["valid"] and verdict["invalid"]
    if entry.check:
        assert entry.check in failed(verdict), (verdict["invalid"], failed(verdict))


@pytest.mark.slow
@pytest.mark.parametrize("number", ALONE)
def test_without_its_check_a_cheat_gets_through(number, tmp_path, corpus, counts):
    name, others = ALONE[number]
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    found = judge(name, CHEATS[name], "cheats", tmp_path / "with", corpus, counts, frozenset(others))
    assert failed(found) == {number}, found["invalid"]
    verdict = judge(name, CHEATS[name], "cheats", tmp_path / "without", corpus, counts, frozenset({number, *others}))
    assert verdict["valid"], (failed(verdict), verdict["invalid"])


HONEST = {
    "ngram_mixture": Entry(), "bytes_model": Entry(keys={"tokenizer": {"kind": "bytes"}}), "bad": Entry(),
    "score_first": Entry(keys={"adapts": True, "chunk": 4096}), "windows": Entry(keys={"stride": 16}),
    "half_precision": Entry(keys={"precision": "bfloat16"}),
    "large_vocabulary": Entry(prepare=lambda f, c: own_tokenizer(f, train_tokenizer(iter(texts_of(c)), 4096))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_honest_submissions_pass(name, tmp_path, corpus, counts):
    verdict = judge(name, HONEST[name], "honest", tmp_path, corpus, counts)
    assert verdict["valid"], (verdict["invalid"], failed(verdict))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = run("train_gpt.py", "smoke", *TINY, "--run.max-steps", 30, "--run.data", corpus, "--run.runs", runs)
    assert done.returncode == 0, done.stderr + done.stdout
    return next(runs.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [], ["--stride", 16], ["--isolate"], ["--adapt-rank", 2, "--chunk", 2048, "--phase-tokens", 8192],
    ["--ngram-order", 3, "--chunk", 512, "--stride", 16],
])  # fmt: skip
def test_our_own_model_passes_however_it_is_asked(trained, corpus, tmp_path, flags):
    done = run("artifact.py", "rescore", trained, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    verdict = eval_bpb.judge(tmp_path / "run", corpus)
    assert verdict["valid"], (verdict["invalid"], failed(verdict))


@pytest.mark.slow
def test_training_again_without_the_validation_text(trained, corpus):
    done = run("eval_bpb.py", trained, "--data", corpus, "--retrain", "--json")
    told = json.loads(done.stdout)["retrained"]
    assert told.startswith("agrees") and "+0.00 %" in told.replace("-0.00", "+0.00"), told


PROVED_WRONG = ("last_epoch", "oracle_expert", "scored_positions", "target_gated", "wrong_denominator", "target_in_key",
                "two_tongues", "adapts_first")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVED_WRONG)
def test_a_cheat_cannot_decompress_what_it_claims(name, tmp_path, corpus, counts):
    folder, data = make(name, CHEATS[name], "cheats", tmp_path, corpus, counts)
    assert not eval_bpb.prove_folder(folder, data, 8, 48)["holds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bad", "score_first", "bytes_model", "half_precision"])
def test_an_honest_submission_decompresses_what_it_claims(name, tmp_path, corpus, counts):
    folder, data = make(name, HONEST[name], "honest", tmp_path, corpus, counts)
    result = eval_bpb.prove_folder(folder, data, 8, 48)
    assert result["holds"], result


@pytest.mark.parametrize("name", ["shows_nothing", "oracle_expert", "reads_outside"])
def test_some_cheats(name, tmp_path, corpus, counts):
    assert CHEATS[name].check in failed(judge(name, CHEATS[name], "cheats", tmp_path, corpus, counts))


def test_one_honest_submission(tmp_path, corpus, counts):
    passed = judge("score_first", HONEST["score_first"], "honest", tmp_path, corpus, counts)
    assert passed["valid"], passed["invalid"]
