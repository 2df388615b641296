"""Trellis-coded quantisation: two interleaved grids, and a walk of eight states that says which one a weight uses.

After Marcellin and Fischer (1990), with an entropy coder behind it (Fischer and Wang 1992), on Ungerboeck's 8 states.
A weight of the walk is (2 k + z) * step / 2: its symbol k is coded, z is the walk's state's lowest bit, and the parity
of k chooses the next state. Walks go down the columns of a matrix, each of WALK rows, all from state 0.
"""

from __future__ import annotations

import numpy as np

WALK = 64
STATES = np.arange(8)
# Ungerboeck's parity check 1 + D + D^3, D^2: (s0, s1, s2) -> (s0 + s1, s2 + parity, s0).
NEXT = np.stack([(STATES ^ STATES >> 1) & 1 | ((STATES >> 2 & 1) ^ bit) << 1 | (STATES & 1) << 2 for bit in (0, 1)], 1)
FROM = np.array([[(s, bit) for s in range(8) for bit in (0, 1) if NEXT[s, bit] == end] for end in range(8)])
ORIGIN, PARITY = FROM[:, :, 0], FROM[:, :, 1]  # (8, 2): the two ways into each state
SUBSET = 2 * PARITY + (ORIGIN & 1)  # which residue modulo 4, in half steps, a weight on that way has


def walk_bits(integers: np.ndarray) -> np.ndarray:
    """The states' lowest bits (R, C) int8 along walks with these symbols (R, C)."""
    bits = np.empty_like(integers)
    state = np.zeros((-(-len(integers) // WALK), integers.shape[1]), dtype=np.int64)
    for first in range(min(WALK, len(integers))):
        symbols = integers[first::WALK]
        state = state[: len(symbols)]
        bits[first::WALK] = state & 1
        state = NEXT[state, symbols & 1]
    return bits


def best_walk(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Symbols k (N, R) of least squared error for N columns of weights in steps x (N, R), by Viterbi's algorithm.

    `slope` (N, R) times the square of a weight's steps is added to its error, for what its bits cost.
    """
    count, rows = x.shape
    walks = -(-rows // WALK)
    padded = np.zeros((2, count, walks * WALK))
    padded[0, :, :rows], padded[1, :, :rows] = x, slope
    y, price = padded.reshape(2, count * walks, WALK).transpose(0, 2, 1)  # (WALK, N * walks)
    residues = np.arange(4)
    # The nearest half step of each residue, and its error.
    half = 4 * np.rint((2 * y[:, :, None] - residues) / 4) + residues  # (WALK, N * walks, 4)
    error = np.square(y[:, :, None] - half / 2) + price[:, :, None] * np.square(half / 2)
    error.reshape(WALK, count, walks, 4)[rows - (walks - 1) * WALK :, :, -1] = 0.0  # beyond the last row
    cost = np.full((y.shape[1], 8), np.inf)
    cost[:, 0] = 0.0
    came = np.empty((WALK, *cost.shape), dtype=np.int8)
    for t in range(WALK):
        ways = cost[:, ORIGIN] + error[t][:, SUBSET]  # (N * walks, 8, 2)
        second = ways[..., 1] < ways[..., 0]
        came[t] = second
        cost = np.where(second, ways[..., 1], ways[..., 0])
    every = np.arange(len(cost))
    state = cost.argmin(axis=1)
    symbols = np.empty(y.shape, dtype=np.int16)
    for t in range(WALK - 1, -1, -1):
        way = came[t, every, state].astype(np.int64)
        found = half[t, every, SUBSET[state, way]]
        state = ORIGIN[state, way]
        symbols[t] = (found - (state & 1)) / 2
    return symbols.T.reshape(count, walks * WALK)[:, :rows]
