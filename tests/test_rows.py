"""Rows cover every target once, blind copies come first and look like the rest, and the ledger takes nothing twice."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.rows import Asked, Ledger, Row, chunks, deal, plan


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 400), st.integers(2, 50), st.integers(1, 50), st.integers(0, 90), st.booleans())
def test_every_target_is_scored_once_and_in_order(tokens, context, stride, chunk, official):
    stride = min(stride, context)
    rows = [r for part in chunks(tokens, chunk, context, stride, official and not chunk) for r in part]
    found = [t for r in rows for t in range(r.new.start, r.new.stop)]
    last = 1 + (tokens - 1) // context * context if official and not chunk else tokens
    assert found == list(range(1, last))
    for row in rows:
        assert 0 < row.length <= context and row.start >= 0 and row.start + row.length < tokens
        assert row.length - row.first <= max(stride, context if row.start == 0 else stride)
        if stride < context and row.start > 0:
            assert row.length == context  # as much before them as the context holds


def test_disjoint_rows_are_the_trainers():
    rows = plan(1, 1001, 256, 256)
    assert [(r.start, r.length, r.first) for r in rows] == [(0, 256, 0), (256, 256, 0), (512, 256, 0), (768, 232, 0)]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_blind_copies_come_before_in_the_same_slot(tokens, context, slots, seed):
    rng = np.random.default_rng(seed)
    rows = plan(1, tokens, context, context)
    flips = {r: int(rng.integers(r.length)) for r in rows if rng.random() < 0.3}
    batches = list(deal(rows, flips, slots, rng))
    whole = {a.row: (k, n) for k, b in enumerate(batches) for n, a in enumerate(b) if a.flip < 0}
    blind = {a.row: (k, n) for k, b in enumerate(batches) for n, a in enumerate(b) if a.flip >= 0 and a.counts}
    assert set(whole) == set(rows) and sum(a.flip < 0 for b in batches for a in b) == len(rows)
    assert set(blind) == set(flips)
    for row, (k, n) in blind.items():
        assert k < whole[row][0] and n == whole[row][1]
    usual = max(r.length for r in rows)
    assert {len(b) for b in batches if b[0].row.length == usual} == {min(slots, sum(r.length == usual for r in rows))}
    assert all(len({a.row.length for a in b}) == 1 for b in batches)


def test_the_ledger_writes_once_and_sums_in_float64():
    ledger = Ledger(5)
    scores = np.array([-0.1, -0.2], dtype=np.float32)
    ledger.commit(Row(0, 2, 0), scores)
    ledger.commit(Row(0, 4, 2), scores)
    assert ledger.count == 4 and ledger.nats == pytest.approx(
        2 * float(scores.astype(np.float64).sum()) * -1, rel=1e-12
    )
    digest = hashlib.sha256()
    for start, stop in ((1, 3), (3, 5)):
        digest.update(np.array([start, stop], dtype="<i8").tobytes() + scores.tobytes())
    assert ledger.digest.hexdigest() == digest.hexdigest()
    with pytest.raises(AssertionError, match="twice"):
        ledger.commit(Row(0, 4, 2), scores)
    with pytest.raises(AssertionError):
        Ledger(5).commit(Row(0, 2, 0), np.array([np.nan, 0], dtype=np.float32))


def test_filling_rows_are_never_compared():
    rows = plan(1, 109, 9, 9)
    batches = list(deal(rows, {rows[0]: 3}, 4, np.random.default_rng(0)))
    assert any(not a.counts for b in batches for a in b)
    assert isinstance(batches[0][0], Asked)
