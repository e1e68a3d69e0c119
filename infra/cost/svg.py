"""Plots as SVG that lies inside a page, takes its colours, and is equal to the byte each time.

Lengths are CSS pixels; colours are the page's variables, so a figure follows light, dark and print. Curves differ in dash
as well as in colour, for those who see colours otherwise and for paper.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 460
LABEL = 150
DASHES = ("", "7 4", "2 4")
COLOURS = ("one", "two", "three")


@dataclass(frozen=True)
class Bar:
    """A row: its name, three values that rise, and what is written at its end."""

    label: str
    low: float
    expected: float
    high: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A named curve of points with x and y above 0, in rising order of x."""

    label: str
    points: Sequence[tuple[float, float]]


def bars(label: str, rows: Sequence[Bar]) -> str:
    """Draw a row for each bar: its length is the expected value, a line spans low to high. None for no rows."""
    most = max((row.high for row in rows), default=0)
    if most <= 0:
        return ""
    room, step = WIDTH - LABEL - 110, 26
    parts = []
    for k, row in enumerate(rows):
        y = k * step + 4
        low, middle, high = (LABEL + room * value / most for value in (row.low, row.expected, row.high))
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{_text(row.label, 22)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{max(middle - LABEL, 0.5):.1f}" height="16" class="bar"/>'
            f'<path d="M{low:.1f} {y + 8}H{high:.1f}M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8" class="span"/>'
            f'<text x="{max(middle, high) + 6:.1f}" y="{y + 12}">{html.escape(row.text)}</text>'
        )
    return _svg(label, len(rows) * step + 6, "".join(parts))


def curves(label: str, series: Sequence[Curve], *, x: str, y: str, marks: Sequence[tuple[float, float]] = ()) -> str:
    """Draw curves on two logarithmic axes, with a ring at each mark. None where nothing is left to draw."""
    xs = [point[0] for curve in series for point in curve.points if min(point) > 0]
    ys = [point[1] for curve in series for point in curve.points if min(point) > 0]
    if not xs:
        return ""
    left, top, right, bottom = 58, 10, WIDTH - 26, 250
    x_low, x_high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (math.log10(point[0]) - x_low) / max(x_high - x_low, 1)
        up = (math.log10(point[1]) - y_low) / max(y_high - y_low, 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for power in range(x_low, x_high + 1):
        across, _ = at((10.0**power, 10.0**y_low))
        parts.append(f'<path d="M{across:.1f} {top}V{bottom}" class="rule"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{_power(power)}</text>')
    for power in range(y_low, y_high + 1):
        _, up = at((10.0**x_low, 10.0**power))
        parts.append(f'<path d="M{left} {up:.1f}H{right}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{_power(power)}</text>')
    for k, curve in enumerate(series):
        line = "L".join("{:.1f} {:.1f}".format(*at(point)) for point in curve.points if min(point) > 0)
        dash = f' stroke-dasharray="{DASHES[k % 3]}"' if DASHES[k % 3] else ""
        parts.append(f'<path d="M{line}" class="curve {COLOURS[k % 3]}"{dash}/>')
    for mark in marks:
        across, up = at(mark)
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" class="ring"/>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 34}" text-anchor="middle" class="axis">{_text(x)}</text>'
    )
    parts.append(
        f'<text x="{-(top + bottom) / 2}" y="12" text-anchor="middle" transform="rotate(-90)" class="axis">{_text(y)}</text>'
    )
    for k, curve in enumerate(series):
        row = bottom + 54 + 18 * k
        dash = f' stroke-dasharray="{DASHES[k % 3]}"' if DASHES[k % 3] else ""
        parts.append(f'<path d="M{left} {row}h34" class="curve {COLOURS[k % 3]}"{dash}/>')
        parts.append(f'<text x="{left + 42}" y="{row + 4}">{_text(curve.label)}</text>')
    return _svg(label, bottom + 50 + 18 * len(series), "".join(parts))


def _svg(label: str, height: int, body: str) -> str:
    named = html.escape(label, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{named}">{body}</svg>'


def _text(text: str, most: int = 80) -> str:
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}\u2026")


def _power(power: int) -> str:
    return f"{10**power:,}" if 0 <= power <= 6 else f"{10.0**power:g}"
