"""Purchases as baselines read them: of products or of groups of them, and histories cut from many users at once.

Sizes: N rows, E events, G baskets, U users, L histories, H purchases of all of them. Row 0 is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.behaviour import Ints

Days = npt.NDArray[np.float64]


class Purchases(Protocol):
    """What baselines read of a `Behaviour`; events that are no purchase count for nothing."""

    @property
    def row(self) -> Ints:
        """Row of each event [E]."""

    @property
    def day(self) -> Days:
        """Day of each event [E]."""

    @property
    def bought(self) -> npt.NDArray[np.bool_]:
        """Whether each event is a purchase [E]."""

    @property
    def start(self) -> Ints:
        """Offsets of baskets [G + 1]."""

    @property
    def born(self) -> Ints:
        """Offset of the first event of each basket's user [G]."""

    @property
    def period(self) -> Ints:
        """Period of each basket [G]."""

    @property
    def items(self) -> int:
        """Number of rows, padding not counted."""

    @property
    def texts(self) -> Sequence[str]:
        """Different texts."""

    @property
    def text_of_row(self) -> Ints:
        """Text of each row but padding [N]."""

    @property
    def paths(self) -> Sequence[str]:
        """Different category paths."""

    @property
    def path_of_row(self) -> Ints:
        """Path of each row [N + 1], -1 for padding."""


@dataclass(frozen=True)
class Grouped:
    """Purchases whose items are groups of rows, such as product types; fields as in `Behaviour`."""

    row: Ints
    day: Days
    bought: npt.NDArray[np.bool_]
    start: Ints
    born: Ints
    period: Ints
    texts: Sequence[str]

    @property
    def items(self) -> int:
        """Number of groups."""
        return len(self.texts)

    @property
    def text_of_row(self) -> Ints:
        """Index of each group's name [N]."""
        return np.arange(self.items)

    @property
    def paths(self) -> Sequence[str]:
        """Each group is a path of its own."""
        return self.texts

    @property
    def path_of_row(self) -> Ints:
        """Path of each group [N + 1], -1 for padding."""
        return np.arange(-1, self.items)


def group(behaviour: Purchases, group_of_row: Ints, names: Sequence[str]) -> Grouped:
    """Return purchases of groups 1..len(names) in the same baskets: a basket holds a group once.

    `group_of_row` [N + 1] is 0 for rows that are left out. Product types: `path_of_row + 1` and `paths`.
    """
    basket = np.repeat(np.arange(len(behaviour.period)), np.diff(behaviour.start))
    width = len(names) + 1
    # what is left out or not bought stays as padding, so that no basket is empty
    keys = np.unique(basket * width + np.where(behaviour.bought, group_of_row[behaviour.row], 0))
    basket, row = np.divmod(keys, width)
    start = np.searchsorted(basket, np.arange(len(behaviour.period) + 1))
    first = np.searchsorted(behaviour.start, behaviour.born)
    day = behaviour.day[behaviour.start[:-1]][basket]
    return Grouped(row, day, row > 0, start, start[first], behaviour.period, list(names))


@dataclass(frozen=True)
class Log:
    """Purchases alone, sorted as in `Behaviour`: E of them in the same G baskets, of which some may be empty."""

    row: Ints  # [E]
    day: Days  # [E]
    basket: Ints  # [E]
    start: Ints  # [G + 1], offsets of baskets
    first: Ints  # [G], first basket of the same user
    moment: Days  # [G], day of the basket
    turn: Ints  # [G + 1], baskets with a purchase before
    period: Ints  # [G]
    width: int  # N + 1


def purchases(behaviour: Purchases) -> Log:
    """Leave out what is padding or was not bought."""
    kept = (behaviour.row > 0) & behaviour.bought
    start = np.concatenate([[0], np.cumsum(kept)])[behaviour.start]
    size = np.diff(start)
    return Log(
        row=behaviour.row[kept],
        day=behaviour.day[kept],
        basket=np.repeat(np.arange(len(size)), size),
        start=start,
        first=np.searchsorted(behaviour.start, behaviour.born),
        moment=behaviour.day[behaviour.start[:-1]],
        turn=np.concatenate([[0], np.cumsum(size > 0)]),
        period=behaviour.period,
        width=behaviour.items + 1,
    )


@dataclass(frozen=True)
class Lines:
    """Purchases [H] of L histories, and the number of baskets [L] of each history."""

    line: Ints
    row: Ints
    day: Days
    since: Ints  # baskets of the history after this one
    baskets: Ints
    width: int

    def matrix(self, weight: npt.NDArray[Any]) -> sparse.csr_array:
        """Return the sums [L, N + 1] of weights [H] by history and row."""
        shape = (len(self.baskets), self.width)
        found = sparse.csr_array((np.asarray(weight, np.float64), (self.line, self.row)), shape=shape)
        found.sum_duplicates()
        return found


def history(log: Log, first: Ints, stop: Ints) -> Lines:
    """Return what is in the baskets from `first` [L] until before `stop` [L]."""
    born = log.start[first]
    size = log.start[stop] - born
    line = np.repeat(np.arange(len(size)), size)
    at = np.arange(size.sum()) + np.repeat(born - (np.cumsum(size) - size), size)
    since = log.turn[stop][line] - log.turn[log.basket[at]] - 1
    return Lines(line, log.row[at], log.day[at], since, log.turn[stop] - log.turn[first], log.width)


def past(log: Log, baskets: Ints) -> Lines:
    """Return what was bought before baskets [b]; days are days before the basket."""
    found = history(log, log.first[baskets], baskets)
    return replace(found, day=log.moment[baskets][found.line] - found.day)


def users(log: Log, until: int) -> tuple[Ints, Ints]:
    """Return the first basket [U] of users with a purchase before a period, and the basket [U] after their last."""
    known = np.flatnonzero(log.period < until)[::-1]
    first, at = np.unique(log.first[known], return_index=True)
    stop = known[at] + 1
    there = log.start[stop] > log.start[first]
    return first[there], stop[there]


def counted(log: Log, until: int, days: float = np.inf) -> npt.NDArray[np.float64]:
    """Return the purchases [N + 1] before a period, of the last `days` of that time alone."""
    seen = log.period[log.basket] < until
    if seen.any():
        seen &= log.day > log.day[seen].max() - days
    return np.bincount(log.row[seen], minlength=log.width).astype(np.float64)
