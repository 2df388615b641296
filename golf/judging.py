"""The referee's loop and its checks: what is asked of a scorer, what is written down, and what gives a fault away."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from golf.contender import Contender, Invalid, Limits
from golf.rows import Asked, Ledger, Row, chunks, deal
from golf.sheet import Lead, Sheet
from golf.submission import Submission
from golf.validation import Validation

if TYPE_CHECKING:
    from golf.kept_scores import KeptScores

BUFFER_BYTES = 64 << 20  # log-probabilities asked for at a time
SCORED_TOKENS = 32_768  # tokens in a batch of a scorer that gives one number a target
TELL_EVERY = 30.0  # seconds between two lines about a scoring that nobody watches on a terminal
SUMS_TO_ONE = 1e-3  # how far probabilities may sum from 1
SAME = {False: 0.0, True: 1e-4}  # nats by which blind and committed scores may differ; where shapes depend on content
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}  # nats between score() and logprobs()
BATCH_MEAN = {"float32": 1e-5, "bfloat16": 2e-3}  # mean difference, nats, between shapes of a batch
# Nats by which score() may lie above logprobs() on average: rounding takes no side.
LEAD = {"float32": 1e-5, "bfloat16": 3e-4}
PROBE_SHARE, LEAST_PROBES, MOST_PROBES = 0.01, 24, 512
FULL_SHARE = 0.01  # of the rows, asked for in full after score()
FULL_HIDDEN = 16  # of those, and at least a quarter, asked again with another target


@dataclass
class Shown:
    """What a scorer said of a row before it was shown the rest."""

    flip: int
    chosen: np.ndarray  # (flip - first,) log-probabilities of the new targets before the flip
    whole: np.ndarray | None  # (V,) the distribution at the flip, where it was asked in full


class Referee:
    """Asks, commits, reveals. `stock` is text of the referee's own that stands in for what is hidden at the start."""

    def __init__(
        self, submission: Submission, validation: Validation, contender: Contender, sheet: Sheet,
        stock: np.ndarray, official: bool = False, tell: Callable[[int], None] = lambda done: None,
    ):  # fmt: skip
        self.submission, self.validation, self.contender, self.sheet = submission, validation, contender, sheet
        self.tokens, self.stock, self.official, self.tell = validation.tokens, stock, official, tell
        self.rng = np.random.default_rng()  # the system's own entropy: nothing in the folder can know it
        self.full = "score" not in contender.offers
        vocab, context = contender.vocab, submission.context
        self.slots = max(1, (BUFFER_BYTES // (4 * vocab) if self.full else SCORED_TOKENS) // context)
        self.ledger = Ledger(self.tokens.size)
        self.openings = np.flatnonzero(self.tokens == validation.tokenizer.bos)
        self.committed = 0  # tokens before which every target's score stands
        self.waiting: list[Row] = []  # rows that are asked for, from the first that is not committed on
        self.flip_nats: list[float] = []
        self.compared = self.identical = self.distributions = 0
        self.worst = 0.0
        self.lead = Lead()
        self.surplus = Lead()  # of what distributions sum to above 1: each may be off by rounding, not all to one side

    # -- asking --------------------------------------------------------------------------------------------------

    def inputs(self, asked: Asked) -> np.ndarray:
        """A row's tokens and the one after, (T + 1,), int64; after the flip others, out of text that is committed."""
        row = asked.row
        tokens = self.tokens[row.start : row.start + row.length + 1].astype(np.int64)
        if asked.flip >= 0:
            count = row.length - asked.flip
            source = self.tokens[: self.committed] if self.committed > 8 * count else self.stock
            at = int(self.rng.integers(0, max(1, source.size - count)))
            other = np.resize(source[at : at + count], count).astype(np.int64)
            if other[0] == tokens[asked.flip + 1]:
                other[0] = int(self.stock[(at + 1) % self.stock.size])
            tokens[asked.flip + 1 :] = other
        return tokens

    def ask(self, batch: list[Asked], contender: Contender | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities of the shown targets (B, T), and of all pieces (B, T, V) where the scorer gives them."""
        contender = contender or self.contender
        shown = np.stack([self.inputs(asked) for asked in batch])
        contender.share = sum(a.flip >= 0 for a in batch) / len(batch)
        if not self.full:
            return contender.score(shown), None
        given = contender.logprobs(shown[:, :-1])
        return self.chosen(given, shown), given

    def chosen(self, given: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """The log-probabilities (B, T) of the shown targets; every distribution must sum to one."""
        bad = self.unnormalised(given)
        self.distributions += given.shape[0] * given.shape[1]
        self.sheet.see(3, not bad, bad)
        return np.take_along_axis(given, shown[:, 1:, None], axis=-1)[..., 0]

    def unnormalised(self, given: np.ndarray) -> str:
        """What is wrong with distributions (B, T, V), if anything is; what they sum to beyond 1 is added up."""
        flat = given.reshape(-1, given.shape[-1])
        for at in range(0, len(flat), 4096):
            with np.errstate(over="ignore", invalid="ignore"):
                sums = np.exp(flat[at : at + 4096]).sum(axis=-1, dtype=np.float64)
            wrong = ~(np.abs(sums - 1) <= SUMS_TO_ONE)  # also where the sum is not a number
            if wrong.any():
                return f"a distribution sums to {sums[wrong][0]:.4f}, not to 1"
            self.surplus.add(np.log(sums), np.zeros(sums.size))
        return ""

    # -- the pass ------------------------------------------------------------------------------------------------

    def flip_of(self, row: Row) -> int:
        """Where a row's tokens are replaced: at an edge of a document, of the row or of what is new, or anywhere."""
        first, last = row.first, row.length - 1
        edges = np.flatnonzero(self.tokens[row.start + first : row.start + row.length] == self.validation.tokenizer.bos)
        kind = int(self.rng.integers(4))
        if kind == 0 and edges.size:
            at = first + int(self.rng.choice(edges)) - int(self.rng.integers(2))
        else:
            at = {1: first, 2: last - 1}.get(kind, int(self.rng.integers(first, last + 1)))
        return min(max(at, first), last)

    def probes(self, rows: list[Row], share: float) -> dict[Row, int]:
        """Rows that are shown blind first: the first and the last, those at document edges, and others."""
        wanted = min(MOST_PROBES, len(rows), max(math.ceil(share * len(rows)), 1))
        places = {0, len(rows) - 1} if wanted > 2 else set()
        places |= {int(n) for n in self.rng.permutation(len(rows))[: wanted - len(places)]}
        return {rows[n]: self.flip_of(rows[n]) for n in places}

    def stretches(self, kept: KeptScores | None) -> list[list[Row]]:
        """Rows that are committed together: between two calls of adapt, or as many as are kept at a time."""
        found = list(
            chunks(
                self.tokens.size, self.submission.chunk, self.submission.context, self.submission.stride, self.official
            )
        )
        if kept is None or self.submission.adapts:
            return found
        some = max(1, kept.every // (self.submission.stride or self.submission.context))
        return [rows[at : at + some] for rows in found for at in range(0, len(rows), some)]

    def run(self, kept: KeptScores | None = None) -> None:
        """Score the whole stream, or what `kept` lacks of it. Raises Invalid when the scorer fails or leaves its
        limits."""
        stretches = self.stretches(kept)
        total = sum(map(len, stretches))
        share = max(PROBE_SHARE, min(1.0, LEAST_PROBES / max(1, total)))
        probed_chunks = self.rng.random(len(stretches)) < share * total / len(stretches)
        probed_chunks[[0, -1]] = True
        if self.submission.adapts:
            self.contender.reset()
        done = kept.go_on(self, self.contender.limits, stretches) if kept else 0
        for number, rows in enumerate(stretches):
            if number < done:
                if self.submission.adapts:  # it learns again what it knew
                    self.reveal(rows)
                continue
            each = share if len(stretches) == 1 else max(share, 1 / len(rows))
            flips = self.probes(rows, each) if probed_chunks[number] else {}
            self.score_rows(rows, flips)
            self.look_again(rows, bool(flips))
            if self.submission.adapts:
                self.reveal(rows)
            if kept and (self.ledger.count - kept.count >= kept.every or number == len(stretches) - 1):
                kept.stand(self, self.contender.limits, number + 1, [stretches[kept.stretches][0], rows[-1]])
        if 6 not in self.sheet.off:
            wanted = sum(r.length - r.first for rows in stretches for r in rows)
            self.sheet.see(6, self.ledger.count == wanted, f"{self.ledger.count} of {wanted} targets were written")
        self.finish()

    def score_rows(self, rows: list[Row], flips: dict[Row, int]) -> None:
        """Ask for rows and commit them; blind copies first, unless no check wants them."""
        before: dict[Row, Shown] = {}
        self.waiting = rows[::-1]
        if {1, 2} <= self.sheet.off:
            flips = {}
        for batch in deal(rows, flips, self.slots, self.rng):
            scores, whole = self.ask(batch)
            for n, asked in enumerate(batch):
                row = asked.row
                if asked.flip < 0:
                    self.commit(row, scores[n, row.first :])
                    if row in before:
                        self.compare(row, before.pop(row), scores[n], None if whole is None else whole[n])
                elif asked.counts:
                    before[row] = Shown(
                        asked.flip, scores[n, row.first : asked.flip].copy(),
                        None if whole is None else whole[n, asked.flip].copy(),
                    )  # fmt: skip

    def commit(self, row: Row, scores: np.ndarray) -> None:
        if not np.isfinite(scores).all() or scores.max() > SUMS_TO_ONE:
            raise Invalid("the scorer gave a log-probability that is not finite or above 0", 3)
        self.ledger.commit(row, scores)
        while self.waiting and not np.isnan(self.ledger.scores[self.waiting[-1].new.start]):
            self.committed = self.waiting.pop().new.stop
        self.tell(self.ledger.count)

    def compare(self, row: Row, shown: Shown, scores: np.ndarray, whole: np.ndarray | None) -> None:
        """What was committed against what was said when the rest was hidden."""
        far = np.abs(scores[row.first : shown.flip] - shown.chosen).max(initial=0.0)
        self.differ(1, far, f"with other tokens after it, the score of a target in row {row.start} moves")
        self.flip_nats.append(-float(scores[shown.flip]))
        if whole is not None:
            with np.errstate(invalid="ignore"):
                far = float(np.nan_to_num(np.abs(whole[shown.flip] - shown.whole), nan=np.inf, posinf=np.inf).max())
            if np.array_equal(whole[shown.flip], shown.whole, equal_nan=True):
                far = 0.0
            self.differ(2, far, f"with another target, the distribution before it in row {row.start} moves")

    def differ(self, number: int, far: float, what: str) -> None:
        self.compared += 1
        self.identical += far == 0
        self.worst = max(self.worst, float(far))
        self.sheet.see(number, far <= SAME[self.submission.content_shapes], f"{what} by {far:.2e} nats")

    def ask_unseen(self, rows: list[Row], fresh: Contender) -> None:
        """Rows shown without what follows to a process that never saw it: it must give the targets before the flip, and
        the one that is hidden first, what was committed. A scorer that offers score() is asked for distributions: the
        numbers it gives with the targets before its eyes must be in them."""
        check = (1, 2) if self.full else (4, 4)
        slots = max(1, BUFFER_BYTES // (4 * fresh.vocab * self.submission.context))
        agree, lead = AGREE[self.submission.precision], Lead()
        for at in range(0, len(rows), slots):
            batch = [Asked(row, self.flip_of(row)) for row in rows[at : at + slots]]
            shown = np.stack([self.inputs(asked) for asked in batch])
            given = fresh.logprobs(shown[:, :-1])
            chosen = self.chosen(given, shown)
            for n, asked in enumerate(batch):
                row, flip = asked.row, asked.flip
                known = self.ledger.scores[row.new]
                far = np.abs(chosen[n, row.first : flip] - known[: flip - row.first]).max(initial=0.0)
                lead.add(known[: flip - row.first], chosen[n, row.first : flip])
                self.sheet.see(check[0], far <= agree, f"a process that never saw the rest gives targets in row "
                                                       f"{row.start} other scores, by {far:.2e} nats")  # fmt: skip
                off = abs(float(given[n, flip, self.tokens[row.start + flip + 1]] - known[flip - row.first]))
                self.sheet.see(check[1], off <= agree, f"a process that never saw the target at the flip of row "
                                                       f"{row.start} scores it {off:.2e} nats off")  # fmt: skip
        self.no_lead(check[1], lead, "that a process which never saw the rest gives")

    def no_lead(self, number: int, lead: Lead, which: str) -> None:
        """Each score may be off by its precision, but not all to the better side."""
        allowed = LEAD[self.submission.precision]
        self.sheet.see(number, lead.least <= allowed, f"scores lie {lead.mean:.1e} nats a target above the "
                                                      f"distributions {which}, {allowed:g} allowed")  # fmt: skip

    def look_again(self, rows: list[Row], repeat: bool) -> None:
        """After the commit: rows in full where only numbers were given, and a row asked for a second time."""
        if not self.full:
            share = 1.0 if self.submission.record.track == "smoke" else FULL_SHARE
            count = int(self.rng.binomial(len(rows), share)) if share < 1 else len(rows)
            count = max(count, 1) if repeat else count
            picked = [rows[int(n)] for n in self.rng.permutation(len(rows))[:count]]
            hidden = set(picked[: max(FULL_HIDDEN, len(picked) // 4)])
            slots = max(1, BUFFER_BYTES // (4 * self.contender.vocab * self.submission.context))
            for length in sorted({r.length for r in picked}):
                alike = [r for r in picked if r.length == length]
                for at in range(0, len(alike), slots):
                    self.see_in_full(alike[at : at + slots], hidden)
        if repeat and not {5} <= self.sheet.off:
            row = rows[int(self.rng.integers(len(rows)))]
            filler = [Asked(r, self.flip_of(r), False) for r in rows if r.length == row.length and r != row]
            others = [filler[int(n)] for n in self.rng.permutation(len(filler))[: min(self.slots, len(rows)) - 1]]
            self.ask([*others, Asked(row)])  # others between
            scores, _ = self.ask([Asked(row), *others])
            far = np.abs(scores[0, row.first :] - self.ledger.scores[row.new]).max()
            limit = AGREE[self.submission.precision]
            self.sheet.see(5, far <= limit, f"row {row.start} asked again scores up to {far:.2e} nats differently")

    def see_in_full(self, rows: list[Row], hidden: set[Row]) -> None:
        """The distributions of committed rows of one length, and of those in `hidden` with another target."""
        self.contender.share = 1.0
        true = np.stack([self.inputs(Asked(row)) for row in rows])
        given = self.contender.logprobs(true[:, :-1])
        chosen = self.chosen(given, true)
        agree = AGREE[self.submission.precision]
        for n, row in enumerate(rows):
            far = np.abs(chosen[n, row.first :] - self.ledger.scores[row.new]).max()
            self.lead.add(self.ledger.scores[row.new], chosen[n, row.first :])
            self.sheet.see(
                4,
                far <= agree,
                f"score() and logprobs() of row {row.start} differ by {far:.2e} nats, {agree:g} allowed",
            )
        flips = {n: self.flip_of(row) for n, row in enumerate(rows) if row in hidden}
        if not flips:
            return
        others = [Asked(row, flips.get(n, -1)) for n, row in enumerate(rows)]  # alike in shape
        blind = self.contender.logprobs(np.stack([self.inputs(asked) for asked in others])[:, :-1])
        for n, flip in flips.items():
            far = float(np.abs(blind[n, flip] - given[n, flip]).max())
            self.differ(2, far, f"with another target, the distribution before it in row {rows[n].start} moves")

    def reveal(self, rows: list[Row], contender: Contender | None = None, instead: np.ndarray | None = None) -> None:
        """Give a scorer that adapts the targets of rows that are committed, or other tokens in their place."""
        contender, part = contender or self.contender, slice(rows[0].new.start, rows[-1].new.stop)
        contender.share = 0.0
        tokens = self.tokens[part] if instead is None else instead
        documents = np.searchsorted(self.openings, np.arange(part.start, part.stop), side="right")
        contender.adapt(tokens.astype(np.int64), documents.astype(np.int64))

    def finish(self) -> None:
        """Notes, and the one fault that shows only over all rows: worse scores wherever the rest was hidden."""
        kind = "nats at most" if self.worst else "nats"
        if self.compared:
            for number in (1, 2):
                self.sheet.note(
                    number, f"{self.sheet.checks[number].tried} comparisons, {self.identical} of {self.compared} "
                    f"bit-identical, {self.worst:.1e} {kind}",
                )  # fmt: skip
        allowed = LEAD[self.submission.precision]
        over = f"distributions sum to 1 and {self.surplus.mean:.1e} on average, {allowed:g} allowed"
        self.sheet.see(3, self.surplus.least <= allowed, over)
        self.sheet.note(3, f"{self.distributions:,} distributions over {self.contender.vocab:,} pieces")
        self.sheet.note(5, f"{self.sheet.checks[5].tried} rows asked again with others between")
        if self.full:
            self.sheet.see(4, True, "")
            self.sheet.note(4, "scores are read out of the full distributions")
        else:
            self.no_lead(4, self.lead, "asked for after the commit")
            self.sheet.note(4, f"{self.sheet.checks[4].tried - 1} rows asked in full after the commit, "
                               f"{self.lead.mean:.1e} nats a target above them")  # fmt: skip
        mean, variance = self.ledger.moments()
        found = np.array(self.flip_nats)
        if found.size >= LEAST_PROBES:
            spread = math.sqrt(max(variance, found.var()) / found.size)
            z = (found.mean() - mean) / max(spread, 1e-9)
            self.sheet.see(
                1, z < 6, f"targets whose row had been shown blind cost {found.mean():.2f} nats, all {mean:.2f}"
            )


def stock_tokens(validation: Validation) -> np.ndarray:
    """Text of the referee's own, as the submission's tokenizer cuts it."""
    import argparse
    import ast
    import logging

    text = " ".join((module.__doc__ or "") + " ".join((getattr(module, n).__doc__ or "") for n in dir(module))
                    for module in (argparse, ast, logging))  # fmt: skip
    return np.array(validation.tokenizer.encode(text[:20_000]), dtype=np.int64)


def tell_progress(total: int, limits: Limits) -> Callable[[int], None]:
    """Scored tokens and time left: one line that stays in place on a terminal, a line now and then elsewhere."""
    terminal = sys.stderr.isatty()
    start = "\r" if terminal else ""
    told = time.monotonic()
    first: tuple[float, int] | None = None  # when, and how many were done then: a scoring that goes on had some

    def tell(done: int) -> None:
        nonlocal told, first
        first = first or (time.monotonic(), done)
        if done <= first[1] or (not terminal and done < total and time.monotonic() - told < TELL_EVERY):
            return
        told = time.monotonic()
        left = (told - first[0]) / (done - first[1]) * (total - done)
        end = "\n" if done >= total or not terminal else ""
        print(f"{start}scored {done:,} of {total:,} tokens, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return tell
