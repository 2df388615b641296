"""Train a plain PyTorch model for a minute and write a submission folder, without any of this project's code.

    python examples/plain/build.py data/builtin /tmp/plain [SECONDS]
    python eval_bpb.py /tmp/plain --data data/builtin
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scorer import CONTEXT, Model

ROWS, RATE = 16, 3e-3


def read_shard(path):
    """A shard is 256 int32, of which the third is the number of tokens, and then so many uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[0] == 20240520, f"{path} is no shard"
    return np.fromfile(path, dtype="<u2", count=header[2], offset=1024)


def main(data, out, seconds):
    manifest = json.loads((data / "manifest.json").read_text())
    tokens = np.concatenate([read_shard(data / name) for name in manifest["splits"]["train"]["files"]]).astype(np.int64)
    torch.manual_seed(1)
    model = Model(manifest["tokenizer"]["vocab_size"])
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator, began, steps = np.random.default_rng(1), time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - spent / seconds)
        starts = generator.integers(0, tokens.size - CONTEXT - 1, ROWS)
        rows = torch.from_numpy(np.stack([tokens[s : s + CONTEXT + 1] for s in starts]))
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    out.mkdir(parents=True)
    with open(out / "weights.bin", "wb") as file:
        np.savez_compressed(file, **{name: p.numpy().astype(np.float16) for name, p in model.state_dict().items()})
    shutil.copy(Path(__file__).parent / "scorer.py", out / "scorer.py")
    shutil.copy(data / "tokenizer.model", out / "tokenizer.model")
    sha256 = hashlib.sha256((data / "tokenizer.model").read_bytes()).hexdigest()
    (out / "submission.json").write_text(json.dumps({
        "name": "plain", "author": "a stranger", "track": "smoke", "context": CONTEXT, "corpus": manifest["name"],
        "adapts": False, "train_seconds": seconds, "steps": steps,
        "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": sha256, "transform": "none"},
    }, indent=1))  # fmt: skip
    size = (out / "weights.bin").stat().st_size
    print(f"{steps} steps, loss {loss.item():.3f}, {size:,} bytes -> {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not (Path(sys.argv[1]) / "manifest.json").is_file():
        sys.exit("error: give a folder of prepared data (python -m golf.prepare builtin) and a folder to write.")
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 60.0)
