"""Several ranks watch each other: one that has died or stalled is named within seconds, and all end.

Each rank's thread tells the launcher's store every second that it lives, what step it is at, and whether its main
thread waits for the others; a rank whose beat stops is dead, one that does not wait while all others do is stalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 15.0  # seconds without one
SOON = 3.0  # the same, once communication has failed
SLOWEST = 3.0  # times the longest step so far that a rank may take for one
WAITING = ("distributed_c10d.py", "overlap.py", "resume.py")  # where a rank waits for others, or writes a checkpoint
AGREEING = {"largest", "total", "from_rank_0"}  # of machine.py: where numbers that all ranks meet in are read
SAVING = 120.0  # seconds that saving what there is may take, which waits for a device that may hang


class Beat(NamedTuple):
    """What a rank says of itself."""

    count: int
    step: int
    waits: bool
    since: float
    """Seconds that step and waiting have been as they are."""
    pid: int
    host: str


def in_a_collective(thread: int) -> bool:
    """Whether a thread waits for other ranks, or for a disk, by where it is."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(WAITING):
            return True
        if code.co_filename.endswith("machine.py") and code.co_name in AGREEING:
            return True
        frame = frame.f_back
    return False


class Watchdog:
    """Watches the other ranks from a thread while a run lasts; `bark` is told once, in that thread, of those that are
    lost, and the process then ends with 1."""

    def __init__(self, rank: int, world: int, bark: Callable[[str], None]):
        self.rank, self.world, self.bark = rank, world, bark
        self.step, self.training, self.longest, self.step_began = 0, False, 0.0, time.monotonic()
        self.patience = PATIENCE
        self.ended = threading.Event()
        self.main = threading.get_ident()
        self.last: dict[int, tuple[Beat, float]] = {}
        self.gone: set[int] = set()

    def __enter__(self) -> Watchdog:
        if self.world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
            self.tell(0, self.step, False, 0.0)  # at once: a rank may die before its first second is over
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.ended.set()
        if self.world > 1:
            with contextlib.suppress(RuntimeError):  # the store may have gone with the launcher
                self.store.set(f"golf/done/{self.rank}", f"it ended: {error or kind.__name__}" if kind else "")
            self.thread.join(timeout=2 * BEAT)

    def note(self, row: dict) -> None:
        """An event of training, on every rank."""
        now = time.monotonic()
        if row["event"] == "step":
            if self.step:
                self.longest = max(self.longest, now - self.step_began)
            self.step, self.training = row["step"], True
        self.step_began = now  # validation and the like are no part of a step
        if row["event"] == "trained":
            self.training = False

    def watch(self) -> None:
        """The thread: beat, look at the others, until the run ends."""
        count, state, since = 0, None, time.monotonic()
        while not self.ended.wait(BEAT):
            here = (self.step, in_a_collective(self.main))
            if here != state:
                state, since = here, time.monotonic()
            count += 1
            try:
                lost = self.look(self.tell(count, *here, time.monotonic() - since))
            except RuntimeError as error:
                if self.ended.is_set():
                    return
                lost = {-1: f"the launcher's store does not answer ({str(error).splitlines()[0][:80]})"}
            if lost:
                self.end(lost)

    def tell(self, count: int, step: int, waits: bool, since: float) -> Beat:
        """One sign of life, for the others to read."""
        beat = Beat(count, step, waits, since, os.getpid(), socket.gethostname())
        self.store.set(f"golf/beat/{self.rank}", json.dumps(beat))
        return beat

    def look(self, mine: Beat) -> dict[int, str]:
        """The ranks that are lost, and how it is known."""
        now, lost = time.monotonic(), {}
        for rank in range(self.world):
            if rank == self.rank:
                continue
            if self.store.check([f"golf/done/{rank}"]):
                if why := self.store.get(f"golf/done/{rank}").decode():
                    lost[rank] = why.rstrip(".")[:300]
                continue
            if not self.store.check([f"golf/beat/{rank}"]):
                continue  # it has not begun
            beat = Beat(*json.loads(self.store.get(f"golf/beat/{rank}")))
            if rank not in self.last or self.last[rank][0].count != beat.count:
                self.last[rank] = (beat, now)
            elif now - self.last[rank][1] > self.patience:
                lost[rank] = f"it has not answered for {now - self.last[rank][1]:.0f} s"
        patience = max(PATIENCE, SLOWEST * self.longest)
        if not lost and self.training and mine.waits and mine.since > patience:
            others = {rank: beat for rank, (beat, _) in self.last.items()}
            busy = {r: b for r, b in others.items() if not b.waits and b.since > patience}
            if busy and all(b.waits or r in busy for r, b in others.items()):
                lost = {r: f"it has stood in step {b.step + 1} for {b.since:.0f} s" for r, b in busy.items()}
        return lost

    def failed(self) -> None:
        """Communication has failed in the main thread: who is gone is soon known, and then this process ends; returns
        where nobody is."""
        if self.world > 1:
            self.patience = SOON
            time.sleep(PATIENCE + SOON)

    def end(self, lost: dict[int, str]) -> None:
        """Say who is lost, let `bark` save what there is, end those that hang on this host, and this process."""
        self.gone = set(lost)
        names = "; ".join(f"rank {r}: {why}" if r >= 0 else why for r, why in lost.items())
        print(f"error: the run cannot go on; {names}.", file=sys.stderr, flush=True)
        saving = threading.Thread(target=self.save, args=(names,), daemon=True)
        saving.start()
        saving.join(timeout=SAVING)
        for rank in lost:
            beat = self.last[rank][0] if rank in self.last else None
            if beat and beat.host == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(1)

    def save(self, names: str) -> None:
        """Let `bark` save; what it cannot is said, and the process ends all the same."""
        try:
            self.bark(names)
        except Exception as error:
            print(f"error: nothing could be saved ({error!r:.200}).", file=sys.stderr, flush=True)

    @property
    def heir(self) -> bool:
        """Whether this is the lowest rank that is left, which saves what there is."""
        return self.rank == min(r for r in range(self.world) if r not in self.gone)
