"""Weights and sensitivities on disk, as safetensors with the model's shape in the metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from golf.config import shape_from_dict
from golf.errors import UsageError
from golf.files import write_bytes
from golf.quantize import Sensitivity
from golf.shape import Shape


def write_weights(path: Path, shape: Shape, weights: dict[str, np.ndarray]) -> None:
    """Write float32 tensors."""
    from safetensors.numpy import save

    write_bytes(path, save(weights, metadata={"shape": json.dumps(asdict(shape))}))


def write_sensitivities(path: Path, shape: Shape, found: dict[str, Sensitivity]) -> None:
    """Write each matrix's Hessian as float32 and its rows' weights."""
    from safetensors.numpy import save

    tensors = {f"{name}/hessian": s.hessian.astype(np.float32) for name, s in found.items()}
    tensors |= {f"{name}/rows": s.rows.astype(np.float32) for name, s in found.items()}
    write_bytes(path, save(tensors, metadata={"shape": json.dumps(asdict(shape))}))


def read_tensors(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    """Shape and tensors of a file that this module wrote. Raises UsageError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a safetensors file of float tensors that numpy knows ({error}).") from error
    try:
        return shape_from_dict(json.loads(about["shape"])), tensors
    except (KeyError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} has no model shape in its metadata; write it with `artifact.py unpack`.") from error


def read_sensitivities(path: Path, shape: Shape) -> dict[str, Sensitivity]:
    """What write_sensitivities wrote, for this very shape. Raises UsageError."""
    theirs, tensors = read_tensors(path)
    if theirs != shape:
        raise UsageError(f"{path} holds the Hessians of another model; collect them from this one.")
    names = {name.partition("/")[0] for name in tensors}
    try:
        return {
            n: Sensitivity(tensors[f"{n}/hessian"].astype(np.float64), tensors[f"{n}/rows"].astype(np.float64))
            for n in names
        }
    except KeyError as error:
        raise UsageError(f"{path} is incomplete: it has no {error}.") from error
