"""Who may take a role: a service of AWS, on behalf of the stack's own account alone."""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import IConstruct


def own_service(scope: IConstruct, name: str) -> iam.ServicePrincipal:
    """Return a service, as "s3.amazonaws.com", that another account cannot send here (IAM's confused deputy)."""
    account = cdk.Stack.of(scope).account
    return iam.ServicePrincipal(name, conditions={"StringEquals": {"aws:SourceAccount": account}})
