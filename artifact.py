#!/usr/bin/env python3
"""The artifact: weights to bytes and back, and a folder's bytes against the cap. None of it imports torch.

python artifact.py check FOLDER [--json]
python artifact.py unpack FOLDER/model.bin WEIGHTS.safetensors
python artifact.py pack WEIGHTS.safetensors MODEL.bin [--target-bytes N] [--hessians FILE]
python artifact.py bundle RUN|PRESET [--output FOLDER] [--minify] [--pack] [--golden DATA]
python artifact.py rescore RUN FOLDER [--stride N] [--isolate] [--adapt-rank R] ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from golf import bundle, folders, records
from golf.checkpoint import read_sensitivities, read_tensors, write_weights
from golf.checks import check_pack
from golf.codec import encode, load_artifact
from golf.config import TRACKS, Config
from golf.console import parse, run_script, show
from golf.errors import UsageError
from golf.files import write_bytes, write_files
from golf.presets import PRESETS, flags_of
from golf.quantize import quantize
from golf.recipe import Pack, Run, Scoring
from golf.rescore import rescored


def check(folder: Positional[str], cap: int = 0, json: bool = False) -> int:
    """Add up the bytes of a folder on disk. Exit 0 when they fit, 1 when not, 2 for misuse.

    Args:
        folder: A submission folder.
        cap: Bytes allowed; the cap of the record's track when 0, or 16,000,000 without a record.
        json: Print one JSON object.
    """
    path = Path(folder)
    if cap < 0:
        raise UsageError(f"--cap {cap}: give 0 or more.")
    measured = folders.sizes(path)
    if not measured.total:
        raise UsageError(f"{path} holds nothing that counts, name a submission folder.")
    track = records.read(path).track if (path / "submission.json").exists() else "contest"
    limit = cap or TRACKS.get(track, TRACKS["contest"]).bytes_cap
    result = {
        "code": measured.code, "weights": measured.weights, "other": measured.other, "total": measured.total,
        "cap": limit, "headroom": limit - measured.total, "fits": measured.total <= limit,
    }  # fmt: skip
    show(result, json)
    if not json:
        for name, size in measured.files.items():
            print(f"  {size:>12,}  {name}")
    return 0 if result["fits"] else 1


def unpack(artifact: Positional[str], weights: Positional[str], json: bool = False) -> int:
    """Write an artifact's weights as a safetensors file, the shape in its metadata.

    Args:
        artifact: A model.bin.
        weights: File to write.
        json: Print one JSON object.
    """
    shape, tensors = load_artifact(Path(artifact))
    write_weights(Path(weights), shape, tensors)
    show({"tensors": len(tensors), "parameters": shape.parameter_count, "written": weights}, json)
    return 0


def pack(
    weights: Positional[str], artifact: Positional[str], hessians: str = "", track: str = "contest",
    pack: Annotated[Pack, arg(name="")] = Pack(), json: bool = False,  # noqa: B008, frozen
) -> int:  # fmt: skip
    """Quantise and compress the weights of a safetensors file whose metadata holds the shape.

    Args:
        weights: A file that `unpack` or a run with --run.checkpoint wrote.
        artifact: File to write.
        hessians: The hessians.safetensors of the same run; without it every weight counts the same.
        track: Whose cap the artifact is to fill, less the code and 0.05 %, when neither bytes nor steps are given.
        pack: How weights become bytes.
        json: Print one JSON object.
    """
    if track not in TRACKS:
        raise UsageError(f"--track {track}: give one of {', '.join(TRACKS)}.")
    shape, tensors = read_tensors(Path(weights))
    check_pack(pack)
    config = Config("pack", track, shape, pack=pack)
    found = read_sensitivities(Path(hessians), shape) if hessians else None
    target = config.target_bytes(bundle.code_bytes(config))
    data, report = quantize(shape, tensors, pack, target, found, partial(encode, shape, coder=pack.coder, chosen={}))
    write_bytes(Path(artifact), data)
    result = {"bytes": len(data), "bits_per_parameter": round(8 * len(data) / shape.parameter_count, 4)}
    if pack.matrix_step == 0:
        result["target_bytes"] = target
    if found:
        result["predicted_loss"] = report["predicted_loss"]
    show(result, json)
    for note in report["notes"]:
        print(note, file=sys.stderr)
    return 0


def bundle_run(
    run: Positional[str], output: str = "", minify: bool = False, pack: bool = False, golden: str = "",
    json: bool = False,
) -> int:  # fmt: skip
    """Write a run's code as one self-contained train_gpt.py.

    Args:
        run: A run folder, or a preset's name.
        output: Folder to write to; the run folder when empty.
        minify: Shorten names and drop comments (python-minifier).
        pack: Compress the file into one that unpacks itself; the readable one is written under source/.
        golden: A prepared corpus on which the bundle is first run for 20 steps and must give the checkout's losses.
        json: Print one JSON object.
    """
    config = PRESETS[run] if run in PRESETS else records.config_of(records.read(Path(run)))
    folder = Path(output or run)
    if not output and run in PRESETS:
        raise UsageError(f"--output: name a folder for the bundle of {run}.")
    files = {"train_gpt.py": counted_code(config, minify, pack)}
    if minify or pack:
        files["source/train_gpt.py"] = bundle.readable(config).encode()
    for name, data in files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != data:
            raise UsageError(f"{folder / name} exists and is not this bundle; give another --output.")
    if golden and (difference := golden_difference(config, minify, pack, Path(golden))):
        raise UsageError(f"The bundle does not train as the checkout does: {difference}.")
    write_files(folder, files)
    show({"bytes_code": len(files["train_gpt.py"]), "written": str(folder / "train_gpt.py")}, json)
    return 0


def counted_code(config: Config, minify: bool, pack: bool) -> bytes:
    """The one file as it counts."""
    source = bundle.readable(config)
    source = bundle.minified(source) if minify else source
    return bundle.packed(source) if pack else source.encode()


def golden_difference(config: Config, minify: bool, pack: bool, data: Path, steps: int = 20) -> str:
    """Where the bundle's losses over a few steps leave the checkout's, or nothing."""
    run = replace(config.run, max_steps=steps, data=str(data.resolve()))
    losses = []
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        (here / "train_gpt.py").write_bytes(counted_code(replace(config, run=run), minify, pack))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DATA_PATH": str(data.resolve())}
        own = ["--run.data", run.data, "--run.max-steps", str(steps), "--run.runs", place, "--run.name", "checkout"]
        place_free = {name: getattr(Run(), name) for name in ("data", "name", "runs", "max_steps", "checkpoint")}
        same = flags_of(replace(config, run=replace(config.run, **place_free)))
        checkout = [str(bundle.ROOT / "train_gpt.py"), config.preset, *same, *own, "--run.no-judge"]
        for command in (["-I", str(here / "train_gpt.py")], checkout):
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=here, check=False
            )
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["it failed"])[-1]
            log = done.stdout if command[0] == "-I" else next(here.glob("*-checkout/log.jsonl")).read_text("utf-8")
            rows = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
            losses.append([row["loss"] for row in rows if row.get("event") == "step"])
    ours, theirs = losses
    if len(ours) != steps:
        return f"{len(ours)} steps of {steps}"
    return next((f"step {i + 1}: {a} and {b}" for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), "")


def rescore(
    run: Positional[str], output: Positional[str],
    scoring: Annotated[Scoring, arg(name="")] = Scoring(), json: bool = False,  # noqa: B008, frozen
) -> int:  # fmt: skip
    """Copy a run folder with other ways of scoring stored in its artifact: windows, documents, adaptation.

    Args:
        run: A run folder.
        output: Folder to write.
        scoring: How the packed model is asked.
        json: Print one JSON object.
    """
    record = rescored(Path(run), Path(output), asdict(scoring))
    show({"written": output, "bytes_total": record.bytes_total}, json)
    return 0


def main() -> int:
    commands = {"pack": pack, "check": check, "unpack": unpack, "bundle": bundle_run, "rescore": rescore}
    return parse(tyro.extras.subcommand_cli_from_dict, commands, prog="artifact.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
