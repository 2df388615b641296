"""Two sets of runs against each other: means, spread, a one-sided Welch test, the contest's rule and its practice."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

NATS, P_VALUE = 0.005, 0.01  # the contest's rule for a record: better by this, at less than this
PRACTICE = 0.25  # one-sided p below which its organisers accepted records (#1899, #1900, #1902)
MOST_SEEDS = 99


def welch(ours: list[float], theirs: list[float], margin: float = 0.0) -> float | None:
    """One-sided p that losses `ours` are not lower than `theirs` by more than `margin` (Welch 1947); None with fewer
    than two of either, or where neither varies."""
    if min(len(ours), len(theirs)) < 2 or statistics.pvariance(ours) + statistics.pvariance(theirs) == 0:
        return None
    from scipy.stats import ttest_ind

    return float(ttest_ind([v + margin for v in ours], theirs, equal_var=False, alternative="less").pvalue)


def after_looks(p: float | None, looks: int) -> float | None:
    """A p-value that was looked at so many times, each time ready to stop (Bonferroni)."""
    return None if p is None else min(1.0, p * looks)


def seeds_needed(gain: float, deviation: float, margin: float = NATS, p: float = P_VALUE) -> int | None:
    """Seeds on each side with which a gain of this size and deviation, if they stay as they are, would just be
    significant beyond the margin, so in about half of all tries; None when more than 99, or when the gain is not that
    large."""
    if gain <= margin:
        return None
    from scipy.stats import t

    for count in range(2, MOST_SEEDS + 1):
        error = deviation * math.sqrt(2 / count)
        if error == 0 or t.sf((gain - margin) / error, 2 * (count - 1)) < p:
            return count
    return None


def spread(values: list[float]) -> float | None:
    """Sample standard deviation, of two or more."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of two or more values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    reach = t.ppf((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - reach, statistics.mean(values) + reach


@dataclass(frozen=True)
class Comparison:
    """What runs of one side gain over another's; differences are positive where `ours` are better."""

    ours: int
    theirs: int
    mean_loss: float
    mean_bpb: float
    their_loss: float
    their_bpb: float
    sd_bpb: float | None
    their_sd_bpb: float | None
    gain_nats: float
    gain_bpb: float
    looks: int
    """Times that the result was looked at: once, and once more for each seed beyond those planned."""
    p: float | None
    """That ours are not better at all, after all looks."""
    p_rule: float | None
    """That ours are not better by 0.005 nats, after all looks."""
    seeds_needed: int | None

    @property
    def meets_rule(self) -> bool:
        """The contest's: shown at p < 0.01 to be better by 0.005 nats."""
        return self.p_rule is not None and self.p_rule < P_VALUE

    @property
    def meets_practice(self) -> bool:
        """What its organisers accepted."""
        return self.gain_nats > 0 and self.p is not None and self.p < PRACTICE

    def sentences(self) -> list[str]:
        """What it says, for people."""
        lines = [f"better by {self.gain_bpb:+.4f} bpb, {self.gain_nats:+.4f} nats a token"]
        if self.p is None or self.p_rule is None:
            return [*lines, "no test: it needs two seeds of each side that are not all alike"]
        looked = "" if self.looks == 1 else f", after {self.looks} looks"
        met = {True: "met", False: "not met"}
        lines += [
            f"one-sided Welch p {self.p:.3g} that it is no better, {self.p_rule:.3g} that it is not better by {NATS} "
            f"nats{looked}",
            f"the contest's rule, {NATS} nats at p < {P_VALUE}: {met[self.meets_rule]}; its organisers' practice, "
            f"p < {PRACTICE}: {met[self.meets_practice]}",
        ]
        if not self.meets_rule and self.gain_nats > 0:
            need = f"{self.seeds_needed} seeds a side" if self.seeds_needed else "a larger gain or a smaller spread"
            lines.append(f"for even odds to show {NATS} nats at p < {P_VALUE} it would take {need}")
        return lines


def compare(
    losses: list[float], scores: list[float], their_losses: list[float], their_scores: list[float], planned: int = 0
) -> Comparison:  # fmt: skip
    """Losses in nats a token, scores in bits a byte, one a seed. With `planned` seeds a side, each beyond them is one
    look more."""
    looks = 1 + max(0, max(len(losses), len(their_losses)) - planned) if planned else 1
    gain = statistics.mean(their_losses) - statistics.mean(losses)
    deviations = [d for d in (spread(losses), spread(their_losses)) if d is not None]
    pooled = math.sqrt(statistics.mean(d * d for d in deviations)) if deviations else 0.0
    return Comparison(
        len(losses), len(their_losses), statistics.mean(losses), statistics.mean(scores), statistics.mean(their_losses),
        statistics.mean(their_scores), spread(scores), spread(their_scores), gain,
        statistics.mean(their_scores) - statistics.mean(scores), looks,
        after_looks(welch(losses, their_losses), looks), after_looks(welch(losses, their_losses, NATS), looks),
        seeds_needed(gain, pooled) if deviations else None,
    )  # fmt: skip
