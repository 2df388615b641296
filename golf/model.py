"""RecurrentGPT: a transformer whose core blocks run several times, with one forward path for all uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config import Recipe, Shape


@dataclass(frozen=True)
class Role:
    """What a parameter is: who updates it, how it starts, how the artifact stores it."""

    optimizer: str  # muon | embed | scalar
    init: str  # fan_in | zero | one | mix | gain | embed
    codec: str  # matrix | embed | control


# Every parameter's role, by the last part of its name. The contest's baseline starts its linear layers with
# torch's default, uniform in +-1/sqrt(fan in), and the two projections back into the stream with zero.
ROLES = {
    "embedding": Role("embed", "embed", "embed"),
    "query": Role("muon", "fan_in", "matrix"),
    "key": Role("muon", "fan_in", "matrix"),
    "value": Role("muon", "fan_in", "matrix"),
    "out": Role("muon", "zero", "matrix"),
    "up": Role("muon", "fan_in", "matrix"),
    "down": Role("muon", "zero", "matrix"),
    "attn_scale": Role("scalar", "one", "control"),
    "mlp_scale": Role("scalar", "one", "control"),
    "resid_mix": Role("scalar", "mix", "control"),
    "qk_gain": Role("scalar", "gain", "control"),
    "skip_weight": Role("scalar", "one", "control"),
}


def role_of(name: str) -> Role:
    """The role of a parameter. Raises ValueError with its name when it has none."""
    role = ROLES.get(name.rsplit(".", 1)[-1])
    if role is None:
        raise ValueError(f"parameter {name!r} has no role: no optimizer, init and codec rule")
    return role


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split: x (B, H, T, head), cos and sin (T, head / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    """One unique transformer block: causal attention, then the squared-ReLU MLP, each with a learned scale.

    The control vectors come from outside, so that a pass of a shared block can have its own.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = shape.heads, shape.kv_heads, shape.head_size
        width, kv_width, hidden = shape.width, shape.kv_width, shape.mlp_width
        self.query = nn.Parameter(torch.empty(width, width))
        self.key = nn.Parameter(torch.empty(kv_width, width))
        self.value = nn.Parameter(torch.empty(kv_width, width))
        self.out = nn.Parameter(torch.empty(width, width))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def attend(self, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, D) normalised -> (B, T, D)."""
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_size
        weight = torch.cat((self.query, self.key, self.value)).to(x.dtype)  # one product instead of three
        q, k, v = F.linear(x, weight).split((width, kv_width, kv_width), dim=-1)
        q = q.view(batch, length, self.heads, self.head_size).transpose(1, 2)  # (B, H, T, head)
        k = k.view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        q = rotate(F.rms_norm(q, (self.head_size,)), cos, sin) * gain.to(x.dtype)[:, None, None]
        k = rotate(F.rms_norm(k, (self.head_size,)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return F.linear(y.transpose(1, 2).reshape(batch, length, width), self.out.to(x.dtype))

    def forward(
        self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, attn_scale: Tensor, mlp_scale: Tensor, mix: Tensor,
        gain: Tensor,
    ) -> Tensor:  # fmt: skip
        """x, x0 (B, T, D); scales (D,), mix (2, D), gain (H,) -> (B, T, D)."""
        width = (x.size(-1),)
        mix = mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + attn_scale.to(x.dtype) * self.attend(F.rms_norm(x, width), gain, cos, sin)
        hidden = F.relu(F.linear(F.rms_norm(x, width), self.up.to(x.dtype))).square()
        return x + mlp_scale.to(x.dtype) * F.linear(hidden, self.down.to(x.dtype))


class RecurrentGPT(nn.Module):
    """Prelude blocks, a core of unique blocks run `loops` times, coda blocks; tied embedding, capped logits.

    Depth recurrence after the Universal Transformer (Dehghani et al. 2018); the block is the contest baseline's.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.skip_rows = shape.skip_rows
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.unique_layers))
        rows = shape.control_rows
        self.attn_scale = nn.Parameter(torch.empty(rows, shape.width))
        self.mlp_scale = nn.Parameter(torch.empty(rows, shape.width))
        self.resid_mix = nn.Parameter(torch.empty(rows, 2, shape.width))
        self.qk_gain = nn.Parameter(torch.empty(rows, shape.heads))
        if self.skip_rows:
            self.skip_weight = nn.Parameter(torch.empty(len(self.skip_rows), shape.width))
        self.angles: dict[tuple, tuple[Tensor, Tensor]] = {}
        stored = {name: tuple(p.shape) for name, p in self.named_parameters()}
        assert stored == shape.parameters(), "the model's parameters are not those the shape lists"

    @torch.no_grad()
    def initialize(self, recipe: Recipe, seed: int) -> RecurrentGPT:
        """Start every parameter by its role, the same on every device and number of ranks. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            rule = role_of(name).init
            value = torch.empty(p.shape)
            if rule == "embed":
                value.normal_(std=recipe.embed_std, generator=generator)
            elif rule == "fan_in":
                value.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=generator)
            elif rule == "mix":
                value.copy_(torch.tensor([1.0, 0.0])[:, None])
            elif rule in ("zero", "one", "gain"):
                value.fill_({"zero": 0.0, "one": 1.0, "gain": recipe.qk_gain}[rule])
            else:
                raise ValueError(f"parameter {name!r} has the unknown init rule {rule!r}")
            p.copy_(value)
        return self

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the position angles, (T, head / 2) each, computed once for each length."""
        key = (length, device, dtype)
        if key not in self.angles:
            half = self.shape.head_size // 2
            frequency = self.shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
            self.angles[key] = (angle.cos().to(device, dtype), angle.sin().to(device, dtype))
        return self.angles[key]

    def hidden(self, tokens: Tensor, dtype: torch.dtype = torch.float32, loops: int | None = None) -> Tensor:
        """tokens (B, T) int64 -> normalised final states (B, T, D) in `dtype`."""
        shape = self.shape
        cos, sin = self.rotary(tokens.size(1), tokens.device, dtype)
        x = F.rms_norm(F.embedding(tokens, self.embedding).to(dtype), (shape.width,))
        x0, pushed = x, []
        order, pops = shape.order(loops), shape.skip_layers(loops)
        for layer, block in enumerate(order):
            row = layer if shape.pass_scalars else block
            if layer in pops:
                x = x + self.skip_weight[self.skip_rows[row]].to(dtype) * pushed.pop()
            x = self.blocks[block](
                x, x0, cos, sin, self.attn_scale[row], self.mlp_scale[row], self.resid_mix[row], self.qk_gain[row]
            )
            if layer < pops.start:
                pushed.append(x)
        return F.rms_norm(x, (shape.width,))

    def head(self, x: Tensor) -> Tensor:
        """Final states (..., D) -> capped logits (..., V) float32."""
        logits = F.linear(x, self.embedding.to(x.dtype)).float()
        return self.shape.softcap * torch.tanh(logits / self.shape.softcap)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Final states (B, T, D), targets (B, T) -> mean nats a target."""
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, dtype: torch.dtype = torch.float32,
        loops: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean nats a target when targets are given, else logits (B, T, V) float32 of each next token."""
        x = self.hidden(tokens, dtype, loops)
        return self.head(x) if targets is None else self.head_loss(x, targets)
