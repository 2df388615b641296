"""The artifact: exact on its grids, unique tensors only, and no damaged file gets through."""

import hashlib
import json
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.artifact_mutations import mutated, refused
from golf import codec, grid
from golf.errors import UsageError
from golf.model import ROLES, RecurrentGPT
from golf.quantize import quantize
from golf.recipe import Pack, Recipe
from golf.shape import TENSOR_CLASSES, Shape, tensor_class

SHAPE = Shape(vocab_size=128, width=32, heads=2, kv_heads=1, prelude=1, core=2, coda=1, loops=3)
STEPS = Pack(0.3, 0.2)


def weights_of(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    model = RecurrentGPT(shape).initialize(Recipe(), seed)
    rng = np.random.default_rng(seed)
    return {
        name: (p.detach().numpy() + 0.1 * rng.standard_normal(tuple(p.shape))).astype(np.float32)
        for name, p in model.named_parameters()
    }


def artifact(shape: Shape, weights: dict[str, np.ndarray], pack: Pack = STEPS) -> tuple[bytes, dict[str, grid.Grid]]:
    """The bytes and the grids that went into them."""
    kept = {}

    def encode(grids):
        kept.update(grids)
        return codec.encode(shape, grids, {"note": 1}, pack.coder)

    return quantize(shape, weights, pack, 0, None, encode)[0], kept


ARTIFACT, GRIDS = artifact(SHAPE, weights_of(SHAPE))


@pytest.mark.parametrize("pack", [
    STEPS, replace(STEPS, quantizer="scalar"), replace(STEPS, quantizer="scalar", coder="static"),
    replace(STEPS, rounding="nearest"), Pack(2.0, 1.5), Pack(0.01, 0.01),
])  # fmt: skip
def test_what_is_decoded_is_what_was_encoded(pack):
    data, grids = artifact(SHAPE, weights_of(SHAPE), pack)
    shape, decoded = codec.decode(data)
    assert shape == SHAPE
    for name, w in decoded.items():
        assert np.array_equal(w, grids[name].weights().reshape(w.shape)), name
    _, back = codec.decode_grids(data)
    assert codec.encode(SHAPE, back, {"note": 1}, pack.coder) == data


integers = hnp.arrays(np.int8, st.tuples(st.integers(1, 150), st.integers(1, 20)), elements=st.integers(-127, 127))


@settings(max_examples=60, deadline=None)
@given(st.data(), integers, st.booleans(), st.integers(1, 3))
def test_any_group_round_trips(data, stack, walks, count):
    rows, columns = stack.shape
    codes = st.integers(-400, 100)
    base = data.draw(codes)
    row = base + 16 * data.draw(hnp.arrays(np.int32, (count, rows), elements=st.integers(0, 127)))
    column = 16 * data.draw(hnp.arrays(np.int32, (count, columns), elements=st.integers(-32, 32)))
    grids = [grid.Grid(np.roll(stack, k), row[k], column[k], walks) for k in range(count)]
    encoder, described, _ = codec.put_group(grids, codec.ways(grids, "adaptive"))
    decoder, reader = codec.Decoder(encoder.finish(7), 7), codec.Reader(described)
    for given_grid, got in zip(grids, codec.take_group(decoder, reader, row, column), strict=True):
        assert np.array_equal(given_grid.integers, got.integers) and given_grid.walks == got.walks
    decoder.finish()


@settings(max_examples=100, deadline=None)
@given(st.integers(-6000, 6000))
def test_steps_are_powers_of_two(code):
    assert grid.step_of(np.array(code, dtype=np.int32)) == pytest.approx(2 ** (code / 256), rel=1e-7)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(1e-6, 1e6)))
def test_codes_meet_their_steps_on_average_and_each_within_a_notch(steps):
    codes = grid.codes_of(steps)
    error = codes / 256 - np.log2(steps)
    assert abs(error.mean()) < 1 / 256 and np.abs(error).max() < 1.6 / 32 + 1 / 128
    assert len(set(codes % 16)) == 1


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e4, 1e4, width=32),
))  # fmt: skip
def test_control_vectors_are_within_half_a_step(weight):
    rounded = grid.fine_grid(weight)
    steps = grid.step_of(rounded.row).astype(np.float64)[:, None]
    assert (np.abs(rounded.weights().astype(np.float64) - weight) <= steps * 0.5001).all()
    largest = np.abs(weight).max(axis=1)
    normal = (largest > 1e-4) & (largest > largest.max() / 200)  # rows beyond that are rows of nothing
    assert (steps[normal, 0] <= largest[normal] / 127 * 2 ** (1.01 / 16)).all()


def test_every_role_has_one_codec_rule():
    assert set(ROLES) == set(TENSOR_CLASSES)
    with pytest.raises(ValueError, match="mystery"):
        tensor_class("blocks.0.mystery")


def test_only_unique_tensors_are_stored():
    _, decoded = codec.decode(ARTIFACT)
    model = RecurrentGPT(SHAPE)
    assert sorted(decoded) == sorted(name for name, _ in model.named_parameters())
    stored = [w.tobytes() for w in decoded.values()]
    assert len(set(stored)) == len(stored)  # no tensor twice
    assert sum(w.size for w in decoded.values()) == SHAPE.parameter_count


@pytest.mark.parametrize(
    ("prelude", "core", "coda"), [(1, 2, 1), (0, 3, 0), (3, 3, 5), (0, 1, 0), (5, 1, 0), (0, 2, 3)]
)
def test_the_size_does_not_move_with_loops(prelude, core, coda):
    shapes = [replace(SHAPE, prelude=prelude, core=core, coda=coda, loops=loops) for loops in (2, 7)]
    weights = weights_of(shapes[0])
    sizes = {len(artifact(shape, weights)[0]) for shape in shapes}
    assert max(sizes) - min(sizes) <= 2  # the header's digits


def test_a_flat_model_of_the_same_depth_is_larger():
    flat = replace(SHAPE, loops=1, core=6)
    assert len(artifact(flat, weights_of(flat))[0]) > 1.4 * len(ARTIFACT)


@pytest.mark.slow
def test_one_dial_goes_from_ternary_to_eight_bits():
    weights = weights_of(replace(SHAPE, width=64))
    shape = replace(SHAPE, width=64)
    found = [artifact(shape, weights, Pack(step, step, quantizer="scalar")) for step in (0.02, 0.1, 0.3, 0.6, 1.0, 2.0)]
    sizes = [len(data) for data, _ in found]
    assert sizes == sorted(set(sizes), reverse=True)
    tops = [
        max(np.abs(g.integers).max() for n, g in grids.items() if tensor_class(n) != "control") for _, grids in found
    ]
    assert tops[0] == 127 and tops[-1] <= 3
    assert np.mean(np.abs(found[-1][1]["blocks.0.up"].integers) <= 1) > 0.98


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_that_cannot_be_stored_are_refused(bad):
    for name in ("embedding", "blocks.1.up", "attn_scale"):
        weights = weights_of(SHAPE)
        weights[name].flat[3] = bad
        with pytest.raises(UsageError, match=name):
            artifact(SHAPE, weights)
    weights = weights_of(SHAPE)
    with pytest.raises(UsageError, match="extra"):
        artifact(SHAPE, {**weights, "extra": weights["embedding"]})
    with pytest.raises(UsageError, match="blocks.0.out"):
        artifact(SHAPE, {**weights, "blocks.0.out": weights["blocks.0.out"][:-1]})


def test_zero_weights_come_back_as_zero():
    weights = weights_of(SHAPE)
    weights["blocks.1.out"][:] = 0
    weights["blocks.2.up"][5] = 0
    _, decoded = codec.decode(artifact(SHAPE, weights)[0])
    assert np.abs(decoded["blocks.1.out"]).max() < 1e-6 and np.abs(decoded["blocks.2.up"][5]).max() < 1e-3
    with pytest.raises(UsageError, match="all but zero"):
        artifact(SHAPE, {name: w * 0 for name, w in weights.items()})


def resealed(header: dict, rest: bytes) -> bytes:
    """An artifact with a header of our making and a right checksum, so that the parser itself is tried."""
    text = json.dumps(header).encode()
    body = struct.pack("<I", len(text)) + text + rest
    return struct.pack("<8sI", codec.ARTIFACT_MAGIC, codec.ARTIFACT_VERSION) + hashlib.sha256(body).digest() + body


def split_artifact(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack_from("<I", data, codec.PREFIX.size - 4)[0]
    end = codec.PREFIX.size + length
    return json.loads(data[codec.PREFIX.size : end]), data[end:]


def test_hand_made_headers_are_refused():
    header, rest = split_artifact(ARTIFACT)
    assert codec.decode(resealed(header, rest))[0] == SHAPE
    for change in (
        {"shape": {**header["shape"], "width": 64}},
        {"shape": {**header["shape"], "width": 10**8}},
        {"shape": {**header["shape"], "vocab_size": 65_536, "width": 65_536}},
        {"shape": {**header["shape"], "loops": 10**9}},
        {"shape": {**header["shape"], "extra": 1}},
        {"shape": {**header["shape"], "activation": "swiglu"}},
        {"shape": {**header["shape"], "exit_gate": "hazard", "loops": 1}},  # a gate's biases would be none
        {"shape": [1]},
        {"lanes": 0},
        {"lanes": 10**9},
        {"lanes": True},
        {"lanes": header["lanes"] + 1},
        {"tables": -1},
        {"tables": header["tables"] + 1},
        {"tables": 10**12},
        {"note": 7},
    ):
        with pytest.raises(UsageError):
            codec.decode(resealed({**header, **change}, rest))
    with pytest.raises(UsageError):
        codec.decode(resealed(header, rest[:-1]))
    newer = codec.ARTIFACT_VERSION + 1
    with pytest.raises(UsageError, match=f"version {newer}"):
        codec.decode(ARTIFACT[:8] + struct.pack("<I", newer) + ARTIFACT[12:])


@pytest.mark.slow
def test_mutations_and_truncations_are_refused_or_decode_to_the_declared_shapes():
    rng = np.random.default_rng(0)
    static, _ = artifact(SHAPE, weights_of(SHAPE), replace(STEPS, quantizer="scalar", coder="static"))
    for data, trials in ((ARTIFACT, 20), (static, 200)):  # the second decodes faster
        assert sum(refused(mutated(data, rng)) for _ in range(trials)) > trials / 2


@pytest.mark.slow
def test_decoding_allocates_at_most_twice_the_model():
    shape = replace(SHAPE, width=128, vocab_size=1024)
    data, _ = artifact(shape, weights_of(shape))
    tracemalloc.start()
    codec.decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 4 * shape.parameter_count


def test_a_missing_artifact_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        codec.load_artifact(tmp_path / "model.bin")


def test_few_lanes_for_a_large_file_are_refused():
    """They are read one step after the other: 16 MB of one lane would take most of an hour."""
    header, rest = split_artifact(ARTIFACT)
    with pytest.raises(UsageError, match="1 lanes for"):
        codec.read_header(resealed({**header, "lanes": 1}, rest + bytes(1_000_000)))
