"""What must hold between the settings of an environment, its region and its release, before anything is synthesized."""

from collections.abc import Sequence

from models.config import Environment, Fleet
from models.release import Release, ShipyardError

# Families that SageMaker hosts by region, of those that fleet.toml allows (schemas of cfn-lint 1.58, "sagemaker hosting").
GPU_FAMILIES = {
    "ap-northeast-1": "g4dn g5 g6 g6e",
    "ap-northeast-2": "g4dn g5 g6 g6e",
    "ap-south-1": "g4dn g5 g6 g6e",
    "ap-southeast-1": "g4dn g5",
    "ap-southeast-2": "g4dn g5 g6",
    "ca-central-1": "g4dn g5 g6",
    "eu-central-1": "g4dn g5 g6 g6e",
    "eu-north-1": "g4dn g5 g6",
    "eu-west-1": "g4dn g5 g6",
    "eu-west-2": "g4dn g5 g6",
    "eu-west-3": "g4dn g6",
    "sa-east-1": "g4dn g5 g6",
    "us-east-1": "g4dn g5 g6 g6e",
    "us-east-2": "g4dn g5 g6 g6e",
    "us-west-1": "g4dn",
    "us-west-2": "g4dn g5 g6 g6e",
}

# Memory in MiB by CPU units (Amazon ECS developer guide, "Task size").
FARGATE_MEMORY: dict[int, Sequence[int]] = {
    256: (512, 1024, 2048),
    512: range(1024, 4097, 1024),
    1024: range(2048, 8193, 1024),
    2048: range(4096, 16385, 1024),
    4096: range(8192, 30721, 1024),
    8192: range(16384, 61441, 4096),
    16384: range(32768, 122881, 8192),
}


def check(name: str, fleet: Fleet) -> None:
    """Check an environment.

    Raises:
        ShipyardError: the first thing that does not hold, with what is allowed.
    """
    env = fleet.env[name]
    where = f"env.{name}"
    _check_gpu(where, env)
    _check_cpu(where, env)
    _check_ways(where, env)
    if env.production:
        _check_production(where, env)
    _check_training(where, env)
    _check_pipeline(name, fleet)
    source = env.delivery.promote_from if env.delivery else None
    if source is not None and (source == name or source not in fleet.env):
        raise ShipyardError(
            f"{where}.delivery.promote_from: no such environment",
            value=source,
            allowed=", ".join(other for other in fleet.env if other != name) or "another environment",
            mend="name the environment that releases come from",
        )


def check_release(name: str, env: Environment, release: Release, shadow: Release | None) -> None:
    """Check what an environment asks of its release.

    Raises:
        ShipyardError: scoring or a shadow is asked for and no artifact of the release can.
    """
    where = f"env.{name}"
    if env.cpu.score_at is not None and not any("score" in a.template for a in release.of("image-context")):
        raise ShipyardError(
            f"{where}.cpu.score_at: no sub-model of the release can score",
            value=release.version,
            allowed="a release whose image-context artifacts have a command to score with",
            mend="remove score_at or name another release",
        )
    if shadow is not None:
        answering = {artifact.name: artifact.digest for artifact in release.of("triton")}
        shadows = {artifact.name: artifact.digest for artifact in shadow.of("triton")}
        if all(shadows.get(artifact) in (None, digest) for artifact, digest in answering.items()):
            raise ShipyardError(
                f"{where}.gpu.shadow: has no other model than the release itself",
                value=shadow.version,
                allowed="a release with another model of the same name",
                mend="remove shadow or name another release",
            )


def _check_gpu(where: str, env: Environment) -> None:
    gpu = env.gpu
    families = GPU_FAMILIES.get(env.region, "").split()
    for key, types in (("instance_type", (gpu.instance_type,)), ("fallback", gpu.fallback)):
        for kind in types:
            if families and kind.split(".")[1] not in families:
                raise ShipyardError(
                    f"{where}.gpu.{key}: SageMaker has no such type in {env.region}",
                    value=kind,
                    allowed=", ".join(f"ml.{family}" for family in families),
                    mend="choose another type or region",
                )
    if len({gpu.instance_type, *gpu.fallback}) <= len(gpu.fallback):
        raise ShipyardError(
            f"{where}.gpu.fallback: the same type twice",
            value=", ".join(gpu.fallback),
            allowed="types that differ, and from instance_type too",
            mend="remove one",
        )
    if gpu.max_instances is not None and gpu.max_instances < gpu.instances:
        raise ShipyardError(
            f"{where}.gpu.max_instances: less than instances",
            value=gpu.max_instances,
            allowed=f"{gpu.instances} or more",
            mend="raise it",
        )
    if gpu.update == "rolling" and (gpu.instances == 1 or gpu.shadow is not None):
        raise ShipyardError(
            f"{where}.gpu.update: no rolling update of one instance, or beside a shadow",
            value="rolling",
            allowed="canary, linear",
            mend="choose one of these, or two instances and no shadow",
        )


def _check_cpu(where: str, env: Environment) -> None:
    cpu = env.cpu
    if (cpu.image is None) == (cpu.context is None):
        raise ShipyardError(
            f"{where}.cpu: not one image", allowed="exactly one of image and context", mend="keep one of the two"
        )
    if cpu.max_tasks is not None and cpu.max_tasks < cpu.tasks:
        raise ShipyardError(
            f"{where}.cpu.max_tasks: less than tasks",
            value=cpu.max_tasks,
            allowed=f"{cpu.tasks} or more",
            mend="raise it",
        )
    sized = [("gateway", env.gateway.cpu, env.gateway.memory_mib)]
    sized += [(f"cpu.job.{name}", job.cpu, job.memory_mib) for name, job in cpu.job.items()]
    # scoring runs on Fargate, whatever the services run on
    if cpu.instance_type is None or cpu.score_at is not None:
        sized.append(("cpu", cpu.cpu, cpu.memory_mib))
    for key, units, memory in sized:
        sizes = FARGATE_MEMORY[units]
        if memory not in sizes:
            raise ShipyardError(
                f"{where}.{key}.memory_mib: not a size of Fargate for {units} CPU units",
                value=memory,
                allowed=f"{', '.join(str(size) for size in sizes[:3])} ... {sizes[-1]}",
                mend="correct one of the two",
            )


def _check_ways(where: str, env: Environment) -> None:
    """Check gateway, link, and the existing VPC."""
    gateway = env.gateway
    if (gateway.api == "jwt") != bool(gateway.issuer and gateway.audience):
        raise ShipyardError(
            f"{where}.gateway: issuer and audience belong to JWT",
            value=gateway.api,
            allowed='api = "jwt" with both, or another api with neither',
            mend="complete or remove them",
        )
    if env.vpc is not None and not len(env.vpc.subnets) == len(env.vpc.route_tables) == len(env.zones):
        raise ShipyardError(
            f"{where}.vpc: not one subnet and one route table a zone",
            value=f"{len(env.vpc.subnets)} and {len(env.vpc.route_tables)}",
            allowed=f"{len(env.zones)} of each",
            mend="name them in the order of the zones",
        )
    if env.replica == env.region:
        raise ShipyardError(
            f"{where}.replica: the environment's own region",
            value=env.replica,
            allowed="another region",
            mend="choose another one",
        )
    if env.link is not None and (env.link.kind == "vpn") != (env.link.peer is not None):
        raise ShipyardError(
            f"{where}.link.peer: belongs to a VPN",
            value=env.link.peer,
            allowed='kind = "vpn" with the address of the other end, or "direct-connect" without',
            mend="add or remove it",
        )
    if env.link is not None and (env.link.domain is None) != (not env.link.resolvers):
        raise ShipyardError(
            f"{where}.link.resolvers: domain and resolvers belong together",
            value=env.link.domain,
            allowed="both or neither",
            mend="complete or remove them",
        )


def _check_training(where: str, env: Environment) -> None:
    """Check that what is named for training jobs lies in the environment's own account and region."""
    if env.training is None:
        return
    place, role = env.training.place, env.training.role
    named = {"training.place.key": place.key if place else None, "training.role": role}
    for key, arn in named.items():
        parts = arn.split(":") if arn else []
        if arn is not None and (parts[4] != env.account or parts[3] not in ("", env.region)):
            raise ShipyardError(
                f"{where}.{key}: of another account or region",
                value=arn,
                allowed=f"account {env.account}, region {env.region}",
                mend="correct it",
            )


def _check_pipeline(name: str, fleet: Fleet) -> None:
    """Check that a pipeline begins where releases are made, leads somewhere, and has a connection of its own place."""
    env = fleet.env[name]
    if env.delivery is None or env.delivery.pipeline is None:
        return
    where = f"env.{name}.delivery.pipeline"
    if env.delivery.promote_from is not None or len(fleet.way(name)) < 2:
        raise ShipyardError(
            f"{where}: no release begins its way here", value=", ".join(fleet.way(name)),
            allowed="an environment without promote_from, from which one other takes releases",
            mend="move the table to the first environment",
        )  # fmt: skip
    parts = env.delivery.pipeline.connection.split(":")
    if parts[3:5] != [env.region, env.account]:
        raise ShipyardError(
            f"{where}.connection: of another account or region", value=env.delivery.pipeline.connection,
            allowed=f"account {env.account}, region {env.region}", mend="make one there",
        )  # fmt: skip
    if env.delivery.pipeline.profile not in fleet.profile:
        raise ShipyardError(
            f"{where}.profile: no such profile", value=env.delivery.pipeline.profile, allowed=", ".join(fleet.profile),
            mend="name one of them",
        )  # fmt: skip


def _check_production(where: str, env: Environment) -> None:
    """Hold production to what the others may do without."""
    missing = {
        "observe": (env.observe is None, "a table observe: production has alarms, and somebody who is told"),
        "hours": (env.hours is not None, "no hours: production does not sleep"),
        "gpu.instances": (env.gpu.instances < 2, "2 or more, in two zones"),
        "cpu.tasks": (env.cpu.tasks < 2, "2 or more, in two zones"),
        "gateway.tasks": (env.gateway.tasks < 2, "2 or more, in two zones"),
    }
    for key, (wrong, allowed) in missing.items():
        if wrong:
            value = None if key in ("observe", "hours") else 1
            raise ShipyardError(f"{where}.{key}: not for production", value=value, allowed=allowed, mend="correct it")
