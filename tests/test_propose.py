"""A release is proposed for a reason, once, and nothing else is done."""

import json

import boto3
import duckdb
import numpy as np
import pytest
from conftest import ROOT, shipyard

from models.config import load_fleet
from shipyard.drift import Seen, drift

FLEET = load_fleet(ROOT / "fleet.toml")


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text((ROOT / "fleet.toml").read_text())
    return path


@pytest.fixture
def collected(tmp_path):
    folder = tmp_path / "collected"
    folder.mkdir()
    duckdb.connect().execute(
        f"COPY (SELECT i AS item FROM range(120) r(i)) TO '{folder}/events.parquet' (FORMAT parquet)"
    )
    return folder


def propose(fleet, *more, **environment):
    done = shipyard("propose", "--fleet", fleet, "--env", "prod", *more, **environment)
    return done, json.loads(done.stdout) if done.returncode == 0 else {}


def test_fresh_events_are_a_reason_from_the_threshold_on(fleet, collected):
    path = fleet.parent / "releases/proposed/prod.json"
    done, told = propose(fleet, "--fresh", collected, "--events", 121, "--no-alarms")
    assert (told["proposed"], told["events"], path.exists()) == (False, 120, False), done.stderr
    _, told = propose(fleet, "--fresh", collected, "--events", 120, "--no-alarms")
    assert told["proposed"] is True
    written = path.read_bytes()
    assert json.loads(written) == {
        "environment": "prod",
        "runs": FLEET.env["prod"].release,
        "reasons": [{"what": "fresh events", "value": 120, "threshold": 120}],
    }
    # the same reasons are no new proposal, and fleet.toml is as it was
    propose(fleet, "--fresh", collected, "--events", 120, "--no-alarms")
    assert path.read_bytes() == written
    assert fleet.read_text() == (ROOT / "fleet.toml").read_text()


def test_an_alarm_of_drift_is_a_reason_and_another_alarm_or_environment_is_none(moto, fleet, monkeypatch):
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": moto}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    cloudwatch = boto3.client("cloudwatch", region_name="us-east-1")

    def alarm(name, description, state):
        cloudwatch.put_metric_alarm(
            AlarmName=name, AlarmDescription=description, MetricName="m", Namespace="n", Period=60, EvaluationPeriods=1,
            Threshold=1.0, ComparisonOperator="GreaterThanThreshold", Statistic="Sum",
        )  # fmt: skip
        cloudwatch.set_alarm_state(AlarmName=name, StateValue=state, StateReason="test")

    alarm("shipyard-prod-observe-slow", "Slow: answers are late", "ALARM")
    alarm("shipyard-prod-observe-drift", "Drift: shoppers act on answers otherwise", "OK")
    alarm("shipyard-staging-observe-drift", "Drift: shoppers act on answers otherwise", "ALARM")
    done, told = propose(fleet)
    assert told["proposed"] is False, done.stderr
    cloudwatch.set_alarm_state(AlarmName="shipyard-prod-observe-drift", StateValue="ALARM", StateReason="test")
    _, told = propose(fleet)
    assert told["reasons"] == [{"what": "drift", "alarms": ["shipyard-prod-observe-drift"]}]


def test_measures_that_drifted_are_a_reason(fleet, tmp_path):
    path = tmp_path / "drift.json"
    seen = Seen(200, {"items": np.full(200, 9.0)}, np.array([]), np.array([], dtype=bool))
    told = {"requests": 200, "measures": {"items": {"edges": [1.0, 5.0], "counts": [100, 60, 40]}}, "calibration": []}
    found = drift({"routes": {"search": told}}, {"search": seen})
    path.write_text(json.dumps(found))
    done, said = propose(fleet, "--drift", path, "--no-alarms")
    assert said["reasons"] == [{"what": "drift", "measures": ["search items"]}], done.stderr
    path.write_text(json.dumps(found | {"measures": []}))
    assert propose(fleet, "--drift", path, "--no-alarms")[1]["proposed"] is False
    path.write_text("{}")
    done, _ = propose(fleet, "--drift", path, "--no-alarms")
    assert "no report of drift: 'measures'; mend: shipyard drift" in done.stderr


def test_the_alarm_that_is_asked_for_is_one_that_the_stack_makes():
    from shipyard.delivery.propose import DRIFT

    assert f'alarm_description="{DRIFT}' in (ROOT / "infra" / "observe.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--env", "nowhere"), "--env: no such environment"), (("--fresh", "missing"), "events.parquet: no such file")],
)
def test_what_is_not_there_is_told_in_one_line(fleet, arguments, told):
    done, _ = propose(fleet, "--no-alarms", *arguments)
    assert done.returncode == 1 and told in done.stderr.splitlines()[-1]
