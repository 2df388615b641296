"""How large an unlooped model equals a looped one: N unique blocks run r times against 1 to 4 N blocks run once.

    python -m golf.capacity ablations/capacity_tokens.toml [--json]

Reads a comparison's rows. For each seed the looped score is found between those of the unlooped sizes, along the
logarithm of the size; r passes are then worth N x r^phi blocks. A score that no unlooped size reaches, or that all are
better than, has no such size, and where one seed has none the exponent has no mean. The published law has phi 0.46
(arXiv 2604.21106).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from tyro.conf import Positional

from golf.ablate import with_paces
from golf.console import parse, run_script
from golf.errors import UsageError
from golf.plan import Plan, configuration, read_plan
from golf.result_rows import bpb_of, read_rows, same, void
from golf.stats import interval


@dataclass(frozen=True)
class Worth:
    """What the passes of one looped variant are worth."""

    variant: str
    passes: int
    seeds: list[int]
    sizes: list[float | None]
    """Of each seed: unlooped blocks over the looped model's own that reach its score; none outside what was run."""
    sides: list[str]
    """Of each seed: "under 1", "over 4" and the like where it has no size."""
    of_means: float | None
    """The size by the seeds' mean scores."""
    depth: float
    """Mean passes of a token while the last steps were trained; all of them without a gate."""
    phi: float | None
    """Mean exponent; none where a seed has no size, since the mean of the others would be biased."""
    interval: tuple[float, float] | None
    """Of the mean, 95 %, by Student's t over seeds; two or more are needed."""


def equal_size(sizes: list[float], scores: list[float], score: float) -> float | None:
    """The size at which unlooped models, smallest first, reach `score`, linear in the logarithm between neighbours; the
    first crossing where there are several."""
    for (small, worse), (large, better) in pairwise(zip(sizes, scores, strict=True)):
        if better <= score <= worse and better < worse:
            share = (worse - score) / (worse - better)
            return math.exp(math.log(small) + share * math.log(large / small))
    return None


def side(sizes: list[float], scores: list[float], score: float) -> str:
    """Where a score without a size lies: it is worse than the smallest model's, or better than all."""
    return f"over {sizes[-1]:g}" if score < min(scores) else f"under {sizes[0]:g}"


def measure(plan: Plan, rows: list[dict]) -> list[Worth]:
    """What each looped variant's passes are worth. Raises UsageError for a plan without what it takes."""
    shapes = {name: configuration(plan, name, plan.seeds[0]).shape for name in plan.variants}
    flat = sorted((s.unique_layers, name) for name, s in shapes.items() if s.loops == 1)
    looped = [name for name, s in shapes.items() if s.loops > 1]
    if len(flat) < 2 or not looped:
        raise UsageError("The plan compares no looped model with two or more unlooped ones, give such variants.")
    good = [r for r in rows if same(plan, r) and not void(r) and bpb_of(r) is not None]
    score = {(r["variant"], r["seed"]): bpb_of(r) for r in good}
    depth = {(r["variant"], r["seed"]): r.get("mean_depth") for r in good}
    found = []
    for name in looped:
        shape = shapes[name]
        blocks = [layers / shape.unique_layers for layers, _ in flat]
        seeds = [s for s in plan.seeds if all((v, s) in score for v in (name, *(v for _, v in flat)))]
        curves = [[score[v, seed] for _, v in flat] for seed in seeds]
        scores = [score[name, seed] for seed in seeds]
        sizes = [equal_size(blocks, curve, own) for curve, own in zip(curves, scores, strict=True)]
        sides = [
            "" if size else side(blocks, curve, own) for size, curve, own in zip(sizes, curves, scores, strict=True)
        ]
        means = [statistics.mean(column) for column in zip(*curves, strict=True)]
        of_means = equal_size(blocks, means, statistics.mean(scores)) if seeds else None
        slopes = [math.log(size) / math.log(shape.loops) for size in sizes if size is not None]
        whole = len(slopes) == len(seeds) > 0
        depths = [depth[name, seed] for seed in seeds if depth.get((name, seed)) is not None]
        found.append(Worth(
            name, shape.loops, seeds, sizes, sides, of_means,
            statistics.mean(depths) if depths else shape.loops, statistics.mean(slopes) if whole else None,
            interval(slopes) if whole and len(slopes) > 1 else None,
        ))  # fmt: skip
    return found


@dataclass(frozen=True)
class Arguments:
    """What passes are worth in unlooped blocks."""

    file: Positional[str]
    """A plan in TOML, whose rows are beside it."""
    json: bool = False
    """Print one JSON array."""


def main() -> int:
    asked = parse(tyro.cli, Arguments, prog="python -m golf.capacity")
    path = Path(asked.file)
    results = path.with_suffix(".jsonl")
    found = measure(with_paces(read_plan(path), results), read_rows(results))
    print(json.dumps([asdict(worth) for worth in found]) if asked.json else table(found))
    return 0


def table(found: list[Worth]) -> str:
    """Markdown."""
    heads = ("looped", "passes", "taken", "seeds", "worth, in its own blocks", "by mean scores", "phi", "95 %")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for w in found:
        sizes = ", ".join(side or f"{size:.2f}" for size, side in zip(w.sizes, w.sides, strict=True)) or "-"
        means = "-" if w.of_means is None else f"{w.of_means:.2f}"
        phi = "-" if w.phi is None else f"{w.phi:.2f}"
        reach = f"{w.interval[0]:.2f} to {w.interval[1]:.2f}" if w.interval else "-"
        cells = (w.variant, w.passes, f"{w.depth:.2f}", len(w.seeds), sizes, means, phi, reach)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
