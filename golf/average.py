"""A running average of the weights, which is what is packed when there is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential average of all parameters in float32, over about `horizon` of the clock; a horizon of 0 is none.

    The contest's records average with 0.9965 a step, 6 % of their run (03-22 on).
    """

    def __init__(self, model: nn.Module, horizon: float):
        self.parameters = list(model.parameters()) if horizon else []
        self.horizon, self.progress = horizon, 0.0
        self.average: list[Tensor] = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """After an update at `progress` in [0, 1] of the clock."""
        if self.average:
            share = 1 - math.exp(-(progress - self.progress) / min(self.horizon, max(progress, 1e-6)))
            torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], max(share, 1e-6))
            self.progress = progress

    @torch.no_grad()
    def install(self) -> None:
        """Make the model's weights the average."""
        for p, average in zip(self.parameters, self.average, strict=True):
            p.copy_(average)
