"""Cross-entropy of capped logits, some positions at a time, its gradients taken in the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from golf.shape import MOST_LOGITS

CHUNK = 8192  # positions at most whose logits exist at a time on a CPU
STEEP = 40.0  # up to this cap exp(-2 cap) is far from float32's least number, and no maximum need be found


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32 (Gemma 2's softcap)."""
    return cap * torch.tanh(logits.float() / cap)


def pieces(x: Tensor, vocab_size: int) -> list[slice]:
    """The positions of x (N, D) in slices of a size that suits its device, as equal as can be: one shape for a compiler
    where it divides."""
    count, most = len(x), max(1, MOST_LOGITS // vocab_size) if x.is_cuda else CHUNK
    size = -(-count // -(-count // most))
    return [slice(at, at + size) for at in range(0, count, size)]


def part_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) float32 of x (N, D), and the gradients of their sum times scale (N, 1): for x, of x's type, and for
    weight (V, D).

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
    gradient = ((share / total - hit.float()) * (slope * scale)).to(x.dtype)
    chosen = logits.gather(-1, targets[:, None])
    return (torch.log(total) - chosen)[:, 0], gradient @ weight, gradient.mT @ x


class CappedCrossEntropy(torch.autograd.Function):
    """Losses times their scales, summed, and each loss; the logits of all positions need not exist at once, and
    backward only multiplies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, cap: float, part: Callable) -> tuple:
        flat, wanted, narrow = x.detach().flatten(0, -2), targets.flatten(), weight.detach().to(x.dtype)
        scales = scale.detach().float().flatten()
        to_x, to_weight, losses = torch.empty_like(flat), torch.zeros_like(weight), torch.empty_like(scales)
        for piece in pieces(flat, len(weight)):
            losses[piece], to_x[piece], grown = part(flat[piece], narrow, wanted[piece], cap, scales[piece, None])
            to_weight += grown
        losses = losses.view(targets.shape)
        ctx.save_for_backward(to_x.view_as(x), to_weight, losses)
        ctx.mark_non_differentiable(losses)
        return (losses.flatten() * scales).sum(), losses

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple:
        to_x, to_weight, losses = ctx.saved_tensors
        to_scale = losses * gradient if ctx.needs_input_grad[3] else None
        return to_x * gradient, to_weight * gradient, None, to_scale, None, None


def capped_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, part: Callable = part_loss, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B, T, D), weight (V, D), targets (B, T) -> mean nats a target, and the nats of each (B, T) without gradients.

    The mean is of losses times `shares` (B, T) where they are given, which receive gradients too. `part` is part_loss,
    compiled or not. One pass over chunks with its gradients follows Liger's fused linear cross-entropy (Hsu et al.
    2024).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        scale = torch.ones(targets.shape, device=x.device) if shares is None else shares
        return CappedCrossEntropy.apply(x, weight, targets, scale / targets.numel(), cap, part)
    flat, wanted, losses = x.flatten(0, -2), targets.flatten(), []
    for piece in pieces(flat, len(weight)):
        logits = capped(F.linear(flat[piece], weight.to(x.dtype)), cap)
        losses.append(F.cross_entropy(logits, wanted[piece], reduction="none"))
    losses = torch.cat(losses).view(targets.shape)
    return (losses if shares is None else losses * shares).mean(), losses
