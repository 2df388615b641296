"""Count pairs of pieces in prepared text and write a submission folder, without any of this project's code.

    python examples/ngram/build.py data/builtin /tmp/ngram
    python eval_bpb.py /tmp/ngram --data data/builtin
"""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np

DISCOUNT = 0.75  # taken off every count, for the pieces that never followed
LEAST = 1e-4  # of a piece that was never seen
CAP = 390_000  # bytes of the weights


def read_shard(path):
    """A shard is 256 int32, of which the third is the number of tokens, and then so many uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[0] == 20240520, f"{path} is no shard"
    return np.fromfile(path, dtype="<u2", count=header[2], offset=1024)


def main(data, out):
    manifest = json.loads((data / "manifest.json").read_text())
    vocab = manifest["tokenizer"]["vocab_size"]
    tokens = np.concatenate([read_shard(data / name) for name in manifest["splits"]["train"]["files"]]).astype(np.int64)
    single = np.bincount(tokens, minlength=vocab) + LEAST
    pairs, counts = np.unique(tokens[:-1] * vocab + tokens[1:], return_counts=True)
    share = (counts - DISCOUNT) / np.bincount(tokens[:-1], minlength=vocab).clip(1)[pairs // vocab]
    kept = np.argsort(-counts, kind="stable")
    while True:  # the most frequent pairs, as many as fit
        some = np.sort(kept)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, single=single.astype(np.float32), following=(pairs[some] % vocab).astype(np.uint16),
            starts=np.searchsorted(pairs[some] // vocab, np.arange(vocab + 1)).astype(np.int32),
            share=np.floor(share[some] * 65_535).astype(np.uint16),
        )  # fmt: skip
        if buffer.tell() <= CAP:
            break
        kept = kept[: int(kept.size * 0.9 * CAP / buffer.tell())]
    out.mkdir(parents=True)
    (out / "weights.bin").write_bytes(buffer.getvalue())
    shutil.copy(Path(__file__).parent / "scorer.py", out / "scorer.py")
    shutil.copy(data / "tokenizer.model", out / "tokenizer.model")
    sha256 = hashlib.sha256((data / "tokenizer.model").read_bytes()).hexdigest()
    (out / "submission.json").write_text(json.dumps({
        "name": "pairs of pieces", "author": "a stranger", "track": "smoke", "context": 256,
        "corpus": manifest["name"], "adapts": False,
        "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": sha256, "transform": "none"},
    }, indent=1))  # fmt: skip
    print(f"{kept.size:,} pairs of {pairs.size:,}, {buffer.tell():,} bytes -> {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "manifest.json").is_file():
        sys.exit("error: give a folder of prepared data (python -m golf.prepare builtin) and a folder to write.")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
