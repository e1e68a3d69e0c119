"""The task of one bundle: one container brings it from the bucket and verifies it, the other serves it."""

from dataclasses import dataclass

from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_ecr_assets as assets
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.findings import ENVIRONMENT, WILDCARD, acknowledge
from infra.principals import own_service
from infra.storage import StorageStack
from infra.template import Command, ImageTemplate
from models.config import CpuSettings
from models.release import Artifact, artifact_key

USER = "10001"  # not root, and not a user of the host
VOLUME = "model"
ARM64 = ecs.RuntimePlatform(
    cpu_architecture=ecs.CpuArchitecture.ARM64, operating_system_family=ecs.OperatingSystemFamily.LINUX
)


@dataclass(frozen=True)
class Place:
    """Say where a task runs and how large it is: `cpu` in units of 1/1024 vCPU, `memory_mib` in MiB.

    On machines of the customer's own (EXTERNAL) the task has no network interface of the VPC, so its port becomes the
    machine's `host_port`.
    """

    compatibility: ecs.Compatibility
    cpu: int
    memory_mib: int
    host_port: int | None = None


def bundle_task(
    scope: Construct,
    *,
    place: Place,
    settings: CpuSettings,
    artifact: Artifact,
    template: ImageTemplate,
    storage: StorageStack,
    statements: tuple[iam.PolicyStatement, ...] = (),
    run: Command | None = None,
) -> ecs.TaskDefinition:
    """Return the task that serves a bundle, or that runs the command `run` on it and ends.

    The image holds code and libraries alone. The container `fetch` brings the bundle of the release, verifies it with
    the trusted key and ends; the other starts only where that succeeded. The task's role reads every version of the
    bundle: until a deployment ends, or when it is taken back, tasks of the version before still start and fetch theirs.
    """
    readable = storage.reading(artifact_key(artifact.name, "*") + "*")
    task = empty_task(scope, place=place, statements=(*readable, *statements))
    task.add_volume(name=VOLUME)
    image = container_image(scope, settings.image, settings.context)
    log = log_driver(scope, artifact.name, storage)

    def container(name: str, command: Command, *, essential: bool) -> ecs.ContainerDefinition:
        added = add_container(
            task, name, image=image, command=command, essential=essential, log=log, environment=template.environment
        )
        added.add_mount_points(
            # Fargate takes owner and mode of the volume from the image, which has to declare it for this user
            ecs.MountPoint(source_volume=VOLUME, container_path=template.mount, read_only=essential)
        )
        return added

    fetch = container("fetch", template.fetch, essential=False)
    if run is None:
        serve = container("serve", template.serve, essential=True)
        serve.add_port_mappings(ecs.PortMapping(container_port=template.port, host_port=place.host_port))
    else:
        serve = container("run", run, essential=True)
    serve.add_container_dependencies(
        ecs.ContainerDependency(container=fetch, condition=ecs.ContainerDependencyCondition.SUCCESS)
    )
    return task


def empty_task(scope: Construct, *, place: Place, statements: tuple[iam.PolicyStatement, ...]) -> ecs.TaskDefinition:
    """Return a task definition without containers, whose role may do what `statements` say and nothing else."""
    role = iam.Role(
        scope,
        "Role",
        assumed_by=own_service(scope, "ecs-tasks.amazonaws.com"),
        inline_policies={"task": iam.PolicyDocument(statements=list(statements))} if statements else None,
    )
    acknowledge(role, WILDCARD, "Every version of one artifact, or every object below a prefix.")
    external = place.compatibility == ecs.Compatibility.EXTERNAL
    task = ecs.TaskDefinition(
        scope,
        "Task",
        compatibility=place.compatibility,
        cpu=str(place.cpu),
        memory_mib=str(place.memory_mib),
        network_mode=ecs.NetworkMode.BRIDGE if external else ecs.NetworkMode.AWS_VPC,
        # of the customer's machines we do not know what they are: their image has both platforms
        runtime_platform=None if external else ARM64,
        task_role=role,
        # the CDK's own could be sent here from another account
        execution_role=iam.Role(scope, "ExecutionRole", assumed_by=own_service(scope, "ecs-tasks.amazonaws.com")),
    )
    acknowledge(
        task.obtain_execution_role(),
        WILDCARD,
        "The execution role's ecr:GetAuthorizationToken knows no resource; images are named.",
    )
    acknowledge(task, ENVIRONMENT, "Public keys, signatures and names of buckets: none of it is a secret.")
    return task


def add_container(
    task: ecs.TaskDefinition,
    name: str,
    *,
    image: ecs.ContainerImage,
    command: Command,
    essential: bool,
    log: ecs.LogDriver,
    environment: dict[str, str],
) -> ecs.ContainerDefinition:
    """Add a container that is not root, has no capability and writes to its volumes alone."""
    linux = ecs.LinuxParameters(task, f"{name}-linux", init_process_enabled=True)
    linux.drop_capabilities(ecs.Capability.ALL)
    return task.add_container(
        name,
        image=image,
        command=list(command),
        environment=environment,
        essential=essential,
        user=USER,
        privileged=False,
        readonly_root_filesystem=True,
        linux_parameters=linux,
        logging=log,
    )


def log_driver(scope: Construct, name: str, storage: StorageStack) -> ecs.LogDriver:
    """Return a log group of the construct, kept for a month and encrypted with the environment's key."""
    return ecs.LogDrivers.aws_logs(
        stream_prefix=name,
        log_group=logs.LogGroup(scope, "LogGroup", encryption_key=storage.key, retention=logs.RetentionDays.ONE_MONTH),
    )


def container_image(scope: Construct, image: str | None, context: str | None = None) -> ecs.ContainerImage:
    """Return the image of that digest in the environment's registry, or the one that the CDK builds from a folder."""
    if context is not None:
        return ecs.ContainerImage.from_docker_image_asset(
            assets.DockerImageAsset(scope, "Image", directory=context, platform=assets.Platform.LINUX_ARM64)
        )
    assert image is not None
    repository, digest = image.split("@")
    return ecs.ContainerImage.from_ecr_repository(
        ecr.Repository.from_repository_name(scope, "Repository", repository), digest
    )
