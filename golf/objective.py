"""What a training step minimises: the last pass's loss, every pass's, or each as likely as the gate stops there."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from golf.config import Config
from golf.halting import divergence, exit_logprobs, expected_depth, prior_logprobs
from golf.model import RecurrentGPT

STEERING = 0.02  # nats by which a step moves the penalty when all passes are one too many
MOST_STEERED = 1.0  # nats for a mean depth of all passes


class Objective:
    """The loss of a configuration, with the penalty on depth as it now stands, and what a step showed of its passes."""

    def __init__(self, config: Config):
        self.recipe, self.shape = config.recipe, config.shape
        self.steered, self.penalty = 0.0, 0.0
        self.losses, self.depths = [], []

    def begin(self, progress: float) -> None:
        """Before a step at `progress` in [0, 1] of the clock: how much depth costs, and nothing seen yet."""
        recipe = self.recipe
        since = progress - recipe.loops_from
        rise = min(1.0, max(0.0, since) / recipe.halt_warmup) if recipe.halt_warmup else 1.0
        self.penalty = rise * (recipe.halt_penalty + self.steered)
        self.losses, self.depths = [], []

    def steer(self, depth: float) -> None:
        """After a step of mean depth `depth`, alike on all ranks: towards the depth that is wanted."""
        if self.recipe.target_depth:
            moved = self.steered + STEERING * (depth - self.recipe.target_depth) / self.shape.loops
            self.steered = min(max(moved, -MOST_STEERED), MOST_STEERED)  # a depth out of reach drowns no loss

    def loss(
        self, model: RecurrentGPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype, loops: int
    ) -> Tensor:  # fmt: skip
        """tokens, targets (B, T) -> what is minimised, nats."""
        if self.recipe.depth_loss == "last":
            return model(tokens, targets, dtype, loops, self.recipe.isolate)
        if self.shape.exit_gate == "act":
            return self.pondering(model, tokens, targets, dtype, loops)
        states, final = model.each(tokens, dtype, loops, self.recipe.isolate)  # (R, B, T, D)
        wanted = targets.expand(loops, *targets.shape)
        if self.recipe.depth_loss == "each":
            loss, losses = model.head_losses(final, wanted)
            self.note(losses)
            return loss
        if loops == 1:  # nowhere else to stop
            logprobs = torch.zeros_like(wanted, dtype=torch.float32)
        else:
            logprobs = exit_logprobs(torch.stack([model.gate(x, at) for at, x in enumerate(states[:-1], 1)]))
        loss, losses = model.head_losses(final, wanted, loops * logprobs.exp())  # the sum over passes of p times loss
        depth = expected_depth(logprobs).mean()
        self.note(losses, depth)
        apart = divergence(logprobs, prior_logprobs(loops, self.recipe.prior_hazard)).mean()
        return loss + self.recipe.prior_weight * apart + self.penalty * depth / loops

    def pondering(
        self, model: RecurrentGPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype, loops: int
    ) -> Tensor:  # fmt: skip
        """The mixture's loss, and Graves's penalty of passes and remainder."""
        found = model.pondered(tokens, dtype, loops)
        passes = found.passes.float()
        self.note(depth=passes.mean())
        return model.head_loss(found.states, targets) + self.penalty * (passes + found.remainder).mean() / loops

    def note(self, losses: Tensor | None = None, depth: Tensor | None = None) -> None:
        """What a micro-batch showed: losses (R, B, T), mean depth."""
        if losses is not None:
            self.losses.append(losses.flatten(1).mean(dim=1))
        if depth is not None:
            self.depths.append(depth.detach())

    def told(self, model: RecurrentGPT) -> dict:
        """After a step's backward passes, of this rank: loss after each pass, mean depth, its price, the gate's
        gradient."""
        row: dict = {}
        if self.losses:
            row["pass_losses"] = [round(v, 5) for v in torch.stack(self.losses).mean(dim=0).tolist()]
        if self.depths:
            row["mean_depth"] = round(float(torch.stack(self.depths).mean()), 4)
            row["penalty"] = round(self.penalty, 6)
            norms = [float(p.grad.norm()) for p in (model.exit_weight, model.exit_bias)]
            row["gate_gradient_norm"] = round(math.hypot(*norms), 6)
        return row


@torch.no_grad()
def pass_statistics(model: RecurrentGPT, tokens: np.ndarray, dtype: torch.dtype, loops: int) -> dict:
    """tokens (B, T) -> norm a channel of the state after each pass of the core, and the cosine between neighbouring
    passes' states: whether repeats still move the state, and whether they blow it up."""
    given, states = torch.from_numpy(tokens).to(model.embedding.device), []
    with torch.compiler.set_stance("force_eager"):  # a row by itself is worth no graph
        if model.shape.exit_gate == "act":
            states = list(model.each(given, dtype, loops)[0])
        else:
            model.hidden(given, dtype, loops, seen=states)
    states = torch.stack(states).float()
    cosines = torch.nn.functional.cosine_similarity(states[1:], states[:-1], dim=-1)
    norms = states.square().mean(dim=-1).sqrt()
    return {
        "state_norms": [round(v, 4) for v in norms.flatten(1).mean(dim=1).tolist()],
        "state_cosines": [round(v, 5) for v in cosines.flatten(1).mean(dim=1).tolist()],
    }
