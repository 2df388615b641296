"""A run's log on disk: who writes it, and what stands in it. No torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

from golf.errors import UsageError
from golf.files import SMALL, lines_of, open_plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LOG_LINE = SMALL  # bytes of a row at most
NUMBERS = ("loss", "elapsed", "ms", "progress", "loops", "tokens", "limit")  # of a step
PARTS = ("shape", "recipe", "pack", "scoring", "run")


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
    """Whether a process that still lives writes this log; nobody writes what is no file."""
    try:
        file = open_plain(path)
    except OSError:
        return False
    with file:
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
        stream = open_plain(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    rows: list[dict] = []
    with stream:
        try:
            for line in lines_of(stream, LOG_LINE):
                row = parsed(line)
                if row.get("event") == "resumed":
                    rows = [r for r in rows if not (isinstance(r.get("step"), int) and r["step"] > row.get("step", 0))]
                if row:
                    rows.append(row)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}).") from error
    return rows


def parsed(line: bytes | str) -> dict:
    """A log's line as an object; an empty one where it is none, or where what readers count with is no number."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict):
        return {}
    config = row.get("config", {})
    counted = type(row.get("step", 0)) is int and all(type(row.get(k, 0)) in (int, float) for k in NUMBERS)
    plain = isinstance(config, dict) and all(isinstance(config.get(part, {}), dict) for part in PARTS)
    return row if counted and plain else {}
