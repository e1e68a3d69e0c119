"""The edge target: Greengrass components for a thing group, and what its devices may do."""

import json
from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_greengrassv2 as greengrass
from aws_cdk import aws_iam as iam
from aws_cdk import aws_iot as iot
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.storage import StorageStack
from infra.template import ComponentTemplate, read_template
from models.config import EdgeSettings
from models.release import Artifact, Release, ShipyardError, artifact_key

NUCLEUS = "aws.greengrass.Nucleus"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name
MAX_RECIPE_BYTES = 8000  # Greengrass lite reads a recipe into 8196 bytes, with digests added


class EdgeStack(cdk.Stack):
    """Wire the components of a release, one deployment of them all, and the devices' identity."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: EdgeSettings,
        release: Release,
        values: Mapping[str, str],
        storage: StorageStack,
    ) -> None:
        """Make thing group, role, policy, components and deployment; `values` fills the placeholders of recipes.

        Raises:
            ShipyardError: a recipe is too large for a device.
        """
        super().__init__(scope, construct_id)
        artifacts = release.of("greengrass-runtime") + release.of("greengrass-model")
        # a device is in one of them: two deployments that pin different versions would fail on it
        things = iot.CfnThingGroup(self, "ThingGroup", thing_group_name=settings.thing_group)
        canaries = iot.CfnThingGroup(self, "CanaryGroup", thing_group_name=f"{settings.thing_group}-canary")
        alias = iot.CfnRoleAlias(self, "RoleAlias", role_arn=self._role(artifacts, storage).role_arn)
        policy = iot.CfnPolicy(
            self, "DevicePolicy", policy_document=self._device_policy(settings.thing_group, alias).to_json()
        )
        templates = {artifact.name: read_template(artifact, ComponentTemplate, values) for artifact in artifacts}
        # without it the classic nucleus takes {iot:thingName} in a recipe's accessControl as it stands
        nucleus = _pin(settings.nucleus_version, {"interpolateComponentConfiguration": True})
        components = {NUCLEUS: nucleus, TOKEN_EXCHANGE: _pin(settings.token_exchange_version)}
        # which models the runtime serves, and whose signature they have to bear
        models = " ".join(template.model for template in templates.values() if template.model)
        configuration = {"models": models, "trustedKey": values["TRUSTED_KEY"]}
        for artifact in artifacts:
            recipe = templates[artifact.name].recipe
            runs = artifact.kind == "greengrass-runtime"
            text = _inline(recipe, artifact.name)
            if settings.components == "published":
                # `shipyard edge publish` made it, and what it makes can be gone back to
                components[recipe["ComponentName"]] = _pin(recipe["ComponentVersion"], configuration if runs else None)
                continue
            version = greengrass.CfnComponentVersion(self, artifact.name, inline_recipe=text)
            # A version is immutable and devices may still run or return to it, so it outlives its replacement. One
            # that a failed deployment had just made goes, or the next try would meet it.
            version.apply_removal_policy(cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE)
            components[recipe["ComponentName"]] = _pin(version.attr_component_version, configuration if runs else None)
        policies = greengrass.CfnDeployment.DeploymentPoliciesProperty(failure_handling_policy="ROLLBACK")
        first = greengrass.CfnDeployment(
            self, "CanaryDeployment", target_arn=canaries.attr_arn, components=components, deployment_policies=policies,
            iot_job_configuration=_jobs(settings),
        )  # fmt: skip
        rest = greengrass.CfnDeployment(
            self, "Deployment", target_arn=things.attr_arn, components=components, deployment_policies=policies,
            iot_job_configuration=_jobs(settings),
        )  # fmt: skip
        # CloudFormation does not wait for devices: `shipyard edge rollout` does
        rest.add_dependency(first)
        cdk.CfnOutput(self, "ThingGroupName", value=things.ref)
        cdk.CfnOutput(self, "CanaryGroupName", value=canaries.ref)
        cdk.CfnOutput(self, "RoleAliasName", value=alias.ref)
        # policies of a thing group do not grant what a core device asks for: attach this one to each certificate
        cdk.CfnOutput(self, "DevicePolicyName", value=policy.ref)
        cdk.CfnOutput(self, "Release", value=release.version)

    def _role(self, artifacts: tuple[Artifact, ...], storage: StorageStack) -> iam.Role:
        """Return the role for which devices exchange their certificate: it reads components alone."""
        keys = [artifact_key(artifact.name, "*") + "*" for artifact in artifacts]
        keys += [f"deltas/{artifact.name}/*" for artifact in artifacts if artifact.kind == "greengrass-model"]
        location = iam.PolicyStatement(actions=["s3:GetBucketLocation"], resources=[storage.bucket.bucket_arn])
        role = iam.Role(
            self,
            "TokenExchangeRole",
            assumed_by=iam.ServicePrincipal("credentials.iot.amazonaws.com"),
            inline_policies={"fetch": iam.PolicyDocument(statements=[*storage.reading(*keys), location])},
        )
        acknowledge(role, WILDCARD, "Every version of these components: a device may return to one of before.")
        return role

    def _device_policy(self, thing_group: str, alias: iot.CfnRoleAlias) -> iam.PolicyDocument:
        """Return the least that a core device needs (Greengrass developer guide, "Minimal AWS IoT policy").

        Core devices know no policy variables, so devices are bounded by name: a thing of the group is called
        "<thing group>-<anything>". The nucleus opens further connections as "<thing>#2", hence the wildcard.
        """
        thing = f"{thing_group}-*"

        def arns(resource: str, *names: str) -> list[str]:
            return [self.format_arn(service="iot", resource=resource, resource_name=name) for name in names]

        topics = [f"$aws/things/{thing}/jobs/*", f"$aws/things/{thing}/shadow/*"]
        health = [f"$aws/things/{thing}/greengrass/health/json", f"$aws/things/{thing}/greengrassv2/health/json"]
        return iam.PolicyDocument(
            statements=[
                iam.PolicyStatement(actions=["iot:Connect"], resources=arns("client", thing)),
                iam.PolicyStatement(actions=["iot:Publish", "iot:Receive"], resources=arns("topic", *topics, *health)),
                iam.PolicyStatement(actions=["iot:Subscribe"], resources=arns("topicfilter", *topics)),
                iam.PolicyStatement(actions=["iot:AssumeRoleWithCertificate"], resources=[alias.attr_role_alias_arn]),
                iam.PolicyStatement(
                    actions=[
                        "greengrass:GetComponentVersionArtifact",
                        "greengrass:GetDeploymentConfiguration",
                        "greengrass:ListThingGroupsForCoreDevice",
                        "greengrass:ResolveComponentCandidates",
                    ],
                    # Amazon's own components lie in Amazon's account, deployments have ids that are not known here
                    resources=["*"],
                ),
            ]
        )


def _pin(
    version: str, configuration: Mapping[str, object] | None = None
) -> greengrass.CfnDeployment.ComponentDeploymentSpecificationProperty:
    """Pin a component to a version, with the configuration that is merged into its own."""
    update = greengrass.CfnDeployment.ComponentConfigurationUpdateProperty(
        merge=json.dumps(configuration, sort_keys=True)
    )
    return greengrass.CfnDeployment.ComponentDeploymentSpecificationProperty(
        component_version=version, configuration_update=update if configuration else None
    )


def _jobs(settings: EdgeSettings) -> greengrass.CfnDeployment.DeploymentIoTJobConfigurationProperty:
    """Return how a deployment spreads: slowly first, faster as it succeeds, and not on where too many fail."""
    made = greengrass.CfnDeployment
    rate = made.IoTJobExponentialRolloutRateProperty(
        base_rate_per_minute=settings.rollout_per_minute,
        increment_factor=2,
        # the CDK has no class of this one, so it is spelt as in a template
        rate_increase_criteria={"NumberOfSucceededThings": settings.rollout_per_minute},
    )
    threshold = made.IoTJobAbortCriteriaProperty(
        failure_type="FAILED",
        action="CANCEL",
        threshold_percentage=settings.abort_percent,
        min_number_of_executed_things=settings.abort_after,
    )
    return made.DeploymentIoTJobConfigurationProperty(
        job_executions_rollout_config=made.IoTJobExecutionsRolloutConfigProperty(
            exponential_rate=rate, maximum_per_minute=1000
        ),
        abort_config=made.IoTJobAbortConfigProperty(criteria_list=[threshold]),
        timeout_config=made.IoTJobTimeoutConfigProperty(in_progress_timeout_in_minutes=settings.timeout_minutes),
    )


def _inline(recipe: Mapping[str, object], name: str) -> str:
    """Return a recipe as compact JSON: the same recipe is the same text, so that it makes no new version."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    if len(text) >= MAX_RECIPE_BYTES:
        raise ShipyardError(
            f"edge: recipe of {name} is too large",
            value=len(text),
            allowed=f"less than {MAX_RECIPE_BYTES} bytes",
            mend="move its script into the component's archive",
        )
    return text
