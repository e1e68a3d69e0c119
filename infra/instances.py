"""How an endpoint's instances change: updates that alarms take back, and a number that follows the requests."""

from collections.abc import Sequence

import aws_cdk as cdk
from aws_cdk import aws_applicationautoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from models.config import GpuSettings, Hours

# a deployment compares variants by name, so the names stay for good
VARIANT = "primary"
SHADOW = "shadow"
BAKE_SECONDS = 600  # both fleets stay this long after the last shift, so that a rollback is one change of weights
STEP_SECONDS = 300
MOST_ERRORS = 5  # answers of a minute with a status of 500 or more


def update_alarms(scope: Construct, endpoint: str, slow_ms: int) -> tuple[cloudwatch.Alarm, ...]:
    """Return the alarms that take an update of the endpoint of that name back."""

    def alarm(construct_id: str, metric: str, statistic: str, threshold: float, what: str) -> cloudwatch.Alarm:
        return cloudwatch.Alarm(
            scope,
            construct_id,
            metric=cloudwatch.Metric(
                namespace="AWS/SageMaker",
                metric_name=metric,
                dimensions_map={"EndpointName": endpoint, "VariantName": VARIANT},
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


def deployment(
    settings: GpuSettings, alarms: Sequence[cloudwatch.Alarm]
) -> sagemaker.CfnEndpoint.DeploymentConfigProperty:
    """Return how an update comes in and what takes it back (SageMaker developer guide, "Deployment guardrails")."""

    def percent(value: int) -> sagemaker.CfnEndpoint.CapacitySizeProperty:
        return sagemaker.CfnEndpoint.CapacitySizeProperty(type="CAPACITY_PERCENT", value=value)

    rollback = sagemaker.CfnEndpoint.AutoRollbackConfigProperty(
        alarms=[sagemaker.CfnEndpoint.AlarmProperty(alarm_name=alarm.alarm_name) for alarm in alarms]
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


def scale(
    scope: Construct, endpoint: sagemaker.CfnEndpoint, name: str, settings: GpuSettings, hours: Hours | None
) -> None:
    """Let the number of instances follow the requests and the hours, as far as the settings have these."""
    most = settings.max_instances or settings.instances
    target = autoscaling.ScalableTarget(
        scope,
        "Scaling",
        service_namespace=autoscaling.ServiceNamespace.SAGEMAKER,
        scalable_dimension="sagemaker:variant:DesiredInstanceCount",
        resource_id=f"endpoint/{name}/variant/{VARIANT}",
        min_capacity=settings.instances,
        max_capacity=most,
    )
    target.node.add_dependency(endpoint)
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
        for when, hour, least, upto in (
            ("Wake", hours.start, settings.instances, most),
            ("Sleep", hours.end, 1, 1),
        ):
            target.scale_on_schedule(
                when,
                schedule=autoscaling.Schedule.expression(f"cron(0 {hour} ? * {hours.days} *)"),
                time_zone=zone,
                min_capacity=least,
                max_capacity=upto,
            )
