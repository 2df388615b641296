"""What is said of mistakes, as a set: one sentence each, whole, of a length that fits two lines of a terminal."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT, run

FILES = sorted([*ROOT.glob("golf/*.py"), *ROOT.glob("*.py")])
LONGEST = 200  # characters, with each value that is filled in counted as one


def words(node: ast.expr) -> str | None:
    """A message as written, every filled-in value as a ?; None where the whole message comes from elsewhere."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(v) or "" for v in node.values)
    return "?" if isinstance(node, ast.FormattedValue) else None


def sentences() -> list[tuple[str, str]]:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UsageError"
            if called and (said := words(node.args[0])):
                found.append((f"{path.name}:{node.lineno}", said))
    return found


def faults(said: str) -> list[str]:
    """What is wrong with a sentence."""
    inner = said[:-1]
    return [
        name
        for name, wrong in (
            ("does not end in a period", not said.endswith((".", "?"))),
            ("is more than one sentence", bool(re.search(r"[.!] +[A-Z]", inner))),
            ("begins with a small letter", bool(re.match(r"[a-z]", said)) and not re.match(r"[a-z]+: ", said)),
            ("has several lines", "\n" in said),
            ("is too long", len(said) > LONGEST),
            ("blames or shouts", bool(re.search(r"!|\b(please|sorry|illegal|bad|oops|failed)\b", said, re.IGNORECASE))),
        )
        if wrong
    ]


def test_every_sentence_is_one():
    all_of_them = sentences()
    assert len(all_of_them) > 150
    wrong = {place: (said, found) for place, said in all_of_them if (found := faults(said))}
    assert not wrong


@pytest.mark.parametrize("said", ["no such file", "Sorry, it failed.", "It broke. Try it.", "Two\nlines.", "x" * 300])
def test_a_bad_one_would_be_seen(said):
    assert faults(said)


def test_a_benchmarks_mistakes_are_one_sentence():
    done = run("bench/step_speed.py", "--data", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: --data nowhere: "), done.stderr
    assert done.stderr.count("\n") == 1
