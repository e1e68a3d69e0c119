"""Metrics of rankings, probabilities and classes, and their intervals: against slow references and known libraries."""

import json
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import pytrec_eval
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn import metrics as sk

from serve.errors import ShipyardError
from shipyard import intervals, losses, metrics

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)

# --- metrics of a ranking --------------------------------------------------------------------------------------------


def slow(ranked, relevant, gains, k):
    """All three metrics of one request, as the textbooks write them."""
    gain = {row: g for row, g in zip(relevant, gains, strict=True) if row != 0}
    right = set(gain)
    found = [row for row in ranked[:k] if row in right]
    gained = sum(gain.get(row, 0) / math.log2(1 + place) for place, row in enumerate(ranked[:k], start=1))
    best = sum(g / math.log2(1 + place) for place, g in enumerate(sorted(gain.values(), reverse=True)[:k], start=1))
    first = next((1 / place for place, row in enumerate(ranked[:k], start=1) if row in right), 0)
    return {
        "ndcg": gained / best if best else math.nan,
        "mrr": first if right else math.nan,
        "recall": len(found) / len(right) if right else math.nan,
    }


@st.composite
def rankings(draw, least=0):
    """Rankings [B, P] of different rows, right answers [B, K] with padding anywhere, gains [B, K] and k."""
    batch, places, width = draw(st.integers(1, 5)), draw(st.integers(1, 25)), draw(st.integers(max(1, least), 20))
    rows = st.integers(1, 30)
    ranked = [draw(st.lists(rows, min_size=places, max_size=places, unique=True)) for _ in range(batch)]
    relevant = []
    for _ in range(batch):
        right = draw(st.lists(rows, min_size=least, max_size=width, unique=True))
        relevant.append(draw(st.permutations(right + [0] * (width - len(right)))))
    gains = draw(npst.arrays(np.float64, (batch, width), elements=st.sampled_from([0, 0.5, 1, 2, 3, 7])))
    return np.array(ranked, np.int64), np.array(relevant, np.int64), gains, draw(st.integers(1, 30))


@given(rankings())
@quick
def test_metrics_are_the_textbooks(case):
    ranked, relevant, gains, k = case
    lines = [slow(*line, k) for line in zip(ranked.tolist(), relevant.tolist(), gains.tolist(), strict=True)]
    expected = {name: [line[name] for line in lines] for name in lines[0]}
    np.testing.assert_allclose(metrics.ndcg(ranked, relevant, k, gains), expected["ndcg"], atol=1e-12)
    for name in ("mrr", "recall"):
        found = getattr(metrics, name)(ranked, relevant, k)
        np.testing.assert_allclose(found, expected[name], atol=1e-12)
    everything = metrics.mrr(ranked, relevant)
    np.testing.assert_array_equal(everything, metrics.mrr(ranked, relevant, ranked.shape[1]))


@given(seeds, st.integers(2, 40), st.integers(1, 45))
@quick
def test_ndcg_of_a_full_ranking_is_scikit_learns(seed, rows, k):
    rng = np.random.default_rng(seed)
    gains = rng.integers(0, 4, (3, rows)).astype(float)
    assume((gains.sum(1) > 0).all())
    scores = rng.permuted(np.tile(np.arange(rows, dtype=float), (3, 1)), axis=1)
    relevant = np.tile(np.arange(1, rows + 1), (3, 1))
    found = metrics.ndcg(np.argsort(-scores, axis=1) + 1, relevant, k, gains)
    expected = [sk.ndcg_score(gains[[i]], scores[[i]], k=k) for i in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(rankings(least=1))
@quick
def test_ndcg_recall_and_mrr_are_trec_evals(case):
    ranked, relevant, _, k = case
    gains = np.random.default_rng(k).integers(1, 5, relevant.shape)  # trec_eval takes whole numbers
    qrels = {
        f"q{i}": {f"d{row}": int(gain) for row, gain in zip(relevant[i], gains[i], strict=True) if row}
        for i in range(len(ranked))
    }
    run = {f"q{i}": {f"d{row}": -float(place) for place, row in enumerate(line)} for i, line in enumerate(ranked)}
    wanted = {f"ndcg_cut.{k}", f"recall.{k}", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    ours = {
        f"ndcg_cut_{k}": metrics.ndcg(ranked, relevant, k, gains),
        f"recall_{k}": metrics.recall(ranked, relevant, k),
        "recip_rank": metrics.mrr(ranked, relevant),
    }
    for name, values in ours.items():
        expected = [theirs[f"q{i}"][name] if f"q{i}" in theirs else np.nan for i in range(len(ranked))]
        np.testing.assert_allclose(values, expected, atol=1e-9)


def test_metrics_of_known_rankings():
    ranked = np.tile(np.arange(1, 13), (4, 1))
    relevant = np.array([[1, 0, 0], [2, 0, 0], [0, 11, 1], [11, 0, 12]])
    np.testing.assert_allclose(
        metrics.ndcg(ranked, relevant), [1, 1 / math.log2(3), 1 / (1 + 1 / math.log2(3)), 0], atol=1e-12
    )
    np.testing.assert_allclose(metrics.mrr(ranked, relevant), [1, 1 / 2, 1, 1 / 11])
    np.testing.assert_allclose(metrics.mrr(ranked, relevant, 10), [1, 1 / 2, 1, 0])
    np.testing.assert_allclose(metrics.recall(ranked, relevant, 10), [1, 1, 1 / 2, 0])
    # gains 3 and 1, the lesser one first: (1 + 3 / log2 3) / (3 + 1 / log2 3)
    assert metrics.ndcg(np.array([[5, 4]]), np.array([[4, 5]]), gains=np.array([[3, 1]]))[0] == pytest.approx(0.796708)


@given(rankings(), seeds)
@quick
def test_permuting_requests_permutes_values_and_the_order_of_right_answers_does_not_matter(case, seed):
    ranked, relevant, gains, k = case
    rng = np.random.default_rng(seed)
    order, across = rng.permutation(len(ranked)), rng.permutation(relevant.shape[1])
    found = metrics.ndcg(ranked, relevant, k, gains)
    moved = metrics.ndcg(ranked[order], relevant[order][:, across], k, gains[order][:, across])
    np.testing.assert_allclose(moved, found[order], atol=1e-12)
    recall = metrics.recall(ranked, relevant, k)
    np.testing.assert_array_equal(metrics.recall(ranked[order], relevant[order][:, across], k), recall[order])


@given(rankings(least=1), st.sampled_from([1e-30, 1e-3, 10, 1e30, 1e307]))
@quick
def test_ndcg_is_a_part_of_1_that_no_scale_of_gains_changes(case, scale):
    ranked, relevant, gains, k = case
    found = metrics.ndcg(ranked, relevant, k, gains)
    known = ~np.isnan(found)
    assert (found[known] >= 0).all() and (found[known] <= 1 + 1e-12).all()
    np.testing.assert_allclose(metrics.ndcg(ranked, relevant, k, gains * scale), found, atol=1e-9)


def test_more_right_answers_than_places_can_still_be_all_right():
    assert metrics.ndcg(np.arange(25, 0, -1)[None], np.arange(1, 26)[None])[0] == pytest.approx(1)
    assert metrics.recall(np.arange(25, 0, -1)[None], np.arange(1, 26)[None], 10)[0] == pytest.approx(10 / 25)


def test_a_request_without_a_right_answer_has_no_value():
    ranked, relevant = np.array([[1, 2], [1, 2]]), np.array([[0, 0], [2, 0]])
    for name in ("ndcg", "mrr", "recall"):
        found = getattr(metrics, name)(ranked, relevant, k=2)
        assert np.isnan(found[0]) and found[1] > 0
    assert np.isnan(metrics.ndcg(ranked, np.array([[1, 2], [2, 0]]), gains=np.zeros((2, 2)))).all()


def test_padding_in_a_ranking_is_no_hit_however_often():
    ranked, relevant = np.array([[0, 1, 0, 0, 2]]), np.array([[0, 0, 2]])
    assert metrics.mrr(ranked, relevant)[0] == pytest.approx(1 / 5)
    assert metrics.recall(ranked, relevant, 4)[0] == 0


good = np.array([[1, 2, 3]])


@pytest.mark.parametrize(
    ("ranked", "relevant", "more", "said"),
    [
        (np.array([[1, 2, 1]]), good, {}, "ranking has a row twice in request 0; value: 'row 1'"),
        (good, np.array([[4, 0, 4]]), {}, "right answers has a row twice in request 0; value: 'row 4'"),
        (good, np.array([[1], [2]]), {}, "shapes of rankings and right answers disagree; value: '1 and 2'"),
        (good[0], good, {}, r"ranking has nothing in it or the wrong shape; value: \(3,\)"),
        (np.empty((0, 3), int), np.empty((0, 3), int), {}, "nothing in it"),
        (good, np.empty((1, 0), int), {}, "nothing in it"),
        (good.astype(float), good, {}, "no array of rows"),
        (good, np.array([[True]]), {}, "no array of rows"),
        (-good, good, {}, "value: '-3 to -1, int64'; allowed: integers from 0"),
        (np.array([[2**40]]), good, {}, "allowed: integers from 0"),
        (good, good, {"k": 0}, "too few places to look at; value: 0; allowed: 1 or more"),
        (good, good, {"gains": np.array([[1, -1, 0]])}, "a gain is negative or not finite; value: -1.0; allowed: 0"),
        (good, good, {"gains": np.array([[1, np.nan, 0]])}, "value: nan"),
        (good, good, {"gains": np.array([[1, np.inf, 0]])}, "value: inf"),
        (good, good, {"gains": np.array([1, 1, 1])}, "shapes of right answers and gains disagree"),
    ],
)
def test_a_ranking_that_is_none_is_refused(ranked, relevant, more, said):
    with pytest.raises(ShipyardError, match=said):
        metrics.ndcg(ranked, relevant, **more)


# --- places and what follows from them -------------------------------------------------------------------------------


def slow_place(line, row):
    others = [score for at, score in enumerate(line) if at not in (0, row)]
    return 1 + sum(score > line[row] for score in others) + sum(score == line[row] for score in others) / 2


@st.composite
def scored(draw):
    """Scores [B, R + 1] with many ties, minus infinity and huge values among them, and right answers [B, K]."""
    batch, rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 25)), draw(st.integers(1, 8))
    values = st.sampled_from([-np.inf, -1e30, -1, 0, 0.5, 1, 2, 1e30])
    scores = draw(npst.arrays(np.float32, (batch, rows + 1), elements=values, fill=st.nothing()))
    relevant = []
    for _ in range(batch):
        right = draw(st.lists(st.integers(1, rows), max_size=min(width, rows), unique=True))
        relevant.append(draw(st.permutations(right + [0] * (width - len(right)))))
    return scores, np.array(relevant, np.int64)


@given(scored())
@quick
def test_places_are_counted_and_ties_share_their_mean_place(case):
    scores, relevant = case
    expected = [
        [slow_place(line, row) if row else 0 for row in right]
        for line, right in zip(scores.tolist(), relevant.tolist(), strict=True)
    ]
    found = metrics.places(scores, relevant)
    np.testing.assert_array_equal(found, expected)
    best = [1 / min(p for p in line if p) if any(line) else math.nan for line in expected]
    np.testing.assert_allclose(metrics.mrr_of_places(found), best)


@given(scored())
@quick
def test_auc_from_places_is_scikit_learns_over_all_rows(case):
    scores, relevant = case
    rows = scores.shape[1] - 1
    found = metrics.auc(metrics.places(scores, relevant), relevant, rows)
    for line, right, value in zip(scores[:, 1:].clip(-1e35, None), relevant, found, strict=True):
        label = np.isin(np.arange(1, rows + 1), right[right != 0])
        if 0 < label.sum() < rows:
            assert value == pytest.approx(sk.roc_auc_score(label, line), abs=1e-12)
        else:
            assert np.isnan(value)


@given(seeds, st.integers(-1000, 1000), st.integers(1, 9))
@quick
def test_a_constant_or_a_scale_changes_no_place_and_permuted_requests_permute_them(seed, constant, scale):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-20, 20, (4, 50)).astype(np.float64)
    relevant = np.stack([rng.permutation(49)[:5] + 1 for _ in range(4)])
    found, order = metrics.places(scores, relevant), rng.permutation(4)
    np.testing.assert_array_equal(metrics.places(scores * scale + constant, relevant), found)
    np.testing.assert_array_equal(metrics.places(scores[order], relevant[order]), found[order])


def test_when_everything_ties_each_place_is_the_middle_one_and_auc_a_half():
    relevant = np.array([[3, 9, 0]])
    found = metrics.places(np.zeros((1, 12)), relevant)
    np.testing.assert_array_equal(found, [[6, 6, 0]])
    assert metrics.auc(found, relevant, 11)[0] == pytest.approx(0.5)


def test_the_mean_place_is_what_ties_get_when_chance_breaks_them():
    rng = np.random.default_rng(5)
    scores = np.array([[9.0, 1, 1, 1, 0, 2]])
    broken = [np.argsort(np.argsort(-(scores[0, 1:] + rng.uniform(0, 0.1, 5))))[0] + 1 for _ in range(4000)]
    assert metrics.places(scores, np.array([[1]]))[0, 0] == pytest.approx(np.mean(broken), abs=0.05)


def test_one_row_has_the_first_place_and_no_wrong_row_to_beat():
    relevant = np.array([[1]])
    found = metrics.places(np.array([[5.0, -np.inf]]), relevant)
    assert found[0, 0] == 1 and metrics.mrr_of_places(found)[0] == 1
    assert np.isnan(metrics.auc(found, relevant, 1)[0])


def test_the_score_of_padding_is_never_looked_at():
    assert metrics.places(np.array([[np.nan, 1, 2]]), np.array([[2, 0]])).tolist() == [[1, 0]]
    assert losses.softmax_log_loss(np.array([[np.nan, 1.0, 1]]), np.array([[2, 0]]))[0] == pytest.approx(math.log(2))


def test_places_of_a_large_catalogue_take_little_memory():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((16, 92_001), np.float32)
    relevant = np.tile(np.arange(1, 101), (16, 1))
    tracemalloc.start()
    found = metrics.places(scores, relevant)
    losses.softmax_log_loss(scores, relevant)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < scores.nbytes  # requests x right answers x rows would be 100 times the scores
    assert found[3, 7] == slow_place(scores[3].tolist(), 8)


@pytest.mark.parametrize(
    ("scores", "relevant", "said"),
    [
        (np.array([[0, np.nan, 1]]), np.array([[2]]), "a score is not a number"),
        (
            np.array([[0.0, 1, 1]]),
            np.array([[2], [1]]),
            "shapes of scores and right answers disagree; value: '1 and 2'",
        ),
        (np.array([[0.0, 1, 1]]), np.array([[3]]), "value: '3 to 3, int64'; allowed: integers from 0 to 2"),
        (np.array([[0.0, 1, 1]]), np.array([[2, 2]]), "right answers has a row twice"),
        (np.array([[0.0]]), np.array([[0]]), "scores have nothing in them"),
        (np.empty((0, 3)), np.array([[0]]), "scores have nothing in them"),
        (np.zeros(3), np.array([[0]]), "scores have nothing in them"),
    ],
)
def test_scores_that_are_none_are_refused(scores, relevant, said):
    with pytest.raises(ShipyardError, match=said):
        metrics.places(scores, relevant)
    if "not a number" not in said:
        with pytest.raises(ShipyardError, match=said):
            losses.softmax_log_loss(scores, relevant)


@pytest.mark.parametrize(
    ("places", "relevant", "said"),
    [
        ([[1.0, 0]], [[1, 2]], "places are not those"),
        ([[1.0, 2]], [[1, 0]], "places are not those"),
        ([[12.0]], [[1]], "allowed: 1 to 11"),
        ([[np.nan]], [[1]], "places are not those"),
        ([[1.0]], [[1], [2]], "shapes of places and right answers disagree"),
        (np.empty((0, 2)), np.empty((0, 2)), "nothing in them"),
    ],
)
def test_places_of_other_right_answers_are_refused(places, relevant, said):
    with pytest.raises(ShipyardError, match=said):
        metrics.auc(np.asarray(places), np.asarray(relevant), 11)


# --- losses ----------------------------------------------------------------------------------------------------------


@given(scored(), seeds)
@quick
def test_softmax_loss_is_the_textbooks_and_no_constant_changes_it(case, seed):
    _, relevant = case
    scores = np.random.default_rng(seed).normal(0, 3, case[0].shape)
    expected = []
    for line, right in zip(scores, relevant, strict=True):
        part = np.exp(line[1:]) / np.exp(line[1:]).sum()
        expected.append(-np.log(part[right[right != 0] - 1]).mean() if right.any() else math.nan)
    np.testing.assert_allclose(losses.softmax_log_loss(scores, relevant), expected, rtol=1e-9)
    np.testing.assert_allclose(losses.softmax_log_loss(scores + 700, relevant), expected, rtol=1e-9)


def test_softmax_loss_of_hostile_scores():
    right = np.array([[1, 0]])
    assert losses.softmax_log_loss(np.array([[0, 1e30, -1e30]]), right)[0] == 0
    assert losses.softmax_log_loss(np.array([[0, 1.7e308, -1.7e308]]), right)[0] == 0
    assert losses.softmax_log_loss(np.array([[0, -1e30, 1e30]], np.float32), right)[0] == pytest.approx(2e30)
    assert losses.softmax_log_loss(np.array([[0, 1.0, -np.inf]]), right)[0] == 0
    assert losses.softmax_log_loss(np.array([[0, -np.inf, 1.0]]), right)[0] == np.inf
    assert losses.softmax_log_loss(np.zeros((1, 92_001), np.float32), right)[0] == pytest.approx(math.log(92_000))
    for scores in ([0, 1, np.nan], [0, 1, np.inf], [0, -np.inf, -np.inf]):
        with pytest.raises(ShipyardError, match="scores have no softmax"):
            losses.softmax_log_loss(np.array([scores]), right)


@st.composite
def forecasts(draw):
    """Probabilities [N], ties and the ends among them, and labels [N]."""
    size = draw(st.integers(1, 60))
    values = st.one_of(st.floats(0, 1), st.sampled_from([0, 0.25, 0.5, 1]))
    probability = draw(npst.arrays(np.float64, size, elements=values))
    return probability, draw(npst.arrays(np.int64, size, elements=st.integers(0, 1)))


@given(forecasts())
@quick
def test_log_loss_and_brier_are_scikit_learns(case):
    probability, label = case
    expected = sk.log_loss(label, probability, labels=[0, 1])
    assert losses.log_loss(probability, label).mean() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = np.mean((probability - label) ** 2)
    assert losses.brier(probability, label).mean() == pytest.approx(expected, abs=1e-12)
    if len(set(label.tolist())) == 2:
        assert expected == pytest.approx(sk.brier_score_loss(label, probability), abs=1e-12)


@given(forecasts(), st.integers(1, 20), seeds)
@quick
def test_reliability_counts_all_whatever_their_order_and_its_error_is_below_1(case, bins, seed):
    probability, label = case
    table = losses.reliability(probability, label, bins)
    assert sum(table["count"]) == len(label) and len(table["count"]) <= bins
    assert np.average(table["predicted"], weights=table["count"]) == pytest.approx(probability.mean(), abs=1e-12)
    assert np.average(table["observed"], weights=table["count"]) == pytest.approx(label.mean(), abs=1e-12)
    assert (np.diff(table["predicted"]) > 0).all()
    error = losses.calibration_error(probability, label, bins)
    assert 0 <= error <= 1
    order = np.random.default_rng(seed).permutation(len(label))
    assert losses.calibration_error(probability[order], label[order], bins) == pytest.approx(error, abs=1e-12)
    json.dumps(table)


def test_bins_have_equal_mass_and_the_error_is_the_textbooks():
    rng = np.random.default_rng(1)
    probability = rng.permutation(300) / 300
    label = (rng.random(300) < probability**2).astype(int)
    assert losses.reliability(probability, label)["count"] == [20] * 15
    order = np.argsort(probability)
    apart = probability[order].reshape(15, 20).mean(1) - label[order].reshape(15, 20).mean(1)
    assert losses.calibration_error(probability, label) == pytest.approx(np.abs(apart).mean())


def test_a_calibrated_forecast_has_a_small_error_and_a_constant_one_that_of_its_mean():
    rng = np.random.default_rng(2)
    probability = rng.random(40_000)
    label = rng.random(40_000) < probability
    assert losses.calibration_error(probability, label) < 0.01
    assert losses.calibration_error(probability / 2, label) == pytest.approx(0.25, abs=0.01)
    table = losses.reliability(np.full(10, 0.3), np.arange(10) < 5)
    assert table == {"predicted": [pytest.approx(0.3)], "observed": [0.5], "count": [10]}


def test_equal_probabilities_share_the_bin_of_their_mean_place():
    probability, label = np.r_[0.25, np.full(9, 0.75)], np.arange(10) < 4
    expected = {"predicted": [0.25, 0.75], "observed": [1, pytest.approx(3 / 9)], "count": [1, 9]}
    assert losses.reliability(probability, label, 2) == expected


@pytest.mark.parametrize("measure", [losses.log_loss, losses.brier, losses.reliability, losses.calibration_error])
@pytest.mark.parametrize(
    ("probability", "label", "said"),
    [
        ([0.5, np.nan], [0, 1], "a probability is none; value: nan; allowed: 0 to 1"),
        ([0.5, 1.5], [0, 1], "value: 1.5"),
        ([0.5, 0.5], [0, 2], "a label is none; value: 2; allowed: 0 or 1"),
        ([0.5, 0.5], [0.0, np.nan], "a label is none"),
        ([0.5], [0, 1], "shapes of probabilities and labels disagree"),
        ([], [], "probabilities are none"),
    ],
)
def test_what_is_no_forecast_is_refused(measure, probability, label, said):
    with pytest.raises(ShipyardError, match=said):
        measure(np.array(probability), np.array(label))


def test_a_table_of_no_bins_is_refused():
    with pytest.raises(ShipyardError, match="too few bins; value: 0"):
        losses.reliability(np.array([0.5]), np.array([1]), 0)


# --- classes ---------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(3, 12), st.integers(1, 60))
@quick
def test_a_report_of_classes_is_scikit_learns(seed, classes, size):
    rng = np.random.default_rng(seed)
    true = np.minimum(rng.geometric(0.4, size) - 1, classes - 1)
    scores = rng.normal(0, 2, (size, classes))
    scores[np.arange(size), true] += 1
    predicted, everything = scores.argmax(1), np.arange(classes)
    found = losses.classification_report(true, scores, [f"c{c}" for c in everything], most=classes)
    near = {"abs": 6e-6}
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted), **near)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with three classes the top three are always right
        third = sk.top_k_accuracy_score(true, scores, k=3, labels=everything)
    assert found["top_3_accuracy"] == pytest.approx(third, **near)
    part = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert found["cross_entropy"] == pytest.approx(sk.log_loss(true, part, labels=everything), **near)
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(true, predicted, average=average, zero_division=0)
        assert list(found[average].values()) == pytest.approx(expected[:3], **near)
    each = sk.precision_recall_fscore_support(true, predicted, labels=everything, zero_division=0)
    for line in found["classes"]:
        c = int(line["name"][1:])
        assert [line[n] for n in ("precision", "recall", "f1", "support")] == pytest.approx(
            [x[c] for x in each], **near
        )
    assert sum(line["support"] for line in found["classes"]) == found["examples"] == size
    json.dumps(found, allow_nan=False)


def test_the_table_holds_the_most_frequent_classes():
    true = np.array([2, 2, 2, 0, 0, 3])
    found = losses.classification_report(true, np.eye(4)[true], ["a", "b", "c", "d"], most=2)
    assert [(line["name"], line["support"]) for line in found["classes"]] == [("c", 3), ("a", 2)]
    assert found["macro"] == {"precision": 1, "recall": 1, "f1": 1}


def test_of_equal_class_scores_the_lower_index_comes_first():
    found = losses.classification_report(np.arange(5), np.zeros((5, 5)), list("abcde"))
    assert found["accuracy"] == 0.2 and found["top_3_accuracy"] == 0.6
    assert found["cross_entropy"] == round(math.log(5), 5)


def test_a_class_that_was_ruled_out_and_is_true_has_no_finite_cross_entropy():
    found = losses.classification_report(np.array([0, 1]), np.array([[-np.inf, 0], [1e30, 0]]), ["a", "b"])
    assert found["cross_entropy"] is None and found["accuracy"] == 0


@pytest.mark.parametrize(
    ("true", "scores", "names", "said"),
    [
        ([0, 1], [[1, np.nan], [1, 2]], "ab", "scores have no softmax; value: nan"),
        ([0], [[1, 2], [1, 2]], "ab", "shapes of classes and their scores disagree"),
        ([0, 1], [[1, 2], [1, 2]], "abc", "shapes of scores and names of classes disagree; value: '2 and 3'"),
        ([0, 2], [[1, 2], [1, 2]], "ab", "value: '0 to 2, int64'; allowed: integers from 0 to 1"),
        ([0.0, 1.0], [[1, 2], [1, 2]], "ab", "no array of rows"),
        ([], np.empty((0, 2)), "ab", "scores of classes are none"),
    ],
)
def test_what_is_no_classification_is_refused(true, scores, names, said):
    with pytest.raises(ShipyardError, match=said):
        losses.classification_report(np.array(true), np.array(scores, float), list(names))


# --- intervals -------------------------------------------------------------------------------------------------------


@given(npst.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1, 1)), seeds, st.booleans())
@settings(deadline=None, max_examples=25)
def test_an_interval_holds_the_mean_whatever_the_order(values, seed, grouped):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 7, len(values)) if grouped else None
    found, order = intervals.interval(values, groups), rng.permutation(len(values))
    moved = intervals.interval(values[order], None if groups is None else groups[order])
    assert found["value"] == pytest.approx(values.mean(), abs=1e-5)
    assert found["low"] <= found["high"]
    assert values.min() - 1e-5 <= found["low"] and found["high"] <= values.max() + 1e-5
    assert moved["value"] == pytest.approx(found["value"], abs=1.1e-5)
    if not grouped:
        assert moved == found


def test_an_interval_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    found = intervals.interval(values)
    assert found["low"] < values.mean() < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_an_interval_of_groups_is_that_of_a_slow_bootstrap():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    values = rng.normal(0, 1, 60)[groups] + rng.normal(0, 0.3, len(groups))
    means = []
    for _ in range(2000):
        drawn = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 60, 60)])
        means.append(values[drawn].mean())
    found, (low, high) = intervals.interval(values, groups), np.quantile(means, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.04) and found["high"] == pytest.approx(high, abs=0.04)


def households(rng, size=40, shared=1.0):
    groups = np.repeat(np.arange(size), rng.integers(2, 10, size))
    return rng.normal(0, 1, size)[groups] * shared + rng.normal(0, 0.5, len(groups)), groups


def test_a_clustered_interval_covers_and_is_wider_than_the_naive_one():
    rng, naive, clustered, widths = np.random.default_rng(6), 0, 0, []
    for _ in range(300):
        values, groups = households(rng, size=200)
        each = [intervals.interval(values, g, rounds=400) for g in (None, groups)]
        widths.append([found["high"] - found["low"] for found in each])
        naive += each[0]["low"] <= 0 <= each[0]["high"]
        clustered += each[1]["low"] <= 0 <= each[1]["high"]
    one, other = np.mean(widths, axis=0)
    assert other > 1.5 * one
    assert naive < 0.75 * 300  # what the clusters are for: the naive interval claims 95 %
    assert 0.92 * 300 <= clustered <= 0.98 * 300


def test_without_correlation_clusters_change_little():
    values, groups = households(np.random.default_rng(8), size=300, shared=0)
    naive, clustered = intervals.interval(values), intervals.interval(values, groups)
    assert clustered["high"] - clustered["low"] == pytest.approx(naive["high"] - naive["low"], rel=0.2)


def test_each_value_in_a_group_of_its_own_is_no_group():
    values = np.random.default_rng(9).random(50)
    assert intervals.interval(values, np.array([f"h{i}" for i in range(50)])) == intervals.interval(values)


def test_undefined_values_are_left_out_of_sum_and_count():
    rng = np.random.default_rng(10)
    values, groups = rng.random(40), rng.integers(0, 9, 40)
    gaps = rng.random(40) < 0.3
    holed = np.where(gaps, np.nan, values)
    assert intervals.interval(holed, groups) == intervals.interval(values[~gaps], groups[~gaps])
    assert intervals.interval(holed) == intervals.interval(values[~gaps])
    assert intervals.interval(np.array([np.nan, 0.5])) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_equal_values_have_an_interval_of_no_width():
    assert intervals.interval(np.full(30, 0.25)) == {"value": 0.25, "low": 0.25, "high": 0.25}
    zero = intervals.interval(np.full(30, -1e-9))
    assert math.copysign(1, zero["value"]) == 1


def test_another_seed_draws_other_groups_and_the_same_seed_the_same():
    values = np.random.default_rng(11).random(30)
    assert intervals.interval(values) == intervals.interval(values.copy())
    assert intervals.interval(values, seed=8) != intervals.interval(values)


def test_a_paired_difference_is_narrower_than_what_it_is_made_of_and_its_sign_turns():
    rng = np.random.default_rng(12)
    b, groups = households(rng, size=100)
    b = b + 3
    a = b + rng.normal(0.3, 0.05, len(b))
    found, alone = intervals.difference(a, b, groups), intervals.interval(b, groups)
    assert found["high"] - found["low"] < 0.2 * (alone["high"] - alone["low"])
    assert {n: found[n] for n in ("value", "low", "high")} == intervals.interval(a - b, groups)
    assert found["relative"]["value"] == pytest.approx((a - b).mean() / b.mean(), abs=1e-5)
    assert found["relative"]["low"] < found["relative"]["value"] < found["relative"]["high"]
    assert intervals.difference(b, a, groups)["value"] == -found["value"]


def test_the_interval_of_a_relative_difference_is_that_of_a_ratio():
    """Where a is twice b in every request, the ratio is known exactly though both means are not."""
    b = np.random.default_rng(13).random(50)
    assert intervals.difference(2 * b, b)["relative"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_pair_with_a_gap_is_left_out_and_nothing_is_relative_to_zero():
    a, b = np.array([0.5, np.nan, 0.7, 0.2]), np.array([0.1, 0.2, np.nan, 0.4])
    assert intervals.difference(a, b) == intervals.difference(a[[0, 3]], b[[0, 3]])
    assert intervals.difference(a[[0, 3]], np.zeros(2))["relative"] is None
    turning = np.array([1.0, 1.0, -1.0])  # above 0 on average and below it in some draws
    assert intervals.difference(turning + 1, turning)["relative"] is None
    json.dumps(intervals.difference(a, b), allow_nan=False)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: intervals.interval(np.array([])), "no value is left to average"),
        (lambda: intervals.interval(np.full(3, np.nan)), "no value is left to average; value: '3, all undefined'"),
        (lambda: intervals.interval(np.array([1, np.inf])), "a value is infinite"),
        (lambda: intervals.interval(np.ones((2, 2))), "values have the wrong shape"),
        (lambda: intervals.interval(np.ones(2), np.ones(3)), "shapes of values and groups disagree"),
        (lambda: intervals.difference(np.ones(2), np.ones(3)), "shapes of paired values disagree"),
        (lambda: intervals.difference(np.array([1, np.nan]), np.array([np.nan, 1])), "no value is left"),
    ],
)
def test_what_has_no_interval_is_refused(call, said):
    with pytest.raises(ShipyardError, match=said):
        call()
