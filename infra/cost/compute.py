"""What computes otherwise: EC2 instances and volumes, Lambda, CodeBuild, and autoscaling targets of any of it."""

from decimal import Decimal
from typing import Any

from infra.cost.lines import Meter, NotStatic, Resource, View, each, three
from infra.cost.resolve import Pointer, Unknown
from infra.cost.scaling import Index, Pricer, bounded, limits, mean, near, property_of, recurrence, week
from infra.cost.usage import MB_PER_GB, Three

SPOT = "spot instances: the price changes through the day"

IO2_FIRST = Decimal(32_000)
"""IOPS of one io2 volume that are paid in full; those above cost less (Amazon EBS pricing)."""


def instance(meter: Meter, index: Index, count: Three | None = None, node: View | None = None) -> None:
    """Price EC2 instances on demand with Linux, and their volumes."""
    view = node or _launched(meter, index)
    for place in (view, view.view("Placement")):
        tenancy = place.text("Tenancy", "default")
        if tenancy != "default" or any(place.get(name) for name in ("HostId", "HostResourceGroupArn")):
            raise NotStatic(f"tenancy {tenancy}" if tenancy != "default" else "a dedicated host")
    if view.get("InstanceRequirements") is not None:
        raise NotStatic("its instance type is chosen by requirements when it starts")
    size = view.text("InstanceType", "m1.small")
    number, blocks = count or three(Decimal(1)), view.items("BlockDeviceMappings")
    meter.hourly(f"instances: {size}, Linux", f"ec2.ondemand.linux.{size}", number, of=view,
                 note="" if blocks else "without the volume that its image brings")  # fmt: skip
    for block in blocks:
        if block.view("Ebs").get("VolumeSize") is not None:
            volumes(meter, block.view("Ebs"), "VolumeSize", number, default="gp2")
        elif block.get("Ebs"):
            meter.unknown("a volume", "its size is that of its snapshot or image")
    switch = view.get("Monitoring")
    if view.view("Monitoring").flag("Enabled") if isinstance(switch, dict) else view.flag("Monitoring"):
        meter.monthly("detailed monitoring: 7 metrics each", "cw.metric.custom", each(number, Decimal(7)), of=view)
    if any(str(one.get("AssociatePublicIpAddress")).lower() == "true" for one in view.items("NetworkInterfaces")):
        meter.hourly("public IPv4 addresses", "public_ipv4.hour", number, of=view)
    meter.told("data out to the internet", "egress.internet", "internet_gb")
    meter.told("data between zones", "intra_region.inter_az_each_way", "cross_zone_gb")


def _launched(meter: Meter, index: Index) -> View:
    """Return an instance's properties, what it leaves out taken from its launch template."""
    instance = meter.properties
    given = instance.view("LaunchTemplate")
    template = _template(given, by=meter.resource, index=index)
    if template is None:
        if given.whole():
            if instance.get("InstanceType") is None:
                raise NotStatic("its launch template is in no template here")
            meter.unknown("what its launch template adds", "it is in no template here")
        return instance
    data = View(template.properties).get("LaunchTemplateData", {})
    if View(data).view("InstanceMarketOptions").text("MarketType") == "spot":
        raise NotStatic(SPOT)
    own = instance.whole()
    return View({**data, **own} if isinstance(data, dict) else own, reads=instance.reads)


def auto_scaling_group(meter: Meter, index: Index) -> None:
    """Price a group's instances: minimum, desired and maximum."""
    group = meter.properties
    if group.get("MixedInstancesPolicy") is not None:
        raise NotStatic("a mix of instance types and of spot: the price changes with what is had")
    least, most = bounded(group, "MinSize", "MaxSize")
    desired = group.number("DesiredCapacity") if group.get("DesiredCapacity") is not None else least
    template = _template(group.view("LaunchTemplate"), by=meter.resource, index=index)
    config = index.at(group.get("LaunchConfigurationName"), "AWS::AutoScaling::LaunchConfiguration")
    if template is None and config is None:
        raise NotStatic("its launch template is in no template here")
    if template is not None:
        view = View(View(template.properties).get("LaunchTemplateData", {}), "LaunchTemplateData.")
        if view.view("InstanceMarketOptions").text("MarketType") == "spot":
            raise NotStatic(SPOT)
    else:
        assert config is not None
        view = View(_as_template(config), "LaunchConfiguration.")
        if view.get("SpotPrice") is not None:
            raise NotStatic(SPOT)
    view.reads.update(group.reads)
    instance(meter, index, _through_the_week(meter, index, (least, desired, most)), view)


def _template(given: View, *, by: Resource, index: Index) -> Resource | None:
    """Return the launch template that is meant by its id, or by its name."""
    found, name = index.at(given.get("LaunchTemplateId"), "AWS::EC2::LaunchTemplate"), given.get("LaunchTemplateName")
    return found or index.named("AWS::EC2::LaunchTemplate", "LaunchTemplateName", name, by)


def _as_template(config: Resource) -> dict[str, Any]:
    """Return a launch configuration as a launch template has it: detailed monitoring is on unless it is turned off."""
    table = View(config.properties).whole()
    address = {"AssociatePublicIpAddress": table.get("AssociatePublicIpAddress", False)}
    return table | {
        "Monitoring": {"Enabled": table.get("InstanceMonitoring", True)},
        "Placement": {"Tenancy": table.get("PlacementTenancy", "default")},
        "NetworkInterfaces": [address],
    }


def _through_the_week(meter: Meter, index: Index, sizes: Three) -> Three:
    """Return the mean of a group's minimum, desired and maximum size, as its scheduled actions change them."""
    name = property_of(meter.resource, "AutoScalingGroupName")
    actions = []
    for action in index.of("AWS::AutoScaling::ScheduledAction"):
        group = property_of(action, "AutoScalingGroupName")
        named = isinstance(name, str) and group == name and near(action, meter.resource)
        mine = named or index.at(group, meter.resource.type) is meter.resource
        new = View(action.properties)
        if mine and (when := new.text("Recurrence")):  # without one it happens once
            actions.append((recurrence(when), new))
    series = [
        week(start, [(when, new.number(key)) for when, new in actions if new.get(key) is not None])
        for key, start in zip(("MinSize", "DesiredCapacity", "MaxSize"), sizes, strict=True)
    ]
    # minimum and maximum bound what is desired, whatever it was before
    desired = [min(max(a, b), max(a, c)) for a, b, c in zip(*series, strict=True)]
    return mean(series[0]), mean(desired), mean([max(a, c) for a, c in zip(series[0], series[2], strict=True)])


def volume(meter: Meter, index: Index) -> None:
    """Price an EBS volume: storage, IOPS and throughput beyond what is included."""
    volumes(meter, meter.properties, "Size", three(Decimal(1)), default="gp2")


def volumes(meter: Meter, view: View, size: str, count: Three, *, default: str) -> None:
    """Price `count` volumes whose size in GB is the property `size`."""
    name, gigabytes = view.text("VolumeType", default), view.number(size)
    meter.monthly(f"volume storage: {name}", f"ebs.{name}.storage", each(count, gigabytes), of=view,
                  note="without its requests, which are paid too" if name == "standard" else "")  # fmt: skip
    if name in ("io1", "io2"):
        iops = view.number("Iops")
        first = min(iops, IO2_FIRST) if name == "io2" else iops
        meter.monthly(f"volume IOPS: {name}", f"ebs.{name}.iops", each(count, first), of=view)
        if iops > first:
            meter.monthly("volume io2: IOPS over 32,000", "ebs.io2.iops.over_32000", each(count, iops - first), of=view)
    if name == "gp3":
        iops, rate = view.number("Iops", 3000) - 3000, view.number("Throughput", 125) - 125
        if iops > 0:
            meter.monthly("volume gp3: IOPS over 3000", "ebs.gp3.iops", each(count, iops), of=view)
        if rate > 0:
            meter.monthly("volume gp3: MB/s over 125", "ebs.gp3.throughput", each(count, rate), of=view)


def function(meter: Meter, index: Index) -> None:
    """Price a Lambda function: requests, GB-seconds and storage over 512 MB."""
    view = meter.properties
    meter.used("requests", "lambda.requests", lambda u: u["invocations"], "invocations")
    memory, chip = view.number("MemorySize", 128) / MB_PER_GB, _chip(view)
    disk = view.view("EphemeralStorage").number("Size", 512)
    mine = [
        name
        for kind in ("AWS::Lambda::Alias", "AWS::Lambda::Version")
        for name in index.of(kind)
        if index.at(property_of(name, "FunctionName"), meter.resource.type) is meter.resource
    ]
    try:
        ready = any(_ready(name, index) for name in mine)
    except NotStatic:  # which is told where the alias is priced
        ready = True
    meter.used(
        f"duration ({chip})", f"lambda.gb_s.{chip}", lambda u: u["invocations"] * u["duration_ms"] / 1000 * memory,
        "invocations", "duration_ms", note="at most: what provisioned concurrency serves costs less" if ready else "",
    )  # fmt: skip
    java = view.text("Runtime", "java").startswith("java")
    if view.view("SnapStart").text("ApplyOn", "None") != "None" and not java:
        meter.unknown("SnapStart", "the price book has none for snapshots and their restoration")
    if disk > 512:
        extra = (disk - 512) / MB_PER_GB
        meter.used(
            "storage over 512 MB", "lambda.ephemeral_gb_s_over_512MB",
            lambda u: u["invocations"] * u["duration_ms"] / 1000 * extra, "invocations", "duration_ms",
        )  # fmt: skip


def provisioned(meter: Meter, index: Index) -> None:
    """Price the provisioned concurrency of a Lambda alias or version."""
    config = meter.properties.view("ProvisionedConcurrencyConfig")
    if not _ready(meter.resource, index):
        return meter.free("a name of a function's version costs nothing")
    code = index.at(meter.properties.get("FunctionName"), "AWS::Lambda::Function")
    if code is None or isinstance(property_of(code, "MemorySize"), Pointer):
        return meter.unknown("provisioned concurrency", "its function is in no template here")
    memory, arm = View(code.properties).number("MemorySize", 128) / MB_PER_GB, _chip(View(code.properties)) == "arm"
    initial = config.number("ProvisionedConcurrentExecutions", 0)
    count = each(limits(_concurrency(meter.resource, code, index), initial, config), memory * 3600)
    sku = f"lambda.provisioned_concurrency.gb_s{'.arm' if arm else ''}"
    return meter.hourly("provisioned concurrency", sku, count, of=config)


def _chip(function: View) -> str:
    """Return the chips on which a function runs: arm or x86."""
    chips = function.listed("Architectures") or ["x86_64"]
    if chips not in (["arm64"], ["x86_64"]):
        raise NotStatic("Architectures is not static")
    return "arm" if chips == ["arm64"] else "x86"


def _ready(name: Resource, index: Index) -> bool:
    """Return whether a function's alias or version keeps environments ready."""
    code = index.at(property_of(name, "FunctionName"), "AWS::Lambda::Function")
    return property_of(name, "ProvisionedConcurrencyConfig") is not None or (
        code is not None and name.type == "AWS::Lambda::Alias" and _concurrency(name, code, index) is not None
    )


def _concurrency(name: Resource, code: Resource, index: Index) -> Resource | None:
    """Return what scales the provisioned concurrency of a function's alias or version."""
    alias = property_of(name, "Name")
    return index.scaler(code, "lambda:function:ProvisionedConcurrency", f":{alias}" if isinstance(alias, str) else "")


def build_project(meter: Meter, index: Index) -> None:
    """Price a CodeBuild project's minutes."""
    environment = meter.properties.view("Environment")
    if environment.view("Fleet").get("FleetArn") is not None:
        return meter.unknown(
            "build minutes", "they run on machines of a fleet, which are paid by the minute they stand by"
        )
    kind, size = environment.text("Type"), environment.text("ComputeType")
    if kind != "LINUX_CONTAINER":
        return meter.unknown("build minutes", f"the price book has none for {kind}")
    sku = f"codebuild.linux.{size.removeprefix('BUILD_').lower().replace('_', '.')}"
    return meter.used(f"build minutes ({size})", sku, lambda u: u["build_minutes"], "build_minutes", of=environment)


def scalable_target(meter: Meter, index: Index) -> None:
    """Say that what is scaled is priced where it is declared, if it is declared here."""
    scaled = property_of(meter.resource, "ResourceId")
    if index.scaled(meter.resource):
        meter.free("what it scales is priced where it is declared")
    elif isinstance(scaled, Unknown):
        meter.unknown("autoscaling", f"what it scales is not known: {scaled.reason}")
    else:
        meter.unknown("autoscaling", "what it scales is in no template here")


PRICED: dict[str, Pricer] = {
    "AWS::ApplicationAutoScaling::ScalableTarget": scalable_target,
    "AWS::EC2::Instance": instance,
    "AWS::EC2::Volume": volume,
    "AWS::AutoScaling::AutoScalingGroup": auto_scaling_group,
    "AWS::Lambda::Function": function,
    "AWS::Lambda::Alias": provisioned,
    "AWS::Lambda::Version": provisioned,
    "AWS::CodeBuild::Project": build_project,
}
