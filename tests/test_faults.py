"""Faults while training, with real processes: what is said and how soon, what survives, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from golf import run_list
from golf.checkpoint import read_tensors, write_sensitivities, write_weights
from golf.codec import load_artifact
from golf.log_file import read_log
from golf.presets import PRESETS
from golf.quantize import Sensitivity
from golf.shape import tensor_class
from golf.size import submission_bytes
from golf.spare import BESIDES, needed
from tests.conftest import ROOT, TINY, run

pytestmark = pytest.mark.slow
NAMED_WITHIN = 30.0  # seconds until a lost rank is named
LONG = ("--run.max-steps", "100000", "--run.log-every", "1", "--run.no-judge", "--recipe.loops-from", "0")


class Launched:
    """A run in a session of its own, its output read as it comes, with the time of each line."""

    def __init__(self, corpus: Path, runs: Path, ranks: int, *more: object, before: object = None, plant: str = ""):
        """`plant` is code that is run before train_gpt is imported, to make something go wrong."""
        script = "train_gpt.py"
        if plant:
            script = runs / "planted-train_gpt.py"
            script.write_text(f"import os, sys, time\n{plant}\nimport train_gpt\nfrom golf.console import run_script\n"
                              "code = run_script(train_gpt.main)\nsys.stdout.flush()\nos._exit(code)\n")  # fmt: skip
        words = [script, "smoke", *TINY, *LONG, "--run.data", corpus, "--run.runs", runs, *more]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*(start if ranks > 1 else [sys.executable]), *map(str, words)]
        self.mark = uuid.uuid4().hex
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN_OF_A_TEST": self.mark}
        self.runs, self.lines = runs, []
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True, preexec_fn=before)  # fmt: skip
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.tree():
            process.kill()
        self.process.wait()

    def tree(self) -> list[psutil.Process]:
        """Every process of the run that lives, wherever it hangs by now: each inherited the run's mark."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("RUN_OF_A_TEST") == self.mark
                found += [process] if mine and process.status() != psutil.STATUS_ZOMBIE else []
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def nothing_lives(self, seconds: float = 10) -> None:
        """None of its processes is left soon after the launcher's end."""
        left = psutil.wait_procs(self.tree(), timeout=seconds)[1]
        assert not left, [p.cmdline() for p in left]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return next(p for p in self.tree() if p.environ().get("RANK") == str(number) and "smoke" in p.cmdline())

    def reaches(self, step: int, seconds: float = 180) -> None:
        self.says("step ", seconds, lambda line: line.startswith("step") and int(line.split()[1]) >= step)

    def says(self, words: str, seconds: float = 60, test: object = None) -> float:
        """Wait for a line; the time it came."""
        end, at = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            while at < len(self.lines):
                when, line = self.lines[at]
                at += 1
                if (test or (lambda text: words in text))(line):
                    return when
            time.sleep(0.05)
        raise AssertionError(f"it did not say {words!r}: {''.join(line for _, line in self.lines[-30:])}")

    def names(self, words: str, began: float) -> None:
        """It says who was lost, soon, and all of it ends; `pytest -rP` shows how soon."""
        named = self.says(words) - began
        assert named < NAMED_WITHIN
        assert self.ends() != 0
        self.nothing_lives()
        print(f"said after {named:.1f} s, ended after {time.monotonic() - began:.1f} s")

    def ends(self, seconds: float = 90) -> int:
        code = self.process.wait(timeout=seconds)
        self.reader.join(timeout=10)
        return code

    @property
    def folder(self) -> Path:
        (found,) = self.runs.glob("*-smoke-seed*")
        return found

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def nothing_half_written(self) -> None:
        assert not [p for p in self.folder.rglob("*") if p.name.endswith(".part")]
        for path in self.folder.glob("*.json"):
            json.loads(path.read_text())


def steps_of(folder: Path) -> int:
    return max(r["step"] for r in read_log(folder / "log.jsonl") if r["event"] == "step")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "submission.json").read_text())


# == a rank dies or stalls =========================================================================================


@pytest.mark.parametrize(("ranks", "lost", "how"), [
    (2, 1, signal.SIGKILL), (2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP), (2, 0, signal.SIGSTOP),
    (4, 2, signal.SIGKILL), (4, 0, signal.SIGKILL), (4, 3, signal.SIGSTOP), (4, 0, signal.SIGSTOP),
])  # fmt: skip
def test_a_rank_that_is_lost_is_named_and_all_end(corpus, tmp_path, ranks, lost, how):
    with Launched(corpus, tmp_path, ranks, "--run.keep-every", 1) as run_:
        run_.reaches(5)
        run_.rank(lost).send_signal(how)
        began = time.monotonic()
        run_.names(f"rank {lost}: it has not answered", began)
        run_.nothing_half_written()
        assert steps_of(run_.folder) >= 5
        record = record_of(run_.folder)
        assert record["status"] == "crash" and f"rank {lost}" in record["reason"] and record["steps"] >= 5
        weights = read_tensors(run_.folder / "checkpoint.safetensors")[1]
        assert all(np.isfinite(w).all() for w in weights.values())
        if lost:  # else who writes checkpoints may have been lost before that of the last step
            kept = load_file(run_.folder / "states" / f"{record['steps']:09d}.safetensors")
            assert all(np.array_equal(w, kept[f"model/{name}"]) for name, w in weights.items())


def in_reading(rank: int, what: str) -> str:
    """Code that makes a rank do something in its 41st reading of text."""
    return (
        "from golf import data\nplain = data.TokenStream.read\n"
        "def read(stream, start, count):\n"
        "    read.count = getattr(read, 'count', 0) + 1\n"
        f"    if os.environ['RANK'] == '{rank}' and read.count > 40:\n        {what}\n"
        "    return plain(stream, start, count)\n"
        "data.TokenStream.read = read\n"
    )


HANGS = "print('it hangs', flush=True), time.sleep(600)"
IN_COMPUTING = (
    "from golf.machine import Machine\nplain = Machine.given\n"
    "def given(machine, array):\n"
    "    given.count = getattr(given, 'count', 0) + 1\n"
    f"    if os.environ['RANK'] == '1' and given.count > 80:\n        {HANGS}\n"
    "    return plain(machine, array)\n"
    "Machine.given = given\n"
)


@pytest.mark.parametrize("hangs", [in_reading(1, HANGS), IN_COMPUTING], ids=["reading", "computing"])
def test_a_rank_that_stands_still_while_others_wait_is_named(corpus, tmp_path, hangs):
    """Its threads live, so that it answers: the main thread hangs, in reading a file that never comes, or at work."""
    with Launched(corpus, tmp_path, 2, plant=hangs) as run_:
        began = run_.says("it hangs", 180)
        run_.names("rank 1: it has stood in step", began)
        run_.nothing_half_written()
        record = record_of(run_.folder)
        assert record["status"] == "crash"
        assert int(re.search(r"rank 1: it has stood in step (\d+)", record["reason"])[1]) == steps_of(run_.folder) + 1
        weights = read_tensors(run_.folder / "checkpoint.safetensors")[1]
        assert all(np.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize(("lost", "what", "why"), [
    (1, "raise MemoryError", "Memory ran out in step"), (1, "raise ValueError('a planted fault')", "a planted fault"),
    (0, "raise MemoryError", "Memory ran out in step"),
])  # fmt: skip
def test_a_rank_that_fails_alone_is_named_with_its_reason(corpus, tmp_path, lost, what, why):
    with Launched(corpus, tmp_path, 2, plant=in_reading(lost, f"print('it fails', flush=True); {what}")) as run_:
        began = run_.says("it fails", 180)
        run_.names(f"rank {lost}: it ended: {why}" if lost else f"error: {why}", began)
        run_.nothing_half_written()
        record = record_of(run_.folder)
        assert record["status"] == "crash" and (why.lower() in record["reason"].lower()), record["reason"]
        assert (run_.folder / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_killed_leave_a_log_and_checkpoints_to_go_on_from(corpus, tmp_path, ranks):
    with Launched(corpus, tmp_path, ranks, "--run.keep-every", 3) as run_:
        run_.reaches(8)
        for process in run_.tree():
            process.kill()
        run_.ends()
        run_.nothing_lives()
        seen = max(int(line.split()[1]) for _, line in run_.lines if line.startswith("step"))
        assert steps_of(run_.folder) >= seen >= 8
        assert len(list((run_.folder / "states").glob("*.safetensors"))) == 2
        assert [r.status for r in run_list.started(tmp_path)] == ["lost"]
        run_.nothing_half_written()
        folder = run_.folder
    with Launched(corpus, tmp_path, ranks, "--run.keep-every", 3, "--run.resume", folder) as again:
        assert again.says("resumed after step")
        again.reaches(12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_with_what_there_is(corpus, tmp_path, how, ranks):
    with Launched(corpus, tmp_path, ranks, "--pack.calibration-batches", 0) as run_:
        run_.reaches(5)
        os.killpg(run_.process.pid, how) if how == signal.SIGINT else run_.process.send_signal(how)
        assert run_.ends() != 0
        run_.nothing_lives()
        run_.nothing_half_written()
        record = record_of(run_.folder)
        assert record["status"] == "interrupted" and record["steps"] >= 5 and (run_.folder / "model.bin").exists()


def test_a_run_of_ranks_that_is_stopped_is_judged_too(corpus, tmp_path):
    with Launched(corpus, tmp_path, 2, "--pack.calibration-batches", 0, "--run.judge") as run_:
        run_.reaches(5)
        run_.process.send_signal(signal.SIGTERM)
        run_.ends()
        run_.nothing_lives()
        record = record_of(run_.folder)
        assert record["status"] == "interrupted" and record["val_bpb"] > 0, run_.text[-2000:]
        assert json.loads((run_.folder / "verdict.json").read_text())["valid"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_with_what_there_is(corpus, tmp_path, number, how):
    with Launched(corpus, tmp_path, 2, "--pack.calibration-batches", 0) as run_:
        run_.reaches(5)
        run_.rank(number).send_signal(how)
        run_.ends()
        run_.nothing_lives()
        run_.nothing_half_written()
        record = record_of(run_.folder)
        assert record["status"] == "interrupted" and record["steps"] >= 5 and (run_.folder / "model.bin").exists()
        assert not (run_.folder / "checkpoint.safetensors").exists()  # it stood in for the artifact


# == data, memory, disk, numbers ===================================================================================


def copy_of(corpus: Path, place: Path) -> Path:
    shutil.copytree(corpus, place / "data")
    return place / "data"


def test_a_shard_that_is_deleted_goes_on_being_read(corpus, tmp_path):
    data = copy_of(corpus, tmp_path)
    with Launched(data, tmp_path, 1) as run_:
        run_.reaches(3)
        for path in data.glob("train_*.bin"):
            path.unlink()
        run_.reaches(12)
        run_.process.send_signal(signal.SIGTERM)
        assert run_.ends() == 130 and record_of(run_.folder)["status"] == "interrupted"


@pytest.mark.parametrize(("fault", "ranks"), [("cut", 1), ("changed", 1), ("cut", 2)])
def test_a_shard_that_is_spoilt_during_the_run_is_named_and_the_weights_are_kept(corpus, tmp_path, fault, ranks):
    data = copy_of(corpus, tmp_path)
    with Launched(data, tmp_path, ranks) as run_:
        run_.reaches(3)
        for path in data.glob("train_*.bin"):
            with open(path, "r+b") as file:
                if fault == "cut":
                    file.truncate(5000)
                else:
                    file.seek(1024)
                    file.write(bytes(path.stat().st_size - 1024))  # tokens that there are
        said = ".bin was cut to 5,000 bytes" if fault == "cut" else ".bin was written to while"
        run_.says(said)
        assert "\nerror: " in run_.text
        assert run_.ends() in ((2,) if ranks == 1 else (1, 2))  # a launcher has codes of its own
        assert ranks > 1 or ("Traceback" not in run_.text and run_.text.count("\nerror: ") == 1)
        assert record_of(run_.folder)["status"] == "crash" and (run_.folder / "checkpoint.safetensors").exists()


def test_memory_that_runs_out_later_is_a_sentence_and_keeps_the_weights(corpus, tmp_path):
    """A look at the validation text needs more than training had."""
    with Launched(corpus, tmp_path, 1, "--run.validate-every", 500) as run_:
        run_.reaches(20)
        process = psutil.Process(run_.process.pid)
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 1_000_000, -1))
        assert run_.ends(120) == 2, run_.text[-3000:]
        record = record_of(run_.folder)
        assert 20 <= record["steps"] <= 500 and (run_.folder / "checkpoint.safetensors").exists()
        said = f"error: Memory ran out in step {record['steps'] + 1}"
        assert run_.text.count("Memory ran out") == 1 and said in run_.text and "Traceback" not in run_.text


def test_memory_that_runs_out_in_packing_is_a_sentence_and_keeps_the_weights(corpus, tmp_path):
    plant = "import train_gpt\ndef pack(*rest):\n    raise MemoryError\ntrain_gpt.pack = pack\n"
    with Launched(corpus, tmp_path, 1, "--run.max-steps", 5, "--pack.calibration-batches", 0, plant=plant) as run_:
        assert run_.ends() == 2 and "Traceback" not in run_.text, run_.text[-3000:]
        assert run_.text.count("error: ") == 1 and "error: Memory ran out after training" in run_.text
        record = record_of(run_.folder)
        assert record["status"] == "crash" and record["reason"] == "out of memory after training"
        assert record["steps"] == 5 and read_tensors(run_.folder / "checkpoint.safetensors")
        run_.nothing_half_written()


def test_memory_that_is_too_small_from_the_start_is_a_sentence(corpus, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_450_000_000, resource.RLIM_INFINITY))

    rows = ("--recipe.batch-tokens", 4_194_304, "--recipe.sequence-length", 1024)
    with Launched(corpus, tmp_path, 1, *rows, before=limit) as run_:
        assert run_.ends(120) == 2, run_.text[-2000:]
        assert "fit in memory" in run_.text or "Memory ran out" in run_.text, run_.text[-2000:]
        assert "Traceback" not in run_.text
        run_.nothing_half_written()
        assert [r.status for r in run_list.started(tmp_path)] == ["crash"]


def test_a_full_disk_costs_the_log_and_not_the_run(corpus, tmp_path):
    """A limit on what a file may hold stands for a full disk, where no file system can be mounted."""
    more = ("--run.max-steps", 2500, "--pack.calibration-batches", 0)
    with Launched(corpus, tmp_path, 1, *more) as run_:
        run_.reaches(20)
        psutil.Process(run_.process.pid).rlimit(psutil.RLIMIT_FSIZE, (300_000, 300_000))
        assert run_.ends(300) == 0, run_.text[-2000:]
        assert "the log cannot be written (File too large)" in run_.text
        assert record_of(run_.folder)["steps"] == 2500 and (run_.folder / "model.bin").exists()


@pytest.mark.parametrize("preset", ["smoke", "laptop", "baseline"])
def test_the_room_that_is_held_is_that_of_what_a_run_may_leave(tmp_path, preset):
    config = PRESETS[preset]
    table = {name: np.zeros(size, np.float32) for name, size in config.shape.parameters().items()}
    matrices = {name: w for name, w in table.items() if tensor_class(name) != "control"}
    found = {n: Sensitivity(np.zeros((w.shape[1],) * 2), np.zeros(w.shape[0])) for n, w in matrices.items()}
    write_weights(tmp_path / "checkpoint.safetensors", config.shape, table)
    write_sensitivities(tmp_path / "hessians.safetensors", config.shape, found)
    left = sum(path.stat().st_size for path in tmp_path.iterdir()) + submission_bytes(config, 40_000)
    assert left + BESIDES // 2 < needed(config, 40_000) < left + BESIDES


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill_up(place: Path) -> None:
    """A file that takes all the room there is left."""
    with open(place / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(1 << 12)):
            pass


def test_a_disk_that_fills_up_costs_log_rows_and_checkpoints_and_not_the_run(corpus, small_disk):
    """The room for what a run leaves was held from its start."""
    more = ("--run.max-steps", 200, "--run.keep-every", 20, "--pack.calibration-batches", 0, "--run.judge")
    with Launched(corpus, small_disk, 1, *more) as run_:
        run_.reaches(45)
        fill_up(small_disk)
        assert run_.ends() == 0 and "Traceback" not in run_.text, run_.text[-3000:]
        assert "the log cannot be written (No space left on device)" in run_.text
        assert "no checkpoint at step 60: No space left on device" in run_.text
        record = record_of(run_.folder)
        assert record["status"] == "complete" and record["steps"] == 200 and record["val_bpb"] > 0
        assert load_artifact(run_.folder / "model.bin") and (run_.folder / "report.html").exists()
        assert steps_of(run_.folder) >= 45
        run_.nothing_half_written()


def test_a_disk_that_fills_up_keeps_the_weights_of_a_run_that_is_lost(corpus, small_disk):
    with Launched(corpus, small_disk, 2) as run_:
        run_.reaches(5)
        fill_up(small_disk)
        run_.rank(1).kill()
        assert run_.ends() != 0
        record = record_of(run_.folder)
        assert record["status"] == "crash" and "rank 1" in record["reason"]
        assert read_tensors(run_.folder / "checkpoint.safetensors")
        run_.nothing_half_written()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_without_the_room_that_a_run_needs_is_refused_before_any_time_is_spent(corpus, small_disk, ranks):
    (small_disk / "filler").write_bytes(bytes(7_000_000))
    with Launched(corpus, small_disk, ranks) as run_:
        assert run_.ends() == (2 if ranks == 1 else 1), run_.text
        assert not re.search("^step ", run_.text, re.M) and run_.text.count("error: --run.runs") == 1
        assert "no room for the" in run_.text
        run_.nothing_lives()


def test_a_wall_clock_that_jumps_moves_no_deadline(corpus, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nplain = time.time\ncount = [0]\n"
        "def jumping():\n    count[0] += 1\n"
        f"    count[0] == 1 and open('{tmp_path}/jumped', 'w').close()\n"
        "    return plain() + (count[0] % 3 - 1) * 86400\n"
        "time.time = jumping\n"
    )
    done = run("train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", tmp_path, "--run.cap", 4,
               "--run.no-judge", "--run.name", "jumps", PYTHONPATH=f"{tmp_path}:{ROOT}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "jumped").exists()
    (folder,) = tmp_path.glob("*-jumps")
    assert 3 < record_of(folder)["train_seconds"] <= 4


def test_two_runs_started_at_once_in_one_folder_leave_one(corpus, tmp_path):
    more = ("--run.max-steps", 5, "--pack.calibration-batches", 0, "--run.name", "same")
    with Launched(corpus, tmp_path, 1, *more) as one, Launched(corpus, tmp_path, 1, *more) as two:
        assert sorted((one.ends(), two.ends())) == [0, 2]
        assert "exists already" in one.text + two.text
        (folder,) = tmp_path.glob("*-same")
        assert record_of(folder)["status"] == "complete"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_costs_one_update(corpus, tmp_path, what, ranks):
    """At a step that is drawn anew each time; of two ranks one alone has it."""
    step = random.SystemRandom().randint(3, 40)
    bad = "loss = loss * float('nan')" if what == "loss" else "next(model.parameters()).grad.fill_(float('nan'))"
    plant = (
        "import train_gpt\nplain = train_gpt.accumulate\n"
        "def accumulate(model, *rest):\n"
        "    accumulate.count = getattr(accumulate, 'count', 0) + 1\n    loss = plain(model, *rest)\n"
        f"    if accumulate.count == {step} and os.environ.get('RANK', '0') == '{ranks - 1}':\n        {bad}\n"
        "    return loss\ntrain_gpt.accumulate = accumulate\n"
    )
    with Launched(corpus, tmp_path, ranks, plant=plant) as run_:
        assert run_.ends(180) == 1, run_.text[-2000:]
        run_.nothing_lives()
        record = record_of(run_.folder)
        assert record["status"] == "crash" and "nan" in record["reason"] and f"at step {step}" in record["reason"]
        assert record["steps"] == step - 2 and (run_.folder / "model.bin").exists()  # the one before led there


def test_a_disk_that_is_full_at_the_record_costs_the_record_alone(corpus, tmp_path):
    plant = (
        "from golf import records\nplain = records.write_bytes\n"
        "def write_bytes(path, *parts):\n"
        "    if path.name == 'submission.json':\n        raise OSError(28, 'No space left on device', str(path))\n"
        "    plain(path, *parts)\nrecords.write_bytes = write_bytes\n"
    )
    with Launched(corpus, tmp_path, 1, "--run.max-steps", 5, "--pack.calibration-batches", 0, plant=plant) as run_:
        assert run_.ends() == 2 and "submission.json: No space left on device" in run_.text
        assert "Traceback" not in run_.text and load_artifact(run_.folder / "model.bin")
        run_.nothing_half_written()
        assert [r.status for r in run_list.started(tmp_path)] == ["crash"]
