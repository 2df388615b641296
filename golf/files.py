"""Files that are whole or not there, and reading those of strangers without waiting or filling the memory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SMALL = 1 << 24  # bytes of a file that describes something
LARGE = 1 << 31  # bytes of an artifact
LINE = 1 << 26  # bytes of one line


def open_plain(path: Path, links: bool = False) -> BinaryIO:
    """Open a file for reading that is one: no pipe or device, which may never end, and no link unless they are allowed.
    Raises an OSError that says why not."""
    refused = getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
    try:
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | refused))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return stream


def read_plain(path: Path, most: int = SMALL, links: bool = False) -> bytes:
    """The bytes of a plain file. Raises an OSError that says why not, for one of more than `most` bytes too."""
    with open_plain(path, links) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it holds more than {most:,} bytes", str(path))
        return stream.read(size)  # a buffer of that size, and no larger one, is made for it


def lines_of(stream: BinaryIO, most: int = LINE) -> Iterator[bytes]:
    """The lines of a stream. Raises ValueError for one of more than `most` bytes."""
    number = 1
    while line := stream.readline(most + 1):
        if len(line) > most:
            raise ValueError(f"line {number} has more than {most:,} bytes")
        yield line
        number += 1


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


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their names below a folder, each whole or not at all. Raises an OSError that names one."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, data)
