"""shipyard edge: publish, rollout, rollback and status, on one environment of fleet.toml."""

import argparse
import json
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from models.approval import check_withdrawn, require_approval
from models.config import Environment, Fleet
from models.release import Release, read_release, trusted_key
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard import rollout
from shipyard.components import MEND, publish_edge
from shipyard.console import Reporter
from shipyard.upload import open_store


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Do an action; return the exit code.

    Raises:
        ShipyardError: the environment or release is not known, AWS refuses, or the canaries are not well.
    """
    if chosen.env not in fleet.env:
        raise ShipyardError("--env: no such environment", value=chosen.env, allowed=", ".join(fleet.env))
    env = fleet.env[chosen.env]
    clients = open_clients(env)
    if chosen.action == "status":
        told = rollout.status(clients, env.edge)
        print(json.dumps(told) if chosen.json else _table(told))
        return 0
    version = chosen.version
    if version is None and chosen.action == "rollback":
        version = rollout.before(clients, env.edge, account=env.account, region=env.region)
    if version is None:
        raise ShipyardError(
            f"edge {chosen.action}: no release is named",
            mend=f"shipyard edge {chosen.action} --env {chosen.env} VERSION",
        )
    releases = root / "releases"
    keys = load_keys(releases / "keys")
    oldest = 0 if chosen.allow_older else fleet.project.minimum_sequence
    found = read_release(releases / f"{version}.json", keys, oldest)
    check_withdrawn(releases / f"{version}.json")
    require_approval(found, chosen.env, env, releases, releases / "keys")
    bucket = fleet.bucket(chosen.env)
    said, deltas = publish_edge(
        found, others(releases, found), build / "store", open_store(f"s3://{bucket}", owner=env.account),
        clients.greengrass, bucket, account=env.account, region=env.region, progress=reporter.progress,
    )  # fmt: skip
    if chosen.action != "publish":
        said |= rollout.rollout(
            clients, found, env.edge, deltas, account=env.account, region=env.region,
            trusted_key=trusted_key(found, keys), said=reporter.line, canary=chosen.action == "rollout", wait=chosen.wait,
        )  # fmt: skip
    print(json.dumps(said))
    return 0


def open_clients(env: Environment) -> rollout.Clients:
    """Return the clients of a rollout, with the credentials of the surroundings."""
    try:
        session = boto3.Session(region_name=env.region)
        config = Config(retries={"mode": "standard", "max_attempts": 8})
        made = {name: session.client(name, config=config) for name in ("greengrassv2", "iot", "iot-data")}
    except BotoCoreError as fault:
        raise ShipyardError(f"edge: {fault}", mend=MEND) from None
    return rollout.Clients(made["greengrassv2"], made["iot"], made["iot-data"])


def others(releases: Path, found: Release) -> list[Release]:
    """Return the other releases of the repository that devices may come from."""
    keys = load_keys(releases / "keys")
    files = [path for path in releases.glob("*-g*.json") if path.stem != found.version]
    known = []
    for path in sorted(files):
        try:
            known.append(read_release(path, keys))
        except ShipyardError:
            # of an older form: its devices take the full archive
            continue
    return known


def _table(told: dict[str, Any]) -> str:
    lines = [f"{'group':<32} {'in step':>8} {'behind':>8} {'silent':>8} {'failed':>8}"]
    for entry in told.values():
        lines.append(f"{entry['group']:<32} " + " ".join(f"{count:>8}" for count in entry["devices"].values()))
        lines += [f"  {thing}: {fault}" for thing, fault in entry["faults"].items()]
    return "\n".join(lines)
