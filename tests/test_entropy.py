"""rANS and its tables: constriction's sizes, any symbols and lanes, damaged bytes, and the same bytes everywhere."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from golf import entropy, rans

bytes_of = st.integers(-128, 127)
matrices = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=50), elements=st.integers(-127, 127))


def gaussian(shape: tuple[int, ...], sigma: float, seed: int = 0) -> np.ndarray:
    values = np.rint(np.random.default_rng(seed).standard_normal(shape) * sigma)
    return np.clip(values, -127, 127).astype(np.int8)


def level(steps: np.ndarray):
    """Grid steps that are all alike."""
    return lambda step: np.full(steps.shape[1], entropy.SCALE_ONE)


def following_of(encoder: rans.Encoder, steps: np.ndarray) -> bytes:
    return entropy.put_following(encoder, steps, level(steps), 64, 4)


def zero_order(symbols: np.ndarray) -> float:
    """Bytes at the entropy of the symbols' own frequencies."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8)


@settings(max_examples=100, deadline=None)
@given(st.lists(matrices, min_size=1, max_size=4), st.integers(1, 70))
def test_any_integers_round_trip(parts, lanes):
    encoder = rans.Encoder()
    described = b"".join(entropy.put_static(encoder, part) for part in parts)
    decoder, reader = rans.Decoder(encoder.finish(lanes), lanes), entropy.Reader(described)
    for part in parts:
        assert np.array_equal(entropy.take_static(decoder, reader, part.size), part.ravel())
    decoder.finish()


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(1, 70), st.sampled_from([5, 64, 1024]))
def test_any_integers_round_trip_with_tables_that_follow(steps, lanes, memory):
    encoder = rans.Encoder()
    described = entropy.put_following(encoder, steps, level(steps), memory, 4)
    decoder, reader = rans.Decoder(encoder.finish(lanes), lanes), entropy.Reader(described)
    assert np.array_equal(entropy.take_following(decoder, reader, steps.shape, level(steps)), steps)
    decoder.finish()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=256).filter(any))
def test_frequencies_sum_and_keep_every_symbol(counts):
    frequency = rans.normalize(np.array(counts))
    assert frequency.sum() == rans.TABLE_SUM
    assert ((frequency > 0) == (np.array(counts) > 0)).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(-127, 127), st.integers(0, 60), st.integers(16, 65_535), st.integers(-32_768, 32_767))
def test_normal_tables_sum_and_keep_every_symbol(low, size, sigma, mean):
    size = min(size + 1, 128 - low)
    table = entropy.normal_table(low, size, sigma, mean)
    assert table.frequency.sum() == rans.TABLE_SUM
    assert (table.frequency > 0).all()
    assert np.array_equal(entropy.Reader(table.described).table().frequency, table.frequency)


def test_normal_tables_are_the_normal_distribution():
    table = entropy.normal_table(-20, 41, round(2.5 * 256), round(0.7 * 256))

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - 0.7) / 2.5 / math.sqrt(2)))

    expected = np.array([below(k + 0.5) - below(k - 0.5) for k in range(-20, 21)])
    assert np.abs(table.frequency / rans.TABLE_SUM - expected).max() < 4e-4


def test_no_libm_can_change_the_normal_distribution():
    exact = [2**24 * 0.5 * (1 + math.erf(i / 64 / math.sqrt(2))) for i in range(-400, 401)]
    distance = min(abs(value - math.floor(value) - 0.5) for value in exact)
    assert distance > 1e-6  # in units of 2^-24, where a double's error is 1e-8


@pytest.mark.parametrize("sigma", [0.4, 2.5, 12.0])
def test_size_is_the_entropy_and_constrictions(sigma):
    constriction = pytest.importorskip("constriction")
    symbols = gaussian((500_000,), sigma)
    encoder, lanes = rans.Encoder(), rans.lane_count(zero_order(symbols))
    described = entropy.put_static(encoder, symbols)
    data = encoder.finish(lanes)
    assert 4 * lanes <= 0.0005 * len(data)
    assert len(data) + len(described) < zero_order(symbols) * 1.0015
    table = entropy.Reader(described).table()
    probabilities = (table.frequency / rans.TABLE_SUM).astype(np.float32)
    model = constriction.stream.model.Categorical(probabilities, perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32) - table.low, model)
    theirs = coder.get_compressed().nbytes
    assert abs(len(data) - 4 * lanes - theirs) < 0.001 * theirs


def test_following_tables_cost_little_where_nothing_changes():
    steps = gaussian((512, 256), 2.5)
    encoder = rans.Encoder()
    described = entropy.put_following(encoder, steps, level(steps), 1024, 4)
    assert encoder.bits() / 8 + len(described) < zero_order(steps) * 1.005


def test_following_tables_find_widths_and_means():
    rng = np.random.default_rng(0)
    width, mean = np.exp(rng.standard_normal(256)), 2 * rng.standard_normal(256)
    values = np.rint(rng.standard_normal((512, 256)) * width * 2.5 + mean)
    steps = np.clip(values, -127, 127).astype(np.int8)
    known = sum(zero_order(steps[:, lane]) for lane in range(256))
    encoder = rans.Encoder()
    described = entropy.put_following(encoder, steps, level(steps), 1024, 4)
    assert encoder.bits() / 8 + len(described) < 1.07 * known < 0.95 * zero_order(steps)


def test_short_tables_win_where_symbols_are_few():
    few, many = gaussian((2000,), 3.0), gaussian((2_000_000,), 3.0) * np.int8(2)
    assert entropy.best_table(few).described[0] == entropy.NORMAL
    assert entropy.best_table(many).described[0] == entropy.HISTOGRAM  # even integers only: no normal variable


def test_the_bytes_never_change():
    """Integers of a linear congruential sequence, so that no library's generator matters; sizes and hashes are of
    format version 2 and change only with the version."""
    x, values = 1, []
    for _ in range(20_000):
        x = (6364136223846793005 * x + 1442695040888963407) % 2**64
        values.append(sum((x >> s & 0xFF) for s in (0, 8, 16, 24, 32, 40, 48, 56)) // 64 - 16)
    symbols = np.array(values, dtype=np.int8)
    static, following = rans.Encoder(), rans.Encoder()
    tables = entropy.put_static(static, symbols) + following_of(following, symbols.reshape(200, 100))
    found = [hashlib.sha256(e.finish(16)).hexdigest()[:16] for e in (static, following)]
    assert [*found, hashlib.sha256(tables).hexdigest()[:16]] == GOLDEN


GOLDEN = ["8736a79414588668", "2c5a772c5f796101", "19f016d15056a113"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_streams_are_refused_or_decode(data):
    symbols = gaussian((40, 25), 3.0)
    following = data.draw(st.booleans())
    encoder = rans.Encoder()
    put = (lambda: following_of(encoder, symbols)) if following else lambda: entropy.put_static(encoder, symbols)
    parts = [bytearray(put()), bytearray(encoder.finish(8))]
    target = parts[data.draw(st.integers(0, 1))]
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    at = data.draw(st.integers(0, len(target) - 1))
    if kind == "flip":
        target[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del target[at:]
    else:
        target.insert(at, data.draw(st.integers(0, 255)))
    try:
        decoder, reader = rans.Decoder(bytes(parts[1]), 8), entropy.Reader(bytes(parts[0]))
        take = (
            entropy.take_following(decoder, reader, (40, 25), level(symbols))
            if following
            else entropy.take_static(decoder, reader, 1000)
        )
        decoder.finish()
    except rans.CodedDataError:
        return
    assert take.size == 1000
