"""Propose a release where behaviour has drifted or enough of it is new. It writes a file and deploys nothing.

Drift is what the environment's own alarms tell (infra/observe.py: feedback a request, against a band of the weeks before),
and what `shipyard drift` has found of requests, scores and calibration; what is new is counted in what `shipyard collect`
has made of the gateway's feedback.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from models.config import Fleet
from serve.errors import ShipyardError
from serve.files import read_json
from shipyard.console import Reporter
from shipyard.stage import write

DRIFT = "Drift"
"""How the description of an alarm of drift begins."""


def alarms_of(fleet: Fleet, env_name: str) -> list[str]:
    """Ask the alarms of an environment, with the credentials of the surroundings.

    Raises:
        ShipyardError: AWS refuses, or boto3 is not installed.
    """
    try:
        import boto3  # not at the top: fresh data are counted without it
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError:
        raise ShipyardError("propose: boto3 is not installed", mend="pip install 'shipyard[aws]'") from None
    prefix = f"{fleet.project.name}-{env_name.replace('_', '-')}-"
    try:
        return drifted(boto3.client("cloudwatch", region_name=fleet.env[env_name].region), prefix)
    except (BotoCoreError, ClientError) as fault:
        raise ShipyardError(f"propose: {fault}", mend="allow cloudwatch:DescribeAlarms, or --no-alarms") from None


def drifted(cloudwatch: Any, prefix: str) -> list[str]:
    """Return the alarms of an environment that tell of drift, by name."""
    pages = cloudwatch.get_paginator("describe_alarms").paginate(AlarmNamePrefix=prefix)
    return sorted(
        str(alarm["AlarmName"])
        for page in pages
        for kind in ("MetricAlarms", "CompositeAlarms")
        for alarm in page.get(kind, ())
        if alarm["StateValue"] == "ALARM" and alarm.get("AlarmDescription", "").startswith(DRIFT)
    )


def fresh(folder: Path) -> int:
    """Return how many events `shipyard collect` left in a folder.

    Raises:
        ShipyardError: it has left none there, or the file is damaged.
    """
    path = folder / "events.parquet"
    if not path.is_file():
        raise ShipyardError(f"{path}: no such file", mend="shipyard collect JOURNAL --out FOLDER")
    try:
        found = duckdb.connect().execute("SELECT count(*) FROM read_parquet(?)", [str(path)]).fetchone()
    except duckdb.Error as fault:
        raise ShipyardError(f"{path}: {fault}", mend="collect again") from None
    assert found is not None
    return int(found[0])


def measured(path: Path) -> list[str]:
    """Return the measures that `shipyard drift --json` found drifted, as route and measure.

    Raises:
        ShipyardError: the file is none of that verb.
    """
    told = read_json(path)
    try:
        return [f"{line['route']} {line['measure']}" for line in told["measures"] if line["drifted"]]
    except (KeyError, TypeError) as fault:
        raise ShipyardError(
            f"{path}: no report of drift: {fault}", mend="shipyard drift JOURNAL --json > FILE"
        ) from None


def propose(
    fleet: Fleet,
    env_name: str,
    *,
    alarms: Sequence[str] = (),
    measures: Sequence[str] = (),
    events: int | None = None,
    threshold: int,
    folder: Path,
) -> dict[str, Any]:
    """Return what is known and whether it is reason enough; write `folder`/ENV.json where it is.

    The file has no date: the same reasons propose the same, and nothing is proposed twice.
    """
    reasons: list[dict[str, Any]] = []
    if alarms:
        reasons.append({"what": "drift", "alarms": list(alarms)})
    if measures:
        reasons.append({"what": "drift", "measures": list(measures)})
    if events is not None and events >= threshold:
        reasons.append({"what": "fresh events", "value": events, "threshold": threshold})
    told = {"environment": env_name, "runs": fleet.env[env_name].release, "reasons": reasons}
    path = folder / f"{env_name}.json"
    if reasons:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return told | {"proposed": bool(reasons), "events": events, "threshold": threshold}


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Look for reasons to train again and tell them."""
    if chosen.env not in fleet.env:
        raise ShipyardError("--env: no such environment", value=chosen.env, allowed=", ".join(fleet.env))
    alarms = [] if chosen.no_alarms else alarms_of(fleet, chosen.env)
    events = None if chosen.fresh is None else fresh(chosen.fresh)
    measures = [] if chosen.drift is None else measured(chosen.drift)
    told = propose(
        fleet, chosen.env, alarms=alarms, measures=measures, events=events, threshold=chosen.events,
        folder=root / "releases" / "proposed",
    )  # fmt: skip
    what = ", ".join(reason["what"] for reason in told["reasons"])
    reporter.line(f"proposes a release for {chosen.env}: {what}" if what else "proposes nothing: no reason")
    print(json.dumps(told, ensure_ascii=False))
    return 0
