"""What a run is besides its Shape: Recipe (changes weights), Pack (weights to bytes), Scoring (how the packed model is
asked), Run (where, how long and from which seed; not part of the fingerprint). No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from golf.shape import Shape


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
    matrix_rate: float = 0.04
    """Muon's learning rate."""
    embed_rate: float = 0.05
    """Adam's learning rate for the tied embedding."""
    scalar_rate: float = 0.04
    """Adam's learning rate for control vectors."""
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
    """Adam's momentum, of the embedding and what is no matrix."""
    adam_beta2: float = 0.95
    """Adam's memory of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the root that Adam divides by."""
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
    """Learning rate of those passes."""

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
    """Where the model is; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 where the processor computes it natively."""
    compile: Literal["auto", "block", "model", "none"] = "auto"
    """What torch.compile sees: each block, which compiles soonest, or the whole model. auto is model on a GPU where the
    last pass alone is trained, else block, or none without a C++ compiler."""
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
    LOOPS=MS,... (`golf.ablate` measures them)."""
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


def said_pace(text: str) -> dict[int, float]:
    """LOOPS=MS,... as seconds by loops. Raises ValueError."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return {int(loops): float(ms) / 1e3 for loops, _, ms in parts}


def kinds_of_steps(shape: Shape, recipe: Recipe) -> list[int]:
    """Passes of every kind of step that training takes, the deepest, which needs most memory, first."""
    found = {shape.loops if progress >= recipe.loops_from else 1 for progress in (0.0, recipe.loops_from)}
    return sorted(found, reverse=True)
