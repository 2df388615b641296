#!/usr/bin/env python3
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
from dataclasses import asdict, replace

from golf import bundle, pace, size
from golf.config import TRACKS, Config
from golf.errors import UsageError
from golf.files import write_bytes

FEWEST_BITS = 2.0  # bits a weight below which `fit` leaves a width out


def usual_machine(track: str) -> str:
    """Whose steps a track's plans are in where none is named: empty where that is this one, and it was not timed."""
    return "8xH100" if track == "contest" else "this" if pace.read_measured() else ""


def plan(config: Config, machine: str = "8xH100") -> dict:
    """Everything known of a configuration before it is trained; without a machine, no steps."""
    shape = config.shape
    code = bundle.code_bytes(config)
    classes = size.artifact_bytes(config, code)
    total = sum(classes.values()) + code
    timed = {}
    if machine:
        rates = pace.machine_rates(machine, config)
        steps = pace.steps_in_cap(config, rates)
        timed = {"machine": machine, "rates": rates.source, "step_ms": round(1e3 * pace.step_seconds(config, rates), 2),
                 "steps": steps, "tokens": steps * config.recipe.batch_tokens}  # fmt: skip
    ranks = 8 if machine.startswith("8x") else 1
    memory = pace.training_memory(config, ranks)
    claimed = {"claimed_memory": CLAIMED_MEMORY[config.preset]} if config.preset in CLAIMED_MEMORY else {}
    return {
        "preset": config.preset, "track": config.track, "parameters": shape.parameter_count,
        "effective_parameters": sum(
            math.prod(dims) * (shape.passes(int(name.split(".")[1])) if name.startswith("blocks.") else 1)
            for name, dims in shape.parameters().items()
        ),
        "unique_layers": shape.unique_layers, "effective_layers": shape.effective_layers,
        "bytes": classes, "bits_a_weight": round(size.bits_a_weight(config, classes), 3),
        "bytes_model": sum(classes.values()), "bytes_code": code, "bytes_total": total,
        "cap": config.limits.bytes_cap, "headroom": config.limits.bytes_cap - total,
        "fits": total <= config.limits.bytes_cap, "flops_per_token": 3 * pace.forward_flops(config), **timed,
        "memory": pace.memory_parts(config, ranks), **claimed, "training_memory": memory,
        "fits_12gb": memory <= 12e9, "fits_24gb": memory <= 24e9,
        "process_memory": pace.process_memory(config),
    }  # fmt: skip


def require_fit(config: Config) -> None:
    """Raise UsageError when the predicted artifact exceeds the track's cap, unless the run allows it."""
    code = bundle.code_bytes(config)
    total, cap = size.submission_bytes(config, code), config.limits.bytes_cap
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


# What the proposal of adaptive depth claims of its model's memory: bfloat16 weights, AdamW, activations.
CLAIMED_MEMORY = {"adaptive100m": {"weights": 200_000_000, "optimizer": 800_000_000, "activations": 2_000_000_000}}

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
        fitted = timing.fit([(*pace.step_work(c), seconds) for c, seconds in samples])
        rates[kind] = asdict(
            pace.Rates(*fitted, memory_gb=result["memory_gb"], source=f"measured: {result['processor']}")
        )
        for c, seconds in samples:
            predicted = pace.step_seconds(c, pace.Rates(*fitted))
            print(f"{kind:>5} {c.preset:<13} measured {seconds * 1e3:8.1f} ms  fitted {predicted * 1e3:8.1f} ms")
    result["rates"] = rates
    write_bytes(pace.MEASURED, json.dumps(result, indent=1).encode())
    print(f"written: {pace.MEASURED.name}")
    return result


# -- what fits ---------------------------------------------------------------------------------------------------


def fit(config: Config, machine: str, widths: range, uniques: list[int], loops: list[int]) -> list[dict]:
    """The frontier under a track's cap: for each width, number of unique blocks and of loops the finest grid that
    fits, and the steps that the machine, where one is named, makes with and without the loops. Head size 64 or near it,
    half as many KV heads or the next fewer that divide them."""
    rates, code, rows = machine and pace.machine_rates(machine, config), bundle.code_bytes(config), []
    for unique in uniques:
        for passes in loops:
            for width in widths:
                heads = max(1, width // 64)
                kv_heads = max(n for n in range(1, max(1, heads // 2) + 1) if heads % n == 0)
                shape = replace(
                    config.shape, width=width, heads=heads, kv_heads=kv_heads, prelude=0, core=unique, coda=0,
                    loops=passes,
                )  # fmt: skip
                if width % heads or shape.head_size % 2:
                    continue
                one = replace(config, shape=shape, pack=replace(config.pack, matrix_step=0.0, embed_step=0.0))
                classes = size.artifact_bytes(one, code)
                total, bits = sum(classes.values()) + code, size.bits_a_weight(one, classes)
                if total > config.limits.bytes_cap or bits < FEWEST_BITS:
                    continue
                rows.append({
                    "width": width, "unique": unique, "loops": passes, "layers": unique * passes,
                    "parameters": shape.parameter_count, "bits": round(bits, 2), "bytes_total": total,
                })  # fmt: skip
                if rates:
                    flat = replace(one, shape=replace(shape, loops=1))
                    steps, unlooped = pace.steps_in_cap(one, rates), pace.steps_in_cap(flat, rates)
                    rows[-1] |= {
                        "step_ms": round(1e3 * pace.step_seconds(one, rates), 2), "steps": steps,
                        "steps_unlooped": unlooped,
                        "steps_lost": f"{100 * (1 - steps / unlooped):.0f} %" if passes > 1 and unlooped else "-",
                    }  # fmt: skip
    return rows


UNTIMED = "Steps are not known: `python budget.py measure` times this machine, or --machine names another."
FIT_NOTES = """\
A narrower model gets a finer grid, down to the finest that there is; from there on the cap is not filled. A looped
block costs no bytes but all of its time, so steps_unlooped is what the same bytes would be trained for without loops.
What a coarser grid costs in score is not predicted here: pack a trained model with `artifact.py pack --target-bytes`
to see."""


def fit_command(arguments: list[str]) -> int:
    """budget.py fit [--track T] [--unique N[,N]] [--loops N[,N]] [--width N[,N]] [--vocab N] [--machine M] [--json]"""
    from golf.presets import PRESETS

    if {"-h", "--help"} & set(arguments):
        print(f"{fit_command.__doc__}\n\n{FIT_NOTES}")
        return 0
    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    track = take_option(arguments, "--track", "contest")
    timed = [name for name, limits in TRACKS.items() if math.isfinite(limits.train_seconds)]
    if track not in timed:
        raise UsageError(f"--track {track}: give one of {', '.join(timed)}.")
    uniques = numbers("--unique", take_option(arguments, "--unique", "3"))
    loops = numbers("--loops", take_option(arguments, "--loops", "3"))
    given = take_option(arguments, "--width", "")
    vocabulary = numbers("--vocab", take_option(arguments, "--vocab", "1024"))[0]
    machine = take_option(arguments, "--machine", usual_machine(track))
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
        print(f"Steps on {machine}: {pace.machine_rates(machine, config).source}." if machine else UNTIMED)
        print(FIT_NOTES)
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
            for name, scheme in size.SCHEMES.items():
                predicted, real = scheme.bytes(PRESETS[name].shape), size.PUBLISHED[name]
                print(f"{name} as it was packed: {predicted:,} bytes predicted, {real:,} published.")
        return 0
    machine = take_option(arguments, "--machine", "")
    config = parse_command_line(arguments, "budget.py").check()
    result = plan(config, machine or usual_machine(config.track))
    if as_json:
        print(json.dumps(result))
    else:
        show_plan(result)
    return 0 if result["fits"] else 1


def show_plan(result: dict) -> None:
    """A plan for people, one value a line."""
    for key, value in result.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            name = f"{key}.{part}" if part else key
            print(f"{name}: {number:,}" if type(number) is int else f"{name}: {number}")
    if "machine" not in result:
        print(UNTIMED)


if __name__ == "__main__":
    from golf.console import run_script

    sys.exit(run_script(main))
