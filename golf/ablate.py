"""Variants against each other at equal time, pace, steps, training FLOPs or bytes, seed by seed.

    python -m golf.ablate FILE.toml [--pairs] [--table]
    python -m golf.ablate --space FILE.toml [--pairs]           a search: see golf/search.py
    python -m golf.ablate --preset laptop --data data/english --equal steps --amount 400 --seeds 1 2 \
        --variants control= "leaky=--shape.activation leaky-relu2" --results mine.jsonl

FILE names a preset, the data, what is equal, seeds and variants:

    preset = "laptop"
    data = "data/yardstick"
    equal = "steps"            # time, pace, steps, flops or bytes
    amount = 600               # seconds, seconds, steps, training FLOPs, or bytes of the artifact
    seeds = [1, 2]
    flags = ["--recipe.matrix-rate", "0.03"]
    keep = "runs/mine"         # where the run folders stay, if they shall
    judge = false              # score the packed artifact by the referee, or the weights before packing
    [variants]
    control = []
    leaky = ["--shape.activation", "leaky-relu2"]
    naive = ["laptop_naive", "--run.data", "data/other"]      # another preset, other data

Runs go seed by seed through all variants, so that a machine that changes its pace hits all alike. Each run is a row of
FILE.jsonl, crashes too; what stands there is not run again. A run at equal time during which other programs took more
than a twentieth of the processor is void and is run once more. Equal pace is equal time by a clock that counts what
each kind of step took when all variants were timed in turn (FILE.pace.json): its runs may share the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import psutil
import tyro

from golf import records
from golf.console import parse, run_script
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import write_bytes
from golf.journal import processor
from golf.log_file import read_log
from golf.plan import Plan, average_step_flops, budget_flags, configuration, make_plan, read_plan, words_of, work_of
from golf.result_rows import TRIES, add_row, bpb_of, read_rows, table, void, wanted

ROOT = Path(__file__).resolve().parent.parent
LAST_STEPS = 40  # whose mean is the training loss of a row


class Load:
    """What share of the busy processor some process trees had, while all of them ran."""

    def __init__(self, count: int = 1):
        self.wait, self.roots = count, []
        self.before = self.ours = self.busy_since = self.ours_before = 0.0
        self.ended = False
        self.lock = threading.Lock()

    @staticmethod
    def busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)

    def add(self, process: subprocess.Popen) -> None:
        """One more; from the last on it counts."""
        with self.lock:
            self.roots.append(process)
            if len(self.roots) == self.wait:
                self.before, self.ours_before = self.busy(), self.seconds()

    def seconds(self) -> float:
        """Processor seconds of all trees so far."""
        total = 0.0
        for root in self.roots:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(root.pid)
                total += sum(sum(p.cpu_times()[:4]) for p in [process, *process.children(recursive=True)])
        return total

    def look(self) -> None:
        """Note the seconds so far, until the first of the trees has ended."""
        with self.lock:
            self.ended |= any(root.poll() is not None for root in self.roots)
            if len(self.roots) == self.wait and not self.ended:
                found = self.seconds() - self.ours_before
                if found >= self.ours:
                    self.ours, self.busy_since = found, self.busy() - self.before

    def share(self) -> float:
        return min(1.0, self.ours / max(1e-9, self.busy_since))


def run_one(plan: Plan, variant: str, seed: int, cpus: list[int] | None, load: Load | None = None) -> dict:
    """Train one variant once: its row. `load` watches the run that is beside it too."""
    load = load or Load()
    config = configuration(plan, variant, seed)
    with tempfile.TemporaryDirectory(prefix="golf-ablate-") as place:
        words = [*words_of(plan, variant, seed), *budget_flags(plan, variant, config)]
        here = ["--run.runs", place, "--run.name", "run", *([] if plan.judge else ["--run.no-judge"])]
        began = time.monotonic()
        with ending_with_us():
            with open(Path(place) / "said", "w") as said:  # a pipe that nobody reads would fill
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / "train_gpt.py"), *words, *here], stdout=said, stderr=said
                )
            pin(cpus or [], process.pid)
            load.add(process)
            while process.poll() is None:
                load.look()
                time.sleep(1.0)
        told = (Path(place) / "said").read_text("utf-8", "replace").strip().splitlines() or ["no word"]
        found = list(Path(place).glob("*/submission.json"))
        row = {
            "variant": variant, "seed": seed, "equal": plan.equal, "amount": plan.amount, "flags": words,
            "judge": plan.judge, "fingerprint": config.fingerprint, "exit": process.returncode,
            "cpu_share": round(load.share(), 4), "seconds": round(time.monotonic() - began, 1),
            "step_flops": average_step_flops(config),
        }  # fmt: skip
        if not found:
            return {**row, "status": "crash", "reason": told[-1][:300]}
        record = json.loads(found[0].read_text("utf-8"))
        rows = read_log(found[0].with_name("log.jsonl"))
        losses = [r["loss"] for r in rows if r.get("event") == "step" and isinstance(r["loss"], float)]
        record["train_loss"] = statistics.mean(losses[-LAST_STEPS:]) if losses else None
        depths = [r["mean_depth"] for r in rows if isinstance(r.get("mean_depth"), float)]
        record["mean_depth"] = statistics.mean(depths[-LAST_STEPS:]) if depths else None
        if plan.keep:
            target = Path(plan.keep) / f"{variant}-seed{seed}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(found[0].parent, target)
            records.write(target, replace(records.read(target), name=target.name, record=str(target)))
    kept = (
        "status", "reason", "val_bpb", "val_loss", "unpacked_val_bpb", "quantization_penalty", "bytes_total",
        "bytes_model", "steps", "tokens", "training_flops", "tokens_per_second", "train_seconds", "peak_memory",
        "train_loss", "unpacked_val_loss", "mean_depth",
    )  # fmt: skip
    epochs = (record.get("tokens") or 0) / Corpus(config.run.data).tokens["train"]
    return {**row, **{key: record.get(key) for key in kept}, "epochs": round(epochs, 4)}


@contextlib.contextmanager
def ending_with_us() -> Iterator[None]:
    """Where this process is asked to end, its runs and their judges end first."""
    try:
        yield
    except BaseException:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        raise


def with_paces(plan: Plan, results: Path, cpus: list[int] | None = None) -> Plan:
    """The plan with its variants' paces where they are what is equal: those beside the results, or measured on `cpus`
    if there are none yet. Raises UsageError, also without `cpus`."""
    if plan.equal != "pace":
        return plan
    path = results.with_suffix(".pace.json")
    try:
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if not all(isinstance(entry["work"] + entry["pace"], str) for entry in known.values()):
            raise ValueError("a pace is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}); delete it, and the paces are measured anew.") from error
    configs = {name: configuration(plan, name, plan.seeds[0]) for name in plan.variants}
    works = {name: work_of(config) for name, config in configs.items()}
    told = {name: entry["work"] for name, entry in known.items()}
    if missing := [name for name, work in works.items() if told.get(name) != work]:
        if not known and cpus is None:
            raise UsageError(f"{path} is not there: nothing is timed yet; run the plan without --table.")
        if known:
            raise UsageError(f"{path}: it has no pace of {missing[0]} as it is now, and all are timed in turn; delete "
                             "the file.")  # fmt: skip
        from golf.timing import paces

        print(f"timing {len(missing)} variants in turn", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn"), pin, (cpus,)) as pool:  # whose memory goes with it
            found = pool.submit(paces, configs).result()
        known = {name: {"work": works[name], "pace": pace, "on": processor()} for name, pace in found.items()}
        write_bytes(path, json.dumps(known, indent=1).encode() + b"\n")
    return replace(plan, paces={name: known[name]["pace"] for name in plan.variants})


def pin(cpus: list[int], process: int = 0) -> None:
    """Keep a process, or this one, to some cores."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cpus)


@dataclass(frozen=True)
class Arguments:
    """Compare variants; resumes where FILE.jsonl ends."""

    file: tyro.conf.Positional[str] = ""
    """A plan in TOML; without one the options below are the plan."""
    space: str = ""
    """A search in TOML: options and their ranges, tried for short, the better ones for longer."""
    preset: str = ""
    """Preset that is varied."""
    data: str = "data/builtin"
    """Prepared text."""
    equal: Literal["time", "pace", "steps", "flops", "bytes"] = "steps"
    """What all variants have alike."""
    amount: float = 0.0
    """Seconds, seconds, steps, training FLOPs, or bytes of the artifact."""
    seeds: tuple[int, ...] = (1,)
    variants: tuple[str, ...] = ()
    """NAME=FLAGS each; the first is what others are compared with."""
    judge: bool = False
    """Score the packed artifacts by the referee."""
    results: str = ""
    """File of rows, JSON lines; FILE.jsonl when empty."""
    table: bool = False
    """Only print the table of what stands in the results."""
    pairs: bool = False
    """Run two variants at a time, each on cores of its own."""
    most: int = 0
    """Runs to do now; 0 is all."""


def plan_of(arguments: Arguments) -> tuple[Plan, Path]:
    """The plan, and the file of its rows. Raises UsageError."""
    if arguments.file:
        path = Path(arguments.file)
        return read_plan(path), Path(arguments.results or path.with_suffix(".jsonl"))
    if not arguments.results:
        raise UsageError("Name a plan (FILE.toml), or a file of rows with --results beside --preset and --variants.")
    for option in ("preset", "amount", "variants"):
        if not getattr(arguments, option):
            raise UsageError(f"--{option}: give it, or name a plan (FILE.toml).")
    for variant in arguments.variants:
        if "=" not in variant:
            raise UsageError(f"--variants {variant:.60}: give NAME=FLAGS, as control= for no flags.")
    named = [variant.partition("=") for variant in arguments.variants]
    values = {name: getattr(arguments, name) for name in ("preset", "data", "equal", "amount", "judge")}
    names = [name for name, _, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--variants {twice}: stands twice, give each a name of its own.")
    try:
        flags = [shlex.split(words) for _, _, words in named]
    except ValueError as error:
        raise UsageError(f"--variants: a quotation mark is not closed ({error}).") from error
    values |= {"seeds": list(arguments.seeds), "variants": dict(zip(names, flags, strict=True))}
    return make_plan(values, "command line"), Path(arguments.results)


def main() -> int:
    arguments = parse(tyro.cli, Arguments, prog="python -m golf.ablate")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments.space:
        from golf import search

        for option in ("most", "results", "judge"):
            if getattr(arguments, option):
                raise UsageError(f"--{option}: it is not of a search, leave it out beside --space.")
        return search.main(Path(arguments.space), arguments.pairs, arguments.table)
    plan, results = plan_of(arguments)
    if arguments.table:
        print(table(with_paces(plan, results), read_rows(results)))
        return 0
    rows = carry_out(plan, results, arguments.pairs, arguments.most)
    print(table(with_paces(plan, results), rows))
    return 0


def carry_out(plan: Plan, results: Path, pairs: bool, most: int = 0) -> list[dict]:
    """Run what the results lack, at most `most` runs if that is not 0; returns all rows. Raises UsageError."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    width = 2 if pairs and len(cores) >= 2 else 1
    plan = with_paces(plan, results, cores[: len(cores) // width])
    rows = read_rows(results)
    done, tried = 0, Counter()
    while not (most and done >= most):  # what was void is wanted once more
        todo = [one for one in wanted(plan, rows) if tried[one] < TRIES]
        if not todo:
            break
        part = todo[: min(width, most - done) if most else width]
        for number, (variant, seed) in enumerate(part):
            print(f"[{done + number + 1}/{done + len(todo)}] {variant}, seed {seed}", flush=True)
        done += len(part)
        tried.update(part)
        for row in side_by_side(plan, part, cores) if width > 1 else [run_one(plan, *part[0], None)]:
            add_row(results, row)
            rows.append(row)
            told = row.get("reason") or "" if bpb_of(row) is None else f"{bpb_of(row):.4f} bpb, {row['steps']} steps"
            print(f"    {row['variant']}, seed {row['seed']}: {told}{' (void)' if void(row) else ''}", flush=True)
    return rows


def side_by_side(plan: Plan, part: list[tuple[str, int]], cores: list[int]) -> list[dict]:
    """Two runs at once, each on half of the cores; their share of the processor is that of both while both ran."""
    half, load = len(cores) // 2, Load(len(part))
    halves = (cores[:half], cores[half : 2 * half])
    with ThreadPoolExecutor(2) as pool, ending_with_us():
        jobs = [pool.submit(run_one, plan, *one, mine, load) for one, mine in zip(part, halves, strict=False)]
        return [job.result() for job in jobs]


if __name__ == "__main__":
    sys.exit(run_script(main))
