"""A comparison of places as table, Markdown and page."""

from collections.abc import Sequence
from decimal import Decimal

from infra.cost import svg
from infra.cost.page import figure, page, table
from infra.cost.places import Crossing, Place, crossings, loads, rates, verdict
from infra.cost.svg import Curve
from infra.cost.words import money

SHOWN = tuple(Decimal(text) for text in ("0.1", "1", "10", "100", "1000", "10000"))
"""Loads of the table, in requests a second."""


def head(found: Sequence[Place]) -> tuple[str, ...]:
    """Return the names of the table's columns."""
    return (
        "requests a second",
        *(f"{place.name}: {what}" for place in found for what in ("units", "a month", "a million")),
    )


def rows(found: Sequence[Place], currency: str) -> list[tuple[str, ...]]:
    """Return a row for each load: units, cost a month, cost a million predictions of each place."""
    return [
        (
            f"{rate:,f}",
            *(
                text
                for place in found
                for text in (
                    f"{place.units(rate):,f}",
                    money(place.cost(rate), currency),
                    money(place.million(rate), currency),
                )
            ),
        )
        for rate in SHOWN
    ]


def crossing_lines(found: Sequence[Crossing]) -> list[str]:
    """Return the crossing points, a line each; of a stair of many the first and the last of each pair."""
    pairs = sorted({tuple(sorted((one.cheaper, one.dearer))) for one in found})
    out = []
    for pair in pairs:
        mine = [one for one in found if {one.cheaper, one.dearer} == set(pair)]
        shown = mine if len(mine) <= 4 else [mine[0], mine[-1]]
        out += [
            f"from {loads(one.rate)} requests a second the {one.cheaper} costs less than the {one.dearer}"
            for one in shown
        ]
        if len(mine) > 4:
            out.append(f"between these two {pair[0]} and {pair[1]} change places {len(mine) - 2} times, unit by unit")
    return out or ["the places keep their order at every load"]


def comparison_markdown(found: Sequence[Place], currency: str) -> str:
    """Return a comparison as Markdown, which a terminal shows as well."""
    names, lines = head(found), rows(found, currency)
    cells = ["| " + " | ".join(row) + " |" for row in (names, ["---:"] * len(names), *lines)]
    told = [verdict(found), *crossing_lines(crossings(found)), *(place.told for place in found)]
    return "\n".join([*cells, "", *(f"- {line}" for line in told), ""])


def comparison_page(found: Sequence[Place], currency: str, title: str) -> str:
    """Return a comparison as a page with both curves."""
    points = crossings(found)
    by_name = {place.name: place for place in found}
    # a stair of crossings would hide the curves
    marks = points if len(points) <= 6 else [points[0], points[-1]]
    figures = [
        figure(
            f"{what}, {currency}",
            svg.curves(
                f"{what} against requests a second",
                [Curve(place.name, [(float(rate), float(cost(place, rate))) for rate in rates()]) for place in found],
                x="requests a second",
                y=currency,
                marks=[(float(one.rate), float(cost(by_name[one.cheaper], one.rate))) for one in marks],
            ),
            f"Both axes are logarithmic. {'A ring is a crossing; steps' if marks else 'Steps'} are units that are added.",
        )
        for what, cost in (("A month", Place.cost), ("A million predictions", Place.million))
    ]
    told = "".join(
        f"<li>{line}</li>" for line in map(_escaped, [*crossing_lines(points), *(place.told for place in found)])
    )
    names = head(found)
    stair = [(loads(one.rate), one.cheaper, one.dearer) for one in points]
    return page(
        title,
        verdict(found),
        [f'<div class="grid">{"".join(figures)}</div>', table("", names, rows(found, currency), range(len(names))),
         f"<ul>{told}</ul>",
         "<h2>Crossing points</h2>" if stair else "",
         table("", ("from requests a second", "costs less", "costs more"), stair, numbers=(0,))],
    )  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
