"""What people see of a run: lines in a pipe, a panel on a terminal, another terminal that follows."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from golf.live import State, curve, predicted_loss, told
from golf.log_file import read_log
from tests.conftest import ROOT, TINY, run

FIRST = {
    "event": "start", "folder": "runs/x",
    "config": {"preset": "smoke", "run": {"seed": 1, "max_steps": 0, "log_every": 2}},
    "corpus": {"name": "tiny", "bytes_a_token": 2.0}, "planned": {"bytes": 350_000, "cap": 400_000},
}  # fmt: skip


def step(number: int, **values: object) -> dict:
    usual = {"event": "step", "step": number, "loss": 4.0 - 0.01 * number, "elapsed": 0.1 * number, "ms": 100.0,
             "progress": number / 100, "loops": 1, "tokens": 512 * number, "limit": 10.0}  # fmt: skip
    return usual | values


def on_a_terminal(words: list[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and output of a command whose output is a terminal."""
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=side, stderr=side, stdin=side)
    os.close(side)
    shown, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([main], [], [], 0.1)[0]:
            try:
                data = os.read(main, 1 << 16)
            except OSError:  # the other side has been closed
                break
            shown += data
            if not data:
                break
    os.close(main)
    return process.wait(timeout=10), shown.decode(errors="replace")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("live")
    done = run("train_gpt.py", "smoke", *TINY, "--run.max-steps", 40, "--run.data", corpus, "--run.runs", runs,
               "--run.no-judge", "--pack.calibration-batches", 0, "--run.log-every", 5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = runs.iterdir()
    return folder


def test_a_pipe_gets_plain_lines(finished):
    done = run("record.py", "watch", finished)
    assert done.returncode == 0 and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 9 and all(part in steps[-1] for part in ("loss", "tokens/s", "ms/step", "0 steps left"))
    assert lines[-1].startswith("complete: val_bpb None")


def test_a_log_of_an_older_version_is_shown_too():
    done = run("record.py", "watch", next((ROOT / "runs").glob("*laptop-seed1*")))
    assert done.returncode == 0 and "step   3420" in done.stdout, done.stderr


def test_a_terminal_gets_a_panel_that_ends_in_the_same_block(finished):
    code, shown = on_a_terminal(["record.py", "watch", str(finished)])
    assert code == 0 and "complete: val_bpb" in shown, shown[-2000:]
    assert "\x1b[" in shown and "loops" in shown and "bits a byte of the training text" in shown


@pytest.mark.slow
def test_training_on_a_terminal_shows_a_panel_and_the_closing_block(corpus, tmp_path):
    words = ["train_gpt.py", "smoke", *TINY, "--run.max-steps", "40", "--run.data", str(corpus), "--run.runs",
             str(tmp_path), "--run.no-judge", "--pack.calibration-batches", "0"]  # fmt: skip
    code, shown = on_a_terminal(words, 120)
    assert code == 0 and "steps left" in shown and "record: " in shown.splitlines()[-2], shown[-2000:]


def test_a_watcher_follows_a_writer_and_says_when_it_is_gone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom golf.journal import Journal\n"
        "log = Journal(Path(sys.argv[1]), 0)\nlog.write({'event': 'warm-up', 'seconds': 1.0})\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "warm-up" in writer.stdout.readline() and writer.stdout.readline() == "ready\n"
    watcher = subprocess.Popen([sys.executable, "record.py", "watch", folder], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert "warm-up 1.0 s" in watcher.stdout.readline()
        assert watcher.poll() is None  # it waits while the writer lives
        writer.kill()
        _, said = watcher.communicate(timeout=20)
        assert watcher.returncode == 1 and "ended without a record" in said
    finally:
        writer.kill(), watcher.kill()
        writer.wait()


def test_a_run_that_goes_on_after_its_record_is_followed(tmp_path):
    rows = [{"event": "step", "step": 1}, {"event": "record", "status": "interrupted", "val_bpb": 2.5},
            {"event": "start"}, {"event": "step", "step": 2}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("record.py", "watch", tmp_path)
    assert done.returncode == 1 and "ended without a record" in done.stderr, done.stdout
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    done = run("record.py", "watch", tmp_path)
    assert done.returncode == 0 and "interrupted: val_bpb 2.5, None bytes" in done.stdout, done.stderr


def test_a_half_written_line_is_waited_for_and_a_torn_one_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(step(1)) + "\n{torn\n" + json.dumps(step(2)) + "\n" + json.dumps(step(3))[:20])
    assert [r["step"] for r in read_log(log)] == [1, 2]
    log.write_text("".join(json.dumps(r) + "\n" for r in (
        step(1), step(2), step(3), {"event": "resumed", "step": 1}, step(2, loss=9.0))))  # fmt: skip
    assert [(r["step"], r["loss"]) for r in read_log(log) if r["event"] == "step"] == [(1, 3.99), (2, 9.0)]


def test_the_end_is_predicted_from_a_curve_that_is_known():
    progress = [n / 1000 for n in range(1, 301)]
    loss = [3.0 - 0.4 * math.log(p) for p in progress]
    assert predicted_loss(progress, loss) == pytest.approx(3.0)
    assert predicted_loss(progress[:10], loss[:10]) is None and predicted_loss([0.5] * 30, [1.0] * 30) is None


def test_real_curves_are_predicted_within_a_third_of_a_nat():
    """The runs kept in this repository: their last steps' mean from what was known at a half of the clock."""
    logs = sorted((ROOT / "runs").rglob("log.jsonl"))
    assert len(logs) > 20
    off = []
    for log in logs:
        rows = [r for r in read_log(log) if r["event"] == "step"]
        half = [r for r in rows if r["progress"] <= 0.5]
        end = sum(r["loss"] for r in rows[-50:]) / 50
        off.append(predicted_loss([r["progress"] for r in half], [r["loss"] for r in half]) - end)
    assert max(map(abs, off)) < 0.3 and sorted(map(abs, off))[-2] < 0.15, sorted(off)


def test_lines_say_what_is_left_and_how_fast():
    state = State()
    for row in (FIRST, step(1), step(2)):
        state.take(row)
    assert told(state, step(2)) == "step      2  loss 3.9800      5,120 tokens/s    100.0 ms/step  10 s left"
    assert told(state, step(3)) is None and len(curve([4.0, 3.0, 2.0, 1.0])) > 1
    assert state.bits == pytest.approx(0.7213475)
