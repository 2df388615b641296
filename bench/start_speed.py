"""Seconds a user waits: for the plan, a help text, a list of 2,000 runs, and until the demo's first training step.

    python bench/start_speed.py [--json]

The demo's data must be prepared (`make demo` once); its compiled graphs then lie in torch's cache.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def whole(*words: str) -> float:
    """Median seconds of a command, of five."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def until_first_step() -> float:
    """Seconds from `golf.prepare builtin`, which finds its work done, to the demo's first step."""
    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "golf.prepare", "builtin"], cwd=ROOT, capture_output=True, check=True)
        words = ("-u", "train_gpt.py", "smoke", "--run.runs", runs, "--run.no-judge", "--run.log-every", "1")
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step      1"):
                break
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
    return seconds


def many_runs(place: Path, count: int = 2000) -> Path:
    """So many copies of a kept run's record and log."""
    record = min((ROOT / "runs").glob("*/*/submission.json"))
    for number in range(count):
        folder = place / f"run-{number}"
        folder.mkdir()
        for name in ("submission.json", "log.jsonl", "verdict.json"):
            shutil.copy(record.parent / name, folder)
    return place


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        listed = whole("record.py", "list", "--runs", str(many_runs(Path(place))))
    result = {
        "budget.py laptop": round(whole("budget.py", "laptop", "--json"), 3),
        "train_gpt.py --help": round(whole("train_gpt.py", "--help"), 3),
        "artifact.py --help": round(whole("artifact.py", "--help"), 3),
        "record.py list, 2,000 runs": round(listed, 3),
        "demo to its first step": round(until_first_step(), 1),
    }
    print(json.dumps(result) if "--json" in sys.argv else "\n".join(f"{k}: {v} s" for k, v in result.items()))


if __name__ == "__main__":
    main()
