"""What a run is: Shape (changes bytes), Recipe (changes weights), Run (changes neither). No torch here.

Everything that can be derived from a field is a property, never a second field.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from golf.shape import Shape


class UsageError(Exception):
    """A user's mistake: one sentence that names the option, its value and the way out. Scripts exit 2 on it."""


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
        check_pace(self)
        limit = self.limits.train_seconds
        ends = self.train_seconds < float("inf") or self.run.max_steps > 0
        require(ends, "track", self.track, "it has no clock, give --run.max-steps or --run.cap")
        require(self.run.cap <= limit, "run.cap", self.run.cap, f"the {self.track} track allows {limit:g} s")
        return self


def require(condition: bool, option: str, value: object, way_out: str) -> None:
    """Raise UsageError("--option value: way out") unless `condition` holds."""
    if not condition:
        name = option.replace("_", "-")
        raise UsageError(f"--{name} {value}: {way_out}.")


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


def said_pace(text: str) -> dict[tuple[int, ...], float]:
    """LOOPSxLENGTH=MS,... as seconds by (loops, length). Raises ValueError."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return {tuple(map(int, kind.split("x"))): float(ms) / 1e3 for kind, _, ms in parts}


def check_pace(config: Config) -> None:
    """Raise UsageError for a pace that leaves out a kind of step, or a run that it would prove nothing of."""
    run, pace = config.run, config.run.pace
    if not pace:
        return
    require(not run.judge, "run.pace", pace, "give --run.no-judge, seconds that are said prove no limit")
    require(not run.max_steps, "run.max_steps", run.max_steps, "give no pace, or no number of steps")
    try:
        told = said_pace(pace)
    except ValueError:
        told = {}
    for length, loops in kinds_of_steps(config.shape, config.recipe):
        fits = 0 < told.get((loops, length), 0) < 1e6
        require(fits, "run.pace", pace, f"give {loops}x{length}=MS, as --run.pace 1x256=300,3x256=450")


def kinds_of_steps(shape: Shape, recipe: Recipe) -> list[tuple[int, int]]:
    """(row length, loops) of every kind of step that training takes, the deepest, which needs most memory, first."""
    found = {
        (recipe.length_at(progress), shape.loops if progress >= recipe.loops_from else 1)
        for progress in (0.0, recipe.short_until, recipe.loops_from, 1.0)
    }
    return sorted(found, key=lambda kind: (-kind[1], -kind[0]))


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
