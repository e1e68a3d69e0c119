"""The strongest baseline of recommendation: boosted trees over the facts of a history, ranked by LambdaMART.

Burges, "From RankNet to LambdaRank to LambdaMART" (2010), by LightGBM (Ke et al., NeurIPS 2017). Candidates are what the
shopper bought before and the most popular rows. Each example sees statistics of the time before it alone: of those taken
at the ends of weeks, the last before its day. Sizes as in shipyard.purchases, P candidates, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt

from models.behaviour import Floats, Ints
from serve.errors import ShipyardError
from shipyard.baselines import BLOCK, Baseline, Queries, Scorer, filled, levels
from shipyard.purchases import Log, Purchases, counted, past, purchases

TAUS = (7, 14, 30, 60, 120, 240)
RECENT = 28.0
"""Days of recent popularity."""

FEATURES = (
    "count", "count per basket", *(f"count decayed by exp(-days / {tau})" for tau in TAUS), "count in last 5 baskets",
    "days since last", "mean gap in days", "days since last / mean gap", "baskets since last",
    "type count", "type decayed count", "type days since last", "type days since last / mean gap", "part of type",
    "popularity", "recent popularity", "purchases per buyer", "baskets", "basket size", "days since any purchase",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """What is known of all rows [N + 1] on a day: the logarithm of weekly purchases, of recent ones, of those per buyer."""

    day: float
    popularity: Floats
    recent: Floats
    loyalty: Floats

    def most_popular(self, most: int) -> Ints:
        """Return the rows of most recent purchases, ties by all purchases, then the lower row."""
        order = np.lexsort((np.arange(len(self.recent)), -self.popularity, -self.recent))
        return order[order > 0][:most]


@dataclass(frozen=True)
class Candidates:
    """Candidates of a block: their line, row and features [P, F], sorted by line and row."""

    line: Ints
    row: Ints
    features: Floats


@dataclass(frozen=True)
class Boosted(Baseline):
    """Rank candidates by boosted trees, the rest by popularity.

    Candidates are the `own` rows of the shopper with the highest counts decayed by exp(-days / 120), and the `popular`
    ones of the last weeks. It learns from `examples` baskets of the last `weeks` before the period, few of each shopper.
    Training is deterministic for a number of threads.
    """

    name = "boosted trees"
    grid = ({"leaves": 15}, {"leaves": 31}, {"leaves": 63})

    leaves: int = 31
    trees: int = 200
    rate: float = 0.05
    least: int = 50
    examples: int = 12_000
    weeks: int = 12
    own: int = 120
    popular: int = 50
    seed: int = 7
    threads: int = 1

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Train on baskets before the period."""
        log, path_of_row = purchases(behaviour), behaviour.path_of_row
        fill = levels(counted(log, until))
        booster = self.train(log, path_of_row, until)
        now = snapshot(log, until, np.inf)

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            found = self.describe(log, path_of_row, baskets, now)
            scores = np.zeros((len(baskets), len(fill)), np.float32)
            value = np.asarray(booster.predict(found.features, num_threads=self.threads), np.float64)
            scores[found.line, found.row] = np.exp(np.clip(value, -60, 60))
            return filled(scores, fill)

        return scorer

    def train(self, log: Log, path_of_row: Ints, until: int) -> lightgbm.Booster:
        """Return the trees.

        Raises:
            ShipyardError: no basket before the period has a right candidate.
        """
        features, labels, sizes = [], [], []
        for baskets, seen in self._blocks(log, until):
            found = self.describe(log, path_of_row, baskets, seen)
            right = np.isin(found.line * log.width + found.row, _answers(log, baskets))
            # a basket without a right candidate teaches nothing
            kept = np.bincount(found.line, right, len(baskets))[found.line] > 0
            features.append(found.features[kept])
            labels.append(right[kept])
            sizes.append(np.unique(found.line[kept], return_counts=True)[1])
        if not sum(map(len, sizes)):
            raise ShipyardError(
                "baselines: boosted trees have nothing to learn from", value=0, allowed="a basket after another one",
                mend=f"give users that bought in the last {self.weeks} weeks before period {until}, and before that",
            )  # fmt: skip
        return lightgbm.train(
            {
                "objective": "lambdarank", "learning_rate": self.rate, "num_leaves": self.leaves, "verbose": -1,
                "min_data_in_leaf": self.least, "lambdarank_truncation_level": 15, "seed": self.seed,
                "num_threads": self.threads, "deterministic": True, "force_row_wise": True,
            },
            lightgbm.Dataset(
                np.concatenate(features), np.concatenate(labels).astype(np.int8), group=np.concatenate(sizes),
                feature_name=list(FEATURES),
            ),
            num_boost_round=self.trees,
        )  # fmt: skip

    def describe(self, log: Log, path_of_row: Ints, baskets: Ints, seen: Snapshot) -> Candidates:
        """Return the candidates of baskets with their features."""
        return describe(log, path_of_row, baskets, seen, self.own, self.popular)

    def _blocks(self, log: Log, until: int) -> Iterator[tuple[Ints, Snapshot]]:
        """Yield the baskets to learn from with what was known at the end of the week before, by week."""
        known = log.period < until
        end = log.moment[known].max()
        bought = np.diff(log.start) > 0
        able = known & bought & (log.start[:-1] > log.start[log.first])
        rng = np.random.default_rng(self.seed)
        baskets = np.flatnonzero(able & (log.moment > end - 7 * self.weeks))
        drawn = rng.permutation(baskets)
        # by turns of shoppers, so that those who come every day do not decide alone
        order = np.argsort(log.first[drawn], kind="stable")
        owner = log.first[drawn][order]
        turn = np.empty(len(drawn), np.int64)
        turn[order] = np.arange(len(drawn)) - np.searchsorted(owner, owner)
        chosen = np.sort(drawn[np.argsort(turn, kind="stable")[: self.examples]])
        week = np.ceil((end - log.moment[chosen]) / 7).astype(np.int64)
        for ago in range(self.weeks, 0, -1):
            those = chosen[np.maximum(week, 1) == ago]
            if len(those):
                seen = snapshot(log, until, end - 7 * ago)
                for k in range(0, len(those), BLOCK):
                    yield those[k : k + BLOCK], seen


def snapshot(log: Log, until: int, day: float) -> Snapshot:
    """Return what is known before a day of the periods before `until`; a later day is their end."""
    known = (log.period[log.basket] < until) & (log.day < day)
    if not known.any():
        empty = np.zeros(log.width, np.float32)
        return Snapshot(day, empty, empty, empty)
    rows, days = log.row[known], log.day[known]
    weeks = max((days.max() - days.min()) / 7, 1)
    total = np.bincount(rows, minlength=log.width)
    recent = np.bincount(rows[days > days.max() - RECENT], minlength=log.width)
    pairs = np.unique(log.first[log.basket[known]] * log.width + rows)
    buyers = np.bincount(pairs % log.width, minlength=log.width)
    loyalty = np.divide(total, buyers, out=np.zeros(log.width), where=buyers > 0)
    parts = (np.log1p(total / weeks), np.log1p(recent / min(weeks, RECENT / 7)), loyalty)
    return Snapshot(day, *(part.astype(np.float32) for part in parts))


def describe(log: Log, path_of_row: Ints, baskets: Ints, seen: Snapshot, most: int, popular: int) -> Candidates:
    """Return the candidates of baskets [b], `most` own rows and the `popular` ones, NaN for what is not known of them."""
    found = past(log, baskets)
    width, paths = log.width, int(path_of_row.max()) + 1
    own, at = np.unique(found.line * width + found.row, return_inverse=True)
    often = np.add.outer(np.arange(len(baskets)) * width, seen.most_popular(popular)).ravel()
    key = np.union1d(own, often)
    line, row = np.divmod(key, width)
    place = np.searchsorted(key, own)
    path = path_of_row[row]
    of_path, at_path = np.unique(found.line * paths + path_of_row[found.row], return_inverse=True)
    where = np.minimum(np.searchsorted(of_path, line * paths + path), max(len(of_path) - 1, 0))
    known = of_path[where] == line * paths + path if len(of_path) else np.zeros(len(key), bool)

    def spread(values: npt.NDArray[Any], otherwise: float) -> npt.NDArray[np.float64]:
        column = np.full(len(key), otherwise, np.float64)
        column[place] = values
        return column

    def by_path(values: npt.NDArray[Any], otherwise: float) -> npt.NDArray[np.float64]:
        return np.where(known, values[where], otherwise) if len(of_path) else np.full(len(key), otherwise, np.float64)

    def total(weight: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        return np.bincount(at, weight, len(own))

    count = np.bincount(at, minlength=len(own)).astype(np.float64)
    last, gap = _times(at, found.day, count)
    since = np.full(len(own), np.iinfo(np.int64).max)
    np.minimum.at(since, at, found.since)
    path_count = np.bincount(at_path, minlength=len(of_path)).astype(np.float64)
    path_last, path_gap = _times(at_path, found.day, path_count)
    counts, path_counts = spread(count, 0), by_path(path_count, 0)
    any_last = np.full(len(baskets), np.inf)
    np.minimum.at(any_last, found.line, found.day)
    visits = np.maximum(found.baskets, 1)
    columns: list[npt.NDArray[Any]] = [
        *(counts, counts / visits[line], *(spread(total(np.exp(-found.day / tau)), 0) for tau in TAUS)),
        spread(total((found.since < 5).astype(np.float64)), 0),
        *(spread(last, np.nan), spread(gap, np.nan), spread(last / gap, np.nan), spread(since.astype(float), np.nan)),
        *(path_counts, by_path(np.bincount(at_path, np.exp(-found.day / 60), len(of_path)), 0)),
        *(by_path(path_last, np.nan), by_path(path_last / path_gap, np.nan), counts / np.maximum(path_counts, 1)),
        *(seen.popularity[row], seen.recent[row], seen.loyalty[row]),
        *(found.baskets[line], (np.bincount(found.line, minlength=len(baskets)) / visits)[line], any_last[line]),
    ]
    features = np.stack(columns, axis=1).astype(np.float32)
    order = np.lexsort((-features[:, 2 + TAUS.index(120)], line))
    above = np.empty(len(key), np.int64)
    above[order] = np.arange(len(key)) - np.searchsorted(line, line)
    kept = (counts > 0) & (above < most) | np.isin(key, often)
    return Candidates(line[kept], row[kept], features[kept])


def _times(
    at: Ints, days: npt.NDArray[np.float64], count: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return days since the last event of each group, and the mean days between its events, NaN for fewer than two."""
    last, oldest = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(last, at, days)
    np.maximum.at(oldest, at, days)
    # events of one day have no gap to be due by
    gap = np.divide(oldest - last, count - 1, out=np.full(len(count), np.nan), where=(count > 1) & (oldest > last))
    return last, gap


def _answers(log: Log, baskets: Ints) -> Ints:
    size = log.start[baskets + 1] - log.start[baskets]
    line = np.repeat(np.arange(len(baskets)), size)
    at = np.arange(size.sum()) + np.repeat(log.start[baskets] - (np.cumsum(size) - size), size)
    keys: Ints = line * log.width + log.row[at]
    return keys
