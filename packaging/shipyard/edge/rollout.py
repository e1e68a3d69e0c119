"""Rollout: one release to the canary devices, then to the fleet, judged by what the devices say; and the way back.

Each device has a named shadow (docs/edge-sync.md): what is wanted is written there, what is served is read there. A
deployment brings code and the models that a new device begins with.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from models.config import EdgeSettings
from models.release import Release
from serve.errors import ShipyardError
from serve.greengrass.words import SHADOW, Delta, Told, write_told
from shipyard.edge.components import call, pointer
from shipyard.edge.devices import Clients, Seen, groups, look_all, things
from shipyard.edge.lock import component, edge_artifacts

NUCLEUS = "aws.greengrass.Nucleus"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name

Deltas = Mapping[str, Mapping[str, Delta]]
"""Patches to a release's models, by model and by the digest of the bundle.json that they start from."""


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

    Each canary has to serve the release's models by the release's runtime. Without `canary` both groups follow at once, as a
    rollback wants it. The same release twice does nothing.

    Returns:
        Deployments made and devices told, by group.

    Raises:
        ShipyardError: more devices failed than `abort_percent` allows, the canaries did not answer in `wait` seconds, or
            there is no canary to ask.
    """
    made: dict[str, Any] = {}
    components = deployment(found, settings, trusted_key)
    seen = {label: look_all(clients, things(clients, group)) for label, group in groups(settings).items()}
    if canary and seen["fleet"] and not seen["canary"]:
        raise ShipyardError(
            f"edge: no canary would try the release before the {len(seen['fleet'])} devices of the fleet",
            value=f"no device in {groups(settings)['canary']}", allowed="one or more",
            mend=f"move a device there from {settings.thing_group}",
        )  # fmt: skip
    told = [device.told.generation for devices in seen.values() for device in devices if device.told is not None]
    generation = max([0, *told]) + 1
    for label, group in groups(settings).items():
        arn = f"arn:aws:iot:{region}:{account}:thinggroup/{group}"
        identifier = deploy(clients, arn, f"{group} {found.version}", components, settings)
        count = sum(tell(clients, device, found, generation, deltas) for device in seen[label])
        made[label] = {"deployment": identifier, "told": count}
        said(f"{label}: {'a new deployment' if identifier else 'no new deployment'}, {count} devices told")
        if label == "canary" and canary:
            names = [device.thing for device in seen[label]]
            _judge(clients, names, _runtime(found), settings, identifier, said, wait, pause)
    return {"version": found.version, "generation": generation, **made}


def _runtime(found: Release) -> str | None:
    """Return the version of a release's runtime, which a device reports as it is in the recipe; None where it has none."""
    return next((component(artifact)[1] for artifact in found.of("greengrass-runtime")), None)


def _judge(
    clients: Clients, names: list[str], runtime: str | None, settings: EdgeSettings, identifier: str | None,
    said: Callable[[str], None], wait: float, pause: float,
) -> None:  # fmt: skip
    """Wait until every canary serves what is wanted by `runtime`; end the deployment where too many say that they cannot."""
    until = time.monotonic() + wait
    while True:
        seen = look_all(clients, names)
        failed = sum(device.standing == "failed" for device in seen)
        serving = [device.report.get("runtime") for device in seen if device.standing == "in step"]
        # models alone do not tell whether a device runs the new code: a release may bring nothing else
        good = len(serving) if runtime is None else serving.count(runtime)
        if names and 100 * failed / len(names) >= settings.abort_percent:
            what, value = "canaries failed", f"{failed} of {len(names)}"
            break
        if failed + good == len(names):
            said(f"canary: {good} of {len(names)} devices in step")
            return
        if time.monotonic() > until:
            what, value = "canaries did not come in step", f"{good} of {len(names)} in {wait:.0f} s"
            if good < len(serving):
                value += f", {len(serving) - good} by another runtime than {runtime}"
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
