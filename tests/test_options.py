"""Each option of block and recipe does what it says, looks at nothing to come, and costs the bytes the shape lists."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval_bpb
from golf import pace
from golf.average import WeightAverage
from golf.block import document_bounds, exclude_own
from golf.config import Config
from golf.data import TokenStream, batches, coprime_stride
from golf.machine import Machine, accumulate
from golf.model import RecurrentGPT
from golf.objective import Objective
from golf.recipe import Recipe, kinds_of_steps
from golf.shape import BOS, Shape
from tests.conftest import TINY, run

SHAPE = Shape(vocab_size=64, width=32, heads=4, kv_heads=2, prelude=1, core=1, coda=1, loops=3)
OPTIONS = [
    {"activation": "leaky-relu2"},
    {"exclusive": True}, {"attn_gate": True}, {"smear": True}, {"lanes": True}, {"pass_scalars": True},
    {"activation": "leaky-relu2", "exclusive": True, "attn_gate": True,
     "smear": True, "pass_scalars": True, "lanes": True},
]  # fmt: skip


def model_of(**options: object) -> RecurrentGPT:
    """A model none of whose gates and signals is zero."""
    model = RecurrentGPT(replace(SHAPE, **options)).initialize(Recipe(), 1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.requires_grad_(False)


def tokens_of(length: int = 24) -> torch.Tensor:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 64, (2, length)))
    tokens[:, ::7] = BOS
    return tokens


@pytest.mark.parametrize("options", OPTIONS)
def test_no_option_looks_ahead(options):
    model, tokens = model_of(**options), tokens_of()
    before = model(tokens, dtype=torch.float64)
    for at in (1, 7, 8, 23):
        changed = tokens.clone()
        changed[:, at:] = (changed[:, at:] + 11) % 62 + 2
        after = model(changed, dtype=torch.float64)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at:], after[:, at:])


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_changes_the_function(options):
    plain, tokens = model_of(), tokens_of()
    model = model_of(**options)
    shared = {n: p for n, p in plain.named_parameters() if dict(model.named_parameters()).get(n, p).shape == p.shape}
    model.load_state_dict({n: p for n, p in shared.items() if n in dict(model.named_parameters())}, strict=False)
    assert not torch.allclose(model(tokens, dtype=torch.float64), plain(tokens, dtype=torch.float64))


def test_gates_start_as_nothing():
    tokens = tokens_of()
    plain = RecurrentGPT(SHAPE).initialize(Recipe(), 1)
    for option in ({"attn_gate": True}, {"smear": True}):
        model = RecurrentGPT(replace(SHAPE, **option)).initialize(Recipe(), 1)
        assert torch.equal(model(tokens), plain(tokens)), option


def test_smear_stops_at_documents():
    model, tokens = model_of(smear=True), tokens_of()
    found = torch.randn(2, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    added = model.smeared(tokens, found)
    assert (added[tokens == BOS] == 0).all() and (added[:, 0] == 0).all()
    gate, size = model.smear[0, 1:], model.smear[0, 0]
    for t in (1, 2, 5, 20):
        expected = size * torch.sigmoid(found[:, t, :12] @ gate)[:, None] * found[:, t - 1]
        assert torch.allclose(added[:, t], expected * (tokens[:, t] != BOS)[:, None])


@pytest.mark.parametrize("options", OPTIONS)
def test_within_documents_nothing_passes_from_one_to_the_next(options):
    model, tokens = model_of(**options), tokens_of()
    other = tokens.clone()
    other[:, 1:7] = (other[:, 1:7] + 11) % 62 + 2
    before, after = (model.hidden(t, torch.float64, isolate=True) for t in (tokens, other))
    assert torch.equal(before[:, 7:], after[:, 7:]) and not torch.equal(before[:, 1:7], after[:, 1:7])
    plain, changed = (model.hidden(t, torch.float64) for t in (tokens, other))
    assert not torch.equal(plain[:, 7:], changed[:, 7:])


@pytest.fixture(scope="module")
def variable_lengths_on_a_cpu():
    """torch has that kernel for GPUs only: here the operator itself, with its checks, gets a slow one."""
    from torch.nn.attention import varlen

    def documents(bounds, *rows):
        for begin, end in itertools.pairwise(bounds.tolist()):
            q, k, v, *rest = (row[begin:end].transpose(0, 1) for row in rows)  # (H, T, head)
            scores = q @ k.mT * q.size(-1) ** -0.5
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            yield q, k, v, torch.softmax(scores.masked_fill(ahead, -math.inf), dim=-1), *rest

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, bounds, bounds_k, max_q, max_k, is_causal, scale, window, *rest):
        assert is_causal and window == [-1, 0] and bounds is bounds_k
        y = torch.cat([(weight @ v).transpose(0, 1) for _, _, v, weight in documents(bounds, q, k, v)])
        return y, torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(gradient, q, k, v, out, lse, bounds, *rest):
        found = []
        for q_, k_, v_, weight, g in documents(bounds, q, k, v, gradient):
            slope = g @ v_.mT
            slope = weight * (slope - (slope * weight).sum(dim=-1, keepdim=True)) * q_.size(-1) ** -0.5
            found.append([y.transpose(0, 1) for y in (slope @ k_, slope.mT @ q_, weight.mT @ g)])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_documents_as_bounds_are_the_mask(variable_lengths_on_a_cpu, compiled):
    """Loss and gradients of both, also of every pass at once; a compiler takes any number of documents in one graph."""
    model = model_of().requires_grad_()
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager")

    def found(tokens, bounds: bool) -> torch.Tensor:
        given = model.enter(tokens, torch.float64, isolate=True)
        given = replace(given, seen=document_bounds(tokens)) if bounds else given
        copies = model.coda(torch.cat([model.prelude(given)] * 2), given.repeated(2))
        loss = (model.through(given) * torch.arange(32)).sum() + (copies * torch.arange(32)).square().mean()
        model.zero_grad()
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])

    tokens = tokens_of()
    other = tokens.clone()
    other[:, 3:20:3] = BOS
    assert document_bounds(tokens).tolist() == [0, 7, 14, 21, 24, 31, 38, 45, 48]
    torch.testing.assert_close(found(tokens, True), found(tokens, False), rtol=1e-9, atol=1e-9)
    with torch._dynamo.config.patch(error_on_recompile=compiled):
        many = found(other, True)
    torch.testing.assert_close(many, found(other, False), rtol=1e-9, atol=1e-9)


EVERY_OPTION = (
    ["--shape.exclusive", "--shape.attn-gate", "--shape.smear", "--shape.no-skips",
     "--shape.exit-gate", "hazard", "--recipe.depth-loss", "gate", "--scoring.exit", "gate",
     "--scoring.exit-threshold", "0.5"],
    ["--shape.lanes", "--shape.skips", "--shape.loop-scale", "--shape.no-pass-scalars", "--shape.activation", "relu2",
     "--scoring.isolate", "--scoring.stride", "16"],
    pytest.param(["--shape.no-skips", "--recipe.depth-loss", "each", "--scoring.exit", "entropy",
                  "--scoring.exit-threshold", "6"], marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("flags", EVERY_OPTION)
def test_the_referee_passes_a_model_with_every_option(corpus, tmp_path, flags):
    done = run("train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", tmp_path, "--run.max-steps", 4,
               "--recipe.loops-from", "0", "--pack.calibration-batches", 1, *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["valid"], verdict["invalid"]
    assert {c["number"] for c in verdict["checks"] if c["status"] == "passed"} >= {1, 2, 3, 4, 5, 6, 14, 15, 16}


def test_exclusive_attention_is_orthogonal_to_the_own_value():
    generator = torch.Generator().manual_seed(1)
    y, v = (torch.randn(2, n, 9, 8, dtype=torch.float64, generator=generator) for n in (4, 2))
    out = exclude_own(y, v)
    assert (out * v.repeat_interleave(2, dim=1)).sum(-1).abs().max() < 1e-12
    along = (y * F.normalize(v, dim=-1).repeat_interleave(2, dim=1)).sum(-1)
    assert torch.allclose(y.square().sum(-1) - along.square(), out.square().sum(-1))


def test_the_average_is_an_exponential_one():
    p = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage(torch.nn.ParameterList([p]), 0.1)
    steps = [n / 100 for n in range(1, 101)]
    found, last = np.zeros(3), 0.0
    for progress in steps:
        with torch.no_grad():
            p.fill_(progress**2)
        average.follow(progress)
        share = 1 - math.exp(-(progress - last) / min(0.1, progress))
        found, last = found + share * (progress**2 - found), progress
    average.install()
    assert p.detach().numpy() == pytest.approx(found, rel=1e-5)
    assert p[0] < 1.0
    untouched = torch.nn.Parameter(torch.ones(2))
    none = WeightAverage(torch.nn.ParameterList([untouched]), 0.0)
    none.follow(0.5)
    none.install()
    assert (untouched == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000))
def test_a_coprime_stride_visits_every_row(rows):
    stride = coprime_stride(rows)
    assert {n * stride % rows for n in range(rows)} == set(range(rows))


def test_strided_batches_see_all_rows_before_any_twice_and_can_begin_anywhere():
    stream = TokenStream([np.arange(1600, dtype=np.uint16)])
    source = batches(stream, 64, 16, "strided")
    first = [int(row[0]) for _ in range(25) for inputs, _ in next(source) for row in inputs]
    assert sorted(first) == list(range(0, 1600, 16))
    later = batches(stream, 64, 16, "strided", step=7)
    assert np.array_equal(next(later)[0][0][:, 0], first[28:32])


def test_schedules_name_every_graph_they_need():
    assert kinds_of_steps(SHAPE, Recipe(loops_from=0.6)) == [3, 1] and kinds_of_steps(SHAPE, Recipe()) == [3]
    taper = Recipe(matrix_decay=0.1, decay_taper=0.5)
    assert [taper.decay_at(p) for p in (0.0, 0.7, 1.0)] == pytest.approx([0.1, 0.1, 0.05])


def test_a_part_that_waits_for_the_repeats_has_a_gradient_of_zero():
    machine = Machine(torch.device("cpu"), torch.float32, "none")
    recipe = Recipe(depth_loss="gate")
    model = RecurrentGPT(replace(SHAPE, skips=False, exit_gate="hazard")).initialize(recipe, 1)
    tokens, objective = tokens_of().numpy(), Objective(Config(shape=model.shape, recipe=recipe))
    accumulate(model, [(tokens, tokens)], machine, 1, objective)
    assert (model.exit_weight.grad == 0).all()
    accumulate(model, [(tokens, tokens)], machine, 3, objective)
    assert all(p.grad is not None for p in model.parameters())


def test_passes_that_are_all_trained_count_as_work():
    shape = replace(SHAPE, skips=False)
    once = Config(shape=shape, recipe=Recipe(sequence_length=64, batch_tokens=256))
    each = replace(once, recipe=replace(once.recipe, depth_loss="each"))
    assert pace.layers_and_ends(once) == (5, 1) and pace.layers_and_ends(each) == (7, 3)
    assert pace.step_work(each)[2] == 3 * pace.step_work(once)[2]


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("activation", ["relu2", "leaky-relu2"])
def test_a_steps_flops_are_those_that_torch_counts(loops, activation):
    config = Config(shape=replace(SHAPE, activation=activation), recipe=Recipe(sequence_length=64, batch_tokens=256))
    model, rows = RecurrentGPT(config.shape).initialize(config.recipe, 1), torch.arange(256).view(4, 64) % 64
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model.head_loss(model.hidden(rows, torch.float32, loops), rows).backward()
    found = {kind.__name__: flops for kind, flops in counted.get_flop_counts()["Global"].items()}
    assert set(found) == {"mm", "bmm"}  # matrices, and attention over the whole square, of which half is needed
    assert found["mm"] + found["bmm"] // 2 == pace.step_flops(config, loops)


LEAK = '''


plain_exits = run_exits


class Leaking:
    """Each position's passes are those that the piece after it wants."""

    def __init__(self, depths):
        self.depths = depths

    def stops(self, look):
        return self.depths.gather(1, look.place) <= look.passed


def run_exits(model, tokens, rule, *more, **named):
    return plain_exits(model, tokens, Leaking(1 + 2 * (tokens.roll(-1, 1) % 2)), *more, **named)
'''


@pytest.mark.slow
def test_the_referee_catches_depths_that_the_future_decides(corpus, tmp_path):
    done = run("train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", tmp_path, "--run.max-steps", 20,
               "--shape.no-skips", "--recipe.loops-from", "0", "--recipe.depth-loss", "each", "--scoring.exit",
               "difference", "--scoring.exit-threshold", "0.3", "--pack.calibration-batches", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    code = (folder / "source" / "train_gpt.py").read_text()
    rule = "# == this file's own main"
    (folder / "train_gpt.py").write_text(code.replace(rule, LEAK + "\n\n" + rule, 1))
    verdict = eval_bpb.judge(folder, corpus, claims=False)
    failed = {c["number"] for c in verdict["checks"] if c["status"] == "failed"}
    assert not verdict["valid"] and failed & {1, 2}, verdict["invalid"]
