"""shipyard edge: publish, rollout, rollback, status and merge, on one environment of fleet.toml."""

import argparse
import json
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from models.approval import check_standing, require_approval
from models.config import Environment, Fleet
from models.release import Release, read_release, trusted_key
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.console import Reporter
from shipyard.edge import devices, rollout
from shipyard.edge.components import MEND, publish_edge
from shipyard.edge.corrections import LOCK, write_corrections
from shipyard.edge.merge import Terms, learned_of, merge
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
        told = devices.status(clients, env)
        print(json.dumps(told) if chosen.json else _table(told))
        return 0
    version = env.release if chosen.version is None and chosen.action == "merge" else chosen.version
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
    if chosen.action == "merge":
        terms = Terms(
            chosen.least_devices, chosen.least_evidence, clip=chosen.clip, epsilon=chosen.epsilon, delta=chosen.delta
        )
        merged = _merge(found, clients, env, terms, reporter)
        write_corrections(releases, merged)
        print(json.dumps(merged))
        reporter.line(f"wrote {releases / LOCK}; commit it: the next release takes it up through its gates")
        return 0
    check_standing(releases / f"{version}.json", found)
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


def _merge(
    found: Release, clients: devices.Clients, env: Environment, terms: Terms, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Merge what the devices of all groups have learned of a release's models, by sub-model; leave out what has too few.

    Raises:
        ShipyardError: of no model have enough devices learned.
    """
    names = [thing for group in devices.groups(env.edge).values() for thing in devices.things(clients, group)]
    reports = {device.thing: device.report for device in devices.look_all(clients, names)}
    merged: dict[str, dict[str, Any]] = {}
    faults: list[ShipyardError] = []
    for artifact in found.of("greengrass-model"):
        assert artifact.submodel is not None
        began = found.submodels[artifact.submodel].score.calibration.get("correction", (1.0, 0.0))
        serving, learned = learned_of(artifact.name, artifact.manifest, reports)
        try:
            made = merge(artifact.submodel, serving, learned, (began[0], began[1]), terms)
        except ShipyardError as fault:
            faults.append(fault)
            reporter.line(f"left out {fault}")
        else:
            merged[artifact.submodel] = made | {"of": found.version}
    if not merged:
        raise faults[0]
    return merged


def open_clients(env: Environment) -> devices.Clients:
    """Return the clients of a rollout, with the credentials of the surroundings."""
    try:
        session = boto3.Session(region_name=env.region)
        config = Config(retries={"mode": "standard", "max_attempts": 8})
        made = {name: session.client(name, config=config) for name in ("greengrassv2", "iot", "iot-data")}
    except BotoCoreError as fault:
        raise ShipyardError(f"edge: {fault}", mend=MEND) from None
    return devices.Clients(made["greengrassv2"], made["iot"], made["iot-data"])


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
