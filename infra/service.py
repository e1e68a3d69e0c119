"""One bundle as a service on the private cluster: its tasks, how they are updated, scaled and watched."""

import hashlib
from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_applicationautoscaling as autoscaling
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.network import NetworkStack, closed_group
from infra.shift import alternate, shift_alarms, target_group
from infra.storage import StorageStack
from infra.task import Place, bundle_task
from infra.template import ImageTemplate
from models.config import CpuSettings, Hours
from models.release import Artifact

CPU_PERCENT = 60
BAKE = cdk.Duration.minutes(10)  # both revisions stay this long after the last shift, so that a rollback is one rule
STEP = cdk.Duration.minutes(5)


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
        self.targets = targets = [
            target_group(self, name, template, network) for name in ("Blue", "Green")[: 2 if shifts else 1]
        ]
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
        self.alarms = shift_alarms(self, targets, sizing.slow_ms)
        self.service = self._service(cluster, sizing, task)
        target = self.service.load_balancer_target(
            container_name="serve",
            container_port=template.port,
            alternate_target=alternate(self, targets, rule) if shifts else None,
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
