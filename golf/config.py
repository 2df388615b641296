"""What a run is: Shape (changes bytes), Recipe (changes weights), Run (changes neither). No torch here.

Everything that can be derived from a field is a property, never a second field.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

BOS = 1  # the piece that opens a document, in shards and in rows

# How the artifact stores a parameter, by the last part of its name.
TENSOR_CLASSES = {
    "embedding": "embed", "query": "matrix", "key": "matrix", "value": "matrix", "out": "matrix", "up": "matrix",
    "down": "matrix", "attn_scale": "control", "mlp_scale": "control", "resid_mix": "control", "qk_gain": "control",
    "skip_weight": "control", "gate": "matrix", "attn_gate": "control", "smear": "control", "pass_signal": "control",
    "bigram": "embed", "bigram_out": "matrix", "value_table": "embed", "lane_mix": "control",
}  # fmt: skip


class UsageError(Exception):
    """A user's mistake: one sentence that names the option, its value and the way out. Scripts exit 2 on it."""


def tensor_class(name: str) -> str:
    """Which codec rule a parameter has: embed, matrix or control. Raises ValueError with its name when none."""
    kind = TENSOR_CLASSES.get(name.rsplit(".", 1)[-1])
    if kind is None:
        raise ValueError(f"parameter {name!r} has no codec rule")
    return kind


GATE_CHANNELS = 12  # of a block's input, that open and close gates
PASS_WAVES = 4  # sines of the pass by which a shared block tells one from another


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
    pass_signal: bool = False
    """Tell a shared block by a learned vector, scaled by a sine of the pass, which pass it is."""
    bigram_rows: int = 0
    """Rows of a hashed table of pairs of pieces whose rows are projected and added to the embedding; 0 is none."""
    bigram_width: int = 32
    """Channels of that table."""
    value_blocks: int = 0
    """How many of the last unique blocks add a learned row for each piece to their values (one table for all)."""
    lanes: bool = False
    """In the second half of the effective layers keep two residual streams, one read by attention, one by the MLP."""

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
        if self.pass_signal:
            table["pass_signal"] = (PASS_WAVES, width)
        if self.bigram_rows:
            table["bigram"] = (self.bigram_rows, self.bigram_width)
            table["bigram_out"] = (width, self.bigram_width)
        if self.value_blocks:
            table["value_table"] = (self.vocab_size, self.kv_width)
        if self.lanes:
            table["lane_mix"] = (rows, 2, 3)
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
    shared_rate: Literal["same", "divided"] = "same"
    """Divide the rate of a shared block's matrices by its passes, or leave it to Muon's normalisation."""
    random_loops: bool = False
    """Draw the number of passes anew each step, from 1 to the shape's, once repeats are on."""
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
    embed_spectrum: float = 0.0
    """Give the embedding at the start singular values that fall as this power of their rank; 0 leaves them."""

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
    phase_tokens: int = 0
    """Targets after which one pass over them is made that is never forgotten; 0 makes none."""
    phase_rate: float = 1e-3


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
    threads: int = 0
    """Threads of the CPU's matrix products; 0 leaves it to torch."""
    micro_rows: int = 0
    """Rows a rank computes at a time; 0 is all of its share of the batch."""
    max_steps: int = 0
    """Stop after this many steps and read no clock (progress is step / max-steps); 0 trains by the clock."""
    cap: float = 0.0
    """Training seconds, if fewer than the track's."""
    validate_every: int = 0
    """Steps between looks at the validation loss, outside the clock; 0 is only at the end."""
    log_every: int = 20
    """Steps between progress lines."""
    checkpoint: bool = False
    """Write the weights and sensitivities beside the artifact, for `artifact.py pack`; they do not count."""
    judge: bool = True
    """Have the referee score the packed artifact at the end."""
    allow_over_cap: bool = False
    """Train even where the budget says that the artifact will not fit."""


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
}


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    preset: str = "custom"
    track: Literal["contest", "laptop", "smoke"] = "contest"
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
        parts = [self.shape, self.recipe, self.pack, self.scoring]
        text = json.dumps([self.track, *map(asdict, parts)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, world_size: int = 1) -> Config:
        """Return self, or raise UsageError naming the first option that cannot work."""
        check_shape(self.shape)
        check_recipe(self.recipe, self.run, world_size)
        check_pack(self.pack)
        check_scoring(self.scoring, self.recipe.sequence_length)
        step = self.recipe.noise_step or self.pack.matrix_step
        told = self.recipe.grid_noise == "off" or step > 0
        require(told, "recipe.noise_step", self.recipe.noise_step, "name the grid's step in row deviations")
        for name in ("seed", "threads", "max_steps", "cap", "validate_every", "log_every"):
            require(getattr(self.run, name) >= 0, f"run.{name}", getattr(self.run, name), "give 0 or more")
        limit = self.limits.train_seconds
        require(self.run.cap <= limit, "run.cap", self.run.cap, f"the {self.track} track allows {limit:g} s")
        return self


def require(condition: bool, option: str, value: object, way_out: str) -> None:
    """Raise UsageError("--option value: way out") unless `condition` holds."""
    if not condition:
        raise UsageError(f"--{option.replace('_', '-')} {value}: {way_out}.")


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
    width, heads = shape.width, shape.heads
    near = max(1, width // heads) * heads
    require(width % heads == 0, "shape.width", width, f"not divisible by {heads} heads, {near} is")
    require(shape.head_size % 2 == 0, "shape.heads", heads, f"the head size {shape.head_size} must be even for RoPE")
    require(heads % shape.kv_heads == 0, "shape.kv_heads", shape.kv_heads, f"must divide the {heads} heads")
    require(shape.mlp_width >= 1, "shape.mlp_ratio", shape.mlp_ratio, "give more than 0")
    require(shape.softcap > 0, "shape.softcap", shape.softcap, "give more than 0")
    require(shape.rope_base > 1, "shape.rope_base", shape.rope_base, "give more than 1")


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
    for name in ("matrix_rate", "embed_rate", "scalar_rate", "matrix_decay", "embed_decay", "clip_norm", "embed_std",
                 "noise_step"):  # fmt: skip
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


def check_scoring(scoring: Scoring, context: int) -> None:
    """Raise UsageError for a scorer that cannot be asked so."""
    require(0 <= scoring.stride <= context, "scoring.stride", scoring.stride, f"give 0 to {context}, the row's length")
    require(0 <= scoring.adapt_rank <= 1024, "scoring.adapt_rank", scoring.adapt_rank, "give 0 to 1,024")
    require(scoring.phase_tokens >= 0, "scoring.phase_tokens", scoring.phase_tokens, "give 0 or more")
    for name in ("chunk", "adapt_context"):
        require(2 <= getattr(scoring, name) <= 1 << 20, f"scoring.{name}", getattr(scoring, name), "give 2 or more")
    for name in ("adapt_rate", "phase_rate"):
        require(0 <= getattr(scoring, name) <= 1, f"scoring.{name}", getattr(scoring, name), "give 0 to 1")


def fields_from_dict(kind: type, values: object, what: str):
    """A flat dataclass from a stranger's JSON object, names and types checked. Raises UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"The {what} is not a JSON object.")
    kinds = {f.name: type(f.default) for f in fields(kind)}
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
