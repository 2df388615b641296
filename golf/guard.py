"""What a run has to show so far, and what keeps it good: the update to take back, and the wish to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from golf.average import WeightAverage
from golf.model import RecurrentGPT
from golf.quantize import Sensitivity


@dataclass
class Result:
    """What training leaves."""

    model: RecurrentGPT
    status: str = "complete"  # complete | interrupted | crash
    reason: str = ""
    steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    step_seconds: float = 0.0  # of them without the calibration
    loss: float = float("nan")
    peak_memory: int = 0
    updating: bool = False  # between the first and the last weight of an update
    sensitivities: dict[str, Sensitivity] | None = None


class Rollback:
    """The weights, their average and the count of steps before the last update, to return to when it must not stand."""

    def __init__(self, result: Result, average: WeightAverage):
        self.result, self.average = result, average
        self.weights = [t.detach().clone() for t in self.tensors()]
        self.counts, self.progress = (0, 0, 0.0, float("nan")), average.progress

    def tensors(self) -> list[torch.Tensor]:
        return [*self.result.model.parameters(), *self.average.average]

    @torch.no_grad()
    def remember(self) -> None:
        """Before an update: keep the weights, whose loss has just been found finite."""
        torch._foreach_copy_(self.weights, self.tensors())
        self.progress = self.average.progress
        self.counts = (self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss)

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo the last update."""
        torch._foreach_copy_(self.tensors(), self.weights)
        self.average.progress, self.result.updating = self.progress, False
        self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss = self.counts


class Interrupt:
    """Whether Ctrl-C or SIGTERM has asked the run to end. A second one, later than a launcher's echo of the first,
    ends the program at once."""

    ECHO_SECONDS = 5.0

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    @contextmanager
    def watched(self) -> Iterator[Interrupt]:
        before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.asked_at is not None and time.monotonic() - self.asked_at > self.ECHO_SECONDS:
            raise KeyboardInterrupt
        self.asked_at = self.asked_at or time.monotonic()
