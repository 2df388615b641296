"""Counting a submission folder's bytes, and copying only what is counted."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from golf.errors import UsageError

# Files that describe a run and that its scorer never sees; all else is counted.
UNCOUNTED = {"README.md", "submission.json", "verdict.json", "report.html", "tokenizer.model", "log.jsonl",
             "train.log", "requirements.txt", "checkpoint.safetensors", "hessians.safetensors"}  # fmt: skip
UNCOUNTED_FOLDERS = {"source", "states"}
CODE_SUFFIXES = {".py", ".zip"}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a folder on disk."""

    code: int
    weights: int
    other: int
    files: dict[str, int]

    @property
    def total(self) -> int:
        return self.code + self.weights + self.other


def counted(folder: Path) -> list[Path]:
    """Every file that counts, by its path inside the folder. Raises UsageError for links and special files."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    found = []
    for base, folders, files in os.walk(folder):
        here = Path(base)
        if here == folder:
            folders[:] = [f for f in folders if f not in UNCOUNTED_FOLDERS]
        for name in sorted(files + [f for f in folders if (here / f).is_symlink()]):
            path = here / name
            if path.is_symlink() or not path.is_file():
                raise UsageError(f"{path} is a link or a special file; a submission holds plain files only.")
            if here == folder and (name in UNCOUNTED or (name.startswith("train_seed") and name.endswith(".log"))):
                continue
            found.append(path)
        folders.sort()
    return found


def sizes(folder: Path) -> Sizes:
    """Bytes of code, weights and everything else. Raises UsageError."""
    totals = {"code": 0, "weights": 0, "other": 0}
    files = {}
    for path in counted(folder):
        size = path.stat().st_size
        kind = "code" if path.suffix in CODE_SUFFIXES else "weights" if path.suffix == ".bin" else "other"
        totals[kind] += size
        files[str(path.relative_to(folder))] = size
    return Sizes(totals["code"], totals["weights"], totals["other"], files)


def sha256_of(folder: Path) -> str:
    """Of the names and bytes of all counted files."""
    digest = hashlib.sha256()
    for path in counted(folder):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
    return digest.hexdigest()


def copy_whole(folder: Path, target: Path) -> None:
    """Copy a run folder but for the states of its training; links are copied, never followed. Raises UsageError."""
    try:
        shutil.copytree(folder, target, symlinks=True, ignore=lambda at, _: {"states"} if at == str(folder) else set())
    except shutil.Error as error:
        raise UsageError(f"{folder} cannot be copied ({error.args[0][0][2]!s:.200}).") from error


def copy_counted(folder: Path, target: Path) -> None:
    """Copy what counts to `target`."""
    for path in counted(folder):
        goal = target / path.relative_to(folder)
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, goal)
