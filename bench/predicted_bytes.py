"""Real artifacts beside the sizes that budget.py gives them before training.

    python bench/predicted_bytes.py RUN... [--json]

Each RUN is a folder of a run with --run.checkpoint. Its weights are packed as its configuration says and on grids of
other steps, with static and with following tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import codec, records, size
from golf.checkpoint import read_sensitivities, read_tensors
from golf.config import Config
from golf.console import run_script
from golf.quantize import quantize
from golf.recipe import Pack

STATIC = Pack(0.35, 0.2, quantizer="scalar", coder="static")
PACKS = {
    "int8, nearest, static": Pack(
        1 / 40, 1 / 40, rounding="nearest", quantizer="scalar", column_steps=False, row_power=1.0, coder="static",
        calibration_batches=0,
    ),
    "0.35 / 0.2, static": STATIC,
    "0.8 / 0.5, static": replace(STATIC, matrix_step=0.8, embed_step=0.5),
    "0.1 / 0.1, trellis": Pack(0.1, 0.1),
    "0.35 / 0.2, trellis": Pack(0.35, 0.2),
    "0.8 / 0.5, trellis": Pack(0.8, 0.5),
    "0.35 / 0.2, scalar": Pack(0.35, 0.2, quantizer="scalar"),
}  # fmt: skip


def rows_of(run: Path) -> list[dict]:
    """One row for each packing of a run's weights."""
    shape, weights = read_tensors(run / "checkpoint.safetensors")
    sensitivities = read_sensitivities(run / "hessians.safetensors", shape)
    preset, rows = records.read(run).preset, []
    for name, pack in PACKS.items():
        found = sensitivities if pack.calibration_batches else None
        data, _ = quantize(shape, weights, pack, 0, found, partial(codec.encode, shape, coder=pack.coder, chosen={}))
        classes = size.artifact_bytes(Config(shape=shape, pack=pack), 0)
        predicted = sum(classes.values())
        rows.append({
            "run": run.name, "preset": preset, "shape": codec.changed(shape), "packing": name, "pack": asdict(pack),
            "bytes": len(data), "predicted": predicted, "off_%": round(100 * (predicted / len(data) - 1), 2),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row for run in arguments.runs for row in rows_of(run)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| run | packing | bytes | predicted | off |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['run']} | {row['packing']} | {row['bytes']:,} | {row['predicted']:,} | {row['off_%']:+.2f} % |")
    for kind in ("static", "trellis"):
        off = [abs(row["off_%"]) for row in rows if kind in row["packing"]]
        print(f"{kind}: {max(off):.2f} % at most")


if __name__ == "__main__":
    sys.exit(run_script(main))
