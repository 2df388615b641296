"""A long scoring, killed in the middle and gone on with: the same score, nothing asked for twice, seconds summed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import eval_bpb
from golf.contender import Contender, Limits
from golf.errors import UsageError
from golf.kept_scores import KeptScores
from tests.conftest import ROOT, run
from tests.test_referee import submission

# Takes its time; knows what it has adapted to.
SLOW = '''
    import time
    import numpy as np

    class Scorer:
        vocab = 512

        def __init__(self):
            self.counts = np.ones(512)

        def logprobs(self, tokens):
            time.sleep(0.01)
            given = np.log(self.counts / self.counts.sum()).astype(np.float32)
            return np.broadcast_to(given, (*tokens.shape, 512)).copy()

        ADAPT

    def load_scorer(folder):
        return Scorer()
'''
LEARNS = '''def adapt(self, tokens, documents):
            self.counts += np.bincount(tokens, minlength=512)

        def reset(self):
            self.counts = np.ones(512)
'''


def folder_of(place: Path, corpus: Path, adapts: bool) -> Path:
    source = SLOW.replace("ADAPT", LEARNS if adapts else "")
    more = {"adapts": True, "chunk": 200} if adapts else {}
    return submission(place / "slow", corpus, source, **more)


def command(folder: Path, corpus: Path, kept: Path) -> list[object]:
    return ["eval_bpb.py", folder, "--data", corpus, "--keep", kept, "--keep-every", 800, "--lift-cap", "--json"]


def kill_in_the_middle(folder: Path, corpus: Path, kept: Path) -> None:
    """Begin to score and kill the judge, and its scorer, when two parts or more are kept."""
    words = [sys.executable, *map(str, command(folder, corpus, kept))]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and not (kept.exists() and json.loads(kept.read_text())["stretches"] >= 2):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("adapts", [False, True])
def test_a_killed_scoring_goes_on_and_comes_to_the_same(tmp_path, corpus, adapts):
    folder, kept = folder_of(tmp_path, corpus, adapts), tmp_path / "kept.json"
    whole = eval_bpb.judge(folder, corpus)
    assert whole["valid"], whole
    kill_in_the_middle(folder, corpus, kept)
    state = json.loads(kept.read_text())
    assert 0 < state["count"] < whole["val_tokens"] and state["surplus"]["count"] > 0
    with open(kept.with_name(kept.name + ".f32"), "ab") as file:
        file.write(b"\x00" * 7)  # what was appended and never said to stand
    asked = []

    def spied(contender: Contender, tokens: np.ndarray) -> np.ndarray:
        if not contender.probe:  # a fresh process is asked at random
            asked.append(tokens.size)
        return plain(contender, tokens)

    plain = Contender.logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Contender, "logprobs", spied)
        limits = Limits(math.inf, probe_seconds=math.inf)
        verdict = eval_bpb.judge(folder, corpus, limits=limits, keep=(kept, 800))
        after, asked[:] = sum(asked), []
        eval_bpb.judge(folder, corpus)
    assert after <= sum(asked) - state["count"]  # what stands is not asked for again, probes of it neither
    assert verdict["valid"] and verdict["val_tokens"] == whole["val_tokens"]
    assert verdict["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-7)
    evidence = {c["number"]: c["evidence"] for c in verdict["checks"]}
    assert "interrupted 1 times" in evidence[6] and "lifted" in evidence[10]
    assert verdict["eval_seconds"] > state["scoring"]
    assert next(c["status"] for c in verdict["checks"] if c["number"] == 10) != "failed"
    again = json.loads(kept.read_text())
    assert again["surplus"]["count"] > state["surplus"]["count"]  # what was seen before still counts


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "told"), [(1 << 20, ""), (14_000, "learned 1 of 2"), (8_000, "of 4")])
def test_few_stretches_are_asked_blind_again_too(tmp_path, corpus, chunk, told):
    folder = submission(tmp_path / "slow", corpus, SLOW.replace("ADAPT", LEARNS), adapts=True, chunk=chunk)
    verdict = eval_bpb.judge(folder, corpus)
    assert verdict["valid"] and told in verdict["checks"][0]["evidence"], verdict


@pytest.mark.slow
def test_kept_scores_that_were_tampered_with_are_not_what_the_judge_finds(tmp_path, corpus):
    """Better scores written into the kept file are not those whose hash stands beside it."""
    folder, kept = folder_of(tmp_path, corpus, False), tmp_path / "kept.json"
    kill_in_the_middle(folder, corpus, kept)
    scores = np.fromfile(tmp_path / "kept.json.f32", dtype="<f4")
    (scores * np.float32(0.5)).tofile(tmp_path / "kept.json.f32")
    done = run(*command(folder, corpus, kept))
    assert done.returncode == 2 and "damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_scores_of_another_submission_or_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text('{"schema": 4, "stretches": 1, "count": 2, "identity": {"folder": "a"}}')
    (tmp_path / "kept.json.f32").write_bytes(np.zeros(2, "<f4").tobytes())
    assert KeptScores(path, {"folder": "a"}).count == 2
    with pytest.raises(UsageError, match="of another submission"):
        KeptScores(path, {"folder": "b"})
    (tmp_path / "kept.json.f32").write_bytes(b"")
    with pytest.raises(UsageError, match="of another submission"):
        KeptScores(path, {"folder": "a"})
    path.write_text('{"schema": 4, "count": 2')
    with pytest.raises(UsageError, match="damaged"):
        KeptScores(path, {"folder": "a"})


@pytest.mark.slow
def test_old_scores_beside_a_file_that_was_deleted_are_not_taken(tmp_path, corpus):
    folder = folder_of(tmp_path, corpus, False)
    (tmp_path / "kept.f32").write_bytes(np.full(5000, -1e-4, "<f4").tobytes())
    done = run("eval_bpb.py", folder, "--data", corpus, "--keep", tmp_path / "kept", "--keep-every", 5000, "--json")
    assert not (tmp_path / "kept").exists()  # of a scoring that has ended
    plain = run("eval_bpb.py", folder, "--data", corpus, "--json")
    assert json.loads(done.stdout)["val_loss"] == pytest.approx(json.loads(plain.stdout)["val_loss"], rel=1e-7)


@pytest.mark.slow
def test_scores_kept_at_other_distances_are_another_scorings(tmp_path, corpus):
    path = tmp_path / "kept"
    path.write_text('{"schema": 4, "stretches": 1, "count": 2, "identity": {"every": 5}}')
    (tmp_path / "kept.f32").write_bytes(np.zeros(2, "<f4").tobytes())
    assert KeptScores(path, {"every": 5}, 5).count == 2
    folder = folder_of(tmp_path, corpus, False)
    done = run("eval_bpb.py", folder, "--data", corpus, "--keep", path, "--keep-every", 7)
    assert done.returncode == 2 and "another submission" in done.stderr


@pytest.mark.slow
def test_a_folder_that_takes_no_verdict_loses_none(tmp_path, corpus):
    folder = folder_of(tmp_path, corpus, False)
    (folder / "verdict.json").mkdir()  # which no file replaces
    done = run("eval_bpb.py", folder, "--data", corpus, "--keep", tmp_path / "kept", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["valid"] and "no verdict.json" in done.stderr


def test_a_submission_may_not_hold_the_judges_file(tmp_path, corpus):
    folder = folder_of(tmp_path, corpus, False)
    done = run("eval_bpb.py", folder, "--data", corpus, "--keep", folder / "kept")
    assert done.returncode == 2 and "submission's own folder" in done.stderr


def test_two_judges_do_not_write_one_file(tmp_path):
    first = KeptScores(tmp_path / "kept.json", {"a": 1})
    with pytest.raises(UsageError, match="another judge is at it"):
        KeptScores(tmp_path / "kept.json", {"a": 1})
    first.taken.close()
    KeptScores(tmp_path / "kept.json", {"a": 1})
