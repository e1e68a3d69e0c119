"""Behaviour in memory: the examples of a small shop against a plain reference, and that no later event reaches one."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.behaviour import LEVELS, PERIODS, TEST, TRAIN, VALIDATION, load_behaviour, pack_market, placing
from serve.history import FEATURES, OFFER, Past, histories

VALID_FROM, TEST_FROM, END = 100.0, 130.0, 160.0
KINDS = {"purchase": 0, "cart": 1, "view": 2}

PATHS = ["dairy milk", "dairy cheese", "snacks chips", "snacks nuts"]
ITEMS = [
    # item, text, path, category, local; rows count from 1
    ("m-1", "milk whole", 0, 0, True),
    ("m-2", "milk low fat", 0, 0, True),
    ("c-1", "cheese", 1, 0, False),
    ("c-2", "cheese", 1, 0, True),
    ("s-1", "薯片", 2, 1, False),
    ("s-2", "chips salt", 2, 1, True),
    ("n-1", "nuts", 3, 1, False),
]

Event = tuple[int, int, int, float, str, int]
"""User, basket, row, day, kind, place."""

EVENTS: list[Event] = [
    # user 0: two purchases of one basket, looks alone, a basket of both
    (0, 0, 1, 10.0, "purchase", 0),
    (0, 0, 3, 10.0, "purchase", 0),
    (0, 1, 5, 20.0, "view", 0),
    (0, 2, 1, 30.0, "purchase", 0),
    (0, 2, 5, 30.0, "view", 0),
    (0, 3, 6, 105.0, "purchase", 0),
    (0, 3, 1, 105.0, "purchase", 0),
    (0, 4, 1, 140.0, "purchase", 0),
    (0, 5, 2, 150.0, "purchase", 0),
    # user 1: begins with a look, buys nowhere in particular
    (1, 6, 7, 50.0, "view", -1),
    (1, 7, 7, 60.0, "purchase", -1),
    (1, 8, 4, 110.0, "purchase", -1),
    (1, 8, 7, 110.0, "purchase", -1),
    (1, 9, 2, 131.0, "view", -1),
    # user 2: looks alone
    (2, 10, 2, 40.0, "view", 1),
    (2, 11, 3, 120.0, "cart", 1),
    # user 3: new in the test period
    (3, 12, 5, 135.0, "purchase", 1),
    (3, 13, 5, 136.0, "purchase", 1),
    (3, 13, 6, 136.0, "purchase", 1),
]

Span = tuple[int, float, float, int, float, float, float]
"""Place, first day, day after the last, row, display, mailer, discount."""

MARKET: list[Span] = [
    (-1, 0.0, 35.0, 2, 1.0, 0.0, 0.0),
    (-1, 100.0, 105.0, 3, 0.0, 0.0, 1.0),  # ends where a basket begins
    (-1, 100.0, 120.0, 1, 0.0, 0.2, 0.4),
    (-1, 100.0, 120.0, 6, 0.0, 0.6, 0.0),
    (0, 105.0, 106.0, 1, 1.0, 0.0, 0.0),  # begins there, and tells of a row that is promoted everywhere too
    (0, 105.0, 106.0, 7, 0.0, 1.0, 0.0),
    (1, 90.0, 160.0, 4, 1.0, 1.0, 1.0),
    (-1, 136.0, 137.0, 5, 0.0, 0.0, 0.2),
]
Search = tuple[int, str, int, float, int, float]
"""Query, its text, row, gain, user, day."""

NEVER = float("nan")
SEARCHES: list[Search] = [
    (0, "milk", 2, 1.0, 0, 30.0),  # with a basket of the same user at the same time
    (0, "milk", 1, 0.5, 0, 30.0),
    (0, "milk", 7, 0.0, 0, 30.0),
    (1, "nuts", 7, 0.1, -1, NEVER),
    (2, "坚果", 7, 0.0, 1, 55.0),  # nothing is right
    (3, "milk", 3, 0.5, 1, 125.0),
    (3, "milk", 4, 1.0, 1, 125.0),
    (4, "牛奶", 1, 1.0, 0, 155.0),
    (5, "chips", 5, 1.0, 3, 134.0),  # before all that the user ever did
    (6, "chips", 6, 1.0, 77, 150.0),  # of a user who does nothing else
    (7, "cheese", 3, 1.0, 2, NEVER),
]
"""Those of no day are of the train period."""


def period_of(day: float) -> int:
    return int(np.searchsorted((VALID_FROM, TEST_FROM), day, side="right"))


def write(folder, events=EVENTS, market=MARKET, searches=SEARCHES):
    """Write a shop as the data stage does, lines in its order."""
    folder.mkdir(exist_ok=True)
    item, text, path, category, local = zip(*ITEMS, strict=True)
    texts, categories = sorted(set(text)), ["dairy", "snacks"]
    table = {
        "row": np.arange(1, len(ITEMS) + 1), "item": item, "text": text, "text_id": [texts.index(t) for t in text],
        "path": [PATHS[p] for p in path], "path_id": path, "category": [categories[c] for c in category],
        "category_id": category, "local": local,
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "items.parquet")
    for period, name in enumerate(PERIODS):
        lines = sorted(event for event in events if period_of(event[3]) == period)
        columns = list(zip(*lines, strict=True)) or [()] * 6
        user, basket, row, day, kind, place = columns
        ints = {"user": user, "basket": basket, "row": row, "place": place}
        pq.write_table(
            pa.table(
                {key: np.array(value, np.int64) for key, value in ints.items()}
                | {"day": np.array(day, float), "kind": np.array([KINDS[k] for k in kind], np.int8)}
            ),
            folder / f"{name}.parquet",
        )
        spans = sorted(
            (span for span in market if period_of(span[1]) == period), key=lambda s: (s[1], s[0], s[2], s[3])
        )
        place, since, until, row, *told = list(zip(*spans, strict=True)) or [()] * 7
        pq.write_table(
            pa.table(
                {
                    "place": np.array(place, np.int64), "day_from": np.array(since, float),
                    "day_until": np.array(until, float), "row": np.array(row, np.int64),
                    **{key: np.array(value, np.float32) for key, value in zip(OFFER, told, strict=True)},
                }
            ),
            folder / f"market-{name}.parquet",
        )  # fmt: skip
        pack_market(folder, name)
        lines = [s for s in searches if (period_of(s[5]) if s[5] == s[5] else TRAIN) == period]
        query, asked, row, gain, user, day = list(zip(*lines, strict=True)) or [()] * 6
        pq.write_table(
            pa.table(
                {
                    "query_id": np.array(query, np.int64), "query": pa.array(asked, pa.string()),
                    "row": np.array(row, np.int64), "gain": np.array(gain, np.float32),
                    "user": np.array(user, np.int64), "day": np.array(day, float),
                }
            ),
            folder / f"searches-{name}.parquet",
        )  # fmt: skip
    return load_behaviour(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shop"))


# --- a plain reference -----------------------------------------------------------------------------------------------


def baskets_of(events):
    """Baskets in the order of users and days: (user, number, lines)."""
    found = {}
    for event in sorted(events, key=lambda e: (e[0], e[3])):
        found.setdefault((event[0], event[1]), []).append(event)
    return [(user, number, lines) for (user, number), lines in found.items()]


def plain_offers(market, place, day):
    """Strengths by row of what is promoted at a place and a day, the strongest where two tell of one."""
    told = {}
    for where, since, until, row, *strengths in market:
        if where in (place, -1) and since <= day < until:
            now = [round(255 * s) / 255 for s in strengths]
            told[row] = [max(pair) for pair in zip(told.get(row, (0, 0, 0)), now, strict=True)]
    return told


def plain_view(events, market, number, place, *, query):
    """The example of a basket: history, offers, what is bought and what of it is asked for, in a sub-model's rows."""
    user, _, lines = next(b for b in baskets_of(events) if b[1] == number)
    day, where = lines[0][3], lines[0][5]
    earlier = [e for e in events if e[0] == user and e[3] < day and place[e[2]] > 0]
    told = {place[row]: s for row, s in plain_offers(market, where, day).items() if place[row] > 0}
    past = Past(
        np.zeros(len(earlier), np.int64),
        np.array([place[e[2]] for e in earlier], np.int64),
        np.array([day - e[3] for e in earlier], float),
        np.array([e[4] == "purchase" for e in earlier], bool),
    )
    rows = np.array([sorted(told)], np.int64).reshape(1, -1)
    strengths = np.array([[told[row] for row in sorted(told)]], np.float32).reshape(1, -1, 3)
    items, features = histories(past, 1, rows, strengths)
    bought = {e[2] for e in lines if e[4] == "purchase"}
    asked = {row for row in bought if ITEMS[row - 1][2] == query}
    return {
        "items": items[0], "features": features[0], "offers": rows[0], "strengths": strengths[0],
        "bought": sorted({place[row] for row in bought} - {0}), "asked": sorted({place[row] for row in asked} - {0}),
    }  # fmt: skip


def numbers(behaviour, events):
    """The number of each basket of `behaviour`."""
    return [number for _, number, _ in baskets_of(events)]


def same(found, expected):
    """Hold one line of a view to the reference."""
    for name in ("items", "offers", "bought", "asked"):
        line = found[name].tolist()
        known = np.asarray(expected[name]).tolist()
        known = [row for row in known if row]
        assert line == known + [0] * (len(line) - len(known)), name
    n, p = int((found["items"] > 0).sum()), int((found["offers"] > 0).sum())
    np.testing.assert_allclose(found["features"][:n], expected["features"][:n], rtol=1e-6)
    np.testing.assert_allclose(found["strengths"][:p], expected["strengths"], rtol=1e-6)
    assert not found["features"][n:].any() and not found["strengths"][p:].any()


TOLD = ("items", "features", "offers", "strengths", "bought", "asked")
PLACES = {
    "all": np.arange(len(ITEMS) + 1),
    "local": placing(np.flatnonzero([False, *(item[4] for item in ITEMS)]), len(ITEMS)),
    "types": np.array([0, *(1 + item[2] for item in ITEMS)]),
    "one row": placing(np.array([7]), len(ITEMS)),
}


@pytest.mark.parametrize("which", PLACES)
@pytest.mark.parametrize("query", range(len(PATHS)))
def test_views_are_those_of_a_plain_reference(shop, which, query):
    place, known = PLACES[which], numbers(shop, EVENTS)
    chosen = np.concatenate([shop.baskets(period, fewest=0) for period in (TRAIN, VALIDATION, TEST)])
    queries = np.full(len(chosen), query)
    view = shop.view(chosen, queries, place)
    for i, basket in enumerate(chosen.tolist()):
        line = {name: getattr(view, name)[i] for name in TOLD}
        same(line, plain_view(EVENTS, MARKET, known[basket], place, query=query))
        alone = shop.view(chosen[i : i + 1], queries[i : i + 1], place)
        for name, value in line.items():
            width = getattr(alone, name).shape[1]
            np.testing.assert_array_equal(value[:width], getattr(alone, name)[0])
            assert not value[width:].any()


def test_without_offers_none_is_told(shop):
    chosen = shop.baskets(VALIDATION)
    view = shop.view(chosen, shop.queries(chosen), PLACES["types"], offers=False)
    assert view.offers.shape == (len(chosen), 1) and not view.offers.any() and not view.strengths.any()
    assert not view.features[:, :, -len(OFFER) :].any()


# --- which baskets are examples --------------------------------------------------------------------------------------


def test_a_basket_of_looks_is_no_example_and_its_looks_are_history(shop):
    known = numbers(shop, EVENTS)
    chosen = [known[basket] for period in range(3) for basket in shop.baskets(period, fewest=0).tolist()]
    assert chosen == [0, 2, 7, 3, 8, 4, 5, 12, 13]
    view = shop.view(np.array([known.index(2)]), np.array([0]), PLACES["all"])
    assert view.items.tolist() == [[5, 1, 3]]
    assert view.features[0, :, FEATURES.index("looks")].tolist() == [pytest.approx(np.log1p(np.exp(-10 / 14))), 0, 0]
    assert view.bought.tolist() == [[1]], "a look of the basket itself is no answer"


@pytest.mark.parametrize(("fewest", "expected"), [(0, [4, 5, 12, 13]), (1, [4, 5, 13]), (6, [4, 5]), (8, [5]), (9, [])])
def test_a_user_must_have_a_past(shop, fewest, expected):
    known = numbers(shop, EVENTS)
    assert [known[basket] for basket in shop.baskets(TEST, fewest=fewest).tolist()] == expected


def test_baskets_of_a_user_are_spread_first_ones_first(shop):
    known = numbers(shop, EVENTS)
    assert [known[b] for b in shop.spread(TEST, 1).tolist()] == [4, 13]
    assert [known[b] for b in shop.spread(TEST, 2).tolist()] == [4, 5, 13]
    assert shop.owner(shop.spread(TEST, 2)).tolist() == [0, 0, 3]


def test_a_query_is_the_path_of_something_that_was_bought(shop):
    chosen = np.concatenate([shop.baskets(period) for period in range(3)])
    answers = [set(shop.path_of_row[shop.answer(basket)].tolist()) for basket in chosen.tolist()]
    fixed = shop.queries(chosen)
    np.testing.assert_array_equal(fixed, shop.queries(chosen))
    drawn = [shop.queries(chosen, np.random.default_rng(seed)).tolist() for seed in range(40)]
    for i, paths in enumerate(answers):
        assert fixed[i] in paths
        assert {line[i] for line in drawn} == paths


def test_levels_have_their_rows_and_names(shop):
    assert [shop.names(level) for level in LEVELS] == [[item[0] for item in ITEMS], PATHS, ["dairy", "snacks"]]
    rows = [shop.row_of(level).tolist() for level in LEVELS]
    assert rows == [list(range(8)), [0, 1, 1, 2, 2, 3, 3, 4], [0, 1, 1, 1, 1, 2, 2, 2]]


# --- time ------------------------------------------------------------------------------------------------------------


def test_popularity_is_of_purchases_before_validation(shop):
    assert shop.popularity.tolist() == [0, 2, 0, 1, 0, 0, 0, 1]
    assert shop.sold(TEST).tolist() == [0, 3, 0, 1, 1, 0, 1, 2]


@pytest.mark.parametrize("number", [0, 2, 3, 4, 7, 8, 13])
def test_what_comes_later_never_reaches_a_view(tmp_path, shop, number):
    """Change everything from the basket's day on, other than the basket itself, and take the rest of the future away."""
    user, _, lines = next(b for b in baskets_of(EVENTS) if b[1] == number)
    day = lines[0][3]
    before = [e for e in EVENTS if e[3] < day or e[1] == number]
    more = [
        # another basket of the same user at a later time, views of its answers, and all others at the same time
        (user, 90, 2, min(day + 0.5, END), "purchase", 1),
        *((user, 91, line[2], min(day + 1, END), "view", 0) for line in lines),
        *((u, 92 + u, 4, day, "purchase", 0) for u in range(4) if u != user),
    ]
    past = [span for span in MARKET if span[1] <= day]
    later = [*past, *((-1, day + 1e-6, END, row, 1.0, 1.0, 1.0) for row in range(1, 8))]
    expected = None
    for k, (events, market) in enumerate([(EVENTS, MARKET), (before, past), ([*before, *more], later)]):
        behaviour = write(tmp_path / str(k), events, market)
        view = behaviour.view(np.array([numbers(behaviour, events).index(number)]), np.array([0]), PLACES["all"])
        told = {name: getattr(view, name) for name in TOLD}
        expected = expected or told
        for name, value in told.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


# --- offers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "day", "expected"),
    [
        (-1, -0.001, []),
        (-1, 0.0, [2]),
        (-1, 34.999, [2]),
        (-1, 35.0, []),
        (-1, 104.999, [1, 3, 6]),
        (-1, 105.0, [1, 6]),
        (0, 104.999, [1, 3, 6]),
        (0, 105.0, [1, 6, 7]),
        (0, 106.0, [1, 6]),
        (1, 89.999, []),
        (1, 90.0, [4]),
        (1, 105.0, [1, 4, 6]),
        (0, 119.999, [1, 6]),
        (0, 120.0, []),
        (99, 105.0, [1, 6]),
        (1, 136.0, [4, 5]),
        (1, 137.0, [4]),
        (1, 160.0, []),
    ],
)
def test_offers_hold_from_their_first_day_to_before_their_end(shop, place, day, expected):
    rows, strengths = shop.market.offers(place, day)
    told = plain_offers(MARKET, place, day)
    assert rows.tolist() == expected == sorted(told)
    assert strengths.shape == (len(rows), len(OFFER)) and strengths.dtype == np.float32
    np.testing.assert_allclose(strengths, np.reshape([told[row] for row in expected], (-1, 3)), rtol=1e-6)


def test_two_offers_of_one_product_are_its_strongest_each(shop):
    rows, strengths = shop.market.offers(0, 105.5)
    np.testing.assert_allclose(strengths[rows == 1], [[1.0, 0.2, 0.4]], rtol=1e-6)


def test_a_purchase_at_no_place_sees_what_is_promoted_everywhere_alone(shop):
    known = numbers(shop, EVENTS)
    view = shop.view(np.array([known.index(8), known.index(3)]), np.array([0, 0]), PLACES["all"])
    assert view.offers.tolist() == [[1, 6, 0], [1, 6, 7]]
    assert not view.strengths[0, 2].any()


def test_a_shop_that_promotes_nothing_has_no_offers(tmp_path):
    shop = write(tmp_path / "shop", market=[])
    chosen = np.concatenate([shop.baskets(period) for period in range(3)])
    view = shop.view(chosen, shop.queries(chosen), PLACES["all"])
    assert view.offers.shape == (len(chosen), 1) and not view.offers.any() and not view.strengths.any()


# --- searches --------------------------------------------------------------------------------------------------------


def test_searches_are_lines_by_query(shop):
    searches = shop.searches
    assert searches.text == ["milk", "nuts", "坚果", "milk", "牛奶", "chips", "chips", "cheese"]
    assert searches.period.tolist() == [TRAIN, TRAIN, TRAIN, VALIDATION, TEST, TEST, TEST, TRAIN]
    assert searches.query.tolist() == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert searches.row.tolist() == [1, 2, 7, 7, 7, 3, 4, 1, 5, 6, 3]
    np.testing.assert_allclose(searches.gain, [0.5, 1, 0, 0.1, 0, 0.5, 1, 1, 1, 1, 1], rtol=1e-6)


def test_a_search_without_a_right_answer_is_no_example(shop):
    assert [shop.searches.of(period).tolist() for period in range(3)] == [[0, 1, 7], [3], [4, 5, 6]]


@pytest.mark.parametrize("which", PLACES)
def test_searches_of_the_log_are_those_of_a_plain_reference(shop, which):
    place = PLACES[which]
    chosen = np.arange(8)
    view = shop.log_view(chosen, place)
    assert view.offers.shape == (8, 1) and not view.offers.any() and not view.strengths.any()
    for query in chosen.tolist():
        lines = [s for s in SEARCHES if s[0] == query]
        user, day = lines[0][4:]
        earlier = [e for e in EVENTS if e[0] == user and e[3] < day and place[e[2]] > 0]
        past = Past(
            np.zeros(len(earlier), np.int64),
            np.array([place[e[2]] for e in earlier], np.int64),
            np.array([day - e[3] for e in earlier], float),
            np.array([e[4] == "purchase" for e in earlier], bool),
        )
        items, features = histories(past, 1, np.zeros((1, 1), np.int64), np.zeros((1, 1, 3), np.float32))
        width = items.shape[1]
        np.testing.assert_array_equal(view.items[query, :width], items[0])
        np.testing.assert_allclose(view.features[query, :width], features[0], rtol=1e-6)
        assert not view.items[query, width:].any()
        right = [(int(place[s[2]]), s[3]) for s in sorted(lines, key=lambda s: s[2]) if s[3] > 0 and place[s[2]] > 0]
        given = view.bought[query] > 0
        assert list(zip(view.bought[query][given].tolist(), view.gains[query][given].tolist(), strict=True)) == [
            (row, pytest.approx(gain)) for row, gain in right
        ]
        assert not view.gains[query][~given].any()


def test_a_shop_without_searches_has_none(tmp_path):
    searches = write(tmp_path / "shop", searches=[]).searches
    assert searches.text == [] and len(searches.query) == len(searches.row) == len(searches.gain) == 0
