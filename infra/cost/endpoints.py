"""SageMaker endpoints: variants, serverless capacity, volumes, data capture, and the second fleet of a release."""

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

from infra.cost.lines import Meter, NotStatic, Resource, View, each
from infra.cost.scaling import WEEK, Index, Pricer, bounded, capacity, property_of, within
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
        modes = " ".join(option.text("CaptureMode") for option in capture.items("CaptureOptions")) or "Input Output"
        days = _kept_days(index, capture.text("DestinationS3Uri"))
        most = days / (meter.hours / 24) if days else None
        meter.used(
            "captured data, kept in S3", "s3.standard.storage",
            lambda u: part * traffic_gb(_captured(u, modes), meter.hours)
            * (1 + u["months"] if most is None else min(1 + u["months"], most)),
            "requests_per_second", "request_kb", "response_kb", "months", of=capture,
            note=f"its bucket deletes it after {days:f} days" if days else "",
        )  # fmt: skip


def _captured(u: Mapping[str, Any], modes: str) -> dict[str, Any]:
    """Return a usage of which only what is captured, requests or answers or both, has a size."""
    return {
        **u,
        "request_kb": u["request_kb"] * ("Input" in modes),
        "response_kb": u["response_kb"] * ("Output" in modes),
    }


def _kept_days(index: Index, uri: str) -> Decimal | None:
    """Return after how many days a bucket of these templates deletes what lies at an address; None where none does."""
    name, _, key = uri.removeprefix("s3://").partition("/")
    for bucket in index.of("AWS::S3::Bucket"):
        if name and property_of(bucket, "BucketName") == name:
            rules = View(bucket.properties).view("LifecycleConfiguration").items("Rules")
            days = [rule.number("ExpirationInDays") for rule in rules
                    if rule.text("Status") == "Enabled" and rule.get("ExpirationInDays") is not None
                    and rule.get("TagFilters") is None and key.startswith(rule.text("Prefix"))]  # fmt: skip
            return min(days, default=None)
    return None


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
    initial = variant.number("InitialInstanceCount", 1)
    if managed.text("Status", "DISABLED") == "ENABLED":
        least, most = bounded(managed, "MinInstanceCount", "MaxInstanceCount", 1)
        return within(meter, [least] * WEEK, [most] * WEEK, "managed scaling")
    found = index.scaler(endpoint, "sagemaker:variant:DesiredInstanceCount", f"/variant/{name}") if endpoint else None
    return capacity(meter, initial, found, variant)


def endpoint(meter: Meter, index: Index) -> None:
    """Say that an endpoint is paid by its configuration, and price the second fleet that runs while a release bakes.

    A blue/green update runs old and new beside each other for its wait intervals and the wait before termination
    (SageMaker developer guide, "Blue/Green Deployments"); the key deployment_minutes adds what starting takes.
    """
    meter.free("its instances are priced with its configuration")
    name, kind = meter.properties.get("EndpointConfigName"), "AWS::SageMaker::EndpointConfig"
    config = index.at(name, kind) or index.named(kind, "EndpointConfigName", name, meter.resource)
    if config is None:
        return
    deployment = meter.properties.view("DeploymentConfig")
    rolling = deployment.get("RollingUpdatePolicy") is not None
    policy = deployment.view("RollingUpdatePolicy" if rolling else "BlueGreenUpdatePolicy")
    start = meter.ask("deployment_minutes")
    shape = View(config.properties)
    for variant in [*shape.items("ProductionVariants"), *shape.items("ShadowProductionVariants")]:
        if variant.get("ServerlessConfig") is not None:
            continue
        (size, _), name = _size(variant), variant.text("VariantName", "variant")
        fleet = _instances(meter, index, variant, name, meter.resource)[0][1]  # what is expected to run then
        count, baking = _rolling(policy, fleet) if rolling else (fleet, _baking(policy, fleet))
        variant.reads.update(policy.reads)
        item = f"{'batch beside the old' if rolling else 'second fleet'} while a release bakes: {size}"
        if baking and start is None:
            meter.release(item, f"sagemaker.hosting.{size}", count * baking / 3600, of=variant,
                          note="without the minutes that starting takes: deployment_minutes")  # fmt: skip
        else:
            meter.used(
                item, f"sagemaker.hosting.{size}",
                lambda u, count=count, baking=baking: count * (baking / 3600 + u["deployment_minutes"] / 60),  # type: ignore[misc]
                "deployment_minutes", of=variant, status="release",
            )  # fmt: skip


def _rolling(policy: View, fleet: Decimal) -> tuple[Decimal, Decimal]:
    """Return the instances of a batch that a rolling update starts beside the old ones, and for how many seconds."""
    batch = _part(policy.view("MaximumBatchSize"), fleet)
    steps = (fleet / batch).to_integral_value(ROUND_CEILING)
    return batch, steps * policy.number("WaitIntervalInSeconds", 0)


def _part(size: View, fleet: Decimal) -> Decimal:
    """Return how many instances of a fleet a step takes: a count, or a percentage rounded up."""
    value, kind = size.number("Value"), size.text("Type")
    if not value or kind not in ("CAPACITY_PERCENT", "INSTANCE_COUNT"):
        raise NotStatic(f"a step of {value:f} {kind}")
    return (
        value if kind == "INSTANCE_COUNT" else max((fleet * value / 100).to_integral_value(ROUND_CEILING), Decimal(1))
    )


def _baking(policy: View, fleet: Decimal) -> Decimal:
    """Return the seconds for which both fleets of a blue/green update run."""
    routing = policy.view("TrafficRoutingConfiguration")
    kind, wait = routing.text("Type", "ALL_AT_ONCE"), routing.number("WaitIntervalInSeconds", 0)
    steps = Decimal(1)
    if kind == "CANARY":
        steps = Decimal(2)
    elif kind == "LINEAR":
        size = routing.view("LinearStepSize")
        whole = Decimal(100) if size.text("Type") == "CAPACITY_PERCENT" else fleet
        steps = (whole / (size.number("Value") or whole)).to_integral_value(ROUND_CEILING)
    return steps * wait + policy.number("TerminationWaitInSeconds", 0)


def _serverless(meter: Meter, config: View, label: str) -> None:
    memory = config.number("MemorySizeInMB") / MB_PER_GB
    meter.used(
        f"{label}: serverless compute", "sagemaker.serverless.gb_second",
        lambda u: requests(u["requests_per_second"], meter.hours) * u["duration_ms"] / 1000 * memory,
        "requests_per_second", "duration_ms", of=config,
        note="at most: what provisioned concurrency serves costs less" if config.get("ProvisionedConcurrency") else "",
    )  # fmt: skip
    if config.get("ProvisionedConcurrency") is not None:
        count = config.number("ProvisionedConcurrency") * memory * 3600
        meter.hourly(f"{label}: provisioned concurrency", "sagemaker.serverless.pc_gb_second", count, of=config)


PRICED: dict[str, Pricer] = {
    "AWS::SageMaker::Endpoint": endpoint,
    "AWS::SageMaker::EndpointConfig": endpoint_config,
}
