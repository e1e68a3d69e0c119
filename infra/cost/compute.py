"""What computes: SageMaker endpoints, ECS, EC2, EBS, Lambda, CodeBuild."""

from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal

from infra.cost.lines import Meter, NotStatic, Resource, View, three
from infra.cost.resolve import Pointer
from infra.cost.scaling import Index, capacity, property_of
from infra.cost.usage import Three, requests

KB_PER_GB = Decimal(1024 * 1024)
MB_PER_GB = Decimal(1024)

Pricer = Callable[[Meter, Index], None]


def endpoint_config(meter: Meter, index: Index) -> None:
    """Price an endpoint's variants: instances, volumes, serverless capacity, data and data capture."""
    users = [
        endpoint
        for endpoint in index.of("AWS::SageMaker::Endpoint")
        if (config := property_of(endpoint, "EndpointConfigName")) is not None
        and (
            index.at(config, "AWS::SageMaker::EndpointConfig") is meter.resource
            or (isinstance(config, str) and config == property_of(meter.resource, "EndpointConfigName"))
        )
    ]
    if len(users) > 1:
        raise NotStatic("several endpoints use this configuration; give each its own")
    note = "" if users else "no endpoint in these templates uses it: one is assumed"
    for kind in ("ProductionVariants", "ShadowProductionVariants"):
        for variant in meter.properties.items(kind):
            name = variant.text("VariantName", "variant")
            label = f"{'shadow variant' if kind.startswith('Shadow') else 'variant'} {name}"
            try:
                if variant.get("ServerlessConfig") is not None:
                    _serverless(meter, variant.view("ServerlessConfig"), label)
                    continue
                size, fallback = _size(variant)
                count, why = _instances(meter, index, variant, name, users[0] if users else None)
                said = "; ".join(part for part in (note, why, fallback) if part)
                meter.hourly(f"{label}: {size}", f"sagemaker.hosting.{size}", count, of=variant, note=said)
                if variant.get("VolumeSizeInGB") is not None:
                    size_gb = variant.number("VolumeSizeInGB")
                    volumes = _each(count, size_gb)
                    meter.monthly(f"{label}: volumes", "sagemaker.hosting.storage.gp2", volumes, of=variant)
            except NotStatic as fault:
                meter.unknown(label, str(fault))
    meter.serves(lambda u: requests(u["requests_per_second"], meter.hours), "requests_per_second")
    meter.used(
        "data in and out of the models", "sagemaker.hosting.data_processed",
        lambda u: requests(u["requests_per_second"], meter.hours) * (u["request_kb"] + u["response_kb"]) / KB_PER_GB,
        "requests_per_second", "request_kb", "response_kb",
    )  # fmt: skip
    capture = meter.properties.view("DataCaptureConfig")
    if str(capture.get("EnableCapture", False)).lower() == "true":
        part = capture.number("InitialSamplingPercentage", 100) / 100
        meter.used(
            "captured data, kept in S3", "s3.standard.storage",
            lambda u: part * requests(u["requests_per_second"], meter.hours) * (u["request_kb"] + u["response_kb"])
            / KB_PER_GB * (1 + u["months"]),
            "requests_per_second", "request_kb", "response_kb", "months", of=capture,
        )  # fmt: skip


def _size(variant: View) -> tuple[str, str]:
    """Return a variant's instance type, with a note on those that stand in for it; of pools the first choice."""
    pools = variant.items("InstancePools")
    if not pools:
        size = variant.text("InstanceType")
        if not size:
            raise NotStatic("a variant without an instance type")
        return size, ""
    pools.sort(key=lambda pool: pool.number("Priority", 1))
    first, *others = [pool.text("InstanceType") for pool in pools]
    variant.reads["InstancePools"] = ", ".join([first, *others])
    return first, f"the first choice; where it cannot be had, {', '.join(others)} at another price" if others else ""


def _instances(meter: Meter, index: Index, variant: View, name: str, endpoint: Resource | None) -> tuple[Three, str]:
    managed = variant.view("ManagedInstanceScaling")
    if managed.text("Status", "DISABLED") == "ENABLED":
        least, most = managed.number("MinInstanceCount"), managed.number("MaxInstanceCount")
        return (least, least, most), "minimum, minimum and maximum of its managed scaling"
    initial = variant.number("InitialInstanceCount", 1)
    found = index.scaler(endpoint, "sagemaker:variant:DesiredInstanceCount", name) if endpoint else None
    return capacity(meter, initial, found, variant)


def endpoint(meter: Meter, index: Index) -> None:
    """Say that an endpoint is paid by its configuration, and price the second fleet that runs while a release bakes.

    A blue/green update runs old and new beside each other for its wait intervals and the wait before termination
    (SageMaker developer guide, "Blue/Green Deployments"); the key deployment_minutes adds what starting takes.
    """
    meter.free("its instances are priced with its configuration")
    config = index.at(meter.properties.get("EndpointConfigName"), "AWS::SageMaker::EndpointConfig")
    if config is None:
        return
    policy = meter.properties.view("DeploymentConfig").view("BlueGreenUpdatePolicy")
    baking = _baking(policy) if policy.reads else Decimal(0)
    start = meter.ask("deployment_minutes")
    for variant in View(config.properties).items("ProductionVariants"):
        if variant.get("ServerlessConfig") is not None:
            continue
        (size, _), count = _size(variant), variant.number("InitialInstanceCount", 1)
        variant.reads.update(policy.reads)
        item = f"second fleet while a release bakes: {size}"
        if baking and start is None:
            meter.release(item, f"sagemaker.hosting.{size}", count * baking / 3600, of=variant,
                          note="without the minutes that starting takes: deployment_minutes")  # fmt: skip
        else:
            meter.used(
                item, f"sagemaker.hosting.{size}",
                lambda u, count=count: count * (baking / 3600 + u["deployment_minutes"] / 60),  # type: ignore[misc]
                "deployment_minutes", of=variant, status="release",
            )  # fmt: skip


def _baking(policy: View) -> Decimal:
    """Return the seconds for which both fleets of a blue/green update run."""
    routing = policy.view("TrafficRoutingConfiguration")
    kind, wait = routing.text("Type", "ALL_AT_ONCE"), routing.number("WaitIntervalInSeconds", 0)
    steps = Decimal(1)
    if kind == "CANARY":
        steps = Decimal(2)
    elif kind == "LINEAR":
        size = routing.view("LinearStepSize")
        if size.text("Type") != "CAPACITY_PERCENT" or not size.number("Value"):
            raise NotStatic("a linear shift by instances")
        steps = (100 / size.number("Value")).to_integral_value(ROUND_CEILING)
    return steps * wait + policy.number("TerminationWaitInSeconds", 0)


def _serverless(meter: Meter, config: View, label: str) -> None:
    memory = config.number("MemorySizeInMB") / MB_PER_GB
    meter.used(
        f"{label}: serverless compute", "sagemaker.serverless.gb_second",
        lambda u: requests(u["requests_per_second"], meter.hours) * u["duration_ms"] / 1000 * memory,
        "requests_per_second", "duration_ms", of=config,
    )  # fmt: skip
    if config.get("ProvisionedConcurrency") is not None:
        count = config.number("ProvisionedConcurrency") * memory * 3600
        meter.hourly(f"{label}: provisioned concurrency", "sagemaker.serverless.pc_gb_second", count, of=config)


def ecs_service(meter: Meter, index: Index) -> None:
    """Price a service's tasks on Fargate; on EC2 its cluster's instances are billed, once."""
    service = meter.properties
    if service.text("SchedulingStrategy", "REPLICA") == "DAEMON":
        return meter.free("a daemon runs on the cluster's instances, which are billed once, where they are declared")
    shares = _providers(service, index)
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
    cpu, memory = shape.number("Cpu") / 1024, shape.number("Memory") / MB_PER_GB
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
        count = tuple(share * one for one in tasks)
        meter.hourly(f"vCPU of tasks: {label}", f"{kind}.linux.{chip}.vcpu", _each(count, cpu), of=shape, note=note)
        meter.hourly(
            f"memory of tasks: {label}", f"{kind}.linux.{chip}.memory", _each(count, memory), of=shape, note=note
        )
        if storage > 20:
            meter.hourly(
                f"storage of tasks over 20 GB: {label}",
                "fargate.ephemeral_storage",
                _each(count, storage - 20),
                of=shape,
            )
    _deploying(meter, service, tasks, {"vcpu": cpu, "memory": memory}, shares, chip)
    return None


def _deploying(
    meter: Meter, service: View, tasks: Three, sizes: dict[str, Decimal], shares: dict[str, Decimal], chip: str
) -> None:
    """Price the tasks that a rolling deployment runs beside the old ones."""
    extra = service.view("DeploymentConfiguration").number("MaximumPercent", 200) / 100 - 1
    if extra <= 0 or "EC2" in shares:
        return
    kind = "fargate" if "FARGATE" in shares else "fargate_spot"
    for name, size in sizes.items():
        meter.used(
            f"new tasks beside the old while a release starts: {name}", f"{kind}.linux.{chip}.{name}",
            lambda u, size=size: tasks[1] * extra * size * u["deployment_minutes"] / 60,  # type: ignore[misc]
            "deployment_minutes", of=service, status="release",
        )  # fmt: skip


def scalable_target(meter: Meter, index: Index) -> None:
    """Say that what is scaled is priced where it is declared, if it is declared here."""
    if index.scaled(meter.resource):
        meter.free("what it scales is priced where it is declared")
    else:
        meter.unknown("autoscaling", "what it scales is in no template here")


def _each(count: tuple[Decimal, ...], times: Decimal) -> Three:
    return count[0] * times, count[1] * times, count[2] * times


def _providers(service: View, index: Index) -> dict[str, Decimal]:
    """Return the share of tasks by provider: FARGATE, FARGATE_SPOT, or EC2 for any other."""
    strategy = service.items("CapacityProviderStrategy")
    launch = service.text("LaunchType")
    if not strategy and not launch:
        cluster = index.at(service.get("Cluster"), "AWS::ECS::Cluster")
        strategy = View(cluster.properties).items("DefaultCapacityProviderStrategy") if cluster else []
    if not strategy:
        return {"FARGATE" if launch == "FARGATE" else "EC2": Decimal(1)}
    weights: dict[str, Decimal] = {}
    for item in strategy:
        name = item.get("CapacityProvider")
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


def ecs_cluster(meter: Meter, index: Index) -> None:
    """Say that a cluster is free, and price the metrics of its Container Insights."""
    settings = meter.properties.items("ClusterSettings")
    if any(s.text("Name") == "containerInsights" and s.text("Value") != "disabled" for s in settings):
        meter.used(
            "metrics of Container Insights", "cw.metric.custom", lambda u: u["metrics"] * meter.hours / 730, "metrics"
        )
    else:
        meter.free("a cluster costs nothing; its tasks and instances do")


def instance(meter: Meter, index: Index, count: Three | None = None, node: View | None = None) -> None:
    """Price EC2 instances on demand with Linux, and their volumes."""
    view = node or meter.properties
    tenancy = view.text("Tenancy", "default")
    if tenancy != "default":
        raise NotStatic(f"tenancy {tenancy}")
    size = view.text("InstanceType")
    number = count or three(Decimal(1))
    meter.hourly(f"instances: {size}, Linux", f"ec2.ondemand.linux.{size}", number, of=view)
    for block in view.items("BlockDeviceMappings"):
        volume = block.view("Ebs")
        if volume.get("VolumeSize") is not None:
            _volume(meter, volume, "VolumeSize", "VolumeType", number, default="gp2")
    if str(view.get("Monitoring", False)).lower() == "true":
        meter.monthly("detailed monitoring: 7 metrics each", "cw.metric.custom", _each(number, Decimal(7)), of=view)


def auto_scaling_group(meter: Meter, index: Index) -> None:
    """Price a group's instances: minimum, desired and maximum."""
    group = meter.properties
    if group.get("MixedInstancesPolicy") is not None:
        raise NotStatic("a mix of instance types and of spot: the price changes with what is had")
    least, most = group.number("MinSize"), group.number("MaxSize")
    desired = group.number("DesiredCapacity") if group.get("DesiredCapacity") is not None else least
    template = index.at(group.view("LaunchTemplate").get("LaunchTemplateId"), "AWS::EC2::LaunchTemplate")
    config = index.at(group.get("LaunchConfigurationName"), "AWS::AutoScaling::LaunchConfiguration")
    if template is None and config is None:
        raise NotStatic("its launch template is in no template here")
    if template is not None:
        view = View(View(template.properties).get("LaunchTemplateData", {}), "LaunchTemplateData.")
        if view.view("InstanceMarketOptions").text("MarketType") == "spot":
            raise NotStatic("spot instances: the price changes through the day")
    else:
        assert config is not None
        view = View(config.properties, "LaunchConfiguration.")
    view.reads.update(group.reads)
    instance(meter, index, (least, desired, most), view)


def volume(meter: Meter, index: Index) -> None:
    """Price an EBS volume: storage, IOPS and throughput beyond what is included."""
    _volume(meter, meter.properties, "Size", "VolumeType", three(Decimal(1)), default="gp2")


def _volume(meter: Meter, view: View, size: str, kind: str, count: Three, *, default: str) -> None:
    name, gigabytes = view.text(kind, default), view.number(size)
    meter.monthly(f"volume storage: {name}", f"ebs.{name}.storage", _each(count, gigabytes), of=view)
    if name in ("io1", "io2"):
        meter.monthly(f"volume IOPS: {name}", f"ebs.{name}.iops", _each(count, view.number("Iops")), of=view)
    if name == "gp3":
        iops, rate = view.number("Iops", 3000) - 3000, view.number("Throughput", 125) - 125
        if iops > 0:
            meter.monthly("volume gp3: IOPS over 3000", "ebs.gp3.iops", _each(count, iops), of=view)
        if rate > 0:
            meter.monthly("volume gp3: MB/s over 125", "ebs.gp3.throughput", _each(count, rate), of=view)


def function(meter: Meter, index: Index) -> None:
    """Price a Lambda function: requests, GB-seconds and storage over 512 MB."""
    view = meter.properties
    memory = view.number("MemorySize", 128) / MB_PER_GB
    chips = view.get("Architectures", ["x86_64"])
    chip = "arm" if chips == ["arm64"] else "x86"
    disk = view.view("EphemeralStorage").number("Size", 512)
    meter.used("requests", "lambda.requests", lambda u: u["invocations"], "invocations")
    meter.used(
        f"duration ({chip})", f"lambda.gb_s.{chip}", lambda u: u["invocations"] * u["duration_ms"] / 1000 * memory,
        "invocations", "duration_ms",
    )  # fmt: skip
    if disk > 512:
        extra = (disk - 512) / MB_PER_GB
        meter.used(
            "storage over 512 MB", "lambda.ephemeral_gb_s_over_512MB",
            lambda u: u["invocations"] * u["duration_ms"] / 1000 * extra, "invocations", "duration_ms",
        )  # fmt: skip


def provisioned(meter: Meter, index: Index) -> None:
    """Price the provisioned concurrency of a Lambda alias or version."""
    config = meter.properties.view("ProvisionedConcurrencyConfig")
    if config.get("ProvisionedConcurrentExecutions") is None:
        return meter.free("a name of a function's version costs nothing")
    code = index.at(meter.properties.get("FunctionName"), "AWS::Lambda::Function")
    if code is None or isinstance(property_of(code, "MemorySize"), Pointer):
        return meter.unknown("provisioned concurrency", "its function is in no template here")
    memory = View(code.properties).number("MemorySize", 128) / MB_PER_GB
    count = config.number("ProvisionedConcurrentExecutions") * memory * 3600
    return meter.hourly("provisioned concurrency", "lambda.provisioned_concurrency.gb_s", count, of=config)


def build_project(meter: Meter, index: Index) -> None:
    """Price a CodeBuild project's minutes."""
    environment = meter.properties.view("Environment")
    kind, size = environment.text("Type"), environment.text("ComputeType")
    if kind != "LINUX_CONTAINER":
        return meter.unknown("build minutes", f"the price book has none for {kind}")
    sku = f"codebuild.linux.{size.removeprefix('BUILD_').lower().replace('_', '.')}"
    return meter.used(f"build minutes ({size})", sku, lambda u: u["build_minutes"], "build_minutes", of=environment)


def eks_cluster(meter: Meter, index: Index) -> None:
    """Price the control plane of an EKS cluster."""
    meter.hourly("control plane", "eks.cluster.hour", Decimal(1))


PRICED: dict[str, Pricer] = {
    "AWS::SageMaker::Endpoint": endpoint,
    "AWS::SageMaker::EndpointConfig": endpoint_config,
    "AWS::ApplicationAutoScaling::ScalableTarget": scalable_target,
    "AWS::ECS::Service": ecs_service,
    "AWS::ECS::Cluster": ecs_cluster,
    "AWS::EC2::Instance": instance,
    "AWS::EC2::Volume": volume,
    "AWS::AutoScaling::AutoScalingGroup": auto_scaling_group,
    "AWS::Lambda::Function": function,
    "AWS::Lambda::Alias": provisioned,
    "AWS::Lambda::Version": provisioned,
    "AWS::CodeBuild::Project": build_project,
    "AWS::EKS::Cluster": eks_cluster,
}
