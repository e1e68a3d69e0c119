"""What the cluster does by a schedule: score all households offline, and run jobs such as the models' update."""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_iam as iam
from aws_cdk import aws_scheduler as scheduler
from aws_cdk import aws_scheduler_targets as targets
from aws_cdk import aws_sqs as sqs
from constructs import Construct

from infra.network import NetworkStack, closed_group
from infra.storage import StorageStack
from infra.task import Place, add_container, bundle_task, container_image, empty_task, log_driver
from infra.template import ImageTemplate
from models.config import CpuSettings, Job
from models.release import Artifact

SCORING = "scoring/"  # below it, in the data bucket, what waits to be scored and what was


class ScheduledTask(Construct):
    """Start a task of the cluster by a schedule; a start that failed three times is kept in a queue for two weeks."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        at: str,
        cluster: ecs.Cluster,
        task: ecs.TaskDefinition,
        group: ec2.ISecurityGroup,
    ) -> None:
        """Make schedule, queue and the role that may start this task alone."""
        super().__init__(scope, construct_id)
        failed = sqs.Queue(
            self,
            "Failed",
            encryption=sqs.QueueEncryption.SQS_MANAGED,
            enforce_ssl=True,
            retention_period=cdk.Duration.days(14),
        )
        cdk.Validations.of(failed).acknowledge(
            cdk.Acknowledgment(id="AwsSolutions-SQS3", reason="It is itself the queue for what failed.")
        )
        scheduler.Schedule(
            self,
            "Schedule",
            schedule=scheduler.ScheduleExpression.expression(at, cdk.TimeZone.ETC_UTC),
            target=targets.EcsRunFargateTask(
                cluster,
                task_definition=task,
                assign_public_ip=False,
                vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
                security_groups=[group],
                dead_letter_queue=failed,
                retry_attempts=2,
                enable_ecs_managed_tags=True,
            ),
        )


def score(
    scope: Construct,
    construct_id: str,
    *,
    cluster: ecs.Cluster,
    settings: CpuSettings,
    artifact: Artifact,
    template: ImageTemplate,
    storage: StorageStack,
    group: ec2.ISecurityGroup,
) -> None:
    """Score all waiting requests with one bundle: the answers become objects of the data bucket."""
    assert settings.score_at is not None
    place = Construct(scope, construct_id)
    task = bundle_task(
        place,
        place=Place(ecs.Compatibility.FARGATE, cpu=settings.cpu, memory_mib=settings.memory_mib),
        settings=settings,
        artifact=artifact,
        template=template,
        storage=storage,
        statements=tuple(storage.data_access(reads=(f"{SCORING}in/",), writes=(f"{SCORING}out/{artifact.name}/",))),
        run=template.score,
    )
    ScheduledTask(place, "Run", at=settings.score_at, cluster=cluster, task=task, group=group)


def scheduled_job(
    scope: Construct,
    construct_id: str,
    *,
    job: Job,
    cluster: ecs.Cluster,
    storage: StorageStack,
    network: NetworkStack,
) -> None:
    """Run a command of an image of the customer's own, with access to the named prefixes of the data bucket."""
    place = Construct(scope, construct_id)
    statements: list[iam.PolicyStatement] = storage.data_access(reads=job.reads, writes=job.writes)
    task = empty_task(
        place,
        place=Place(ecs.Compatibility.FARGATE, cpu=job.cpu, memory_mib=job.memory_mib),
        statements=tuple(statements),
    )
    task.add_volume(name="scratch")
    added = add_container(
        task,
        "run",
        image=container_image(place, job.image),
        command=job.command,
        essential=True,
        log=log_driver(place, construct_id, storage),
        environment={"SHIPYARD_DATA": f"s3://{storage.data_name}/"},
    )
    added.add_mount_points(ecs.MountPoint(source_volume="scratch", container_path="/tmp", read_only=False))  # noqa: S108
    group = closed_group(place, "SecurityGroup", vpc=network.vpc, description=f"Task of {construct_id}")
    group.connections.allow_to(network.endpoints, ec2.Port.tcp(443), "Image and logs")
    group.connections.allow_to(network.s3, ec2.Port.tcp(443), "Image layers and data")
    ScheduledTask(place, "Run", at=job.at, cluster=cluster, task=task, group=group)
