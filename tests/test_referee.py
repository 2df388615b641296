"""The referee on strangers' submissions: right sums, its own bytes, and a verdict for every way to fail."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard
from conftest import ROOT, run, unpacked

import eval_bpb
from golf import contender, evidence, folders, prepare, prove, spool
from golf.bpb import ByteTable
from golf.contender import Contender, Invalid, Limits, why_not_isolated
from golf.data import Corpus
from golf.errors import UsageError
from golf.sources import Document, Source
from golf.submission import read as read_submission
from golf.validation import Tokenizer

UNIFORM = """
    import numpy as np

    class Scorer:
        vocab = 512

        def logprobs(self, tokens):
            return np.full((*tokens.shape, 512), -np.log(512), dtype=np.float32)

    def load_scorer(folder):
        return Scorer()
"""


def submission(folder: Path, corpus: Path, source: str, **keys: object) -> Path:
    """A stranger's folder: a scorer in one file and a minimal submission.json."""
    folder.mkdir()
    (folder / "scorer.py").write_text(textwrap.dedent(source))
    about = {"name": folder.name, "track": "smoke", "context": 64, "corpus": "tiny", "author": "a stranger", **keys}
    (folder / "submission.json").write_text(json.dumps(about))
    return folder


def test_a_uniform_scorer_costs_the_logarithm_of_its_vocabulary(tmp_path, corpus):
    verdict = eval_bpb.judge(submission(tmp_path / "uniform", corpus, UNIFORM), corpus)
    assert verdict["valid"], verdict["invalid"]
    data = Corpus(corpus)
    tokens, text = data.tokens["val"], data.manifest["splits"]["val"]["bytes"]
    assert (verdict["val_tokens"], verdict["val_bytes"]) == (tokens - 1, text)
    assert verdict["val_loss"] == pytest.approx(math.log(512), rel=1e-6)
    assert verdict["val_bpb"] == pytest.approx(9 * (tokens - 1) / text, rel=1e-6)


def test_an_environment_that_is_a_link_is_seen_from_inside(tmp_path, corpus):
    (tmp_path / "link").symlink_to(sys.prefix)
    folder = submission(tmp_path / "uniform", corpus, UNIFORM)
    command = [tmp_path / "link/bin/python", ROOT / "eval_bpb.py", folder, "--data", corpus]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_target_is_asked_for_once_and_in_order(tmp_path, corpus):
    # A scorer whose answer at each place is a known function of the token there: the sum tells what was asked.
    source = """
        import numpy as np

        class Scorer:
            vocab = 512

            def logprobs(self, tokens):
                out = np.zeros((*tokens.shape, 512), dtype=np.float64)
                rates = 1 + (tokens * 7919 % 13)[..., None] * (np.arange(512) % 5)
                return np.log(rates / rates.sum(-1, keepdims=True)).astype(np.float32)

        def load_scorer(folder):
            return Scorer()
    """
    tokens = np.concatenate(Corpus(corpus).shards("val")).astype(np.int64)
    rates = 1 + (tokens[:-1] * 7919 % 13)[:, None] * (np.arange(512) % 5)
    chosen = np.log(rates[np.arange(tokens.size - 1), tokens[1:]] / rates.sum(-1))
    folder = submission(tmp_path / "known64", corpus, source, context=64)
    verdict = eval_bpb.judge(folder, corpus)
    assert verdict["val_loss"] == pytest.approx(-chosen.mean(), rel=1e-6)
    folder = submission(tmp_path / "known1000", corpus, source, context=1000)
    official = eval_bpb.judge(folder, corpus, official=True)
    whole = (tokens.size - 1) // 1000 * 1000
    assert official["val_tokens"] == whole
    assert official["val_loss"] == pytest.approx(-chosen[:whole].mean(), rel=1e-6)
    table = ByteTable(corpus / "tokenizer.model")
    assert official["val_bytes"] == table.count(tokens[:whole], tokens[1 : whole + 1])


@pytest.mark.slow
def test_the_official_truncation_on_the_real_validation_head(yardstick, tmp_path):
    words = ["files", yardstick / "fineweb_docs_sample.jsonl.zst", "--validation"]
    words += [yardstick / "fineweb_val_prefix.jsonl.zst", "--tokenizer"]
    words += [yardstick / "tokenizers" / "fineweb_1024_bpe.model.zst", "--out", tmp_path / "data"]
    assert run("-m", "golf.prepare", *words).returncode == 0
    source = UNIFORM.replace("512", "1024")
    folder = submission(tmp_path / "uniform", tmp_path / "data", source, context=1024)
    whole = eval_bpb.judge(folder, tmp_path / "data")
    assert (whole["val_tokens"], whole["val_bytes"]) == (1_040_297, 2_504_867)
    assert whole["valid"] and "0 of 902 documents encode differently again" in whole["checks"][6]["evidence"]
    assert whole["val_bpb"] == pytest.approx(10 * 1_040_297 / 2_504_867, rel=1e-6)
    official = eval_bpb.judge(folder, tmp_path / "data", official=True)
    assert (official["val_tokens"], official["val_bytes"]) == (1_039_360, 2_502_627)


def test_the_scorer_sees_only_what_counts(tmp_path, corpus):
    source = UNIFORM.replace(
        "return Scorer()",
        "import os; assert sorted(os.listdir(folder)) == ['scorer.py', 'tokenizer.model'], os.listdir(folder); "
        "return Scorer()",
    )
    folder = submission(tmp_path / "curious", corpus, source)
    for name in ("README.md", "log.jsonl", "verdict.json", "report.html", "train_seed3.log"):
        (folder / name).write_text("hidden text")
    (folder / "source").mkdir()
    (folder / "source" / "weights.bin").write_bytes(bytes(1000))
    (folder / "tokenizer.model").write_bytes((corpus / "tokenizer.model").read_bytes())
    assert eval_bpb.judge(folder, corpus)["val_tokens"] > 0
    assert folders.sizes(folder).total == (folder / "scorer.py").stat().st_size


def test_stray_files_count(tmp_path, corpus):
    folder = submission(tmp_path / "stray", corpus, UNIFORM)
    before = folders.sizes(folder).total
    (folder / "notes.txt").write_bytes(bytes(12_345))
    (folder / "deep" / "source").mkdir(parents=True)
    (folder / "deep" / "source" / "README.md").write_bytes(bytes(100))
    (folder / ".hidden").write_bytes(bytes(7))
    measured = folders.sizes(folder)
    assert measured.total == before + 12_345 + 107 and measured.other == 12_345 + 107
    os.symlink("/etc/passwd", folder / "link")
    with pytest.raises(UsageError, match="link"):
        folders.sizes(folder)


FAILURES = {
    "raises": ("raise ValueError('no weights')", "no weights"),
    "exits": ("import os; os._exit(3)", "exit code 3"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", "signal 9"),
    "wrong shape": ("return np.zeros((1, 1, 512), dtype=np.float32)", "not float32"),
    "wrong type": ("return np.full((*tokens.shape, 512), -6.238, dtype=np.float64)", "float64"),
    "nothing": ("return None", "not float32"),
    "not finite": ("return np.full((*tokens.shape, 512), np.nan, dtype=np.float32)", "not finite"),
    "certain of everything": ("return np.zeros((*tokens.shape, 512), dtype=np.float32)", "sums to 512"),
    "positive": ("return np.full((*tokens.shape, 512), 3.0, dtype=np.float32)", "above 0"),
    "prints and leaves": ("print('x' * 10_000_000); raise SystemExit(1)", "SystemExit"),
    "certain before the end": (
        "out = np.full((*tokens.shape, 512), -np.log(512), dtype=np.float32); out[:, :-1] = 0; return out",
        "sums to 512",
    ),
    "not a number beside the target": (
        "out = np.full((*tokens.shape, 512), -np.log(512), dtype=np.float32); out[:, :, 0] = np.nan; return out",
        "sums to nan|not finite",
    ),
    "cuts its answers short": (
        "import os; [os.ftruncate(f, 8) for f in range(3, 30) if os.path.exists(f'/proc/self/fd/{f}') "
        "and 'golf' in os.readlink(f'/proc/self/fd/{f}')]; return np.zeros((*tokens.shape, 512), dtype=np.float32)",
        "sums to|short|exit code|failed",
    ),
    "speaks for itself": (
        "import os, sys; os.write(int(sys.argv[4]), b'[1, 2]\\n'); import time; time.sleep(9)", "answered",
    ),
    "floods the pipe": ("import os, sys; os.write(int(sys.argv[4]), b'x' * (2 << 20)); return None", "short message"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_scorer_that_fails_gets_a_verdict(tmp_path, corpus, name):
    line, words = FAILURES[name]
    source = UNIFORM.replace("return np.full((*tokens.shape, 512), -np.log(512), dtype=np.float32)", line)
    verdict = eval_bpb.judge(submission(tmp_path / "bad", corpus, source), corpus)
    assert not verdict["valid"] and re.search(words, verdict["invalid"]), verdict["invalid"]


def test_a_scorer_that_hangs_is_stopped_at_the_cap(tmp_path, corpus):
    source = UNIFORM.replace("return Scorer()", "import time; time.sleep(600)")
    folder = submission(tmp_path / "slow", corpus, source)
    limits, began = Limits(1.5), time.monotonic()
    with pytest.raises(Invalid, match="evaluation cap"), Contender(folder, b"", limits):
        pass
    assert time.monotonic() - began < 10


def test_what_probes_take_beyond_what_scoring_takes_is_scoring():
    limits = Limits(60, grace=5)
    limits.spend(10, 0.0)  # loading
    limits.spend(8, 0.5, rows=8)  # a second a row
    limits.spend(20, 1.0, rows=2)
    assert (limits.scoring, limits.probing, limits.beyond) == (14, 24, 0)
    limits.spend(23, 1.0, rows=2)
    assert (limits.scoring, limits.beyond) == (14, 3)
    limits.spend(26, 1.0, rows=2)
    assert (limits.scoring, limits.beyond) == (18, 9)
    limits.spend(100, 1.0)  # a process of the probes' own
    assert (limits.scoring, limits.probing) == (18, 173)


@pytest.mark.parametrize(("line", "words"), [
    ("hoard = [bytearray(1 << 26) for _ in range(100)]; import time; time.sleep(60)", "GB of memory"),
    ("import os, time; [os.fork() or time.sleep(60) for _ in range(1200)]; time.sleep(60)", "processes"),
])  # fmt: skip
def test_a_scorer_that_takes_too_much_is_stopped(tmp_path, corpus, line, words):
    source = UNIFORM.replace("return Scorer()", f"{line}; return Scorer()")
    folder = submission(tmp_path / "greedy", corpus, source)
    with pytest.raises(Invalid, match=words), Contender(folder, b"", Limits(60, memory=1 << 30)):
        pass


def test_what_a_scorer_starts_ends_with_it(tmp_path, corpus):
    started = f"{time.time_ns()}"  # a name to find it by
    source = UNIFORM.replace(
        "return Scorer()",
        "import subprocess as s, sys; "
        f"s.Popen([sys.executable, '-c', 'import time; time.sleep(300)', '{started}'], start_new_session=True); "
        "return Scorer()",
    )

    def alive() -> list[int]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if started in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found

    with Contender(submission(tmp_path / "parent", corpus, source), b"", Limits(60)):
        assert alive()
    end = time.monotonic() + 10  # a killed process takes its moment
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive()


def test_the_scorers_tokenizer_is_the_referees(tmp_path, corpus):
    source = UNIFORM.replace(
        "return Scorer()", "assert len(open(folder + '/tokenizer.model', 'rb').read()) < 10**6; return Scorer()"
    )
    folder = submission(tmp_path / "stuffed", corpus, source)
    (folder / "tokenizer.model").write_bytes(bytes(10**7))  # weights where nothing is counted
    assert eval_bpb.judge(folder, corpus)["val_tokens"] > 0


def test_no_temporary_files_stay(tmp_path, corpus, monkeypatch):
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))  # other tests run beside this one
    with Contender(submission(tmp_path / "good", corpus, UNIFORM), b"", Limits(60)):
        assert list(place.iterdir())
    assert not list(place.iterdir())
    with pytest.raises(Invalid), Contender(submission(tmp_path / "bad", corpus, "raise SystemError"), b"", Limits(60)):
        pass
    assert not list(place.iterdir())


def test_misuse_is_one_sentence(tmp_path, corpus):
    folder = submission(tmp_path / "fine", corpus, UNIFORM)
    empty = tmp_path / "empty"
    empty.mkdir()
    no_scorer = submission(tmp_path / "none", corpus, UNIFORM)
    (no_scorer / "scorer.py").unlink()
    of_bytes, nothing = submission(tmp_path / "b", corpus, UNIFORM, tokenizer={"kind": "bytes"}), tmp_path / "nothing"
    nothing.write_text('{"text": ""}\n')
    cases = [
        (["eval_bpb.py", empty, "--data", corpus], 2, "submission.json"),
        (["eval_bpb.py", folder, "--data", empty], 2, "golf.prepare"),
        (["eval_bpb.py", no_scorer, "--data", corpus], 1, "neither train_gpt.py nor scorer.py"),
        (["eval_bpb.py"], 2, "Missing"),
        (["eval_bpb.py", folder, "--dta", corpus], 2, "--data"),
        *((["eval_bpb.py", folder, "--data", corpus, "--memory", n], 2, "--memory") for n in ("inf", "nan", "-1")),
        (["eval_bpb.py", of_bytes, "--data", nothing], 2, "is empty"),
    ]
    for words, code, said in cases:
        done = run(*words)
        assert done.returncode == code, (words, done.stderr)
        assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    submission(tmp_path / "other", corpus, UNIFORM, tokenizer_sha256="0" * 64)
    with pytest.raises(UsageError, match="tokenizer"):
        eval_bpb.judge(tmp_path / "other", corpus)
    submission(tmp_path / "mix", corpus, UNIFORM.replace("512", "500"))
    assert "vocabulary is 500" in eval_bpb.judge(tmp_path / "mix", corpus)["invalid"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "not a JSON object"), ("{", "not JSON"), ('{"val_bpb": "low"}', "val_bpb"), ('{"steps": true}', "steps"),
     ('{"schema": 99}', "schema 99"), ('{"track": "moon"}', "track is 'moon'"), ("[" * 50_000, "not JSON"),
     ('{"track": "smoke", "context": 8, "tokenizer": {"file": "a\\u0000b"}}', "not a plain name")],
)  # fmt: skip
def test_records_that_do_not_fit_the_schema_are_refused(tmp_path, corpus, text, words):
    folder = submission(tmp_path / "x", corpus, UNIFORM)
    (folder / "submission.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        eval_bpb.judge(folder, corpus)


def test_the_verdict_names_the_artifact(tmp_path, corpus):
    folder = submission(tmp_path / "named", corpus, UNIFORM)
    (folder / "model.bin").write_bytes(b"weights")
    assert eval_bpb.judge(folder, corpus)["model_sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_lossy_tokenizer_on_raw_documents_is_invalid(yardstick, tmp_path):
    model = unpacked(yardstick / "tokenizers" / "fineweb_1024_bpe.model.zst")
    folder = submission(tmp_path / "raw", tmp_path, UNIFORM.replace("512", "1024"),
                        tokenizer={"file": "tokenizer.model", "sha256": hashlib.sha256(model).hexdigest()})  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model)
    verdict = eval_bpb.judge(folder, yardstick / "fineweb_docs_sample.jsonl.zst")
    assert "196 of 200 documents" in verdict["invalid"] and "published shards" in verdict["invalid"]


def test_another_tokenizer_reads_the_text_of_published_shards(corpus, tmp_path):
    folder = submission(tmp_path / "bytes", corpus, UNIFORM.replace("512", "257"), tokenizer={"kind": "bytes"})
    verdict = eval_bpb.judge(folder, corpus)
    data = Corpus(corpus)
    documents = data.manifest["splits"]["val"]["documents"]
    assert verdict["valid"], verdict["invalid"]
    assert verdict["val_bytes"] == data.val_bytes and verdict["val_tokens"] == data.val_bytes + documents - 1


def test_a_character_that_is_cut_has_no_capital(corpus, tmp_path):
    model = (corpus / "tokenizer.model").read_bytes()
    told = {"sha256": hashlib.sha256(model).hexdigest(), "transform": "case"}
    folder = submission(tmp_path / "case", corpus, UNIFORM, tokenizer=told)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(read_submission(folder), model)
    tokens = tokenizer.encode("Word \U0001f3cc")
    assert tokenizer.decode(tokens) == "Word \U0001f3cc".encode()
    assert tokenizer.decode(tokens[:-1]) == b"Word "


def test_documents_too_short_to_be_looked_for_are_scored(tmp_path, library_texts):
    lines = [Document(" ".join(text.text.split()[:3]), "short") for text in library_texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "VALIDATION_LEAST", 500)
        source = Source("short", lambda: iter(lines), {"source": "short"}, ["PSF License Version 2"])
        prepare.prepare(source, tmp_path / "data", prepare.Options(vocab_size=400, validation_share=0.1))
    verdict = eval_bpb.judge(submission(tmp_path / "x", tmp_path / "data", UNIFORM.replace("512", "400")),
                             tmp_path / "data")  # fmt: skip
    told = {c["number"]: c for c in verdict["checks"]}[12]
    assert verdict["valid"] and told["status"] == "not run" and "no validation document has more" in told["evidence"]


def test_a_tokenizer_that_opens_no_document_is_refused(tmp_path, corpus, library_texts):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(d.text for d in library_texts[:20]), model_writer=model, vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, required_chars="\u2581",
        remove_extra_whitespaces=False, minloglevel=2, bos_id=-1, max_sentence_length=1 << 28,
    )  # fmt: skip
    told = {"file": "tokenizer.model", "sha256": hashlib.sha256(model.getvalue()).hexdigest()}
    folder = submission(tmp_path / "x", corpus, UNIFORM.replace("512", "400"), tokenizer=told)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    assert "opens a document" in eval_bpb.judge(folder, corpus)["invalid"]
    (tmp_path / "mine.model").write_bytes(model.getvalue())
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in library_texts[:80]))
    done = run("-m", "golf.prepare", "files", tmp_path / "t.jsonl", "--tokenizer", tmp_path / "mine.model", "--out",
               tmp_path / "out")  # fmt: skip
    assert done.returncode == 2 and "its BOS is piece -1" in done.stderr, done.stderr


def test_a_proof_is_read_by_a_scorer_of_the_said_vocabulary(tmp_path, corpus):
    folder = submission(tmp_path / "x", corpus, UNIFORM)
    rows = [np.arange(2)]
    body = np.array([1], "<u2").tobytes() + b"\0" * 8
    (tmp_path / "proof").write_bytes(prove.HEAD.pack(prove.MAGIC, len(rows), zlib.crc32(body)) + body)
    assert run("eval_bpb.py", "decode", folder, tmp_path / "proof", "--vocab", 512).returncode == 0
    done = run("eval_bpb.py", "decode", folder, tmp_path / "proof", "--vocab", 513)
    assert done.returncode == 1 and "vocabulary is 512, not 513" in done.stderr


def test_capitals_as_marks_come_back(corpus, tmp_path):
    model = (corpus / "tokenizer.model").read_bytes()
    told = {"sha256": hashlib.sha256(model).hexdigest(), "transform": "case"}
    folder = submission(tmp_path / "case", corpus, UNIFORM, tokenizer=told)
    (folder / "tokenizer.model").write_bytes(model)
    verdict = eval_bpb.judge(folder, corpus)
    assert verdict["valid"] and verdict["val_bytes"] == Corpus(corpus).val_bytes
    assert verdict["val_tokens"] != Corpus(corpus).tokens["val"] - 1


@pytest.mark.parametrize("line", [
    "import socket; socket.create_connection(('127.0.0.1', 9))", "open('/etc/passwd').read()",
    "open('/tmp/mine', 'w').write('x')",
])  # fmt: skip
def test_without_namespaces_a_scorer_is_watched(tmp_path, corpus, monkeypatch, line):
    monkeypatch.setattr(contender, "why_not_isolated", lambda: "this test")
    folder = submission(tmp_path / "watched", corpus, UNIFORM.replace("return Scorer()", f"{line}; return Scorer()"))
    with pytest.raises(Invalid, match="no network|outside what") as raised, Contender(folder, b"", Limits(60)):
        pass
    assert raised.value.check == 11


def test_a_watched_verdict_does_not_claim_to_have_shut_in(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(contender, "why_not_isolated", lambda: "this test")
    verdict = eval_bpb.judge(submission(tmp_path / "watched", corpus, UNIFORM), corpus)
    row = verdict["checks"][10]
    assert verdict["isolation"] == "watched" and row["status"] == "not run" and "only watched" in row["evidence"]


@pytest.mark.parametrize(("keys", "words"), [
    ({"context": 1}, "context 1"), ({"stride": 65}, "stride 65"), ({"chunk": -1}, "chunk -1"),
    ({"adapts": True}, "chunk must say"), ({"precision": "int4"}, "precision"),
    ({"tokenizer": {"kind": "gzip"}}, "kind"),
    ({"tokenizer": {"file": "../x"}}, "not a plain name"), ({"tokenizer": {"code": "x"}}, "tokenizer has"),
    ({"tokenizer": {"transform": "upper"}}, "transform"),
])  # fmt: skip
def test_declarations_that_no_referee_can_follow_are_refused(tmp_path, corpus, keys, words):
    with pytest.raises(UsageError, match=words):
        eval_bpb.judge(submission(tmp_path / "odd", corpus, UNIFORM, **keys), corpus)


def test_a_record_cannot_choose_its_text(tmp_path, corpus):
    folder = submission(tmp_path / "entry", corpus, UNIFORM)
    told = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps(told | {"corpus": "../elsewhere/data"}))
    done = run("eval_bpb.py", folder)
    assert done.returncode == 2 and "is not a plain name, give --data" in done.stderr and "Traceback" not in done.stderr


def test_pythons_own_library_as_text_is_never_called_hidden(tmp_path, corpus):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "python3.11.7-0123"}))
    verdict = eval_bpb.judge(submission(tmp_path / "entry", corpus, UNIFORM), data)
    found = next(c for c in verdict["checks"] if c["number"] == 11)
    assert verdict["valid"] and found["status"] == "not run" and "Python's own library" in found["evidence"]
    folder = submission(tmp_path / "again", corpus, UNIFORM)
    (folder / "train_gpt.py").write_text("")
    done = run("eval_bpb.py", folder, "--data", data, "--retrain")
    assert done.returncode == 2 and "Python's own library" in done.stderr


def test_an_error_that_draws_on_the_terminal_is_plain_text(tmp_path, corpus):
    said = "a\\nverdict: valid \\x1b[8m"
    folder = submission(tmp_path / "entry", corpus, f"def load_scorer(folder):\n    raise ValueError('{said}')")
    done = run("eval_bpb.py", folder, "--data", corpus)
    assert done.returncode == 1 and "\x1b" not in done.stdout + done.stderr
    assert not any(line.startswith("verdict: valid") for line in done.stdout.splitlines())


def test_decompression_has_one_budget(tmp_path):
    bomb = zstandard.compress(bytes(1 << 30), 19)
    room = evidence.Room(1 << 20)
    parts = list(evidence.unpacked(bomb, room))
    assert sum(map(len, parts)) <= len(bomb) + (1 << 20) and not room.left


@pytest.mark.skipif(bool(why_not_isolated()), reason="this system cannot shut a process in")
def test_locked_flags_of_mounts_do_not_stop_the_isolation(tmp_path, corpus):
    """As where /tmp and /sys are mounted without devices, programs and other users' rights."""
    folder, place = submission(tmp_path / "entry", corpus, UNIFORM), tmp_path / "mounted"
    place.mkdir()
    judge = f"{sys.executable} {ROOT}/eval_bpb.py {folder} --data {corpus} --json"
    script = f"mount -t tmpfs -o nosuid,nodev,noexec,noatime none {place} && TMPDIR={place} exec {judge}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isolation"] == "isolated"


def test_a_file_of_one_beginning_over_and_over_is_searched_in_time():
    """Eight bytes of a stored piece, a million times: each place has to be compared, and none is it."""
    text = bytes(np.random.default_rng(1).integers(32, 127, 1 << 16, dtype=np.uint8))
    pieces = evidence.windows_of(text)
    file = pieces[5, :8].tobytes() * (1 << 20) + text[320:3_200]
    began = time.process_time()
    assert len(evidence.shared_windows(file, pieces)) == 90
    assert time.process_time() - began < 20  # of the referee's own


def test_a_tokenizer_that_unpacks_to_more_than_any_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 999)
    (tmp_path / "bomb.model.zst").write_bytes(zstandard.compress(bytes(1 << 27)))
    done = run("-m", "golf.prepare", "files", tmp_path, "--tokenizer", tmp_path / "bomb.model.zst")
    assert done.returncode == 2 and "holds more than" in done.stderr and "Traceback" not in done.stderr
