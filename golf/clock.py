"""The training clock: counts training only, answers alike on all ranks, and stops before the cap."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RECENT = 16  # steps whose slowest predicts the next: long enough to see a periodic stall, short enough to forget one


class Clock:
    """Seconds of training, not counting what happens inside `paused()`.

    A step goes begin_step() -> gradients -> may_update() -> update -> end_step(). begin_step answers None when the
    slowest recent step would not fit before `seconds - reserve`; may_update answers False when the slowest recent
    update would not, so that the step is abandoned. Should an update end after the limit all the same, `late` is set
    and the caller takes it back: no late update stays in the weights.

    `agree` turns this rank's elapsed seconds into the largest of all ranks'; every decision is made from agreed
    numbers only, so that all ranks decide alike. `now` reads the time.
    """

    def __init__(
        self, seconds: float, reserve: float = 0.0, agree: Callable[[float], float] = float,
        now: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        if not 0 <= reserve < seconds:
            raise ValueError(f"a reserve of {reserve} s leaves nothing of {seconds} s")
        self.seconds, self.reserve = seconds, reserve
        self.agree, self.now = agree, now
        self.started = self.now()
        self.left_out = 0.0
        self.steps: deque[float] = deque(maxlen=RECENT)
        self.updates: deque[float] = deque(maxlen=RECENT)
        self.step_began = self.update_began = 0.0
        self.late = False

    @property
    def limit(self) -> float:
        return self.seconds - self.reserve

    def elapsed(self) -> float:
        """Counted seconds on this rank."""
        return self.now() - self.started - self.left_out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: validation, writing of checkpoints."""
        began = self.now()
        try:
            yield
        finally:
            self.left_out += self.now() - began

    def begin_step(self) -> float | None:
        """Progress in [0, 1], the same on all ranks, or None when the next step would not fit."""
        self.step_began = self.agree(self.elapsed())
        if self.late or self.step_began + max(self.steps, default=0.0) >= self.limit:
            return None
        return self.step_began / self.limit

    def may_update(self) -> bool:
        """Whether an update that starts now ends before the cap, by the slowest recent one; all ranks agree."""
        self.update_began = self.agree(self.elapsed())
        return self.update_began + max(self.updates, default=0.0) < self.limit

    def end_step(self) -> float:
        """Note what the step and its update took on the slowest rank; return the step's seconds."""
        ended = self.agree(self.elapsed())
        self.late = ended > self.limit
        self.steps.append(ended - self.step_began)
        self.updates.append(ended - self.update_began)
        return self.steps[-1]


class Pace:
    """A time that passes by what steps are said to take: runs of equal time are then alike on a busy machine too."""

    def __init__(self, seconds: dict[int, float]):
        """Seconds of a step of so many passes."""
        self.seconds, self.time = seconds, 0.0

    def now(self) -> float:
        return self.time

    def tick(self, loops: int) -> None:
        """A step's time passes."""
        self.time += self.seconds[loops]


class StepCounter:
    """A Clock that reads no time: progress is step / steps. For runs that must be equal on every machine."""

    late = False

    def __init__(self, steps: int):
        self.total = steps
        self.done = 0
        self.started = time.perf_counter()
        self.left_out = self.step_began = 0.0

    elapsed = Clock.elapsed
    paused = Clock.paused
    now = staticmethod(time.perf_counter)

    def begin_step(self) -> float | None:
        self.step_began = self.elapsed()
        return self.done / self.total if self.done < self.total else None

    def may_update(self) -> bool:
        return True

    def end_step(self) -> float:
        self.done += 1
        return self.elapsed() - self.step_began
