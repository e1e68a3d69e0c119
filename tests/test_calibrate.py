"""Calibration: against scikit-learn, on hostile scores, and what is stored of it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from serve.errors import ShipyardError
from shipyard import calibrate
from shipyard.calibrate import KNOTS, METHODS, Calibration
from shipyard.losses import calibration_error, log_loss

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
methods = pytest.mark.parametrize("method", METHODS)


def sample(seed, size=400, slope=1.5, offset=-1.0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, size)
    labels = rng.random(size) < 1 / (1 + np.exp(-(slope * scores + offset)))
    labels[:2] = 0, 1
    return scores, labels


@given(seeds, st.integers(5, 300), st.sampled_from([1e-6, 1, 1e6]))
@quick
def test_platt_is_a_logistic_regression_on_smoothed_labels(seed, size, scale):
    scores, labels = sample(seed, size)
    ones, zeros = labels.sum(), (~labels).sum()
    target = np.where(labels, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    twice, soft = np.r_[scores, scores][:, None], np.r_[target, 1 - target]
    model.fit(twice, np.repeat([1, 0], size), sample_weight=soft)
    found = calibrate.fit(scores * scale, labels, "platt")
    np.testing.assert_allclose(found.apply(scores * scale), model.predict_proba(scores[:, None])[:, 1], atol=1e-4)


@given(seeds, st.integers(5, 120))
@quick
def test_isotonic_is_scikit_learns_between_platts_targets(seed, size):
    scores, labels = sample(seed, size)
    scores = np.round(scores * 2)  # many ties
    found = calibrate.fit(scores, labels, "isotonic")
    low, high = 1 / ((~labels).sum() + 2), (labels.sum() + 1) / (labels.sum() + 2)
    model = IsotonicRegression(out_of_bounds="clip").fit(scores, labels.astype(float))
    grid = np.linspace(-15, 15, 301)
    fitted = model.predict(np.r_[scores, grid])
    ends = np.r_[scores, grid]
    knots = np.unique(scores)
    # between two scores the line is drawn to the clipped ends
    expected = np.interp(ends, knots, model.predict(knots).clip(low, high))
    np.testing.assert_allclose(found.apply(ends), expected, atol=1e-9)
    np.testing.assert_allclose(found.apply(ends), fitted, atol=max(low, 1 - high) + 1e-9)


@given(seeds, st.integers(4, 200), st.sampled_from(METHODS))
@quick
def test_a_calibration_is_probabilities_of_few_numbers_that_survive_json(seed, size, method):
    scores, labels = sample(seed, size)
    found = calibrate.fit(scores, labels, method)
    again = Calibration.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    grid = np.r_[-np.inf, -1e300, -1e30, np.linspace(-9, 9, 50), 1e30, 1e300, np.inf]
    probability = found.apply(grid)
    assert ((probability >= 0) & (probability <= 1)).all()
    np.testing.assert_array_equal(again.apply(grid), probability)
    assert len(found.x) == len(found.y) <= KNOTS
    if method == "isotonic":
        assert (np.diff(probability) >= 0).all() and probability[0] > 0 and probability[-1] < 1


@given(seeds, st.sampled_from(METHODS))
@quick
def test_the_order_of_the_examples_changes_nothing(seed, method):
    scores, labels = sample(seed, 80)
    order = np.random.default_rng(seed).permutation(80)
    one, other = calibrate.fit(scores, labels, method), calibrate.fit(scores[order], labels[order], method)
    np.testing.assert_allclose(one.apply(scores), other.apply(scores), atol=1e-8)


@methods
def test_a_calibration_mends_scores_of_another_period(method):
    scores, labels = sample(1, 20_000)
    later, happened = sample(2, 20_000)
    raw = 1 / (1 + np.exp(-later))
    probability = calibrate.fit(scores, labels, method).apply(later)
    assert calibration_error(probability, happened) < 0.02 < 0.1 < calibration_error(raw, happened)
    assert log_loss(probability, happened).mean() < log_loss(raw, happened).mean()


def test_many_blocks_are_joined_to_few_knots_that_stay_calibrated():
    rng = np.random.default_rng(3)
    scores = rng.random(50_000)
    labels = rng.random(50_000) < scores
    found = calibrate.fit(scores, labels, "isotonic")
    assert 20 < len(found.x) <= KNOTS
    np.testing.assert_allclose(found.apply(np.linspace(0.05, 0.95, 50)), np.linspace(0.05, 0.95, 50), atol=0.06)
    assert calibration_error(found.apply(scores), labels) < 0.01
    assert found.apply(scores).mean() == pytest.approx(labels.mean(), abs=0.002)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@methods
def test_labels_that_a_score_tells_apart_have_no_certainty(method, scale):
    scores, labels = np.linspace(-1, 1, 40) * scale, np.arange(40) >= 20
    found = calibrate.fit(scores, labels, method)
    assert np.isfinite([*found.x, *found.y]).all()
    probability = found.apply(scores)
    assert 0 < probability[0] < 0.06 and 0.94 < probability[-1] < 1
    assert (np.diff(probability) >= 0).all()


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3, 1e30])
@methods
def test_scores_that_all_tie_get_the_rate(method, score):
    found = calibrate.fit(np.full(400, score), np.arange(400) < 100, method)
    np.testing.assert_allclose(found.apply(np.array([score, -1e9, np.inf])), 0.25, atol=0.005)


@methods
def test_one_outlier_does_not_break_a_fit(method):
    scores, labels = sample(4)
    found = calibrate.fit(np.r_[scores, 1e30], np.r_[labels, True], method)
    probability = found.apply(scores)
    assert ((probability > 0) & (probability < 1)).all()


def test_wrongly_signed_scores_turn_the_slope_and_flatten_the_steps():
    scores, labels = sample(5, 2000)
    assert calibrate.fit(-scores, labels, "platt").x[0] == pytest.approx(-calibrate.fit(scores, labels, "platt").x[0])
    assert np.ptp(calibrate.fit(-scores, labels, "isotonic").apply(-scores)) < 0.3


def test_golden_platt_of_four_scores():
    """Targets are 1/4 and 3/4; the two mirrored pairs make the intercept 0 and the slope solve one equation."""
    found = calibrate.fit(np.array([-1.0, -1.0, 1.0, 1.0]), np.array([0, 0, 1, 1]), "platt")
    assert found.x[0] == pytest.approx(np.log(3), abs=1e-6) and found.y[0] == pytest.approx(0, abs=1e-9)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_choice_is_platt_where_it_holds_and_isotonic_where_it_does_not():
    assert calibrate.choose(*sample(6, 1500)).method == "platt"
    rng = np.random.default_rng(7)
    scores = rng.normal(0, 2, 6000)
    stairs = rng.random(6000) < np.select([scores < -1, scores < 1], [0.02, 0.5], 0.55)
    assert calibrate.choose(scores, stairs).method == "isotonic"


def test_cross_fitting_never_sees_the_own_group():
    """Each group has one score and one label of its own: who has seen it knows the answer, who has not knows nothing."""
    rng = np.random.default_rng(8)
    groups = np.repeat(np.arange(200), 10)
    scores, labels = rng.normal(size=200)[groups], (rng.random(200) < 0.5)[groups]
    within = log_loss(calibrate.fit(scores, labels, "isotonic").apply(scores), labels).mean()
    apart = log_loss(calibrate.cross_fit(scores, labels, "isotonic", groups), labels).mean()
    leaked = log_loss(calibrate.cross_fit(scores, labels, "isotonic"), labels).mean()
    assert within < leaked + 0.01 and leaked < np.log(2) < apart


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=4, max_size=40), st.sampled_from(METHODS))
@quick
def test_every_fold_can_be_fitted_where_two_groups_have_each_label(pairs, method):
    groups, labels = np.array([g for g, _ in pairs]), np.array([label for _, label in pairs])
    scores = np.arange(len(pairs)) * 0.5
    fewest = min(len(set(groups[labels].tolist())), len(set(groups[~labels].tolist())))
    if fewest < 2:
        with pytest.raises(ShipyardError, match="too few groups to cross-fit"):
            calibrate.cross_fit(scores, labels, method, groups)
    else:
        found = calibrate.cross_fit(scores, labels, method, groups)
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_array_equal(found, calibrate.cross_fit(scores, labels, method, groups))


@pytest.mark.parametrize("rare", [False, True])
def test_two_groups_with_the_rare_label_are_never_in_one_fold(rare):
    groups = np.repeat(np.arange(11), 2)
    labels = np.full(22, not rare)
    labels[[4, 14]] = rare
    for seed in range(30):
        calibrate.cross_fit(np.arange(22.0), labels, "platt", groups, seed)


# --- what is refused -------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        ([1, np.nan], [0, 1], "a score is not finite or too large to fit on; value: nan"),
        ([1, -np.inf], [0, 1], "value: -inf"),
        ([1, 1e200], [0, 1], "allowed: -1e[+]100 to 1e[+]100"),
        ([1, 2], [0, 2], "a label is none; value: 2; allowed: 0 or 1"),
        ([1, 2], [1, 1], "labels are all alike; value: '2 ones of 2'"),
        ([1, 2], [0, 0], "labels are all alike; value: '0 ones of 2'"),
        ([1], [0, 1], "shapes disagree"),
        ([], [], "scores and labels are none"),
        ([[1, 2]], [[0, 1]], "allowed: one size"),
    ],
)
def test_what_cannot_be_fitted_is_refused(method, scores, labels, said):
    with pytest.raises(ShipyardError, match=said):
        calibrate.fit(np.array(scores, float), np.array(labels), method)


def test_an_unknown_method_a_score_that_is_none_and_other_groups_are_refused():
    scores, labels = sample(9)
    with pytest.raises(ShipyardError, match="unknown method; value: 'beta'; allowed: platt, isotonic"):
        calibrate.fit(scores, labels, "beta")
    with pytest.raises(ShipyardError, match="a score is not a number"):
        calibrate.fit(scores, labels, "platt").apply(np.array([0, np.nan]))
    with pytest.raises(ShipyardError, match="scores and groups disagree"):
        calibrate.choose(scores, labels, np.arange(3))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"method": "platt", "x": [1.0]}, "a document with other keys"),
        ({"method": "platt", "x": [1.0], "y": [0.0], "z": 1}, "a document with other keys"),
        ({"method": "platt", "x": "no", "y": [0.0]}, "no lists of numbers"),
        ({"method": "platt", "x": None, "y": [0.0]}, "no lists of numbers"),
        ({"method": "platt", "x": [1.0, 2.0], "y": [0.0]}, "no platt calibration; value: '2 and 1 of them'"),
        ({"method": "platt", "x": [float("nan")], "y": [0.0]}, "no platt calibration"),
        ({"method": "isotonic", "x": [], "y": []}, "no isotonic calibration"),
        ({"method": "isotonic", "x": [1, 1], "y": [0, 1]}, "no isotonic calibration"),
        ({"method": "isotonic", "x": [1, 2], "y": [0.5, 0.4]}, "no isotonic calibration"),
        ({"method": "isotonic", "x": [1, 2], "y": [0.5, 1.4]}, "no isotonic calibration"),
        ({"method": "isotonic", "x": [1, 2], "y": [0.5, float("nan")]}, "no isotonic calibration"),
        ({"method": "isotonic", "x": [1, 2, 3], "y": [0.5, 0.6]}, "no isotonic calibration"),
        ({"method": "spline", "x": [1], "y": [0.5]}, "unknown method"),
    ],
)
def test_a_document_that_is_no_calibration_is_refused(document, said):
    with pytest.raises(ShipyardError, match=said):
        Calibration.from_json(document)


def test_to_apply_a_calibration_numpy_is_enough():
    code = (
        "import sys; from shipyard.calibrate import Calibration\n"
        "Calibration.from_json({'method': 'platt', 'x': [1.0], 'y': [0.0]}).apply([0.5])\n"
        "print(sorted({'sklearn', 'scipy', 'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
