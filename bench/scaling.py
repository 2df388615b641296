"""Seconds and memory of a training step against width, unique blocks, loops, row length and ranks, with exponents.

    python bench/scaling.py [--steps 5] [--json]

Each point is a process of its own on the same batch of 4,096 tokens; its memory is what its peak grew by after the
imports, the compiler's included, and with two ranks rank 0's. The points of
a row are compared with the row's first. The exponent is the slope of a line through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf.config import Config
from golf.console import run_script
from golf.presets import PRESETS
from golf.recipe import Run

AXES = {
    "width": (64, 128, 256), "unique blocks": (3, 6, 12), "loops": (1, 2, 8), "row length": (128, 256, 512),
    "ranks": (1, 2),
}  # fmt: skip


def config_of(axis: str, value: int) -> Config:
    """What a point runs."""
    config = PRESETS["laptop"]
    shape, recipe = config.shape, replace(config.recipe, batch_tokens=4096)
    if axis == "width":
        shape = replace(shape, width=value, heads=value // 64, kv_heads=max(1, value // 128))
    elif axis == "unique blocks":
        shape = replace(shape, core=value - 2, loops=1)
    elif axis == "loops":
        shape = replace(shape, loops=value)
    elif axis == "row length":
        recipe = replace(recipe, sequence_length=value)
    return replace(config, shape=shape, recipe=recipe, run=Run(threads=1 if axis == "ranks" else 0))


def point(axis: str, value: int, steps: int) -> None:
    """In a process of its own: print seconds a step (median), bytes that the peak grew by, and training FLOPs."""
    import torch
    import torch.distributed as dist

    from golf import pace
    from golf.machine import peak_memory
    from golf.timing import Stepper

    config = config_of(axis, value)
    before = peak_memory(torch.device("cpu"))
    stepper = Stepper(config)
    taken = sorted(stepper.step() for _ in range(steps))
    seconds = stepper.machine.largest(taken[steps // 2])
    if stepper.machine.rank == 0:
        print(json.dumps({
            "seconds": seconds, "bytes": peak_memory(stepper.machine.device) - before,
            "flops": pace.step_work(config)[0],
        }))  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(axis: str, value: int, steps: int) -> dict:
    """One point's row. Two ranks have half the batch each."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={value}"] if axis == "ranks" else []
    command = [sys.executable, *launch, __file__, "--point", axis, str(value), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if axis == "ranks" else None
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def slope(values: list[float], sizes: list[float]) -> float:
    """Exponent p of size ~ value^p."""
    return float(np.polyfit(np.log(values), np.log(sizes), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--point", nargs=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.point:
        point(arguments.point[0], int(arguments.point[1]), arguments.steps)
        return
    found, known = {}, {}
    for axis, values in AXES.items():
        rows = []
        for value in values:
            key = (config_of(axis, value), axis == "ranks" and value)
            known[key] = known.get(key) or measure(axis, value, arguments.steps)  # axes meet in what is usual
            rows.append({"value": value, **known[key]})
        fits = {key: round(slope(list(values), [r[key] for r in rows]), 2) for key in ("seconds", "bytes", "flops")}
        found[axis] = {"rows": rows, "exponents": fits}
        if not arguments.json:
            for r in rows:
                ratio = r["seconds"] / rows[0]["seconds"]
                print(f"{axis:>14} {r['value']:>4}: {1e3 * r['seconds']:7.1f} ms  {ratio:5.2f}x  "
                      f"{r['bytes'] / 1e6:7,.0f} MB  {r['flops'] / 1e9:7.2f} GFLOP", flush=True)  # fmt: skip
            told = ", ".join(f"{key} {value:+.2f}" for key, value in fits.items())
            print(f"{axis:>14} exponents: {told}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_script(main))
