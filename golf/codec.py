"""Weights to bytes and back: an integer grid for each row, one zstd frame for each class of tensor.

The file is MAGIC, a version, a sha256 of all that follows, the header's length, the JSON header and the frames.
Only the unique tensors that Shape.parameters() lists are stored, in that order; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zstandard

from golf.config import Shape, UsageError, shape_from_dict, tensor_class

MAGIC, VERSION = b"GOLFPACK", 1
PREFIX = struct.Struct("<8sI32sI")  # magic, version, sha256, header length
HEADER_LIMIT = 1 << 20
FRAMES = ("embed", "matrix", "scale", "control")
LEVEL = 22


@dataclass(frozen=True)
class Grid:
    """A matrix on its grid: row r of the weight is integers[r] * scale[r]."""

    integers: np.ndarray  # (R, C) int8
    scale: np.ndarray  # (R,) float16


def quantize(weight: np.ndarray, bits: int) -> Grid:
    """Round each row of a finite (R, C) float32 matrix to 2^bits - 1 steps of its largest magnitude.

    Exact on the grid: quantize(dequantize(g)) == g for every g that quantize made.
    """
    top = 2 ** (bits - 1) - 1
    weight = weight.astype(np.float32)
    with np.errstate(over="ignore"):  # encode refuses a scale that is not finite
        scale = (np.abs(weight).max(axis=1) / top).astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    integers = np.clip(np.rint(weight / divisor[:, None]), -top, top) * (scale > 0)[:, None]
    return Grid(integers.astype(np.int8), scale)


def dequantize(grid: Grid) -> np.ndarray:
    """The (R, C) float32 weights that the grid stands for."""
    return grid.integers.astype(np.float32) * grid.scale.astype(np.float32)[:, None]


def encode(shape: Shape, weights: dict[str, np.ndarray], note: dict | None = None) -> bytes:
    """The artifact's bytes. Raises UsageError for missing, misshapen or non-finite weights."""
    table = shape.parameters()
    if set(weights) != set(table):
        raise UsageError(f"The weights {sorted(set(weights) ^ set(table))[:3]} do not belong to this shape.")
    frames: dict[str, list[bytes]] = {name: [] for name in FRAMES}
    for name, dims in table.items():
        weight = np.asarray(weights[name], dtype=np.float32)
        if weight.shape != dims:
            raise UsageError(f"Weight {name} has shape {weight.shape}, the model's is {dims}.")
        if not np.isfinite(weight).all():
            raise UsageError(f"Weight {name} is not finite; there is nothing to pack.")
        kind = tensor_class(name)
        if kind == "control":
            with np.errstate(over="ignore"):
                half = weight.astype("<f2")
            if not np.isfinite(half).all():
                raise UsageError(f"Weight {name} exceeds what a 16-bit float holds; there is nothing to pack.")
            frames["control"].append(half.tobytes())
            continue
        grid = quantize(weight, shape.embed_bits if kind == "embed" else shape.matrix_bits)
        if not np.isfinite(grid.scale).all():
            raise UsageError(f"Weight {name} exceeds what a 16-bit scale holds; there is nothing to pack.")
        frames[kind].append(grid.integers.tobytes())
        frames["scale"].append(grid.scale.astype("<f2").tobytes())
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    packed = {name: compressor.compress(b"".join(parts)) for name, parts in frames.items()}
    header = {"shape": asdict(shape), "frames": {k: len(v) for k, v in packed.items()}, "note": note or {}}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    body = struct.pack("<I", len(text)) + text + b"".join(packed.values())
    return struct.pack("<8sI", MAGIC, VERSION) + hashlib.sha256(body).digest() + body


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def read_header(data: bytes) -> tuple[Shape, dict, dict[str, bytes]]:
    """Shape, note and compressed frames of an artifact, everything checked before anything is allocated."""
    if len(data) < PREFIX.size or data[:8] != MAGIC:
        raise UsageError("The file is not an artifact of this program (no GOLFPACK at its start).")
    _, version, digest, header_bytes = PREFIX.unpack_from(data)
    if version != VERSION:
        raise UsageError(f"The artifact has format version {version}, this program reads {VERSION}.")
    if hashlib.sha256(memoryview(data)[PREFIX.size - 4 :]).digest() != digest:
        raise UsageError("The artifact is damaged: its sha256 does not match its bytes.")
    if header_bytes > min(HEADER_LIMIT, len(data) - PREFIX.size):
        raise UsageError("The artifact's header is longer than the file.")
    try:
        text = data[PREFIX.size : PREFIX.size + header_bytes].decode("utf-8")
        header = json.loads(text, parse_constant=refuse_constant)
        sizes = {name: header["frames"][name] for name in FRAMES}
        shape, note = shape_from_dict(header["shape"]), header["note"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"The artifact's header cannot be read ({error!r}).") from error
    if not all(type(n) is int and n >= 0 for n in sizes.values()) or not isinstance(note, dict):
        raise UsageError("The artifact's header has a wrong frame size or note.")
    if PREFIX.size + header_bytes + sum(sizes.values()) != len(data):
        raise UsageError("The artifact's frames do not add up to the file's length.")
    frames, offset = {}, PREFIX.size + header_bytes
    for name, size in sizes.items():
        frames[name] = data[offset : offset + size]
        offset += size
    return shape, note, frames


def frame_bytes(shape: Shape) -> dict[str, int]:
    """Length of each frame once decompressed, from the shape alone."""
    sizes = dict.fromkeys(FRAMES, 0)
    for name, dims in shape.parameters().items():
        kind = tensor_class(name)
        sizes[kind] += int(np.prod(dims, dtype=object)) * (2 if kind == "control" else 1)
        sizes["scale"] += 0 if kind == "control" else 2 * dims[0]
    return sizes


def decode(data: bytes) -> tuple[Shape, dict[str, np.ndarray]]:
    """Shape and float32 weights of an artifact. Raises UsageError for anything that is not a whole, sane one."""
    shape, _, frames = read_header(data)
    raw = {}
    for name, size in frame_bytes(shape).items():
        try:
            if zstandard.frame_content_size(frames[name]) != size:
                raise UsageError(f"The artifact's {name} frame does not hold the {size} bytes its shape asks for.")
            raw[name] = zstandard.ZstdDecompressor().decompress(frames[name], max_output_size=size)
        except zstandard.ZstdError as error:
            raise UsageError(f"The artifact's {name} frame cannot be decompressed ({error}).") from error
        if len(raw[name]) != size:
            raise UsageError(f"The artifact's {name} frame holds {len(raw[name])} bytes, not {size}.")
    return shape, unpack_tensors(shape, raw)


def unpack_tensors(shape: Shape, raw: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Cut the decompressed frames into the shape's tensors, float32."""
    at = dict.fromkeys(FRAMES, 0)

    def take(frame: str, dtype: str, dims: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(dims, dtype=object))
        array = np.frombuffer(raw[frame], dtype=dtype, count=count, offset=at[frame])
        at[frame] += array.nbytes
        return array.reshape(dims)

    weights = {}
    for name, dims in shape.parameters().items():
        kind = tensor_class(name)
        if kind == "control":
            weights[name] = take("control", "<f2", dims).astype(np.float32)
        else:
            with np.errstate(invalid="ignore"):
                weights[name] = dequantize(Grid(take(kind, "i1", dims), take("scale", "<f2", dims[:1])))
        if not np.isfinite(weights[name]).all():
            raise UsageError(f"The artifact's tensor {name} is not finite.")
    return weights


def load(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    """Read an artifact from disk. Raises UsageError."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"Artifact {path} cannot be read ({error.strerror}).") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
