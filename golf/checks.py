"""Which options cannot work, alone or together: each check raises UsageError naming the first. No torch here."""

from __future__ import annotations

from golf.errors import UsageError, require
from golf.recipe import Pack, Recipe, Run, Scoring, kinds_of_steps, said_pace
from golf.shape import Shape

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
    require(shape.mlp_width >= 1, "shape.mlp_ratio", shape.mlp_ratio, "give more than 0")
    require(shape.softcap > 0, "shape.softcap", shape.softcap, "give more than 0")
    require(shape.rope_base > 1, "shape.rope_base", shape.rope_base, "give more than 1")
    if shape.exit_gate != "none":
        check_exits(shape)


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
    if loss != "last":
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


def check_threshold(
    rule: str, threshold: float, shape: Shape, names: tuple[str, str] = ("exit", "threshold")
) -> None:
    """Raise UsageError for a threshold that its rule cannot take, or a rule that the shape cannot follow; `names` are
    those of the two options."""
    loops, gate = shape.loops, shape.exit_gate
    require(rule != "gate" or gate != "none", names[0], rule, "the model has no gate, give another rule")
    fits = rule == "gate" or gate != "act"
    require(fits, names[0], rule, "the model mixes its passes by its own gate, give gate")
    least, most = int(rule == "fixed"), {"fixed": loops, "random": 1.0, "margin": 1.0, "gate": 1.0}.get(rule, 1e6)
    whole = rule != "fixed" or threshold in range(1, loops + 1)
    way_out = f"{rule} takes {least} to {most:g}"
    require(0 <= threshold <= most and whole, names[1], f"{threshold:g}", way_out)


def check_pace(shape: Shape, recipe: Recipe, run: Run, limited: bool) -> None:
    """Raise UsageError for a pace that leaves out a kind of step, or a run on a limited track that it would prove
    nothing of."""
    pace = run.pace
    if not pace:
        return
    proves = not (run.judge and limited)
    require(proves, "run.pace", pace, "give --run.no-judge or --track unlimited, seconds that are said prove no limit")
    require(not run.max_steps, "run.max_steps", run.max_steps, "give no pace, or no number of steps")
    try:
        told = said_pace(pace)
    except ValueError:
        told = {}
    for loops in kinds_of_steps(shape, recipe):
        require(0 < told.get(loops, 0) < 1e6, "run.pace", pace, f"give {loops}=MS, as --run.pace 1=300,3=450")


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
    for name in (
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
    for name in ("matrix_rate", "embed_rate", "scalar_rate", "matrix_decay", "embed_decay", "clip_norm",
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


def check_scoring(scoring: Scoring, context: int, shape: Shape, part: str = "scoring.") -> None:
    """Raise UsageError for a model of this shape that cannot be asked so; `part` begins the options' names."""
    if scoring.exit != "none":
        check_exits(shape)
        check_threshold(scoring.exit, scoring.exit_threshold, shape, (f"{part}exit", f"{part}exit_threshold"))
        require(not scoring.isolate, f"{part}isolate", True, "tokens that stop see their whole row")
        require(scoring.adapt_rank == 0, f"{part}adapt_rank", scoring.adapt_rank, "give 0 where tokens stop")
    still = shape.exit_gate != "act" or not (scoring.isolate or scoring.adapt_rank)
    require(still, f"{part}isolate" if scoring.isolate else f"{part}adapt_rank", "on", "an ACT model's tokens stop")
    require(0 <= scoring.ngram_order <= 3, f"{part}ngram_order", scoring.ngram_order, "give 0 to 3")
    fits = shape.vocab_size ** (scoring.ngram_order + 1) < 1 << 63
    require(fits, f"{part}ngram_order", scoring.ngram_order, "too long for this vocabulary, give less")
    require(0 <= scoring.stride <= context, f"{part}stride", scoring.stride, f"give 0 to {context}, the row's length")
    require(0 <= scoring.adapt_rank <= 1024, f"{part}adapt_rank", scoring.adapt_rank, "give 0 to 1,024")
    require(scoring.phase_tokens >= 0, f"{part}phase_tokens", scoring.phase_tokens, "give 0 or more")
    for name in ("chunk", "adapt_context"):
        require(2 <= getattr(scoring, name) <= 1 << 20, f"{part}{name}", getattr(scoring, name), "give 2 or more")
    for name in ("adapt_rate", "phase_rate"):
        require(0 <= getattr(scoring, name) <= 1, f"{part}{name}", getattr(scoring, name), "give 0 to 1")
