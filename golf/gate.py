"""A gate for a model that is trained already: the second stage of Ouro (Zhu et al. 2025), on the packed weights.

The model stays as it is. After each pass the gate should go on where the next pass lowers the token's loss; from the
second round on those losses are measured as they arise when the gate itself stops tokens, whose keys and values are
then frozen for all others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from golf.checks import check_exits
from golf.codec import decode_grids, encode, read_header
from golf.errors import UsageError
from golf.exits import Gate
from golf.grid import fine_grid
from golf.halting import SLACK, gate_loss, prior_biases
from golf.machine import keep_memory
from golf.model import RecurrentGPT
from golf.shape import Shape

ROWS = 16  # of text that a step learns from


@dataclass(frozen=True)
class GateOptions:
    """How a gate is trained, as `depth_map.py gate` explains it."""

    seed: int
    steps: int
    rate: float
    least_gain: float  # nats
    label: str  # next or last
    quantile: float


def gated(data: bytes) -> tuple[Shape, RecurrentGPT]:
    """The model of an artifact with a gate, its biases at the uniform prior if it had none. Raises UsageError."""
    shape, grids = decode_grids(data)
    keep_memory()
    check_exits(shape)
    if shape.exit_gate == "act":
        raise UsageError("The model has an ACT gate, which its weights were trained with; give another run.")
    whole = replace(shape, exit_gate="hazard")
    model = RecurrentGPT(whole)
    with torch.no_grad():
        model.exit_weight.zero_()
        model.exit_bias.copy_(torch.tensor(prior_biases(shape.loops)))
        for name, p in model.named_parameters():
            if name in grids:
                p.copy_(torch.from_numpy(grids[name].weights()).reshape(p.shape))
    return shape, model.eval().requires_grad_(False)


@torch.no_grad()
def losses_at_stops(model: RecurrentGPT, tokens: Tensor, targets: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """tokens, targets (B, T) -> states (R, B, T, D) and nats (R, B, T) after each pass where others stop as the gate
    says: of a token that stopped, the passes after it are what it would have made of them alone, its own key unchanged.
    """
    shape = model.shape
    given = model.enter(tokens, torch.float32)
    x = model.prelude(given)
    kept, rule = model.nothing_kept(x), Gate(quantile)
    running, spent = torch.ones_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape)
    frozen, states, losses = x, [], []
    for passed in range(1, shape.loops + 1):
        for bank in kept:
            bank.moves = running
        x = model.core_pass(x, given, passed, kept)  # of everyone; only who runs is seen by others
        frozen = torch.where(running[..., None], x, frozen)
        states.append(x)
        whole, alone = (model.coda(s, given) for s in (frozen, x))
        losses.append(model.head_losses(torch.where(running[..., None], whole, alone), targets)[1])
        if passed < shape.loops:
            spent = spent + (1 - spent) * torch.sigmoid(model.gate(x, passed))
            running = running & (spent < rule.threshold - SLACK)
    return torch.stack(states), torch.stack(losses)


def labels_from(losses: Tensor, label: str) -> Tensor:
    """Losses (R, ...) whose steps from one to the next are what each of the R - 1 gates learns from."""
    if label == "next":
        return losses
    return torch.cat((losses[:1], losses[:-1]))  # the step to pass t itself; before the first there is none


def train_gate(model: RecurrentGPT, stream: np.ndarray, length: int, options: GateOptions) -> dict:
    """Train the gate of a model on a stream of tokens, rows of `length`; the rest stays frozen. Returns what it lost at
    the beginning and the end, nats. Raises UsageError for too little text."""
    rows = (stream.size - 1) // length
    if rows < ROWS:
        raise UsageError(f"--data: it has {rows} rows of {length} tokens, give text of {ROWS} or more.")
    generator = np.random.default_rng(options.seed)
    model.exit_weight.requires_grad_()
    model.exit_bias.requires_grad_()
    optimizer = torch.optim.Adam([model.exit_weight, model.exit_bias], lr=options.rate)
    seen = []
    for step in range(options.steps):
        picked = generator.choice(rows, ROWS, replace=False)
        cut = np.stack([stream[r * length : (r + 1) * length + 1] for r in picked]).astype(np.int64)
        tokens, targets = torch.from_numpy(cut[:, :-1].copy()), torch.from_numpy(cut[:, 1:].copy())
        if step < options.steps // 2:
            with torch.no_grad():
                states, final = model.each(tokens)
                losses = model.head_losses(final, targets.expand(len(final), *targets.shape))[1]
        else:
            states, losses = losses_at_stops(model, tokens, targets, options.quantile)
        hazards = torch.stack([model.gate(x, t) for t, x in enumerate(states[:-1], 1)])
        loss = gate_loss(labels_from(losses, options.label), hazards, options.least_gain)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = options.rate * (1 - step / options.steps)
        optimizer.step()
        seen.append(float(loss.detach()))
    model.requires_grad_(False)
    tenth = max(1, options.steps // 10)
    return {"loss_at_first": float(np.mean(seen[:tenth])), "loss_at_last": float(np.mean(seen[-tenth:])),
            **asdict(options)}  # fmt: skip


def with_gate(data: bytes, model: RecurrentGPT) -> bytes:
    """The same artifact with the model's gate in it; every other weight stays as it was stored."""
    grids = decode_grids(data)[1]
    for name in ("exit_weight", "exit_bias"):
        weight = model.get_parameter(name).detach().double().numpy()
        grids[name] = fine_grid(weight.reshape(-1, weight.shape[-1]))
    return encode(model.shape, grids, read_header(data)[1])
