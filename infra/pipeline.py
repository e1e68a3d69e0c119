"""A release by AWS: a CodePipeline with the steps of .github/workflows/release.yml, a person's word before production."""

from collections.abc import Sequence
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_codebuild as codebuild
from aws_cdk import aws_codepipeline as codepipeline
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.buildspec import deliver, release
from infra.delivery import build_role, deploy_role, release_role
from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service
from infra.storage import KEPT, StorageStack
from models.config import DeliverySettings, Fleet

IMAGE = "aws/codebuild/standard:7.0"  # Ubuntu, with the runtimes that infra/buildspec.py asks for
RELEASE_MINUTES, DELIVER_MINUTES, QUEUED_MINUTES = 300, 180, 480
LARGE, MEDIUM = "BUILD_GENERAL1_LARGE", "BUILD_GENERAL1_MEDIUM"  # a training takes 7 GB, a rollout next to nothing
CODE, DELIVERY = "Code", "Delivery"
_Stage = codepipeline.CfnPipeline.StageDeclarationProperty
_Action = codepipeline.CfnPipeline.ActionDeclarationProperty


class PipelineStack(cdk.Stack):
    """Wire source, a build that releases, and for each further environment a build that delivers, one after the other.

    A build has no rights on an environment but those of its release role and its deploy role, which it takes in turn.
    """

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
        """Make the pipeline of the environment `name`, at which a release begins its way."""
        super().__init__(scope, construct_id)
        assert settings.pipeline is not None
        self._fleet, self._name, self._storage, self._pipeline = fleet, name, storage, settings.pipeline
        self._prefix = f"{fleet.project.name}-{name.replace('_', '-')}-pipeline"
        self._store = self._bucket()
        order = fleet.way(name)
        stages = [_Stage(name="Source", actions=[self._source(settings.repository)])]
        projects = []
        for before, env in zip((None, *order), order, strict=False):
            first = before is None
            keys = {"SIGNING_KEY": f"kms:{self._pipeline.signing_key}"}
            if fleet.env[env].needs_approval:
                keys["APPROVING_KEY"] = f"kms:{self._pipeline.approving_key}"
            spec = release(env) if first else deliver(env, str(before), approve="APPROVING_KEY" in keys)
            project = self._project(
                env, spec, keys, LARGE if first else MEDIUM, RELEASE_MINUTES if first else DELIVER_MINUTES
            )
            projects.append(project)
            if not first and fleet.env[env].production:
                stages.append(_Stage(name=f"Approve-{env}", actions=[_word(env)]))
            stages.append(_Stage(name=f"Release-{env}", actions=[self._build(env, before, project)]))
        role = self._role(projects)
        codepipeline.CfnPipeline(
            self,
            "Pipeline",
            name=self._prefix,
            pipeline_type="V2",
            # one at a time, in order
            execution_mode="QUEUED",
            role_arn=role.role_arn,
            artifact_store=codepipeline.CfnPipeline.ArtifactStoreProperty(
                type="S3",
                location=self._store.bucket_name,
                encryption_key=codepipeline.CfnPipeline.EncryptionKeyProperty(id=storage.key.key_arn, type="KMS"),
            ),
            variables=[
                codepipeline.CfnPipeline.VariableDeclarationProperty(
                    name="profile", default_value=self._pipeline.profile, description="Size of the training"
                )
            ],
            stages=stages,
        )
        cdk.CfnOutput(self, "PipelineName", value=self._prefix)

    def _bucket(self) -> s3.Bucket:
        """Return where the pipeline keeps code, fleet.toml and releases/ from one build to the next."""
        return s3.Bucket(
            self,
            "Store",
            versioned=True,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self._storage.key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=self._storage.access_log,
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

    def _source(self, repository: str) -> _Action:
        return _action(
            "Code", ("Source", "AWS", "CodeStarSourceConnection"), outputs=(CODE,),
            configuration={
                "ConnectionArn": self._pipeline.connection,
                "FullRepositoryId": repository,
                "BranchName": self._pipeline.branch,
                # a clone, not its files alone: the provenance of a release names its commit
                "OutputArtifactFormat": "CODEBUILD_CLONE_REF",
                # a release is begun by a person, as the workflow is
                "DetectChanges": "false",
            },
        )  # fmt: skip

    def _project(self, env: str, spec: str, keys: dict[str, str], size: str, minutes: int) -> codebuild.CfnProject:
        """Return the build that works on an environment, with its log and its role."""
        place = Construct(self, env.replace("_", "-").title())
        label = env.replace("_", "-")
        log = self._storage.log_group(place, "Log", name=f"{self._prefix}-{label}")
        roles = {"RELEASE_ROLE": release_role(self._fleet, env)}
        if env != self._name:
            roles["DEPLOY_ROLE"] = deploy_role(self._fleet, env)
        role = iam.Role(
            place,
            "Role",
            # fixed, for the roles of other accounts know it by its name
            role_name=build_role(self._fleet, self._name, env).rpartition("/")[2],
            description=f"Releases into {env}",
            assumed_by=own_service(self, "codebuild.amazonaws.com"),
            inline_policies={
                "build": iam.PolicyDocument(
                    statements=[
                        iam.PolicyStatement(actions=["sts:AssumeRole"], resources=list(roles.values())),
                        self._connection(),
                        iam.PolicyStatement(
                            actions=["logs:CreateLogStream", "logs:PutLogEvents"], resources=[log.log_group_arn]
                        ),
                        *self._passing_on(),
                    ]
                )
            },
        )
        acknowledge(role, WILDCARD, "CodePipeline makes up the names of what it keeps; streams of one log group.")
        variables = roles | keys | {"AWS_STS_REGIONAL_ENDPOINTS": "regional"}
        return codebuild.CfnProject(
            place,
            "Build",
            name=f"{self._prefix}-{label}",
            service_role=role.role_arn,
            encryption_key=self._storage.key.key_arn,
            timeout_in_minutes=minutes,
            queued_timeout_in_minutes=QUEUED_MINUTES,
            source=codebuild.CfnProject.SourceProperty(type="CODEPIPELINE", build_spec=spec),
            artifacts=codebuild.CfnProject.ArtifactsProperty(type="CODEPIPELINE"),
            environment=codebuild.CfnProject.EnvironmentProperty(
                type="LINUX_CONTAINER",
                compute_type=size,
                image=IMAGE,
                image_pull_credentials_type="CODEBUILD",
                privileged_mode=False,
                environment_variables=[
                    codebuild.CfnProject.EnvironmentVariableProperty(name=key, value=value, type="PLAINTEXT")
                    for key, value in variables.items()
                ],
            ),
            logs_config=codebuild.CfnProject.LogsConfigProperty(
                cloud_watch_logs=codebuild.CfnProject.CloudWatchLogsConfigProperty(
                    status="ENABLED", group_name=log.log_group_name
                )
            ),
        )

    def _build(self, env: str, before: str | None, project: codebuild.CfnProject) -> _Action:
        """Return the action that runs a project: with the code, and what the build before has written."""
        told = [
            {"name": "BY", "value": "codepipeline #{codepipeline.PipelineExecutionId}"},
            {"name": "PROFILE", "value": "#{variables.profile}"}
            if before is None
            else {"name": "RELEASE", "value": "#{release.RELEASE}"},
        ]
        inputs = (CODE,) if before is None else (CODE, f"{DELIVERY}{_pascal(before)}")
        configuration: dict[str, Any] = {"ProjectName": project.ref, "EnvironmentVariables": self.to_json_string(told)}
        if before is not None:
            configuration["PrimarySource"] = CODE
        return _action(
            f"Release-{env}", ("Build", "AWS", "CodeBuild"), inputs=inputs, outputs=(f"{DELIVERY}{_pascal(env)}",),
            configuration=configuration, namespace="release" if before is None else None,
        )  # fmt: skip

    def _connection(self) -> iam.PolicyStatement:
        return iam.PolicyStatement(actions=["codeconnections:UseConnection"], resources=[self._pipeline.connection])

    def _passing_on(self) -> list[iam.PolicyStatement]:
        """Return what reads and writes what builds hand to each other."""
        return [
            iam.PolicyStatement(
                actions=["s3:GetObject", "s3:GetObjectVersion", "s3:PutObject"],
                resources=[self._store.arn_for_objects("*")],
            ),
            iam.PolicyStatement(
                actions=["s3:GetBucketLocation", "s3:GetBucketVersioning"], resources=[self._store.bucket_arn]
            ),
            iam.PolicyStatement(
                actions=["kms:Decrypt", "kms:GenerateDataKey"],
                resources=[self._storage.key.key_arn],
                conditions={"StringEquals": {"kms:ViaService": f"s3.{self.region}.amazonaws.com"}},
            ),
        ]

    def _role(self, projects: Sequence[codebuild.CfnProject]) -> iam.Role:
        """Return the pipeline's own role: it fetches the code, starts these builds, and hands on what they write."""
        made = iam.Role(
            self,
            "Role",
            role_name=self._prefix,
            description="Starts the builds of a release",
            assumed_by=own_service(self, "codepipeline.amazonaws.com"),
            inline_policies={
                "pipeline": iam.PolicyDocument(
                    statements=[
                        self._connection(),
                        iam.PolicyStatement(
                            actions=["codebuild:BatchGetBuilds", "codebuild:StartBuild"],
                            resources=[project.attr_arn for project in projects],
                        ),
                        *self._passing_on(),
                    ]
                )
            },
        )
        acknowledge(made, WILDCARD, "CodePipeline makes up the names of what it keeps.")
        return made


def _pascal(env: str) -> str:
    return "".join(part.title() for part in env.split("_"))


def _word(env: str) -> _Action:
    """Return the action that waits for a person."""
    return _action(
        f"Approve-{env}", ("Approval", "AWS", "Manual"),
        configuration={"CustomData": f"#{{release.RELEASE}} into {env}: read the report and what staging says"},
    )  # fmt: skip


def _action(
    name: str, kind: tuple[str, str, str], *, configuration: dict[str, Any], inputs: Sequence[str] = (),
    outputs: Sequence[str] = (), namespace: str | None = None,
) -> _Action:  # fmt: skip
    category, owner, provider = kind
    made = codepipeline.CfnPipeline
    return _Action(
        name=name,
        action_type_id=made.ActionTypeIdProperty(category=category, owner=owner, provider=provider, version="1"),
        configuration=configuration,
        input_artifacts=[made.InputArtifactProperty(name=one) for one in inputs] or None,
        output_artifacts=[made.OutputArtifactProperty(name=one) for one in outputs] or None,
        namespace=namespace,
        run_order=1,
    )
