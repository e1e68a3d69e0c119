"""Who may change an environment from outside: GitHub workflows by OIDC, each with a role for what it does."""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.storage import StorageStack
from models.config import DeliverySettings, Fleet

ISSUER = "token.actions.githubusercontent.com"
QUALIFIER = "hnb659fds"  # of `cdk bootstrap`, where no other is given
ARTIFACTS = "artifacts/*"
REGISTER = "delivery/*"  # lock, records and state of a delivery, each written on a condition


def release_role(fleet: Fleet, name: str) -> str:
    """Return the ARN of an environment's release role, which environments in other accounts know by its name."""
    return f"arn:aws:iam::{fleet.env[name].account}:role/{_prefix(fleet, name)}-release"


def promoters(fleet: Fleet, name: str) -> list[str]:
    """Return the release roles that promote artifacts from an environment."""
    return [
        release_role(fleet, other)
        for other, env in fleet.env.items()
        if env.delivery is not None and env.delivery.promote_from == name
    ]


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
        prefix = _prefix(fleet, name)

        def role(construct_id: str, subject: str, statements: list[iam.PolicyStatement], what: str) -> None:
            made = iam.Role(
                self,
                construct_id,
                role_name=f"{prefix}-{construct_id.lower()}",
                description=what,
                max_session_duration=cdk.Duration.hours(1),
                assumed_by=iam.WebIdentityPrincipal(
                    provider.oidc_provider_arn,
                    {"StringEquals": {f"{ISSUER}:aud": "sts.amazonaws.com", f"{ISSUER}:sub": subject}},
                ),
                inline_policies={construct_id.lower(): iam.PolicyDocument(statements=statements)},
            )
            acknowledge(
                made,
                WILDCARD,
                "All artifacts, and all stacks of this environment: their digests and ids are not known here.",
            )
            cdk.CfnOutput(self, f"{construct_id}RoleArn", value=made.role_arn)

        role("Release", here, self._upload(settings, fleet, storage), "Uploads artifacts, or copies those of before")
        role(
            "Plan",
            f"repo:{settings.repository}:pull_request",
            [self._assume("lookup"), *self._read_stacks(prefix)],
            "Compares templates with what is deployed",
        )
        role(
            "Deploy",
            here,
            [self._assume("deploy", "file-publishing", "image-publishing", "lookup"), *self._read_stacks(prefix)],
            "Deploys stacks by the roles of cdk bootstrap",
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
            iam.PolicyStatement(
                actions=["kms:Decrypt", "kms:GenerateDataKey"],
                resources=[storage.key.key_arn],
                conditions={"StringEquals": {"kms:ViaService": f"s3.{self.region}.amazonaws.com"}},
            ),
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
                actions=["cloudformation:DescribeStacks", "cloudformation:GetTemplate"], resources=[stacks]
            )
        ]


def _prefix(fleet: Fleet, name: str) -> str:
    return f"{fleet.project.name}-{name.replace('_', '-')}"
