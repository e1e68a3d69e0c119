"""Plots: figures as SVG that lies inside a page, takes the page's colours and fonts, and is equal to the byte each time.

One unit is one CSS pixel. Colours are the page's variables (`COLOURS`), so a figure follows light, dark and print. Kinds
of marks differ in shape as well as in colour, for those who see colours otherwise and for paper.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 372
"""Of a figure; two stand side by side on a page, one on a phone."""

SIZE, SMALL = 12.5, 11.5
"""Of letters."""

COLOURS = {
    "ink": "#010101", "muted": "#020202", "rule": "#030303", "paper": "#040404", "model": "#050505",
    "baseline": "#060606", "before": "#070707", "third": "#080808",
}  # fmt: skip
"""Variables of the page, each with the colour that stands for it while a figure is drawn."""

Kind = Literal["model", "baseline", "before", "third", "better", "even", "worse"]

SHAPES: dict[Kind, tuple[str, str, bool]] = {
    "model": ("model", "o", True),
    "baseline": ("baseline", "D", True),
    "before": ("before", "o", False),
    "third": ("third", "s", True),
    "better": ("model", "o", True),
    "even": ("before", "o", False),
    "worse": ("baseline", "D", True),
}
"""Colour, shape, and whether it is filled."""


@dataclass(frozen=True)
class Mark:
    """A value, with its interval where there is one."""

    kind: Kind
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a dot plot: its name, figures in words at its right, and one mark or several, one below the other."""

    label: str
    note: str
    marks: tuple[Mark, ...]
    strong: bool = False


@dataclass(frozen=True)
class Series:
    """A curve with its name; `best` is the point (x, y) to mark, with what to say of it."""

    label: str
    kind: Kind
    points: Sequence[tuple[float, float]]
    best: tuple[float, float] | None = None
    dots: bool = True


def finite(value: Any) -> float | None:
    """Return a number, None for what is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def dots(
    name: str, label: str, rows: Sequence[Row], *, axis: str, zero: bool = False, guide: float | None = None,
    log: bool = False,
) -> str:  # fmt: skip
    """Draw rows of dots and intervals; `zero` marks no difference, `guide` a value to compare with.

    Returns:
        The SVG; an empty text where nothing is left to draw. `name` makes its ids unique, `label` is read aloud.
    """
    values = [v for row in rows for mark in row.marks for v in (mark.low, mark.value, mark.high) if v is not None]
    if log:
        values = [value for value in values if value > 0]
    if not values:
        return ""
    # the text of a row is two lines when its name and its figures do not fit into one
    texts = [(8.0 if row.strong else 6.6) * len(row.label) + 6.2 * len(row.note) > WIDTH - 8 for row in rows]
    tall = [16 * (1 + two) + 12 * len(row.marks) + 9 for row, two in zip(rows, texts, strict=True)]
    height = sum(tall) + 44
    with _figure(height) as figure:
        axes = _axes(figure, 5, 7, 2, 40, height)
        low, high = min(values), max(values)
        if log:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlim(low / 2, high * 2)
        else:
            # a part of a whole starts at 0, so that lengths can be compared
            low = min(low, 0.0)
            high = max(high, 0.0)
            room = (high - low or 1.0) * 0.04
            axes.set_xlim(low - (room if low < 0 else room / 2), high + room)
        axes.set_ylim(sum(tall), 0)
        axes.set_yticks([])
        axes.xaxis.grid(True, color=COLOURS["rule"], linewidth=0.7)
        y = 0.0
        for row, two, space in zip(rows, texts, tall, strict=True):
            _words(axes, y + 13, row.label, "left", COLOURS["ink"], SIZE, "bold" if row.strong else "normal")
            _words(axes, y + (28 if two else 13), row.note, "right", COLOURS["muted"], SMALL)
            # beside the marks alone, not through the words
            band = y + 16 * (1 + two) + 1, y + space - 4
            if zero:
                axes.vlines(0, *band, color=COLOURS["ink"], linewidth=1)
            if guide is not None:
                axes.vlines(guide, *band, color=COLOURS["model"], linewidth=1, alpha=0.55)
            for k, mark in enumerate(row.marks):
                _mark(axes, mark, band[0] + 12 * k + 7)
            y += space
        _axis(axes, axis)
        if not log:
            axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
        return _svg(figure, name, label)


def curves(name: str, label: str, series: Sequence[Series], *, axis: str, x_axis: str = "step") -> str:
    """Draw curves with their names at their ends; the best point of each is ringed and told."""
    kept = [one for one in series if one.points]
    if not kept:
        return ""
    height = 250
    with _figure(height) as figure:
        right = 14 + 6.6 * max(len(one.label) for one in kept)
        axes = _axes(figure, 42, right, 22, 40, height)
        xs = [x for one in kept for x, _ in one.points]
        ys = [y for one in kept for _, y in one.points]
        axes.set_xlim(0, max(xs) * 1.01 or 1)
        room = (max(ys) - min(ys) or 1.0) * 0.12
        axes.set_ylim(min(ys) - room, max(ys) + room / 2)
        axes.yaxis.grid(True, color=COLOURS["rule"], linewidth=0.7)
        ends: list[float] = []
        for one in sorted(kept, key=lambda found: -found.points[-1][1]):
            colour, shape, filled = SHAPES[one.kind]
            x, y = zip(*one.points, strict=True)
            axes.plot(
                x, y, linestyle="-", marker=shape if one.dots else "", markersize=4.5, linewidth=1.8 if one.dots else 1.1,
                color=COLOURS[colour], markerfacecolor=COLOURS[colour if filled else "paper"],
                clip_on=False,
            )  # fmt: skip
            at = axes.transData.transform((x[-1], y[-1]))[1]
            # names of curves that end close together are moved apart
            at = min([at, *(end - 15 for end in ends)])
            ends.append(at)
            place = axes.transAxes.inverted().transform((0, at))[1]
            axes.text(1.03, place, one.label, transform=axes.transAxes, va="center", color=COLOURS[colour])
            if one.best is not None:
                axes.plot(*one.best, "o", markersize=11, markerfacecolor="none", color=COLOURS[colour])
        _axis(axes, x_axis)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.locator_params(axis="y", nbins=6)
        axes.text(-0.12, 1.03, axis, transform=axes.transAxes, color=COLOURS["muted"], fontsize=SMALL)
        return _svg(figure, name, label)


def reliability(name: str, label: str, predicted: Sequence[Any], observed: Sequence[Any], count: Sequence[Any]) -> str:
    """Draw what was predicted against what happened, a point a bin with its 95 % binomial interval, counts below."""
    table = [
        (p, o, n)
        for p, o, n in zip(*([finite(v) for v in column] for column in (predicted, observed, count)), strict=False)
        if p is not None and o is not None and n
    ]
    if not table:
        return ""
    height = 340
    with _figure(height) as figure:
        axes = _axes(figure, 42, 14, 22, 96, height)
        bounds = [wilson(o, n) for _, o, n in table]
        most = min(1.0, 1.06 * max(max(p for p, _, _ in table), max(high for _, high in bounds)))
        axes.set_xlim(0, most)
        axes.set_ylim(0, most)
        axes.grid(True, color=COLOURS["rule"], linewidth=0.7)
        axes.plot([0, most], [0, most], color=COLOURS["muted"], linewidth=1)
        axes.text(most * 0.9, most, "as predicted", ha="right", va="top", color=COLOURS["muted"], fontsize=SMALL)
        for (p, o, _), (low, high) in zip(table, bounds, strict=True):
            axes.plot([p, p], [low, high], color=COLOURS["model"], linewidth=1.4)
            axes.plot(p, o, "o", markersize=5.5, color=COLOURS["model"])
        axes.text(-0.12, 1.03, "observed", transform=axes.transAxes, color=COLOURS["muted"], fontsize=SMALL)
        axes.set_xticklabels([])
        below = _axes(figure, 42, 14, 262, 40, height)
        below.set_xlim(0, most)
        largest = max(n for _, _, n in table)
        below.set_ylim(0, largest * 1.1)
        below.vlines([p for p, _, _ in table], 0, [n for _, _, n in table], color=COLOURS["muted"], linewidth=3)
        below.set_yticks([0, largest], ["0", f"{largest:.0f}"])
        for place in (axes, below):
            place.locator_params(axis="x", nbins=6)
            place.tick_params(length=0)
        axes.locator_params(axis="y", nbins=6)
        _axis(below, "predicted probability; bars: places of the bin")
        return _svg(figure, name, label)


def wilson(part: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a binomial part (Wilson, JASA 1927)."""
    middle = (part + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(part * (1 - part) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _mark(axes: Axes, mark: Mark, y: float) -> None:
    colour, shape, filled = SHAPES[mark.kind]
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.low, mark.high], [y, y], color=COLOURS[colour], linewidth=2, solid_capstyle="butt")
    if mark.value is not None:
        size = {"o": 7.0, "D": 5.6, "s": 6.2}[shape]
        axes.plot(
            mark.value, y, shape, markersize=size, markerfacecolor=COLOURS[colour if filled else "paper"],
            markeredgecolor=COLOURS[colour], markeredgewidth=1.6, clip_on=False,
        )  # fmt: skip


def _words(axes: Axes, y: float, text: str, side: str, colour: str, size: float, weight: str = "normal") -> None:
    axes.text(
        0 if side == "left" else 1, y, text, transform=axes.get_yaxis_transform(), ha=side, va="baseline", fontsize=size,
        color=colour, fontweight=weight,
    )  # fmt: skip


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """Give an empty figure, drawn by rules that neither the user's settings nor the day change."""
    # letters are set by the browser: that matplotlib's font lacks one matters nothing
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.hashsalt": "shipyard", "svg.fonttype": "none", "text.parse_math": False, "font.size": SIZE,
            "axes.unicode_minus": True, "axes.edgecolor": COLOURS["muted"], "text.color": COLOURS["ink"],
        })  # fmt: skip
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        yield figure


def _axes(figure: Figure, left: float, right: float, top: float, bottom: float, height: float) -> Axes:
    """Add axes with margins in pixels."""
    across, down = (WIDTH - left - right) / WIDTH, (height - top - bottom) / height
    axes = figure.add_axes((left / WIDTH, bottom / height, across, down))
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.tick_params(colors=COLOURS["muted"], labelsize=SMALL, length=0, pad=5)
    return axes


def _axis(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, color=COLOURS["muted"], fontsize=SMALL, labelpad=3)


def _svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an element of a page: no metadata, no fixed colours or fonts, ids of its own."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314 - written two lines above
    names = {colour: f"var(--{variable})" for variable, colour in COLOURS.items()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r"#([A-Za-z]\w+)", stream.getvalue()))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        if node.get("id") is not None and node.attrib["id"] not in used:
            del node.attrib["id"]
        for key, value in node.attrib.items():
            if key == "id":
                node.set(key, f"{name}-{value}")
            elif key in ("href", "clip-path"):
                node.set(key, value.replace("#", f"#{name}-"))
            elif key == "style":
                value = re.sub(r"font-family: [^;]*;? ?", "", value)
                node.set(key, re.sub(r"#0\d0\d0\d\b", lambda found: names.get(found[0], "var(--ink)"), value))
            elif key == "d":
                node.set(key, " ".join(value.split()))
        if node.tag not in ("text", "tspan"):
            node.text = node.tail = None
        node.tail = None
    height = np.round(figure.get_figheight() * 72, 2)
    root.attrib = {"viewBox": f"0 0 {WIDTH} {height:g}", "width": str(WIDTH), "height": f"{height:g}", "role": "img",
                   "aria-label": label}  # fmt: skip
    return ElementTree.tostring(root, encoding="unicode")
