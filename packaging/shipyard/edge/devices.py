"""Devices: what the center knows of each from its named shadow, and where they stand, by group."""

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from models.config import EdgeSettings
from serve.errors import ShipyardError
from serve.greengrass.telemetry import total
from serve.greengrass.words import SHADOW, Told, read_told
from shipyard.edge.components import MEND, call

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
    """What is known of one device: what it was told, what it said, and how long ago, in the service's own clock."""

    thing: str
    told: Told | None
    echoed: bool
    report: Mapping[str, Any]
    age_s: float

    @property
    def standing(self) -> Standing:
        """Return where it stands; failed before silent, for that is its last word."""
        if self.report.get("phase") == "failed":
            return "failed"
        if not self.report or self.age_s > SILENT_S:
            return "silent"
        serves = self.told is None or all(
            self.report["models"].get(name) == wanted.manifest for name, wanted in self.told.models.items()
        )
        return "in step" if self.echoed and serves else "behind"


def groups(settings: EdgeSettings) -> dict[str, str]:
    """Return the thing groups of an environment, in the order of a rollout."""
    return {"canary": f"{settings.thing_group}-canary", "fleet": settings.thing_group}


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
    stamped = document.get("metadata", {}).get("reported", {}).get("report", {}).get("timestamp", 0)
    report = json.loads(reported["report"]) if "report" in reported else {}
    # both are the service's: a device's clock counts for nothing
    age = document.get("timestamp", time.time()) - stamped
    return Seen(thing, None if desired is None else read_told(desired), reported.get("told") == desired, report, age)


def look_all(clients: Clients, names: Iterable[str]) -> list[Seen]:
    """Read many devices' shadows, several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda thing: look(clients, thing), names))


def status(clients: Clients, settings: EdgeSettings) -> dict[str, Any]:
    """Return where the devices of each group stand, of those that failed, why, and what all have counted, by model."""
    told: dict[str, Any] = {}
    for label, group in groups(settings).items():
        seen = look_all(clients, things(clients, group))
        standings: dict[Standing, int] = {"in step": 0, "behind": 0, "silent": 0, "failed": 0}
        for device in seen:
            standings[device.standing] += 1
        told[label] = {
            "group": group,
            "devices": standings,
            "generations": sorted({device.told.generation for device in seen if device.told is not None}),
            "totals": total(d.report["telemetry"] for d in seen if "telemetry" in d.report),
            "faults": {d.thing: d.report.get("fault", "") for d in seen if d.standing == "failed"},
        }
    return told
