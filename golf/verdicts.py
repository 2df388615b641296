"""The referee's word on a run: its verdict read, asked for, and what becomes of the record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from golf.bundle import ROOT
from golf.errors import UsageError
from golf.files import read_plain
from golf.records import Record, write


def read(folder: Path) -> dict | None:
    """The referee's verdict beside a record, if it is one: its checks and whether it holds."""
    try:
        told = json.loads(read_plain(folder / "verdict.json"))
        fits = isinstance(told["valid"], bool) and all(isinstance(c["status"], str) for c in told["checks"])
        return told if fits and (told["valid"] or isinstance(told["invalid"], str)) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def said(verdict: dict | None) -> str:
    """A verdict in a line."""
    if not verdict:
        return "none; python record.py judge FOLDER asks for it"
    passed = sum(c["status"] == "passed" for c in verdict["checks"])
    word = "valid" if verdict["valid"] else f"INVALID, {verdict['invalid']}"
    return f"{word} ({passed} of {len(verdict['checks'])} checks passed)"


def called_invalid(record: Record, why: str) -> Record:
    """A record without its score, which a referee does not believe; how the run ended is kept."""
    ended = record.extra if record.status == "invalid" else record.extra | {"ended": [record.status, record.reason]}
    return replace(record, status="invalid", reason=why, val_loss=None, val_bpb=None, extra=ended)


def as_it_ended(record: Record) -> Record:
    """A record as it was before a referee called it invalid."""
    if record.status != "invalid":
        return record
    told = record.extra.get("ended")
    fits = isinstance(told, list) and len(told) == 2 and told[0] == "interrupted" and isinstance(told[1], str)
    extra = {key: value for key, value in record.extra.items() if key != "ended"}
    return replace(record, status=told[0] if fits else "complete", reason=told[1] if fits else "", extra=extra)


def judged(folder: Path, record: Record, data: Path) -> Record:
    """Have the referee score the folder in a process of its own; write and return the completed record."""
    command = [sys.executable, str(ROOT / "eval_bpb.py"), str(folder), "--data", str(data), "--json"]
    alone = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=alone, check=False)
    if done.returncode in (130, -2):  # Ctrl-C went to it too
        print(f"`python record.py judge {folder}` asks the referee again.", file=sys.stderr)
        raise KeyboardInterrupt
    try:
        verdict = json.loads(done.stdout)
        if "invalid" in verdict:
            record = called_invalid(record, str(verdict["invalid"]))
            write(folder, record)
            return record
        record = replace(
            as_it_ended(record), val_loss=verdict["val_loss"], val_bpb=verdict["val_bpb"],
            eval_seconds=verdict["eval_seconds"],
            val_tokens=verdict["val_tokens"], val_bytes=verdict["val_bytes"], model_sha256=verdict["model_sha256"],
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        why = f"it was ended by signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        raise UsageError(
            f"The referee gave no score for {folder} ({why}); `python record.py judge {folder}` asks it again."
        ) from error
    write(folder, record)
    return record
