"""The codec: exact on its grid, unique tensors only, and no damaged file gets through."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from golf import codec
from golf.config import TENSOR_CLASSES, Recipe, Shape, UsageError
from golf.model import ROLES, RecurrentGPT

SHAPE = Shape(vocab_size=128, width=32, heads=2, kv_heads=1, prelude=1, core=2, coda=1, loops=3, matrix_bits=6)


def weights_of(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    model = RecurrentGPT(shape).initialize(Recipe(), seed)
    rng = np.random.default_rng(seed)
    return {
        name: (p.detach().numpy() + 0.1 * rng.standard_normal(tuple(p.shape))).astype(np.float32)
        for name, p in model.named_parameters()
    }


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=True),
    ),
    st.integers(4, 8),
)  # fmt: skip
def test_the_grid_is_exact(weight, bits):
    grid = codec.quantize(weight, bits)
    top = 2 ** (bits - 1) - 1
    assert np.abs(grid.integers).max() <= top
    once = codec.dequantize(grid)
    again = codec.quantize(once, bits)
    assert np.array_equal(codec.dequantize(again), once)
    scale = grid.scale.astype(np.float64)[:, None]
    normal = scale >= 6.2e-5  # below, a 16-bit float holds the scale coarsely
    error = np.abs(once.astype(np.float64) - weight)
    assert (error <= scale * (0.5 + top * 2**-11) * 1.0001)[np.broadcast_to(normal, error.shape)].all()


def test_decoded_weights_are_the_grids_and_pack_again_to_the_same_bytes():
    weights = weights_of(SHAPE)
    data = codec.encode(SHAPE, weights)
    shape, decoded = codec.decode(data)
    assert shape == SHAPE
    for name, w in weights.items():
        kind = codec.tensor_class(name)
        bits = SHAPE.embed_bits if kind == "embed" else SHAPE.matrix_bits
        expected = w.astype(np.float16) if kind == "control" else codec.dequantize(codec.quantize(w, bits))
        assert np.array_equal(decoded[name], expected.astype(np.float32)), name
    assert codec.encode(shape, decoded) == data


def test_every_role_has_one_codec_rule():
    assert set(ROLES) == set(TENSOR_CLASSES)
    with pytest.raises(ValueError, match="mystery"):
        codec.tensor_class("blocks.0.mystery")


def test_only_unique_tensors_are_stored():
    weights = weights_of(SHAPE)
    _, decoded = codec.decode(codec.encode(SHAPE, weights))
    model = RecurrentGPT(SHAPE)
    assert sorted(decoded) == sorted(name for name, _ in model.named_parameters())
    stored = [w.tobytes() for w in decoded.values()]
    assert len(set(stored)) == len(stored)  # no tensor twice
    assert sum(w.size for w in decoded.values()) == SHAPE.parameter_count


@pytest.mark.parametrize(
    ("prelude", "core", "coda"), [(1, 2, 1), (0, 3, 0), (3, 3, 5), (0, 1, 0), (5, 1, 0), (0, 2, 3)]
)
def test_the_size_does_not_move_with_loops(prelude, core, coda):
    shapes = [replace(SHAPE, prelude=prelude, core=core, coda=coda, loops=loops) for loops in (2, 3, 4, 7)]
    weights = weights_of(shapes[0])
    assert len({len(codec.encode(shape, weights)) for shape in shapes}) == 1


def test_a_flat_model_of_the_same_depth_is_larger():
    flat = replace(SHAPE, loops=1, core=6)
    assert len(codec.encode(flat, weights_of(flat))) > 1.4 * len(codec.encode(SHAPE, weights_of(SHAPE)))


def test_fewer_bits_are_fewer_bytes():
    weights = weights_of(SHAPE)
    sizes = [len(codec.encode(replace(SHAPE, matrix_bits=b, embed_bits=b), weights)) for b in (4, 5, 6, 7, 8)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_that_cannot_be_stored_are_refused(bad):
    for name in ("embedding", "blocks.1.up", "attn_scale"):
        weights = weights_of(SHAPE)
        weights[name].flat[3] = bad
        with pytest.raises(UsageError, match=name):
            codec.encode(SHAPE, weights)
    weights = weights_of(SHAPE)
    with pytest.raises(UsageError, match="extra"):
        codec.encode(SHAPE, {**weights, "extra": weights["embedding"]})
    with pytest.raises(UsageError, match="blocks.0.out"):
        codec.encode(SHAPE, {**weights, "blocks.0.out": weights["blocks.0.out"][:-1]})


def resealed(header: dict, frames: bytes) -> bytes:
    """An artifact with a header of our making and a right checksum, so that the parser itself is tried."""
    import hashlib

    text = json.dumps(header).encode()
    body = struct.pack("<I", len(text)) + text + frames
    return struct.pack("<8sI", codec.MAGIC, codec.VERSION) + hashlib.sha256(body).digest() + body


def split_artifact(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack_from("<I", data, codec.PREFIX.size - 4)[0]
    end = codec.PREFIX.size + length
    return json.loads(data[codec.PREFIX.size : end]), data[end:]


def test_hand_made_headers_are_refused():
    header, frames = split_artifact(codec.encode(SHAPE, weights_of(SHAPE)))
    assert codec.decode(resealed(header, frames))[0] == SHAPE
    for change in (
        {"shape": {**header["shape"], "width": 64}},
        {"shape": {**header["shape"], "width": 10**8}},
        {"shape": {**header["shape"], "loops": 10**9}},
        {"shape": {**header["shape"], "extra": 1}},
        {"shape": [1]},
        {"frames": {**header["frames"], "matrix": -1}},
        {"frames": {**header["frames"], "matrix": header["frames"]["matrix"] + 1}},
        {"frames": {k: v for k, v in header["frames"].items() if k != "scale"}},
        {"note": 7},
    ):
        with pytest.raises(UsageError):
            codec.decode(resealed({**header, **change}, frames))
    with pytest.raises(UsageError):
        codec.decode(resealed(header, frames[:-1]))
    with pytest.raises(UsageError, match="version 2"):
        data = codec.encode(SHAPE, weights_of(SHAPE))
        codec.decode(data[:8] + struct.pack("<I", 2) + data[12:])


def test_mutations_and_truncations_are_refused_or_decode_to_the_declared_shapes():
    import hashlib

    data = codec.encode(SHAPE, weights_of(SHAPE))
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        changed = bytearray(data)
        if trial % 4 == 0:
            changed = changed[: rng.integers(0, len(data))]
        else:
            for _ in range(rng.integers(1, 4)):
                changed[rng.integers(0, len(changed))] = rng.integers(0, 256)
        if trial % 2 and len(changed) > codec.PREFIX.size:
            body = bytes(changed[codec.PREFIX.size - 4 :])
            changed[12:44] = hashlib.sha256(body).digest()
        try:
            shape, weights = codec.decode(bytes(changed))
            assert {n: w.shape for n, w in weights.items()} == shape.parameters()
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_a_missing_artifact_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        codec.load(tmp_path / "model.bin")
