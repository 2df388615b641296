"""What the referee's probes cost beside the scoring: measured on a run, extrapolated to the contest's validation set.

python bench/probe_cost.py RUN [--data FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval_bpb
from golf import submission, validation
from golf.console import run_script
from golf.contender import Contender, Limits
from golf.judging import FULL_SHARE, MOST_PROBES, PROBE_SHARE, SCORED_TOKENS
from golf.recheck import AT_A_TIME, FRESH_ROWS

CONTEST_TARGETS = 62_021_845


def seconds_a_row(contender: Contender, tokens: np.ndarray, context: int, slots: int) -> dict[str, float]:
    """Median seconds of a row by score() in batches of `slots`, and by logprobs() in one of a buffer's size."""
    found = {}
    for kind, rows in (("score", slots), ("logprobs", max(1, (64 << 20) // (4 * contender.vocab * context)))):
        batch = np.stack([tokens[n * context : (n + 1) * context + 1] for n in range(rows)]).astype(np.int64)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            contender.score(batch) if kind == "score" else contender.logprobs(batch[:, :-1])
            times.append((time.perf_counter() - began) / rows)
        found[kind] = float(np.median(times[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/yardstick"))
    arguments = parser.parse_args()
    verdict = eval_bpb.judge(arguments.run, arguments.data)
    scoring, probing = verdict["eval_seconds"], verdict["probe_seconds"]
    print(f"{verdict['val_tokens']:,} targets: {scoring:.1f} s of scoring, {probing:.1f} s of probes "
          f"({100 * probing / scoring:.1f} %)")  # fmt: skip
    entry = submission.read(arguments.run)
    text = validation.load(arguments.data, entry)
    slots = max(1, SCORED_TOKENS // entry.context)
    with Contender(arguments.run, text.tokenizer.model, Limits(600)) as contender:
        each = seconds_a_row(contender, text.tokens, entry.context, slots)
    rows = CONTEST_TARGETS // entry.context
    blind, full = min(MOST_PROBES, int(PROBE_SHARE * rows)), int(FULL_SHARE * rows)
    cost = {
        f"{blind} rows shown blind": blind * each["score"],
        f"{full} rows in full, a quarter of them twice": 1.25 * full * each["logprobs"],
        "a row asked again, with others": 2 * slots * each["score"],
        f"a fresh process, {FRESH_ROWS} rows twice among {slots} and alone": FRESH_ROWS
        * (2 * slots / AT_A_TIME + 1)
        * each["score"],
    }
    whole = rows * each["score"]
    print(
        f"{CONTEST_TARGETS:,} targets: {rows:,} rows of {entry.context} at {1e3 * each['score']:.2f} ms: {whole:.0f} s"
    )
    for what, seconds in cost.items():
        print(f"  {what}: {seconds:.1f} s")
    print(f"  together {100 * sum(cost.values()) / whole:.2f} % of the scoring")


if __name__ == "__main__":
    sys.exit(run_script(main))
