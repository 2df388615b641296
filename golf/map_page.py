"""The depth map as one page that opens from disk: every token coloured by its loops, what they gained, two charts."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf import charts

COLORS = ("#eef4fb", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")  # light to dark


@dataclass(frozen=True)
class Spot:
    """One token of a document that is shown."""

    text: str
    loops: int
    """Passes at the token."""
    spent: int
    """Passes that were spent to predict it; 0 for a document's first token, which BOS predicts, where unknown."""
    losses: tuple[float, ...]
    """Nats of predicting it before the first pass, and where all stop after each."""
    loss: float
    """Nats under the rule, where those that stopped keep their state."""
    confidence: float
    """Probability of the likeliest piece where the position that predicts it stopped."""


@dataclass(frozen=True)
class Shown:
    """A document on the page."""

    title: str
    spots: list[Spot]


def color(depth: int, loops: int) -> str:
    """The colour of a depth of at most `loops`."""
    place = 0 if loops < 2 else round((depth - 1) * (len(COLORS) - 1) / (loops - 1))
    return COLORS[max(0, min(place, len(COLORS) - 1))]


def is_dark(depth: int, loops: int) -> bool:
    return loops > 1 and (depth - 1) / (loops - 1) > 0.5


STYLE = charts.STYLE + """
.text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-radius: 2px; padding: 1px 0; border-bottom: 0 solid currentColor;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.text span:focus, .text span:hover { outline: 2px solid #d95f02; outline-offset: 1px; }
#panel { position: sticky; top: 0; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .75rem; min-height: 4.2rem; font-size: .9rem; }
#panel b { font-family: ui-monospace, monospace; white-space: pre; }
fieldset { border: 1px solid var(--line); border-radius: 6px; display: inline-block; margin: .5rem 0; }
.legend { gap: .75rem; margin: .5rem 0; font-size: 1rem; }
.legend i { display: inline-block; width: 1.2rem; height: 1.2rem; border-radius: 2px; vertical-align: middle;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media print { #panel, fieldset { display: none; } body { max-width: none; } .text { font-size: 10pt; } }
"""

SCRIPT = """
const panel = document.getElementById("panel"), body = document.body;
function tell(t) {
  if (!t.dataset.l) return;
  const losses = t.dataset.l.split(" ").join(" \\u2192 ");
  panel.textContent = "";
  const name = document.createElement("b");
  name.textContent = JSON.stringify(t.textContent);
  panel.append(name, ` loops here: ${t.dataset.a}; spent to predict it: ${t.dataset.s}. `,
    `Nats before and after each loop, where all stop there: ${losses}; as it stopped: ${t.dataset.n}. `,
    `Confidence there: ${t.dataset.c}.`);
}
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, e => {
  if (e.target.matches && e.target.matches(".text span")) tell(e.target); });
document.addEventListener("keydown", e => {
  const here = document.activeElement;
  if (!here.matches(".text span")) return;
  const all = [...document.querySelectorAll(".text span")], at = all.indexOf(here);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (step && all[at + step]) { here.tabIndex = -1; all[at + step].tabIndex = 0; all[at + step].focus();
    e.preventDefault(); }
});
for (const box of document.querySelectorAll("input[name=view]")) box.addEventListener("change", () => {
  body.className = box.value; });
"""


def page(title: str, about: str, loops: int, documents: list[Shown], pictures: list[str]) -> str:
    """The whole page. Everything that is shown is escaped."""
    rules = []
    for depth in range(1, loops + 1):
        look = f"background:{color(depth, loops)};color:{'#fff' if is_dark(depth, loops) else '#1b1f24'};"
        look += f"border-bottom-width:{depth - 1}px"
        rules.append(f".at .a{depth},.before .b{depth}{{{look}}}")
    legend = "".join(
        f'<span><i style="background:{color(d, loops)}"></i> {d} loop{"s" if d > 1 else ""}</span>'
        for d in range(1, loops + 1)
    )
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}{''.join(rules)}</style></head>",
        f'<body class="at"><h1>{html.escape(title)}</h1><p class="faint">{html.escape(about)}</p>',
        '<fieldset><legend>Colour shows</legend>',
        '<label><input type="radio" name="view" value="at" checked> loops at the token</label> ',
        '<label><input type="radio" name="view" value="before"> loops spent to predict it</label></fieldset>',
        f'<div class="legend">{legend}</div>',
        '<div id="panel" role="status">Point at a token, or move with Tab and the arrow keys.</div>',
    ]
    parts = ["\n".join(head)]
    first = True
    for document in documents:
        parts.append(f'<h2>{html.escape(document.title)}</h2><div class="text">')
        for spot in document.spots:
            parts.append(span(spot, first))
            first = False
        parts.append("</div>")
    parts += [f"<h2>{html.escape(heading)}</h2>{svg}" for heading, svg in pictures]
    parts.append(f"<script>{SCRIPT}</script></body></html>\n")
    return "".join(parts)


def span(spot: Spot, first: bool) -> str:
    """One token; a token of white space alone keeps its white space."""
    losses = " ".join(f"{v:.2f}" for v in spot.losses)
    told = f' data-l="{losses}" data-n="{spot.loss:.2f}" data-s="{spot.spent}" data-a="{spot.loops}"'
    told += f' data-c="{spot.confidence:.2f}"'
    return (
        f'<span class="a{spot.loops} b{spot.spent}" tabindex="{0 if first else -1}"{told}>'
        f"{html.escape(spot.text)}</span>"
    )  # fmt: skip


def histogram(depths: np.ndarray, loops: int) -> str:
    """How many tokens stop after each pass, as a picture."""
    counts = np.bincount(depths, minlength=loops + 1)[1:]
    bars = [charts.Bar(str(n), c / counts.sum(), c / counts.sum(), c / counts.sum()) for n, c in enumerate(counts, 1)]
    return charts.bar_chart(bars, 1.0, "share of tokens", "{:.0%}")


def write_png(path: Path, documents: list[Shown], loops: int, before: bool = False, columns: int = 88) -> None:
    """The coloured text with its legend as a picture for papers. Raises UsageError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, row, column = [], 0, 0
    for document in documents:
        for spot in document.spots:
            for character in spot.text:
                if character == "\n" or column >= columns:
                    row, column = row + 1, 0
                if character != "\n":
                    cells.append((row, column, character, spot.spent if before else spot.loops))
                    column += 1
        row, column = row + (2 if column else 1), 0
    for x, character in enumerate("loops"):
        cells.append((row, x, character, 0))
    cells += [(row, 4 + 3 * n, str(n), n) for n in range(1, loops + 1)]
    row += 1
    figure = pyplot.figure(figsize=(columns * 0.09, max(1, row) * 0.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, columns)
    axes.set_ylim(max(1, row), 0)
    axes.axis("off")
    for y, x, character, depth in cells:
        if depth:  # not the words of the legend
            axes.add_patch(pyplot.Rectangle((x, y), 1, 1, color=color(depth, loops), linewidth=0))
        ink = "white" if depth and is_dark(depth, loops) else "black"
        axes.text(x + 0.5, y + 0.55, character, family="monospace", fontsize=8, color=ink, ha="center", va="center",
                  parse_math=False)  # fmt: skip
    charts.save_figure(figure, path)
