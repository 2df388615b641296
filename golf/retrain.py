"""Training a submission again where no validation text exists: the only way to see that none went into its weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from golf import folders, records
from golf.config import TRACKS
from golf.console import printable
from golf.contender import LEAST_FREE, LOOK_EVERY, SANDBOX, installation, why_not_isolated
from golf.data import Corpus, write_shard
from golf.errors import UsageError
from golf.files import LARGE, write_bytes

LAST_WORDS = 4096  # bytes
CLOSE = 0.01  # relative, between the recorded score and that of the weights trained again


def without_validation(corpus: Corpus, target: Path) -> None:
    """A copy of prepared data whose validation split is the last part of the training split."""
    from golf.bpb import ByteTable

    target.mkdir()
    shards = corpus.shards("train")
    for name in corpus.files["train"]:
        os.symlink((corpus.folder / name).resolve(), target / name)
    shutil.copyfile(corpus.tokenizer, target / "tokenizer.model")
    part = np.array(shards[-1][-min(shards[-1].size, max(corpus.tokens["val"], 4096)) :])
    write_shard(target / "val_000000.bin", part)
    table = ByteTable(corpus.tokenizer)
    manifest = json.loads(json.dumps(corpus.manifest))
    counted = table.count(part[:-1].astype(np.int64), part[1:].astype(np.int64))
    manifest["splits"]["val"] |= {"files": ["val_000000.bin"], "tokens": int(part.size), "counted_bytes": counted}
    write_bytes(target / "manifest.json", json.dumps(manifest).encode())


def require(folder: Path, data: Path) -> None:
    """Raise UsageError where the system, the folder or the data do not allow it."""
    if why_not_isolated():
        raise UsageError(f"--retrain: this system cannot hide the validation text ({why_not_isolated()}).")
    if not (folder / "train_gpt.py").is_file() or not data.is_dir():
        raise UsageError(f"--retrain: {folder} has no train_gpt.py, or --data {data} is no prepared folder.")
    corpus = Corpus(data, "--data")
    if corpus.fingerprint.startswith("python"):
        raise UsageError(f"--retrain: the text of {data} is Python's own library, which no process can do without.")
    if not corpus.shards("train"):
        raise UsageError(f"{data} has no training shards to train on again, give --data with them.")


def watched(command: list[str], environment: dict, output: int, limit: float) -> tuple[int | None, str]:
    """Run a command that is not trusted: its exit code and last words; None and why where it was stopped, for time or
    for the machine's memory."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
        pass_fds=(output,),
    )  # fmt: skip
    tail = b""

    def listen() -> None:
        nonlocal tail
        while part := process.stderr.read1(1 << 16):
            tail = (tail + part)[-LAST_WORDS:]

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    end, why = time.monotonic() + limit, ""
    while process.poll() is None and not why:
        time.sleep(LOOK_EVERY)
        machine = psutil.virtual_memory()
        if time.monotonic() > end:
            why = f"the training did not end within {limit:g} s"
        elif machine.available < LEAST_FREE * machine.total:
            why = f"the training was stopped: {machine.available / 1e6:,.0f} MB of the machine's memory were left"
    process.kill()
    process.wait()
    listener.join(timeout=10)
    last = (tail.decode(errors="replace").strip().splitlines() or ["no word"])[-1][:200]
    return (None, why) if why else (process.returncode, printable(last))


def retrain(folder: Path, data: Path, verdict: dict, judge: Callable[[Path, Path], dict]) -> str:
    """Run the folder's train_gpt.py in isolation on data without the validation text, judge what it makes, and say how
    far its score is from the folder's. For what `require` allows."""
    record = records.read(folder)
    if verdict.get("val_bpb") is None:
        return "not run: the folder has no score"
    with tempfile.TemporaryDirectory(prefix="golf-", ignore_cleanup_errors=True) as place:
        here = Path(place)
        corpus = Corpus(data, "--data")
        without_validation(corpus, here / "data")
        (here / "root").mkdir()
        train_files = [[str((data / n).resolve()), f"/data/{n}"] for n in corpus.files["train"]]
        for name in corpus.files["train"]:
            (here / "data" / name).unlink()
        others = [[str(here / "data" / p.name), f"/data/{p.name}"] for p in (here / "data").iterdir()]
        script = [[str((folder / "train_gpt.py").resolve()), "/submission/train_gpt.py"]]
        output = os.memfd_create("golf")
        spec = json.dumps({
            "binds": [[p, p] for p in installation()] + train_files + others + script, "root": str(here / "root"),
            "tmp_mb": 4096, "fds": [output],
        })  # fmt: skip
        python = [sys.executable, "-I", "-B"]
        run = (
            "import os, runpy, sys\n"
            "try:\n    runpy.run_path('/submission/train_gpt.py', run_name='__main__')\n"
            "finally:\n    data = open('/tmp/model.bin', 'rb').read()\n"
            f"    os.write({output}, data)\n"
        )
        environment = {
            "PATH": os.environ.get("PATH", ""), "HOME": "/tmp", "TMPDIR": "/tmp", "DATA_PATH": "/data",
            "MODEL_PATH": "/tmp/model.bin", "SEED": str(record.seed),
        }  # fmt: skip
        limit = 4 * min(TRACKS[record.track].train_seconds, max(600.0, record.train_seconds)) + 600
        command = [*python, str(SANDBOX), spec, *python, "-c", run]
        ended, said = watched(command, environment, output, limit)
        if ended is None:
            return f"failed: {said}"
        copy = here / "again"
        folders.copy_whole(folder, copy)
        with os.fdopen(output, "rb") as stream:
            if (size := os.fstat(output).st_size) > LARGE:
                return f"failed: the training left {size:,} bytes"
            stream.seek(0)
            (copy / "model.bin").write_bytes(stream.read(size))
        if ended or not (copy / "model.bin").stat().st_size:
            return f"failed: the training ended with exit code {ended} ({said})"
        again = judge(copy, data)
    if again.get("val_bpb") is None:
        return f"failed: {again['invalid']}"
    off = again["val_bpb"] / verdict["val_bpb"] - 1
    told = f"{again['val_bpb']:.5f} bits a byte trained where no validation text exists, {100 * off:+.2f} %"
    return f"{'agrees' if off < CLOSE else 'DIFFERS'}: {told}"
