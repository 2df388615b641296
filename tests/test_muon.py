"""Muon against torch's own, its iterations against float64, and the rule of one optimiser a parameter."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import run
from torch import nn

from golf.model import RecurrentGPT
from golf.muon import POLAR_EXPRESS, QUINTIC, Muon, Optimizers, orthogonalize
from golf.recipe import Recipe
from golf.shape import Shape

SHAPES = [(64, 64), (32, 64), (128, 64), (64, 128)]


def recurrence(x: torch.Tensor, triples: tuple, steps: int, slack: float) -> torch.Tensor:
    """The iteration in float64 from its definition, through the singular values."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (x.double().norm() * slack)
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize(
    ("method", "triples", "slack"), [("quintic", QUINTIC, 1.0), ("polar-express", POLAR_EXPRESS, 1.02)]
)
@pytest.mark.parametrize("dims", SHAPES)
def test_iterations_equal_their_recurrence(method, triples, slack, dims):
    x = torch.randn(2, *dims, generator=torch.Generator().manual_seed(0))
    ours = orthogonalize(x.double(), method, 5, torch.float64)
    for i in range(2):
        torch.testing.assert_close(ours[i], recurrence(x[i], triples, 5, slack), rtol=1e-4, atol=1e-4)
    half = orthogonalize(x, method, 5, torch.bfloat16)
    cosine = torch.nn.functional.cosine_similarity(half.flatten().double(), ours.flatten(), dim=0)
    assert cosine > 0.999


def test_polar_express_brings_singular_values_closer_to_one_than_the_quintic():
    x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distance = {
        m: (torch.linalg.svdvals(orthogonalize(x, m, 5, torch.float64)) - 1).abs().max()
        for m in ("quintic", "polar-express")
    }
    assert distance["polar-express"] < distance["quintic"]


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_equal_torch_muon(dims, decay):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(dims, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([("blocks.0.query", ours)], Recipe(matrix_decay=decay))
    oracle = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=decay, adjust_lr_fn="original")
    for _ in range(4):
        gradient = torch.randn(dims, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        before_ours, before_theirs = ours.detach().clone(), theirs.detach().clone()
        muon.step(0.02, 0.9)
        oracle.step()
        a, b = (ours - before_ours).flatten(), (theirs - before_theirs).flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) >= 0.999
        assert (a.norm() / b.norm()).item() == pytest.approx(1, abs=0.02)


def test_row_normalisation_divides_rows_before_orthogonalising():
    gradient = torch.randn(48, 32, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 48)[:, None]
    p = nn.Parameter(torch.zeros(48, 32))
    p.grad = gradient.clone()
    Muon([("blocks.0.up", p)], Recipe(row_normalize=True)).step(1.0, 0.95, torch.float64)
    update = gradient.double() * (1 + 0.95)
    update /= update.norm(dim=1, keepdim=True)
    expected = -recurrence(update, QUINTIC, 5, 1.0) * (48 / 32) ** 0.5
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_every_parameter_has_exactly_one_optimizer():
    model = RecurrentGPT(Shape(vocab_size=64, width=16, heads=2, kv_heads=1, core=2, loops=2, pass_scalars=True))
    optimizers = Optimizers(model, Recipe())
    owned = [p for g in optimizers.muon.groups for p in g.parameters]
    owned += [p for g in optimizers.adam.param_groups for p in g["params"]]
    assert sorted(map(id, owned)) == sorted(id(p) for p in model.parameters())
    model.mystery = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="mystery"):
        Optimizers(model, Recipe())
    with pytest.raises(ValueError, match=r"blocks\.0\.query"):
        Muon([("blocks.0.query", nn.Parameter(torch.zeros(3)))], Recipe())


def test_adam_groups_follow_the_schedule():
    recipe = Recipe(warmdown=0.5, embed_rate=0.3, scalar_rate=0.1)
    model = RecurrentGPT(Shape(vocab_size=64, width=16, heads=2, kv_heads=1, core=1)).initialize(recipe, 0)
    optimizers = Optimizers(model, recipe)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.step(0.75)
    assert {g["kind"]: g["lr"] for g in optimizers.adam.param_groups} == pytest.approx({"embed": 0.15, "scalar": 0.05})


def test_clipping_bounds_the_norm_and_a_bad_gradient_shows():
    recipe = replace(Recipe(), clip_norm=1.0)
    model = RecurrentGPT(Shape(vocab_size=64, width=16, heads=2, kv_heads=1, core=1)).initialize(recipe, 0)
    optimizers = Optimizers(model, recipe)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert optimizers.gradient_norm() == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5, rel=1e-5)
    optimizers.step(0.0)
    assert optimizers.gradient_norm() == pytest.approx(1.0, rel=1e-3)
    model.embedding.grad[0, 0] = float("nan")
    assert not torch.isfinite(torch.tensor(optimizers.gradient_norm()))


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from golf.config import Recipe
from golf.model import RecurrentGPT
from golf.muon import Optimizers
from golf.overlap import optimizers_for
from golf.shape import Shape

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)  # no port to collide on
# An odd number of matrices of each shape.
shape = Shape(vocab_size=64, width=32, heads=4, kv_heads=2, prelude=1, core=1, coda=1, loops=2)
recipe = Recipe(clip_norm=0.5, newton_schulz="polar-express", row_normalize=True, matrix_decay=0.1)
models = [RecurrentGPT(shape).initialize(recipe, 3) for _ in range(2)]
both = [optimizers_for(model, recipe, overlap) for model, overlap in zip(models, (False, True))]
assert type(both[0]) is Optimizers and type(both[1]) is not Optimizers
for step in range(4):
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(10 * step + rank))
    norms = []
    for model, optimizers in zip(models, both):
        optimizers.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizers.reduce_gradients()
        norms.append(optimizers.gradient_norm())
        optimizers.step(step / 4)
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0], norms
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name} after step {step}: {text}")
if rank == 0:
    print("alike")
dist.destroy_process_group()
"""


def test_overlapped_optimizers_of_two_ranks_do_as_the_plain_ones(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda rank: run(script, rank, tmp_path / "meeting"), range(2)))
    assert [done.returncode for done in both] == [0, 0] and "alike" in both[0].stdout, both
