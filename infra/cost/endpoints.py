"""SageMaker endpoints: variants, serverless capacity, volumes, data capture, and the second fleet of a release."""

from decimal import ROUND_CEILING, Decimal

from infra.cost.lines import Meter, NotStatic, Resource, View, each
from infra.cost.scaling import Index, Pricer, capacity, property_of
from infra.cost.usage import MB_PER_GB, Three, requests, traffic_gb


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
                    volumes = each(count, size_gb)
                    meter.monthly(f"{label}: volumes", "sagemaker.hosting.storage.gp2", volumes, of=variant)
            except NotStatic as fault:
                meter.unknown(label, str(fault))
    meter.serves(lambda u: requests(u["requests_per_second"], meter.hours), "requests_per_second")
    meter.used(
        "data in and out of the models", "sagemaker.hosting.data_processed", lambda u: traffic_gb(u, meter.hours),
        "requests_per_second", "request_kb", "response_kb",
    )  # fmt: skip
    capture = meter.properties.view("DataCaptureConfig")
    if str(capture.get("EnableCapture", False)).lower() == "true":
        part = capture.number("InitialSamplingPercentage", 100) / 100
        meter.used(
            "captured data, kept in S3", "s3.standard.storage",
            lambda u: part * traffic_gb(u, meter.hours) * (1 + u["months"]),
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


PRICED: dict[str, Pricer] = {
    "AWS::SageMaker::Endpoint": endpoint,
    "AWS::SageMaker::EndpointConfig": endpoint_config,
}
