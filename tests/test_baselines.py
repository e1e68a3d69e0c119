"""Baselines: against what the papers define, worked out by hand, and without a look at the future."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from models.behaviour import TEST, TRAIN, VALIDATION
from serve.errors import ShipyardError
from shipyard import baselines, boosted, lexical, neighbours, purchases
from shipyard.metrics import ndcg

NAMES = ["milk", "whole milk", "rye bread", "white bread", "white rye bread", "soap"]


def log_of(users, names=NAMES):
    """Purchases of users; each is a list of baskets (day, period, rows)."""
    flat = [(u, *basket) for u, baskets in enumerate(users) for basket in baskets]
    size = [len(rows) for *_, rows in flat]
    start = np.concatenate([[0], np.cumsum(size)])
    owner = np.array([u for u, *_ in flat])
    return purchases.Grouped(
        row=np.concatenate([rows for *_, rows in flat]).astype(np.int64),
        day=np.repeat([float(day) for _, day, *_ in flat], size),
        bought=np.ones(start[-1], bool),
        start=start,
        born=start[np.searchsorted(owner, owner)],
        period=np.array([period for _, _, period, _ in flat]),
        texts=names,
    )


@pytest.fixture(scope="module")
def shop():
    """40 shoppers of 30 rows with three staples each; days 0 to 99 train, to 119 validation, to 139 test."""
    rng = np.random.default_rng(3)
    users = []
    for _ in range(40):
        staples, baskets = rng.choice(np.arange(1, 31), 3, replace=False), []
        for day in np.sort(rng.choice(140, 28, replace=False)):
            some = staples[rng.random(3) < 0.7]
            rows = np.unique(np.r_[some, rng.integers(1, 31, 2)])
            baskets.append((day, TRAIN if day < 100 else VALIDATION if day < 120 else TEST, rows))
        users.append(baskets)
    return log_of(users, [f"thing {i} of {i % 4}" for i in range(30)])


def first_baskets(log, period):
    known = np.flatnonzero((log.period == period) & (log.start[:-1] > log.born))
    return known[np.unique(log.born[known], return_index=True)[1]]


def answers(log, baskets):
    found = [np.unique(log.row[log.start[basket] : log.start[basket + 1]]) for basket in baskets]
    width = max(map(len, found))
    return np.stack([np.pad(rows, (0, width - len(rows))) for rows in found])


SMALL = {"examples": 200, "trees": 15, "least": 5, "leaves": 7, "popular": 10}
ALL = [
    baselines.Popularity(),
    baselines.RecentPopularity(),
    baselines.OwnCounts(),
    baselines.OwnDecayed(),
    neighbours.TifuKnn(neighbours=5),
    neighbours.UpCf(neighbours=5),
    boosted.Boosted(**SMALL),
    lexical.ExactPath(),
    lexical.ExactPathOwn(),
    lexical.ExactPathDecayed(),
    lexical.Bm25(),
    lexical.Bm25Own(),
]
every_baseline = pytest.mark.parametrize("baseline", ALL, ids=lambda one: one.name)

# --- every baseline --------------------------------------------------------------------------------------------------


@every_baseline
def test_scores_of_a_period_do_not_depend_on_it_or_on_later_ones(shop, baseline):
    rng = np.random.default_rng(1)
    for period in (VALIDATION, TEST):
        baskets = first_baskets(shop, period)
        queries = rng.integers(0, 30, len(baskets))
        later = np.repeat(shop.period, np.diff(shop.start)) >= period
        other = replace(shop, row=np.where(later, rng.integers(1, 31, len(shop.row)), shop.row))
        scores = baseline.fit(shop, period)(baskets, queries)
        assert scores.dtype == np.float32 and scores.shape == (len(baskets), 31)
        assert np.isfinite(scores).all()
        np.testing.assert_array_equal(scores, baseline.fit(other, period)(baskets, queries))


@every_baseline
def test_scores_of_a_later_basket_see_the_shoppers_own_history_until_it(shop, baseline):
    baskets = first_baskets(shop, VALIDATION)[:5] + 1
    queries = np.full(5, 28)
    scores = baseline.fit(shop, VALIDATION)(baskets, queries)
    at = np.repeat(np.arange(len(shop.period)), np.diff(shop.start))
    for line, basket in enumerate(baskets):
        # of the period, what others did and what the shopper does from this basket on
        hidden = (shop.period[at] >= VALIDATION) & ((shop.born[at] != shop.born[basket]) | (at >= basket))
        other = replace(shop, row=np.where(hidden, 30, shop.row))
        again = baseline.fit(other, VALIDATION)(baskets[line : line + 1], queries[:1])
        np.testing.assert_allclose(again[0], scores[line], rtol=1e-6)
    seen = (shop.born[at] == shop.born[baskets[0]]) & (at == baskets[0] - 1)
    other = replace(shop, row=np.where(seen, 29, shop.row))
    changed = not np.array_equal(baseline.fit(other, VALIDATION)(baskets[:1], queries[:1])[0], scores[0])
    impersonal = baselines.Popularity, baselines.RecentPopularity, lexical.Bm25
    if not isinstance(baseline, lexical.ExactPath):  # here a path holds one row, which stays the first
        assert changed == (type(baseline) not in impersonal)


@every_baseline
def test_what_was_not_bought_counts_for_nothing(shop, baseline):
    viewed = log_of([[(d, p, [r]) for d, p, r in [(0, 0, 1), (1, 0, 2), (3, 0, 3), (4, 0, 1), (9, 1, 4)]]] * 2)
    shop = log_of([[(d, p, [r]) for d, p, r in [(0, 0, 1), (3, 0, 3), (4, 0, 1), (9, 1, 4)]]] * 2)
    viewed.bought[viewed.row == 2] = False
    one = replace(baseline, least=1) if baseline.name == "boosted trees" else baseline
    first = one.fit(viewed, VALIDATION)(np.array([4, 9]), np.array([2, 3]))
    np.testing.assert_allclose(first, one.fit(shop, VALIDATION)(np.array([3, 7]), np.array([2, 3])), rtol=1e-6)


@every_baseline
def test_lines_do_not_depend_on_their_block(shop, baseline):
    baskets = first_baskets(shop, VALIDATION)
    queries = np.arange(len(baskets)) % 30
    scorer = baseline.fit(shop, VALIDATION)
    whole = scorer(baskets, queries)
    np.testing.assert_allclose(whole[7:9], scorer(baskets[7:9], queries[7:9]), rtol=1e-6)


@every_baseline
def test_grid_has_settings_of_the_baseline(baseline):
    assert all(replace(baseline, **settings) is not None for settings in baseline.grid)
    assert len({tuple(settings.items()) for settings in baseline.grid}) == len(baseline.grid) <= 36


def test_tune_takes_the_best_of_the_grid_and_refuses_the_test_period(shop):
    baskets = first_baskets(shop, VALIDATION)
    right, queries = answers(shop, baskets), np.zeros(len(baskets), np.int64)
    best, table = baselines.OwnDecayed().tune(shop, baskets, queries, right)
    assert [line["tau"] for line in table] == [settings["tau"] for settings in baselines.OwnDecayed.grid]
    values = [line["ndcg@10"] for line in table]
    assert best.tau == table[int(np.argmax(values))]["tau"]
    ranked = baselines.rank(best.fit(shop, VALIDATION), baskets, queries)
    assert max(values) == pytest.approx(np.nanmean(ndcg(ranked, right)), abs=1e-5)
    few, _ = boosted.Boosted(**SMALL).tune(shop, baskets, queries, right, rows=np.arange(1, 9), seed=11)
    assert few.seed == 11
    with pytest.raises(ShipyardError, match="validation alone"):
        best.tune(shop, first_baskets(shop, TEST), queries, right)


def test_rank_takes_the_lower_row_of_equals_and_can_be_restricted():
    def scorer(baskets, queries):
        return np.tile(np.array([9, 1, 3, 3, 2, 3], np.float32), (len(baskets), 1))

    baskets = np.arange(300)
    ranked = baselines.rank(scorer, baskets, baskets, places=4)
    assert ranked.shape == (300, 4) and (ranked == [2, 3, 5, 4]).all()
    assert (baselines.rank(scorer, baskets, baskets, rows=np.array([5, 1, 4])) == [5, 4, 1]).all()


def test_groups_are_bought_once_a_basket():
    log = log_of([[(0, 0, [1, 2, 3]), (1, 0, [1, 6]), (2, 1, [6])], [(0, 0, [6]), (1, 1, [3])]])
    types = purchases.group(log, np.array([0, 1, 1, 2, 2, 2, 0]), ["milk", "bread"])
    assert types.items == 2
    assert types.row.tolist() == [1, 2, 0, 1, 0, 0, 2]
    assert types.start.tolist() == [0, 2, 4, 5, 6, 7]
    assert types.born.tolist() == [0, 0, 0, 5, 5]
    assert types.day.tolist() == [0, 0, 1, 1, 2, 0, 1]
    scores = baselines.OwnCounts().fit(types, VALIDATION)(np.array([2, 4]), np.array([0, 0]))
    assert scores[0].argsort()[::-1].tolist() == [1, 2, 0]
    assert (scores[1] < 1).all()


# --- popularity and own purchases ------------------------------------------------------------------------------------


def test_popularity_counts_the_periods_before_and_the_last_days():
    log = log_of([[(0, 0, [1, 2]), (10, 0, [1]), (20, 0, [3]), (30, 1, [4]), (40, 2, [4])]])
    assert purchases.counted(purchases.purchases(log), VALIDATION).tolist() == [0, 2, 1, 1, 0, 0, 0]
    assert purchases.counted(purchases.purchases(log), TEST, 20).tolist() == [0, 0, 0, 1, 1, 0, 0]
    recent = baselines.RecentPopularity(days=15.0).fit(log, VALIDATION)(np.array([3]), np.array([0]))
    assert recent[0, 1] > recent[0, 3] > recent[0, 2] > recent[0, 4]


def test_own_purchases_decay_by_days_and_ties_go_to_the_popular():
    log = log_of([[(0, 0, [1]), (10, 0, [1]), (80, 0, [2, 3]), (100, 1, [4])], [(5, 0, [3, 5]), (6, 1, [1])]])
    basket = np.array([3])

    def order(baseline):
        return np.argsort(-baseline.fit(log, VALIDATION)(basket, basket)[0, 1:], kind="stable")[:4] + 1

    assert order(baselines.OwnCounts()).tolist() == [1, 3, 2, 5]
    assert order(baselines.OwnDecayed(tau=60.0)).tolist() == [3, 2, 1, 5]
    # 2 exp(-95 / tau) passes exp(-20 / tau) near tau = 109
    assert order(baselines.OwnDecayed(tau=365.0)).tolist() == [1, 3, 2, 5]


def test_scores_keep_counts_and_ties_exact_in_32_bits():
    own = sparse.csr_array(np.array([[0, 16_777_217, 16_777_216, 0.5, 0.5, 0]]))
    fill = baselines.levels(np.array([0, 1, 2, 3, 4, 5]))
    scores = baselines.own_first(own, fill)
    assert np.argsort(-scores[0]).tolist() == [1, 2, 4, 3, 5, 0]


# --- neighbours ------------------------------------------------------------------------------------------------------

THREE = [
    [(0, 0, [1]), (1, 0, [1, 2]), (2, 0, [3]), (9, 1, [6])],
    [(0, 0, [2]), (1, 0, [4]), (9, 1, [6])],
    [(0, 0, [5]), (9, 1, [6])],
]


def test_tifu_knn_by_hand():
    tifu = neighbours.TifuKnn(groups=2, within=0.5, across=0.5, neighbours=1, alpha=0.6)
    log = purchases.purchases(log_of(THREE))
    vectors = tifu.vectors(purchases.past(log, np.array([3, 6, 8]))).toarray()
    # groups of the first: {1}, and (0.5 {1, 2} + {3}) / 2
    expected = [[0, 0.375, 0.125, 0.25, 0, 0, 0], [0, 0, 0.25, 0, 0.5, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    np.testing.assert_allclose(vectors, expected)
    # squared distances of the first: 0.46875 and 1.21875; so the second is its neighbour
    scores = tifu.fit(log_of(THREE), VALIDATION)(np.array([3]), np.array([0]))[0]
    np.testing.assert_allclose(scores[1:5], [0.225, 0.6 * 0.125 + 0.4 * 0.25, 0.15, 0.2], rtol=1e-6)
    assert (scores[[0, 5, 6]] < 0).all()


@pytest.mark.parametrize(
    ("baskets", "sizes"), [(2, [1, 1]), (3, [1, 1, 1]), (7, [2, 2, 3]), (8, [2, 3, 3]), (9, [3] * 3)]
)
def test_tifu_knn_divides_baskets_evenly_the_larger_groups_last(baskets, sizes):
    log = purchases.purchases(log_of([[(day, 0, [day + 1]) for day in range(baskets)]], ["x"] * 9))
    tifu = neighbours.TifuKnn(groups=3, within=0.9, across=0.7)
    found = tifu.vectors(purchases.history(log, np.array([0]), np.array([baskets]))).toarray()[0, 1 : baskets + 1]
    expected = [
        0.9 ** (size - 1 - place) / size * 0.7 ** (len(sizes) - 1 - index) / len(sizes)
        for index, size in enumerate(sizes)
        for place in range(size)
    ]
    np.testing.assert_allclose(found, expected)


def test_up_cf_by_hand():
    up_cf = neighbours.UpCf(window=2, locality=2, neighbours=2, asymmetry=0.25)
    scores = up_cf.fit(log_of(THREE), VALIDATION)(np.array([3, 6]), np.array([0, 0]))
    # the first bought {1, 2, 3}, half of its last two baskets hold each; the second {2, 4}
    similar = (1 / (3**0.25 * 2**0.75)) ** 2
    np.testing.assert_allclose(scores[0, 1:5], [0.5, 0.5 + 0.5 * similar, 0.5, 0.5 * similar], rtol=1e-6)
    similar = (1 / (2**0.25 * 3**0.75)) ** 2
    np.testing.assert_allclose(scores[1, 1:5], 0.5 * np.array([similar, 1 + similar, similar, 1]), rtol=1e-6)
    assert (scores[:, 5:] < 0).all()


def test_neighbours_are_the_nearest_without_the_shopper():
    near = np.array([[5.0, 3, 4, 1], [0, 9, 2, 2]])
    own = np.array([[True, False, False, False], [False, True, False, False]])
    chosen, value = neighbours._nearest(near, own, 2)
    assert chosen.toarray().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert value.tolist() == [3, 4, 2, 2]
    assert neighbours._nearest(near, own, 9)[0].sum() == 6


# --- boosted trees ---------------------------------------------------------------------------------------------------


def test_boosted_trees_are_deterministic_and_beat_popularity(shop):
    baskets = first_baskets(shop, VALIDATION)
    right = answers(shop, baskets)
    scores = [boosted.Boosted(**SMALL).fit(shop, VALIDATION)(baskets, baskets) for _ in range(2)]
    np.testing.assert_array_equal(*scores)

    def value(baseline):
        return np.nanmean(ndcg(baselines.rank(baseline.fit(shop, VALIDATION), baskets, baskets), right))

    assert value(boosted.Boosted(**SMALL)) > value(baselines.Popularity()) + 0.1


def test_features_are_what_they_are_called():
    users = [[(0, 0, [1, 3]), (4, 0, [1]), (10, 0, [1, 2]), (20, 0, [5]), (24, 1, [1])], [(3, 0, [6, 1])]]
    log = log_of(users)
    path_of_row = np.array([-1, 0, 0, 1, 1, 1, 2])
    seen = boosted.snapshot(purchases.purchases(log), VALIDATION, np.inf)
    found = boosted.describe(purchases.purchases(log), path_of_row, np.array([4]), seen, 10, 1)
    assert found.row.tolist() == [1, 2, 3, 5]
    assert found.features.shape == (4, len(boosted.FEATURES))
    one = dict(zip(boosted.FEATURES, found.features[0].tolist(), strict=True))
    days = np.array([24, 20, 14])
    expected = {
        "count": 3, "count per basket": 0.75, "count decayed by exp(-days / 30)": np.exp(-days / 30).sum(),
        "count in last 5 baskets": 3, "days since last": 14, "mean gap in days": 5, "days since last / mean gap": 2.8,
        "baskets since last": 1, "type count": 4, "type decayed count": np.exp(-days / 60).sum() + np.exp(-14 / 60),
        "type days since last": 14, "type days since last / mean gap": 14 / (10 / 3), "part of type": 0.75,
        "popularity": math.log1p(4 / (20 / 7)), "recent popularity": math.log1p(4 / (20 / 7)), "purchases per buyer": 2,
        "baskets": 4, "basket size": 1.5, "days since any purchase": 4,
    }  # fmt: skip
    for name, value in expected.items():
        assert one[name] == pytest.approx(value, rel=1e-6), name
    assert math.isnan(found.features[1, boosted.FEATURES.index("mean gap in days")])
    few = boosted.describe(purchases.purchases(log), path_of_row, np.array([4]), seen, 1, 1)
    # the most recent count by decay is of row 1, the most popular row too
    assert few.row.tolist() == [1]


def test_examples_see_statistics_of_the_time_before_them_alone(shop):
    log = purchases.purchases(shop)
    seen = list(boosted.Boosted(**SMALL)._blocks(log, VALIDATION))
    assert sum(len(baskets) for baskets, _ in seen) == 200
    for baskets, snapshot in seen:
        assert (log.period[baskets] == TRAIN).all()
        assert (log.moment[baskets] >= snapshot.day).all() and (log.moment[baskets] <= snapshot.day + 7).all()
    early = boosted.snapshot(log, VALIDATION, 50)
    count = np.bincount(shop.row[shop.day < 50], minlength=31)
    days = shop.day[shop.day < 50]
    np.testing.assert_allclose(early.popularity, np.log1p(count / ((days.max() - days.min()) / 7)), rtol=1e-6)


def test_boosted_trees_need_something_to_learn_from():
    with pytest.raises(ShipyardError, match="nothing to learn from"):
        boosted.Boosted().fit(log_of([[(0, 0, [1]), (3, 1, [1])]]), VALIDATION)


# --- search ----------------------------------------------------------------------------------------------------------

SHOPPER = [
    [(0, 0, [3, 4]), (1, 0, [4, 5, 5 - 4]), (200, 0, [3]), (201, 1, [3])],
    [(0, 0, [5]), (1, 0, [5]), (2, 0, [5, 6])],
]


class Catalogue:
    """Purchases of which three kinds of bread share a path."""

    def __init__(self, log):
        self.log = log
        self.paths = ["dairy", "bread", "drug"]
        self.path_of_row = np.array([-1, 0, 0, 1, 1, 1, 2])

    def __getattr__(self, name):
        return getattr(self.log, name)


@pytest.mark.parametrize("query", [1, "bread"])
def test_exact_path_ranks_its_rows_first_ties_by_popularity(query):
    catalogue = Catalogue(log_of(SHOPPER))
    queries = [query] if isinstance(query, str) else np.array([query])

    def order(baseline):
        return baselines.rank(baseline.fit(catalogue, VALIDATION), np.array([3]), queries)[0].tolist()

    # popularity: 4 of row 5, 2 each of 3 and 4, 1 of 1 and 6; the shopper has 2 of 3, 2 of 4, 1 of 5
    assert order(lexical.ExactPath()) == [5, 3, 4, 1, 6, 2]
    assert order(lexical.ExactPathOwn()) == [3, 4, 5, 1, 6, 2]
    assert order(lexical.ExactPathDecayed(tau=30.0)) == [3, 4, 5, 1, 6, 2]


def test_bm25_is_its_formula():
    texts = [name.split() for name in NAMES]
    mean = sum(map(len, texts)) / len(texts)

    def slow(words, text, k1, b):
        total = 0.0
        for word in words.split():
            holds = sum(word in other for other in texts)
            often = text.count(word)
            idf = math.log(1 + (len(texts) - holds + 0.5) / (holds + 0.5))
            total += idf * often / (often + k1 * (1 - b + b * len(text) / mean)) if holds else 0
        return total

    for k1, b in [(1.2, 0.75), (0.6, 0.0)]:
        search = lexical.Bm25(k1=k1, b=b).index(log_of(SHOPPER))
        for words in ["white bread", "whole milk milk", "soap unknown"]:
            np.testing.assert_allclose(search(words), [slow(words, text, k1, b) for text in texts], rtol=1e-5)
        assert search("unknown").tolist() == search("").tolist() == [0] * 6


def test_bm25_breaks_ties_by_popularity():
    log = log_of(SHOPPER, ["milk", "milk", "bread", "bread", "bread", "rye bread"])
    ranked = baselines.rank(lexical.Bm25().fit(log, VALIDATION), np.array([3]), ["bread"])
    assert ranked[0].tolist() == [5, 3, 4, 6, 1, 2]
    nothing = baselines.rank(lexical.Bm25().fit(log, VALIDATION), np.array([3]), ["unknown words"])
    assert nothing[0].tolist() == [5, 3, 4, 1, 6, 2]


def test_bm25_with_own_counts_is_a_weighted_sum():
    log = log_of(SHOPPER)
    one = lexical.Bm25Own(own_weight=0.5, popularity_weight=0.2, tau=50.0)
    scores = one.fit(log, VALIDATION)(np.array([3]), ["rye bread"])[0]
    found = one.index(log)("rye bread")
    own = np.array([0, math.exp(-4), 0, math.exp(-201 / 50) + math.exp(-1 / 50), 0, 0, 0])
    own[1], own[4], own[5] = math.exp(-200 / 50), math.exp(-201 / 50) + math.exp(-200 / 50), math.exp(-200 / 50)
    popularity = np.array([0, 1, 0, 2, 2, 4, 1])
    expected = np.r_[0, found / found.max()] + 0.5 * np.log1p(own) + 0.2 * np.log1p(popularity) / math.log(5)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
