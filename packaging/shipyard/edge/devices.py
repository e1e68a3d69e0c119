"""Devices: what the center knows of each from its named shadow, and where they stand, by group."""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from models.config import EdgeSettings, Environment
from serve.errors import ShipyardError
from serve.greengrass.recipe import RUNTIME_COMPONENT
from serve.greengrass.telemetry import total
from serve.greengrass.words import SHADOW, Told, read_told
from shipyard.edge.components import MEND, call
from shipyard.edge.reports import read_report

Standing = Literal["in step", "behind", "silent", "failed"]
AT_ONCE = 16
"""Shadows that are read at a time: the service allows hundreds a second."""

SILENT_S = 3 * 3600
"""Seconds without a report after which a device counts as silent: three of its questions."""


@dataclass(frozen=True)
class Clients:
    """The services that a rollout speaks to."""

    greengrass: Any
    iot: Any
    shadows: Any


@dataclass(frozen=True)
class Seen:
    """What is known of one device: what it was told, what it said, and how long ago, in the service's own clock.

    `unread` says what of its report is not understood.
    """

    thing: str
    told: Told | None
    echoed: bool
    report: Mapping[str, Any]
    age_s: float
    unread: str = ""

    @property
    def refused(self) -> bool:
        """Say whether it failed at what it was told last: what it said before it heard that is of another word."""
        return self.echoed and self.report.get("phase") == "failed"

    @property
    def floor(self) -> int:
        """Return the generation that a word to it has to pass, or be."""
        return max(self.report.get("floor", 0), 0 if self.told is None else self.told.generation)

    def standing(self, models: Mapping[str, str], runtime: str | None) -> Standing:
        """Return where it stands towards digests by model and a runtime's version, which None leaves open.

        Failed comes before silent, for that is its last word; what the runtime before failed at, the next one may do.
        """
        runs = runtime in (None, self.report.get("runtime"))
        if self.refused and runs:
            return "failed"
        if not (self.report or self.unread) or self.age_s > SILENT_S:
            return "silent"
        has = self.report.get("models", {})
        serves = bool(self.report) and all(has.get(name) == manifest for name, manifest in models.items())
        return "in step" if self.echoed and serves and runs else "behind"

    @property
    def fault(self) -> str:
        """Return what is wrong with it: with its report, or as that says."""
        said: str = self.report.get("fault", "")
        return self.unread or said


def manifests(told: Told | None) -> dict[str, str]:
    """Return the digests by model that a device was told."""
    return {} if told is None else {name: pointer.manifest for name, pointer in told.models.items()}


def groups(settings: EdgeSettings) -> dict[str, str]:
    """Return the thing groups of an environment, in the order of a rollout."""
    return {"canary": f"{settings.thing_group}-canary", "fleet": settings.thing_group}


def target(group: str, account: str, region: str) -> str:
    """Return the ARN of a thing group, as a deployment names it."""
    return f"arn:aws:iot:{region}:{account}:thinggroup/{group}"


def latest(clients: Clients, arn: str) -> Mapping[str, Any]:
    """Return the latest deployment of a target; nothing where there is none."""
    found = call(clients.greengrass.list_deployments, targetArn=arn, historyFilter="LATEST_ONLY")["deployments"]
    if not found:
        return {}
    made: Mapping[str, Any] = call(clients.greengrass.get_deployment, deploymentId=found[0]["deploymentId"])
    return made


def things(clients: Clients, group: str) -> list[str]:
    """Name the devices of a group."""
    pages = clients.iot.get_paginator("list_things_in_thing_group").paginate(thingGroupName=group)
    return sorted(name for page in call(lambda: list(pages)) for name in page["things"])


def look(clients: Clients, thing: str) -> Seen:
    """Read a device's shadow.

    Raises:
        ShipyardError: AWS refuses, or does not answer.
    """
    try:
        document = json.loads(clients.shadows.get_thing_shadow(thingName=thing, shadowName=SHADOW)["payload"].read())
    except (ClientError, BotoCoreError) as fault:
        if isinstance(fault, ClientError) and fault.response["Error"]["Code"] == "ResourceNotFoundException":
            return Seen(thing, None, False, {}, float("inf"))
        raise ShipyardError(f"edge: {thing}: {fault}", mend=MEND) from None
    desired = document["state"].get("desired", {}).get("told")
    reported = document["state"].get("reported", {})
    told: Told | None = None
    report: Mapping[str, Any] = {}
    unread, stamped = "", 0
    if desired is not None:
        # a word that nobody understands stands as none: a rollout tells it anew
        with contextlib.suppress(ShipyardError):
            told = read_told(desired)
    if "report" in reported:
        stamp = document.get("metadata", {}).get("reported", {}).get("report", {})
        # what is no text has a stamp for each of its parts
        stamped = stamp.get("timestamp", 0) if isinstance(reported["report"], str) else 0
        try:
            report, left = read_report(reported["report"])
            unread = left and f"its telemetry is {left}"
        except ShipyardError as fault:
            unread = f"its report is {fault}"
    # both are the service's: a device's clock counts for nothing
    age = document.get("timestamp", time.time()) - stamped
    return Seen(thing, told, reported.get("told") == desired, report, age, unread)


def look_all(clients: Clients, names: Iterable[str]) -> list[Seen]:
    """Read many devices' shadows, several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda thing: look(clients, thing), names))


def status(clients: Clients, env: Environment) -> dict[str, Any]:
    """Return where the devices of each group stand, what is wrong with whom, and what all have counted, by model.

    They stand towards the latest word of their group and the runtime of its latest deployment, so that those whom a rollout
    did not reach are behind.
    """
    told: dict[str, Any] = {}
    for label, group in groups(env.edge).items():
        seen = look_all(clients, things(clients, group))
        words = [device.told for device in seen if device.told is not None]
        models = manifests(max(words, key=lambda word: word.generation, default=None))
        deployed = latest(clients, target(group, env.account, env.region)).get("components", {})
        version = deployed.get(RUNTIME_COMPONENT, {}).get("componentVersion")
        standings: dict[Standing, int] = {"in step": 0, "behind": 0, "silent": 0, "failed": 0}
        faults = {}
        for device in seen:
            standing = device.standing(models, version)
            standings[standing] += 1
            # a device in step may say what passed since, as that it could not fetch
            if device.unread or (standing != "in step" and device.fault):
                faults[device.thing] = device.fault
        told[label] = {
            "group": group,
            "devices": standings,
            "generations": sorted({word.generation for word in words}),
            "totals": total(d.report["telemetry"] for d in seen if "telemetry" in d.report),
            "faults": faults,
        }
    return told
