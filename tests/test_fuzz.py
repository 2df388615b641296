"""Strangers' files: every kept input, and seeded mutations of it, is taken or refused in one sentence."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "fuzz"))

from targets import TARGETS, held

CORPUS = ROOT / "tests" / "fuzz_corpus"


def kept(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, changed, doubled or with something inserted."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(changed) + 1))
        kind = rng.integers(5)
        if kind == 0 and changed:
            changed = changed[:at]
        elif kind == 1 and changed:
            changed[min(at, len(changed) - 1)] = int(rng.integers(256))
        elif kind == 2:
            changed[at:at] = changed[: int(rng.integers(0, 40))]
        elif kind == 3:
            changed[at:at] = rng.choice([b"[" * 100_000, b'"', b"\xff\xfe", b"1e999", b"NaN", b"\x00" * 9, b"-1"])
        else:
            changed[at : at + int(rng.integers(1, 9))] = b""
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_is_taken_or_refused_in_a_sentence(name):
    inputs = kept(name)
    assert len(inputs) >= 2
    taken = [held(TARGETS[name], data) for data in inputs]
    assert any(taken), "no input gets through, so that nothing behind the first check is tried"


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_are_taken_or_refused_in_a_sentence(name):
    rng = np.random.default_rng(1)
    for data in kept(name):
        for _ in range(20):
            held(TARGETS[name], mutated(data, rng))
