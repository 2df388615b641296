"""Whether the training cap holds, and how much of it is used, under artificial load.

    python bench/caps.py [--runs 20] [--cap 10] [--data data/builtin] [--json]

Real runs of a small model under `--run.cap`, one after the other, while other processes take the processors for random
stretches and rest for others. Prints each run's seconds; exit 1 where one is over the cap, or where the median run uses
less than 97 % of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_MEDIAN = 0.97
LOAD = (
    "import random, sys, time\nrandom.seed(int(sys.argv[1]))\n"
    "while True:\n"
    "    end = time.monotonic() + random.choice([0.002, 0.02, 0.2, 1.0])\n"
    "    while time.monotonic() < end:\n        pass\n"
    "    time.sleep(random.choice([0.001, 0.02, 0.3, 2.0]))\n"
)
SMALL = (
    "--shape.width", "32", "--shape.heads", "2", "--shape.kv-heads", "1", "--recipe.sequence-length", "64",
    "--recipe.batch-tokens", "512", "--run.compile", "none", "--run.no-judge", "--pack.calibration-batches", "4",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--cap", type=float, default=10.0)
    parser.add_argument("--data", default="data/builtin")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    seconds = []
    for number in range(asked.runs):
        seeds = range(100 * number, 100 * number + (os.cpu_count() or 1))
        loads = [subprocess.Popen([sys.executable, "-c", LOAD, str(seed)]) for seed in seeds]
        try:
            with tempfile.TemporaryDirectory(prefix="golf-caps-") as place:
                command = [sys.executable, str(ROOT / "train_gpt.py"), "smoke", *SMALL, "--run.data", asked.data,
                           "--run.cap", str(asked.cap), "--run.runs", place]  # fmt: skip
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return done.returncode
                record = json.loads(next(Path(place).glob("*/submission.json")).read_text())
        finally:
            for load in loads:
                load.kill()
                load.wait()
        seconds.append(record["train_seconds"])
        if not asked.json:
            print(f"run {number + 1:>3}: {seconds[-1]:.3f} s, {record['steps']} steps", flush=True)
    over, median = sum(s > asked.cap for s in seconds), statistics.median(seconds) / asked.cap
    told = {"runs": len(seconds), "cap": asked.cap, "over": over, "least": min(seconds) / asked.cap, "median": median,
            "most": max(seconds) / asked.cap}  # fmt: skip
    print(json.dumps(told | {"seconds": seconds}) if asked.json else ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()))  # fmt: skip
    return 1 if over or median < LEAST_MEDIAN else 0


if __name__ == "__main__":
    sys.exit(main())
