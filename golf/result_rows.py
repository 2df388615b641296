"""Rows of a comparison: kept as JSON lines, those still wanted, and the table of those that stand. No torch here."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from golf.errors import UsageError
from golf.plan import Plan, configuration, words_of
from golf.stats import spread, welch

LEAST_SHARE = 0.95  # of the busy processor, that a run at equal time must have had
TRIES = 2  # of a run that was disturbed
KEYS = {"variant": str, "seed": int, "equal": str, "flags": list, "cpu_share": (int, float)}


def read_rows(path: Path) -> list[dict]:
    """Rows of a results file; a last line that was cut off is dropped. Raises UsageError for one that is none."""
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if missing := [key for key, kind in KEYS.items() if not isinstance(rows[-1].get(key), kind)]:
                raise ValueError(f"{missing[0]} is missing or of another kind")
        except (ValueError, AttributeError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UsageError(f"{path}: line {number} is no row ({str(error)[:80]}), delete it.") from error
    return rows


def add_row(path: Path, row: dict) -> None:
    """Append a row so that it survives a power cut; a last line that was cut off goes."""
    data = path.read_bytes() if path.exists() else b""
    with open(path, "ab") as file:
        file.truncate(data.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def bpb_of(row: dict) -> float | None:
    """The score that counts: of the artifact, else of the weights and what packing costs at the full loop count. None
    for a run that crashed, was interrupted or is invalid."""
    if row.get("status", "complete") != "complete":
        return None
    if row.get("val_bpb") is not None:
        return row["val_bpb"]
    penalty = row.get("quantization_penalty")
    if row.get("unpacked_val_bpb") is None or penalty == {}:  # nor where memory ran out before packing was measured
        return None
    return row["unpacked_val_bpb"] + (list(penalty.values())[-1] if penalty else 0.0)


def void(row: dict) -> bool:
    """Whether other programs disturbed a run whose result depends on the pace."""
    return row["equal"] in ("time", "bytes") and row["cpu_share"] < LEAST_SHARE


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
    mine, theirs = run_flags(words_of(plan, row["variant"], row["seed"])), run_flags(row["flags"])
    for flags in (mine, theirs) if plan.equal != "bytes" else ():  # how long it trains is what is equal
        flags.pop("--run.cap", None), flags.pop("--run.max-steps", None)
    pace = theirs.pop("--run.pace", None)
    return alike and theirs == mine and pace == plan.paces.get(row["variant"])


def run_flags(words: list[str]) -> dict[str, str]:
    """The --run options of a command line, which no fingerprint knows, each with the last value it was given."""
    found = {}
    for n, word in enumerate(words):
        if word.startswith("--run."):
            name, is_one, value = word.partition("=")
            following = words[n + 1] if n + 1 < len(words) and not words[n + 1].startswith("--") else ""
            found[name] = value if is_one else following
    return found


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
        "| epochs | validation less training loss, nats | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in sorted(found, key=lambda v: mean([bpb_of(r) for r in found[v]])):
        mine = found[variant]
        crashed = sum(r["variant"] == variant and r.get("status") == "crash" for r in rows)
        if not mine:
            lines.append(f"| {variant} |{' - |' * 11} 0, {crashed} crashed |")
            continue
        scores = [bpb_of(r) for r in mine]
        gains = [base[r["seed"]] - bpb_of(r) for r in mine if r["seed"] in base]
        p = welch(scores, [base[s] for s in base]) if variant != control else None
        lines.append(
            f"| {variant} | {mean(scores):.4f} | {deviation(scores)} | {mean(gains):+.4f} | {deviation(gains)} | "
            f"{'-' if p is None else f'{p:.3f}'} | {mean([r['bytes_total'] for r in mine]):,.0f} | "
            f"{mean([r['steps'] for r in mine]):,.0f} | "
            f"{1e3 * mean([r['tokens'] / max(1, r['steps']) / max(1e-9, r['tokens_per_second']) for r in mine]):.1f} | "
            f"{mean([r['tokens_per_second'] for r in mine]):,.0f} | "
            f"{average(mine, epochs_of, '.2f')} | {average(mine, gap_of, '+.3f')} | "
            f"{len(mine)}{f', {crashed} crashed' if crashed else ''} |"
        )
    if every > len(rows):
        lines.append(f"\n{every - len(rows)} rows are of other configurations, as by options that have changed since, "
                     "and are left out.")  # fmt: skip
    return "\n".join(lines)


def epochs_of(row: dict) -> float | None:
    """How often the run went over its text."""
    return row.get("epochs")


def gap_of(row: dict) -> float | None:
    """Nats a token by which the weights do worse on validation text than on their last steps' batches."""
    both = row.get("unpacked_val_loss"), row.get("train_loss")
    return None if None in both else both[0] - both[1]


def average(rows: list[dict], of: Callable[[dict], float | None], form: str) -> str:
    """The mean over those rows that have it, as a table shows it."""
    found = [value for row in rows if (value := of(row)) is not None]
    return f"{mean(found):{form}}" if found else "-"


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else math.inf


def deviation(values: list[float]) -> str:
    """Sample standard deviation as a table shows it."""
    found = spread(values)
    return "-" if found is None else f"{found:.4f}"
