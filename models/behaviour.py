"""Behaviour data in memory, and the examples that are cut from it.

An example is one basket: what the shopper did before it is the input, with what the place promotes at the time; what is
in it is the answer. Where the source has no log of searches, the query is the category path of one of its products (Ai
et al., "Learning a Hierarchical Embedding Model for Personalized Product Search", SIGIR 2017). Nothing of the basket or of
later ones reaches the input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.submodel import Answer
from serve.history import OFFER, Past, histories, pad

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

TRAIN, VALIDATION, TEST = 0, 1, 2
PERIODS = ("train", "validation", "test")

Level = Literal["product", "type", "category"]
"""What a sub-model ranks: products, product types (whole category paths) or categories (one level of the path)."""

LEVELS: tuple[Level, ...] = ("product", "type", "category")

DAYS = 100_000.0
"""More days than any data spans."""


@dataclass(frozen=True)
class View:
    """A batch as one sub-model sees it, in the rows that it ranks; row 0 is padding.

    `items` [B, H] and `features` [B, H, F] are histories, `offers` [B, P] promoted rows with `strengths` [B, P, 3], `bought`
    [B, K] the answer, `asked` [B, K] those of it that answer the query, with `gains` [B, K] where a log grades them.
    """

    items: Ints
    features: Floats
    offers: Ints
    strengths: Floats
    bought: Ints
    asked: Ints
    gains: Floats | None = None

    def answer(self, kind: Answer) -> Ints:
        """Return the right answers [B, K]."""
        return self.bought if kind == "bought" else self.asked


@dataclass(frozen=True)
class Segment:
    """What one place promotes in one span of days: `rows` [P], sorted, with `strengths` [P, 3] in 1/255.

    `place` is -1 for everywhere, `until` is exclusive. The arrays are mapped files.
    """

    place: int
    since: float
    until: float
    rows: npt.NDArray[np.int32]
    strengths: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Market:
    """What each place promotes when."""

    segments: tuple[Segment, ...]

    @cached_property
    def _of_place(self) -> dict[int, list[Segment]]:
        found: dict[int, list[Segment]] = {}
        for segment in self.segments:
            found.setdefault(segment.place, []).append(segment)
        return found

    def offers(self, place: int, day: float) -> tuple[Ints, Floats]:
        """Return the rows [P] that are promoted at a place and a day, sorted, with their strengths [P, 3]."""
        found = [
            segment
            for where in ((place, -1) if place >= 0 else (-1,))
            for segment in self._of_place.get(where, ())
            if segment.since <= day < segment.until
        ]
        if not found:
            return np.zeros(0, np.int64), np.zeros((0, len(OFFER)), np.float32)
        rows = np.concatenate([segment.rows for segment in found]).astype(np.int64)
        strength = np.concatenate([segment.strengths for segment in found]).astype(np.float32)
        strength /= 255
        if len(found) == 1:
            return rows, strength
        once, where = np.unique(rows, return_inverse=True)
        strongest = np.zeros((len(once), len(OFFER)), np.float32)
        np.maximum.at(strongest, where, strength)
        return once, strongest


@dataclass(frozen=True)
class Searches:
    """A log of searches with graded answers, one line an answer, sorted by query: `query` [L] counts from 0.

    `text` [Q] are the queries, with `period`, `user` (-1 for none) and `day` (NaN for none) [Q]; `row` [L] products, `gain`
    [L] from 0 to 1.
    """

    text: list[str]
    period: Ints
    user: Ints
    day: npt.NDArray[np.float64]
    query: Ints
    row: Ints
    gain: Floats

    def of(self, period: int) -> Ints:
        """Return the queries of a period that have a right answer."""
        right = np.bincount(self.query, self.gain > 0, len(self.text)) > 0
        return np.flatnonzero((self.period == period) & right)

    def answers(self, queries: Ints) -> tuple[list[Ints], list[Floats]]:
        """Return the right rows of each query, sorted, each once, and their gains."""
        start = np.searchsorted(self.query, np.arange(len(self.text) + 1))
        rows, gains = [], []
        for query in queries.tolist():
            part = slice(start[query], start[query + 1])
            kept = self.gain[part] > 0
            found, where = np.unique(self.row[part][kept], return_inverse=True)
            best = np.zeros(len(found), np.float32)
            np.maximum.at(best, where, self.gain[part][kept])
            rows.append(found)
            gains.append(best)
        return rows, gains


@dataclass(frozen=True)
class Behaviour:
    """Hold items and events of the data stage; arrays over rows have row 0 as padding.

    `user`, `row`, `day`, `bought` and `place` are events sorted by user, day and basket, so that a basket and the history
    before it are slices: `start` [G + 1] are the baskets' offsets, `born` [G] the offset of the user's first. A basket
    counts as an example when something in it was bought.
    """

    item: list[Any]  # [N], ids of the source
    texts: list[str]  # [T]
    text_of_row: Ints  # [N]
    paths: list[str]
    path_of_row: Ints  # [N + 1], -1 for padding
    categories: list[str]
    category_of_row: Ints  # [N + 1], -1 for padding
    local: Flags  # [N + 1]: sold in the edge's store
    user: Ints
    row: Ints
    day: npt.NDArray[np.float64]
    bought: Flags
    place: Ints
    start: Ints
    born: Ints
    period: Ints  # [G]
    market: Market
    searches: Searches

    @property
    def items(self) -> int:
        """Number of items, padding not counted."""
        return len(self.item)

    @cached_property
    def popularity(self) -> npt.NDArray[np.float64]:
        """Purchases of each row [N + 1] in the train period."""
        return self.sold(VALIDATION)

    def sold(self, until: int) -> npt.NDArray[np.float64]:
        """Return the purchases of each row [N + 1] before the period `until`."""
        known = (np.repeat(self.period, np.diff(self.start)) < until) & self.bought
        return np.bincount(self.row[known], minlength=self.items + 1).astype(np.float64)

    def row_of(self, level: Level) -> Ints:
        """Return the row [N + 1] that each product has at a level, 0 for padding."""
        if level == "product":
            return np.arange(self.items + 1)
        return (self.path_of_row if level == "type" else self.category_of_row) + 1

    def names(self, level: Level) -> list[Any]:
        """Return what the rows of a level stand for, the first of them row 1."""
        return {"product": self.item, "type": self.paths, "category": self.categories}[level]

    def baskets(self, period: int, *, fewest: int = 1) -> Ints:
        """Return the baskets of a period with a purchase, whose user has `fewest` events or more before."""
        known = self.start[:-1] - self.born
        buys = np.add.reduceat(self.bought, self.start[:-1]) > 0 if len(known) else np.zeros(0, bool)
        return np.flatnonzero((self.period == period) & (known >= fewest) & buys)

    def owner(self, baskets: Ints) -> Ints:
        """Return the users [B] of baskets."""
        return self.user[self.start[baskets]]

    def spread(self, period: int, each: int) -> Ints:
        """Return at most `each` baskets of a user in a period: its first ones, in the order of baskets."""
        baskets = self.baskets(period)
        owner = self.owner(baskets)
        return baskets[np.arange(len(baskets)) - np.searchsorted(owner, owner) < each]

    def answer(self, basket: int) -> Ints:
        """Return the rows that were bought in a basket, sorted, each once."""
        part = slice(self.start[basket], self.start[basket + 1])
        return np.unique(self.row[part][self.bought[part]])

    def queries(self, baskets: Ints, rng: np.random.Generator | None = None) -> Ints:
        """Return the path [B] that is asked for before each basket: of a random product, or of a fixed one."""
        asked = []
        for basket in baskets.tolist():
            part = slice(self.start[basket], self.start[basket + 1])
            rows = self.row[part][self.bought[part]]
            asked.append(rows[rng.integers(len(rows)) if rng is not None else basket % len(rows)])
        return self.path_of_row[np.array(asked, np.int64)]

    def view(self, baskets: Ints, queries: Ints, place: Ints, *, offers: bool = True) -> View:
        """Return the examples of `baskets`; `place` [N + 1] renumbers rows, 0 for those that are left out.

        `queries` [B] are paths. Without `offers` none is told, for a level whose rows are not products.
        """
        rows, strengths = self._offers(baskets, place) if offers else _none(len(baskets))
        born, start = self.born[baskets], self.start[baskets]
        past = self._past(born, start, self.day[start], place)
        items, features = histories(past, len(baskets), rows, strengths)
        bought, asked = (self.answers(baskets, queries, place, kind) for kind in get_args(Answer))
        return View(items, features, rows, strengths, bought, asked)

    def answers(self, baskets: Ints, queries: Ints, place: Ints, kind: Answer) -> Ints:
        """Return the right answers [B, K] to `baskets` and the paths `queries` [B], renumbered as by `view`."""
        found = []
        for basket, query in zip(baskets.tolist(), queries.tolist(), strict=True):
            rows = self.answer(basket)
            rows = np.unique(place[rows if kind == "bought" else rows[self.path_of_row[rows] == query]])
            found.append(rows[rows > 0])
        return pad(found)

    def log_view(self, queries: Ints, place: Ints) -> View:
        """Return the searches `queries` [B] of the log as examples, with the history of those whose user is known.

        A log names no place, so that no offer is told.
        """
        user, day = self.searches.user[queries], np.nan_to_num(self.searches.day[queries])
        # events are sorted by user and day
        key, span = self.user * DAYS + self.day, np.minimum(day, DAYS - 1)
        known = (user >= 0) & ~np.isnan(self.searches.day[queries])
        born = np.where(known, np.searchsorted(self.user, user), 0)
        start = np.where(known, np.searchsorted(key, user * DAYS + span), 0)
        rows, strengths = _none(len(queries))
        items, features = histories(self._past(born, start, day, place), len(queries), rows, strengths)
        right, gains = self.log_answers(queries, place)
        return View(items, features, rows, strengths, right, right, gains)

    def log_answers(self, queries: Ints, place: Ints) -> tuple[Ints, Floats]:
        """Return the right answers [B, K] to searches of the log, renumbered as by `view`, with their gains [B, K]."""
        rows, gains = self.searches.answers(queries)
        kept = [place[found] > 0 for found in rows]
        right = pad([place[found][k] for found, k in zip(rows, kept, strict=True)])
        worth = np.zeros(right.shape, np.float32)
        worth[right > 0] = np.concatenate([*(gain[k] for gain, k in zip(gains, kept, strict=True)), worth[:0, 0]])
        return right, worth

    def _past(self, born: Ints, start: Ints, day: npt.NDArray[np.float64], place: Ints) -> Past:
        """Return the events from `born` [B] up to `start` [B], seen from `day` [B]."""
        sizes = start - born
        owner = np.repeat(np.arange(len(born)), sizes)
        at = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(born, sizes)
        rows = place[self.row[at]]
        kept = rows > 0
        days = np.repeat(day, sizes) - self.day[at]
        return Past(owner[kept], rows[kept], days[kept], self.bought[at][kept])

    def _offers(self, baskets: Ints, place: Ints) -> tuple[Ints, Floats]:
        """Return promoted rows [B, P] and their strengths [B, P, 3] at the place and time of each basket."""
        found = []
        for k in self.start[baskets].tolist():
            rows, strength = self.market.offers(int(self.place[k]), float(self.day[k]))
            rows = place[rows]
            found.append((rows[rows > 0], strength[rows > 0]))
        rows = pad([rows for rows, _ in found])
        strengths = np.zeros((*rows.shape, len(OFFER)), np.float32)
        strengths[rows > 0] = np.concatenate([*(told for _, told in found), strengths[:0, 0]])
        return rows, strengths

    def past(self, basket: int) -> tuple[Ints, npt.NDArray[np.float64]]:
        """Return rows and days before it of what was bought before a basket."""
        part = slice(self.born[basket], self.start[basket])
        bought = self.bought[part]
        return self.row[part][bought], (self.day[self.start[basket]] - self.day[part])[bought]


def evenly(found: Ints, most: int) -> Ints:
    """Return at most that many of what was found, spread over all."""
    return found[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]


def placing(rows: Ints, items: int) -> Ints:
    """Return the array [items + 1] that renumbers `rows` to 1..len(rows) and everything else to 0."""
    place = np.zeros(items + 1, np.int64)
    place[rows] = np.arange(1, len(rows) + 1)
    return place


def load_behaviour(folder: Path) -> Behaviour:
    """Read what the data stage wrote into `folder`."""
    items = _columns(pq.read_table(folder / "items.parquet"))
    events, period = _by_period(folder, "")
    user, basket = events["user"], events["basket"]
    # periods follow each other in time, so that the order by user and day is restored by a stable sort
    order = np.lexsort((np.arange(len(user)), period, user))
    events, period = {name: column[order] for name, column in events.items()}, period[order]
    user, basket = events["user"], events["basket"]
    starts = np.flatnonzero(np.diff(basket, prepend=-1) | np.diff(user, prepend=-1))
    births = np.flatnonzero(np.diff(user, prepend=-1))
    return Behaviour(
        item=items["item"].tolist(),
        texts=_names(items["text_id"], items["text"]),
        text_of_row=items["text_id"],
        paths=_names(items["path_id"], items["path"]),
        path_of_row=np.r_[-1, items["path_id"]],
        categories=_names(items["category_id"], items["category"]),
        category_of_row=np.r_[-1, items["category_id"]],
        local=np.r_[False, items["local"]],
        user=user,
        row=events["row"],
        day=events["day"],
        bought=events["kind"] == 0,
        place=events["place"],
        start=np.r_[starts, len(user)],
        born=births[np.searchsorted(births, starts, side="right") - 1] if len(starts) else starts,
        period=period[starts],
        market=_market(folder),
        searches=_searches(folder),
    )


def pack_market(folder: Path, name: str) -> None:
    """Turn market-<name>.parquet, sorted by day_from, place, day_until and row, into arrays that can be mapped.

    The sample has 21 million lines of it; here they take seven bytes each, and only those that are asked for are read.
    """
    file = folder / f"market-{name}.parquet"
    spans = _columns(pq.read_table(file, columns=["place", "day_from", "day_until"]))
    key = np.stack([spans["place"], spans["day_from"], spans["day_until"]]).astype(np.float64)
    first = np.flatnonzero(np.r_[True, (np.diff(key, axis=1) != 0).any(0)][: key.shape[1]])
    np.save(folder / f"market-{name}.spans.npy", np.vstack([key[:, first], first]))
    row = pq.read_table(file, columns=["row"])["row"].to_numpy()
    np.save(folder / f"market-{name}.rows.npy", row.astype(np.int32))
    told = pq.read_table(file, columns=list(OFFER))
    np.save(folder / f"market-{name}.strengths.npy",
            np.stack([np.round(255 * told[name].to_numpy()).astype(np.uint8) for name in OFFER], axis=1))  # fmt: skip
    file.unlink()


def _market(folder: Path) -> Market:
    found = []
    for name in PERIODS:
        spans, rows, strengths = (
            np.load(folder / f"market-{name}.{part}.npy", mmap_mode="r", allow_pickle=False)
            for part in ("spans", "rows", "strengths")
        )
        place, since, until, first = np.array(spans)
        start = np.r_[first, len(rows)].astype(np.int64)
        found += [
            Segment(int(p), a, z, rows[i:k], strengths[i:k])
            for p, a, z, i, k in zip(place, since, until, start[:-1], start[1:], strict=True)
        ]
    return Market(tuple(found))


def _searches(folder: Path) -> Searches:
    lines, period = _by_period(folder, "searches-")
    order = np.lexsort((lines["row"], lines["query_id"]))
    _, first, query = np.unique(lines["query_id"][order], return_index=True, return_inverse=True)
    return Searches(
        text=lines["query"][order][first].tolist(),
        period=period[order][first],
        user=lines["user"][order][first],
        day=lines["day"][order][first].astype(np.float64),
        query=query.astype(np.int64),
        row=lines["row"][order],
        gain=lines["gain"][order].astype(np.float32),
    )


def _by_period(folder: Path, prefix: str) -> tuple[dict[str, Any], Ints]:
    """Read one table's files of all periods, one after the other, and the period of each line."""
    tables = [pq.read_table(folder / f"{prefix}{name}.parquet") for name in PERIODS]
    period = np.repeat(np.arange(len(PERIODS)), [table.num_rows for table in tables])
    return _columns(pa.concat_tables(tables)), period


def _columns(table: pa.Table) -> dict[str, Any]:
    # copies: torch takes no array that cannot be written to
    found = {name: np.array(table[name].to_numpy()) for name in table.column_names}
    return {name: c.astype(np.int64) if c.dtype.kind in "iu" else c for name, c in found.items()}


def _names(ids: Ints, names: Sequence[str]) -> list[str]:
    found: list[str] = [""] * (int(ids.max(initial=-1)) + 1)
    for i, name in dict(zip(ids.tolist(), names, strict=True)).items():
        found[i] = name
    return found


def _none(requests: int) -> tuple[Ints, Floats]:
    """Return the offers of requests that are told of none."""
    return np.zeros((requests, 1), np.int64), np.zeros((requests, 1, len(OFFER)), np.float32)
