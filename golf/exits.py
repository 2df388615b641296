"""Scoring in which each token stops at a pass of its own, and the computation after it is left out.

A token that has stopped keeps its last state, and in every block the keys and values of its last pass, which others go
on to see. Only the states that still run are gathered, padded to few sizes, and computed; what a token does depends on
nothing after it and on no other row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from golf.block import Given, Kept, gathered
from golf.checks import check_exits, check_threshold
from golf.errors import UsageError
from golf.halting import SLACK
from golf.model import RecurrentGPT
from golf.shape import Shape

SIZES = 8  # of the number of running positions in a row, as parts of its length


@dataclass
class Look:
    """What a rule may read after a pass, of the positions that run: all of it is of the position or before it."""

    passed: int
    place: Tensor  # (B, N) int64, the positions
    state: Tensor  # (B, N, D) after the pass
    before: Tensor  # (B, N, D) as the pass read it
    read: Callable[[Tensor], Tensor]
    """States (B, N, D) -> log-probabilities (B, N, V) float32."""
    keys: Tensor  # (B, N) int64, a hash of the positions' last pieces
    spent: Tensor  # (B, N) what the gate's exits sum to; zero without one


@dataclass(frozen=True)
class FixedDepth:
    """Everyone stops after `depth` passes."""

    depth: int

    def stops(self, look: Look) -> Tensor:
        return torch.full(look.state.shape[:2], look.passed >= self.depth, device=look.state.device)


@dataclass(frozen=True)
class Assigned:
    """Each position stops after the pass that `depths` (B, T) int64 names: another model's, or a control's."""

    depths: Tensor

    def stops(self, look: Look) -> Tensor:
        return self.depths.gather(1, look.place) <= look.passed


@dataclass(frozen=True)
class RandomDepth:
    """Stop after each pass with a chance of `threshold`, by a hash of the last pieces: the bar for any gate."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        mixed = look.keys + look.passed * 0x27D4EB2F
        for factor in (0x2C1B3C6D, 0x297A2D39):  # as integers are commonly hashed
            mixed = ((mixed ^ (mixed >> 15)) * factor).remainder(1 << 31)
        return (mixed ^ (mixed >> 15)).remainder(1 << 20) < self.threshold * (1 << 20)


@dataclass(frozen=True)
class Entropy:
    """Stop where the distribution's entropy is at most `threshold` nats."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        logprobs = look.read(look.state)
        return -(logprobs.exp() * logprobs).sum(dim=-1) <= self.threshold


@dataclass(frozen=True)
class Margin:
    """Stop where the two likeliest pieces are at least `threshold` apart in probability."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        first, second = look.read(look.state).exp().topk(2, dim=-1).values.unbind(dim=-1)
        return first - second >= self.threshold


@dataclass(frozen=True)
class Divergence:
    """Stop where the pass moved the distribution by at most `threshold` nats (KL of the new one from the old)."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        if look.passed == 1:  # nothing to compare with
            return torch.zeros(look.state.shape[:2], dtype=torch.bool, device=look.state.device)
        new, old = look.read(look.state), look.read(look.before)
        return (new.exp() * (new - old)).sum(dim=-1) <= self.threshold


@dataclass(frozen=True)
class Difference:
    """Stop where the pass moved the state by at most `threshold` of its norm."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        moved = (look.state - look.before).float().norm(dim=-1)
        return moved <= self.threshold * look.state.float().norm(dim=-1)


@dataclass(frozen=True)
class Gate:
    """Stop where the model's own exits have summed to `threshold` (PALBERT's Q-exit; ACT's 1 - epsilon)."""

    threshold: float

    def stops(self, look: Look) -> Tensor:
        return look.spent >= self.threshold - SLACK


Rule = FixedDepth | Assigned | RandomDepth | Entropy | Margin | Divergence | Difference | Gate
RULES = {
    "fixed": FixedDepth, "random": RandomDepth, "entropy": Entropy, "margin": Margin, "divergence": Divergence,
    "difference": Difference, "gate": Gate,
}  # fmt: skip


def make_rule(name: str, threshold: float, shape: Shape) -> Rule:
    """A rule by name. Raises UsageError for a name or threshold that is none, or that a shape cannot follow."""
    if name not in RULES:
        known = ", ".join(RULES)
        raise UsageError(f"--exit {name:.60}: give one of {known}.")
    check_threshold(name, threshold, shape)
    return FixedDepth(int(threshold)) if name == "fixed" else RULES[name](threshold)


def prefix_keys(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T) int64: a number for the last four pieces at each position."""
    padded = F.pad(tokens, (3, 0))
    length = tokens.size(1)
    factors = (1, 31_337, 7_919, 104_729)
    return sum(padded[:, 3 - back : 3 - back + length] * factor for back, factor in enumerate(factors))


@dataclass
class Exits:
    """States and depths of one batch."""

    states: Tensor  # (B, T, D); of run_exits the normalised final ones
    depths: Tensor  # (B, T) int64 passes of each token
    computed: list[int]
    """Positions that each pass computed, padding included."""


@dataclass(frozen=True)
class Chosen:
    """What a pass computes: some positions of each row, or all."""

    place: Tensor | None  # (B, N) int64; None is all in order
    moves: Tensor | None  # (B, N) bool, which of them run; None is all

    def of(self, x: Tensor) -> Tensor:
        """x (B, T) or (B, T, D) at those positions."""
        if self.place is None:
            return x
        return gathered(x, self.place) if x.ndim == 3 else x.gather(1, self.place)

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` where it runs."""
        wide = (lambda t: t[..., None].expand_as(new)) if x.ndim == 3 else lambda t: t
        if self.moves is not None:
            new = torch.where(wide(self.moves), new, self.of(x))
        return new if self.place is None else x.scatter(1, wide(self.place), new)


def choose(running: Tensor, gather: bool) -> Chosen:
    """running (B, T) bool -> the positions to compute: as many in each row, one of SIZES parts of T, or all.

    A row with fewer running positions repeats its last one; one with none holds position 0, which does not run.
    """
    length, counts = running.size(1), running.sum(dim=1)
    part = math.ceil(length / SIZES)
    size = min(length, part * max(1, math.ceil(int(counts.max()) / part)))
    if size == length or not gather:
        return Chosen(None, None if bool(running.all()) else running)
    order = torch.argsort(running.int(), dim=1, descending=True, stable=True)
    place = torch.arange(size, device=running.device).expand(len(running), -1)
    place = order.gather(1, torch.minimum(place, (counts - 1).clamp_min(0)[:, None]))
    if bool(counts.all()):
        return Chosen(place, None)
    moves = (counts > 0)[:, None].expand(-1, size)
    return Chosen(torch.where(moves, place, 0), moves)


@torch.no_grad()
def run_exits(
    model: RecurrentGPT, tokens: Tensor, rule: Rule, dtype: torch.dtype = torch.float32, gather: bool = True
) -> Exits:
    """tokens (B, T) int64 -> states and depths under `rule`; with `gather` only what runs is computed, else all of it,
    to the same end."""
    check_exits(model.shape)
    given = model.enter(tokens, dtype)
    x = model.prelude(given)
    kept = model.nothing_kept(x)  # of one pass after the other: who has stopped stays in it as it was
    found = follow(model, given, x, prefix_keys(tokens), rule, [kept] * model.shape.loops, gather)
    return replace(found, states=model.coda(found.states, given))


def follow(
    model: RecurrentGPT, given: Given, x: Tensor, keys: Tensor, rule: Rule, kept: list[list[Kept]], gather: bool = True,
    start: int = 0,
) -> Exits:  # fmt: skip
    """The passes over states x (B, T, D) at positions from `start` on, with the core's keys and values at each pass:
    the states that the coda reads, and depths."""
    shape, everywhere = model.shape, torch.arange(x.size(1), device=x.device).expand(len(x), -1)
    whole = kept[0][0].keys.size(2) == x.size(1)
    running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    depths, computed = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device), []
    spent = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    mixed = torch.zeros_like(x)  # of an ACT model
    read = lambda states: F.log_softmax(model.head(F.rms_norm(states, (shape.width,))), dim=-1)  # noqa: E731
    for passed in range(1, shape.loops + 1):
        chosen = choose(running, gather)
        place = everywhere if chosen.place is None else chosen.place
        for bank in kept[passed - 1]:
            bank.at, bank.moves = None if whole and chosen.place is None else place + start, chosen.moves
        before = chosen.of(x)
        part = model.core_pass(before, given if chosen.place is None else given.at(place), passed, kept[passed - 1])
        computed.append(place.numel())
        x = chosen.put(x, part)
        depths += running
        if passed == shape.loops:
            break
        look = Look(passed, place, part, before, read, chosen.of(keys), chosen.of(spent))
        if shape.exit_gate != "none":
            stop, left = torch.sigmoid(model.gate(part, passed)), 1 - look.spent
            look.spent = look.spent + stop * (left if shape.exit_gate == "hazard" else 1)
        still = ~rule.stops(look)
        if shape.exit_gate == "act":
            share = torch.where(still, stop, left)[..., None].to(x.dtype)
            mixed = chosen.put(mixed, chosen.of(mixed) + share * part)
        spent = chosen.put(spent, look.spent)
        running = chosen.put(running, still)
        if not running.any():
            break
    if shape.exit_gate == "act":
        x = mixed + torch.where(running, 1 - spent, 0.0)[..., None].to(x.dtype) * x
    return Exits(x, depths, computed)
