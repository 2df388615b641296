"""Coverage-guided fuzzing of what reads strangers' files (pip install atheris; Linux).

    python fuzz/run.py TARGET|all [SECONDS] [--corpus DIR]
    python fuzz/run.py TARGET|all keep [--corpus DIR]

Inputs that reach new code are kept in DIR/TARGET (fuzz/corpus by default, which git ignores). A crash, a traceback that
is no UsageError, five seconds of one input or 2 GB end it, and the input is written beside it as crash-*. Each run adds
a line to fuzz/sessions.jsonl: target, seconds, inputs tried, how it ended. `keep` copies what reaches code that the
seeds in tests/fuzz_corpus do not, the smallest first, into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS = HERE.parent / "tests" / "fuzz_corpus"
SESSIONS = HERE / "sessions.jsonl"
AGAIN = "FUZZ_AGAIN"  # names a program that starts this one again for the same target
PIECE = 200  # seconds that a fuzzing process lives: it keeps 65 kB of each artifact that it tried
MOST_KEPT, LARGEST = 12, 2000  # files of a target, and bytes of one, that `keep` adds


def command(name: str, *options: str) -> list[str]:
    return [sys.executable, __file__, "--inside", name, *options]


def fuzz(name: str, seconds: int, corpus: Path) -> int:
    """Fuzz one target for so long, apart from this process, and write down that it was done."""
    kept = corpus / name
    kept.mkdir(parents=True, exist_ok=True)
    began, tried, code = time.monotonic(), 0, 0
    while code == 0 and (left := seconds - (time.monotonic() - began)) >= 1:
        words = command(
            name, f"-max_total_time={min(left, PIECE):.0f}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=20000",
            "-print_final_stats=1", f"-artifact_prefix={kept}/", str(kept), str(SEEDS / name),
        )  # fmt: skip
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, errors="replace") as process:
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                if told := re.match(r"stat::number_of_executed_units:\s*(\d+)", line):
                    tried += int(told[1])
        code = process.returncode
    with open(SESSIONS, "a", encoding="utf-8") as log:
        row = {"date": time.strftime("%Y-%m-%d"), "target": name, "seconds": round(time.monotonic() - began),
               "inputs": tried, "exit": code}  # fmt: skip
        log.write(json.dumps(row) + "\n")
    return code


def keep(name: str, corpus: Path) -> int:
    """Add to the seeds of a target the smallest found inputs that reach what the seeds do not."""
    seeds = SEEDS / name
    with tempfile.TemporaryDirectory() as place:
        merged, small = Path(place) / "merged", Path(place) / "small"
        shutil.copytree(seeds, merged)
        small.mkdir()
        for path in (corpus / name).iterdir():
            if path.stat().st_size <= LARGEST:
                shutil.copy(path, small)
        again = Path(place) / "again"  # merging starts the program of its first word anew
        again.write_text(f'#!/bin/sh\nexec {shlex.join(command(name))} "$@"\n')
        again.chmod(0o755)
        words, env = command(name, "-merge=1", str(merged), str(small)), {**os.environ, AGAIN: str(again)}
        code = subprocess.call(words, env=env, stderr=subprocess.DEVNULL)
        known = {path.read_bytes() for path in seeds.iterdir()}
        found = sorted((d for p in merged.iterdir() if (d := p.read_bytes()) not in known), key=len)[:MOST_KEPT]
    for data in found:
        (seeds / f"found-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
    print(f"{name}: {len(found)} kept")
    return code


def inside(name: str, options: list[str]) -> None:
    """The fuzzing process; it does not come back."""
    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["golf"]):
        from targets import TARGETS, held

    atheris.Setup([os.environ.get(AGAIN, sys.argv[0]), *options], lambda data: held(TARGETS[name], data))
    atheris.Fuzz()


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["--inside"]:
        inside(words[1], words[2:])
        return 0
    corpus = HERE / "corpus"
    if "--corpus" in words:
        at = words.index("--corpus")
        corpus = Path(words[at + 1])
        del words[at : at + 2]
    name, what = words[0] if words else "all", words[1] if len(words) > 1 else "60"
    targets = sorted(path.name for path in SEEDS.iterdir())
    if name not in ("all", *targets) or not re.fullmatch(r"keep|[1-9]\d*", what):
        said = f"give all or one of {', '.join(targets)}, and whole seconds or keep."
        print(f"error: {name} {what}: {said}", file=sys.stderr)
        return 2
    names = targets if name == "all" else [name]
    codes = [keep(one, corpus) if what == "keep" else fuzz(one, int(what), corpus) for one in names]
    return max(map(abs, codes))  # one that a signal ended counts below 0


if __name__ == "__main__":
    sys.exit(main())
