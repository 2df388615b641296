"""Damaged artifacts: seeded mutations and truncations of a real one, half of them with a right checksum.

    python bench/artifact_mutations.py runs/FOLDER/model.bin [COUNT]

Each must be refused in one sentence or decode to finite weights of the declared shapes, in bounded time and memory.
"""

from __future__ import annotations

import hashlib
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import codec
from golf.console import run_script
from golf.errors import UsageError


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A truncation, or a few changed bytes, more often near the front, where the structure is."""
    changed = bytearray(data)
    if rng.integers(4) == 0:
        changed = changed[: rng.integers(0, len(data))]
    else:
        for _ in range(rng.integers(1, 4)):
            end = len(changed) if rng.integers(2) else min(len(changed), 1500)
            changed[rng.integers(0, end)] = rng.integers(0, 256)
    if rng.integers(2) and len(changed) > codec.PREFIX.size:
        changed[12:44] = hashlib.sha256(bytes(changed[codec.PREFIX.size - 4 :])).digest()
    return bytes(changed)


def refused(data: bytes) -> bool:
    """Whether a file is refused, in one sentence; else it decodes to finite weights of the declared shapes."""
    try:
        shape, weights = codec.decode(data)
    except UsageError as error:
        assert str(error) and "\n" not in str(error)
        return True
    assert {n: w.shape for n, w in weights.items()} == shape.parameters()
    assert all(np.isfinite(w).all() for w in weights.values())
    return False


def main() -> None:
    data = Path(sys.argv[1]).read_bytes()
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    model_bytes = 4 * codec.decode(data)[0].parameter_count
    rng, turned_away, slowest, largest = np.random.default_rng(0), 0, 0.0, 0
    for trial in range(count):
        changed = mutated(data, rng)
        watch = trial % 20 == 0  # tracing memory is slow
        if watch:
            tracemalloc.start()
        began = time.perf_counter()
        turned_away += refused(changed)
        if watch:
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            slowest = max(slowest, time.perf_counter() - began)
    print(f"{count} damaged files: {turned_away} refused, {count - turned_away} decoded to the declared shapes")
    print(f"slowest {slowest:.2f} s; largest allocation {largest:,} bytes, {largest / model_bytes:.2f} times the model")
    assert largest <= 2 * model_bytes


if __name__ == "__main__":
    sys.exit(run_script(main))
