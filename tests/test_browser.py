"""Pages in a real browser: what is shown, by mouse, keys, in the dark, on paper and on a telephone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golf import charts, map_page, report
from tests import browser
from tests.browser import Browser, contrast
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed here"),
]  # fmt: skip
PIECES = ["The", " cat", " sat", "\n", "<script>window.caught = 1</script>", "<img src=x onerror='window.caught=1'>",
          " &amp;", " \u4e2d\u6587", " and" * 12]  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A map of tokens that took 1 to 4 loops, two documents of them, the second a stranger's markup."""
    losses = (3.0, 2.5, 2.25, 2.2)
    spots = [map_page.Spot(text, n % 4 + 1, (n + 2) % 4 + 1, losses, 2.2, 0.5) for n, text in enumerate(PIECES)]
    documents = [map_page.Shown("a text", spots), map_page.Shown("<b>another</b>", spots)]
    bars = [charts.Bar("code", 2.1, 2.0, 2.2), charts.Bar("poetry", 1.5, 1.2, 1.9)]
    pictures = [("Tokens by loops", map_page.histogram(np.array([s.loops for s in spots]), 4)),
                ("Loops a token by topic", charts.bar_chart(bars, 4, "loops"))]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "depth.html"
    path.write_text(map_page.page("What it thinks longer about", "a model", 4, documents, pictures), "utf-8")
    return path


def test_the_map_shows_every_token_and_complains_of_nothing(opened, drawn, tmp_path):
    opened.media()
    opened.open(drawn)
    texts = opened.run("[...document.querySelectorAll('.text span')].map(e => e.textContent)")
    assert texts == PIECES * 2
    assert opened.run("window.caught === undefined") and opened.faults() == []
    assert opened.run("document.querySelectorAll('svg').length") == 2
    assert opened.run("document.querySelectorAll('.legend span').length") == 4
    assert opened.run("document.querySelectorAll('h2 b').length") == 0
    assert opened.photograph(tmp_path / "light.png")[:8] == b"\x89PNG\r\n\x1a\n"


def test_pointing_at_a_token_tells_of_it(opened, drawn):
    opened.media()
    opened.open(drawn)
    opened.point(".text span:nth-of-type(2)")
    told = opened.run("document.getElementById('panel').textContent")
    assert '" cat"' in told and "loops here: 2; spent to predict it: 4" in told
    assert "3.00 \u2192 2.50 \u2192 2.25 \u2192 2.20" in told and "as it stopped: 2.20" in told and "0.50" in told


def test_keys_walk_from_token_to_token(opened, drawn):
    opened.media()
    opened.open(drawn)
    for _ in range(6):
        opened.press("Tab")
        if opened.run("document.activeElement.matches('.text span')"):
            break
    assert opened.run("document.activeElement.textContent") == "The"
    assert '"The"' in opened.run("document.getElementById('panel').textContent")
    opened.press("ArrowRight"), opened.press("ArrowRight"), opened.press("ArrowLeft")
    assert opened.run("document.activeElement.textContent") == " cat"
    assert '" cat"' in opened.run("document.getElementById('panel').textContent")
    assert opened.run("document.querySelectorAll('.text span[tabindex=\"0\"]').length") == 1


def test_the_switch_turns_to_the_loops_spent_to_predict(opened, drawn):
    opened.media()
    opened.open(drawn)
    shade = "getComputedStyle(document.querySelector('.text span')).backgroundColor"
    at = opened.run(shade)
    opened.click("input[value=before]")
    before = opened.run(shade)
    assert at != before and opened.run("document.body.className") == "before"
    opened.click("input[value=at]")
    assert opened.run(shade) == at


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_stands_out_in_light_and_dark(opened, drawn, scheme, tmp_path):
    opened.media(scheme)
    opened.open(drawn)
    for selector in ("h1", "#panel", ".faint", ".a1", ".a2", ".a3", ".a4"):
        assert contrast(opened, selector) >= 4.5, (scheme, selector)
    page = opened.run("getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(255, 255, 255)") == (scheme == "light")
    opened.photograph(tmp_path / f"{scheme}.png")


def test_on_paper_the_colours_stay_and_the_controls_go(opened, drawn):
    opened.media("light", "print")
    opened.open(drawn)
    assert opened.run("getComputedStyle(document.getElementById('panel')).display") == "none"
    style = "getComputedStyle(document.querySelector('.a4'))"
    assert opened.run(f"{style}.printColorAdjust || {style}.webkitPrintColorAdjust") == "exact"
    assert opened.call("Page.printToPDF", printBackground=False)["data"]


def test_a_telephone_needs_no_scrolling_sideways(opened, drawn, tmp_path):
    opened.media()
    opened.open(drawn, width=360, height=740)
    assert opened.run("document.scrollingElement.scrollWidth") <= 360
    opened.photograph(tmp_path / "telephone.png")


# == the run's page ================================================================================================


@pytest.fixture(scope="module")
def run_page(tmp_path_factory) -> Path:
    """The page of the run kept in this repository, against itself."""
    kept = next((ROOT / "runs").glob("*laptop-seed1*"))
    return report.write(kept, kept, tmp_path_factory.mktemp("run") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_runs_page_has_its_parts_and_complains_of_nothing(opened, run_page, scheme, tmp_path):
    opened.media(scheme)
    opened.open(run_page, height=3000)
    assert opened.faults() == []
    headings = opened.run("[...document.querySelectorAll('h2')].map(e => e.textContent.split(':')[0])")
    assert headings[1:] == ["Learning", "Schedule and speed", "Health", "Bytes", "What packing costs", "Verdict",
                            "Where it comes from"]  # fmt: skip
    assert opened.run("[...document.querySelectorAll('figure svg[role=img]')].length") >= 10
    paths = opened.run("[...document.querySelectorAll('svg path.curve')].map(e => e.getAttribute('d'))")
    assert paths and not any("nan" in path or "inf" in path for path in paths)
    for selector in ("h1", "figcaption", "td", ".good", ".headline li"):
        assert contrast(opened, selector) >= 4.5, (scheme, selector)
    opened.photograph(tmp_path / f"run-{scheme}.png")


def test_a_runs_page_reads_on_a_telephone_and_on_paper(opened, run_page, tmp_path):
    opened.media()
    opened.open(run_page, width=360, height=740)
    assert opened.run("document.scrollingElement.scrollWidth") <= 360
    opened.photograph(tmp_path / "run-telephone.png")
    opened.media("light", "print")
    opened.open(run_page)
    assert opened.call("Page.printToPDF")["data"]


def test_a_hand_opens_every_option(opened, run_page):
    opened.media()
    opened.open(run_page)
    shown = "document.querySelector('details').open"
    assert opened.run(shown) is False
    opened.click("summary")
    assert opened.run(shown) is True and "shape.vocab_size" in opened.run("document.body.innerText")
