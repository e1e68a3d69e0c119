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
from serve.greengrass.words import SHADOW, Delta, Pointer, Told, write_told
from shipyard.edge.components import call, pointer
from shipyard.edge.devices import Clients, Seen, groups, latest, look_all, manifests, target, things
from shipyard.edge.lock import component, edge_artifacts

NUCLEUS = "aws.greengrass.Nucleus"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name

BACK = " back"
"""Ends the name of a deployment that is a way back, so that the same command again does not go forward."""

Deltas = Mapping[str, Mapping[str, Delta]]
"""Patches to a release's models, by model and by the digest of the bundle.json that they start from."""


def wanted(found: Release) -> dict[str, Pointer]:
    """Return how devices are told of a release's models, without deltas."""
    return {artifact.name: pointer(artifact) for artifact in found.of("greengrass-model")}


def tell(clients: Clients, seen: Seen, found: Release, generation: int, deltas: Deltas) -> bool:
    """Write what is wanted into a device's shadow, with a delta from what it has; say whether that was anything new.

    A device tries a generation once and takes none below its floor: one that refused this word, or cannot hear it, is told
    again.
    """
    plain = wanted(found)
    if not plain:
        return False
    if seen.told is not None and not seen.refused and seen.told.generation == seen.floor:
        known = {name: dataclasses.replace(told, delta=None) for name, told in seen.told.models.items()}
        if known == plain:
            return False
    has = seen.report.get("models", {})
    models = {n: dataclasses.replace(p, delta=deltas.get(n, {}).get(has.get(n, ""))) for n, p in plain.items()}
    try:
        told = write_told(Told(generation, models))
    except ShipyardError:
        # a shadow takes no more: full archives lead to the same
        told = write_told(Told(generation, plain))
    payload = json.dumps({"state": {"desired": {"told": told}}}).encode()
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
    there = latest(clients, arn)
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
    seen = _look(clients, settings)
    write_told(Told(_next(seen), wanted(found)))  # a word that no shadow takes ends it here, not half way
    if canary and seen["fleet"] and not seen["canary"]:
        raise ShipyardError(
            f"edge: no canary would try the release before the {len(seen['fleet'])} devices of the fleet",
            value=f"no device in {groups(settings)['canary']}", allowed="one or more",
            mend=f"move a device there from {settings.thing_group}",
        )  # fmt: skip
    for label, group in groups(settings).items():
        generation = _next(seen)
        name = f"{group} {found.version}" + ("" if canary else BACK)
        identifier = deploy(clients, target(group, account, region), name, components, settings)
        count = sum(tell(clients, device, found, generation, deltas) for device in seen[label])
        made[label] = {"deployment": identifier, "told": count}
        said(f"{label}: {'a new deployment' if identifier else 'no new deployment'}, {count} devices told")
        if label == "canary" and canary:
            names = [device.thing for device in seen[label]]
            _judge(clients, names, found, generation, settings, identifier, said, wait, pause)
            # that may have taken an hour: devices came and went, and others may have spoken to them
            seen = _look(clients, settings)
    return {"version": found.version, "generation": generation, **made}


def _look(clients: Clients, settings: EdgeSettings) -> dict[str, list[Seen]]:
    return {label: look_all(clients, things(clients, group)) for label, group in groups(settings).items()}


def _next(seen: Mapping[str, list[Seen]]) -> int:
    """Return the generation above all that devices were told or took up."""
    return 1 + max((device.floor for devices in seen.values() for device in devices), default=0)


def _runtime(found: Release) -> str | None:
    """Return the version of a release's runtime, which a device reports as it is in the recipe; None where it has none."""
    return next((component(artifact)[1] for artifact in found.of("greengrass-runtime")), None)


def _judge(
    clients: Clients, names: list[str], found: Release, generation: int, settings: EdgeSettings, identifier: str | None,
    said: Callable[[str], None], wait: float, pause: float,
) -> None:  # fmt: skip
    """Wait until every canary serves a release by its runtime; end the deployment where too many say that they cannot."""
    models, runtime = {name: told.manifest for name, told in wanted(found).items()}, _runtime(found)
    until = time.monotonic() + wait
    while True:
        seen = look_all(clients, names)
        standings = [device.standing(models, runtime) for device in seen]
        failed, good = standings.count("failed"), standings.count("in step")
        later = [device for device in seen if device.told is not None and device.told.generation > generation]
        others = [device.thing for device in later if manifests(device.told) != models]
        if others:
            what, value = "canaries were told otherwise meanwhile", ", ".join(others[:3])
            break
        if names and 100 * failed / len(names) >= settings.abort_percent:
            what, value = "canaries failed", f"{failed} of {len(names)}"
            break
        if failed + good == len(names):
            said(f"canary: {good} of {len(names)} devices in step")
            return
        if time.monotonic() > until:
            what, value = "canaries did not come in step", f"{good} of {len(names)} in {wait:.0f} s"
            # models alone do not tell whether a device runs the new code: a release may bring nothing else
            if late := sum(device.standing(models, None) == "in step" for device in seen) - good:
                value += f", {late} by another runtime than {runtime}"
            break
        time.sleep(pause)
    if identifier is not None:
        call(clients.greengrass.cancel_deployment, deploymentId=identifier)
    raise ShipyardError(
        f"edge: {what}; the fleet was left as it is", value=value, allowed=f"less than {settings.abort_percent} %",
        mend="shipyard edge status tells why; shipyard edge rollback brings the canaries back",
    )  # fmt: skip


def before(clients: Clients, settings: EdgeSettings, *, account: str, region: str) -> str:
    """Return the version of the release to go back to: the last one of the fleet that is not the canaries' present one.

    What canaries alone tried is passed by. Where the latest deployment is a way back, that one is gone on with.

    Raises:
        ShipyardError: the fleet never ran another one.
    """
    ran = {
        label: [
            name.removeprefix(f"{group} ")
            for entry in _history(clients, target(group, account, region))
            if (name := entry.get("deploymentName", "")).startswith(f"{group} ")
        ]
        for label, group in groups(settings).items()
    }
    present = ran["canary"][0] if ran["canary"] else ""
    if present.endswith(BACK):
        return present.removesuffix(BACK)
    earlier = [version for name in ran["fleet"] if (version := name.removesuffix(BACK)) != present]
    if not earlier:
        raise ShipyardError(
            f"edge: {settings.thing_group} never ran another release", value=present,
            mend="name one: edge rollback VERSION",
        )  # fmt: skip
    return earlier[0]


def _history(clients: Clients, arn: str) -> Iterator[Mapping[str, Any]]:
    """Yield the deployments of a target, the latest first."""
    pages = clients.greengrass.get_paginator("list_deployments").paginate(targetArn=arn, historyFilter="ALL")
    found = [entry for page in call(lambda: list(pages)) for entry in page["deployments"]]
    yield from sorted(found, key=lambda entry: entry["creationTimestamp"], reverse=True)
