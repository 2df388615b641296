"""The log of a run: every event a JSON line, and one line on the console every so many steps. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TextIO

from golf.bundle import ROOT
from golf.config import Config, UsageError
from golf.data import Corpus

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def git_state() -> dict:
    """Commit of the checkout and whether it has uncommitted changes; empty outside one."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--", ".", ":!runs"))} if commit else {}


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict:
    """What the numbers of a run depend on besides its configuration."""
    packages = ("torch", "numpy", "zstandard", "sentencepiece")
    return {
        "python": platform.python_version(), "platform": platform.platform(), "processor": processor(),
        "cores": os.cpu_count(), **{name: metadata.version(name) for name in packages}, **git_state(),
    }  # fmt: skip


def start_row(config: Config, corpus: Corpus, machine: dict) -> dict:
    """First row of a log."""
    return {
        "event": "start", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv,
        "environment": environment(), "machine": {k: list(v) if k == "notes" else str(v) for k, v in machine.items()},
        "config": asdict(config), "fingerprint": config.fingerprint,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "train_tokens": corpus.tokens["train"]},
    }  # fmt: skip


def finite(value: object) -> object:
    """The same value with numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def lock(file: TextIO) -> bool:
    """Take a file for this process until it ends; False when another has it. Systems without such locks always do."""
    for _ in range(5):  # a reader that looks whether the file is taken holds it for a moment
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def is_locked(path: Path) -> bool:
    """Whether a process that still lives writes this log."""
    with open(path, encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError:
            return True


def read_log(path: Path) -> list[dict]:
    """The rows of a log as far as they are whole; steps that a resumed run took again stand once, as they stand now.
    Raises UsageError for a file that cannot be read."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    rows: list[dict] = []
    for line in lines:
        row = parsed(line)
        if row.get("event") == "resumed":
            rows = [r for r in rows if not (isinstance(r.get("step"), int) and r["step"] > row.get("step", 0))]
        if row:
            rows.append(row)
    return rows


def parsed(line: bytes | str) -> dict:
    """A log's line as an object; an empty one where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


class Journal:
    """Append-only log.jsonl of one run, and its console lines."""

    def __init__(self, folder: Path, config: Config, rank: int):
        self.config, self.rank, self.folder = config, rank, folder
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8") if rank == 0 else None
        if self.file and not lock(self.file):
            raise UsageError(f"{folder}: another process writes this run; wait for it, or give another --run.name.")
        self.environment: dict = {}
        self.last_step_logged = 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the error that we report
            if error is not None:
                self.write({"event": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})
            self.file.close()

    def write(self, row: dict) -> None:
        """Log a row; print what people follow."""
        if self.file is None:
            return
        self.file.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self.file.flush()
        speak = getattr(self, "on_" + row["event"].replace("-", "_"), None)
        if speak:
            speak(row)

    def on_start(self, row: dict) -> None:
        shape, machine = self.config.shape, row["machine"]
        self.environment = row["environment"]
        print(
            f"{self.config.preset} seed {self.config.run.seed}: {shape.parameter_count:,} parameters, "
            f"{shape.unique_layers} unique and {shape.effective_layers} effective layers, width {shape.width}; "
            f"{machine['world']} x {machine['device']} {machine['dtype'][6:]}, compile {machine['compile']}; "
            f"corpus {row['corpus']['name']} -> {self.folder}"
        )
        for note in row["machine"]["notes"]:
            print(note)

    def on_memory(self, row: dict) -> None:
        print(row["message"])

    def on_warm_up(self, row: dict) -> None:
        print(f"warm-up {row['seconds']:.1f} s (outside the clock)", flush=True)

    def on_step(self, row: dict) -> None:
        if row["step"] != 1 and row["step"] % max(1, self.config.run.log_every):
            return
        speed = row["tokens"] / max(row["elapsed"], 1e-9)
        if self.config.run.max_steps:
            left = f"{self.config.run.max_steps - row['step']} steps left"
        else:
            left = f"{row['limit'] - row['elapsed']:.0f} s left"
        pace = f"{speed:>9,.0f} tokens/s  {row['ms']:>7.1f} ms/step"
        print(f"step {row['step']:>6}  loss {row['loss']:.4f}  {pace}  {left}", flush=True)

    def on_resumed(self, row: dict) -> None:
        changed = "; the code has changed since" if row["code_changed"] else ""
        print(f"resumed after step {row['step']}, {row['elapsed']:.2f} s on the clock{changed}")

    def on_not_kept(self, row: dict) -> None:
        print(f"no checkpoint at step {row['step']}: {row['reason']}")

    def on_validation(self, row: dict) -> None:
        print(f"step {row['step']:>6}  val_loss {row['val_loss']:.4f}  val_bpb {row['val_bpb']:.4f}", flush=True)

    def on_trained(self, row: dict) -> None:
        why = f": {row['reason']}" if row["reason"] else ""
        print(f"training {row['status']}{why} after {row['steps']} steps, {row['train_seconds']:.2f} s", flush=True)

    def on_calibrated(self, row: dict) -> None:
        late = "" if row["batches"] else ", too late: packed without"
        print(
            f"calibrated on {row['batches']} batches in {row['seconds']:.1f} s (reserve {row['reserve']:.1f} s){late}"
        )

    def on_packed(self, row: dict) -> None:
        loss = row["predicted_loss"]
        expected = f", expected to cost {loss:.5f} nats a token" if loss is not None else ""
        print(f"packed in {row['seconds']:.1f} s: {row['bytes']:,} bytes{expected}", flush=True)
        for note in row["notes"]:
            print(note)

    def on_unpacked(self, row: dict) -> None:
        print(f"before packing: val_loss {row['val_loss']:.5f}  val_bpb {row['val_bpb']:.5f}", flush=True)

    def on_penalty(self, row: dict) -> None:
        costs = ", ".join(f"{loops} loops {bpb:+.5f}" for loops, bpb in row["bpb"].items())
        print(f"packing costs, bpb: {costs}", flush=True)

    def close_with(self, record: object) -> None:
        """Log the finished record and print its closing block."""
        self.write({"event": "record", **record.as_dict()})
        for key, value in record.closing().items():
            print(f"{key}: {value}")
