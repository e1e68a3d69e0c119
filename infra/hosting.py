"""What SageMaker needs to host a model: Amazon's Triton image, and the role that fetches image and model."""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.network import NetworkStack
from infra.principals import own_service
from infra.storage import CAPTURE, StorageStack
from models.config import TRITON_ACCOUNTS as TRITON_ACCOUNTS
from models.config import TRITON_REPOSITORY, triton_account
from models.release import Artifact, artifact_key


def hosting_role(
    endpoint: Construct,
    artifact: Artifact,
    *,
    group: ec2.ISecurityGroup,
    storage: StorageStack,
    network: NetworkStack,
    capture: bool,
) -> iam.Role:
    """Return the role with which SageMaker fetches image and model (SageMaker developer guide, "CreateModel API").

    With `capture` it also writes requests and answers to the data bucket. It may read every version of the artifact:
    until a deployment ends, or when it is rolled back, the fleet that runs the version before still starts instances.
    """
    stack = cdk.Stack.of(endpoint)
    versions = artifact_key(artifact.name, "*") + "*"

    def ec2_arns(resource: str, *names: str) -> list[str]:
        return [stack.format_arn(service="ec2", resource=resource, resource_name=name) for name in names]

    subnets = [subnet.subnet_id for subnet in network.vpc.isolated_subnets]
    interfaces = ec2_arns("network-interface", "*")
    statements = [
        *storage.reading(versions),
        *(storage.data_access(writes=(f"{CAPTURE}{artifact.name}/",)) if capture else ()),
        iam.PolicyStatement(
            actions=["s3:ListBucket"],
            resources=[storage.bucket.bucket_arn],
            conditions={"StringLike": {"s3:prefix": versions}},
        ),
        iam.PolicyStatement(
            actions=["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
            resources=[
                stack.format_arn(
                    service="ecr",
                    account=triton_account(stack.region),
                    resource="repository",
                    resource_name=TRITON_REPOSITORY,
                )
            ],
        ),
        iam.PolicyStatement(
            actions=["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
            resources=[
                stack.format_arn(
                    service="logs",
                    resource="log-group",
                    resource_name="/aws/sagemaker/Endpoints/*",
                    arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME,
                )
            ],
        ),
        iam.PolicyStatement(
            actions=["ec2:CreateNetworkInterface"],
            resources=interfaces + ec2_arns("subnet", *subnets) + ec2_arns("security-group", group.security_group_id),
        ),
        iam.PolicyStatement(
            actions=[
                "ec2:CreateNetworkInterfacePermission",
                "ec2:DeleteNetworkInterface",
                "ec2:DeleteNetworkInterfacePermission",
            ],
            resources=interfaces,
        ),
        # these actions know no resource, so "*" is the only one that they can be granted for
        iam.PolicyStatement(
            actions=[
                "ec2:DescribeDhcpOptions",
                "ec2:DescribeNetworkInterfaces",
                "ec2:DescribeSecurityGroups",
                "ec2:DescribeSubnets",
                "ec2:DescribeVpcs",
                "ecr:GetAuthorizationToken",
            ],
            resources=["*"],
        ),
        iam.PolicyStatement(
            actions=["cloudwatch:PutMetricData"],
            resources=["*"],
            conditions={"StringLike": {"cloudwatch:namespace": ["/aws/sagemaker/*", "AWS/SageMaker"]}},
        ),
    ]
    role = iam.Role(
        endpoint,
        "Role",
        assumed_by=own_service(endpoint, "sagemaker.amazonaws.com"),
        # inline, so that the role is never there without its policy when the model is created
        inline_policies={"serve": iam.PolicyDocument(statements=statements)},
    )
    acknowledge(
        role,
        WILDCARD,
        "Versions of this artifact, its captured requests, logs and interfaces have ids that are not known here; the "
        "actions on * know no resource.",
    )
    return role
