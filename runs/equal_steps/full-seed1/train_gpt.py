"""A submission in one file: preset laptop, track unlimited."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import contextlib
import ctypes
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from functools import partial
import hashlib
import itertools
import json
import math
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
import os
from pathlib import Path
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import time
from torch import Tensor
from torch import nn
import torch
import torch.distributed as dist
from torch.func import functional_call
import torch.nn.functional as F
from typing import Literal

# == errors ========================================================================================
# A user's mistake, and how it is said.

class UsageError(Exception):
    """A user's mistake: one sentence that names the option, its value and the way out. Scripts exit 2 on it."""


def require(condition: bool, option: str, value: object, way_out: str) -> None:
    """Raise UsageError("--option value: way out") unless `condition` holds."""
    if not condition:
        name = option.replace("_", "-")
        raise UsageError(f"--{name} {value}: {way_out}.")


# == shape =========================================================================================
# The model's architecture, from which the artifact's tensors follow. No torch here.

BOS = 1  # the piece that opens a document, in shards and in rows


# How the artifact stores a parameter, by the last part of its name.
TENSOR_CLASSES = {
    "embedding": "embed", "query": "matrix", "key": "matrix", "value": "matrix", "out": "matrix", "up": "matrix",
    "down": "matrix", "attn_scale": "control", "mlp_scale": "control", "resid_mix": "control", "qk_gain": "control",
    "skip_weight": "control", "gate": "matrix", "attn_gate": "control", "smear": "control", "lane_mix": "control",
    "exit_weight": "control", "exit_bias": "control",
}  # fmt: skip


def tensor_class(name: str) -> str:
    """Which codec rule a parameter has: embed, matrix or control. Raises ValueError with its name when none."""
    kind = TENSOR_CLASSES.get(name.rsplit(".", 1)[-1])
    if kind is None:
        raise ValueError(f"parameter {name!r} has no codec rule")
    return kind


GATE_CHANNELS = 12  # of a block's input, that open and close gates


@dataclass(frozen=True)
class Shape:
    """The model's architecture; together with the grid widths it decides the artifact's bytes."""

    vocab_size: int = 1024
    """Pieces of the tokenizer."""
    width: int = 512
    """Channels of the residual stream."""
    heads: int = 8
    """Query heads; width / heads is the head size."""
    kv_heads: int = 4
    """Key and value heads, shared by groups of query heads."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLP over the model's width."""
    prelude: int = 0
    """Unique blocks before the core."""
    core: int = 9
    """Unique blocks that run `loops` times in a row."""
    coda: int = 0
    """Unique blocks after the core."""
    loops: int = 1
    """Passes through the core."""
    rope_base: float = 10000.0
    """Base of the rotary position angles."""
    softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    skips: bool = True
    """U-Net skips over the effective layers: the first half pushes, the second half pops."""
    pass_scalars: bool = False
    """Give every pass of a shared block its own scales, mixes, gains and skip weights (a few kB)."""
    activation: Literal["relu2", "leaky-relu2", "swiglu"] = "relu2"
    """The MLP's: squared ReLU, the same with half the slope below zero, or SwiGLU with two thirds of the width."""
    rotary_share: float = 1.0
    """Share of each head's channels that carry positions."""
    depth_scale: bool = False
    """Divide what enters a block by the square root of its place among the unique blocks, counted from 1."""
    exclusive: bool = False
    """Take out of each head's output what lies along the position's own value (exclusive self-attention)."""
    attn_gate: bool = False
    """Gate each head's output by a few channels of the block's input."""
    smear: bool = False
    """Add a gated share of the previous piece's embedding, but not across the start of a document."""
    lanes: bool = False
    """In the second half of the effective layers keep two residual streams, one read by attention, one by the MLP."""
    loop_scale: bool = False
    """Divide what each pass of a shared block adds by the number of its passes."""
    exit_gate: Literal["none", "hazard", "act"] = "none"
    """A gate that reads each token's state after a pass: none, the chance to stop if it has not (hazard), or shares
    that add up to one and weigh the passes' states (adaptive computation time)."""

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def mlp_width(self) -> int:
        """Hidden channels; with SwiGLU's third matrix as many parameters as without."""
        share = 2 / 3 if self.activation == "swiglu" else 1
        return round(share * self.mlp_ratio * self.width)

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that carry positions, an even number."""
        return 2 * round(self.rotary_share * self.head_size / 2)

    @property
    def unique_layers(self) -> int:
        return self.prelude + self.core + self.coda

    def order(self, loops: int | None = None) -> tuple[int, ...]:
        """Index of the unique block that runs at each effective layer, the core repeated `loops` times."""
        middle = tuple(range(self.prelude, self.prelude + self.core)) * (self.loops if loops is None else loops)
        return (*range(self.prelude), *middle, *range(self.prelude + self.core, self.unique_layers))

    @property
    def effective_layers(self) -> int:
        return len(self.order())

    def passes(self, block: int) -> int:
        """How many times unique block `block` runs."""
        return self.order().count(block)

    @property
    def control_rows(self) -> int:
        """Rows of each bank of control vectors: one a unique block, or one a block and pass."""
        return self.effective_layers if self.pass_scalars else self.unique_layers

    def layers(self, loops: int | None = None) -> list[tuple[int, int]]:
        """(unique block, its row in the banks of control vectors) of each effective layer.

        With pass_scalars a row belongs to a block and a pass, whatever the number of loops; passes beyond the shape's
        own share the last one's row.
        """
        passes = [0] * self.unique_layers
        out = []
        for block in self.order(loops):
            row = block
            if self.pass_scalars and block >= self.prelude:
                inside = block < self.prelude + self.core
                done = min(passes[block], self.loops - 1) if inside else self.loops - 1
                row = block + done * self.core
            passes[block] += 1
            out.append((block, row))
        return out

    def skip_layers(self, loops: int | None = None) -> range:
        """Effective layers that pop a skip: the second half, one pop for each push of the first half."""
        depth = len(self.order(loops))
        pushes = depth // 2
        return range(pushes, 2 * pushes) if self.skips else range(0)

    @property
    def skip_rows(self) -> dict[int, int]:
        """Row of the skip bank by the control row of the layer that pops.

        A looped shape has a row for every core and coda block, whether or not it pops at this number of loops: the
        artifact's size does not move with the loops, and loops can be switched on during training.
        """
        if not self.skips:
            return {}
        keys = {self.layers(1)[layer][1] for layer in self.skip_layers(1)}
        if self.loops > 1:
            keys |= set(range(self.prelude, self.control_rows))
        return {key: row for row, key in enumerate(sorted(keys))}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor, in storage order; the last part of a name is its role."""
        width, hidden = self.width, self.mlp_width
        table: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, width)}
        for block in range(self.unique_layers):
            table[f"blocks.{block}.query"] = (width, width)
            table[f"blocks.{block}.key"] = (self.kv_width, width)
            table[f"blocks.{block}.value"] = (self.kv_width, width)
            table[f"blocks.{block}.out"] = (width, width)
            table[f"blocks.{block}.up"] = (hidden, width)
            if self.activation == "swiglu":
                table[f"blocks.{block}.gate"] = (hidden, width)
            table[f"blocks.{block}.down"] = (width, hidden)
        rows = self.control_rows
        table["attn_scale"] = table["mlp_scale"] = (rows, width)
        table["resid_mix"] = (rows, 2, width)
        table["qk_gain"] = (rows, self.heads)
        if self.skip_rows:
            table["skip_weight"] = (len(self.skip_rows), width)
        if self.attn_gate:
            table["attn_gate"] = (rows, self.heads, GATE_CHANNELS)
        if self.smear:
            table["smear"] = (1, GATE_CHANNELS + 1)
        if self.lanes:
            table["lane_mix"] = (rows, 2, 3)
        if self.exit_gate != "none":
            table["exit_weight"], table["exit_bias"] = (1, width), (1, self.loops - 1)
        return table

    @property
    def parameter_count(self) -> int:
        total = 0
        for shape in self.parameters().values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total


# == recipe ========================================================================================
# What a run is besides its Shape: Recipe (changes weights), Pack (weights to bytes), Scoring (how the packed model is
# asked), Run (where, how long and from which seed; not part of the fingerprint). No torch here.

@dataclass(frozen=True)
class Recipe:
    """How the weights come about: rates, and fractions of the clock in place of step counts."""

    sequence_length: int = 1024
    """Tokens a row."""
    batch_tokens: int = 524_288
    """Tokens a step, over all ranks and micro-batches."""
    loader: Literal["sequential", "lanes", "strided"] = "sequential"
    """Rows of a batch are neighbours in the text, or each follows a lane of its own through all of it, or they lie a
    stride apart that visits every row once."""
    isolate: bool = False
    """Attend within a document only."""
    short_length: int = 0
    """Tokens a row at first, batches as large; 0 is the same length throughout."""
    short_until: float = 0.5
    """Fraction of the clock at which rows become long."""
    matrix_rate: float = 0.04
    """Muon's learning rate."""
    embed_rate: float = 0.05
    """Adam's learning rate for the tied embedding."""
    scalar_rate: float = 0.04
    """Adam's learning rate for control vectors."""
    shared_rate: float = 1.0
    """Factor on the rate of a shared block's matrices; 0 divides it by the block's passes, 1 leaves it to Muon's
    normalisation."""
    depth_loss: Literal["last", "each", "gate"] = "last"
    """Train what the last pass leads to; what every pass leads to, all alike, so that a token may stop at any; or each
    as likely as the model's own gate stops there."""
    prior_weight: float = 0.1
    """Weight of the divergence of a hazard gate's exits from their prior."""
    prior_hazard: float = 0.0
    """Chance to stop after each pass in that prior, cut at the last; 0 is the uniform prior."""
    halt_penalty: float = 0.0
    """Nats added for a mean depth of all passes; a gate that stops earlier pays its share."""
    halt_warmup: float = 0.1
    """Fraction of the clock, from the repeats on, over which that penalty rises."""
    target_depth: float = 0.0
    """Mean number of passes that the penalty is steered to; 0 leaves it as it is."""
    gate_bias: float = 0.0
    """Added to the gate's logits at the start; below 0 is a gate that keeps looping."""
    loops_from: float = 0.0
    """Fraction of the clock at which the core's repeats are switched on; before it the core runs once."""
    momentum: float = 0.95
    """Muon's Nesterov momentum after its warm-up."""
    momentum_start: float = 0.85
    """Muon's momentum at the start."""
    momentum_warmup: float = 500 / 13_780
    """Fraction of the clock over which the momentum rises."""
    newton_schulz: Literal["quintic", "polar-express"] = "quintic"
    """Coefficients of the orthogonalising iteration."""
    newton_schulz_steps: int = 5
    """Iterations of it."""
    row_normalize: bool = False
    """Divide each row of the update by its norm before orthogonalising (MuonEq-R)."""
    matrix_decay: float = 0.0
    """Decoupled weight decay of the matrices, times the rate."""
    embed_decay: float = 0.0
    """Decoupled weight decay of the embedding, times the rate."""
    decay_taper: float = 1.0
    """Share of the matrices' decay that is left at the end; it falls from 0.7 of the clock on."""
    average: float = 0.0
    """Share of the clock over which weights are averaged, exponentially, for what is packed; 0 packs the last ones."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    warmdown: float = 1200 / 13_780
    """Last fraction of the clock, over which every rate falls linearly."""
    rate_floor: float = 0.0
    """Rates fall to this share of their start."""
    clip_norm: float = 0.0
    """Clip the gradient's global norm to this; 0 is off."""
    grid_noise: Literal["off", "uniform", "straight-through"] = "off"
    """Train shared blocks against the artifact's rounding: uniform noise of a step's size, or rounded weights."""
    noise_from: float = 0.85
    """Fraction of the clock from which they do."""
    noise_step: float = 0.0
    """Step of that grid in standard deviations of a row; 0 is pack.matrix_step."""
    embed_std: float = 0.005
    """Standard deviation of the embedding at the start."""
    qk_gain: float = 1.5
    """Start of the learned gain on normalised queries."""
    matrix_init: Literal["uniform", "orthogonal"] = "uniform"
    """Start of matrices that do not start at zero."""

    def length_at(self, progress: float) -> int:
        """Tokens a row at `progress` in [0, 1] of the clock."""
        return self.short_length if self.short_length and progress < self.short_until else self.sequence_length

    def decay_at(self, progress: float) -> float:
        """The matrices' weight decay at `progress` in [0, 1] of the clock."""
        return self.matrix_decay * (1 - (1 - self.decay_taper) * max(0.0, (progress - 0.7) / 0.3))

    def rate_scale(self, progress: float) -> float:
        """Factor on every learning rate at `progress` in [0, 1] of the clock."""
        left = (1.0 - progress) / self.warmdown if self.warmdown > 0 else 1.0
        return max(min(1.0, left), self.rate_floor)

    def momentum_at(self, progress: float) -> float:
        """Muon's momentum at `progress` in [0, 1] of the clock."""
        share = min(1.0, progress / self.momentum_warmup) if self.momentum_warmup > 0 else 1.0
        return self.momentum_start + (self.momentum - self.momentum_start) * share


@dataclass(frozen=True)
class Pack:
    """How weights become bytes. With both steps 0 they are chosen so that the artifact fills its cap."""

    matrix_step: float = 0.0
    """Grid step of the blocks' matrices in standard deviations of their rows."""
    embed_step: float = 0.0
    """Grid step of the tied embedding, likewise."""
    rounding: Literal["feedback", "nearest"] = "feedback"
    """Feed each rounding error forward into the weights not yet rounded, or round each to the nearest."""
    quantizer: Literal["scalar", "trellis"] = "trellis"
    """One grid, or the two of a trellis: 0.16 bits a weight less at the same error."""
    column_steps: bool = True
    """Give columns of a matrix steps of their own, finer where errors cost more."""
    row_power: float = 0.0
    """Steps of a tensor's rows go with this power of their standard deviation."""
    rate_weight: float = 0.0
    """Prefer the cheaper of two neighbouring grid points; 1 weighs bits as the whole grid does."""
    coder: Literal["adaptive", "static"] = "adaptive"
    """Tables that follow rows or columns where that is shorter, or one table a tensor."""
    calibration_batches: int = 16
    """Batches of training text for the sensitivities, taken from the training time; 0 collects none."""
    target_bytes: int = 0
    """Bytes of the artifact where steps are chosen; 0 is the track's cap less the code and 0.05 %."""


@dataclass(frozen=True)
class Scoring:
    """How the packed model is asked, and what it learns on the way; stored in the artifact."""

    stride: int = 0
    """Targets that each row adds, fewer than its tokens for sliding windows; 0 is the whole row."""
    isolate: bool = False
    """Attend within a document only."""
    adapt_rank: int = 0
    """Rank of what is added to the core's matrices while scoring, from text whose scores stand; 0 learns nothing."""
    adapt_rate: float = 1e-3
    """Learning rate of one step a chunk."""
    adapt_context: int = 256
    """Tokens of a row that is learned from."""
    chunk: int = 256
    """Targets between two steps."""
    per_document: bool = True
    """Forget at the start of each document."""
    ngram_order: int = 0
    """Longest context whose successors in the scored text sharpen the model's distribution; 0 counts nothing."""
    exit: Literal["none", "fixed", "random", "entropy", "margin", "divergence", "difference", "gate"] = "none"
    """Rule by which each token stops at a pass of its own."""
    exit_threshold: float = 0.0
    """The rule's: passes, chance, nats of entropy, margin of probabilities, nats moved, share of the state moved, or
    what the gate's exits must have summed to."""
    phase_tokens: int = 0
    """Targets after which one pass over them is made that is never forgotten; 0 makes none."""
    phase_rate: float = 1e-3

    @property
    def adapts(self) -> bool:
        """Whether the scorer learns from what was scored."""
        return self.adapt_rank > 0 or self.ngram_order > 0


@dataclass(frozen=True)
class Run:
    """Where and how a run happens; none of it is part of the configuration's fingerprint."""

    data: str = "data/builtin"
    """Folder written by `python -m golf.prepare` (environment: DATA_PATH)."""
    seed: int = 1
    """Seed of the weights' start (environment: SEED)."""
    name: str = ""
    """Name of the run folder, runs/DATE-NAME; the preset and seed when empty."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 where the processor computes it natively."""
    compile: Literal["auto", "block", "model", "none"] = "auto"
    """What torch.compile sees; auto is block, or none without a C++ compiler."""
    overlap: bool = False
    """With several ranks, let each own a part of Muon's matrices and communicate beside the arithmetic."""
    threads: int = 0
    """Threads of the CPU's matrix products; 0 leaves it to torch."""
    micro_rows: int = 0
    """Rows a rank computes at a time; 0 is all of its share of the batch."""
    max_steps: int = 0
    """Stop after this many steps and read no clock (progress is step / max-steps); 0 trains by the clock."""
    cap: float = 0.0
    """Training seconds, if fewer than the track's; 0 is the track's own, which `unlimited` has none of."""
    pace: str = ""
    """What the clock counts in place of seconds, for comparisons on a busy machine: milliseconds of a step as
    LOOPSxLENGTH=MS,... (`golf.ablate` measures them)."""
    track: Literal["none", "trackio"] = "none"
    """Mirror the finished run's log to trackio's store on this machine."""
    validate_every: int = 0
    """Steps between looks at the validation loss, outside the clock; 0 is only at the end."""
    log_every: int = 20
    """Steps between progress lines."""
    keep_every: int = 0
    """Steps between checkpoints that --run.resume goes on from, outside the clock; 0 keeps none."""
    resume: str = ""
    """Run folder whose newest checkpoint is gone on from; give the flags that the run was begun with."""
    checkpoint: bool = False
    """Write the weights and sensitivities beside the artifact, for `artifact.py pack`; they do not count."""
    judge: bool = True
    """Have the referee score the packed artifact at the end."""
    allow_over_cap: bool = False
    """Train even where the budget says that the artifact will not fit."""


def said_pace(text: str) -> dict[tuple[int, ...], float]:
    """LOOPSxLENGTH=MS,... as seconds by (loops, length). Raises ValueError."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return {tuple(map(int, kind.split("x"))): float(ms) / 1e3 for kind, _, ms in parts}


def kinds_of_steps(shape: Shape, recipe: Recipe) -> list[tuple[int, int]]:
    """(row length, loops) of every kind of step that training takes, the deepest, which needs most memory, first."""
    found = {
        (recipe.length_at(progress), shape.loops if progress >= recipe.loops_from else 1)
        for progress in (0.0, recipe.short_until, recipe.loops_from, 1.0)
    }
    return sorted(found, key=lambda kind: (-kind[1], -kind[0]))


# == checks ========================================================================================
# Which options cannot work, alone or together: each check raises UsageError naming the first. No torch here.

MOST = {"vocab_size": 65_536, "width": 65_536, "heads": 4096, "kv_heads": 4096, "core": 1024, "loops": 1024,
           "prelude": 1024, "coda": 1024, "mlp_ratio": 64.0, "rope_base": 1e9, "softcap": 1e9}  # fmt: skip


def check_shape(shape: Shape) -> None:
    """Raise UsageError for a shape that no model can have."""
    for name, most in MOST.items():
        value = getattr(shape, name)
        require(value <= most, f"shape.{name}", value, f"give at most {most:g}")  # also refuses nan
    for name in ("vocab_size", "width", "heads", "kv_heads", "core", "loops"):
        require(getattr(shape, name) >= 1, f"shape.{name}", getattr(shape, name), "give 1 or more")
    for name in ("prelude", "coda"):
        require(getattr(shape, name) >= 0, f"shape.{name}", getattr(shape, name), "give 0 or more")
    require(
        shape.core * shape.loops <= 4096, "shape.loops", shape.loops, f"{shape.core} blocks run too often, give fewer"
    )
    require(shape.mlp_ratio > 0, "shape.mlp_ratio", shape.mlp_ratio, "give more than 0")
    width, heads = shape.width, shape.heads
    near = max(1, width // heads) * heads
    require(width % heads == 0, "shape.width", width, f"not divisible by {heads} heads, {near} is")
    require(shape.head_size % 2 == 0, "shape.heads", heads, f"the head size {shape.head_size} must be even for RoPE")
    require(heads % shape.kv_heads == 0, "shape.kv_heads", shape.kv_heads, f"must divide the {heads} heads")
    require(0 <= shape.rotary_share <= 1, "shape.rotary_share", shape.rotary_share, "give 0 to 1")
    require(shape.mlp_width >= 1, "shape.mlp_ratio", shape.mlp_ratio, "give more than 0")
    require(shape.softcap > 0, "shape.softcap", shape.softcap, "give more than 0")
    require(shape.rope_base > 1, "shape.rope_base", shape.rope_base, "give more than 1")


def check_exits(shape: Shape) -> None:
    """Raise UsageError for a shape whose tokens cannot stop one by one."""
    for wrong, option, way_out in (
        (shape.loops < 2, "shape.loops", "nothing is repeated, give 2 or more"),
        (shape.skips, "shape.skips", "skips join layers by their number, give --shape.no-skips"),
        (shape.lanes, "shape.lanes", "lanes begin at a layer's number, give --shape.no-lanes"),
    ):
        if wrong:
            raise UsageError(f"--{option}: {way_out} where tokens stop by themselves.")


def check_gate(shape: Shape, recipe: Recipe, run: Run) -> None:
    """Raise UsageError for passes that cannot all be trained, or a gate that nothing trains or that this loss lacks."""
    gate, loss = shape.exit_gate, recipe.depth_loss
    if loss != "last" or gate != "none":
        check_exits(shape)
    require(loss != "gate" or gate != "none", "recipe.depth_loss", loss, "name a gate with --shape.exit-gate")
    require(gate != "act" or loss == "gate", "shape.exit_gate", gate, "it needs --recipe.depth-loss gate")
    require(gate != "act" or not recipe.isolate, "recipe.isolate", True, "tokens that stop see their whole row")
    require(loss == "last" or run.compile != "model", "run.compile", run.compile, f"depth loss {loss} needs block")
    for name in ("halt_penalty", "target_depth"):
        value = getattr(recipe, name)
        require(value == 0 or loss == "gate", f"recipe.{name}", value, "it needs --recipe.depth-loss gate")
        require(0 <= value < 1e6, f"recipe.{name}", value, "give 0 or more")
    fits = recipe.target_depth == 0 or 1 <= recipe.target_depth <= shape.loops
    require(fits, "recipe.target_depth", recipe.target_depth, f"give 1 to {shape.loops} passes, or 0")
    require(0 <= recipe.prior_weight < 1e6, "recipe.prior_weight", recipe.prior_weight, "give 0 or more")
    require(0 <= recipe.prior_hazard < 1, "recipe.prior_hazard", recipe.prior_hazard, "give 0 or more and less than 1")
    require(abs(recipe.gate_bias) <= 100, "recipe.gate_bias", recipe.gate_bias, "give -100 to 100")


def check_threshold(rule: str, threshold: float, shape: Shape) -> None:
    """Raise UsageError for a threshold that its rule cannot take, or a rule that the shape cannot follow."""
    loops, gate = shape.loops, shape.exit_gate
    require(rule != "gate" or gate != "none", "scoring.exit", rule, "the model has no gate, give another rule")
    fits = rule == "gate" or gate != "act"
    require(fits, "scoring.exit", rule, "the model mixes its passes by its own gate, give gate")
    least, most = int(rule == "fixed"), {"fixed": loops, "random": 1.0, "margin": 1.0, "gate": 1.0}.get(rule, 1e6)
    whole = rule != "fixed" or threshold in range(1, loops + 1)
    way_out = f"{rule} takes {least} to {most:g}"
    require(0 <= threshold <= most and whole, "scoring.exit_threshold", f"{threshold:g}", way_out)


def check_pace(shape: Shape, recipe: Recipe, run: Run) -> None:
    """Raise UsageError for a pace that leaves out a kind of step, or a run that it would prove nothing of."""
    pace = run.pace
    if not pace:
        return
    require(not run.judge, "run.pace", pace, "give --run.no-judge, seconds that are said prove no limit")
    require(not run.max_steps, "run.max_steps", run.max_steps, "give no pace, or no number of steps")
    try:
        told = said_pace(pace)
    except ValueError:
        told = {}
    for length, loops in kinds_of_steps(shape, recipe):
        fits = 0 < told.get((loops, length), 0) < 1e6
        require(fits, "run.pace", pace, f"give {loops}x{length}=MS, as --run.pace 1x256=300,3x256=450")


def check_recipe(recipe: Recipe, run: Run, world_size: int) -> None:
    """Raise UsageError for a batch that does not divide over rows and ranks, or a fraction outside [0, 1]."""
    length, batch = recipe.sequence_length, recipe.batch_tokens
    require(length >= 2, "recipe.sequence_length", length, "give 2 or more")
    require(batch >= length, "recipe.batch_tokens", batch, f"give at least one row of {length} tokens")
    require(batch % length == 0, "recipe.batch_tokens", batch, f"give a multiple of the sequence length {length}")
    rows = batch // length
    require(
        rows % world_size == 0,
        "recipe.batch_tokens",
        batch,
        f"its {rows} rows do not divide over {world_size} ranks, start a number of processes that divides {rows}",
    )
    micro = run.micro_rows
    share = rows // world_size
    require(micro >= 0 and (micro == 0 or share % micro == 0), "run.micro_rows", micro, f"must divide {share} rows")
    short = recipe.short_length
    fits = short == 0 or (0 < short < recipe.sequence_length and recipe.sequence_length % short == 0)
    require(fits, "recipe.short_length", short, f"give a divisor of {recipe.sequence_length}, or 0")
    for name in (
        "short_until",
        "halt_warmup",
        "decay_taper",
        "average",
        "loops_from",
        "noise_from",
        "momentum_warmup",
        "warmdown",
        "rate_floor",
        "momentum",
        "momentum_start",
    ):
        value = getattr(recipe, name)
        require(0 <= value <= 1, f"recipe.{name}", value, "give a fraction from 0 to 1")
    for name in ("matrix_rate", "embed_rate", "scalar_rate", "shared_rate", "matrix_decay", "embed_decay", "clip_norm",
                 "embed_std", "noise_step"):  # fmt: skip
        value = getattr(recipe, name)
        require(0 <= value < float("inf"), f"recipe.{name}", value, "give 0 or more")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(recipe, name)
        require(0 <= value < 1, f"recipe.{name}", value, "give 0 or more and less than 1")
    require(recipe.adam_epsilon > 0, "recipe.adam_epsilon", recipe.adam_epsilon, "give more than 0")
    require(recipe.newton_schulz_steps >= 1, "recipe.newton_schulz_steps", recipe.newton_schulz_steps, "give 1 or more")


def check_pack(pack: Pack) -> None:
    """Raise UsageError for steps that are no grid, or only one of the two."""
    for name in ("matrix_step", "embed_step"):
        value = getattr(pack, name)
        require(value == 0 or 0.005 <= value <= 3, f"pack.{name}", value, "give 0.005 to 3 deviations, or 0 to choose")
    both = (pack.matrix_step > 0) == (pack.embed_step > 0)
    require(both, "pack.embed_step", pack.embed_step, "give both steps, or neither")
    for name, most in (("row_power", 1), ("rate_weight", 2), ("calibration_batches", 4096)):
        value = getattr(pack, name)
        require(0 <= value <= most, f"pack.{name}", value, f"give 0 to {most}")
    require(pack.target_bytes >= 0, "pack.target_bytes", pack.target_bytes, "give 0 or more")


def check_scoring(scoring: Scoring, context: int, shape: Shape) -> None:
    """Raise UsageError for a model of this shape that cannot be asked so."""
    if scoring.exit != "none":
        check_exits(shape)
        check_threshold(scoring.exit, scoring.exit_threshold, shape)
        require(not scoring.isolate, "scoring.isolate", True, "tokens that stop see their whole row")
        require(scoring.adapt_rank == 0, "scoring.adapt_rank", scoring.adapt_rank, "give 0 where tokens stop")
    still = shape.exit_gate != "act" or not (scoring.isolate or scoring.adapt_rank)
    require(still, "scoring.isolate" if scoring.isolate else "scoring.adapt_rank", "on", "an ACT model's tokens stop")
    require(0 <= scoring.ngram_order <= 3, "scoring.ngram_order", scoring.ngram_order, "give 0 to 3")
    fits = shape.vocab_size ** (scoring.ngram_order + 1) < 1 << 63
    require(fits, "scoring.ngram_order", scoring.ngram_order, "too long for this vocabulary, give less")
    require(0 <= scoring.stride <= context, "scoring.stride", scoring.stride, f"give 0 to {context}, the row's length")
    require(0 <= scoring.adapt_rank <= 1024, "scoring.adapt_rank", scoring.adapt_rank, "give 0 to 1,024")
    require(scoring.phase_tokens >= 0, "scoring.phase_tokens", scoring.phase_tokens, "give 0 or more")
    for name in ("chunk", "adapt_context"):
        require(2 <= getattr(scoring, name) <= 1 << 20, f"scoring.{name}", getattr(scoring, name), "give 2 or more")
    for name in ("adapt_rate", "phase_rate"):
        require(0 <= getattr(scoring, name) <= 1, f"scoring.{name}", getattr(scoring, name), "give 0 to 1")


# == config ========================================================================================
# One run, whole: its parts, its track's limits, its fingerprint. No torch here.
#
# Everything that can be derived from a field is a property, never a second field.

@dataclass(frozen=True)
class Track:
    """Limits of a contest: training and evaluation seconds, and bytes of code plus artifact."""

    train_seconds: float
    eval_seconds: float
    bytes_cap: int


TRACKS = {
    "contest": Track(600.0, 600.0, 16_000_000),
    "laptop": Track(600.0, 600.0, 400_000),
    "smoke": Track(60.0, 120.0, 400_000),
    "unlimited": Track(float("inf"), 600.0, 16_000_000),  # the contest's non-record track: no limit on training
}


# Options that lost their comparisons and are gone (LAB.md), as runs without them have them: records that name them so
# are read, and fingerprints stay.
RETIRED: dict[str, dict] = {
    "shape": {
        "pass_signal": False, "pass_mix": False, "bigram_rows": 0, "bigram_width": 32, "value_blocks": 0,
    },
    "recipe": {"random_loops": False, "embed_spectrum": 0.0},
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    preset: str = "custom"
    track: Literal["contest", "laptop", "smoke", "unlimited"] = "contest"
    """Whose limits hold."""
    shape: Shape = field(default_factory=Shape)
    recipe: Recipe = field(default_factory=Recipe)
    pack: Pack = field(default_factory=Pack)
    run: Run = field(default_factory=Run)
    scoring: Scoring = field(default_factory=Scoring)

    @property
    def limits(self) -> Track:
        return TRACKS[self.track]

    @property
    def train_seconds(self) -> float:
        """Seconds on the training clock: the track's, or fewer when --run.cap asks for fewer."""
        return self.run.cap or self.limits.train_seconds

    def target_bytes(self, code_bytes: int) -> int:
        """Bytes that the artifact may take beside this much code."""
        return self.pack.target_bytes or int((self.limits.bytes_cap - code_bytes) * 0.9995)

    @property
    def fingerprint(self) -> str:
        """Hash of track, shape, recipe and packing: equal for all seeds and machines of one configuration."""
        shape, recipe = (RETIRED[name] | asdict(getattr(self, name)) for name in ("shape", "recipe"))
        text = json.dumps([self.track, shape, recipe, asdict(self.pack), asdict(self.scoring)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, world_size: int = 1) -> Config:
        """Return self, or raise UsageError naming the first option that cannot work."""
        check_shape(self.shape)
        check_recipe(self.recipe, self.run, world_size)
        check_pack(self.pack)
        check_scoring(self.scoring, self.recipe.sequence_length, self.shape)
        check_gate(self.shape, self.recipe, self.run)
        step = self.recipe.noise_step or self.pack.matrix_step
        told = self.recipe.grid_noise == "off" or step > 0
        require(told, "recipe.noise_step", self.recipe.noise_step, "name the grid's step in row deviations")
        for name in ("seed", "threads", "max_steps", "cap", "validate_every", "log_every", "keep_every"):
            require(getattr(self.run, name) >= 0, f"run.{name}", getattr(self.run, name), "give 0 or more")
        check_pace(self.shape, self.recipe, self.run)
        limit = self.limits.train_seconds
        ends = self.train_seconds < float("inf") or self.run.max_steps > 0
        require(ends, "track", self.track, "it has no clock, give --run.max-steps or --run.cap")
        require(self.run.cap <= limit, "run.cap", self.run.cap, f"the {self.track} track allows {limit:g} s")
        return self


def fields_from_dict(kind: type, values: object, what: str):
    """A flat dataclass from a stranger's JSON object, names and types checked. Raises UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"The {what} is not a JSON object.")
    kinds, gone = {f.name: type(f.default) for f in fields(kind)}, RETIRED.get(what, {})
    values = {name: value for name, value in values.items() if name not in gone or value != gone[name]}
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise UsageError(f"The {what} has the unknown field {unknown[0]!r:.60}.")
    for name, value in values.items():
        wanted = (int, float) if kinds[name] is float else (kinds[name],)
        if type(value) not in wanted:
            raise UsageError(f"The {what}'s field {name} is {value!r:.60}, not of type {kinds[name].__name__}.")
    return kind(**values)


def shape_from_dict(values: object) -> Shape:
    """Shape from a stranger's JSON object, types and ranges checked. Raises UsageError."""
    shape = fields_from_dict(Shape, values, "shape")
    check_shape(shape)
    return shape


# == files =========================================================================================
# Files that are whole or not there.

def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, fsync, rename. Raises an OSError that names it; leaves no other file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as out:
            for part in parts:
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # which a full disk does not name
        raise


# == halting =======================================================================================
# How deep each token goes: distributions over exits, the losses that train them, and rules that stop.
#
# A gate's logits are hazards: the chance to stop after a pass, given that the token has not stopped before. All of it is
# in float32 or wider, and in logarithms, where products of many survivals would vanish.

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


def uniform_biases(loops: int) -> list[float]:
    """Hazard logits for which every exit of `loops` is equally likely: log(1 / (loops - t)), t = 1 .. loops - 1."""
    return [-math.log(loops - t) for t in range(1, loops)]


def prior_logprobs(loops: int, geometric: float = 0.0) -> Tensor:
    """(R,) log-probabilities of a prior over exits: uniform, or geometric with this hazard, cut at R and normalised.
    Raises ValueError for a hazard outside [0, 1)."""
    if not 0 <= geometric < 1:
        raise ValueError(f"a hazard of {geometric} is not in [0, 1)")
    if not geometric:
        return torch.full((loops,), -math.log(loops))
    steps = torch.arange(loops) * math.log1p(-geometric)
    return steps - steps.logsumexp(dim=0)


def expected_depth(logprobs: Tensor) -> Tensor:
    """(R, ...) exit log-probabilities -> (...) mean number of passes, from 1 to R."""
    depth = torch.arange(1, len(logprobs) + 1, device=logprobs.device, dtype=logprobs.dtype)
    return torch.tensordot(depth, logprobs.exp(), dims=1)


def divergence(logprobs: Tensor, prior: Tensor) -> Tensor:
    """KL(exits || prior) in nats, (...): never negative, and zero where they agree."""
    prior = prior.to(logprobs).view(-1, *[1] * (logprobs.ndim - 1))
    return (logprobs.exp() * (logprobs - prior)).sum(dim=0)


# == loss ==========================================================================================
# Cross-entropy of capped logits, some positions at a time, its gradients taken in the same pass.

CHUNK = 8192  # positions at most whose logits exist at a time


STEEP = 40.0  # up to this cap exp(-2 cap) is far from float32's least number, and no maximum need be found


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32 (Gemma 2's softcap)."""
    return cap * torch.tanh(logits.float() / cap)


def pieces(count: int) -> list[slice]:
    """`count` positions in slices of at most CHUNK, as equal as can be: one shape for a compiler where it divides."""
    size = -(-count // -(-count // CHUNK))
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
        for piece in pieces(len(flat)):
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
    for piece in pieces(len(flat)):
        logits = capped(F.linear(flat[piece], weight.to(x.dtype)), cap)
        losses.append(F.cross_entropy(logits, wanted[piece], reduction="none"))
    losses = torch.cat(losses).view(targets.shape)
    return (losses if shares is None else losses * shares).mean(), losses


# == block =========================================================================================
# One transformer block, and attention over whole rows or over positions that still change.

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split: x (B, H, T, head), cos and sin (T, R / 2); channels beyond R stay as they are."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def exclude_own(y: Tensor, v: Tensor) -> Tensor:
    """y (B, H, T, head) less its part along the own value v (B, KV, T, head) of each position (contest, #265)."""
    batch, heads, length, size = y.shape
    own = F.normalize(v, dim=-1).unsqueeze(2)  # (B, KV, 1, T, head)
    grouped = y.view(batch, v.size(1), heads // v.size(1), length, size)
    return (grouped - (grouped * own).sum(dim=-1, keepdim=True) * own).view(y.shape)


# Told of a matrix's input (B, T, C) and output (B, T, R) at each use, when Hessians are collected.
Tap = Callable[[str, Tensor, Tensor], None]


STEEPEST = 80.0  # score whose exponential, times any number of keys, is still a float32


QUERY_BLOCK = 32  # queries that a short row on a CPU attends at a time


def same_document(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, 1, T, T): whether a position may attend to another, at or before it in its document."""
    document = (tokens == BOS).cumsum(dim=1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return seen[:, None]


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
    cos: Tensor  # (T, R / 2), or (B, 1, N, R / 2)
    sin: Tensor
    seen: Tensor | None = None  # (B, 1, T, T), or causal

    def at(self, place: Tensor) -> Given:
        """Of the positions (B, N) int64 only."""
        return Given(gathered(self.start, place), self.cos[place][:, None], self.sin[place][:, None])

    def repeated(self, times: int) -> Given:
        """The same rows several times over, one copy after the other."""
        seen = None if self.seen is None else self.seen.repeat(times, 1, 1, 1)
        return Given(self.start.repeat(times, 1, 1), self.cos, self.sin, seen)


def gathered(x: Tensor, place: Tensor) -> Tensor:
    """x (B, T, D), place (B, N) int64 -> (B, N, D)."""
    return x.gather(1, place[..., None].expand(-1, -1, x.size(-1)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """q (B, H, T, head), k and v (B, KV, T, head) -> (B, H, T, head), each position attending to itself and before,
    or where `seen` (B, 1, T, T) says so.

    Compiled for a CPU, short rows go as plain products, 32 queries against the keys up to them, divided by their sum
    at the end. No maximum is taken off first: queries and keys come normalised, so that a score beyond STEEPEST, where
    it would saturate, needs a gain of 10 at head size 64. A step of `laptop` in float32 took 291 ms where it took 308
    with scaled_dot_product_attention (2 cores).
    """
    batch, heads, length, size = q.shape
    groups = k.size(1)
    if seen is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=groups != heads)
    if not (torch.compiler.is_compiling() and q.device.type == "cpu" and length <= 512):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)
    each = heads // groups
    q = (q * size**-0.5).reshape(batch * groups, each, length, size)
    k, v = k.reshape(batch * groups, length, size), v.reshape(batch * groups, length, size)
    late = q.dtype == torch.float32  # rounded sums would not cancel in the gradients
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(length, start + QUERY_BLOCK)
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
        if shape.activation == "swiglu":
            self.gate = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def attend(
        self, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, attn_gate: Tensor | None,
        kept: Kept | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, D) normalised -> (B, T, D)."""
        batch, length, width = x.shape
        kv_width = self.kv_heads * self.head_size
        weight = torch.cat((self.query, self.key, self.value)).to(x.dtype)  # one product instead of three
        q, k, v = F.linear(x, weight).split((width, kv_width, kv_width), dim=-1)
        if self.tap:
            self.tap("query", x, q), self.tap("key", x, k), self.tap("value", x, v)
        q = q.view(batch, length, self.heads, self.head_size).transpose(1, 2)  # (B, H, T, head)
        k = k.view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        q = rotate(F.rms_norm(q, (self.head_size,)), cos, sin) * gain.to(x.dtype)[:, None, None]
        k = rotate(F.rms_norm(k, (self.head_size,)), cos, sin)
        y = causal_attention(q, k, v, seen) if kept is None else causal_attention(q, *kept.take(k, v), kept.seen())
        if self.exclusive:
            y = exclude_own(y, v)
        if attn_gate is not None:
            opened = 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], attn_gate.to(x.dtype)))  # (B, T, H)
            y = y * opened.transpose(1, 2)[..., None]
        y = y.transpose(1, 2).reshape(batch, length, width)
        out = F.linear(y, self.out.to(x.dtype))
        if self.tap:
            self.tap("out", y, out)
        return out

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) normalised -> (B, T, D)."""
        up = F.linear(x, self.up.to(x.dtype))
        if self.activation == "swiglu":
            opened = F.linear(x, self.gate.to(x.dtype))
            hidden = up * F.silu(opened)
            if self.tap:
                self.tap("gate", x, opened)
        else:
            hidden = (F.leaky_relu(up, 0.5) if self.activation == "leaky-relu2" else F.relu(up)).square()
        down = F.linear(hidden, self.down.to(x.dtype))
        if self.tap:
            self.tap("up", x, up), self.tap("down", hidden, down)
        return down

    def forward(
        self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, attn_scale: Tensor, mlp_scale: Tensor, mix: Tensor,
        gain: Tensor, seen: Tensor | None = None, attn_gate: Tensor | None = None,
        lane: Tensor | None = None, lane_mix: Tensor | None = None, depth_scale: float = 1.0, kept: Kept | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """x, x0 (B, T, D); scales (D,), mix (2, D), gain (H,), gate (H, GATE_CHANNELS) -> (B, T, D).

        With a second `lane` (B, T, D) attention reads x, the MLP the lane, and both write to both as lane_mix (2, 3)
        says: the two streams are returned (contest, #1529).
        """
        width = (x.size(-1),)
        mix = mix.to(x.dtype)
        if lane is None:
            x = mix[0] * x + mix[1] * x0
            found = self.attend(F.rms_norm(x, width) * depth_scale, gain, cos, sin, seen, attn_gate, kept)
            x = x + attn_scale.to(x.dtype) * found
            return x + mlp_scale.to(x.dtype) * self.feed_forward(F.rms_norm(x, width) * depth_scale)
        normal = F.rms_norm(mix[0] * x + mix[1] * x0, width) * depth_scale
        found = attn_scale.to(x.dtype) * self.attend(normal, gain, cos, sin, seen, attn_gate, kept)
        thought = mlp_scale.to(x.dtype) * self.feed_forward(F.rms_norm(lane, width) * depth_scale)
        a, b = lane_mix.to(x.dtype)
        return a[0] * x + a[1] * found + a[2] * thought, b[0] * lane + b[1] * found + b[2] * thought


# == model =========================================================================================
# RecurrentGPT: a transformer whose core blocks run several times, with one forward path for all uses.

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
    "gate": Role("muon", "fan_in"),
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
        self.loss_part = part_loss  # compiled or not
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
            elif rule == "fan_in" and recipe.matrix_init == "orthogonal":
                nn.init.orthogonal_(value, generator=generator)
            elif rule == "fan_in":
                value.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=generator)
            elif rule == "lanes":
                value.copy_(torch.tensor([1.1, 1.0, 1.0]))
            elif rule == "mix":
                value.copy_(torch.tensor([1.0, 0.0])[:, None])
            elif rule == "exits":
                prior = uniform_biases(self.shape.loops)
                value.copy_(torch.tensor(prior if self.shape.exit_gate == "hazard" else [ACT_BIAS] * len(prior)))
                value += recipe.gate_bias
            elif rule in ("zero", "one", "gain"):
                value.fill_({"zero": 0.0, "one": 1.0, "gain": recipe.qk_gain}[rule])
            else:
                raise ValueError(f"parameter {name!r} has the unknown init rule {rule!r}")
            p.copy_(value)
        return self

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the position angles, (T, rotary_channels / 2) each, computed once for each length."""
        key = (length, device, dtype)
        if key not in self.angles:
            half = self.shape.rotary_channels // 2
            frequency = self.shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
            self.angles[key] = (angle.cos().to(device, dtype), angle.sin().to(device, dtype))
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
        return F.rms_norm(x, (shape.width,))

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
        return F.rms_norm(x, (shape.width,))

    def nothing_kept(self, x: Tensor) -> list[Kept]:
        """For each block of the core, of states x (B, T, D): every position changes, and nothing is known yet."""
        shape, (rows, length, _) = self.shape, x.shape
        empty = x.new_zeros(rows, shape.kv_heads, length, shape.head_size)
        return [Kept(empty.clone(), empty.clone()) for _ in range(shape.core)]

    def gate(self, x: Tensor, passed: int) -> Tensor:
        """States x (..., D) after a pass below the last -> (...) logits of stopping, float32 or wider."""
        read = F.rms_norm(x, (x.size(-1),)).to(torch.promote_types(x.dtype, torch.float32))
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
        """tokens (B, T) -> the passes' states mixed as adaptive computation time says (halting.act); a token that
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
        seen = same_document(tokens) if isolate else None
        cos, sin = self.rotary(tokens.size(1), tokens.device, dtype)
        found = F.embedding(tokens, self.embedding).to(dtype)
        if self.tap:
            self.tap("lookup", tokens, found)
        if shape.smear:
            found = found + self.smeared(tokens, found)
        return Given(F.rms_norm(found, (shape.width,)), cos, sin, seen)

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
            lane, self.lane_mix[row] if lane is not None else None,
            (block + 1) ** -0.5 if shape.depth_scale else 1.0, kept,
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


# == objective =====================================================================================
# What a training step minimises: the last pass's loss, every pass's, or each as likely as the gate stops there.

STEERING = 0.02  # nats by which a step moves the penalty when all passes are one too many


class Objective:
    """The loss of a configuration, with the penalty on depth as it now stands, and what a step showed of its passes."""

    def __init__(self, config: Config):
        self.recipe, self.shape = config.recipe, config.shape
        self.steered, self.penalty = 0.0, 0.0
        self.losses, self.depths = [], []

    def begin(self, progress: float) -> None:
        """Before a step at `progress` in [0, 1] of the clock: how much depth costs, and nothing seen yet."""
        recipe = self.recipe
        since = progress - recipe.loops_from
        rise = min(1.0, max(0.0, since) / recipe.halt_warmup) if recipe.halt_warmup else 1.0
        self.penalty = rise * (recipe.halt_penalty + self.steered)
        self.losses, self.depths = [], []

    def steer(self, depth: float) -> None:
        """After a step of mean depth `depth`, alike on all ranks: towards the depth that is wanted."""
        if self.recipe.target_depth:
            self.steered += STEERING * (depth - self.recipe.target_depth) / self.shape.loops

    def loss(
        self, model: RecurrentGPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype, loops: int
    ) -> Tensor:  # fmt: skip
        """tokens, targets (B, T) -> what is minimised, nats."""
        if self.recipe.depth_loss == "last":
            return model(tokens, targets, dtype, loops, self.recipe.isolate)
        if self.shape.exit_gate == "act":
            return self.pondering(model, tokens, targets, dtype, loops)
        states, final = model.each(tokens, dtype, loops, self.recipe.isolate)  # (R, B, T, D)
        wanted = targets.expand(loops, *targets.shape)
        if self.recipe.depth_loss == "each":
            loss, losses = model.head_losses(final, wanted)
            self.note(losses)
            return loss
        if loops == 1:  # nowhere else to stop
            logprobs = torch.zeros_like(wanted, dtype=torch.float32)
        else:
            logprobs = exit_logprobs(torch.stack([model.gate(x, at) for at, x in enumerate(states[:-1], 1)]))
        loss, losses = model.head_losses(final, wanted, loops * logprobs.exp())  # the sum over passes of p times loss
        depth = expected_depth(logprobs).mean()
        self.note(losses, depth)
        apart = divergence(logprobs, prior_logprobs(loops, self.recipe.prior_hazard)).mean()
        return loss + self.recipe.prior_weight * apart + self.penalty * depth / loops

    def pondering(
        self, model: RecurrentGPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype, loops: int
    ) -> Tensor:  # fmt: skip
        """The mixture's loss, and Graves's penalty of passes and remainder."""
        found = model.pondered(tokens, dtype, loops)
        passes = found.passes.float()
        self.note(depth=passes.mean())
        return model.head_loss(found.states, targets) + self.penalty * (passes + found.remainder).mean() / loops

    def note(self, losses: Tensor | None = None, depth: Tensor | None = None) -> None:
        """What a micro-batch showed: losses (R, B, T), mean depth."""
        if losses is not None:
            self.losses.append(losses.flatten(1).mean(dim=1))
        if depth is not None:
            self.depths.append(depth.detach())

    def told(self, model: RecurrentGPT) -> dict:
        """After a step's backward passes, of this rank: loss after each pass, mean depth, its price, the gate's
        gradient."""
        row: dict = {}
        if self.losses:
            row["pass_losses"] = [round(v, 5) for v in torch.stack(self.losses).mean(dim=0).tolist()]
        if self.depths:
            row["mean_depth"] = round(float(torch.stack(self.depths).mean()), 4)
            row["penalty"] = round(self.penalty, 6)
            norms = [float(p.grad.norm()) for p in (model.exit_weight, model.exit_bias)]
            row["gate_gradient_norm"] = round(math.hypot(*norms), 6)
        return row


@torch.no_grad()
def pass_statistics(model: RecurrentGPT, tokens: np.ndarray, dtype: torch.dtype, loops: int) -> dict:
    """tokens (B, T) -> norm a channel of the state after each pass of the core, and the cosine between neighbouring
    passes' states: whether repeats still move the state, and whether they blow it up."""
    given, states = torch.from_numpy(tokens).to(model.embedding.device), []
    with torch.compiler.set_stance("force_eager"):  # a row by itself is worth no graph
        if model.shape.exit_gate == "act":
            states = list(model.each(given, dtype, loops)[0])
        else:
            model.hidden(given, dtype, loops, seen=states)
    states = torch.stack(states).float()
    cosines = torch.nn.functional.cosine_similarity(states[1:], states[:-1], dim=-1)
    norms = states.square().mean(dim=-1).sqrt()
    return {
        "state_norms": [round(v, 4) for v in norms.flatten(1).mean(dim=1).tolist()],
        "state_cosines": [round(v, 5) for v in cosines.flatten(1).mean(dim=1).tolist()],
    }


# == trellis =======================================================================================
# Trellis-coded quantisation: two interleaved grids, and a walk of eight states that says which one a weight uses.
#
# After Marcellin and Fischer (1990), with an entropy coder behind it (Fischer and Wang 1992), on Ungerboeck's 8 states.
# A weight of the walk is (2 k + z) * step / 2: its symbol k is coded, z is the walk's state's lowest bit, and the parity
# of k chooses the next state. Walks go down the columns of a matrix, each of WALK rows, all from state 0.

WALK = 64


STATES = np.arange(8)


# Ungerboeck's parity check 1 + D + D^3, D^2: (s0, s1, s2) -> (s0 + s1, s2 + parity, s0).
NEXT = np.stack([(STATES ^ STATES >> 1) & 1 | ((STATES >> 2 & 1) ^ bit) << 1 | (STATES & 1) << 2 for bit in (0, 1)], 1)


FROM = np.array([[(s, bit) for s in range(8) for bit in (0, 1) if NEXT[s, bit] == end] for end in range(8)])


ORIGIN, PARITY = FROM[:, :, 0], FROM[:, :, 1]  # (8, 2): the two ways into each state


SUBSET = 2 * PARITY + (ORIGIN & 1)  # which residue modulo 4, in half steps, a weight on that way has


def walk_bits(integers: np.ndarray) -> np.ndarray:
    """The states' lowest bits (R, C) int8 along walks with these symbols (R, C)."""
    bits = np.empty_like(integers)
    state = np.zeros((-(-len(integers) // WALK), integers.shape[1]), dtype=np.int64)
    for first in range(min(WALK, len(integers))):
        symbols = integers[first::WALK]
        state = state[: len(symbols)]
        bits[first::WALK] = state & 1
        state = NEXT[state, symbols & 1]
    return bits


def best_walk(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Symbols k (N, R) of least squared error for N columns of weights in steps x (N, R), by Viterbi's algorithm.

    `slope` (N, R) times the square of a weight's steps is added to its error, for what its bits cost.
    """
    count, rows = x.shape
    walks = -(-rows // WALK)
    padded = np.zeros((2, count, walks * WALK))
    padded[0, :, :rows], padded[1, :, :rows] = x, slope
    y, price = padded.reshape(2, count * walks, WALK).transpose(0, 2, 1)  # (WALK, N * walks)
    residues = np.arange(4)
    # The nearest half step of each residue, and its error.
    half = 4 * np.rint((2 * y[:, :, None] - residues) / 4) + residues  # (WALK, N * walks, 4)
    error = np.square(y[:, :, None] - half / 2) + price[:, :, None] * np.square(half / 2)
    error.reshape(WALK, count, walks, 4)[rows - (walks - 1) * WALK :, :, -1] = 0.0  # beyond the last row
    cost = np.full((y.shape[1], 8), np.inf)
    cost[:, 0] = 0.0
    came = np.empty((WALK, *cost.shape), dtype=np.int8)
    for t in range(WALK):
        ways = cost[:, ORIGIN] + error[t][:, SUBSET]  # (N * walks, 8, 2)
        second = ways[..., 1] < ways[..., 0]
        came[t] = second
        cost = np.where(second, ways[..., 1], ways[..., 0])
    every = np.arange(len(cost))
    state = cost.argmin(axis=1)
    symbols = np.empty(y.shape, dtype=np.int16)
    for t in range(WALK - 1, -1, -1):
        way = came[t, every, state].astype(np.int64)
        found = half[t, every, SUBSET[state, way]]
        state = ORIGIN[state, way]
        symbols[t] = (found - (state & 1)) / 2
    return symbols.T.reshape(count, walks * WALK)[:, :rows]


# == grid ==========================================================================================
# The grid that a tensor's weights are rounded to: an integer times its row's step times its column's.
#
# Steps are whole powers of 2^(1/256), so that a weight comes back the same on every machine; within a tensor they differ
# by multiples of 2^(1/16), so that a row's step is one small number.

OCTAVE, NOTCH = 256, 16  # codes that double a step; codes between two steps of one tensor


REACH = 127 * NOTCH  # codes from a tensor's finest row to its coarsest, at most


CODE_LIMIT = 25 * OCTAVE  # steps from 2^-25 to 2^25


TOP = 127  # integers are signed bytes, -128 unused


def roots() -> np.ndarray:
    """2^(i / 256) for i below 256, float32: square roots and products, which every machine rounds alike."""
    root = 2.0
    for _ in range(8):
        root = math.sqrt(root)
    return np.array([math.prod([root] * i) for i in range(OCTAVE)]).astype(np.float32)


POWERS = roots()


@dataclass(frozen=True)
class Grid:
    """A tensor as rows of integers; weight[r, c] = integers[r, c] * 2^((row[r] + column[c]) / 256).

    With `walks` half a step is added where the trellis's walk down the column says so.
    """

    integers: np.ndarray  # (R, C) int8
    row: np.ndarray  # (R,) int32, equal modulo 16
    column: np.ndarray  # (C,) int32, multiples of 16
    walks: bool = False

    def weights(self) -> np.ndarray:
        """(R, C) float32."""
        weights = step_of(self.row[:, None] + self.column)
        if self.walks:
            weights *= self.integers + walk_bits(self.integers) * np.float32(0.5)
        else:
            weights *= self.integers
        return weights


def as_matrix(dims: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a tensor is stored as."""
    return math.prod(dims[:-1]), dims[-1]


def step_of(code: np.ndarray) -> np.ndarray:
    """2^(code / 256), float32: a table's entry times a power of two."""
    return np.ldexp(POWERS[code & (OCTAVE - 1)], code >> 8)


def codes_of(step: np.ndarray) -> np.ndarray:
    """Codes (N,) int32 of positive steps: their mean is met to 1/256 octave, each of them to 1/16."""
    logs = OCTAVE * np.log2(np.maximum(np.asarray(step, dtype=np.float64), 2.0 ** (-CODE_LIMIT / OCTAVE)))
    base = np.rint(logs.mean())
    for _ in range(3):  # rounding in notches moves the mean
        notches = np.rint((logs - base) / NOTCH)
        base += np.rint((logs - base - NOTCH * notches).mean())
    return np.clip(base + NOTCH * notches, -CODE_LIMIT, CODE_LIMIT).astype(np.int32)


def wide_enough(weight: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Row codes, raised by whole notches where a row's largest weight would need an integer beyond 127."""
    need = np.abs(weight / step_of(column)).max(axis=1) / (step_of(row) * (TOP + 0.49))
    notches = np.ceil(OCTAVE / NOTCH * np.log2(np.maximum(need, 1)))
    row = row + NOTCH * notches.astype(np.int32)
    return np.maximum(row, row.max() - REACH)  # rows finer by eight octaves are rows of nothing


def nearest(weight: np.ndarray, row: np.ndarray, column: np.ndarray) -> Grid:
    """Each weight (R, C) at the nearest point of the grid with these codes."""
    integers = np.rint(weight / step_of(row[:, None] + column))
    return Grid(np.clip(integers, -TOP, TOP).astype(np.int8), row, column)


def fine_grid(weight: np.ndarray) -> Grid:
    """The rule of small and control tensors: steps as fine as each row's largest magnitude allows, 122 to 127 of
    them to it (fewer in rows eight octaves under the coarsest step)."""
    column = np.zeros(weight.shape[1], dtype=np.int32)
    lowest = np.full(len(weight), -CODE_LIMIT, dtype=np.int32)
    return nearest(weight, wide_enough(weight, lowest, column), column)


# == rans ==========================================================================================
# Interleaved range asymmetric numeral systems: integer frequencies in, bytes out, and back.
#
# After Duda (2013, arXiv 1311.2540), the lanes after Giesen (2014, arXiv 1402.3392). Each lane is a 32-bit state; 16-bit
# words move in and out. Many lanes are coded side by side as numpy arrays, and all of it is integer arithmetic, so the
# bytes are the same on every machine and numpy version.

PRECISION = 14  # a table's frequencies sum to 2^14


TABLE_SUM = 1 << PRECISION


STATE_LOW = 1 << 16  # states live in [2^16, 2^32)


class CodedDataError(ValueError):
    """Coded bytes that no encoder wrote."""


def normalize(counts: np.ndarray) -> np.ndarray:
    """Counts (S,) to frequencies that sum to TABLE_SUM, at least 1 where the count is not 0. Integers only."""
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    if total <= 0 or (counts > 0).sum() > TABLE_SUM:
        raise ValueError("no table for these counts")
    present = counts > 0
    frequency = np.where(present, np.maximum(1, (counts * TABLE_SUM + total // 2) // total), 0)
    order = np.lexsort((np.arange(frequency.size), -frequency))  # the largest first: a change costs least there
    while error := TABLE_SUM - int(frequency.sum()):
        for s in order:
            share = max(1, int(frequency[s]) // 64)
            move = min(error, share) if error > 0 else max(error, -share, 1 - int(frequency[s]))
            if present[s]:
                frequency[s] += move
                error -= move
            if not error:
                break
    return frequency


def starts(frequency: np.ndarray) -> np.ndarray:
    """Where each symbol's slots begin: the sum of the frequencies before it, along the last axis."""
    return np.cumsum(frequency, axis=-1) - frequency


def lane_count(payload_bytes: float) -> int:
    """Lanes whose final states, 4 bytes each, take at most 0.05 % of a payload; at least 1, at most 4,096."""
    return int(min(4096, max(1, payload_bytes * 0.0005 // 4)))


class Encoder:
    """Collects symbols as (frequency, start) pairs in the order they will be decoded; finish() codes them.

    A step of n symbols uses the lanes 0 .. min(n, lanes) - 1, over and over.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, frequency: np.ndarray, start: np.ndarray) -> None:
        """One step: (n,) each, frequency from 1 to TABLE_SUM."""
        self.steps.append((frequency.astype(np.uint16), start.astype(np.uint16)))

    def bits(self) -> float:
        """Ideal length of what was added."""
        return float(
            sum(PRECISION * f.size - np.log2(f.astype(np.float32)).sum(dtype=np.float64) for f, _ in self.steps)
        )

    def finish(self, lanes: int) -> bytes:
        """lanes x uint32 final states, then the uint16 words in the order of their reading, little-endian."""
        state = np.full(lanes, STATE_LOW, dtype=np.uint32)
        words: list[np.ndarray] = []
        for frequency, start in reversed(self.steps):
            for at in range((frequency.size - 1) // lanes * lanes, -1, -lanes):
                f = frequency[at : at + lanes].astype(np.uint32)
                x = state[: f.size]
                full = (x >> np.uint32(32 - PRECISION)) >= f
                words.append(x[full].astype("<u2"))
                x = np.where(full, x >> np.uint32(16), x)
                quotient = x // f
                state[: f.size] = (quotient << np.uint32(PRECISION)) + (x - quotient * f) + start[at : at + lanes]
        return state.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


class Decoder:
    """The inverse: slots() shows where the next symbols fall in their tables, advance() takes them off the states."""

    def __init__(self, data: bytes | memoryview, lanes: int):
        if lanes < 1 or len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
            raise CodedDataError("the coded data has no whole number of words")
        self.lanes = lanes
        self.state = np.frombuffer(data, dtype="<u4", count=lanes).astype(np.uint32)
        self.words = np.frombuffer(data, dtype="<u2", offset=4 * lanes).astype(np.uint32)
        self.at = 0

    def slots(self, count: int) -> np.ndarray:
        """(count,) uint32 below TABLE_SUM for the first `count` lanes, count <= lanes."""
        return self.state[:count] & np.uint32(TABLE_SUM - 1)

    def advance(self, slot: np.ndarray, frequency: np.ndarray, start: np.ndarray) -> None:
        """Take the symbols with these tables' entries off the first lanes; all (n,) uint32."""
        x = frequency * (self.state[: slot.size] >> np.uint32(PRECISION)) + (slot - start)
        low = np.flatnonzero(x < STATE_LOW)
        end = self.at + low.size
        if end > self.words.size:
            raise CodedDataError("the coded data ends too early")
        x[low] = (x[low] << np.uint32(16)) | self.words[self.at : end]
        self.at = end
        self.state[: slot.size] = x

    def finish(self) -> None:
        """Raise CodedDataError unless every word was read and every state is where the encoder began."""
        if self.at != self.words.size or (self.state != STATE_LOW).any():
            raise CodedDataError("the coded data does not end where its symbols do")


def decode_table(decoder: Decoder, count: int, frequency: np.ndarray) -> np.ndarray:
    """`count` symbols that were added as one step with one table, uint8."""
    symbol_of = np.repeat(np.arange(frequency.size, dtype=np.uint8), frequency)  # (TABLE_SUM,)
    factor = frequency.astype(np.uint32)[symbol_of]
    start = starts(frequency).astype(np.uint32)[symbol_of]
    symbols = np.empty(count, dtype=np.uint8)
    for at in range(0, count, decoder.lanes):
        slot = decoder.slots(min(decoder.lanes, count - at))
        symbols[at : at + decoder.lanes] = symbol_of[slot]
        decoder.advance(slot, factor[slot], start[slot])
    return symbols


# == entropy =======================================================================================
# What the integers of a grid cost: one table for a tensor, or tables that follow each row or column as it goes.
#
# Everything that both sides must agree on is integer arithmetic, so that an artifact decodes alike on every machine.

# The normal distribution function at i / 64, in 2^-24: no value lies near enough to a half for a libm to matter.
NORMAL_CDF = np.array([round(2**24 * 0.5 * (1 + math.erf(i / 64 / math.sqrt(2)))) for i in range(-400, 401)])


def normal_starts(low: int, size: int, sigma: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Slots before each symbol low .. low + size under normal distributions, (..., size + 1), every symbol possible.

    sigma and mean (...) are integers in 1/256 of a grid step. Integers only.
    """
    edges = (2 * np.arange(low, low + size + 1) - 1) * 128 - mean[..., None]  # the lower edge of each, in 1/256
    x = np.clip((edges << 14) // sigma[..., None], -(6 << 14), 6 << 14) + (400 << 8)
    index, rest = x >> 8, x & 255
    cdf = NORMAL_CDF[index] + ((NORMAL_CDF[np.minimum(index + 1, 800)] - NORMAL_CDF[index]) * rest >> 8)
    cdf[..., 0], cdf[..., -1] = 0, 1 << 24
    return (cdf * (TABLE_SUM - size) >> 24) + np.arange(size + 1)


# -- one table for a tensor --------------------------------------------------------------------------------------

HISTOGRAM, NORMAL = 0, 1


TABLE_HEAD = struct.Struct("<BbB")  # kind, lowest symbol, symbols - 1


NORMAL_TAIL = struct.Struct("<Hh")  # width and mean in 1/256 of a step


NARROWEST = 16  # width, in 1/256 of a step, below which a normal table is not drawn


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols low .. low + size - 1, and the bytes that describe them."""

    low: int
    frequency: np.ndarray  # (S,) summing to TABLE_SUM
    described: bytes

    def bits(self, counts: np.ndarray) -> float:
        """Bits that symbols with these counts (S,) and the description take."""
        used = counts > 0
        cost = counts[used] * (math.log2(TABLE_SUM) - np.log2(self.frequency[used]))
        return float(cost.sum()) + 8 * len(self.described)


def histogram_table(low: int, counts: np.ndarray) -> Table:
    """The counts' own frequencies, each as one or two bytes (7 bits and a flag, then 7 more)."""
    frequency = normalize(counts)
    parts = [
        bytes([f]) if f < 128 else bytes([128 | f >> 7, f & 127]) for f in np.minimum(frequency, TABLE_SUM - 1).tolist()
    ]
    return Table(low, frequency, TABLE_HEAD.pack(HISTOGRAM, low, counts.size - 1) + b"".join(parts))


def normal_table(low: int, size: int, sigma: int, mean: int) -> Table:
    """Frequencies of a normal variable, its width and mean in 1/256 of a step."""
    edges = normal_starts(low, size, np.array(sigma), np.array(mean))
    return Table(low, np.diff(edges), TABLE_HEAD.pack(NORMAL, low, size - 1) + NORMAL_TAIL.pack(sigma, mean))


def best_table(symbols: np.ndarray) -> Table:
    """The cheaper of the two tables for integers (N,), description included."""
    low = int(symbols.min())
    counts = np.bincount(symbols.ravel().astype(np.int64) - low)
    histogram = histogram_table(low, counts)
    values = symbols.astype(np.float64)
    sigma = min(65_535, max(NARROWEST, round(256 * math.sqrt(max(0.0, values.var() - 1 / 12)))))
    normal = normal_table(low, counts.size, sigma, round(256 * values.mean()))
    return min(histogram, normal, key=lambda table: table.bits(counts))


class Reader:
    """Takes fields off a bytes object in order. Raises CodedDataError when it ends too early."""

    def __init__(self, data: bytes | memoryview):
        self.data, self.at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        if self.at + count > len(self.data):
            raise CodedDataError("the tables end too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def table(self) -> Table:
        """A table that best_table described."""
        kind, low, size = self.unpack(TABLE_HEAD.format)
        size += 1
        if low + size > 128:
            raise CodedDataError("a table's symbols exceed 8 bits")
        if kind == NORMAL:
            sigma, mean = self.unpack(NORMAL_TAIL.format)
            if sigma < NARROWEST:
                raise CodedDataError("a table has no width")
            return normal_table(low, size, sigma, mean)
        if kind != HISTOGRAM:
            raise CodedDataError(f"tables of kind {kind} are unknown")
        frequency = np.zeros(size, dtype=np.int64)
        for s in range(size):
            (first,) = self.take(1)
            frequency[s] = first if first < 128 else (first & 127) << 7 | self.take(1)[0]
        if size == 1 and frequency[0] == TABLE_SUM - 1:
            frequency[0] = TABLE_SUM
        if frequency.sum() != TABLE_SUM:
            raise CodedDataError("a table's frequencies do not sum to one")
        return Table(low, frequency, b"")


def put_static(encoder: Encoder, symbols: np.ndarray) -> bytes:
    """Add integers (any shape, int8 range) with the best table of their own; returns its description."""
    table = best_table(symbols)
    index = symbols.ravel().astype(np.int64) - table.low
    encoder.add(table.frequency[index], starts(table.frequency)[index])
    return table.described


def take_static(decoder: Decoder, reader: Reader, count: int) -> np.ndarray:
    """The inverse of put_static: (count,) int8."""
    table = reader.table()
    if count == 0:
        return np.zeros(0, dtype=np.int8)
    return (decode_table(decoder, count, table.frequency).astype(np.int16) + table.low).astype(np.int8)


# -- tables that follow -------------------------------------------------------------------------------------------

BINS, SHIFTS = 40, 3  # widths in quarter octaves from 1/16 step; means from -3 to 3 in 0.3 of the width


CONTEXTS = BINS * (2 * SHIFTS + 1)


EIGHTH = math.sqrt(math.sqrt(math.sqrt(2.0)))  # of an octave; a square root is the same on every machine


WIDTHS = np.array([round(NARROWEST * EIGHTH ** (2 * b)) for b in range(BINS)])  # in 1/256 step


WIDTH_LIMITS = np.array([round(NARROWEST * EIGHTH ** (2 * b + 1)) for b in range(BINS - 1)])


INCREMENT, START_SYMBOLS, COUNT_LIMIT = 32, 24, 1 << 20


REFRESH = 256  # symbols between two looks at the counts, growing with what has been learned


SCALE_ONE = 1 << 10  # a step of average size


CONTEXTS_AT_A_TIME = 32  # whose tables are worked on together, so that what that takes stays small


def parts_of(contexts: int) -> list[slice]:
    """Contexts a few at a time."""
    stops = range(CONTEXTS_AT_A_TIME, contexts + CONTEXTS_AT_A_TIME, CONTEXTS_AT_A_TIME)
    return [slice(stop - CONTEXTS_AT_A_TIME, min(stop, contexts)) for stop in stops]


class LearnedTables:
    """One table of frequencies for each context, learned as it is used.

    A table begins as the normal distribution of its context's width and mean, (contexts,) each in 1/256 of a step.
    """

    def __init__(self, low: int, size: int, widths: np.ndarray, means: np.ndarray):
        self.low, self.size = low, size
        self.counts = np.empty((widths.size, size), dtype=np.int32)
        for part in parts_of(widths.size):
            edges = np.diff(normal_starts(low, size, widths[part], means[part]))
            self.counts[part] = edges * (INCREMENT * START_SYMBOLS) // TABLE_SUM
        # Where each table's entries start, all tables one after the other; an entry ends where the next begins.
        self.keys = np.empty(self.counts.size + 1, dtype=np.int32)
        self.keys[-1] = widths.size * TABLE_SUM
        self.waiting: list[np.ndarray] = []
        self.waiting_symbols = self.learned = 0
        self.refresh()

    def refresh(self) -> None:
        """Tables from the counts, every symbol possible."""
        if self.waiting:
            np.add.at(self.counts.reshape(-1), np.concatenate(self.waiting), INCREMENT)
            self.learned += self.waiting_symbols
            self.waiting, self.waiting_symbols = [], 0
        for part in parts_of(len(self.counts)):
            counts = self.counts[part]
            full = counts.sum(axis=1) > COUNT_LIMIT
            counts[full] >>= 1
            ends = np.cumsum(counts, axis=1, dtype=np.int64)
            total = np.maximum(ends[:, -1:], 1)
            ends *= TABLE_SUM - self.size
            ends //= total
            ends += np.arange(1, self.size + 1)
            ends += TABLE_SUM * np.arange(part.start, part.start + len(counts))[:, None]
            starts_here = self.keys[part.start * self.size : part.stop * self.size].reshape(counts.shape)
            starts_here[:, 1:] = ends[:, :-1]
            starts_here[:, 0] = TABLE_SUM * np.arange(part.start, part.start + len(counts))

    def entries(self, place: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frequency and start (lanes,) uint32 of entries in tables that begin at `base`."""
        start = self.keys[place]
        return (self.keys[place + 1] - start).astype(np.uint32), (start - base).astype(np.uint32)

    def put(self, encoder: Encoder, context: np.ndarray, index: np.ndarray) -> None:
        """Add a step of symbol indices (lanes,) by their lanes' tables, and learn from it."""
        place = context * self.size + index
        encoder.add(*self.entries(place, context * TABLE_SUM))
        self.learn(place)

    def take(self, decoder: Decoder, context: np.ndarray) -> np.ndarray:
        """The inverse: (lanes,) int64."""
        lanes = context.size
        base = (context * TABLE_SUM).astype(np.int32)
        place = np.empty(lanes, dtype=np.int64)
        for at in range(0, lanes, decoder.lanes):
            part = slice(at, min(lanes, at + decoder.lanes))
            slot = decoder.slots(part.stop - at)
            found = np.searchsorted(self.keys, base[part] + slot.astype(np.int32), side="right") - 1
            decoder.advance(slot, *self.entries(found, base[part]))
            place[part] = found
        self.learn(place)
        return place - context * self.size

    def learn(self, place: np.ndarray) -> None:
        """Count table entries that were used."""
        self.waiting.append(place)
        self.waiting_symbols += place.size
        if self.waiting_symbols >= REFRESH + self.learned // 32:
            self.refresh()


class FollowingTables(LearnedTables):
    """Tables chosen, for each lane at each step, by the width and mean of the symbols that the lane has shown so far,
    recent ones weighing more.

    Lanes are the rows or columns of a group's tensors. Widths and means are of weights, not of symbols: a step's
    `scale` (lanes,), in 1/1024 of the average, says how large each symbol's grid step is. They come from exponential
    averages over about `memory` symbols, which begin at the group's mean with the weight of `prior` symbols.
    """

    def __init__(self, lanes: int, low: int, size: int, magnitude: int, memory: int, prior: int, grids: int = 1):
        self.memory, self.seen = memory, prior
        self.total = np.full(lanes, magnitude * prior, dtype=np.int64)  # of magnitudes, in 1/256
        self.drift = np.zeros(lanes, dtype=np.int64)  # of symbols, in 1/256
        context = np.arange(grids * CONTEXTS)
        widths = WIDTHS[context % CONTEXTS // (2 * SHIFTS + 1)]
        means = widths * 3 * (context % (2 * SHIFTS + 1) - SHIFTS) // 10 - context // CONTEXTS * 128
        super().__init__(low, size, widths, means)

    def contexts(self, scale: np.ndarray, grid: np.ndarray | int = 0) -> np.ndarray:
        """Table of each lane's next symbol, (lanes,) int64; `grid` 1 where the symbol k stands for k + 1/2."""
        # A normal variable's width is 321 / 256 mean magnitudes.
        width = np.maximum(self.total * 321 * (SCALE_ONE >> 8) // (self.seen * scale), NARROWEST)
        mean = self.drift * SCALE_ONE // (self.seen * scale)
        shift = np.clip((20 * mean + 3 * width) // (6 * width), -SHIFTS, SHIFTS)
        return grid * CONTEXTS + np.searchsorted(WIDTH_LIMITS, width) * (2 * SHIFTS + 1) + shift + SHIFTS

    def follow(self, row: np.ndarray, scale: np.ndarray, grid: np.ndarray | int = 0) -> None:
        """Remember a step's symbols (lanes,) int64."""
        symbols = (2 * row + grid) * scale >> 3  # in 1/256 of the average step
        self.total += np.abs(symbols)
        self.drift += symbols
        self.seen += 1
        if self.seen > self.memory:
            self.total = self.total * self.memory // self.seen
            self.drift = self.drift * self.memory // self.seen
            self.seen = self.memory


FOLLOWING_HEAD = struct.Struct("<bBHHB")  # lowest symbol, symbols - 1, mean magnitude in 1/256, memory, prior


Scale = Callable[[int], np.ndarray]  # of a step: its lanes' grid steps over the average, in 1/1024, (lanes,) int64


def put_following(
    encoder: Encoder, steps: np.ndarray, scale_of: Scale, memory: int, prior: int, walks: bool = False
) -> bytes:  # fmt: skip
    """Add integers (steps, lanes), on the grids of a trellis's walks or on one; returns the description."""
    low = int(steps.min())
    size = int(steps.max()) - low + 1
    total = sum(int((np.abs(row.astype(np.int64)) * scale_of(t)).sum()) for t, row in enumerate(steps))
    mean = total * 256 // (SCALE_ONE * steps.size)
    magnitude = min(65_535, max(1, mean))
    tables = FollowingTables(steps.shape[1], low, size, magnitude, memory, prior, 2 if walks else 1)
    state = np.zeros(steps.shape[1], dtype=np.int64)
    for t, row in enumerate(steps):
        scale, grid, row = scale_of(t), state & 1, row.astype(np.int64)
        tables.put(encoder, tables.contexts(scale, grid), row - low)
        tables.follow(row, scale, grid)
        if walks:
            state = NEXT[state, row & 1] if (t + 1) % WALK else state * 0
    return FOLLOWING_HEAD.pack(low, size - 1, magnitude, memory, prior)


def take_following(
    decoder: Decoder, reader: Reader, dims: tuple[int, int], scale_of: Scale, walks: bool = False
) -> np.ndarray:  # fmt: skip
    """The inverse of put_following: (steps, lanes) int8."""
    low, size, magnitude, memory, prior = reader.unpack(FOLLOWING_HEAD.format)
    size += 1
    if low + size > 128 or not magnitude or not 0 < prior < memory:
        raise CodedDataError("a following table's description is out of range")
    lanes = dims[1]
    tables = FollowingTables(lanes, low, size, magnitude, memory, prior, 2 if walks else 1)
    state = np.zeros(lanes, dtype=np.int64)
    out = np.empty(dims, dtype=np.int8)
    for t in range(dims[0]):
        scale, grid = scale_of(t), state & 1
        row = tables.take(decoder, tables.contexts(scale, grid)) + low
        tables.follow(row, scale, grid)
        out[t] = row
        if walks:
            state = NEXT[state, row & 1] if (t + 1) % WALK else state * 0
    return out


# == reference =====================================================================================
# Rows told from earlier rows: pieces of a vocabulary that the text never shows keep all but the same embedding.
#
# Every row names one earlier row, a strength and a width. Its integers are coded as differences from strength times that
# row, by tables learned for the width; a column that differs more than others is noticed on the way.

STRENGTH_ONE, STRONGEST = 16, 24  # a row as large as the one it names; the largest factor, in 1/16


DIGIT = 64  # a row's number is stored in digits of this base


COLUMN_MEMORY = 64  # rows over which a column's own width is averaged


BATCH = 1024  # rows compared with all before them at a time


LINKED_HEAD = struct.Struct("<bB")  # lowest symbol, symbols - 1


@dataclass(frozen=True)
class Links:
    """For each of R rows: an earlier row, how strongly it resembles that row, and how far it is off."""

    earlier: np.ndarray  # (R,) int64; 0 where the strength is 0
    strength: np.ndarray  # (R,) int64 in 1/16
    width: np.ndarray  # (R,) index into WIDTHS: of the differences, in 1/256 of the average step


def find_links(values: np.ndarray) -> Links:
    """For each row of integers (R, C) the earlier one of which a multiple leaves least. Exact: sums stay below 2^53."""
    count = len(values)
    x = values.astype(np.float64)
    energy = np.square(x).sum(axis=1)
    earlier, strength = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for at in range(0, count, BATCH):
        last = min(count, at + BATCH)
        product = np.tril(x[at:last] @ x[:last].T, at - 1)
        gain = np.square(product) / np.maximum(energy[:last], 1)
        earlier[at:last] = best = gain.argmax(axis=1)
        ratio = np.take_along_axis(product, best[:, None], axis=1)[:, 0] / np.maximum(energy[best], 1)
        strength[at:last] = np.clip(np.rint(STRENGTH_ONE * ratio), -STRONGEST, STRONGEST)
    left = STRENGTH_ONE * values - strength[:, None] * values[earlier]
    error = np.square(left).sum(axis=1) // STRENGTH_ONE**2  # whole numbers: alike on every machine
    # A link costs its number; where it saves less than that the row stands alone.
    alone = (energy + 1) / (error + 1) < 2 ** (2 * (math.log2(count) + 2) / values.shape[1])
    alone |= strength == 0
    strength[alone] = earlier[alone] = 0
    width = np.sqrt(np.where(alone, energy, error) / values.shape[1])
    return Links(earlier, strength, np.searchsorted(WIDTH_LIMITS, width))


class LinkedTables(LearnedTables):
    """Tables by the width of a row's differences and the column's own share of it. Symbols are wrapped around."""

    def __init__(self, columns: int, low: int, size: int):
        self.lowest, self.share, self.seen = low, np.full(columns, 256 * 8, dtype=np.int64), 8
        super().__init__(-(size // 2), size, WIDTHS, np.zeros_like(WIDTHS))

    def predict(self, told: np.ndarray, strength: int, width: int, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest integers and tables for a row, from the values (C,) of the row that it names."""
        nearest = (told * strength * (SCALE_ONE // STRENGTH_ONE) // scale + 128) >> 8
        own = WIDTHS[width] * self.share * (SCALE_ONE >> 8) // (self.seen * scale)
        return nearest, np.searchsorted(WIDTH_LIMITS, own)

    def wrapped(self, row: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """Indices of symbols for integers (C,)."""
        return (row - nearest - self.low) % self.size

    def unwrapped(self, index: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """The inverse."""
        return (index + self.low + nearest - self.lowest) % self.size + self.lowest

    def follow(self, row: np.ndarray, told: np.ndarray, strength: int, width: int, scale: np.ndarray) -> np.ndarray:
        """Remember how far each column was off; returns the row's values, in 1/256 of the average step."""
        values = row * scale >> 2
        off = np.abs(values - told * strength // STRENGTH_ONE)
        self.share += off * 321 // WIDTHS[width]  # a normal variable's width is 321 / 256 mean magnitudes
        self.seen += 1
        if self.seen > COLUMN_MEMORY:
            self.share = self.share * COLUMN_MEMORY // self.seen
            self.seen = COLUMN_MEMORY
        return values


def put_linked(encoder: Encoder, rows: np.ndarray, scale_of: Scale) -> bytes:
    """Add integers (R, C); returns the description."""
    values = np.stack([row * scale_of(t) >> 2 for t, row in enumerate(rows.astype(np.int64))])
    links = find_links(values)
    digits = (links.earlier // DIGIT**place % DIGIT for place in range(3))
    described = b"".join(put_static(encoder, part) for part in (*digits, links.strength, links.width))
    low = int(rows.min())
    size = int(rows.max()) - low + 1
    tables = LinkedTables(rows.shape[1], low, size)
    for t, row in enumerate(rows.astype(np.int64)):
        scale, told = scale_of(t), values[links.earlier[t]]
        way = int(links.strength[t]), int(links.width[t])
        nearest, context = tables.predict(told, *way, scale)
        tables.put(encoder, context, tables.wrapped(row, nearest))
        tables.follow(row, told, *way, scale)
    return LINKED_HEAD.pack(low, size - 1) + described


def take_linked(decoder: Decoder, reader: Reader, dims: tuple[int, int], scale_of: Scale) -> np.ndarray:
    """The inverse of put_linked: (R, C) int8."""
    count, columns = dims
    low, size = reader.unpack(LINKED_HEAD.format)
    size += 1
    *digits, strength, width = (take_static(decoder, reader, count).astype(np.int64) for _ in range(5))
    earlier = sum(digit * DIGIT**place for place, digit in enumerate(digits))
    limits = np.where(strength == 0, 1, np.arange(count))  # a row that stands alone names row 0
    if low + size > 128 or ((earlier < 0) | (earlier >= limits)).any():
        raise CodedDataError("a row is told from one that does not precede it")
    if (np.abs(strength) > STRONGEST).any() or ((width < 0) | (width >= WIDTHS.size)).any():
        raise CodedDataError("a row's strength or width is out of range")
    tables = LinkedTables(columns, low, size)
    values = np.zeros(dims, dtype=np.int64)
    out = np.empty(dims, dtype=np.int8)
    for t in range(count):
        scale, told = scale_of(t), values[earlier[t]]
        way = int(strength[t]), int(width[t])
        nearest, context = tables.predict(told, *way, scale)
        row = tables.unwrapped(tables.take(decoder, context), nearest)
        values[t] = tables.follow(row, told, *way, scale)
        out[t] = row
    return out


# == codec =========================================================================================
# Grids to an artifact's bytes and back: a strict JSON header, tables, and one stream of entropy-coded integers.
#
# The file is MAGIC, a version, a sha256 of all that follows, the header's length, the JSON header, the tables and the
# stream. Only the unique tensors that Shape.parameters() lists are stored; nothing is pickled. Tensors of one role form
# a group, and each group is coded in the way that is shortest for it.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"GOLFPACK", 2


PREFIX = struct.Struct("<8sI32sI")  # magic, version, sha256, header length


HEADER_LIMIT = 1 << 16


WEIGHTS_A_BYTE = 16  # more than any model packs; a file that claims more is refused before anything is allocated


STATIC, DOWN_COLUMNS, ALONG_ROWS, WALKS, LINKED = range(5)  # how a group is coded; walks go down columns


MEMORIES = ((64, 4), (1024, 32))  # what a following table remembers, and how much its beginning weighs


def groups(shape: Shape) -> dict[str, list[str]]:
    """Names of the tensors of each role, in storage order."""
    found: dict[str, list[str]] = {}
    for name in shape.parameters():
        found.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return found


def lanes_of(stack: np.ndarray, mode: int) -> np.ndarray:
    """A group's (K, R, C) as (steps, lanes): lanes are columns, or rows."""
    moved = stack.transpose((2, 0, 1) if mode == ALONG_ROWS else (1, 0, 2))
    return moved.reshape(moved.shape[0], -1)


def scales_of(row: np.ndarray, column: np.ndarray, mode: int) -> Callable[[int], np.ndarray]:
    """Grid steps of a group with codes (K, R) and (K, C) over their mean, in 1/1024: step -> (lanes,) int64."""
    across, along = (row, column) if mode == ALONG_ROWS else (column, row)
    mean = int(row.sum()) // row.size + int(column.sum()) // column.size

    def scale(step: int) -> np.ndarray:
        codes = np.clip(across + (along[:, step, None] - mean), -6 * OCTAVE, 6 * OCTAVE).ravel()
        return np.rint(SCALE_ONE * step_of(codes)).astype(np.int64)

    return scale


Way = tuple[int, int, int]  # mode, memory, prior


def ways(members: list[Grid], coder: str) -> list[Way]:
    """How a group may be coded. Links are for a tensor without siblings: the embedding or the head."""
    walks = members[0].walks
    modes = (WALKS,) if walks else (DOWN_COLUMNS, ALONG_ROWS) if coder == "adaptive" else ()
    found = [(mode, *memory) for mode in modes for memory in MEMORIES]
    if coder == "adaptive" and len(members) == 1 and not walks:
        found.append((LINKED, 0, 0))
    return found if walks else [(STATIC, 0, 0), *found]


def put_group(grids: list[Grid], tried: list[Way]) -> tuple[Encoder, bytes, Way]:
    """The shortest of these codings of a group's integers, its description begun by a byte for the mode."""
    stack, row, column = (np.stack([getattr(g, part) for g in grids]) for part in ("integers", "row", "column"))
    found = []
    for way in tried:
        mode, memory, prior = way
        encoder = Encoder()
        if mode == STATIC:
            tables = b"".join(put_static(encoder, matrix) for matrix in stack)
        elif mode == LINKED:
            tables = put_linked(encoder, stack[0], scales_of(row, column, mode))
        else:
            steps, scale = lanes_of(stack, mode), scales_of(row, column, mode)
            tables = put_following(encoder, steps, scale, memory, prior, mode == WALKS)
        found.append((encoder, bytes([mode]) + tables, way))
    return min(found, key=lambda one: one[0].bits() + 8 * len(one[1]))


def take_group(decoder: Decoder, reader: Reader, row: np.ndarray, column: np.ndarray) -> list[Grid]:
    """The inverse, for codes (K, R) and (K, C)."""
    (count, rows), columns = row.shape, column.shape[1]
    (mode,) = reader.take(1)
    if mode == STATIC:
        stack = [take_static(decoder, reader, rows * columns).reshape(rows, columns) for _ in range(count)]
    elif mode == LINKED and count == 1:
        stack = take_linked(decoder, reader, (rows, columns), scales_of(row, column, mode))[None]
    elif mode in (DOWN_COLUMNS, WALKS):
        dims = (rows, count * columns)
        flat = take_following(decoder, reader, dims, scales_of(row, column, mode), mode == WALKS)
        stack = flat.reshape(rows, count, columns).transpose(1, 0, 2)
    elif mode == ALONG_ROWS:
        flat = take_following(decoder, reader, (columns, count * rows), scales_of(row, column, mode))
        stack = flat.reshape(columns, count, rows).transpose(1, 2, 0)
    else:
        raise CodedDataError(f"a group of mode {mode} is unknown")
    return [Grid(*parts, mode == WALKS) for parts in zip(stack, row, column, strict=True)]


def put_codes(encoder: Encoder, codes: np.ndarray) -> bytes:
    """Step codes (K, N): the smallest of each tensor as int16, then one table for the notches above it."""
    lowest = codes.min(axis=1, keepdims=True)
    return lowest.astype("<i2").tobytes() + put_static(encoder, (codes - lowest) // NOTCH)


def take_codes(decoder: Decoder, reader: Reader, count: int, size: int) -> np.ndarray:
    """The inverse: (K, N) int32."""
    lowest = np.frombuffer(reader.take(2 * count), dtype="<i2").astype(np.int32)
    notches = take_static(decoder, reader, count * size).reshape(count, size).astype(np.int32)
    return lowest[:, None] + NOTCH * notches


def encode(
    shape: Shape, grids: dict[str, Grid], note: dict | None = None, coder: str = "adaptive",
    chosen: dict[str, Way] | None = None,
) -> bytes:  # fmt: skip
    """The artifact's bytes. `coder` is static (one table a tensor) or adaptive (whatever is shortest).

    What was shortest for each role is noted in `chosen`, and not looked for where it is noted already.
    """
    whole, tables = Encoder(), b""
    chosen = {} if chosen is None else chosen
    for role, names in groups(shape).items():
        rows = np.stack([grids[name].row for name in names])
        columns = np.stack([grids[name].column for name in names])
        tables += put_codes(whole, rows) + put_codes(whole, columns)
        members = [grids[name] for name in names]
        tried = [chosen[role]] if role in chosen else ways(members, coder)
        encoder, described, chosen[role] = put_group(members, tried)
        whole.steps += encoder.steps
        tables += described
    lanes = lane_count(whole.bits() / 8)
    stream = whole.finish(lanes)
    header = {"shape": changed(shape), "note": note or {}, "lanes": lanes, "tables": len(tables)}
    data = container(header, tables, stream)
    if shape.parameter_count > WEIGHTS_A_BYTE * len(data):
        raise UsageError("The weights are all but zero; an artifact holds at least half a bit a weight.")
    return data


def changed(shape: Shape) -> dict:
    """The fields in which a shape differs from the default one."""
    default = asdict(Shape())
    return {name: value for name, value in asdict(shape).items() if value != default[name]}


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def read_header(data: bytes) -> tuple[Shape, dict, int, memoryview, memoryview]:
    """Shape, note, lanes, tables and stream of an artifact, all checked before anything is allocated."""
    if len(data) < PREFIX.size or data[:8] != ARTIFACT_MAGIC:
        raise UsageError("The file is not an artifact of this program (no GOLFPACK at its start).")
    _, version, digest, header_bytes = PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise UsageError(f"The artifact has format version {version}, this program reads {ARTIFACT_VERSION}.")
    view = memoryview(data)
    if hashlib.sha256(view[PREFIX.size - 4 :]).digest() != digest:
        raise UsageError("The artifact is damaged: its sha256 does not match its bytes.")
    if header_bytes > min(HEADER_LIMIT, len(data) - PREFIX.size):
        raise UsageError("The artifact's header is longer than the file.")
    start = PREFIX.size + header_bytes
    try:
        header = json.loads(bytes(view[PREFIX.size : start]).decode("utf-8"), parse_constant=refuse_constant)
        lanes, tables = header["lanes"], header["tables"]
        shape, note = shape_from_dict(header["shape"]), header["note"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"The artifact's header cannot be read ({error!r}).") from error
    if not (type(lanes) is type(tables) is int and 1 <= lanes <= 4096 and tables >= 0 and isinstance(note, dict)):
        raise UsageError("The artifact's header has a wrong number of lanes, size of tables or note.")
    if start + tables + 4 * lanes > len(data):
        raise UsageError("The artifact's tables and states are longer than the file.")
    if shape.parameter_count > WEIGHTS_A_BYTE * len(data):
        raise UsageError(f"The artifact claims {shape.parameter_count:,} weights in {len(data):,} bytes.")
    return shape, note, lanes, view[start : start + tables], view[start + tables :]


def read_note(path: Path) -> dict:
    """What the artifact says beside its weights. Raises UsageError."""
    return read_header(path.read_bytes())[1]


def container(header: dict, tables: bytes | memoryview, stream: bytes | memoryview) -> bytes:
    """A whole artifact from its parts."""
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    body = b"".join((struct.pack("<I", len(text)), text, tables, stream))
    return struct.pack("<8sI", ARTIFACT_MAGIC, ARTIFACT_VERSION) + hashlib.sha256(body).digest() + body


def decode_grids(data: bytes) -> tuple[Shape, dict[str, Grid]]:
    """Shape and grids of an artifact. Raises UsageError for anything that is not a whole, sane one."""
    shape, _, lanes, tables, stream = read_header(data)
    table, grids = shape.parameters(), {}
    try:
        decoder, reader = Decoder(stream, lanes), Reader(tables)
        for names in groups(shape).values():
            count, (rows, columns) = len(names), as_matrix(table[names[0]])
            row = take_codes(decoder, reader, count, rows)
            column = take_codes(decoder, reader, count, columns)
            if max(abs(int(f(row)) + int(f(column))) for f in (np.min, np.max)) > 2 * CODE_LIMIT:
                raise CodedDataError("a step is out of range")
            grids |= zip(names, take_group(decoder, reader, row, column), strict=True)
        decoder.finish()
        if reader.at != len(reader.data):
            raise CodedDataError("the tables do not end where the groups do")
    except CodedDataError as error:
        raise UsageError(f"The artifact cannot be decoded: {error}.") from error
    return shape, grids


def decode(data: bytes) -> tuple[Shape, dict[str, np.ndarray]]:
    """Shape and float32 weights of an artifact. Raises UsageError for anything that is not a whole, sane one."""
    shape, grids = decode_grids(data)
    table, weights = shape.parameters(), {}
    for name in table:
        with np.errstate(over="ignore", invalid="ignore"):
            weights[name] = grids.pop(name).weights().reshape(table[name])
        if not np.isfinite(weights[name]).all():
            raise UsageError(f"The artifact's tensor {name} is not finite.")
    return shape, weights


def load_artifact(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    """Read an artifact from disk. Raises UsageError."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"Artifact {path} cannot be read ({error.strerror}).") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


# == quantize ======================================================================================
# Weights onto their grids: how fine a step each tensor gets, and rounding that feeds each error forward.
#
# A matrix's sensitivity is H = E[|g|^2 / R x x'] over tokens and passes, where x enters it and g is the loss's gradient
# at its R outputs: 1/2 sum_r d_r H d_r' predicts what an error d costs in nats a token. H has the form of GPTQ's Hessian
# (Frantar et al. 2022, arXiv 2210.17323); its size, the Fisher information, makes tensors comparable.

DAMPING = 0.01  # of the diagonal's mean, added to the diagonal


BLOCK = 128  # columns between two updates of all that follow


FINEST, COARSEST = 1 / 32, 2.0  # steps in standard deviations: 7 bits a weight, and 1.25


COLUMN_RANGE = 2 * OCTAVE // NOTCH  # a column's step is at most four times, and at least a quarter of, its row's


EMBED_SHARE = 0.5  # without sensitivities, the embedding's step over the matrices'


LARGEST_WEIGHT = 1e6


RATE_SLOPE = math.log(2) / 6  # what a bit is worth on a fine grid, in squared steps: -dD/dR of D = step^2 / 12


TRELLIS_ERROR = 0.8  # squared error of the best walk over a plain grid's


LEAST_ROW = 0.03  # of the average weight, for rows of pieces that calibration hardly saw


NEAR_TARGET = 0.0005  # an artifact lands at most this share below its target, where steps can be had that fine


@dataclass(frozen=True)
class Sensitivity:
    """What errors in a matrix (R, C) cost: `hessian` (C, C) float64 for a row of average weight; `rows` (R,), with
    mean 1, the weight of each."""

    hessian: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A matrix ready to be rounded at any step: columns in the order of rounding, and how an error spreads."""

    order: np.ndarray  # (C,) columns by falling diagonal
    spread: np.ndarray  # (C, C) upper Cholesky factor U of the damped inverse Hessian, H^-1 = U'U
    column: np.ndarray  # (C,) step codes of the columns
    scale: np.ndarray  # (R,) step of each row, up to the one factor that sets the rate
    cost: float  # predicted loss for a unit factor, nats a token
    note: str = ""


def prepare(weight: np.ndarray, sensitivity: Sensitivity | None, pack: Pack) -> Prepared:
    """Order, error spread and relative steps of a matrix (R, C).

    With entropy coding the bits depend on the product of the steps alone, and the loss is sum_c step_c^2 / U_cc^2: it
    is least when step_c is proportional to U_cc, and to 1 / sqrt(weight) over rows. One table for a whole tensor wants
    symbols that are alike: with static tables a step goes with its row's deviation alone.
    """
    columns = weight.shape[1]
    deviation = weight.std(axis=1)
    if sensitivity is None:
        return Prepared(
            np.arange(columns), np.eye(columns), np.zeros(columns, dtype=np.int32), deviation,
            float(np.square(deviation).sum()) / 24,
        )  # fmt: skip
    diagonal = np.diag(sensitivity.hessian).copy()
    order = np.argsort(-diagonal, kind="stable")
    hessian = sensitivity.hessian[np.ix_(order, order)].astype(np.float64)
    damping, note, factor = DAMPING * max(float(diagonal.mean()), 1e-30), "", None
    while factor is None:
        try:
            # H = V V' with V upper, from the Cholesky factor of H turned around; then U = V^-1.
            lower = np.linalg.cholesky((hessian + damping * np.eye(columns))[::-1, ::-1])
            factor = np.linalg.inv(lower)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            note = f"singular Hessian, damped by {damping / max(float(diagonal.mean()), 1e-30):.0e} of its mean"
    spread = np.triu(factor)
    pivots = np.diag(spread)
    column = np.zeros(columns, dtype=np.int32)
    if pack.column_steps and pack.coder == "adaptive":
        logs = np.log2(pivots)
        notches = np.rint(OCTAVE / NOTCH * (logs - logs.mean()))
        column[order] = NOTCH * np.clip(notches, -COLUMN_RANGE, COLUMN_RANGE)
    usual = np.exp(np.log(np.maximum(deviation, 1e-30)).mean())  # so that a step is one in deviations, on average
    relative = np.maximum(deviation, 1e-30) / usual
    if pack.coder == "adaptive":
        relative = relative**pack.row_power / np.sqrt(np.maximum(sensitivity.rows, LEAST_ROW))
    scale = usual * relative / np.exp(np.log(relative).mean())
    steps = step_of(column[order]).astype(np.float64)
    cost = float((sensitivity.rows * scale**2).sum() * np.square(steps / pivots).sum()) / 24
    return Prepared(order, spread, column, scale, cost, note)


def walked(name: str, pack: Pack) -> bool:
    """Whether a tensor's columns are rounded by the trellis's walks."""
    return pack.rounding == "feedback" and pack.quantizer == "trellis" and tensor_class(name) != "embed"


def rounded(
    weights: dict[str, np.ndarray], ready: dict[str, Prepared], steps: dict[str, float], pack: Pack
) -> dict[str, Grid]:  # fmt: skip
    """The grids of all matrices at `steps` times their relative steps; those of one shape are rounded side by side."""
    grids, alike = {}, {}
    for name, weight in weights.items():
        code = codes_of(steps[name] * ready[name].scale)
        row = wide_enough(weight, code, ready[name].column)
        if pack.rounding == "nearest":
            grids[name] = nearest(weight, row, ready[name].column)
        else:
            alike.setdefault((weight.shape, walked(name, pack)), []).append((name, row))
    for (_, walks), members in alike.items():
        names, rows = zip(*members, strict=True)
        chosen, plans = [weights[n] for n in names], [ready[n] for n in names]
        found = feed_errors(chosen, rows, plans, walks, pack.rate_weight)
        grids |= zip(names, found, strict=True)
    return grids


def feed_errors(
    weights: list[np.ndarray], rows: list[np.ndarray], ready: list[Prepared], walks: bool, rate_weight: float
) -> list[Grid]:  # fmt: skip
    """Round K matrices column by column, each column's error made up for in those not yet rounded (GPTQ).

    With `walks` a column is rounded by the trellis's best walks down it.
    """
    work = np.stack([w.T[p.order] for w, p in zip(weights, ready, strict=True)]).astype(np.float64)  # (K, C, R)
    spread = np.stack([p.spread for p in ready])  # (K, C, C)
    codes = np.stack([r + p.column[p.order][:, None] for r, p in zip(rows, ready, strict=True)])
    integers = np.empty(work.shape, dtype=np.int8)
    slope = 0.0
    if rate_weight:  # bits by which a symbol costs more than 0, over its square, and what a bit is worth
        variance = np.stack([w.var(axis=1) for w in weights])[:, None, :] / np.square(step_of(codes)) + 1 / 12
        slope = rate_weight * RATE_SLOPE / (2 * math.log(2) * variance)
    slope = np.broadcast_to(slope, work.shape)
    for first in range(0, work.shape[1], BLOCK):
        last = min(work.shape[1], first + BLOCK)
        errors = np.empty((len(work), last - first, work.shape[2]))
        for c in range(first, last):
            steps = step_of(codes[:, c]).astype(np.float64)  # (K, R)
            x = work[:, c] / steps
            if walks:
                symbols = np.clip(best_walk(x, slope[:, c]), -TOP, TOP).astype(np.int8)
                found = symbols + walk_bits(symbols.T).T / 2
            else:
                symbols = found = np.clip(cheapest(x, slope[:, c]), -TOP, TOP)
            integers[:, c] = symbols
            errors[:, c - first] = error = (work[:, c] - found * steps) / spread[:, c, c, None]
            work[:, c + 1 : last] -= spread[:, c, c + 1 : last, None] * error[:, None]
        work[:, last:] -= spread[:, first:last, last:].mT @ errors
    grids = []
    for k, p in enumerate(ready):
        back = np.empty(integers.shape[1:], dtype=np.int8)
        back[p.order] = integers[k]
        grids.append(Grid(np.ascontiguousarray(back.T), rows[k], p.column, walks))
    return grids


def cheapest(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Of the two grid points around x the one with the smaller squared error plus slope times its square."""
    below = np.floor(x)
    gain = np.square(x - below) - np.square(x - below - 1) + slope * (np.square(below) - np.square(below + 1))
    return below + (gain > 0)


def gaussian_bits(step: np.ndarray) -> np.ndarray:
    """Entropy, bits, of a standard normal variable rounded to multiples of `step` up to 2; within 1 %."""
    return 0.5 * np.log2(2 * math.pi * math.e * (1 / np.square(step) + 1 / 12))


def quantize(
    shape: Shape,
    weights: dict[str, np.ndarray],
    pack: Pack,
    target_bytes: int,
    sensitivities: dict[str, Sensitivity] | None,
    encode: Callable[[dict[str, Grid]], bytes],
) -> tuple[bytes, dict]:
    """Grids for all tensors, as fine as the target allows, and the bytes that `encode` makes of them.

    Steps are the pack's where it names them; else one factor over all tensors, found such that the artifact lands at
    most 0.05 % below `target_bytes`: the loss that a bit saves is then the same everywhere. Returns the artifact and a
    report. Raises UsageError for weights or sensitivities that do not fit the shape, and targets out of reach.
    """
    check_weights(shape, weights)
    matrices = {n: weights[n].reshape(as_matrix(d)).astype(np.float32) for n, d in shape.parameters().items()}
    fixed = {n: fine_grid(w) for n, w in matrices.items() if tensor_class(n) == "control"}
    free = {n: w for n, w in matrices.items() if n not in fixed}
    check_sensitivities(free, sensitivities)
    ready = {n: prepare(w, sensitivities[n] if sensitivities else None, pack) for n, w in free.items()}
    ready = {n: replace(r, cost=TRELLIS_ERROR * r.cost) if walked(n, pack) else r for n, r in ready.items()}
    relative = relative_steps(free, ready, pack, bool(sensitivities))

    def at(steps: dict[str, float]) -> tuple[bytes, dict[str, float]]:
        return encode(fixed | rounded(free, ready, steps, pack)), steps

    data, steps = at(relative) if pack.matrix_step else find_factor(at, free, ready, relative, target_bytes)
    report = {
        "bytes": len(data),
        "predicted_loss": sum(ready[n].cost * steps[n] ** 2 for n in free) if sensitivities else None,
        "bits": {n: round(symbol_bits(free[n], ready[n], steps[n]), 3) for n in free},
        "notes": [f"{n}: {r.note}" for n, r in ready.items() if r.note],
    }
    return data, report


def check_weights(shape: Shape, weights: dict[str, np.ndarray]) -> None:
    """Raise UsageError for missing, misshapen or non-finite weights."""
    table = shape.parameters()
    if set(weights) != set(table):
        raise UsageError(f"The weights {sorted(set(weights) ^ set(table))[:3]} do not belong to this shape.")
    for name, dims in table.items():
        if weights[name].shape != dims:
            raise UsageError(f"Weight {name} has shape {weights[name].shape}, the model's is {dims}.")
        if not np.isfinite(weights[name]).all():
            raise UsageError(f"Weight {name} is not finite; there is nothing to pack.")
        if np.abs(weights[name]).max() > LARGEST_WEIGHT:
            raise UsageError(f"Weight {name} exceeds {LARGEST_WEIGHT:.0e}; there is nothing sensible to pack.")


def check_sensitivities(free: dict[str, np.ndarray], sensitivities: dict[str, Sensitivity] | None) -> None:
    """Raise UsageError when the Hessians were collected from another model."""
    for name, weight in free.items() if sensitivities else ():
        found = sensitivities.get(name)
        rows, columns = weight.shape
        if found is None or found.hessian.shape != (columns, columns) or found.rows.shape != (rows,):
            raise UsageError(f"The Hessians are another model's: {name} {weight.shape} has none that fits.")
        if not (np.isfinite(found.hessian).all() and np.isfinite(found.rows).all() and (found.rows >= 0).all()):
            raise UsageError(f"The Hessian of {name} is not finite; collect it again.")


def relative_steps(
    free: dict[str, np.ndarray], ready: dict[str, Prepared], pack: Pack, weighed: bool
) -> dict[str, float]:  # fmt: skip
    """Each tensor's step up to one factor for all. With sensitivities sum cost step^2 is least for the bits
    -sum size log2 step when step^2 is proportional to size / cost."""
    given = {"embed": pack.embed_step, "matrix": pack.matrix_step}
    if pack.embed_step and pack.matrix_step:
        return {n: given[tensor_class(n)] for n in free}
    if weighed:
        return {n: math.sqrt(w.size / max(ready[n].cost, 1e-30)) for n, w in free.items()}
    return {n: EMBED_SHARE if tensor_class(n) == "embed" else 1.0 for n in free}


def bounded(step: float, weight: np.ndarray, ready: Prepared) -> float:
    """A tensor's step, kept between the finest and the coarsest in standard deviations of its rows."""
    middle = float(np.exp(np.mean(np.log(np.maximum(weight.std(axis=1), 1e-30) / np.maximum(ready.scale, 1e-30)))))
    return min(max(step, FINEST * middle), COARSEST * middle)


def symbol_bits(weight: np.ndarray, ready: Prepared, step: float) -> float:
    """Predicted bits a weight."""
    rows = np.log2(np.maximum(weight.std(axis=1), 1e-30) / np.maximum(step * ready.scale, 1e-30))
    steps = 2.0 ** -np.clip(rows[:, None] - ready.column / OCTAVE, -1, 12)
    return float(gaussian_bits(steps).mean())


def find_factor(
    at: Callable[[dict[str, float]], tuple[bytes, dict[str, float]]], free: dict[str, np.ndarray],
    ready: dict[str, Prepared], relative: dict[str, float], target: int,
) -> tuple[bytes, dict[str, float]]:  # fmt: skip
    """(artifact, steps) nearest below `target` bytes, by the size of real artifacts. Raises UsageError if none is."""

    def steps_at(log: float) -> dict[str, float]:
        return {n: bounded(2.0**log * relative[n], w, ready[n]) for n, w in free.items()}

    def predicted(log: float) -> float:
        return sum(free[n].size * symbol_bits(free[n], ready[n], step) for n, step in steps_at(log).items()) / 8

    log, span = 0.0, 64.0  # log2 of the factor
    while (span := span / 2) > 1e-4:
        log += span if predicted(log) > target else -span
    few = many = best = None  # factors that gave few enough bytes, and too many
    for _ in range(12):
        data, steps = at(steps_at(log))
        if len(data) <= target:
            few = log
            best = max(best or (data, steps), (data, steps), key=lambda found: len(found[0]))
            if len(data) >= target * (1 - NEAR_TARGET) or steps == steps_at(-100.0):
                break
        elif steps == steps_at(100.0):
            raise UsageError(
                f"--target-bytes {target}: the coarsest grids take {len(data)} bytes, give more or a smaller model."
            )
        else:
            many = log
        moving = sum(w.size for n, w in free.items() if steps[n] == 2.0**log * relative[n])  # the rest is at a bound
        log += 8 * (len(data) - target * (1 - NEAR_TARGET / 2)) / max(moving, 1)
        if few is not None and many is not None and not many < log < few:
            log = (few + many) / 2
    if best is None:
        raise UsageError(f"--target-bytes {target}: no grid lands below it, give more bytes or a smaller model.")
    return best


# == muon ==========================================================================================
# Muon: momentum whose matrices are orthogonalised before they are applied (Keller Jordan et al. 2024).
#
# Every parameter goes to exactly one optimiser, by its role; the work on matrices is shared over the ranks.

# (a, b, c) of X <- aX + (bA + cA^2)X with A = XX^T, one triple an iteration.
QUINTIC = ((3.4445, -4.7750, 2.0315),)


# Polar Express (Amsel et al. 2025), the triples the best contest record runs.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


COEFFICIENTS = {"quintic": QUINTIC, "polar-express": POLAR_EXPRESS}


def orthogonalize(
    updates: Tensor, method: str = "quintic", steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Move the singular values of each matrix of a batch (N, R, C) towards 1 by `steps` iterations in `dtype`.

    The polynomial's last triple repeats when `steps` exceeds the list. Returns (N, R, C) in the type of `updates`.
    """
    triples = COEFFICIENTS[method]
    x = updates.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the smaller side first, so that A = XX^T is the smaller product
        x = x.mT
    # The Frobenius norm bounds every singular value by 1; Polar Express was fitted for 2 % below it.
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm * 1.02 + 1e-6 if method == "polar-express" else norm + 1e-7)
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(updates.dtype)


@dataclass
class Matrices:
    """Parameters of one shape that Muon updates as a batch."""

    parameters: list[nn.Parameter]
    momentum: Tensor  # (N, R, C)
    rate_factor: Tensor  # (N, 1, 1): aspect ratio, and what the recipe says of shared blocks


class Muon:
    """Nesterov momentum, orthogonalised: W -= rate * factor * orthogonalize(update), decay decoupled.

    factor is sqrt(max(1, rows / columns)). Every rank keeps all of the momentum, which is cheap, and orthogonalises
    its share of each batch, which is not; one all-reduce of the updates hands everyone the rest.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], recipe: Recipe, passes: dict[str, int]):
        self.recipe = recipe
        by_shape: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        for name, p in named:
            if p.ndim != 2:
                raise ValueError(f"Muon updates matrices only, {name!r} has shape {tuple(p.shape)}")
            by_shape.setdefault(tuple(p.shape), []).append((name, p))
        self.groups = []
        for (rows, columns), members in by_shape.items():
            aspect = max(1.0, rows / columns) ** 0.5
            shared = {name: recipe.shared_rate or 1 / n for name, n in passes.items() if n > 1}
            factors = [aspect * shared.get(name, 1.0) for name, _ in members]
            parameters = [p for _, p in members]
            device = parameters[0].device
            momentum = torch.zeros(len(members), rows, columns, device=device)
            self.groups.append(Matrices(parameters, momentum, torch.tensor(factors, device=device)[:, None, None]))

    @torch.no_grad()
    def step(
        self, rate: float, momentum: float, ns_dtype: torch.dtype = torch.bfloat16, decay: float | None = None
    ) -> None:
        """Update every matrix from its .grad (already averaged over ranks)."""
        decay = self.recipe.matrix_decay if decay is None else decay
        updates = []
        for group in self.groups:
            gradient = torch.stack([p.grad for p in group.parameters]).float()
            updates.append(self.update_of(gradient, group.momentum, momentum))
        self.orthogonalize_all(updates, ns_dtype)
        for group, update in zip(self.groups, updates, strict=True):
            self.apply(group, update, rate, decay)

    def update_of(self, gradient: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Nesterov: buffer <- momentum * buffer + gradient; the update looks one step ahead. (N, R, C) float32, both
        are written to."""
        buffer.mul_(momentum).add_(gradient)
        update = gradient.add_(buffer, alpha=momentum)
        if self.recipe.row_normalize:
            update /= update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return update

    @staticmethod
    def apply(group: Matrices, update: Tensor, rate: float, decay: float) -> None:
        """Decay the group's matrices and move them against orthogonalised updates (N, R, C)."""
        if decay:
            torch._foreach_mul_(group.parameters, 1.0 - rate * decay)
        torch._foreach_add_(group.parameters, list((update * group.rate_factor).unbind()), alpha=-rate)

    def orthogonalize_all(self, updates: list[Tensor], ns_dtype: torch.dtype) -> None:
        """Orthogonalise in place; with several ranks each does every world-size-th matrix and the sum is shared."""
        method, steps = self.recipe.newton_schulz, self.recipe.newton_schulz_steps
        if not dist.is_initialized() or dist.get_world_size() == 1:
            for update in updates:
                update.copy_(orthogonalize(update, method, steps, ns_dtype))
            return
        rank, world = dist.get_rank(), dist.get_world_size()
        flat = torch.zeros(sum(u.numel() for u in updates), device=updates[0].device)
        offset = 0
        for update in updates:
            view = flat[offset : offset + update.numel()].view_as(update)
            if rank < len(update):
                view[rank::world] = orthogonalize(update[rank::world], method, steps, ns_dtype)
            offset += update.numel()
        dist.all_reduce(flat)
        offset = 0
        for update in updates:
            update.copy_(flat[offset : offset + update.numel()].view_as(update))
            offset += update.numel()

    def state(self) -> list[Tensor]:
        """The buffers, to be restored after warm-up."""
        return [group.momentum for group in self.groups]


class Optimizers:
    """Muon for matrices, Adam for the embedding and for control vectors: every parameter exactly once."""

    def __init__(self, model: RecurrentGPT, recipe: Recipe):
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "embed": [], "scalar": []}
        for name, p in model.named_parameters():
            kind = role_of(name).optimizer
            if kind not in groups:
                raise ValueError(f"parameter {name!r} has the unknown optimizer {kind!r}")
            groups[kind].append((name, p))
        self.recipe = recipe
        # A block's name is blocks.INDEX.MATRIX.
        passes = {n: model.shape.passes(int(n.split(".")[1])) for n, _ in groups["muon"] if n.startswith("blocks.")}
        self.muon = Muon(groups["muon"], recipe, passes)
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for _, p in groups["embed"]], "kind": "embed", "weight_decay": recipe.embed_decay},
                {"params": [p for _, p in groups["scalar"]], "kind": "scalar", "weight_decay": 0.0},
            ],
            lr=0.0, betas=(recipe.adam_beta1, recipe.adam_beta2), eps=recipe.adam_epsilon, fused=True,
        )  # fmt: skip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # bfloat16 products on CUDA as the records do; float32 on a CPU, whose small matrices gain nothing from less.
        self.ns_dtype = torch.bfloat16 if self.parameters[0].is_cuda else torch.float32

    def reduce_gradients(self) -> None:
        """Average gradients over ranks: one flat all-reduce of the unique parameters."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        offset = 0
        for g in gradients:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

    def step(self, progress: float) -> None:
        """One update at `progress` in [0, 1] of the clock, from gradients that are already reduced."""
        recipe = self.recipe
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        rate = recipe.matrix_rate * self.set_rates(progress)
        self.adam.step()
        self.muon.step(rate, recipe.momentum_at(progress), self.ns_dtype, recipe.decay_at(progress))

    def set_rates(self, progress: float) -> float:
        """Adam's rates at `progress`; returns the factor on every rate."""
        scale = self.recipe.rate_scale(progress)
        for group in self.adam.param_groups:
            group["lr"] = scale * (self.recipe.embed_rate if group["kind"] == "embed" else self.recipe.scalar_rate)
        return scale

    def gradient_norm(self) -> float:
        """Global norm of the gradients, not finite when any of them is not."""
        return float(torch.stack(torch._foreach_norm([p.grad for p in self.parameters])).norm())

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def reset(self) -> None:
        """Forget all state, as after a warm-up on synthetic tokens."""
        self.adam.state.clear()
        for buffer in self.muon.state():
            buffer.zero_()


# == overlap =======================================================================================
# Optimisers of several ranks whose communication runs beside the arithmetic: each rank owns a part of every bank.
#
# Gradients of a bank (all matrices of one shape) are reduce-scattered, the owner updates momentum and orthogonalises, and
# the updates are gathered while the next bank is worked on: parallel Muon of the contest's records (#399, #1523).

# Its name from torch 2.13 on, and before.
gather_whole = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Bank:
    """The matrices of one shape, and this rank's part of their averaged gradients."""

    group: Matrices  # whose momentum (N / world, R, C) is this rank's part too
    part: Tensor  # (N / world, R, C), their number filled up with zeros
    work: dist.Work | None = None


class OverlappedOptimizers(Optimizers):
    """Optimizers for a group of ranks, equal to the plain ones up to the order of sums."""

    def __init__(self, model: RecurrentGPT, recipe: Recipe):
        super().__init__(model, recipe)
        self.world = dist.get_world_size()
        self.banks = []
        for group in sorted(self.muon.groups, key=lambda g: -g.momentum.numel()):  # the largest first
            part = torch.zeros_like(group.momentum[: -(-len(group.momentum) // self.world)])
            group.momentum = torch.zeros_like(part)
            self.banks.append(Bank(group, part))
        inside = {id(p) for bank in self.banks for p in bank.group.parameters}
        self.rest = [p for p in self.parameters if id(p) not in inside]
        self.rest_gradients = torch.zeros(0)
        self.rest_work: dist.Work | None = None

    def reduce_gradients(self) -> None:
        """Begin to average: the largest banks first, then all that is no matrix as one row."""
        for bank in self.banks:
            stacked = torch.stack([p.grad for p in bank.group.parameters]).float()
            whole = stacked.new_zeros(self.world * len(bank.part), *stacked.shape[1:])
            whole[: len(stacked)] = stacked / self.world
            bank.work = dist.reduce_scatter_tensor(bank.part, whole, async_op=True)
        self.rest_gradients = torch.cat([p.grad.flatten() for p in self.rest]) / self.world
        self.rest_work = dist.all_reduce(self.rest_gradients, async_op=True)

    def gradient_norm(self) -> float:
        """Global norm of the averaged gradients, alike on all ranks; then they are scaled to the recipe's limit."""
        for work in (*(bank.work for bank in self.banks), self.rest_work):
            work.wait()
        squares = torch.stack([bank.part.square().sum() for bank in self.banks]).sum()
        dist.all_reduce(squares)
        norm = (squares + self.rest_gradients.square().sum()).sqrt()
        if self.recipe.clip_norm:
            scale = (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*(bank.part for bank in self.banks), self.rest_gradients], scale)
        offset = 0
        for p in self.rest:
            p.grad = self.rest_gradients[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        return float(norm)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One update at `progress` in [0, 1] of the clock; after gradient_norm()."""
        recipe = self.recipe
        rate = recipe.matrix_rate * self.set_rates(progress)
        gathered = []
        for bank in self.banks:
            update = self.muon.update_of(bank.part, bank.group.momentum, recipe.momentum_at(progress))
            update = orthogonalize(update, recipe.newton_schulz, recipe.newton_schulz_steps, self.ns_dtype)
            whole = update.new_empty(self.world * len(update), *update.shape[1:])
            gathered.append((bank.group, whole, gather_whole(whole, update, async_op=True)))
        self.adam.step()
        for group, whole, work in gathered:
            work.wait()
            self.muon.apply(group, whole[: len(group.parameters)], rate, recipe.decay_at(progress))


def optimizers_for(model: RecurrentGPT, recipe: Recipe, overlap: bool) -> Optimizers:
    """The overlapped ones for several ranks, if wanted; else the plain ones."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return OverlappedOptimizers(model, recipe) if overlap and several else Optimizers(model, recipe)


# == data ==========================================================================================
# Token shards in the contest's public format, and the batches a rank reads from them.
#
# A shard is 256 little-endian int32 (20240520, 1, token count, zeros), then that many uint16 tokens.

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256


HEADER_BYTES = HEADER_INTS * 4


def read_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens, uint16 (N,). Raises UsageError for a file that is not a whole shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UsageError(f"Shard {path} cannot be read ({error.strerror}); prepare the data again.") from error
    if header.size < HEADER_INTS or header[0] != MAGIC:
        raise UsageError(f"{path} is not a token shard (no magic {MAGIC} at its start); prepare the data again.")
    if header[1] != VERSION:
        raise UsageError(f"Shard {path} has format version {header[1]}, this program reads {VERSION}.")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise UsageError(f"Shard {path} should hold {header[2]} tokens but is {size} bytes long; prepare it again.")
    if header[2] == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


class Corpus:
    """A folder that `python -m golf.prepare` wrote: manifest.json, tokenizer.model, train_*.bin and val_*.bin."""

    def __init__(self, folder: Path | str, option: str = "--run.data"):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(
                f"{option} {folder}: no {path.name} there ({error.strerror}); run python -m golf.prepare first."
            ) from error
        except ValueError as error:
            raise UsageError(f"{option} {folder}: {path.name} is not JSON ({error}); prepare it again.") from error
        try:
            self.name = str(self.manifest["name"])
            self.fingerprint = str(self.manifest["fingerprint"])
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.files = {
                split: [str(f) for f in self.manifest["splits"][split]["files"]] for split in ("train", "val")
            }
            self.tokens = {split: int(self.manifest["splits"][split]["tokens"]) for split in ("train", "val")}
            self.val_bytes = int(self.manifest["splits"]["val"]["counted_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{option} {folder}: {path.name} lacks {error}; prepare it again.") from error

    @property
    def transform(self) -> str:
        """What was done to the text before the tokenizer saw it: none or case."""
        return str(self.manifest["tokenizer"].get("transform", "none"))

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def has_its_tokenizer(self) -> bool:
        """Whether tokenizer.model is the one that made the shards. Raises UsageError when it cannot be read."""
        try:
            found = hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"{self.tokenizer} cannot be read ({error.strerror}); prepare the data again.") from error
        return found == self.manifest["tokenizer"].get("sha256")

    def shards(self, split: str) -> list[np.ndarray]:
        """The split's shards, every header checked. Raises UsageError for a missing or damaged one."""
        shards = [read_shard(self.folder / name) for name in self.files[split]]
        found = sum(s.size for s in shards)
        if found != self.tokens[split]:
            raise UsageError(f"The {split} shards in {self.folder} hold {found} tokens, not {self.tokens[split]}.")
        return shards

    def check(self, vocab_size: int, sequence_length: int) -> None:
        """Refuse, before any time is spent, data that the model cannot train on. Raises UsageError."""
        if self.vocab_size != vocab_size:
            raise UsageError(
                f"--shape.vocab-size {vocab_size}: the tokenizer in {self.folder} has {self.vocab_size} pieces, "
                "give that number or other data."
            )
        if not self.has_its_tokenizer():
            raise UsageError(f"{self.tokenizer} is not the tokenizer that made the shards; prepare the data again.")
        for split in ("train", "val"):
            for name, shard in zip(self.files[split], self.shards(split), strict=True):
                top = max((int(shard[i : i + 2**24].max()) for i in range(0, shard.size, 2**24)), default=0)
                if top >= vocab_size:
                    raise UsageError(
                        f"Shard {self.folder / name} holds token {top}, the vocabulary ends at {vocab_size}."
                    )
        for split in ("train", "val"):
            if self.tokens[split] <= sequence_length:
                raise UsageError(
                    f"--recipe.sequence-length {sequence_length}: the {split} split in {self.folder} has only "
                    f"{self.tokens[split]} tokens, give a shorter sequence or more text."
                )


def whole(shard: np.ndarray) -> np.ndarray:
    """The same shard, its file not cut since it was mapped: reading past a file's end would end the process. One that
    was deleted can still be read. Raises UsageError."""
    if isinstance(shard, np.memmap):
        with contextlib.suppress(FileNotFoundError):
            size = os.path.getsize(shard.filename)
            if size < HEADER_BYTES + 2 * shard.size:
                raise UsageError(f"Shard {shard.filename} was cut to {size:,} bytes while it was read.")
    return shard


class TokenStream:
    """The shards as one endless row of tokens: read in order, over and over."""

    def __init__(self, shards: list[np.ndarray], vocab_size: int = 1 << 16):
        self.vocab_size = vocab_size
        self.shards = [s for s in shards if s.size]
        self.total = sum(s.size for s in self.shards)
        self.starts = np.cumsum([0] + [s.size for s in self.shards])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the endless row, int64 (count,)."""
        parts, start = [], start % self.total
        while count > 0:
            index = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = whole(self.shards[index])[start - self.starts[index] :][:count]
            parts.append(part)
            count -= part.size
            start = (start + part.size) % self.total
        tokens = np.concatenate(parts).astype(np.int64)
        if (top := tokens.max()) >= self.vocab_size:
            raise UsageError(f"A shard holds token {top}, the vocabulary ends at {self.vocab_size}: it was changed.")
        return tokens


def coprime_stride(rows: int) -> int:
    """A stride through so many rows that visits each once, about 0.618 of them: neighbours in time lie far apart."""
    stride = max(1, round(rows * 0.6180339887))
    while math.gcd(stride, rows) != 1:
        stride += 1
    return stride


def batches(
    stream: TokenStream, batch_tokens: int, length: int, loader: str = "sequential", rank: int = 0, world: int = 1,
    micro_rows: int = 0, step: int = 0,
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """For each step the rank's micro-batches of (inputs, targets), int64 (rows, length) each.

    `sequential` takes a batch's rows one after the other from the stream, as the contest's trainer does. `lanes` cuts
    the stream into as many lanes as a batch has rows, and row r continues lane r, so that a batch mixes distant text.
    `strided` visits all rows of the stream in steps that are coprime to their number, then begins again.
    Rows are dealt to ranks in blocks, so that any world size that divides the rows sees the same batch.
    """
    batch_rows = batch_tokens // length
    rows = batch_rows // world
    micro = micro_rows or rows
    while True:
        numbers = np.arange(rank * rows, (rank + 1) * rows)
        if loader == "lanes":
            starts = numbers * (stream.total // batch_rows) + step * length
        elif loader == "strided":
            starts = (
                (step * batch_rows + numbers)
                * coprime_stride(stream.total // length)
                % max(1, stream.total // length)
                * length
            )
        else:
            starts = (step * batch_rows + numbers) * length
        tokens = np.stack([stream.read(int(start), length + 1) for start in starts])  # (rows, length + 1)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        yield [(inputs[i : i + micro], targets[i : i + micro]) for i in range(0, rows, micro)]
        step += 1


# == bpb ===========================================================================================
# Bits per byte: nats from the model, bytes from the original text.
#
# The contest counts a piece's UTF-8 bytes, a leading U+2581 as one byte, a byte-fallback piece as one, a control
# piece as none. Here those counts are also checked against the decoded text, so that a tokenizer which loses bytes
# is found and refused.

@dataclass(frozen=True)
class Score:
    """Summed nats over `tokens` targets that stand for `bytes` bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits a byte."""
        return self.nats / math.log(2) / self.bytes


def documents(tokens: np.ndarray, bos: int) -> Iterator[np.ndarray]:
    """Cut a row of tokens at each BOS; the pieces come without it."""
    starts = np.flatnonzero(tokens == bos)
    if tokens.size and (not starts.size or starts[0] != 0):
        yield tokens[: starts[0] if starts.size else tokens.size]
    for start, end in zip(starts, [*starts[1:], tokens.size], strict=True):
        yield tokens[start + 1 : end]


def windows(tokens: np.ndarray, length: int, rows: int, whole_only: bool = False) -> Iterator[tuple[np.ndarray, ...]]:
    """Disjoint rows over a stream of tokens, each target exactly once: (inputs, targets), int64 (B, T) each.

    The last row is shorter; `whole_only` leaves it out, as the contest's trainer does.
    """
    targets = tokens.size - 1
    full = targets // length
    for first in range(0, full, rows):
        count = min(rows, full - first)
        part = np.asarray(tokens[first * length : (first + count) * length + 1], dtype=np.int64)
        yield part[:-1].reshape(count, length), part[1:].reshape(count, length)
    if full * length < targets and not whole_only:
        part = np.asarray(tokens[full * length :], dtype=np.int64)
        yield part[None, :-1], part[None, 1:]


# == clock =========================================================================================
# The training clock: counts training only, answers alike on all ranks, and stops before the cap.

RECENT = 16  # steps whose slowest predicts the next: long enough to see a periodic stall, short enough to forget one


class Clock:
    """Seconds of training, not counting what happens inside `paused()`.

    A step goes begin_step() -> gradients -> may_update() -> update -> end_step(). begin_step answers None when the
    slowest recent step would not fit before `seconds - reserve`; may_update answers False when the slowest recent
    update would not, so that the step is abandoned. Should an update end after the limit all the same, `late` is set
    and the caller takes it back: no late update stays in the weights.

    `agree` turns this rank's elapsed seconds into the largest of all ranks'; every decision is made from agreed
    numbers only, so that all ranks decide alike. `now` reads the time.
    """

    def __init__(
        self, seconds: float, reserve: float = 0.0, agree: Callable[[float], float] = float,
        now: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        if not 0 <= reserve < seconds:
            raise ValueError(f"a reserve of {reserve} s leaves nothing of {seconds} s")
        self.seconds, self.reserve = seconds, reserve
        self.agree, self.now = agree, now
        self.started = self.now()
        self.left_out = 0.0
        self.steps: deque[float] = deque(maxlen=RECENT)
        self.updates: deque[float] = deque(maxlen=RECENT)
        self.step_began = self.update_began = 0.0
        self.late = False

    @property
    def limit(self) -> float:
        return self.seconds - self.reserve

    def elapsed(self) -> float:
        """Counted seconds on this rank."""
        return self.now() - self.started - self.left_out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: validation, writing of checkpoints."""
        began = self.now()
        try:
            yield
        finally:
            self.left_out += self.now() - began

    def begin_step(self) -> float | None:
        """Progress in [0, 1], the same on all ranks, or None when the next step would not fit."""
        self.step_began = self.agree(self.elapsed())
        if self.late or self.step_began + max(self.steps, default=0.0) >= self.limit:
            return None
        return self.step_began / self.limit

    def may_update(self) -> bool:
        """Whether an update that starts now ends before the cap, by the slowest recent one; all ranks agree."""
        self.update_began = self.agree(self.elapsed())
        return self.update_began + max(self.updates, default=0.0) < self.limit

    def end_step(self) -> float:
        """Note what the step and its update took on the slowest rank; return the step's seconds."""
        ended = self.agree(self.elapsed())
        self.late = ended > self.limit
        self.steps.append(ended - self.step_began)
        self.updates.append(ended - self.update_began)
        return self.steps[-1]


class Pace:
    """A time that passes by what steps are said to take: runs of equal time are then alike on a busy machine too."""

    def __init__(self, seconds: dict[tuple[int, ...], float]):
        """Seconds of a step of so many passes in rows of a length."""
        self.seconds, self.time = seconds, 0.0

    def now(self) -> float:
        return self.time

    def tick(self, loops: int, length: int) -> None:
        """A step's time passes."""
        self.time += self.seconds[loops, length]


class StepCounter:
    """A Clock that reads no time: progress is step / steps. For runs that must be equal on every machine."""

    late = False

    def __init__(self, steps: int):
        self.total = steps
        self.done = 0
        self.started = time.perf_counter()
        self.left_out = self.step_began = 0.0

    elapsed = Clock.elapsed
    paused = Clock.paused
    now = staticmethod(time.perf_counter)

    def begin_step(self) -> float | None:
        self.step_began = self.elapsed()
        return self.done / self.total if self.done < self.total else None

    def may_update(self) -> bool:
        return True

    def end_step(self) -> float:
        self.done += 1
        return self.elapsed() - self.step_began


# == machine =======================================================================================
# The machine a rank computes on: its device and number type, the ranks beside it, compilation and warm-up.

@dataclass(frozen=True)
class Machine:
    """Where this rank computes, and how."""

    device: torch.device
    dtype: torch.dtype
    compile: str
    rank: int = 0
    world: int = 1
    notes: tuple[str, ...] = ()

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, the same on each."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def from_rank_0(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.world == 1:
            return text
        said = [text]
        dist.broadcast_object_list(said, device=self.device)
        return said[0]

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all ranks', in place."""
        if self.world > 1:
            dist.all_reduce(tensor)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a CUDA device, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_memory() -> None:
    """Have glibc keep freed blocks instead of handing them back and faulting every page in again.

    Activations are allocated and freed at every layer; eager steps took 1.48 times as long without this on 2 cores.
    """
    try:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library


def bfloat16_gain(device: torch.device) -> float:
    """Rate of bfloat16 matrix products over float32's, measured here: below 1 where they are emulated."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 512, device=device).to(dtype) for _ in range(2))
        taken = []
        for _ in range(8):
            began = time.perf_counter()
            for _ in range(4):
                a @ b.mT
            taken.append(time.perf_counter() - began)
        seconds[dtype] = min(taken)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def missing_for_compile() -> str:
    """What torch.compile needs for a CPU and does not find here: a C++ compiler or Python's headers."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "C++ compiler"
    return "" if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "Python.h (python3-dev)"


def set_up(config: Config) -> Machine:
    """Choose device, type and compilation, and join the other ranks. Raises UsageError for what is not there."""
    run, notes = config.run, []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    if not available:
        raise UsageError(f"--run.device {kind}: this machine has none, give cpu or auto.")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if kind != "cpu":
        notes.append(f"{kind}: written for it, not yet tested on it")
    if run.threads:
        torch.set_num_threads(run.threads)
    keep_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(run.dtype)
    if dtype is None and kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
        notes.append(f"{str(dtype)[6:]}: by the device's capability")
    elif dtype is None:
        gain = Machine(device, torch.float32, "none", rank, world).largest(bfloat16_gain(device))  # one answer for all
        dtype = torch.bfloat16 if gain > 1.2 else torch.float32
        notes.append(f"{str(dtype)[6:]}: bfloat16 products run at {gain:.1f} times float32's rate here")
    mode = run.compile
    if mode != "none" and kind == "cpu" and (missing := missing_for_compile()):
        if mode != "auto":
            raise UsageError(f"--run.compile {mode}: there is no {missing}, install it or give none.")
        mode = "none"
        notes.append(f"compile: none, there is no {missing}")
    mode = "block" if mode == "auto" else mode
    return Machine(device, dtype, mode, rank, world, tuple(notes))


def compile_model(model: RecurrentGPT, mode: str) -> None:
    """Compile in place: each block and the head (`block`, one graph whatever the loops), or the whole (`model`)."""
    if mode == "none":
        return
    torch._dynamo.config.recompile_limit = 64  # one code object serves every block
    if mode == "model":
        model.compile()
        return
    for block in model.blocks:
        block.compile()
    model.loss_part = torch.compile(part_loss, dynamic=False)


def accumulate(model: RecurrentGPT, micro: list, machine: Machine, loops: int, objective: Objective) -> Tensor:
    """Gradients of the mean loss over a rank's micro-batches, added to .grad; returns that loss."""
    total = torch.zeros((), device=machine.device)
    for inputs, targets in micro:
        tokens, wanted = (torch.from_numpy(a).to(machine.device, non_blocking=True) for a in (inputs, targets))
        loss = objective.loss(model, tokens, wanted, machine.dtype, loops) / len(micro)
        loss.backward()
        total += loss.detach()
    for p in model.parameters():
        if p.grad is None:  # of a part that does nothing before the repeats are on
            p.grad = torch.zeros_like(p)
    return total


def warm_up(model: RecurrentGPT, optimizers: Optimizers, config: Config, machine: Machine, micro_rows: int) -> bool:
    """Compile every graph that training will use, on synthetic tokens; weights and optimiser state are restored.

    Returns False, on every rank, when memory ran out on any: nothing that ranks do together is begun before all of
    them have been through a backward pass.
    """
    recipe, shape, objective = config.recipe, config.shape, Objective(config)
    saved = [p.detach().clone() for p in model.parameters()]
    row = np.arange(micro_rows * recipe.sequence_length, dtype=np.int64).reshape(micro_rows, -1) % shape.vocab_size
    failed = 0.0
    for length, loops in kinds_of_steps(shape, recipe):
        row = row.reshape(-1, length)
        for _ in range(2):
            try:
                optimizers.zero_grad()
                accumulate(model, [(row, row)], machine, loops, objective)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = 1.0
            if failed := machine.largest(failed):
                break
            optimizers.reduce_gradients()
            optimizers.gradient_norm()
            optimizers.step(0.0)
        if failed:
            break
    with torch.no_grad():
        for p, before in zip(model.parameters(), saved, strict=True):
            p.copy_(before)
    optimizers.zero_grad()
    optimizers.reset()
    if failed and machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return not failed


def is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def warm_up_in_memory(
    model: RecurrentGPT, optimizers: Optimizers, config: Config, machine: Machine, report: Callable[[dict], None]
) -> int:
    """Warm up, with half the micro-batch if memory runs out once. Returns the rows that fit. Raises UsageError."""
    rows = config.recipe.batch_tokens // config.recipe.sequence_length // machine.world
    micro = config.run.micro_rows or rows
    half = next(n for n in range(max(1, micro // 2), 0, -1) if rows % n == 0)
    for attempt in (micro, half):
        if warm_up(model, optimizers, config, machine, attempt):
            return attempt
        report({"event": "memory", "message": f"{attempt} rows at a time do not fit in memory"})
    raise UsageError(f"--run.micro-rows {micro}: neither {micro} nor {half} rows fit in memory, give fewer.")


# == calibrate =====================================================================================
# Sensitivities of the matrices, from gradients on training text, summed over every pass of a shared block.

class Collector:
    """Hessian sums of one model, filled through its taps while batches run forward and backward."""

    def __init__(self, model: RecurrentGPT):
        self.model = model
        self.sums = {
            name: torch.zeros(p.shape[1], p.shape[1], device=p.device)
            for name, p in model.named_parameters()
            if tensor_class(name) != "control"
        }
        self.rows = torch.zeros(model.shape.vocab_size, device=model.embedding.device)
        self.tokens = self.batches = 0
        model.tap = self.top
        for index, block in enumerate(model.blocks):
            block.tap = partial(self.matrix, f"blocks.{index}.")

    def matrix(self, prefix: str, role: str, x: Tensor, y: Tensor) -> None:
        """Note a matrix's inputs; its outputs' gradients add to the sums when they come."""
        y.register_hook(partial(self.add, prefix + role, x.detach()))

    def top(self, use: str, x: Tensor, y: Tensor) -> None:
        """The tied embedding: a matrix at the head, rows that are looked up."""
        y.register_hook(partial({"head": self.add_head, "lookup": self.add_lookup}[use], x.detach()))

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Sum over tokens of |g|^2 / R x x'; of a mean loss's gradient, so `finish` multiplies by the tokens."""
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        weight = gradient.square().mean(dim=1, keepdim=True)
        self.sums[name] += (x * weight).mT @ x

    def add_head(self, x: Tensor, gradient: Tensor) -> None:
        self.add("embedding", x, gradient)
        x = x.flatten(0, -2).float()
        self.rows += (gradient.flatten(0, -2).float().square().mT @ x.square().mean(dim=1, keepdim=True))[:, 0]

    def add_lookup(self, rows: Tensor, gradient: Tensor) -> None:
        weight = gradient.flatten(0, -2).float().square().mean(dim=1)
        self.rows.index_add_(0, rows.flatten(), weight)
        self.sums["embedding"].diagonal().add_(weight.sum() / self.rows.numel())

    def batch(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype, isolate: bool = False) -> None:
        """Forward and backward over one batch (B, T) at full depth; the parameters' own gradients are dropped."""
        self.model(tokens, targets, dtype=dtype, isolate=isolate).backward()
        self.model.zero_grad(set_to_none=True)
        self.tokens += tokens.numel()
        self.batches += 1

    def finish(self, machine: Machine) -> dict[str, Sensitivity]:
        """Means over the tokens of all ranks; the taps are taken off."""
        self.model.tap = None
        for block in self.model.blocks:
            block.tap = None
        tokens, batches = machine.total([self.tokens, self.batches])
        # A mean loss's gradient at a token is 1 / (tokens of the batch) of that token's, and it is squared here.
        scale = (tokens / batches) / batches
        found = {}
        for name, hessian in self.sums.items():
            machine.add_up(hessian)
            rows = np.ones(self.model.get_parameter(name).shape[0])
            if name == "embedding":
                machine.add_up(self.rows)
                rows = self.rows.double().cpu().numpy()
                rows /= max(rows.mean(), 1e-300)
            found[name] = Sensitivity(hessian.double().cpu().numpy() * scale, rows)
        return found


def twin_of(model: RecurrentGPT) -> RecurrentGPT:
    """A copy that is not compiled: taps change what runs."""
    twin = RecurrentGPT(model.shape).to(model.embedding.device)
    twin.load_state_dict(model.state_dict())
    return twin


def rehearse(model: RecurrentGPT, config: Config, machine: Machine, micro_rows: int) -> tuple[float, float]:
    """Training seconds to set aside for calibrate(), and of them those for its end; by timing both on synthetic
    tokens, alike on all ranks."""
    batches = config.pack.calibration_batches
    if not batches or config.run.max_steps or config.run.pace:
        return 0.0, 0.0
    length = config.recipe.sequence_length
    numbers = torch.arange(micro_rows * (length + 1), device=machine.device)
    tokens = numbers.view(micro_rows, length + 1) % model.shape.vocab_size
    times = [machine.now()]
    collector = Collector(twin_of(model))
    for _ in range(3):
        collector.batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), machine.dtype, config.recipe.isolate)
        times.append(machine.now())
    collector.finish(machine)
    start, *rest, end = np.diff([*times, machine.now()])
    usual, end = machine.largest(min(rest)), machine.largest(2 * float(end) + 0.05)
    return machine.largest(1.25 * batches * usual + max(start - usual, 0.0)) + end, end


def calibrate(
    model: RecurrentGPT, source: Iterator, config: Config, machine: Machine, seconds_left: Callable[[], float],
    end: float,
) -> tuple[dict[str, Sensitivity] | None, int]:  # fmt: skip
    """Sensitivities from the next batches of training text (the first micro-batch of each), and how many there were:
    fewer than asked for when time runs out; none, as if there had been none, when it ran out all the same."""
    collector = Collector(twin_of(model))
    slowest = 0.0
    for _ in range(config.pack.calibration_batches):
        left = seconds_left()
        if machine.largest(1.5 * slowest + end - left) > 0:
            break
        inputs, targets = (torch.from_numpy(a).to(machine.device) for a in next(source)[0])
        collector.batch(inputs, targets, machine.dtype, config.recipe.isolate)
        machine.now()
        slowest = max(slowest, left - seconds_left())
    found = collector.finish(machine) if collector.batches else None
    late = machine.largest(-seconds_left()) > 0
    return (None, 0) if late else (found, collector.batches)


# == noise =========================================================================================
# Training against the export: the grid's error, added to the shared blocks while gradients are taken.
#
# An error in a block that runs several times grows through its passes; blocks that have trained with it bear it better
# (contest pull request 363: +0.37 bpb without, 0.002 with matched noise).

class GridNoise:
    """Perturbs the matrices of every block that runs more than once, from `recipe.noise_from` of the clock on."""

    def __init__(self, model: RecurrentGPT, config: Config):
        self.recipe = config.recipe
        self.step = config.recipe.noise_step or config.pack.matrix_step
        shared = [block for index, block in enumerate(model.blocks) if config.shape.passes(index) > 1]
        self.matrices = [p for block in shared for p in block.parameters()]
        device = model.embedding.device
        self.generator = torch.Generator(device).manual_seed(config.run.seed)  # the same noise on every rank

    @contextmanager
    def added(self, progress: float) -> Iterator[None]:
        """Inside, the matrices carry a grid's error; gradients taken there are the straight-through ones."""
        if self.recipe.grid_noise == "off" or progress < self.recipe.noise_from:
            yield
            return
        with torch.no_grad():
            exact = [p.clone() for p in self.matrices]
            for p in self.matrices:
                step = (self.step * p.std(dim=1, keepdim=True)).clamp_min(1e-12)  # of rows that start at zero
                if self.recipe.grid_noise == "uniform":
                    p.add_((torch.rand(p.shape, device=p.device, generator=self.generator) - 0.5) * step)
                else:
                    p.copy_(torch.round(p / step) * step)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.matrices, exact)


# == average =======================================================================================
# A running average of the weights, which is what is packed when there is one.

class WeightAverage:
    """Exponential average of all parameters in float32, over about `horizon` of the clock; a horizon of 0 is none.

    The contest's records average with 0.9965 a step, 6 % of their run (03-22 on).
    """

    def __init__(self, model: nn.Module, horizon: float):
        self.parameters = list(model.parameters()) if horizon else []
        self.horizon, self.progress = horizon, 0.0
        self.average: list[Tensor] = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """After an update at `progress` in [0, 1] of the clock."""
        if self.average:
            share = 1 - math.exp(-(progress - self.progress) / min(self.horizon, max(progress, 1e-6)))
            torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], max(share, 1e-6))
            self.progress = progress

    @torch.no_grad()
    def install(self) -> None:
        """Make the model's weights the average."""
        for p, average in zip(self.parameters, self.average, strict=True):
            p.copy_(average)


# == ngrams ========================================================================================
# Counts of runs of pieces in text whose scores stand, which sharpen a model's distribution.
#
# A model small enough to be weak at names and phrases gains much from the text it has just been scored on. Each context's
# counts are exact (no hashing), discounted and filled up with the distribution they sharpen, so that every distribution
# sums to one whatever was counted: absolute discounting (Ney, Essen and Kneser 1994) with the network's distribution at
# the bottom in place of the unigrams. Counts are read for a position from the pieces before it only.

DISCOUNT = 0.7  # of every count, given to what was not seen


# (document so far?, pieces of context, weight of the distribution below in counts), in the order they are applied;
# chosen on the development split.
STEPS = ((True, 1, 16.0), (False, 2, 128.0), (True, 2, 0.5), (False, 3, 4.0), (True, 3, 0.5))


class Successors:
    """How often each piece followed each context of `length` pieces. Raises ValueError where a run of length + 1 pieces
    of this vocabulary is no 63-bit number."""

    def __init__(self, length: int, vocab: int):
        if vocab ** (length + 1) >= 1 << 63:
            raise ValueError(f"runs of {length + 1} of {vocab} pieces do not fit 63 bits")
        self.length, self.vocab = length, vocab
        self.weights = vocab ** np.arange(length, -1, -1, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        self.keys = np.zeros(0, dtype=np.int64)  # of context and successor, ascending
        self.counts = np.zeros(0, dtype=np.int64)
        self.sums = np.zeros(1, dtype=np.int64)  # of all counts before a key

    def add(self, document: np.ndarray, start: int = 0) -> None:
        """Count the runs inside document (N,) whose last piece is at `start` or later."""
        begin = max(0, start - self.length)
        if document.size - begin <= self.length:
            return
        runs = sliding_window_view(document[begin:], self.length + 1)
        keys, counts = np.unique(runs @ self.weights, return_counts=True)
        place = np.searchsorted(self.keys, keys)
        known = place < self.keys.size
        known[known] = self.keys[place[known]] == keys[known]
        self.counts[place[known]] += counts[known]
        self.keys = np.insert(self.keys, place[~known], keys[~known])
        self.counts = np.insert(self.counts, place[~known], counts[~known])
        self.sums = np.concatenate(([0], np.cumsum(self.counts)))

    def contexts(self, row: np.ndarray) -> np.ndarray:
        """Number of the context that ends at each position of row (T,), from position length - 1 on."""
        return sliding_window_view(row, self.length) @ self.weights[1:]

    def spans(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the keys of each context (N,) begin and end."""
        low = np.searchsorted(self.keys, contexts * self.vocab)
        return low, np.searchsorted(self.keys, (contexts + 1) * self.vocab)

    def count(self, contexts: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """Times that each piece (N,) followed its context (N,)."""
        keys = contexts * self.vocab + pieces
        place = np.searchsorted(self.keys, keys)
        found = np.zeros(keys.shape, dtype=np.int64)
        inside = place < self.keys.size
        inside[inside] = self.keys[place[inside]] == keys[inside]
        found[inside] = self.counts[place[inside]]
        return found


@dataclass
class Step:
    """One distribution on top of another."""

    here: bool
    weight: float
    table: Successors


class RunCache:
    """Successors in all documents before, and in the document so far."""

    def __init__(self, vocab: int, order: int):
        """`order` is the longest context, 1 to 3 pieces."""
        self.steps = [Step(here, weight, Successors(n, vocab)) for here, n, weight in STEPS if n <= order]
        self.clear()

    def clear(self) -> None:
        """Forget all text."""
        self.document, self.number = np.zeros(0, dtype=np.int64), -1
        for step in self.steps:
            step.table.clear()

    def learn(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Count tokens (N,), whose scores stand, with the numbers of their documents (N,)."""
        for part in np.split(tokens, np.flatnonzero(np.diff(documents)) + 1):
            number = int(documents[0])
            documents = documents[part.size :]
            if number != self.number:
                self.close()
                self.number = number
            start = self.document.size
            self.document = np.concatenate([self.document, part])
            for step in self.steps:
                if step.here:
                    step.table.add(self.document, start)

    def close(self) -> None:
        """The document is over: it joins the others."""
        for step in self.steps:
            step.table.clear() if step.here else step.table.add(self.document)
        self.document = self.document[:0]

    def continues(self, row: np.ndarray) -> np.ndarray:
        """Whether each position of row (T,) lies in the document so far, as far as the pieces up to it tell."""
        inside = np.ones(row.size, dtype=bool)
        bounds = [*np.flatnonzero(row == BOS), row.size]
        for start, end in itertools.pairwise(bounds):
            known = min(end - start, self.document.size)
            alike = row[start : start + known] == self.document[:known]
            inside[start : start + known] = np.logical_and.accumulate(alike)
            inside[start + known : end] = inside[start + known - 1] if known else False
        return inside

    def score(self, row: np.ndarray, below: np.ndarray) -> np.ndarray:
        """row (T + 1,), probabilities (T,) of its pieces after the first -> (T,), sharpened."""
        p, inside = below.astype(np.float64), self.continues(row[:-1])
        for step in self.steps:
            at = slice(step.table.length - 1, None)
            if row.size <= step.table.length:
                continue
            contexts = step.table.contexts(row[:-1])
            low, high = step.table.spans(contexts)
            seen = step.table.sums[high] - step.table.sums[low]
            count = step.table.count(contexts, row[step.table.length :])
            rest = (step.weight + DISCOUNT * (high - low)) * p[at]
            sharper = (np.maximum(count - DISCOUNT, 0.0) + rest) / (seen + step.weight)
            use = (seen > 0) & (inside[at] if step.here else True)
            p[at] = np.where(use, sharper, p[at])
        return p

    def spread(self, row: np.ndarray, below: np.ndarray) -> np.ndarray:
        """row (T,), distributions (T, V) of the piece after each position -> (T, V), sharpened."""
        p, inside = below.astype(np.float64), self.continues(row)
        for step in self.steps:
            table = step.table
            if row.size < table.length:
                continue
            low, high = table.spans(table.contexts(row))
            for at, (a, b) in enumerate(zip(low, high, strict=True), table.length - 1):
                if a < b and (inside[at] or not step.here):
                    seen = table.sums[b] - table.sums[a]
                    p[at] *= step.weight + DISCOUNT * (b - a)
                    p[at, table.keys[a:b] % table.vocab] += table.counts[a:b] - DISCOUNT
                    p[at] /= seen + step.weight
        return p


# == exits =========================================================================================
# Scoring in which each token stops at a pass of its own, and the computation after it is left out.
#
# A token that has stopped keeps its last state, and in every block the keys and values of its last pass, which others go
# on to see. Only the states that still run are gathered, padded to few sizes, and computed; what a token does depends on
# nothing after it and on no other row.

SIZES = 8  # of the number of running positions in a row, as parts of its length


@dataclass
class Look:
    """What a rule may read after a pass, of the positions that run: all of it is of the position or before it."""

    passed: int
    place: Tensor  # (B, N) int64, the positions
    state: Tensor  # (B, N, D) after the pass
    before: Tensor  # (B, N, D) as the pass read it
    read: Callable[[Tensor], Tensor]
    """States (B, N, D) -> log-probabilities (B, N, V) float32."""
    keys: Tensor  # (B, N) int64, a hash of the positions' last pieces
    spent: Tensor  # (B, N) what the gate's exits sum to; zero without one


@dataclass(frozen=True)
class FixedDepth:
    """Everyone stops after `depth` passes."""

    depth: int

    def stops(self, look: Look) -> Tensor:
        return torch.full(look.state.shape[:2], look.passed >= self.depth, device=look.state.device)


@dataclass(frozen=True)
class Assigned:
    """Each position stops after the pass that `depths` (B, T) int64 names: another model's, or a control's."""

    depths: Tensor

    def stops(self, look: Look) -> Tensor:
        return self.depths.gather(1, look.place) <= look.passed


@dataclass(frozen=True)
class RandomDepth:
    """Stop after each pass with a chance of `threshold`, by a hash of the last pieces: the bar for any gate."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        mixed = look.keys + look.passed * 0x27D4EB2F
        for factor in (0x2C1B3C6D, 0x297A2D39):  # as integers are commonly hashed
            mixed = ((mixed ^ (mixed >> 15)) * factor).remainder(1 << 31)
        return (mixed ^ (mixed >> 15)).remainder(1 << 20) < self.threshold * (1 << 20)


@dataclass(frozen=True)
class Entropy:
    """Stop where the distribution's entropy is at most `threshold` nats."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        logprobs = look.read(look.state)
        return -(logprobs.exp() * logprobs).sum(dim=-1) <= self.threshold


@dataclass(frozen=True)
class Margin:
    """Stop where the two likeliest pieces are at least `threshold` apart in probability."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        first, second = look.read(look.state).exp().topk(2, dim=-1).values.unbind(dim=-1)
        return first - second >= self.threshold


@dataclass(frozen=True)
class Divergence:
    """Stop where the pass moved the distribution by at most `threshold` nats (KL of the new one from the old)."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        if look.passed == 1:  # nothing to compare with
            return torch.zeros(look.state.shape[:2], dtype=torch.bool, device=look.state.device)
        new, old = look.read(look.state), look.read(look.before)
        return (new.exp() * (new - old)).sum(dim=-1) <= self.threshold


@dataclass(frozen=True)
class Difference:
    """Stop where the pass moved the state by at most `threshold` of its norm."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        moved = (look.state - look.before).float().norm(dim=-1)
        return moved <= self.threshold * look.state.float().norm(dim=-1)


@dataclass(frozen=True)
class Gate:
    """Stop where the model's own exits have summed to `threshold` (PALBERT's Q-exit; ACT's 1 - epsilon)."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        return look.spent >= self.threshold - SLACK


Rule = FixedDepth | Assigned | RandomDepth | Entropy | Margin | Divergence | Difference | Gate


RULES = {
    "fixed": FixedDepth, "random": RandomDepth, "entropy": Entropy, "margin": Margin, "divergence": Divergence,
    "difference": Difference, "gate": Gate,
}  # fmt: skip


def make_rule(name: str, threshold: float, shape: Shape) -> Rule:
    """A rule by name. Raises UsageError for a name or threshold that is none, or that a shape cannot follow."""
    if name not in RULES:
        known = ", ".join(RULES)
        raise UsageError(f"--scoring.exit {name:.60}: give one of {known}.")
    check_threshold(name, threshold, shape)
    return FixedDepth(int(threshold)) if name == "fixed" else RULES[name](threshold)


def prefix_keys(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T) int64: a number for the last four pieces at each position."""
    padded = F.pad(tokens, (3, 0))
    length = tokens.size(1)
    factors = (1, 31_337, 7_919, 104_729)
    return sum(padded[:, 3 - back : 3 - back + length] * factor for back, factor in enumerate(factors))


@dataclass
class Exits:
    """States and depths of one batch."""

    states: Tensor  # (B, T, D); of run_exits the normalised final ones
    depths: Tensor  # (B, T) int64 passes of each token
    computed: list[int]
    """Positions that each pass computed, padding included."""


@dataclass(frozen=True)
class Chosen:
    """What a pass computes: some positions of each row, or all."""

    place: Tensor | None  # (B, N) int64; None is all in order
    moves: Tensor | None  # (B, N) bool, which of them run; None is all

    def of(self, x: Tensor) -> Tensor:
        """x (B, T) or (B, T, D) at those positions."""
        if self.place is None:
            return x
        return gathered(x, self.place) if x.ndim == 3 else x.gather(1, self.place)

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` where it runs."""
        wide = (lambda t: t[..., None].expand_as(new)) if x.ndim == 3 else lambda t: t
        if self.moves is not None:
            new = torch.where(wide(self.moves), new, self.of(x))
        return new if self.place is None else x.scatter(1, wide(self.place), new)


def choose(running: Tensor, gather: bool) -> Chosen:
    """running (B, T) bool -> the positions to compute: as many in each row, one of SIZES parts of T, or all.

    A row with fewer running positions repeats its last one; one with none holds position 0, which does not run.
    """
    length, counts = running.size(1), running.sum(dim=1)
    part = math.ceil(length / SIZES)
    size = min(length, part * max(1, math.ceil(int(counts.max()) / part)))
    if size == length or not gather:
        return Chosen(None, None if bool(running.all()) else running)
    order = torch.argsort(running.int(), dim=1, descending=True, stable=True)
    place = torch.arange(size, device=running.device).expand(len(running), -1)
    place = order.gather(1, torch.minimum(place, (counts - 1).clamp_min(0)[:, None]))
    if bool(counts.all()):
        return Chosen(place, None)
    moves = (counts > 0)[:, None].expand(-1, size)
    return Chosen(torch.where(moves, place, 0), moves)


@torch.no_grad()
def run_exits(
    model: RecurrentGPT, tokens: Tensor, rule: Rule, dtype: torch.dtype = torch.float32, gather: bool = True
) -> Exits:
    """tokens (B, T) int64 -> states and depths under `rule`; with `gather` only what runs is computed, else all of it,
    to the same end."""
    check_exits(model.shape)
    given = model.enter(tokens, dtype)
    x = model.prelude(given)
    kept = model.nothing_kept(x)  # of one pass after the other: who has stopped stays in it as it was
    found = follow(model, given, x, prefix_keys(tokens), rule, [kept] * model.shape.loops, gather)
    return replace(found, states=model.coda(found.states, given))


def follow(
    model: RecurrentGPT, given: Given, x: Tensor, keys: Tensor, rule: Rule, kept: list[list[Kept]], gather: bool = True,
    start: int = 0,
) -> Exits:  # fmt: skip
    """The passes over states x (B, T, D) at positions from `start` on, with the core's keys and values at each pass:
    the states that the coda reads, and depths."""
    shape, everywhere = model.shape, torch.arange(x.size(1), device=x.device).expand(len(x), -1)
    whole = kept[0][0].keys.size(2) == x.size(1)
    running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    depths, computed = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device), []
    spent = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    mixed = torch.zeros_like(x)  # of an ACT model
    read = lambda states: F.log_softmax(model.head(F.rms_norm(states, (shape.width,))), dim=-1)  # noqa: E731
    for passed in range(1, shape.loops + 1):
        chosen = choose(running, gather)
        place = everywhere if chosen.place is None else chosen.place
        for bank in kept[passed - 1]:
            bank.at, bank.moves = None if whole and chosen.place is None else place + start, chosen.moves
        before = chosen.of(x)
        part = model.core_pass(before, given if chosen.place is None else given.at(place), passed, kept[passed - 1])
        computed.append(place.numel())
        x = chosen.put(x, part)
        depths += running
        if passed == shape.loops:
            break
        look = Look(passed, place, part, before, read, chosen.of(keys), chosen.of(spent))
        if shape.exit_gate != "none":
            stop, left = torch.sigmoid(model.gate(part, passed)), 1 - look.spent
            look.spent = look.spent + stop * (left if shape.exit_gate == "hazard" else 1)
        still = ~rule.stops(look)
        if shape.exit_gate == "act":
            share = torch.where(still, stop, left)[..., None].to(x.dtype)
            mixed = chosen.put(mixed, chosen.of(mixed) + share * part)
        spent = chosen.put(spent, look.spent)
        running = chosen.put(running, still)
        if not running.any():
            break
    if shape.exit_gate == "act":
        x = mixed + torch.where(running, 1 - spent, 0.0)[..., None].to(x.dtype) * x
    return Exits(x, depths, computed)


# == scoring =======================================================================================
# The packed model as a referee asks for it, and what it may learn from text whose scores stand.

LOGITS_AT_A_TIME = 1 << 25


PHASE_ROWS = 8  # rows of a step in a phase over text that has been scored


def packed_model(path: Path) -> RecurrentGPT:
    """The model in an artifact, for use alone. Raises UsageError."""
    shape, weights = load_artifact(path)
    model = RecurrentGPT(shape)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return model.eval().requires_grad_(False)


def scoring_of(path: Path) -> Scoring:
    """What an artifact says of how it is to be scored. Raises UsageError."""
    return fields_from_dict(Scoring, read_note(path).get("scoring", {}), "artifact's scoring")


class Adapters:
    """Low-rank additions to the matrices of the blocks that run several times (LoRA, Hu et al. 2021)."""

    def __init__(self, model: RecurrentGPT, rank: int, rate: float):
        self.weights = dict(model.named_parameters())
        self.rank, self.rate = rank, rate
        shape: Shape = model.shape
        core = range(shape.prelude, shape.prelude + shape.core)
        self.names = [n for n, p in self.weights.items() if p.ndim == 2 and n.startswith("blocks.")
                      and int(n.split(".")[1]) in core]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Start again: the additions are zero."""
        generator = torch.Generator().manual_seed(1)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.names:
            rows, columns = self.weights[name].shape
            device = self.weights[name].device
            a = torch.randn(self.rank, columns, generator=generator).to(device) * columns**-0.5
            self.parts[name] = (a.requires_grad_(), torch.zeros(rows, self.rank, device=device, requires_grad=True))
        self.moved = False
        self.optimizer = torch.optim.AdamW(
            [p for pair in self.parts.values() for p in pair], lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0
        )  # fmt: skip

    def added(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with the additions on top."""
        return weights | {name: weights[name] + b @ a for name, (a, b) in self.parts.items()}

    def step(self, loss: Tensor) -> None:
        """One update towards a smaller loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.moved = True


class Scorer:
    """Log-probabilities of every piece after every prefix, under what the artifact says of its scoring."""

    def __init__(self, folder: Path | str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        path = Path(folder) / "model.bin"
        self.model = packed_model(path).to(self.device)
        shape = self.model.shape
        self.scoring = scoring_of(path)
        self.vocab = shape.vocab_size
        exit, threshold = self.scoring.exit, self.scoring.exit_threshold
        self.rule = make_rule(exit, threshold, shape) if exit != "none" else None
        self.runs = RunCache(self.vocab, self.scoring.ngram_order) if self.scoring.ngram_order else None
        if self.scoring.adapts:
            self.adapt, self.reset = self.learn, self.forget  # offered only where it is declared
            self.forget()

    def weights(self) -> dict[str, Tensor]:
        """The model's weights, and all that was learned since."""
        found = dict(self.model.named_parameters())
        for adapters in (self.lasting, self.passing) if self.scoring.adapt_rank else ():
            found = adapters.added(found) if adapters.moved else found
        return found

    def run(self, weights: dict[str, Tensor], tokens: np.ndarray, targets: np.ndarray | None = None) -> Tensor:
        """Logits (B, T, V) float32, or the mean loss when targets are given."""
        if self.rule:
            given = torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
            return self.model.head(run_exits(self.model, given, self.rule, self.dtype).states)
        given = [torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in (tokens, targets) if a is not None]
        return functional_call(
            self.model, weights, tuple(given), {"dtype": self.dtype, "isolate": self.scoring.isolate}
        )  # fmt: skip

    @torch.no_grad()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) int64 -> natural-log probabilities (B, T, V) float32 of the piece after each position."""
        logprobs = torch.log_softmax(self.run(self.weights(), tokens), dim=-1).cpu().numpy()
        if self.runs:
            below = np.exp(logprobs.astype(np.float64))
            rows = [self.runs.spread(row, p) for row, p in zip(tokens, below, strict=True)]
            logprobs = np.log(np.stack(rows)).astype(np.float32)
        return logprobs

    @torch.no_grad()
    def score(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T + 1) int64 -> (B, T) float32: the log-probability of each but the first."""
        rows = max(1, LOGITS_AT_A_TIME // (self.vocab * tokens.shape[1]))
        weights, parts = self.weights(), []
        for at in range(0, len(tokens), rows):
            part = tokens[at : at + rows]
            logprobs = torch.log_softmax(self.run(weights, part[:, :-1]), dim=-1)
            targets = torch.from_numpy(np.ascontiguousarray(part[:, 1:, None])).to(self.device)
            parts.append(logprobs.gather(-1, targets)[..., 0].cpu().numpy())
        scores = np.concatenate(parts)
        if self.runs:
            below = np.exp(scores.astype(np.float64))
            rows = [self.runs.score(row, p) for row, p in zip(tokens, below, strict=True)]
            scores = np.log(np.stack(rows)).astype(np.float32)
        return scores

    def forget(self) -> None:
        """Return to the packed weights, and to no text."""
        if self.runs:
            self.runs.clear()
        if not self.scoring.adapt_rank:
            return
        self.passing = Adapters(self.model, self.scoring.adapt_rank, self.scoring.adapt_rate)
        self.lasting = Adapters(self.model, self.scoring.adapt_rank, self.scoring.phase_rate)
        self.recent = np.zeros(0, dtype=np.int64)
        self.waiting: list[np.ndarray] = []
        self.document = -1

    def learn(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """One step on tokens (N,) whose scores stand, after those before them; their documents' numbers (N,)."""
        if self.runs:
            self.runs.learn(tokens, documents)
        if not self.scoring.adapt_rank:
            return
        if self.scoring.phase_tokens:
            self.waiting.append(tokens)
            if sum(map(len, self.waiting)) >= self.scoring.phase_tokens:
                self.phase()
        if self.scoring.per_document and documents[-1] != self.document:
            if self.passing.moved:
                self.passing.reset()
            tokens, self.recent = tokens[documents == documents[-1]], self.recent[:0]
        self.document = int(documents[-1])
        self.recent = np.concatenate([self.recent, tokens])[-(self.scoring.adapt_context + 1) :]
        if self.recent.size < 2:
            return
        weights = self.passing.added(self.lasting.added(dict(self.model.named_parameters())))
        self.passing.step(self.run(weights, self.recent[None, :-1], self.recent[None, 1:]))

    def phase(self) -> None:
        """One pass over all that was scored since the last one, in rows, for additions that stay."""
        text, self.waiting = np.concatenate(self.waiting), []
        length = self.scoring.adapt_context
        rows = text[: (text.size - 1) // length * length + 1]
        inputs, targets = rows[:-1].reshape(-1, length), rows[1:].reshape(-1, length)
        for at in range(0, len(inputs), PHASE_ROWS):
            weights = self.lasting.added(dict(self.model.named_parameters()))
            self.lasting.step(self.run(weights, inputs[at : at + PHASE_ROWS], targets[at : at + PHASE_ROWS]))


# == train_gpt =====================================================================================
# Train a depth-recurrent language model against the clock, pack it, have it judged, write the record.
#
#     python train_gpt.py PRESET [flags]
#     python train_gpt.py laptop --run.data data/english --recipe.matrix-rate 0.02
#     python train_gpt.py laptop --run.resume runs/FOLDER
#     torchrun --standalone --nproc_per_node=8 train_gpt.py PRESET [flags]
#
# In a run folder this file is also the submission: load_scorer(folder) returns the packed model's Scorer.

VALIDATION_TOKENS = 16_384  # tokens a rank scores at a time


PENALTY_TOKENS = 32_768


# == the submission's side ====================================================================================


def load_scorer(folder: Path | str) -> Scorer:
    """Load the artifact in `folder`. Raises UsageError when it is missing or damaged."""
    keep_memory()
    return Scorer(folder)


# == training ====================================================================================================


@dataclass
class Result:
    """What training leaves."""

    model: RecurrentGPT
    status: str = "complete"  # complete | interrupted | crash
    reason: str = ""
    steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    loss: float = float("nan")
    peak_memory: int = 0
    sensitivities: dict[str, Sensitivity] | None = None


class Rollback:
    """The weights, their average and the count of steps before the last update, to return to when it must not stand."""

    def __init__(self, result: Result, average: WeightAverage):
        self.result, self.average = result, average
        self.weights = [t.detach().clone() for t in self.tensors()]
        self.counts, self.progress = (0, 0, 0.0, float("nan")), average.progress

    def tensors(self) -> list[torch.Tensor]:
        return [*self.result.model.parameters(), *self.average.average]

    @torch.no_grad()
    def remember(self) -> None:
        """Before an update: keep the weights, whose loss has just been found finite."""
        torch._foreach_copy_(self.weights, self.tensors())
        self.progress = self.average.progress
        self.counts = (self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss)

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo the last update."""
        torch._foreach_copy_(self.tensors(), self.weights)
        self.average.progress = self.progress
        self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss = self.counts


class Interrupt:
    """Whether Ctrl-C or SIGTERM has asked the run to end. A second one, later than a launcher's echo of the first,
    ends the program at once."""

    ECHO_SECONDS = 5.0

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    @contextmanager
    def watched(self) -> Iterator[Interrupt]:
        before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.asked_at is not None and time.monotonic() - self.asked_at > self.ECHO_SECONDS:
            raise KeyboardInterrupt
        self.asked_at = self.asked_at or time.monotonic()


@torch.no_grad()
def validate(
    model: RecurrentGPT, tokens: np.ndarray, text_bytes: int, config: Config, machine: Machine, loops: int | None = None
) -> Score:  # fmt: skip
    """Score of the model's weights on a row of tokens that stands for `text_bytes`, shared over the ranks."""
    length = config.recipe.sequence_length
    nats, count = 0.0, 0
    for index, (inputs, targets) in enumerate(windows(tokens, length, max(1, VALIDATION_TOKENS // length))):
        if index % machine.world == machine.rank:
            given, wanted = (torch.from_numpy(a).to(machine.device) for a in (inputs, targets))
            hidden = model.hidden(given, machine.dtype, loops, config.scoring.isolate)
            nats += float(model.head_loss(hidden, wanted)) * targets.size
            count += targets.size
    nats, count = machine.total([nats, count])
    return Score(nats, int(count), text_bytes)


def train(
    config: Config, corpus: Corpus, machine: Machine, interrupt: Interrupt, report: Callable[[dict], None],
    keeper: object = None,
) -> Result:  # fmt: skip
    """Train until the clock or the step count says stop. `report` receives one dict an event, on every rank. A keeper
    (golf.resume) puts back what an earlier run kept, and keeps what this one needs to go on."""
    shape, recipe, run = config.shape, config.recipe, config.run
    torch.manual_seed(run.seed)
    model = RecurrentGPT(shape).initialize(recipe, run.seed).to(machine.device)
    optimizers = optimizers_for(model, recipe, run.overlap)
    compile_model(model, machine.compile)
    stream = TokenStream(corpus.shards("train"), shape.vocab_size)
    began = time.perf_counter()
    micro_rows = warm_up_in_memory(model, optimizers, config, machine, report)
    reserve, ending = rehearse(model, config, machine, micro_rows)
    report({
        "event": "warm-up", "seconds": round(time.perf_counter() - began, 2), "micro_rows": micro_rows,
        "reserve": round(reserve, 2),
    })  # fmt: skip

    result = Result(model)
    average, objective, noise = WeightAverage(model, recipe.average), Objective(config), GridNoise(model, config)
    rollback = Rollback(result, average)
    pace = Pace(said_pace(run.pace))
    now = pace.now if run.pace else machine.now
    timed = Clock(config.train_seconds, min(reserve, config.train_seconds / 2), machine.largest, now)
    clock: Clock | StepCounter = StepCounter(run.max_steps) if run.max_steps else timed
    if keeper:
        keeper.begin(model, optimizers, clock, average, objective, noise, result)
        rollback.remember()  # a run that goes on falls back to where it does

    def source_from(length: int, step: int) -> Iterator:
        rows = micro_rows * recipe.sequence_length // length
        return batches(stream, recipe.batch_tokens, length, recipe.loader, machine.rank, machine.world, rows, step)

    length, source = recipe.sequence_length, source_from(recipe.sequence_length, result.steps)
    while (progress := clock.begin_step()) is not None:
        if machine.largest(interrupt.asked):
            result.status, result.reason = "interrupted", "asked to stop"
            if keeper:
                keeper.keep()
            break
        loops = shape.loops if progress >= recipe.loops_from else 1
        if recipe.length_at(progress) != length:
            length = recipe.length_at(progress)
            source = source_from(length, result.steps)
        optimizers.zero_grad()
        objective.begin(progress)
        with noise.added(progress):
            batch = next(source)
            local_loss = accumulate(model, batch, machine, loops, objective)
        if run.pace:
            pace.tick(loops, length)
        optimizers.reduce_gradients()
        norm, told = optimizers.gradient_norm(), objective.told(model)
        if recipe.target_depth and loops > 1:
            objective.steer(machine.total([told["mean_depth"]])[0] / machine.world)
        loss = machine.total([float(local_loss)])[0] / machine.world
        if not (np.isfinite(loss) and np.isfinite(norm)):
            result.status, result.reason = "crash", f"loss {loss}, gradient norm {norm} at step {result.steps + 1}"
            rollback.take_back()  # the update that led here
            break
        if not clock.may_update():
            report({"event": "abandoned", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            break
        rollback.remember()
        optimizers.step(progress)
        average.follow(progress)
        seconds = clock.end_step()
        if clock.late:
            report({"event": "late", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            rollback.take_back()
            break
        result.steps += 1
        result.tokens += recipe.batch_tokens
        result.loss, result.train_seconds = loss, clock.elapsed()
        report({
            "event": "step", "step": result.steps, "loss": round(loss, 5),
            "elapsed": round(result.train_seconds, 3), "ms": round(seconds * 1e3, 1),
            "progress": round(progress, 5), "loops": loops, "rate_scale": round(recipe.rate_scale(progress), 4),
            "gradient_norm": round(norm, 4), "tokens": result.tokens, "limit": config.train_seconds, **told,
        })  # fmt: skip
        if loops > 1 and run.log_every and result.steps % run.log_every == 0 and machine.rank == 0:
            report({"event": "passes", "step": result.steps, **pass_statistics(
                model, batch[0][0][:1], machine.dtype, loops)})  # fmt: skip
        if keeper:
            keeper.after_step()
        if run.validate_every and result.steps % run.validate_every == 0:
            with clock.paused():
                score = validation_score(model, corpus, config, machine)
                report({"event": "validation", "step": result.steps, "val_loss": score.loss, "val_bpb": score.bpb})
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        result.status, result.reason = "crash", f"weights not finite after step {result.steps}"
        rollback.take_back()
    if result.steps and result.status != "crash":
        average.install()
    report({
        "event": "trained", "status": result.status, "reason": result.reason, "steps": result.steps,
        "tokens": result.tokens, "train_seconds": round(result.train_seconds, 3), "left_out": round(clock.left_out, 3),
    })  # fmt: skip
    if config.pack.calibration_batches and result.steps:
        began = clock.elapsed()
        limit = float("inf") if run.max_steps or run.pace else config.train_seconds
        left = lambda: limit - clock.elapsed()  # noqa: E731
        result.sensitivities, done = calibrate(model, source, config, machine, left, ending)
        seconds = machine.largest(clock.elapsed()) - began
        if done:
            result.train_seconds = began + seconds
        report({"event": "calibrated", "batches": done, "seconds": round(seconds, 2), "reserve": round(reserve, 2)})
    result.peak_memory = peak_memory(machine.device)
    return result


def validation_score(model: RecurrentGPT, corpus: Corpus, config: Config, machine: Machine) -> Score:
    """The unpacked weights' score on the corpus's whole validation split."""
    tokens = np.concatenate(corpus.shards("val"))
    return validate(model, tokens, corpus.val_bytes, config, machine)


def pack(result: Result, config: Config, path: Path, code_bytes: int, report: Callable[[dict], None]) -> None:
    """Quantise, encode and write the artifact. Raises UsageError for weights that cannot be packed."""
    began = time.perf_counter()
    weights = {name: p.detach().float().cpu().numpy() for name, p in result.model.named_parameters()}
    note = {"preset": config.preset, "seed": config.run.seed}
    if config.scoring != Scoring():
        note["scoring"] = asdict(config.scoring)
    data, about = quantize(
        config.shape, weights, config.pack, config.target_bytes(code_bytes), result.sensitivities,
        partial(encode, config.shape, note=note, coder=config.pack.coder, chosen={}),
    )  # fmt: skip
    write_bytes(path, data)
    report({"event": "packed", "seconds": round(time.perf_counter() - began, 2), **about})


def quantization_penalty(
    model: RecurrentGPT, path: Path, corpus: Corpus, config: Config, machine: Machine
) -> dict[str, float]:  # fmt: skip
    """Bits a byte that packing costs at each number of loops, on the first PENALTY_TOKENS of validation. The model is
    left with the packed weights."""
    tokens, alone = np.concatenate(corpus.shards("val"))[: PENALTY_TOKENS + 1], replace(machine, rank=0, world=1)
    text_bytes = round(corpus.val_bytes * tokens.size / corpus.tokens["val"])  # the whole split's bytes a token

    def scores() -> list[float]:
        counts = range(1, config.shape.loops + 1)
        return [validate(model, tokens, text_bytes, config, alone, loops).bpb for loops in counts]

    before = scores()
    weights = load_artifact(path)[1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))
    return {str(n + 1): round(b - a, 5) for n, (a, b) in enumerate(zip(before, scores(), strict=True))}


# == this file's own main: the baked configuration; SEED, DATA_PATH and MODEL_PATH from outside ==

CONFIG = Config(preset='laptop',
    track='unlimited',
    shape=Shape(vocab_size=4096, width=128, heads=2, kv_heads=1, core=3, loops=3, skips=False, pass_scalars=True, activation='leaky-relu2'),
    recipe=Recipe(sequence_length=256, batch_tokens=4096, loader='strided', matrix_rate=0.03, scalar_rate=0.03, momentum_warmup=0.1, newton_schulz='polar-express', row_normalize=True, warmdown=1.0, clip_norm=1.0),
    pack=Pack(target_bytes=364000),
    run=Run(data='data/yardstick4096', max_steps=350, cap=600.0))


def main() -> int:
    """Train again from scratch, JSON lines on standard output, and write the artifact."""
    run = replace(
        CONFIG.run, seed=int(os.environ.get("SEED", CONFIG.run.seed)), data=os.environ.get("DATA_PATH", CONFIG.run.data)
    )
    config = replace(CONFIG, run=run).check(int(os.environ.get("WORLD_SIZE", 1)))
    here = Path(__file__)
    path = Path(os.environ.get("MODEL_PATH", here.parent / "model.bin"))
    if path.exists():
        raise UsageError(f"{path} exists, name another file in MODEL_PATH.")
    corpus = Corpus(run.data)
    corpus.check(config.shape.vocab_size, config.recipe.sequence_length)
    machine = set_up(config)

    def report(row: dict) -> None:
        if machine.rank == 0:
            print(json.dumps(row), flush=True)

    with Interrupt().watched() as interrupt:
        result = train(config, corpus, machine, interrupt, report)
        if machine.rank == 0:
            pack(result, config, path, here.stat().st_size, report)
        score = validation_score(result.model, corpus, config, machine)
        report({"event": "unpacked", "val_loss": score.loss, "val_bpb": score.bpb})
    return 0 if result.status == "complete" else 1


if __name__ == "__main__":
    try:
        code = main()
    except UsageError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        code = 2
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
