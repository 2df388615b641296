"""Pictures in a page: lines, bars and rectangles as inline SVG, without scripts or libraries; everything is escaped."""

from __future__ import annotations

import html
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from golf.errors import UsageError

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #5c6370; --line: #ccd;
  --one: #1f6fb4; --two: #c2410c; --three: #15803d; --four: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb; --faint: #9aa1ad; --line: #39414d;
  --one: #6cb2eb; --two: #fb923c; --three: #4ade80; --four: #c084fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.faint { color: var(--faint); font-size: .9rem; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .bar { fill: #4292c6; } svg .mark { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .85rem; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .curve { fill: none; stroke-width: 1.8; }
"""
INKS = ("var(--one)", "var(--two)", "var(--three)", "var(--four)")
MOST_POINTS = 300  # of a curve that is drawn


@dataclass(frozen=True)
class Bar:
    """A mean with its interval."""

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Points of one line, x rising; `ink` is a place among INKS."""

    name: str
    x: list[float]
    y: list[float]
    ink: int = 0
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Tile:
    """A rectangle of a treemap."""

    name: str
    size: int
    shade: str


def save_figure(figure: object, path: Path) -> None:
    """Write a figure of matplotlib, and close it. Raises UsageError where it cannot be written."""
    from matplotlib import pyplot

    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--png {path}: it cannot be written ({error}).") from error
    finally:
        pyplot.close(figure)


def bar_chart(bars: list[Bar], most: float, unit: str, form: str = "{:.2f}") -> str:
    """Horizontal bars with their intervals; what is below 0 is told and has no bar."""
    height, left, width = 26, 150, 420
    lines = [f'<svg viewBox="0 0 {left + width + 90} {height * len(bars) + 24}" role="img" '
             f'aria-label="{html.escape(unit)}">']  # fmt: skip
    for number, bar in enumerate(bars):
        y = number * height
        end, low, high = (left + width * max(0.0, v) / most for v in (bar.mean, bar.low, bar.high))
        lines.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{html.escape(bar.name[:22])}</text>')
        lines.append(f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(0.0, end - left):.1f}" height="18"/>')
        if bar.high > bar.low:
            lines.append(f'<path class="mark" d="M{low:.1f} {y + 13}H{high:.1f}M{low:.1f} {y + 8}v10M{high:.1f} '
                         f'{y + 8}v10"/>')  # fmt: skip
        lines.append(f'<text x="{max(high, end) + 8:.1f}" y="{y + 17}">{form.format(bar.mean)}</text>')
    lines.append(f'<text x="{left}" y="{height * len(bars) + 16}">{html.escape(unit)}</text></svg>')
    return "".join(lines)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most so many."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis has it: 1.2k, 14M, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points where there are too many to draw."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = [n * len(x) // MOST_POINTS for n in range(MOST_POINTS + 1)]
    mean = lambda values: [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]  # noqa: E731
    return mean(x), mean(y)


def line_chart(curves: list[Curve], across: str, up: str) -> str:
    """Curves over common axes under their legend; nothing where there is no finite point."""
    kept = []
    for c in curves:
        pairs = [(a, b) for a, b in zip(c.x, c.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if pairs:
            x, y = ([float(v) for v in values] for values in zip(*pairs, strict=True))
            kept.append((c, *thinned(x, y)))
    if not kept:
        return ""
    left, top, width, height = 54, 8, 400, 190
    x_low, x_high = min(min(x) for _, x, _ in kept), max(max(x) for _, x, _ in kept)
    y_low, y_high = min(min(y) for _, _, y in kept), max(max(y) for _, _, y in kept)
    x_high, y_high = (high if high > low else low + 1 for low, high in ((x_low, x_high), (y_low, y_high)))
    at_x = lambda v: left + width * (v - x_low) / (x_high - x_low)  # noqa: E731
    at_y = lambda v: top + height * (1 - (v - y_low) / (y_high - y_low))  # noqa: E731
    lines = [f'<svg viewBox="0 0 {left + width + 20} {top + height + 42}" role="img" '
             f'aria-label="{html.escape(up)} over {html.escape(across)}">']  # fmt: skip
    for v in ticks(y_low, y_high):
        lines.append(f'<path class="grid" d="M{left} {at_y(v):.1f}h{width}"/>'
                     f'<text x="{left - 6}" y="{at_y(v) + 4:.1f}" text-anchor="end">{short(v)}</text>')  # fmt: skip
    for v in ticks(x_low, x_high):
        lines.append(f'<text x="{at_x(v):.1f}" y="{top + height + 18}" text-anchor="middle">{short(v)}</text>')
    lines.append(f'<text x="{left + width}" y="{top + height + 36}" text-anchor="end">{html.escape(across)}</text>')
    legend = []
    for c, x, y in kept:
        ink = INKS[c.ink % len(INKS)]
        look = f'stroke="{ink}"' + (' stroke-dasharray="5 4"' if c.dashed else "")
        if c.dots or len(x) == 1:
            lines += [f'<circle cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="3.5" fill="{ink}"/>'
                      for a, b in zip(x, y, strict=True)]  # fmt: skip
        path = "L".join(f"{at_x(a):.1f} {at_y(b):.1f}" for a, b in zip(x, y, strict=True))
        lines.append(f'<path class="curve" {look} d="M{path}"/>')
        legend.append(f'<span><svg width="24" height="10" viewBox="0 0 24 10"><path class="curve" {look} d="M0 5h24"/>'
                      f"</svg> {html.escape(c.name)}</span>")  # fmt: skip
    return f'<div class="legend">{"".join(legend)}</div>{"".join(lines)}</svg>'


def treemap(tiles: list[Tile]) -> str:
    """Rectangles whose areas are the sizes, as square as they come (squarified, Bruls et al. 2000)."""
    width, height = 640.0, 300.0
    tiles = sorted((t for t in tiles if t.size > 0), key=lambda t: -t.size)
    total = sum(t.size for t in tiles)
    lines = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="bytes by kind">']
    x = y = 0.0
    left, scale = list(tiles), width * height / max(1, total)
    while left:
        wide, high = width - x, height - y
        side = min(wide, high)
        row = [left.pop(0)]
        while left and worst([*row, left[0]], side, scale) <= worst(row, side, scale):
            row.append(left.pop(0))
        thick = sum(t.size for t in row) * scale / side
        along = 0.0
        for tile in row:
            length = tile.size * scale / thick
            box = (x, y + along, thick, length) if wide >= high else (x + along, y, length, thick)
            lines.append(drawn(tile, total, *box))
            along += length
        x, y = (x + thick, y) if wide >= high else (x, y + thick)
    return "".join(lines) + "</svg>"


def worst(row: list[Tile], side: float, scale: float) -> float:
    """The least square shape of a row of tiles along a side."""
    area = sum(t.size for t in row) * scale
    return max(max(side**2 * t.size * scale / area**2, area**2 / (side**2 * t.size * scale)) for t in row)


def drawn(tile: Tile, total: int, x: float, y: float, width: float, height: float) -> str:
    """One tile, its name and share inside where there is room; both always in its tooltip."""
    told = f"{tile.name}: {tile.size:,} bytes, {tile.size / total:.1%}"
    box = (f'<g><title>{html.escape(told)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
           f'height="{height:.1f}" fill="{tile.shade}" stroke="var(--page)" stroke-width="2"/>')  # fmt: skip
    if width > 8 * len(tile.name) + 8 and height > 36:
        box += (f'<text x="{x + 7:.1f}" y="{y + 18:.1f}" style="fill:#111">{html.escape(tile.name)}</text>'
                f'<text x="{x + 7:.1f}" y="{y + 34:.1f}" style="fill:#111">{tile.size:,}</text>')  # fmt: skip
    return box + "</g>"
