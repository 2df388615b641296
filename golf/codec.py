"""Grids to an artifact's bytes and back: a strict JSON header, tables, and one stream of entropy-coded integers.

The file is MAGIC, a version, a sha256 of all that follows, the header's length, the JSON header, the tables and the
stream. Only the unique tensors that Shape.parameters() lists are stored; nothing is pickled. Tensors of one role form
a group, and each group is coded in the way that is shortest for it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from golf.config import changed, shape_from_dict
from golf.entropy import SCALE_ONE, Reader, put_following, put_static, take_following, take_static
from golf.errors import UsageError
from golf.files import LARGE, read_plain
from golf.grid import CODE_LIMIT, NOTCH, OCTAVE, Grid, as_matrix, step_of
from golf.rans import CodedDataError, Decoder, Encoder, lane_count
from golf.reference import put_linked, take_linked
from golf.shape import Shape

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"GOLFPACK", 2
PREFIX = struct.Struct("<8sI32sI")  # magic, version, sha256, header length
HEADER_LIMIT = 1 << 16
WEIGHTS_A_BYTE = 16  # more than any model packs; a file that claims more is refused before anything is allocated
STATIC, DOWN_COLUMNS, ALONG_ROWS, WALKS, LINKED = range(5)  # how a group is coded; walks go down columns
MEMORIES = ((64, 4), (1024, 32))  # what a following table remembers, and how much its beginning weighs


def groups(shape: Shape) -> dict[str, list[str]]:
    """Names of the tensors of each role, in storage order."""
    found: dict[str, list[str]] = {}
    for name in shape.parameters():
        found.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return found


def lanes_of(stack: np.ndarray, mode: int) -> np.ndarray:
    """A group's (K, R, C) as (steps, lanes): lanes are columns, or rows."""
    moved = stack.transpose((2, 0, 1) if mode == ALONG_ROWS else (1, 0, 2))
    return moved.reshape(moved.shape[0], -1)


def scales_of(row: np.ndarray, column: np.ndarray, mode: int) -> Callable[[int], np.ndarray]:
    """Grid steps of a group with codes (K, R) and (K, C) over their mean, in 1/1024: step -> (lanes,) int64."""
    across, along = (row, column) if mode == ALONG_ROWS else (column, row)
    mean = int(row.sum()) // row.size + int(column.sum()) // column.size

    def scale(step: int) -> np.ndarray:
        codes = np.clip(across + (along[:, step, None] - mean), -6 * OCTAVE, 6 * OCTAVE).ravel()
        return np.rint(SCALE_ONE * step_of(codes)).astype(np.int64)

    return scale


Way = tuple[int, int, int]  # mode, memory, prior


def ways(members: list[Grid], coder: str) -> list[Way]:
    """How a group may be coded. Links are for a tensor without siblings: the embedding or the head."""
    walks = members[0].walks
    modes = (WALKS,) if walks else (DOWN_COLUMNS, ALONG_ROWS) if coder == "adaptive" else ()
    found = [(mode, *memory) for mode in modes for memory in MEMORIES]
    if coder == "adaptive" and len(members) == 1 and not walks:
        found.append((LINKED, 0, 0))
    return found if walks else [(STATIC, 0, 0), *found]


def put_group(grids: list[Grid], tried: list[Way]) -> tuple[Encoder, bytes, Way]:
    """The shortest of these codings of a group's integers, its description begun by a byte for the mode."""
    stack, row, column = (np.stack([getattr(g, part) for g in grids]) for part in ("integers", "row", "column"))
    found = []
    for way in tried:
        mode, memory, prior = way
        encoder = Encoder()
        if mode == STATIC:
            tables = b"".join(put_static(encoder, matrix) for matrix in stack)
        elif mode == LINKED:
            tables = put_linked(encoder, stack[0], scales_of(row, column, mode))
        else:
            steps, scale = lanes_of(stack, mode), scales_of(row, column, mode)
            tables = put_following(encoder, steps, scale, memory, prior, mode == WALKS)
        found.append((encoder, bytes([mode]) + tables, way))
    return min(found, key=lambda one: one[0].bits() + 8 * len(one[1]))


def take_group(decoder: Decoder, reader: Reader, row: np.ndarray, column: np.ndarray) -> list[Grid]:
    """The inverse, for codes (K, R) and (K, C)."""
    (count, rows), columns = row.shape, column.shape[1]
    (mode,) = reader.take(1)
    if mode == STATIC:
        stack = [take_static(decoder, reader, rows * columns).reshape(rows, columns) for _ in range(count)]
    elif mode == LINKED and count == 1:
        stack = take_linked(decoder, reader, (rows, columns), scales_of(row, column, mode))[None]
    elif mode in (DOWN_COLUMNS, WALKS):
        dims = (rows, count * columns)
        flat = take_following(decoder, reader, dims, scales_of(row, column, mode), mode == WALKS)
        stack = flat.reshape(rows, count, columns).transpose(1, 0, 2)
    elif mode == ALONG_ROWS:
        flat = take_following(decoder, reader, (columns, count * rows), scales_of(row, column, mode))
        stack = flat.reshape(columns, count, rows).transpose(1, 2, 0)
    else:
        raise CodedDataError(f"a group of mode {mode} is unknown")
    return [Grid(*parts, mode == WALKS) for parts in zip(stack, row, column, strict=True)]


def put_codes(encoder: Encoder, codes: np.ndarray) -> bytes:
    """Step codes (K, N): the smallest of each tensor as int16, then one table for the notches above it."""
    lowest = codes.min(axis=1, keepdims=True)
    return lowest.astype("<i2").tobytes() + put_static(encoder, (codes - lowest) // NOTCH)


def take_codes(decoder: Decoder, reader: Reader, count: int, size: int) -> np.ndarray:
    """The inverse: (K, N) int32."""
    lowest = np.frombuffer(reader.take(2 * count), dtype="<i2").astype(np.int32)
    notches = take_static(decoder, reader, count * size).reshape(count, size).astype(np.int32)
    return lowest[:, None] + NOTCH * notches


def encode(
    shape: Shape, grids: dict[str, Grid], note: dict | None = None, coder: str = "adaptive",
    chosen: dict[str, Way] | None = None,
) -> bytes:  # fmt: skip
    """The artifact's bytes. `coder` is static (one table a tensor) or adaptive (whatever is shortest).

    What was shortest for each role is noted in `chosen`, and not looked for where it is noted already.
    """
    whole, tables = Encoder(), b""
    chosen = {} if chosen is None else chosen
    for role, names in groups(shape).items():
        rows = np.stack([grids[name].row for name in names])
        columns = np.stack([grids[name].column for name in names])
        tables += put_codes(whole, rows) + put_codes(whole, columns)
        members = [grids[name] for name in names]
        tried = [chosen[role]] if role in chosen else ways(members, coder)
        encoder, described, chosen[role] = put_group(members, tried)
        whole.steps += encoder.steps
        tables += described
    lanes = lane_count(whole.bits() / 8)
    stream = whole.finish(lanes)
    header = {"shape": changed(shape), "note": note or {}, "lanes": lanes, "tables": len(tables)}
    data = container(header, tables, stream)
    if shape.parameter_count > WEIGHTS_A_BYTE * len(data):
        raise UsageError("The weights are all but zero; an artifact holds at least half a bit a weight.")
    return data


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def read_header(data: bytes) -> tuple[Shape, dict, int, memoryview, memoryview]:
    """Shape, note, lanes, tables and stream of an artifact, all checked before anything is allocated."""
    if len(data) < PREFIX.size or data[:8] != ARTIFACT_MAGIC:
        raise UsageError("The file is not an artifact of this program (no GOLFPACK at its start).")
    _, version, digest, header_bytes = PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise UsageError(f"The artifact has format version {version}, this program reads {ARTIFACT_VERSION}.")
    view = memoryview(data)
    if hashlib.sha256(view[PREFIX.size - 4 :]).digest() != digest:
        raise UsageError("The artifact is damaged: its sha256 does not match its bytes.")
    if header_bytes > min(HEADER_LIMIT, len(data) - PREFIX.size):
        raise UsageError("The artifact's header is longer than the file.")
    start = PREFIX.size + header_bytes
    try:
        header = json.loads(bytes(view[PREFIX.size : start]).decode("utf-8"), parse_constant=refuse_constant)
        lanes, tables = header["lanes"], header["tables"]
        shape, note = shape_from_dict(header["shape"]), header["note"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"The artifact's header cannot be read ({error!r:.200}).") from error
    if not (type(lanes) is type(tables) is int and 1 <= lanes <= 4096 and tables >= 0 and isinstance(note, dict)):
        raise UsageError("The artifact's header has a wrong number of lanes, size of tables or note.")
    if start + tables + 4 * lanes > len(data):
        raise UsageError("The artifact's tables and states are longer than the file.")
    if lanes < lane_count((len(data) - start - tables) / 2):  # the fewer, the longer it takes to read
        raise UsageError(f"The artifact has {lanes} lanes for {len(data):,} bytes, fewer than are packed here.")
    if shape.parameter_count > WEIGHTS_A_BYTE * len(data):
        raise UsageError(f"The artifact claims {shape.parameter_count:,} weights in {len(data):,} bytes.")
    return shape, note, lanes, view[start : start + tables], view[start + tables :]


def read_note(path: Path) -> dict:
    """What the artifact says beside its weights. Raises UsageError."""
    return read_header(read_plain(path, LARGE))[1]


def with_note(data: bytes, note: dict) -> bytes:
    """The same artifact with another note. Raises UsageError for one that is damaged."""
    shape, _, lanes, tables, stream = read_header(data)
    return container({"shape": changed(shape), "note": note, "lanes": lanes, "tables": len(tables)}, tables, stream)


def container(header: dict, tables: bytes | memoryview, stream: bytes | memoryview) -> bytes:
    """A whole artifact from its parts."""
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    body = b"".join((struct.pack("<I", len(text)), text, tables, stream))
    return struct.pack("<8sI", ARTIFACT_MAGIC, ARTIFACT_VERSION) + hashlib.sha256(body).digest() + body


def decode_grids(data: bytes) -> tuple[Shape, dict[str, Grid]]:
    """Shape and grids of an artifact. Raises UsageError for anything that is not a whole, sane one."""
    shape, _, lanes, tables, stream = read_header(data)
    table, grids = shape.parameters(), {}
    try:
        decoder, reader = Decoder(stream, lanes), Reader(tables)
        for names in groups(shape).values():
            count, (rows, columns) = len(names), as_matrix(table[names[0]])
            row = take_codes(decoder, reader, count, rows)
            column = take_codes(decoder, reader, count, columns)
            if max(abs(int(f(row)) + int(f(column))) for f in (np.min, np.max)) > 2 * CODE_LIMIT:
                raise CodedDataError("a step is out of range")
            grids |= zip(names, take_group(decoder, reader, row, column), strict=True)
        decoder.finish()
        if reader.at != len(reader.data):
            raise CodedDataError("the tables do not end where the groups do")
    except CodedDataError as error:
        raise UsageError(f"The artifact cannot be decoded: {error}.") from error
    return shape, grids


def decode(data: bytes) -> tuple[Shape, dict[str, np.ndarray]]:
    """Shape and float32 weights of an artifact. Raises UsageError for anything that is not a whole, sane one."""
    shape, grids = decode_grids(data)
    table, weights = shape.parameters(), {}
    for name in table:
        with np.errstate(over="ignore", invalid="ignore"):
            weights[name] = grids.pop(name).weights().reshape(table[name])
        if not np.isfinite(weights[name]).all():
            raise UsageError(f"The artifact's tensor {name} is not finite.")
    return shape, weights


def load_artifact(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    """Read an artifact from disk. Raises UsageError."""
    try:
        return decode(read_plain(path, LARGE))
    except OSError as error:
        raise UsageError(f"Artifact {path} cannot be read ({error.strerror}).") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
