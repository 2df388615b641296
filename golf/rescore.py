"""A run folder asked in another way: a copy whose artifact says how it is to be scored. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args, get_type_hints

from golf import folders, records, verdicts
from golf.checks import check_scoring, check_threshold
from golf.codec import read_header, with_note
from golf.config import changed, fields_from_dict
from golf.errors import UsageError
from golf.files import LARGE, read_plain, write_bytes
from golf.recipe import Scoring


def read_artifact(folder: Path) -> bytes:
    """The artifact of a run folder. Raises UsageError."""
    try:
        return read_plain(folder / "model.bin", LARGE)
    except OSError as error:
        raise UsageError(f"{folder}/model.bin cannot be read ({error.strerror}).") from error


def rescored(
    source: Path, target: Path, changes: dict, data: bytes = b"", record: records.Record | None = None
) -> records.Record:  # fmt: skip
    """Copy a run folder to `target` with these fields of its Scoring changed, in artifact and record, whose own are
    given where they differ from the folder's; what was judged before is left out. Raises UsageError."""
    record, data = record or records.read(source), data or read_artifact(source)
    try:
        shape, note = read_header(data)[:2]
    except UsageError as error:
        raise UsageError(f"{source}/model.bin: {error}") from error
    scoring = replace(fields_from_dict(Scoring, note.get("scoring", {}), "artifact's scoring"), **changes)
    check_scoring(scoring, record.context, shape, "")
    if target.exists():
        raise UsageError(f"{target} exists already, name another folder.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        folders.copy_whole(source, aside)
        (aside / "verdict.json").unlink(missing_ok=True)
        write_bytes(aside / "model.bin", with_note(data, note | {"scoring": changed(scoring)}))
        measured, adapts = folders.sizes(aside), scoring.adapts
        new = replace(
            verdicts.as_it_ended(record), stride=scoring.stride, chunk=scoring.chunk if adapts else 0, adapts=adapts,
            val_bpb=None, val_loss=None, eval_seconds=None, bytes_model=measured.weights, bytes_total=measured.total,
            content_shapes=scoring.exit != "none", headroom=record.cap - measured.total,
            config=record.config | {"scoring": asdict(scoring)},
        )  # fmt: skip
        with contextlib.suppress(UsageError):  # a stranger's record has no configuration of ours
            new = replace(new, fingerprint=records.config_of(new).fingerprint)
        records.write(aside, new, target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return new


def with_exit(source: Path, place: Path, rule: str, threshold: float) -> Path:
    """A copy of a run folder, in `place`, whose tokens stop by a rule at its threshold. Raises UsageError."""
    rules = get_args(get_type_hints(Scoring)["exit"])
    if rule not in rules:
        raise UsageError(f"--exit {rule:.60}: give one of {', '.join(rules[1:])}.")
    check_threshold(rule, threshold, read_header(read_artifact(source))[0])
    rescored(source, place / source.name, {"exit": rule, "exit_threshold": threshold})
    return place / source.name
