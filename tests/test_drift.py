"""Drift: nothing is seen where nothing changed, what changed is named, and the verb ends with 3."""

import json

import numpy as np
import pytest
from test_collect import write

from serve.errors import ShipyardError
from serve.files import sha256_file
from shipyard.cli import main
from shipyard.drift import CHANCE, FEWEST, drift, of_journal, of_release, seen
from shipyard.reference import gathered, refer

KINDS = ("purchase",)


def day(rng, name, number=600, *, events=20.0, lift=0.0, taking=1.0, more=(), bundle="b1"):
    """A day of searches: each shows five items with scores, and an item is bought as often as its score says."""
    records = []
    for k in range(number):
        scores = np.sort(rng.beta(2, 5, 5))[::-1].round(6)
        observed = {"events": float(rng.poisson(events)), "offers": 0.0, "fused": scores[0] + lift} | dict(more)
        records.append(
            {"kind": "impression", "request_id": f"{name}{k}", "user": 1, "time": "2017-06-01 10:00:00", "place": None,
             "route": "search", "query": "q", "items": list(range(5)), "scores": (scores + lift).tolist(),
             "bundle": bundle, "observed": observed}
        )  # fmt: skip
        for item in np.flatnonzero(rng.random(5) < taking * scores).tolist():
            records.append({"kind": "purchase", "request_id": f"{name}{k}", "user": 1, "item": item,
                            "time": "2017-06-01 10:01:00"})  # fmt: skip
    return records


@pytest.fixture
def journal(tmp_path):
    def made(name, *days):
        write(tmp_path / name, *(record for records in days for record in records))
        return tmp_path / name

    return made


def states(found):
    return {line["measure"]: line["state"] for line in found["measures"]}


def test_a_day_like_another_has_not_drifted_and_one_by_one_each_change_is_named(journal):
    rng = np.random.default_rng(7)
    reference = of_journal(journal("first", day(rng, "a", 2000)), KINDS)
    still = {"events": "as before", "offers": "as before", "fused": "as before", "calibration": "as before"}
    changes = {
        "none": ({}, {}),
        "input": ({"events": 30.0}, {"events": "drifted"}),
        "score": ({"lift": 0.2}, {"fused": "drifted", "calibration": "drifted"}),
        "calibration": ({"taking": 0.4}, {"calibration": "drifted"}),
        "source": ({"more": {"source edge": 0.5}}, {"source edge": "new"}),
    }
    for name, (changed, expected) in changes.items():
        found = drift(reference, seen(journal(name, day(rng, name, **changed)), KINDS))
        assert states(found) == still | expected, name
        assert found["drifted"] is ("drifted" in expected.values())


def test_the_index_is_the_one_of_the_formula(journal):
    """Two bins, by hand: half and half before, one in five and four in five after."""

    def records(name, low, high):
        shown = {"kind": "impression", "route": "search", "items": [1], "scores": [0.5]}
        return [shown | {"request_id": f"{name}{k}", "observed": {"events": int(k >= low)}} for k in range(low + high)]

    reference = of_journal(journal("before", records("a", 1000, 1000)), KINDS)
    assert reference["routes"]["search"]["measures"]["events"] == {"edges": [0.0], "counts": [1000, 1000]}
    [found] = [line for line in drift(reference, seen(journal("after", records("b", 200, 800)), KINDS))["measures"]
               if line["measure"] == "events"]  # fmt: skip
    assert found["value"] == pytest.approx(-0.3 * np.log(0.4) + 0.3 * np.log(1.6), abs=2e-3)
    assert (found["requests"], found["reference"], found["drifted"]) == (1000, 2000, True)


def test_chance_alone_is_rarely_called_drift():
    """Without a limit of size, days from one distribution are called drifted about as often as the chance says."""
    rng = np.random.default_rng(3)

    def one(number):
        scores = rng.beta(2, 5, (number, 5))
        taken = rng.random((number, 5)) < scores
        rows = [({"fused": float(s.max())}, list(zip(s.tolist(), t.tolist(), strict=True)))
                for s, t in zip(scores, taken, strict=True)]  # fmt: skip
        return gathered(rows)

    reference = {"search": one(800)}
    called = {"fused": 0, "calibration": 0}
    for _ in range(100):
        found = drift(refer(reference), {"search": one(400)}, psi=0, calibration=0)
        for line in found["measures"]:
            called[line["measure"]] += line["chance"] < CHANCE
        reference = {"search": one(800)}
    assert called["fused"] <= 100 * CHANCE * 5 and called["calibration"] <= 100 * CHANCE * 5


def test_a_journal_of_several_bundles_is_read_for_one(journal):
    rng = np.random.default_rng(5)
    both = journal("both", day(rng, "a", bundle="b1"), day(rng, "b", events=60.0, bundle="b2"))
    reference = refer(seen(both, KINDS, "b1"))
    assert reference["routes"]["search"]["requests"] == 600
    assert not drift(reference, seen(both, KINDS, "b1"))["drifted"]
    assert states(drift(reference, seen(both, KINDS, "b2")))["events"] == "drifted"


def test_too_few_requests_and_no_kind_of_feedback_are_refused(journal):
    rng = np.random.default_rng(5)
    reference = of_journal(journal("first", day(rng, "a")), KINDS)
    with pytest.raises(ShipyardError, match=f"too few requests; value: 'search: {FEWEST - 1}'"):
        drift(reference, seen(journal("few", day(rng, "b", FEWEST - 1)), KINDS))
    with pytest.raises(ShipyardError, match="no such kind of feedback; value: 'views'"):
        seen(journal("views"), ("views",))


def test_the_verb_ends_with_3_where_something_drifted(journal, tmp_path, capsys):
    rng = np.random.default_rng(9)
    first, later = (str(journal(name, day(rng, name, events=e))) for name, e in (("first", 20.0), ("later", 40.0)))
    assert main(["drift", later, "--against", first, "--json"]) == 3
    assert states(json.loads(capsys.readouterr().out))["events"] == "drifted"
    assert main(["drift", later, "--against", later]) == 0
    assert "as before" in capsys.readouterr().out
    assert main(["drift", later, "--build", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_release_has_a_reference_of_its_own_answers(small):
    reference, bundle = of_release(small.release, small.build)
    assert bundle == sha256_file(small.bundle("gateway") / "bundle.json")[:16]
    told = {route: found["measures"].keys() for route, found in reference["routes"].items()}
    asked = {"events", "days", "unknown", "offers", "fused"}
    sources = {f"source {source}" for source in small.release.fusion.sources}
    assert told == {"search": asked | sources | {"characters"}, "recommend": asked | (sources - {"source search"})}
    assert len(reference["routes"]["search"]["calibration"]["edges"]) >= 5
    for found in reference["routes"].values():
        assert found["requests"] >= 150
        assert all(sum(one["counts"]) <= found["requests"] for one in found["measures"].values())
        # what has a high score is right more often than what has a low one
        right, shown = (np.array(found["calibration"][key]) for key in ("right", "shown"))
        if len(right) == 1:  # a fusion may give a source no weight; alone, its answers all score the same
            continue
        assert right[-2:].sum() / shown[-2:].sum() > 1.5 * right[:5].sum() / shown[:5].sum()
