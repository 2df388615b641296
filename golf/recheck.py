"""Checks that want a scorer which has seen nothing: the same submission once more, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from golf.contender import Contender, Limits
from golf.judging import AGREE, BATCH_MEAN, SAME, Referee
from golf.rows import Asked, Row, chunks

RELOAD = 1e-6  # relative, between the recorded score and a fresh process's
FRESH_ROWS, AT_A_TIME = 12, 4
UNSEEN_ROWS = 64  # shown without what follows: of a scorer that looks ahead in a tenth of the rows one in 850 gets by
LATER = 3  # stretches, drawn at random and one of them from the last quarter, up to which it learns again
AGAIN_SECONDS = 60.0  # that learning again may take beyond twice the seconds of scoring


def fresh_process(referee: Referee, folder: Path, limits: Limits, hidden: Path | None) -> str:
    """Checks that want a process which has seen nothing: reload, batch shapes, and what adaptation may touch. Returns
    how far scores depend on the document before."""
    sheet, submission = referee.sheet, referee.submission
    ledger, rng = referee.ledger, referee.rng
    shut_in = 11 not in sheet.off
    with Contender(folder, referee.validation.tokenizer.shown, limits, hidden, True, shut_in) as fresh:
        if fresh.vocab != referee.contender.vocab or fresh.offers != referee.contender.offers:
            sheet.see(16, False, "a second process offers something else than the first")
            return "not run"
        stretches = list(
            chunks(referee.tokens.size, submission.chunk, submission.context, submission.stride, referee.official)
        )
        sample = stretches[0] if submission.adapts else [r for rows in stretches for r in rows]
        usual = max(r.length for r in sample)
        rows = [r for r in sample if r.length == usual]
        slots = min(referee.slots, len(rows))
        unseen = [rows[int(n)] for n in rng.permutation(len(rows))[:UNSEEN_ROWS]]
        picked = unseen[:FRESH_ROWS]
        if submission.adapts:
            fresh.reset()
        precise = SAME[submission.content_shapes]
        size = min(AT_A_TIME, slots)
        groups = [picked[at : at + size] for at in range(0, len(picked), size)]
        referee.ask_unseen(unseen, fresh)  # first: nothing of these rows but their beginnings has been shown here
        nats = recorded = worst = 0.0
        for group in groups:
            scores, _ = referee.ask(fill(referee, rows, slots, [Asked(row) for row in group]), fresh)
            for n, row in enumerate(group):
                given, known = scores[n, row.first :], ledger.scores[row.new]
                nats += float(given.sum(dtype=np.float64))
                recorded += float(known.sum(dtype=np.float64))
                worst = max(worst, float(np.abs(given - known).max()))
                alone, _ = referee.ask([Asked(row)], fresh)
                mean = float(np.abs(alone[0, row.first :] - given).mean())
                most = BATCH_MEAN[submission.precision]
                sheet.see(14, mean <= most, f"row {row.start} alone scores {mean:.1e} nats differently on average")
        off = abs(nats - recorded) / max(abs(recorded), 1e-9)
        sheet.see(16, off <= max(RELOAD, precise), f"a fresh process scores {len(picked)} rows {off:.1e} differently")
        sheet.note(16, f"{len(picked)} rows, relative difference {off:.1e}")
        sheet.note(14, f"{len(picked)} rows alone and among {slots}")
        found = independence(referee, fresh, rows)
        if submission.adapts:
            adapted_only_later(referee, fresh, stretches)
        else:
            limit = AGREE[submission.precision]
            sheet.see(
                15, worst <= limit, f"asked first thing in a fresh process, targets score up to {worst:.1e} nats off"
            )
            sheet.note(15, f"it never adapts: {len(picked)} rows asked first thing, {worst:.1e} nats at most")
    return found


def independence(referee: Referee, fresh: Contender, rows: list[Row]) -> str:
    """How far scores move when the document before theirs in a row is another one. No rule asks for it."""
    bos, moved, count = referee.validation.tokenizer.bos, [], 0
    for row in rows:
        shown = referee.inputs(Asked(row))[None]
        inside = np.flatnonzero(shown[0, 1:-1] == bos) + 1
        if not inside.size or count == FRESH_ROWS:
            continue
        at = int(inside[-1])
        other = shown.copy()
        other[0, :at] = np.resize(referee.stock, at)
        both = np.concatenate([shown, other])
        if "score" in fresh.offers:
            scores = fresh.score(both)
        else:
            given = fresh.logprobs(both[:, :-1])
            scores = np.take_along_axis(given, both[:, 1:, None], axis=-1)[..., 0]
        moved.append(np.abs(scores[0, at:] - scores[1, at:]).mean())
        count += 1
    if not moved:
        return "no row holds the start of a document"
    return f"{np.mean(moved):.1e} nats a target on average in {count} rows, {max(moved):.1e} in the worst"


def fill(referee: Referee, rows: list[Row], slots: int, asked: list[Asked]) -> list[Asked]:
    """A batch of the usual shape with these rows in front."""
    others = [rows[int(n)] for n in referee.rng.integers(len(rows), size=slots - len(asked))]
    return [*asked, *(Asked(other, referee.flip_of(other), False) for other in others)]


def adapted_only_later(referee: Referee, fresh: Contender, stretches: list[list[Row]]) -> None:
    """Random tokens in place of the true ones may change later scores only, and reset() forgets them."""
    sheet, ledger = referee.sheet, referee.ledger
    first, later = stretches[0], stretches[1] if len(stretches) > 1 else []

    def difference(rows: list[Row]) -> float:
        found = 0.0
        for row in rows[:FRESH_ROWS]:
            scores, _ = referee.ask([Asked(row)], fresh)
            found = max(found, float(np.abs(scores[0, row.first :] - ledger.scores[row.new]).max()))
        return found

    noise = referee.rng.choice(referee.stock, first[-1].new.stop - first[0].new.start)
    limit = AGREE[referee.submission.precision]
    later_unseen(referee, fresh, stretches)
    fresh.reset()
    before = difference(first)
    referee.reveal(first, fresh, noise)
    moved = difference(later)
    fresh.reset()
    again = difference(first)
    referee.reveal(first, fresh)
    same = difference(later)
    sheet.see(5, before <= limit, f"the first rows score {before:.1e} nats off in a fresh process")
    sheet.see(5, again <= limit, f"after reset() the first rows score {again:.1e} nats off")
    sheet.see(16, same <= limit, f"adapted again in a fresh process, later rows score {same:.1e} nats off")
    sheet.note(5, f"adapting to other tokens moves later scores by up to {moved:.2f} nats and no earlier one")


def later_unseen(referee: Referee, fresh: Contender, stretches: list[list[Row]]) -> None:
    """A scorer that learns again, and at stretches drawn at random is asked for rows that it never saw: one may be
    honest at first and look ahead later. Its seconds are beside those of the probes, which it could have used up."""
    count, limits = len(stretches), fresh.limits
    if count < 2:
        return
    late = int(referee.rng.integers(max(1, count - -(-count // 4)), count))
    others = [n for n in referee.rng.permutation(np.arange(1, count)).tolist() if n != late][: LATER - 1]
    asked = sorted((late, *others))
    limits.probe_seconds += 2 * limits.scoring + AGAIN_SECONDS
    fresh.reset()
    for number, stretch in enumerate(stretches[: asked[-1] + 1]):
        if number in asked:
            usual = max(r.length for r in stretch)
            rows = [r for r in stretch if r.length == usual]
            referee.ask_unseen([rows[int(n)] for n in referee.rng.permutation(len(rows))[:UNSEEN_ROWS]], fresh)
        referee.reveal(stretch, fresh)
    told = ", ".join(map(str, asked))
    referee.sheet.note(1, f"asked blind in a fresh process that had learned {told} of {count} stretches")
