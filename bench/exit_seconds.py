"""Whether tokens that stop save the time that they save in counted FLOPs.

    python bench/exit_seconds.py RUN --choose DATA --measure DATA [--rules difference gate ...] [--json]

The threshold of each rule is fixed on the first data's validation split, where bits per byte may rise by `--share` over
all loops; score, FLOPs and seconds are of the second's. Seconds are those of the least of three passes over each batch,
rules and all loops in turn. A rule holds when the share of seconds saved is at least that of FLOPs less 10 points; for
one that fails, and for all loops, the operators that take longest are listed. Rules are all that the model can follow
when none is named. Exit 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import depth, frontier
from golf.console import run_script
from golf.data import Corpus

POINTS = 0.10


def profile(looped: depth.Looped, batch: frontier.Batch, name: str, threshold: float) -> str:
    """The operators that scoring a batch spends most time in."""
    rule = None if name == frontier.ALL else looped.rule(name, threshold)
    frontier.one(looped, batch, rule)
    with torch.profiler.profile() as seen:
        frontier.one(looped, batch, rule)
    return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--choose", required=True)
    parser.add_argument("--measure", required=True)
    parser.add_argument("--rules", nargs="+")
    parser.add_argument("--share", type=float, default=0.005)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    looped = depth.load(Path(asked.run))
    chosen_on, measured_on = (
        frontier.batches(looped, Corpus(folder, option), asked.rows)
        for folder, option in ((asked.choose, "--choose"), (asked.measure, "--measure"))
    )
    named = asked.rules or ["entropy", "margin", "divergence", "difference", "random",
                            *(["gate"] if looped.model.shape.exit_gate != "none" else [])]  # fmt: skip
    rules = [(name, frontier.cheapest_within(looped, chosen_on, name, asked.share)) for name in named]
    points = frontier.measure(looped, measured_on, rules, repeats=3)
    held = {p.rule: p.saved_seconds >= p.saved_flops - POINTS for p in points[1:]}
    if asked.json:
        print(json.dumps({"points": [asdict(p) for p in points], "holds": held}))
    else:
        print(frontier.table(points))
        for p in points[1:]:
            print(f"{p.rule}: {p.bpb / points[0].bpb - 1:+.2%} bpb; {p.saved_seconds:.1%} of the seconds for "
                  f"{p.saved_flops:.1%} of the FLOPs: {'holds' if held[p.rule] else 'FAILS'}")  # fmt: skip
        failed = [(p.rule, p.threshold) for p in points[1:] if not held[p.rule]]
        for name, threshold in [(frontier.ALL, 0.0), *failed] if failed else []:
            print(f"\n{name}, first batch:\n{profile(looped, measured_on[0], name, threshold)}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
