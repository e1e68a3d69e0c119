"""A shopper's history as a model's input: the same numpy code in training and in serving, so that neither drifts."""

import numpy as np
import numpy.typing as npt

LIMIT = 512
"""Items of a history that are kept, the most recent ones."""

FEATURES = ("purchases", "decayed_14", "decayed_60", "recency", "gap", "due")
"""What is told of each item: log(1 + x) of purchases, of purchases decayed by exp(-days / 14) and exp(-days / 60), of days
since the last, of mean days between two (0 for a single one), and recency over gap, at most 4 (0 for a single one)."""


def history(
    rows: npt.NDArray[np.int64], days_ago: npt.NDArray[np.float64], limit: int = LIMIT
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Summarise purchases by item, the most recent first.

    `rows` [n] are table rows, 1 or more; `days_ago` [n] are days before the request, 0 or more. Their order does not
    matter.

    Returns:
        Item rows [m] and features [m, 6], m at most `limit`; ties of recency are in the order of rows.
    """
    items, where, purchases = np.unique(rows, return_inverse=True, return_counts=True)
    last = np.full(len(items), np.inf)
    first = np.zeros(len(items))
    np.minimum.at(last, where, days_ago)
    np.maximum.at(first, where, days_ago)
    gap = np.divide(first - last, purchases - 1, out=np.zeros(len(items)), where=purchases > 1)
    due = np.divide(last, gap, out=np.zeros(len(items)), where=gap > 0)
    features = np.stack(
        [
            np.log1p(purchases),
            np.log1p(np.bincount(where, np.exp(-days_ago / 14), len(items))),
            np.log1p(np.bincount(where, np.exp(-days_ago / 60), len(items))),
            np.log1p(last),
            np.log1p(gap),
            np.minimum(due, 4),
        ],
        axis=1,
    )
    order = np.argsort(last, kind="stable")[:limit]
    return items[order].astype(np.int64), features[order].astype(np.float32)


def stack(
    histories: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Pad histories to one batch: rows [b, m] and features [b, m, 6], with row 0 as padding, m at least 1."""
    width = max([1, *(len(items) for items, _ in histories)])
    rows = np.zeros((len(histories), width), np.int64)
    features = np.zeros((len(histories), width, len(FEATURES)), np.float32)
    for i, (items, values) in enumerate(histories):
        rows[i, : len(items)] = items
        features[i, : len(items)] = values
    return rows, features
