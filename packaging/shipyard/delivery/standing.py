"""Where an environment stands: what is live against what the release says, a row each thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "differs", "missing", "not ready", "failed"]


@dataclass(frozen=True)
class Row:
    """One thing that is live: where, what the release wants there, what is there, and by which configuration."""

    place: str
    unit: str
    wanted: str
    live: str
    state: State
    by: str = ""


def same(rows: list[Row]) -> bool:
    """Return whether all that is live is what the release says."""
    return all(row.state == "ok" for row in rows)


def table(rows: list[Row]) -> str:
    """Return the rows as a table of text."""
    cells = [("place", "unit", "release says", "is live", "state", "by")]
    cells += [(row.place, row.unit, row.wanted, row.live, row.state, row.by) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in cells
    )
