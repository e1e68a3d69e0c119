"""Live: what an environment runs, as its own services tell it, against what the release says.

A deployment that CloudFormation calls a success may have been taken back since, by an alarm or by a circuit breaker. So what
counts is the model that an endpoint's present configuration names, the task definition that a service's tasks are of, and
the components of a thing group's latest deployment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from models.config import Environment, Fleet
from models.release import Artifact, Release
from serve.errors import ShipyardError
from shipyard.delivery.promote import PROMOTIONS
from shipyard.delivery.register import Register
from shipyard.delivery.standing import Row, State
from shipyard.edge import devices
from shipyard.edge.command import open_clients
from shipyard.edge.deployments import target
from shipyard.edge.lock import component, edge_artifacts

DIGITS = 12


@dataclass(frozen=True)
class Services:
    """The services that are asked."""

    sagemaker: Any
    ecs: Any
    cloudformation: Any
    edge: devices.Clients


def open_services(env: Environment) -> Services:
    """Return clients of an environment's region, with the credentials of the surroundings."""
    try:
        sagemaker, ecs, cloudformation = (
            boto3.client(name, region_name=env.region) for name in ("sagemaker", "ecs", "cloudformation")
        )
    except BotoCoreError as fault:
        raise ShipyardError(f"status: {fault}", mend="check your credentials") from None
    return Services(sagemaker, ecs, cloudformation, open_clients(env))


def status(services: Services, fleet: Fleet, name: str, release: Release, register: Register) -> list[Row]:
    """Compare what an environment runs with a release; the rows are in the order of a rollout.

    Raises:
        ShipyardError: a service refuses to tell.
    """
    env, prefix = fleet.env[name], f"{fleet.project.name}-{name.replace('_', '-')}"
    bucket = fleet.bucket(name)
    try:
        rows = [_endpoint(services.sagemaker, prefix, a, bucket) for a in release.of("triton")]
        for place, artifacts in (("cpu", release.of("image-context")), ("gateway", release.of("gateway"))):
            if artifacts:
                tasks = _services(services, f"{prefix}-{place}")
                rows += [row for a in artifacts for row in _service(tasks, place, a, bucket, env.cpu.image)]
        if edge_artifacts(release):
            rows += _edge(services.edge, env, release)
    except (ClientError, BotoCoreError) as fault:
        raise ShipyardError(f"status: {fault}", mend="check the region, your credentials and your rights") from None
    records = register.below(PROMOTIONS)
    if records:
        last = records[-1]["release"]
        rows.append(Row("record", "promotion", release.version, last, "ok" if last == release.version else "differs"))
    return rows


def _short(uri: str, bucket: str, artifact: Artifact) -> str:
    """Return what tells a place in a bucket from the artifact's own: its digest, or all of it where it is elsewhere."""
    folder = f"s3://{bucket}/artifacts/{artifact.name}/"
    return uri.removeprefix(folder)[:DIGITS] if uri.startswith(folder) else uri


def _endpoint(sagemaker: Any, prefix: str, artifact: Artifact, bucket: str) -> Row:
    name, wanted = f"{prefix}-{artifact.name}", artifact.digest[:DIGITS]
    try:
        endpoint = sagemaker.describe_endpoint(EndpointName=name)
    except ClientError as fault:
        if "Could not find" not in str(fault):
            raise
        return Row("gpu", artifact.name, wanted, "", "missing")
    configuration = endpoint["EndpointConfigName"]
    variants = sagemaker.describe_endpoint_config(EndpointConfigName=configuration)["ProductionVariants"]
    live = set()
    for variant in variants:
        container = sagemaker.describe_model(ModelName=variant["ModelName"])["PrimaryContainer"]
        live.add(_short(container["ModelDataSource"]["S3DataSource"]["S3Uri"], bucket, artifact))
    state: State = "ok" if live == {wanted} else "differs"
    if endpoint["EndpointStatus"] != "InService":
        state = "failed" if endpoint["EndpointStatus"] in ("Failed", "UpdateRollbackFailed") else "not ready"
    by = f"{configuration}, {endpoint['EndpointStatus']}"
    return Row("gpu", artifact.name, wanted, ", ".join(sorted(live)), state, by)


def _services(services: Services, stack: str) -> dict[str, list[tuple[Any, Any]]]:
    """Return the services of a stack with their task definitions, by the artifact that each serves."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for arn in _resources(services.cloudformation, stack, "AWS::ECS::Service"):
        cluster = arn.split("/")[-2]
        [service] = services.ecs.describe_services(cluster=cluster, services=[arn])["services"]
        told = services.ecs.describe_task_definition(taskDefinition=service["taskDefinition"])["taskDefinition"]
        command: list[str] = next((c["command"] for c in told["containerDefinitions"] if c["name"] == "serve"), [])
        if "--artifact" in command:
            found.setdefault(command[command.index("--artifact") + 1], []).append((service, told))
    return found


def _resources(cloudformation: Any, stack: str, kind: str) -> Iterator[str]:
    try:
        pages = list(cloudformation.get_paginator("list_stack_resources").paginate(StackName=stack))
    except ClientError as fault:
        if "does not exist" not in str(fault):
            raise
        return
    for page in pages:
        for found in page["StackResourceSummaries"]:
            if found["ResourceType"] == kind:
                yield found["PhysicalResourceId"]


def _service(
    tasks: dict[str, list[tuple[Any, Any]]], place: str, artifact: Artifact, bucket: str, image: str | None
) -> Iterator[Row]:
    wanted = artifact.digest[:DIGITS]
    if artifact.name not in tasks:
        yield Row(place, artifact.name, wanted, "", "missing")
    # where machines of your own serve it too there are two
    for service, told in tasks.get(artifact.name, ()):
        yield _tasks(service, told, place, artifact, bucket, image)


def _tasks(service: Any, told: Any, place: str, artifact: Artifact, bucket: str, image: str | None) -> Row:
    wanted = artifact.digest[:DIGITS]
    containers = {container["name"]: container for container in told["containerDefinitions"]}
    live = _short(next(w for w in containers["fetch"]["command"] if w.startswith("s3://")), bucket, artifact)
    state: State = "ok" if live == wanted else "differs"
    if image is not None and not containers["serve"]["image"].endswith(image):
        state, live = "differs", f"{live}, image {containers['serve']['image'].rpartition('@')[2]}"
    primary = next(one for one in service["deployments"] if one["status"] == "PRIMARY")
    rolled = primary.get("rolloutState", "COMPLETED")
    if rolled != "COMPLETED" or service["runningCount"] < service["desiredCount"]:
        state = "failed" if rolled == "FAILED" else "not ready" if state == "ok" else state
    by = f"{service['taskDefinition'].rpartition('/')[2]}, {service['runningCount']} of {service['desiredCount']}"
    return Row(place, artifact.name, wanted, live, state, by)


def _edge(clients: devices.Clients, env: Environment, release: Release) -> list[Row]:
    rows, standing = [], devices.status(clients, env)
    for label, group in devices.groups(env.edge).items():
        arn = target(group, env.account, env.region)
        latest = clients.greengrass.list_deployments(targetArn=arn, historyFilter="LATEST_ONLY")["deployments"]
        there: dict[str, Any] = {}
        state, by = "", ""
        for entry in latest:
            found = clients.greengrass.get_deployment(deploymentId=entry["deploymentId"])
            there, state, by = found.get("components", {}), found["deploymentStatus"], entry["deploymentId"][:8]
        for artifact in edge_artifacts(release):
            name, version = component(artifact)
            live = there.get(name, {}).get("componentVersion", "")
            verdict: State = "ok" if live == version else "differs" if live else "missing"
            if verdict == "ok" and state in ("CANCELED", "FAILED"):
                verdict = "failed"
            rows.append(Row(f"edge {label}", artifact.name, version, live, verdict, f"{by}, {state}" if by else ""))
        counts = standing[label]["devices"]
        # a device that is silent may be switched off; one that failed or serves another model says so itself
        told: State = "failed" if counts["failed"] else "not ready" if counts["behind"] else "ok"
        said = ", ".join(f"{count} {standing}" for standing, count in counts.items() if count)
        rows.append(Row(f"edge {label}", "devices", "in step", said or "none", told))
    return rows
