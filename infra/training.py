"""Where training jobs run: their role, their security group, and what a person or workflow needs to start one."""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.network import NetworkStack, closed_group
from infra.principals import own_service
from infra.storage import StorageStack
from models.config import Fleet

PREFIX = "training/"  # of the data bucket; shipyard/remote/plan.py writes below it
WRITTEN = (f"{PREFIX}jobs/", f"{PREFIX}checkpoints/")
GROUP = "/aws/sagemaker/TrainingJobs"
SERVICE = "sagemaker.amazonaws.com"


class TrainingStack(cdk.Stack):
    """Let jobs reach S3 and nothing else, as a role that reads inputs and writes outputs and checkpoints."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        fleet: Fleet,
        name: str,
        image: str,
        own_role: bool,
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make the group and the policy; the role too, unless the environment has one of its own."""
        super().__init__(scope, construct_id)
        self._storage = storage
        prefix = f"{fleet.project.name}-{name.replace('_', '-')}"
        group = closed_group(self, "Jobs", vpc=network.vpc, description="Training jobs")
        group.add_egress_rule(network.s3, ec2.Port.tcp(443), "Inputs, outputs and checkpoints")
        subnets = [subnet.subnet_id for subnet in network.vpc.isolated_subnets]
        if own_role:
            role = iam.Role(
                self,
                "Role",
                # fixed, for the plan of a job knows the role by its name alone
                role_name=f"{prefix}-training",
                description="Training jobs",
                assumed_by=own_service(self, SERVICE),
                inline_policies={
                    "training": iam.PolicyDocument(
                        statements=[*self._data(), *self._machine(image), *self._network(network.vpc, group, subnets)]
                    )
                },
            )
            acknowledge(
                role, WILDCARD, "Names of inputs, jobs, log streams and interfaces are not known here; tokens, metrics "
                "and what describes a network know no resource.",
            )  # fmt: skip
        policy = iam.ManagedPolicy(
            self,
            "Start",
            managed_policy_name=f"{prefix}-train",
            description="Starts training jobs, follows them and brings their output back",
            document=iam.PolicyDocument(statements=self._start(prefix, fleet.training_role(name))),
        )
        acknowledge(
            policy, WILDCARD, "All jobs of this environment and what they left; a list of jobs knows no resource."
        )
        cdk.CfnOutput(self, "Subnets", value=cdk.Fn.join(",", subnets))
        cdk.CfnOutput(self, "SecurityGroup", value=group.security_group_id)
        cdk.CfnOutput(self, "KeyArn", value=storage.key.key_arn)
        cdk.CfnOutput(self, "StartPolicyArn", value=policy.managed_policy_arn)

    def _data(self) -> list[iam.PolicyStatement]:
        """Return what a job needs of the bucket and the key (SageMaker developer guide, "CreateTrainingJob API")."""
        key = self._storage.key.key_arn
        return [
            *self._storage.data_access(reads=(PREFIX,), writes=WRITTEN),
            iam.PolicyStatement(actions=["kms:DescribeKey", "kms:Encrypt"], resources=[key]),
            iam.PolicyStatement(
                actions=["kms:CreateGrant"], resources=[key],
                conditions={"Bool": {"kms:GrantIsForAWSResource": "true"}},  # the disk
            ),
        ]  # fmt: skip

    def _machine(self, image: str) -> list[iam.PolicyStatement]:
        """Return what pulls the image and writes log and metrics."""
        repository = image.partition("@")[0]
        log = self._arn("logs", "log-group", GROUP, cdk.ArnFormat.COLON_RESOURCE_NAME)
        return [
            iam.PolicyStatement(
                actions=["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
                resources=[self._arn("ecr", "repository", repository)],
            ),
            iam.PolicyStatement(actions=["ecr:GetAuthorizationToken"], resources=["*"]),
            iam.PolicyStatement(
                actions=["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
                resources=[log, f"{log}:*"],
            ),
            iam.PolicyStatement(
                actions=["cloudwatch:PutMetricData"], resources=["*"],
                conditions={"StringEquals": {"cloudwatch:namespace": GROUP}},
            ),
        ]  # fmt: skip

    def _network(self, vpc: ec2.IVpc, group: ec2.SecurityGroup, subnets: list[str]) -> list[iam.PolicyStatement]:
        """Return what places a job into the VPC: interfaces in these subnets, with this group."""
        interfaces = self._arn("ec2", "network-interface", "*")
        here = {"ArnEquals": {"ec2:Vpc": self._arn("ec2", "vpc", vpc.vpc_id)}}
        return [
            iam.PolicyStatement(
                actions=["ec2:CreateNetworkInterface"],
                resources=[
                    interfaces,
                    self._arn("ec2", "security-group", group.security_group_id),
                    *(self._arn("ec2", "subnet", subnet) for subnet in subnets),
                ],
            ),
            iam.PolicyStatement(
                actions=["ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface"],
                resources=[interfaces],
                conditions=here,
            ),
            iam.PolicyStatement(
                actions=[
                    "ec2:DeleteNetworkInterfacePermission", "ec2:DescribeDhcpOptions", "ec2:DescribeNetworkInterfaces",
                    "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets", "ec2:DescribeVpcs",
                ],
                resources=["*"],
                conditions={"StringEquals": {"aws:RequestedRegion": self.region}},
            ),
        ]  # fmt: skip

    def _start(self, prefix: str, role: str) -> list[iam.PolicyStatement]:
        """Return what `shipyard finetune --on sagemaker` calls."""
        jobs = self._arn("sagemaker", "training-job", f"{prefix}-*")
        bucket = self._storage.data.bucket_arn
        return [
            iam.PolicyStatement(
                actions=["sagemaker:CreateTrainingJob"],
                resources=[jobs],
                # no job without isolation, whoever writes the request
                conditions={
                    "Bool": {"sagemaker:NetworkIsolation": "true"},
                    "ArnEquals": {"sagemaker:VolumeKmsKey": self._storage.key.key_arn},
                },
            ),
            iam.PolicyStatement(
                actions=["sagemaker:AddTags", "sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob"],
                resources=[jobs],
            ),
            iam.PolicyStatement(actions=["sagemaker:ListTrainingJobs"], resources=["*"]),
            iam.PolicyStatement(
                actions=["iam:PassRole"],
                resources=[role],
                conditions={"StringEquals": {"iam:PassedToService": SERVICE}},
            ),
            iam.PolicyStatement(
                actions=["logs:DescribeLogStreams", "logs:GetLogEvents"],
                resources=[f"{self._arn('logs', 'log-group', GROUP, cdk.ArnFormat.COLON_RESOURCE_NAME)}:*"],
            ),
            *self._storage.data_access(reads=(PREFIX,), writes=(PREFIX,)),
            # without it S3 answers 403 and not 404 for what is not there
            iam.PolicyStatement(actions=["s3:ListBucket", "s3:ListBucketMultipartUploads"], resources=[bucket]),
            iam.PolicyStatement(
                actions=["s3:ListMultipartUploadParts"], resources=[self._storage.data.arn_for_objects(f"{PREFIX}*")]
            ),
        ]

    def _arn(
        self, service: str, resource: str, name: str, form: cdk.ArnFormat = cdk.ArnFormat.SLASH_RESOURCE_NAME
    ) -> str:
        return self.format_arn(service=service, resource=resource, resource_name=name, arn_format=form)
