"""Timing training steps on this machine, for budget.py's predictions."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from golf.config import Config
from golf.journal import processor
from golf.machine import accumulate, compile_model, set_up, warm_up
from golf.model import RecurrentGPT
from golf.muon import Optimizers
from golf.objective import Objective
from golf.plan import work_of
from golf.presets import PRESETS
from golf.recipe import Run, kinds_of_steps


class Stepper:
    """A model, warmed up and ready to take training steps on random tokens."""

    def __init__(self, config: Config):
        self.config, self.machine = config, set_up(config)
        self.model = RecurrentGPT(config.shape).initialize(config.recipe, 1).to(self.machine.device)
        self.optimizers = Optimizers(self.model, config.recipe, self.machine.dtype)
        self.objective = Objective(config)
        self.rows = config.recipe.batch_tokens // config.recipe.sequence_length // self.machine.world
        self.generator = np.random.default_rng(0)
        began = self.machine.now()
        compile_model(self.model, self.machine.compile)
        warm_up(self.model, self.optimizers, config, self.machine, self.rows)
        self.warm_up_seconds = self.machine.now() - began

    def step(self, loops: int | None = None) -> float:
        """Seconds of one step: with all its loops, or as said."""
        length = self.config.recipe.sequence_length
        tokens = self.generator.integers(0, self.config.shape.vocab_size, (self.rows, length + 1))
        began = self.machine.now()
        self.take([(tokens[:, :-1].copy(), tokens[:, 1:].copy())], loops)
        return self.machine.now() - began

    def take(self, micro: list, loops: int | None = None) -> None:
        """One step on a batch's micro-batches."""
        self.optimizers.zero_grad()
        accumulate(self.model, micro, self.machine, loops or self.config.shape.loops, self.objective)
        self.optimizers.reduce_gradients()
        self.optimizers.gradient_norm()
        self.optimizers.step(0.5)


def step_time(config: Config, steps: int = 5) -> float:
    """Median seconds of a training step, warm-up left out."""
    torch._dynamo.reset()
    stepper = Stepper(config)
    return sorted(stepper.step() for _ in range(steps))[steps // 2]


def paces(configs: dict[str, Config], rounds: int = 25) -> dict[str, str]:
    """For each configuration what --run.pace says of it here: median milliseconds of each kind of step, all kinds of
    all configurations in turn, so that a machine that changes its pace hits them alike. Those that compute the same
    share one measurement."""
    torch._dynamo.reset()
    keys = {name: work_of(config) for name, config in configs.items()}
    steppers: dict[str, Stepper] = {}
    kinds: dict[str, set[int]] = {}
    for name, config in configs.items():
        if keys[name] not in steppers:
            steppers[keys[name]] = Stepper(config)
        kinds.setdefault(keys[name], set()).update(kinds_of_steps(config.shape, config.recipe))
    for key, stepper in steppers.items():
        for loops in kinds[key]:
            stepper.step(loops)  # compiled where the first of them did not need it
    took: dict[tuple, list[float]] = {}
    for _ in range(rounds):
        for key, stepper in steppers.items():
            for loops in kinds[key]:
                took.setdefault((key, loops), []).append(stepper.step(loops))
    return {
        name: ",".join(
            f"{loops}={1e3 * statistics.median(took[keys[name], loops]):.1f}"
            for loops in kinds_of_steps(c.shape, c.recipe)
        )
        for name, c in configs.items()
    }


def measure_machine() -> dict:
    """Step times of small shapes with the default number type and in float32, and what the machine is."""
    samples: dict[str, list[tuple[Config, float]]] = {}
    for kind, names, run in (
        ("fast", ("laptop", "laptop_flat", "smoke", "laptop_naive"), Run()),
        ("float32", ("laptop_naive", "laptop_flat", "smoke", "laptop"), Run(dtype="float32")),
    ):
        for name in names:
            config = replace(PRESETS[name], run=run)
            samples.setdefault(kind, []).append((config, step_time(config)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d"), "memory_gb": round(memory, 1), "samples": samples,
    }  # fmt: skip


def fit(samples: list[tuple[float, ...]]) -> list[float]:
    """Non-negative seconds for each unit of work that explain the steps best, relative to each step.

    A sample is the step's amounts of work and then its seconds.
    """
    from scipy.optimize import nnls

    rows = np.array(samples)
    work, seconds = rows[:, :-1], rows[:, -1:]
    scale = work.max(axis=0)
    solution, _ = nnls(work / scale / seconds, np.ones(len(rows)))
    return [float(v) for v in solution / scale]
