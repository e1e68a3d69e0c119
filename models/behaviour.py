"""Behaviour data in memory, and the examples that are cut from it.

An example is one basket: what the household bought before it is the input, what is in it is the answer, and for search
the category path of one of its products is the query (Ai et al., "Learning a Hierarchical Embedding Model for
Personalized Product Search", SIGIR 2017). Nothing of the basket or of later ones reaches the input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from serve.history import history, stack

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class View:
    """A batch as one sub-model sees it, in the rows that it ranks; row 0 is padding.

    `items` [B, H] and `features` [B, H, 6] are histories, `bought` [B, K] the answer, `asked` [B, K] those of it that
    answer the query.
    """

    items: Ints
    features: Floats
    bought: Ints
    asked: Ints

    def take(self, which: "Ints | slice") -> "View":
        """Return some of the requests."""
        return View(self.items[which], self.features[which], self.bought[which], self.asked[which])


@dataclass(frozen=True)
class Behaviour:
    """Hold items and events of the data stage; arrays over rows have row 0 as padding.

    `household`, `row` and `day` are events sorted by household, day and basket, so that a basket and the history
    before it are slices: `start` [G + 1] are the baskets' offsets, `born` [G] the offset of the household's first.
    """

    product_id: Ints  # [N + 1]
    texts: list[str]  # [T]
    text_of_row: Ints  # [N]
    paths: list[str]
    path_of_row: Ints  # [N + 1], -1 for padding
    local: npt.NDArray[np.bool_]  # [N + 1]: sold in the edge's store
    household: Ints
    row: Ints
    day: npt.NDArray[np.float64]
    start: Ints
    born: Ints
    period: Ints  # [G]

    @property
    def items(self) -> int:
        """Number of items, padding not counted."""
        return len(self.product_id) - 1

    @cached_property
    def popularity(self) -> npt.NDArray[np.float64]:
        """Purchases of each row [N + 1] in the train period."""
        train = np.repeat(self.period, np.diff(self.start)) == TRAIN
        return np.bincount(self.row[train], minlength=self.items + 1).astype(np.float64)

    def baskets(self, period: int, *, fewest: int = 1) -> Ints:
        """Return the baskets of a period whose household bought `fewest` lines or more before."""
        known = self.start[:-1] - self.born
        return np.flatnonzero((self.period == period) & (known >= fewest))

    def first_baskets(self, period: int) -> Ints:
        """Return one basket a household, its first of the period."""
        baskets = self.baskets(period)
        _, first = np.unique(self.household[self.start[baskets]], return_index=True)
        return baskets[first]

    def queries(self, baskets: Ints, rng: np.random.Generator | None = None) -> Ints:
        """Return the path [B] that is asked for before each basket: of a random product, or of a fixed one."""
        size = np.diff(self.start)[baskets]
        at = rng.integers(0, size) if rng is not None else baskets % size
        return self.path_of_row[self.row[self.start[baskets] + at]]

    def view(self, baskets: Ints, queries: Ints, place: Ints | None = None) -> View:
        """Return the examples of `baskets`; `place` [N + 1] renumbers rows, 0 for those that are left out."""
        histories, bought, asked = [], [], []
        for basket, query in zip(baskets, queries, strict=True):
            born, start, end = self.born[basket], self.start[basket], self.start[basket + 1]
            rows, days = self.row[born:start], self.day[start] - self.day[born:start]
            answer = np.unique(self.row[start:end])
            match = answer[self.path_of_row[answer] == query]
            if place is not None:
                rows, answer, match = place[rows], place[answer], place[match]
                rows, days = rows[rows > 0], days[rows > 0]
                answer, match = answer[answer > 0], match[match > 0]
            histories.append(history(rows, days))
            bought.append(answer)
            asked.append(match)
        return View(*stack(histories), _pad(bought), _pad(asked))

    def past(self, basket: int) -> tuple[Ints, npt.NDArray[np.float64]]:
        """Return rows and days before it of what was bought before a basket."""
        born, start = self.born[basket], self.start[basket]
        return self.row[born:start], self.day[start] - self.day[born:start]


def placing(rows: Ints, items: int) -> Ints:
    """Return the array [items + 1] that renumbers `rows` to 1..len(rows) and everything else to 0."""
    place = np.zeros(items + 1, np.int64)
    place[rows] = np.arange(1, len(rows) + 1)
    return place


def load_behaviour(folder: Path) -> Behaviour:
    """Read what the data stage wrote into `folder`."""
    items = _columns(folder / "items.parquet")
    events = _columns(folder / "events.parquet")
    household, basket = events["household"], events["basket"]
    starts = np.flatnonzero(np.r_[True, (np.diff(basket) != 0) | (np.diff(household) != 0)])
    births = np.flatnonzero(np.r_[True, np.diff(household) != 0])
    texts, paths = _names(items["text_id"], items["text"]), _names(items["path_id"], items["path"])
    return Behaviour(
        product_id=np.r_[0, items["product_id"]],
        texts=texts,
        text_of_row=items["text_id"],
        paths=paths,
        path_of_row=np.r_[-1, items["path_id"]],
        local=np.r_[False, items["local"]],
        household=household,
        row=events["row"],
        day=events["day"],
        start=np.r_[starts, len(household)],
        born=births[np.searchsorted(births, starts, side="right") - 1],
        period=events["period"][starts].astype(np.int64),
    )


def _columns(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    # copies: torch takes no array that cannot be written to
    return {name: np.array(table[name].to_numpy()) for name in table.column_names}


def _names(ids: Ints, names: Sequence[str]) -> list[str]:
    found: list[str] = [""] * (int(ids.max()) + 1)
    for i, name in dict(zip(ids.tolist(), names, strict=True)).items():
        found[i] = name
    return found


def _pad(rows: list[Ints]) -> Ints:
    width = max([1, *map(len, rows)])
    return np.stack([np.pad(r, (0, width - len(r))) for r in rows])
