"""A training step against a plain PyTorch float32 trainer, and against the machine's own rate of matrix products.

    python bench/step_speed.py [--data data/builtin] [--widths 128,192] [--batch-tokens 4096] [--compile auto]
        [--rounds 7] [--json]

For each width, in turn, several rounds, medians compared: the plain trainer, ours in float32 and in the machine's fast
type, optimiser and data included; and a step's matrix products alone, forward and backward, in that type. Ours in the
fast type is compiled as --compile says: by blocks unless asked otherwise, the whole model takes minutes. The plain
trainer steps in a process of its own, whose memory is handled as Python and PyTorch do it by themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from plain_trainer import PlainTrainer

from golf.config import Config
from golf.console import run_script
from golf.data import Corpus, TokenStream, batches
from golf.presets import PRESETS
from golf.recipe import Run
from golf.timing import Stepper


class Ours(Stepper):
    """Steps on real batches, their reading included."""

    def __init__(self, config: Config, stream: TokenStream):
        super().__init__(config)
        recipe = config.recipe
        self.source = batches(stream, recipe.batch_tokens, recipe.sequence_length, recipe.loader)

    def step(self) -> float:
        began = self.machine.now()
        self.take(next(self.source))
        return self.machine.now() - began


class Products:
    """The matrix products of one step and nothing else, in the machine's fast type."""

    def __init__(self, config: Config, dtype: torch.dtype):
        shape, recipe = config.shape, config.recipe
        tokens, length, width = recipe.batch_tokens, recipe.sequence_length, shape.width
        rows = tokens // length
        layers = shape.effective_layers
        made = lambda *dims: torch.randn(*dims).to(dtype)  # noqa: E731
        linear = [
            (width, width + 2 * shape.kv_width), (width, width), (width, shape.mlp_width), (shape.mlp_width, width),
        ] * layers + [(width, shape.vocab_size)]  # fmt: skip
        self.pairs = [(made(tokens, a), made(a, b)) for a, b in linear]
        heads = rows * shape.heads
        for _ in range(layers):  # scores, and values by weights: half of the square is what is looked at
            self.pairs.append((made(heads, length // 2, shape.head_size), made(heads, shape.head_size, length)))
            self.pairs.append((made(heads, length // 2, length), made(heads, length, shape.head_size)))
        self.flops = 3 * sum(2 * a.numel() * b.size(-1) for a, b in self.pairs)

    def step(self) -> float:
        began = time.perf_counter()
        for a, b in self.pairs:
            y = a @ b
            y @ b.mT
            a.mT @ y
        return time.perf_counter() - began


def step_when_asked(end: Connection, config: Config, data: str) -> None:
    """The plain trainer's process: a step and its seconds for every question."""
    trainer = PlainTrainer(config, TokenStream(Corpus(data, "--data").shards("train")))
    while end.recv():
        end.send(trainer.step())


class Plain:
    """The plain trainer, in a process of its own."""

    def __init__(self, config: Config, data: str):
        context = multiprocessing.get_context("spawn")
        self.end, there = context.Pipe()
        self.process = context.Process(target=step_when_asked, args=(there, config, data), daemon=True)
        self.process.start()

    def step(self) -> float:
        self.end.send(True)
        return self.end.recv()

    def close(self) -> None:
        self.end.send(False)
        self.process.join()


def compare(config: Config, data: str, compiled: str, rounds: int) -> dict:
    """Medians of steps in turn. Raises UsageError for data that is not there."""
    stream = TokenStream(Corpus(data, "--data").shards("train"))
    fast, trainer = Ours(replace(config, run=Run(compile=compiled)), stream), Plain(config, data)
    kind = str(fast.machine.dtype)[6:]
    rows = {"plain float32": trainer, f"ours {kind}": fast}
    if kind != "float32":
        rows["ours float32"] = Ours(replace(config, run=Run(dtype="float32")), stream)
    products = rows[f"products {kind}"] = Products(config, fast.machine.dtype)
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 2):
        for name, row in rows.items():
            taken[name].append(row.step())
    trainer.close()
    middle = {name: statistics.median(seconds[2:]) for name, seconds in taken.items()}
    plain, alone, best = middle["plain float32"], middle[f"products {kind}"], middle[f"ours {kind}"]
    tokens = config.recipe.batch_tokens
    return {
        "width": config.shape.width, "tokens_per_second": {n: round(tokens / s) for n, s in middle.items()},
        "over_plain": {n: round(plain / s, 2) for n, s in middle.items()},
        "share_of_products": round(alone / best, 3),
        "products_gflops": round(products.flops / alone / 1e9), "type": kind,
        "compile": fast.machine.compile,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/builtin")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--widths", default="128,192")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step; the preset's unless given")
    parser.add_argument("--compile", default="auto", choices=("auto", "block", "model", "none"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    corpus, preset, found = Corpus(arguments.data, "--data"), PRESETS[arguments.preset], []
    recipe = replace(preset.recipe, batch_tokens=arguments.batch_tokens or preset.recipe.batch_tokens)
    for width in map(int, arguments.widths.split(",")):
        heads = max(1, width // 64)
        shape = replace(
            preset.shape, width=width, heads=heads, kv_heads=1 if heads % 2 else heads // 2,
            vocab_size=corpus.vocab_size,
        )  # fmt: skip
        config = replace(preset, shape=shape, recipe=recipe).check()
        found.append(compare(config, arguments.data, arguments.compile, arguments.rounds))
        torch._dynamo.reset()
    if arguments.json:
        print(json.dumps(found))
        return
    for row in found:
        print(f"width {row['width']}: {100 * row['share_of_products']:.0f} % of the rate of its products alone "
              f"({row['products_gflops']} GFLOP/s in {row['type']}), compile {row['compile']}")  # fmt: skip
        for name, speed in row["tokens_per_second"].items():
            print(f"  {name:<18} {speed:>9,} tokens/s  {row['over_plain'][name]:.2f}x")


if __name__ == "__main__":
    sys.exit(run_script(main))
