"""Cross-entropy of capped logits, a chunk of positions at a time, its gradients taken in the same pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # positions whose logits exist at a time


def capped_logits(x: Tensor, weight: Tensor, cap: float) -> Tensor:
    """x (..., D), weight (V, D) -> cap * tanh(x weight' / cap), (..., V) float32."""
    return cap * torch.tanh(F.linear(x, weight.to(x.dtype)).float() / cap)


def chunk_of(x: Tensor, weight: Tensor, targets: Tensor, cap: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of x (N, D) over `count`, and its gradients: for x, of x's type, and for weight (V, D)."""
    bent = torch.tanh(F.linear(x, weight).float() / cap)
    logits = cap * bent
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])
    share = torch.exp(logits - total)
    hit = torch.arange(weight.size(0), device=x.device) == targets[:, None]
    gradient = ((share - hit.float()) * (1 - bent * bent) / count).to(x.dtype)
    return (total - chosen).sum() / count, gradient @ weight, gradient.mT @ x


class CappedCrossEntropy(torch.autograd.Function):
    """Mean nats a target; the logits of all positions never exist at once, and backward only scales."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, part) -> Tensor:
        flat, wanted, narrow = x.detach().flatten(0, -2), targets.flatten(), weight.detach().to(x.dtype)
        loss = torch.zeros((), device=x.device)
        to_x, to_weight = torch.empty_like(flat), torch.zeros_like(weight)
        for at in range(0, len(flat), CHUNK):
            piece = slice(at, at + CHUNK)
            added, to_x[piece], grown = part(flat[piece], narrow, wanted[piece], cap, len(flat))
            loss += added
            to_weight += grown
        ctx.save_for_backward(to_x.view_as(x), to_weight)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        to_x, to_weight = ctx.saved_tensors
        return to_x * gradient.to(to_x.dtype), to_weight * gradient, None, None, None


def capped_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, cap: float, part=chunk_of) -> Tensor:
    """x (B, T, D), weight (V, D), targets (B, T) -> mean nats a target. `part` is chunk_of, compiled or not.

    The softcap is Gemma 2's, the one pass over chunks follows Liger's fused linear cross-entropy (Hsu et al. 2024).
    """
    if x.requires_grad or weight.requires_grad:
        return CappedCrossEntropy.apply(x, weight, targets, cap, part)
    flat, wanted, total = x.flatten(0, -2), targets.flatten(), torch.zeros((), device=x.device)
    for at in range(0, len(flat), CHUNK):
        logits = capped_logits(flat[at : at + CHUNK], weight, cap)
        total += F.cross_entropy(logits, wanted[at : at + CHUNK], reduction="sum")
    return total / len(flat)
