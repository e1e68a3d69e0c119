"""The public-cloud target: a SageMaker GPU endpoint with Triton for each of its artifacts."""

from collections.abc import Mapping
from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_applicationautoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra.hosting import hosting_role
from infra.network import NetworkStack, closed_group
from infra.storage import CAPTURE, ENDPOINT_LOGS, StorageStack
from infra.template import TritonTemplate, read_template
from models.config import GpuSettings, Hours, triton_image
from models.release import Artifact, Release, ShipyardError

# A deployment compares variants by name, so the names stay for good.
VARIANT = "primary"
SHADOW = "shadow"
# Driver 580 with CUDA 13, which the image wants; the default of g5 is driver 470 with CUDA 11.4.
INFERENCE_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
BAKE_SECONDS = 600  # both fleets stay this long after the last shift, so that a rollback is one change of weights
STEP_SECONDS = 300
MOST_ERRORS = 5  # answers of a minute with a status of 500 or more


class GpuStack(cdk.Stack):
    """Wire one endpoint for each Triton artifact of a release."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: GpuSettings,
        hours: Hours | None,
        slow_ms: int,
        release: Release,
        shadow: Release | None,
        values: Mapping[str, str],
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make the endpoints; `values` fills the placeholders of templates, `shadow` has the models that get copies."""
        super().__init__(scope, construct_id)
        shadows = {artifact.name: artifact for artifact in shadow.of("triton")} if shadow else {}
        self.endpoints: dict[str, TritonEndpoint] = {}
        """The endpoint of each artifact, by the artifact's name."""
        for artifact in release.of("triton"):
            models = [Hosted(artifact, read_template(artifact, TritonTemplate, values))]
            if artifact.name in shadows:
                models.append(
                    Hosted(shadows[artifact.name], read_template(shadows[artifact.name], TritonTemplate, values))
                )
            endpoint = TritonEndpoint(
                self,
                artifact.name,
                settings=settings,
                hours=hours,
                slow_ms=slow_ms,
                prefix=self.stack_name.removesuffix(f"-{construct_id}"),
                models=models,
                storage=storage,
                network=network,
            )
            self.endpoints[artifact.name] = endpoint
            cdk.CfnOutput(self, f"{artifact.name}-endpoint", value=endpoint.endpoint.attr_endpoint_name)
        cdk.CfnOutput(self, "Release", value=release.version)


@dataclass(frozen=True)
class Hosted:
    """An artifact with its template, filled."""

    artifact: Artifact
    template: TritonTemplate


class TritonEndpoint(Construct):
    """Serve one model repository, and by option copy the requests to another one.

    Model and EndpointConfig have no name of ours, and all of their properties are immutable: another artifact has
    another S3Uri, so CloudFormation replaces the Model, hence the EndpointConfig that refers to it, and then turns the
    Endpoint over to that. Its ids need no digest for this. The endpoint has a name, for the alarms that take its
    updates back are made before it.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: GpuSettings,
        hours: Hours | None,
        slow_ms: int,
        prefix: str,
        models: list[Hosted],
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make role, models, configuration, alarms, endpoint and scaling; the first of `models` answers.

        The endpoint's name is `prefix` and the artifact's name.

        Raises:
            ShipyardError: the name is too long, or Amazon publishes no Triton image in the region.
        """
        super().__init__(scope, construct_id)
        name = models[0].artifact.name
        self.name = f"{prefix}-{name}"
        if len(self.name) > 63:
            raise ShipyardError(
                "gpu: the endpoint's name is too long",
                value=self.name,
                allowed="63 characters",
                mend="shorten the environment's or the sub-model's name",
            )
        group = closed_group(
            self, "SecurityGroup", vpc=network.vpc, description=f"SageMaker fetches the model of {name}"
        )
        group.add_egress_rule(network.s3, ec2.Port.tcp(443), "Model data from S3")
        capture = settings.capture_percent > 0
        role = hosting_role(self, models[0].artifact, group=group, storage=storage, network=network, capture=capture)
        made = [
            self._model(construct, hosted, role, group, storage, network)
            for construct, hosted in zip(("Model", "ShadowModel"), models, strict=False)
        ]
        config = sagemaker.CfnEndpointConfig(
            self,
            "EndpointConfig",
            # No KmsKeyId: each instance type that fleet.toml allows (g4dn, g5, g6, g6e) has local NVMe storage, which
            # its own hardware encrypts, and CreateEndpointConfig fails where a key is given for such a type.
            production_variants=[self._variant(VARIANT, made[0], settings, settings.instances)],
            shadow_production_variants=[self._variant(SHADOW, model, settings, 1) for model in made[1:]] or None,
            data_capture_config=self._capture(name, settings, storage) if capture else None,
        )
        self.alarms = self._alarms(slow_ms)
        # made before the endpoint is, which would make it unencrypted and for good
        log = logs.LogGroup(
            self,
            "LogGroup",
            log_group_name=f"{ENDPOINT_LOGS}{self.name}",
            encryption_key=storage.key,
            retention=logs.RetentionDays.ONE_MONTH,
        )
        scales = settings.max_instances is not None or hours is not None
        self.endpoint = sagemaker.CfnEndpoint(
            self,
            "Endpoint",
            endpoint_name=self.name,
            endpoint_config_name=config.attr_endpoint_config_name,
            deployment_config=self._update(settings),
            # a new model must not set back an instance count that was scaled since; what else fleet.toml says holds
            retain_all_variant_properties=True,
            exclude_retained_variant_properties=[
                sagemaker.CfnEndpoint.VariantPropertyProperty(variant_property_type=kind)
                for kind in ("DataCaptureConfig", "DesiredWeight", *(() if scales else ("DesiredInstanceCount",)))
            ],
        )
        self.endpoint.node.add_dependency(log)
        if scales:
            self._scale(settings, hours)

    def _model(
        self,
        construct_id: str,
        hosted: Hosted,
        role: iam.Role,
        group: ec2.SecurityGroup,
        storage: StorageStack,
        network: NetworkStack,
    ) -> sagemaker.CfnModel:
        archived = hosted.template.model_data.endswith(".tar.gz")  # a prefix ends in a slash
        return sagemaker.CfnModel(
            self,
            construct_id,
            execution_role_arn=role.role_arn,
            # the container has no network at all; SageMaker fetches the model through the VPC on its behalf
            enable_network_isolation=True,
            vpc_config=sagemaker.CfnModel.VpcConfigProperty(
                security_group_ids=[group.security_group_id],
                subnets=[subnet.subnet_id for subnet in network.vpc.isolated_subnets],
            ),
            primary_container=sagemaker.CfnModel.ContainerDefinitionProperty(
                image=triton_image(cdk.Stack.of(self).region),
                environment=hosted.template.environment,
                model_data_source=sagemaker.CfnModel.ModelDataSourceProperty(
                    s3_data_source=sagemaker.CfnModel.S3DataSourceProperty(
                        s3_uri=f"s3://{storage.bucket_name}/{hosted.artifact.key}{hosted.template.model_data}",
                        s3_data_type="S3Object" if archived else "S3Prefix",
                        compression_type="Gzip" if archived else "None",
                    )
                ),
            ),
        )

    def _variant(
        self, name: str, model: sagemaker.CfnModel, settings: GpuSettings, instances: int
    ) -> sagemaker.CfnEndpointConfig.ProductionVariantProperty:
        types = (settings.instance_type, *settings.fallback)
        pools = [
            sagemaker.CfnEndpointConfig.InstancePoolProperty(instance_type=kind, priority=priority)
            for priority, kind in enumerate(types, start=1)
        ]
        return sagemaker.CfnEndpointConfig.ProductionVariantProperty(
            variant_name=name,
            model_name=model.attr_model_name,
            # SageMaker takes one of the two: a type, or several in the order in which they are tried
            instance_type=None if settings.fallback else settings.instance_type,
            instance_pools=pools if settings.fallback else None,
            initial_instance_count=instances,
            initial_variant_weight=1,
            inference_ami_version=INFERENCE_AMI,
        )

    def _capture(
        self, name: str, settings: GpuSettings, storage: StorageStack
    ) -> sagemaker.CfnEndpointConfig.DataCaptureConfigProperty:
        return sagemaker.CfnEndpointConfig.DataCaptureConfigProperty(
            enable_capture=True,
            initial_sampling_percentage=settings.capture_percent,
            destination_s3_uri=f"s3://{storage.data_name}/{CAPTURE}{name}/",
            kms_key_id=storage.key.key_arn,
            capture_options=[
                sagemaker.CfnEndpointConfig.CaptureOptionProperty(capture_mode=mode) for mode in ("Input", "Output")
            ],
        )

    def _alarms(self, slow_ms: int) -> tuple[cloudwatch.Alarm, ...]:
        """Return the alarms that take an update back."""

        def alarm(construct_id: str, metric: str, statistic: str, threshold: float, what: str) -> cloudwatch.Alarm:
            return cloudwatch.Alarm(
                self,
                construct_id,
                metric=cloudwatch.Metric(
                    namespace="AWS/SageMaker",
                    metric_name=metric,
                    dimensions_map={"EndpointName": self.name, "VariantName": VARIANT},
                    statistic=statistic,
                    period=cdk.Duration.minutes(1),
                ),
                threshold=threshold,
                evaluation_periods=3,
                datapoints_to_alarm=2,
                comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_THRESHOLD,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
                alarm_description=what,
            )

        return (
            alarm("Errors", "Invocation5XXErrors", "Sum", MOST_ERRORS, "Answers with a status of 500 or more"),
            alarm("Slow", "ModelLatency", "p99", slow_ms * 1000, "99 % of the answers take longer, in microseconds"),
        )

    def _update(self, settings: GpuSettings) -> sagemaker.CfnEndpoint.DeploymentConfigProperty:
        """Return how an update comes in and what takes it back (SageMaker developer guide, "Deployment guardrails")."""

        def percent(value: int) -> sagemaker.CfnEndpoint.CapacitySizeProperty:
            return sagemaker.CfnEndpoint.CapacitySizeProperty(type="CAPACITY_PERCENT", value=value)

        rollback = sagemaker.CfnEndpoint.AutoRollbackConfigProperty(
            alarms=[sagemaker.CfnEndpoint.AlarmProperty(alarm_name=alarm.alarm_name) for alarm in self.alarms]
        )
        if settings.update == "rolling":
            return sagemaker.CfnEndpoint.DeploymentConfigProperty(
                auto_rollback_configuration=rollback,
                rolling_update_policy=sagemaker.CfnEndpoint.RollingUpdatePolicyProperty(
                    maximum_batch_size=percent(50),
                    rollback_maximum_batch_size=percent(100),
                    wait_interval_in_seconds=BAKE_SECONDS,
                ),
            )
        # a part of the new fleet takes traffic first, at most half of it; one instance has no such part
        kind = settings.update if settings.instances > 1 else "all_at_once"
        return sagemaker.CfnEndpoint.DeploymentConfigProperty(
            auto_rollback_configuration=rollback,
            blue_green_update_policy=sagemaker.CfnEndpoint.BlueGreenUpdatePolicyProperty(
                traffic_routing_configuration=sagemaker.CfnEndpoint.TrafficRoutingConfigProperty(
                    type=kind.upper(),
                    canary_size=percent(10) if kind == "canary" else None,
                    linear_step_size=percent(25) if kind == "linear" else None,
                    wait_interval_in_seconds=STEP_SECONDS,
                ),
                termination_wait_in_seconds=BAKE_SECONDS,
            ),
        )

    def _scale(self, settings: GpuSettings, hours: Hours | None) -> None:
        most = settings.max_instances or settings.instances
        target = autoscaling.ScalableTarget(
            self,
            "Scaling",
            service_namespace=autoscaling.ServiceNamespace.SAGEMAKER,
            scalable_dimension="sagemaker:variant:DesiredInstanceCount",
            resource_id=f"endpoint/{self.name}/variant/{VARIANT}",
            min_capacity=settings.instances,
            max_capacity=most,
        )
        target.node.add_dependency(self.endpoint)
        if settings.max_instances is not None:
            target.scale_to_track_metric(
                "Concurrency",
                predefined_metric=(
                    autoscaling.PredefinedMetric.SAGEMAKER_VARIANT_CONCURRENT_REQUESTS_PER_MODEL_HIGH_RESOLUTION
                ),
                target_value=settings.concurrency,
                scale_in_cooldown=cdk.Duration.minutes(10),
                scale_out_cooldown=cdk.Duration.minutes(1),
            )
        if hours is not None:
            zone = cdk.TimeZone.of(hours.timezone)
            # an endpoint without inference components keeps one instance
            for name, hour, least, upto in (
                ("Wake", hours.start, settings.instances, most),
                ("Sleep", hours.end, 1, 1),
            ):
                target.scale_on_schedule(
                    name,
                    schedule=autoscaling.Schedule.expression(f"cron(0 {hour} ? * {hours.days} *)"),
                    time_zone=zone,
                    min_capacity=least,
                    max_capacity=upto,
                )
