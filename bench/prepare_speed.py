"""Text to shards: MB/s, tokenizer training aside, and the peak memory of the whole preparation.

    python bench/prepare_speed.py [--megabytes N] [--json]

The input repeats the standard library's text with a number in each document, so that no two are equal. Exit 1 where the
peak is over 1 GB.
"""

from __future__ import annotations

import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf import sources
from golf.console import run_script

MOST = 1_000_000_000  # bytes of memory, whatever the size of the text


def write_input(path: Path, megabytes: int) -> int:
    """JSON lines of at least so many megabytes of text; returns the bytes of text."""
    texts = [d.text[i : i + 4000] for d in sources.builtin().read() for i in range(0, len(d.text), 4000)]
    total = 0
    with open(path, "w", encoding="utf-8") as out:
        for number, text in enumerate(itertools.cycle(texts)):
            if total >= megabytes * 1_000_000:
                return total
            document = f"{number} {text}"
            out.write(json.dumps({"text": document}) + "\n")
            total += len(document.encode())
    return total


def main() -> int:
    megabytes = int(sys.argv[sys.argv.index("--megabytes") + 1]) if "--megabytes" in sys.argv else 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        size = write_input(path, megabytes)
        command = [sys.executable, "-m", "golf.prepare", "files", str(path), "--out", f"{folder}/out"]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    training = float(re.search(r"training the tokenizer: done in ([\d.]+)", done.stdout).group(1))
    result = {
        "text_bytes": size, "seconds": round(seconds, 1), "tokenizer_seconds": training,
        "megabytes_per_second": round(size / 1e6 / (seconds - training), 2), "peak_memory": peak,
    }  # fmt: skip
    print(json.dumps(result) if "--json" in sys.argv else "\n".join(f"{k}: {v:,}" for k, v in result.items()))
    return 0 if peak <= MOST else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
