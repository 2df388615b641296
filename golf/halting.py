"""How deep each token goes: distributions over exits, and the losses that train them.

A gate's logits are hazards: the chance to stop after a pass, given that the token has not stopped before. All of it is
in float32 or wider, and in logarithms, where products of many survivals would vanish.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 1e-6  # by which a sum of chances may fall short: rounding must not cost a pass
EPSILON = 0.01  # by which ACT's may (Graves 2016)
ACT_BIAS = -3.0  # of its gate at the start, which then rarely stops before the last pass


def exit_logprobs(hazards: Tensor) -> Tensor:
    """hazards (R - 1, ...) logits of stopping after pass 1 .. R - 1 -> (R, ...) log-probability of each exit.

    Whatever is left after R - 1 passes stops at R, so that the exits always sum to one (stick breaking; PonderNet,
    Banino et al. 2021).
    """
    stop, go = F.logsigmoid(hazards.float()), F.logsigmoid(-hazards.float())
    survived = torch.cumsum(go, dim=0)
    return torch.cat((stop[:1], stop[1:] + survived[:-1], survived[-1:]))


def prior_logprobs(loops: int, geometric: float = 0.0) -> Tensor:
    """(R,) log-probabilities of a prior over exits: uniform, or geometric with this hazard, cut at R and normalised.
    Raises ValueError for a hazard outside [0, 1)."""
    if not 0 <= geometric < 1:
        raise ValueError(f"a hazard of {geometric} is not in [0, 1)")
    if not geometric:
        return torch.full((loops,), -math.log(loops))
    steps = torch.arange(loops) * math.log1p(-geometric)
    return steps - steps.logsumexp(dim=0)


def prior_biases(loops: int, geometric: float = 0.0) -> list[float]:
    """Hazard logits, t = 1 .. loops - 1, for which exits have that prior: log of what stops over what goes on, which is
    -log(loops - t) where exits are equally likely."""
    prior = prior_logprobs(loops, geometric).double()
    after = prior.flip(0).logcumsumexp(0).flip(0)  # the log-probability of exit t or later
    return (prior[:-1] - after[1:]).tolist()


def expected_depth(logprobs: Tensor) -> Tensor:
    """(R, ...) exit log-probabilities -> (...) mean number of passes, from 1 to R."""
    depth = torch.arange(1, len(logprobs) + 1, device=logprobs.device, dtype=logprobs.dtype)
    return torch.tensordot(depth, logprobs.exp(), dims=1)


def divergence(logprobs: Tensor, prior: Tensor) -> Tensor:
    """KL(exits || prior) in nats, (...): never negative, and zero where they agree."""
    prior = prior.to(logprobs).view(-1, *[1] * (logprobs.ndim - 1))
    return (logprobs.exp() * (logprobs - prior)).sum(dim=0)




def gate_loss(losses: Tensor, hazards: Tensor, least_gain: float = 0.005, steepness: float = 50.0) -> Tensor:
    """Loss of a gate on a frozen model: losses (R, ...), hazards (R - 1, ...) -> mean nats.

    The gate after pass t should go on where pass t + 1 lowers the token's loss by more than `least_gain` nats (Ouro's
    second stage, Zhu et al. 2025, with the label of the decision that is taken).
    """
    gain = (losses[:-1] - losses[1:]).clamp_min(0.0)
    go_on = torch.sigmoid(steepness * (gain - least_gain)).detach()
    return F.binary_cross_entropy_with_logits(-hazards.float(), go_on.float())
