"""Baselines of recommendation and search that a model has to beat, tuned on validation.

Here are popularity and the shopper's own purchases, which Li et al. ("A Next Basket Recommendation Reality Check", TOIS
2023) found that few models beat; shipyard.neighbours adds TIFU-KNN and UP-CF, shipyard.boosted boosted trees over the same
facts, shipyard.lexical search by category path and by BM25.

Sizes as in shipyard.purchases, B or b requests. What is fitted comes from events of the periods before the one that is
scored; a shopper's own history ends before the basket. Scores order rows, their size tells nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.behaviour import VALIDATION, Floats, Ints
from serve.errors import ShipyardError
from shipyard.metrics import PLACES, ndcg, top
from shipyard.purchases import Lines, Purchases, counted, past, purchases

Queries = Ints | Sequence[str]

BLOCK = 128
"""Requests that are scored at a time."""


class Scorer(Protocol):
    """A fitted baseline."""

    def __call__(self, baskets: Ints, queries: Queries) -> Floats:
        """Return scores [b, N + 1] of all rows before `baskets` [b]; queries [b] are path ids or words."""


@dataclass(frozen=True)
class Baseline(ABC):
    """A baseline with its settings; `grid` lists those that are tried."""

    name: ClassVar[str]
    grid: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abstractmethod
    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Return a scorer of baskets of the period `until` or later, fitted to the periods before it."""

    def tune(
        self,
        behaviour: Purchases,
        baskets: Ints,
        queries: Queries,
        relevant: Ints,
        rows: Ints | None = None,
        seed: int = 7,
    ) -> tuple[Self, list[dict[str, Any]]]:
        """Return the best of the grid and every setting with its mean nDCG@10 on validation, ties to the first.

        Baskets [B], queries [B] and right answers [B, K] padded with 0 as in `rank`; `seed` goes to what draws.

        Raises:
            ShipyardError: a basket is not of the validation period.
        """
        periods = behaviour.period[baskets]
        if (periods != VALIDATION).any():
            raise ShipyardError(
                f"baselines: {self.name}: settings are chosen on validation alone",
                value=f"a basket of period {periods[periods != VALIDATION][0]}", allowed=VALIDATION,
                mend="tune on behaviour.first_baskets(VALIDATION)",
            )  # fmt: skip
        drawn = {"seed": seed} if "seed" in {field.name for field in fields(self)} else {}
        tried = [replace(self, **{**drawn, **settings}) for settings in self.grid]
        if rows is not None:
            relevant = np.where(np.isin(relevant, rows), relevant, 0)
        table = []
        for one, settings in zip(tried, self.grid, strict=True):
            ranked = rank(one.fit(behaviour, VALIDATION), baskets, queries, rows)
            table.append({**settings, "ndcg@10": round(float(np.nanmean(ndcg(ranked, relevant))), 5)})
        return tried[int(np.argmax([line["ndcg@10"] for line in table]))], table

    def settings(self) -> dict[str, Any]:
        """Return the settings for a record, what is no plain value left out."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if not callable(value)}


def rank(scorer: Scorer, baskets: Ints, queries: Queries, rows: Ints | None = None, places: int = PLACES) -> Ints:
    """Return the best rows [B, places] of `rows`, all unless given, the best first, ties by the lower row."""
    allowed = None if rows is None else np.r_[0, np.unique(rows)]
    found = []
    for k in range(0, len(baskets), BLOCK):
        scores = scorer(baskets[k : k + BLOCK], queries[k : k + BLOCK])
        found.append(top(scores, places) if allowed is None else allowed[top(scores[:, allowed], places)])
    return np.concatenate(found)


def levels(values: npt.NDArray[Any]) -> Floats:
    """Return values [R] as equally spaced numbers from 0 to below 1 in the same order, equal ones as equal ones."""
    found, place = np.unique(values, return_inverse=True)
    return (place / len(found)).astype(np.float32)


def own_first(own: sparse.csr_array, fill: Floats) -> Floats:
    """Return scores [L, R]: places of what has an own value, ties by `fill` [R], above `fill` for the rest.

    Places, not values, keep ties exact in 32 bits.
    """
    scores = np.tile(fill, (own.shape[0], 1))
    line = np.repeat(np.arange(own.shape[0]), np.diff(own.indptr))
    order = np.lexsort((-own.indices, fill[own.indices], own.data, line))
    scores[line, own.indices[order]] = 1 + np.arange(len(order)) - own.indptr[line]
    return scores


def filled(scores: npt.NDArray[Any], fill: Floats) -> Floats:
    """Return scores [b, R] with those that are not above 0 replaced by `fill` [R] - 1, below 0."""
    return np.where(scores > 0, scores, fill - 1).astype(np.float32)


# --- popularity and own purchases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Popularity(Baseline):
    """Rank by purchases of everybody before the period."""

    name = "popularity"

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Count purchases."""
        return _constant(counted(purchases(behaviour), until))


@dataclass(frozen=True)
class RecentPopularity(Baseline):
    """Rank by purchases of everybody in the last days before the period."""

    name = "recent popularity"
    grid = tuple({"days": days} for days in (7.0, 14.0, 28.0, 56.0, 84.0))

    days: float = 28.0

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Count purchases, ties by those of all days."""
        log = purchases(behaviour)
        return _constant(counted(log, until, self.days) + levels(counted(log, until)))


def _constant(scores: npt.NDArray[np.float64]) -> Scorer:
    fill = levels(scores)

    def scorer(baskets: Ints, queries: Queries) -> Floats:
        return np.tile(fill, (len(baskets), 1))

    return scorer


@dataclass(frozen=True)
class OwnCounts(Baseline):
    """Rank by the shopper's purchases of all time, ties and the rest by popularity."""

    name = "own counts, popularity"

    def weigh(self, found: Lines) -> npt.NDArray[Any]:
        """Return the weight of each event of a history."""
        return np.ones(len(found.line))

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Count what fills the ranking."""
        log = purchases(behaviour)
        fill = levels(counted(log, until))

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            found = past(log, baskets)
            return own_first(found.matrix(self.weigh(found)), fill)

        return scorer


@dataclass(frozen=True)
class OwnDecayed(OwnCounts):
    """Rank by the shopper's purchases, each worth exp(-days / tau), ties and the rest by popularity."""

    name = "own decayed counts, popularity"
    grid = tuple({"tau": tau} for tau in (30.0, 60.0, 90.0, 120.0, 180.0, 270.0, 365.0))

    tau: float = 120.0

    def weigh(self, found: Lines) -> npt.NDArray[Any]:
        """Return the weight of each event of a history."""
        return np.exp(-found.day / self.tau)
