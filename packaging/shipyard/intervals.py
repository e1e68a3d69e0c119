"""Intervals of means and of paired differences: bootstraps clustered by groups."""

from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError
from shipyard.metrics import Floats, Labels, blocks, rounded, same


def interval(
    values: npt.NDArray[Any], groups: Labels | None = None, seed: int = 7, rounds: int = 2000
) -> dict[str, float]:
    """Return the mean of values [N] with its 95 % bootstrap interval clustered by groups [N], rounded to 5 places.

    Whole groups (households) are drawn with replacement, the mean is that of all values drawn: a ratio of sums (Efron
    1979; Field and Welsh, "Bootstrapping Clustered Data", 2007; percentile form). NaN is left out of sum and count. Without
    groups each value is its own. The order of the values does not matter. With few groups the interval is too narrow: in
    a simulation with uneven sizes it held the truth 92 times in 100 with 40 groups, 95 with 200; one has no width at all.

    Raises:
        ShipyardError: shapes disagree, no value is left, or one is infinite.
    """
    table = _table([_values(values)], values.shape, groups)
    sums = _resample(table, seed, rounds)
    whole = table.sum(0)
    return _between(whole[0] / whole[1], sums[:, 0] / sums[:, 1])


def difference(
    a: npt.NDArray[Any], b: npt.NDArray[Any], groups: Labels | None = None, seed: int = 7, rounds: int = 2000
) -> dict[str, Any]:
    """Return the interval of the mean of a - b, paired [N], and `relative`: that of mean(a - b) / mean(b).

    Drawn as in `interval`; a pair with a NaN is left out. `relative` has its own bootstrap of the ratio of means, and is
    None where the mean of b is not above 0 in every draw.

    Raises:
        ShipyardError: shapes disagree, no pair is left, or a value is infinite.
    """
    same("paired values", a.shape, b.shape)
    first, second = _values(a), _values(b)
    table = _table([first - second, second], a.shape, groups)
    sums, whole = _resample(table, seed, rounds), table.sum(0)
    found: dict[str, Any] = dict(_between(whole[0] / whole[2], sums[:, 0] / sums[:, 2]))
    bounded = whole[1] > 0 and (sums[:, 1] > 0).all()
    found["relative"] = _between(whole[0] / whole[1], sums[:, 0] / sums[:, 1]) if bounded else None
    return found


def _values(values: npt.NDArray[Any]) -> Floats:
    if values.ndim != 1:
        raise ShipyardError("metrics: values have the wrong shape", value=values.shape, allowed="one size")
    found = values.astype(np.float64)
    if np.isinf(found).any():
        raise ShipyardError("metrics: a value is infinite, so is its mean", allowed="numbers, NaN where undefined")
    return found


def _some(known: npt.NDArray[np.bool_]) -> None:
    if not known.any():
        raise ShipyardError(
            "metrics: no value is left to average", value=f"{len(known)}, all undefined", allowed="1 or more",
            mend="look for requests without a right answer",
        )  # fmt: skip


def _table(columns: list[Floats], shape: tuple[int, ...], groups: Labels | None) -> Floats:
    """Return the sums of columns [N] in each group, then its count [G, C + 1], in an order of their own."""
    if groups is not None:
        same("values and groups", shape, groups.shape)
    known = ~np.isnan(columns[0])
    _some(known)
    columns = [column[known] for column in columns] + [np.ones(int(known.sum()))]
    if groups is not None:
        _, which = np.unique(groups[known], return_inverse=True)
        columns = [np.bincount(which, column).astype(np.float64) for column in columns]
    order = np.lexsort(columns[::-1])
    return np.stack([column[order] for column in columns], axis=1)


def _resample(table: Floats, seed: int, rounds: int) -> Floats:
    """Return the sums [rounds, C] of as many lines of the table [G, C] as it has, drawn with replacement."""
    rng, size = np.random.default_rng(seed), len(table)
    sums = np.empty((rounds, table.shape[1]))
    for part in blocks(rounds, size):
        drawn = rng.integers(0, size, (len(sums[part]), size))
        for column, line in enumerate(table.T):
            # a column of ones, the count where each value is its own, adds up to the same in every draw
            sums[part, column] = size if (line == 1).all() else line[drawn].sum(1)
    return sums


def _between(value: float, drawn: Floats) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": rounded(value), "low": rounded(low), "high": rounded(high)}
