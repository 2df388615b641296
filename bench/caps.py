"""Whether the caps on training and evaluation hold, and how much of the first is used, under hostile load.

    python bench/caps.py [--simulated 200] [--runs 20] [--cap 60] [--judged 20] [--data data/builtin] [--json]

Simulated: the clock alone against step times with outliers, stalls, drifts, periods. Real: runs of a small model under
`--run.cap`, one after the other, while other processes take the processors for random stretches; their seconds are the
record's, and those that this process sees pass between the log's lines. Judged under the same load, against a cap of
JUDGED_SECONDS: scorers that get slower with every call, which must be stopped, and scorers that take about as long as
is allowed, in turn. Exit 1 where anything that stands was later than its cap, where one that gets slower is not stopped
within GRACE, or where the median run uses less than 97 % of its cap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf.clock import Clock
from golf.console import run_script

LEAST_MEDIAN = 0.97
JUDGED_SECONDS, GRACE = 10.0, 2.0  # a scorer's cap, and what stopping it may take
SEEN = 0.25  # seconds by which what this process sees may be off
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
SLOW = (
    "import time\nimport numpy as np\n"
    "class Slow:\n    vocab, calls = {vocab}, 0\n"
    "    def logprobs(self, tokens):\n"
    "        self.calls += 1\n        time.sleep({seconds})\n"
    "        return np.full((*tokens.shape, self.vocab), -np.log(self.vocab), dtype=np.float32)\n"
    "def load_scorer(folder):\n    return Slow()\n"
)


def hostile(seed: int) -> Iterator[float]:
    """Step times without end: one kind of trouble each."""
    rng = random.Random(seed)
    base, step, drift = rng.uniform(0.02, 1.0), 0, 1.0
    while True:
        step += 1
        kind = seed % 5
        if kind == 0:  # heavy tails
            yield base * min(20.0, rng.paretovariate(1.5))
        elif kind == 1:  # a stall now and then
            yield base * (30 if rng.random() < 0.005 else 1)
        elif kind == 2:  # slower and slower
            drift = min(4.0, drift * 1.002)
            yield base * drift
        elif kind == 3:  # a period that a short memory forgets
            yield base * (6 if step % 40 == 0 else 1)
        else:  # the pace changes for minutes
            drift = rng.choice((0.5, 1.0, 3.0)) if rng.random() < 0.01 else drift
            yield base * drift * rng.lognormvariate(0, 0.3)


def simulate(seed: int, cap: float = 600.0) -> tuple[float, float, str]:
    """Seconds at which the last update that stands ended, and training did, and how."""
    now, how = [0.0], "before a step"
    clock, last = Clock(cap, now=lambda: now[0]), 0.0
    for seconds in hostile(seed):
        if clock.begin_step() is None:
            break
        now[0] += 0.9 * seconds
        if not clock.may_update():
            how = "abandoned"
            break
        now[0] += 0.1 * seconds
        clock.end_step()
        if clock.late:
            how = "taken back"
            break
        last = clock.elapsed()
    return last, clock.elapsed(), how


@contextlib.contextmanager
def loaded(number: int) -> Iterator[None]:
    """Other processes at work, one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loads = [subprocess.Popen([sys.executable, "-c", LOAD, str(100 * number + n)]) for n in range(cores)]
    try:
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


def train(number: int, cap: float, data: str, place: Path) -> dict:
    """A run under load: its own seconds, what was seen of them, and how it ended."""
    command = [sys.executable, str(ROOT / "train_gpt.py"), "smoke", *SMALL, "--run.data", data, "--run.cap", str(cap),
               "--run.runs", str(place)]  # fmt: skip
    with loaded(number):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seen: dict[str, float] = {}
        while process.poll() is None:
            for log in place.glob("*/log.jsonl"):
                text = log.read_bytes()
                for event in (b"warm-up", b"calibrated"):
                    if b'"event": "' + event + b'"' in text:
                        seen.setdefault(event.decode(), time.monotonic())
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(process.stderr.read())
    (folder,) = place.iterdir()
    record, text = json.loads((folder / "submission.json").read_text()), (folder / "log.jsonl").read_text()
    how = "abandoned" if '"abandoned"' in text else "taken back" if '"late"' in text else "before a step"
    return {"seconds": record["train_seconds"], "seen": round(seen["calibrated"] - seen["warm-up"], 3), "how": how,
            "steps": record["steps"], "folder": folder}  # fmt: skip


def judge(number: int, folder: Path, data: str) -> dict:
    """A scorer that gets slower and slower, or (odd numbers) takes about as long as it may: its seconds, and whether
    it was called late."""
    import eval_bpb
    from golf.contender import Limits
    from golf.data import Corpus

    corpus, grows = Corpus(data, "--data"), number % 2 == 0
    a_token = random.Random(number).uniform(0.3, 1.1) * JUDGED_SECONDS / corpus.tokens["val"]

    with tempfile.TemporaryDirectory(prefix="golf-caps-") as place:
        slow = Path(place) / "slow"
        shutil.copytree(folder, slow)
        vocab = json.loads((folder / "submission.json").read_text())["config"]["shape"]["vocab_size"]
        for code in slow.glob("*.py"):
            code.unlink()
        seconds = "0.05 * 1.3 ** self.calls" if grows else f"{a_token} * tokens.size"
        (slow / "scorer.py").write_text(SLOW.format(vocab=vocab, seconds=seconds))
        with loaded(number):
            limits = Limits(JUDGED_SECONDS)
            verdict = eval_bpb.judge(slow, Path(data), limits=limits)
    late = "was stopped after" in str(verdict.get("invalid"))
    if not late and not verdict["valid"]:
        raise SystemExit(f"A scorer without fault was found invalid: {verdict['invalid']}")
    return {"seconds": limits.scoring, "late": late, "grows": grows,
            "over": limits.scoring > JUDGED_SECONDS + (GRACE if late else 0) or (grows and not late)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulated", type=int, default=200)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--judged", type=int, default=20)
    parser.add_argument("--cap", type=float, default=60.0)
    parser.add_argument("--data", default="data/builtin")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    tell = (lambda text: None) if asked.json else lambda text: print(text, flush=True)
    found: dict[str, dict] = {}

    def note(kind: str, shares: list[float], over: int, **more: object) -> None:
        found[kind] = {"count": len(shares), "over": over, "least": min(shares), "median": statistics.median(shares),
                       "most": max(shares), **more}  # fmt: skip
        tell(f"{kind}: {len(shares)}, {over} over the cap; share of it used {min(shares):.4f} to {max(shares):.4f}, "
             f"median {statistics.median(shares):.4f}; {more}")  # fmt: skip

    if asked.simulated:
        ends = [simulate(seed) for seed in range(asked.simulated)]
        hows = {how: sum(h == how for *_, h in ends) for how in ("before a step", "abandoned", "taken back")}
        note("simulated", [last / 600 for last, *_ in ends], sum(last > 600 for last, *_ in ends), ends=hows,
             ended_most=max(end for _, end, _ in ends) / 600)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="golf-caps-") as place:
        rows = []
        for number in range(asked.runs):
            here = Path(place) / str(number)
            here.mkdir()
            rows.append(train(number, asked.cap, asked.data, here))
            row = rows[-1]
            tell(f"run {number + 1:>3}: {row['seconds']:.3f} s, seen {row['seen']:.3f} s, {row['steps']} steps, ended "
                 f"{row['how']}")  # fmt: skip
        if rows:
            over = sum(r["seconds"] > asked.cap or r["seen"] > asked.cap + SEEN for r in rows)
            hows = {how: sum(r["how"] == how for r in rows) for how in ("before a step", "abandoned", "taken back")}
            note("trained", [r["seconds"] / asked.cap for r in rows], over, ends=hows,
                 seen_most=max(r["seen"] for r in rows) / asked.cap)  # fmt: skip
        if asked.judged and rows:
            stops = [judge(number, rows[0]["folder"], asked.data) for number in range(asked.judged)]
            note("judged", [s["seconds"] / JUDGED_SECONDS for s in stops], sum(s["over"] for s in stops),
                 called_late=sum(s["late"] for s in stops), grew=sum(s["grows"] for s in stops),
                 stood_most=max([s["seconds"] for s in stops if not s["late"]] or [0.0]) / JUDGED_SECONDS)  # fmt: skip
    if asked.json:
        print(json.dumps(found))
    low = [k for k in ("simulated", "trained") if k in found and found[k]["median"] < LEAST_MEDIAN]
    return 1 if low or any(told["over"] for told in found.values()) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
