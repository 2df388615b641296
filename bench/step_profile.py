"""Where the time of a training step goes, by kind of work.

    python bench/step_profile.py [PRESET] [--dtype float32|bfloat16] [--compile none|block] [--json]

Self time of torch's profiler, summed over the processor's threads' leader; five steps after the warm-up, loops on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf.console import run_script
from golf.presets import PRESETS
from golf.recipe import Run
from golf.timing import Stepper

STEPS = 5
KINDS = (
    ("products", ("aten::mm", "aten::addmm", "aten::linear")),
    ("products of batches: attention, Muon", ("aten::bmm",)),
    ("attention, fused", ("aten::_scaled_dot_product",)),
    ("Muon's sums of products", ("aten::baddbmm",)),
    ("compiled element-wise", ("## Call CompiledFxGraph", "CompiledFunction", "Torch-Compiled")),
    ("Adam", ("Optimizer.step", "aten::_fused_adam")),
    ("embedding", ("aten::embedding", "aten::index")),
)


def kind_of(name: str) -> str:
    """The kind of work that an operator's name stands for."""
    return next((kind for kind, starts in KINDS if name.startswith(starts)), "the rest")


def measure(preset: str, dtype: str, mode: str) -> dict:
    """Milliseconds a step by kind, their sum, and the step without a profiler."""
    stepper = Stepper(replace(PRESETS[preset], run=Run(dtype=dtype, compile=mode)))
    for _ in range(3):
        stepper.step()
    began = time.perf_counter()
    for _ in range(STEPS):
        stepper.step()
    alone = (time.perf_counter() - began) / STEPS
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            stepper.step()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e3 / STEPS
    return {
        "preset": preset, "dtype": str(stepper.machine.dtype)[6:], "compile": stepper.machine.compile,
        "milliseconds": {k: round(v, 1) for k, v in sorted(spent.items(), key=lambda kv: -kv[1])},
        "step": round(1e3 * alone, 1), "tokens_per_second": round(PRESETS[preset].recipe.batch_tokens / alone),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", nargs="?", default="laptop")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.preset, arguments.dtype, arguments.compile)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['preset']}, {result['dtype']}, compile {result['compile']}: {result['step']} ms a step")
    total = sum(result["milliseconds"].values())
    for kind, milliseconds in result["milliseconds"].items():
        print(f"  {kind:<38} {milliseconds:8.1f} ms  {100 * milliseconds / total:5.1f} %")


if __name__ == "__main__":
    sys.exit(run_script(main))
