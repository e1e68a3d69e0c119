"""One bundle as a service on the private cluster: its tasks, how they are updated, scaled and watched."""

import hashlib
from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_applicationautoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.network import NetworkStack, closed_group
from infra.principals import own_service
from infra.storage import StorageStack
from infra.task import Place, bundle_task
from infra.template import ImageTemplate
from models.config import CpuSettings, Hours
from models.release import Artifact

CPU_PERCENT = 60
BAKE = cdk.Duration.minutes(10)  # both revisions stay this long after the last shift, so that a rollback is one rule
STEP = cdk.Duration.minutes(5)
SLOW_PERIODS = 3  # minutes of a slow or failing service before a deployment is taken back
MOST_ERRORS = 5  # answers of a minute with a status of 500 or more


@dataclass(frozen=True)
class Sizing:
    """Say how many tasks a service has, how large they are, where they run and how others take their place."""

    cpu: int
    memory_mib: int
    tasks: int
    max_tasks: int
    update: str
    slow_ms: int
    hours: Hours | None = None
    capacity: ecs.ManagedInstancesCapacityProvider | None = None


def stable_number(name: str, low: int, count: int) -> int:
    """Return a number of `count` from `low` on that belongs to a name, whatever other names there are."""
    return low + int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % count


class InferenceService(Construct):
    """Serve one bundle behind a listener of the cluster's load balancer.

    Where the update shifts traffic, ECS itself weighs the two target groups in the listener's rule. The rule must
    therefore never change for another reason: CloudFormation would write the weights of the template again.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        cluster: ecs.Cluster,
        sizing: Sizing,
        artifact: Artifact,
        template: ImageTemplate,
        settings: CpuSettings,
        storage: StorageStack,
        network: NetworkStack,
        listener: elbv2.ApplicationListener,
        path: str,
        statements: tuple[iam.PolicyStatement, ...] = (),
    ) -> None:
        """Make the service for the requests of `listener` below `path`; `statements` are what its tasks may besides."""
        super().__init__(scope, construct_id)
        task = bundle_task(
            self,
            place=Place(
                ecs.Compatibility.MANAGED_INSTANCES if sizing.capacity else ecs.Compatibility.FARGATE,
                cpu=sizing.cpu,
                memory_mib=sizing.memory_mib,
            ),
            settings=settings,
            artifact=artifact,
            template=template,
            storage=storage,
            statements=statements,
        )
        group = self.node.find_child("LogGroup")
        assert isinstance(group, logs.LogGroup)
        self.log_group = group
        self.group = closed_group(self, "SecurityGroup", vpc=network.vpc, description=f"Tasks of {artifact.name}")
        self.group.connections.allow_to(network.endpoints, ec2.Port.tcp(443), "Image, logs and what else AWS has")
        self.group.connections.allow_to(network.s3, ec2.Port.tcp(443), "Image layers and bundle from S3")

        shifts = sizing.update != "rolling"
        targets = [self._targets(name, template, network) for name in ("Blue", "Green")[: 2 if shifts else 1]]
        rule = elbv2.ApplicationListenerRule(
            self,
            "Rule",
            listener=listener,
            priority=stable_number(artifact.name, 1, 49_999),
            conditions=[elbv2.ListenerCondition.path_patterns([f"{path}*"])],
            action=elbv2.ListenerAction.weighted_forward(
                [elbv2.WeightedTargetGroup(target_group=group, weight=100 * (not i)) for i, group in enumerate(targets)]
            ),
        )
        self.alarms = self._alarms(targets, sizing)
        self.service = self._service(cluster, sizing, task)
        target = self.service.load_balancer_target(
            container_name="serve",
            container_port=template.port,
            alternate_target=self._alternate(targets, rule) if shifts else None,
        )
        target.attach_to_application_target_group(targets[0])
        self.group.connections.allow_from(listener, ec2.Port.tcp(template.port), "The load balancer")
        # the load balancer refuses a target group that no listener knows yet
        self.service.node.add_dependency(rule)
        self._scale(sizing)

    def _service(self, cluster: ecs.Cluster, sizing: Sizing, task: ecs.TaskDefinition) -> ecs.FargateService:
        machines = sizing.capacity and ecs.CapacityProviderStrategy(
            capacity_provider=sizing.capacity.capacity_provider_name, weight=1
        )
        strategy = {
            "rolling": ecs.DeploymentStrategy.ROLLING,
            "canary": ecs.DeploymentStrategy.CANARY,
            "linear": ecs.DeploymentStrategy.LINEAR,
            "blue-green": ecs.DeploymentStrategy.BLUE_GREEN,
        }[sizing.update]
        shift = ecs.TrafficShiftConfig
        service = ecs.FargateService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            # no desired_count: it would set back on each deployment what was scaled since; the scaling holds the least
            capacity_provider_strategies=[machines] if machines else None,
            security_groups=[self.group],
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            assign_public_ip=False,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            deployment_alarms=ecs.DeploymentAlarmConfig(
                alarm_names=[alarm.alarm_name for alarm in self.alarms],
                behavior=ecs.AlarmBehavior.ROLLBACK_ON_ALARM,
            ),
            deployment_strategy=strategy,
            bake_time=None if sizing.update == "rolling" else BAKE,
            canary_configuration=shift(step_percent=10, step_bake_time=STEP) if sizing.update == "canary" else None,
            linear_configuration=shift(step_percent=20, step_bake_time=STEP) if sizing.update == "linear" else None,
            min_healthy_percent=100,
            max_healthy_percent=200,
            health_check_grace_period=cdk.Duration.seconds(120),
            enable_ecs_managed_tags=True,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )
        # a task cannot start before its execution role may pull and log
        service.node.add_dependency(task.obtain_execution_role())
        return service

    def _targets(
        self, construct_id: str, template: ImageTemplate, network: NetworkStack
    ) -> elbv2.ApplicationTargetGroup:
        return elbv2.ApplicationTargetGroup(
            self,
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

    def _alternate(
        self, targets: list[elbv2.ApplicationTargetGroup], rule: elbv2.ApplicationListenerRule
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
            self,
            "ShiftRole",
            assumed_by=own_service(self, "ecs.amazonaws.com"),
            inline_policies={"shift": iam.PolicyDocument(statements=statements)},
        )
        acknowledge(role, WILDCARD, "The describing actions know no resource; what changes is named.")
        return ecs.AlternateTarget(
            "Alternate",
            alternate_target_group=targets[1],
            production_listener=ecs.ListenerRuleConfiguration.application_listener_rule(rule),
            role=role,
        )

    def _alarms(self, targets: list[elbv2.ApplicationTargetGroup], sizing: Sizing) -> tuple[cloudwatch.Alarm, ...]:
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
                self,
                construct_id,
                metric=metric,
                threshold=threshold,
                evaluation_periods=SLOW_PERIODS,
                datapoints_to_alarm=2,
                comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_THRESHOLD,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
                alarm_description=what,
            )

        slow = sizing.slow_ms / 1000
        return (
            alarm("Errors", worst("errors", "SUM", "5xx"), MOST_ERRORS, "Answers with a status of 500 or more"),
            alarm("Slow", worst("slow", "MAX", "p99"), slow, "99 % of the answers take longer, in seconds"),
        )

    def _scale(self, sizing: Sizing) -> None:
        scaling = self.service.auto_scale_task_count(min_capacity=sizing.tasks, max_capacity=sizing.max_tasks)
        # by CPU and not by requests a target: that is counted for one target group, and traffic changes between two
        scaling.scale_on_cpu_utilization("Cpu", target_utilization_percent=CPU_PERCENT)
        if sizing.hours is not None:
            zone = cdk.TimeZone.of(sizing.hours.timezone)
            for name, hour, least, most in (
                ("Wake", sizing.hours.start, sizing.tasks, sizing.max_tasks),
                ("Sleep", sizing.hours.end, 0, 0),
            ):
                schedule = autoscaling.Schedule.expression(f"cron(0 {hour} ? * {sizing.hours.days} *)")
                scaling.scale_on_schedule(
                    name, schedule=schedule, time_zone=zone, min_capacity=least, max_capacity=most
                )
