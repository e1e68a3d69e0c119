"""What computes otherwise: EC2 instances and volumes, Lambda, CodeBuild, and autoscaling targets of any of it."""

from decimal import Decimal

from infra.cost.lines import Meter, NotStatic, View, each, three
from infra.cost.resolve import Pointer
from infra.cost.scaling import Index, Pricer, limits, mean, property_of, recurrence, week
from infra.cost.usage import MB_PER_GB, Three

SPOT = "spot instances: the price changes through the day"


def instance(meter: Meter, index: Index, count: Three | None = None, node: View | None = None) -> None:
    """Price EC2 instances on demand with Linux, and their volumes."""
    view = node or _launched(meter.properties, index)
    tenancy = view.text("Tenancy", "default")
    if tenancy != "default":
        raise NotStatic(f"tenancy {tenancy}")
    size = view.text("InstanceType", "m1.small")
    number = count or three(Decimal(1))
    meter.hourly(f"instances: {size}, Linux", f"ec2.ondemand.linux.{size}", number, of=view)
    for block in view.items("BlockDeviceMappings"):
        volume = block.view("Ebs")
        if volume.get("VolumeSize") is not None:
            _volume(meter, volume, "VolumeSize", "VolumeType", number, default="gp2")
    if str(view.get("Monitoring", False)).lower() == "true":
        meter.monthly("detailed monitoring: 7 metrics each", "cw.metric.custom", each(number, Decimal(7)), of=view)
    if any(str(one.get("AssociatePublicIpAddress")).lower() == "true" for one in view.items("NetworkInterfaces")):
        meter.hourly("public IPv4 addresses", "public_ipv4.hour", number, of=view)
    if meter.ask("internet_gb"):
        meter.used("data out to the internet", "egress.internet", lambda u: u["internet_gb"], "internet_gb")


def _launched(instance: View, index: Index) -> View:
    """Return an instance's properties, what it leaves out taken from its launch template."""
    given = instance.view("LaunchTemplate")
    template = index.at(given.get("LaunchTemplateId"), "AWS::EC2::LaunchTemplate")
    if template is None:
        if given.reads and instance.get("InstanceType") is None:
            raise NotStatic("its launch template is in no template here")
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
    least, most = group.number("MinSize"), group.number("MaxSize")
    desired = group.number("DesiredCapacity") if group.get("DesiredCapacity") is not None else least
    template = index.at(group.view("LaunchTemplate").get("LaunchTemplateId"), "AWS::EC2::LaunchTemplate")
    config = index.at(group.get("LaunchConfigurationName"), "AWS::AutoScaling::LaunchConfiguration")
    if template is None and config is None:
        raise NotStatic("its launch template is in no template here")
    if template is not None:
        view = View(View(template.properties).get("LaunchTemplateData", {}), "LaunchTemplateData.")
        if view.view("InstanceMarketOptions").text("MarketType") == "spot":
            raise NotStatic(SPOT)
    else:
        assert config is not None
        view = View(config.properties, "LaunchConfiguration.")
    view.reads.update(group.reads)
    instance(meter, index, _through_the_week(meter, index, (least, desired, most)), view)


def _through_the_week(meter: Meter, index: Index, sizes: Three) -> Three:
    """Return the mean of a group's minimum, desired and maximum size, as its scheduled actions change them."""
    name = property_of(meter.resource, "AutoScalingGroupName")
    actions = []
    for action in index.of("AWS::AutoScaling::ScheduledAction"):
        group = property_of(action, "AutoScalingGroupName")
        mine = index.at(group, meter.resource.type) is meter.resource or (isinstance(name, str) and group == name)
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
    _volume(meter, meter.properties, "Size", "VolumeType", three(Decimal(1)), default="gp2")


def _volume(meter: Meter, view: View, size: str, kind: str, count: Three, *, default: str) -> None:
    name, gigabytes = view.text(kind, default), view.number(size)
    meter.monthly(f"volume storage: {name}", f"ebs.{name}.storage", each(count, gigabytes), of=view)
    if name in ("io1", "io2"):
        meter.monthly(f"volume IOPS: {name}", f"ebs.{name}.iops", each(count, view.number("Iops")), of=view)
    if name == "gp3":
        iops, rate = view.number("Iops", 3000) - 3000, view.number("Throughput", 125) - 125
        if iops > 0:
            meter.monthly("volume gp3: IOPS over 3000", "ebs.gp3.iops", each(count, iops), of=view)
        if rate > 0:
            meter.monthly("volume gp3: MB/s over 125", "ebs.gp3.throughput", each(count, rate), of=view)


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
    target = index.scaler(code, "lambda:function:ProvisionedConcurrency")
    count = each(limits(target, config.number("ProvisionedConcurrentExecutions"), config), memory * 3600)
    return meter.hourly("provisioned concurrency", "lambda.provisioned_concurrency.gb_s", count, of=config)


def build_project(meter: Meter, index: Index) -> None:
    """Price a CodeBuild project's minutes."""
    environment = meter.properties.view("Environment")
    kind, size = environment.text("Type"), environment.text("ComputeType")
    if kind != "LINUX_CONTAINER":
        return meter.unknown("build minutes", f"the price book has none for {kind}")
    sku = f"codebuild.linux.{size.removeprefix('BUILD_').lower().replace('_', '.')}"
    return meter.used(f"build minutes ({size})", sku, lambda u: u["build_minutes"], "build_minutes", of=environment)


def scalable_target(meter: Meter, index: Index) -> None:
    """Say that what is scaled is priced where it is declared, if it is declared here."""
    if index.scaled(meter.resource):
        meter.free("what it scales is priced where it is declared")
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
