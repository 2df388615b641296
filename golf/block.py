"""One transformer block, and attention over whole rows or over positions that still change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.shape import BOS, GATE_CHANNELS, Shape


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rolled: bool = False) -> Tensor:
    """Rotary positions, half-split: x (B, T, H, head) with cos and sin (T, 1, head) or (B, T, 1, head), the sine's
    second half negative. Written as one sum of products: a compiler makes one pass of it, forward and backward.

    Keys that leave a compiled block are `rolled`, which gives the same and makes a step 8 % slower: of flipped ones
    torch 2.13 makes gradients that are not numbers, on a CPU in bfloat16.
    """
    swapped = x.roll(x.size(-1) // 2, -1) if rolled else x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * sin


def exclude_own(y: Tensor, v: Tensor) -> Tensor:
    """y (B, H, T, head) less its part along the own value v (B, KV, T, head) of each position (contest, #265)."""
    batch, heads, length, size = y.shape
    own = F.normalize(v, dim=-1).unsqueeze(2)  # (B, KV, 1, T, head)
    grouped = y.view(batch, v.size(1), heads // v.size(1), length, size)
    return (grouped - (grouped * own).sum(dim=-1, keepdim=True) * own).view(y.shape)


# Told of a matrix's input (B, T, C) and output (B, T, R) at each use, when Hessians are collected.
Tap = Callable[[str, Tensor, Tensor], None]
STEEPEST = 80.0  # score whose exponential, times any number of keys, is still a float32
QUERY_BLOCK = {torch.float32: 32, torch.bfloat16: 128}  # queries that a short row on a CPU attends at a time


def same_document(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, 1, T, T): whether a position may attend to another, at or before it in its document."""
    document = (tokens == BOS).cumsum(dim=1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return seen[:, None]


@torch.compiler.disable
def document_bounds(tokens: Tensor) -> Tensor:
    """tokens (B, T), rows end to end -> (N + 1,) int32: where each document or row begins, and B * T. How many there
    are is data, which the host waits for."""
    begins = tokens == BOS
    begins[:, 0] = True
    found = begins.flatten().nonzero()[:, 0]
    bounds = F.pad(found, (0, 1), value=tokens.numel()).to(torch.int32)
    torch._dynamo.mark_dynamic(bounds, 0)  # one graph for any number of documents
    return bounds


def takes_bounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's attention of variable lengths (FlashAttention 2, Dao 2023) runs there."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class Kept:
    """Keys and values (B, KV, T, head) of one block for whole rows, of which only some positions still change."""

    keys: Tensor
    values: Tensor
    at: Tensor | None = None
    """(B, N) int64 position of each given state, or all in order; one may stand twice with the same state."""
    moves: Tensor | None = None
    """(B, N) bool, or all: the others stay as they were."""

    def take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put in what moves of k and v (B, KV, N, head); returns all keys and values."""
        self.keys, self.values = self.put(self.keys, k), self.put(self.values, v)
        return self.keys, self.values

    def put(self, kept: Tensor, new: Tensor) -> Tensor:
        place = None if self.at is None else self.at[:, None, :, None].expand_as(new)
        if self.moves is not None:
            new = torch.where(self.moves[:, None, :, None], new, kept if place is None else kept.gather(2, place))
        if place is None:
            return new
        return kept.scatter(2, place, new) if torch.is_grad_enabled() else kept.scatter_(2, place, new)

    def seen(self) -> Tensor | None:
        """(B, 1, N, T): which positions each state attends to; None where all are there and attend causally."""
        if self.at is None:
            return None
        return (self.at[:, :, None] >= torch.arange(self.keys.size(2), device=self.at.device))[:, None]


@dataclass
class Given:
    """What every layer reads besides the state: of whole rows, or of some of their positions."""

    start: Tensor  # (B, T, D) normalised embeddings
    cos: Tensor  # (T, 1, head), or (B, N, 1, head)
    sin: Tensor
    seen: Tensor | None = None  # (B, 1, T, T), or the documents' bounds (N + 1,), or causal

    def at(self, place: Tensor) -> Given:
        """Of the positions (B, N) int64 only."""
        return Given(gathered(self.start, place), self.cos[place], self.sin[place])

    def repeated(self, times: int) -> Given:
        """The same rows several times over, one copy after the other."""
        seen = self.seen
        if seen is not None and seen.dim() == 1:
            seen = torch.cat([seen[:1], *(seen[1:] + copy * self.start[..., 0].numel() for copy in range(times))])
        elif seen is not None:
            seen = seen.repeat(times, 1, 1, 1)
        return Given(self.start.repeat(times, 1, 1), self.cos, self.sin, seen)


def gathered(x: Tensor, place: Tensor) -> Tensor:
    """x (B, T, D), place (B, N) int64 -> (B, N, D)."""
    return x.gather(1, place[..., None].expand(-1, -1, x.size(-1)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """q (B, H, T, head), k and v (B, KV, T, head) -> (B, H, T, head), each position attending to itself and before,
    or where `seen`, (B, 1, T, T) or the documents' bounds (N + 1,), says so.

    Compiled for a CPU, short rows go as plain products, some queries against the keys up to them, divided by their sum
    at the end. No maximum is taken off first: queries and keys come normalised, so that a score beyond STEEPEST, where
    it would saturate, needs a gain of 10 at head size 64. A step of `laptop` in float32 took 291 ms where it took 308
    with scaled_dot_product_attention (2 cores); in bfloat16, where products are fast, 128 queries at a time took 132
    ms where 32 took 144.
    """
    batch, heads, length, size = q.shape
    groups = k.size(1)
    if seen is not None and seen.dim() == 1:
        q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v))  # (B T, H, head)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        from torch.nn.attention.varlen import varlen_attn  # seconds, which nobody else need wait for

        y = varlen_attn(q, k, v, seen, seen, length, length, window_size=(-1, 0))
        return y.view(batch, length, heads, size).transpose(1, 2)
    if seen is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=groups != heads)
    if not (torch.compiler.is_compiling() and q.device.type == "cpu" and length <= 512):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)
    each = heads // groups
    q = (q * size**-0.5).reshape(batch * groups, each, length, size)
    k, v = k.reshape(batch * groups, length, size), v.reshape(batch * groups, length, size)
    late = q.dtype == torch.float32  # rounded sums would not cancel in the gradients
    parts, most = [], QUERY_BLOCK.get(q.dtype, 32)
    for start in range(0, length, most):
        end = min(length, start + most)
        count = end - start
        scores = torch.bmm(q[:, :, start:end].reshape(batch * groups, each * count, size), k[:, :end].mT)
        scores = scores.view(batch * groups, each, count, end).float()
        seen = torch.ones(count, end, device=q.device).tril(start)
        weight = torch.exp(scores.clamp(-STEEPEST, STEEPEST)) * seen
        total = weight.sum(dim=-1, keepdim=True)
        if not late:
            weight = weight / total
        part = torch.bmm(weight.to(q.dtype).view(batch * groups, each * count, end), v[:, :end])
        part = part / total.view(batch * groups, each * count, 1) if late else part
        parts.append(part.view(batch * groups, each, count, size))
    return torch.cat(parts, dim=2).view(batch, heads, length, size)


class Block(nn.Module):
    """One unique transformer block: causal attention, then the MLP, each with a learned scale.

    The control vectors come from outside, so that a pass of a shared block can have its own.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = shape.heads, shape.kv_heads, shape.head_size
        self.activation, self.exclusive = shape.activation, shape.exclusive
        self.tap: Tap | None = None
        width, kv_width, hidden = shape.width, shape.kv_width, shape.mlp_width
        self.query = nn.Parameter(torch.empty(width, width))
        self.key = nn.Parameter(torch.empty(kv_width, width))
        self.value = nn.Parameter(torch.empty(kv_width, width))
        self.out = nn.Parameter(torch.empty(width, width))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def attend(
        self, x: Tensor, scale: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None,
        attn_gate: Tensor | None, kept: Kept | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, D) normalised -> (B, T, D), times scale (D,)."""
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_size
        weight = torch.cat((self.query, self.key, self.value)).to(x.dtype)  # one product instead of three
        q, k, v = F.linear(x, weight).split((width, kv_width, kv_width), dim=-1)
        if self.tap:
            self.tap("query", x, q), self.tap("key", x, k), self.tap("value", x, v)
        size = (self.head_size,)
        q, k, v = (y.view(batch, length, -1, *size) for y in (q, k, v))  # (B, T, H, head)
        q = rotate(F.rms_norm(q, size), cos, sin) * gain.to(x.dtype)[:, None]
        k = rotate(F.rms_norm(k, size), cos, sin, rolled=kept is not None)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, head)
        y = causal_attention(q, k, v, seen) if kept is None else causal_attention(q, *kept.take(k, v), kept.seen())
        if self.exclusive:
            y = exclude_own(y, v)
        if attn_gate is not None:
            opened = 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], attn_gate.to(x.dtype)))  # (B, T, H)
            y = y * opened.transpose(1, 2)[..., None]
        y = y.transpose(1, 2).reshape(batch, length, width)
        return self.project("out", y, scale)

    def project(self, name: str, x: Tensor, scale: Tensor) -> Tensor:
        """x (B, T, C) through the matrix `name` (D, C) back into the stream, times scale (D,).

        The matrix is scaled rather than what comes out of it: the scale's gradient needs no pass over the tokens.
        """
        weight = getattr(self, name)
        if self.tap is None:
            return F.linear(x, (weight * scale[:, None]).to(x.dtype))
        out = F.linear(x, weight.to(x.dtype))
        self.tap(name, x, out)
        return out * scale.to(x.dtype)

    def feed_forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (B, T, D) normalised -> (B, T, D), times scale (D,)."""
        up = F.linear(x, self.up.to(x.dtype))
        hidden = (F.leaky_relu(up, 0.5) if self.activation == "leaky-relu2" else F.relu(up)).square()
        if self.tap:
            self.tap("up", x, up)
        return self.project("down", hidden, scale)

    def forward(
        self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, attn_scale: Tensor, mlp_scale: Tensor, mix: Tensor,
        gain: Tensor, seen: Tensor | None = None, attn_gate: Tensor | None = None,
        lane: Tensor | None = None, lane_mix: Tensor | None = None, kept: Kept | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """x, x0 (B, T, D); scales (D,), mix (2, D), gain (H,), gate (H, GATE_CHANNELS) -> (B, T, D).

        With a second `lane` (B, T, D) attention reads x, the MLP the lane, and both write to both as lane_mix (2, 3)
        says: the two streams are returned (contest, #1529).
        """
        width = (x.size(-1),)
        mix = mix.to(x.dtype)
        if lane is None:
            x = mix[0] * x + mix[1] * x0
            x = x + self.attend(F.rms_norm(x, width), attn_scale, gain, cos, sin, seen, attn_gate, kept)
            return x + self.feed_forward(F.rms_norm(x, width), mlp_scale)
        normal = F.rms_norm(mix[0] * x + mix[1] * x0, width)
        found = self.attend(normal, attn_scale, gain, cos, sin, seen, attn_gate, kept)
        thought = self.feed_forward(F.rms_norm(lane, width), mlp_scale)
        a, b = lane_mix.to(x.dtype)
        return a[0] * x + a[1] * found + a[2] * thought, b[0] * lane + b[1] * found + b[2] * thought
