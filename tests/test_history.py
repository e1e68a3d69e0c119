"""Histories: against a plain reference that takes one shopper at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.history import DECAYS, FEATURES, LIMIT, OFFER, Past, histories, pad

PLACE = {name: k for k, name in enumerate(FEATURES)}


def plain(events, offers, limit=LIMIT):
    """One shopper's history: events are (row, days ago, bought), offers strengths by row."""
    visits = {days for _, days, bought in events if bought}
    found = []
    for row in {row for row, _, _ in events}:
        bought = sorted(days for r, days, b in events if r == row and b)
        looks = [days for r, days, b in events if r == row and not b]
        last = min(bought + looks)
        gap = (bought[-1] - bought[0]) / (len(bought) - 1) if len(bought) > 1 else 0
        told = {
            "purchases": math.log(1 + len(bought)),
            **{f"decayed_{d}": math.log(1 + sum(math.exp(-days / d) for days in bought)) for d in DECAYS},
            "lately": math.log(1 + sum(days in sorted(visits)[:5] for days in bought)),
            "share": len(bought) / len(visits) if visits else 0,
            "recency": math.log(1 + last),
            "since": math.log(1 + sum(days < min(bought) for days in visits)) if bought else 0,
            "gap": math.log(1 + gap),
            "due": min(4, last / gap) if gap > 0 else 0,
            "baskets": math.log(1 + len(visits)),
            "size": math.log(1 + sum(b for *_, b in events) / len(visits)) if visits else 0,
            "pause": math.log(1 + min(visits)) if visits else 0,
            "looks": math.log(1 + sum(math.exp(-days / 14) for days in looks)),
            **dict(zip(OFFER, offers.get(row, (0, 0, 0)), strict=True)),
        }
        found.append((last, row, [told[name] for name in FEATURES]))
    found.sort()
    return [row for _, row, _ in found[:limit]], [told for _, _, told in found[:limit]]


def past(shoppers):
    lines = [(k, *event) for k, events in enumerate(shoppers) for event in events]
    owner, rows, days, bought = zip(*lines, strict=True) if lines else ((), (), (), ())
    return Past(np.array(owner, np.int64), np.array(rows, np.int64), np.array(days, float), np.array(bought, bool))


def promoted(offers):
    rows = pad([np.array(sorted(told), np.int64) for told in offers])
    strengths = np.zeros((*rows.shape, len(OFFER)), np.float32)
    for i, told in enumerate(offers):
        for k, row in enumerate(sorted(told)):
            strengths[i, k] = told[row]
    return rows, strengths


def summarise(shoppers, offers=None, limit=LIMIT):
    return histories(past(shoppers), len(shoppers), *promoted(offers or [{}] * len(shoppers)), limit)


events = st.tuples(st.integers(1, 12), st.integers(0, 60).map(lambda half: half / 2), st.booleans())
"""Few products and few days, so that times, products and both meet again."""

strengths = st.tuples(*[st.sampled_from([0.0, 0.25, 1.0])] * 3)


@st.composite
def batches(draw):
    shoppers = draw(st.lists(st.lists(events, max_size=40), min_size=1, max_size=5))
    offers = [draw(st.dictionaries(st.integers(1, 15), strengths, max_size=10)) for _ in shoppers]
    return shoppers, offers, draw(st.integers(1, 14))


@given(batches())
@settings(deadline=None, max_examples=150)
def test_a_batch_is_what_a_plain_reference_makes_of_each_shopper(case):
    shoppers, offers, limit = case
    items, features = summarise(shoppers, offers, limit)
    expected = [plain(*shopper, limit) for shopper in zip(shoppers, offers, strict=True)]
    width = max(1, *(len(rows) for rows, _ in expected))
    assert items.shape == (len(shoppers), width) and items.dtype == np.int64
    assert features.shape == (len(shoppers), width, len(FEATURES)) and features.dtype == np.float32
    for i, (rows, told) in enumerate(expected):
        assert items[i].tolist() == rows + [0] * (width - len(rows))
        np.testing.assert_allclose(features[i, : len(rows)], np.array(told).reshape(-1, len(FEATURES)), rtol=1e-5)
        assert not features[i, len(rows) :].any()


@given(batches(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_in_a_batch_and_alone_a_shopper_has_the_same_bytes(case, random):
    shoppers, offers, limit = case
    items, features = summarise(shoppers, offers, limit)
    for i, events in enumerate(shoppers):
        alone, told = summarise([events], [offers[i]], limit)
        assert items[i, : alone.shape[1]].tolist() == alone[0].tolist()
        np.testing.assert_array_equal(features[i, : alone.shape[1]], told[0])
    order = random.sample(range(len(shoppers)), len(shoppers))
    again, others = summarise([shoppers[i] for i in order], [offers[i] for i in order], limit)
    np.testing.assert_array_equal(again, items[order])
    np.testing.assert_array_equal(others, features[order])


@given(batches(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_order_of_the_past_does_not_matter(case, random):
    shoppers, offers, limit = case
    items, features = summarise(shoppers, offers, limit)
    again, others = summarise([random.sample(events, len(events)) for events in shoppers], offers, limit)
    np.testing.assert_array_equal(again, items)
    np.testing.assert_allclose(others, features, rtol=1e-6)


@given(batches())
@settings(deadline=None, max_examples=60)
def test_what_is_told_is_finite_and_not_negative(case):
    shoppers, offers, limit = case
    _, features = summarise(shoppers, offers, limit)
    assert np.isfinite(features).all() and (features >= 0).all()
    assert features[:, :, PLACE["due"]].max() <= 4


def test_a_history_of_two_items_has_these_features():
    """Item 5 was bought 2, 16 and 30 days ago, item 3 once, 7 days ago, and was looked at today."""
    shopper = [(5, 16.0, True), (3, 7.0, True), (5, 2.0, True), (5, 30.0, True), (3, 0.0, False)]
    items, features = summarise([shopper], [{5: (0.0, 1.0, 0.5)}])
    assert items.tolist() == [[3, 5]]
    once = [
        0.693147,
        0.474077,
        0.636514,
        0.664406,
        0.67867,
        0.693147,
        0.25,
        0,
        0.693147,
        0,
        0,
        1.609438,
        0.693147,
        1.098612,
    ]
    once += [0.693147, 0, 0, 0]
    often = [1.386294, 0.834258, 1.205874, 1.291282, 1.337552, 1.386294, 0.75, 1.098612, 0, 2.70805, 0.142857, 1.609438]
    often += [0.693147, 1.098612, 0, 0, 1, 0.5]
    np.testing.assert_allclose(features, [[once, often]], atol=1e-6)


def test_looks_make_no_basket_and_no_purchase():
    items, features = summarise([[(4, 1.0, False), (4, 3.0, False), (9, 3.0, True)]])
    assert items.tolist() == [[4, 9]]
    bought = ("purchases", *(f"decayed_{d}" for d in DECAYS), "share", "gap", "due")
    assert not features[0, 0, [PLACE[name] for name in bought]].any()
    assert features[0, 0, PLACE["looks"]] == pytest.approx(math.log(1 + math.exp(-1 / 14) + math.exp(-3 / 14)))
    assert features[0, :, PLACE["baskets"]] == pytest.approx(math.log(2))
    assert features[0, 1, PLACE["share"]] == 1


def test_purchases_at_one_time_are_one_basket():
    _, features = summarise([[(1, 5.0, True), (2, 5.0, True), (1, 9.0, True)]])
    assert features[0, :, PLACE["baskets"]] == pytest.approx(math.log(3))
    assert features[0, :, PLACE["share"]].tolist() == [1, 0.5]


def test_baskets_at_the_same_time_of_two_shoppers_are_apart():
    _, features = summarise([[(1, 5.0, True), (1, 7.0, True)], [(1, 5.0, True)]])
    np.testing.assert_allclose(features[:, 0, PLACE["baskets"]], [math.log(3), math.log(2)], rtol=1e-6)


def test_ties_of_recency_go_to_the_lower_row_whatever_the_limit():
    shopper = [(row, 2.0, bool(row % 2)) for row in (9, 4, 7, 2)] + [(11, 1.0, True)]
    for limit in range(1, 6):
        items, _ = summarise([shopper], limit=limit)
        assert items.tolist() == [[11, 2, 4, 7, 9][:limit]]


def test_a_limit_keeps_the_last_seen_and_tells_the_same_of_them():
    shopper = [(row, float(row), True) for row in range(1, 700)]
    items, features = summarise([shopper])
    assert items.tolist() == [list(range(1, LIMIT + 1))]
    whole, told = summarise([shopper], limit=10_000)
    assert whole.shape == (1, 699)
    np.testing.assert_array_equal(told[:, :LIMIT], features)


def test_an_empty_past_has_one_place_of_padding():
    for shoppers, offers in (([[]], [{}]), ([[], []], [{3: (1, 1, 1)}, {}])):
        items, features = summarise(shoppers, offers)
        assert items.shape == (len(shoppers), 1) and features.shape == (len(shoppers), 1, len(FEATURES))
        assert not items.any() and not features.any()


def test_an_empty_past_among_others_stays_empty():
    items, features = summarise([[], [(2, 1.0, True), (3, 2.0, True)], []])
    assert items.tolist() == [[0, 0], [2, 3], [0, 0]]
    assert not features[[0, 2]].any()


def test_an_offer_is_told_to_its_own_shopper_and_product_alone():
    shoppers = [[(1, 1.0, True), (2, 2.0, False)], [(1, 1.0, True), (2, 2.0, True)]]
    _, features = summarise(shoppers, [{2: (1.0, 0.5, 0.25), 8: (1.0, 1.0, 1.0)}, {}])
    told = features[:, :, -len(OFFER) :]
    np.testing.assert_array_equal(told, [[[0, 0, 0], [1, 0.5, 0.25]], np.zeros((2, 3))])


@given(st.lists(st.lists(st.integers(1, 99), max_size=6), max_size=5))
def test_lists_are_padded_at_their_ends(rows):
    padded = pad([np.array(r, np.int64) for r in rows])
    width = max([1, *map(len, rows)])
    assert padded.shape == (len(rows), width) and padded.dtype == np.int64
    assert padded.tolist() == [r + [0] * (width - len(r)) for r in rows]
