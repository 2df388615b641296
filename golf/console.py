"""What people see on a terminal, and how a script ends: one sentence and exit 2 for a user's mistake."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from golf.errors import UsageError

T = TypeVar("T")


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main; return its exit code. Mistakes, full disks and Ctrl-C end in one sentence."""
    try:
        return main() or 0
    except UsageError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.strerror is None:
            raise
        print(f"error: {printable(str(error.filename or 'a file'))}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


def printable(text: str) -> str:
    """A stranger's text as it may be shown on a terminal: what is no character to see becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def show(result: dict, as_json: bool) -> None:
    """Print a result for a machine or for a person."""
    lines = (f"{k}: {v:,}" if type(v) is int else printable(f"{k}: {v}") for k, v in result.items())
    print(json.dumps(result) if as_json else "\n".join(lines))


def parse(parser: Callable, *arguments: object, **options: object) -> object:
    """Call one of tyro's parsers; its drawn box about a wrong option becomes a UsageError of one sentence."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser(*arguments, **options)
    except SystemExit as end:
        if end.code == 2:
            raise UsageError(fold(said.getvalue())) from None
        if {"-h", "--help"} & set(sys.argv):
            print("\n".join(["", "examples:", *examples(sys.modules["__main__"].__doc__ or "", sys.argv[1:])]))
        raise
    finally:
        sys.stderr.write("" if isinstance(sys.exception(), UsageError) else said.getvalue())


def examples(about: str, words: list[str]) -> list[str]:
    """The commands that a script's docstring shows; of a subcommand its own, where it has any."""
    lines = [line for line in about.splitlines() if line.strip().startswith(("python ", "torchrun "))]
    lines = [f"    {line.strip()}" for line in lines]
    mine = [line for line in lines if words[0] in line.split()[2:4]]
    return mine or lines


def fold(box: str) -> str:
    """The words of a drawn box on one line, without its frame, title, helptext and pointer to --help."""
    words = re.sub(r"\u256d.*?\u256e", " ", box)  # the frame's first line holds the box's title
    words = re.sub(r"[\u2500-\u257f]+", " ", words)
    words = re.sub(r"\s+", " ", words)
    words = re.sub(r"Argument helptext:.*|For full helptext.*|Error parsing ", "", words)
    if unknown := re.search(r"Unrecognized options: (\S+?),? .*?Available subcommands: ([^;]*)", words):
        names = unknown[2].strip().rstrip(".").split(", ")
        near = difflib.get_close_matches(unknown[1], names, 1)
        perhaps = f"; perhaps you meant {near[0]}" if near else ""
        return f"{unknown[1]} is none of {', '.join(names)}{perhaps}; see --help."
    for told, kind in (("invalid literal for int\\(\\) with base 10", "a whole number"),
                       ("could not convert string to float", "a number")):  # fmt: skip
        words = re.sub(rf"(--\S+): {told}: '([^']*)'", rf"\1 \2: give {kind}", words)
    words = re.sub(r"(Perhaps you meant: (--\S+)).*", r"\1", words)
    return words.strip().rstrip(".") + "; see --help."


def counted(items: Sequence[T], what: str) -> Iterator[T]:
    """Each of the items; standard error is told how many are done and how long the rest will take."""
    began = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        left = (time.monotonic() - began) / done * (len(items) - done)
        print(f"{what}: {done} of {len(items)}, {left:.0f} s left", file=sys.stderr, flush=True)


class Stage:
    """A progress bar on a terminal, one line with the seconds elsewhere."""

    def __init__(self, name: str, total: int, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console()
        columns = [TextColumn("{task.description}"), BarColumn()]
        if unit == "B":
            columns += [DownloadColumn(), TimeRemainingColumn()]
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task(name, total=total or None)
        self.name = name

    def __enter__(self) -> Stage:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if error[0] is None:
            print(f"{self.name}: done in {self.bar.tasks[0].elapsed or 0:.1f} s")

    def advance(self, amount: int) -> None:
        self.bar.advance(self.task, amount)
