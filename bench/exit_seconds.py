"""Whether tokens that stop save the time that they save in counted FLOPs.

    python bench/exit_seconds.py RUN --choose DATA --measure DATA [--rules difference gate ...] [--json]

The threshold of each rule is fixed on the first data's validation split, where bits per byte may rise by `--share` over
all loops; score, FLOPs and seconds are of the second's. Seconds are those of the least of three passes over each batch,
rules and all loops in turn. A rule holds when the share of seconds saved is at least that of FLOPs less 10 points.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import depth, frontier
from golf.data import Corpus

POINTS = 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--choose", required=True)
    parser.add_argument("--measure", required=True)
    parser.add_argument("--rules", nargs="+", default=["entropy", "margin", "divergence", "difference", "random"])
    parser.add_argument("--share", type=float, default=0.005)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    looped = depth.load(Path(asked.run))
    chosen_on, measured_on = (
        frontier.batches(looped, Corpus(folder, option), asked.rows)
        for folder, option in ((asked.choose, "--choose"), (asked.measure, "--measure"))
    )
    rules = [(name, frontier.cheapest_within(looped, chosen_on, name, asked.share)) for name in asked.rules]
    points = frontier.measure(looped, measured_on, rules, repeats=3)
    held = {p.rule: p.saved_seconds >= p.saved_flops - POINTS for p in points[1:]}
    if asked.json:
        print(json.dumps({"points": [asdict(p) for p in points], "holds": held}))
    else:
        print(frontier.table(points))
        for p in points[1:]:
            print(f"{p.rule}: {p.bpb / points[0].bpb - 1:+.2%} bpb; {p.saved_seconds:.1%} of the seconds for "
                  f"{p.saved_flops:.1%} of the FLOPs: {'holds' if held[p.rule] else 'FAILS'}")  # fmt: skip
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
