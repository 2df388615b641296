"""A packed model writes: one new position at a time, each layer's keys and values kept, tokens stopping by a rule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from golf import records
from golf.block import Given
from golf.bpb import ByteTable
from golf.checks import check_exits
from golf.errors import UsageError
from golf.exits import Rule, follow, make_rule, prefix_keys
from golf.halting import EPSILON
from golf.model import RecurrentGPT
from golf.scoring import packed_model, scoring_of

WINDOW = 4  # last pieces that an embedding or a rule may read


def load(folder: Path, exit: str, threshold: float) -> tuple[RecurrentGPT, ByteTable, Rule | None]:
    """The packed model of a run folder, its tokenizer, and the rule named, or for "stored" the artifact's own.

    Raises UsageError for a damaged folder, and for a rule that the model cannot follow.
    """
    model = packed_model(folder / "model.bin")
    shape = model.shape
    if exit == "stored":
        if threshold:
            raise UsageError(f"--threshold {threshold:g}: name a rule with --exit.")
        scoring = scoring_of(folder / "model.bin")
        exit, threshold = scoring.exit, scoring.exit_threshold
    if exit == "none" and shape.exit_gate == "act":
        exit, threshold = "gate", 1 - EPSILON
    rule = make_rule(exit, threshold, shape) if exit != "none" else None
    if rule:
        check_exits(shape)
    table = ByteTable(tokenizer_of(folder))
    if table.vocab_size != shape.vocab_size:
        raise UsageError(f"{folder}: the tokenizer has {table.vocab_size} pieces, the model {shape.vocab_size}.")
    return model, table, rule


def tokenizer_of(folder: Path) -> Path:
    """A run folder's tokenizer; of one that was kept without it, that of the prepared data it was trained on. Raises
    UsageError where neither is its."""
    if (folder / "tokenizer.model").exists():
        return folder / "tokenizer.model"
    record = records.read(folder)
    other = Path("data") / Path(record.corpus).name / "tokenizer.model"
    if not other.exists() or hashlib.sha256(other.read_bytes()).hexdigest() != record.tokenizer_sha256:
        raise UsageError(f"{folder}: it was kept without its tokenizer, copy tokenizer.model of {record.corpus} there.")
    return other


@dataclass(frozen=True)
class Written:
    """A token, and what it took to predict it."""

    token: int
    loops: int
    logprob: float
    """Natural logarithm, before any temperature."""


class Decoder:
    """One row of tokens that grows; what a step gives is what the whole row at once would give at its end."""

    def __init__(self, model: RecurrentGPT, length: int, rule: Rule | None = None, dtype: torch.dtype = torch.float32):
        """`length` is the number of positions that are kept; without a rule every token takes all loops."""
        self.model, self.length, self.rule, self.dtype = model, length, rule, dtype
        self.clear()

    def clear(self) -> None:
        """Forget the row."""
        shape = self.model.shape
        row = torch.zeros(1, self.length, shape.width, dtype=self.dtype)
        layers = len(shape.layers())
        self.kept = [bank for _ in range(layers) for bank in self.model.nothing_kept(row)][:layers]
        first, end = shape.prelude, layers - shape.coda
        self.passes = [self.kept[at : at + shape.core] for at in range(first, end, shape.core)]
        self.row: list[int] = []

    @torch.no_grad()
    def step(self, token: int) -> tuple[Tensor, int]:
        """Put a token at the end -> log-probabilities (V,) float32 of the one after it, and its loops."""
        model, shape, at = self.model, self.model.shape, len(self.row)
        assert at < self.length, "the row is full"
        self.row.append(token)
        near = torch.tensor([self.row[-WINDOW:]])
        given = self.entered(near, at)
        for bank in self.kept:
            bank.at = torch.tensor([[at]])
        if self.rule is None:
            states, loops = model.through(given, kept=self.kept), shape.loops
        else:
            x = model.prelude(given, self.kept[: shape.prelude])
            found = follow(model, given, x, prefix_keys(near)[:, -1:], self.rule, self.passes, start=at)
            loops = int(found.depths)
            for later in self.passes[loops:]:
                for bank, last in zip(later, self.passes[loops - 1], strict=True):
                    bank.keys[:, :, at], bank.values[:, :, at] = last.keys[:, :, at], last.values[:, :, at]
            states = model.coda(found.states, given, self.kept[len(self.kept) - shape.coda :])
        return torch.log_softmax(model.head(states), dim=-1)[0, 0], loops

    def entered(self, near: Tensor, at: int) -> Given:
        """What layers read of the last of some tokens (1, N), which stands at position `at`."""
        given = self.model.enter(near, self.dtype)
        cos, sin = self.model.rotary(self.length, near.device, self.dtype)
        return Given(given.start[:, -1:], cos[at : at + 1], sin[at : at + 1])


def write(decoder: Decoder, prompt: list[int], count: int, temperature: float, seed: int) -> Iterator[Written]:
    """The tokens of `prompt` but its first, BOS, and then up to `count` more, drawn until BOS comes again.

    A full row goes on from its last half. At temperature 0 the likeliest token is taken. Raises UsageError for
    log-probabilities that are not numbers.
    """
    generator, bos = np.random.default_rng(seed), prompt[0]
    token = bos
    for written in range(len(prompt) - 1 + count):
        if len(decoder.row) == decoder.length:
            tail = decoder.row[-(decoder.length // 2) :]
            decoder.clear()
            for old in tail:
                decoder.step(old)
        logprobs, loops = decoder.step(token)
        if not torch.isfinite(logprobs).all():
            raise UsageError("The model's log-probabilities are not numbers.")
        if written < len(prompt) - 1:
            token = prompt[written + 1]
        elif temperature == 0:
            token = int(logprobs.argmax())
        else:
            weight = (logprobs.double() / temperature).softmax(dim=-1).numpy()
            token = int(generator.choice(weight.size, p=weight))
        if token == bos:
            return
        yield Written(token, loops, float(logprobs[token]))
