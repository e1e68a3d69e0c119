"""Fuse what several targets answer to one request into one ranking, by numpy alone.

Each source answers with its best products and their scores. Four rules, their parameters fitted on validation and pinned
in the release:

weighted: the sum of each source's weight times its scores, scaled to 0..1 within its answer (what it left out is 0).
vote: the number of sources whose first `depth` products hold it, ties by reciprocal rank.
rrf: the sum of weight / (k + place) (Cormack, Clarke and Büttcher, SIGIR 2009).
stacking: a linear score of what `FEATURES` tell of each source, fitted by the softmax over a request's candidates.

A source that is missing counts nothing; for weighted and rrf the weights of the others are scaled up to the same sum, and
where none of those that spoke has a weight they share it equally: what they say beats no order at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError

Method = Literal["weighted", "vote", "rrf", "stacking"]
METHODS: tuple[Method, ...] = get_args(Method)

PARAMETERS = {"weighted": ("weights",), "vote": ("depth",), "rrf": ("weights", "k"), "stacking": ("weights",)}

FEATURES = ("score", "reciprocal", "given")
"""What stacking is told of a candidate by each source: scaled score, 1 / place, and whether the source named it."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """What the sources said of a request: `products` [C], each once, and by source `scaled` [S, C] from 0 to 1 and `place`
    [S, C] from 1, infinite where the source did not name the product; `spoke` [S] is false for a missing source."""

    products: list[Any]
    scaled: Floats
    place: Floats
    spoke: npt.NDArray[np.bool_]


def gather(answers: Sequence[tuple[Sequence[Any], Sequence[float]] | None]) -> Candidates:
    """Bring answers together: of each source its products, best first, with their scores, or None where it is missing."""
    column: dict[Any, int] = {}
    for answer in answers:
        for product in answer[0] if answer is not None else ():
            column.setdefault(product, len(column))
    scaled = np.zeros((len(answers), len(column)))
    place = np.full((len(answers), len(column)), np.inf)
    for k, answer in enumerate(answers):
        if answer is None or not len(answer[0]):
            continue
        at = [column[product] for product in answer[0]]
        scores = np.asarray(answer[1], np.float64)
        span = scores.max() - scores.min()
        # the last one named stays above what was not named at all
        scaled[k, at] = (scores - scores.min() + 0.01 * span) / (1.01 * span) if span > 0 else 1.0
        place[k, at] = np.arange(1, len(at) + 1)
    return Candidates(list(column), scaled, place, np.array([answer is not None for answer in answers]))


def describe(found: Candidates) -> Floats:
    """Return what stacking sees [C, S * 3], source by source in the order of `FEATURES`."""
    told = np.stack([found.scaled, 1 / found.place, np.isfinite(found.place)], axis=-1)
    return told.transpose(1, 0, 2).reshape(len(found.products), len(found.spoke) * len(FEATURES))


def fuse(found: Candidates, method: str, parameters: Mapping[str, Any]) -> Floats:
    """Return the fused scores [C] of the candidates, the higher the better.

    Raises:
        ShipyardError: the method is unknown, or its parameters are not those of as many sources.
    """
    sources = len(found.spoke)
    if method not in METHODS:
        raise ShipyardError("fusion: unknown method", value=method, allowed=", ".join(METHODS))
    for name in PARAMETERS[method]:
        if name not in parameters:
            raise ShipyardError(
                f"fusion: {method}: no {name}", allowed=", ".join(PARAMETERS[method]), mend="fit it again"
            )
    if method == "vote":
        depth = int(parameters["depth"])
        return (found.place <= depth).sum(0) + (1 / (1 + found.place)).sum(0) / (sources + 1)
    weights = np.asarray(parameters["weights"], np.float64)
    wanted = sources * (len(FEATURES) if method == "stacking" else 1)
    if len(weights) != wanted or not np.isfinite(weights).all():
        raise ShipyardError(
            f"fusion: {method}: wrong weights", value=str(weights.tolist()), allowed=f"{wanted} finite numbers"
        )
    if method == "stacking":
        return describe(found) @ weights
    present = weights * found.spoke
    if not present.any():
        present = found.spoke.astype(np.float64)
    scale = (weights.sum() or 1.0) / (present.sum() or 1.0)
    told = found.scaled if method == "weighted" else 1 / (float(parameters["k"]) + found.place)
    return scale * (present @ told)


def best(found: Candidates, scores: Floats, k: int) -> list[tuple[Any, float]]:
    """Return the best k products with their fused scores, ties in the order in which the sources named them."""
    order = np.argsort(-scores, kind="stable")[:k]
    return [(found.products[i], float(scores[i])) for i in order]
