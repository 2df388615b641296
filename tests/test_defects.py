"""The twelve defects of published halting code, one test each: ours passes, and a planted version of the defect fails.

Where the mathematics is tested in depth, see test_halting.py, test_exits.py and test_gate.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_exits import SHAPE, model_of, tokens_of
from torch import Tensor

from golf import exits, halting
from golf.exits import run_exits
from golf.model import RecurrentGPT
from golf.objective import Objective
from golf.presets import PRESETS
from tests import naive_halting

LOOPS = SHAPE.loops
STOPS = torch.full((LOOPS, 1), 0.3, dtype=torch.float64)


def told_apart(check: Callable, ours: object, planted: object) -> None:
    """The check passes ours and fails the planted defect."""
    check(ours)
    with pytest.raises(AssertionError):
        check(planted)


def test_1_the_models_loss_reaches_the_gate():
    model, tokens = model_of(exit_gate="hazard").requires_grad_(), tokens_of()
    objective = Objective(replace(PRESETS["adaptive100m"], shape=model.shape))
    objective.begin(1.0)

    def check(loss: Callable[[], Tensor]) -> None:
        gradient = torch.autograd.grad(loss(), model.exit_weight, allow_unused=True)[0]
        assert gradient is not None and gradient.abs().max() > 0

    weighed = lambda: objective.loss(model, tokens, tokens.roll(-1, 1), torch.float64, LOOPS)  # noqa: E731
    last_state = lambda: model(tokens, tokens.roll(-1, 1), torch.float64)  # noqa: E731
    told_apart(check, weighed, last_state)


class MostHaveStopped:
    """The sketch's loop ends when nearly all tokens of the batch have halted."""

    def stops(self, look: exits.Look) -> Tensor:
        alone = exits.RandomDepth(0.4).stops(look)
        return torch.full_like(alone, bool(alone.double().mean() > 0.4))


def test_2_a_tokens_depth_is_its_own():
    model, tokens = model_of(), tokens_of(6)

    def check(rule: exits.Rule) -> None:
        together = run_exits(model, tokens, rule, torch.float64).depths
        alone = torch.cat([run_exits(model, row[None], rule, torch.float64).depths for row in tokens])
        assert torch.equal(together, alone)

    told_apart(check, exits.Entropy(3.4), MostHaveStopped())


def test_3_a_stopped_token_keeps_its_keys_and_values():
    model, tokens = model_of(), tokens_of()
    given = model.enter(tokens, torch.float64)

    def check(freezes: bool) -> None:
        x, kept = model.prelude(given), model.nothing_kept(given.start)
        running = torch.ones_like(tokens, dtype=torch.bool)
        for passed in range(1, LOOPS + 1):
            for bank in kept:
                bank.moves = running if freezes else torch.ones_like(running)
            old = [bank.keys.clone() for bank in kept]
            x = torch.where(running[..., None], model.core_pass(x, given, passed, kept), x)
            stopped = ~running[:, None, :, None]
            assert all(torch.equal(a * stopped, b.keys * stopped) for a, b in zip(old, kept, strict=True))
            running = running & (tokens % 3 != 0)  # a third stops after the first pass

    told_apart(check, True, False)


def graves(weights: Callable[[Tensor], Tensor]) -> None:
    """Chances of 0.3 after each of four passes weigh 0.3, 0.3, 0.3 and what is left."""
    torch.testing.assert_close(weights(STOPS)[:, 0], torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64))


def test_4_act_adds_chances_and_is_not_a_product_of_survivals():
    survivals = lambda stops: halting.exit_logprobs(stops.logit()[:-1]).exp()  # noqa: E731
    told_apart(graves, lambda stops: naive_halting.act_of_the_model(stops)[0], survivals)


def never_forced(stops: Tensor) -> Tensor:
    """Chances as weights, and no remainder when the cap is reached without a stop."""
    return stops.clone()


def test_5_the_remainder_is_given_at_the_cap():
    rarely = torch.full((LOOPS, 1), 0.05, dtype=torch.float64)

    def check(weights: Callable[[Tensor], Tensor]) -> None:
        assert weights(rarely).sum().item() == pytest.approx(1.0)

    told_apart(check, lambda stops: naive_halting.act_of_the_model(stops)[0], never_forced)


def blended(stops: Tensor) -> Tensor:
    """The new state blended with the old one by its chance: weights of a running convex mean."""
    weights = torch.zeros_like(stops)
    for at, stop in enumerate(stops):
        weights[: at + 1] *= 1 - stop
        weights[at] = stop
    return weights


def test_6_states_are_summed_and_not_blended():
    told_apart(graves, lambda stops: naive_halting.act_of_the_model(stops)[0], blended)


def test_7_the_penalty_has_a_gradient():
    bias = torch.zeros(LOOPS - 1, 1, requires_grad=True)

    def check(depth: Callable[[], Tensor]) -> None:
        found = depth()
        assert found.requires_grad and torch.autograd.grad(found.sum(), bias)[0].abs().min() > 0

    expected = lambda: halting.expected_depth(halting.exit_logprobs(bias))  # noqa: E731
    counted = lambda: naive_halting.quantile_exit(halting.exit_logprobs(bias), 0.5).float()  # noqa: E731
    told_apart(check, expected, counted)


def swapped(logprobs: Tensor, prior: Tensor) -> Tensor:
    """KL with its arguments the other way round, of a geometric prior that was cut and not normalised."""
    cut = 0.2 * 0.8 ** torch.arange(LOOPS)
    return F.kl_div(logprobs, cut[:, None].expand_as(logprobs), reduction="none").sum(dim=0)


def test_8_the_divergence_is_never_negative_and_zero_at_the_prior():
    prior = halting.prior_logprobs(LOOPS, 0.2)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.log_softmax(torch.randn(LOOPS, 200, generator=generator), dim=0)

    def check(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
        assert (divergence(drawn, prior) >= -1e-6).all()
        assert divergence(prior[:, None], prior).abs().item() < 1e-6

    told_apart(check, halting.divergence, swapped)


def aliased(stops: Tensor) -> Tensor:
    """ACT whose remainder is written into the buffer of the sum of chances."""
    total = remainder = torch.zeros_like(stops[0])
    weights = []
    for at, stop in enumerate(stops):
        ends = (total + stop >= 0.99) | (at == len(stops) - 1)
        weights.append(torch.where(ends, 1 - total, stop))
        total += weights[-1]
        remainder.copy_(torch.where(ends, 1 - total, remainder))
    return torch.stack(weights)


def test_9_no_buffer_is_another():
    def check(weights: Callable[[Tensor], Tensor]) -> None:
        stops = torch.tensor([[0.5, 0.2], [0.6, 0.2], [0.1, 0.2], [0.3, 0.2]], dtype=torch.float64)
        before = stops.clone()
        found = weights(stops)
        assert torch.equal(stops, before)
        torch.testing.assert_close(found, torch.tensor([[0.5, 0.2], [0.5, 0.2], [0, 0.2], [0, 0.4]]).double())

    told_apart(check, lambda stops: naive_halting.act_of_the_model(stops)[0], aliased)


class Untied(RecurrentGPT):
    """Each pass's blocks wrapped in copies of their own."""

    def __init__(self, shape):
        super().__init__(shape)
        self.copies = torch.nn.ModuleList(copy.deepcopy(self.blocks) for _ in range(shape.loops - 1))


def test_10_passes_share_their_weights():
    def check(kind: Callable) -> None:
        model = kind(SHAPE)
        assert sum(p.numel() for p in model.parameters()) == SHAPE.parameter_count
        pointers = {p.data_ptr() for p in model.parameters()}
        assert len(pointers) == len(SHAPE.parameters())

    told_apart(check, RecurrentGPT, Untied)


class TopOfTheRow:
    """The half of a row that is least sure goes on, chosen over the whole row."""

    def stops(self, look: exits.Look) -> Tensor:
        size = look.state.double().norm(dim=-1)
        return size > size.median(dim=1, keepdim=True).values


def test_11_no_depth_is_chosen_by_what_follows():
    model, tokens = model_of(), tokens_of()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % 62 + 2

    def check(rule: exits.Rule) -> None:
        before, after = (run_exits(model, t, rule, torch.float64) for t in (tokens, changed))
        assert torch.equal(before.depths[:, :20], after.depths[:, :20])
        torch.testing.assert_close(before.states[:, :20], after.states[:, :20])

    told_apart(check, exits.Entropy(3.4), TopOfTheRow())


def test_12_what_has_stopped_is_not_computed():
    model, tokens = model_of(), tokens_of()

    def check(gather: bool) -> None:
        found = run_exits(model, tokens, exits.RandomDepth(0.8), torch.float64, gather)
        assert sum(found.computed) < 0.7 * LOOPS * tokens.numel()
        assert found.depths.sum() <= sum(found.computed)

    told_apart(check, True, False)
