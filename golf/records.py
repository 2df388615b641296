"""A run's record: submission.json with one schema, checked on read and write; its folder and README."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from golf.config import TRACKS, Config, fields_from_dict
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import read_plain, write_bytes
from golf.folders import sizes
from golf.log_file import PARTS, read_log
from golf.pace import step_flops
from golf.presets import PRESETS, flags_of
from golf.recipe import Pack, Recipe, Run, Scoring
from golf.shape import Shape

SCHEMA = 1
CONTEST_TRACKS = ("10min_16mb", "track_10min_16mb")  # names that public records give it


@dataclass(frozen=True)
class Record:
    """submission.json: the ten keys that public contest records share, then ours. Other keys are kept in `extra`."""

    author: str = ""
    github_id: str = ""
    name: str = ""
    blurb: str = ""
    date: str = ""
    track: str = ""
    val_loss: float | None = None
    """Nats a token of the reloaded artifact on the whole validation split."""
    val_bpb: float | None = None
    bytes_total: int = 0
    bytes_code: int = 0
    schema: int = SCHEMA
    status: str = "complete"
    """complete, interrupted, crash, or invalid by the referee."""
    reason: str = ""
    preset: str = ""
    seed: int = 0
    fingerprint: str = ""
    corpus: str = ""
    corpus_fingerprint: str = ""
    tokenizer_sha256: str = ""
    tokenizer: dict = field(default_factory=dict)
    """kind (sentencepiece or bytes), file, sha256, transform (none or case)."""
    context: int = 0
    """Tokens a row that the scorer is asked for."""
    stride: int = 0
    """Targets that each row adds; 0 is the context."""
    chunk: int = 0
    """Targets between two calls of adapt."""
    adapts: bool = False
    precision: str = "float32"
    """float32 or bfloat16: how far scores may move with the shape of a batch."""
    content_shapes: bool = False
    """Whether the scorer's inner shapes depend on what it reads."""
    bytes_model: int = 0
    bytes_other: int = 0
    cap: int = 0
    headroom: int = 0
    steps: int = 0
    tokens: int = 0
    training_flops: int = 0
    """Counted from the log: forward and backward of every step that stands, at its loops and length."""
    tokens_per_second: float = 0.0
    """While steps were taken; the calibration at their end is training time too, and not in it."""
    train_seconds: float = 0.0
    eval_seconds: float | None = None
    peak_memory: int = 0
    """Bytes, of rank 0 in training."""
    train_loss: float | None = None
    unpacked_val_loss: float | None = None
    unpacked_val_bpb: float | None = None
    quantization_penalty: dict = field(default_factory=dict)
    """Bits a byte that packing costs at each number of loops, on a part of the validation split."""
    val_tokens: int | None = None
    val_bytes: int | None = None
    model_sha256: str = ""
    record: str = ""
    """Folder the run was written to."""
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    CLOSING = (
        "val_bpb", "val_loss", "bytes_code", "bytes_model", "bytes_total", "cap", "headroom", "steps", "tokens",
        "tokens_per_second", "train_seconds", "eval_seconds", "record",
    )  # fmt: skip

    @property
    def claimed_bpb(self) -> float | None:
        """What the folder's artifact is said to score: of several seeds its own, where they are told apart."""
        told = self.extra.get("seed_results")
        mine = told.get(str(self.seed)) if isinstance(told, dict) else None
        score = mine.get("val_bpb") if isinstance(mine, dict) else None
        fits = type(score) in (int, float) and abs(score) < 1 << 63  # also no nan
        return float(score) if fits else self.val_bpb

    def seed_results(self) -> dict[str, str]:
        """Of a submission of several seeds, what each is said to score."""
        told = self.extra.get("seed_results")
        each = told.items() if isinstance(told, dict) else ()
        return {seed: f"{one.get('val_bpb')} bpb, {one.get('artifact_bytes')} bytes, {one.get('steps')} steps"
                for seed, one in each if isinstance(one, dict)}  # fmt: skip

    def as_dict(self) -> dict:
        """The JSON object, strangers' keys after ours."""
        values = asdict(self)
        extra = values.pop("extra")
        return {**values, **extra}

    def closing(self) -> dict[str, object]:
        """The block a run ends with; every value is the one in submission.json."""
        values = {key: getattr(self, key) for key in self.CLOSING}
        if self.status != "complete":
            values["status"] = f"{self.status} ({self.reason})"
        return values


@cache
def record_types() -> dict:
    """Types of a record's fields; finding them takes longer than reading a record."""
    return get_type_hints(Record)


def check_types(values: dict, where: str) -> None:
    """Raise UsageError naming the first key whose value has the wrong type."""
    hints = record_types()
    for key, value in values.items():
        allowed = get_args(hints[key]) or (hints[key],)
        plain = tuple(float if t is float else t for t in allowed)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where}: {key} is {value}, not a number.")
        if type(value) is int and abs(value) >= 1 << 63:
            raise UsageError(f"{where}: {key} has more digits than any number here.")
        fits = any(
            (value is None) if t is NoneType else type(value) in (int, float) if t is float else type(value) is t
            for t in plain
        )
        if not fits:
            wanted = " or ".join("nothing" if t is NoneType else t.__name__ for t in allowed)
            raise UsageError(f"{where}: {key} is {value!r:.60}, not {wanted}.")


def from_dict(values: object, where: str) -> Record:
    """A Record from a JSON object. Raises UsageError for wrong types or a newer schema."""
    if not isinstance(values, dict):
        raise UsageError(f"{where} is not a JSON object.")
    known = {f.name for f in fields(Record)} - {"extra"}
    ours = {k: v for k, v in values.items() if k in known}
    if ours.get("track") in CONTEST_TRACKS:
        ours["track"] = "contest"
    check_types(ours, where)
    if odd := [k for k, v in ours.get("config", {}).items() if k in PARTS and not isinstance(v, dict)]:
        raise UsageError(f"{where}: config.{odd[0]} is not an object.")
    if ours.get("schema", SCHEMA) > SCHEMA:
        raise UsageError(f"{where} has schema {ours['schema']}, this program reads up to {SCHEMA}.")
    return Record(**ours, extra={k: v for k, v in values.items() if k not in known})


def read(folder: Path) -> Record:
    """The record in a run folder. Raises UsageError."""
    path = folder / "submission.json"
    try:
        data = read_plain(path)
        values = json.loads(data)
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # a half may have its other half beside it
            json.dumps(values, ensure_ascii=False).encode()
        return from_dict(values, str(path))
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UsageError(f"{path}: it holds half a character ({half!a}), write it whole.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name a run folder.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}).") from error


def write(folder: Path, record: Record, place: Path | None = None) -> None:
    """Write submission.json and README.md, types checked, of a folder that will stand at `place`."""
    values = asdict(record)
    values.pop("extra")
    check_types(values, str(folder / "submission.json"))
    write_bytes(folder / "submission.json", json.dumps(record.as_dict(), indent=1).encode() + b"\n")
    write_bytes(folder / "README.md", readme(place or folder, record).encode("utf-8", "backslashreplace"))


def folder_name(config: Config) -> str:
    """DATE-NAME; without --run.name the preset, seed and time of day."""
    name = config.run.name or f"{config.preset}-seed{config.run.seed}-{time.strftime('%H%M%S')}"
    if "/" in name or name.startswith("."):
        raise UsageError(f"--run.name {name}: give a plain folder name.")
    return f"{time.strftime('%Y-%m-%d')}-{name}"


def create_folder(folder: Path) -> None:
    """Make the run folder; one that exists is refused. Raises UsageError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run.runs {folder.parent}: it cannot be a folder ({error.strerror}), name one.") from error
    try:
        folder.mkdir()
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except FileExistsError:
        raise UsageError(f"--run.name: {folder} exists already, give another name.") from None
    except OSError as error:
        raise UsageError(f"--run.runs: {folder} cannot be written ({error.strerror}), give another folder.") from error


def config_of(record: Record) -> Config:
    """The configuration that a record tells of. Raises UsageError for one that this program cannot run."""
    told = record.config
    parts = {"shape": Shape, "recipe": Recipe, "pack": Pack, "run": Run}
    try:
        values = {name: fields_from_dict(kind, told[name], name) for name, kind in parts.items()}
        values["scoring"] = fields_from_dict(Scoring, told.get("scoring", {}), "scoring")
        config = Config(str(told["preset"]), str(told["track"]), **values)
    except KeyError as error:
        raise UsageError(
            f"{record.name}: its record has no {error}; it is older than this program or not its own."
        ) from error
    if config.track not in TRACKS or config.preset not in PRESETS:
        raise UsageError(f"{record.name}: the track {config.track!r:.60} or preset {config.preset!r:.60} is unknown.")
    return config.check()


def flags_like(record: Record) -> list[str]:
    """The flags that make a run like this one, wherever its folder is and whatever it was called."""
    try:
        config = config_of(record)
    except UsageError:  # of an older program, or a stranger's
        return ["--run.seed", str(record.seed), "--run.data", f"data/{record.corpus}"]
    usual = Run()
    return flags_of(replace(config, run=replace(
        config.run, name=usual.name, runs=usual.runs, resume=usual.resume, track=usual.track)))  # fmt: skip


def write_checkpoint(folder: Path, result: object) -> None:
    """The weights, and the sensitivities where there are any, as safetensors files beside the artifact."""
    from golf.checkpoint import write_sensitivities, write_weights

    weights = {name: p.detach().float().cpu().numpy() for name, p in result.model.named_parameters()}
    write_weights(folder / "checkpoint.safetensors", result.model.shape, weights)
    if result.sensitivities:
        write_sensitivities(folder / "hessians.safetensors", result.model.shape, result.sensitivities)


def number(value: float | None) -> float | None:
    """The value, or nothing when JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def from_run(
    folder: Path,
    config: Config,
    corpus: Corpus,
    result: object,
    unpacked: object | None,
    environment: dict,
    penalty: dict[str, float],
) -> Record:
    """The record of a finished run that has not been judged yet."""
    measured = sizes(folder)
    shape = config.shape
    return Record(
        name=folder.name, date=time.strftime("%Y-%m-%d"), track=config.track,
        blurb=f"{shape.unique_layers} unique blocks, {shape.effective_layers} effective layers, width {shape.width}, "
        f"vocabulary {shape.vocab_size}, Muon under a clock of {config.train_seconds:g} s",
        bytes_total=measured.total, bytes_code=measured.code, bytes_model=measured.weights,
        bytes_other=measured.other, cap=config.limits.bytes_cap, headroom=config.limits.bytes_cap - measured.total,
        status=result.status, reason=result.reason, preset=config.preset, seed=config.run.seed,
        fingerprint=config.fingerprint, corpus=corpus.name, corpus_fingerprint=corpus.fingerprint,
        tokenizer_sha256=str(corpus.manifest["tokenizer"].get("sha256", "")),
        tokenizer={
            "kind": "sentencepiece", "file": "tokenizer.model", "transform": corpus.transform,
            "sha256": str(corpus.manifest["tokenizer"].get("sha256", "")),
        },
        context=config.recipe.sequence_length, stride=config.scoring.stride, adapts=config.scoring.adapts,
        chunk=config.scoring.chunk if config.scoring.adapts else 0, content_shapes=config.scoring.exit != "none",
        steps=result.steps, tokens=result.tokens, training_flops=training_flops(folder, config, result.steps),
        tokens_per_second=round(result.tokens / result.step_seconds, 1) if result.step_seconds else 0.0,
        train_seconds=round(result.train_seconds, 3), train_loss=number(result.loss), peak_memory=result.peak_memory,
        unpacked_val_loss=number(unpacked and unpacked.loss), unpacked_val_bpb=number(unpacked and unpacked.bpb),
        quantization_penalty={k: v for k, v in penalty.items() if number(v) is not None},
        config=json.loads(json.dumps(asdict(config))), environment=environment, record=str(folder),
        extra={"resumed": True} if config.run.resume else {},
    )  # fmt: skip


def training_flops(folder: Path, config: Config, steps: int) -> int:
    """FLOPs of the first `steps` steps in a run's log."""
    taken = [r for r in read_log(folder / "log.jsonl") if r.get("event") == "step" and r["step"] <= steps]
    return sum(times * step_flops(config, loops) for loops, times in Counter(r["loops"] for r in taken).items())


def in_markdown(value: object) -> str:
    """A stranger's words on one line of a Markdown page, where they make no tag, table or code."""
    line = " ".join(html.escape(str(value), quote=False).split())
    return line.replace("|", "\\|").replace("`", "'").replace("[", "\\[")


def readme(folder: Path, record: Record) -> str:
    """The run folder's README, all of it from the record."""
    rows = "\n".join(f"| {key} | {in_markdown(v)} |" for key, v in record.closing().items() if key != "record")
    shape, recipe = record.config.get("shape", {}), record.config.get("recipe", {})
    settings = "\n".join(f"| {in_markdown(key)} | {in_markdown(v)} |" for key, v in {**shape, **recipe}.items())
    command = " ".join(["python train_gpt.py", record.preset, *map(shlex.quote, flags_like(record))])
    return (
        f"# {in_markdown(record.name)}\n\n{in_markdown(record.blurb)}. Track `{in_markdown(record.track)}`, corpus "
        f"`{in_markdown(record.corpus)}` ({in_markdown(record.corpus_fingerprint)}), seed {record.seed}, "
        f"status {in_markdown(record.status)}.\n\n"
        f"| result | value |\n|---|---|\n{rows}\n\n"
        f"Before packing: val_loss {record.unpacked_val_loss}, val_bpb {record.unpacked_val_bpb}.\n\n"
        f"From a checkout: `{in_markdown(command)}`; the packed model is scored by "
        f"`python eval_bpb.py {in_markdown(folder)}`.\n\n"
        f"| setting | value |\n|---|---|\n{settings}\n"
    )
