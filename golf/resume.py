"""All that a training loop is made of, kept now and then in one file, and put back: a run goes on bit for bit.

One safetensors file a checkpoint holds the tensors and, in its metadata, the rest as JSON; it is written aside and
renamed, and the newest two are kept. On a CPU under --run.max-steps a run that went on ends with the same artifact as
one that was never stopped; under a clock the seconds before and after are summed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from golf import records
from golf.average import WeightAverage
from golf.clock import Clock, StepCounter
from golf.config import Config
from golf.data import Corpus
from golf.errors import UsageError
from golf.files import write_bytes
from golf.guard import Result, Rollback
from golf.machine import Machine
from golf.model import RecurrentGPT
from golf.muon import Optimizers
from golf.noise import GridNoise
from golf.objective import Objective

FOLDER, KEPT, SCHEMA = "states", 2, 1
RESULT = ("steps", "tokens", "train_seconds", "step_seconds", "loss")  # of a run's Result


class Loop(NamedTuple):
    """What a step of training reads and changes."""

    model: RecurrentGPT
    optimizers: Optimizers
    clock: Clock | StepCounter
    average: WeightAverage
    objective: Objective
    noise: GridNoise
    result: Result
    rollback: Rollback  # of the last update

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; those that ranks hold parts of come whole, so that all ranks must ask."""
        found = {f"model/{name}": p for name, p in self.model.named_parameters()}
        found |= {f"muon/{n}": whole(part, len(group.parameters))
                  for n, (part, group) in enumerate(zip(self.optimizers.muon.state(), self.optimizers.muon.groups,
                                                        strict=True))}  # fmt: skip
        for n, p in enumerate(self.adams()):
            found |= {f"adam/{n}/{key}": value for key, value in self.optimizers.adam.state[p].items()}
        found |= {f"average/{n}": a for n, a in enumerate(self.average.average)}
        return found | {"noise": self.noise.generator.get_state()}

    def adams(self) -> list[Tensor]:
        return [p for group in self.optimizers.adam.param_groups for p in group["params"]]

    def numbers(self) -> dict:
        """Everything else, as JSON has it."""
        clock, result = self.clock, self.result
        kept = {"elapsed": clock.elapsed(), "left_out": clock.left_out}
        if isinstance(clock, StepCounter):
            kept["done"] = clock.done
        else:
            kept |= {"steps": list(clock.steps), "updates": list(clock.updates)}
        return {
            "clock": kept, "average": self.average.progress, "steered": self.objective.steered,
            "result": {k: getattr(result, k) for k in RESULT},
        }  # fmt: skip

    @torch.no_grad()
    def put_back(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        """Become what was kept. Raises KeyError and RuntimeError for another model's."""
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"model/{name}"])
        rank = dist.get_rank() if dist.is_initialized() else 0
        for n, part in enumerate(self.optimizers.muon.state()):
            stored = tensors[f"muon/{n}"]
            if len(part) != len(stored):  # this rank's part of it
                start = rank * len(part)
                part.zero_()
                stored = stored[start : start + len(part)]
                part = part[: len(stored)]
            part.copy_(stored)
        for n, p in enumerate(self.adams()):
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizers.adam.state[p] = {k: tensors[f"adam/{n}/{k}"].to(p.device) for k in keys}
        for n, a in enumerate(self.average.average):
            a.copy_(tensors[f"average/{n}"])
        self.noise.generator.set_state(tensors["noise"])
        kept, clock = numbers["clock"], self.clock
        if isinstance(clock, StepCounter):
            clock.done = kept["done"]
        else:
            clock.steps.extend(kept["steps"]), clock.updates.extend(kept["updates"])
        clock.left_out = kept["left_out"]
        clock.started = clock.now() - kept["elapsed"] - clock.left_out
        self.average.progress, self.objective.steered = numbers["average"], numbers["steered"]
        for key, value in numbers["result"].items():
            setattr(self.result, key, value)


def whole(part: Tensor, count: int) -> Tensor:
    """A bank's momentum (N, R, C), also where each rank holds a part."""
    if len(part) == count or not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[:count]


def code_sha256() -> str:
    """Of the code that trains, to say whether it has changed since."""
    from golf.bundle import source_files

    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Keeper:
    """Writes a run's checkpoints, and puts the newest one back."""

    def __init__(self, folder: Path, config: Config, corpus: Corpus, machine: Machine, report: Callable[[dict], None]):
        self.folder, self.every, self.machine, self.report = folder / FOLDER, config.run.keep_every, machine, report
        self.about = {
            "schema": SCHEMA, **of_configuration(config), "world": machine.world, "corpus": corpus.fingerprint,
            "dtype": str(machine.dtype)[6:], "compile": machine.compile, "code": code_sha256(),
        }  # fmt: skip
        self.resumes, self.loop = bool(config.run.resume), None

    def begin(self, *parts: object) -> None:
        """Before the first step: go on where the newest checkpoint ends, if the run is resumed. Raises UsageError."""
        self.loop = loop = Loop(*parts)
        if not self.resumes:
            return
        path, told = newest(self.folder.parent)
        require_same(told, self.about)
        try:
            loop.put_back(load_file(path), told["loop"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"--run.resume: the checkpoint does not fit this program ({error!r:.100}).") from error
        changed = told.get("code") != self.about["code"] or told.get("compile") != self.about["compile"]
        self.report({"event": "resumed", "step": loop.result.steps, "elapsed": round(loop.clock.elapsed(), 3),
                     "code_changed": changed})  # fmt: skip

    def after_step(self) -> None:
        """Write a checkpoint where one is due."""
        if self.every and self.loop.result.steps % self.every == 0:
            self.keep()

    def keep(self) -> None:
        """Write a checkpoint, off the clock, of a run that wants any; a disk that is full ends no run."""
        loop = self.loop
        step = loop.result.steps
        if not self.every or not step:
            return
        numbers = loop.numbers()  # before the clock is stopped, so that what follows is on none
        with loop.clock.paused():
            tensors = {name: t.detach().cpu().contiguous() for name, t in loop.tensors().items()}
            if self.machine.rank:
                return
            metadata = {"state": json.dumps({**self.about, "loop": numbers})}
            try:
                self.folder.mkdir(exist_ok=True)
                write_bytes(self.folder / f"{step:09d}.safetensors", save(tensors, metadata=metadata))
                for old in sorted(self.folder.glob("*.safetensors"))[:-KEPT]:
                    old.unlink()
            except OSError as error:
                self.report({"event": "not-kept", "step": step, "reason": error.strerror or str(error)})

    def clear(self) -> None:
        """Delete the checkpoints of a run that has ended well."""
        shutil.rmtree(self.folder, ignore_errors=True)


NAMES = {
    "fingerprint": "configuration", "seed": "seed", "max_steps": "number of steps", "seconds": "number of seconds",
    "corpus": "text", "world": "number of ranks", "dtype": "number type",
}  # fmt: skip


def of_configuration(config: Config) -> dict:
    """What a configuration alone says of a run that may be gone on with."""
    run = config.run
    return {"fingerprint": config.fingerprint, "seed": run.seed, "max_steps": run.max_steps,
            "seconds": config.train_seconds}  # fmt: skip


def require_same(told: dict, about: dict) -> None:
    """Raise UsageError naming the first thing in which a run that is gone on with was begun otherwise."""
    for key, name in NAMES.items():
        if key in about and told.get(key) != about[key]:
            raise UsageError(f"--run.resume: the run had another {name} ({told.get(key)}, now {about[key]}), give the "
                             "flags that it was begun with.")  # fmt: skip


def newest(folder: Path) -> tuple[Path, dict]:
    """The newest whole checkpoint of a run, and what it holds beside tensors. Raises UsageError where there is none."""
    damaged = ""
    for path in sorted((folder / FOLDER).glob("*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as stored:
                told = json.loads((stored.metadata() or {})["state"])
            if not isinstance(told, dict) or told.get("schema") != SCHEMA:
                damaged = f"{path} has schema {told.get('schema') if isinstance(told, dict) else None}, not {SCHEMA}"
                continue
            return path, told
        except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
            damaged = f"{path} is damaged ({error!r:.100})"
    raise UsageError(f"--run.resume {folder}: {damaged or 'there is no checkpoint, begin with --run.keep-every'}.")


def resumed(config: Config) -> tuple[Path, Config]:
    """The run folder that --run.resume names, and the configuration with the number type it was begun with, which a
    machine chooses by a measurement. Raises UsageError for a run that has ended, or is none."""
    folder = Path(config.run.resume)
    if config.run.name and folder.resolve().name[11:] != config.run.name:  # after its date
        raise UsageError(f"--run.name {config.run.name}: a run that goes on keeps its folder's name, leave it out.")
    if not (folder / "log.jsonl").exists():
        raise UsageError(f"--run.resume {folder}: it is no run folder.")
    if (folder / "submission.json").exists() and (status := records.read(folder).status) in ("complete", "invalid"):
        raise UsageError(f"--run.resume {folder}: the run has ended ({status}), begin another.")
    told = newest(folder)[1]
    require_same(told, of_configuration(config))
    chosen = config.run.dtype == "auto" and told.get("dtype") in ("float32", "bfloat16")
    return folder, replace(config, run=replace(config.run, dtype=told["dtype"])) if chosen else config
