"""Topics against each other: differences with p, an expected order, and each between every two sources. No torch."""

from __future__ import annotations

import itertools

import numpy as np

from golf.errors import UsageError
from golf.topics import LEAST_DOCUMENTS, Interval, combined, freedom


def difference(one: Interval, other: Interval) -> dict:
    """What one estimate is above another, and two-sided p from the draws' spread by Student's t."""
    from scipy.stats import t

    found = combined([(1.0, one), (-1.0, other)])
    spread = max(float(np.nanstd(found.draws, ddof=1)), 1e-12)
    known = freedom(found.draws, found.steady, found.models)
    return {**found.row(), "p": float(2 * t.sf(abs(found.mean) / spread, known))}


def holm(rows: list[dict]) -> list[dict]:
    """Give each row its p after Holm (1979), over all of them."""
    worst = 0.0
    for place, row in enumerate(sorted(rows, key=lambda r: r["p"])):
        worst = max(worst, min(1.0, row["p"] * (len(rows) - place)))
        row["p_holm"] = worst
    return rows


def contrasts(names: tuple[str, ...], estimates: list[Interval]) -> list[dict]:
    """Differences of all pairs, two-sided p from the draws' spread, Holm-corrected over the pairs."""
    return holm([
        {"topics": f"{names[a]} - {names[b]}", **difference(estimates[a], estimates[b])}
        for a, b in itertools.combinations(range(len(names)), 2)
    ])  # fmt: skip


def in_order(names: tuple[str, ...], estimates: list[Interval], order: tuple[str, ...]) -> list[dict]:
    """Each place of an expected order against the next, deepest first; a place is a topic or several joined by +, which
    count alike."""

    def pooled(place: str) -> Interval:
        mine = [estimates[names.index(t)] for t in place.split("+")]
        return combined([(1 / len(mine), each) for each in mine])

    return holm([
        {"topics": f"{a} - {b}", **difference(pooled(a), pooled(b))} for a, b in itertools.pairwise(order)
    ])  # fmt: skip


def check_order(names: set[str], order: tuple[str, ...]) -> None:
    """Raise UsageError for an expected order that names what is no topic, or one place alone."""
    if missing := sorted({t for place in order for t in place.split("+")} - names):
        raise UsageError(f"--order: there is no topic {missing[0]!r:.60}, give some of {', '.join(sorted(names))}.")
    if len(order) == 1:
        raise UsageError(f"--order {order[0]}: give two places or more.")


def by_pairs_of_sources(topics: tuple[str, ...], rows: list[dict]) -> list[dict]:
    """Each contrast of topics once more between every source of the one and every source of the other, of those that
    have LEAST_DOCUMENTS documents or more; rows have topic, source, documents and loops. A contrast's p is the largest
    of its pairs', then Holm-corrected: sources agree where all pairs have one sign and that p is under 0.05. One that
    was seen in one source a side alone is repeated nowhere."""
    rows, found = [r for r in rows if r["documents"] >= LEAST_DOCUMENTS], []
    for a, b in itertools.combinations(topics, 2):
        each = [
            {"sources": [one["source"], other["source"]], **difference(one["loops"], other["loops"])}
            for one, other in itertools.product(*([r for r in rows if r["topic"] == t] for t in (a, b)))
        ]
        found.append({"topics": f"{a} - {b}", "pairs": each, "p": max((e["p"] for e in each), default=1.0)})
    for row in holm(found):
        signs = {np.sign(e["mean"]) for e in row["pairs"]}
        agree = len(signs) == 1 and row["p_holm"] < 0.05
        row["sources"] = "one source" if len(row["pairs"]) < 2 else "agree" if agree else "differ"
    return found
