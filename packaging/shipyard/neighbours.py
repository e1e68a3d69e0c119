"""Baselines of recommendation that add what similar shoppers bought: TIFU-KNN and UP-CF.

Both learn the other shoppers from the periods before the one that is scored. Sizes as in shipyard.purchases.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.behaviour import Floats, Ints
from shipyard.baselines import Baseline, Queries, Scorer, filled, levels
from shipyard.purchases import Lines, Purchases, counted, history, past, purchases, users


@dataclass(frozen=True)
class TifuKnn(Baseline):
    """Mix the shopper's decayed frequencies with those of the nearest shoppers (Hu et al., SIGIR 2020).

    A history's n baskets, as vectors of 0 and 1, form `groups` groups in order, their sizes differing by one at most, the
    larger ones last (each basket is its own group where there are fewer). A group of s baskets v_1..v_s is
    sum(within^(s - j) v_j) / s, a history of m groups sum(across^(m - i) g_i) / m. Scores are alpha times the shopper's
    vector plus 1 - alpha times the mean of the `neighbours` nearest by Euclidean distance, the shopper left out. The
    authors' own code differs: it decays within groups by the place in the whole history.
    """

    name = "TIFU-KNN"
    grid = tuple(
        {"groups": groups, "within": within, "across": across, "neighbours": neighbours, "alpha": alpha}
        for groups, within, across in ((7, 0.9, 0.7), (15, 1.0, 0.8), (50, 1.0, 0.95), (100, 1.0, 0.95))
        for neighbours, alpha in ((50, 0.4), (100, 0.5), (300, 0.5), (300, 0.7))
    )

    groups: int = 7
    within: float = 0.9
    across: float = 0.7
    neighbours: int = 300
    alpha: float = 0.7

    def vectors(self, found: Lines) -> sparse.csr_array:
        """Return a vector [L, N + 1] of each history."""
        baskets = found.baskets[found.line]
        groups = np.minimum(self.groups, baskets)
        size, larger = baskets // groups, baskets % groups
        place = baskets - 1 - found.since
        turn = (groups - larger) * size
        late = place >= turn
        size = size + late
        index, place = np.divmod(np.where(late, place - turn, place), size)
        index = np.where(late, groups - larger + index, index)
        weight = self.within ** (size - 1 - place) / size * self.across ** (groups - 1 - index) / groups
        return found.matrix(weight)

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Compute the vectors [U, N + 1] of all shoppers."""
        log = purchases(behaviour)
        first, stop = users(log, until)
        fill = levels(counted(log, until))
        table = self.vectors(history(log, first, stop)).astype(np.float32)
        square = table.multiply(table).sum(axis=1)
        turned = table.T.tocsr()

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            own = self.vectors(past(log, baskets)).astype(np.float32)
            # the shopper's own square is the same for all neighbours
            near = 2 * (own @ turned).toarray() - square
            chosen, _ = _nearest(near, first == log.first[baskets][:, None], self.neighbours)
            mean = chosen.multiply(1 / np.maximum(np.diff(chosen.indptr), 1)[:, None]).tocsr()
            return filled((self.alpha * own + (1 - self.alpha) * (mean @ table)).toarray(), fill)

        return scorer


@dataclass(frozen=True)
class UpCf(Baseline):
    """Add the recent frequencies of similar shoppers to the shopper's own (UP-CF; Faggioli et al., UMAP 2020).

    A frequency is the part of the last `window` baskets (all for None) that hold a row. Shoppers are as similar as the
    sets u and v of all they bought, |u and v| / (|u|^asymmetry |v|^(1 - asymmetry)), to the power `locality`; the
    `neighbours` most similar count, and the shopper with similarity 1.
    """

    name = "UP-CF"
    grid = tuple(
        {"window": window, "locality": locality, "asymmetry": asymmetry}
        for window in (10, 25, 50)
        for locality in (3, 5, 10)
        for asymmetry in (0.25, 0.5)
    )

    window: int | None = 25
    locality: float = 5
    neighbours: int = 300
    asymmetry: float = 0.25

    def frequencies(self, found: Lines) -> sparse.csr_array:
        """Return the part [L, N + 1] of each history's last baskets that hold a row."""
        window = np.inf if self.window is None else self.window
        most = np.minimum(window, np.maximum(found.baskets, 1))
        return found.matrix((found.since < window) / most[found.line])

    def fit(self, behaviour: Purchases, until: int) -> Scorer:
        """Compute the sets and the frequencies [U, N + 1] of all shoppers."""
        log = purchases(behaviour)
        first, stop = users(log, until)
        fill = levels(counted(log, until))
        known = history(log, first, stop)
        bought, often = _sets(known), self.frequencies(known).astype(np.float32)
        turned, sizes = bought.T.tocsr(), np.diff(bought.indptr)

        def scorer(baskets: Ints, queries: Queries) -> Floats:
            found = past(log, baskets)
            own = _sets(found)
            size = np.maximum(np.diff(own.indptr), 1)[:, None]
            similar = (own @ turned).toarray() / (size**self.asymmetry * sizes ** (1 - self.asymmetry))
            chosen, value = _nearest(similar, first == log.first[baskets][:, None], self.neighbours)
            chosen.data = value**self.locality
            own_part = self.frequencies(found).astype(np.float32)
            return filled((own_part + chosen.astype(np.float32) @ often).toarray(), fill)

        return scorer


def _sets(found: Lines) -> sparse.csr_array:
    bought = found.matrix(np.ones(len(found.line))).astype(np.float32)
    bought.data[:] = 1
    return bought


def _nearest(
    near: npt.NDArray[Any], own: npt.NDArray[np.bool_], most: int
) -> tuple[sparse.csr_array, npt.NDArray[np.float64]]:
    """Return the `most` nearest [b, U] as ones, the shopper's `own` [b, U] left out, and how near each of them is."""
    near = np.where(own, -np.inf, near)
    most = min(most, near.shape[1])
    column = np.sort(np.argpartition(-near, most - 1, axis=1)[:, :most], axis=1)
    value = np.take_along_axis(near, column, axis=1)
    line, place = np.nonzero(value > -np.inf)
    shape = near.shape
    chosen = sparse.csr_array((np.ones(len(line), np.float32), (line, column[line, place])), shape=shape)
    return chosen, value[line, place].astype(np.float64)
