"""A release by AWS: a CodePipeline with the steps of .github/workflows/release.yml, a person's word before production."""

from collections.abc import Sequence
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_codebuild as codebuild
from aws_cdk import aws_codepipeline as codepipeline
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.build import Build, Store, use
from infra.buildspec import deliver, release
from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service
from infra.roles import build_role, deploy_role, keys, release_role
from infra.storage import StorageStack
from models.config import DeliverySettings, Fleet

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
        self._pipeline = settings.pipeline
        self._prefix = f"{fleet.project.name}-{name.replace('_', '-')}-pipeline"
        store = Store(self, storage=storage)
        order = fleet.way(name)
        stages = [_Stage(name="Source", actions=[self._source(settings.repository)])]
        projects = []
        for before, env in zip((None, *order), order, strict=False):
            first = before is None
            signing = {variable: f"kms:{arn}" for variable, arn in keys(fleet, name, env).items()}
            spec = release(env) if first else deliver(env, str(before), approve="APPROVING_KEY" in signing)
            roles = {"RELEASE_ROLE": release_role(fleet, env)} | (
                {} if first else {"DEPLOY_ROLE": deploy_role(fleet, env)}
            )
            build = Build(
                self,
                env.replace("_", "-").title(),
                name=f"{self._prefix}-{env.replace('_', '-')}",
                role_name=build_role(fleet, name, env).rpartition("/")[2],
                description=f"Releases into {env}",
                spec=spec,
                large=first,
                roles=roles,
                keys=signing,
                connection=self._pipeline.connection,
                store=store,
                storage=storage,
            )
            projects.append(build.project)
            if not first and fleet.env[env].production:
                stages.append(_Stage(name=f"Approve-{env}", actions=[_word(env)]))
            stages.append(_Stage(name=f"Release-{env}", actions=[self._release(env, before, build.project)]))
        role = self._role(projects, store)
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
                location=store.bucket.bucket_name,
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

    def _release(self, env: str, before: str | None, project: codebuild.CfnProject) -> _Action:
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

    def _role(self, projects: Sequence[codebuild.CfnProject], store: Store) -> iam.Role:
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
                        use(self._pipeline.connection),
                        iam.PolicyStatement(
                            actions=["codebuild:BatchGetBuilds", "codebuild:StartBuild"],
                            resources=[project.attr_arn for project in projects],
                        ),
                        *store.passing_on(),
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
