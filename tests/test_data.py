"""Shards in the public format, refusals of damaged ones, and batches that do not depend on the number of ranks."""

import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.data import Corpus, TokenStream, ahead, batches, read_shard, write_shard
from golf.errors import UsageError
from golf.files import write_bytes


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 65_535), max_size=2000))
def test_shards_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "train_000000.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    assert read_shard(path).tolist() == tokens
    data = path.read_bytes()
    assert struct.unpack("<3i", data[:12]) == (20240520, 1, len(tokens))
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == np.array(tokens, dtype="<u2").tobytes()


def test_the_contests_own_shard_reads(yardstick, tmp_path):
    path = tmp_path / "val.bin"
    path.write_bytes(unpacked(yardstick / "fineweb_val_sp1024_prefix.bin.zst"))
    shard = read_shard(path)
    assert (shard.size, shard[0], int((shard == 1).sum())) == (1_040_298, 1, 902)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d[:-2], "should hold"),
        (lambda d: d[:500], "not a token shard"),
        (lambda d: struct.pack("<i", 7) + d[4:], "not a token shard"),
        (lambda d: d[:4] + struct.pack("<i", 9) + d[8:], "format version 9"),
        (lambda d: d + b"\0\0", "should hold"),
        (lambda d: d[:8] + struct.pack("<i", -1) + d[12:], "should hold"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, damage, words):
    path = tmp_path / "x.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=words):
        read_shard(path)


def test_missing_shards_and_folders_are_refused(tmp_path, corpus):
    with pytest.raises(UsageError, match="cannot be read"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(UsageError, match="golf.prepare"):
        Corpus(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (copy / "train_000000.bin").unlink()
    with pytest.raises(UsageError, match="train_000000"):
        Corpus(copy).check(512, 64)
    told = (copy / "manifest.json").read_text()
    for bad in ("{", "[" * 100_000, '{"a":' * 100_000):
        (copy / "manifest.json").write_text(bad)
        with pytest.raises(UsageError, match="not JSON"):
            Corpus(copy)
    for key in ("vocab_size", "tokens", "counted_bytes"):
        (copy / "manifest.json").write_text(re.sub(rf'"{key}": \d+', f'"{key}": 1e999', told))
        with pytest.raises(UsageError, match="lacks"):
            Corpus(copy)


def test_data_that_does_not_fit_the_model_is_refused(corpus, tmp_path):
    with pytest.raises(UsageError, match="--shape.vocab-size 1024"):
        Corpus(corpus).check(1024, 64)
    with pytest.raises(UsageError, match="--recipe.sequence-length 10000000"):
        Corpus(corpus).check(512, 10_000_000)
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    tokens = np.array(read_shard(copy / "val_000000.bin"))
    tokens[-1] = 512
    write_shard(copy / "val_000000.bin", tokens)
    with pytest.raises(UsageError, match="holds token 512"):
        Corpus(copy).check(512, 64)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["tokens"] -= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="not"):
        Corpus(copy).shards("val")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 500), st.integers(1, 200))
def test_the_stream_is_the_shards_over_and_over(sizes, start, count):
    whole = np.arange(sum(sizes))
    shards = np.split(whole, np.cumsum(sizes)[:-1])
    expected = np.resize(np.roll(whole, -(start % whole.size)), count)
    assert TokenStream(shards).read(start, count).tolist() == expected.tolist()


@pytest.mark.parametrize("loader", ["sequential", "lanes"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_any_number_of_ranks_reads_the_same_batch(corpus, loader, world, micro):
    stream = TokenStream(Corpus(corpus).shards("train"))
    alone = batches(stream, 512, 64, loader)
    ranks = [batches(stream, 512, 64, loader, rank, world, micro) for rank in range(world)]
    for _ in range(5):
        inputs, targets = next(alone)[0]
        parts = list(itertools.chain.from_iterable(next(r) for r in ranks))
        assert np.array_equal(np.concatenate([p[0] for p in parts]), inputs)
        assert np.array_equal(np.concatenate([p[1] for p in parts]), targets)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_sequential_batches_are_the_text_in_order_and_lanes_cover_it_all():
    stream = TokenStream([np.arange(1000), np.arange(1000, 2400)])
    first = next(batches(stream, 40, 10))[0]
    assert first[0].flatten().tolist() == list(range(40))
    assert first[1].flatten().tolist() == list(range(1, 41))
    lanes = batches(stream, 40, 10, "lanes")
    seen = np.concatenate([next(lanes)[0][0].flatten() for _ in range(60)])
    assert sorted(seen.tolist()) == list(range(2400))  # one epoch, each token once


def test_a_loader_resumes_at_any_step():
    stream = TokenStream([np.arange(5000)])
    for loader in ("sequential", "lanes"):
        run = batches(stream, 40, 10, loader)
        for _ in range(7):
            next(run)
        assert np.array_equal(next(run)[0][0], next(batches(stream, 40, 10, loader, step=7))[0][0])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "keep.bin"
    write_bytes(path, b"before")
    # A file-size limit is what a full disk looks like to a process.
    code = (
        "import resource, signal, sys, pathlib\n"
        "from golf.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    write_bytes(pathlib.Path({str(path)!r}), bytes(5000))\n"
        "except OSError as error:\n"
        "    print('refused', error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stderr
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["keep.bin"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_batches_read_ahead_are_the_same_and_a_fault_among_them_is_told(corpus):
    stream = TokenStream(Corpus(corpus).shards("train"))
    plain, early = batches(stream, 1024, 64, "strided"), ahead(batches(stream, 1024, 64, "strided"))
    for ours, theirs in itertools.islice(zip(plain, early, strict=True), 20):
        for (a, b), (c, d) in zip(ours, theirs, strict=True):
            assert np.array_equal(a, c) and np.array_equal(b, d)
    early.close()

    def broken():
        yield 1
        raise UsageError("the shard was cut")

    source = ahead(broken())
    assert next(source) == 1
    with pytest.raises(UsageError, match="cut"):
        next(source)
