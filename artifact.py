"""The artifact: weights to bytes and back, and a folder's bytes against the cap. None of it imports torch.

python artifact.py check FOLDER [--json]
python artifact.py unpack FOLDER/model.bin WEIGHTS.safetensors
python artifact.py pack WEIGHTS.safetensors MODEL.bin [--matrix-bits N] [--embed-bits N]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import tyro
from tyro.conf import Positional

from golf import codec, folders, records
from golf.config import TRACKS, UsageError, check_shape, shape_from_dict
from golf.console import parse, run_script
from golf.data import write_bytes


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
    from safetensors.numpy import save

    shape, tensors = codec.load(Path(artifact))
    write_bytes(Path(weights), save(tensors, metadata={"shape": dumps(asdict(shape))}))
    show({"tensors": len(tensors), "parameters": shape.parameter_count, "written": weights}, json)
    return 0


def pack(
    weights: Positional[str], artifact: Positional[str], matrix_bits: int = 0, embed_bits: int = 0, json: bool = False
) -> int:
    """Quantise and compress the weights of a safetensors file whose metadata holds the shape.

    Args:
        weights: A file that `unpack` wrote.
        artifact: File to write.
        matrix_bits: Grid of the blocks' matrices, 4 to 8; the stored shape's when 0.
        embed_bits: Grid of the embedding, 4 to 8; the stored shape's when 0.
        json: Print one JSON object.
    """
    shape, tensors = read_weights(Path(weights))
    shape = replace(shape, matrix_bits=matrix_bits or shape.matrix_bits, embed_bits=embed_bits or shape.embed_bits)
    check_shape(shape)
    data = codec.encode(shape, tensors)
    write_bytes(Path(artifact), data)
    show({"bytes": len(data), "bits_per_parameter": round(8 * len(data) / shape.parameter_count, 4)}, json)
    return 0


def read_weights(path: Path) -> tuple:
    """Shape and tensors of a safetensors file. Raises UsageError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a safetensors file of float tensors that numpy knows ({error}).") from error
    try:
        return shape_from_dict(loads(about["shape"])), tensors
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path} has no model shape in its metadata; write it with `artifact.py unpack`.") from error


dumps, loads = json.dumps, json.loads  # the commands have an option called json


def show(result: dict, as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    print(
        dumps(result)
        if as_json
        else "\n".join(f"{k}: {v:,}" if type(v) is int else f"{k}: {v}" for k, v in result.items())
    )


def main() -> int:
    commands = {"pack": pack, "check": check, "unpack": unpack}
    return parse(tyro.extras.subcommand_cli_from_dict, commands, prog="artifact.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
