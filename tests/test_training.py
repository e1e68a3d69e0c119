"""The stack of training jobs: what a job reaches, what it may, and what starting one takes."""

import json

import cfnlint.api
import pytest

from infra.checks import check
from models.release import ShipyardError
from tests.test_infra import ACCOUNT, aslist, compare_snapshot, fleet_of, make_stage, only, plain, template_of, walk
from tests.test_operations import ALL, TRAINING

SG, SUBNET = "sg-0123456789abcdef0", "subnet-0123456789abcdef0"


def key_of(account, region="us-east-1"):
    return f"arn:aws:kms:{region}:{account}:key/11111111-1111-1111-1111-111111111111"


def place(key):
    return {"subnets": (SUBNET,), "security_groups": (SG,), "key": key}


@pytest.fixture(scope="module")
def training():
    return template_of(make_stage(*ALL, training=TRAINING), "training")


def allowed(document):
    """Return the statements of a policy by their actions."""
    return {tuple(aslist(one["Action"])): one for one in plain(document)["Statement"]}


def test_cfn_lint_finds_no_error_and_the_snapshot_holds(training):
    body = training.to_json()
    found = cfnlint.api.lint(json.dumps(body), regions=["us-east-1"])
    assert [str(match) for match in found if match.rule.id.startswith("E")] == []
    assert "0.0.0.0/0" not in json.dumps(body)
    compare_snapshot("training", body)


def test_a_job_reaches_s3_and_nothing_else(training):
    group = only(training, "AWS::EC2::SecurityGroup")
    assert [rule["CidrIp"] for rule in group["SecurityGroupEgress"]] == ["255.255.255.255/32"]
    egress = only(training, "AWS::EC2::SecurityGroupEgress")
    assert (egress["DestinationPrefixListId"], egress["FromPort"], egress["ToPort"]) == ("pl-63a5400a", 443, 443)
    assert not training.find_resources("AWS::EC2::SecurityGroupIngress")


def test_the_role_is_sagemakers_and_reads_and_writes_below_training_alone(training):
    role = only(training, "AWS::IAM::Role")
    assert role["RoleName"] == "shipyard-dev-training"
    [trust] = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert "aws:SourceAccount" in json.dumps(trust["Condition"])
    policy = allowed(role["Policies"][0]["PolicyDocument"])
    assert policy["s3:GetObject",]["Resource"] == "<data>/training/*"
    assert policy["s3:AbortMultipartUpload", "s3:PutObject"]["Resource"] == [
        "<data>/training/checkpoints/*", "<data>/training/jobs/*",
    ]  # fmt: skip
    assert policy["kms:CreateGrant",]["Condition"] == {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    for actions, one in policy.items():
        assert not [action for action in actions if "*" in action]
        # what AWS knows no resource for is bound by a condition, but for the token
        assert one["Resource"] != "*" or "Condition" in one or actions == ("ecr:GetAuthorizationToken",)
    assert not [a for actions in policy for a in actions if a.startswith(("s3:Delete", "iam:", "sts:"))]


def test_a_job_is_started_isolated_encrypted_and_as_its_own_role(training):
    policy = only(training, "AWS::IAM::ManagedPolicy")
    assert policy["ManagedPolicyName"] == "shipyard-dev-train"
    statements = allowed(policy["PolicyDocument"])
    create = statements["sagemaker:CreateTrainingJob",]
    assert create["Condition"] == {
        "Bool": {"sagemaker:NetworkIsolation": "true"}, "ArnEquals": {"sagemaker:VolumeKmsKey": "<key>"},
    }  # fmt: skip
    assert "training-job/shipyard-dev-*" in json.dumps(create["Resource"])
    role = statements["iam:PassRole",]
    assert role["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/shipyard-dev-training"
    assert role["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}


def test_an_environment_with_a_role_of_its_own_gets_none():
    own = f"arn:aws:iam::{ACCOUNT}:role/theirs"
    template = template_of(make_stage(*ALL, training=TRAINING | {"role": own}), "training")
    assert not template.find_resources("AWS::IAM::Role")
    assert own in [value for _, value in walk(template.to_json())]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"place": place(key_of("999999999999"))}, "env.dev.training.place.key: of another account"),
        ({"place": place(key_of(ACCOUNT, "eu-west-1"))}, "env.dev.training.place.key: of another account or region"),
        ({"role": "arn:aws:iam::999999999999:role/theirs"}, "env.dev.training.role: of another account"),
    ],
)
def test_what_lies_elsewhere_is_told_at_synth(more, told):
    with pytest.raises(ShipyardError, match=told):
        check("dev", fleet_of(training=TRAINING | more))
    check("dev", fleet_of(training=TRAINING | {"place": place(key_of(ACCOUNT))}))
