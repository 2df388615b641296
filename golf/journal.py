"""The log of a run: every event a JSON line, shown as golf.live shows it. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from golf import size
from golf.bundle import ROOT
from golf.config import Config
from golf.data import Corpus
from golf.errors import UsageError
from golf.live import display
from golf.log_file import lock


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


def start_row(folder: Path, config: Config, corpus: Corpus, machine: dict, code_bytes: int) -> dict:
    """First row of a log."""
    return {
        "event": "start", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv,
        "environment": environment(), "machine": {k: list(v) if k == "notes" else str(v) for k, v in machine.items()},
        "config": asdict(config), "fingerprint": config.fingerprint,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "train_tokens": corpus.tokens["train"],
                   "bytes_a_token": corpus.val_bytes / corpus.tokens["val"]},
        "folder": str(folder),
        "planned": {"bytes": size.submission_bytes(config, code_bytes), "cap": config.limits.bytes_cap},
    }  # fmt: skip


def finite(value: object) -> object:
    """The same value with numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Append-only log.jsonl of one run, and what people see of it."""

    def __init__(self, folder: Path, rank: int):
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8") if rank == 0 else None
        if self.file and not lock(self.file):
            raise UsageError(f"{folder}: another process writes this run; wait for it, or give another --run.name.")
        self.shown = display() if rank == 0 else None
        self.environment: dict = {}
        self.full = self.unread = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the error that we report
            if error is not None:  # which is said where it is caught
                self.log({"event": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})
            self.file.close()
        self.show(self.shown.close)

    def write(self, row: dict) -> None:
        """Log a row, and show it."""
        if self.file is None:
            return
        if row["event"] == "start":
            self.environment = row["environment"]
        self.log(row)
        self.show(lambda: self.shown.take(row))

    def show(self, picture: Callable[[], None]) -> None:
        """Show something, as long as anybody reads."""
        if self.unread:
            return
        try:
            picture()
        except OSError:  # as by a pipe into head: the run goes on
            self.unread = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def log(self, row: dict) -> None:
        """Log a row."""
        try:
            self.file.write(json.dumps(finite(row), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:  # minutes of training are worth more than the log
            if not self.full:
                print(f"the log cannot be written ({error.strerror}); the run goes on", file=sys.stderr, flush=True)
            self.full = True

    def close_with(self, record: object, verdict: str) -> None:
        """Log the finished record and print its closing block, and what the referee says."""
        self.write({"event": "record", **record.as_dict()})
        self.show(self.shown.close)
        block = "\n".join(f"{key}: {value}" for key, value in (record.closing() | {"verdict": verdict}).items())
        self.show(lambda: print(block, flush=True))
