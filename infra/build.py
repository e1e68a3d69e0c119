"""A build of a pipeline: its machine, its log, its role, and the store by which builds hand on what they have written."""

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_codebuild as codebuild
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service
from infra.storage import KEPT, StorageStack

IMAGE = "aws/codebuild/standard:7.0"  # Ubuntu, with the runtimes that infra/buildspec.py asks for
LARGE, MEDIUM = ("BUILD_GENERAL1_LARGE", 300), ("BUILD_GENERAL1_MEDIUM", 180)
"""Machine and minutes: a training takes 7 GB, a rollout waits for others."""
QUEUED_MINUTES = 480


def use(connection: str) -> iam.PolicyStatement:
    """Return what fetches code by a connection of CodeConnections."""
    return iam.PolicyStatement(actions=["codeconnections:UseConnection"], resources=[connection])


class Store:
    """Hold code, fleet.toml and releases/ from one build to the next."""

    def __init__(self, scope: Construct, *, storage: StorageStack) -> None:
        """Make the bucket."""
        self._key = storage.key
        self.bucket = s3.Bucket(
            scope,
            "Store",
            versioned=True,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=storage.key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=storage.access_log,
            server_access_logs_prefix="pipeline/",
            lifecycle_rules=[
                s3.LifecycleRule(
                    expiration=cdk.Duration.days(90),
                    noncurrent_version_expiration=cdk.Duration.days(30),
                    abort_incomplete_multipart_upload_after=cdk.Duration.days(7),
                )
            ],
            removal_policy=KEPT,
        )

    def passing_on(self) -> list[iam.PolicyStatement]:
        """Return what reads and writes what builds hand to each other."""
        region = cdk.Stack.of(self.bucket).region
        return [
            iam.PolicyStatement(
                actions=["s3:GetObject", "s3:GetObjectVersion", "s3:PutObject"],
                resources=[self.bucket.arn_for_objects("*")],
            ),
            iam.PolicyStatement(
                actions=["s3:GetBucketLocation", "s3:GetBucketVersioning"], resources=[self.bucket.bucket_arn]
            ),
            iam.PolicyStatement(
                actions=["kms:Decrypt", "kms:GenerateDataKey"],
                resources=[self._key.key_arn],
                conditions={"StringEquals": {"kms:ViaService": f"s3.{region}.amazonaws.com"}},
            ),
        ]


class Build(Construct):
    """Run a specification with the right to take `roles` in turn, and no other right on an environment."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        name: str,
        role_name: str,
        description: str,
        spec: str,
        large: bool,
        roles: Mapping[str, str],
        keys: Mapping[str, str],
        connection: str,
        store: Store,
        storage: StorageStack,
    ) -> None:
        """Make log, role and project; `roles` and `keys` are ARNs by the variable that tells them to the build."""
        super().__init__(scope, construct_id)
        log = storage.log_group(self, "Log", name=name)
        role = iam.Role(
            self,
            "Role",
            # fixed, for the roles of other accounts know it by its name
            role_name=role_name,
            description=description,
            assumed_by=own_service(self, "codebuild.amazonaws.com"),
            inline_policies={
                "build": iam.PolicyDocument(
                    statements=[
                        iam.PolicyStatement(actions=["sts:AssumeRole"], resources=list(roles.values())),
                        use(connection),
                        iam.PolicyStatement(
                            actions=["logs:CreateLogStream", "logs:PutLogEvents"], resources=[log.log_group_arn]
                        ),
                        *store.passing_on(),
                    ]
                )
            },
        )
        acknowledge(role, WILDCARD, "CodePipeline makes up the names of what it keeps; streams of one log group.")
        size, minutes = LARGE if large else MEDIUM
        variables = {**roles, **keys, "AWS_STS_REGIONAL_ENDPOINTS": "regional"}
        made = codebuild.CfnProject
        self.project = made(
            self,
            "Build",
            name=name,
            service_role=role.role_arn,
            encryption_key=storage.key.key_arn,
            timeout_in_minutes=minutes,
            queued_timeout_in_minutes=QUEUED_MINUTES,
            source=made.SourceProperty(type="CODEPIPELINE", build_spec=spec),
            artifacts=made.ArtifactsProperty(type="CODEPIPELINE"),
            environment=made.EnvironmentProperty(
                type="LINUX_CONTAINER",
                compute_type=size,
                image=IMAGE,
                image_pull_credentials_type="CODEBUILD",
                privileged_mode=False,
                environment_variables=[
                    made.EnvironmentVariableProperty(name=key, value=value, type="PLAINTEXT")
                    for key, value in variables.items()
                ],
            ),
            logs_config=made.LogsConfigProperty(
                cloud_watch_logs=made.CloudWatchLogsConfigProperty(status="ENABLED", group_name=log.log_group_name)
            ),
        )
