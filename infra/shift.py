"""How a service's traffic moves from one revision to the next: two groups of tasks, and the alarms that take it back."""

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.network import NetworkStack
from infra.principals import own_service
from infra.template import ImageTemplate

SLOW_PERIODS = 3  # minutes of a slow or failing service before a deployment is taken back
MOST_ERRORS = 5  # answers of a minute with a status of 500 or more


def target_group(
    scope: Construct, construct_id: str, template: ImageTemplate, network: NetworkStack
) -> elbv2.ApplicationTargetGroup:
    """Return a group of a service's tasks, which are asked whether they are ready."""
    return elbv2.ApplicationTargetGroup(
        scope,
        construct_id,
        vpc=network.vpc,
        port=template.port,
        protocol=elbv2.ApplicationProtocol.HTTP,
        target_type=elbv2.TargetType.IP,
        deregistration_delay=cdk.Duration.seconds(30),
        health_check=elbv2.HealthCheck(
            path=template.health,
            healthy_http_codes="200",
            interval=cdk.Duration.seconds(15),
            timeout=cdk.Duration.seconds(5),
            healthy_threshold_count=2,
            unhealthy_threshold_count=3,
        ),
    )


def alternate(
    scope: Construct, targets: list[elbv2.ApplicationTargetGroup], rule: elbv2.ApplicationListenerRule
) -> ecs.AlternateTarget:
    """Return the second target group, and the role with which ECS moves traffic to it.

    Its statements are those of AmazonECSInfrastructureRolePolicyForLoadBalancers, for this service's resources alone.
    """
    statements = [
        iam.PolicyStatement(
            actions=[
                "elasticloadbalancing:DescribeListeners",
                "elasticloadbalancing:DescribeRules",
                "elasticloadbalancing:DescribeTargetGroups",
                "elasticloadbalancing:DescribeTargetHealth",
            ],
            resources=["*"],  # these actions know no resource
        ),
        iam.PolicyStatement(actions=["elasticloadbalancing:ModifyRule"], resources=[rule.listener_rule_arn]),
        iam.PolicyStatement(
            actions=["elasticloadbalancing:RegisterTargets", "elasticloadbalancing:DeregisterTargets"],
            resources=[group.target_group_arn for group in targets],
        ),
    ]
    role = iam.Role(
        scope,
        "ShiftRole",
        assumed_by=own_service(scope, "ecs.amazonaws.com"),
        inline_policies={"shift": iam.PolicyDocument(statements=statements)},
    )
    acknowledge(role, WILDCARD, "The describing actions know no resource; what changes is named.")
    return ecs.AlternateTarget(
        "Alternate",
        alternate_target_group=targets[1],
        production_listener=ecs.ListenerRuleConfiguration.application_listener_rule(rule),
        role=role,
    )


def shift_alarms(
    scope: Construct, targets: list[elbv2.ApplicationTargetGroup], slow_ms: int
) -> tuple[cloudwatch.Alarm, ...]:
    """Return the alarms that take a deployment back; of two target groups the worse one counts."""
    minute = cdk.Duration.minutes(1)

    def worst(name: str, function: str, label: str) -> cloudwatch.MathExpression:
        if name == "errors":
            metrics = [
                t.metrics.http_code_target(elbv2.HttpCodeTarget.TARGET_5XX_COUNT, period=minute) for t in targets
            ]
        else:
            metrics = [t.metrics.target_response_time(period=minute, statistic="p99") for t in targets]
        using: dict[str, cloudwatch.IMetric] = {f"{name}{i}": metric for i, metric in enumerate(metrics)}
        # a group without traffic has no data, and what is missing in one would hide what is there in the other
        filled = ", ".join(f"FILL({key}, 0)" for key in using)
        return cloudwatch.MathExpression(
            expression=f"{function}([{filled}])", using_metrics=using, period=minute, label=label
        )

    def alarm(construct_id: str, metric: cloudwatch.IMetric, threshold: float, what: str) -> cloudwatch.Alarm:
        return cloudwatch.Alarm(
            scope,
            construct_id,
            metric=metric,
            threshold=threshold,
            evaluation_periods=SLOW_PERIODS,
            datapoints_to_alarm=2,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
            alarm_description=what,
        )

    slow = slow_ms / 1000
    return (
        alarm("Errors", worst("errors", "SUM", "5xx"), MOST_ERRORS, "Answers with a status of 500 or more"),
        alarm("Slow", worst("slow", "MAX", "p99"), slow, "99 % of the answers take longer, in seconds"),
    )
