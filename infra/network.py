"""The private network: isolated subnets, the endpoints that are the only way out, and who may talk to whom."""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.storage import StorageStack
from models.config import Environment
from models.release import ShipyardError

# AWS-managed and constant. CloudFormation has no attribute for them and a look-up would need credentials at synth.
S3_PREFIX_LISTS = {
    "ap-northeast-1": "pl-61a54008",
    "ap-northeast-2": "pl-78a54011",
    "ap-south-1": "pl-78a54011",
    "ap-southeast-1": "pl-6fa54006",
    "ap-southeast-2": "pl-6ca54005",
    "ca-central-1": "pl-7da54014",
    "eu-central-1": "pl-6ea54007",
    "eu-north-1": "pl-c3aa4faa",
    "eu-west-1": "pl-6da54004",
    "eu-west-2": "pl-7ca54015",
    "eu-west-3": "pl-23ad484a",
    "sa-east-1": "pl-6aa54003",
    "us-east-1": "pl-63a5400a",
    "us-east-2": "pl-7ba54012",
    "us-west-1": "pl-6ba54002",
    "us-west-2": "pl-68a54001",
}

# What Fargate calls to start a task in a subnet without internet. S3 decrypts on its own side, so no task calls KMS.
INTERFACE_ENDPOINTS = {
    "EcrApi": ec2.InterfaceVpcEndpointAwsService.ECR,
    "EcrDocker": ec2.InterfaceVpcEndpointAwsService.ECR_DOCKER,
    "Logs": ec2.InterfaceVpcEndpointAwsService.CLOUDWATCH_LOGS,
}


class NetworkStack(cdk.Stack):
    """Hold a VPC without internet gateway and NAT."""

    def __init__(self, scope: Construct, construct_id: str, *, settings: Environment, storage: StorageStack) -> None:
        """Make the VPC with its endpoints.

        Raises:
            ShipyardError: the prefix list of S3 is not known for the region.
        """
        super().__init__(scope, construct_id)
        self._zones = list(settings.zones)
        if settings.region not in S3_PREFIX_LISTS:
            raise ShipyardError(
                "network: region without a known S3 prefix list",
                value=settings.region,
                allowed=", ".join(S3_PREFIX_LISTS),
                mend="add the region to S3_PREFIX_LISTS (aws ec2 describe-managed-prefix-lists)",
            )
        self.vpc = ec2.Vpc(
            self,
            "Vpc",
            ip_addresses=ec2.IpAddresses.cidr(settings.cidr),
            availability_zones=self._zones,
            subnet_configuration=[
                ec2.SubnetConfiguration(name="isolated", subnet_type=ec2.SubnetType.PRIVATE_ISOLATED, cidr_mask=20)
            ],
            # to empty the default group would take a Lambda function; nothing is ever placed into it
            restrict_default_security_group=False,
        )
        self.vpc.add_flow_log(
            "FlowLog",
            destination=ec2.FlowLogDestination.to_cloud_watch_logs(
                logs.LogGroup(self, "FlowLogGroup", encryption_key=storage.key, retention=logs.RetentionDays.ONE_MONTH)
            ),
        )

        self.clients = closed_group(
            self, "Clients", vpc=self.vpc, description="Whoever may call the private services joins this group"
        )
        self.endpoints = closed_group(self, "Endpoints", vpc=self.vpc, description="Interface endpoints")
        self.s3 = ec2.Peer.prefix_list(S3_PREFIX_LISTS[settings.region])

        gateway = self.vpc.add_gateway_endpoint("S3", service=ec2.GatewayVpcEndpointAwsService.S3)
        # an endpoint policy bounds what anyone in the VPC can reach; roles say who may reach it
        gateway.add_to_policy(
            iam.PolicyStatement(
                principals=[iam.AnyPrincipal()],
                actions=["s3:GetObject", "s3:ListBucket"],
                resources=[storage.bucket.bucket_arn, storage.bucket.arn_for_objects("*")],
            )
        )
        gateway.add_to_policy(
            iam.PolicyStatement(
                principals=[iam.AnyPrincipal()],
                actions=["s3:GetObject"],
                # where ECR keeps the layers of images
                resources=[f"arn:aws:s3:::prod-{settings.region}-starport-layer-bucket/*"],
            )
        )
        for name, service in INTERFACE_ENDPOINTS.items():
            self.vpc.add_interface_endpoint(name, service=service, security_groups=[self.endpoints], open=False)

    @property
    def availability_zones(self) -> list[str]:
        """Return the zones of fleet.toml: a VPC compares its own with these, which would else be looked up in AWS."""
        return self._zones


def closed_group(scope: Construct, construct_id: str, *, vpc: ec2.IVpc, description: str) -> ec2.SecurityGroup:
    """Return a security group that lets nothing in or out until a rule is added to it."""
    group = ec2.SecurityGroup(scope, construct_id, vpc=vpc, description=description, allow_all_outbound=False)
    resource = group.node.default_child
    assert isinstance(resource, ec2.CfnSecurityGroup)
    # EC2 lets a group without outbound rules of its own send anything anywhere. CDK writes a rule that no packet meets
    # to prevent this, but takes it away again when rules are added as resources beside the group, as all of ours are.
    resource.add_property_override(
        "SecurityGroupEgress",
        [
            {
                "CidrIp": "255.255.255.255/32",
                "Description": "Disallow all traffic",
                "FromPort": 252,
                "IpProtocol": "icmp",
                "ToPort": 86,
            }
        ],
    )
    return group
