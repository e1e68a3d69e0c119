"""What the center makes of what devices have learned: averaged, bounded, counted once, with noise, and through a gate."""

import json
import math

import numpy as np
import pytest
from conftest import Made
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import Profile
from serve.errors import ShipyardError
from serve.greengrass.adapt import Learner, log_odds
from serve.greengrass.telemetry import Telemetry
from shipyard.edge.correct import correct, hold
from shipyard.edge.corrections import LOCK, read_corrections, write_corrections
from shipyard.edge.merge import Learned, Terms, learned_of, merge

NAME, ARTIFACT = "edge_recommend", "edge-recommend"
BASE = "a" * 64
PLATT = {"method": "platt", "x": [1.3], "y": [-0.7]}
FEW = Terms(devices=2, evidence=10, enough=100)


def fleet(*told):
    return {f"device-{number}": Learned((a, b), evidence) for number, (a, b, evidence) in enumerate(told)}


def test_the_mean_is_weighted_by_evidence_up_to_enough():
    made = merge(NAME, 3, fleet((1.2, 0.4, 50), (0.8, -0.2, 100), (5.0, 4.0, 9)), (1.0, 0.0), FEW)
    # the third has too little evidence to be heard; the others weigh 0.5 and 1
    assert made["correction"] == pytest.approx([1 + (0.5 * 0.2 - 0.2) / 1.5, (0.5 * 0.4 - 0.2) / 1.5], abs=1e-6)
    assert (made["devices"], made["serving"], made["evidence"], made["noise"]) == (2, 3, 150, None)
    much = merge(NAME, 2, fleet((1.2, 0.4, 10**6), (0.8, -0.4, 100)), (1.0, 0.0), FEW)
    assert much["correction"] == pytest.approx([1.0, 0.0], abs=1e-6)


def test_no_device_pulls_further_than_the_clip_and_none_that_tells_no_number():
    made = merge(NAME, 3, fleet((1.0, 4.0, 100), (1.0, 0.0, 100), (1.0, float("nan"), 100)), (1.0, 0.0), FEW)
    assert made["correction"] == pytest.approx([1.0, 0.5], abs=1e-6)


def test_with_too_few_devices_nothing_is_merged():
    with pytest.raises(ShipyardError, match=r"too few devices .*value: 1; allowed: 2 with 10 answers each"):
        merge(NAME, 3, fleet((1.2, 0.4, 50), (0.8, -0.2, 9)), (1.0, 0.0), FEW)


# in their bounds: beyond them both are held
@given(st.floats(0.5, 1.8), st.floats(-1, 1), st.floats(0.5, 1.5), st.floats(-0.5, 0.5), st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_a_merge_on_top_of_one_is_both_in_turn(a, b, more_a, more_b, score):
    made = merge(NAME, 2, fleet((more_a, more_b, 100), (more_a, more_b, 100)), (a, b), FEW)
    first = log_odds(PLATT | {"correction": [a, b]}, score)
    assert log_odds(PLATT | {"correction": made["correction"]}, score) == pytest.approx(
        more_a * first + more_b, abs=1e-4
    )


def test_what_was_learned_of_another_bundle_counts_nothing():
    def report(serves, learned_on):
        return {"models": {ARTIFACT: serves}, "telemetry": {"learned": {ARTIFACT: [learned_on[:16], 1.1, 0.2, 70]}}}

    reports = {
        "a": report(BASE, BASE), "b": report("b" * 64, "b" * 64), "c": report(BASE, "b" * 64),
        "d": {"models": {ARTIFACT: BASE}}, "e": {},
    }  # fmt: skip
    assert learned_of(ARTIFACT, BASE, reports) == (3, {"a": Learned((1.1, 0.2), 70)})


def test_a_fleet_s_merge_is_better_where_its_shoppers_are():
    rng = np.random.default_rng(3)

    def shoppers(count):
        odds = rng.normal(-1, 1.5, count)
        return odds, rng.random(count) < 1 / (1 + np.exp(-(0.7 * odds + 0.6)))

    learned = {}
    for number in range(25):
        device = Telemetry()
        device.learner = Learner()
        device.learner.serve({ARTIFACT: (BASE, {})})
        for k, (score, taken) in enumerate(zip(*(part.tolist() for part in shoppers(120)), strict=True)):
            device.learner.feedback(ARTIFACT, {"id": str(k), "shown": [{"score": score, "taken": taken}]})
        device.close()
        report = {"models": {ARTIFACT: BASE}, "telemetry": json.loads(device.saved)}
        learned |= {f"d{number}": found for found in learned_of(ARTIFACT, BASE, {"x": report})[1].values()}
    a, b = merge(NAME, 25, learned, (1.0, 0.0), Terms())["correction"]
    odds, taken = shoppers(4000)

    def loss(z):
        return float(np.mean(np.logaddexp(0, z) - taken * z))

    assert loss(a * odds + b) < loss(odds) - 0.03
    assert loss(a * odds + b) < loss(0.7 * odds + 0.6) + 0.01


# --- noise -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0.2, 5), st.floats(-4, 4), st.integers(0, 5000)), min_size=3, max_size=12),
    st.tuples(st.floats(0.2, 5), st.floats(-4, 4), st.integers(0, 5000)),
)
@settings(max_examples=60, deadline=None)
def test_no_device_moves_what_is_released_by_more_than_its_noise_is_made_for(told, other):
    # one that certainly is heard, so that there is a mean
    told = [(1.0, 0.0, 50), *told]
    terms = Terms(devices=1, evidence=50, enough=1000, clip=0.8, epsilon=1.0)
    heard = []

    def watch(mean, sensitivity, epsilon, delta):
        heard.append((mean, sensitivity))
        return mean, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shipyard.edge.merge._noised", watch)
        for some in (told, [told[0], other, *told[2:]]):
            merge(NAME, len(told), fleet(*some), (1.0, 0.0), terms)
    [(one, sensitivity), (two, _)] = heard
    assert math.dist(one, two) <= sensitivity + 1e-12 and sensitivity == pytest.approx(2 * 0.8 / len(told))


def test_noise_is_as_large_as_its_promise_wants():
    pytest.importorskip("opendp", reason="no opendp: make setup")
    told = fleet(*[(1.1, 0.1, 1000)] * 50)

    def deviation(epsilon):
        made = [merge(NAME, 50, told, (1.0, 0.0), Terms(epsilon=epsilon)) for _ in range(3)]
        [scale] = {one["noise"]["scale"] for one in made}
        moved = [value - mean for one in made for value, mean in zip(one["correction"], (1.1, 0.1), strict=True)]
        # six draws: each another one, none beyond six deviations, and not all of them next to nothing
        assert len(set(moved)) == 6 and scale / 10 < max(map(abs, moved)) < 6 * scale
        return scale

    # the Gaussian mechanism of Dwork and Roth (2014) is an upper bound of what OpenDP finds
    strict, loose = deviation(0.9), deviation(8.0)
    assert loose < strict < math.sqrt(2 * math.log(1.25 / 1e-6)) * (2 / 50) / 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": -1.0}, {"clip": float("nan")}, {"clip": 0.0}, {"evidence": 0}, {"devices": 0}, {"epsilon": 0.0},
        {"epsilon": float("nan")}, {"delta": 0.0}, {"delta": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_terms_out_of_their_bounds_are_refused(wrong):
    [(key, value)] = wrong.items()
    with pytest.raises(ShipyardError, match=f"edge merge: --.*{key}: wrong; value: {value}; allowed: "):
        Terms(**wrong)


def test_with_noise_nothing_is_told_of_how_much_evidence_a_device_has(monkeypatch):
    monkeypatch.setattr("shipyard.edge.merge._noised", lambda mean, *_: (mean, {"scale": 1.0}))
    terms = Terms(devices=1, evidence=50, epsilon=1.0)
    made = [
        merge(NAME, 3, fleet((1.1, 0.1, 900), (1.2, 0.2, 80), (1.1, 0.1, evidence)), (1.0, 0.0), terms)
        for evidence in (10, 999)
    ]
    told = [{key: value for key, value in one.items() if key != "correction"} for one in made]
    assert told[0] == told[1] and told[0]["serving"] == 3


# --- the next release ------------------------------------------------------------------------------------------------


def test_the_lock_keeps_what_other_models_have(tmp_path):
    assert read_corrections(tmp_path) == {}
    write_corrections(tmp_path, {"a": {"correction": [1.1, 0.0]}, "b": {"correction": [0.9, 0.1]}})
    write_corrections(tmp_path, {"b": {"correction": [0.8, 0.1]}})
    assert read_corrections(tmp_path) == {"a": {"correction": [1.1, 0.0]}, "b": {"correction": [0.8, 0.1]}}
    assert (tmp_path / LOCK).is_file() and not list(tmp_path.glob("*.json"))  # those are releases


def test_a_correction_goes_through_its_gate(small: Made):
    record = small.said("joint", "evaluate")["submodels"][NAME]["calibration"]
    plain = {key: record[key] for key in ("method", "x", "y")}
    profile: Profile = small.fleet.profile["small"]

    def run(correction):
        return correct(
            small.folder("joint", "data"), small.folder("joint", "finetune"), small.fleet.finetune, profile,
            tuple(small.fleet.submodel), NAME, plain, correction,
        )  # fmt: skip

    same = run([1.0, 0.0])
    # the device's formula on the release's numbers: the log loss of the evaluation itself
    assert same["log_loss"] == same["corrected_log_loss"] == pytest.approx(record["log_loss"], abs=2e-5)
    assert same["calibration"] == plain | {"correction": [1.0, 0.0]}
    with pytest.raises(ShipyardError, match=r"gate: edge_recommend: what was merged .*allowed: 5% more at most"):
        run([0.2, 3.0])
    with pytest.raises(ShipyardError, match="gate"):
        hold(NAME, 0.3, float("nan"))


def test_bundles_of_the_edge_carry_their_calibration(small: Made):
    manifest = json.loads((small.bundle(NAME) / "bundle.json").read_text())
    score = small.release.submodels[NAME].score.calibration
    assert manifest["facts"]["calibration"] == {key: score[key] for key in ("method", "x", "y")}
    assert "calibration" not in json.loads((small.bundle("recommend") / "bundle.json").read_text())["facts"]
