"""Training on one CUDA device: fast paths checked, then tokens/s and utilisation at the contest's shapes.

    python bench/gpu.py [--rows PRESET:MODE[@CHECKOUT],...] [--seconds 540] [--json]

A row is a preset in a compile mode, of this checkout or of another, so that before and after come from one device in
one run. Each is a process: all compile side by side, then each is timed alone, with device events, while the others
wait. A step is the preset's whole batch, in the eighths that each of eight ranks would have at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ROWS = (
    "baseline:block", "baseline:model", "record:block", "record:model", "3x3-768:model", "3x4-768:model",
    "3x3-1024:model",
)  # fmt: skip
RANKS = 8
READY = "ready"
KINDS = (  # of work, by what their kernels' names hold
    ("attention", ("sdpa", "flash", "fmha", "cudnn")),
    ("products", ("nvjet", "gemm", "cutlass", "splitK")),
    ("compiled element-wise", ("triton_",)),
)
CHECK = "check"


# == in a row's own process ==================================================================================


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name stands for."""
    return next((kind for kind, parts in KINDS if any(part in kernel for part in parts)), "the rest")


class Timed:
    """Milliseconds of a piece of work on the device, between two events; on a CPU by the clock."""

    def __init__(self, device) -> None:
        import torch

        self.cuda = device.type == "cuda"
        self.event = lambda: torch.cuda.Event(enable_timing=True)
        self.wait = torch.cuda.synchronize if self.cuda else lambda: None

    def once(self, work) -> float:
        if not self.cuda:
            began = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - began)
        begin, end = self.event(), self.event()
        begin.record()
        work()
        end.record()
        self.wait()
        return begin.elapsed_time(end)

    def often(self, work, times: int) -> list[float]:
        """Least, median and most of several."""
        found = sorted(self.once(work) for _ in range(times))
        return [round(found[0], 3), round(statistics.median(found), 3), round(found[-1], 3)]


def rate_of_products(device, dtype) -> float:
    """FLOP/s of a large matrix product of random numbers on this device."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed = Timed(device)
    timed.often(lambda: a @ b, 3)
    return 2 * size**3 / (1e-3 * timed.often(lambda: a @ b, 10)[1])


def whole_square(config, loops: int) -> int:
    """FLOPs of one token's training with attention counted to whole rows, as some authors do."""
    from golf.pace import forward_flops, layers_and_ends

    layers, _ = layers_and_ends(config, loops)
    return 3 * (forward_flops(config, loops) + layers * 2 * config.shape.width * config.recipe.sequence_length)


def kernels(work, wait) -> dict:
    """Milliseconds of a piece of work by kind of kernel, and its longest kernels: (ms, launches, name)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        wait()
    found = [(e.self_device_time_total / 1e3, e.count, e.key) for e in seen.key_averages()]
    kinds: dict[str, float] = {}
    for spent, _, kernel in found:
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + spent
    return {
        "kernels_ms": {k: round(v, 2) for k, v in sorted(kinds.items(), key=lambda kv: -kv[1])},
        "longest": [[round(s, 3), n, k[:100]] for s, n, k in sorted(found, reverse=True)[:30]],
    }


def time_loops(stepper, timed: Timed, parts: list, loops: int) -> dict:
    """Steps with so many loops, on a batch's parts: what each of them and of its pieces takes."""
    from golf.machine import accumulate
    from golf.pace import forward_flops

    def backward() -> None:
        stepper.optimizers.zero_grad()
        accumulate(stepper.model, parts[:1], stepper.machine, loops, stepper.objective)

    row: dict = {"first_ms": round(timed.once(backward), 2), "part_ms": timed.often(backward, 10)}
    timed.wait()
    began = time.perf_counter()
    backward()
    row["launch_ms"] = round(1e3 * (time.perf_counter() - began), 2)  # what the host needs to hand out the work
    row["update_ms"] = timed.often(lambda: stepper.optimizers.step(0.5), 5)
    row["step_ms"] = timed.often(lambda: stepper.take(parts, loops), 4)
    seconds, tokens = 1e-3 * row["step_ms"][1], sum(targets.size for _, targets in parts)
    row["tokens_per_second"] = round(tokens / seconds)
    row["flops"] = 3 * forward_flops(stepper.config, loops) * tokens
    row["flops_per_second"] = row["flops"] / seconds
    row["flops_per_second_whole_square"] = whole_square(stepper.config, loops) * tokens / seconds
    return {**row, **kernels(backward, timed.wait)} if timed.cuda else row


def measure(preset: str, mode: str, device: str) -> None:
    """Compile, say that it is done, wait for the turn, time, and print one line of JSON."""
    import numpy as np
    import torch

    from golf.machine import peak_memory
    from golf.pace import training_memory
    from golf.presets import PRESETS
    from golf.recipe import Run
    from golf.timing import Stepper

    whole = PRESETS[preset].recipe
    recipe = replace(whole, batch_tokens=whole.batch_tokens // RANKS)
    config = replace(PRESETS[preset], recipe=recipe, run=Run(compile=mode, device=device, allow_over_cap=True))
    rows, length = recipe.batch_tokens // recipe.sequence_length, recipe.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.shape.vocab_size, (RANKS, rows, length + 1))
    parts = [(part[:, :-1].copy(), part[:, 1:].copy()) for part in tokens]
    stepper = Stepper(config)
    place, timed = stepper.machine.device, Timed(stepper.machine.device)
    if timed.cuda:
        torch.cuda.empty_cache()  # others warm up beside this one
    print(READY, flush=True)
    sys.stdin.readline()
    counts = [1, config.shape.loops] if recipe.loops_from else [config.shape.loops]
    found = {
        "preset": preset, "compile": mode, "device": torch.cuda.get_device_name() if timed.cuda else "cpu",
        "warm_up_seconds": round(stepper.warm_up_seconds, 1),
        "loops": {str(loops): time_loops(stepper, timed, parts, loops) for loops in counts},
        "memory": [peak_memory(place), training_memory(config)],
        "products": rate_of_products(place, stepper.machine.dtype),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def check(device: str) -> None:
    """Loss and gradients of each fast path against float64, and of the bundle against the checkout; one JSON line."""
    import numpy as np
    import torch

    from golf import bundle
    from golf.config import Config
    from golf.machine import Machine, accumulate, compile_model
    from golf.model import RecurrentGPT
    from golf.objective import Objective
    from golf.recipe import Recipe
    from golf.shape import BOS, Shape

    shape = Shape(width=256, heads=4, kv_heads=2, prelude=1, core=1, coda=1, loops=2, pass_scalars=True)
    config = Config("baseline", "contest", shape, Recipe(sequence_length=256, batch_tokens=2048))
    tokens = np.random.default_rng(1).integers(0, shape.vocab_size, (8, 257))
    tokens[:, ::50] = BOS
    batch, place = [(tokens[:, :-1].copy(), tokens[:, 1:].copy())], torch.device(device)

    def model_of(kind, dtype=torch.float32):
        model = kind(shape).initialize(config.recipe, 1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():  # nothing zero, so that all of it is seen
                p += 0.02 * torch.randn(p.shape, generator=generator)
        return model.to(place, dtype)

    def found(model, machine, run=accumulate, objective=None) -> tuple[float, torch.Tensor]:
        loss = run(model, batch, machine, 2, objective or Objective(config))
        return float(loss), torch.cat([p.grad.double().flatten() for p in model.parameters()])

    rows = []
    for within, kind in (("", config), (" documents", replace(config, recipe=replace(config.recipe, isolate=True)))):
        objective, plain = Objective(kind), {}
        exact = found(model_of(RecurrentGPT, torch.float64), Machine(place, torch.float64, "none"), objective=objective)
        for dtype in (torch.float32, torch.bfloat16):
            for mode in ("none", "block", "model") if place.type == "cuda" else ("none",):  # a CPU compiles for minutes
                torch._dynamo.reset()
                model = model_of(RecurrentGPT)
                compile_model(model, mode)
                loss, gradient = found(model, Machine(place, dtype, mode), objective=objective)
                off = float((gradient - exact[1]).norm() / exact[1].norm())
                plain.setdefault(dtype, off)
                good = off < (0.02 if dtype == torch.float32 else 0.05) and off < 2 * plain[dtype] + 1e-4
                rows.append({
                    "path": f"{str(dtype)[6:]} {mode}{within}", "loss_off": abs(loss - exact[0]), "gradients_off": off,
                    "good": good and abs(loss - exact[0]) < 0.01,
                })  # fmt: skip
    alone = sys.modules["submission"] = types.ModuleType("submission")
    exec(compile(bundle.readable(config), "submission", "exec"), alone.__dict__)  # our own source, in one file
    machine = alone.Machine(place, torch.bfloat16, "none")
    theirs = found(model_of(alone.RecurrentGPT), machine, alone.accumulate, alone.Objective(alone.CONFIG))
    ours = found(model_of(RecurrentGPT), Machine(place, torch.bfloat16, "none"))
    off = float((theirs[1] - ours[1]).norm() / ours[1].norm())  # attention's backward adds in any order
    rows.append({
        "path": "bundle", "loss_off": abs(theirs[0] - ours[0]), "gradients_off": off,
        "good": theirs[0] == ours[0] and off < 1e-3,
    })  # fmt: skip
    print(json.dumps(rows), flush=True)


# == the one that starts them ================================================================================


@dataclass
class Row:
    """A process and what it has said."""

    name: str
    process: subprocess.Popen
    lines: queue.Queue = field(default_factory=queue.Queue)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.strip() or " ")
        self.lines.put("")

    def line(self, begin: str, seconds: float) -> str:
        """The next line of output that begins so; empty when there is none in time."""
        until, line = time.monotonic() + seconds, " "
        while line and not line.startswith(begin):
            try:
                line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return ""
        return line

    def failed(self) -> str:
        """Why there is no result: out of time, or the last line that it complained of."""
        if self.process.poll() is None and self.lines.empty():
            self.process.kill()
            return "out of time"
        self.process.kill()
        self.process.wait()
        return next((e.strip()[:300] for e in reversed(self.errors) if e.strip()), "out of time")


def start(name: str, device: str, threads: int) -> Row:
    """A row's process, or the check's."""
    asked, _, checkout = name.partition("@")
    checkout = Path(checkout).resolve() if checkout else HERE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    command = [sys.executable, __file__, "--row", asked, "--device", device]
    pipe = subprocess.PIPE
    return Row(name, subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True))


def run_rows(names: list[str], device: str, seconds: float) -> dict:
    """Start all, then let those that are ready be timed one after the other."""
    until = time.monotonic() + seconds
    share = until - 0.35 * seconds  # the rest is for timing
    threads = max(1, (os.cpu_count() or 1) // (len(names) + 1))
    checking = start(CHECK, device, threads)
    rows = {name: start(name, device, threads) for name in names}
    found: dict = {"rows": {}, "failed": {}}
    told = checking.line("[", share - time.monotonic())
    found["checks"] = json.loads(told) if told else []
    if not told:
        found["failed"][CHECK] = checking.failed()
    ready = {label: row for label, row in rows.items() if row.line(READY, share - time.monotonic())}
    for label in rows.keys() - ready.keys():
        found["failed"][label] = rows[label].failed()
    for label, row in ready.items():
        try:
            row.process.stdin.write("go\n")
            row.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and says why below
        if told := row.line("{", until - time.monotonic()):
            found["rows"][label] = json.loads(told)
            row.process.wait()
        else:
            found["failed"][label] = row.failed()
    return found


def table(found: dict) -> None:
    """What people read."""
    for row in found["checks"]:
        said = "as float64 says" if row["path"] != "bundle" else "as the checkout says"
        print(f"{row['path']:<24} {said if row['good'] else 'WRONG':<22} gradients off by {row['gradients_off']:.1e}")
    for label, row in found["rows"].items():
        top = row["products"]
        held, predicted = (b / 1e9 for b in row["memory"])
        print(f"\n{label}: {row['device']}, products at {top / 1e12:.1f} TFLOP/s, warm-up {row['warm_up_seconds']} s "
              f"beside the others, peak {held:.1f} GB (predicted {predicted:.1f})")  # fmt: skip
        for loops, one in row["loops"].items():
            share, wide = one["flops_per_second"] / top, one["flops_per_second_whole_square"] / top
            print(f"  loops {loops}: {one['tokens_per_second']:>9,} tokens/s, {100 * share:.1f} % of that rate "
                  f"({100 * wide:.1f} % with the whole square); step {one['step_ms'][1]:.1f} ms "
                  f"({one['step_ms'][0]:.1f}-{one['step_ms'][2]:.1f}), an eighth {one['part_ms'][1]:.2f}, launched in "
                  f"{one['launch_ms']:.1f}, update {one['update_ms'][1]:.2f}, first {one['first_ms']:.1f}")  # fmt: skip
            if "kernels_ms" in one:
                print("    " + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in one["kernels_ms"].items()))
    for label, why in found["failed"].items():
        print(f"{label}: no result ({why})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row == CHECK:
        check(arguments.device)
        return 0
    if arguments.row:
        measure(*arguments.row.split(":"), arguments.device)
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: this machine has no CUDA device; nothing was measured.", file=sys.stderr)
        return 2
    found = run_rows(arguments.rows.split(","), arguments.device, arguments.seconds)
    print(json.dumps(found)) if arguments.json else table(found)
    return 0 if found["rows"] and not found["failed"] and all(row["good"] for row in found["checks"]) else 1


if __name__ == "__main__":
    if "--row" not in sys.argv:
        sys.path.insert(0, str(HERE))
    sys.exit(main())
