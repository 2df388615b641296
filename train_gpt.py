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
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from golf.files import write_bytes
from golf.machine import Machine, accumulate, compile_model, peak_memory, set_up, warm_up_in_memory
from golf.model import RecurrentGPT
from golf.noise import GridNoise
from golf.objective import Objective, pass_statistics
from golf.overlap import optimizers_for
from golf.quantize import Sensitivity, quantize
from golf.recipe import Scoring, said_pace
from golf.scoring import Scorer

VALIDATION_TOKENS = 16_384  # tokens a rank scores at a time
PENALTY_TOKENS = 32_768


# == the submission's side ====================================================================================


def load_scorer(folder: Path | str) -> Scorer:
    """Load the artifact in `folder`. Raises UsageError when it is missing or damaged."""
    return Scorer(folder)


# == training ====================================================================================================


@dataclass
class Result:
    """What training leaves."""

    model: RecurrentGPT
    status: str = "complete"  # complete | interrupted | crash
    reason: str = ""
    steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    step_seconds: float = 0.0  # of them without the calibration
    loss: float = float("nan")
    peak_memory: int = 0
    updating: bool = False  # between the first and the last weight of an update
    sensitivities: dict[str, Sensitivity] | None = None


class Rollback:
    """The weights, their average and the count of steps before the last update, to return to when it must not stand."""

    def __init__(self, result: Result, average: WeightAverage):
        self.result, self.average = result, average
        self.weights = [t.detach().clone() for t in self.tensors()]
        self.counts, self.progress = (0, 0, 0.0, float("nan")), average.progress

    def tensors(self) -> list[torch.Tensor]:
        return [*self.result.model.parameters(), *self.average.average]

    @torch.no_grad()
    def remember(self) -> None:
        """Before an update: keep the weights, whose loss has just been found finite."""
        torch._foreach_copy_(self.weights, self.tensors())
        self.progress = self.average.progress
        self.counts = (self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss)

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo the last update."""
        torch._foreach_copy_(self.tensors(), self.weights)
        self.average.progress, self.result.updating = self.progress, False
        self.result.steps, self.result.tokens, self.result.train_seconds, self.result.loss = self.counts


class Interrupt:
    """Whether Ctrl-C or SIGTERM has asked the run to end. A second one, later than a launcher's echo of the first,
    ends the program at once."""

    ECHO_SECONDS = 5.0

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    @contextmanager
    def watched(self) -> Iterator[Interrupt]:
        before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.asked_at is not None and time.monotonic() - self.asked_at > self.ECHO_SECONDS:
            raise KeyboardInterrupt
        self.asked_at = self.asked_at or time.monotonic()


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


def train(
    config: Config, corpus: Corpus, machine: Machine, interrupt: Interrupt, report: Callable[[dict], None],
    keeper: object = None,
) -> Result:  # fmt: skip
    """Train until the clock or the step count says stop. `report` receives one dict an event, on every rank. A keeper
    (golf.resume) puts back what an earlier run kept, and keeps what this one needs to go on."""
    shape, recipe, run = config.shape, config.recipe, config.run
    torch.manual_seed(run.seed)
    model = RecurrentGPT(shape).initialize(recipe, run.seed).to(machine.device)
    optimizers = optimizers_for(model, recipe, run.overlap, machine.dtype)
    compile_model(model, machine.compile)
    stream = TokenStream(corpus.shards("train"), shape.vocab_size)
    began = time.perf_counter()
    micro_rows = warm_up_in_memory(model, optimizers, config, machine, report)
    reserve, ending = rehearse(model, config, machine, micro_rows)
    report({
        "event": "warm-up", "seconds": round(time.perf_counter() - began, 2), "micro_rows": micro_rows,
        "reserve": round(reserve, 2),
    })  # fmt: skip

    result = Result(model)
    average, objective, noise = WeightAverage(model, recipe.average), Objective(config), GridNoise(model, config)
    rollback = Rollback(result, average)
    pace = Pace(said_pace(run.pace))
    now = pace.now if run.pace else machine.now
    timed = Clock(config.train_seconds, min(reserve, config.train_seconds / 2), machine.largest, now)
    clock: Clock | StepCounter = StepCounter(run.max_steps) if run.max_steps else timed
    if keeper:
        keeper.begin(model, optimizers, clock, average, objective, noise, result, rollback)
        rollback.remember()  # a run that goes on falls back to where it does

    source = batches(
        stream, recipe.batch_tokens, recipe.sequence_length, recipe.loader, machine.rank, machine.world, micro_rows,
        result.steps,
    )  # fmt: skip
    if machine.device.type != "cpu":  # a processor has nothing to do beside
        source = ahead(source)
    while (progress := clock.begin_step()) is not None:
        if machine.largest(interrupt.asked):
            result.status, result.reason = "interrupted", "asked to stop"
            if keeper:
                keeper.keep()
            break
        loops = shape.loops if progress >= recipe.loops_from else 1
        optimizers.zero_grad()
        objective.begin(progress)
        with noise.added(progress):
            batch = next(source)
            local_loss = accumulate(model, batch, machine, loops, objective)
        if run.pace:
            pace.tick(loops)
        optimizers.reduce_gradients()
        norm, told = optimizers.gradient_norm(), objective.told(model)
        if recipe.target_depth and loops > 1:
            objective.steer(machine.total([told["mean_depth"]])[0] / machine.world)
        loss = machine.total([float(local_loss)])[0] / machine.world
        if not (np.isfinite(loss) and np.isfinite(norm)):
            result.status, result.reason = "crash", f"loss {loss}, gradient norm {norm} at step {result.steps + 1}"
            rollback.take_back()  # the update that led here
            break
        if not clock.may_update():
            report({"event": "abandoned", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            break
        rollback.remember()
        result.updating = True
        optimizers.step(progress)
        average.follow(progress)
        result.updating = False
        seconds = clock.end_step()
        if clock.late:
            report({"event": "late", "step": result.steps + 1, "elapsed": round(clock.elapsed(), 3)})
            rollback.take_back()
            break
        result.steps += 1
        result.tokens += recipe.batch_tokens
        result.loss, result.train_seconds = loss, clock.elapsed()
        result.step_seconds = result.train_seconds
        report({
            "event": "step", "step": result.steps, "loss": round(loss, 5),
            "elapsed": round(result.train_seconds, 3), "ms": round(seconds * 1e3, 1),
            "progress": round(progress, 5), "loops": loops, "rate_scale": round(recipe.rate_scale(progress), 4),
            "gradient_norm": round(norm, 4), "tokens": result.tokens, "limit": config.train_seconds, **told,
        })  # fmt: skip
        if loops > 1 and run.log_every and result.steps % run.log_every == 0 and machine.rank == 0:
            report({"event": "passes", "step": result.steps, **pass_statistics(
                model, batch[0][0][:1], machine.dtype, loops)})  # fmt: skip
        if keeper:
            keeper.after_step()
        if run.validate_every and result.steps % run.validate_every == 0:
            with clock.paused():
                score = validation_score(model, corpus, config, machine)
                report({"event": "validation", "step": result.steps, "val_loss": score.loss, "val_bpb": score.bpb})
    settle(result, rollback, config, reserve)
    if result.steps and result.status != "crash":
        average.install()
    report({
        "event": "trained", "status": result.status, "reason": result.reason, "steps": result.steps,
        "tokens": result.tokens, "train_seconds": round(result.train_seconds, 3), "left_out": round(clock.left_out, 3),
    })  # fmt: skip
    if config.pack.calibration_batches and result.steps:
        seconds, batches_done = collect_sensitivities(result, source, config, machine, clock, ending)
        report({
            "event": "calibrated", "batches": batches_done, "seconds": round(seconds, 2), "reserve": round(reserve, 2),
        })  # fmt: skip
    result.peak_memory = peak_memory(machine.device)
    return result


def collect_sensitivities(
    result: Result, source: Iterator, config: Config, machine: Machine, clock: Clock | StepCounter, ending: float
) -> tuple[float, int]:  # fmt: skip
    """Calibrate on batches that follow the last step, inside the clock: the seconds it took, and how many were done."""
    began = clock.elapsed()
    limit = float("inf") if config.run.max_steps or config.run.pace else config.train_seconds
    left = lambda: limit - clock.elapsed()  # noqa: E731
    result.sensitivities, done = calibrate(result.model, source, config, machine, left, ending)
    seconds = machine.largest(clock.elapsed()) - began
    if done:
        result.train_seconds = began + seconds
    return seconds, done


def settle(result: Result, rollback: Rollback, config: Config, reserve: float) -> None:
    """After the last step: weights that are not numbers are taken back, and a run that made no step is no run."""
    if not all(torch.isfinite(p).all() for p in result.model.parameters()):
        result.status, result.reason = "crash", f"weights not finite after step {result.steps}"
        rollback.take_back()
    elif not result.steps and result.status == "complete":
        result.status, result.reason = "crash", (
            f"no step ends within {config.train_seconds:g} s, of which {reserve:.1f} s are kept for calibration: give "
            "a longer --run.cap, or fewer --pack.calibration-batches"
        )


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
    from golf import bundle, journal, last_words, presets, records, report, resume, track, watchdog

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
        words = last_words.LastWords(folder, config, corpus, machine, log, keeper)
        with watchdog.Watchdog(machine.rank, machine.world, words.lost) as words.dog:
            try:
                result = train(config, corpus, machine, interrupt, words.told, keeper)
                if machine.rank == 0:
                    with words.weights_kept(result):
                        try:
                            pack(result, config, folder / "model.bin", len(code["train_gpt.py"]), log.write)
                        except UsageError as error:
                            result.status, result.reason = "crash", str(error)
                    for name, data in {**code, "tokenizer.model": corpus.tokenizer.read_bytes()}.items():
                        (folder / name).parent.mkdir(exist_ok=True)
                        write_bytes(folder / name, data)
                unpacked = validation_score(result.model, corpus, config, machine) if result.steps else None
            except Exception as error:
                words.explain(error)
                raise
        if machine.rank == 0:
            if unpacked:
                log.write({"event": "unpacked", "val_loss": unpacked.loss, "val_bpb": unpacked.bpb})
            penalty = {}
            if unpacked and (folder / "model.bin").exists():
                penalty = quantization_penalty(result.model, folder / "model.bin", corpus, config, machine)
                log.write({"event": "penalty", "bpb": penalty})
            record = records.from_run(folder, config, corpus, result, unpacked, log.environment, penalty)
            records.write(folder, record)
            if config.run.judge and result.steps and (folder / "model.bin").exists():
                result.model.cpu()  # the scorer needs the device's memory
                if machine.device.type == "cuda":
                    torch.cuda.empty_cache()
                log.write({"event": "judging"})
                record = records.judged(folder, record, Path(config.run.data))
            if record.status == "complete":
                keeper.clear()
            log.close_with(record, records.said_verdict(records.read_verdict(folder)))
            report.write(folder)
            if config.run.track == "trackio":
                track.mirror(folder, config)
    if machine.rank > 0:
        return 0  # a launcher ends all ranks when one fails, and rank 0 may still be writing
    return {"complete": 0, "interrupted": 130}.get(record.status, 1)


if __name__ == "__main__":
    from golf.console import run_script

    code = run_script(main)
    if dist.is_initialized():
        # Ranks end at different times, and gloo's threads abort a process that unwinds after its peers have gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
