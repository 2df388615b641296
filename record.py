"""Run folders: the leaderboard, and what a packed model writes.

    python record.py leaderboard [--runs DIR]
    python record.py sample FOLDER --prompt TEXT [--exit RULE --threshold X]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

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


Exit = Literal["stored", "none", "entropy", "margin", "divergence", "difference", "gate", "random", "fixed"]
RAISED = str.maketrans("0123456789", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


@dataclass(frozen=True)
class SampleArguments:
    """Continue a text with a packed model, each token followed by the loops that were spent to predict it."""

    folder: tyro.conf.Positional[str]
    """A run folder."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    seed: int = 1
    exit: Exit = "stored"
    """Rule by which tokens stop; what the artifact says of its scoring, or none."""
    threshold: float = 0.0
    """That rule's threshold."""
    json: bool = False
    """Print one JSON object."""


def sample(arguments: SampleArguments) -> int:
    """Write the prompt and its continuation. Raises UsageError."""
    folder = Path(arguments.folder)
    for name in ("tokens", "temperature", "seed"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} {value}: give 0 or more.")
    record = records.read(folder)
    from golf import decode

    model, table, rule = decode.load(folder, arguments.exit, arguments.threshold)
    decoder = decode.Decoder(model, max(2, record.context), rule)
    prompt = [table.bos, *table.encode(arguments.prompt)]
    found = list(decode.write(decoder, prompt, arguments.tokens, arguments.temperature, arguments.seed))
    text = table.decode([w.token for w in found]).decode(errors="replace")
    loops = [w.loops for w in found]
    mean = sum(loops) / max(1, len(loops))
    if arguments.json:
        tokens = [asdict(w) | {"text": table.text[w.token].decode(errors="replace")} for w in found]
        print(json.dumps({"text": text, "prompt_tokens": len(prompt) - 1, "mean_loops": mean, "tokens": tokens}))
        return 0
    print(text)
    if model.shape.loops > 1:
        pieces = (f"{table.text[w.token].decode(errors='replace')}{str(w.loops).translate(RAISED)}" for w in found)
        print(f"\nLoops to predict each token, {mean:.2f} of {model.shape.loops} on average:\n{''.join(pieces)}")
    return 0


def main() -> int:
    if sys.argv[1:2] == ["sample"]:
        return sample(parse(tyro.cli, SampleArguments, prog="record.py sample", args=sys.argv[2:]))
    return parse(tyro.extras.subcommand_cli_from_dict, {"leaderboard": leaderboard}, prog="record.py")


if __name__ == "__main__":
    sys.exit(run_script(main))
