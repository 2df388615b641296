"""What a run that cannot go on leaves: its last good weights, a record that says why, and a sentence."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.numpy  # noqa: F401, now: when memory is short nothing can be loaded

from golf import records
from golf.config import Config
from golf.data import Corpus
from golf.errors import UsageError
from golf.journal import Journal
from golf.machine import Machine, is_out_of_memory
from golf.resume import Keeper
from golf.spare import Spare, needed
from golf.watchdog import Watchdog


@dataclass
class LastWords:
    """Knows the run; its keeper knows the loop once that has begun. Holds room on the disk for what will be left.
    Raises UsageError where there is none."""

    folder: Path
    config: Config
    corpus: Corpus
    machine: Machine
    log: Journal
    keeper: Keeper
    code_bytes: int
    saved: bool = False
    trained: bool = False
    dog: Watchdog | None = None

    def __post_init__(self) -> None:
        self.one_at_a_time = threading.Lock()
        self.spare = Spare(self.folder, needed(self.config, self.code_bytes)) if self.machine.rank == 0 else None

    def told(self, row: dict) -> None:
        """An event of training: logged, and known to the watchdog."""
        self.trained |= row["event"] == "trained"
        self.log.write(row)
        self.dog.note(row)

    @contextlib.contextmanager
    def weights_kept(self, result: object) -> Iterator[None]:
        """While the artifact is made the weights stand beside it, where they are asked for or the run was interrupted,
        whose launcher may not wait so long."""
        self.spare.release()
        if self.config.run.checkpoint or (result.status == "interrupted" and result.steps):
            records.write_checkpoint(self.folder, result)
        yield
        if not self.config.run.checkpoint and (self.folder / "model.bin").exists():
            (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def lost(self, names: str) -> None:
        """From the watchdog's thread: other ranks are gone; the lowest that is left saves what there is."""
        self.log.write({"event": "failed", "error": names})
        if self.dog.heir:
            self.save(names)

    def save(self, reason: str) -> str:
        """Write weights and record, once; returns what was saved, as the end of a sentence."""
        with self.one_at_a_time:
            loop = self.keeper.loop
            if self.saved or loop is None or not loop.result.steps:
                return ""
            self.saved = True
            if self.spare:
                self.spare.release()
            if loop.result.updating:  # half an update is none
                loop.rollback.take_back()
            loop.result.status, loop.result.reason = "crash", reason
            loop.optimizers.reset()  # whose memory the saving may need
            loop.optimizers.zero_grad()
            records.write_checkpoint(self.folder, loop.result)
            records.write(self.folder, records.from_run(
                self.folder, self.config, self.corpus, loop.result, None, self.log.environment, {}
            ))  # fmt: skip
            return f"; the weights after step {loop.result.steps} are in {self.folder}/checkpoint.safetensors"

    def explain(self, error: Exception) -> None:
        """The main thread's error, in training, packing or validation: who is lost is said where communication failed;
        memory that ran out and faults of the data become a sentence. Raises UsageError, or returns for the error to be
        raised as it is."""
        if isinstance(error, UsageError) or is_out_of_memory(error):
            self.dog.ended.set()  # others that fail alike are no news
        if isinstance(error, UsageError):
            saved = self.save(str(error)) if self.machine.rank == 0 else ""
            raise UsageError(str(error).rstrip(".") + saved + ".") from error
        if is_out_of_memory(error):
            step = self.keeper.loop.result.steps + 1 if self.keeper.loop else 0
            when = "after training" if self.trained else f"in step {step}"
            try:
                saved = self.save(f"out of memory {when}") if self.machine.rank == 0 else ""
            except (MemoryError, RuntimeError, OSError) as second:
                saved = f"; the weights could not be written ({second!r:.60})"
            raise UsageError(
                f"Memory ran out {when}: give a smaller --run.micro-rows or --recipe.batch-tokens{saved}."
            ) from error
        if isinstance(error, RuntimeError):
            self.dog.failed()
        if self.machine.rank == 0:
            try:
                self.save(f"{type(error).__name__}: {error}"[:300])
            except OSError as second:  # what went wrong first is what is raised
                if not isinstance(error, OSError):
                    print(f"error: the weights could not be written ({second!r:.100}).", file=sys.stderr, flush=True)
