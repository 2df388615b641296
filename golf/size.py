"""Bytes of an artifact before there is one: ours from shape and codec settings, others' from their schemes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from golf.config import Config
from golf.recipe import Pack
from golf.shape import Shape, tensor_class

FINEST, COARSEST = 1 / 32, 2.0  # the codec's own limits; a test holds them equal

# What an artifact holds beside its weights' symbols; measured on trained models (LAB.md).
ROW_CODE_BITS = 4.4  # a row's step, where it goes with the row's deviation
EMBED_ROW_BITS = 6.1  # a row of the embedding, whose step goes with how often the piece occurs
COLUMN_CODE_BITS = 4.9  # a column's step, where columns have their own
CONTROL_BITS = 7.3  # a control weight
HEADER_BYTES, GROUP_BYTES, TABLE_BYTES, LANE_SHARE = 200, 8, 10, 0.0004
# Bits that the adaptive coder saves on a weight of the embedding at a step of half a deviation, and for each halving of
# it: rows of pieces that the text hardly shows have wide steps, or are told from earlier rows.
EMBED_GAIN_BITS, EMBED_GAIN_PER_OCTAVE = 0.07, 0.158
# Bits of matrices whose columns have steps of their own are more by this over the width, the longer the columns the
# less: tables that follow a column learn its width from its first symbols.
COLUMNS_COST = 1.66
FEEDBACK_ERROR = 1.65  # variance that errors fed forward add to what is rounded, in those of the rounding itself


def largest_of(count: int) -> float:
    """Median of the largest magnitude among `count` standard normal numbers."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)


def symbol_bits(step: float, quantizer: str, added: float = 1.0) -> float:
    """Entropy of a standard normal variable on a grid of this step.

    Rounding adds the grid's error, step^2 / 12 or with a trellis 0.8 of it, to the variance that is coded: 2.047
    - log2(step) bits where steps are fine; within 0.3 % up to a step of 1.5. Errors fed forward add it `added` times.
    """
    error = added * (0.8 / 12 if quantizer == "trellis" else 1 / 12)
    return 0.5 * math.log2(2 * math.pi * math.e * (1 / step**2 + error))


def grid_step(step: float, columns: int) -> float:
    """The step that a row of this many weights gets: an integer of 8 bits must hold its largest."""
    return max(step, largest_of(columns) / 127.5)


def has_column_steps(pack: Pack) -> bool:
    """Whether columns get steps of their own: with sensitivities, and tables that follow."""
    return pack.column_steps and pack.calibration_batches > 0 and pack.coder == "adaptive"


def side_bytes(config: Config) -> dict[str, float]:
    """Predicted bytes of everything but the symbols of matrices and embedding."""
    shape, pack = config.shape, config.pack
    totals = {"scales": 0.0, "control": 0.0, "header": float(HEADER_BYTES)}
    weighed = pack.calibration_batches > 0
    table = shape.parameters()
    for name, dims in table.items():
        kind = tensor_class(name)
        if kind == "control":
            totals["control"] += math.prod(dims) * CONTROL_BITS / 8
            continue
        rows = ROW_CODE_BITS
        if weighed and pack.coder == "adaptive":
            rows = EMBED_ROW_BITS if kind == "embed" else ROW_CODE_BITS if pack.row_power else 0.0
        columns = COLUMN_CODE_BITS if has_column_steps(pack) else 0.0
        totals["scales"] += (dims[0] * rows + dims[1] * columns) / 8
    totals["header"] += GROUP_BYTES * len({name.rsplit(".", 1)[-1] for name in table})
    totals["header"] += TABLE_BYTES * len(table) if pack.coder == "static" else 0
    return totals


def coded_bytes(config: Config, matrix_step: float, embed_step: float) -> dict[str, float]:
    """Predicted bytes of the artifact by class, on grids of these steps in standard deviations."""
    totals = {"embedding": 0.0, "matrices": 0.0, **side_bytes(config)}
    for name, dims in config.shape.parameters().items():
        kind = tensor_class(name)
        if kind != "control":
            step = grid_step(embed_step if kind == "embed" else matrix_step, dims[1])
            walks = config.pack.quantizer == "trellis" and kind == "matrix"
            fed = config.pack.calibration_batches and config.pack.rounding == "feedback"
            bits = symbol_bits(step, "trellis" if walks else "scalar", FEEDBACK_ERROR if fed else 1.0)
            if kind == "embed" and config.pack.coder == "adaptive":
                bits -= max(0.0, EMBED_GAIN_BITS + EMBED_GAIN_PER_OCTAVE * math.log2(0.5 / step))
            if kind == "matrix" and has_column_steps(config.pack):
                bits *= 1 + COLUMNS_COST / config.shape.width
            totals["embedding" if kind == "embed" else "matrices"] += math.prod(dims) * bits / 8
    totals["header"] += LANE_SHARE * sum(totals.values())
    return totals


def artifact_bytes(config: Config, code: int) -> dict[str, int]:
    """Predicted bytes of each class of tensor: at the steps that the configuration names, or those that fill its cap.

    A cap too small for the coarsest grid is not filled but exceeded.
    """
    pack = config.pack
    if pack.matrix_step:
        totals = coded_bytes(config, pack.matrix_step, pack.embed_step)
    else:
        target, low, high = config.target_bytes(code), math.log2(FINEST), math.log2(COARSEST)
        for _ in range(40):
            middle = 2 ** ((low + high) / 2)
            over = sum(coded_bytes(config, middle, middle).values()) > target
            low, high = ((low + high) / 2, high) if over else (low, (low + high) / 2)
        totals = coded_bytes(config, 2**high, 2**high)
    return {name: round(value) for name, value in totals.items()}


def submission_bytes(config: Config, code: int) -> int:
    """Predicted bytes of the artifact and `code` bytes of code."""
    return sum(artifact_bytes(config, code).values()) + code


@dataclass(frozen=True)
class Scheme:
    """How others pack: a grid step in row deviations for each role, and bytes over the symbols' entropy."""

    steps: dict[str, float]
    """By the last part of a name, "" for all others; 0 is 127 steps to the row's largest weight."""
    over_entropy: float
    control_bytes: int

    def bytes(self, shape: Shape) -> int:
        """Predicted bytes of the packed weights, 16 bits a row's scale."""
        total = 0.0
        for name, dims in shape.parameters().items():
            if tensor_class(name) == "control":
                total += self.control_bytes * math.prod(dims)
                continue
            step = self.steps.get(name.rsplit(".", 1)[-1], self.steps[""]) or largest_of(dims[1]) / 127
            total += math.prod(dims) * symbol_bits(step, "scalar") / 8 * self.over_entropy + 2 * dims[0]
        return round(total)


# The contest baseline: int8 and zlib-9. The 36 M-weight record: int6 at 13 and, in the MLP, 11.5 deviations, the
# embedding int7 at 14; lrzip's zpaq mode, at 0.993 of the entropy.
SCHEMES = {
    "baseline": Scheme({"": 0.0}, 1.0, 4),
    "record": Scheme({"": 13 / 31, "up": 11.5 / 31, "down": 11.5 / 31, "embedding": 14 / 63}, 0.993, 2),
}
PUBLISHED = {"baseline": 15_815_847, "record": 15_865_260}


def bits_a_weight(config: Config, classes: dict[str, int]) -> float:
    """Bits of the artifact over its weights."""
    return 8 * sum(classes.values()) / config.shape.parameter_count
