"""A shopper's history as a model's input: the same numpy code in training and in serving, so that neither drifts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

LIMIT = 512
"""Items of a history that are kept, the most recent ones."""

MOST_OFFERS = 20_000
"""Promoted items that a request may name."""

OFFER = ("display", "mailer", "discount")
"""What is told of a promoted item, each from 0 to 1."""

DECAYS = (14, 60, 120, 240)

KINDS = ("purchase", "cart", "click", "view", "search")
"""Kinds of events; all but the first are looks."""

LATELY = 5
"""Baskets that count as the last ones."""

FEATURES = (
    "purchases", *(f"decayed_{days}" for days in DECAYS), "lately", "share", "recency", "since", "gap", "due", "baskets",
    "size", "pause", "looks", *OFFER,
)  # fmt: skip
"""What is told of each item: log(1 + x) of purchases, of purchases decayed by exp(-days / 14, 60, 120 and 240) and of those
in the last 5 baskets; purchases a basket of the shopper; log(1 + x) of days since it was last seen, of baskets since it was
last bought, and of mean days between two purchases (0 for fewer than two); recency over gap, at most 4 (0 without a gap);
log(1 + x) of the shopper's baskets, of what is in one on average, of days since the last one, and of looks (views, clicks
and carts) decayed by exp(-days / 14); and its present offer."""


@dataclass(frozen=True)
class Past:
    """What shoppers did, one after the other: `owner` [n] is the request from 0, `rows` [n] table rows from 1.

    `days_ago` [n] are days before the request, 0 or more; `bought` [n] is false for a look (a view, a click, a cart).
    Purchases of one shopper at one time are a basket.
    """

    owner: Ints
    rows: Ints
    days_ago: Floats
    bought: npt.NDArray[np.bool_]


def histories(past: Past, requests: int, offers: Ints, strengths: Singles, limit: int = LIMIT) -> tuple[Ints, Singles]:
    """Summarise each shopper's past by item, the last seen first.

    `offers` [B, P] are the promoted rows of each request, each once, 0 for padding, and `strengths` [B, P, 3] their `OFFER`.
    The order of the past does not matter.

    Returns:
        Rows [B, m] with 0 as padding, m from 1 to `limit`, and features [B, m, F]; ties of recency by the lower row.
    """
    span = int(max(past.rows.max(initial=0), offers.max(initial=0))) + 1
    keys, where = np.unique(past.owner * span + past.rows, return_inverse=True)
    owner, rows, n = keys // span, keys % span, len(keys)
    bought, days = past.bought, past.days_ago
    last = np.full(n, np.inf)
    np.minimum.at(last, where, days)
    newest, oldest = np.full(n, np.inf), np.zeros(n)
    np.minimum.at(newest, where[bought], days[bought])
    np.maximum.at(oldest, where[bought], days[bought])
    purchases = np.bincount(where, bought, n)
    gap = np.divide(oldest - newest, purchases - 1, out=np.zeros(n), where=purchases > 1)
    due = np.divide(last, gap, out=np.zeros(n), where=gap > 0)
    buyer = past.owner[bought]
    basket, pause, baskets = _baskets(buyer, days[bought], requests)
    since = np.full(n, np.inf)
    np.minimum.at(since, where[bought], basket)
    size = np.divide(np.bincount(buyer, minlength=requests), baskets, out=np.zeros(requests), where=baskets > 0)
    baskets, size, pause = baskets[owner], size[owner], pause[owner]
    looks = np.bincount(where[~bought], np.exp(-days[~bought] / DECAYS[0]), n)
    features = np.stack(
        [
            np.log1p(purchases),
            *(np.log1p(np.bincount(where, bought * np.exp(-days / decay), n)) for decay in DECAYS),
            np.log1p(np.bincount(where[bought], basket < LATELY, n)),
            np.divide(purchases, baskets, out=np.zeros(n), where=baskets > 0),
            np.log1p(last),
            np.log1p(np.where(purchases > 0, since, 0)),
            np.log1p(gap),
            np.minimum(due, 4),
            np.log1p(baskets),
            np.log1p(size),
            np.log1p(pause),
            np.log1p(looks),
            *_present(keys, offers, strengths, span).T,
        ],
        axis=1,
    )
    order = np.lexsort((rows, last, owner))
    place = np.arange(n) - np.searchsorted(owner, owner)  # lexsort keeps each owner's part where it is
    kept = place < limit
    order, place, owner = order[kept], place[kept], owner[kept]
    width = int(place.max(initial=0)) + 1
    items = np.zeros((requests, width), np.int64)
    told = np.zeros((requests, width, len(FEATURES)), np.float32)
    items[owner, place] = rows[order]
    told[owner, place] = features[order]
    return items, told


def _baskets(buyer: Ints, days: Floats, requests: int) -> tuple[Ints, Floats, Ints]:
    """Return the basket [n] of purchases, 0 for a request's newest; of requests [B] the days since it, and their baskets."""
    order = np.lexsort((days, buyer))
    owner, day = buyer[order], days[order]
    new = np.r_[True, (owner[1:] != owner[:-1]) | (day[1:] != day[:-1])][: len(order)]
    baskets = np.bincount(owner[new], minlength=requests)
    pause = np.zeros(requests)
    pause[baskets > 0] = day[new][(np.cumsum(baskets) - baskets)[baskets > 0]]
    basket = np.empty(len(order), np.int64)
    basket[order] = np.cumsum(new) - 1 - (np.cumsum(baskets) - baskets)[owner]
    return basket, pause, baskets


def _present(keys: Ints, offers: Ints, strengths: Singles, span: int) -> Floats:
    """Return the offers [n, 3] of the items that `keys` name, 0 where there is none."""
    found = np.zeros((len(keys), len(OFFER)))
    given = offers > 0
    if given.any() and len(keys):
        asked = (np.arange(len(offers))[:, None] * span + offers)[given]
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        hit = keys[at] == asked
        found[at[hit]] = strengths[given][hit]
    return found


def pad(rows: Sequence[Ints]) -> Ints:
    """Return lists of rows as one array [B, m], padded with 0, m at least 1."""
    sizes = np.array([len(r) for r in rows], np.int64)
    padded = np.zeros((len(rows), max([1, *sizes.tolist()])), np.int64)
    padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.concatenate([*rows, np.zeros(0, np.int64)])
    return padded
