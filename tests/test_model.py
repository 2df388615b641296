"""The model against a plain reference, and what sharing must keep true."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from golf import loss
from golf.block import causal_attention
from golf.machine import compile_model, missing_for_compile
from golf.model import RecurrentGPT, role_of
from golf.presets import PRESETS
from golf.recipe import Recipe
from golf.shape import Shape

SHAPE = Shape(vocab_size=97, width=32, heads=4, kv_heads=2, prelude=1, core=2, coda=1, loops=3)


def randomized(shape: Shape, seed: int = 0) -> RecurrentGPT:
    """A model none of whose parameters is at a value that hides a mistake."""
    model = RecurrentGPT(shape).initialize(Recipe(), seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def reference(model: RecurrentGPT, tokens: torch.Tensor, loops: int) -> torch.Tensor:
    """Logits by loops over positions and heads, written from the definition."""
    shape, weights = model.shape, dict(model.named_parameters())
    length = tokens.numel()

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def rope(x):  # (T, head)
        half = x.size(-1) // 2
        out = torch.empty_like(x)
        for t in range(length):
            for i in range(half):
                angle = t * shape.rope_base ** (-i / half)
                a, b = x[t, i], x[t, i + half]
                out[t, i] = a * math.cos(angle) + b * math.sin(angle)
                out[t, i + half] = b * math.cos(angle) - a * math.sin(angle)
        return out

    def attention(block, x, gain):
        q, k, v = (x @ weights[f"blocks.{block}.{n}"].T for n in ("query", "key", "value"))
        heads = []
        for h in range(shape.heads):
            size, group = shape.head_size, h // (shape.heads // shape.kv_heads)
            mine, shared = slice(h * size, (h + 1) * size), slice(group * size, (group + 1) * size)
            qh, kh = rope(rms(q[:, mine])) * gain[h], rope(rms(k[:, shared]))
            rows = []
            for t in range(length):
                p = torch.softmax(kh[: t + 1] @ qh[t] / math.sqrt(size), 0)
                rows.append(p @ v[: t + 1, shared])
            heads.append(torch.stack(rows))
        return torch.cat(heads, -1) @ weights[f"blocks.{block}.out"].T

    core = list(range(shape.prelude, shape.prelude + shape.core))
    order = [*range(shape.prelude), *core * loops, *range(shape.prelude + shape.core, shape.unique_layers)]
    x = x0 = rms(model.embedding[tokens])
    pushed = []
    for layer, block in enumerate(order):
        row = block
        if shape.pass_scalars and block >= shape.prelude:  # the row of a block and pass, loops or not
            last = block >= shape.prelude + shape.core
            row = block + (shape.loops - 1 if last else order[:layer].count(block)) * shape.core
        if shape.skips and layer < len(order) // 2:
            push = True
        else:
            push = False
            if shape.skips and pushed:
                x = x + model.skip_weight[shape.skip_rows[row]] * pushed.pop()
        x = model.resid_mix[row][0] * x + model.resid_mix[row][1] * x0
        x = x + model.attn_scale[row] * attention(block, rms(x), model.qk_gain[row])
        hidden = (rms(x) @ weights[f"blocks.{block}.up"].T).clamp(min=0) ** 2
        x = x + model.mlp_scale[row] * (hidden @ weights[f"blocks.{block}.down"].T)
        if push:
            pushed.append(x)
    logits = rms(x) @ model.embedding.T
    return shape.softcap * torch.tanh(logits / shape.softcap)


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("pass_scalars", [False, True])
@pytest.mark.parametrize("skips", [True, False])
def test_logits_equal_the_reference(loops, pass_scalars, skips):
    model = randomized(replace(SHAPE, pass_scalars=pass_scalars, skips=skips))
    tokens = torch.randint(0, 97, (7,), generator=torch.Generator().manual_seed(3))
    ours = model(tokens[None], dtype=torch.float64, loops=loops)[0]
    # The head returns float32.
    torch.testing.assert_close(ours.double(), reference(model, tokens, loops), rtol=1e-5, atol=1e-5)


def test_two_block_core_stands_on_both_sides_of_the_hinge():
    shape = Shape(vocab_size=97, width=32, heads=4, kv_heads=2, core=3, loops=3)
    pushes = set(shape.order()[: shape.skip_layers().start])
    pops = {shape.order()[layer] for layer in shape.skip_layers()}
    assert pushes & pops  # a block that pushes in one pass and pops in another
    model = randomized(shape)
    tokens = torch.randint(0, 97, (6,), generator=torch.Generator().manual_seed(3))
    ours = model(tokens[None], dtype=torch.float64)[0]
    torch.testing.assert_close(ours.double(), reference(model, tokens, 3), rtol=1e-5, atol=1e-5)


def test_no_logit_moves_when_a_later_token_does():
    model = randomized(SHAPE)
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    a, b = model(tokens, dtype=torch.float64), model(changed, dtype=torch.float64)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


def test_shared_blocks_are_one_tensor_with_the_gradients_of_all_passes():
    looped = randomized(Shape(vocab_size=61, width=16, heads=2, kv_heads=1, core=2, loops=3, skips=False))
    flat = randomized(Shape(vocab_size=61, width=16, heads=2, kv_heads=1, core=6, skips=False))
    with torch.no_grad():
        for name, p in flat.named_parameters():
            if name.startswith("blocks."):
                _, index, part = name.split(".")
                p.copy_(dict(looped.named_parameters())[f"blocks.{int(index) % 2}.{part}"])
            elif name == "embedding":
                p.copy_(looped.embedding)
            else:
                p.copy_(dict(looped.named_parameters())[name].repeat(3, *[1] * (p.ndim - 1)))
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    for model in (looped, flat):
        model(tokens[:, :-1], tokens[:, 1:], dtype=torch.float64).backward()
    for index in range(2):
        for part in ("query", "down"):
            own = dict(looped.named_parameters())[f"blocks.{index}.{part}"].grad
            parts = [dict(flat.named_parameters())[f"blocks.{i}.{part}"].grad for i in range(index, 6, 2)]
            torch.testing.assert_close(own, sum(parts), rtol=1e-4, atol=1e-7)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = randomized(SHAPE)
    tokens = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(2))
    logits = model(tokens[:, :-1], dtype=torch.float64)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert model(tokens[:, :-1], tokens[:, 1:], dtype=torch.float64).item() == pytest.approx(expected.item())


def test_start_is_the_same_for_a_seed_and_near_uniform():
    a, b = (RecurrentGPT(SHAPE).initialize(Recipe(), seed=4) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    tokens = torch.randint(0, 97, (2, 33))
    assert a(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(97), abs=0.05)
    assert a.embedding.std().item() == pytest.approx(0.005, rel=0.1)
    assert a.blocks[0].out.abs().max() == 0 == a.blocks[0].down.abs().max()


def test_a_parameter_without_a_role_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0\.mystery"):
        role_of("blocks.0.mystery")
    model = RecurrentGPT(SHAPE)
    model.mystery = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="mystery"):
        model.initialize(Recipe(), 0)


@pytest.mark.parametrize("loops", [2, 3, 4])
def test_every_shape_runs_at_every_number_of_loops(loops):
    tokens = torch.randint(0, 97, (1, 5), generator=torch.Generator().manual_seed(2))
    for prelude, core, coda in ((3, 3, 5), (0, 1, 0), (5, 1, 0), (1, 2, 0)):
        for pass_scalars in (False, True):
            shape = replace(SHAPE, prelude=prelude, core=core, coda=coda, loops=loops, pass_scalars=pass_scalars)
            model = randomized(shape)
            for n in (1, 2, 3, 5):
                assert model(tokens, dtype=torch.float64, loops=n).isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compile()), reason="nothing to compile with")
@pytest.mark.parametrize("length", [64, 200])
def test_short_rows_attend_alike_compiled_and_not(length):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 16, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)
    )
    torch._dynamo.reset()
    results = []
    for attend in (torch.compile(causal_attention, fullgraph=True), causal_attention):
        y = attend(q, k, v)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    exact = [y, *torch.autograd.grad(y.square().sum(), exact)]
    for ours, plain, true in zip(*results, exact, strict=True):
        errors = [float((found.double() - true).norm() / true.norm()) for found in (ours.detach(), plain.detach())]
        assert errors[0] <= 2.5 * errors[1], errors


def test_more_loops_add_no_parameters():
    assert SHAPE.parameter_count == replace(SHAPE, loops=2).parameter_count == replace(SHAPE, loops=9).parameter_count


@pytest.mark.skipif(bool(missing_for_compile()), reason="nothing to compile with")
@pytest.mark.parametrize("mode", ["block", pytest.param("model", marks=pytest.mark.slow)])
def test_compiled_losses_and_gradients_are_the_eager_ones(mode):
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(2))
    found = []
    for compiled in ("none", mode):
        torch._dynamo.reset()
        model = RecurrentGPT(SHAPE).initialize(Recipe(), 0)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        compile_model(model, compiled)
        losses = []
        for loops in (1, 3):
            loss = model(tokens[:, :-1], tokens[:, 1:], loops=loops)
            loss.backward()
            losses.append(loss.item())
        found.append((losses, [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for eager, compiled in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compile()), reason="nothing to compile with")
@pytest.mark.parametrize("loops", [1, 4])
@pytest.mark.parametrize("gate", ["act", "hazard"])
def test_gradients_through_compiled_passes_in_bfloat16_are_the_eager_ones(gate, loops):
    """Keys that leave a block to be kept had gradients that were not numbers, at this head size and in this type."""
    shape = replace(PRESETS["laptop"].shape, loops=4, skips=False, exit_gate=gate, vocab_size=97)
    tokens = torch.randint(0, 97, (2, 256), generator=torch.Generator().manual_seed(2))
    found = []
    for compiled in ("none", "block"):
        torch._dynamo.reset()
        model = RecurrentGPT(shape).initialize(Recipe(), 0)
        compile_model(model, compiled)
        model.hidden(tokens, torch.bfloat16, loops).float()[..., :5].sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, eager in found[0].items():
        compiled = found[1][name]
        assert compiled.isfinite().all(), name
        assert F.cosine_similarity(compiled.flatten(), eager.flatten(), dim=0) > 0.99 or not eager.any(), name


@pytest.mark.parametrize(("cap", "compiled"), [(15.0, False), (30.0, False), (30.0, True), (100.0, False), (1e9, True)])
def test_capped_cross_entropy_is_that_of_the_capped_logits(cap, compiled, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 64)  # 150 positions in three pieces
    torch.manual_seed(0)
    x = torch.randn(3, 50, 32, requires_grad=True)
    weight, targets = (2 * torch.randn(77, 32)).requires_grad_(), torch.randint(0, 77, (3, 50))
    bent = cap * torch.tanh(F.linear(x.double(), weight.double()) / cap)
    wanted = F.cross_entropy(bent.flatten(0, 1), targets.flatten())
    part = torch.compile(loss.part_loss, dynamic=False) if compiled else loss.part_loss
    found, losses = loss.capped_cross_entropy(x, weight, targets, cap, part)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * wanted, (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(loss.capped_cross_entropy(x, weight, targets, cap)[0].double(), wanted)
    torch.testing.assert_close(losses.mean(), found)


@pytest.mark.parametrize("compiled", [False, True])
def test_shares_weigh_losses_and_learn_from_them(compiled):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 50, 32, requires_grad=True), (2 * torch.randn(77, 32)).requires_grad_()
    shares, targets = torch.rand(3, 50, requires_grad=True), torch.randint(0, 77, (3, 50))
    bent = 30 * torch.tanh(F.linear(x, weight) / 30)
    each = F.cross_entropy(bent.flatten(0, 1), targets.flatten(), reduction="none").view(3, 50)
    part = torch.compile(loss.part_loss, dynamic=False) if compiled else loss.part_loss
    found, losses = loss.capped_cross_entropy(x, weight, targets, 30.0, part, shares)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-5, atol=1e-6)
    inputs = (x, weight, shares)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad((each * shares).mean(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(loss.capped_cross_entropy(x, weight, targets, 30.0, shares=shares)[0], found)


@pytest.mark.parametrize("length", [24, pytest.param(96, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("steep", [1.0, 4.0])
def test_short_rows_by_plain_products_are_the_attention_they_stand_for(length, steep):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16, requires_grad=True) for heads in (4, 2, 2))
    wanted = F.scaled_dot_product_attention(steep * q, k, v, is_causal=True, enable_gqa=True)
    found = torch.compile(causal_attention)(steep * q, k, v)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    probe = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), probe), torch.autograd.grad(wanted, (q, k, v), probe), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    steeper = torch.compile(causal_attention)(1e4 * q, k, v)
    assert steeper.isfinite().all()
