"""What exits come to by their definitions, on whole tensors: what the program does pass by pass is held against it."""

from __future__ import annotations

import torch
from torch import Tensor

from golf.halting import EPSILON, SLACK
from golf.model import RecurrentGPT
from golf.recipe import Recipe
from golf.shape import Shape


def expected_loss(losses: Tensor, logprobs: Tensor) -> Tensor:
    """losses (R, ...) after each pass, weighted by the exits' probabilities: (...)."""
    return (logprobs.exp() * losses).sum(dim=0)


def act(stops: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive computation time (Graves 2016): stops (R, ...) in [0, 1] after each pass -> weights (R, ...), passes
    (...) and remainder (...).

    A token stops at the first pass where its sum reaches 1 - epsilon, and at the last in any case; the weight of that
    pass is what is missing to one. The penalty passes + remainder has a gradient through the remainder only.
    """
    total, weights = torch.zeros_like(stops[0]), []
    running = torch.ones_like(total, dtype=torch.bool)
    passes, remainder = torch.zeros_like(total), torch.zeros_like(total)
    for at, stop in enumerate(stops):
        ends = running if at == len(stops) - 1 else running & (total + stop >= 1 - epsilon - SLACK)
        weight = torch.where(ends, 1 - total, torch.where(running, stop, torch.zeros_like(stop)))
        remainder = torch.where(ends, 1 - total, remainder)
        passes = passes + running
        total = total + torch.where(ends, torch.zeros_like(stop), weight)
        running = running & ~ends
        weights.append(weight)
    return torch.stack(weights), passes, remainder


class Told(RecurrentGPT):
    """A model whose gate says given chances, and whose state after a pass is the pass's own unit vector: what it mixes
    are ACT's weights."""

    def pass_by_pass(self, stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """stops (R, N) -> weights (R, N), passes (N,) and remainder (N,), as the model itself stops and mixes."""
        self.stops = stops
        found = self.pondered(torch.zeros(1, stops.size(1), dtype=torch.int64), stops.dtype, len(stops))
        return found.states[0, :, : len(stops)].T, found.passes[0], found.remainder[0]

    def gate(self, x: Tensor, passed: int) -> Tensor:
        return self.stops[passed - 1].logit()[None]

    def core_pass(self, x: Tensor, given: object, passed: int, kept: object = None) -> Tensor:
        return torch.eye(x.size(-1), dtype=x.dtype)[passed - 1].expand_as(x)

    def coda(self, x: Tensor, given: object, kept: object = None) -> Tensor:
        return x


def act_of_the_model(stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `act` gives, computed by the model's own passes."""
    shape = Shape(vocab_size=64, width=32, heads=4, kv_heads=2, core=1, loops=len(stops), skips=False, exit_gate="act")
    return Told(shape).initialize(Recipe(), 1).pass_by_pass(stops)


def quantile_exit(logprobs: Tensor, quantile: float) -> Tensor:
    """(R, ...) -> (...) int64: the first pass by which the exits' probabilities sum to `quantile` (PALBERT, 2022)."""
    before = (logprobs.exp().cumsum(dim=0) < quantile - SLACK).sum(dim=0)
    return before.clamp(max=len(logprobs) - 1) + 1
