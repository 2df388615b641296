"""The grid that a tensor's weights are rounded to: an integer times its row's step times its column's.

Steps are whole powers of 2^(1/256), so that a weight comes back the same on every machine; within a tensor they differ
by multiples of 2^(1/16), so that a row's step is one small number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from golf.trellis import walk_bits

OCTAVE, NOTCH = 256, 16  # codes that double a step; codes between two steps of one tensor
REACH = 127 * NOTCH  # codes from a tensor's finest row to its coarsest, at most
CODE_LIMIT = 25 * OCTAVE  # steps from 2^-25 to 2^25
TOP = 127  # integers are signed bytes, -128 unused


def roots() -> np.ndarray:
    """2^(i / 256) for i below 256, float32: square roots and products, which every machine rounds alike."""
    root = 2.0
    for _ in range(8):
        root = math.sqrt(root)
    return np.array([math.prod([root] * i) for i in range(OCTAVE)]).astype(np.float32)


POWERS = roots()


@dataclass(frozen=True)
class Grid:
    """A tensor as rows of integers; weight[r, c] = integers[r, c] * 2^((row[r] + column[c]) / 256).

    With `walks` half a step is added where the trellis's walk down the column says so.
    """

    integers: np.ndarray  # (R, C) int8
    row: np.ndarray  # (R,) int32, equal modulo 16
    column: np.ndarray  # (C,) int32, multiples of 16
    walks: bool = False

    def weights(self) -> np.ndarray:
        """(R, C) float32."""
        weights = step_of(self.row[:, None] + self.column)
        if self.walks:
            weights *= self.integers + walk_bits(self.integers) * np.float32(0.5)
        else:
            weights *= self.integers
        return weights


def as_matrix(dims: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a tensor is stored as."""
    return math.prod(dims[:-1]), dims[-1]


def step_of(code: np.ndarray) -> np.ndarray:
    """2^(code / 256), float32: a table's entry times a power of two."""
    return np.ldexp(POWERS[code & (OCTAVE - 1)], code >> 8)


def codes_of(step: np.ndarray) -> np.ndarray:
    """Codes (N,) int32 of positive steps: their mean is met to 1/256 octave, each of them to 1/16."""
    logs = OCTAVE * np.log2(np.maximum(np.asarray(step, dtype=np.float64), 2.0 ** (-CODE_LIMIT / OCTAVE)))
    base = np.rint(logs.mean())
    for _ in range(3):  # rounding in notches moves the mean
        notches = np.rint((logs - base) / NOTCH)
        base += np.rint((logs - base - NOTCH * notches).mean())
    return np.clip(base + NOTCH * notches, -CODE_LIMIT, CODE_LIMIT).astype(np.int32)


def wide_enough(weight: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Row codes, raised by whole notches where a row's largest weight would need an integer beyond 127."""
    need = np.abs(weight / step_of(column)).max(axis=1) / (step_of(row) * (TOP + 0.49))
    notches = np.ceil(OCTAVE / NOTCH * np.log2(np.maximum(need, 1)))
    row = row + NOTCH * notches.astype(np.int32)
    return np.maximum(row, row.max() - REACH)  # rows finer by eight octaves are rows of nothing


def nearest(weight: np.ndarray, row: np.ndarray, column: np.ndarray) -> Grid:
    """Each weight (R, C) at the nearest point of the grid with these codes."""
    integers = np.rint(weight / step_of(row[:, None] + column))
    return Grid(np.clip(integers, -TOP, TOP).astype(np.int8), row, column)


def fine_grid(weight: np.ndarray) -> Grid:
    """The rule of small and control tensors: steps as fine as each row's largest magnitude allows, 122 to 127 of
    them to it (fewer in rows eight octaves under the coarsest step)."""
    column = np.zeros(weight.shape[1], dtype=np.int32)
    lowest = np.full(len(weight), -CODE_LIMIT, dtype=np.int32)
    return nearest(weight, wide_enough(weight, lowest, column), column)
