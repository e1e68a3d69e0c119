"""Containers: ECS services on Fargate and on EC2, their clusters, EKS."""

import re
from decimal import ROUND_CEILING, Decimal
from typing import Any

from infra.cost.compute import volumes
from infra.cost.lines import Meter, NotStatic, View, each
from infra.cost.scaling import Index, Pricer, capacity, property_of
from infra.cost.usage import MB_PER_GB, Three, requests


def ecs_service(meter: Meter, index: Index) -> None:
    """Price a service's tasks on Fargate; on EC2 its cluster's instances are billed, once."""
    service = meter.properties
    shares = _providers(service, index)
    if service.text("SchedulingStrategy", "REPLICA") == "DAEMON":
        if set(shares) != {"EC2"}:
            raise NotStatic("a daemon, which Fargate does not run")
        return meter.free("a daemon runs on the cluster's instances, which are billed once, where they are declared")
    if set(shares) == {"EC2"}:
        return meter.free("its tasks run on the cluster's instances, which are billed once, where they are declared")
    task = index.at(service.get("TaskDefinition"), "AWS::ECS::TaskDefinition")
    if task is None:
        return meter.unknown("tasks", "its task definition is in no template here")
    shape = View(task.properties, "TaskDefinition.")
    platform = shape.view("RuntimePlatform")
    if not platform.text("OperatingSystemFamily", "LINUX").upper().startswith("LINUX"):
        return meter.unknown("tasks", "the price book has none for Windows on Fargate")
    chip = {"ARM64": "arm", "X86_64": "x86"}.get(platform.text("CpuArchitecture", "X86_64").upper(), "other")
    cpu, memory = _size(shape, "Cpu", "vCPU"), _size(shape, "Memory", "GB")
    storage = shape.view("EphemeralStorage").number("SizeInGiB", 20)
    target = index.scaler(meter.resource, "ecs:service:DesiredCount")
    meter.serves(lambda u: requests(u["requests_per_second"], meter.hours), "requests_per_second")
    tasks, note = capacity(meter, service.number("DesiredCount", 1), target, shape)
    shape.reads.update(service.reads)
    for provider, share in shares.items():
        if provider == "EC2":
            meter.unknown("tasks", "a capacity provider that is neither FARGATE nor FARGATE_SPOT")
            continue
        kind = "fargate_spot" if provider == "FARGATE_SPOT" else "fargate"
        label = f"Fargate{' Spot' if kind == 'fargate_spot' else ''} ({chip})"
        count = each(tasks, share)
        meter.hourly(f"vCPU of tasks: {label}", f"{kind}.linux.{chip}.vcpu", each(count, cpu), of=shape, note=note)
        meter.hourly(
            f"memory of tasks: {label}", f"{kind}.linux.{chip}.memory", each(count, memory), of=shape, note=note
        )
        if storage > 20:
            meter.hourly(
                f"storage of tasks over 20 GB: {label}",
                "fargate.ephemeral_storage",
                each(count, storage - 20),
                of=shape,
            )
    for volume in service.items("VolumeConfigurations"):
        volumes(meter, volume.view("ManagedEBSVolume"), "SizeInGiB", tasks, default="gp3")
    network = service.view("NetworkConfiguration").view("AwsvpcConfiguration")
    if network.text("AssignPublicIp", "DISABLED") == "ENABLED":
        meter.hourly("public IPv4 addresses of tasks", "public_ipv4.hour", tasks, of=network)
    meter.told("data out to the internet", "egress.internet", "internet_gb")
    meter.told("data between zones", "intra_region.inter_az_each_way", "cross_zone_gb")
    _deploying(meter, service, tasks, {"vcpu": cpu, "memory": memory}, shares, chip)
    return None


def _size(shape: View, name: str, unit: str) -> Decimal:
    """Return a task's vCPU or memory in GB, which may be written as 1024, or as "1 vCPU" or "2 GB"."""
    said = re.fullmatch(rf"([0-9]*\.?[0-9]+) ?{unit}", shape.text(name), re.IGNORECASE)
    return Decimal(said[1]) if said else shape.number(name) / MB_PER_GB


def _deploying(
    meter: Meter, service: View, tasks: Three, sizes: dict[str, Decimal], shares: dict[str, Decimal], chip: str
) -> None:
    """Price the tasks that a deployment runs beside the old ones: a part of them, or all while blue and green bake.

    The key deployment_minutes adds what starting takes.
    """
    policy = service.view("DeploymentConfiguration")
    baking = _baking(policy)
    extra = Decimal(1) if baking is not None else policy.number("MaximumPercent", 200) / 100 - 1
    if extra <= 0 or "EC2" in shares:
        return
    kind = "fargate" if "FARGATE" in shares else "fargate_spot"
    what = "the old while a release starts" if baking is None else "the old while a release bakes"
    for name, size in sizes.items():
        item = f"{'vCPU' if name == 'vcpu' else name} of new tasks beside {what}"
        sku, running = f"{kind}.linux.{chip}.{name}", tasks[1] * extra * size
        if baking and meter.ask("deployment_minutes") is None:
            meter.release(item, sku, running * baking / 60, of=service,
                          note="without the minutes that starting takes: deployment_minutes")  # fmt: skip
        else:
            meter.used(
                item, sku,
                lambda u, running=running: running * ((baking or 0) + u["deployment_minutes"]) / 60,  # type: ignore[misc]
                "deployment_minutes", of=service, status="release",
            )  # fmt: skip


def _baking(policy: View) -> Decimal | None:
    """Return the minutes for which a service runs blue and green beside each other; None for a rolling deployment.

    Green has all its tasks before the first request is shifted (ECS developer guide, "Blue/green deployments").
    """
    strategy = policy.text("Strategy", "ROLLING")
    if strategy == "ROLLING":
        return None
    baking = policy.number("BakeTimeInMinutes", 0)
    if strategy == "CANARY":
        baking += policy.view("CanaryConfiguration").number("CanaryBakeTimeInMinutes", 10)
    elif strategy == "LINEAR":
        linear = policy.view("LinearConfiguration")
        steps = (100 / (linear.number("StepPercent", 10, whole=False) or Decimal(100))).to_integral_value(ROUND_CEILING)
        baking += (steps - 1) * linear.number("StepBakeTimeInMinutes", 6)
    elif strategy != "BLUE_GREEN":
        raise NotStatic(f"the deployment strategy {strategy}")
    return baking


def _providers(service: View, index: Index) -> dict[str, Decimal]:
    """Return the share of tasks by provider: FARGATE, FARGATE_SPOT, or EC2 for any other."""
    strategy = service.items("CapacityProviderStrategy")
    launch = service.text("LaunchType")
    if not strategy and not launch:
        strategy = _default_strategy(service.get("Cluster"), index)
    if not strategy:
        if launch not in ("", "EC2", "FARGATE"):
            raise NotStatic(f"the price book has none for the launch type {launch}")
        return {"FARGATE" if launch == "FARGATE" else "EC2": Decimal(1)}
    weights: dict[str, Decimal] = {}
    for item in strategy:
        name = item.get("CapacityProvider")
        provider = index.at(name, "AWS::ECS::CapacityProvider")
        if provider and property_of(provider, "ManagedInstancesProvider") is not None:
            raise NotStatic("instances that ECS chooses and manages: the price book has none")
        key = name if name in ("FARGATE", "FARGATE_SPOT") else "EC2"
        if item.number("Base", 0) and len(strategy) > 1:
            raise NotStatic(
                "a capacity provider strategy with a base: the share of each provider changes with the count"
            )
        weights[key] = weights.get(key, Decimal(0)) + item.number("Weight", 1 if len(strategy) == 1 else 0)
    total = sum(weights.values())
    if not total:
        raise NotStatic("a capacity provider strategy without weights")
    return {key: weight / total for key, weight in weights.items() if weight}


def _default_strategy(pointer: Any, index: Index) -> list[View]:
    """Return the strategy of a cluster for services that have none and no launch type, which run on EC2 without one."""
    cluster = index.at(pointer, "AWS::ECS::Cluster")
    if cluster is None:
        raise NotStatic("without a launch type its cluster decides where it runs, which is in no template here")
    ties = index.of("AWS::ECS::ClusterCapacityProviderAssociations")
    mine = [tie for tie in ties if index.at(property_of(tie, "Cluster"), cluster.type) is cluster]
    return [item for it in (cluster, *mine) for item in View(it.properties).items("DefaultCapacityProviderStrategy")]


def ecs_cluster(meter: Meter, index: Index) -> None:
    """Say that a cluster is free, and price the metrics of its Container Insights."""
    settings = meter.properties.items("ClusterSettings")
    if any(s.text("Name") == "containerInsights" and s.text("Value") != "disabled" for s in settings):
        meter.used(
            "metrics of Container Insights", "cw.metric.custom", lambda u: u["metrics"] * meter.hours / 730, "metrics"
        )
    else:
        meter.free("a cluster costs nothing; its tasks and instances do")


def eks_cluster(meter: Meter, index: Index) -> None:
    """Price the control plane of an EKS cluster."""
    meter.hourly(
        "control plane", "eks.cluster.hour", Decimal(1), note="a version in extended support costs six times as much"
    )
    if meter.properties.view("ComputeConfig").flag("Enabled"):
        meter.unknown("instances", "those that the cluster starts and manages by itself are in no template")


PRICED: dict[str, Pricer] = {
    "AWS::ECS::Service": ecs_service,
    "AWS::ECS::Cluster": ecs_cluster,
    "AWS::EKS::Cluster": eks_cluster,
}
