#!/usr/bin/env python3
"""README's tables of runs, from the run folders that they stand on.

    python examples/tables.py            # print each table that README marks with <!-- runs: FOLDER -->
    python examples/tables.py --write    # put them there

A folder holds runs named VARIANT-seedN, as `golf.ablate` keeps them. Exit code 1 where README says otherwise.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf import records
from golf.config import shape_from_dict
from golf.console import run_script
from golf.errors import UsageError
from golf.result_rows import deviation

MARK = re.compile(r"<!-- runs: (\S+) -->\n(?:\|.*\n)*")
HEAD = ("run", "unique blocks", "layers", "bytes", "steps", "training FLOPs", "packing costs", "bpb", "sd", "seeds")


def rows_of(folder: Path) -> list[tuple[float, tuple]]:
    """Mean score and cells of each variant's runs. Raises UsageError for records that cannot be read or differ."""
    variants: dict[str, list[records.Record]] = {}
    for path in sorted(folder.glob("*-seed*/submission.json")):
        variants.setdefault(path.parent.name.rpartition("-seed")[0], []).append(records.read(path.parent))
    rows = []
    for name, runs in variants.items():
        runs = [r for r in runs if r.status == "complete" and r.val_bpb is not None]
        if not runs or len({r.fingerprint for r in runs}) > 1:
            raise UsageError(f"{folder}: the runs of {name} are none, or of several configurations, give seeds of one.")
        shape, scores = shape_from_dict(runs[0].config["shape"]), [r.val_bpb for r in runs]
        costs = [list(r.quantization_penalty.values())[-1] for r in runs if r.quantization_penalty]
        cost = f"{statistics.mean(costs):.4f}" if len(costs) == len(runs) else "-"
        rows.append((statistics.mean(scores), (
            f"`{name}`", shape.unique_layers, shape.effective_layers,
            f"{statistics.mean(r.bytes_total for r in runs):,.0f}", f"{statistics.mean(r.steps for r in runs):,.0f}",
            f"{statistics.mean(r.training_flops for r in runs):.3g}", cost, f"{statistics.mean(scores):.4f}",
            deviation(scores), len(runs),
        )))  # fmt: skip
    return rows


def table(folder: Path) -> str:
    """Markdown, best first."""
    lines = [HEAD, ("---",) * len(HEAD), *(cells for _, cells in sorted(rows_of(folder)))]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines)


def asked(words: list[str]) -> bool:
    """Whether to write. Raises UsageError."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        sys.exit(0)
    if other := [word for word in words if word != "--write"]:
        raise UsageError(f"{other[0]}: give --write or nothing; README names the folders.")
    return bool(words)


def main(write: bool) -> int:
    path = ROOT / "README.md"
    said = path.read_text("utf-8")
    for mark in MARK.finditer(said):
        print(f"{mark[1]}\n\n{table(ROOT / mark[1])}")
    true = MARK.sub(lambda mark: f"<!-- runs: {mark[1]} -->\n{table(ROOT / mark[1])}", said)
    if write:
        path.write_text(true, "utf-8")
    elif true != said:
        print("README says otherwise; --write corrects it.")
    return int(true != said and not write)


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(asked(sys.argv[1:]))))
