"""What each kind of resource costs, and what a release of it costs once, by hand from the prices of the book."""

from dataclasses import replace
from decimal import Decimal

import pytest

from infra.cost.report import price
from infra.cost.usage import Usage
from tests.test_cost import BOOK, amounts, lines, one, scaled, stack, three, usage_of, variant

# --- compute ---------------------------------------------------------------------------------------------------------


def test_shadow_variants_volumes_and_capture_are_priced():
    properties = {
        "ProductionVariants": [variant(2, VolumeSizeInGB=50)],
        "ShadowProductionVariants": [variant()],
        "DataCaptureConfig": {"EnableCapture": True, "InitialSamplingPercentage": 50},
    }
    used = usage_of(requests_per_second=10, request_kb=2, response_kb=6)
    found = amounts(one("AWS::SageMaker::EndpointConfig", properties, used))
    assert found["variant a: ml.g5.xlarge"][0] == pytest.approx(2 * 1.4084 * 730)
    assert found["shadow variant a: ml.g5.xlarge"][0] == pytest.approx(1.4084 * 730)
    assert found["variant a: volumes"][0] == pytest.approx(2 * 50 * 0.14)
    gigabytes = 10 * 3600 * 730 * 8 / 1024**2
    assert found["data in and out of the models"][0] == pytest.approx(gigabytes * 0.016)
    assert found["captured data, kept in S3"][0] == pytest.approx(gigabytes / 2 * 0.023)


def test_a_variant_of_pools_is_priced_at_its_first_choice():
    pools = [{"InstanceType": "ml.g6.2xlarge", "Priority": 2}, {"InstanceType": "ml.g5.xlarge", "Priority": 1}]
    [line, *_] = one(
        "AWS::SageMaker::EndpointConfig",
        {"ProductionVariants": [{"VariantName": "a", "InstancePools": pools, "InitialInstanceCount": 2}]},
    )
    assert float(line.amount[1]) == pytest.approx(2 * 1.4084 * 730)
    assert "where it cannot be had, ml.g6.2xlarge at another price" in line.note


def test_serverless_variants_follow_requests():
    serverless = {"VariantName": "a", "ServerlessConfig": {"MemorySizeInMB": 2048, "ProvisionedConcurrency": 1}}
    used = usage_of(requests_per_second=1, duration_ms=100, request_kb=0, response_kb=0)
    found = amounts(one("AWS::SageMaker::EndpointConfig", {"ProductionVariants": [serverless]}, used))
    assert found["variant a: serverless compute"][0] == pytest.approx(3600 * 730 * 0.1 * 0.00004)
    assert found["variant a: provisioned concurrency"][0] == pytest.approx(3600 * 730 * 0.0000233)


def tasks(resources, usage=None):
    found = [line for line in lines(resources, usage) if line.item.startswith("vCPU of tasks")]
    return [float(q) / 730 for q in found[0].quantity]


def at(schedule, **bounds):
    return {"Schedule": schedule, "ScheduledActionName": "x", "ScalableTargetAction": bounds}


def test_autoscaling_gives_minimum_and_maximum():
    assert tasks(scaled()) == [2, 2, 8]


def test_autoscaling_follows_the_load_of_each_hour():
    busy = tuple(Decimal(100 if 8 <= hour < 20 else 1) for hour in range(24))
    values = {
        "requests_per_second": (busy, busy, tuple(3 * r for r in busy)),
        "unit_requests_per_second": (Decimal(20),) * 3,
    }
    # 100 a second want 5 tasks for half of the day, 300 want 15 and get 8; at night the minimum of 2 runs
    assert tasks(scaled(), Usage((("Service", values),))) == [3.5, 3.5, 5]


def test_schedules_move_the_bounds():
    night = [
        at("cron(0 20 * * ? *)", MinCapacity=0, MaxCapacity=0),
        at("cron(0 8 * * ? *)", MinCapacity=2, MaxCapacity=8),
    ]
    assert tasks(scaled(night)) == [1, 1, 4]
    weekdays = [at("cron(0 8 ? * MON-FRI *)", MinCapacity=4), at("cron(0 20 ? * MON-FRI *)", MinCapacity=2)]
    assert tasks(scaled(weekdays))[0] == pytest.approx(2 + 2 * 60 / 168)


def test_a_schedule_that_is_not_understood_makes_no_number():
    found = [line for line in lines(scaled([at("cron(0 8 1 * ? *)", MinCapacity=4)])) if line.resource == "Service"]
    assert [line.status for line in found] == ["unknown"]
    assert "not understood" in found[0].note


def test_schedules_count_every_hour_that_they_name_and_the_part_of_one():
    def through(*actions):
        return tasks(scaled(actions, MinCapacity=0, MaxCapacity=0))[0]

    on, off = {"MinCapacity": 24, "MaxCapacity": 24}, {"MinCapacity": 0, "MaxCapacity": 0}
    # 24 tasks for half an hour, for half an hour to the next, and for two spans of two hours each day
    assert through(at("cron(0 8 * * ? *)", **on), at("cron(30 8 * * ? *)", **off)) == pytest.approx(0.5)
    assert through(at("cron(45 7 * * ? *)", **on), at("cron(15 8 * * ? *)", **off)) == pytest.approx(0.5)
    assert through(at("cron(0 8,20-21 * * ? *)", **on), at("cron(0 9,22 * * ? *)", **off)) == pytest.approx(3)
    for hours in ("8,*/2", "22-2", "8-25", "1-2-3"):
        odd = scaled([at(f"cron(0 {hours} * * ? *)", **on)])
        assert "not understood" in next(line.note for line in lines(odd) if line.resource == "Service")


def test_tasks_on_instances_are_billed_once():
    resources = scaled()
    resources["Service"]["Properties"]["LaunchType"] = "EC2"
    found = [line for line in lines(resources) if line.resource == "Service"]
    assert [line.status for line in found] == ["free"]
    assert "billed once" in found[0].note


def test_spot_and_on_demand_share_by_weight():
    resources = scaled()
    del resources["Service"]["Properties"]["LaunchType"]
    resources["Service"]["Properties"]["CapacityProviderStrategy"] = [
        {"CapacityProvider": "FARGATE", "Weight": 1},
        {"CapacityProvider": "FARGATE_SPOT", "Weight": 3},
    ]
    found = amounts([line for line in lines(resources) if line.resource == "Service"])
    assert found["vCPU of tasks: Fargate (x86)"][0] == pytest.approx(0.5 * 730 * 0.04048)
    assert found["vCPU of tasks: Fargate Spot (x86)"][0] == pytest.approx(1.5 * 730 * 0.01334053)


def test_a_blue_green_release_runs_two_fleets_while_it_bakes():
    resources = {
        "Config": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": {"ProductionVariants": [variant(2)]}},
        "Endpoint": {
            "Type": "AWS::SageMaker::Endpoint",
            "Properties": {
                "EndpointConfigName": {"Fn::GetAtt": ["Config", "EndpointConfigName"]},
                "DeploymentConfig": {
                    "BlueGreenUpdatePolicy": {
                        "TerminationWaitInSeconds": 600,
                        "TrafficRoutingConfiguration": {"Type": "CANARY", "WaitIntervalInSeconds": 1500},
                    }
                },
            },
        },
    }
    report = price([stack(resources)], BOOK, Usage())
    # two instances for twice 25 minutes and 10 more: an hour
    assert report.total(release=True)["USD"][1] == Decimal("2.8168")
    assert report.total()["USD"][1] == Decimal("2.8168") * 730


def release_of(policy, count=2, usage=None, **config):
    """What one release of an endpoint with a deployment policy costs, USD."""
    resources = {
        "Config": {
            "Type": "AWS::SageMaker::EndpointConfig",
            "Properties": {"ProductionVariants": [variant(count)], **config},
        },
        "Endpoint": {
            "Type": "AWS::SageMaker::Endpoint",
            "Properties": {"EndpointConfigName": {"Ref": "Config"}, "DeploymentConfig": policy},
        },
    }
    return price([stack(resources)], BOOK, usage or Usage()).total(release=True).get("USD", (0, 0, 0))[1]


def linear(kind, value):
    shift = {"Type": "LINEAR", "LinearStepSize": {"Type": kind, "Value": value}, "WaitIntervalInSeconds": 600}
    return {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": shift, "TerminationWaitInSeconds": 600}}


def test_each_way_to_release_an_endpoint_has_its_own_second_fleet():
    hour = Decimal("1.4084")
    # four instances for three steps of ten minutes and ten more: 40 minutes
    assert release_of(linear("CAPACITY_PERCENT", 40), 4) == pytest.approx(4 * hour * 40 / 60)
    # steps of two of four instances: two of ten minutes, and ten more
    assert release_of(linear("INSTANCE_COUNT", 2), 4) == pytest.approx(4 * hour * 30 / 60)
    batch = {"Type": "CAPACITY_PERCENT", "Value": 25}
    rolling = {"RollingUpdatePolicy": {"MaximumBatchSize": batch, "WaitIntervalInSeconds": 900}}
    # a batch of one beside the others, four times a quarter of an hour
    assert release_of(rolling, 4) == pytest.approx(hour)
    shadow = {"ShadowProductionVariants": [variant(1)]}
    assert release_of(linear("INSTANCE_COUNT", 2), 4, **shadow) == pytest.approx(4 * hour / 2 + hour * 20 / 60)


def test_a_service_that_shifts_traffic_runs_blue_and_green_while_it_bakes():
    resources = scaled()
    canary = {"Strategy": "CANARY", "BakeTimeInMinutes": 10, "CanaryConfiguration": {"CanaryBakeTimeInMinutes": 5}}
    resources["Service"]["Properties"]["DeploymentConfiguration"] = canary
    hour = Decimal("0.04048") + 2 * Decimal("0.004445")
    report = price([stack(resources)], BOOK, Usage())
    # two tasks, a quarter of an hour
    assert report.total(release=True)["USD"][1] == pytest.approx(2 * hour / 4)
    with_start = price([stack(resources)], BOOK, usage_of(deployment_minutes=15))
    assert with_start.total(release=True)["USD"][1] == pytest.approx(2 * hour / 2)
    steps = {"Strategy": "LINEAR", "LinearConfiguration": {"StepPercent": 25, "StepBakeTimeInMinutes": 10}}
    resources["Service"]["Properties"]["DeploymentConfiguration"] = steps
    assert price([stack(resources)], BOOK, Usage()).total(release=True)["USD"][1] == pytest.approx(2 * hour / 2)
    resources["Service"]["Properties"]["DeploymentConfiguration"] = {"MaximumPercent": 150}
    rolling = price([stack(resources)], BOOK, usage_of(deployment_minutes=60))
    assert rolling.total(release=True)["USD"][1] == pytest.approx(hour)


def test_a_variant_with_managed_scaling_follows_the_load():
    managed = {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 4}
    config = {"ProductionVariants": [variant(1, ManagedInstanceScaling=managed)]}
    [line, *_] = one("AWS::SageMaker::EndpointConfig", config)
    assert [q / 730 for q in line.quantity] == [1, 1, 4]
    used = usage_of(requests_per_second=50, unit_requests_per_second=20, request_kb=1, response_kb=1)
    [line, *_] = one("AWS::SageMaker::EndpointConfig", config, used)
    assert [q / 730 for q in line.quantity] == [3, 3, 3]


def test_captured_data_is_counted_for_as_long_as_its_bucket_keeps_it():
    rule = {"Status": "Enabled", "Prefix": "capture/", "ExpirationInDays": 73}
    bucket = {"BucketName": "data", "LifecycleConfiguration": {"Rules": [rule]}}
    capture = {"EnableCapture": True, "InitialSamplingPercentage": 100, "DestinationS3Uri": "s3://data/capture/search/"}
    config = {"ProductionVariants": [variant()], "DataCaptureConfig": capture}
    used = usage_of(requests_per_second=1, request_kb=1, response_kb=0, months=11)
    month = Decimal(3600 * 730) / 1024 / 1024

    def kept(**more):
        made = {"Config": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": config}, **more}
        return next(line.quantity[1] for line in lines(made, used) if line.item.startswith("captured"))

    # 73 of the 365 / 12 days of a month
    assert kept(Bucket={"Type": "AWS::S3::Bucket", "Properties": bucket}) == pytest.approx(month * Decimal("2.4"))
    assert kept() == pytest.approx(month * 12)
    other = {**bucket, "LifecycleConfiguration": {"Rules": [{**rule, "Prefix": "logs/"}]}}
    assert kept(Bucket={"Type": "AWS::S3::Bucket", "Properties": other}) == pytest.approx(month * 12)


def group(*actions, **more):
    """A group of one to four c5.large, of which two are desired, with scheduled actions."""
    return {
        "Group": {
            "Type": "AWS::AutoScaling::AutoScalingGroup",
            "Properties": {"MinSize": "1", "DesiredCapacity": "2", "MaxSize": "4",
                           "LaunchTemplate": {"LaunchTemplateId": {"Ref": "Shape"}}, **more},
        },
        "Shape": {"Type": "AWS::EC2::LaunchTemplate",
                  "Properties": {"LaunchTemplateData": {"InstanceType": "c5.large"}}},
        **{
            f"Action{k}": {"Type": "AWS::AutoScaling::ScheduledAction",
                           "Properties": {"AutoScalingGroupName": {"Ref": "Group"}, **action}}
            for k, action in enumerate(actions)
        },
    }  # fmt: skip


def test_a_group_of_instances_follows_its_scheduled_actions():
    def instances(resources):
        found = [line for line in lines(resources) if line.resource == "Group"]
        return [float(q) / 730 for q in found[0].quantity] if found[0].quantity else found[0].note

    assert instances(group()) == [1, 2, 4]
    night = {"Recurrence": "0 20 * * *", "MinSize": 0, "MaxSize": 0, "DesiredCapacity": 0}
    day = {"Recurrence": "0 8 * * *", "MinSize": 1, "MaxSize": 4, "DesiredCapacity": 2}
    assert instances(group(night, day)) == [0.5, 1, 2]
    # 5 of Unix is Friday, 0 and 7 are Sunday: from Friday at 20 h to Monday at 8 h nothing runs, 60 of 168 hours
    weekend = [{**night, "Recurrence": "0 20 * * 5"}, {**day, "Recurrence": "0 8 * * 1"}]
    assert instances(group(*weekend)) == pytest.approx([108 / 168, 216 / 168, 432 / 168])
    assert instances(group({**night, "Recurrence": "0 20 * * 7"}, {**day, "Recurrence": "0 20 * * 1"}))[
        1
    ] == pytest.approx(2 * 144 / 168)
    assert "not understood" in instances(group({**night, "Recurrence": "0 20 1 * *"}))
    assert "not a static text" in instances(group({**night, "Recurrence": {"Ref": "Group"}}))


def test_an_instance_takes_from_its_launch_template_what_it_leaves_out():
    shape = {"Type": "AWS::EC2::LaunchTemplate", "Properties": {"LaunchTemplateData": {"InstanceType": "c5.large"}}}
    it = {"Type": "AWS::EC2::Instance", "Properties": {"LaunchTemplate": {"LaunchTemplateId": {"Ref": "Shape"}}}}
    assert price([stack({"It": it, "Shape": shape})], BOOK, Usage()).total()["USD"][1] == Decimal("62.05")
    spot = {"InstanceType": "c5.large", "InstanceMarketOptions": {"MarketType": "spot"}}
    shape["Properties"]["LaunchTemplateData"] = spot
    [line] = [line for line in lines({"It": it, "Shape": shape}) if line.resource == "It"]
    assert "through the day" in line.note
    it["Properties"] = {"LaunchTemplate": {"LaunchTemplateId": "lt-1", "Version": "1"}}
    [line] = lines({"It": it})
    assert line.note == "its launch template is in no template here"


def shaped(kind, data):
    """Lines of a group of one or two instances that a launch template or configuration describes."""
    template = kind.endswith("LaunchTemplate")
    by = (
        {"LaunchTemplate": {"LaunchTemplateId": {"Ref": "It"}}}
        if template
        else {"LaunchConfigurationName": {"Ref": "It"}}
    )
    shape = {"InstanceType": "c5.large", **data}
    group = {"MinSize": 1, "MaxSize": 2, **by}
    made = {
        "It": {"Type": kind, "Properties": {"LaunchTemplateData": shape} if template else shape},
        "Group": {"Type": "AWS::AutoScaling::AutoScalingGroup", "Properties": group},
    }
    return [line for line in lines(made) if line.resource == "Group"]


def test_launch_templates_and_configurations_have_names_of_their_own_for_the_same():
    template, config = "AWS::EC2::LaunchTemplate", "AWS::AutoScaling::LaunchConfiguration"
    # 7 metrics of 0.30 are the detailed monitoring of an instance, which configurations have unless they say otherwise
    watched = "detailed monitoring: 7 metrics each"
    assert watched not in amounts(shaped(template, {}))
    assert amounts(shaped(template, {"Monitoring": {"Enabled": True}}))[watched] == pytest.approx((2.1, 2.1, 4.2))
    assert amounts(shaped(config, {}))[watched][1] == pytest.approx(2.1)
    assert watched not in amounts(shaped(config, {"InstanceMonitoring": False}))
    assert amounts(shaped(config, {"AssociatePublicIpAddress": True}))["public IPv4 addresses"][1] == pytest.approx(
        3.65
    )
    for kind, data, told in (
        (template, {"Placement": {"Tenancy": "dedicated"}}, "tenancy dedicated"),
        (template, {"Placement": {"HostId": "h-1"}}, "a dedicated host"),
        (config, {"PlacementTenancy": "dedicated"}, "tenancy dedicated"),
        (config, {"SpotPrice": "0.05"}, "the price changes through the day"),
    ):
        [line] = shaped(kind, data)
        assert line.status == "unknown"
        assert told in line.note


def test_what_is_meant_by_its_name_is_found():
    shape = {"Type": "AWS::EC2::LaunchTemplate",
             "Properties": {"LaunchTemplateName": "web", "LaunchTemplateData": {"InstanceType": "c5.large"}}}  # fmt: skip
    made = {"Shape": shape, "Group": {"Type": "AWS::AutoScaling::AutoScalingGroup", "Properties": {
        "MinSize": 1, "MaxSize": 1, "LaunchTemplate": {"LaunchTemplateName": "web"}}}}  # fmt: skip
    assert price([stack(made)], BOOK, Usage()).total()["USD"][1] == Decimal("62.05")
    config = {"EndpointConfigName": "search", "ProductionVariants": [variant()]}
    baked = {"BlueGreenUpdatePolicy": {"TerminationWaitInSeconds": 3600}}
    made = {
        "Config": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": config},
        "Endpoint": {"Type": "AWS::SageMaker::Endpoint",
                     "Properties": {"EndpointConfigName": "search", "DeploymentConfig": baked}},
    }  # fmt: skip
    assert price([stack(made)], BOOK, Usage()).total(release=True)["USD"][1] == Decimal("1.4084")


def test_what_cannot_run_as_it_is_written_makes_no_number():
    [line] = shaped("AWS::EC2::LaunchTemplate", {"InstanceRequirements": {"VCpuCount": {"Min": 2}}})
    assert "chosen by requirements" in line.note
    group = {"MinSize": 5, "MaxSize": 2, "LaunchTemplate": {"LaunchTemplateName": "web"}}
    assert "MinSize 5 is over MaxSize 2" in one("AWS::AutoScaling::AutoScalingGroup", group)[0].note
    found = lines(scaled(MinCapacity=9))
    assert [line.status for line in found if line.resource == "Service"] == ["unknown"]
    made = scaled()
    made["Service"]["Properties"]["SchedulingStrategy"] = "DAEMON"
    assert "Fargate does not run" in next(line.note for line in lines(made) if line.resource == "Service")
    made["Service"]["Properties"] = {"CapacityProviderStrategy": [{"CapacityProvider": {"Ref": "Own"}, "Weight": 1}]}
    made["Own"] = {"Type": "AWS::ECS::CapacityProvider", "Properties": {"ManagedInstancesProvider": {"a": "b"}}}
    assert "ECS chooses" in next(line.note for line in lines(made) if line.resource == "Service")


def test_volumes_of_an_instance_are_priced_or_named():
    it = {"InstanceType": "c5.large"}
    [line] = one("AWS::EC2::Instance", it)
    assert line.note == "without the volume that its image brings"
    found = one("AWS::EC2::Instance", {**it, "BlockDeviceMappings": [{"Ebs": {"SnapshotId": "snap-1"}}]})
    assert [line.item for line in found if line.status == "unknown"] == ["a volume"]
    found = one("AWS::EC2::Instance", {**it, "LaunchTemplate": {"LaunchTemplateName": "theirs"}})
    assert [line.item for line in found if line.status == "unknown"] == ["what its launch template adds"]
    # IOPS over 32,000 cost less; the book does not know how much
    found = one("AWS::EC2::Volume", {"VolumeType": "io2", "Size": 100, "Iops": 40_000})
    assert [(line.quantity[1], line.status) for line in found[1:]] == [(32_000, "fixed"), (8_000, "unknown")]


def test_where_a_service_runs_is_its_own_choice_or_its_clusters():
    def service(**more):
        made = scaled()
        del made["Service"]["Properties"]["LaunchType"]
        made["Service"]["Properties"] |= more.pop("properties", {})
        return [line for line in lines({**made, **more}) if line.resource == "Service"]

    assert [line.status for line in service()] == ["free"]
    ties = {"Type": "AWS::ECS::ClusterCapacityProviderAssociations", "Properties": {
        "Cluster": {"Ref": "Cluster"},
        "DefaultCapacityProviderStrategy": [{"CapacityProvider": "FARGATE", "Weight": 1}]}}  # fmt: skip
    assert amounts(service(Ties=ties))["vCPU of tasks: Fargate (x86)"][1] == pytest.approx(2 * 730 * 0.04048)
    for more in (
        {"Cluster": "theirs"},
        {"LaunchType": "EXTERNAL"},
        {"LaunchType": "EXTERNAL", "SchedulingStrategy": "DAEMON"},
    ):
        assert [line.status for line in service(properties=more)] == ["unknown"]


def test_sizes_of_tasks_are_numbers_or_texts_and_their_volumes_are_priced():
    made = scaled()
    made["Task"]["Properties"] = {"Cpu": "1 vCPU", "Memory": "2 GB"}
    disk = {"SizeInGiB": 100, "RoleArn": "r"}
    made["Service"]["Properties"]["VolumeConfigurations"] = [{"Name": "d", "ManagedEBSVolume": disk}]
    found = amounts(lines(made))
    assert tasks(made) == tasks(scaled())
    assert found["volume storage: gp3"] == pytest.approx((16, 16, 64))


def test_stages_whose_resources_have_one_name_keep_their_own_autoscaling():
    named = scaled()
    named["Service"]["Properties"]["ServiceName"] = "api"
    target = named.pop("Target")
    target["Properties"]["ResourceId"] = "service/cluster/api"
    stages = [stack(named, name="dev/cpu"), stack({**named, "Target": target}, name="prod/cpu")]
    for order in (stages, stages[::-1]):
        found = [line for line in price(order, BOOK, Usage()).lines if line.item.startswith("vCPU of tasks")]
        assert {line.stack: [q / 730 for q in line.quantity] for line in found} == {
            "dev/cpu": [1, 1, 1], "prod/cpu": [2, 2, 8],
        }  # fmt: skip


def test_autoscaling_whose_resource_is_not_static_makes_no_number():
    made = scaled()
    target = next(one for one in made.values() if one["Type"].endswith("ScalableTarget"))
    target["Properties"]["ResourceId"] = {"Fn::Sub": "service/${Theirs}/${Service.Name}"}
    more = {"Parameters": {"Theirs": {"Type": "String"}}}
    found = [line for line in lines(made, **more) if line.resource == "Service"]
    assert [line.status for line in found] == ["unknown"]
    assert "give it by --parameter Theirs=VALUE" in found[0].note
    assert {line.status for line in lines(made, **more, parameters={"Theirs": "x"}) if line.amount} == {"fixed"}


def test_provisioned_concurrency_follows_the_chips_and_the_autoscaling_of_its_alias():
    def function(alias, **more):
        made = {
            "Function": {"Type": "AWS::Lambda::Function", "Properties": {"MemorySize": 1024, "FunctionName": "f", **more}},
            "Alias": {"Type": "AWS::Lambda::Alias", "Properties": {"FunctionName": {"Ref": "Function"}, "Name": alias}},
            "Target": {"Type": "AWS::ApplicationAutoScaling::ScalableTarget", "Properties": {
                "ResourceId": "function:f:live", "MinCapacity": 1, "MaxCapacity": 3,
                "ScalableDimension": "lambda:function:ProvisionedConcurrency"}},
        }  # fmt: skip
        return {line.item: line for line in lines(made)}

    line = function("live")["provisioned concurrency"]
    assert [q / 730 for q in line.quantity] == [3600, 3600, 10800]
    assert "costs less" in function("live")["duration (x86)"].note
    assert "provisioned concurrency" not in function("other")
    assert function("live", Architectures=["arm64"])["provisioned concurrency"].status == "unknown"
    made = {
        "Function": {"Type": "AWS::Lambda::Function"},
        "Alias": {"Type": "AWS::Lambda::Alias", "Properties": {"FunctionName": {"Ref": "Function"}, "Name": "live"}},
        "Target": {"Type": "AWS::ApplicationAutoScaling::ScalableTarget", "Properties": {
            "ResourceId": {"Ref": "No"}, "ScalableDimension": "lambda:function:ProvisionedConcurrency"}},
    }  # fmt: skip
    found = {(line.resource, line.status) for line in lines(made)}
    assert found == {("Function", "usage"), ("Alias", "unknown"), ("Target", "unknown")}
    found = one("AWS::Lambda::Function", {"Architectures": [{"Ref": "No"}]})
    assert [line.status for line in found] == ["usage", "unknown"]
    python = {"Runtime": "python3.12", "SnapStart": {"ApplyOn": "PublishedVersions"}}
    assert "SnapStart" in [line.item for line in one("AWS::Lambda::Function", python)]


def test_public_addresses_are_paid_by_the_zone_and_by_the_task():
    def address(resources):
        found = [line for line in lines(resources) if line.item.startswith("public IPv4")]
        return [line.amount and float(line.amount[1]) for line in found]

    balancer = {"Type": "AWS::ElasticLoadBalancingV2::LoadBalancer", "Properties": {"Subnets": ["a", "b"]}}
    assert address({"It": balancer}) == [7.3]
    balancer["Properties"] = {"Type": "network", "SubnetMappings": [{"AllocationId": "e"}, {"SubnetId": "b"}]}
    assert address({"It": balancer}) == [3.65]
    balancer["Properties"] = {}
    assert address({"It": balancer}) == [None]
    balancer["Properties"] = {"Scheme": "internal"}
    assert address({"It": balancer}) == []
    balancer["Properties"] = {"Subnets": ["a", "b"], "IpAddressType": "dualstack-without-public-ipv4"}
    assert address({"It": balancer}) == []
    for unlisted in ("subnet-1,subnet-2", {"Fn::GetAtt": ["Net", "Subnets"]}):
        found = lines({"It": {**balancer, "Properties": {"Subnets": unlisted}}, "Net": {"Type": "Custom::Net"}})
        assert "Subnets is no list" in next(line.note for line in found if line.status == "unknown")
    resources = scaled()
    network = {"AwsvpcConfiguration": {"AssignPublicIp": "ENABLED"}}
    resources["Service"]["Properties"]["NetworkConfiguration"] = network
    assert address(resources) == [7.3]


def test_a_network_load_balancer_holds_less_of_what_is_encrypted():
    used = usage_of(requests_per_second=100, request_kb=0, response_kb=0, connection_seconds=0)

    def units(protocol):
        listener = {"Type": "AWS::ElasticLoadBalancingV2::Listener",
                    "Properties": {"LoadBalancerArn": {"Ref": "It"}, "Protocol": protocol}}  # fmt: skip
        balancer = {"Type": "AWS::ElasticLoadBalancingV2::LoadBalancer",
                    "Properties": {"Type": "network", "Scheme": "internal"}}  # fmt: skip
        found = lines({"It": balancer, "Listener": listener}, used)
        return next(line.quantity[1] / 730 for line in found if line.item == "capacity units")

    # 800, 50 and 400 new connections a second are a unit (Elastic Load Balancing pricing, "NLCU details")
    assert [units(name) for name in ("TCP", "TLS", "UDP")] == [Decimal("0.125"), 2, Decimal("0.25")]


def test_the_autoscaling_of_tables_and_of_provisioned_concurrency_gives_minimum_and_maximum():
    def target(dimension, resource, least, most):
        return {"Type": "AWS::ApplicationAutoScaling::ScalableTarget",
                "Properties": {"MinCapacity": least, "MaxCapacity": most, "ScalableDimension": dimension,
                               "ResourceId": resource}}  # fmt: skip

    def join(*parts):
        return {"Fn::Join": ["", list(parts)]}

    units = {"ReadCapacityUnits": 1, "WriteCapacityUnits": 1}
    index = {"IndexName": "by-day", "ProvisionedThroughput": units}
    made = {
        "Table": {"Type": "AWS::DynamoDB::Table",
                  "Properties": {"ProvisionedThroughput": units, "GlobalSecondaryIndexes": [index]}},
        "Target": target("dynamodb:table:WriteCapacityUnits", join("table/", {"Ref": "Table"}), 5, 50),
        "Other": target("dynamodb:index:ReadCapacityUnits", join("table/", {"Ref": "Table"}, "/index/by-day"), 2, 4),
        "Alias": {"Type": "AWS::Lambda::Alias", "Properties": {
            "FunctionName": {"Ref": "Function"}, "ProvisionedConcurrencyConfig": {"ProvisionedConcurrentExecutions": 1}}},
        "Function": {"Type": "AWS::Lambda::Function", "Properties": {"MemorySize": 1024}},
        "Third": target("lambda:function:ProvisionedConcurrency",
                        join("function:", {"Ref": "Function"}, ":live"), 1, 3),
    }  # fmt: skip
    found = {line.item: [q / 730 for q in line.quantity] for line in lines(made) if line.quantity}
    assert found["write capacity"] == [5, 5, 50]
    assert found["read capacity"] == [1, 1, 1]
    assert found["read capacity of by-day"] == [2, 2, 4]
    assert found["provisioned concurrency"] == [3600, 3600, 10800]
    assert {line.status for line in lines(made) if line.type.endswith("ScalableTarget")} == {"free"}


def test_what_has_no_price_of_its_own_is_not_priced_as_its_neighbour():
    assert one("AWS::SNS::Topic", {"FifoTopic": True})[0].status == "unknown"
    assert one("AWS::ApiGateway::Stage", {})[0].status == "free"
    assert (
        one("AWS::ApiGateway::Stage", {"CacheClusterEnabled": True, "CacheClusterSize": "6.1"})[0].status == "unknown"
    )
    kept = {"LifecycleConfiguration": {"Rules": [{"Transitions": [{"StorageClass": "GLACIER"}]}]}}
    assert "at most" in one("AWS::S3::Bucket", kept)[0].note
    assert one("AWS::DynamoDB::Table", {"BillingMode": "{{resolve:ssm:/mode}}"})[0].status == "unknown"


def managed(name, vendor="AWS"):
    group = {"Name": name, "VendorName": vendor}
    return {"Rules": [{"Name": name, "Priority": 0, "Statement": {"ManagedRuleGroupStatement": group}}]}


@pytest.mark.parametrize(
    ("kind", "properties", "item"),
    [
        ("AWS::SNS::Topic", {"Subscription": [{"Protocol": "sms", "Endpoint": "+1"}]}, "notifications"),
        ("AWS::WAFv2::WebACL", managed("AWSManagedRulesATPRuleSet"), "the rules AWSManagedRulesATPRuleSet of AWS"),
        ("AWS::WAFv2::WebACL", managed("Theirs", "Shop"), "the rules Theirs of Shop"),
        ("AWS::KinesisFirehose::DeliveryStream",
         {"ExtendedS3DestinationConfiguration": {"DynamicPartitioningConfiguration": {"Enabled": True}}},
         "dynamic partitioning"),
        ("AWS::CloudTrail::Trail", {"InsightSelectors": [{"InsightType": "ApiCallRateInsight"}]}, "insights"),
        ("AWS::Events::Rule", {"Targets": [{"Id": "t", "EcsParameters": {"LaunchType": "FARGATE"}}]},
         "tasks that it starts, 1 each time"),
        ("AWS::CloudWatch::Alarm", {"Metrics": [{"Id": "q", "Expression": "SELECT MAX(CPU) FROM x"}]}, "alarm metrics"),
        ("AWS::CodeBuild::Project", {"Environment": {"Type": "LINUX_CONTAINER", "Fleet": {"FleetArn": "f"}}},
         "build minutes"),
        ("AWS::S3::Bucket", {"ReplicationConfiguration": {"Role": "r"}}, "ReplicationConfiguration"),
        ("AWS::ElasticLoadBalancingV2::LoadBalancer",
         {"Scheme": "internal", "MinimumLoadBalancerCapacity": {"CapacityUnits": 100}}, "reserved capacity units"),
        ("AWS::EC2::NatGateway", {"AvailabilityMode": "regional"}, "all of it"),
        ("AWS::EC2::VPNConnection", {"EnableAcceleration": True}, "acceleration"),
        ("AWS::EKS::Cluster", {"ComputeConfig": {"Enabled": True}}, "instances"),
        ("AWS::Logs::LogGroup", {"DataProtectionPolicy": {"Name": "p"}}, "data protection"),
    ],
)  # fmt: skip
def test_what_costs_more_without_a_price_in_the_book_is_named(kind, properties, item):
    assert [line.item for line in one(kind, properties) if line.status == "unknown"] == [item]


def test_plain_neighbours_of_what_costs_more_are_known():
    rule = {"Targets": [{"Id": "t", "Arn": "a"}]}
    for kind, properties in (
        ("AWS::WAFv2::WebACL", managed("AWSManagedRulesCommonRuleSet")),
        ("AWS::Events::Rule", rule),
    ):
        assert "unknown" not in {line.status for line in one(kind, properties)}


def test_what_belongs_to_a_resource_is_counted_with_it():
    used = usage_of(notifications=100_000, queries=2_000_000_000, messages=1024, payload_kb=1024, storage_gb=0)

    def found(kind, properties):
        return {name: amount[1] for name, amount in amounts(one(kind, properties, used)).items()}

    topic = {"Subscription": [{"Protocol": "email", "Endpoint": "e"}, {"Protocol": "sqs", "Endpoint": "q"}]}
    assert found("AWS::SNS::Topic", topic)["notifications by email"] == 2
    secret = {"ReplicaRegions": [{"Region": "us-west-2"}, {"Region": "eu-west-1"}]}
    assert found("AWS::SecretsManager::Secret", secret)["secret and its replicas"] == pytest.approx(1.2)
    # 400.00 for the first 1,000 million, 20.00 for each 100 million more (infracost, route53_record_test.golden)
    assert found("AWS::Route53::HostedZone", {})["queries"] == pytest.approx(600)
    assert found("AWS::Events::Archive", {})["events taken in"] == pytest.approx(0.1)
    cached = {"StageDescription": {"CacheClusterEnabled": True, "CacheClusterSize": "0.5"}}
    assert found("AWS::ApiGateway::Deployment", cached) == {"cache of 0.5 GB": pytest.approx(14.6)}
    assert one("AWS::ApiGateway::Deployment", {})[0].status == "free"
    assert one("AWS::EC2::EIP", {"PublicIpv4Pool": "ipv4pool-ec2-1"})[0].status == "free"


def test_data_is_counted_where_aws_counts_it():
    used = usage_of(requests_per_second=1, request_kb=1, response_kb=3, cross_zone_gb=100)
    private = {"EndpointConfiguration": {"Types": ["PRIVATE"]}}
    assert "data out to the internet" not in amounts(one("AWS::ApiGateway::RestApi", private, used))
    # between the zones of an application load balancer data is free, of a network load balancer it is not
    kind, internal = "AWS::ElasticLoadBalancingV2::LoadBalancer", {"Scheme": "internal"}
    assert "data between zones" not in amounts(one(kind, internal, used))
    assert amounts(one(kind, {**internal, "Type": "network"}, used))["data between zones"][1] == pytest.approx(1)
    assert amounts(lines(scaled(), used))["data between zones"][1] == pytest.approx(1)

    def captured(*modes):
        capture = {"EnableCapture": True, "CaptureOptions": [{"CaptureMode": mode} for mode in modes]}
        shape = {"ProductionVariants": [variant()], "DataCaptureConfig": capture}
        return amounts(one("AWS::SageMaker::EndpointConfig", shape, used))["captured data, kept in S3"][1]

    assert captured("Input") * 4 == pytest.approx(captured("Input", "Output"))
    assert captured("Output") * 4 == pytest.approx(captured("InputAndOutput") * 3)


def test_groups_of_devices_of_two_accounts_are_two():
    group = {"It": {"Type": "AWS::GreengrassV2::Deployment", "Properties": {"TargetArn": "group"}}}
    stacks = [replace(stack(group, name=name), account=name) for name in ("dev", "prod")]
    found = price(stacks, BOOK, usage_of(devices=10, sync_minutes=15, message_kb=1)).lines
    assert [float(line.amount[1]) for line in found if line.item == "active core devices"] == pytest.approx([1.6, 1.6])


def test_data_that_leaves_is_counted_where_a_key_tells_it():
    used = usage_of(internet_gb=100, processed_gb=0)
    for kind, more in (("AWS::EC2::NatGateway", {}), ("AWS::EC2::Instance", {"InstanceType": "c5.large"})):
        found = amounts(one(kind, more, used))
        assert found["data out to the internet"][1] == pytest.approx(9)
    regions = usage_of(inter_region_gb=750)
    assert amounts(one("AWS::S3::Bucket", {}, regions))["data out to another region"][1] == pytest.approx(15)


def test_tiers_are_of_the_account_and_not_of_each_resource():
    bucket = {"Type": "AWS::S3::Bucket"}
    one_usage = Usage((("*", {"internet_gb": three("", 10240), "storage_gb": three("", 0), "put_requests": three("", 0),
                              "get_requests": three("", 0)}),))  # fmt: skip
    found = [
        line.amount[1] for line in lines({"A": bucket, "B": bucket}, one_usage) if line.item.startswith("data out")
    ]
    # the second 10 TB are in the second tier, which both share
    assert found == [Decimal(10240) * (Decimal("0.09") + Decimal("0.085")) / 2] * 2


def test_a_budget_is_paid_once_however_many_actions_it_has():
    def action(budget):
        return {"Type": "AWS::Budgets::BudgetsAction", "Properties": {"BudgetName": budget}}

    made = {"Budget": {"Type": "AWS::Budgets::Budget"}, "A": action({"Ref": "Budget"}), "B": action({"Ref": "Budget"}),
            "C": action("other")}  # fmt: skip
    found = {line.resource: line for line in lines(made)}
    assert [found[name].status for name in "ABC"] == ["fixed", "free", "fixed"]
    # 0.10 a day, 365 / 12 days
    assert float(found["A"].amount[1]) == pytest.approx(3.0417, abs=1e-4)
    # two budgets with actions are free, a third is not
    free = Usage(free_tier=True)
    assert sum(line.amount[1] for line in lines(made, free) if line.amount) == 0
    assert sum(line.amount[1] for line in lines({**made, "D": action("third")}, free) if line.amount) > 2.9


def test_copies_of_an_inference_component_run_on_the_instances_of_their_variant():
    managed = {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 2}
    made = {
        "Config": {"Type": "AWS::SageMaker::EndpointConfig",
                   "Properties": {"ProductionVariants": [variant(1, ManagedInstanceScaling=managed)]}},
        "Component": {"Type": "AWS::SageMaker::InferenceComponent", "Properties": {"InferenceComponentName": "search"}},
        "Target": {"Type": "AWS::ApplicationAutoScaling::ScalableTarget",
                   "Properties": {"ResourceId": "inference-component/search", "MinCapacity": 0, "MaxCapacity": 4,
                                  "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount"}},
    }  # fmt: skip
    found = lines(made)
    assert {line.resource: line.status for line in found if line.resource != "Config"} == {
        "Component": "free", "Target": "free",
    }  # fmt: skip
    assert [q / 730 for q in next(line.quantity for line in found if line.resource == "Config")] == [1, 1, 2]
