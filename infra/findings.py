"""Findings of policy checks that are known and accepted, each with its reason, beside the resource."""

import aws_cdk as cdk
from constructs import IConstruct

WILDCARD = "AwsSolutions-IAM5"
ENVIRONMENT = "AwsSolutions-ECS2"


def acknowledge(construct: IConstruct, finding: str, reason: str) -> None:
    """Accept a finding of cdk-nag on a construct and what is below it."""
    cdk.Validations.of(construct).acknowledge(cdk.Acknowledgment(id=finding, reason=reason))
