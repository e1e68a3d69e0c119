"""Metrics of rankings, and of places in the full ranking.

Sizes: B requests, K right answers, P places, R rows. Row 0 is padding, in rankings as in right answers. A ranking's metric
is of the full ranking, every row that is no right answer counts as wrong (Krichene and Rendle, KDD 2020). A request
without a right answer has no value: it gets NaN, and an interval leaves it out.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError

Rows = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[Any]
LARGEST = 2**31 - 1
"""The highest row: a request and a row make one 64-bit key."""
BLOCK = 2**18
"""Elements that are worked on at once where a whole array would not fit."""
PLACES = 10
"""Places of a ranking that are judged unless told."""
DIGITS = 5
"""Decimal places of what goes into a record."""


def top(scores: npt.NDArray[Any], places: int = PLACES) -> npt.NDArray[np.int64]:
    """Return the rows [B, places] of the highest scores [B, R + 1], the highest first, ties by the lower row.

    Row 0 is left out; there are no more places than rows.
    """
    ranked = np.empty((len(scores), min(places, scores.shape[1] - 1)), np.int64)
    for line, each in zip(ranked, scores[:, 1:], strict=True):
        # a partition alone takes any of those that tie for the last place, and many products share one text
        least = np.partition(each, -len(line))[-len(line)]
        above = np.flatnonzero(each > least)
        tied = np.flatnonzero(each == least)[: len(line) - len(above)]
        line[:] = np.r_[above[np.argsort(-each[above], kind="stable")], tied] + 1
    return ranked


def ndcg(ranked: Rows, relevant: Rows, k: int = PLACES, gains: npt.NDArray[Any] | None = None) -> Floats:
    """Return nDCG@k [B] of rows best first [B, P] against right answers [B, K].

    The discount is log2(1 + place), the ideal ranking has all right answers by falling gain (Jarvelin and Kekalainen,
    "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 2002). Gains [B, K] are taken as they are, 1 unless given; a
    right answer with gain 0 counts as wrong. NaN where no gain is above 0.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, a row twice, or a gain that is negative or not finite.
    """
    ranked, relevant = _rankings(ranked, relevant, k)
    worth = _gains(relevant, gains)
    discount = 1 / np.log2(np.arange(2, max(ranked.shape[1], min(k, worth.shape[1])) + 2))
    ideal = -np.sort(-worth, axis=1)[:, :k]
    best = ideal @ discount[: ideal.shape[1]]
    return divide(_gained(ranked, relevant, worth) @ discount[: ranked.shape[1]], best)


def mrr(ranked: Rows, relevant: Rows, k: int | None = None) -> Floats:
    """Return 1 / place of the first right answer [B], 0 where none is in the first k places; k None takes all.

    Voorhees, "The TREC-8 Question Answering Track Report" (1999). Rows best first [B, P], right answers [B, K].

    Raises:
        ShipyardError: shapes disagree, nothing to measure, or a row twice.
    """
    found, count = _hits(ranked, relevant, k)
    first = np.where(found.any(1), 1 / (found.argmax(1) + 1), 0.0)
    return np.where(count > 0, first, np.nan)


def recall(ranked: Rows, relevant: Rows, k: int) -> Floats:
    """Return the part [B] of the right answers [B, K] that is in the first k places of rows best first [B, P].

    Manning, Raghavan and Schuetze, "Introduction to Information Retrieval" (2008), 8.3. The divisor is all right answers,
    though k may be fewer.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, or a row twice.
    """
    found, count = _hits(ranked, relevant, k)
    return divide(found.sum(1), count)


def divide(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """Return part / whole [B], NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def whole_rows(name: str, rows: Rows, highest: int = LARGEST) -> npt.NDArray[np.int64]:
    """Return rows [B, N] that are checked: whole numbers in range, none twice in a line but padding."""
    if rows.ndim != 2 or not rows.size:
        raise ShipyardError(
            f"metrics: {name} has nothing in it or the wrong shape",
            value=rows.shape,
            allowed="two sizes, 1 or more each",
        )
    if not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() > highest:
        found = f"{rows.min()} to {rows.max()}, {rows.dtype}"
        raise ShipyardError(
            f"metrics: {name} is no array of rows", value=found, allowed=f"integers from 0 to {highest}"
        )
    ordered = np.sort(rows, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)
    if twice.any():
        line = int(twice.any(1).argmax())
        raise ShipyardError(
            f"metrics: {name} has a row twice in request {line}", value=f"row {ordered[line, 1:][twice[line]][0]}",
            allowed="each row once, 0 as padding", mend="drop repeated rows before the metric",
        )  # fmt: skip
    return rows.astype(np.int64, copy=False)


def _rankings(ranked: Rows, relevant: Rows, k: int | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first k places of rankings, and right answers, both checked."""
    if k is not None and k < 1:
        raise ShipyardError("metrics: too few places to look at", value=k, allowed="1 or more")
    ranked, relevant = whole_rows("ranking", ranked), whole_rows("right answers", relevant)
    same("rankings and right answers", len(ranked), len(relevant))
    return ranked[:, :k], relevant


def same(what: str, one: object, other: object) -> None:
    """Refuse two shapes or sizes that are not equal."""
    if one != other:
        raise ShipyardError(f"metrics: shapes of {what} disagree", value=f"{one} and {other}", allowed="equal ones")


def _gains(relevant: Rows, gains: npt.NDArray[Any] | None) -> Floats:
    """Return gains [B, K] as parts of the request's largest, so that no sum overflows; 0 for padding."""
    if gains is None:
        return (relevant != 0).astype(np.float64)
    same("right answers and gains", relevant.shape, gains.shape)
    worth = np.where(relevant != 0, gains, 0).astype(np.float64)
    if not (np.isfinite(worth) & (worth >= 0)).all():
        wrong = worth[~(np.isfinite(worth) & (worth >= 0))][0]
        raise ShipyardError("metrics: a gain is negative or not finite", value=wrong, allowed="0 or more")
    most = worth.max(1, keepdims=True)
    return np.divide(worth, most, out=np.zeros_like(worth), where=most > 0)


def _gained(ranked: Rows, relevant: Rows, worth: Floats) -> Floats:
    """Return the gain [B, P] of what is at each place, 0 where it is wrong; memory is that of its arguments."""
    size = int(max(ranked.max(), relevant.max())) + 1
    request = np.arange(len(ranked))[:, None] * size
    keys = (request + relevant).ravel()
    order = np.argsort(keys)
    keys, wanted = keys[order], request + ranked
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    gained: Floats = np.where(keys[at] == wanted, worth.ravel()[order][at], 0.0)  # padding has no worth
    return gained


def _hits(ranked: Rows, relevant: Rows, k: int | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return which of the first k places are right [B, P] and how many right answers there are [B]."""
    ranked, relevant = _rankings(ranked, relevant, k)
    return _gained(ranked, relevant, _gains(relevant, None)) > 0, (relevant != 0).sum(1)


def places(scores: npt.NDArray[Any], relevant: Rows) -> Floats:
    """Return the places [B, K] of right answers [B, K] in the full ranking by scores [B, R + 1]; padding gets 0.

    1 is the best. Those that tie share the mean of their places, which is what they get on average when ties are broken
    by chance (Kendall, Biometrika 1945). Column 0 of the scores is left out, minus infinity ranks last. One line is
    sorted at a time: memory beside the answer is 2 R.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, a right answer twice, or a score that is not a number.
    """
    relevant = against(scores, relevant)
    found = np.zeros(relevant.shape)
    for place, line, rows in zip(found, scores, relevant, strict=True):
        ordered = np.sort(line[1:])
        if np.isnan(ordered[-1]):  # a sort leaves them at the end
            raise ShipyardError("metrics: a score is not a number", value=ordered[-1], mend="look for NaN in the model")
        right = rows != 0
        own = line[rows[right]]
        below, above = np.searchsorted(ordered, own, "left"), len(ordered) - np.searchsorted(ordered, own, "right")
        place[right] = (above + 1 + len(ordered) - below) / 2
    return found


def auc(places: Floats, relevant: Rows, rows: int) -> Floats:
    """Return the part [B] of the pairs of a right and a wrong row in which the right one ranks higher, ties as half.

    Mann and Whitney (1947), from `places` [B, K] of the right answers [B, K] among all `rows`; every other row is wrong.
    NaN where no row is right or none is wrong.

    Raises:
        ShipyardError: shapes disagree, or places that are not those of these right answers.
    """
    right = _placed(places, relevant, rows).sum(1)
    lost = places.sum(1) - right * (right + 1) / 2
    pairs = right * (rows - right)
    return 1 - divide(lost, pairs)


def mrr_of_places(places: Floats) -> Floats:
    """Return 1 / place of the best placed right answer [B] from `places` [B, K], 0 as padding.

    Voorhees (1999), over the full ranking. Where right answers tie with others it is 1 / the mean place.

    Raises:
        ShipyardError: nothing to measure, or places below 1.
    """
    right = _placed(places, None, None)
    return np.where(right.any(1), 1 / np.where(right, places, np.inf).min(1), np.nan)


def against(scores: npt.NDArray[Any], relevant: Rows) -> npt.NDArray[np.int64]:
    """Return right answers that are checked against scores [B, R + 1]."""
    if scores.ndim != 2 or len(scores) < 1 or scores.shape[1] < 2:
        raise ShipyardError(
            "metrics: scores have nothing in them or the wrong shape", value=scores.shape,
            allowed="requests x rows + 1, the first column for padding",
        )  # fmt: skip
    found = whole_rows("right answers", relevant, scores.shape[1] - 1)
    same("scores and right answers", len(scores), len(found))
    return found


def _placed(places: Floats, relevant: Rows | None, rows: int | None) -> npt.NDArray[np.bool_]:
    """Return where places [B, K] are no padding."""
    if places.ndim != 2 or not places.size:
        raise ShipyardError(
            "metrics: places have nothing in them or the wrong shape",
            value=places.shape,
            allowed="two sizes, 1 or more",
        )
    right: npt.NDArray[np.bool_] = places != 0
    if relevant is not None:
        same("places and right answers", places.shape, relevant.shape)
        right = relevant != 0
    last = np.inf if rows is None else rows
    if not ((places[right] >= 1) & (places[right] <= last)).all() or places[~right].any():
        raise ShipyardError("metrics: places are not those of the right answers", allowed=f"1 to {last}, 0 for padding")
    return right


def blocks(lines: int, width: int) -> Iterator[slice]:
    """Return slices of lines whose elements are worked on at once."""
    step = max(1, BLOCK // width)
    return (slice(start, start + step) for start in range(0, lines, step))


def rounded(value: float) -> float:
    """Return a figure as it goes into a record."""
    return round(float(value), DIGITS) + 0.0  # no -0.0
