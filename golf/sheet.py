"""What a judgement writes down: the numbered checks, how often each was tried, what went wrong, and what was seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

CHECKS = {
    1: "future flip", 2: "target flip", 3: "sum to one", 4: "score is the log-probability", 5: "score before adapt",
    6: "single pass", 7: "bytes recounted", 8: "whole validation set", 9: "bytes under the cap",
    10: "time under the caps",
    11: "self-contained", 12: "train and validation disjoint", 13: "no stored text", 14: "batch invariance",
    15: "adapt off is the plain score", 16: "reload gives the score",
}  # fmt: skip


@dataclass
class Check:
    """One rule: how often it was tried, and what went wrong."""

    tried: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        return "failed" if self.faults else "passed" if self.tried else "not run"

    def see(self, good: bool, fault: str) -> None:
        """Count one trial."""
        self.tried += 1
        if not good and len(self.faults) < 3:
            self.faults.append(fault)

    def evidence(self) -> str:
        return "; ".join((self.faults or [])[:2] + self.notes)


class Sheet:
    """All checks of a judgement. Those in `off` are skipped, to show that each one is needed."""

    def __init__(self, off: frozenset[int] = frozenset()):
        self.checks = {number: Check() for number in CHECKS}
        self.off = off

    def see(self, number: int, good: bool, fault: str) -> None:
        if number not in self.off:
            self.checks[number].see(bool(good), fault)

    def note(self, number: int, text: str) -> None:
        self.checks[number].notes.append(text)

    def faults(self) -> list[str]:
        return [f"{CHECKS[n]}: {c.faults[0]}" for n, c in self.checks.items() if c.faults]


@dataclass
class Lead:
    """How far committed scores lie above the distributions that they should be read from."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, committed: np.ndarray, chosen: np.ndarray) -> None:
        """Log-probabilities, nats, of the same targets as numbers and out of distributions."""
        gained = committed.astype(np.float64) - chosen
        self.count += gained.size
        self.total += float(gained.sum())
        self.squares += float((gained**2).sum())

    @property
    def mean(self) -> float:
        """Nats a target."""
        return self.total / max(1, self.count)

    @property
    def least(self) -> float:
        """The mean less four standard errors."""
        spread = max(0.0, self.squares / max(1, self.count) - self.mean**2)
        return self.mean - 4 * math.sqrt(spread / max(1, self.count))
