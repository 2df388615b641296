"""The packed model as a referee asks for it, and what it may learn from text whose scores stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from golf.codec import load_artifact, read_note
from golf.config import fields_from_dict
from golf.exits import make_rule, run_exits
from golf.machine import keep_memory
from golf.model import RecurrentGPT
from golf.ngrams import RunCache
from golf.recipe import Scoring
from golf.shape import Shape

LOGITS_AT_A_TIME = {"cuda": 1 << 25, "cpu": 1 << 22}  # of which a processor holds several float32 copies
PHASE_ROWS = 8  # rows of a step in a phase over text that has been scored


def packed_model(path: Path) -> RecurrentGPT:
    """The model in an artifact, for use alone. Raises UsageError."""
    keep_memory()
    shape, weights = load_artifact(path)
    model = RecurrentGPT(shape)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return model.eval().requires_grad_(False)


def scoring_of(path: Path) -> Scoring:
    """What an artifact says of how it is to be scored. Raises UsageError."""
    return fields_from_dict(Scoring, read_note(path).get("scoring", {}), "artifact's scoring")


class Adapters:
    """Low-rank additions to the matrices of the blocks that run several times (LoRA, Hu et al. 2021)."""

    def __init__(self, model: RecurrentGPT, rank: int, rate: float):
        self.weights = dict(model.named_parameters())
        self.rank, self.rate = rank, rate
        shape: Shape = model.shape
        core = range(shape.prelude, shape.prelude + shape.core)
        self.names = [n for n, p in self.weights.items() if p.ndim == 2 and n.startswith("blocks.")
                      and int(n.split(".")[1]) in core]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Start again: the additions are zero."""
        generator = torch.Generator().manual_seed(1)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.names:
            rows, columns = self.weights[name].shape
            device = self.weights[name].device
            a = torch.randn(self.rank, columns, generator=generator).to(device) * columns**-0.5
            self.parts[name] = (a.requires_grad_(), torch.zeros(rows, self.rank, device=device, requires_grad=True))
        self.moved = False
        self.optimizer = torch.optim.AdamW(
            [p for pair in self.parts.values() for p in pair], lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0
        )  # fmt: skip

    def added(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with the additions on top."""
        return weights | {name: weights[name] + b @ a for name, (a, b) in self.parts.items()}

    def step(self, loss: Tensor) -> None:
        """One update towards a smaller loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.moved = True


class Scorer:
    """Log-probabilities of every piece after every prefix, under what the artifact says of its scoring."""

    def __init__(self, folder: Path | str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        path = Path(folder) / "model.bin"
        self.model = packed_model(path).to(self.device)
        shape = self.model.shape
        self.scoring = scoring_of(path)
        self.vocab = shape.vocab_size
        exit, threshold = self.scoring.exit, self.scoring.exit_threshold
        self.rule = make_rule(exit, threshold, shape) if exit != "none" else None
        self.runs = RunCache(self.vocab, self.scoring.ngram_order) if self.scoring.ngram_order else None
        if self.scoring.adapts:
            self.adapt, self.reset = self.learn, self.forget  # offered only where it is declared
            self.forget()

    def weights(self) -> dict[str, Tensor]:
        """The model's weights, and all that was learned since."""
        found = dict(self.model.named_parameters())
        for adapters in (self.lasting, self.passing) if self.scoring.adapt_rank else ():
            found = adapters.added(found) if adapters.moved else found
        return found

    def run(self, weights: dict[str, Tensor], tokens: np.ndarray, targets: np.ndarray | None = None) -> Tensor:
        """Logits (B, T, V) float32, or the mean loss when targets are given."""
        if self.rule:
            given = torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
            return self.model.head(run_exits(self.model, given, self.rule, self.dtype).states)
        given = [torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in (tokens, targets) if a is not None]
        return functional_call(
            self.model, weights, tuple(given), {"dtype": self.dtype, "isolate": self.scoring.isolate}
        )  # fmt: skip

    def parts(self, tokens: np.ndarray) -> Iterator[slice]:
        """Rows of tokens (B, T) whose logits are held at a time."""
        rows = max(1, LOGITS_AT_A_TIME[self.device.type] // (self.vocab * tokens.shape[1]))
        return (slice(at, at + rows) for at in range(0, len(tokens), rows))

    @torch.no_grad()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T) int64 -> natural-log probabilities (B, T, V) float32 of the piece after each position."""
        weights, logprobs = self.weights(), np.empty((*tokens.shape, self.vocab), dtype=np.float32)
        for part in self.parts(tokens):
            logprobs[part] = torch.log_softmax(self.run(weights, tokens[part]), dim=-1).cpu().numpy()
        if self.runs:
            below = np.exp(logprobs.astype(np.float64))
            rows = [self.runs.spread(row, p) for row, p in zip(tokens, below, strict=True)]
            logprobs = np.log(np.stack(rows)).astype(np.float32)
        return logprobs

    @torch.no_grad()
    def score(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (B, T + 1) int64 -> (B, T) float32: the log-probability of each but the first."""
        weights, scores = self.weights(), np.empty((len(tokens), tokens.shape[1] - 1), dtype=np.float32)
        for part in self.parts(tokens[:, 1:]):
            logprobs = torch.log_softmax(self.run(weights, tokens[part, :-1]), dim=-1)
            targets = torch.from_numpy(np.ascontiguousarray(tokens[part, 1:, None])).to(self.device)
            scores[part] = logprobs.gather(-1, targets)[..., 0].cpu().numpy()
        if self.runs:
            below = np.exp(scores.astype(np.float64))
            rows = [self.runs.score(row, p) for row, p in zip(tokens, below, strict=True)]
            scores = np.log(np.stack(rows)).astype(np.float32)
        return scores

    def forget(self) -> None:
        """Return to the packed weights, and to no text."""
        if self.runs:
            self.runs.clear()
        if not self.scoring.adapt_rank:
            return
        self.passing = Adapters(self.model, self.scoring.adapt_rank, self.scoring.adapt_rate)
        self.lasting = Adapters(self.model, self.scoring.adapt_rank, self.scoring.phase_rate)
        self.recent = np.zeros(0, dtype=np.int64)
        self.waiting: list[np.ndarray] = []
        self.document = -1

    def learn(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """One step on tokens (N,) whose scores stand, after those before them; their documents' numbers (N,)."""
        if self.runs:
            self.runs.learn(tokens, documents)
        if not self.scoring.adapt_rank:
            return
        if self.scoring.phase_tokens:
            self.waiting.append(tokens)
            if sum(map(len, self.waiting)) >= self.scoring.phase_tokens:
                self.phase()
        if self.scoring.per_document and documents[-1] != self.document:
            if self.passing.moved:
                self.passing.reset()
            tokens, self.recent = tokens[documents == documents[-1]], self.recent[:0]
        self.document = int(documents[-1])
        self.recent = np.concatenate([self.recent, tokens])[-(self.scoring.adapt_context + 1) :]
        if self.recent.size < 2:
            return
        weights = self.passing.added(self.lasting.added(dict(self.model.named_parameters())))
        self.passing.step(self.run(weights, self.recent[None, :-1], self.recent[None, 1:]))

    def phase(self) -> None:
        """One pass over all that was scored since the last one, in rows, for additions that stay."""
        text, self.waiting = np.concatenate(self.waiting), []
        length = self.scoring.adapt_context
        rows = text[: (text.size - 1) // length * length + 1]
        inputs, targets = rows[:-1].reshape(-1, length), rows[1:].reshape(-1, length)
        for at in range(0, len(inputs), PHASE_ROWS):
            weights = self.lasting.added(dict(self.model.named_parameters()))
            self.lasting.step(self.run(weights, inputs[at : at + PHASE_ROWS], targets[at : at + PHASE_ROWS]))
