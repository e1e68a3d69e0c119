"""The public-cloud target: a SageMaker GPU endpoint with Triton for each of its artifacts."""

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra.network import NetworkStack, closed_group
from infra.storage import StorageStack
from infra.template import TritonTemplate, read_template
from models.config import GpuSettings
from models.release import Artifact, Release, ShipyardError, artifact_key

TRITON_REPOSITORY = "sagemaker-tritonserver"
TRITON_TAG = "26.05-py3"
# Amazon's account by region, as `image_uris.retrieve` of the SageMaker SDK has it; GovCloud and China have no image.
TRITON_ACCOUNTS = {
    "ap-northeast-1": "763104351884",
    "ap-northeast-2": "763104351884",
    "ap-south-1": "763104351884",
    "ap-southeast-1": "763104351884",
    "ap-southeast-2": "763104351884",
    "ca-central-1": "763104351884",
    "eu-central-1": "763104351884",
    "eu-north-1": "763104351884",
    "eu-west-1": "763104351884",
    "eu-west-2": "763104351884",
    "eu-west-3": "763104351884",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "sa-east-1": "763104351884",
    "us-east-1": "763104351884",
    "us-east-2": "763104351884",
    "us-west-1": "763104351884",
    "us-west-2": "763104351884",
}

# A deployment compares variants by name, so the name stays for good.
VARIANT = "primary"
# Driver 580 with CUDA 13, which the image wants; the default of g5 is driver 470 with CUDA 11.4.
INFERENCE_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"


class GpuStack(cdk.Stack):
    """Wire one endpoint for each Triton artifact of a release."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: GpuSettings,
        release: Release,
        values: Mapping[str, str],
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make the endpoints; `values` fills the placeholders of templates."""
        super().__init__(scope, construct_id)
        for artifact in release.of("triton"):
            endpoint = TritonEndpoint(
                self,
                artifact.name,
                settings=settings,
                artifact=artifact,
                template=read_template(artifact, TritonTemplate, values),
                storage=storage,
                network=network,
            )
            cdk.CfnOutput(self, f"{artifact.name}-endpoint", value=endpoint.endpoint.attr_endpoint_name)
        cdk.CfnOutput(self, "Release", value=release.version)


class TritonEndpoint(Construct):
    """Serve one model repository.

    Model and EndpointConfig have no name of ours, and all of their properties are immutable: another artifact has
    another S3Uri, so CloudFormation replaces the Model, hence the EndpointConfig that refers to it, and then turns the
    Endpoint over to that. Its ids need no digest for this.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: GpuSettings,
        artifact: Artifact,
        template: TritonTemplate,
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make role, model, configuration and endpoint.

        Raises:
            ShipyardError: Amazon publishes no Triton image in the region.
        """
        super().__init__(scope, construct_id)
        group = closed_group(
            self, "SecurityGroup", vpc=network.vpc, description=f"SageMaker fetches the model of {artifact.name}"
        )
        group.add_egress_rule(network.s3, ec2.Port.tcp(443), "Model data from S3")
        model = sagemaker.CfnModel(
            self,
            "Model",
            execution_role_arn=_role(self, artifact, group, storage, network).role_arn,
            # the container has no network at all; SageMaker fetches the model through the VPC on its behalf
            enable_network_isolation=True,
            vpc_config=sagemaker.CfnModel.VpcConfigProperty(
                security_group_ids=[group.security_group_id],
                subnets=[subnet.subnet_id for subnet in network.vpc.isolated_subnets],
            ),
            primary_container=sagemaker.CfnModel.ContainerDefinitionProperty(
                image=_image(cdk.Stack.of(self)),
                environment=template.environment,
                model_data_source=sagemaker.CfnModel.ModelDataSourceProperty(
                    s3_data_source=sagemaker.CfnModel.S3DataSourceProperty(
                        s3_uri=f"s3://{storage.bucket_name}/{artifact.key}{template.model_data}",
                        s3_data_type="S3Prefix",
                        compression_type="None",
                    )
                ),
            ),
        )
        config = sagemaker.CfnEndpointConfig(
            self,
            "EndpointConfig",
            # No KmsKeyId: each instance type that fleet.toml allows (g4dn, g5, g6, g6e) has local NVMe storage, which
            # its own hardware encrypts, and CreateEndpointConfig fails where a key is given for such a type.
            production_variants=[
                sagemaker.CfnEndpointConfig.ProductionVariantProperty(
                    variant_name=VARIANT,
                    model_name=model.attr_model_name,
                    instance_type=settings.instance_type,
                    initial_instance_count=settings.instances,
                    initial_variant_weight=1,
                    inference_ami_version=INFERENCE_AMI,
                )
            ],
        )
        self.endpoint = sagemaker.CfnEndpoint(
            self,
            "Endpoint",
            endpoint_config_name=config.attr_endpoint_config_name,
            # a new model must not set back an instance count that was scaled since
            retain_all_variant_properties=True,
        )


def _image(stack: cdk.Stack) -> str:
    account = _image_account(stack.region)
    return f"{account}.dkr.ecr.{stack.region}.amazonaws.com/{TRITON_REPOSITORY}:{TRITON_TAG}"


def _image_account(region: str) -> str:
    if region not in TRITON_ACCOUNTS:
        raise ShipyardError(
            "gpu: no Triton image in this region",
            value=region,
            allowed=", ".join(TRITON_ACCOUNTS),
            mend="choose another region or add Amazon's account to TRITON_ACCOUNTS",
        )
    return TRITON_ACCOUNTS[region]


def _role(
    endpoint: Construct, artifact: Artifact, group: ec2.SecurityGroup, storage: StorageStack, network: NetworkStack
) -> iam.Role:
    """Return the role with which SageMaker fetches image and model (SageMaker developer guide, "CreateModel API").

    It may read every version of the artifact: until a deployment ends, or when it is rolled back, the fleet that runs
    the version before still starts instances.
    """
    stack = cdk.Stack.of(endpoint)
    versions = artifact_key(artifact.name, "*") + "*"

    def ec2_arns(resource: str, *names: str) -> list[str]:
        return [stack.format_arn(service="ec2", resource=resource, resource_name=name) for name in names]

    subnets = [subnet.subnet_id for subnet in network.vpc.isolated_subnets]
    interfaces = ec2_arns("network-interface", "*")
    statements = [
        *storage.reading(versions),
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
                    account=_image_account(stack.region),
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
    return iam.Role(
        endpoint,
        "Role",
        assumed_by=iam.ServicePrincipal(
            "sagemaker.amazonaws.com", conditions={"StringEquals": {"aws:SourceAccount": stack.account}}
        ),
        # inline, so that the role is never there without its policy when the model is created
        inline_policies={"serve": iam.PolicyDocument(statements=statements)},
    )
