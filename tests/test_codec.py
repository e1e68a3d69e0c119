"""The codec looks at a whole history and at a thousand candidates at once: as if each were looked at by itself."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import ITEMS, PRODUCTS, make_bundle

from serve.codec import MOST_DAYS, BadRequest, Codec
from serve.history import KINDS, OFFER


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = make_bundle(tmp_path_factory.mktemp("codec") / "bundle").folder
    return Codec(folder, json.loads((folder / "bundle.json").read_bytes()))


ODD = [
    None,
    True,
    False,
    1.5,
    -1,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "牛奶",
    [],
    {},
    b"x",
    MOST_DAYS,
    MOST_DAYS + 1,
]
values = st.one_of(st.sampled_from(ODD), st.integers(0, 9), st.sampled_from(KINDS))
right = st.fixed_dictionaries(
    {"product": st.sampled_from(PRODUCTS), "days_ago": st.floats(0, MOST_DAYS)},
    optional={"kind": st.sampled_from(KINDS)},
)
wrong = st.dictionaries(st.sampled_from(["product", "days_ago", "kind", "more", "Kind"]), values)
events = st.lists(st.one_of(right, right, wrong, values), max_size=6)


def is_right(event):
    """Say whether an event is right, as docs/serving.md describes one."""
    if type(event) is not dict or not {"product", "days_ago"} <= event.keys() <= {"product", "days_ago", "kind"}:
        return False
    days = event["days_ago"]
    return (
        type(event["product"]) in (int, str)
        and type(days) in (int, float)
        and days == days
        and 0 <= days <= MOST_DAYS
        and isinstance(event.get("kind", "view"), str)
        and event.get("kind", "view") in KINDS
    )


@given(history=events)
@settings(deadline=None, max_examples=400)
def test_a_history_is_right_where_each_of_its_events_is(codec, history):
    first = next((i for i, event in enumerate(history) if not is_right(event)), None)
    if first is None:
        assert codec.check({"history": history}, "request") == min(10, codec.returned)
    else:
        with pytest.raises(BadRequest, match=rf"^request: history\[{first}\]"):
            codec.check({"history": history}, "request")


offered = st.fixed_dictionaries(
    {"product": st.sampled_from(PRODUCTS)}, optional={name: st.floats(0, 1) for name in OFFER}
)
odd = st.dictionaries(st.sampled_from(["product", *OFFER, "more"]), values)


def is_right_offer(offer):
    """Say whether an offer is right, as docs/serving.md describes one."""
    if type(offer) is not dict or not {"product"} <= offer.keys() <= {"product", *OFFER}:
        return False
    told = [offer[name] for name in OFFER if name in offer]
    return type(offer["product"]) in (int, str) and all(
        type(value) in (int, float) and value == value and 0 <= value <= 1 for value in told
    )


@given(offers=st.lists(st.one_of(offered, offered, odd, values), max_size=6))
@settings(deadline=None, max_examples=400)
def test_offers_are_right_where_each_of_them_is(codec, offers):
    first = next((i for i, offer in enumerate(offers) if not is_right_offer(offer)), None)
    if first is None:
        assert codec.check({"offers": offers}, "request") == min(10, codec.returned)
    else:
        with pytest.raises(BadRequest, match=rf"^request: offers\[{first}\]"):
            codec.check({"offers": offers}, "request")


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_candidates_are_sorted_stably_and_the_first_of_them_told(codec, data):
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=ITEMS + 1, max_size=ITEMS + 1))
    asked = data.draw(st.lists(st.sampled_from([*PRODUCTS, "nothing", 5]), min_size=1, max_size=2 * ITEMS))
    k = data.draw(st.integers(1, len(asked)))
    known = [product for product in dict.fromkeys(asked) if product in PRODUCTS]
    expected = sorted(known, key=lambda product: -scores[1 + PRODUCTS.index(product)])[:k]
    answer = codec.rank({"candidates": asked}, np.array(scores, np.float32), k)
    assert [found["product"] for found in answer["products"]] == expected
    assert answer["unknown_candidates"] == [product for product in dict.fromkeys(asked) if product not in PRODUCTS]
