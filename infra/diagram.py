"""Draw the architecture from templates: Mermaid's text, with a box a stack and an arrow from what uses to what is used."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Template = Mapping[str, Any]

SHOWN = {
    "AWS::ApiGatewayV2::Api": "HTTP API",
    "AWS::ApiGatewayV2::VpcLink": "VPC link",
    "AWS::Budgets::Budget": "budget",
    "AWS::CloudWatch::Dashboard": "dashboard",
    "AWS::CodeBuild::Project": "build",
    "AWS::CodePipeline::Pipeline": "pipeline",
    "AWS::DirectConnect::DirectConnectGateway": "Direct Connect",
    "AWS::EC2::VPC": "VPC",
    "AWS::EC2::VPCEndpoint": "VPC endpoint",
    "AWS::EC2::VPNConnection": "VPN connection",
    "AWS::EC2::VPNGateway": "VPN gateway",
    "AWS::ECS::Cluster": "ECS cluster",
    "AWS::ECS::Service": "ECS service",
    "AWS::ElasticLoadBalancingV2::LoadBalancer": "load balancer",
    "AWS::GreengrassV2::ComponentVersion": "component",
    "AWS::GreengrassV2::Deployment": "deployment",
    "AWS::IoT::ThingGroup": "thing group",
    "AWS::KMS::Key": "key",
    "AWS::KinesisFirehose::DeliveryStream": "Firehose",
    "AWS::Route53Resolver::ResolverEndpoint": "resolver",
    "AWS::S3::Bucket": "bucket",
    "AWS::SageMaker::Endpoint": "SageMaker endpoint",
    "AWS::SageMaker::Model": "SageMaker model",
    "AWS::Scheduler::Schedule": "schedule",
    "AWS::SNS::Topic": "topic",
    "AWS::StepFunctions::StateMachine": "state machine",
    "AWS::WAFv2::WebACL": "WAF",
}
"""What is drawn. Roles, groups, rules and alarms are left to the tables: an arrow goes through them to what they serve."""

# nearly everything lies in it: its arrows would cover the others
_NO_ARROWS_TO = {"AWS::EC2::VPC", "AWS::KMS::Key"}
# what only joins others: an arrow from the first of them to the rest
_JOINS = {"AWS::ApiGatewayV2::Integration": "AWS::ApiGatewayV2::Api"}
# names that are plain text, so that others tell them without a reference
_NAMES = ("BucketName", "DeliveryStreamName", "EndpointName")


def diagram(templates: Mapping[str, Template]) -> str:
    """Return a Mermaid flowchart of the templates of an environment, given by the ids of their stacks."""
    kinds = {(s, n): r["Type"] for s, template in templates.items() for n, r in template["Resources"].items()}
    named = {
        resource["Properties"][key]: (stack, name)
        for stack, template in templates.items()
        for name, resource in template["Resources"].items()
        for key in _NAMES
        if isinstance(resource.get("Properties", {}).get(key), str)
    }
    used = {
        (stack, name): set(uses(templates, stack, resource, named)) - {(stack, name)}
        for stack, template in templates.items()
        for name, resource in template["Resources"].items()
    }
    for place, others in list(used.items()):
        for first in [other for other in others if kinds.get(other) == _JOINS.get(kinds[place], "")]:
            used[first] |= others - {first}
    lines = ["flowchart LR"]
    for stack, template in templates.items():
        drawn = [
            (f"{stack}_{name}", f"{SHOWN[resource['Type']]}<br>{path(name, resource)}")
            for name, resource in template["Resources"].items()
            if resource["Type"] in SHOWN
        ]
        if drawn:
            lines += [f"  subgraph {stack}", *(f'    {name}["{label}"]' for name, label in drawn), "  end"]
    for place in used:
        if kinds[place] in SHOWN:
            reached = sorted(_reach(place, used, kinds))
            lines += [f"  {'_'.join(place)} --> {'_'.join(other)}" for other in reached]
    return "\n".join(lines)


def path(name: str, resource: Mapping[str, Any]) -> str:
    """Return the construct's path within its stack, as search/Endpoint, or what the logical id tells of it."""
    told: str = resource.get("Metadata", {}).get("aws:cdk:path", "")
    parts = [part for part in told.split("/")[2:] if part not in ("Resource", "Default")]
    return "/".join(parts) or readable(name)


def readable(name: str) -> str:
    """Return a logical id without the digits of a hash that the CDK puts at its end."""
    return re.sub(r"(?<=.)[0-9A-F]{8}$", "", name)


def _reach(
    place: tuple[str, str], used: Mapping[tuple[str, str], set[tuple[str, str]]], kinds: Mapping[tuple[str, str], str]
) -> set[tuple[str, str]]:
    """Return what is drawn and used by a resource, itself or by way of what is not drawn."""
    found, seen, left = set(), {place}, list(used[place])
    while left:
        other = left.pop()
        if other in seen or other not in used:
            continue
        seen.add(other)
        if kinds[other] not in SHOWN:
            left += used[other]
        elif kinds[other] not in _NO_ARROWS_TO:
            found.add(other)
    return found


def uses(
    templates: Mapping[str, Template], stack: str, value: Any, named: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield the resources that a part of a template refers to: in its own stack, by another's export, or by name."""
    if isinstance(value, list):
        for item in value:
            yield from uses(templates, stack, item, named)
    elif isinstance(value, str):
        yield from (place for name, place in named.items() if name in value)
    elif isinstance(value, dict):
        if isinstance(value.get("Ref"), str):
            yield stack, value["Ref"]
        elif "Fn::GetAtt" in value:
            yield stack, value["Fn::GetAtt"][0]
        elif "Fn::ImportValue" in value:
            yield from _exporter(templates, str(value["Fn::ImportValue"]))
        else:
            for item in value.values():
                yield from uses(templates, stack, item, named)


def _exporter(templates: Mapping[str, Template], export: str) -> Iterator[tuple[str, str]]:
    for stack, template in templates.items():
        for output in template.get("Outputs", {}).values():
            if output.get("Export", {}).get("Name") == export:
                yield from uses(templates, stack, output["Value"], {})
