"""Cross-entropy of capped logits, some positions at a time, its gradients taken in the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8192  # positions at most whose logits exist at a time
STEEP = 40.0  # up to this cap exp(-2 cap) is far from float32's least number, and no maximum need be found


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32 (Gemma 2's softcap)."""
    return cap * torch.tanh(logits.float() / cap)


def pieces(count: int) -> list[slice]:
    """`count` positions in slices of at most CHUNK, as equal as can be: one shape for a compiler where it divides."""
    size = -(-count // -(-count // CHUNK))
    return [slice(at, at + size) for at in range(0, count, size)]


def part_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of x (N, D) over `count`, and its gradients: for x, of x's type, and for weight (V, D).

    With r = 1 / (exp(2 z / cap) + 1) a capped logit is cap - 2 cap r and its slope 4 r (1 - r): one exponential in
    place of a hyperbolic tangent, and the softmax of -2 cap r needs no maximum.
    """
    z = F.linear(x, weight).float()
    if cap <= STEEP:
        r = 1 / (torch.exp(z * (2 / cap)) + 1)
        logits, slope = -2 * cap * r, 4 * r * (1 - r)
    else:
        bent = torch.tanh(z / cap)
        logits, slope = cap * bent, 1 - bent * bent
        logits = logits - logits.amax(dim=-1, keepdim=True)
    share = torch.exp(logits)
    total = share.sum(dim=-1, keepdim=True)
    hit = torch.arange(weight.size(0), device=x.device) == targets[:, None]
    gradient = ((share / total - hit.float()) * slope / count).to(x.dtype)
    chosen = logits.gather(-1, targets[:, None])
    return (torch.log(total) - chosen).sum() / count, gradient @ weight, gradient.mT @ x


class CappedCrossEntropy(torch.autograd.Function):
    """Mean nats a target; the logits of all positions need not exist at once, and backward only scales."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, part: Callable) -> Tensor:
        flat, wanted, narrow = x.detach().flatten(0, -2), targets.flatten(), weight.detach().to(x.dtype)
        loss = torch.zeros((), device=x.device)
        to_x, to_weight = torch.empty_like(flat), torch.zeros_like(weight)
        for piece in pieces(len(flat)):
            added, to_x[piece], grown = part(flat[piece], narrow, wanted[piece], cap, len(flat))
            loss += added
            to_weight += grown
        ctx.save_for_backward(to_x.view_as(x), to_weight)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        to_x, to_weight = ctx.saved_tensors
        return to_x * gradient, to_weight * gradient, None, None, None


def capped_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, part: Callable = part_loss
) -> Tensor:  # fmt: skip
    """x (B, T, D), weight (V, D), targets (B, T) -> mean nats a target. `part` is part_loss, compiled or not.

    One pass over chunks with its gradients follows Liger's fused linear cross-entropy (Hsu et al. 2024).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return CappedCrossEntropy.apply(x, weight, targets, cap, part)
    flat, wanted, total = x.flatten(0, -2), targets.flatten(), torch.zeros((), device=x.device)
    for piece in pieces(len(flat)):
        logits = capped(F.linear(flat[piece], weight.to(x.dtype)), cap)
        total += F.cross_entropy(logits, wanted[piece], reduction="sum")
    return total / len(flat)
