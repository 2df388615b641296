"""What exit rules trade: bits per byte against mean depth, counted FLOPs and seconds, on prepared text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from golf import charts
from golf.data import Corpus
from golf.depth import Looped, halve, nearest_threshold
from golf.errors import UsageError
from golf.exits import Exits, Rule, run_exits
from golf.pace import layer_flops
from golf.shape import Shape

ROWS = 16  # of a batch
WAYS_TO_READ = {"entropy": 1, "margin": 1, "divergence": 2}  # distributions a rule reads at each position it looks at
ALL = "all loops"


@dataclass(frozen=True)
class Batch:
    """Rows of tokens (B, T), their targets (B, T), and the targets' bytes."""

    inputs: Tensor
    targets: Tensor
    bytes: int


@dataclass(frozen=True)
class Point:
    """A rule at a threshold, over all batches."""

    rule: str
    threshold: float
    mean_depth: float
    bpb: float
    flops: float
    """Multiply-adds x 2 of a token, the rule's own reading and padding included."""
    seconds: float
    tokens_per_second: float
    saved_flops: float = 0.0
    """Share of what all loops take without a rule."""
    saved_seconds: float = 0.0


def batches(looped: Looped, corpus: Corpus, rows: int) -> list[Batch]:
    """The head of a corpus's validation text in rows of the length that the model was trained on. Raises UsageError."""
    corpus.check(looped.table.vocab_size, looped.context)
    tokens = np.concatenate(corpus.shards("val"))[: rows * looped.context + 1].astype(np.int64)
    count = (tokens.size - 1) // looped.context
    if not count:
        raise UsageError(f"--data {corpus.folder}: it is shorter than {looped.context} tokens, give more text.")
    inputs, targets = (
        tokens[at : at + count * looped.context].reshape(count, looped.context) for at in (0, 1)
    )  # fmt: skip
    return [
        Batch(torch.from_numpy(i), torch.from_numpy(t), looped.table.count(i, t))
        for i, t in zip(*(np.split(a, range(ROWS, count, ROWS)) for a in (inputs, targets)), strict=True)
    ]


def scoring_flops(shape: Shape, length: int, positions: int, computed: list[int], rule: str) -> int:
    """Multiply-adds x 2 of scoring `positions` in rows of `length`, when the passes compute so many, under a rule that
    reads. A pass of some positions attends to whole rows behind a mask, one of all to half of them on average."""
    layer = layer_flops(shape, length)
    head = 2 * shape.width * shape.vocab_size
    looks = computed[: shape.loops - 1]
    read = sum(looks[1:] if rule == "divergence" else looks) * WAYS_TO_READ.get(rule, 0) * head
    gate = 2 * shape.width * sum(looks) if shape.exit_gate != "none" else 0
    ends = (shape.prelude + shape.coda) * positions * layer + positions * head
    masked = sum(n for n in computed if n < positions) * 2 * shape.width * length
    return ends + shape.core * (sum(computed) * layer + masked) + read + gate


@torch.no_grad()
def one(looped: Looped, batch: Batch, rule: Rule | None) -> tuple[float, Exits | None, float]:
    """Nats, depths and seconds of scoring a batch; without a rule by the plain path through all loops."""
    began = time.perf_counter()
    found = run_exits(looped.model, batch.inputs, rule) if rule else None
    states = found.states if found else looped.model.hidden(batch.inputs)
    nats = looped.model.head_losses(states, batch.targets)[1].double().sum().item()
    return nats, found, time.perf_counter() - began


def measure(looped: Looped, given: list[Batch], points: list[tuple[str, float]], repeats: int = 1) -> list[Point]:
    """All loops first, then each rule at its threshold, batch by batch in turn, so that a machine that changes its pace
    hits all alike; seconds are the least of `repeats` for each batch."""
    asked = [(ALL, 0.0, None), *((name, at, looped.rule(name, at)) for name, at in points)]
    shape, length = looped.model.shape, looped.context
    nats, depth, flops, seconds = (np.zeros(len(asked)) for _ in range(4))
    count, size = sum(b.inputs.numel() for b in given), sum(b.bytes for b in given)
    one(looped, given[0], None)  # warm
    for batch in given:
        here = batch.inputs.numel()
        for n, (name, _, rule) in enumerate(asked):
            tries = [one(looped, batch, rule) for _ in range(repeats)]
            lost, found, _ = tries[0]
            nats[n] += lost
            depth[n] += found.depths.sum().item() if found else here * shape.loops
            flops[n] += scoring_flops(shape, length, here, found.computed if found else [here] * shape.loops, name)
            seconds[n] += min(took for _, _, took in tries)
    return [
        Point(name, at, depth[n] / count, nats[n] / np.log(2) / size, flops[n] / count, seconds[n], count / seconds[n],
              1 - flops[n] / flops[0], 1 - seconds[n] / seconds[0])
        for n, (name, at, _) in enumerate(asked)
    ]  # fmt: skip


def spread(looped: Looped, given: list[Batch], rules: list[str], count: int) -> list[tuple[str, float]]:
    """Thresholds that spread each rule's mean depth evenly between one pass and all; `fixed` takes each depth."""
    found = []
    for name in rules:
        if name == "fixed":
            found += [(name, float(depth)) for depth in range(1, looped.loops)]
            continue
        looped.rule(name, 0.0)  # refused before any time is spent
        for part in np.linspace(1, looped.loops, count + 2)[1:-1]:
            found.append((name, nearest_threshold(looped, name, part, lambda rule: mean_depth(looped, given, rule))))
    return found


def mean_depth(looped: Looped, given: list[Batch], rule: Rule) -> float:
    """Mean passes of a token under a rule."""
    total = sum(run_exits(looped.model, b.inputs, rule).depths.sum().item() for b in given)
    return total / sum(b.inputs.numel() for b in given)


def cheapest_within(looped: Looped, given: list[Batch], name: str, share: float) -> float:
    """The threshold at which a rule stops as early as it can with bits per byte at most `share` above all loops'."""

    def nats(rule: Rule | None) -> float:
        return sum(one(looped, b, rule)[0] for b in given)

    most = nats(None) * (1 + share)
    return halve(name, lambda threshold: nats(looped.rule(name, threshold)) > most)


def table(points: list[Point]) -> str:
    """Markdown."""
    lines = ["| rule | threshold | loops a token | bpb | MFLOPs a token | fewer | tokens/s | seconds less |",
             "|" + "---|" * 8]  # fmt: skip
    for p in points:
        lines.append(f"| {p.rule} | {p.threshold:.5g} | {p.mean_depth:.3f} | {p.bpb:.4f} | {p.flops / 1e6:.3f} | "
                     f"{p.saved_flops:.1%} | {p.tokens_per_second:,.0f} | {p.saved_seconds:.1%} |")  # fmt: skip
    return "\n".join(lines)


def draw(path: Path, curves: dict[str, list[Point]], apart: dict[str, list[Point]]) -> None:
    """Bits per byte against mean depth: a curve each, and points that no curve joins. Raises UsageError where the
    picture cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for name, points in curves.items():
        points = sorted(points, key=lambda p: p.mean_depth)
        axes.plot([p.mean_depth for p in points], [p.bpb for p in points], marker="o", markersize=4, label=name)
    for name, points in apart.items():
        axes.plot([p.mean_depth for p in points], [p.bpb for p in points], "k*", markersize=9, label=name)
    axes.set_xlabel("loops a token")
    axes.set_ylabel("bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    charts.save_figure(figure, path)
