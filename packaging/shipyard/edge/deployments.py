"""Deployments: what Greengrass itself is asked to bring to a thing group, each component pinned."""

import json
from collections.abc import Mapping
from typing import Any

from models.config import EdgeSettings
from models.release import Release
from shipyard.edge.components import call
from shipyard.edge.lock import component, edge_artifacts

NUCLEUS = "aws.greengrass.Nucleus"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name


def target(group: str, account: str, region: str) -> str:
    """Return the ARN of a thing group, as a deployment names it."""
    return f"arn:aws:iot:{region}:{account}:thinggroup/{group}"


def latest(greengrass: Any, arn: str) -> Mapping[str, Any]:
    """Return the latest deployment of a target; nothing where there is none."""
    found = call(greengrass.list_deployments, targetArn=arn, historyFilter="LATEST_ONLY")["deployments"]
    if not found:
        return {}
    made: Mapping[str, Any] = call(greengrass.get_deployment, deploymentId=found[0]["deploymentId"])
    return made


def history(greengrass: Any, arn: str) -> list[Mapping[str, Any]]:
    """Return the deployments of a target, the latest first."""
    pages = greengrass.get_paginator("list_deployments").paginate(targetArn=arn, historyFilter="ALL")
    found = [entry for page in call(lambda: list(pages)) for entry in page["deployments"]]
    return sorted(found, key=lambda entry: entry["creationTimestamp"], reverse=True)


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


def deploy(greengrass: Any, arn: str, name: str, components: dict[str, Any], settings: EdgeSettings) -> str | None:
    """Create the deployment of a thing group, unless its latest one is the same; return its id, or None."""
    there = latest(greengrass, arn)
    if there.get("components") == components and there["deploymentStatus"] in ("ACTIVE", "COMPLETED"):
        return None
    made = call(
        greengrass.create_deployment,
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


def cancel(greengrass: Any, arn: str, components: dict[str, Any]) -> None:
    """End the deployment of these components, also one that an earlier run made; one of others by now is theirs."""
    there = latest(greengrass, arn)
    if there.get("components") == components and there["deploymentStatus"] == "ACTIVE":
        call(greengrass.cancel_deployment, deploymentId=there["deploymentId"])
