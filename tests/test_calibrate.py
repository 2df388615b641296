"""Sensitivities from real gradients, and noise that leaves nothing behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from golf.calibrate import Collector, twin_of
from golf.config import Config
from golf.errors import UsageError
from golf.machine import Machine
from golf.model import RecurrentGPT
from golf.noise import GridNoise
from golf.recipe import Pack, Recipe, Run
from golf.shape import Shape, tensor_class

SHAPE = Shape(vocab_size=64, width=16, heads=2, kv_heads=1, prelude=1, core=1, coda=1, loops=3)
MACHINE = Machine(torch.device("cpu"), torch.float32, "none")


@pytest.fixture
def model() -> RecurrentGPT:
    found = RecurrentGPT(SHAPE).initialize(Recipe(embed_std=0.5), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return found


def tokens(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, 64, (rows, 25), generator=torch.Generator().manual_seed(3))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


class Products(Collector):
    """Sums the products of inputs and gradients instead: they must be the parameters' own gradients."""

    def add(self, name, x, gradient):
        found = gradient.flatten(0, -2).mT @ x.flatten(0, -2)
        self.products = {**getattr(self, "products", {})}
        self.products[name] = self.products.get(name, 0) + found
        self.calls = [*getattr(self, "calls", []), name]

    def add_lookup(self, at, gradient):
        found = torch.zeros(64, 16).index_add_(0, at.flatten(), gradient.flatten(0, -2))
        self.products = {**getattr(self, "products", {})}
        self.products["embedding"] = self.products.get("embedding", 0) + found


def test_every_use_of_every_matrix_is_seen(model):
    collector = Products(model)
    inputs, targets = tokens(3)
    model(inputs, targets).backward()
    for name, p in model.named_parameters():
        if tensor_class(name) != "control":
            assert torch.allclose(collector.products[name], p.grad, atol=1e-6), name
    assert collector.calls.count("blocks.1.up") == 3 and collector.calls.count("blocks.0.up") == 1


def test_sensitivities_do_not_depend_on_how_the_rows_are_batched(model):
    inputs, targets = tokens(4)
    found = []
    for size in (4, 2, 1):
        collector = Collector(twin_of(model))
        for at in range(0, 4, size):
            collector.batch(inputs[at : at + size], targets[at : at + size], torch.float32)
        found.append(collector.finish(MACHINE))
    for name, one in found[0].items():
        for other in found[1:]:
            assert np.allclose(one.hessian, other[name].hessian, rtol=1e-3, atol=1e-9), name
            assert np.allclose(one.rows, other[name].rows, rtol=1e-3)
        assert np.allclose(one.hessian, one.hessian.T) and np.linalg.eigvalsh(one.hessian).min() > -1e-9
        assert one.rows.mean() == pytest.approx(1.0)


def test_the_sum_is_the_definition(model):
    inputs, targets = tokens(2)
    seen = []
    model.blocks[1].tap = lambda role, x, y: (y.retain_grad(), seen.append((x.detach(), y))) if role == "down" else None
    model(inputs, targets).backward()
    model.blocks[1].tap = None
    count = inputs.numel()
    expected = np.zeros((32, 32))
    for x, y in seen:  # three passes
        for x_t, g_t in zip(
            x.flatten(0, 1).double().numpy(), y.grad.flatten(0, 1).double().numpy() * count, strict=True
        ):
            expected += (g_t @ g_t / 16) * np.outer(x_t, x_t) / count
    assert len(seen) == 3
    collector = Collector(twin_of(model))
    collector.batch(inputs, targets, torch.float32)
    assert np.allclose(collector.finish(MACHINE)["blocks.1.down"].hessian, expected, rtol=1e-4, atol=1e-12)


def test_taps_are_taken_off_and_weights_stay(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    collector = Collector(model)
    collector.batch(*tokens(2), torch.float32)
    collector.finish(MACHINE)
    assert model.tap is None and all(block.tap is None for block in model.blocks)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def config_with(**recipe) -> Config:
    return Config(shape=SHAPE, recipe=Recipe(**recipe), pack=Pack(0.5, 0.5), run=Run())


@pytest.mark.parametrize("kind", ["uniform", "straight-through"])
def test_noise_is_of_the_grids_size_in_shared_blocks_only_and_leaves_nothing(model, kind):
    noise = GridNoise(model, config_with(grid_noise=kind, noise_from=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with noise.added(0.4):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with noise.added(0.6):
        moved = {n: (p.detach() - before[n]) for n, p in model.named_parameters()}
    for name, change in moved.items():
        if name.startswith("blocks.1."):
            step = 0.5 * before[name].std(dim=1, keepdim=True)
            assert (change.abs() <= 0.5001 * step).all()
            assert change.std() == pytest.approx(float(step.mean()) / 12**0.5, rel=0.2)
        else:
            assert not change.any(), name
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_noise_without_a_step_is_refused():
    config = config_with(grid_noise="uniform")
    assert config.check()
    with pytest.raises(UsageError, match="--recipe.noise-step"):
        replace(config, pack=Pack()).check()
