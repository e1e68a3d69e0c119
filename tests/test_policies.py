"""Policy checks over every stack: cdk-nag's AwsSolutions, and the rules of infra/rules.py, each with a seeded violation."""

import copy
import json
import os
from pathlib import Path

import aws_cdk as cdk
import pytest
from aws_cdk import aws_s3 as s3
from cdk_nag import AwsSolutionsChecks
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import app
from infra.rules import RULES, check_templates, violations
from models.release import ShipyardError, sign
from tests.test_infra import CONTEXT, IMAGE, fleet_of, sample
from tests.test_operations import ALL, FOLLOWING, LINK, OBSERVE, PIPED, TRAINING

ACKNOWLEDGED = cdk.Validations.ACKNOWLEDGED_RULES_METADATA_KEY
JOB = {"at": "cron(0 2 ? * SUN *)", "image": IMAGE, "command": ("release",), "cpu": 4096, "memory_mib": 16384}


def synthesize(out, seed=None):
    """Build every stack there is with all options, run the pack, and return the app and the findings of its report."""
    root = cdk.App(context={**CONTEXT, "@aws-cdk/core:failSynthOnValidationErrors": False}, outdir=str(out))
    cdk.Validations.of(root).add_plugins(AwsSolutionsChecks(root))
    key = Ed25519PrivateKey.generate()
    fleet = fleet_of(
        production=True,
        observe=OBSERVE,
        link=LINK,
        delivery=PIPED,
        following=FOLLOWING,
        training=TRAINING,
        replica="us-west-2",
        cpu={"anywhere": True, "job": {"update": JOB | {"reads": ("feedback/",), "writes": ("updates/",)}}},
        gpu={"capture_percent": 5, "max_instances": 4},
        gateway={"waf": True},
    )
    release = sign(sample(key, *ALL), "0.1.0", key)
    stage = app.FleetStage(root, "dev", fleet=fleet, release=release, signer="key")
    if seed is not None:
        seed(stage.node.find_child("storage"))
    root.synth()
    (report,) = json.loads((out / "validation-report.json").read_text())["pluginReports"]
    assert report["pluginName"] == "AwsSolutions"
    return root, [
        (violation["ruleName"], construct["constructPath"])
        for violation in report["violations"]
        for construct in violation["violatingConstructs"]
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp("policies"))


@pytest.fixture(scope="module")
def templates(made):
    root, _ = made
    return {path.name: json.loads(path.read_text()) for path in sorted(Path(root.outdir).rglob("*.template.json"))}


def reasons(root, path):
    """Return what is acknowledged on a construct and above it, as {rule: reason}."""
    found, node = {}, root.node
    for part in ("", *path.split("/")):
        node = node.find_child(part).node if part else node
        for entry in node.metadata:
            if entry.type == ACKNOWLEDGED:
                found |= {key.split("::")[-1]: reason for key, reason in entry.data.items()}
    return found


def test_every_finding_is_acknowledged_with_a_reason(made):
    # cdk-nag 3 wants each wildcard acknowledged by the resource that it names, which nobody knows before the synth has
    # resolved it. So one acknowledgement on a role stands for its resources; for actions there is none.
    root, findings = made
    assert {rule.split("[")[0] for rule, _ in findings} <= {"AwsSolutions-IAM5"}
    for rule, path in findings:
        assert rule.startswith("AwsSolutions-IAM5[Resource::"), (rule, path)
        assert len(reasons(root, path).get("AwsSolutions-IAM5", "")) > 20, (rule, path)


def test_pack_runs_with_the_builtin_validator_off(tmp_path):
    assert os.environ["CDK_VALIDATION"] == "false"

    def seed(stack):
        s3.Bucket(stack, "Open")

    _, findings = synthesize(tmp_path / "out", seed)
    assert ("AwsSolutions-S10", "dev/storage/Open/Resource") in findings
    assert ("AwsSolutions-S1", "dev/storage/Open/Resource") in findings


def test_templates_keep_our_rules(templates):
    assert len(templates) == 12
    assert {name: list(violations(template)) for name, template in templates.items()} == {
        name: [] for name in templates
    }
    seen = {resource["Type"] for template in templates.values() for resource in template["Resources"].values()}
    assert RULES.keys() <= seen


SEEDS = {
    "container has a network": ("AWS::SageMaker::Model", lambda p: p.pop("EnableNetworkIsolation")),
    "not fetched through the VPC": ("AWS::SageMaker::Model", lambda p: p.pop("VpcConfig")),
    "captured requests": ("AWS::SageMaker::EndpointConfig", lambda p: p["DataCaptureConfig"].pop("KmsKeyId")),
    "whatever driver": (
        "AWS::SageMaker::EndpointConfig",
        lambda p: p["ProductionVariants"][0].pop("InferenceAmiVersion"),
    ),
    "two alarms": (
        "AWS::SageMaker::Endpoint",
        lambda p: p["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"].pop(),
    ),
    "what was scaled": ("AWS::SageMaker::Endpoint", lambda p: p.pop("RetainAllVariantProperties")),
    "network of its machine": ("AWS::ECS::TaskDefinition", lambda p: p.update(NetworkMode="host")),
    "by its digest": ("AWS::ECS::TaskDefinition", lambda p: p["ContainerDefinitions"][0].update(Image="x:latest")),
    "as root": ("AWS::ECS::TaskDefinition", lambda p: p["ContainerDefinitions"][0].pop("User")),
    "may write": ("AWS::ECS::TaskDefinition", lambda p: p["ContainerDefinitions"][0].pop("ReadonlyRootFilesystem")),
    "keeps capabilities": ("AWS::ECS::TaskDefinition", lambda p: p["ContainerDefinitions"][0].pop("LinuxParameters")),
    "log is lost": ("AWS::ECS::TaskDefinition", lambda p: p["ContainerDefinitions"][0].pop("LogConfiguration")),
    "failed deployment": (
        "AWS::ECS::Service",
        lambda p: p["DeploymentConfiguration"].pop("DeploymentCircuitBreaker"),
    ),
    "public addresses": (
        "AWS::ECS::Service",
        lambda p: p.update(LaunchType="FARGATE", NetworkConfiguration={"AwsvpcConfiguration": {}}),
    ),
    "kept for good": ("AWS::Logs::LogGroup", lambda p: p.pop("RetentionInDays")),
    "wildcard of actions": ("AWS::IoT::Policy", lambda p: p["PolicyDocument"]["Statement"][0].update(Action="iot:*")),
    "wildcard of resources": ("AWS::IoT::Policy", lambda p: p["PolicyDocument"]["Statement"][0].update(Resource="*")),
    "the newest": (
        "AWS::GreengrassV2::Deployment",
        lambda p: p["Components"]["aws.greengrass.Nucleus"].pop("ComponentVersion"),
    ),
    "do not go back": ("AWS::GreengrassV2::Deployment", lambda p: p.pop("DeploymentPolicies")),
}


@pytest.mark.parametrize("fault", SEEDS)
def test_rule_finds_what_it_is_for(templates, fault):
    kind, break_it = SEEDS[fault]
    template = next(
        copy.deepcopy(t) for t in templates.values() if any(r["Type"] == kind for r in t["Resources"].values())
    )
    name = next(name for name, resource in template["Resources"].items() if resource["Type"] == kind)
    break_it(template["Resources"][name]["Properties"])
    found = list(violations(template))
    assert [resource for resource, _ in found] == [name]
    assert fault in found[0][1]


def test_synth_tells_of_a_broken_rule(templates, tmp_path):
    template = copy.deepcopy(next(t for name, t in templates.items() if "gpu" in name))
    for resource in template["Resources"].values():
        if resource["Type"] == "AWS::SageMaker::Model":
            resource["Properties"]["EnableNetworkIsolation"] = False
    (tmp_path / "gpu.template.json").write_text(json.dumps(template))
    with pytest.raises(
        ShipyardError, match=r"rule: a model's container has a network; value: 'gpu.template.json: search"
    ):
        check_templates(tmp_path)
