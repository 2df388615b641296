"""RecurrentGPT: a transformer whose core blocks run several times, with one forward path for all uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.block import Block, Given, Kept, Tap, document_bounds, same_document, takes_bounds
from golf.halting import ACT_BIAS, EPSILON, SLACK, prior_biases
from golf.loss import capped, capped_cross_entropy, part_loss
from golf.recipe import Recipe
from golf.shape import BOS, GATE_CHANNELS, Shape


@dataclass(frozen=True)
class Role:
    """What a parameter is: who updates it and how it starts; golf.shape says how the artifact stores it."""

    optimizer: str  # muon | embed | scalar
    init: str  # fan_in | zero | one | mix | gain | embed | lanes | exits


# Every parameter's role, by the last part of its name. The contest's baseline starts its linear layers with
# torch's default, uniform in +-1/sqrt(fan in), and the two projections back into the stream with zero.
ROLES = {
    "embedding": Role("embed", "embed"),
    "query": Role("muon", "fan_in"),
    "key": Role("muon", "fan_in"),
    "value": Role("muon", "fan_in"),
    "out": Role("muon", "zero"),
    "up": Role("muon", "fan_in"),
    "down": Role("muon", "zero"),
    "attn_scale": Role("scalar", "one"),
    "mlp_scale": Role("scalar", "one"),
    "resid_mix": Role("scalar", "mix"),
    "qk_gain": Role("scalar", "gain"),
    "skip_weight": Role("scalar", "one"),
    "attn_gate": Role("scalar", "zero"),
    "smear": Role("scalar", "zero"),
    "lane_mix": Role("scalar", "lanes"),
    "exit_weight": Role("scalar", "zero"),
    "exit_bias": Role("scalar", "exits"),
}


def role_of(name: str) -> Role:
    """The role of a parameter. Raises ValueError with its name when it has none."""
    role = ROLES.get(name.rsplit(".", 1)[-1])
    if role is None:
        raise ValueError(f"parameter {name!r} has no role: no optimizer and no init rule")
    return role


@dataclass
class Pondered:
    """What adaptive computation time leads to."""

    states: Tensor  # (B, T, D) normalised
    passes: Tensor  # (B, T) int64
    remainder: Tensor  # (B, T) weight of each token's last pass


def normalized(x: Tensor) -> Tensor:
    """x (..., D) over its root mean square."""
    return F.rms_norm(x, (x.size(-1),))


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
        if shape.attn_gate:
            self.attn_gate = nn.Parameter(torch.empty(rows, shape.heads, GATE_CHANNELS))
        if shape.smear:
            self.smear = nn.Parameter(torch.empty(1, GATE_CHANNELS + 1))
        if shape.lanes:
            self.lane_mix = nn.Parameter(torch.empty(rows, 2, 3))
        if shape.exit_gate != "none":
            self.exit_weight = nn.Parameter(torch.empty(1, shape.width))
            self.exit_bias = nn.Parameter(torch.empty(1, shape.loops - 1))
        self.tap: Tap | None = None
        self.loss_part, self.normalize = part_loss, normalized  # compiled or not
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
            elif rule == "lanes":
                value.copy_(torch.tensor([1.1, 1.0, 1.0]))
            elif rule == "mix":
                value.copy_(torch.tensor([1.0, 0.0])[:, None])
            elif rule == "exits":
                prior = prior_biases(self.shape.loops, recipe.prior_hazard)
                value.copy_(torch.tensor(prior if self.shape.exit_gate == "hazard" else [ACT_BIAS] * len(prior)))
                value += recipe.gate_bias
            elif rule in ("zero", "one", "gain"):
                value.fill_({"zero": 0.0, "one": 1.0, "gain": recipe.qk_gain}[rule])
            else:
                raise ValueError(f"parameter {name!r} has the unknown init rule {rule!r}")
            p.copy_(value)
        return self

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, head) of the position angles, as `rotate` wants them, computed once for each length."""
        key = (length, device, dtype)
        if key not in self.angles:
            half = self.shape.head_size // 2
            frequency = self.shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
            cos, sin = torch.cat((angle.cos(),) * 2, dim=1), torch.cat((angle.sin(), -angle.sin()), dim=1)
            self.angles[key] = (cos[:, None].to(device, dtype), sin[:, None].to(device, dtype))
        return self.angles[key]

    def hidden(
        self, tokens: Tensor, dtype: torch.dtype = torch.float32, loops: int | None = None, isolate: bool = False,
        seen: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens (B, T) int64 -> normalised final states (B, T, D) in `dtype`; with `isolate` no position attends
        beyond its document. The state after each pass of the core is added to `seen`."""
        if self.shape.exit_gate == "act":
            return self.pondered(tokens, dtype, loops).states
        return self.through(self.enter(tokens, dtype, isolate), loops, seen)

    def through(
        self, given: Given, loops: int | None = None, seen: list[Tensor] | None = None, kept: list[Kept] | None = None
    ) -> Tensor:  # fmt: skip
        """What layers read -> normalised final states (B, N, D). For some positions of a row only, every layer's keys
        and values are `kept`."""
        shape = self.shape
        x, lane, pushed = given.start, None, []
        layers, pops = shape.layers(loops), shape.skip_layers(loops)
        for layer, (block, row) in enumerate(layers):
            if shape.lanes and layer == len(layers) // 2:
                lane = x
            if layer in pops:
                x = x + self.skip_weight[self.skip_rows[row]].to(x.dtype) * pushed.pop()
            x = self.layer(x, given, block, row, lane, kept[layer] if kept else None)
            if lane is not None:
                x, lane = x
            if layer < pops.start:
                pushed.append(x)
            if seen is not None and block == shape.prelude + shape.core - 1:
                seen.append(x)
        x = x if lane is None else (x + lane) / 2
        return self.normalize(x)

    # -- of shapes whose tokens may stop (checks.check_exits) --

    def prelude(self, given: Given, kept: list[Kept] | None = None) -> Tensor:
        """What layers read -> the states (B, N, D) that the first pass begins with."""
        x = given.start
        for at, (block, row) in enumerate(self.shape.layers(1)[: self.shape.prelude]):
            x = self.layer(x, given, block, row, kept=kept[at] if kept else None)
        return x

    def core_pass(self, x: Tensor, given: Given, passed: int, kept: list[Kept] | None = None) -> Tensor:
        """States x (B, N, D) after pass `passed`, 1 for the first; where only some positions change their blocks' keys
        and values are `kept`."""
        shape = self.shape
        start = shape.prelude + (passed - 1) * shape.core
        for at, (block, row) in enumerate(shape.layers(max(passed, shape.loops))[start : start + shape.core]):
            x = self.layer(x, given, block, row, kept=kept[at] if kept else None)
        return x

    def coda(self, x: Tensor, given: Given, kept: list[Kept] | None = None) -> Tensor:
        """States x (B, N, D) of the last passes -> normalised final states."""
        shape = self.shape
        for at, (block, row) in enumerate(shape.layers()[len(shape.layers()) - shape.coda :]):
            x = self.layer(x, given, block, row, kept=kept[at] if kept else None)
        return self.normalize(x)

    def nothing_kept(self, x: Tensor) -> list[Kept]:
        """For each block of the core, of states x (B, T, D): every position changes, and nothing is known yet."""
        shape, (rows, length, _) = self.shape, x.shape
        empty = x.new_zeros(rows, shape.kv_heads, length, shape.head_size)
        return [Kept(empty.clone(), empty.clone()) for _ in range(shape.core)]

    def gate(self, x: Tensor, passed: int) -> Tensor:
        """States x (..., D) after a pass below the last -> (...) logits of stopping, float32 or wider."""
        read = normalized(x).to(torch.promote_types(x.dtype, torch.float32))
        return F.linear(read, self.exit_weight.to(read.dtype))[..., 0] + self.exit_bias[0, passed - 1]

    def each(
        self, tokens: Tensor, dtype: torch.dtype = torch.float32, loops: int | None = None, isolate: bool = False
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """tokens (B, T) -> (R, B, T, D): the states after each pass, and the normalised final states that stopping
        there leads to; the last are those of hidden()."""
        given = self.enter(tokens, dtype, isolate)
        x, found = self.prelude(given), []
        for passed in range(1, (loops or self.shape.loops) + 1):
            x = self.core_pass(x, given, passed)
            found.append(x)
        states = self.coda(torch.cat(found), given.repeated(len(found)))
        return torch.stack(found), states.unflatten(0, (len(found), -1))

    def pondered(self, tokens: Tensor, dtype: torch.dtype = torch.float32, loops: int | None = None) -> Pondered:
        """tokens (B, T) -> the passes' states mixed as adaptive computation time says (Graves 2016); a token that
        stopped keeps its state, keys and values."""
        given = self.enter(tokens, dtype)
        x = self.prelude(given)
        kept, loops = self.nothing_kept(x), loops or self.shape.loops
        running = torch.ones(tokens.shape, dtype=torch.bool, device=x.device)
        mixed, spent = torch.zeros_like(x), torch.zeros(tokens.shape, device=x.device)
        passes = torch.zeros(tokens.shape, dtype=torch.int64, device=x.device)
        for passed in range(1, loops + 1):
            for bank in kept:
                bank.moves = running
            x = torch.where(running[..., None], self.core_pass(x, given, passed, kept), x)
            passes = passes + running
            if passed == loops:
                break
            stop = torch.sigmoid(self.gate(x, passed))
            ends = running & (spent + stop >= 1 - EPSILON - SLACK)
            weight = torch.where(ends, 1 - spent, torch.where(running, stop, 0.0))
            mixed = mixed + weight[..., None].to(dtype) * x
            spent, running = spent + torch.where(ends, 0.0, weight), running & ~ends
        left = torch.where(running, 1 - spent, 0.0)
        return Pondered(self.coda(mixed + left[..., None].to(dtype) * x, given), passes, 1 - spent)

    def enter(self, tokens: Tensor, dtype: torch.dtype, isolate: bool = False) -> Given:
        """What the layers read of tokens (B, T)."""
        shape = self.shape
        seen = None
        if isolate:
            fast = self.training and takes_bounds(tokens.device, dtype)
            seen = document_bounds(tokens) if fast else same_document(tokens)
        cos, sin = self.rotary(tokens.size(1), tokens.device, dtype)
        found = F.embedding(tokens, self.embedding).to(dtype)
        if self.tap:
            self.tap("lookup", tokens, found)
        if shape.smear:
            found = found + self.smeared(tokens, found)
        return Given(self.normalize(found), cos, sin, seen)

    def layer(
        self, x: Tensor, given: Given, block: int, row: int, lane: Tensor | None = None, kept: Kept | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """One block over x (B, T, D), or some positions of it, with its row of the control vectors."""
        shape = self.shape
        attn_scale, mlp_scale = self.attn_scale[row], self.mlp_scale[row]
        if shape.loop_scale and shape.passes(block) > 1:
            attn_scale, mlp_scale = attn_scale / shape.loops, mlp_scale / shape.loops
        return self.blocks[block](
            x, given.start, given.cos, given.sin, attn_scale, mlp_scale, self.resid_mix[row],
            self.qk_gain[row], given.seen, self.attn_gate[row] if shape.attn_gate else None,
            lane, self.lane_mix[row] if lane is not None else None, kept,
        )  # fmt: skip

    def smeared(self, tokens: Tensor, found: Tensor) -> Tensor:
        """What the piece before adds to each embedding (B, T, D): nothing at the start of a row or a document."""
        before = F.pad(found, (0, 0, 1, 0))[:, :-1]
        gate, size = self.smear[:, 1:].to(found.dtype), self.smear[0, 0].to(found.dtype)
        opened = torch.sigmoid(F.linear(found[..., :GATE_CHANNELS], gate))  # (B, T, 1)
        return size * opened * before * (tokens != BOS)[..., None]

    def head(self, x: Tensor) -> Tensor:
        """Final states (..., D) -> capped logits (..., V) float32."""
        logits = F.linear(x, self.embedding.to(x.dtype))
        if self.tap:
            self.tap("head", x, logits)
        return capped(logits, self.shape.softcap)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Final states (..., D), targets (...) -> mean nats a target."""
        return self.head_losses(x, targets)[0]

    def head_losses(self, x: Tensor, targets: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Final states (..., D), targets (...) -> mean nats a target, times its share where those are given, and the
        nats of each without gradients."""
        if self.tap:  # which wants to see the logits
            logits = self.head(x).flatten(0, -2)
            losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
            return (losses if shares is None else losses * shares).mean(), losses.detach()
        return capped_cross_entropy(x, self.embedding, targets, self.shape.softcap, self.loss_part, shares)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, dtype: torch.dtype = torch.float32,
        loops: int | None = None, isolate: bool = False,
    ) -> Tensor:  # fmt: skip
        """Mean nats a target when targets are given, else logits (B, T, V) float32 of each next token."""
        x = self.hidden(tokens, dtype, loops, isolate)
        return self.head(x) if targets is None else self.head_loss(x, targets)
