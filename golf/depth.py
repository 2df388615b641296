"""How deep a packed model goes on each token of given documents, and what each pass is worth there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from golf.bpb import ByteTable
from golf.checks import check_exits
from golf.decode import tokenizer_of
from golf.errors import UsageError
from golf.exits import Rule, make_rule, run_exits
from golf.map_page import Spot
from golf.model import RecurrentGPT
from golf.scoring import packed_model
from golf.sources import Document
from golf.texts import Tokens
from golf.token_classes import kinds

LENGTH = 256  # tokens of a document that are looked at
ROWS = 16  # documents at a time
CODE_TOPICS = {"code", "program", "programs", "programming", "python", "source code"}  # whose words are identifiers


@dataclass
class Looped:
    """A packed looped model, its tokenizer, and the tokens that it was trained to see at a time."""

    model: RecurrentGPT
    table: ByteTable
    context: int
    name: str

    @property
    def loops(self) -> int:
        return self.model.shape.loops

    def rule(self, name: str, threshold: float) -> Rule:
        """An exit rule that this model can follow. Raises UsageError."""
        return make_rule(name, threshold, self.model.shape)


def load(folder: Path) -> Looped:
    """The packed model in a run folder. Raises UsageError for one whose tokens cannot stop."""
    from golf import records

    record = records.read(folder)
    if (transform := record.tokenizer.get("transform", "none")) != "none":
        raise UsageError(f"{folder}: its text was prepared with --transform {transform}, name a run without.")
    model = packed_model(folder / "model.bin")
    try:
        check_exits(model.shape)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    return Looped(model, ByteTable(tokenizer_of(folder)), max(record.context, 2), folder.name)


def load_all(folders: tuple[str, ...]) -> list[Looped]:
    """The looped models of run folders, each with a name of its own. Raises UsageError."""
    found = [load(Path(folder)) for folder in folders]
    if len({looped.name for looped in found}) < len(found):
        for looped, folder in zip(found, folders, strict=True):
            looped.name = folder.strip("/")
    if len({looped.name for looped in found}) < len(found):
        raise UsageError("A run folder is named twice, name each once.")
    return found


@dataclass
class Rows:
    """Documents as padded rows of tokens, and how many tokens of each are predicted."""

    inputs: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64
    counts: np.ndarray  # (B,) int64
    first: int
    """Number of the first document."""

    def inside(self) -> np.ndarray:
        """(B, T) bool: what is no padding."""
        return np.arange(self.inputs.shape[1]) < self.counts[:, None]


Encode = Callable[[str], list[int]]


def rows_of(looped: Looped, texts: list[Document], encode: Encode | None = None) -> Iterator[Rows]:
    """The heads of documents, some at a time, each in a row of its own after BOS. Raises UsageError."""
    encode = encode or looped.table.encode
    length = min(LENGTH, looped.context)
    for start in range(0, len(texts), ROWS):
        tokens = [encode(t.text[: 16 * length])[:length] for t in texts[start : start + ROWS]]
        for number, row in enumerate(tokens, start):
            if not row or looped.table.unknown in row:
                raise UsageError(f"Document {number + 1} ({texts[number].topic}) does not tokenise without a loss.")
        width = max(map(len, tokens))
        padded = np.array([[looped.table.bos, *row, *[0] * (width - len(row))] for row in tokens], dtype=np.int64)
        yield Rows(padded[:, :-1], padded[:, 1:], np.array([len(row) for row in tokens]), start)


@torch.no_grad()
def nats(looped: Looped, states: Tensor, targets: np.ndarray) -> np.ndarray:
    """Final states (B, T, D), targets (B, T) -> (B, T) float32."""
    return looped.model.head_losses(states, torch.from_numpy(targets))[1].numpy()


@torch.no_grad()
def after_each_pass(looped: Looped, inputs: np.ndarray) -> Iterator[Tensor]:
    """inputs (B, T) -> final states (B, T, D) when everyone stops after each pass."""
    tokens = torch.from_numpy(inputs)
    if looped.model.shape.exit_gate == "act":
        yield from (looped.model.hidden(tokens, loops=n) for n in range(1, looped.loops + 1))
    else:
        yield from looped.model.each(tokens)[1]


def stopped(looped: Looped, rows: Rows, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Depths and nats (B, T) under a rule, keys and values of stopped tokens frozen."""
    found = run_exits(looped.model, torch.from_numpy(rows.inputs), rule)
    return found.depths.numpy(), nats(looped, found.states, rows.targets)


def measure(looped: Looped, texts: list[Document], rule: Rule, encode: Encode | None = None) -> Tokens:
    """All columns for the heads of documents."""
    topics, sources = (tuple(dict.fromkeys(getattr(t, part) for t in texts)) for part in ("topic", "source"))
    parts: list[dict[str, np.ndarray]] = []
    for rows in rows_of(looped, texts, encode):
        inside = rows.inside()
        depth, loss = stopped(looped, rows, rule)
        losses, entropy = [], np.zeros(0)
        for states in after_each_pass(looped, rows.inputs):
            losses.append(nats(looped, states, rows.targets))
            if len(losses) == 1:
                logprobs = F.log_softmax(looped.model.head(states), dim=-1)
                entropy = -(logprobs.exp() * logprobs).sum(dim=-1).numpy()
        numbers = np.arange(rows.first, rows.first + len(rows.inputs))
        shape = inside.shape
        told = [kinds_of(looped, rows.targets[i, :n], texts[numbers[i]].topic) for i, n in enumerate(rows.counts)]
        kind, fragment, opens = (np.concatenate(part) for part in zip(*told, strict=True))
        begins = np.concatenate([np.arange(n) == 0 for n in rows.counts])
        columns = {
            "document": np.broadcast_to(numbers[:, None], shape),
            "position": np.broadcast_to(np.arange(shape[1]), shape),
            "topic": np.broadcast_to([[topics.index(texts[n].topic)] for n in numbers], shape),
            "source": np.broadcast_to([[sources.index(texts[n].source)] for n in numbers], shape),
            "here": rows.inputs, "target": rows.targets, "bytes": looped.table.sizes(rows.inputs, rows.targets),
            "depth": depth, "loss": loss, "entropy": entropy,
        }  # fmt: skip
        part = {name: values[inside] for name, values in columns.items()}
        part["losses"] = np.stack([one[inside] for one in losses], axis=1)
        part |= {"kind": kind, "opens": opens, "kind_here": np.where(begins, -1, np.roll(kind, 1)),
                 "fragment": np.where(begins, 0, np.roll(fragment, 1))}  # fmt: skip
        parts.append(part)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Tokens(**whole, topics=topics, sources=sources)


def kinds_of(looped: Looped, tokens: np.ndarray, topic: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, fragment and sentence start of each token of a document."""
    found = kinds([looped.table.text[t] for t in tokens], topic.lower() in CODE_TOPICS)
    return found.label, found.fragment, found.opens


def spots(looped: Looped, text: str, rule: Rule) -> list[Spot]:
    """Every token of a text for the map, in rows of the length that the model was trained on. Raises UsageError."""
    tokens, found = looped.table.encode(text), []
    if looped.table.unknown in tokens:
        raise UsageError("The text does not tokenise without a loss.")
    for start in range(0, len(tokens), looped.context):
        row = [looped.table.bos, *tokens[start : start + looped.context]]
        rows = Rows(np.array([row[:-1]]), np.array([row[1:]]), np.array([len(row) - 1]), 0)
        whole = run_exits(looped.model, torch.tensor([row]), rule)  # at the last token too, which predicts nothing here
        at = whole.depths[0].tolist()
        top = F.softmax(looped.model.head(whole.states[0]), dim=-1).amax(dim=-1).tolist()
        with torch.no_grad():
            before = looped.model.through(looped.model.enter(torch.from_numpy(rows.inputs), torch.float32), 0)
        passes = [before, *after_each_pass(looped, rows.inputs)]
        losses = np.stack([nats(looped, s, rows.targets)[0] for s in passes], axis=1)
        lost = nats(looped, whole.states[:, :-1], rows.targets)[0]
        for n, token in enumerate(row[1:]):
            shown = looped.table.text[token].decode(errors="replace")
            found.append(Spot(shown, at[n + 1], at[n], tuple(map(float, losses[n])), float(lost[n]), top[n]))
    return found


def mean_depth(looped: Looped, texts: list[Document], rule: Rule) -> float:
    """Mean passes of a token."""
    total = count = 0
    for rows in rows_of(looped, texts):
        inside = rows.inside()
        total += int(stopped(looped, rows, rule)[0][inside].sum())
        count += int(inside.sum())
    return total / count


RANGES = {"random": (0.0, 1.0), "margin": (0.0, 1.0), "gate": (0.0, 1.0), "entropy": (0.0, 12.0),
          "divergence": (0.0, 5.0), "difference": (0.0, 2.0)}  # fmt: skip
DEEPER_WITH_MORE = {"margin", "gate"}  # rules that go on for longer the higher their threshold


def threshold_for(looped: Looped, texts: list[Document], name: str, depth: float) -> float:
    """The threshold at which a rule's mean depth is nearest to `depth` on these documents. Raises UsageError."""
    return nearest_threshold(looped, name, depth, lambda rule: mean_depth(looped, texts, rule))


def nearest_threshold(looped: Looped, name: str, depth: float, depth_under: Callable[[Rule], float]) -> float:
    """The threshold under whose rule `depth_under` is nearest to `depth`, by halving. Raises UsageError."""
    if name not in RANGES:
        raise UsageError(f"--exit {name}: give one of {', '.join(RANGES)}, or a --threshold.")
    if not 1 <= depth <= looped.loops:
        raise UsageError(f"--mean-depth {depth:g}: give 1 to {looped.loops} passes.")
    tried: dict[float, float] = {}

    def too_shallow(threshold: float) -> bool:
        tried[threshold] = found = depth_under(looped.rule(name, threshold))
        return found < depth

    halve(name, too_shallow)
    return min(tried, key=lambda t: abs(tried[t] - depth))


def halve(name: str, too_shallow: Callable[[float], bool]) -> float:
    """The threshold of a rule beside which it is too shallow on one side and not on the other: the deep side's."""
    low, high = RANGES[name]
    for _ in range(12):
        middle = (low + high) / 2
        if too_shallow(middle) == (name in DEEPER_WITH_MORE):
            low = middle
        else:
            high = middle
    return high if name in DEEPER_WITH_MORE else low
