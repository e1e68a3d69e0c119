"""The private network: isolated subnets, the endpoints that are the only way out, and who may talk to whom."""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.principals import own_service
from infra.storage import StorageStack
from models.config import Environment, Vpc
from models.release import Release, ShipyardError

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

# What is allowed through an interface endpoint, by service and whoever deploys what needs it. S3 decrypts on its own side,
# so no task calls KMS. An endpoint without actions here has no policy of its own: its service knows none.
PULL = (
    "ecr:BatchCheckLayerAvailability",
    "ecr:BatchGetImage",
    "ecr:GetAuthorizationToken",
    "ecr:GetDownloadUrlForLayer",
)
TASKS = {"ecr.api": PULL, "ecr.dkr": PULL, "logs": ("logs:CreateLogStream", "logs:PutLogEvents")}
MACHINES: dict[str, tuple[str, ...]] = {"ecs": (), "ecs-agent": (), "ecs-telemetry": ()}
GATEWAY = {
    "kinesis-firehose": ("firehose:PutRecord", "firehose:PutRecordBatch"),
    "sagemaker.runtime": ("sagemaker:InvokeEndpoint",),
}


def interface_endpoints(settings: Environment, release: Release) -> dict[str, tuple[str, ...]]:
    """Return the services that what is deployed calls from inside the VPC, with the actions that it calls."""
    needed: dict[str, tuple[str, ...]] = {}
    if release.of("image-context") or release.of("gateway") or settings.cpu.job:
        needed |= TASKS
        if settings.cpu.instance_type is not None:
            needed |= MACHINES
    if release.of("gateway"):
        needed |= GATEWAY
    return dict(sorted(needed.items()))


class NetworkStack(cdk.Stack):
    """Hold a VPC without internet gateway and NAT, or what an existing VPC lacks."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: Environment,
        release: Release,
        storage: StorageStack,
    ) -> None:
        """Make the VPC with the endpoints that the release's services need.

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
        self.vpc = self._existing(settings.vpc) if settings.vpc else self._own(settings, storage)
        self.route_tables = [subnet.route_table.route_table_id for subnet in self.vpc.isolated_subnets]
        self.clients = closed_group(
            self, "Clients", vpc=self.vpc, description="Whoever may call the private services joins this group"
        )
        group = closed_group(self, "Endpoints", vpc=self.vpc, description="Interface endpoints")
        self.endpoints: ec2.IConnectable = group
        """Where the services' calls of AWS go to."""
        if settings.vpc is not None:
            # endpoints that were there are behind groups of their own, which have to let the VPC in as ours does
            self.endpoints = ec2.Peer.ipv4(settings.cidr)
            group.add_ingress_rule(self.endpoints, ec2.Port.tcp(443), "The VPC")
        self.s3 = ec2.Peer.prefix_list(S3_PREFIX_LISTS[settings.region])

        there = settings.vpc.endpoints if settings.vpc else ()
        if "s3" not in there:
            self._s3_gateway(settings.region, storage)
        for service, actions in interface_endpoints(settings, release).items():
            if service in there:
                continue
            endpoint = ec2.InterfaceVpcEndpoint(
                self,
                _construct_id(service),
                vpc=self.vpc,
                service=ec2.InterfaceVpcEndpointAwsService(service),
                subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
                security_groups=[group],
                open=False,
            )
            if actions:
                endpoint.add_to_policy(
                    iam.PolicyStatement(
                        principals=[iam.AnyPrincipal()],
                        actions=list(actions),
                        resources=["*"],  # roles say which; nobody of another account gets through
                        conditions={"StringEquals": {"aws:PrincipalAccount": self.account}},
                    )
                )

    def _own(self, settings: Environment, storage: StorageStack) -> ec2.Vpc:
        vpc = ec2.Vpc(
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
        group = logs.LogGroup(self, "FlowLogGroup", encryption_key=storage.key, retention=logs.RetentionDays.ONE_MONTH)
        role = iam.Role(self, "FlowLogRole", assumed_by=own_service(self, "vpc-flow-logs.amazonaws.com"))
        vpc.add_flow_log("FlowLog", destination=ec2.FlowLogDestination.to_cloud_watch_logs(group, role))
        return vpc

    def _existing(self, settings: Vpc) -> ec2.IVpc:
        """Return the customer's VPC, whose flow logs are the customer's too."""
        return ec2.Vpc.from_vpc_attributes(
            self,
            "Vpc",
            vpc_id=settings.id,
            availability_zones=self._zones,
            isolated_subnet_ids=list(settings.subnets),
            isolated_subnet_route_table_ids=list(settings.route_tables),
        )

    def _s3_gateway(self, region: str, storage: StorageStack) -> None:
        gateway = ec2.GatewayVpcEndpoint(self, "S3", vpc=self.vpc, service=ec2.GatewayVpcEndpointAwsService.S3)
        # an endpoint policy bounds what anyone in the VPC can reach; roles say who may reach it
        buckets = (storage.bucket, storage.data)
        gateway.add_to_policy(
            iam.PolicyStatement(
                principals=[iam.AnyPrincipal()],
                actions=["s3:GetObject", "s3:ListBucket"],
                resources=[arn for bucket in buckets for arn in (bucket.bucket_arn, bucket.arn_for_objects("*"))],
            )
        )
        gateway.add_to_policy(
            iam.PolicyStatement(
                principals=[iam.AnyPrincipal()],
                actions=["s3:PutObject", "s3:AbortMultipartUpload"],
                resources=[storage.data.arn_for_objects("*")],
            )
        )
        gateway.add_to_policy(
            iam.PolicyStatement(
                principals=[iam.AnyPrincipal()],
                actions=["s3:GetObject"],
                # where ECR keeps the layers of images
                resources=[f"arn:aws:s3:::prod-{region}-starport-layer-bucket/*"],
            )
        )

    @property
    def availability_zones(self) -> list[str]:
        """Return the zones of fleet.toml: a VPC compares its own with these, which would else be looked up in AWS."""
        return self._zones


def closed_group(scope: Construct, construct_id: str, *, vpc: ec2.IVpc, description: str) -> ec2.SecurityGroup:
    """Return a security group that lets nothing in or out until a rule is added to it."""
    group = ec2.SecurityGroup(
        scope, construct_id, vpc=vpc, description=description, allow_all_outbound=False, disable_inline_rules=True
    )
    resource = group.node.default_child
    assert isinstance(resource, ec2.CfnSecurityGroup)
    # EC2 lets a group without outbound rules of its own send anything anywhere. CDK writes a rule that no packet meets
    # to prevent this, but as a resource beside the group, and takes it away again when another rule is added.
    for rule in group.node.find_all():
        if isinstance(rule, ec2.CfnSecurityGroupEgress):
            group.node.try_remove_child(rule.node.id)
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


def _construct_id(service: str) -> str:
    """Return an id as "EcrApi" for a service as "ecr.api"."""
    return service.replace("-", " ").replace(".", " ").title().replace(" ", "")
