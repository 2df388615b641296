"""One run, whole: its parts, its track's limits, its fingerprint. No torch here.

Everything that can be derived from a field is a property, never a second field.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

from golf.checks import check_gate, check_pace, check_pack, check_recipe, check_scoring, check_shape
from golf.errors import UsageError, require
from golf.recipe import Pack, Recipe, Run, Scoring
from golf.shape import Shape


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
        "depth_scale": False, "rotary_share": 1.0,
    },
    "recipe": {
        "random_loops": False, "embed_spectrum": 0.0, "shared_rate": 1.0, "short_length": 0, "short_until": 0.5,
        "matrix_init": "uniform",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    preset: str = "custom"
    """What the record calls this configuration."""
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
        require(self.run.seed < 1 << 63, "run.seed", self.run.seed, "give one below 2^63")
        check_pace(self.shape, self.recipe, self.run, self.track != "unlimited")
        limit = self.limits.train_seconds
        ends = self.train_seconds < float("inf") or self.run.max_steps > 0
        require(ends, "track", self.track, "it has no clock, give --run.max-steps or --run.cap")
        require(self.run.cap <= limit, "run.cap", self.run.cap, f"the {self.track} track allows {limit:g} s")
        return self


def changed(options: object) -> dict:
    """The fields in which a flat dataclass differs from its defaults: what an artifact's header says, and what stays
    the same when an option that nobody sets is added or goes."""
    default = asdict(type(options)())
    return {name: value for name, value in asdict(options).items() if value != default[name]}


@cache
def choices(kind: type) -> dict[str, tuple]:
    """What fields of a dataclass may be, where its types name all of it."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


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
        if name in (known := choices(kind)) and value not in known[name]:
            others = ", ".join(known[name])
            raise UsageError(f"The {what}'s field {name} is {value!r:.60}, not one of {others}.")
    return kind(**values)


def shape_from_dict(values: object) -> Shape:
    """Shape from a stranger's JSON object, types and ranges checked. Raises UsageError."""
    shape = fields_from_dict(Shape, values, "shape")
    check_shape(shape)
    return shape
