"""Rounding with error feedback, steps that fill a target, and trellis walks, against plain references."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import weights_of

from golf import codec, quantize, trellis
from golf.errors import UsageError
from golf.grid import as_matrix, codes_of, step_of
from golf.quantize import Sensitivity
from golf.recipe import Pack
from golf.shape import Shape, tensor_class

SHAPE = Shape(vocab_size=128, width=64, heads=2, kv_heads=1, core=2)


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """A Hessian like those of trained models: a few strong directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) * np.exp(rng.standard_normal(columns))
    x += 3 * rng.standard_normal((4 * columns, 1)) * rng.standard_normal(columns)
    return x.T @ x / len(x)


def sensitivities_of(shape: Shape) -> dict[str, Sensitivity]:
    rng = np.random.default_rng(5)
    found = {}
    for index, (name, dims) in enumerate(shape.parameters().items()):
        if tensor_class(name) != "control":
            rows, columns = as_matrix(dims)
            weight = np.exp(rng.standard_normal(rows)) if name == "embedding" else np.ones(rows)
            found[name] = Sensitivity(correlated(columns, index) * 1e-3, weight / weight.mean())
    return found


def loss(weights: dict, data: bytes, sensitivities: dict) -> float:
    """The increase that the sensitivities predict for an artifact's real errors."""
    _, decoded = codec.decode(data)
    total = 0.0
    for name, s in sensitivities.items():
        error = (decoded[name] - weights[name]).astype(np.float64)
        total += 0.5 * float((s.rows * np.einsum("rc,cd,rd->r", error, s.hessian, error)).sum())
    return total


def packed(pack: Pack, target: int = 0, sensitivities: dict | None = None, shape: Shape = SHAPE):
    weights = weights_of(shape)
    encode = partial(codec.encode, shape, coder=pack.coder, chosen={})
    data, report = quantize.quantize(shape, weights, pack, target, sensitivities, encode)
    return weights, data, report


def naive_feedback(weight: np.ndarray, hessian: np.ndarray, step: np.ndarray, column: np.ndarray, order: np.ndarray):
    """GPTQ as its definition says it: round a column, then move the others to where the loss is least."""
    work, left = weight.astype(np.float64).copy(), list(order)
    out = np.zeros_like(work)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    while left:
        c = left.pop(0)
        steps = step * column[c]
        out[:, c] = np.rint(work[:, c] / steps) * steps
        error = (work[:, c] - out[:, c]) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0, 1:]
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out


@pytest.mark.parametrize("columns", [20, 150])
def test_feedback_is_gptq(columns):
    rng = np.random.default_rng(1)
    weight, hessian = rng.standard_normal((30, columns)).astype(np.float32), correlated(columns)
    ready = quantize.prepare(weight, Sensitivity(hessian, np.ones(30)), Pack())
    row = codes_of(0.3 * ready.scale)
    (found,) = quantize.feed_errors([weight], [row], [ready], walks=False, rate_weight=0.0)
    damped = hessian + quantize.DAMPING * np.diag(hessian).mean() * np.eye(columns)
    expected = naive_feedback(
        weight, damped, step_of(row).astype(float), step_of(ready.column).astype(float), ready.order
    )
    assert np.abs(found.weights() - expected).max() < 1e-5


@pytest.mark.slow
def test_each_refinement_lowers_the_predicted_loss_at_equal_bytes():
    s = sensitivities_of(SHAPE)
    plain = Pack(rounding="nearest", quantizer="scalar", column_steps=False, row_power=1.0)
    ladder = [
        (plain, None), (plain, s), (replace(plain, rounding="feedback"), s),
        (replace(plain, rounding="feedback", column_steps=True), s),
        (replace(plain, rounding="feedback", column_steps=True, quantizer="trellis"), s),
    ]  # fmt: skip
    losses = []
    for pack, given_to in ladder:
        weights, data, _ = packed(pack, 20_000, given_to)
        assert 20_000 * 0.999 < len(data) <= 20_000
        losses.append(loss(weights, data, s))
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("target", [28_345])
@pytest.mark.parametrize("quantizer", [pytest.param("scalar", marks=pytest.mark.slow), "trellis"])
def test_artifacts_land_just_below_their_target(target, quantizer):
    for s in (None, sensitivities_of(SHAPE)):
        _, data, report = packed(Pack(quantizer=quantizer), target, s)
        assert target * 0.999 <= len(data) <= target and report["bytes"] == len(data)


def test_targets_out_of_reach_are_refused_and_generous_ones_end_at_the_finest_grid():
    with pytest.raises(UsageError, match="--target-bytes 5000"):
        packed(Pack(), 5000)
    _, data, report = packed(Pack(), 10**7)
    assert len(data) < 8 * SHAPE.parameter_count / 8
    assert all(6.5 < bits < 7.6 for bits in report["bits"].values())


@pytest.mark.parametrize("quantizer", ["scalar", pytest.param("trellis", marks=pytest.mark.slow)])
def test_the_loss_that_is_predicted_is_the_loss_of_the_errors(quantizer):
    s = sensitivities_of(SHAPE)
    weights, data, report = packed(Pack(quantizer=quantizer), 40_000, s)
    damped = {}
    for name, found in s.items():
        more = quantize.DAMPING * np.diag(found.hessian).mean() * np.eye(len(found.hessian))
        damped[name] = Sensitivity(found.hessian + more, found.rows)
    assert report["predicted_loss"] == pytest.approx(loss(weights, data, damped), rel=0.1)


def test_bits_are_worth_the_same_everywhere():
    """Making one tensor finer and another coarser at equal bytes must not lower the predicted loss."""
    s, weights = sensitivities_of(SHAPE), weights_of(SHAPE)
    names = list(s)
    ready = {n: quantize.prepare(weights[n], s[n], Pack()) for n in names}
    relative = quantize.relative_steps({n: weights[n] for n in names}, ready, Pack(), True)

    def total(steps):
        return sum(ready[n].cost * steps[n] ** 2 for n in names)

    for a, b in itertools.permutations(names[:6], 2):
        moved = dict(relative)
        moved[a] *= 2**0.1
        moved[b] *= 2 ** (-0.1 * weights[a].size / weights[b].size)
        assert total(moved) > total(relative)


def test_a_singular_hessian_is_damped_and_said():
    s = sensitivities_of(SHAPE)
    s["blocks.0.up"] = Sensitivity(np.zeros((64, 64)), np.ones(128))
    broken = np.eye(64)
    broken[3, 3] = -5.0
    s["blocks.1.up"] = Sensitivity(broken, np.ones(128))
    weights, data, report = packed(Pack(quantizer="scalar"), 20_000, s)
    assert any("blocks.1.up" in note for note in report["notes"])
    assert np.isfinite(loss(weights, data, s))


def test_hessians_of_another_model_are_refused():
    s = sensitivities_of(SHAPE)
    for wrong in (
        sensitivities_of(replace(SHAPE, width=32)), {k: v for k, v in s.items() if k != "embedding"},
        {**s, "embedding": Sensitivity(s["embedding"].hessian * np.nan, s["embedding"].rows)},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="Hessian"):
            packed(Pack(), 20_000, wrong)


def test_cheaper_neighbours_save_bytes_at_little_loss():
    s = sensitivities_of(SHAPE)
    plain = Pack(0.6, 0.6, quantizer="scalar")
    weights, data, _ = packed(plain, 0, s)
    _, saving, _ = packed(replace(plain, rate_weight=0.5), 0, s)
    assert len(saving) < len(data)
    assert loss(weights, saving, s) < 1.1 * loss(weights, data, s)


# -- trellis -------------------------------------------------------------------------------------------------------


def test_every_state_is_reached_from_two_and_leads_to_two():
    assert sorted(trellis.NEXT.ravel()) == sorted([*range(8)] * 2)
    for end in range(8):
        for origin, bit in zip(trellis.ORIGIN[end], trellis.PARITY[end], strict=True):
            assert trellis.NEXT[origin, bit] == end


def brute_force(x: np.ndarray) -> float:
    """The least squared error of any walk over a few weights."""
    best = math.inf
    for parities in itertools.product((0, 1), repeat=len(x)):
        state, error = 0, 0.0
        for value, bit in zip(x, parities, strict=True):
            half = 4 * np.rint((2 * value - 2 * bit - (state & 1)) / 4) + 2 * bit + (state & 1)
            error += (value - half / 2) ** 2
            state = trellis.NEXT[state, bit]
        best = min(best, error)
    return best


def test_viterbi_finds_the_best_walk():
    rng = np.random.default_rng(2)
    for length in (1, 2, 5, 9):
        x = rng.standard_normal((3, length)) * 2
        symbols = trellis.best_walk(x, np.zeros_like(x))
        found = symbols + trellis.walk_bits(symbols.T.astype(np.int8)).T / 2
        for k in range(3):
            assert np.square(found[k] - x[k]).sum() == pytest.approx(brute_force(x[k]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 10**6))
def test_walk_bits_follow_the_states(rows, columns, seed):
    symbols = np.random.default_rng(seed).integers(-20, 20, (rows, columns)).astype(np.int8)
    bits = trellis.walk_bits(symbols)
    for c in range(columns):
        state = 0
        for r in range(rows):
            state = 0 if r % trellis.WALK == 0 else state
            assert bits[r, c] == state & 1
            state = trellis.NEXT[state, symbols[r, c] & 1]


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0])
def test_the_trellis_recovers_more_than_a_tenth_of_a_bit(step):
    """Of the quarter bit between a plain grid with an ideal coder and the Gaussian rate-distortion bound."""
    w = np.random.default_rng(3).standard_normal((256, 256))

    def excess(symbols, values, kinds):
        bits = 0.0
        for kind in np.unique(kinds):
            _, counts = np.unique(symbols[kinds == kind], return_counts=True)
            bits -= (counts * np.log2(counts / counts.sum())).sum()
        return bits / w.size + 0.5 * np.log2(np.square(w - values).mean())

    plain = np.rint(w / step)
    k = trellis.best_walk(w / step, np.zeros_like(w))
    z = trellis.walk_bits(k.T.astype(np.int8)).T
    flat, walked = excess(plain, plain * step, np.zeros_like(z)), excess(k, (k + z / 2) * step, z)
    assert 0.24 < flat < 0.33 and walked < flat - 0.14
