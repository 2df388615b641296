"""Weights onto their grids: how fine a step each tensor gets, and rounding that feeds each error forward.

A matrix's sensitivity is H = E[|g|^2 / R x x'] over tokens and passes, where x enters it and g is the loss's gradient
at its R outputs: 1/2 sum_r d_r H d_r' predicts what an error d costs in nats a token. H has the form of GPTQ's Hessian
(Frantar et al. 2022, arXiv 2210.17323); its size, the Fisher information, makes tensors comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from golf.errors import UsageError
from golf.grid import NOTCH, OCTAVE, TOP, Grid, as_matrix, codes_of, fine_grid, nearest, step_of, wide_enough
from golf.recipe import Pack
from golf.shape import Shape, tensor_class
from golf.trellis import best_walk, walk_bits

DAMPING = 0.01  # of the diagonal's mean, added to the diagonal
BLOCK = 128  # columns between two updates of all that follow
FINEST, COARSEST = 1 / 32, 2.0  # steps in standard deviations: 7 bits a weight, and 1.25
COLUMN_RANGE = 2 * OCTAVE // NOTCH  # a column's step is at most four times, and at least a quarter of, its row's
EMBED_SHARE = 0.5  # without sensitivities, the embedding's step over the matrices'
LARGEST_WEIGHT = 1e6
RATE_SLOPE = math.log(2) / 6  # what a bit is worth on a fine grid, in squared steps: -dD/dR of D = step^2 / 12
TRELLIS_ERROR = 0.8  # squared error of the best walk over a plain grid's
LEAST_ROW = 0.03  # of the average weight, for rows of pieces that calibration hardly saw
NEAR_TARGET = 0.0005  # an artifact lands at most this share below its target, where steps can be had that fine


@dataclass(frozen=True)
class Sensitivity:
    """What errors in a matrix (R, C) cost: `hessian` (C, C) float64 for a row of average weight; `rows` (R,), with
    mean 1, the weight of each."""

    hessian: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A matrix ready to be rounded at any step: columns in the order of rounding, and how an error spreads."""

    order: np.ndarray  # (C,) columns by falling diagonal
    spread: np.ndarray  # (C, C) upper Cholesky factor U of the damped inverse Hessian, H^-1 = U'U
    column: np.ndarray  # (C,) step codes of the columns
    scale: np.ndarray  # (R,) step of each row, up to the one factor that sets the rate
    cost: float  # predicted loss for a unit factor, nats a token
    note: str = ""


def prepare(weight: np.ndarray, sensitivity: Sensitivity | None, pack: Pack) -> Prepared:
    """Order, error spread and relative steps of a matrix (R, C).

    With entropy coding the bits depend on the product of the steps alone, and the loss is sum_c step_c^2 / U_cc^2: it
    is least when step_c is proportional to U_cc, and to 1 / sqrt(weight) over rows. One table for a whole tensor wants
    symbols that are alike: with static tables a step goes with its row's deviation alone.
    """
    columns = weight.shape[1]
    deviation = weight.std(axis=1)
    if sensitivity is None:
        return Prepared(
            np.arange(columns), np.eye(columns), np.zeros(columns, dtype=np.int32), deviation,
            float(np.square(deviation).sum()) / 24,
        )  # fmt: skip
    diagonal = np.diag(sensitivity.hessian).copy()
    order = np.argsort(-diagonal, kind="stable")
    hessian = sensitivity.hessian[np.ix_(order, order)].astype(np.float64)
    damping, note, factor = DAMPING * max(float(diagonal.mean()), 1e-30), "", None
    while factor is None:
        try:
            # H = V V' with V upper, from the Cholesky factor of H turned around; then U = V^-1.
            lower = np.linalg.cholesky((hessian + damping * np.eye(columns))[::-1, ::-1])
            factor = np.linalg.inv(lower)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            note = f"singular Hessian, damped by {damping / max(float(diagonal.mean()), 1e-30):.0e} of its mean"
    spread = np.triu(factor)
    pivots = np.diag(spread)
    column = np.zeros(columns, dtype=np.int32)
    if pack.column_steps and pack.coder == "adaptive":
        logs = np.log2(pivots)
        notches = np.rint(OCTAVE / NOTCH * (logs - logs.mean()))
        column[order] = NOTCH * np.clip(notches, -COLUMN_RANGE, COLUMN_RANGE)
    usual = np.exp(np.log(np.maximum(deviation, 1e-30)).mean())  # so that a step is one in deviations, on average
    relative = np.maximum(deviation, 1e-30) / usual
    if pack.coder == "adaptive":
        relative = relative**pack.row_power / np.sqrt(np.maximum(sensitivity.rows, LEAST_ROW))
    scale = usual * relative / np.exp(np.log(relative).mean())
    steps = step_of(column[order]).astype(np.float64)
    cost = float((sensitivity.rows * scale**2).sum() * np.square(steps / pivots).sum()) / 24
    return Prepared(order, spread, column, scale, cost, note)


def walked(name: str, pack: Pack) -> bool:
    """Whether a tensor's columns are rounded by the trellis's walks."""
    return pack.rounding == "feedback" and pack.quantizer == "trellis" and tensor_class(name) != "embed"


def rounded(
    weights: dict[str, np.ndarray], ready: dict[str, Prepared], steps: dict[str, float], pack: Pack
) -> dict[str, Grid]:  # fmt: skip
    """The grids of all matrices at `steps` times their relative steps; those of one shape are rounded side by side."""
    grids, alike = {}, {}
    for name, weight in weights.items():
        code = codes_of(steps[name] * ready[name].scale)
        row = wide_enough(weight, code, ready[name].column)
        if pack.rounding == "nearest":
            grids[name] = nearest(weight, row, ready[name].column)
        else:
            alike.setdefault((weight.shape, walked(name, pack)), []).append((name, row))
    for (_, walks), members in alike.items():
        names, rows = zip(*members, strict=True)
        chosen, plans = [weights[n] for n in names], [ready[n] for n in names]
        found = feed_errors(chosen, rows, plans, walks, pack.rate_weight)
        grids |= zip(names, found, strict=True)
    return grids


def feed_errors(
    weights: list[np.ndarray], rows: list[np.ndarray], ready: list[Prepared], walks: bool, rate_weight: float
) -> list[Grid]:  # fmt: skip
    """Round K matrices column by column, each column's error made up for in those not yet rounded (GPTQ).

    With `walks` a column is rounded by the trellis's best walks down it.
    """
    work = np.stack([w.T[p.order] for w, p in zip(weights, ready, strict=True)]).astype(np.float64)  # (K, C, R)
    spread = np.stack([p.spread for p in ready])  # (K, C, C)
    codes = np.stack([r + p.column[p.order][:, None] for r, p in zip(rows, ready, strict=True)])
    integers = np.empty(work.shape, dtype=np.int8)
    slope = 0.0
    if rate_weight:  # bits by which a symbol costs more than 0, over its square, and what a bit is worth
        variance = np.stack([w.var(axis=1) for w in weights])[:, None, :] / np.square(step_of(codes)) + 1 / 12
        slope = rate_weight * RATE_SLOPE / (2 * math.log(2) * variance)
    slope = np.broadcast_to(slope, work.shape)
    for first in range(0, work.shape[1], BLOCK):
        last = min(work.shape[1], first + BLOCK)
        errors = np.empty((len(work), last - first, work.shape[2]))
        for c in range(first, last):
            steps = step_of(codes[:, c]).astype(np.float64)  # (K, R)
            x = work[:, c] / steps
            if walks:
                symbols = np.clip(best_walk(x, slope[:, c]), -TOP, TOP).astype(np.int8)
                found = symbols + walk_bits(symbols.T).T / 2
            else:
                symbols = found = np.clip(cheapest(x, slope[:, c]), -TOP, TOP)
            integers[:, c] = symbols
            errors[:, c - first] = error = (work[:, c] - found * steps) / spread[:, c, c, None]
            work[:, c + 1 : last] -= spread[:, c, c + 1 : last, None] * error[:, None]
        work[:, last:] -= spread[:, first:last, last:].mT @ errors
    grids = []
    for k, p in enumerate(ready):
        back = np.empty(integers.shape[1:], dtype=np.int8)
        back[p.order] = integers[k]
        grids.append(Grid(np.ascontiguousarray(back.T), rows[k], p.column, walks))
    return grids


def cheapest(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Of the two grid points around x the one with the smaller squared error plus slope times its square."""
    below = np.floor(x)
    gain = np.square(x - below) - np.square(x - below - 1) + slope * (np.square(below) - np.square(below + 1))
    return below + (gain > 0)


def gaussian_bits(step: np.ndarray) -> np.ndarray:
    """Entropy, bits, of a standard normal variable rounded to multiples of `step` up to 2; within 1 %."""
    return 0.5 * np.log2(2 * math.pi * math.e * (1 / np.square(step) + 1 / 12))


def quantize(
    shape: Shape,
    weights: dict[str, np.ndarray],
    pack: Pack,
    target_bytes: int,
    sensitivities: dict[str, Sensitivity] | None,
    encode: Callable[[dict[str, Grid]], bytes],
) -> tuple[bytes, dict]:
    """Grids for all tensors, as fine as the target allows, and the bytes that `encode` makes of them.

    Steps are the pack's where it names them; else one factor over all tensors, found such that the artifact lands at
    most 0.05 % below `target_bytes`: the loss that a bit saves is then the same everywhere. Returns the artifact and a
    report. Raises UsageError for weights or sensitivities that do not fit the shape, and targets out of reach.
    """
    check_weights(shape, weights)
    matrices = {n: weights[n].reshape(as_matrix(d)).astype(np.float32) for n, d in shape.parameters().items()}
    fixed = {n: fine_grid(w) for n, w in matrices.items() if tensor_class(n) == "control"}
    free = {n: w for n, w in matrices.items() if n not in fixed}
    check_sensitivities(free, sensitivities)
    ready = {n: prepare(w, sensitivities[n] if sensitivities else None, pack) for n, w in free.items()}
    relative = relative_steps(free, ready, pack, bool(sensitivities))

    def at(steps: dict[str, float]) -> tuple[bytes, dict[str, float]]:
        return encode(fixed | rounded(free, ready, steps, pack)), steps

    data, steps = at(relative) if pack.matrix_step else find_factor(at, free, ready, relative, target_bytes)
    losses = [(TRELLIS_ERROR if walked(n, pack) else 1.0) * ready[n].cost * steps[n] ** 2 for n in free]
    report = {
        "bytes": len(data),
        "predicted_loss": sum(losses) if sensitivities else None,
        "bits": {n: round(symbol_bits(free[n], ready[n], steps[n]), 3) for n in free},
        "notes": [f"{n}: {r.note}" for n, r in ready.items() if r.note],
    }
    return data, report


def tensor_error(error: np.ndarray, sensitivity: Sensitivity) -> float:
    """Predicted increase of the loss, nats a token, for errors (R, C) in a matrix."""
    each = np.einsum("rc,rc->r", error.astype(np.float64) @ sensitivity.hessian, error)
    return 0.5 * float((sensitivity.rows * each).sum())


def check_weights(shape: Shape, weights: dict[str, np.ndarray]) -> None:
    """Raise UsageError for missing, misshapen or non-finite weights."""
    table = shape.parameters()
    if set(weights) != set(table):
        raise UsageError(f"The weights {sorted(set(weights) ^ set(table))[:3]} do not belong to this shape.")
    for name, dims in table.items():
        if weights[name].shape != dims:
            raise UsageError(f"Weight {name} has shape {weights[name].shape}, the model's is {dims}.")
        if not np.isfinite(weights[name]).all():
            raise UsageError(f"Weight {name} is not finite; there is nothing to pack.")
        if np.abs(weights[name]).max() > LARGEST_WEIGHT:
            raise UsageError(f"Weight {name} exceeds {LARGEST_WEIGHT:.0e}; there is nothing sensible to pack.")


def check_sensitivities(free: dict[str, np.ndarray], sensitivities: dict[str, Sensitivity] | None) -> None:
    """Raise UsageError when the Hessians were collected from another model."""
    for name, weight in free.items() if sensitivities else ():
        found = sensitivities.get(name)
        rows, columns = weight.shape
        if found is None or found.hessian.shape != (columns, columns) or found.rows.shape != (rows,):
            raise UsageError(f"The Hessians are another model's: {name} {weight.shape} has none that fits.")
        if not (np.isfinite(found.hessian).all() and np.isfinite(found.rows).all() and (found.rows >= 0).all()):
            raise UsageError(f"The Hessian of {name} is not finite; collect it again.")


def relative_steps(
    free: dict[str, np.ndarray], ready: dict[str, Prepared], pack: Pack, weighed: bool
) -> dict[str, float]:  # fmt: skip
    """Each tensor's step up to one factor for all. With sensitivities sum cost step^2 is least for the bits
    -sum size log2 step when step^2 is proportional to size / cost. That a trellis errs less is left out: with
    it a model lost up to 0.0009 bpb (LAB.md, 2026-11-25)."""
    given = {"embed": pack.embed_step, "matrix": pack.matrix_step}
    if pack.embed_step and pack.matrix_step:
        return {n: given[tensor_class(n)] for n in free}
    if weighed:
        return {n: math.sqrt(w.size / max(ready[n].cost, 1e-30)) for n, w in free.items()}
    return {n: EMBED_SHARE if tensor_class(n) == "embed" else 1.0 for n in free}


def bounded(step: float, weight: np.ndarray, ready: Prepared) -> float:
    """A tensor's step, kept between the finest and the coarsest in standard deviations of its rows."""
    middle = float(np.exp(np.mean(np.log(np.maximum(weight.std(axis=1), 1e-30) / np.maximum(ready.scale, 1e-30)))))
    return min(max(step, FINEST * middle), COARSEST * middle)


def symbol_bits(weight: np.ndarray, ready: Prepared, step: float) -> float:
    """Predicted bits a weight."""
    rows = np.log2(np.maximum(weight.std(axis=1), 1e-30) / np.maximum(step * ready.scale, 1e-30))
    steps = 2.0 ** -np.clip(rows[:, None] - ready.column / OCTAVE, -1, 12)
    return float(gaussian_bits(steps).mean())


def find_factor(
    at: Callable[[dict[str, float]], tuple[bytes, dict[str, float]]], free: dict[str, np.ndarray],
    ready: dict[str, Prepared], relative: dict[str, float], target: int,
) -> tuple[bytes, dict[str, float]]:  # fmt: skip
    """(artifact, steps) nearest below `target` bytes, by the size of real artifacts. Raises UsageError if none is."""

    def steps_at(log: float) -> dict[str, float]:
        return {n: bounded(2.0**log * relative[n], w, ready[n]) for n, w in free.items()}

    def predicted(log: float) -> float:
        return sum(free[n].size * symbol_bits(free[n], ready[n], step) for n, step in steps_at(log).items()) / 8

    log, span = 0.0, 64.0  # log2 of the factor
    while (span := span / 2) > 1e-4:
        log += span if predicted(log) > target else -span
    few = many = best = None  # factors that gave few enough bytes, and too many
    for _ in range(12):
        data, steps = at(steps_at(log))
        if len(data) <= target:
            few = log
            best = max(best or (data, steps), (data, steps), key=lambda found: len(found[0]))
            if len(data) >= target * (1 - NEAR_TARGET) or steps == steps_at(-100.0):
                break
        elif steps == steps_at(100.0):
            raise UsageError(
                f"--target-bytes {target}: the coarsest grids take {len(data)} bytes, give more or a smaller model."
            )
        else:
            many = log
        moving = sum(w.size for n, w in free.items() if steps[n] == 2.0**log * relative[n])  # the rest is at a bound
        log += 8 * (len(data) - target * (1 - NEAR_TARGET / 2)) / max(moving, 1)
        if few is not None and many is not None and not many < log < few:
            log = (few + many) / 2
    if best is None:
        raise UsageError(f"--target-bytes {target}: no grid lands below it, give more bytes or a smaller model.")
    return best
