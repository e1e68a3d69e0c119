"""The private cluster: listener rules, the ways of an update, scaling, Graviton, the customer's machines, schedules."""

import json

import pytest

from infra.service import stable_number
from tests.test_infra import (
    ACCOUNT,
    IMAGE,
    artifact,
    logical_id,
    make_stage,
    only,
    plain,
    recommend,
    search,
    statements,
    template_of,
)

AWS_LB = "AWS::ElasticLoadBalancingV2"


def second(name="intent"):
    """Another sub-model of the cluster, which can also score."""
    template = recommend()["template"] | {"score": ["-m", "serve.score", "--to", "s3://@DATA@/scoring/out/"]}
    return artifact(name, "cpu", "image-context", template)


def cpu(**settings):
    return template_of(make_stage(search(), recommend(), second(), cpu=settings), "cpu")


@pytest.fixture(scope="module")
def template():
    return cpu()


def test_one_load_balancer_and_a_rule_for_each_sub_model(template):
    template.resource_count_is(f"{AWS_LB}::LoadBalancer", 1)
    template.resource_count_is(f"{AWS_LB}::Listener", 1)
    listener = only(template, f"{AWS_LB}::Listener")
    (refused,) = listener["DefaultActions"]
    assert (refused["Type"], refused["FixedResponseConfig"]["StatusCode"]) == ("fixed-response", "404")
    rules = [rule["Properties"] for rule in template.find_resources(f"{AWS_LB}::ListenerRule").values()]
    paths = {tuple(rule["Conditions"][0]["PathPatternConfig"]["Values"]): rule["Priority"] for rule in rules}
    assert paths == {(f"/{name}/*",): stable_number(name, 1, 49_999) for name in ("recommend", "intent")}
    for rule in rules:
        (action,) = rule["Actions"]
        assert [group["Weight"] for group in action["ForwardConfig"]["TargetGroups"]] == [100, 0]


def test_another_sub_model_leaves_the_rules_of_the_others_alone(template):
    """ECS keeps the weights of a rule: one that CloudFormation writes anew would send traffic to an empty group."""
    alone = template_of(make_stage(search(), recommend()), "cpu")
    rule = logical_id(alone, f"{AWS_LB}::ListenerRule")
    assert template.find_resources(f"{AWS_LB}::ListenerRule")[rule] == alone.find_resources(
        f"{AWS_LB}::ListenerRule"
    ).pop(rule)


def test_canary_has_a_second_target_group_and_a_role_for_its_own_rule(template):
    services = template.find_resources("AWS::ECS::Service")
    (name,) = [key for key in services if key.startswith("recommend")]
    (balanced,) = services[name]["Properties"]["LoadBalancers"]
    rule = next(key for key in template.find_resources(f"{AWS_LB}::ListenerRule") if key.startswith("recommend"))
    advanced = balanced["AdvancedConfiguration"]
    assert advanced["ProductionListenerRule"] == {"Ref": rule}
    assert advanced["AlternateTargetGroupArn"]["Ref"].startswith("recommendGreen")
    assert balanced["TargetGroupArn"]["Ref"].startswith("recommendBlue")
    role = template.find_resources("AWS::IAM::Role")[advanced["RoleArn"]["Fn::GetAtt"][0]]["Properties"]
    allowed = statements(role)
    assert allowed["elasticloadbalancing:ModifyRule"] == ([{"Ref": rule}], None)
    groups, _ = allowed["elasticloadbalancing:DeregisterTargets elasticloadbalancing:RegisterTargets"]
    assert groups == [balanced["TargetGroupArn"], advanced["AlternateTargetGroupArn"]]
    assert rule in services[name]["DependsOn"]


@pytest.mark.parametrize(
    ("update", "strategy", "extra"),
    [
        ("canary", "CANARY", {"CanaryConfiguration": {"CanaryPercent": 10, "CanaryBakeTimeInMinutes": 5}}),
        ("linear", "LINEAR", {"LinearConfiguration": {"StepPercent": 20, "StepBakeTimeInMinutes": 5}}),
        ("blue-green", "BLUE_GREEN", {}),
        ("rolling", "ROLLING", None),
    ],
)
def test_update_is_the_one_that_is_asked_for(update, strategy, extra):
    template = template_of(make_stage(search(), recommend(), cpu={"update": update}), "cpu")
    service = only(template, "AWS::ECS::Service")
    deployment = service["DeploymentConfiguration"]
    assert deployment["Strategy"] == strategy
    assert deployment["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert deployment["Alarms"]["Rollback"] is True and len(deployment["Alarms"]["AlarmNames"]) == 2
    shifts = extra is not None
    template.resource_count_is(f"{AWS_LB}::TargetGroup", 2 if shifts else 1)
    assert ("AdvancedConfiguration" in service["LoadBalancers"][0]) is shifts
    assert deployment.get("BakeTimeInMinutes") == (10 if shifts else None)
    assert (extra or {}).items() <= deployment.items()


def test_alarms_watch_both_target_groups(template):
    alarms = {k: v["Properties"] for k, v in template.find_resources("AWS::CloudWatch::Alarm").items()}
    errors = next(alarm for name, alarm in alarms.items() if name.startswith("recommendErrors"))
    slow = next(alarm for name, alarm in alarms.items() if name.startswith("recommendSlow"))
    assert {len(alarm["Metrics"]) for alarm in (errors, slow)} == {3}
    assert next(m["Expression"] for m in errors["Metrics"] if "Expression" in m) == (
        "SUM([FILL(errors0, 0), FILL(errors1, 0)])"
    )
    assert (slow["Threshold"], slow["EvaluationPeriods"], slow["DatapointsToAlarm"]) == (0.5, 3, 2)
    assert {m["MetricStat"]["Stat"] for m in slow["Metrics"] if "MetricStat" in m} == {"p99"}


def test_cluster_sleeps_outside_of_its_hours():
    hours = {"start": 7, "end": 19, "timezone": "Europe/Berlin"}
    template = template_of(make_stage(search(), recommend(), hours=hours), "cpu")
    target = only(template, "AWS::ApplicationAutoScaling::ScalableTarget")
    actions = {a["Schedule"]: a for a in target["ScheduledActions"]}
    assert {a["Timezone"] for a in actions.values()} == {"Europe/Berlin"}
    assert actions["cron(0 7 ? * MON-FRI *)"]["ScalableTargetAction"] == {"MinCapacity": 3, "MaxCapacity": 12}
    assert actions["cron(0 19 ? * MON-FRI *)"]["ScalableTargetAction"] == {"MinCapacity": 0, "MaxCapacity": 0}


def test_graviton_machines_take_the_place_of_fargate():
    stage = make_stage(search(), recommend(), cpu={"instance_type": "c8g.xlarge", "max_tasks": 7})
    template = template_of(stage, "cpu")
    assert only(template, "AWS::ECS::TaskDefinition")["RequiresCompatibilities"] == ["MANAGED_INSTANCES"]
    service = only(template, "AWS::ECS::Service")
    assert "LaunchType" not in service
    provider = only(template, "AWS::ECS::CapacityProvider")["ManagedInstancesProvider"]
    launch = provider["InstanceLaunchTemplate"]
    assert launch["InstanceRequirements"]["AllowedInstanceTypes"] == ["c8g.xlarge"]
    assert len(launch["NetworkConfiguration"]["Subnets"]) == 2
    assert only(template, "AWS::ApplicationAutoScaling::ScalableTarget")["MaxCapacity"] == 7
    names = {
        e["Properties"]["ServiceName"]
        for e in template_of(stage, "network").find_resources("AWS::EC2::VPCEndpoint").values()
        if isinstance(e["Properties"]["ServiceName"], str)
    }
    assert {f"com.amazonaws.us-east-1.{name}" for name in ("ecs", "ecs-agent", "ecs-telemetry")} <= names


def test_the_customers_machines_run_the_same_containers():
    template = template_of(make_stage(search(), recommend(), cpu={"anywhere": True}), "cpu")
    tasks = template.find_resources("AWS::ECS::TaskDefinition").values()
    outside, inside = sorted((t["Properties"] for t in tasks), key=lambda task: task["NetworkMode"] == "awsvpc")
    assert (outside["RequiresCompatibilities"], outside["NetworkMode"]) == (["EXTERNAL"], "bridge")
    assert "RuntimePlatform" not in outside
    for one, other in zip(outside["ContainerDefinitions"], inside["ContainerDefinitions"], strict=True):
        same = ("Command", "Environment", "User", "ReadonlyRootFilesystem", "LinuxParameters", "MountPoints", "Image")
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    (port,) = outside["ContainerDefinitions"][1]["PortMappings"]
    assert port["HostPort"] == stable_number("recommend", 20_000, 10_000)
    services = [s["Properties"] for s in template.find_resources("AWS::ECS::Service").values()]
    (external,) = [service for service in services if service.get("LaunchType") == "EXTERNAL"]
    assert external["SchedulingStrategy"] == "DAEMON"
    assert not external.get("NetworkConfiguration") and not external.get("LoadBalancers")


def test_machines_take_tasks_of_this_cluster_alone():
    template = template_of(make_stage(search(), recommend(), cpu={"anywhere": True}), "cpu")
    (role,) = [
        role["Properties"]
        for name, role in template.find_resources("AWS::IAM::Role").items()
        if name.startswith("MachineRole")
    ]
    assert role["AssumeRolePolicyDocument"]["Statement"][0]["Condition"] == {
        "StringEquals": {"aws:SourceAccount": ACCOUNT}
    }
    cluster = {"Fn::GetAtt": [logical_id(template, "AWS::ECS::Cluster"), "Arn"]}
    for actions, (resources, condition) in statements(role).items():
        if "ecs:Poll" in actions:
            assert condition == {"ArnEquals": {"ecs:cluster": cluster}}
        if "ecs:RegisterContainerInstance" in actions:
            assert resources == [cluster]
    assert not any(action in json.dumps(role) for action in ("ssm:GetParameter", "s3:", "ecr:"))


def test_offline_scoring_is_a_scheduled_task_of_each_sub_model_that_can():
    template = cpu(score_at="cron(0 3 * * ? *)")
    schedule = only(template, "AWS::Scheduler::Schedule")
    assert schedule["ScheduleExpression"] == "cron(0 3 * * ? *)"
    target = schedule["Target"]
    assert target["EcsParameters"]["LaunchType"] == "FARGATE"
    place = target["EcsParameters"]["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert (place["AssignPublicIp"], len(place["Subnets"])) == ("DISABLED", 2)
    assert target["DeadLetterConfig"]["Arn"]["Fn::GetAtt"][0] == logical_id(template, "AWS::SQS::Queue")
    (task,) = [
        task["Properties"]
        for name, task in template.find_resources("AWS::ECS::TaskDefinition").items()
        if name.startswith("intentscore")
    ]
    fetch, run = task["ContainerDefinitions"]
    assert run["Command"] == ["-m", "serve.score", "--to", "s3://shipyard-dev-data-123456789012-us-east-1/scoring/out/"]
    assert (fetch["Name"], run["DependsOn"]) == ("fetch", [{"ContainerName": "fetch", "Condition": "SUCCESS"}])
    (role,) = [
        role["Properties"]
        for name, role in template.find_resources("AWS::IAM::Role").items()
        if name.startswith("intentscoreRole")
    ]
    allowed = {k: v for k, v in statements(role).items() if k.startswith("s3:Abort")}
    assert allowed == {"s3:AbortMultipartUpload s3:PutObject": (["<data>/scoring/out/intent/*"], None)}


def test_a_job_reads_and_writes_what_it_names():
    job = {
        "at": "cron(0 2 ? * SUN *)",
        "image": IMAGE,
        "command": ("release",),
        "cpu": 4096,
        "memory_mib": 16384,
        "reads": ("feedback/",),
        "writes": ("updates/",),
    }
    template = template_of(make_stage(search(), recommend(), cpu={"job": {"model_update": job}}), "cpu")
    assert only(template, "AWS::Scheduler::Schedule")["ScheduleExpression"] == "cron(0 2 ? * SUN *)"
    (role,) = [
        plain(role["Properties"])
        for name, role in template.find_resources("AWS::IAM::Role").items()
        if name.startswith("jobmodelupdateRole")
    ]
    allowed = statements(role)
    assert allowed["s3:GetObject"] == (["<data>/feedback/*"], None)
    assert allowed["s3:ListBucket"] == (["<data>"], {"StringLike": {"s3:prefix": ["feedback/*"]}})
    assert allowed["s3:AbortMultipartUpload s3:PutObject"] == (["<data>/updates/*"], None)
    # its schedule starts this task and no other
    starts = [
        s
        for policy in template.find_resources("AWS::IAM::Policy").values()
        for s in policy["Properties"]["PolicyDocument"]["Statement"]
        if s["Action"] == "ecs:RunTask"
    ]
    (start,) = starts
    assert "jobmodelupdate" in json.dumps(start["Resource"])


def test_the_image_can_be_built_from_the_bundles_dockerfile(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    stage = make_stage(search(), recommend(), cpu={"image": None, "context": str(tmp_path)})
    template = template_of(stage, "cpu")
    image = only(template, "AWS::ECS::TaskDefinition")["ContainerDefinitions"][0]["Image"]
    assert "cdk-hnb659fds-container-assets" in json.dumps(image)
