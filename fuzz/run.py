"""Coverage-guided fuzzing of what reads strangers' files (pip install atheris; Linux).

    python fuzz/run.py TARGET|all [SECONDS] [--corpus DIR]

Inputs that reach new code are kept in DIR/TARGET (fuzz/corpus by default, which git ignores). A crash, a traceback that
is no UsageError, five seconds of one input or 2 GB end it, and the input is written beside it as crash-*.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    words = sys.argv[1:]
    corpus = HERE / "corpus"
    if "--corpus" in words:
        at = words.index("--corpus")
        corpus = Path(words[at + 1])
        del words[at : at + 2]
    name, seconds = words[0] if words else "all", words[1] if len(words) > 1 else "60"
    sys.path.insert(0, str(HERE))
    if name == "all":
        from targets import TARGETS

        commands = [[sys.executable, __file__, one, seconds, "--corpus", str(corpus)] for one in TARGETS]
        return max(map(abs, map(subprocess.call, commands)))  # one that a signal ended counts below 0
    import atheris

    with atheris.instrument_imports(include=["golf"]):
        from targets import TARGETS, held

    kept = corpus / name
    kept.mkdir(parents=True, exist_ok=True)
    seeds = HERE.parent / "tests" / "fuzz_corpus" / name
    options = [
        f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=20000", "-print_final_stats=1",
        f"-artifact_prefix={kept}/", str(kept), *([str(seeds)] if seeds.is_dir() else []),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], lambda data: held(TARGETS[name], data))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
