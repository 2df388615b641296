"""Tokens that stop by themselves: the gathered path against the whole one, and nothing that tells of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from golf import exits
from golf.config import Config
from golf.errors import UsageError
from golf.exits import run_exits
from golf.model import RecurrentGPT
from golf.objective import Objective
from golf.recipe import Recipe
from golf.shape import BOS, Shape

SHAPE = Shape(vocab_size=64, width=32, heads=4, kv_heads=2, prelude=1, core=2, coda=1, loops=4, skips=False)
OPTIONS = {
    "plain": {}, "whole stack": {"prelude": 0, "coda": 0}, "scalars a pass": {"pass_scalars": True},
    "others": {"smear": True, "attn_gate": True, "exclusive": True,
               "activation": "leaky-relu2"},
}  # fmt: skip
RULES = [
    exits.FixedDepth(2), exits.RandomDepth(0.4), exits.Entropy(3.4), exits.Margin(0.1), exits.Divergence(0.15),
    exits.Difference(0.3),
]  # fmt: skip


def model_of(**options: object) -> RecurrentGPT:
    model = RecurrentGPT(replace(SHAPE, **options)).initialize(Recipe(), 1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.requires_grad_(False)


def tokens_of(rows: int = 3, length: int = 40) -> torch.Tensor:
    tokens = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens[:, ::17] = BOS
    return tokens


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_fixed_depth_is_that_number_of_loops(name, depth):
    model, tokens = model_of(**OPTIONS[name]), tokens_of()
    for gather in (False, True):
        found = run_exits(model, tokens, exits.FixedDepth(depth), torch.float64, gather)
        torch.testing.assert_close(found.states, model.hidden(tokens, torch.float64, loops=depth))
        assert (found.depths == depth).all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_what_is_gathered_is_what_the_whole_would_be(name, rule):
    model, tokens = model_of(**OPTIONS[name]), tokens_of()
    whole, some = (run_exits(model, tokens, rule, torch.float64, gather) for gather in (False, True))
    assert torch.equal(whole.depths, some.depths)
    torch.testing.assert_close(whole.states, some.states)
    assert whole.computed[0] == tokens.numel() and sum(some.computed) <= sum(whole.computed)


def test_rules_stop_some_tokens_and_not_others():
    model, tokens = model_of(), tokens_of(8)
    for rule in RULES[1:]:
        depths = run_exits(model, tokens, rule, torch.float64).depths
        assert len(depths.unique()) > 1, rule
    stopped = (run_exits(model, tokens_of(40), exits.RandomDepth(0.4), torch.float64).depths == 1).double().mean()
    assert stopped.item() == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_neither_other_rows_nor_what_follows_moves_a_token(rule):
    model, tokens = model_of(), tokens_of()
    together = run_exits(model, tokens, rule, torch.float64)
    for row in range(len(tokens)):
        alone = run_exits(model, tokens[row : row + 1], rule, torch.float64)
        assert torch.equal(alone.depths[0], together.depths[row])
        torch.testing.assert_close(alone.states[0], together.states[row])
    for at in (1, 13, 39):
        changed = tokens.clone()
        changed[:, at:] = (changed[:, at:] + 7) % 62 + 2
        after = run_exits(model, changed, rule, torch.float64)
        assert torch.equal(after.depths[:, :at], together.depths[:, :at])
        torch.testing.assert_close(after.states[:, :at], together.states[:, :at])
        prefix = run_exits(model, tokens[:, :at], rule, torch.float64)
        assert torch.equal(prefix.depths, together.depths[:, :at])
        torch.testing.assert_close(prefix.states, together.states[:, :at])


class StopsTogether:
    """Defect 2: everyone stops once most have, so that a token's depth depends on others."""

    def stops(self, look: exits.Look) -> torch.Tensor:
        alone = exits.RandomDepth(0.4).stops(look)
        return torch.full_like(alone, bool(alone.double().mean() > 0.4))


def test_a_rule_that_looks_at_others_is_found_out():
    model, tokens = model_of(), tokens_of(6)
    together = run_exits(model, tokens, StopsTogether(), torch.float64).depths
    alone = torch.cat([run_exits(model, row[None], StopsTogether(), torch.float64).depths for row in tokens])
    assert not torch.equal(together, alone)


def test_keys_and_values_of_a_token_that_stopped_stay_bit_for_bit(monkeypatch):
    """Defect 3: elsewhere states and keys go on changing after the stop, and only the output is frozen."""
    model, tokens = model_of(), tokens_of()
    seen: list[tuple] = []
    plain = RecurrentGPT.core_pass

    def watched(model, x, given, passed, kept=None):
        out = plain(model, x, given, passed, kept)
        seen.append([(bank.keys.clone(), bank.values.clone()) for bank in kept])
        return out

    monkeypatch.setattr(RecurrentGPT, "core_pass", watched)
    for gather in (False, True):
        seen.clear()
        depths = run_exits(model, tokens, exits.RandomDepth(0.4), torch.float64, gather).depths
        assert len(seen) == SHAPE.loops
        for passed in range(1, SHAPE.loops):
            stopped = (depths <= passed)[:, None, :, None]
            for old, new in zip(seen[passed - 1], seen[passed], strict=True):
                for before, after in zip(old, new, strict=True):
                    assert torch.equal(before.where(stopped, 0.0 * before), after.where(stopped, 0.0 * after))
                    assert not torch.equal(before, after)


def test_weights_are_shared_and_computation_is_left_out():
    """Defects 10 and 12: a wrapper for each pass would untie weights, and masking alone computes everything."""
    model, tokens = model_of(), tokens_of()
    assert sum(p.numel() for p in model.parameters()) == replace(SHAPE, loops=1).parameter_count
    few = run_exits(model, tokens, exits.RandomDepth(0.8), torch.float64).computed
    assert sum(few[1:]) < 0.6 * len(few[1:]) * tokens.numel()


@pytest.mark.parametrize(("options", "said"), [
    ({"skips": True}, "no-skips"), ({"loops": 1}, "shape.loops"), ({"lanes": True}, "no-lanes"),
])  # fmt: skip
def test_shapes_that_cannot_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        run_exits(model_of(**options), tokens_of(), exits.FixedDepth(1), torch.float64)


@pytest.mark.parametrize(("name", "threshold", "said"), [
    ("gat", 0.5, "give one of fixed"), ("fixed", 5, "1 to 4"), ("fixed", 1.5, "1 to 4"), ("random", 1.1, "0 to 1"),
    ("entropy", -1, "--threshold -1"), ("margin", float("nan"), "0 to 1"),
])  # fmt: skip
def test_rules_that_are_none_are_refused(name, threshold, said):
    with pytest.raises(UsageError, match=said):
        exits.make_rule(name, threshold, SHAPE)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_pass_leads_to_what_that_many_loops_do(name):
    model, tokens = model_of(**OPTIONS[name]), tokens_of()
    states, found = model.each(tokens, torch.float64)
    assert found.shape == (SHAPE.loops, *tokens.shape, SHAPE.width)
    for loops, states in enumerate(found, 1):
        torch.testing.assert_close(states, model.hidden(tokens, torch.float64, loops))
    targets = tokens.roll(-1, 1)
    losses = [model.head_loss(states, targets) for states in found]
    objective = Objective(Config(shape=model.shape, recipe=Recipe(depth_loss="each")))
    torch.testing.assert_close(objective.loss(model, tokens, targets, torch.float64, 4), torch.stack(losses).mean())


@pytest.mark.parametrize("rule", [
    exits.Difference(0.5), exits.Gate(0.5),
    *(pytest.param(rule, marks=pytest.mark.slow) for rule in (
        exits.Entropy(3.4), exits.Margin(0.1), exits.Divergence(0.15), exits.RandomDepth(0.4), exits.FixedDepth(2))),
], ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_in_float32_hardly_a_token_changes_its_depth_and_scores_agree(rule):
    """Products are summed in another order when gathered, or in a batch of another size: a token that stands at the
    threshold may fall to either side, which moves those after it; all before it score the same."""
    gate = {"exit_gate": "hazard"} if isinstance(rule, exits.Gate) else {}
    model, tokens = model_of(**gate).float(), tokens_of(rows=256, length=64)
    targets = tokens.roll(-1, 1)
    whole, some = (run_exits(model, tokens, rule, torch.float32, gather) for gather in (False, True))
    alone = [run_exits(model, row[None], rule, torch.float32) for row in tokens[:16]]
    assert 1 < whole.depths.double().mean() < SHAPE.loops
    nats = model.head_losses(whole.states, targets)[1]
    for count, depths, states in (
        (256, some.depths, some.states),
        (16, torch.cat([a.depths for a in alone]), torch.cat([a.states for a in alone])),
    ):  # fmt: skip
        moved = whole.depths[:count] != depths
        assert moved.sum() <= 1e-4 * moved.numel(), moved.sum()
        before = moved.cumsum(dim=1) == 0
        other = model.head_losses(states, targets[:count])[1]
        assert (nats[:count] - other).abs()[before].max() <= 1e-4
    assert all(n % (tokens.numel() // exits.SIZES) == 0 for n in some.computed)  # eight static sizes at most
