"""A validation set of the contest's size, scored by a run's model: seconds and memory, interrupted and gone on with.

    python bench/load.py RUN [--data data/builtin] [--tokens 62021846] [--interrupt SECONDS] [--json]

The text is documents of the prepared data, drawn at random until there are so many tokens. The referee runs all its
checks under a lifted cap; with --interrupt it is killed so many seconds after its first scores are kept, and started
again. Prints tokens a second, what was kept when it was killed, its last word on the time left, and the peak memory of
the judge, of the scorer and of both; exit 1 where both together took 2 GB or more, the verdict is not valid, or nothing
was kept when it was killed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf import folders, records
from golf.bpb import ByteTable
from golf.console import run_script
from golf.contender import taken
from golf.data import Corpus, write_shard

MOST = 2_000_000_000
PART = 1 << 22


def large(corpus: Corpus, tokens: int, target: Path) -> None:
    """Write data whose validation split is documents drawn from the corpus, and which has no training split."""
    stream = np.concatenate([*corpus.shards("train"), *corpus.shards("val")])
    table = ByteTable(corpus.tokenizer)
    starts = np.flatnonzero(stream == table.bos)
    ends = np.append(starts[1:], stream.size)
    rng, found, count = np.random.default_rng(1), [], 0
    while count < tokens:
        n = int(rng.integers(starts.size))
        found.append(stream[starts[n] : ends[n]])
        count += found[-1].size
    text = np.concatenate(found)[:tokens]
    target.mkdir()
    shutil.copyfile(corpus.tokenizer, target / "tokenizer.model")
    write_shard(target / "val_000000.bin", text)
    before, after = text[:-1], text[1:]
    counted = sum(table.count(before[at : at + PART], after[at : at + PART]) for at in range(0, after.size, PART))
    manifest = json.loads(json.dumps(corpus.manifest)) | {"name": "large", "fingerprint": f"large-{tokens}"}
    manifest["splits"] = {
        "val": {"documents": len(found), "files": ["val_000000.bin"], "tokens": int(text.size),
                "counted_bytes": counted},
        "train": {"documents": 0, "files": [], "tokens": 0, "counted_bytes": 0},
    }  # fmt: skip
    (target / "manifest.json").write_text(json.dumps(manifest))


def without_claims(run: Path, target: Path) -> None:
    """A copy of a run's counted files whose record says nothing of the text that it was scored on."""
    target.mkdir()
    folders.copy_counted(run, target)
    record = records.read(run)
    records.write(target, replace(record, val_bytes=None, val_tokens=None, val_bpb=None, val_loss=None,
                                  corpus_fingerprint=""))  # fmt: skip


def follow(command: list[str], limit: float, kept: Path, log: Path, peaks: dict[str, int]) -> str | None:
    """Run a command, note its peaks of memory; its output, or None where it was killed `limit` seconds after there was
    something in `kept`. What it says of its progress goes to `log`."""
    with open(log, "a") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
    judge, end = psutil.Process(process.pid), float("inf")
    while process.poll() is None:
        try:
            below = judge.children(recursive=True)
            sizes = {"judge": taken([judge], "rss"), "scorer": taken(below, "rss")}
        except psutil.Error:
            break
        for name, size in (*sizes.items(), ("both", sum(sizes.values()))):
            peaks[name] = max(peaks[name], size)
        if kept.exists() and end == float("inf"):
            end = time.monotonic() + limit
        if time.monotonic() > end:
            process.kill()
            process.wait()
            return None
        time.sleep(0.5)
    return process.communicate()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", default="data/builtin")
    parser.add_argument("--tokens", type=int, default=62_021_846)
    parser.add_argument("--interrupt", type=float, default=float("inf"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    peaks = {"judge": 0, "scorer": 0, "both": 0}
    with tempfile.TemporaryDirectory(prefix="golf-load-") as place:
        data = Path(place) / "data"
        large(Corpus(asked.data), asked.tokens, data)
        without_claims(Path(asked.run), Path(place) / "run")
        command = [sys.executable, "eval_bpb.py", str(Path(place) / "run"), "--data", str(data), "--lift-cap", "--keep",
                   str(Path(place) / "kept"), "--json"]  # fmt: skip
        began, kept, log = time.monotonic(), Path(place) / "kept", Path(place) / "said"
        said, stood = follow(command, asked.interrupt, kept, log, peaks), 0
        if said is None:
            stood = json.loads(kept.read_text())["count"]
            said = follow(command, float("inf"), kept, log, peaks)
        seconds, progress = time.monotonic() - began, [w for w in log.read_text().split("\n") if "left" in w]
    verdict = json.loads(said)
    scored = {n["number"]: n for n in verdict["checks"]}
    told = {
        "tokens": asked.tokens, "seconds": round(seconds, 1), "scoring_seconds": verdict.get("eval_seconds"),
        "tokens_per_second": round(asked.tokens / verdict["eval_seconds"]), "valid": verdict["valid"],
        "invalid": verdict.get("invalid", ""), "kept": scored[6]["evidence"], "stood_when_killed": stood,
        "progress": progress[len(progress) // 2].strip() if progress else "", "lines_of_progress": len(progress),
        **{f"peak_{name}_mb": round(size / 1e6) for name, size in peaks.items()},
    }  # fmt: skip
    print(json.dumps(told) if asked.json else "\n".join(f"{k}: {v}" for k, v in told.items()))
    interrupted = asked.interrupt == float("inf") or stood > 0
    return 0 if peaks["both"] < MOST and verdict["valid"] and interrupted else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
