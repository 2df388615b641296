"""What kind of piece a token is, by stated rules on the text around it: no tagger, no model.

Words are function words by a closed list; verbs by a list of forms that are seldom anything else, and after `to`, a
modal or a subject pronoun (LAB.md has the method's precision); every other word is a content word.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import numpy as np

CLASSES = (
    "space", "assignment", "bracket", "digit", "punctuation", "keyword", "identifier", "function word", "verb",
    "content word", "continuation",
)  # fmt: skip
INDEX = {name: number for number, name in enumerate(CLASSES)}

FUNCTION_WORDS = frozenset(
    """a about above across after again against all along already also although always am among an and any are around as
    at be because been before behind being below beneath beside between beyond both but by can could did do does
    doing down during each either ever every few for from had has have he her here hers him his how i if in inside
    into is it its itself just less many may me might mine more most much must my near neither never no nor not of
    off on once one only onto or other our ours out outside over own per same shall she should since so some still
    such than that the thee their them then there these they this those thou though through thy till to too toward
    towards under until up upon us very was we were what when where whether which while who whom whose why will with
    within without would yet you your yours""".split()
)
# Forms of common verbs that are seldom nouns or adjectives.
VERBS = frozenset(
    """said says say went go goes going gone came come comes coming took take takes taken taking made makes making gave
    give gives given giving got get gets getting knew know knows known knowing thought think thinks thinking saw see
    sees seen seeing became become becomes told tell tells telling felt feel feels found find finds finding kept keep
    keeps keeping let lets began begin begins begun seemed seem seems brought bring brings bringing wrote write writes
    written asked ask asks asking heard hear hears left held hold holds met lost lose loses paid pay pays sent send
    sends spent spend spends stood sat sang sung ran runs grew grow grows grown fell falls drew drawn broke broken chose
    choose chosen ate eats eaten bought buy buys sold sell sells won taught teach caught wants wanted need needs needed
    believe believes believed remember remembers remembered agree agreed added adds include includes included including
    contain contains contained describe describes described provide provides provided follow follows followed allow
    allows allowed return returns returned raise raises raised create creates created require requires required happen
    happens happened consider considered continue continued decide decided expect expected explain explained help helps
    helped hope hopes hoped likes liked live lived loves loved moved played put puts want
    received remain remained reported seem speak speaks spoke spoken suggest suggests suggested supposed tried try tries
    turned use uses used using waited walked watched worked""".split()
)
BEFORE_VERBS = frozenset(
    """to will would shall should can could may might must i you he she we they don't didn't doesn't won't can't
    couldn't wouldn't shouldn't cannot""".split()
)
WORD = re.compile(rb"[A-Za-z_\x80-\xff][A-Za-z0-9_'\x80-\xff]*")
CODE_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class Kinds:
    """Of each token of one document."""

    label: np.ndarray  # (T,) int8, a place in CLASSES
    fragment: np.ndarray  # (T,) int8: how many pieces of its word stand before it, up to 9
    opens: np.ndarray  # (T,) bool: it begins a sentence


def is_verb(word: str, before: str) -> bool:
    """Whether a word that is no function word is a verb, by the lists, or by the word before it."""
    return word in VERBS or before in BEFORE_VERBS


def kinds(pieces: list[bytes], code: bool) -> Kinds:
    """Classes of a document's pieces, which together are its text; `code` says that it is a program."""
    text, at = b"".join(pieces), 0
    words = {}  # start -> (end, word before)
    before = ""
    for found in (CODE_WORD if code else WORD).finditer(text):
        words[found.start()] = (found.end(), before)
        before = found.group().decode(errors="replace").lower()
    labels, fragments, opens = [], [], []
    end_of_word, count, sentence = 0, 0, True
    for piece in pieces:
        core = piece.strip()
        start = at + len(piece) - len(piece.lstrip())
        inside = at < end_of_word and not piece[:1].isspace()
        at += len(piece)
        count = count + 1 if inside else 0
        if not core:
            label = "space"
        elif inside:
            label = "continuation"
        elif core[:1].isdigit():
            label = "digit"
        elif start in words:
            end_of_word, before = words[start]
            label = word_class(text[start:end_of_word].decode(errors="replace"), before, code)
        elif code and core == b"=" and is_assignment(text, start):
            label = "assignment"
        elif all(c in b"()[]{}" for c in core):
            label = "bracket"
        else:
            label = "punctuation"
        wordly = label not in ("space", "punctuation", "bracket", "continuation")
        opens.append(sentence and wordly and not code)
        if core[-1:] in (b".", b"!", b"?"):
            sentence = True
        elif wordly or label == "continuation":
            sentence = False
        labels.append(INDEX[label])
        fragments.append(min(count, 9))
    return Kinds(np.array(labels, np.int8), np.array(fragments, np.int8), np.array(opens, bool))


def word_class(word: str, before: str, code: bool) -> str:
    """Class of a whole word."""
    if code:
        return "keyword" if keyword.iskeyword(word) else "identifier"
    word = word.lower().strip("'")
    if word in FUNCTION_WORDS:
        return "function word"
    return "verb" if is_verb(word, before) else "content word"


def is_assignment(text: bytes, at: int) -> bool:
    """Whether the `=` at `at` of a program assigns: it is no part of a comparison and names no argument."""
    before = text[text.rfind(b"\n", 0, at) + 1 : at]
    inside = before.count(b"(") > before.count(b")")
    return not inside and before[-1:] not in (b"=", b"<", b">", b"!") and text[at + 1 : at + 2] != b"="
