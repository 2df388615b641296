"""Optimisers of several ranks whose communication runs beside the arithmetic: each rank owns a part of every bank.

Gradients of a bank (all matrices of one shape) are reduce-scattered, the owner updates momentum and orthogonalises, and
the updates are gathered while the next bank is worked on: parallel Muon of the contest's records (#399, #1523).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from golf.model import RecurrentGPT
from golf.muon import Matrices, Optimizers, orthogonalize
from golf.recipe import Recipe

# Its name from torch 2.13 on, and before.
gather_whole = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Bank:
    """The matrices of one shape, and this rank's part of their averaged gradients."""

    group: Matrices  # whose momentum (N / world, R, C) is this rank's part too
    part: Tensor  # (N / world, R, C), their number filled up with zeros
    work: dist.Work | None = None


class OverlappedOptimizers(Optimizers):
    """Optimizers for a group of ranks, equal to the plain ones up to the order of sums."""

    def __init__(self, model: RecurrentGPT, recipe: Recipe, dtype: torch.dtype = torch.float32):
        super().__init__(model, recipe, dtype)
        self.world = dist.get_world_size()
        self.banks = []
        for group in sorted(self.muon.groups, key=lambda g: -g.momentum.numel()):  # the largest first
            part = torch.zeros_like(group.momentum[: -(-len(group.momentum) // self.world)])
            group.momentum = torch.zeros_like(part)
            self.banks.append(Bank(group, part))
        inside = {id(p) for bank in self.banks for p in bank.group.parameters}
        self.rest = [p for p in self.parameters if id(p) not in inside]
        self.rest_gradients = torch.zeros(0)
        self.rest_work: dist.Work | None = None

    def reduce_gradients(self) -> None:
        """Begin to average: the largest banks first, then all that is no matrix as one row."""
        for bank in self.banks:
            stacked = torch.stack([p.grad for p in bank.group.parameters]).float()
            whole = stacked.new_zeros(self.world * len(bank.part), *stacked.shape[1:])
            whole[: len(stacked)] = stacked / self.world
            bank.work = dist.reduce_scatter_tensor(bank.part, whole, async_op=True)
        self.rest_gradients = torch.cat([p.grad.flatten() for p in self.rest]) / self.world
        self.rest_work = dist.all_reduce(self.rest_gradients, async_op=True)

    def gradient_norm(self) -> float:
        """Global norm of the averaged gradients, alike on all ranks; then they are scaled to the recipe's limit."""
        for work in (*(bank.work for bank in self.banks), self.rest_work):
            work.wait()
        squares = torch.stack([bank.part.square().sum() for bank in self.banks]).sum()
        dist.all_reduce(squares)
        norm = (squares + self.rest_gradients.square().sum()).sqrt()
        if self.recipe.clip_norm:
            scale = (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*(bank.part for bank in self.banks), self.rest_gradients], scale)
        offset = 0
        for p in self.rest:
            p.grad = self.rest_gradients[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        return float(norm)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One update at `progress` in [0, 1] of the clock; after gradient_norm()."""
        recipe = self.recipe
        rate = recipe.matrix_rate * self.set_rates(progress)
        gathered = []
        for bank in self.banks:
            update = self.muon.update_of(bank.part, bank.group.momentum, recipe.momentum_at(progress))
            update = orthogonalize(update, recipe.newton_schulz, recipe.newton_schulz_steps, self.ns_dtype)
            whole = update.new_empty(self.world * len(update), *update.shape[1:])
            gathered.append((bank.group, whole, gather_whole(whole, update, async_op=True)))
        self.adam.step()
        for group, whole, work in gathered:
            work.wait()
            self.muon.apply(group, whole[: len(group.parameters)], rate, recipe.decay_at(progress))


def optimizers_for(
    model: RecurrentGPT, recipe: Recipe, overlap: bool, dtype: torch.dtype = torch.float32
) -> Optimizers:
    """The overlapped ones for several ranks, if wanted; else the plain ones. Muon's products are of `dtype`."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return (OverlappedOptimizers if overlap and several else Optimizers)(model, recipe, dtype)
