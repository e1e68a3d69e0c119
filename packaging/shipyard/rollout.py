"""Rollout: one release to the canary devices, then to the fleet, judged by what the devices say; rollback; status.

Each device has a named shadow (docs/edge-sync.md): what is wanted is written there, what is served is read there. A
deployment brings code and the models that a new device begins with.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import ClientError

from models.config import EdgeSettings
from models.release import Release
from serve.errors import ShipyardError
from serve.greengrass.protocol import SHADOW, Delta, Told, read_told, write_told
from shipyard.components import call, pointer
from shipyard.lock import component, edge_artifacts

NUCLEUS = "aws.greengrass.Nucleus"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name

Deltas = Mapping[str, Mapping[str, Delta]]
"""Patches to a release's models, by model and by the digest of the bundle.json that they start from."""

Standing = Literal["in step", "behind", "silent", "failed"]
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
    """Read a device's shadow."""
    try:
        answer = clients.shadows.get_thing_shadow(thingName=thing, shadowName=SHADOW)
    except ClientError as fault:
        if fault.response["Error"]["Code"] != "ResourceNotFoundException":
            raise ShipyardError(f"edge: {thing}: {fault}") from None
        return Seen(thing, None, False, {}, float("inf"))
    document = json.loads(answer["payload"].read())
    desired = document["state"].get("desired", {}).get("told")
    reported = document["state"].get("reported", {})
    stamped = document.get("metadata", {}).get("reported", {}).get("report", {}).get("timestamp", 0)
    report = json.loads(reported["report"]) if "report" in reported else {}
    # both are the service's: a device's clock counts for nothing
    age = document.get("timestamp", time.time()) - stamped
    return Seen(thing, None if desired is None else read_told(desired), reported.get("told") == desired, report, age)


def tell(clients: Clients, seen: Seen, found: Release, generation: int, deltas: Deltas) -> bool:
    """Write what is wanted into a device's shadow, with a delta from what it has; say whether that was anything new."""
    models = {a.name: pointer(a) for a in found.of("greengrass-model")}
    known = {} if seen.told is None else {n: p.manifest for n, p in seen.told.models.items()}
    if known == {name: wanted.manifest for name, wanted in models.items()}:
        return False
    for name, wanted in models.items():
        base = seen.report.get("models", {}).get(name)
        models[name] = dataclasses.replace(wanted, delta=deltas.get(name, {}).get(base))
    payload = json.dumps({"state": {"desired": {"told": write_told(Told(generation, models))}}}).encode()
    call(clients.shadows.update_thing_shadow, thingName=seen.thing, shadowName=SHADOW, payload=payload)
    return True


def deployment(found: Release, settings: EdgeSettings, trusted_key: str) -> dict[str, Any]:
    """Return the components that a release deploys, each pinned, the nucleus too, with the runtime's configuration."""
    models = " ".join(a.template["model"].replace("@ATTESTATION@", a.attestation) for a in found.of("greengrass-model"))
    configuration = {"models": models, "trustedKey": trusted_key}
    pinned: dict[str, Any] = {
        NUCLEUS: {
            "componentVersion": settings.nucleus_version,
            "configurationUpdate": {"merge": json.dumps({"interpolateComponentConfiguration": True})},
        },
        TOKEN_EXCHANGE: {"componentVersion": settings.token_exchange_version},
    }
    for artifact in edge_artifacts(found):
        name, version = component(artifact)
        pinned[name] = {"componentVersion": version}
        if artifact.kind == "greengrass-runtime":
            pinned[name]["configurationUpdate"] = {"merge": json.dumps(configuration, sort_keys=True)}
    return pinned


def deploy(clients: Clients, arn: str, name: str, components: dict[str, Any], settings: EdgeSettings) -> str | None:
    """Create the deployment of a thing group, unless its latest one is the same; return its id, or None."""
    latest = call(clients.greengrass.list_deployments, targetArn=arn, historyFilter="LATEST_ONLY")["deployments"]
    for entry in latest:
        there = call(clients.greengrass.get_deployment, deploymentId=entry["deploymentId"])
        if there.get("components") == components and there["deploymentStatus"] in ("ACTIVE", "COMPLETED"):
            return None
    made = call(
        clients.greengrass.create_deployment,
        targetArn=arn,
        deploymentName=name,
        components=components,
        deploymentPolicies={"failureHandlingPolicy": "ROLLBACK"},
        iotJobConfiguration={
            "jobExecutionsRolloutConfig": {
                "exponentialRate": {
                    "baseRatePerMinute": settings.rollout_per_minute,
                    "incrementFactor": 2.0,
                    "rateIncreaseCriteria": {"numberOfSucceededThings": settings.rollout_per_minute},
                },
                "maximumPerMinute": 1000,
            },
            "abortConfig": {
                "criteriaList": [
                    {
                        "failureType": "FAILED",
                        "action": "CANCEL",
                        "thresholdPercentage": settings.abort_percent,
                        "minNumberOfExecutedThings": settings.abort_after,
                    }
                ]
            },
            "timeoutConfig": {"inProgressTimeoutInMinutes": settings.timeout_minutes},
        },
    )
    identifier: str = made["deploymentId"]
    return identifier


def rollout(
    clients: Clients, found: Release, settings: EdgeSettings, deltas: Deltas, *, account: str, region: str, trusted_key: str,
    said: Callable[[str], None], canary: bool = True, wait: float = 3600.0, pause: float = 10.0,
) -> dict[str, Any]:  # fmt: skip
    """Bring a release to the canary group, wait for its devices' own word, then bring it to the fleet.

    Without `canary` both follow at once, as a rollback wants it. The same release twice does nothing.

    Returns:
        Deployments made and devices told, by group.

    Raises:
        ShipyardError: more devices failed than `abort_percent` allows, or the canaries did not answer in `wait` seconds.
    """
    made: dict[str, Any] = {}
    components = deployment(found, settings, trusted_key)
    seen = {group: [look(clients, thing) for thing in things(clients, group)] for group in groups(settings).values()}
    told = [device.told.generation for devices in seen.values() for device in devices if device.told is not None]
    generation = max([0, *told]) + 1
    for label, group in groups(settings).items():
        arn = f"arn:aws:iot:{region}:{account}:thinggroup/{group}"
        identifier = deploy(clients, arn, f"{group} {found.version}", components, settings)
        count = sum(tell(clients, device, found, generation, deltas) for device in seen[group])
        made[label] = {"deployment": identifier, "told": count}
        said(f"{label}: {'a new deployment' if identifier else 'no new deployment'}, {count} devices told")
        if label == "canary" and canary:
            _judge(clients, [device.thing for device in seen[group]], settings, identifier, said, wait, pause)
    return {"version": found.version, "generation": generation, **made}


def _judge(
    clients: Clients, names: list[str], settings: EdgeSettings, identifier: str | None, said: Callable[[str], None],
    wait: float, pause: float,
) -> None:  # fmt: skip
    """Wait until every canary serves what is wanted; end the deployment where too many say that they cannot."""
    until = time.monotonic() + wait
    while True:
        standings = [look(clients, name).standing for name in names]
        failed, good = standings.count("failed"), standings.count("in step")
        if names and 100 * failed / len(names) >= settings.abort_percent:
            what, value = "canaries failed", f"{failed} of {len(names)}"
            break
        if failed + good == len(names):
            said(f"canary: {good} of {len(names)} devices in step")
            return
        if time.monotonic() > until:
            what, value = "canaries did not come in step", f"{good} of {len(names)} in {wait:.0f} s"
            break
        time.sleep(pause)
    if identifier is not None:
        call(clients.greengrass.cancel_deployment, deploymentId=identifier)
    raise ShipyardError(
        f"edge: {what}; the fleet was left as it is", value=value, allowed=f"less than {settings.abort_percent} %",
        mend="shipyard edge status tells why; shipyard edge rollback brings the canaries back",
    )  # fmt: skip


def before(clients: Clients, settings: EdgeSettings, *, account: str, region: str) -> str:
    """Return the version of the release that the canary group ran before its present one.

    Raises:
        ShipyardError: it never ran another one.
    """
    group = groups(settings)["canary"]
    arn = f"arn:aws:iot:{region}:{account}:thinggroup/{group}"
    names = [entry.get("deploymentName", "") for entry in _history(clients, arn)]
    versions = list(dict.fromkeys(name.removeprefix(f"{group} ") for name in names if name.startswith(f"{group} ")))
    if len(versions) < 2:
        raise ShipyardError(
            f"edge: {group} never ran another release",
            value=", ".join(versions),
            mend="name one: edge rollback VERSION",
        )
    return versions[1]


def _history(clients: Clients, arn: str) -> Iterator[Mapping[str, Any]]:
    """Yield the deployments of a target, the latest first."""
    pages = clients.greengrass.get_paginator("list_deployments").paginate(targetArn=arn, historyFilter="ALL")
    found = [entry for page in call(lambda: list(pages)) for entry in page["deployments"]]
    yield from sorted(found, key=lambda entry: entry["creationTimestamp"], reverse=True)


def status(clients: Clients, settings: EdgeSettings) -> dict[str, Any]:
    """Return where the devices of each group stand, and of those that failed, why."""
    told: dict[str, Any] = {}
    for label, group in groups(settings).items():
        seen = [look(clients, thing) for thing in things(clients, group)]
        standings: dict[Standing, int] = {"in step": 0, "behind": 0, "silent": 0, "failed": 0}
        for device in seen:
            standings[device.standing] += 1
        told[label] = {
            "group": group,
            "devices": standings,
            "generations": sorted({device.told.generation for device in seen if device.told is not None}),
            "faults": {d.thing: d.report.get("fault", "") for d in seen if d.standing == "failed"},
        }
    return told
