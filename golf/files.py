"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, fsync, rename. Raises an OSError that names it; leaves no other file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as out:
            for part in parts:
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # which a full disk does not name
        raise
