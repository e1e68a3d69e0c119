"""Champion and challenger: right as often as it says, however often one looks."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ShipyardError
from serve.feedback import KINDS
from shipyard import cli
from shipyard.delivery import command as delivery
from shipyard.delivery.challenge import count
from shipyard.delivery.sequential import Arm, check_split, interval, judge

WAYS = {"alpha": 0.05, "expected": 0.02}


def looks(rng, rates, share=0.5, outcomes=20_000, every=100):
    """The counts of both arms at every look of a stream of shoppers."""
    arm = rng.random(outcomes) < share
    hit = rng.random(outcomes) < np.where(arm, rates[1], rates[0])
    told = [np.cumsum(column)[every - 1 :: every] for column in (~arm, ~arm & hit, arm, arm & hit)]
    return [(Arm(int(a), int(b)), Arm(int(c), int(d))) for a, b, c, d in zip(*told, strict=True)]


def end(counts, **ways):
    """The decision of whoever looks each time and stops at the first one that decides."""
    for arms in counts:
        found = judge(*arms, **(WAYS | ways))
        if found.decision != "go on":
            return found.decision
    return "go on"


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_equal_releases_are_seldom_told_apart_although_one_looks_all_the_time(share):
    rng = np.random.default_rng(7)
    wrong = sum(end(looks(rng, (0.1, 0.1), share)) != "go on" for _ in range(200))
    assert wrong <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5


def test_a_fixed_interval_that_is_looked_at_all_the_time_would_be_wrong_far_more_often():
    """The reason for all this, by the same streams: the usual interval at 5 % errs several times as often."""
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(100):
        for one, two in looks(rng, (0.1, 0.1))[2:]:
            error = (one.rate * (1 - one.rate) / one.shown + two.rate * (1 - two.rate) / two.shown) ** 0.5
            if abs(two.rate - one.rate) > 1.96 * error:
                wrong += 1
                break
    assert wrong > 20


def test_a_better_challenger_is_promoted_and_a_worse_one_stopped():
    rng = np.random.default_rng(8)
    assert [end(looks(rng, (0.1, 0.13))) for _ in range(20)] == ["promote"] * 20
    assert [end(looks(rng, (0.1, 0.07))) for _ in range(20)] == ["stop"] * 20


def test_one_that_is_hardly_worse_may_pass_where_that_is_asked_for():
    rng = np.random.default_rng(9)
    assert end(looks(rng, (0.1, 0.1)), least=-0.03) == "promote"
    assert end(looks(rng, (0.1, 0.1)), least=0.03) == "stop"


def test_the_interval_is_that_of_the_formula():
    """By hand: 1000 and 1000 outcomes, 100 and 120 hits."""
    low, high = interval(Arm(1000, 100), Arm(1000, 120), 0.05, 0.02)
    variance = sum(r * (1 - r) / 1000 for r in (100.5 / 1001, 120.5 / 1001))
    v = 1 / variance
    radius = np.sqrt((v + 2500) * np.log((v + 2500) / (2500 * 0.0025))) / v
    assert (low, high) == pytest.approx((0.02 - radius, 0.02 + radius))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_an_interval_is_finite_and_holds_the_difference(first, second, one, two):
    arms = Arm(first, int(first * one)), Arm(second, int(second * two))
    low, high = interval(*arms, 0.05, 0.01)
    assert np.isfinite([low, high]).all() and low < arms[1].rate - arms[0].rate < high


def test_few_outcomes_decide_nothing():
    assert judge(Arm(150, 0), Arm(150, 150), **WAYS).decision == "go on"
    assert judge(Arm(10_000, 10), Arm(10_000, 3000), **WAYS).decision == "go on"


def test_an_undecided_comparison_stops_where_it_was_to_end():
    found = judge(Arm(1000, 100), Arm(1000, 101), most=2000, **WAYS)
    assert found.decision == "stop" and "undecided after 2000 outcomes" in found.why
    assert judge(Arm(1000, 100), Arm(999, 101), most=2000, **WAYS).decision == "go on"


def test_traffic_that_was_not_split_as_intended_is_refused():
    check_split(Arm(9000, 0), Arm(1000, 0), 0.1)
    with pytest.raises(ShipyardError, match=r"not split as intended; value: '0.1304 to the challenger'; allowed: 0.1"):
        check_split(Arm(10_000, 0), Arm(1500, 0), 0.1)
    rng = np.random.default_rng(3)
    for arms in looks(rng, (0.1, 0.1), 0.1):
        check_split(*arms, 0.1)


@pytest.mark.parametrize(
    "ways", [{"alpha": 0}, {"alpha": 0.6}, {"expected": 0}, {"least": 1}, {"share": 1}, {"share": 0}]
)
def test_numbers_out_of_range_are_refused(ways):
    with pytest.raises(ShipyardError, match="out of range"):
        judge(Arm(1000, 100), Arm(1000, 100), **(WAYS | ways))


# --- from journals -----------------------------------------------------------------------------------------------------


def impression(request, user, time):
    return {"kind": "impression", "request_id": request, "user": user, "time": f"2030-01-01 {time}:00", "items": ["a"]}


def feedback(request, kind, time="10:30"):
    return {"kind": kind, "request_id": request, "user": "x", "time": f"2030-01-01 {time}:00", "item": "a"}


@pytest.fixture
def journals(tmp_path):
    records = {
        "champion": [
            impression("c1", "ann", "10:00"), feedback("c1", "click"), feedback("c1", "purchase"),
            impression("c2", "ann", "10:05"), feedback("c2", "purchase"),  # a second request counts for nothing
            impression("c3", "bob", "10:01"), impression("c4", None, "10:02"), impression("c5", None, "10:03"),
            feedback("c5", "click"), impression("c6", "eve", "10:00"), impression("c7", "dan", "12:00"),  # too young
        ],
        "challenger": [
            impression("d1", "cy", "10:00"), feedback("d1", "purchase"), impression("d2", "eve", "10:00"),  # eve saw both
            feedback("c3", "click"),  # not a request of this arm
        ],
    }  # fmt: skip
    for arm, lines in records.items():
        (tmp_path / arm).mkdir()
        text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "impres'  # cut off by a crash
        (tmp_path / arm / "2030-01-01-1.jsonl").write_text(text)
    return tmp_path / "champion", tmp_path / "challenger"


def test_each_shopper_counts_once_by_the_first_request(journals):
    assert count(*journals, KINDS, 3600) == (Arm(4, 2), Arm(1, 1))
    assert count(*journals, ("purchase",), 3600) == (Arm(4, 1), Arm(1, 1))
    assert count(*journals, KINDS, 0) == (Arm(5, 2), Arm(1, 1))


def test_kinds_of_feedback_are_those_of_the_gateway():
    assert delivery.KINDS == KINDS


def test_the_verb_tells_the_decision_by_words_and_by_its_exit_code(journals, capsys):
    arms = ("--champion", "2000/20000", "--challenger", "2500/20000")
    assert cli.main(["challenge", *arms, "--exit-code"]) == 0
    assert capsys.readouterr().out.startswith("promote: +0.0250 [+0.0")
    assert cli.main(["challenge", "--champion", "2500/20000", "--challenger", "2000/20000", "--exit-code"]) == 3
    capsys.readouterr()
    folders = ("--champion", str(journals[0]), "--challenger", str(journals[1]))
    assert cli.main(["challenge", *folders, "--exit-code", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert (told["decision"], told["champion"]) == ("go on", {"shown": 4, "hits": 2})
    assert cli.main(["challenge", *folders, "--kinds", "look"]) == 1
    assert "no such feedback; value: 'look'; allowed: click, cart, purchase" in capsys.readouterr().err
    assert cli.main(["challenge", "--champion", "3/2", "--challenger", "1/2"]) == 1
    assert cli.main(["challenge", "--champion", str(journals[0] / "none"), "--challenger", str(journals[1])]) == 1
    assert "no *.jsonl" in capsys.readouterr().err
