"""Capital letters as marks before small ones, so that a tokenizer needs one piece for a word however it is written.

A lossless transform in the manner of the contest's CaseOps (#1729): the same text comes back for every string.
"""

from __future__ import annotations

import re

CAPITAL, WORD, LITERAL = "\ue000", "\ue001", "\ue002"  # next letter, next word, next mark itself
SHOWN = str.maketrans({CAPITAL: "\u21e7", WORD: "\u21ea", LITERAL: "\u241b"})  # as arrows and a sign, for people


def paired(letter: str) -> bool:
    """Whether a letter has one small and one capital form that lead to each other."""
    small, capital = letter.lower(), letter.upper()
    return (
        len(small) == len(capital) == 1 and small != capital and small.upper() == capital and capital.lower() == small
    )


def in_one_run(text: str) -> list[str]:
    """Text cut where paired letters begin and end."""
    parts, begin = [], 0
    for at in range(1, len(text) + 1):
        if at == len(text) or paired(text[at]) != paired(text[begin]):
            parts.append(text[begin:at])
            begin = at
    return parts


def marked(word: re.Match[str]) -> str:
    """A word of ASCII letters, at least one of them a capital."""
    letters = word[0]
    if len(letters) > 1 and letters.isupper():
        return WORD + letters.lower()
    return "".join(CAPITAL + c.lower() if c.isupper() else c for c in letters)


def lower(text: str) -> str:
    """Text without paired capitals."""
    if text.isascii():
        return re.sub("[a-z]*[A-Z][A-Za-z]*", marked, text)
    out = []
    for run in in_one_run(text):
        if not paired(run[0]):
            out.append(re.sub(f"([{CAPITAL}{WORD}{LITERAL}])", LITERAL + r"\1", run))
        elif len(run) > 1 and run.isupper():
            out.append(WORD + "".join(c.lower() for c in run))  # a whole word's may differ: a final sigma
        else:
            out.append("".join(CAPITAL + c.lower() if c.isupper() else c for c in run))
    return "".join(out)


def restore(text: str) -> str:
    """The inverse of lower()."""
    out, at = [], 0
    while at < len(text):
        mark = text[at]
        if mark not in (CAPITAL, WORD, LITERAL):
            out.append(mark)
            at += 1
            continue
        end = min(at + 2, len(text))
        while mark == WORD and end < len(text) and paired(text[end]):
            end += 1
        following = text[at + 1 : end]
        out.append(following if mark == LITERAL else following.upper())
        at = end
    return "".join(out)


def widths(text: str) -> list[int]:
    """UTF-8 bytes of the original that each character of lower(text) stands for: marks stand for none."""
    original, out = iter(text), []
    literal = False
    for c in lower(text):
        mark = c in (CAPITAL, WORD, LITERAL) and not literal
        literal = mark and c == LITERAL
        out.append(0 if mark else len(next(original).encode()))
    return out
