"""Sensitivities of the matrices, from gradients on training text, summed over every pass of a shared block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from golf.config import Config
from golf.machine import Machine
from golf.model import RecurrentGPT
from golf.quantize import Sensitivity
from golf.recipe import said_pace
from golf.shape import tensor_class

STEPS_A_BATCH = 2.0  # whose time a calibration batch takes, where steps are said to take theirs (1.9 to 2.1 were seen)


class Collector:
    """Hessian sums of one model, filled through its taps while batches run forward and backward."""

    def __init__(self, model: RecurrentGPT):
        self.model = model
        self.sums = {
            name: torch.zeros(p.shape[1], p.shape[1], device=p.device)
            for name, p in model.named_parameters()
            if tensor_class(name) != "control"
        }
        self.rows = torch.zeros(model.shape.vocab_size, device=model.embedding.device)
        self.tokens = self.batches = 0
        model.tap = self.top
        for index, block in enumerate(model.blocks):
            block.tap = partial(self.matrix, f"blocks.{index}.")

    def matrix(self, prefix: str, role: str, x: Tensor, y: Tensor) -> None:
        """Note a matrix's inputs; its outputs' gradients add to the sums when they come."""
        y.register_hook(partial(self.add, prefix + role, x.detach()))

    def top(self, use: str, x: Tensor, y: Tensor) -> None:
        """The tied embedding: a matrix at the head, rows that are looked up."""
        y.register_hook(partial({"head": self.add_head, "lookup": self.add_lookup}[use], x.detach()))

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Sum over tokens of |g|^2 / R x x'; of a mean loss's gradient, so `finish` multiplies by the tokens."""
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        weight = gradient.square().mean(dim=1, keepdim=True)
        self.sums[name] += (x * weight).mT @ x

    def add_head(self, x: Tensor, gradient: Tensor) -> None:
        self.add("embedding", x, gradient)
        x = x.flatten(0, -2).float()
        self.rows += (gradient.flatten(0, -2).float().square().mT @ x.square().mean(dim=1, keepdim=True))[:, 0]

    def add_lookup(self, rows: Tensor, gradient: Tensor) -> None:
        weight = gradient.flatten(0, -2).float().square().mean(dim=1)
        self.rows.index_add_(0, rows.flatten(), weight)
        self.sums["embedding"].diagonal().add_(weight.sum() / self.rows.numel())

    def batch(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype, isolate: bool = False) -> None:
        """Forward and backward over one batch (B, T) at full depth; the parameters' own gradients are dropped."""
        self.model(tokens, targets, dtype=dtype, isolate=isolate).backward()
        self.model.zero_grad(set_to_none=True)
        self.tokens += tokens.numel()
        self.batches += 1

    def finish(self, machine: Machine) -> dict[str, Sensitivity]:
        """Means over the tokens of all ranks; the taps are taken off."""
        self.model.tap = None
        for block in self.model.blocks:
            block.tap = None
        tokens, batches = machine.total([self.tokens, self.batches])
        # A mean loss's gradient at a token is 1 / (tokens of the batch) of that token's, and it is squared here.
        scale = (tokens / batches) / batches
        found = {}
        for name, hessian in self.sums.items():
            machine.add_up(hessian)
            rows = np.ones(self.model.get_parameter(name).shape[0])
            if name == "embedding":
                machine.add_up(self.rows)
                rows = self.rows.double().cpu().numpy()
                rows /= max(rows.mean(), 1e-300)
            found[name] = Sensitivity(hessian.double().cpu().numpy() * scale, rows)
        return found


def twin_of(model: RecurrentGPT) -> RecurrentGPT:
    """A copy that is not compiled: taps change what runs."""
    twin = RecurrentGPT(model.shape).to(model.embedding.device)
    twin.load_state_dict(model.state_dict())
    return twin


def rehearse(model: RecurrentGPT, config: Config, machine: Machine, micro_rows: int) -> tuple[float, float]:
    """Training seconds to set aside for calibrate(), and of them those for its end; by timing both on synthetic
    tokens, alike on all ranks."""
    batches = config.pack.calibration_batches
    if not batches or config.run.max_steps:
        return 0.0, 0.0
    if config.run.pace:
        return STEPS_A_BATCH * batches * max(said_pace(config.run.pace).values()), 0.0
    length = config.recipe.sequence_length
    numbers = torch.arange(micro_rows * (length + 1), device=machine.device)
    tokens = numbers.view(micro_rows, length + 1) % model.shape.vocab_size
    times = [machine.now()]
    collector = Collector(twin_of(model))
    for _ in range(3):
        collector.batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), machine.dtype, config.recipe.isolate)
        times.append(machine.now())
    collector.finish(machine)
    start, *rest, end = np.diff([*times, machine.now()])
    usual, end = machine.largest(min(rest)), machine.largest(2 * float(end) + 0.05)
    return machine.largest(1.25 * batches * usual + max(start - usual, 0.0)) + end, end


def calibrate(
    model: RecurrentGPT, source: Iterator, config: Config, machine: Machine, seconds_left: Callable[[], float],
    end: float,
) -> tuple[dict[str, Sensitivity] | None, int]:  # fmt: skip
    """Sensitivities from the next batches of training text (the first micro-batch of each), and how many there were:
    fewer than asked for when time runs out; none, as if there had been none, when it ran out all the same."""
    collector = Collector(twin_of(model))
    slowest = 0.0
    for _ in range(config.pack.calibration_batches):
        left = seconds_left()
        if machine.largest(1.5 * slowest + end - left) > 0:
            break
        inputs, targets = next(source)[0]
        collector.batch(machine.given(inputs), machine.given(targets), machine.dtype, config.recipe.isolate)
        machine.now()
        slowest = max(slowest, left - seconds_left())
    found = collector.finish(machine) if collector.batches else None
    late = machine.largest(-seconds_left()) > 0
    return (None, 0) if late else (found, collector.batches)
