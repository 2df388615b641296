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

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import psutil
import tyro

from golf import pace
from golf.config import Config
from golf.console import parse, run_script
from golf.errors import UsageError
from golf.files import write_bytes
from golf.presets import PRESETS, parse_command_line
from golf.stats import welch

ROOT = Path(__file__).resolve().parent.parent
EQUAL = ("time", "pace", "steps", "flops", "bytes")
LEAST_SHARE = 0.95  # of the busy processor, that a run at equal time must have had
TRIES = 2  # of a run that was disturbed


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    preset: str
    data: str
    equal: str
    amount: float
    seeds: list[int]
    variants: dict[str, list[str]]
    flags: list[str] = field(default_factory=list)
    judge: bool = False
    keep: str = ""
    """Folder that the run folders are kept in; none when empty."""
    control: str = ""
    """The variant that others are compared with; the first when empty."""
    paces: dict[str, str] = field(default_factory=dict)
    """What a step of each variant takes, for equal pace."""


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file. Raises UsageError naming the key that is wrong."""
    try:
        return make_plan(tomllib.loads(path.read_text("utf-8")), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML ({error}).") from error


def make_plan(values: dict, path: str) -> Plan:
    """A plan from what stands in `path`. Raises UsageError naming the key that is wrong."""
    kinds = {
        "preset": str, "data": str, "equal": str, "amount": (int, float), "seeds": list, "variants": dict,
        "flags": list, "judge": bool, "control": str, "keep": str,
    }  # fmt: skip
    for key, value in values.items():
        if key not in kinds:
            raise UsageError(f"{path}: {key} is unknown, give {', '.join(kinds)}.")
        if not isinstance(value, kinds[key]):
            raise UsageError(f"{path}: {key} is {value!r:.60}, not of the right type.")
    missing = [k for k in ("preset", "data", "equal", "amount", "seeds", "variants") if not values.get(k)]
    if missing:
        raise UsageError(f"{path}: {missing[0]} is missing, give it.")
    plan = Plan(**values)
    if plan.equal not in EQUAL:
        raise UsageError(f"{path}: equal is {plan.equal!r:.60}, give one of {', '.join(EQUAL)}.")
    if plan.preset not in PRESETS:
        raise UsageError(f"{path}: preset {plan.preset!r:.60} is unknown, give one of {', '.join(PRESETS)}.")
    if plan.control and plan.control not in plan.variants:
        raise UsageError(f"{path}: control {plan.control!r:.60} is none of the variants, name one of them.")
    for name, words in plan.variants.items():
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise UsageError(f"{path}: variant {name} is not a list of words, give its flags as one.")
        configuration(plan, name, plan.seeds[0])
    return plan


def configuration(plan: Plan, variant: str, seed: int) -> Config:
    """A variant's whole configuration. Raises UsageError for flags that make none."""
    return parse_command_line(words_of(plan, variant, seed), "ablate").check()


def words_of(plan: Plan, variant: str, seed: int) -> list[str]:
    """The command line of a variant, which may name data of its own and begin with a preset of its own."""
    own = plan.variants[variant]
    preset, own = (own[0], own[1:]) if own[:1] and own[0] in PRESETS else (plan.preset, own)
    return [preset, "--run.seed", str(seed), "--run.data", plan.data, *plan.flags, *own]


def budget_flags(plan: Plan, variant: str, config: Config) -> list[str]:
    """What makes a run as long, or as large, as the others."""
    if plan.equal == "pace":
        return ["--run.cap", f"{plan.amount:g}", "--run.pace", plan.paces[variant]]
    if plan.equal == "time":
        return ["--run.cap", f"{plan.amount:g}"]
    if plan.equal == "bytes":
        return ["--pack.target-bytes", f"{plan.amount:.0f}"]
    if plan.equal == "steps":
        return ["--run.max-steps", f"{plan.amount:.0f}"]
    return ["--run.max-steps", str(max(1, round(plan.amount / step_flops(config))))]


def step_flops(config: Config) -> float:
    """Training FLOPs of an average step, with loops switched on where the recipe says."""
    share = config.recipe.loops_from if config.shape.loops > 1 else 0.0
    early, late = pace.step_flops(config, 1), pace.step_flops(config)
    return share * early + (1 - share) * late


class Load:
    """What share of the busy processor a process tree had."""

    def __init__(self, process: subprocess.Popen):
        self.process = psutil.Process(process.pid)
        self.before, self.ours = self.busy(), 0.0

    @staticmethod
    def busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)

    def look(self) -> None:
        """Note the tree's processor seconds so far."""
        try:
            tree = [self.process, *self.process.children(recursive=True)]
            self.ours = max(self.ours, sum(sum(p.cpu_times()[:4]) for p in tree))
        except psutil.Error:
            return

    def share(self) -> float:
        return min(1.0, self.ours / max(1e-9, self.busy() - self.before))


def run_one(plan: Plan, variant: str, seed: int, cpus: list[int] | None) -> dict:
    """Train one variant once: its row."""
    config = configuration(plan, variant, seed)
    with tempfile.TemporaryDirectory(prefix="golf-ablate-") as place:
        words = [*words_of(plan, variant, seed), *budget_flags(plan, variant, config)]
        here = ["--run.runs", place, "--run.name", "run", *([] if plan.judge else ["--run.no-judge"])]
        began = time.time()
        with open(Path(place) / "said", "w") as said:  # a pipe that nobody reads would fill
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "train_gpt.py"), *words, *here], cwd=ROOT, stdout=said, stderr=said
            )
        pin(cpus or [], process.pid)
        load = Load(process)
        while process.poll() is None:
            load.look()
            time.sleep(1.0)
        told = (Path(place) / "said").read_text("utf-8", "replace").strip().splitlines() or ["no word"]
        records = list(Path(place).glob("*/submission.json"))
        row = {
            "variant": variant, "seed": seed, "equal": plan.equal, "amount": plan.amount, "flags": words,
            "judge": plan.judge, "fingerprint": config.fingerprint, "exit": process.returncode,
            "cpu_share": round(load.share(), 4), "seconds": round(time.time() - began, 1),
            "step_flops": step_flops(config),
        }  # fmt: skip
        if not records:
            return {**row, "status": "crash", "reason": told[-1][:300]}
        record = json.loads(records[0].read_text("utf-8"))
        if plan.keep:
            target = Path(plan.keep) / f"{variant}-seed{seed}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(records[0].parent, target)
    kept = (
        "status", "reason", "val_bpb", "val_loss", "unpacked_val_bpb", "quantization_penalty", "bytes_total",
        "bytes_model", "steps", "tokens", "training_flops", "tokens_per_second", "train_seconds", "peak_memory",
        "train_loss",
    )  # fmt: skip
    return {**row, **{key: record.get(key) for key in kept}}


def bpb_of(row: dict) -> float | None:
    """The score that counts: of the artifact, else of the weights and what packing costs at the full loop count."""
    if row.get("val_bpb") is not None:
        return row["val_bpb"]
    if row.get("unpacked_val_bpb") is None:
        return None
    penalty = row.get("quantization_penalty") or {}
    return row["unpacked_val_bpb"] + (list(penalty.values())[-1] if penalty else 0.0)


def void(row: dict) -> bool:
    """Whether other programs disturbed a run whose result depends on the pace."""
    return row["equal"] in ("time", "bytes") and row["cpu_share"] < LEAST_SHARE


def with_paces(plan: Plan, results: Path, cpus: list[int] | None = None) -> Plan:
    """The plan with its variants' paces where they are what is equal: those beside the results, or measured on `cpus`
    if there are none yet. Raises UsageError, also without `cpus`."""
    if plan.equal != "pace":
        return plan
    path = results.with_suffix(".pace.json")
    try:
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); delete it, and the paces are measured anew.") from error
    if missing := [name for name in plan.variants if name not in known]:
        if known or cpus is None:
            raise UsageError(f"{path}: it has no pace of {missing[0]}, and all are timed in turn; delete the file.")
        from golf.timing import paces

        print(f"timing {len(missing)} variants in turn", flush=True)
        configs = {name: configuration(plan, name, plan.seeds[0]) for name in missing}
        with ProcessPoolExecutor(1, get_context("spawn"), pin, (cpus,)) as pool:  # whose memory goes with it
            known = pool.submit(paces, configs).result()
        write_bytes(path, json.dumps(known, indent=1).encode() + b"\n")
    return replace(plan, paces=known)


def pin(cpus: list[int], process: int = 0) -> None:
    """Keep a process, or this one, to some cores."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cpus)


def read_rows(path: Path) -> list[dict]:
    """Rows of a results file; a last line that was cut off is dropped. Raises UsageError for one that is not JSON."""
    rows = []
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UsageError(f"{path}: line {number} is not JSON ({error}).") from error
    return rows


def add_row(path: Path, row: dict) -> None:
    """Append a row so that it survives a power cut; a last line that was cut off goes."""
    data = path.read_bytes() if path.exists() else b""
    with open(path, "ab") as file:
        file.truncate(data.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def wanted(plan: Plan, rows: list[dict]) -> list[tuple[str, int]]:
    """(variant, seed) still to be run, seed by seed."""
    todo = []
    for seed in plan.seeds:
        for variant in plan.variants:
            here = [r for r in rows if (r["variant"], r["seed"]) == (variant, seed) and same(plan, r)]
            if not any(not void(r) for r in here) and len(here) < TRIES:
                todo.append((variant, seed))
    return todo


def same(plan: Plan, row: dict) -> bool:
    """Whether a row is of a run as the plan says now: the same whole configuration, whatever flags led to it, text, and
    amount of what is equal."""
    if row["variant"] not in plan.variants:
        return False
    config = configuration(plan, row["variant"], row["seed"])
    asked = {"fingerprint": config.fingerprint, "equal": plan.equal, "amount": plan.amount, "judge": plan.judge}
    alike = row["seed"] in plan.seeds and all(row.get(key) == value for key, value in asked.items())
    wanted = {"--run.data": config.run.data, "--run.pace": plan.paces.get(row["variant"])}
    return alike and all(value_of(row["flags"], name) == value for name, value in wanted.items())


def value_of(words: list[str], flag: str) -> str | None:
    """What follows the last of a flag's places in a command line."""
    places = [n for n, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


def table(plan: Plan, rows: list[dict]) -> str:
    """Markdown: one line a variant, best first."""
    every, rows = len(rows), [r for r in rows if same(plan, r)]
    good = [r for r in rows if not void(r)]
    control = plan.control or next(iter(plan.variants))
    found = {v: [r for r in good if r["variant"] == v and bpb_of(r) is not None] for v in plan.variants}
    base = {r["seed"]: bpb_of(r) for r in found[control]}
    unit = {"time": "s", "pace": "s", "steps": "steps", "flops": "training FLOPs", "bytes": "bytes"}[plan.equal]
    lines = [
        f"Equal {plan.equal}: {plan.amount:g} {unit}, seeds {plan.seeds}{', judged' if plan.judge else ''}.\n",
        f"| variant | bpb | sd | less than {control} | pairs' sd | Welch p | bytes | steps | ms/step | tokens/s "
        "| runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in sorted(found, key=lambda v: mean([bpb_of(r) for r in found[v]])):
        mine = found[variant]
        crashed = sum(r["variant"] == variant and r.get("status") == "crash" for r in rows)
        if not mine:
            lines.append(f"| {variant} | - | - | - | - | - | - | - | - | - | 0, {crashed} crashed |")
            continue
        scores = [bpb_of(r) for r in mine]
        gains = [base[r["seed"]] - bpb_of(r) for r in mine if r["seed"] in base]
        p = welch(scores, [base[s] for s in base]) if variant != control else None
        lines.append(
            f"| {variant} | {mean(scores):.4f} | {spread(scores)} | {mean(gains):+.4f} | {spread(gains)} | "
            f"{'-' if p is None else f'{p:.3f}'} | {mean([r['bytes_total'] for r in mine]):,.0f} | "
            f"{mean([r['steps'] for r in mine]):,.0f} | "
            f"{1e3 * mean([r['train_seconds'] / max(1, r['steps']) for r in mine]):.1f} | "
            f"{mean([r['tokens_per_second'] for r in mine]):,.0f} | "
            f"{len(mine)}{f', {crashed} crashed' if crashed else ''} |"
        )
    if every > len(rows):
        lines.append(f"\n{every - len(rows)} rows are of other configurations, as by options that have changed since, "
                     "and are left out.")  # fmt: skip
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else math.inf


def spread(values: list[float]) -> str:
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"


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
    if arguments.space:
        from golf import search

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
    todo = wanted(plan, rows)
    todo = todo[:most] if most else todo
    for at in range(0, len(todo), width):
        part = todo[at : at + width]
        for number, (variant, seed) in enumerate(part):
            print(f"[{at + number + 1}/{len(todo)}] {variant}, seed {seed}", flush=True)
        for row in side_by_side(plan, part, cores) if width > 1 else [run_one(plan, *part[0], None)]:
            add_row(results, row)
            rows.append(row)
            told = row.get("reason") or "" if bpb_of(row) is None else f"{bpb_of(row):.4f} bpb, {row['steps']} steps"
            print(f"    {row['variant']}, seed {row['seed']}: {told}{' (void)' if void(row) else ''}", flush=True)
    return rows


def side_by_side(plan: Plan, part: list[tuple[str, int]], cores: list[int]) -> list[dict]:
    """Two runs at once, each on half of the cores; a share is then of that half."""
    half = len(cores) // 2
    with ThreadPoolExecutor(2) as pool:
        halves = (cores[:half], cores[half : 2 * half])
        jobs = [pool.submit(run_one, plan, *one, mine) for one, mine in zip(part, halves, strict=False)]
        rows = [job.result() for job in jobs]
    total = sum(r["cpu_share"] for r in rows)
    return [{**r, "cpu_share": round(total, 4)} for r in rows]


if __name__ == "__main__":
    sys.exit(run_script(main))
