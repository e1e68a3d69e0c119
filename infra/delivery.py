"""Who may change an environment from outside: GitHub workflows by OIDC, or a pipeline, each by a role for what it does."""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.roles import begins, builders, keys, piped
from infra.storage import StorageStack
from models.config import DeliverySettings, EdgeSettings, Fleet

ISSUER = "token.actions.githubusercontent.com"
QUALIFIER = "hnb659fds"  # of `cdk bootstrap`, where no other is given
ARTIFACTS = "artifacts/*"
REGISTER = "delivery/*"  # lock, records and state of a delivery, each written on a condition
DELTAS = (
    "deltas/*"  # from one model of the edge to the next; a device holds what it makes of them to the model's digest
)


class DeliveryStack(cdk.Stack):
    """Wire GitHub's identity provider and three roles: release uploads, plan reads, deploy acts through the CDK's roles."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: DeliverySettings,
        fleet: Fleet,
        name: str,
        storage: StorageStack,
    ) -> None:
        """Make provider and roles of the environment `name`."""
        super().__init__(scope, construct_id)
        provider = iam.OidcProviderNative(self, "GitHub", url=f"https://{ISSUER}", client_ids=["sts.amazonaws.com"])
        here = f"repo:{settings.repository}:environment:{name}"
        prefix = begins(fleet, name)

        # named by a condition: a role that is not there yet cannot be a principal
        built = [
            iam.AccountPrincipal(arn.split(":")[4]).with_conditions({"ArnEquals": {"aws:PrincipalArn": arn}})
            for arn in builders(fleet, name)
        ]

        def role(
            construct_id: str, subject: str, statements: list[iam.PolicyStatement], what: str, *more: iam.IPrincipal,
            hours: int = 1,
        ) -> None:  # fmt: skip
            github = iam.WebIdentityPrincipal(
                provider.oidc_provider_arn,
                {"StringEquals": {f"{ISSUER}:aud": "sts.amazonaws.com", f"{ISSUER}:sub": subject}},
            )
            made = iam.Role(
                self,
                construct_id,
                role_name=f"{prefix}-{construct_id.lower()}",
                description=what,
                max_session_duration=cdk.Duration.hours(hours),
                assumed_by=iam.CompositePrincipal(github, *more) if more else github,
                inline_policies={construct_id.lower(): iam.PolicyDocument(statements=statements)},
            )
            acknowledge(
                made,
                WILDCARD,
                "All artifacts, stacks, deployments and components: their digests and ids are not known here.",
            )
            cdk.CfnOutput(self, f"{construct_id}RoleArn", value=made.role_arn)

        uploads = self._upload(settings, fleet, storage)
        role("Release", here, [*uploads, *_sign(fleet, name)], "Uploads artifacts, or copies those of before", *built)
        role(
            "Plan",
            f"repo:{settings.repository}:pull_request",
            [self._assume("lookup"), *self._read_stacks(prefix)],
            "Compares templates with what is deployed",
        )
        role(
            "Deploy",
            here,
            [
                self._assume("deploy", "file-publishing", "image-publishing", "lookup"),
                *self._read_stacks(prefix),
                *self._see(),
                *self._roll_out(fleet.env[name].edge, storage),
            ],
            "Deploys stacks by the roles of cdk bootstrap, rolls out to devices, and sees what is live",
            *built,
            # a rollout waits for each place in turn, and takes its credentials once
            hours=4,
        )

    def _upload(self, settings: DeliverySettings, fleet: Fleet, storage: StorageStack) -> list[iam.PolicyStatement]:
        """Return what writes artifacts and never deletes one, and reads those of the environment before."""
        statements = [
            iam.PolicyStatement(
                actions=["s3:AbortMultipartUpload", "s3:GetObject", "s3:ListMultipartUploadParts", "s3:PutObject"],
                resources=[storage.bucket.arn_for_objects(ARTIFACTS), storage.bucket.arn_for_objects(REGISTER)],
            ),
            iam.PolicyStatement(
                actions=["s3:ListBucket", "s3:ListBucketMultipartUploads"], resources=[storage.bucket.bucket_arn]
            ),
            _by_way_of_s3(storage, self.region),
        ]
        if settings.promote_from is not None:
            source = fleet.env[settings.promote_from]
            statements += [
                iam.PolicyStatement(
                    actions=["s3:GetObject"],
                    resources=[f"arn:aws:s3:::{fleet.bucket(settings.promote_from)}/{ARTIFACTS}"],
                ),
                iam.PolicyStatement(
                    actions=["kms:Decrypt"],
                    # the id of that account's key is not known here; its own policy names this role
                    resources=[f"arn:aws:kms:{source.region}:{source.account}:key/*"],
                    conditions={"StringEquals": {"kms:ViaService": f"s3.{source.region}.amazonaws.com"}},
                ),
            ]
        return statements

    def _see(self) -> list[iam.PolicyStatement]:
        """Return what tells which release an endpoint and a cluster run; their names are CloudFormation's."""
        kinds = ("endpoint", "endpoint-config", "model")
        return [
            iam.PolicyStatement(
                actions=["sagemaker:DescribeEndpoint", "sagemaker:DescribeEndpointConfig", "sagemaker:DescribeModel"],
                resources=[self._arn("sagemaker", f"{kind}/*") for kind in kinds],
            ),
            iam.PolicyStatement(actions=["ecs:DescribeServices"], resources=[self._arn("ecs", "service/*")]),
            # the action knows no resource
            iam.PolicyStatement(actions=["ecs:DescribeTaskDefinition"], resources=["*"]),
        ]

    def _roll_out(self, edge: EdgeSettings, storage: StorageStack) -> list[iam.PolicyStatement]:
        """Return what publishes components, deploys them to this environment's groups, and keeps a rollout's state."""
        groups = [self._arn("iot", f"thinggroup/{edge.thing_group}{end}") for end in ("", "-canary")]
        things = self._arn("iot", f"thing/{edge.thing_group}-*")
        return [
            iam.PolicyStatement(
                actions=[
                    "greengrass:CreateComponentVersion",
                    "greengrass:DescribeComponent",
                    "greengrass:GetComponent",
                ],
                resources=[self._arn("greengrass", "components:*")],
            ),
            iam.PolicyStatement(
                actions=[
                    "greengrass:CancelDeployment",
                    "greengrass:CreateDeployment",
                    "greengrass:GetDeployment",
                    "greengrass:ListDeployments",
                ],
                resources=[self._arn("greengrass", "deployments:*"), *groups],
            ),
            # a deployment to a group is a job of IoT, made in the caller's name
            iam.PolicyStatement(
                actions=["iot:CancelJob", "iot:CreateJob", "iot:DescribeJob", "iot:UpdateJob"],
                resources=[self._arn("iot", "job/*"), *groups],
            ),
            iam.PolicyStatement(actions=["iot:DescribeThingGroup", "iot:ListThingsInThingGroup"], resources=groups),
            iam.PolicyStatement(actions=["iot:GetThingShadow", "iot:UpdateThingShadow"], resources=[things]),
            iam.PolicyStatement(
                actions=["s3:GetObject"],
                resources=[storage.bucket.arn_for_objects(path) for path in (ARTIFACTS, DELTAS, REGISTER)],
            ),
            iam.PolicyStatement(actions=["s3:PutObject"], resources=[storage.bucket.arn_for_objects(REGISTER)]),
            # a delta of more than 8 MiB goes up in parts
            iam.PolicyStatement(
                actions=["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:PutObject"],
                resources=[storage.bucket.arn_for_objects(DELTAS)],
            ),
            iam.PolicyStatement(
                actions=["s3:ListBucket", "s3:ListBucketMultipartUploads"], resources=[storage.bucket.bucket_arn]
            ),
            _by_way_of_s3(storage, self.region),
        ]

    def _arn(self, service: str, rest: str) -> str:
        return f"arn:{self.partition}:{service}:{self.region}:{self.account}:{rest}"

    def _assume(self, *names: str) -> iam.PolicyStatement:
        return iam.PolicyStatement(
            actions=["sts:AssumeRole"],
            resources=[
                f"arn:aws:iam::{self.account}:role/cdk-{QUALIFIER}-{name}-role-{self.account}-{self.region}"
                for name in names
            ],
        )

    def _read_stacks(self, prefix: str) -> list[iam.PolicyStatement]:
        stacks = self.format_arn(service="cloudformation", resource="stack", resource_name=f"{prefix}-*/*")
        return [
            iam.PolicyStatement(
                actions=[
                    "cloudformation:DescribeStacks",
                    "cloudformation:GetTemplate",
                    "cloudformation:ListStackResources",
                ],
                resources=[stacks],
            )
        ]


def _sign(fleet: Fleet, name: str) -> list[iam.PolicyStatement]:
    """Return what signs with the keys that the fleet names; their own policies have to name the role besides.

    A key that a variable of GitHub alone names is not known here.
    """
    known = sorted({arn for first in piped(fleet, name) for arn in keys(fleet, first, name).values()})
    return [iam.PolicyStatement(actions=["kms:GetPublicKey", "kms:Sign"], resources=known)] if known else []


def _by_way_of_s3(storage: StorageStack, region: str) -> iam.PolicyStatement:
    return iam.PolicyStatement(
        actions=["kms:Decrypt", "kms:GenerateDataKey"],
        resources=[storage.key.key_arn],
        conditions={"StringEquals": {"kms:ViaService": f"s3.{region}.amazonaws.com"}},
    )
