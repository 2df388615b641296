"""Made text: the formulaic topic that should need least (licences of installed packages, tables, lists), and tasks
whose difficulty is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib import metadata

import numpy as np

from golf.sources import Document

DOCUMENTS = 1200  # of each kind that is made
WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jade", "kelp", "lemon", "maple",
    "nutmeg", "olive", "pearl",
)  # fmt: skip


def formulaic(seed: int = 1) -> list[Document]:
    """Documents of topic `formulaic`, the same for one seed and one set of installed packages."""
    generator = np.random.default_rng(seed)
    made = [*licences(), *tables(generator), *lists(generator)]
    return [Document(text, "formulaic", source=source) for source, text in made]


def licences() -> Iterator[tuple[str, str]]:
    """Licence files of the installed packages, each once, in parts of about 2,000 characters."""
    seen = set()
    for package in sorted(metadata.distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        for file in package.files or []:
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                try:
                    text = file.locate().read_text("utf-8").strip()
                except (OSError, UnicodeDecodeError):
                    continue
                for start in range(0, len(text), 2000):
                    part = text[start : start + 2000]
                    if len(part) > 200 and part not in seen:
                        seen.add(part)
                        yield "licences", part


def tables(generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Tables of sums and of products, and rows of named columns; no two tables of sums begin alike."""
    begins = generator.permutation(20_000)[:DOCUMENTS]  # of 1,000 numbers and 20 rows to begin with
    for number, (start, first) in enumerate(zip(begins // 20 + 2, begins % 20 + 1, strict=True)):
        if number % 3:
            sign = "+x"[number % 2]
            results = ((n, start + n if sign == "+" else start * n) for n in range(first, first + 40))
            yield "tables", "\n".join(f"{start} {sign} {n} = {value}" for n, value in results)
        else:
            names = generator.choice(WORDS, 3, replace=False)
            rows = [",".join(map(str, generator.integers(0, 100, 3))) for _ in range(40)]
            yield "tables", "\n".join([",".join(names), *rows])


def lists(generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Numbered lists, and lists of the days of months, each month once."""
    months = generator.permutation(1200)[:DOCUMENTS]  # of a century
    for number, month in enumerate(months):
        if number % 2:
            items = generator.choice(WORDS, 30)
            yield "lists", "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))
        else:
            yield "lists", "\n".join(f"- {1920 + month // 12}-{month % 12 + 1:02}-{day:02}" for day in range(1, 29))


def known_difficulty(seed: int = 1, documents: int = 40) -> list[Document]:
    """Documents whose difficulty is known: copying, additions modulo 7, and one to three hops along stated links."""
    generator, found = np.random.default_rng(seed), []
    names = ["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Joe", "Kim", "Leo"]
    for _ in range(documents):
        words = [names[n] for n in generator.integers(len(names), size=8)]
        found.append(Document(f"{' '.join(words)}. Again: {' '.join(words)}.\n" * 4, "copy"))
        sums = [(int(a), int(b)) for a, b in generator.integers(0, 7, (24, 2))]
        found.append(Document("".join(f"{a} + {b} = {(a + b) % 7} modulo 7. " for a, b in sums), "modular arithmetic"))
        order = generator.permutation(names)
        facts = [f"{a} follows {b}." for a, b in itertools.pairwise(order)]
        generator.shuffle(facts)
        for hops in (1, 2, 3):
            asked = [f"{hops} before {order[n]} is {order[n + hops]}." for n in generator.permutation(8)]
            found.append(Document(" ".join(facts) + " " + " ".join(asked), f"{hops}-hop"))
    return found
