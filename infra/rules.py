"""Rules of our own for templates, where no public rule pack has one: SageMaker, ECS, logs, IoT and Greengrass."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.release import ShipyardError

Properties = Mapping[str, Any]

# What devices may do without a named resource: Amazon's own components lie in Amazon's account.
OPEN_DEVICE_ACTIONS = {
    "greengrass:GetComponentVersionArtifact",
    "greengrass:GetDeploymentConfiguration",
    "greengrass:ListThingGroupsForCoreDevice",
    "greengrass:ResolveComponentCandidates",
}


def check_templates(folder: Path) -> None:
    """Check every template below a folder of a synth.

    Raises:
        ShipyardError: a resource breaks a rule; the first one is told.
    """
    for path in sorted(folder.rglob("*.template.json")):
        for resource, fault in violations(json.loads(path.read_text(encoding="utf-8"))):
            raise ShipyardError(
                f"rule: {fault}",
                value=f"{path.name}: {resource}",
                mend="correct the stack; infra/rules.py has the rules",
            )


def violations(template: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the logical id of each resource that breaks a rule, and what is wrong with it."""
    for name, resource in template.get("Resources", {}).items():
        rule = RULES.get(resource["Type"])
        if rule is not None:
            yield from ((name, fault) for fault in rule(resource.get("Properties", {})))


def _model(properties: Properties) -> Iterator[str]:
    if properties.get("EnableNetworkIsolation") is not True:
        yield "a model's container has a network"
    if not properties.get("VpcConfig"):
        yield "a model is not fetched through the VPC"


def _endpoint_config(properties: Properties) -> Iterator[str]:
    capture = properties.get("DataCaptureConfig", {})
    if capture.get("EnableCapture") and "KmsKeyId" not in capture:
        yield "captured requests are not encrypted with the environment's key"
    if any("InferenceAmiVersion" not in variant for variant in properties["ProductionVariants"]):
        yield "a variant takes whatever driver is the default"


def _endpoint(properties: Properties) -> Iterator[str]:
    rollback = properties.get("DeploymentConfig", {}).get("AutoRollbackConfiguration", {})
    if len(rollback.get("Alarms", [])) < 2:
        yield "an update is not taken back by two alarms"
    if properties.get("RetainAllVariantProperties") is not True:
        yield "an update sets back what was scaled"


def _task(properties: Properties) -> Iterator[str]:
    if properties.get("NetworkMode") == "host":
        yield "a task has the network of its machine"
    for container in properties["ContainerDefinitions"]:
        image = json.dumps(container["Image"])
        if "@sha256:" not in image and "container-assets" not in image:
            yield "an image is not named by its digest"
        if container.get("User", "0").split(":")[0] in ("0", "root"):
            yield "a container runs as root"
        if container.get("Privileged") or container.get("ReadonlyRootFilesystem") is not True:
            yield "a container is privileged or may write to its image"
        if container.get("LinuxParameters", {}).get("Capabilities", {}).get("Drop") != ["ALL"]:
            yield "a container keeps capabilities"
        if "LogConfiguration" not in container:
            yield "a container's log is lost"


def _service(properties: Properties) -> Iterator[str]:
    breaker = properties.get("DeploymentConfiguration", {}).get("DeploymentCircuitBreaker", {})
    if not (breaker.get("Enable") and breaker.get("Rollback")):
        yield "a service's failed deployment is not taken back"
    place = properties.get("NetworkConfiguration", {}).get("AwsvpcConfiguration", {})
    if properties.get("LaunchType") != "EXTERNAL" and place.get("AssignPublicIp") != "DISABLED":
        yield "a service's tasks have public addresses"


def _log_group(properties: Properties) -> Iterator[str]:
    if "KmsKeyId" not in properties or "RetentionInDays" not in properties:
        yield "a log is kept for good or not encrypted with the environment's key"


def _device_policy(properties: Properties) -> Iterator[str]:
    for statement in properties["PolicyDocument"]["Statement"]:
        actions, resources = (
            value if isinstance(value, list) else [value] for value in (statement["Action"], statement["Resource"])
        )
        if any("*" in action for action in actions):
            yield "devices have a wildcard of actions"
        if "*" in resources and not set(actions) <= OPEN_DEVICE_ACTIONS:
            yield "devices have a wildcard of resources"


def _deployment(properties: Properties) -> Iterator[str]:
    if any("ComponentVersion" not in component for component in properties.get("Components", {}).values()):
        yield "a component is deployed in whatever version is the newest"
    if properties.get("DeploymentPolicies", {}).get("FailureHandlingPolicy") != "ROLLBACK":
        yield "devices do not go back when a deployment fails"


RULES: dict[str, Callable[[Properties], Iterator[str]]] = {
    "AWS::ECS::Service": _service,
    "AWS::ECS::TaskDefinition": _task,
    "AWS::GreengrassV2::Deployment": _deployment,
    "AWS::IoT::Policy": _device_policy,
    "AWS::Logs::LogGroup": _log_group,
    "AWS::SageMaker::Endpoint": _endpoint,
    "AWS::SageMaker::EndpointConfig": _endpoint_config,
    "AWS::SageMaker::Model": _model,
}
