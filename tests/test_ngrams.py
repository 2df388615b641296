"""Counts of runs against a naive reference, and that what they make is a distribution that knows nothing to come."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.ngrams import DISCOUNT, STEPS, RunCache
from golf.shape import BOS

VOCAB = 12
pieces = st.lists(st.integers(2, VOCAB - 1), min_size=0, max_size=12)
texts = st.lists(pieces, min_size=1, max_size=5).map(lambda parts: [[BOS, *part] for part in parts])


def learned(documents: list[list[int]], order: int, cut: int) -> RunCache:
    """A cache that was told of the documents `cut` pieces at a time."""
    cache = RunCache(VOCAB, order)
    tokens = np.array([t for d in documents for t in d])
    numbers = np.array([n for n, d in enumerate(documents) for _ in d])
    for at in range(0, len(tokens), cut):
        cache.learn(tokens[at : at + cut], numbers[at : at + cut])
    return cache


def naive(documents: list[list[int]], order: int, row: list[int], below: np.ndarray) -> np.ndarray:
    """The distribution after `row`, which goes on with the last document, from the definition."""
    p = below.copy()
    for here, length, weight in STEPS:
        if length > order or len(row) < length:
            continue
        followed = Counter(
            document[at + length]
            for document in (documents[-1:] if here else documents[:-1])
            for at in range(len(document) - length)
            if document[at : at + length] == row[len(row) - length :]
        )
        if followed:
            p = np.array([
                (max(followed[w] - DISCOUNT, 0) + (weight + DISCOUNT * len(followed)) * p[w])
                / (sum(followed.values()) + weight)
                for w in range(VOCAB)
            ])  # fmt: skip
    return p


@settings(deadline=None, max_examples=60)
@given(texts, st.integers(1, 3), st.integers(1, 7), st.integers(0, 10**6))
def test_distributions_are_those_of_the_definition(documents, order, cut, seed):
    cache = learned(documents, order, cut)
    row = np.array(documents[-1])
    below = np.random.default_rng(seed).dirichlet(np.ones(VOCAB), row.size)
    found = cache.spread(row, below)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[-1], naive(documents, order, list(row), below[-1]))
    after = np.random.default_rng(seed + 1).integers(2, VOCAB)
    whole = np.append(row, after)
    scores = cache.score(whole, below[np.arange(row.size), whole[1:]])
    np.testing.assert_array_equal(scores, found[np.arange(row.size), whole[1:]])


def test_a_position_knows_nothing_of_what_follows():
    rng = np.random.default_rng(0)
    documents = [[BOS, *rng.integers(2, 5, 30)] for _ in range(4)]
    cache, row = learned(documents, 3, 8), np.array([*documents[-1], BOS, *rng.integers(2, 5, 9)])
    below = np.full((row.size, VOCAB), 1 / VOCAB)
    before = cache.spread(row, below)
    for at in (3, 20, 31, 35):
        changed = row.copy()
        changed[at:] = BOS if at == 20 else 5
        np.testing.assert_array_equal(cache.spread(changed, below)[:at], before[:at])


def test_the_document_so_far_is_left_where_another_begins():
    cache = learned([[BOS, 3, 4, 3, 4], [BOS, 5, 6, 5, 6]], 1, 3)
    below = np.full((1, VOCAB), 1 / VOCAB)
    here, other = (cache.spread(np.array(row), np.repeat(below, len(row), 0))[-1] for row in ([5], [BOS, 3, 5]))
    assert here[6] > 1.5 / VOCAB and other[6] == pytest.approx(1 / VOCAB)
    again = cache.spread(np.array([BOS, 5]), np.repeat(below, 2, 0))[-1]  # the document's own beginning
    assert again[6] == here[6]
    cache.clear()
    np.testing.assert_array_equal(cache.spread(np.array([5]), below), below)


def test_runs_that_no_number_holds_are_refused():
    with pytest.raises(ValueError, match="63 bits"):
        RunCache(65_536, 3)
