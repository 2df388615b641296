#!/usr/bin/env python3
"""Documents of the studied topics from sources that the topic models were not trained on, as JSON lines.

    python examples/second_sources.py GENRES_GUM GENRES_NLTK HELD.jsonl OUT.jsonl

The first two hold {corpus, genre, text} lines, the third what `depth_map.py split` held out. News: ABC and Brown.
Poetry: Shakespeare's plays, GUM's poems. Dialogue: MASC's conversations, calls, scripts and debates. Code: numpy's
Python files, as installed. Mathematics: held-out OpenStax modules. Of few and long documents pieces are taken, and
their source says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from golf.console import run_script
from golf.errors import UsageError
from golf.files import write_bytes
from golf.sources import open_text

PIECE = 2_000  # characters: more than the 256 tokens that are measured of a document
MOST_NEWS = 400
SPOKEN = {"face-to-face", "telephone", "movie-script", "debate-transcript", "court-transcript", "spoken"}


def rows(path: Path, *keys: str) -> Iterator[tuple[str, ...]]:
    """What the objects of a file of JSON lines hold under some keys. Raises UsageError."""
    try:
        with open_text(path) as stream:
            for line in stream:
                row = json.loads(line)
                yield tuple(row[key] for key in keys)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as JSON lines with {', '.join(keys)} ({error!r}).") from error


def pieces(text: str, most: int) -> Iterator[str]:
    """Pieces of PIECE characters spread evenly over a text, the first behind its head; each begins with a line."""
    stride = max(PIECE, len(text) // (most + 1))
    for start in range(min(stride, len(text) // 2), len(text) - PIECE, stride):
        begin = text.find("\n", start) + 1 or start
        yield text[begin : begin + PIECE]


def documents(gum: Path, nltk: Path, held: Path) -> Iterator[tuple[str, str, str]]:
    """Topic, source, text."""
    yield from (("poetry", "GUM", text) for genre, text in rows(gum, "genre", "text") if genre == "poetry")
    news = 0
    for corpus, genre, text in rows(nltk, "corpus", "genre", "text"):
        if corpus == "abc" and news < MOST_NEWS:
            news += 1
            yield "news", "ABC", text
        elif corpus == "brown" and genre == "news":
            yield "news", "Brown", text
        elif corpus == "shakespeare":
            yield from (("poetry", "Shakespeare, pieces of plays", piece) for piece in pieces(text, 20))
        elif corpus == "masc" and genre in SPOKEN:
            yield from (("dialogue", "MASC, pieces", piece) for piece in pieces(text, 6))
    for topic, source, text in rows(held, "topic", "source", "text"):
        if topic == "math" and "openstax" in source:
            yield from (("math", "OpenStax, pieces of held-out modules", piece) for piece in pieces(text, 6))
    for path in sorted(Path(numpy.__file__).parent.glob("**/*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) > PIECE and "tests" not in path.parts:
            yield "code", "numpy", text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gum", "nltk", "held", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    found = documents(asked.gum, asked.nltk, asked.held)
    told = (json.dumps({"topic": topic, "source": source, "text": text}) + "\n" for topic, source, text in found)
    write_bytes(asked.out, "".join(told).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
