"""Room on the disk for what a run leaves, held from its start: a disk that fills up meanwhile costs no weights."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from golf.config import Config
from golf.errors import UsageError
from golf.shape import tensor_class
from golf.size import submission_bytes

BESIDES = 2 << 20  # bytes of code, tokenizer, record, verdict, page and the log's last rows
PIECE = 1 << 20


def needed(config: Config, code_bytes: int) -> int:
    """Bytes of an artifact, of the weights in float32 and their sensitivities, which an interrupted or crashed run
    leaves, and of the rest."""
    kept = 4 * config.shape.parameter_count
    if config.pack.calibration_batches:
        matrices = [size for name, size in config.shape.parameters().items() if tensor_class(name) != "control"]
        kept += sum(4 * (columns**2 + rows) for rows, columns in matrices)
    return submission_bytes(config, code_bytes) + kept + BESIDES


class Spare:
    """An open file without a name: its room is the disk's again when it is released, or when the process ends."""

    def __init__(self, folder: Path, size: int):
        """Hold `size` bytes. Raises UsageError where the disk has no such room."""
        self.file = None
        try:
            self.file = tempfile.TemporaryFile(dir=folder)
            self.fill(size)
        except OSError as error:
            self.release()
            raise UsageError(
                f"--run.runs {folder.parent}: no room for the {size:,} bytes that a run may leave ({error.strerror}); "
                "free some, or give another folder."
            ) from error

    def fill(self, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        for start in range(0, size, PIECE):
            self.file.write(bytes(min(PIECE, size - start)))
        self.file.flush()

    def release(self) -> None:
        """Give the room back; processes that were forked meanwhile do not keep it."""
        if self.file:
            os.ftruncate(self.file.fileno(), 0)
            self.file.close()
            self.file = None
