"""Speed of packing a model's worth of weights: coding, error feedback, trellis. One core unless the matrices use more.

    python bench/coder_speed.py [--weights 17] [--full]

Synthetic matrices, normal with rows and columns of different size, shaped like the contest's baseline and widened to
the number of millions of weights asked for. --full also rounds them all with error feedback, plain and by the trellis.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import codec
from golf.console import run_script
from golf.grid import codes_of, nearest
from golf.quantize import Sensitivity, prepare, rounded
from golf.rans import Decoder
from golf.recipe import Pack


def matrices(millions: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Nine blocks of six matrices and an embedding."""
    width = 64 * round((millions * 1e6 / (9 * 7 + 2)) ** 0.5 / 64)
    shapes = {"query": (width, width), "key": (width // 2, width), "value": (width // 2, width), "out": (width, width),
              "up": (2 * width, width), "down": (width, 2 * width)}  # fmt: skip

    def one(rows: int, columns: int) -> np.ndarray:
        sizes = np.exp(0.2 * rng.standard_normal((rows, 1)) + 0.2 * rng.standard_normal(columns))
        return (0.02 * sizes * rng.standard_normal((rows, columns))).astype(np.float32)

    found = {f"blocks.{n}.{role}": one(*dims) for n in range(9) for role, dims in shapes.items()}
    return found | {"embedding": one(1024, width)}


def timed(what: str, count: int, action) -> object:
    """Run, and print seconds and millions of weights a second."""
    began = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - began
    print(f"{what:<42}{seconds:8.2f} s {count / seconds / 1e6:8.1f} M weights/s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=float, default=17.0)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = matrices(arguments.weights, rng)
    count = sum(w.size for w in weights.values())
    print(f"{count:,} weights in {len(weights)} matrices")
    grids = {n: nearest(w, codes_of(0.35 * w.std(axis=1)), np.zeros(w.shape[1], np.int32)) for n, w in weights.items()}
    roles: dict[str, list] = {}
    for name, grid in grids.items():
        roles.setdefault(name.rsplit(".", 1)[-1], []).append(grid)
    for what, ways in {
        "static tables": [(codec.STATIC, 0, 0)], "tables that follow": [(codec.DOWN_COLUMNS, 64, 4)],
    }.items():  # fmt: skip
        whole, described = codec.Encoder(), []

        def encode(whole=whole, described=described, ways=ways) -> bytes:
            for members in roles.values():
                encoder, text, _ = codec.put_group(members, ways)
                whole.steps += encoder.steps
                described.append(text)
            return whole.finish(codec.lane_count(whole.bits() / 8))

        data = timed(f"encode, {what}", count, encode)
        lanes = codec.lane_count(whole.bits() / 8)

        def decode(data=data, lanes=lanes, described=described) -> None:
            decoder, reader = Decoder(data, lanes), codec.Reader(b"".join(described))
            for members in roles.values():
                row, column = (np.stack([getattr(g, part) for g in members]) for part in ("row", "column"))
                codec.take_group(decoder, reader, row, column)
            decoder.finish()

        timed(f"decode, {what}", count, decode)
        print(f"{'':<42}{8 * len(data) / count:8.3f} bits a weight, {lanes:,} lanes")
    if not arguments.full:
        return
    hessians = {}
    for w in weights.values():
        if w.shape[1] not in hessians:
            x = rng.standard_normal((2 * w.shape[1], w.shape[1])) * np.exp(0.5 * rng.standard_normal(w.shape[1]))
            hessians[w.shape[1]] = x.T @ x / len(x)
    for what, pack in (("error feedback", Pack(quantizer="scalar")), ("error feedback and trellis", Pack())):

        def run(pack=pack) -> None:
            ready = {
                n: prepare(w, Sensitivity(hessians[w.shape[1]], np.ones(len(w))), pack) for n, w in weights.items()
            }
            rounded(weights, ready, dict.fromkeys(weights, 0.35), pack)

        timed(f"{what}, Hessians given", count, run)


if __name__ == "__main__":
    sys.exit(run_script(main))
