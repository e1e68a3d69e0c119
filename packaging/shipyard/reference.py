"""What requests and answers look like while nothing has drifted: a reference, made of a release or of a journal.

Each measure of `serve.observed` is told by ten bins of equal share and what fell into each; the fused scores of what was
shown by bins too, with how many of them were right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

REFERENCE = "reference.json"
"""In the gateway's bundle."""

BINS = 10

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What was seen on one route: requests, by measure its values, and of all that was shown scores [S] and labels [S]."""

    requests: int
    values: Mapping[str, Floats]
    scores: Floats
    labels: npt.NDArray[np.bool_]


def refer(seen: Mapping[str, Seen]) -> dict[str, Any]:
    """Return the reference of what was seen, by route, as a document."""
    routes: dict[str, Any] = {}
    for route, one in seen.items():
        measures = {}
        for name, values in sorted(one.values.items()):
            edges = _edges(values)
            measures[name] = {"edges": edges, "counts": binned(values, edges).tolist()}
        edges = _edges(one.scores)
        shown = binned(one.scores, edges)
        right = binned(one.scores[one.labels], edges)
        told = {"edges": edges, "shown": shown.tolist(), "right": right.tolist()}
        routes[route] = {"requests": one.requests, "measures": measures, "calibration": told}
    return {"schema": "shipyard.reference/1", "routes": routes}


def binned(values: Floats, edges: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return how many values fall into each bin: up to the first edge, above it up to the second, ..., above the last."""
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)


def _edges(values: Floats) -> list[float]:
    """Return edges between bins of about equal share; few where many values are the same."""
    if not len(values):
        return []
    found = np.quantile(values, np.arange(1, BINS) / BINS, method="inverted_cdf")
    # processors round sums differently, and an edge need not be sharper; the largest value as one would leave a bin empty
    return [edge for edge in sorted({float(f"{edge:.5g}") for edge in found}) if edge < values.max()]


def gathered(rows: Sequence[tuple[Mapping[str, float], Sequence[tuple[float, bool]]]]) -> Seen:
    """Return what was seen of requests, each told by its measures and by score and label of what was shown."""
    values: dict[str, list[float]] = {}
    for measures, _ in rows:
        for name, value in measures.items():
            values.setdefault(name, []).append(value)
    shown = [one for _, found in rows for one in found]
    return Seen(
        len(rows), {name: np.array(found) for name, found in values.items()},
        np.array([score for score, _ in shown], np.float64), np.array([label for _, label in shown], bool),
    )  # fmt: skip
