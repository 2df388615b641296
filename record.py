"""Run folders: the leaderboard.

python record.py leaderboard [--runs DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from golf import records
from golf.config import UsageError
from golf.console import parse, run_script
from golf.files import write_bytes


def leaderboard(runs: str = "runs") -> int:
    """Write RUNS/LEADERBOARD.md from every scored run; corpora and tracks are never mixed.

    Args:
        runs: Folder that holds the run folders.
    """
    folder = Path(runs)
    if not folder.is_dir():
        raise UsageError(f"--runs {runs}: there is no such folder.")
    text = records.leaderboard(folder)
    write_bytes(folder / "LEADERBOARD.md", text.encode())
    print(text, end="")
    for path, record in records.all_records(folder):
        if isinstance(record, UsageError):
            print(f"left out: {path.name}: {record}", file=sys.stderr)
    return 0


def main() -> int:
    return parse(tyro.extras.subcommand_cli_from_dict, {"leaderboard": leaderboard}, prog="record.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
