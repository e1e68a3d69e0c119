"""Baselines of search: the category path that is asked for, and BM25 over the texts of items.

Sizes as in shipyard.purchases, T texts. Queries are path ids, or words.
"""

from dataclasses import dataclass

import bm25s
import numpy as np
import numpy.typing as npt

from models.behaviour import Floats, Ints
from shipyard.baselines import Baseline, Queries, Scorer, levels, own_first
from shipyard.purchases import Purchases, counted, past, purchases


@dataclass(frozen=True)
class ExactPath(Baseline):
    """Rank what is in the asked path by popularity, then the rest by popularity; other words are no path."""

    name = "exact path, popularity"

    def weigh(self, days: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Return the weight of own purchases by days before the basket, None to leave them out."""
        return None

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Count purchases."""
        log = purchases(behaviour)
        fill, path_of_row = levels(counted(log, until)), behaviour.path_of_row
        path_of = {path: index for index, path in enumerate(behaviour.paths)}

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            found = past(log, baskets)
            weight = self.weigh(found.day)
            asked = [path_of.get(query, -2) if isinstance(query, str) else int(query) for query in queries]
            there = path_of_row == np.array(asked, np.int64)[:, None]
            ranked = np.tile(fill, (len(baskets), 1)) if weight is None else own_first(found.matrix(weight), fill)
            return np.where(there, ranked, fill - 1).astype(np.float32)

        return scorer


@dataclass(frozen=True)
class ExactPathOwn(ExactPath):
    """Rank what is in the asked path by the shopper's purchases of all time, ties by popularity."""

    name = "exact path, own counts, popularity"

    def weigh(self, days: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Return the weight of own purchases by days before the basket."""
        return np.ones(len(days))


@dataclass(frozen=True)
class ExactPathDecayed(ExactPath):
    """Rank what is in the asked path by the shopper's purchases, each worth exp(-days / tau), ties by popularity."""

    name = "exact path, own decayed counts, popularity"
    grid = tuple({"tau": tau} for tau in (30.0, 60.0, 90.0, 120.0, 180.0, 270.0, 365.0))

    tau: float = 120.0

    def weigh(self, days: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Return the weight of own purchases by days before the basket."""
        return np.exp(-days / self.tau)


@dataclass(frozen=True)
class Bm25(Baseline):
    """Rank by BM25 of words and item text, ties by popularity.

    Robertson et al., "Okapi at TREC-3" (1994), in Lucene's form, by bm25s (Lu, 2024). A text that many items share counts
    once as a document.
    """

    name = "BM25, popularity"
    grid = tuple({"b": b} for b in (0.0, 0.1, 0.4, 0.75))

    k1: float = 1.2
    b: float = 0.75

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Index the texts."""
        fill = levels(counted(purchases(behaviour), until))
        search = self.index(behaviour)
        text_of_row = behaviour.text_of_row

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            asked, inverse = _different(queries, behaviour)
            # distinct values as whole numbers, so that popularity never reaches the next
            found = np.stack([np.unique(search(words), return_inverse=True)[1] for words in asked])
            return _by_row(found.astype(np.float32), text_of_row)[inverse] + fill

        return scorer

    def index(self, behaviour: Purchases) -> "Index":
        """Return BM25 of words against all texts."""
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        index.index([text.split() for text in behaviour.texts], show_progress=False)
        return Index(index, len(behaviour.texts))


@dataclass(frozen=True)
class Bm25Own(Bm25):
    """Rank by BM25, as part of the query's best, and weighted logarithms of own purchases and popularity.

    Own purchases are each worth exp(-days / tau), or 1 for None.
    """

    name = "BM25, own counts, popularity"
    grid = tuple(
        {"own_weight": own, "popularity_weight": popularity, "tau": tau}
        for own in (0.1, 0.2, 0.3)
        for popularity in (0.03, 0.1, 0.3)
        for tau in (120.0, None)
    )

    b: float = 0.0
    own_weight: float = 0.2
    popularity_weight: float = 0.1
    tau: float | None = None

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Index the texts and count purchases."""
        log = purchases(behaviour)
        popularity = np.log1p(counted(log, until))
        popularity *= self.popularity_weight / max(popularity.max(), 1)
        search = self.index(behaviour)
        text_of_row = behaviour.text_of_row

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            asked, inverse = _different(queries, behaviour)
            found = np.stack([search(words) for words in asked])
            found /= np.maximum(found.max(1, keepdims=True), 1e-9)
            scores = _by_row(found, text_of_row)[inverse] + popularity.astype(np.float32)
            own = past(log, baskets)
            bought = own.matrix(np.exp(-own.day / (self.tau or np.inf))).tocoo()
            scores[bought.row, bought.col] += (self.own_weight * np.log1p(bought.data)).astype(np.float32)
            return scores

        return scorer


@dataclass(frozen=True)
class Index:
    """BM25 over texts."""

    index: bm25s.BM25
    texts: int

    def __call__(self, words: str) -> Floats:
        """Return scores [T] of words that spaces separate."""
        known = [word for word in words.split() if word in self.index.vocab_dict]
        if not known:
            return np.zeros(self.texts, np.float32)
        return np.asarray(self.index.get_scores(known), np.float32)


def _different(queries: Queries, behaviour: Purchases) -> tuple[list[str], Ints]:
    """Return the different queries in words, and which of them each query [b] is."""
    words = [query if isinstance(query, str) else behaviour.paths[int(query)] for query in queries]
    found, inverse = np.unique(words, return_inverse=True)
    return found.tolist(), inverse


def _by_row(found: Floats, text_of_row: Ints) -> Floats:
    """Return the scores [b, N + 1] of rows from those [b, T] of their texts, 0 for padding."""
    return np.concatenate([np.zeros((len(found), 1), np.float32), found[:, text_of_row]], axis=1)
