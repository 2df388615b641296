"""The proof's coder is an arithmetic coder, and its files are read back whole or refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf import prove
from golf.contender import Invalid
from golf.errors import UsageError


class Table:
    """A scorer that is a function of the last piece: no process, but the same calls."""

    vocab, offers = 64, frozenset()

    def __init__(self, seed: int = 0):
        p = np.random.default_rng(seed).random((64, 64)) ** 4 + 1e-6
        self.table = np.log(p / p.sum(1, keepdims=True)).astype(np.float32)

    def logprobs(self, tokens):
        return self.table[tokens]


def sample_of(scorer: Table, documents: int, length: int, seed: int) -> prove.Sample:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(documents):
        row = [0]
        for _ in range(max(1, length - 3 * n)):
            row.append(int(rng.choice(64, p=np.exp(scorer.table[row[-1]].astype(float)) / np.exp(
                scorer.table[row[-1]].astype(float)).sum())))  # fmt: skip
        rows.append(np.array(row))
    return prove.Sample(rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000))
def test_what_is_written_is_read(documents, length, seed):
    scorer = Table(seed)
    sample = sample_of(scorer, documents, length, seed)
    data = prove.compress(scorer, sample, 0, 0)
    assert prove.digest(prove.decompress(Table(seed), data, 0, 0)) == prove.digest(sample.rows)


def test_the_file_is_as_long_as_the_score_says():
    scorer = Table()
    sample = sample_of(scorer, 8, 400, 1)
    size, nats = len(prove.compress(scorer, sample, 0, 0)), prove.usual_score(scorer, sample, 0)
    result = prove.report(sample, 1000, size, nats, True, 0.0)
    assert result["holds"] and abs(size - result["overhead_bytes"] - nats / math.log(2) / 8) <= 3


class Learner(Table):
    """Counts what it was shown, and nothing else."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def adapt(self, tokens, documents):
        self.shown.append(sorted(zip(documents.tolist(), tokens.tolist(), strict=True)))


@pytest.mark.parametrize("chunk", [2, 32, 50])
def test_the_coder_adapts_to_what_the_score_adapts_to(chunk):
    """Also the end of a document that is shorter than the rest."""
    sample = sample_of(Table(), 5, 41, 3)
    coder, usual = Learner(), Learner()
    prove.compress(coder, sample, 0, chunk)
    prove.usual_score(usual, sample, chunk)
    assert coder.shown == usual.shown and sum(map(len, usual.shown)) > 0


def test_another_model_reads_other_text():
    sample = sample_of(Table(), 4, 60, 1)
    data = prove.compress(Table(), sample, 0, 0)
    assert prove.digest(prove.decompress(Table(1), data, 0, 0)) != prove.digest(sample.rows)


def test_more_than_one_buys_nothing():
    scorer = Table()
    sample = sample_of(scorer, 4, 100, 1)
    greedy = Table()
    greedy.table = np.minimum(greedy.table + np.float32(0.5), 0)
    size = len(prove.compress(greedy, sample, 0, 0))
    nats = prove.usual_score(greedy, sample, 0)
    assert not prove.report(sample, 1000, size, nats, True, 0.0)["agrees"]


CHANGES = (
    lambda d: d[:-1], lambda d: d[:10], lambda d: b"", lambda d: d[:20] + b"\0" + d[21:], lambda d: b"X" + d[1:],
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_proofs_are_refused(change):
    data = prove.compress(Table(), sample_of(Table(), 2, 20, 1), 0, 0)
    with pytest.raises(UsageError, match="whole proof"):
        prove.take_apart(change(data))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(Invalid, match="not numbers"):
        prove.frequencies(np.array([0.0, np.nan], dtype=np.float32))
