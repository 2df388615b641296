"""The transform of capitals comes back to the same text, whatever the text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf import casing

letters = st.sampled_from(list(
    "aAbBzZ\u03a3\u03c3\u03c2\u00df\u0130\u0131\u017f\u0149\u01c5\u01c4\ue000\ue001\ue002 .,0Éé文\n"
))  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=letters)))
def test_any_text_comes_back(text):
    assert casing.restore(casing.lower(text)) == text


def test_every_letter_comes_back_alone_and_in_a_word():
    for code in range(0x20000):
        if unicodedata.category(chr(code)) != "Cs":
            for text in (chr(code), f"a{chr(code)}b", f"A{chr(code)}B"):
                assert casing.restore(casing.lower(text)) == text, hex(code)


@pytest.mark.parametrize(("text", "told"), [
    ("The cat", "\ue000the cat"), ("NASA and I", "\ue001nasa and \ue000i"), ("iPhone", "i\ue000phone"),
    ("HTTPServer", "\ue000h\ue000t\ue000t\ue000p\ue000server"),
])  # fmt: skip
def test_words_share_their_small_letters(text, told):
    assert casing.lower(text) == told


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=letters)))
def test_widths_are_the_bytes_of_the_original(text):
    found = casing.widths(text)
    assert len(found) == len(casing.lower(text)) and sum(found) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_goes_the_same_way_as_any_text(text):
    assert casing.lower(text) + "文" == casing.lower(text + "文")
