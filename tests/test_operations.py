"""The stacks around the targets: what is watched, the way to the customer's network, delivery, the copy, other VPCs."""

import json
import re
from pathlib import Path

import aws_cdk as cdk
import cfnlint.api
import pytest
from aws_cdk.assertions import Match
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import app
from models.config import Environment
from models.release import sign
from shipyard.delivery import live
from shipyard.edge import components, devices, rollout
from tests.test_infra import (
    ACCOUNT,
    BUCKET,
    CONTEXT,
    ENVIRONMENT,
    aslist,
    compare_snapshot,
    edge,
    fleet_of,
    gateway,
    logical_id,
    make_stage,
    only,
    plain,
    recommend,
    sample,
    search,
    statements,
    template_of,
    walk,
)

OBSERVE = {"email": "alarms@example.com", "budget_usd": 900, "p99_ms": 300}
LINK = {
    "kind": "vpn",
    "networks": ("192.168.0.0/16",),
    "peer": "198.51.100.7",
    "domain": "corp.example.com",
    "resolvers": ("192.168.0.53",),
}
DELIVERY = {"repository": "owner/shop"}
PIPELINE = {
    "connection": f"arn:aws:codeconnections:us-east-1:{ACCOUNT}:connection/00000000-0000-0000-0000-000000000001",
    "signing_key": f"arn:aws:kms:us-east-1:{ACCOUNT}:key/00000000-0000-0000-0000-000000000002",
    "approving_key": "arn:aws:kms:us-east-1:333333333333:key/00000000-0000-0000-0000-000000000003",
}
PIPED = DELIVERY | {"pipeline": PIPELINE}
FOLLOWING = {
    "staging": {"account": "222222222222", "delivery": DELIVERY | {"promote_from": "dev"}},
    "prod": {"account": "333333333333", "delivery": DELIVERY | {"promote_from": "staging"}, "production": True},
}
TRAINING = {"image": f"shipyard/train@sha256:{'0' * 64}", "instance_type": "ml.c7i.4xlarge"}
VPC = {
    "id": "vpc-0123456789abcdef0",
    "subnets": ("subnet-0123456789abcdef0", "subnet-0123456789abcdef1"),
    "route_tables": ("rtb-0123456789abcdef0", "rtb-0123456789abcdef1"),
    "endpoints": ("s3", "logs"),
}
ALL = (search(), recommend(), edge("runtime"), edge("model"), gateway())


@pytest.fixture(scope="module")
def stage():
    return make_stage(*ALL, observe=OBSERVE, link=LINK, delivery=DELIVERY, replica="us-west-2", production=True)


@pytest.fixture(scope="module")
def observe(stage):
    return template_of(stage, "observe")


@pytest.mark.parametrize("name", ("observe", "link", "delivery", "replica"))
def test_cfn_lint_finds_no_error_and_policies_name_actions(stage, name):
    body = template_of(stage, name).to_json()
    region = "us-west-2" if name == "replica" else "us-east-1"
    found = cfnlint.api.lint(json.dumps(body), regions=[region])
    assert [str(match) for match in found if match.rule.id.startswith("E")] == []
    for _, value in walk(body["Resources"]):
        if isinstance(value, dict) and value.get("Effect") == "Allow" and "Resource" in value:
            key_policy = any(action.startswith("kms:") for action in aslist(value["Action"]))
            known = aslist(value["Action"]) == ["ecs:DescribeTaskDefinition"]  # an action that knows no resource
            assert key_policy or known or "*" not in aslist(value["Resource"])
    assert "ManagedPolicyArns" not in json.dumps(body)
    assert "0.0.0.0/0" not in json.dumps(body)


@pytest.mark.parametrize("name", ("observe", "link", "delivery", "replica"))
def test_snapshot(stage, name):
    """SHIPYARD_UPDATE_SNAPSHOTS=1 writes it anew."""
    compare_snapshot(name, template_of(stage, name).to_json())


# --- observe ---------------------------------------------------------------------------------------------------------


def test_every_target_has_alarms_for_what_deployments_do_not_watch(observe):
    alarms = {
        a["Properties"]["AlarmDescription"].split(":")[0]: a
        for a in observe.find_resources("AWS::CloudWatch::Alarm").values()
    }
    said = " | ".join(alarms)
    for what in ("saturated", "memory", "Nobody asked the endpoint", "No task of recommend", "No task of gateway",
                 "Nobody asked the gateway", "Feedback has not reached", "Drift", "A device was not connected"):  # fmt: skip
        assert what in said
    for description, alarm in alarms.items():
        silent = "Nobody" in description or "No task" in description
        assert (alarm["Properties"]["TreatMissingData"] == "breaching") is silent, description


def test_silence_is_an_alarm_in_production_alone():
    template = template_of(make_stage(*ALL, observe=OBSERVE), "observe")
    assert "Nobody asked" not in json.dumps(template.to_json())


def test_a_private_gateway_is_watched_at_its_tasks():
    """There is no entry then whose metrics tell of silence and drift."""
    stage = make_stage(*ALL, observe=OBSERVE, production=True, gateway={"api": "private"})
    alarms = {
        a["Properties"]["AlarmDescription"].split(":")[0]: json.dumps(a["Properties"]["Metrics"])
        for a in template_of(stage, "observe").find_resources("AWS::CloudWatch::Alarm").values()
        if "Metrics" in a["Properties"]
    }
    for what in ("Nobody asked the gateway for 15 minutes", "Drift"):
        # both groups: one of them has the requests
        assert "FILL(asked0, 0) + FILL(asked1, 0)" in alarms[what]
        assert alarms[what].count('"RequestCount"') == 2
    assert "events / requests" in alarms["Drift"]


def test_alarms_of_every_stack_reach_the_mailbox(observe):
    rules = [rule["Properties"] for rule in observe.find_resources("AWS::Events::Rule").values()]
    patterns = {rule["EventPattern"]["detail-type"][0]: rule["EventPattern"]["detail"] for rule in rules}
    assert patterns["CloudWatch Alarm State Change"] == {
        "alarmName": [{"prefix": "shipyard-dev-"}],
        "state": {"value": ["ALARM"]},
    }
    assert patterns.keys() > {"ECS Deployment State Change", "SageMaker Endpoint State Change", "ECS Task State Change"}
    topic = logical_id(observe, "AWS::SNS::Topic")
    assert {rule["Targets"][0]["Arn"]["Ref"] for rule in rules} == {topic}
    subscription = only(observe, "AWS::SNS::Subscription")
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "alarms@example.com")
    assert only(observe, "AWS::SNS::Topic")["KmsMasterKeyId"] == {
        "Fn::GetAtt": [logical_id(observe, "AWS::KMS::Key"), "Arn"]
    }


def test_budget_stops_new_capacity_and_nothing_else(observe):
    budget = only(observe, "AWS::Budgets::Budget")["Budget"]
    assert budget["BudgetLimit"] == {"Amount": 900, "Unit": "USD"}
    action = only(observe, "AWS::Budgets::BudgetsAction")
    assert (action["ApprovalModel"], action["ActionThreshold"]["Value"]) == ("MANUAL", 100)
    role = f"cdk-hnb659fds-cfn-exec-role-{ACCOUNT}-us-east-1"
    assert action["Definition"]["IamActionDefinition"]["Roles"] == [role]
    policy = only(observe, "AWS::IAM::ManagedPolicy")["PolicyDocument"]["Statement"]
    assert {s["Effect"] for s in policy} == {"Deny"}
    assert "sagemaker:CreateEndpoint" in policy[0]["Action"] and "sagemaker:UpdateEndpoint" not in policy[0]["Action"]
    actor = only(observe, "AWS::IAM::Role")
    ((resources, condition),) = statements(actor).values()
    assert resources == [f"arn:aws:iam::{ACCOUNT}:role/{role}"]
    assert condition == {"ArnEquals": {"iam:PolicyARN": {"Ref": logical_id(observe, "AWS::IAM::ManagedPolicy")}}}


def test_dashboard_shows_the_release_and_every_target(observe):
    body = json.dumps(only(observe, "AWS::CloudWatch::Dashboard")["DashboardBody"])
    for part in ("0.1.0-g", search()["digest"][:12], "gpu search", "cpu recommend", "cpu gateway", "edge: devices"):
        assert part in body


def test_one_request_is_followed_through_the_logs_of_all_services(observe):
    assert len(only(observe, "AWS::Logs::QueryDefinition")["LogGroupNames"]) == 2


def test_environment_without_observe_has_no_such_stack():
    assert make_stage(*ALL).node.try_find_child("observe") is None


# --- link ------------------------------------------------------------------------------------------------------------


def test_vpn_brings_the_routes_of_the_customers_network(stage):
    template = template_of(stage, "link")
    connection = only(template, "AWS::EC2::VPNConnection")
    assert connection["StaticRoutesOnly"] is False
    assert [t["IKEVersions"] for t in connection["VpnTunnelOptionsSpecifications"]] == [[{"Value": "ikev2"}]] * 2
    assert only(template, "AWS::EC2::CustomerGateway")["IpAddress"] == "198.51.100.7"
    assert len(only(template, "AWS::EC2::VPNGatewayRoutePropagation")["RouteTableIds"]) == 2
    assert "PreSharedKey" not in json.dumps(connection)  # AWS makes them; a template would show them
    entered = [r["Properties"] for r in template.find_resources("AWS::EC2::SecurityGroupIngress").values()]
    assert {(rule["CidrIp"], rule["FromPort"], rule["ToPort"]) for rule in entered} == {
        ("192.168.0.0/16", 80, 80),
        ("192.168.0.0/16", 8080, 8080),
        ("192.168.0.0/16", 53, 53),
    }


def test_names_are_asked_of_each_other(stage):
    template = template_of(stage, "link")
    rule = only(template, "AWS::Route53Resolver::ResolverRule")
    assert (rule["DomainName"], rule["TargetIps"]) == ("corp.example.com", [{"Ip": "192.168.0.53", "Port": "53"}])
    directions = {
        e["Properties"]["Direction"] for e in template.find_resources("AWS::Route53Resolver::ResolverEndpoint").values()
    }
    assert directions == {"INBOUND", "OUTBOUND"}


def test_direct_connect_announces_the_vpc_alone():
    link = {"kind": "direct-connect", "networks": ("192.168.0.0/16",)}
    template = template_of(make_stage(*ALL, link=link), "link")
    template.resource_count_is("AWS::EC2::VPNConnection", 0)
    association = only(template, "AWS::DirectConnect::DirectConnectGatewayAssociation")
    assert association["AllowedPrefixesToDirectConnectGateway"] == ["10.40.0.0/16"]
    assert only(template, "AWS::DirectConnect::DirectConnectGateway")["AmazonSideAsn"] != str(
        only(template, "AWS::EC2::VPNGateway")["AmazonSideAsn"]
    )


# --- delivery --------------------------------------------------------------------------------------------------------


def roles(template):
    return {
        role["Properties"]["RoleName"]: role["Properties"]
        for role in template.find_resources("AWS::IAM::Role").values()
    }


def test_a_workflow_gets_the_role_of_its_environment_alone(stage):
    found = roles(template_of(stage, "delivery"))
    assert found.keys() == {f"shipyard-dev-{name}" for name in ("release", "plan", "deploy")}
    subjects = {"release": "environment:dev", "deploy": "environment:dev", "plan": "pull_request"}
    for name, subject in subjects.items():
        (trust,) = found[f"shipyard-dev-{name}"]["AssumeRolePolicyDocument"]["Statement"]
        assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
        assert trust["Condition"] == {
            "StringEquals": {
                "token.actions.githubusercontent.com:aud": "sts.amazonaws.com",
                "token.actions.githubusercontent.com:sub": f"repo:owner/shop:{subject}",
            }
        }


def test_release_writes_artifacts_and_deletes_none(stage):
    found = roles(template_of(stage, "delivery"))
    allowed = statements(found["shipyard-dev-release"])
    actions = {action for names in allowed for action in names.split()}
    assert "s3:PutObject" in actions and not any("Delete" in action for action in actions)
    written = next(resources for names, (resources, _) in allowed.items() if "s3:PutObject" in names)
    assert written == ["<bucket>/artifacts/*", "<bucket>/delivery/*"]
    # the fleet names no key, so the role signs with none
    assert "kms:Sign" not in actions
    # a delta of more than 8 MiB is written in parts, and one that was begun is found again
    rolls = statements(found["shipyard-dev-deploy"])
    parts = "s3:AbortMultipartUpload s3:ListMultipartUploadParts s3:PutObject"
    assert rolls[parts] == (["<bucket>/deltas/*"], None)
    assert rolls["s3:ListBucket s3:ListBucketMultipartUploads"] == (["<bucket>"], None)
    # a rollout waits longer than an hour
    hours = {name.rpartition("-")[2]: role["MaxSessionDuration"] // 3600 for name, role in found.items()}
    assert hours == {"release": 1, "plan": 1, "deploy": 4}
    # plan and deploy act by the roles of the bootstrap, plan by the one that reads
    plan = statements(found["shipyard-dev-plan"])["sts:AssumeRole"][0]
    assert plan == [f"arn:aws:iam::{ACCOUNT}:role/cdk-hnb659fds-lookup-role-{ACCOUNT}-us-east-1"]
    deploy = statements(found["shipyard-dev-deploy"])["sts:AssumeRole"][0]
    assert len(deploy) == 4 and all("/cdk-hnb659fds-" in role for role in deploy)


def test_promotion_reads_the_bucket_of_the_environment_before():
    key = Ed25519PrivateKey.generate()
    dev = Environment(**ENVIRONMENT)
    other = {"account": "222222222222", "delivery": {"repository": "owner/shop", "promote_from": "dev"}}
    fleet = fleet_of().model_copy(update={"env": {"dev": dev, "prod": Environment(**{**ENVIRONMENT, **other})}})
    release = sign(sample(key, *ALL), "0.1.0", key)
    scope = cdk.App(context=CONTEXT)
    stages = {name: app.FleetStage(scope, name, fleet=fleet, release=release, signer="key") for name in fleet.env}
    role = "arn:aws:iam::222222222222:role/shipyard-prod-release"
    template_of(stages["dev"], "storage").has_resource_properties(
        "AWS::S3::BucketPolicy",
        {
            "PolicyDocument": {
                "Statement": Match.array_with(
                    [
                        Match.object_like(
                            {
                                "Action": "s3:GetObject",
                                "Effect": "Allow",
                                "Principal": {"AWS": "arn:aws:iam::222222222222:root"},
                                "Condition": {"ArnEquals": {"aws:PrincipalArn": [role]}},
                            }
                        )
                    ]
                )
            }
        },
    )
    assert role in json.dumps(only(template_of(stages["dev"], "storage"), "AWS::KMS::Key"))
    found = roles(template_of(stages["prod"], "delivery"))
    allowed = statements(found["shipyard-prod-release"])
    assert [f"arn:aws:s3:::{BUCKET}/artifacts/*"] in [resources for resources, _ in allowed.values()]


# --- storage and network ---------------------------------------------------------------------------------------------


def test_artifacts_are_copied_to_the_second_region(stage):
    template = template_of(stage, "storage")
    buckets = [b["Properties"] for b in template.find_resources("AWS::S3::Bucket").values()]
    (rule,) = next(b["ReplicationConfiguration"]["Rules"] for b in buckets if "ReplicationConfiguration" in b)
    copy = f"shipyard-dev-artifacts-{ACCOUNT}-us-west-2"
    assert rule["Destination"] == {
        "Bucket": f"arn:aws:s3:::{copy}",
        "EncryptionConfiguration": {"ReplicaKmsKeyID": f"arn:aws:kms:us-west-2:{ACCOUNT}:alias/{copy}"},
    }
    assert (rule["Filter"], rule["DeleteMarkerReplication"]) == ({"Prefix": "artifacts/"}, {"Status": "Disabled"})
    replica = template_of(stage, "replica")
    (bucket,) = replica.find_resources("AWS::S3::Bucket").values()
    assert bucket["Properties"]["BucketName"] == copy
    assert bucket["DeletionPolicy"] == "RetainExceptOnCreate" and bucket["UpdateReplacePolicy"] == "Retain"
    assert only(replica, "AWS::KMS::Alias")["AliasName"] == f"alias/{copy}"
    assert stage.node.find_child("replica").region == "us-west-2"
    assert {stack.node.id for stack in stage.node.find_child("storage").dependencies} == {"replica"}


@pytest.mark.parametrize(
    ("artifacts", "cpu", "needed"),
    [
        ((search(),), {}, set()),
        ((search(), recommend()), {}, {"ecr.api", "ecr.dkr", "logs"}),
        ((search(), recommend()), {"instance_type": "c8g.large"}, {"ecs", "ecs-agent", "ecs-telemetry"}),
        (ALL, {}, {"ecr.api", "ecr.dkr", "logs", "sagemaker.runtime", "kinesis-firehose"}),
    ],
)
def test_endpoints_follow_from_what_is_deployed(artifacts, cpu, needed):
    stage = make_stage(*artifacts, cpu=cpu)
    template = template_of(stage, "network")
    made = {
        e["Properties"]["ServiceName"].removeprefix("com.amazonaws.us-east-1.")
        for e in template.find_resources("AWS::EC2::VPCEndpoint").values()
        if e["Properties"]["VpcEndpointType"] == "Interface"
    }
    assert made >= needed and (needed or not made)
    if not cpu:
        assert made == needed
    for endpoint in template.find_resources("AWS::EC2::VPCEndpoint").values():
        policy = plain(endpoint["Properties"].get("PolicyDocument", {"Statement": []}))
        for statement in policy["Statement"]:
            if statement["Resource"] == "*":
                assert statement["Condition"] == {"StringEquals": {"aws:PrincipalAccount": ACCOUNT}}


def test_existing_vpc_gets_what_it_lacks():
    stage = make_stage(*ALL, vpc=VPC)
    template = template_of(stage, "network")
    for kind in ("VPC", "Subnet", "RouteTable", "FlowLog", "InternetGateway"):
        template.resource_count_is(f"AWS::EC2::{kind}", 0)
    endpoints = [e["Properties"] for e in template.find_resources("AWS::EC2::VPCEndpoint").values()]
    assert {e["VpcId"] for e in endpoints} == {VPC["id"]}
    assert {e["ServiceName"].rsplit("us-east-1.", 1)[1] for e in endpoints} == {
        *("ecr.api", "ecr.dkr", "sagemaker.runtime", "kinesis-firehose")
    }
    assert {tuple(e["SubnetIds"]) for e in endpoints} == {VPC["subnets"]}
    # calls go to endpoints of other groups too, so to the VPC
    out = template_of(stage, "cpu").find_resources("AWS::EC2::SecurityGroupEgress").values()
    assert "10.40.0.0/16" in {rule["Properties"].get("CidrIp") for rule in out}
    balancer = only(template_of(stage, "cpu"), "AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert balancer["Subnets"] == list(VPC["subnets"])


def test_the_role_that_deploys_may_call_what_a_rollout_and_a_status_call(stage):
    allowed = {
        action
        for resource in template_of(stage, "delivery").to_json()["Resources"].values()
        if resource["Type"] == "AWS::IAM::Role" and resource["Properties"]["RoleName"].endswith("-deploy")
        for policy in resource["Properties"]["Policies"]
        for statement in policy["PolicyDocument"]["Statement"]
        for action in aslist(statement["Action"])
    }
    services, called = {"shadows": "iot"}, set()
    for module in (live, rollout, devices, components):
        text = Path(module.__file__).read_text()
        for service, method in re.findall(r"\b(sagemaker|ecs|greengrass|iot|shadows)\.([a-z]+_[a-z_]+)", text):
            if method != "get_paginator":
                called.add(f"{services.get(service, service)}:{''.join(map(str.title, method.split('_')))}")
    called |= {"cloudformation:ListStackResources", "iot:ListThingsInThingGroup"}  # by paginators
    assert len(called) > 12 and called - allowed == set()
