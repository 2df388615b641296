"""Rows told from earlier rows: exact both ways, worth it where rows repeat, and closed to bad links."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from golf import reference
from golf.entropy import Reader, best_table
from golf.rans import CodedDataError, Decoder, Encoder


def coded(rows: np.ndarray, scale) -> tuple[Encoder, bytes]:
    encoder = Encoder()
    return encoder, reference.put_linked(encoder, rows, scale)


def decoded(encoder: Encoder, described: bytes, dims: tuple[int, int], scale) -> np.ndarray:
    decoder = Decoder(encoder.finish(5), 5)
    rows = reference.take_linked(decoder, Reader(described), dims, scale)
    decoder.finish()
    return rows


def repeated(seed: int = 0, rows: int = 200, columns: int = 64) -> np.ndarray:
    """Rows of which every third repeats an earlier one, at half or whole size, but for the noise of rounding."""
    rng = np.random.default_rng(seed)
    x = 20 * rng.standard_normal((rows, columns))
    for t in range(3, rows, 3):
        x[t] = x[rng.integers(t)] * rng.choice([0.5, 1.0]) + 0.3 * rng.standard_normal(columns)
    return np.clip(np.rint(x), -127, 127).astype(np.int8)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 90), st.integers(1, 20)), elements=st.integers(-63, 63)),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_rows_come_back(rows, seed, uneven):
    rng = np.random.default_rng(seed)
    copies = rows[rng.integers(0, len(rows), len(rows))]
    rows = np.concatenate([rows, copies])
    scales = rng.integers(17, 65_536, rows.shape) if uneven else np.full(rows.shape, 1024)
    encoder, described = coded(rows, scales.__getitem__)
    assert np.array_equal(decoded(encoder, described, rows.shape, scales.__getitem__), rows)


def test_repeated_rows_cost_what_is_new_in_them():
    rows = repeated()
    level = np.full(rows.shape[1], 1024)
    encoder, described = coded(rows, lambda t: level)
    bits = encoder.bits() + 8 * len(described)
    alone = best_table(rows)
    plain = alone.bits(np.bincount(rows.ravel().astype(int) - alone.low, minlength=alone.frequency.size))
    assert bits < 0.85 * plain  # a third of the rows cost about 1.5 bits a weight in place of 6


def test_links_find_the_row_and_the_factor_that_a_full_search_finds():
    rows = repeated(1).astype(np.int64) * 256
    links = reference.find_links(rows)
    for t in np.flatnonzero(links.strength):
        rest = [np.square(rows[t] - (rows[t] @ rows[s]) / max(1, rows[s] @ rows[s]) * rows[s]).sum() for s in range(t)]
        assert links.earlier[t] == int(np.argmin(rest))
    assert (links.strength[3::3] != 0).mean() > 0.9


@pytest.mark.parametrize(("part", "value"), [("earlier", 150), ("strength", 60), ("strength", -60)])
def test_a_link_forward_or_out_of_range_is_refused(part, value, monkeypatch):
    rows = repeated()
    level = np.full(rows.shape[1], 1024)
    found = reference.find_links(rows.astype(np.int64) * 256)
    getattr(found, part)[np.flatnonzero(found.strength)[0]] = value
    monkeypatch.setattr(reference, "find_links", lambda values: found)
    encoder, described = coded(rows, lambda t: level)
    with pytest.raises(CodedDataError, match="a row"):
        decoded(encoder, described, rows.shape, lambda t: level)
