"""What an artifact's bytes buy: coders on the same integers, then whole pipelines at the same bytes.

    python bench/artifact_size.py RUN [--data FOLDER] [--tokens N] [--json]

RUN is a folder of a run with --run.checkpoint: checkpoint.safetensors, hessians.safetensors and submission.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import brotli
import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golf import codec, records
from golf.bpb import windows
from golf.checkpoint import read_sensitivities, read_tensors
from golf.console import run_script
from golf.data import Corpus
from golf.entropy import Reader
from golf.grid import Grid, as_matrix
from golf.model import RecurrentGPT
from golf.quantize import gaussian_bits, quantize, tensor_error
from golf.rans import Decoder
from golf.recipe import Pack
from golf.shape import Shape, tensor_class

SDCLIP = Pack(12.85 / 31, 20 / 127, rounding="nearest", quantizer="scalar", column_steps=False, row_power=1.0)
INT8 = replace(SDCLIP, matrix_step=1 / 40, embed_step=1 / 40)  # finer than 8 bits: each row's largest weight at 127


def zero_order(grids: dict[str, Grid]) -> float:
    """Bytes of matrices' and embedding's symbols at the entropy of each tensor's own frequencies."""
    total = 0.0
    for name, grid in grids.items():
        if tensor_class(name) != "control":
            _, counts = np.unique(grid.integers, return_counts=True)
            total -= float((counts * np.log2(counts / grid.integers.size)).sum()) / 8
    return total


def role_arrays(shape: Shape, grids: dict[str, Grid], transpose: bool) -> list[bytes]:
    """The symbols of each role as one array of bytes, as the records group them."""
    out = []
    for names in codec.groups(shape).values():
        if tensor_class(names[0]) != "control":
            stack = np.stack([grids[n].integers for n in names])
            out.append(np.ascontiguousarray(stack.transpose(0, 2, 1) if transpose else stack).tobytes())
    return out


def lrzip(data: bytes) -> bytes:
    """One group through lrzip's zpaq mode."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x"
        path.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-z", "-L", "9", str(path)], check=True)
        return path.with_suffix(".lrz").read_bytes()


def ours(shape: Shape, grids: dict[str, Grid], coder: str) -> tuple[int, float, float]:
    """Bytes of the symbols and their tables and states alone, seconds to encode and to decode."""
    began = time.perf_counter()
    whole, described, chosen = codec.Encoder(), [], []
    for names in codec.groups(shape).values():
        if tensor_class(names[0]) != "control":
            members = [grids[n] for n in names]
            encoder, text, _ = codec.put_group(members, codec.ways(members, coder))
            whole.steps += encoder.steps
            described.append(text)
            chosen.append(members)
    lanes = codec.lane_count(whole.bits() / 8)
    data = whole.finish(lanes)
    encoded = time.perf_counter()
    decoder, reader = Decoder(data, lanes), Reader(b"".join(described))
    for members in chosen:
        row, column = (np.stack([getattr(g, part) for g in members]) for part in ("row", "column"))
        back = codec.take_group(decoder, reader, row, column)
        assert all(np.array_equal(a.integers, b.integers) for a, b in zip(members, back, strict=True))
    return len(data) + sum(map(len, described)), encoded - began, time.perf_counter() - encoded


def coders(shape: Shape, grids: dict[str, Grid]) -> list[dict]:
    """Every coder on the same integers; steps of rows, which all store alike, are left out."""
    ideal = zero_order(grids)
    count = sum(g.integers.size for n, g in grids.items() if tensor_class(n) != "control")
    rows = []

    def add(name: str, size: int, encode: float, decode: float) -> None:
        rows.append({
            "coder": name, "bytes": size, "bits": round(8 * size / count, 4),
            "over_entropy_%": round(100 * (size / ideal - 1), 3), "encode_s": round(encode, 2),
            "decode_s": round(decode, 2), "M_decoded_per_s": round(count / decode / 1e6, 1),
        })  # fmt: skip

    general = {
        "zlib-9": (lambda d: zlib.compress(d, 9), zlib.decompress),
        "zstd-22": (zstandard.ZstdCompressor(level=22).compress, zstandard.ZstdDecompressor().decompress),
        "brotli-11": (lambda d: brotli.compress(d, quality=11, lgwin=24), brotli.decompress),
    }
    if shutil.which("lrzip"):
        general["lrzip -z -L 9"] = (lrzip, None)
    for name, (press, undo) in general.items():
        best = None
        for transpose in (False, True):
            began = time.perf_counter()
            pressed = [press(part) for part in role_arrays(shape, grids, transpose)]
            encoded = time.perf_counter()
            for part in pressed if undo else ():
                undo(part)
            found = (sum(map(len, pressed)), encoded - began, time.perf_counter() - encoded)
            best = min(best or found, found)
        add(name, *best)
    for coder in ("static", "adaptive"):
        add(f"ours, {coder}", *ours(shape, grids, coder))
    return rows


class Bench:
    """One trained model, its sensitivities, and a stretch of validation text to score on."""

    def __init__(self, run: Path, data: Path, tokens: int):
        self.shape, self.weights = read_tensors(run / "checkpoint.safetensors")
        self.sensitivities = read_sensitivities(run / "hessians.safetensors", self.shape)
        self.record = records.read(run)
        corpus = Corpus(data, "--data")
        self.length = self.record.context
        self.tokens = np.concatenate(corpus.shards("val"))[: tokens + 1]
        self.bytes = corpus.val_bytes * self.tokens.size / corpus.tokens["val"]
        self.model = RecurrentGPT(self.shape).eval()
        self.unpacked = self.score(self.weights)

    @torch.inference_mode()
    def score(self, weights: dict[str, np.ndarray]) -> float:
        """Bits a byte, in float32."""
        self.model.load_state_dict({n: torch.from_numpy(np.ascontiguousarray(w)) for n, w in weights.items()})
        nats = 0.0
        for inputs, targets in windows(self.tokens, self.length, max(1, 8192 // self.length)):
            hidden = self.model.hidden(torch.from_numpy(inputs))
            nats += float(self.model.head_loss(hidden, torch.from_numpy(targets))) * targets.size
        return nats / math.log(2) / self.bytes

    def pack(self, pack: Pack, target: int, press: str = "", weighed: bool = True) -> tuple[dict, dict[str, Grid]]:
        """A pipeline's artifact and its row of the table; `press` names a general compressor in place of our coder."""
        kept: dict[str, Grid] = {}
        chosen: dict[str, codec.Way] = {}

        def encode(grids: dict[str, Grid]) -> bytes:
            kept.update(grids)
            if not press:
                return codec.encode(self.shape, grids, {}, pack.coder, chosen)
            squeeze = brotli.compress if press == "brotli" else zstandard.ZstdCompressor(level=22).compress
            symbols = sum(len(squeeze(part)) for part in role_arrays(self.shape, grids, press == "brotli"))
            control = sum(2 * w.size for n, w in self.weights.items() if tensor_class(n) == "control")
            scales = sum(2 * g.row.size for n, g in grids.items() if tensor_class(n) != "control")
            return bytes(symbols + scales + control)  # as long as the records' file, 16 bits a scale and control weight

        began = time.perf_counter()
        data, _ = quantize(self.shape, self.weights, pack, target, self.sensitivities if weighed else None, encode)
        packed = time.perf_counter()
        if press:
            weights = {n: g.weights().reshape(self.weights[n].shape) for n, g in kept.items()}
        else:
            weights = codec.decode(data)[1]
        decoded = time.perf_counter()
        error = 0.0
        for name, sensitivity in self.sensitivities.items():
            difference = weights[name] - self.weights[name]
            error += tensor_error(difference.reshape(as_matrix(difference.shape)), sensitivity)
        bpb = self.score(weights)
        return {
            "bytes": len(data), "bits": round(8 * len(data) / self.shape.parameter_count, 3),
            "error_nats": round(error, 5), "bpb": round(bpb, 5), "penalty": round(bpb - self.unpacked, 5),
            "pack_s": round(packed - began, 1), "unpack_s": round(decoded - packed, 2),
        }, kept  # fmt: skip


def pipelines(bench: Bench, target: int) -> list[dict]:
    """Whole pipelines at the same bytes."""
    free = {"matrix_step": 0.0, "embed_step": 0.0}
    plain = replace(SDCLIP, **free)
    fed = replace(plain, rounding="feedback")
    rows = []
    for name, pack, press, weighed in (
        ("nearest, SDClip, zstd-22", plain, "zstd", False),
        ("nearest, SDClip, brotli-11", plain, "brotli", False),
        ("error feedback, SDClip, brotli-11", fed, "brotli", True),
        ("nearest, ours", replace(plain, row_power=0.0), "", True),
        ("error feedback, ours", replace(fed, row_power=0.0), "", True),
        ("error feedback, column steps, ours", replace(fed, row_power=0.0, column_steps=True), "", True),
        ("the same with a trellis", Pack(), "", True),
    ):
        row, _ = bench.pack(pack, target, press, weighed)
        rows.append({"pipeline": name, **row})
    return rows


def show(rows: list[dict]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:,}" if type(v) is int else str(v) for v in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/yardstick"))
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.run, arguments.data, arguments.tokens)
    int8, grids8 = bench.pack(INT8, 0, weighed=False)
    int6, grids6 = bench.pack(SDCLIP, 0, weighed=False)
    result = {
        "run": bench.record.name, "parameters": bench.shape.parameter_count, "unpacked_bpb": round(bench.unpacked, 5),
        "int8": {"score": int8, "coders": coders(bench.shape, grids8)},
        "int6": {"score": int6, "coders": coders(bench.shape, grids6)},
    }  # fmt: skip
    brotli11 = next(r for r in result["int6"]["coders"] if r["coder"] == "brotli-11")
    result["pipelines"] = pipelines(bench, brotli11["bytes"])
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{bench.record.name}: {bench.shape.parameter_count:,} parameters, {bench.unpacked:.5f} bpb before packing\n")
    for grid in ("int8", "int6"):
        print(f"Coders on the same {grid} integers ({result[grid]['score']['bpb']} bpb):\n")
        show(result[grid]["coders"])
        print()
    print(f"Pipelines at {brotli11['bytes']:,} bytes, all of the artifact:\n")
    show(result["pipelines"])
    step = SDCLIP.matrix_step
    bound = float(gaussian_bits(np.array(step)) - 0.5 * np.log2(12 / step**2))
    print(f"\nA plain grid of step {step:.3f} lies {bound:.3f} bits above the Gaussian rate-distortion bound.")


if __name__ == "__main__":
    sys.exit(run_script(main))
