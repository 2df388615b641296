"""A run that was stopped goes on as if it had not been; runs by a said pace are alike on any machine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from golf.errors import UsageError
from golf.log_file import read_log
from golf.presets import parse_command_line
from golf.resume import FOLDER, newest
from tests.conftest import ROOT, TINY, run

# Everything that a loop carries from step to step.
FULL = (
    "--recipe.average", "0.2", "--recipe.grid-noise", "uniform", "--recipe.noise-from",
    "0.2", "--recipe.noise-step", "0.1", "--recipe.loops-from", "0.4", "--recipe.clip-norm", "0.5", "--recipe.loader",
    "strided", "--pack.calibration-batches", "2", "--run.no-judge",
)  # fmt: skip


def words(corpus: Path, runs: Path, name: str, *more: object) -> list[str]:
    return [
        "train_gpt.py", "smoke", *TINY, *FULL, "--run.data", str(corpus), "--run.runs", str(runs), "--run.name", name,
        "--run.max-steps", "30", "--run.keep-every", "4", "--run.log-every", "1", *map(str, more),
    ]  # fmt: skip


def stopped_at(step: int, command: list[str], how: int = signal.SIGKILL) -> None:
    """Start a run and end it once it has told of a step, or of the end of training."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if (line.startswith("step") and int(line.split()[1]) >= step) or line.startswith("training"):
            process.send_signal(how)
            break
    process.stdout.read()
    process.wait()


def only(runs: Path, name: str) -> Path:
    (found,) = runs.glob(f"*-{name}")
    return found


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    done = run(*words(corpus, runs, "whole"))
    assert done.returncode == 0, done.stderr
    return only(runs, "whole")


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """The runs' folder and a run in it that was killed after step 17."""
    runs = tmp_path_factory.mktemp("killed")
    stopped_at(17, words(corpus, runs, "killed"))
    return runs, only(runs, "killed")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_artifact(unbroken, killed, corpus, tmp_path):
    folder = tmp_path / killed[1].name
    shutil.copytree(killed[1], folder)
    assert len(list((folder / FOLDER).iterdir())) == 2 and not (folder / "submission.json").exists()
    done = run(*words(corpus, tmp_path, folder.name[11:], "--run.resume", folder))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 16" in done.stdout
    assert (folder / "model.bin").read_bytes() == (unbroken / "model.bin").read_bytes()
    steps = [[(r["step"], r["loss"], r["gradient_norm"], r["loops"]) for r in read_log(f / "log.jsonl")
              if r["event"] == "step"] for f in (unbroken, folder)]  # fmt: skip
    assert steps[0] == steps[1] and len(steps[0]) == 30
    record = json.loads((folder / "submission.json").read_text())
    assert record["resumed"] is True and record["steps"] == 30
    assert not (folder / FOLDER).exists()  # of a run that has ended well
    again = run(*words(corpus, tmp_path, folder.name[11:], "--run.resume", folder))
    assert again.returncode == 2 and "has ended (complete)" in again.stderr


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_goes_on_from_where_it_stopped(unbroken, corpus, tmp_path):
    stopped_at(10, words(corpus, tmp_path, "asked"), signal.SIGTERM)
    folder = only(tmp_path, "asked")
    assert json.loads((folder / "submission.json").read_text())["status"] == "interrupted"
    kept = newest(folder)[1]["loop"]["result"]["steps"]
    assert kept >= 10
    done = run(*words(corpus, tmp_path, folder.name[11:], "--run.resume", folder))
    assert done.returncode == 0 and f"resumed after step {kept}" in done.stdout, done.stderr
    assert (folder / "model.bin").read_bytes() == (unbroken / "model.bin").read_bytes()


@pytest.mark.slow
def test_the_checkpoint_before_is_taken_where_the_newest_is_damaged(unbroken, killed, corpus, tmp_path):
    folder = tmp_path / killed[1].name
    shutil.copytree(killed[1], folder)
    last = max((folder / FOLDER).iterdir())
    last.write_bytes(last.read_bytes()[:1000])
    done = run(*words(corpus, tmp_path, folder.name[11:], "--run.resume", folder))
    assert done.returncode == 0 and "resumed after step 12" in done.stdout, done.stderr
    assert (folder / "model.bin").read_bytes() == (unbroken / "model.bin").read_bytes()


@pytest.mark.slow
def test_a_run_that_crashed_or_died_after_its_last_step_goes_on(unbroken, killed, corpus, tmp_path):
    """A crash leaves a record; and a run may die while it packs, when no step is left to take."""
    folder = tmp_path / killed[1].name
    shutil.copytree(killed[1], folder)
    record = json.loads((unbroken / "submission.json").read_text()) | {"status": "crash"}
    (folder / "submission.json").write_text(json.dumps(record))
    command = words(corpus, tmp_path, folder.name[11:], "--run.resume", folder, "--run.keep-every", 10)
    stopped_at(31, command)
    assert newest(folder)[1]["loop"]["result"]["steps"] == 30
    done = run(*command)
    assert done.returncode == 0 and "resumed after step 30" in done.stdout, done.stderr
    assert (folder / "model.bin").read_bytes() == (unbroken / "model.bin").read_bytes()


@pytest.mark.slow
def test_a_run_that_fails_at_once_when_it_goes_on_keeps_the_steps_it_had(corpus, tmp_path):
    """It falls back to the checkpoint, not to the weights' start."""
    wild = ("--recipe.matrix-rate", "1e15", "--recipe.clip-norm", 0, "--recipe.grid-noise", "off",
            "--run.keep-every", 1)  # fmt: skip
    done = run(*words(corpus, tmp_path, "wild", *wild))
    folder = only(tmp_path, "wild")
    assert done.returncode == 1, done.stderr
    had = newest(folder)[1]["loop"]["result"]["steps"]
    done = run(*words(corpus, tmp_path, folder.name[11:], *wild, "--run.resume", folder))
    record = json.loads((folder / "submission.json").read_text())
    assert done.returncode == 1 and record["status"] == "crash" and record["steps"] == had > 0


@pytest.mark.slow
@pytest.mark.parametrize(("more", "said"), [
    (("--run.seed", 5), "another seed"), (("--recipe.matrix-rate", 0.01), "another configuration"),
    (("--run.max-steps", 40), "another number of steps"), (("--run.name", "new"), "keeps its folder's name"),
])  # fmt: skip
def test_other_flags_are_refused_in_one_sentence(killed, corpus, tmp_path, more, said):
    runs, folder = killed
    before = (folder / "log.jsonl").read_bytes()
    done = run(*words(corpus, runs, folder.name[11:], "--run.resume", folder, *more))
    assert (folder / "log.jsonl").read_bytes() == before
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_folder_that_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        newest(tmp_path)
    done = run("train_gpt.py", "smoke", "--run.resume", tmp_path)
    assert done.returncode == 2 and ("no run folder" in done.stderr or "cannot be read" in done.stderr), done.stderr


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_ends_no_run(corpus, tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))  # what a run leaves fits, no checkpoint

    command = words(corpus, tmp_path, "full", "--shape.width", 128, "--pack.calibration-batches", 0)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=limit, check=False)  # fmt: skip
    assert done.returncode == 0 and "no checkpoint at step 4: File too large" in done.stdout, done.stderr
    assert (only(tmp_path, "full") / "model.bin").exists() and not (only(tmp_path, "full") / FOLDER).exists()


@pytest.mark.slow
def test_seconds_before_and_after_are_summed_under_the_clock(corpus, tmp_path):
    base = [
        "train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path), "--run.name", "timed",
        "--run.cap", "6", "--run.keep-every", "5", "--run.log-every", "1", "--run.no-judge",
    ]  # fmt: skip
    stopped_at(40, base)
    folder = only(tmp_path, "timed")
    kept = newest(folder)[1]["loop"]["clock"]["elapsed"]
    done = run(*base, "--run.resume", str(folder))
    assert done.returncode == 0, done.stderr
    steps = [r for r in read_log(folder / "log.jsonl") if r["event"] == "step"]
    elapsed = [r["elapsed"] for r in steps]
    assert elapsed == sorted(elapsed) and 0 < kept < elapsed[-1] <= 6
    assert json.loads((folder / "submission.json").read_text())["train_seconds"] <= 6


# == by a said pace ================================================================================================


@pytest.mark.slow
def test_a_said_pace_counts_steps_and_the_calibration(corpus, tmp_path):
    """Of 3 s the two calibration batches of `smoke` take two of the deepest steps each, so that steps have 2.2."""
    base = ["train_gpt.py", "smoke", *TINY, "--run.data", str(corpus), "--run.runs", str(tmp_path), "--run.cap", "3",
            "--run.pace", "1=100,3=200", "--run.no-judge", "--recipe.loops-from", "0.6"]  # fmt: skip
    for name in ("one", "two"):
        done = run(*base, "--run.name", name)
        assert done.returncode == 0, done.stderr
    one, two = (only(tmp_path, name) for name in ("one", "two"))
    assert (one / "model.bin").read_bytes() == (two / "model.bin").read_bytes()
    steps = [r for r in read_log(one / "log.jsonl") if r["event"] == "step"]
    assert [r["ms"] for r in steps] == [100.0 if r["loops"] == 1 else 200.0 for r in steps]
    assert [r["loops"] for r in steps].count(1) == 14 and 1.9 <= steps[-1]["elapsed"] <= 2.2 + 1e-9


@pytest.mark.parametrize(("flags", "said"), [
    ("--run.pace 1=100 --run.no-judge", "give 3=MS"), ("--run.pace fast --run.no-judge", "=MS"),
    ("--run.pace 1=100,3=200", "--run.no-judge"), ("--run.pace 1=-1,3=2 --run.no-judge", "=MS"),
])  # fmt: skip
def test_a_pace_that_tells_too_little_is_refused(flags, said):
    with pytest.raises(UsageError, match=said):
        parse_command_line(["smoke", *flags.split()]).check()
