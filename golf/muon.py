"""Muon: momentum whose matrices are orthogonalised before they are applied (Keller Jordan et al. 2024).

Every parameter goes to exactly one optimiser, by its role; the work on matrices is shared over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from golf.model import RecurrentGPT, role_of
from golf.recipe import Recipe

# (a, b, c) of X <- aX + (bA + cA^2)X with A = XX^T, one triple an iteration.
QUINTIC = ((3.4445, -4.7750, 2.0315),)
# Polar Express (Amsel et al. 2025), the triples the best contest record runs.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COEFFICIENTS = {"quintic": QUINTIC, "polar-express": POLAR_EXPRESS}


def orthogonalize(
    updates: Tensor, method: str = "quintic", steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Move the singular values of each matrix of a batch (N, R, C) towards 1 by `steps` iterations in `dtype`.

    The polynomial's last triple repeats when `steps` exceeds the list. Returns (N, R, C) in the type of `updates`.
    """
    triples = COEFFICIENTS[method]
    x = updates.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the smaller side first, so that A = XX^T is the smaller product
        x = x.mT
    # The Frobenius norm bounds every singular value by 1; Polar Express was fitted for 2 % below it.
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm * 1.02 + 1e-6 if method == "polar-express" else norm + 1e-7)
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(updates.dtype)


@dataclass
class Matrices:
    """Parameters of one shape that Muon updates as a batch."""

    parameters: list[nn.Parameter]
    momentum: Tensor  # (N, R, C)
    aspect: float  # factor on the rate: sqrt(max(1, R / C))


class Muon:
    """Nesterov momentum, orthogonalised: W -= rate * factor * orthogonalize(update), decay decoupled.

    factor is sqrt(max(1, rows / columns)). Every rank keeps all of the momentum, which is cheap, and orthogonalises
    its share of each batch, which is not; one all-reduce of the updates hands everyone the rest.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], recipe: Recipe):
        self.recipe = recipe
        by_shape: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        for name, p in named:
            if p.ndim != 2:
                raise ValueError(f"Muon updates matrices only, {name!r} has shape {tuple(p.shape)}")
            by_shape.setdefault(tuple(p.shape), []).append((name, p))
        self.groups = []
        for (rows, columns), members in by_shape.items():
            parameters = [p for _, p in members]
            momentum = torch.zeros(len(members), rows, columns, device=parameters[0].device)
            self.groups.append(Matrices(parameters, momentum, max(1.0, rows / columns) ** 0.5))

    @torch.no_grad()
    def step(
        self, rate: float, momentum: float, ns_dtype: torch.dtype = torch.bfloat16, decay: float | None = None
    ) -> None:
        """Update every matrix from its .grad (already averaged over ranks)."""
        decay = self.recipe.matrix_decay if decay is None else decay
        updates = []
        for group in self.groups:
            gradient = torch.stack([p.grad for p in group.parameters]).float()
            updates.append(self.update_of(gradient, group.momentum, momentum))
        self.orthogonalize_all(updates, ns_dtype)
        for group, update in zip(self.groups, updates, strict=True):
            self.apply(group, update, rate, decay)

    def update_of(self, gradient: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Nesterov: buffer <- momentum * buffer + gradient; the update looks one step ahead. (N, R, C) float32, both
        are written to."""
        buffer.mul_(momentum).add_(gradient)
        update = gradient.add_(buffer, alpha=momentum)
        if self.recipe.row_normalize:
            update /= update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return update

    @staticmethod
    def apply(group: Matrices, update: Tensor, rate: float, decay: float) -> None:
        """Decay the group's matrices and move them against orthogonalised updates (N, R, C)."""
        if decay:
            torch._foreach_mul_(group.parameters, 1.0 - rate * decay)
        torch._foreach_add_(group.parameters, list((update * group.aspect).unbind()), alpha=-rate)

    def orthogonalize_all(self, updates: list[Tensor], ns_dtype: torch.dtype) -> None:
        """Orthogonalise in place; with several ranks each does every world-size-th matrix and the sum is shared."""
        method, steps = self.recipe.newton_schulz, self.recipe.newton_schulz_steps
        if not dist.is_initialized() or dist.get_world_size() == 1:
            for update in updates:
                update.copy_(orthogonalize(update, method, steps, ns_dtype))
            return
        rank, world = dist.get_rank(), dist.get_world_size()
        flat = torch.zeros(sum(u.numel() for u in updates), device=updates[0].device)
        offset = 0
        for update in updates:
            view = flat[offset : offset + update.numel()].view_as(update)
            if rank < len(update):
                view[rank::world] = orthogonalize(update[rank::world], method, steps, ns_dtype)
            offset += update.numel()
        dist.all_reduce(flat)
        offset = 0
        for update in updates:
            update.copy_(flat[offset : offset + update.numel()].view_as(update))
            offset += update.numel()

    def state(self) -> list[Tensor]:
        """The buffers, to be restored after warm-up."""
        return [group.momentum for group in self.groups]


class Optimizers:
    """Muon for matrices, Adam for the embedding and for control vectors: every parameter exactly once."""

    def __init__(self, model: RecurrentGPT, recipe: Recipe, dtype: torch.dtype = torch.float32):
        """`dtype` is that of the model's products, and of Muon's: bfloat16 as its author and the records have it."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "embed": [], "scalar": []}
        for name, p in model.named_parameters():
            kind = role_of(name).optimizer
            if kind not in groups:
                raise ValueError(f"parameter {name!r} has the unknown optimizer {kind!r}")
            groups[kind].append((name, p))
        self.recipe = recipe
        self.muon = Muon(groups["muon"], recipe)
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for _, p in groups["embed"]], "kind": "embed", "weight_decay": recipe.embed_decay},
                {"params": [p for _, p in groups["scalar"]], "kind": "scalar", "weight_decay": 0.0},
            ],
            lr=0.0, betas=(recipe.adam_beta1, recipe.adam_beta2), eps=recipe.adam_epsilon, fused=True,
        )  # fmt: skip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ns_dtype = dtype

    def reduce_gradients(self) -> None:
        """Average gradients over ranks: one flat all-reduce of the unique parameters."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        offset = 0
        for g in gradients:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

    def step(self, progress: float) -> None:
        """One update at `progress` in [0, 1] of the clock, from gradients that are already reduced."""
        recipe = self.recipe
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        rate = recipe.matrix_rate * self.set_rates(progress)
        self.adam.step()
        self.muon.step(rate, recipe.momentum_at(progress), self.ns_dtype, recipe.decay_at(progress))

    def set_rates(self, progress: float) -> float:
        """Adam's rates at `progress`; returns the factor on every rate."""
        scale = self.recipe.rate_scale(progress)
        for group in self.adam.param_groups:
            group["lr"] = scale * (self.recipe.embed_rate if group["kind"] == "embed" else self.recipe.scalar_rate)
        return scale

    def gradient_norm(self) -> float:
        """Global norm of the gradients, not finite when any of them is not."""
        return float(torch.stack(torch._foreach_norm([p.grad for p in self.parameters])).norm())

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def reset(self) -> None:
        """Forget all state, as after a warm-up on synthetic tokens."""
        self.adam.state.clear()
        for buffer in self.muon.state():
            buffer.zero_()
