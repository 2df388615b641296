"""The mathematics of exits against definitions, a checked reference where it is at hand, and mistakes others made."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf import halting
from tests import naive_halting

LOOPS = 4


def hazards_of(seed: int, loops: int = LOOPS) -> torch.Tensor:
    return 2 * torch.randn(loops - 1, 3, 5, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_exits_sum_to_one_and_follow_the_product_of_survivals(seed, loops):
    hazards = hazards_of(seed, loops)
    found = halting.exit_logprobs(hazards).exp()
    torch.testing.assert_close(found.sum(0), torch.ones(3, 5))
    stop, alive = torch.sigmoid(hazards.double()), torch.ones(3, 5, dtype=torch.float64)
    for t in range(loops):
        chance = stop[t] if t < loops - 1 else torch.ones_like(alive)
        torch.testing.assert_close(found[t].double(), chance * alive, rtol=1e-4, atol=1e-6)
        alive = alive * (1 - chance)


@pytest.mark.parametrize("loops", [2, 3, 4, 8])
def test_a_gate_that_starts_at_its_biases_is_exactly_uniform(loops):
    hazards = torch.tensor(halting.prior_biases(loops))[:, None].expand(-1, 6)
    logprobs = halting.exit_logprobs(hazards)
    torch.testing.assert_close(logprobs.exp(), torch.full((loops, 6), 1 / loops))
    torch.testing.assert_close(halting.expected_depth(logprobs), torch.full((6,), (loops + 1) / 2))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_divergence_is_never_negative_and_zero_at_the_prior(seed, geometric):
    prior = halting.prior_logprobs(LOOPS, geometric)
    assert prior.exp().sum().item() == pytest.approx(1)
    assert (halting.divergence(halting.exit_logprobs(hazards_of(seed)), prior) >= -1e-6).all()
    torch.testing.assert_close(halting.divergence(prior[:, None], prior), torch.zeros(1), rtol=0, atol=1e-6)


def test_a_divergence_the_other_way_round_from_a_prior_that_was_cut_would_be_negative():
    """Defect 8: a geometric prior's first exits sum to 0.59, and the wrong way round its own match scores -0.31."""
    cut = torch.tensor([0.2 * 0.8**t for t in range(LOOPS)])
    exits = (cut / cut.sum()).log()
    assert (cut * (cut.log() - exits)).sum().item() == pytest.approx(float(cut.sum() * cut.sum().log()), abs=1e-6)
    assert cut.sum().log() < 0
    prior = halting.prior_logprobs(LOOPS, 0.2)
    torch.testing.assert_close(prior, exits)
    assert abs(halting.divergence(exits[:, None], prior).item()) < 1e-6


def test_loss_and_penalty_reach_the_gate():
    """Defects 1 and 7: a last state gives the gate no gradient, a count of steps gives the penalty none."""
    hazards = hazards_of(0).requires_grad_()
    logprobs = halting.exit_logprobs(hazards)
    depth = halting.expected_depth(logprobs).mean()
    for value in (naive_halting.expected_loss(torch.rand(LOOPS, 3, 5), logprobs).mean(), depth):
        (gradient,) = torch.autograd.grad(value, hazards, retain_graph=True)
        assert gradient.abs().min() > 0
    (gradient,) = torch.autograd.grad(depth, hazards)
    assert (gradient < 0).all()  # a larger hazard is a smaller depth


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_act_weights_are_graves_and_sum_to_one(seed, largest):
    stops = largest * torch.rand(LOOPS, 40, generator=torch.Generator().manual_seed(seed))
    weights, passes, remainder = naive_halting.act_of_the_model(stops)
    for ours, naive in zip((weights, passes, remainder), naive_halting.act(stops), strict=True):
        torch.testing.assert_close(ours, naive.to(ours.dtype), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(0), torch.ones(40))
    for token in range(40):
        total = 0.0
        for t in range(LOOPS):
            last = t == LOOPS - 1 or total + stops[t, token].item() >= 0.99
            expected = 1 - total if last else stops[t, token].item()
            assert weights[t, token].item() == pytest.approx(expected, abs=1e-5)
            total += expected
            if last:
                assert passes[token] == t + 1 and remainder[token].item() == pytest.approx(expected, abs=1e-5)
                assert (weights[t + 1 :, token] == 0).all()
                break


def test_act_is_forced_to_stop_at_the_cap():
    """Defect 5: with chances of 0.05 and no forced stop the weights sum to 0.2."""
    stops = torch.full((LOOPS, 7), 0.05)
    assert stops.sum(0).max() < 0.21
    weights, passes, _ = naive_halting.act_of_the_model(stops)
    torch.testing.assert_close(weights.sum(0), torch.ones(7))
    assert (passes == LOOPS).all()


def test_act_adds_chances_and_is_no_convex_blend():
    """Defect 6: blending gives 0.13, 0.19, 0.27, 0.10 where Graves has 0.3, 0.3, 0.3, 0.1; defect 4: nor survivals."""
    weights, _, _ = naive_halting.act_of_the_model(torch.full((LOOPS, 1), 0.3))
    assert weights[:, 0].tolist() == pytest.approx([0.3, 0.3, 0.3, 0.1], abs=1e-6)


def test_act_trains_through_the_remainder():
    stops = torch.full((LOOPS, 3), 0.3, requires_grad=True)
    _, passes, remainder = naive_halting.act_of_the_model(stops)
    (passes + remainder).sum().backward()
    assert (stops.grad[:3] == -1).all() and (stops.grad[3] == 0).all()


def test_the_second_stage_goes_on_where_the_next_pass_helps():
    hazards = torch.zeros(LOOPS - 1, 1, 1, requires_grad=True)
    halting.gate_loss(torch.tensor([3.0, 2.0, 2.0, 2.0]).view(LOOPS, 1, 1), hazards).backward()
    assert hazards.grad[0] > 0 and (hazards.grad[1:] < 0).all()


def test_a_quantile_is_a_depth_from_one_to_the_cap():
    logprobs = halting.exit_logprobs(hazards_of(3))
    depths = [naive_halting.quantile_exit(logprobs, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert (depths[0] == 1).all() and depths[-1].max() <= LOOPS
    assert all((a <= b).all() for a, b in itertools.pairwise(depths))


def test_all_of_it_agrees_with_a_checked_reference(yardstick):
    path = yardstick.parent / "reference" / "halting_reference.py"
    if not path.is_file():
        pytest.skip("the reference is not beside the yardstick's text")
    spec = importlib.util.spec_from_file_location("halting_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    hazards, losses = hazards_of(7), torch.rand(LOOPS, 3, 5)
    logprobs = halting.exit_logprobs(hazards)
    torch.testing.assert_close(logprobs, reference.exit_dist(hazards))
    assert halting.prior_biases(LOOPS) == pytest.approx(reference.uniform_bias(LOOPS))
    apart = halting.divergence(logprobs, halting.prior_logprobs(LOOPS)).mean()
    ours = naive_halting.expected_loss(losses, logprobs).mean() + 0.1 * apart
    torch.testing.assert_close(ours, reference.stage1(losses, logprobs, 0.1))
    torch.testing.assert_close(halting.gate_loss(losses, hazards), reference.stage2(losses, hazards))
    torch.testing.assert_close(halting.expected_depth(logprobs).mean() / LOOPS, reference.halt_penalty(logprobs))
    for q in (0.1, 0.5, 0.9):
        assert torch.equal(naive_halting.quantile_exit(logprobs, q), reference.q_exit(logprobs, q))
    for ours, theirs in zip(naive_halting.act(losses), reference.act(losses), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert math.isclose(halting.prior_biases(2)[0], 0.0)
