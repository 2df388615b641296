"""Documents of the studied topics from sources that the topic models were not trained on, as JSON lines.

    python bench/second_sources.py GENRES_GUM GENRES_NLTK HELD.jsonl OUT.jsonl

News: ABC and Brown. Poetry: Shakespeare's plays, GUM's poems. Dialogue: MASC's conversations, calls, scripts and
debates. Code: numpy's Python files, as installed. Mathematics: held-out OpenStax modules. What has few and long
documents is cut into pieces, each told apart by its source's name.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import zstandard

PIECE = 2_000
"""Characters of a piece: more than the 256 tokens that are measured of a document."""
SPOKEN = {"face-to-face", "telephone", "movie-script", "debate-transcript", "court-transcript", "spoken"}


def lines(path: str) -> Iterator[dict]:
    opened = zstandard.open if path.endswith(".zst") else io.open
    with opened(path, "rt", encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def pieces(text: str, most: int) -> Iterator[str]:
    """Pieces spread evenly over a text, the first of which skips its head; each begins with a line."""
    stride = max(PIECE, len(text) // (most + 1))
    for start in range(min(stride, len(text) // 2), len(text) - PIECE, stride):
        begin = text.find("\n", start) + 1 or start
        yield text[begin : begin + PIECE]


def documents(gum: str, nltk: str, held: str) -> Iterator[tuple[str, str, str]]:
    """Topic, source, text."""
    for row in lines(gum):
        if row["genre"] == "poetry":
            yield "poetry", "GUM", row["text"]
    taken = 0
    for row in lines(nltk):
        corpus, genre, text = row["corpus"], row["genre"], row["text"]
        if corpus == "abc" and taken < 400:
            taken += 1
            yield "news", "ABC", text
        elif corpus == "brown" and genre == "news":
            yield "news", "Brown", text
        elif corpus == "shakespeare":
            yield from (("poetry", "Shakespeare, pieces of plays", p) for p in pieces(text, 20))
        elif corpus == "masc" and genre in SPOKEN:
            yield from (("dialogue", "MASC, pieces", p) for p in pieces(text, 6))
    for row in lines(held):
        if row["topic"] == "math" and "openstax" in row["source"]:
            yield from (("math", "OpenStax, pieces of held-out modules", p) for p in pieces(row["text"], 6))
    for path in sorted(Path(numpy.__file__).parent.glob("**/*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) > PIECE and "tests" not in path.parts:
            yield "code", "numpy", text


if __name__ == "__main__":
    *sources, out = sys.argv[1:]
    with open(out, "w", encoding="utf-8") as handle:
        for topic, source, text in documents(*sources):
            handle.write(json.dumps({"topic": topic, "source": source, "text": text}) + "\n")
