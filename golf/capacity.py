"""How large an unlooped model equals a looped one: N unique blocks run r times against 1 to 4 N blocks run once.

    python -m golf.capacity ablations/capacity_tokens.toml [--json]

Reads a comparison's rows. For each seed the looped score is found between those of the unlooped sizes, along the
logarithm of the size; r passes are then worth N x r^phi blocks. A score above that of the smallest or below that of the
largest unlooped model has no such size. The published law has phi 0.46 (arXiv 2604.21106).
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
    depth: float
    """Mean passes of a token while the last steps were trained; all of them without a gate."""
    phi: float | None
    """Mean exponent over the seeds that have a size."""
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


def measure(plan: Plan, rows: list[dict]) -> list[Worth]:
    """What each looped variant's passes are worth. Raises UsageError for a plan without what it takes."""
    shapes = {name: configuration(plan, name, plan.seeds[0]).shape for name in plan.variants}
    flat = sorted((s.unique_layers, name) for name, s in shapes.items() if s.loops == 1)
    looped = [name for name, s in shapes.items() if s.loops > 1]
    if len(flat) < 2 or not looped:
        raise UsageError("The plan compares no looped model with two or more unlooped ones, give such variants.")
    score = {
        (r["variant"], r["seed"]): bpb_of(r)
        for r in rows
        if same(plan, r) and not void(r) and bpb_of(r) is not None
    }  # fmt: skip
    depth = {(r["variant"], r["seed"]): r.get("mean_depth") for r in rows}
    found = []
    for name in looped:
        shape, sizes, seeds = shapes[name], [], []
        for seed in plan.seeds:
            if all((v, seed) in score for v in (name, *(v for _, v in flat))):
                blocks = [layers / shape.unique_layers for layers, _ in flat]
                seeds.append(seed)
                sizes.append(equal_size(blocks, [score[v, seed] for _, v in flat], score[name, seed]))
        whole = [math.log(size) / math.log(shape.loops) for size in sizes if size is not None]
        depths = [depth[name, seed] for seed in seeds if depth.get((name, seed)) is not None]
        found.append(Worth(
            name, shape.loops, seeds, sizes, statistics.mean(depths) if depths else shape.loops,
            statistics.mean(whole) if whole else None, interval(whole) if len(whole) > 1 else None,
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
    lines = ["| looped | passes | taken | seeds | worth, in its own blocks | phi | 95 % |", "|---" * 7 + "|"]
    for w in found:
        sizes = ", ".join("outside" if size is None else f"{size:.2f}" for size in w.sizes) or "-"
        phi = "-" if w.phi is None else f"{w.phi:.2f}"
        reach = f"{w.interval[0]:.2f} to {w.interval[1]:.2f}" if w.interval else "-"
        lines.append(f"| {w.variant} | {w.passes} | {w.depth:.2f} | {len(w.seeds)} | {sizes} | {phi} | {reach} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
