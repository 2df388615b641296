"""A search for better options: many tried for short, the better ones for longer (successive halving, Jamieson and
Talwalkar 2016).

    python -m golf.ablate --space FILE.toml [--pairs] [--table]

FILE is a plan of golf.ablate without variants, and what to try:

    preset = "laptop"
    data = "data/development4096"
    equal = "steps"                  # time, pace or steps
    amount = 400                     # of the last, longest round
    seeds = [1]
    [search]
    method = "random"                # or grid: every combination
    tries = 16                       # of a random search
    rounds = 3                       # each gives the best `keep` of its runs 1 / keep times the amount
    keep = 0.5
    seed = 1
    [space]
    "recipe.matrix-rate" = { low = 0.01, high = 0.1, scale = "log" }
    "shape.width" = [96, 128, 160]

Configurations whose artifact is predicted not to fit the track's cap are left out before any training, and told.
Every run is a row of FILE.jsonl; FILE.html shows all of them over their options.
"""

from __future__ import annotations

import html
import itertools
import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from golf import ablate, bundle, charts, size
from golf.errors import UsageError
from golf.files import write_bytes
from golf.plan import Plan, configuration, make_plan
from golf.result_rows import bpb_of, mean, read_rows, same, void

METHODS = ("random", "grid")
MOST_TRIES = 4096
Value = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, spread evenly, or in their logarithm."""

    low: float
    high: float
    scale: str = "linear"

    def at(self, place: float) -> float:
        """The number at a place in [0, 1], of four digits."""
        if self.scale == "log":
            value = math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + place * (self.high - self.low)
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Search:
    """What is searched, and how."""

    plan: Plan
    """Of one variant, the preset itself; amount is the last round's."""
    space: dict[str, list[Value] | Range]
    method: str = "random"
    tries: int = 16
    rounds: int = 3
    keep: float = 0.5
    seed: int = 1


def read(path: Path) -> Search:
    """The search in a TOML file. Raises UsageError naming the key that is wrong."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--space {path}: it cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--space {path}: it is not TOML ({error}).") from error
    space, how = values.pop("space", None), values.pop("search", {})
    if not isinstance(space, dict) or not space or not isinstance(how, dict):
        raise UsageError(f"--space {path}: give a table [space] of options, and [search].")
    plan = make_plan(values | {"variants": {"control": []}}, str(path))
    if plan.equal not in ("time", "pace", "steps"):
        raise UsageError(f"{path}: equal is {plan.equal!r}, a search gives amounts of time, pace or steps.")
    options = {name: options_of(name, given, path) for name, given in space.items()}
    kinds = {"method": str, "tries": int, "rounds": int, "keep": float, "seed": int}
    for key, value in how.items():
        if key not in kinds or type(value) is not kinds[key]:
            raise UsageError(f"{path}: search.{key} is {value!r:.60}, give {', '.join(kinds)}.")
    search = Search(plan, options, **how)
    for fits, key, way_out in (
        (search.method in METHODS, "method", f"give one of {', '.join(METHODS)}"),
        (1 <= search.tries <= MOST_TRIES, "tries", f"give 1 to {MOST_TRIES:,}"),
        (1 <= search.rounds <= 10, "rounds", "give 1 to 10"), (0 < search.keep < 1, "keep", "give a share below 1"),
        (search.seed >= 0, "seed", "give 0 or more"),
    ):  # fmt: skip
        if not fits:
            raise UsageError(f"{path}: search.{key} is {getattr(search, key)!r:.60}, {way_out}.")
    ranges = [name for name, values in options.items() if isinstance(values, Range)]
    if search.method == "grid" and ranges:
        raise UsageError(f"{path}: {ranges[0]} is a range, a grid takes lists.")
    return search


def options_of(name: str, given: object, path: Path) -> list[Value] | Range:
    """The values of one option. Raises UsageError."""
    if isinstance(given, list) and given and all(isinstance(v, (bool, int, float, str)) for v in given):
        return given
    if isinstance(given, dict) and {"low", "high"} <= set(given) <= {"low", "high", "scale"}:
        low, high, scale = given["low"], given["high"], given.get("scale", "linear")
        numbers = all(type(v) in (int, float) and math.isfinite(v) for v in (low, high))
        if numbers and low < high and scale in ("linear", "log") and (scale == "linear" or low > 0):
            return Range(float(low), float(high), scale)
    raise UsageError(f"{path}: space.{name} is {given!r:.80}, give a list of values, or low, high and scale.")


def candidates(search: Search) -> list[dict[str, Value]]:
    """What is tried: every combination, or so many drawn by the seed, none twice."""
    if search.method == "grid":
        names = list(search.space)
        count = math.prod(len(search.space[name]) for name in names)
        if count > MOST_TRIES:
            raise UsageError(f"The grid has {count:,} points, at most {MOST_TRIES:,} are tried; shorten its lists.")
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*search.space.values())]
    generator, found = np.random.default_rng(search.seed), []
    for _ in range(20 * search.tries):
        drawn = {
            name: given.at(generator.random()) if isinstance(given, Range) else given[generator.integers(len(given))]
            for name, given in search.space.items()
        }
        if drawn not in found:
            found.append(drawn)
        if len(found) == search.tries:
            break
    return found


def flags_of(options: dict[str, Value]) -> list[str]:
    """Command-line flags of a candidate."""
    flags: list[str] = []
    for name, value in options.items():
        part, _, last = name.rpartition(".")
        flags += [f"--{part}.{'' if value else 'no-'}{last}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def fitting(search: Search, tried: list[dict[str, Value]]) -> tuple[dict[str, dict[str, Value]], dict[str, str]]:
    """Candidates by name, c01 and so on, and why others are left out: no model has that shape, or it will not fit."""
    good, left_out = {}, {}
    digits = len(str(len(tried)))
    for number, options in enumerate(tried, 1):
        name = f"c{number:0{digits}d}"
        plan = replace(search.plan, variants={name: flags_of(options)})
        try:
            config = configuration(plan, name, plan.seeds[0])
        except UsageError as error:
            left_out[name] = str(error)
            continue
        code = bundle.code_bytes(config)
        total, cap = size.submission_bytes(config, code), config.limits.bytes_cap
        if total > cap and not config.run.allow_over_cap:
            left_out[name] = f"about {total:,} bytes, {cap:,} allowed"
        else:
            good[name] = options
    return good, left_out


def amounts(search: Search) -> list[float]:
    """What each round gives a run; the last the plan's amount."""
    last = search.plan.amount
    found = [last * search.keep ** (search.rounds - 1 - n) for n in range(search.rounds)]
    return [max(1.0, float(round(v))) if search.plan.equal == "steps" else v for v in found]


def main(path: Path, pairs: bool, only_table: bool) -> int:
    """Carry a search out, round by round, from where its rows end."""
    search, results = read(path), path.with_suffix(".jsonl")
    good, left_out = fitting(search, candidates(search))
    for name, why in left_out.items():
        print(f"left out, {name}: {why}")
    if not good:
        raise UsageError(f"--space {path}: no configuration of it can be trained and fits, widen the space.")
    alive, found = list(good), []
    for number, amount in enumerate(amounts(search), 1):
        variants = {name: flags_of(good[name]) for name in alive}
        plan = replace(search.plan, amount=amount, variants=variants, control=alive[0])
        if not only_table:
            print(f"round {number}: {len(alive)} configurations, {amount:g} each", flush=True)
            ablate.carry_out(plan, results, pairs)
        plan = ablate.with_paces(plan, results)
        rows = [r for r in read_rows(results) if same(plan, r) and not void(r)]
        scores = {name: [s for r in rows if r["variant"] == name and (s := bpb_of(r)) is not None]
                  for name in alive}  # fmt: skip
        ranked = sorted((name for name in alive if scores[name]), key=lambda name: mean(scores[name]))
        found += [(number, amount, name, mean(scores[name])) for name in ranked]
        alive = ranked[: max(1, math.ceil(search.keep * len(ranked)))]
        if not alive:
            break
    print(table(found, good))
    page = path.with_suffix(".html")
    write_bytes(page, picture(path.name, found, good).encode())
    print(f"written: {page}")
    return 0 if found else 1


def table(found: list[tuple], good: dict[str, dict[str, Value]]) -> str:
    """Markdown: the last round first, best first."""
    names = list(next(iter(good.values())))
    lines = [f"| round | configuration | bpb | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for number, _, name, bpb in sorted(found, key=lambda row: (-row[0], row[3])):
        lines.append(f"| {number} | {name} | {bpb:.4f} | {' | '.join(str(good[name][n]) for n in names)} |")
    return "\n".join(lines)


def picture(title: str, found: list[tuple], good: dict[str, dict[str, Value]]) -> str:
    """A page: every run as a line over the options (parallel coordinates), the better the darker, and a table."""
    names = [*next(iter(good.values())), "bits a byte"]
    last = {name: (number, bpb) for number, _, name, bpb in found}
    svg = parallel(names, [([*good[name].values(), bpb], bpb) for name, (_, bpb) in last.items()]) if last else ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in (number, name, f"{bpb:.4f}", *good[name].values()))
        + "</tr>" for number, _, name, bpb in sorted(found, key=lambda row: (-row[0], row[3]))
    )  # fmt: skip
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("round", "configuration", "bpb", *names[:-1]))
    style = charts.STYLE + "td, th { text-align: left; padding: .1rem .8rem .1rem 0; }"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="faint">Every configuration at its longest run: a line over its '
        f"options to its bits a byte; the better the darker.</p>{svg}"
        f"<table><tr>{head}</tr>{rows}</table></body></html>\n"
    )  # fmt: skip


def parallel(names: list[str], lines: list[tuple[list[Value], float]]) -> str:
    """Parallel coordinates: an axis a name, numbers by size, others by their order; (values, score) a line."""
    left, top, gap, height = 60, 30, 150, 260
    columns = [[values[n] for values, _ in lines] for n in range(len(names))]
    places = [axis(column) for column in columns]
    scores = [score for _, score in lines]
    low, high = min(scores), max(scores)
    parts = [f'<svg viewBox="0 0 {2 * left + gap * (len(names) - 1)} {top + height + 40}" role="img" '
             'aria-label="configurations over their options">']  # fmt: skip
    for n, name in enumerate(names):
        x = left + gap * n
        parts.append(f'<path class="grid" d="M{x} {top}v{height}"/><text x="{x}" y="{top - 12}" text-anchor="middle">'
                     f"{html.escape(name.rpartition('.')[2][:20])}</text>")  # fmt: skip
        for value, place in sorted({(str(v), places[n][v]) for v in columns[n]}, key=lambda pair: pair[1])[:8]:
            shown = charts.short(float(value)) if value.replace(".", "", 1).isdigit() else value[:12]
            parts.append(f'<text x="{x + 5}" y="{top + height * (1 - place) + 4:.1f}" style="font-size:10px">'
                         f"{html.escape(shown)}</text>")  # fmt: skip
    for values, score in sorted(lines, key=lambda line: -line[1]):
        path = "L".join(f"{left + gap * n} {top + height * (1 - places[n][v]):.1f}" for n, v in enumerate(values))
        share = (high - score) / (high - low) if high > low else 1.0
        parts.append(f'<path class="curve" stroke="var(--one)" opacity="{0.15 + 0.85 * share:.2f}" d="M{path}"/>')
    return "".join(parts) + "</svg>"


def axis(column: list[Value]) -> dict[Value, float]:
    """The place of each value on its axis, in [0, 1]."""
    numbers = all(type(v) in (int, float) for v in column)
    order = sorted(set(column), key=float if numbers else str)
    if not numbers or len(order) < 2:
        return {v: n / max(1, len(order) - 1) for n, v in enumerate(order)}
    low, high = float(order[0]), float(order[-1])
    if low > 0 and high / low > 20:
        return {v: math.log(float(v) / low) / math.log(high / low) for v in order}
    return {v: (float(v) - low) / (high - low) for v in order}
