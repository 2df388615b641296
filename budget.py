"""Before training: bytes, FLOPs, steps and memory of a configuration, without torch.

python budget.py PRESET [flags] [--json] [--machine NAME]
python budget.py table            the looping proposal's six shapes beside its own claims
python budget.py fit --track contest --unique 3 --loops 3 [--width 768,1024] [--vocab N] [--machine NAME]
python budget.py measure          time this machine's training steps once (uses torch)
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist

from golf import bundle
from golf.config import TRACKS, Config, Shape, UsageError, tensor_class

MEASURED = Path(__file__).resolve().parent / "machine.json"
FINEST, COARSEST = 1 / 32, 2.0  # the codec's own limits; a test holds them equal
FEWEST_BITS = 2.0  # bits a weight below which `fit` leaves a width out


@dataclass(frozen=True)
class Rates:
    """Seconds a step takes for each unit of work: a step is their sum."""

    per_flop: float
    per_element: float
    """For each token x effective layer x channel: normalisation, residuals and other element-wise traffic."""
    per_logit: float = 0.0
    """For each token x vocabulary piece."""
    per_score: float = 0.0
    """For each token x effective layer x head x key it attends to: what small heads cost beyond their FLOPs."""
    memory_gb: float = 0.0
    source: str = ""


# Solved from two public step times: the baseline's 43.54 ms (524,288 tokens) and the record's 141 ms with loops on
# (786,432 tokens). Against others it was not solved from: the record's 96 ms before loops -4 %, 85 ms of an 11-layer
# MLP-3x model at 2,048 tokens a row +2 %, 51.9 ms of the baseline at 2,048 tokens a row -13 %.
H100 = Rates(1.01e-15, 1.152e-10, memory_gb=80, source="solved from two public step times on 8xH100")
MACHINES = {
    "8xH100": Rates(H100.per_flop / 8, H100.per_element / 8, memory_gb=80, source=H100.source),
    "1xH100": H100,
    # Scaled by dense bfloat16 rate (989 to 58 TFLOP/s) and memory bandwidth (3,350 to 504 GB/s).
    "RTX4070": Rates(
        H100.per_flop * 989 / 58, H100.per_element * 3350 / 504, memory_gb=12, source="scaled from the H100"
    ),
}


# -- bytes -------------------------------------------------------------------------------------------------------

# What an artifact holds beside its weights' symbols; measured on one trained `laptop` model (LAB.md).
ROW_CODE_BITS = 3.8  # a row's step, where it goes with the row's deviation
EMBED_ROW_BITS = 6.1  # a row of the embedding, whose step goes with how often the piece occurs
COLUMN_CODE_BITS = 3.8  # a column's step, where columns have their own
CONTROL_BITS = 6.8  # a control weight
HEADER_BYTES, GROUP_BYTES, TABLE_BYTES, LANE_SHARE = 340, 26, 14, 0.0004
# What tables that follow its rows or columns save on a weight of the embedding; with steps by the row, less is left.
EMBED_GAIN_BITS = {"alike": 0.3, "by row": 0.15}
FEEDBACK_SHARE = 1.01  # symbols of matrices rounded with error feedback, over those of their weights


def largest_of(count: int) -> float:
    """Median of the largest magnitude among `count` standard normal numbers."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)


def symbol_bits(step: float, quantizer: str) -> float:
    """Entropy of a standard normal variable on a grid of this step.

    Rounding adds the grid's error, step^2 / 12 or with a trellis 0.8 of it, to the variance that is coded: 2.047
    - log2(step) bits where steps are fine; within 0.3 % up to a step of 1.5.
    """
    error = 0.8 / 12 if quantizer == "trellis" else 1 / 12
    return 0.5 * math.log2(2 * math.pi * math.e * (1 / step**2 + error))


def grid_step(step: float, columns: int) -> float:
    """The step that a row of this many weights gets: an integer of 8 bits must hold its largest."""
    return max(step, largest_of(columns) / 127.5)


def side_bytes(config: Config) -> dict[str, float]:
    """Predicted bytes of everything but the symbols of matrices and embedding."""
    shape, pack = config.shape, config.pack
    totals = {"scales": 0.0, "control": 0.0, "header": float(HEADER_BYTES)}
    weighed = pack.calibration_batches > 0
    table = shape.parameters()
    for name, dims in table.items():
        kind = tensor_class(name)
        if kind == "control":
            totals["control"] += math.prod(dims) * CONTROL_BITS / 8
            continue
        rows = (
            EMBED_ROW_BITS if kind == "embed" and weighed else 0.0 if weighed and not pack.row_power else ROW_CODE_BITS
        )
        columns = COLUMN_CODE_BITS if weighed and pack.column_steps else 0.0
        totals["scales"] += (dims[0] * rows + dims[1] * columns) / 8
    totals["header"] += GROUP_BYTES * len({name.rsplit(".", 1)[-1] for name in table})
    totals["header"] += TABLE_BYTES * len(table) if pack.coder == "static" else 0
    return totals


def coded_bytes(config: Config, matrix_step: float, embed_step: float) -> dict[str, float]:
    """Predicted bytes of the artifact by class, on grids of these steps in standard deviations."""
    totals = {"embedding": 0.0, "matrices": 0.0, **side_bytes(config)}
    for name, dims in config.shape.parameters().items():
        kind = tensor_class(name)
        if kind != "control":
            step = grid_step(embed_step if kind == "embed" else matrix_step, dims[1])
            walks = config.pack.quantizer == "trellis" and kind == "matrix"
            bits = symbol_bits(step, "trellis" if walks else "scalar")
            if kind == "embed" and config.pack.coder == "adaptive":
                bits -= EMBED_GAIN_BITS["by row" if config.pack.calibration_batches else "alike"]
            if kind == "matrix" and config.pack.calibration_batches and config.pack.rounding == "feedback":
                bits *= FEEDBACK_SHARE
            totals["embedding" if kind == "embed" else "matrices"] += math.prod(dims) * bits / 8
    totals["header"] += LANE_SHARE * sum(totals.values())
    return totals


def artifact_bytes(config: Config, code: int) -> dict[str, int]:
    """Predicted bytes of each class of tensor: at the steps that the configuration names, or those that fill its cap.

    A cap too small for the coarsest grid is not filled but exceeded.
    """
    pack = config.pack
    if pack.matrix_step:
        totals = coded_bytes(config, pack.matrix_step, pack.embed_step)
    else:
        target, low, high = config.target_bytes(code), math.log2(FINEST), math.log2(COARSEST)
        for _ in range(40):
            middle = 2 ** ((low + high) / 2)
            over = sum(coded_bytes(config, middle, middle).values()) > target
            low, high = ((low + high) / 2, high) if over else (low, (low + high) / 2)
        totals = coded_bytes(config, 2**high, 2**high)
    return {name: round(value) for name, value in totals.items()}


@dataclass(frozen=True)
class Scheme:
    """How others pack: a grid step in row deviations for each role, and bytes over the symbols' entropy."""

    steps: dict[str, float]
    """By the last part of a name, "" for all others; 0 is 127 steps to the row's largest weight."""
    over_entropy: float
    control_bytes: int

    def bytes(self, shape: Shape) -> int:
        """Predicted bytes of the packed weights, 16 bits a row's scale."""
        total = 0.0
        for name, dims in shape.parameters().items():
            if tensor_class(name) == "control":
                total += self.control_bytes * math.prod(dims)
                continue
            step = self.steps.get(name.rsplit(".", 1)[-1], self.steps[""]) or largest_of(dims[1]) / 127
            total += math.prod(dims) * symbol_bits(step, "scalar") / 8 * self.over_entropy + 2 * dims[0]
        return round(total)


# The contest baseline: int8 and zlib-9. The 36 M-weight record: int6 at 13 and, in the MLP, 11.5 deviations, the
# embedding int7 at 14; lrzip's zpaq mode, at 0.993 of the entropy.
SCHEMES = {
    "baseline": Scheme({"": 0.0}, 1.0, 4),
    "record": Scheme({"": 13 / 31, "up": 11.5 / 31, "down": 11.5 / 31, "embedding": 14 / 63}, 0.993, 2),
}
PUBLISHED = {"baseline": 15_815_847, "record": 15_865_260}


def bits_a_weight(config: Config, classes: dict[str, int]) -> float:
    """Bits of the artifact over its weights."""
    return 8 * sum(classes.values()) / config.shape.parameter_count


# -- time and memory ---------------------------------------------------------------------------------------------


def forward_flops(config: Config, loops: int | None = None) -> int:
    """Multiply-adds x 2 of one token's forward pass: matrices, causal attention (half the square), head."""
    shape = config.shape
    layer = 2 * (2 * shape.width**2 + 2 * shape.width * shape.kv_width + 2 * shape.width * shape.mlp_width)
    attention = 2 * shape.width * config.recipe.sequence_length
    return len(shape.order(loops)) * (layer + attention) + 2 * shape.width * shape.vocab_size


def step_work(config: Config, loops: int | None = None) -> tuple[int, int, int, int]:
    """FLOPs, elements, logits and attention scores of one training step."""
    tokens, shape = config.recipe.batch_tokens, config.shape
    layers = len(shape.order(loops))
    scores = layers * shape.heads * config.recipe.sequence_length // 2
    return (
        tokens * 3 * forward_flops(config, loops), tokens * layers * shape.width, tokens * shape.vocab_size,
        tokens * scores,
    )  # fmt: skip


def step_seconds(config: Config, rates: Rates, loops: int | None = None) -> float:
    """Predicted seconds of one training step."""
    flops, elements, logits, scores = step_work(config, loops)
    spent = flops * rates.per_flop + elements * rates.per_element
    return spent + logits * rates.per_logit + scores * rates.per_score


def steps_in_cap(config: Config, rates: Rates) -> int:
    """Steps until the training cap, with loops switched on where the recipe says."""
    share = config.recipe.loops_from if config.shape.loops > 1 else 0.0
    seconds = config.train_seconds
    return int(share * seconds / step_seconds(config, rates, 1) + (1 - share) * seconds / step_seconds(config, rates))


def training_memory(config: Config, ranks: int = 1) -> int:
    """Predicted peak bytes a device: weights, gradients, optimiser state, activations, logits."""
    shape, recipe = config.shape, config.recipe
    rows = config.run.micro_rows or recipe.batch_tokens // recipe.sequence_length // ranks
    tokens = rows * recipe.sequence_length
    half = 4 if config.run.dtype == "float32" else 2
    layer = half * (9 * shape.width + 3 * shape.kv_width + 2 * shape.mlp_width)
    return 16 * shape.parameter_count + tokens * (shape.effective_layers * layer + 14 * shape.vocab_size)


def machine_rates(name: str, config: Config) -> Rates:
    """Rates of a named machine; "this" reads what `budget.py measure` wrote. Raises UsageError."""
    if name != "this":
        if name not in MACHINES:
            raise UsageError(f"--machine {name}: give one of {', '.join(MACHINES)} or this.")
        return MACHINES[name]
    measured = read_measured()
    if measured is None:
        raise UsageError("--machine this: run `python budget.py measure` once first.")
    kind = "float32" if config.run.dtype == "float32" else "fast"
    try:
        return Rates(**measured["rates"][kind])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"--machine this: {MEASURED.name} is damaged; run `python budget.py measure` again."
        ) from error


def read_measured() -> dict | None:
    """machine.json, or nothing when it is absent or damaged."""
    try:
        return json.loads(MEASURED.read_text("utf-8"))
    except (OSError, ValueError):
        return None


# -- the plan ----------------------------------------------------------------------------------------------------


def plan(config: Config, machine: str = "8xH100") -> dict:
    """Everything known of a configuration before it is trained."""
    shape = config.shape
    code = bundle.code_bytes(config)
    classes = artifact_bytes(config, code)
    total = sum(classes.values()) + code
    rates = machine_rates(machine, config)
    steps = steps_in_cap(config, rates)
    return {
        "preset": config.preset, "track": config.track, "parameters": shape.parameter_count,
        "effective_parameters": sum(
            math.prod(dims) * (shape.passes(int(name.split(".")[1])) if name.startswith("blocks.") else 1)
            for name, dims in shape.parameters().items()
        ),
        "unique_layers": shape.unique_layers, "effective_layers": shape.effective_layers,
        "bytes": classes, "bits_a_weight": round(bits_a_weight(config, classes), 3),
        "bytes_model": sum(classes.values()), "bytes_code": code, "bytes_total": total,
        "cap": config.limits.bytes_cap, "headroom": config.limits.bytes_cap - total,
        "fits": total <= config.limits.bytes_cap, "flops_per_token": 3 * forward_flops(config),
        "machine": machine, "rates": rates.source, "step_ms": round(1e3 * step_seconds(config, rates), 2),
        "steps": steps,
        "tokens": steps * config.recipe.batch_tokens,
        "training_memory": training_memory(config, 8 if machine.startswith("8x") else 1),
    }  # fmt: skip


def require_fit(config: Config) -> None:
    """Raise UsageError when the predicted artifact exceeds the track's cap, unless the run allows it."""
    code = bundle.code_bytes(config)
    total, cap = sum(artifact_bytes(config, code).values()) + code, config.limits.bytes_cap
    if total > cap and not config.run.allow_over_cap:
        raise UsageError(
            f"{config.preset} would take about {total:,} bytes, the {config.track} track allows {cap:,}: lower "
            f"--shape.width {config.shape.width}, or give --run.allow-over-cap."
        )


# What the proposal to loop blocks claims of each shape (its two tables): megabytes, steps in 600 s, tokens.
CLAIMS = {
    "baseline": (10.3, 20_000, 10.5e9),
    "3x3-768": (8.0, 8_900, 4.7e9),
    "3x4-768": (8.0, 6_700, 3.5e9),
    "3x3-1024": (13.9, None, None),
    "4x3-768": (10.5, None, None),
    "2x6-1024": (9.5, None, None),
    "4x3-640": (None, 9_600, 5.0e9),
}


def table() -> list[dict]:
    """Rows for the baseline and the proposal's six shapes: our prediction and the claim."""
    from golf.presets import PRESETS

    rows = []
    for name, (megabytes, steps, tokens) in CLAIMS.items():
        p = plan(PRESETS[name])
        rows.append({
            "shape": name, "parameters": p["parameters"], "bits": p["bits_a_weight"],
            "bytes_model": p["bytes_model"], "claimed_bytes": megabytes and round(megabytes * 1e6),
            "claimed_bytes_per_parameter": megabytes and round(megabytes * 1e6 / p["parameters"], 3),
            "fits": p["fits"], "steps": p["steps"], "claimed_steps": steps, "tokens": p["tokens"],
            "claimed_tokens": tokens and round(tokens),
        })  # fmt: skip
    return rows


TABLE_NOTES = """\
The proposal's sizes are about 0.61 bytes a parameter. The contest baseline's int8+zlib artifact is really
15,815,847 bytes for 17,059,912 parameters, 0.927 bytes each; at that grid 3x3 at 1024 does not fit, so its artifact
is packed on a coarser one. The proposal counts 20,000 steps and 10.5 B tokens for the baseline; the run did 13,780
and 7.22 B."""


def show(rows: list[dict]) -> None:
    """Print rows as an aligned table."""

    def text(value: object) -> str:
        return "-" if value is None else f"{value:,}" if type(value) is int else str(value)

    widths = {k: max(len(k), *(len(text(r[k])) for r in rows)) for k in rows[0]}
    print("  ".join(k.rjust(w) for k, w in widths.items()))
    for row in rows:
        print("  ".join(text(row[k]).rjust(w) for k, w in widths.items()))


def measure() -> dict:
    """Time training steps of a few shapes on this machine, fit the rates, write machine.json."""
    from golf import timing

    result = timing.measure_machine()
    rates = {}
    for kind, samples in result.pop("samples").items():
        fitted = timing.fit([(*step_work(c), seconds) for c, seconds in samples])
        rates[kind] = asdict(Rates(*fitted, memory_gb=result["memory_gb"], source=f"measured: {result['processor']}"))
        for c, seconds in samples:
            predicted = step_seconds(c, Rates(*fitted))
            print(f"{kind:>5} {c.preset:<13} measured {seconds * 1e3:8.1f} ms  fitted {predicted * 1e3:8.1f} ms")
    from golf.files import write_bytes

    result["rates"] = rates
    write_bytes(MEASURED, json.dumps(result, indent=1).encode())
    print(f"written: {MEASURED.name}")
    return result


# -- what fits ---------------------------------------------------------------------------------------------------


def fit(config: Config, machine: str, widths: range, uniques: list[int], loops: list[int]) -> list[dict]:
    """The frontier under a track's cap: for each width, number of unique blocks and of loops the finest grid that
    fits, and the steps that the machine makes with and without the loops. Head size 64, half as many KV heads."""
    rates, code, rows = machine_rates(machine, config), bundle.code_bytes(config), []
    for unique in uniques:
        for passes in loops:
            for width in widths:
                heads = max(1, width // 64)
                shape = replace(
                    config.shape, width=width, heads=heads, kv_heads=max(1, heads // 2), prelude=0, core=unique, coda=0,
                    loops=passes,
                )  # fmt: skip
                if width % heads or shape.heads % shape.kv_heads:
                    continue
                one = replace(config, shape=shape, pack=replace(config.pack, matrix_step=0.0, embed_step=0.0))
                classes = artifact_bytes(one, code)
                total, bits = sum(classes.values()) + code, bits_a_weight(one, classes)
                if total > config.limits.bytes_cap or bits < FEWEST_BITS:
                    continue
                flat = replace(one, shape=replace(shape, loops=1))
                steps, unlooped = steps_in_cap(one, rates), steps_in_cap(flat, rates)
                rows.append({
                    "width": width, "unique": unique, "loops": passes, "layers": unique * passes,
                    "parameters": shape.parameter_count, "bits": round(bits, 2), "bytes_total": total,
                    "step_ms": round(1e3 * step_seconds(one, rates), 2), "steps": steps, "steps_unlooped": unlooped,
                    "steps_lost": f"{100 * (1 - steps / unlooped):.0f} %" if passes > 1 else "-",
                })  # fmt: skip
    return rows


FIT_NOTES = """\
Every row fills the cap: a narrower model gets a finer grid. A looped block costs no bytes but all of its time, so
steps_unlooped is what the same bytes would be trained for without loops. What a coarser grid costs in score is not
predicted here: pack a trained model with `artifact.py pack --target-bytes` to see."""


def fit_command(arguments: list[str]) -> int:
    """budget.py fit [--track T] [--unique N[,N]] [--loops N[,N]] [--width N[,N]] [--vocab N] [--machine M] [--json]"""
    from golf.presets import PRESETS

    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    track = take_option(arguments, "--track", "contest")
    if track not in TRACKS:
        raise UsageError(f"--track {track}: give one of {', '.join(TRACKS)}.")
    uniques = numbers("--unique", take_option(arguments, "--unique", "3"))
    loops = numbers("--loops", take_option(arguments, "--loops", "3"))
    given = take_option(arguments, "--width", "")
    vocabulary = numbers("--vocab", take_option(arguments, "--vocab", "1024"))[0]
    machine = take_option(arguments, "--machine", "8xH100" if track == "contest" or not read_measured() else "this")
    if arguments:
        raise UsageError(f"{arguments[0]}: fit takes --track, --unique, --loops, --width, --vocab and --machine.")
    base = PRESETS["baseline"] if track == "contest" else PRESETS["laptop"]
    config = replace(base, track=track, shape=replace(base.shape, vocab_size=vocabulary)).check()
    largest = 4096 if track == "contest" else 1024
    widths = numbers("--width", given) if given else range(64, largest, 64)
    rows = fit(config, machine, widths, uniques, loops)
    if not rows:
        raise UsageError(f"--unique {uniques}: no width that was asked for fits the {track} track, give fewer blocks.")
    if as_json:
        print(json.dumps(rows))
    else:
        show(rows)
        print(f"Steps on {machine}: {machine_rates(machine, config).source}.\n{FIT_NOTES}")
    return 0


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers from 1, separated by commas."""
    parts = text.split(",")
    most = 65_536 if option in ("--width", "--vocab") else 128
    if not all(p.isdecimal() and 0 < int(p) <= most for p in parts):
        raise UsageError(f"{option} {text}: give a whole number up to {most}, or several with commas between them.")
    return [int(p) for p in parts]


def take_option(arguments: list[str], name: str, default: str) -> str:
    """Remove `name VALUE` from the arguments and return VALUE."""
    if name not in arguments:
        return default
    at = arguments.index(name)
    if at + 1 == len(arguments):
        raise UsageError(f"{name}: give a value after it.")
    value = arguments[at + 1]
    del arguments[at : at + 2]
    return value


def main() -> int:
    from golf.presets import PRESETS, parse_command_line

    arguments = sys.argv[1:]
    if arguments[:1] == ["fit"]:
        return fit_command(arguments[1:])
    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    if arguments == ["measure"]:
        measure()
        return 0
    if arguments == ["table"]:
        rows = table()
        if as_json:
            print(json.dumps(rows))
        else:
            show(rows)
            print(TABLE_NOTES)
            for name, scheme in SCHEMES.items():
                predicted, real = scheme.bytes(PRESETS[name].shape), PUBLISHED[name]
                print(f"{name} as it was packed: {predicted:,} bytes predicted, {real:,} published.")
        return 0
    machine = take_option(arguments, "--machine", "")
    config = parse_command_line(arguments, "budget.py").check()
    default = "8xH100" if config.track == "contest" or read_measured() is None else "this"
    result = plan(config, machine or default)
    if as_json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value:,}" if type(value) is int else f"{key}: {value}")
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    from golf.console import run_script

    sys.exit(run_script(main))
