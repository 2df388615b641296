#!/usr/bin/env python3
"""Train a depth-recurrent language model against the clock, pack it, have it judged, write the record.

    python train_gpt.py PRESET [flags]
    python train_gpt.py laptop --run.data data/english --recipe.matrix-rate 0.02
    python train_gpt.py laptop --run.resume runs/FOLDER
    torchrun --standalone --nproc_per_node=8 train_gpt.py PRESET [flags]

In a run folder this file is also the submission: load_scorer(folder) returns the packed model's Scorer.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # answer before torch takes its second to load
    from golf.console import run_script
    from golf.presets import parse_command_line

    sys.exit(run_script(lambda: parse_command_line(sys.argv[1:])))

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from golf.average import WeightAverage
from golf.bpb import Score, windows
from golf.calibrate import calibrate, rehearse
from golf.clock import Clock, Pace, StepCounter
from golf.codec import encode, load_artifact
from golf.config import Config, changed
from golf.data import Corpus, TokenStream, ahead, batches
from golf.errors import UsageError
from golf.files import write_bytes, write_files
from golf.guard import Interrupt, Result, Rollback
from golf.machine import (
    Machine,
    accumulate,
    compile_model,
    is_out_of_memory,
    peak_memory,
    set_up,
    warm_up_in_memory,
)
from golf.model import RecurrentGPT
from golf.noise import GridNoise
from golf.objective import Objective, pass_statistics
from golf.overlap import optimizers_for
from golf.quantize import quantize
from golf.recipe import Scoring, said_pace
from golf.scoring import Scorer

VALIDATION_TOKENS = 16_384  # tokens a rank scores at a time
PENALTY_TOKENS = 32_768


# == the submission's side ====================================================================================


def load_scorer(folder: Path | str) -> Scorer:
    """Load the artifact in `folder`. Raises UsageError when it is missing or damaged."""
    return Scorer(folder)


# == training ====================================================================================================


@torch.no_grad()
def validate(
    model: RecurrentGPT, tokens: np.ndarray, text_bytes: int, config: Config, machine: Machine, loops: int | None = None
) -> Score:  # fmt: skip
    """Score of the model's weights on a row of tokens that stands for `text_bytes`, shared over the ranks."""
    length = config.recipe.sequence_length
    nats, count = 0.0, 0
    for index, (inputs, targets) in enumerate(windows(tokens, length, max(1, VALIDATION_TOKENS // length))):
        if index % machine.world == machine.rank:
            given, wanted = machine.given(inputs), machine.given(targets)
            hidden = model.hidden(given, machine.dtype, loops, config.scoring.isolate)
            nats += float(model.head_loss(hidden, wanted)) * targets.size
            count += targets.size
    nats, count = machine.total([nats, count])
    return Score(nats, int(count), text_bytes)


class Training:
    """Training until the clock or the step count says stop: run() leaves a Result.

    `report` receives one dict an event, on every rank. A keeper (golf.resume) puts back what an earlier run kept, and
    keeps what this one needs to go on.
    """

    def __init__(
        self, config: Config, corpus: Corpus, machine: Machine, report: Callable[[dict], None],
        keeper: object = None,
    ):  # fmt: skip
        """Warm up, and begin or go on. Raises UsageError."""
        self.config, self.corpus, self.machine, self.report, self.keeper = config, corpus, machine, report, keeper
        shape, recipe, run = config.shape, config.recipe, config.run
        torch.manual_seed(run.seed)
        self.model = RecurrentGPT(shape).initialize(recipe, run.seed).to(machine.device)
        self.optimizers = optimizers_for(self.model, recipe, run.overlap, machine.dtype)
        compile_model(self.model, machine.compile)
        stream = TokenStream(corpus.shards("train"), shape.vocab_size)
        began = time.perf_counter()
        micro_rows = warm_up_in_memory(self.model, self.optimizers, config, machine, report)
        self.reserve, self.ending = rehearse(self.model, config, machine, micro_rows)
        report({
            "event": "warm-up", "seconds": round(time.perf_counter() - began, 2), "micro_rows": micro_rows,
            "reserve": round(self.reserve, 2),
        })  # fmt: skip

        self.result, self.average = Result(self.model), WeightAverage(self.model, recipe.average)
        self.objective, self.noise = Objective(config), GridNoise(self.model, config)
        self.rollback = Rollback(self.result, self.average)
        self.pace = Pace(said_pace(run.pace))
        now = self.pace.now if run.pace else machine.now
        timed = Clock(config.train_seconds, min(self.reserve, config.train_seconds / 2), machine.largest, now)
        self.clock: Clock | StepCounter = StepCounter(run.max_steps) if run.max_steps else timed
        if keeper:
            keeper.begin(self.model, self.optimizers, self.clock, self.average, self.objective, self.noise, self.result,
                         self.rollback)  # fmt: skip
            self.rollback.remember()  # a run that goes on falls back to where it does
        source = batches(
            stream, recipe.batch_tokens, recipe.sequence_length, recipe.loader, machine.rank, machine.world, micro_rows,
            self.result.steps,
        )  # fmt: skip
        self.source = ahead(source) if machine.device.type != "cpu" else source  # a processor has nothing to do beside

    def run(self, interrupt: Interrupt) -> Result:
        """All steps, then the averaged weights and their sensitivities."""
        result, recipe = self.result, self.config.recipe
        while (progress := self.clock.begin_step()) is not None:
            if self.machine.largest(interrupt.asked):
                result.status, result.reason = "interrupted", "asked to stop"
                if self.keeper:
                    self.keeper.keep()
                break
            loops = self.config.shape.loops if progress >= recipe.loops_from else 1
            loss, norm, told = self.gradients(progress, loops)
            if not (np.isfinite(loss) and np.isfinite(norm)):
                result.status, result.reason = "crash", f"loss {loss}, gradient norm {norm} at step {result.steps + 1}"
                self.rollback.take_back()  # the update that led here
                break
            if (seconds := self.update(progress)) is None:
                break
            result.steps += 1
            result.tokens += recipe.batch_tokens
            result.loss, result.train_seconds = loss, self.clock.elapsed()
            result.step_seconds = result.train_seconds
            self.report({
                "event": "step", "step": result.steps, "loss": round(loss, 5),
                "elapsed": round(result.train_seconds, 3), "ms": round(seconds * 1e3, 1),
                "progress": round(progress, 5), "loops": loops, "rate_scale": round(recipe.rate_scale(progress), 4),
                "gradient_norm": round(norm, 4), "tokens": result.tokens, "limit": self.config.train_seconds, **told,
            })  # fmt: skip
            self.after_step(loops)
        self.finish()
        return result

    def gradients(self, progress: float, loops: int) -> tuple[float, float, dict]:
        """Every parameter's .grad from the next batch: the mean of all ranks, its global norm, and what the objective
        tells of this rank."""
        recipe, machine = self.config.recipe, self.machine
        self.optimizers.zero_grad()
        self.objective.begin(progress)
        with self.noise.added(progress):
            self.batch = next(self.source)
            local_loss = accumulate(self.model, self.batch, machine, loops, self.objective)
        if self.config.run.pace:
            self.pace.tick(loops)
        self.optimizers.reduce_gradients()
        norm, told = self.optimizers.gradient_norm(), self.objective.told(self.model)
        if recipe.target_depth and loops > 1:
            self.objective.steer(machine.total([told["mean_depth"]])[0] / machine.world)
        return machine.total([float(local_loss)])[0] / machine.world, norm, told

    def update(self, progress: float) -> float | None:
        """The weights' update and the step's seconds; none where it would end, or has ended, after the cap."""
        clock, result = self.clock, self.result
        if not clock.may_update():
            self.report({"event": "abandoned", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            return None
        self.rollback.remember()
        result.updating = True
        self.optimizers.step(progress)
        self.average.follow(progress)
        result.updating = False
        seconds = clock.end_step()
        if clock.late:
            self.report({"event": "late", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            self.rollback.take_back()
            return None
        return seconds

    def after_step(self, loops: int) -> None:
        """What is due now: statistics of the passes, a checkpoint, a look at the validation text."""
        run, step, machine = self.config.run, self.result.steps, self.machine
        if loops > 1 and run.log_every and step % run.log_every == 0 and machine.rank == 0:
            statistics = pass_statistics(self.model, self.batch[0][0][:1], machine.dtype, loops)
            self.report({"event": "passes", "step": step, **statistics})
        if self.keeper:
            self.keeper.after_step()
        if run.validate_every and step % run.validate_every == 0:
            with self.clock.paused():
                score = validation_score(self.model, self.corpus, self.config, machine)
                self.report({"event": "validation", "step": step, "val_loss": score.loss, "val_bpb": score.bpb})

    def finish(self) -> None:
        """After the last step: no weights that are not numbers, the average in their place, their sensitivities."""
        result, config = self.result, self.config
        self.settle()
        if result.steps and result.status != "crash":
            self.average.install()
        self.report({
            "event": "trained", "status": result.status, "reason": result.reason, "steps": result.steps,
            "tokens": result.tokens, "train_seconds": round(result.train_seconds, 3),
            "left_out": round(self.clock.left_out, 3),
        })  # fmt: skip
        if config.pack.calibration_batches and result.steps:
            seconds, done = self.collect_sensitivities()
            self.report({
                "event": "calibrated", "batches": done, "seconds": round(seconds, 2), "reserve": round(self.reserve, 2),
            })  # fmt: skip
        result.peak_memory = peak_memory(self.machine.device)

    def settle(self) -> None:
        """Weights that are not numbers are taken back, and a run that made no step is no run."""
        result = self.result
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            result.status, result.reason = "crash", f"weights not finite after step {result.steps}"
            self.rollback.take_back()
        elif not result.steps and result.status == "complete":
            why = (f"no step ends within {self.config.train_seconds:g} s, of which {self.reserve:.1f} s are kept for "
                   "calibration: give a longer --run.cap, or fewer --pack.calibration-batches")  # fmt: skip
            result.status, result.reason = "crash", why

    def collect_sensitivities(self) -> tuple[float, int]:
        """Calibrate on batches that follow the last step, inside the clock: the seconds it took, and how many were
        done."""
        config, clock, result = self.config, self.clock, self.result
        began = clock.elapsed()
        limit = float("inf") if config.run.max_steps or config.run.pace else config.train_seconds
        left = lambda: limit - clock.elapsed()  # noqa: E731
        result.sensitivities, done = calibrate(self.model, self.source, config, self.machine, left, self.ending)
        seconds = self.machine.largest(clock.elapsed()) - began
        if done:
            result.train_seconds = began + seconds
        return seconds, done


def validation_score(model: RecurrentGPT, corpus: Corpus, config: Config, machine: Machine) -> Score:
    """The unpacked weights' score on the corpus's whole validation split."""
    tokens = np.concatenate(corpus.shards("val"))
    return validate(model, tokens, corpus.val_bytes, config, machine)


def pack(result: Result, config: Config, path: Path, code_bytes: int, report: Callable[[dict], None]) -> None:
    """Quantise, encode and write the artifact. Raises UsageError for weights that cannot be packed."""
    began = time.perf_counter()
    weights = {name: p.detach().float().cpu().numpy() for name, p in result.model.named_parameters()}
    note = {"preset": config.preset, "seed": config.run.seed}
    if config.scoring != Scoring():
        note["scoring"] = changed(config.scoring)
    data, about = quantize(
        config.shape, weights, config.pack, config.target_bytes(code_bytes), result.sensitivities,
        partial(encode, config.shape, note=note, coder=config.pack.coder, chosen={}),
    )  # fmt: skip
    write_bytes(path, data)
    report({"event": "packed", "seconds": round(time.perf_counter() - began, 2), **about})


def quantization_penalty(
    model: RecurrentGPT, path: Path, corpus: Corpus, config: Config, machine: Machine
) -> dict[str, float]:  # fmt: skip
    """Bits a byte that packing costs at each number of loops, on the first PENALTY_TOKENS of validation. The model is
    left with the packed weights."""
    tokens, alone = np.concatenate(corpus.shards("val"))[: PENALTY_TOKENS + 1], replace(machine, rank=0, world=1)
    text_bytes = round(corpus.val_bytes * tokens.size / corpus.tokens["val"])  # the whole split's bytes a token

    def scores() -> list[float]:
        counts = range(1, config.shape.loops + 1)
        return [validate(model, tokens, text_bytes, config, alone, loops).bpb for loops in counts]

    before = scores()
    weights = load_artifact(path)[1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))
    return {str(n + 1): round(b - a, 5) for n, (a, b) in enumerate(zip(before, scores(), strict=True))}


def main() -> int:
    import budget
    from golf import bundle, journal, last_words, presets, records, report, resume, track, verdicts, watchdog

    config = presets.parse_command_line(sys.argv[1:])
    config.check(int(os.environ.get("WORLD_SIZE", 1)))
    folder = Path(config.run.runs) / records.folder_name(config)
    if config.run.track == "trackio":
        track.require_trackio()
    if config.run.resume:
        folder, config = resume.resumed(config)
    corpus = Corpus(config.run.data)
    corpus.check(config.shape.vocab_size, config.recipe.sequence_length)
    budget.require_fit(config)
    code = bundle.counted_files(config)  # now, so that what ships is what runs
    machine = set_up(config)
    folder = Path(machine.from_rank_0(str(folder)))  # named by the time of day
    if machine.rank == 0 and not config.run.resume:
        records.create_folder(folder)
    with Interrupt().watched() as interrupt, journal.Journal(folder, machine.rank) as log:
        log.write(journal.start_row(folder, config, corpus, machine.__dict__, len(code["train_gpt.py"])))
        keeper = resume.Keeper(folder, config, corpus, machine, log.write)
        words = last_words.LastWords(folder, config, corpus, machine, log, keeper, len(code["train_gpt.py"]))
        with watchdog.Watchdog(machine.rank, machine.world, words.lost) as words.dog:
            try:
                result = Training(config, corpus, machine, words.told, keeper).run(interrupt)
                if machine.rank == 0:
                    with words.weights_kept(result):
                        try:
                            pack(result, config, folder / "model.bin", len(code["train_gpt.py"]), log.write)
                        except UsageError as error:
                            result.status, result.reason = "crash", str(error)
                    write_files(folder, {**code, "tokenizer.model": corpus.tokenizer.read_bytes()})
                unpacked = validation_score(result.model, corpus, config, machine) if result.steps else None
            except Exception as error:
                words.explain(error)
                raise
        if machine.rank == 0:
            if unpacked:
                log.write({"event": "unpacked", "val_loss": unpacked.loss, "val_bpb": unpacked.bpb})
            penalty = {}
            if unpacked and (folder / "model.bin").exists():
                try:
                    penalty = quantization_penalty(result.model, folder / "model.bin", corpus, config, machine)
                except (MemoryError, RuntimeError) as error:  # the run is whole without it
                    if not is_out_of_memory(error):
                        raise
                log.write({"event": "penalty", "bpb": penalty})
            record = records.from_run(folder, config, corpus, result, unpacked, log.environment, penalty)
            records.write(folder, record)
            if config.run.judge and result.steps and (folder / "model.bin").exists():
                result.model.cpu()  # the scorer needs the device's memory
                if machine.device.type == "cuda":
                    torch.cuda.empty_cache()
                log.write({"event": "judging"})
                record = verdicts.judged(folder, record, Path(config.run.data))
            if record.status == "complete":
                keeper.clear()
            log.close_with(record, verdicts.said(verdicts.read(folder)))
            report.write(folder)
            if config.run.track == "trackio":
                track.mirror(folder, config)
    # A launcher ends all ranks when one fails, and rank 0 may still be writing.
    return 0 if machine.rank > 0 else {"complete": 0, "interrupted": 130}.get(record.status, 1)


if __name__ == "__main__":
    from golf.console import run_script

    code = run_script(main)
    if dist.is_initialized():
        # Ranks end at different times, and gloo's threads abort a process that unwinds after its peers have gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
