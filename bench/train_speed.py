"""Tokens/s of a training step at the laptop shape by number type and compile mode, as ratios in one run.

    python bench/train_speed.py [PRESET] [--modes none,block,model] [--json]

The rows are timed in turn, several rounds, so that a drift of the machine hits all alike; medians are compared. The
whole model (`model`) is left out unless asked for: a CPU compiles it for minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf.console import run_script
from golf.presets import PRESETS
from golf.recipe import Run
from golf.timing import Stepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="laptop", choices=PRESETS)
    parser.add_argument("--modes", default="none,block")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    preset, steppers = PRESETS[arguments.preset], {}
    rows = [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in arguments.modes.split(",")]
    for dtype, mode in rows:
        steppers[dtype, mode] = Stepper(replace(preset, run=Run(dtype=dtype, compile=mode)))
    taken: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    for _ in range(7):
        for row, stepper in steppers.items():
            taken[row].append(stepper.step())
    tokens = preset.recipe.batch_tokens
    base = statistics.median(taken[rows[0]])
    table = []
    for (dtype, mode), seconds in taken.items():
        middle = statistics.median(seconds)
        table.append({
            "preset": preset.preset, "dtype": dtype, "compile": mode, "tokens_per_second": round(tokens / middle),
            "slowest": round(tokens / max(seconds)), "fastest": round(tokens / min(seconds)),
            "ratio": round(base / middle, 3), "warm_up_seconds": round(steppers[dtype, mode].warm_up_seconds, 1),
        })  # fmt: skip
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"{preset.preset}, loops on, {tokens} tokens a step; ratio to {' '.join(rows[0])}")
    for row in table:
        speed = f"{row['tokens_per_second']:>8,} tokens/s ({row['slowest']:,}-{row['fastest']:,})"
        warm_up = f"warm-up {row['warm_up_seconds']:.1f} s"
        print(f"{row['dtype']:>9} {row['compile']:>6} {speed}  {row['ratio']:.2f}x  {warm_up}")


if __name__ == "__main__":
    sys.exit(run_script(main))
