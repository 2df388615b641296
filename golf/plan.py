"""What a comparison compares: a plan in TOML, and the command line of each of its variants. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from golf import pace
from golf.config import Config, changed
from golf.errors import UsageError
from golf.presets import PRESETS, parse_command_line
from golf.recipe import Recipe

EQUAL = ("time", "pace", "steps", "flops", "bytes")


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    preset: str
    data: str
    equal: str
    amount: float
    seeds: list[int]
    variants: dict[str, list[str]]
    flags: list[str] = field(default_factory=list)
    judge: bool = False
    keep: str = ""
    """Folder that the run folders are kept in; none when empty."""
    control: str = ""
    """The variant that others are compared with; the first when empty."""
    paces: dict[str, str] = field(default_factory=dict)
    """What a step of each variant takes, for equal pace."""


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file. Raises UsageError naming the key that is wrong."""
    try:
        return make_plan(tomllib.loads(path.read_text("utf-8")), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML ({error}).") from error


def make_plan(values: dict, path: str) -> Plan:
    """A plan from what stands in `path`. Raises UsageError naming the key that is wrong."""
    kinds = {
        "preset": str, "data": str, "equal": str, "amount": (int, float), "seeds": list, "variants": dict,
        "flags": list, "judge": bool, "control": str, "keep": str,
    }  # fmt: skip
    for key, value in values.items():
        if key not in kinds:
            raise UsageError(f"{path}: {key} is unknown, give {', '.join(kinds)}.")
        if not isinstance(value, kinds[key]):
            raise UsageError(f"{path}: {key} is {value!r:.60}, not of the right type.")
    missing = [k for k in ("preset", "data", "equal", "amount", "seeds", "variants") if not values.get(k)]
    if missing:
        raise UsageError(f"{path}: {missing[0]} is missing, give it.")
    plan = Plan(**values)
    if plan.equal not in EQUAL:
        raise UsageError(f"{path}: equal is {plan.equal!r:.60}, give one of {', '.join(EQUAL)}.")
    if isinstance(plan.amount, bool) or not 0 < plan.amount < math.inf:
        raise UsageError(f"{path}: amount is {plan.amount!r:.60}, give a number above 0.")
    if odd := [seed for seed in plan.seeds if type(seed) is not int or not 0 <= seed < 1 << 63]:
        raise UsageError(f"{path}: the seed {odd[0]!r:.60} is no whole number from 0.")
    if plan.preset not in PRESETS:
        raise UsageError(f"{path}: preset {plan.preset!r:.60} is unknown, give one of {', '.join(PRESETS)}.")
    if plan.control and plan.control not in plan.variants:
        raise UsageError(f"{path}: control {plan.control!r:.60} is none of the variants, name one of them.")
    for name, words in plan.variants.items():
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise UsageError(f"{path}: variant {name} is not a list of words, give its flags as one.")
        configuration(plan, name, plan.seeds[0])
    return plan


def configuration(plan: Plan, variant: str, seed: int) -> Config:
    """A variant's whole configuration. Raises UsageError for flags that make none."""
    return configuration_of(*words_of(plan, variant, seed))


@lru_cache(maxsize=1024)
def configuration_of(*words: str) -> Config:
    """That of a command line, which takes a parser 0.1 s. Raises UsageError."""
    return parse_command_line(list(words), "ablate").check()


def words_of(plan: Plan, variant: str, seed: int) -> list[str]:
    """The command line of a variant, which may name data of its own and begin with a preset of its own."""
    own = plan.variants[variant]
    preset, own = (own[0], own[1:]) if own[:1] and own[0] in PRESETS else (plan.preset, own)
    return [preset, "--run.seed", str(seed), "--run.data", plan.data, *plan.flags, *own]


def budget_flags(plan: Plan, variant: str, config: Config) -> list[str]:
    """What makes a run as long, or as large, as the others."""
    if plan.equal == "pace":
        return ["--run.cap", f"{plan.amount:g}", "--run.pace", plan.paces[variant]]
    if plan.equal == "time":
        return ["--run.cap", f"{plan.amount:g}"]
    if plan.equal == "bytes":
        return ["--pack.target-bytes", f"{plan.amount:.0f}"]
    if plan.equal == "steps":
        return ["--run.max-steps", f"{plan.amount:.0f}"]
    return ["--run.max-steps", str(max(1, round(plan.amount / average_step_flops(config))))]


# What of a recipe leaves the work of a step of some length and number of passes as it is.
IDLE = (
    "loader", "loops_from", "matrix_rate", "embed_rate", "scalar_rate",
    "momentum", "momentum_start", "momentum_warmup", "matrix_decay", "embed_decay", "decay_taper", "warmdown",
    "rate_floor", "adam_beta1", "adam_beta2", "adam_epsilon", "embed_std", "qk_gain",
    "noise_from", "noise_step", "halt_penalty", "halt_warmup", "target_depth", "prior_weight", "prior_hazard",
    "gate_bias",
)  # fmt: skip


def work_of(config: Config) -> str:
    """What a step computes, whatever its length and number of passes, as a short hash: alike where paces are."""
    usual = Recipe()
    recipe = replace(config.recipe, **{key: getattr(usual, key) for key in IDLE})
    told = json.dumps([changed(config.shape), changed(recipe), config.run.dtype, config.run.compile])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def average_step_flops(config: Config) -> float:
    """Training FLOPs of an average step, with loops switched on where the recipe says."""
    share = config.recipe.loops_from if config.shape.loops > 1 else 0.0
    early, late = pace.step_flops(config, 1), pace.step_flops(config)
    return share * early + (1 - share) * late
