"""Fusion: each rule on examples that were worked out by hand, and its fit on rankings whose best mix is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ShipyardError
from serve.fusion import FEATURES, METHODS, best, describe, fuse, gather
from shipyard import metrics
from shipyard.fuse import fit_fusion

TWO = [(["a", "b", "c"], [3.0, 2.0, 1.0]), (["c", "d"], [0.9, 0.1])]
"""Scaled, with a hundredth of the span below: a 1, b 1.02 / 2.02, c 0.02 / 2.02; and c 1, d 0.008 / 0.808."""

MIDDLE, LOW = 1.02 / 2.02, 0.01 / 1.01
EVERY = {
    "weighted": {"weights": [0.6, 0.4]},
    "vote": {"depth": 2},
    "rrf": {"weights": [0.6, 0.4], "k": 10},
    "stacking": {"weights": [3.0, 0.5, 0.1, 2.0, 0.5, 0.2]},
}


def fused(answers, method, parameters):
    found = gather(answers)
    return dict(zip(found.products, fuse(found, method, parameters).tolist(), strict=True))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_answers_are_brought_together():
    found = gather(TWO)
    assert found.products == ["a", "b", "c", "d"]
    np.testing.assert_allclose(found.scaled, [[1, MIDDLE, LOW, 0], [0, 0, 1, LOW]])
    np.testing.assert_array_equal(found.place, [[1, 2, 3, np.inf], [np.inf, np.inf, 1, 2]])
    assert found.spoke.tolist() == [True, True]


def test_equal_scores_count_fully():
    assert gather([(["a", "b"], [0.3, 0.3]), (["c"], [-7.0])]).scaled.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_no_shift_or_scale_of_a_source_changes_what_is_fused():
    moved = [(products, [1e3 * score - 5e4 for score in scores]) for products, scores in TWO]
    for method, parameters in EVERY.items():
        assert fused(moved, method, parameters) == pytest.approx(fused(TWO, method, parameters), abs=1e-9)


def test_weighted():
    found = fused(TWO, "weighted", {"weights": [0.75, 0.25]})
    assert found == pytest.approx({"a": 0.75, "b": 0.75 * MIDDLE, "c": 0.75 * LOW + 0.25, "d": 0.25 * LOW})


def test_vote():
    """Of three sources c has two votes in the first two places, the others one: reciprocal ranks decide among those."""
    found = fused([*TWO, (["c", "b", "a"], [3, 2, 1])], "vote", {"depth": 2})
    reciprocal = {"a": 1 / 2 + 1 / 4, "b": 1 / 3 + 1 / 3, "c": 1 / 4 + 1 / 2 + 1 / 2, "d": 1 / 3}
    votes = {"a": 1, "b": 2, "c": 2, "d": 1}
    assert found == pytest.approx({p: votes[p] + reciprocal[p] / 4 for p in votes})


@given(st.lists(st.permutations("abcdefgh").map(lambda line: line[:5]), min_size=1, max_size=6), st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_no_tie_of_reciprocal_ranks_outdoes_a_vote(lines, depth):
    found = fused([(line, list(range(5, 0, -1))) for line in lines], "vote", {"depth": depth})
    for product, score in found.items():
        assert int(score) == sum(product in line[:depth] for line in lines)


def test_rrf():
    found = fused(TWO, "rrf", {"weights": [0.6, 0.4], "k": 60})
    assert found == pytest.approx({"a": 0.6 / 61, "b": 0.6 / 62, "c": 0.6 / 63 + 0.4 / 61, "d": 0.4 / 62})


def test_stacking():
    found = gather(TWO)
    told = describe(found)
    assert told.shape == (4, 2 * len(FEATURES))
    np.testing.assert_allclose(told[2], [LOW, 1 / 3, 1, 1, 1, 1])
    np.testing.assert_allclose(told[3], [0, 0, 0, LOW, 1 / 2, 1])
    weights = [1.0, 10.0, 100.0, 2.0, 20.0, 200.0]
    np.testing.assert_allclose(fuse(found, "stacking", {"weights": weights}), told @ weights)


def test_best_are_the_first_ties_in_the_order_of_naming():
    found = gather([(["x", "a", "m", "b"], [1, 1, 1, 1])])
    assert best(found, np.array([0.5, 0.7, 0.5, 0.5]), 3) == [("a", 0.7), ("x", 0.5), ("m", 0.5)]
    assert len(best(found, np.zeros(4), 10)) == 4


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weighted", "rrf"])
def test_the_weights_of_those_that_spoke_are_scaled_up(method):
    parameters = {"weights": [0.5, 0.3, 0.2], "k": 10}
    other = (["a", "d"], [2.0, 1.0])
    found = fused([TWO[0], None, other], method, parameters)
    assert found == pytest.approx(fused([TWO[0], other], method, {"weights": [0.5 / 0.7, 0.2 / 0.7], "k": 10}))
    assert max(found.values()) <= (1 if method == "weighted" else 1 / 11) + 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("missing", [0, 1])
def test_one_source_alone_keeps_its_order(method, missing):
    answers = [None if k == missing else (["a", "b", "c"], [3.0, 1.0, -2.0]) for k in range(2)]
    found = gather(answers)
    assert [product for product, _ in best(found, fuse(found, method, EVERY[method]), 10)] == ["a", "b", "c"]


@pytest.mark.parametrize("method", ["weighted", "rrf"])
def test_a_source_of_no_weight_still_answers_where_the_other_is_missing(method):
    found = gather([None, TWO[1]])
    scores = fuse(found, method, {"weights": [1.0, 0.0], "k": 10})
    assert np.isfinite(scores).all()
    assert [product for product, _ in best(found, scores, 10)] == ["c", "d"]


@pytest.mark.parametrize("method", ["weighted", "rrf"])
def test_sources_of_no_weight_share_it_equally_where_the_others_are_missing(method):
    other = (["d", "a"], [2.0, 1.0])
    found = fused([None, TWO[1], other], method, {"weights": [1.0, 0.0, 0.0], "k": 10})
    assert found == pytest.approx(fused([TWO[1], other], method, {"weights": [0.5, 0.5], "k": 10}))
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answers", [[None, None], [([], []), ([], [])], [([], []), None]])
def test_of_nothing_nothing_is_fused(method, answers):
    found = gather(answers)
    scores = fuse(found, method, EVERY[method])
    assert scores.shape == (0,)
    assert best(found, scores, 10) == []


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_answer_adds_nothing(method):
    found = fused([TWO[0], ([], [])], method, EVERY[method])
    assert list(found) == ["a", "b", "c"]
    assert found["a"] > found["b"] > found["c"]


@pytest.mark.parametrize("method", ["", "mean", "Weighted", "加权"])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(ShipyardError, match=r"unknown method.*allowed: weighted, vote, rrf, stacking"):
        fuse(gather(TWO), method, {"weights": [1, 1]})


@pytest.mark.parametrize("method", ["weighted", "rrf", "stacking"])
@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 3, [1.0] * 5, [1.0] * 7])
def test_another_number_of_weights_is_refused(method, weights):
    with pytest.raises(ShipyardError, match=f"{method}: wrong weights"):
        fuse(gather(TWO), method, {"weights": weights, "k": 10})


@pytest.mark.parametrize("method", ["weighted", "rrf", "stacking"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(method, wrong):
    weights = [wrong, *EVERY[method]["weights"][1:]]
    with pytest.raises(ShipyardError, match="finite numbers"):
        fuse(gather(TWO), method, {"weights": weights, "k": 10})


# --- what does not matter --------------------------------------------------------------------------------------------


@st.composite
def sources(draw, most=4):
    """Answers of some sources with different scores, one of them perhaps missing."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        products = draw(st.lists(st.integers(1, 20), unique=True, max_size=10))
        scores = sorted(draw(st.permutations(range(30)))[: len(products)], reverse=True)
        found.append((products, [float(score) for score in scores]))
    if draw(st.booleans()):
        found[draw(st.integers(0, len(found) - 1))] = None
    return found


@given(sources(), st.sampled_from(METHODS), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=120)
def test_the_order_of_the_sources_does_not_matter(answers, method, random):
    size = len(FEATURES) if method == "stacking" else 1
    weights = [[random.random() + 0.1 for _ in range(size)] for _ in answers]

    def of(order):
        parameters = {"weights": [w for k in order for w in weights[k]], "k": 7, "depth": 3}
        return fused([answers[k] for k in order], method, parameters)

    order = random.sample(range(len(answers)), len(answers))
    assert of(order) == pytest.approx(of(range(len(answers))), abs=1e-9)


@given(sources(), st.sampled_from(METHODS))
@settings(deadline=None, max_examples=60)
def test_names_of_products_do_not_matter(answers, method):
    weights = np.linspace(0.2, 1, len(answers) * (len(FEATURES) if method == "stacking" else 1)).tolist()
    parameters = {"weights": weights, "k": 7, "depth": 3}
    renamed = [None if a is None else ([f"商品 {p}" for p in a[0]], a[1]) for a in answers]
    expected = {f"商品 {p}": score for p, score in fused(answers, method, parameters).items()}
    assert fused(renamed, method, parameters) == expected


# --- fit -------------------------------------------------------------------------------------------------------------

PLACES = 30


def rankings(rng, requests, items, *, signal):
    """Rankings of a source a name that sees each right answer with some signal through noise, and the right answers."""
    right = np.stack([rng.permutation(items)[:2] + 1 for _ in range(requests)])
    found = {}
    for name, strength in signal.items():
        scores = rng.normal(size=(requests, items))
        np.put_along_axis(scores, right - 1, np.take_along_axis(scores, right - 1, 1) + strength, 1)
        ranked = np.argsort(-scores, axis=1)[:, :PLACES]
        found[name] = ranked + 1, np.take_along_axis(scores, ranked, 1).astype(np.float32)
    return found, right


def fit(signal, *, seed=0, requests=120):
    rng = np.random.default_rng(seed)
    validation, right = rankings(rng, requests, 200, signal=signal)
    test, relevant = rankings(rng, requests, 200, signal=signal)
    return fit_fusion(validation, right, test, relevant, np.arange(requests)), (validation, right, test, relevant)


@pytest.mark.parametrize("order", [("good", "random"), ("random", "good")])
def test_the_weight_goes_to_the_source_that_knows(order):
    signal = {"good": 3.0, "random": 0.0}
    found, _ = fit({name: signal[name] for name in order})
    assert found["sources"] == list(order)
    assert found["best_single"] == "good"
    for method in ("weighted", "rrf"):
        weights = dict(zip(order, found["methods"][method]["parameters"]["weights"], strict=True))
        assert weights["good"] >= 0.7, method
        assert sum(weights.values()) == pytest.approx(1)
    stacked = np.reshape(found["methods"]["stacking"]["parameters"]["weights"], (2, len(FEATURES)))
    assert np.abs(stacked[order.index("good")]).max() > 3 * np.abs(stacked[order.index("random")]).max()


@pytest.mark.parametrize("seed", range(4))
def test_weighted_is_never_below_the_best_single_source_on_what_it_is_fitted_to(seed):
    rng = np.random.default_rng(seed)
    found, _ = fit({name: float(rng.uniform(0, 3)) for name in ("a", "b", "c")}, seed=seed, requests=60)
    highest = max(single["validation"] for single in found["single"].values())
    assert found["methods"]["weighted"]["validation"] >= highest


def test_two_sources_that_err_apart_are_better_together():
    found, _ = fit({"one": 2.2, "other": 2.2})
    assert found["over_best_single"]["low"] > 0
    for method in METHODS:
        assert found["methods"][method]["validation"] > found["single"]["one"]["validation"], method


def test_the_record_is_of_the_method_that_is_best_on_validation():
    found, (validation, right, test, relevant) = fit({"one": 2.0, "other": 1.0})
    values = {method: said["validation"] for method, said in found["methods"].items()}
    assert set(values) == set(METHODS)
    assert values[found["method"]] == max(values.values())
    assert found["parameters"] == found["methods"][found["method"]]["parameters"]
    assert found["examples"] == len(relevant)
    for source, (products, _) in validation.items():
        assert found["single"][source]["validation"] == pytest.approx(metrics.ndcg(products, right).mean(), abs=1e-5)
    # as a gateway would fuse
    ranked = np.zeros((len(relevant), 10), np.int64)
    for i, line in enumerate(ranked):
        candidates = gather([(p[i].tolist(), s[i].tolist()) for p, s in test.values()])
        line[:] = [p for p, _ in best(candidates, fuse(candidates, found["method"], found["parameters"]), 10)]
    told = found["methods"][found["method"]]["test"]["value"]
    assert told == pytest.approx(metrics.ndcg(ranked, relevant).mean(), abs=1e-5)


def test_the_fit_looks_at_validation_alone():
    _, (validation, right, test, relevant) = fit({"one": 2.0, "other": 1.0})
    one = fit_fusion(validation, right, test, relevant, np.arange(len(relevant)))
    turned = {name: (products[::-1], scores[::-1]) for name, (products, scores) in test.items()}
    other = fit_fusion(validation, right, turned, relevant, np.arange(len(relevant)))
    assert one["over_best_single"] != other["over_best_single"]
    for method in METHODS:
        assert one["methods"][method]["parameters"] == other["methods"][method]["parameters"]
    assert (one["method"], one["best_single"]) == (other["method"], other["best_single"])


def test_padding_in_a_ranking_is_no_candidate():
    found, (validation, right, test, relevant) = fit({"one": 2.0, "other": 1.0}, requests=30)

    def padded(parts):
        return {
            name: (np.pad(products, ((0, 0), (0, 5))), np.pad(scores, ((0, 0), (0, 5)), constant_values=-9e9))
            for name, (products, scores) in parts.items()
        }

    again = fit_fusion(padded(validation), right, padded(test), relevant, np.arange(len(relevant)))
    assert again == found
