"""A release by CodePipeline: its stages, what its builds run and may, and how it takes back what fails."""

import configparser
import json
import os
import re
import subprocess
import tomllib

import cfnlint.api
import pytest
from conftest import ROOT

from infra.buildspec import deliver, release
from infra.checks import check
from infra.roles import builders
from models.config import Environment, load_fleet
from models.places import PipelineSettings
from models.release import ShipyardError
from tests.test_cost import lines, usage_of
from tests.test_infra import (
    ACCOUNT,
    ENVIRONMENT,
    aslist,
    compare_snapshot,
    fleet_of,
    make_stage,
    statements,
    template_of,
    walk,
)
from tests.test_operations import ALL, DELIVERY, FOLLOWING, PIPED, PIPELINE
from tests.test_workflows import jobs_of, runs

MAKE = re.compile(r"(?:AWS_PROFILE=(\w+) )?make ([a-z]+)([^;&]*)")
ORDER = ("dev", "staging", "prod")


@pytest.fixture(scope="module")
def fleet():
    return fleet_of(delivery=PIPED, following=FOLLOWING)


@pytest.fixture(scope="module")
def stage():
    return make_stage(*ALL, delivery=PIPED, following=FOLLOWING)


@pytest.fixture(scope="module")
def template(stage):
    return template_of(stage, "pipeline")


def of(template, kind):
    return [found["Properties"] for found in template.to_json()["Resources"].values() if found["Type"] == kind]


@pytest.fixture(scope="module")
def projects(template):
    """The builds by the environment on which they work."""
    return {one["Name"].rpartition("-")[2]: one for one in of(template, "AWS::CodeBuild::Project")}


@pytest.fixture(scope="module")
def roles(template):
    return {one["RoleName"]: one for one in of(template, "AWS::IAM::Role")}


def commands(spec):
    document = json.loads(spec)
    return [line for phase in document["phases"].values() for line in phase["commands"]]


# --- the pipeline ------------------------------------------------------------------------------------------------------


def test_a_person_is_asked_between_staging_and_production(template):
    [pipeline] = of(template, "AWS::CodePipeline::Pipeline")
    told = [
        (stage["Name"], [one["ActionTypeId"]["Provider"] for one in stage["Actions"]]) for stage in pipeline["Stages"]
    ]
    assert told == [
        ("Source", ["CodeStarSourceConnection"]), ("Release-dev", ["CodeBuild"]), ("Release-staging", ["CodeBuild"]),
        ("Approve-prod", ["Manual"]), ("Release-prod", ["CodeBuild"]),
    ]  # fmt: skip
    assert (pipeline["PipelineType"], pipeline["ExecutionMode"]) == ("V2", "QUEUED")
    assert pipeline["Variables"] == [{"Name": "profile", "DefaultValue": "full", "Description": "Size of the training"}]
    [source] = pipeline["Stages"][0]["Actions"]
    assert source["Configuration"] == {
        "ConnectionArn": PIPELINE["connection"], "FullRepositoryId": "owner/shop", "BranchName": "main",
        "DetectChanges": "false", "OutputArtifactFormat": "CODEBUILD_CLONE_REF",
    }  # fmt: skip


def test_each_build_takes_what_the_one_before_has_written(template):
    [pipeline] = of(template, "AWS::CodePipeline::Pipeline")
    builds = [
        one for stage in pipeline["Stages"] for one in stage["Actions"] if one["ActionTypeId"]["Category"] == "Build"
    ]
    passed = [
        ([i["Name"] for i in one["InputArtifacts"]], [o["Name"] for o in one["OutputArtifacts"]]) for one in builds
    ]
    assert passed == [
        (["Code"], ["DeliveryDev"]), (["Code", "DeliveryDev"], ["DeliveryStaging"]),
        (["Code", "DeliveryStaging"], ["DeliveryProd"]),
    ]  # fmt: skip
    assert [one["Configuration"].get("PrimarySource") for one in builds] == [None, "Code", "Code"]
    assert [one.get("Namespace") for one in builds] == ["release", None, None]
    told = [
        {one["name"]: one["value"] for one in json.loads(b["Configuration"]["EnvironmentVariables"])} for b in builds
    ]
    by = {"BY": "codepipeline #{codepipeline.PipelineExecutionId}"}
    version = {"RELEASE": "#{release.RELEASE}"}
    assert told == [by | {"PROFILE": "#{variables.profile}"}, by | version, by | version]


def test_builds_are_small_where_little_is_done_and_end(projects):
    assert projects.keys() == set(ORDER)
    for env, project in projects.items():
        machine = project["Environment"]
        assert machine["ComputeType"] == ("BUILD_GENERAL1_LARGE" if env == "dev" else "BUILD_GENERAL1_MEDIUM")
        assert (machine["Type"], machine["PrivilegedMode"]) == ("LINUX_CONTAINER", False)
        assert project["TimeoutInMinutes"] == (300 if env == "dev" else 180)
        assert project["Source"]["Type"] == project["Artifacts"]["Type"] == "CODEPIPELINE"
        assert "Key961B73FD" in json.dumps(project["EncryptionKey"])
        assert project["LogsConfig"]["CloudWatchLogs"]["Status"] == "ENABLED"
        variables = {one["Name"]: one["Value"] for one in machine["EnvironmentVariables"]}
        account = {"dev": ACCOUNT, "staging": "222222222222", "prod": "333333333333"}[env]
        wanted = {"RELEASE_ROLE": f"arn:aws:iam::{account}:role/shipyard-{env}-release",
                  "SIGNING_KEY": f"kms:{PIPELINE['signing_key']}", "AWS_STS_REGIONAL_ENDPOINTS": "regional"}  # fmt: skip
        if env != "dev":
            wanted["DEPLOY_ROLE"] = f"arn:aws:iam::{account}:role/shipyard-{env}-deploy"
        if env == "prod":
            wanted["APPROVING_KEY"] = f"kms:{PIPELINE['approving_key']}"
        assert variables == wanted


def test_logs_are_kept_a_month_and_what_is_handed_on_a_quarter_of_a_year(template):
    groups = of(template, "AWS::Logs::LogGroup")
    assert {group["LogGroupName"] for group in groups} == {f"shipyard-dev-pipeline-{env}" for env in ORDER}
    assert {group["RetentionInDays"] for group in groups} == {30} and all("KmsKeyId" in group for group in groups)
    [bucket] = of(template, "AWS::S3::Bucket")
    [rule] = bucket["LifecycleConfiguration"]["Rules"]
    assert (rule["ExpirationInDays"], rule["NoncurrentVersionExpiration"]) == (90, {"NoncurrentDays": 30})
    [encryption] = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert encryption["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    assert all(bucket["PublicAccessBlockConfiguration"].values())


# --- what it may -------------------------------------------------------------------------------------------------------


def test_a_build_has_the_roles_of_its_environment_alone(roles):
    assert roles.keys() == {"shipyard-dev-pipeline", *(f"shipyard-dev-pipeline-{env}" for env in ORDER)}
    for env, account in zip(ORDER, (ACCOUNT, "222222222222", "333333333333"), strict=True):
        role = roles[f"shipyard-dev-pipeline-{env}"]
        allowed = statements(role)
        names = ("release",) if env == "dev" else ("deploy", "release")
        assert allowed["sts:AssumeRole"][0] == [f"arn:aws:iam::{account}:role/shipyard-{env}-{name}" for name in names]
        assert allowed["codeconnections:UseConnection"][0] == [PIPELINE["connection"]]
        assert allowed.keys() == {
            "sts:AssumeRole", "codeconnections:UseConnection", "logs:CreateLogStream logs:PutLogEvents",
            "s3:GetObject s3:GetObjectVersion s3:PutObject", "s3:GetBucketLocation s3:GetBucketVersioning",
            "kms:Decrypt kms:GenerateDataKey",
        }  # fmt: skip
        assert allowed["kms:Decrypt kms:GenerateDataKey"] == (
            ["<key>"], {"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}},
        )  # fmt: skip
        [trust] = role["AssumeRolePolicyDocument"]["Statement"]
        assert trust["Principal"] == {"Service": "codebuild.amazonaws.com"}
        assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": ACCOUNT}}


def test_the_pipeline_starts_its_own_builds_alone(template, roles):
    allowed = statements(roles["shipyard-dev-pipeline"])
    started = allowed["codebuild:BatchGetBuilds codebuild:StartBuild"][0]
    assert len(started) == 3
    found = template.to_json()["Resources"]
    assert {found[one["Fn::GetAtt"][0]]["Type"] for one in started} == {"AWS::CodeBuild::Project"}
    assert "sts:AssumeRole" not in allowed


def test_no_policy_of_it_names_every_resource(template):
    for path, value in walk(template.to_json()["Resources"]):
        if isinstance(value, dict) and value.get("Effect") == "Allow" and "Resource" in value:
            assert "*" not in aslist(value["Resource"]), path
    assert "ManagedPolicyArns" not in json.dumps(template.to_json())


def test_roles_of_other_accounts_let_this_build_take_them_and_no_other(fleet):
    env = fleet.env["staging"]
    stage = make_stage(
        *ALL, account=env.account, delivery=FOLLOWING["staging"]["delivery"] | {"promote_from": "first"},
        following={"first": {"account": ACCOUNT, "delivery": PIPED}},
    )  # fmt: skip
    arn = f"arn:aws:iam::{ACCOUNT}:role/shipyard-first-pipeline-dev"
    found = {one["RoleName"]: one for one in of(template_of(stage, "delivery"), "AWS::IAM::Role")}
    for name in ("release", "deploy", "plan"):
        _, *more = found[f"shipyard-dev-{name}"]["AssumeRolePolicyDocument"]["Statement"]
        wanted = [{
            "Action": "sts:AssumeRole", "Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:root"},
            "Condition": {"ArnEquals": {"aws:PrincipalArn": arn}},
        }]  # fmt: skip
        assert json.loads(json.dumps(more).replace('{"Ref": "AWS::Partition"}', "aws")) == (
            wanted if name != "plan" else []
        )
    assert builders(fleet, "staging") == [f"arn:aws:iam::{ACCOUNT}:role/shipyard-dev-pipeline-staging"]


def test_a_release_role_signs_with_the_keys_that_it_needs_and_no_other(stage, fleet):
    """An approving key only where a release is approved; the keys' own policies are of another account's making."""
    made = {"dev": stage}
    for name in ("staging", "prod"):
        env = fleet.env[name]
        before = {"first": {"account": ACCOUNT, "delivery": PIPED}}
        if name == "prod":
            before["staging"] = {"account": "222222222222", "delivery": DELIVERY | {"promote_from": "first"}}
        made[name] = make_stage(
            *ALL, account=env.account, production=env.production, following=before,
            delivery=DELIVERY | {"promote_from": list(before)[-1]},
        )  # fmt: skip
    for name, one in made.items():
        found = {role["RoleName"]: role for role in of(template_of(one, "delivery"), "AWS::IAM::Role")}
        wanted = [PIPELINE["signing_key"], *([PIPELINE["approving_key"]] if name == "prod" else [])]
        assert statements(found["shipyard-dev-release"])["kms:GetPublicKey kms:Sign"] == (wanted, None), name
        assert "kms:Sign" not in json.dumps(found["shipyard-dev-deploy"])


# --- what its builds run -----------------------------------------------------------------------------------------------


def test_builds_run_the_verbs_of_the_workflow(projects):
    """In the same order, with the same rights and the same arguments."""
    jobs = {"dev": "release", "staging": "staging", "prod": "prod"}
    for env, project in projects.items():
        found = [MAKE.findall(line) for line in commands(project["Source"]["BuildSpec"])]
        made = [one for line in found for one in line]
        # prod approves here where it wants it, as in the workflow
        assert [verb for _, verb, _ in made] == runs(jobs_of("release")[jobs[env]]), env
        wanted = [
            re.findall(r"(\w+)=", step["run"]) for step in jobs_of("release")[jobs[env]]["steps"] if "run" in step
        ]
        assert [re.findall(r"(\w+)=", rest) for _, _, rest in made] == wanted, env
        rights = {verb: role for role, verb, _ in made}
        as_release = {"release", "upload", "approve", "promote", "rollback"}
        assert {v for v, role in rights.items() if role == "release"} == as_release & rights.keys()
        assert {v for v, role in rights.items() if role == "deploy"} == {"rollout", "status"} & rights.keys()


@pytest.fixture
def run(tmp_path):
    """Run commands of a build as CodeBuild does, in one shell, with a make that writes down what it is asked."""
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/bash\necho "$AWS_PROFILE $*" >> "$LOG"\n'
        '[ "$1" = publish ] && echo release=0.1.0-gabc >> "$GITHUB_OUTPUT"\n[ "$1" != "$FAILS" ]\n'
    )
    fake.chmod(0o755)
    work, before = tmp_path / "work", tmp_path / "before"
    (before / "releases").mkdir(parents=True)
    (before / "fleet.toml").write_text("of before")
    work.mkdir()

    def run(spec, fails="", **more):
        phases = json.loads(spec)["phases"]
        environment = {
            "PATH": f"{fake.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(tmp_path / "log"),
            "FAILS": fails, "RELEASE_ROLE": "arn:release", "DEPLOY_ROLE": "arn:deploy",
            "CODEBUILD_SRC_DIR_DeliveryDev": str(before), **more,
        }  # fmt: skip
        # CodeBuild ends a phase at its first failure and goes on with post_build
        lines = [*phases["install"]["commands"], *phases["build"]["commands"]]
        body = "\n".join(f"{{ {line}\n}} || failed=1" if i == 0 else f"[ -n \"$failed\" ] || {{ {line}\n}} || failed=1"
                         for i, line in enumerate(lines))  # fmt: skip
        after = "\n".join(phases.get("post_build", {"commands": []})["commands"])
        script = (
            f'{body}\nexport CODEBUILD_BUILD_SUCCEEDING=$(( ! ${{failed:-0}} ))\n{after}\necho "RELEASE=$RELEASE"\n'
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True, check=True
        )
        log = (tmp_path / "log").read_text().splitlines()
        (tmp_path / "log").unlink()
        return [" ".join(line.split()[:2]) for line in log], done.stdout

    run.home, run.work = tmp_path, work
    return run


def test_the_first_build_tells_which_release_it_made(run):
    done, told = run(release("dev"), PROFILE="full")
    assert done == ["setup", "bundle PROFILE=full", "release release", "publish", "release upload"]
    assert told.splitlines()[-1] == "RELEASE=0.1.0-gabc"


def test_a_build_takes_each_role_as_long_as_it_runs(run):
    run(release("dev"))
    profiles = configparser.ConfigParser()
    profiles.read(run.home / ".aws" / "config")
    assert {name: dict(profiles[name]) for name in profiles.sections()} == {
        f"profile {role}": {"role_arn": f"arn:{role}", "credential_source": "EcsContainer"}
        for role in ("release", "deploy")
    }


WAY = ["setup", "release promote", "deploy rollout", "deploy status"]
BACK = ["release rollback", "deploy rollout"]


@pytest.mark.parametrize(("fails", "wanted"), [
    ("", WAY), ("setup", WAY[:1]), ("promote", WAY[:2]), ("rollout", [*WAY[:3], *BACK]), ("status", [*WAY, *BACK]),
])  # fmt: skip
def test_what_was_promoted_and_failed_is_taken_back(run, fails, wanted):
    done, _ = run(deliver("staging", "dev", approve=False), fails, RELEASE="0.1.0-gabc")
    assert done == wanted
    if fails != "setup":
        assert (run.work / "fleet.toml").read_text() == "of before"


def test_production_is_approved_before_it_is_promoted(run):
    done, _ = run(deliver("prod", "staging", approve=True), RELEASE="0.1.0-gabc")
    assert done == ["setup", "release approve", *WAY[1:]]


# --- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env", "changes", "told"), [
    ("staging", {}, "env.staging.delivery.pipeline: no release begins its way here"),
    ("dev", {"connection": PIPELINE["connection"].replace("us-east-1", "eu-west-1")}, "of another account or region"),
    ("dev", {"profile": "huge"}, "delivery.pipeline.profile: no such profile; value: 'huge'"),
])  # fmt: skip
def test_a_pipeline_that_cannot_be_is_refused(fleet, env, changes, told):
    delivery = FOLLOWING.get(env, {"delivery": PIPED})["delivery"] | {"pipeline": PIPELINE | changes}
    made = Environment(**{**ENVIRONMENT, "account": fleet.env[env].account, "delivery": delivery})
    with pytest.raises(ShipyardError) as fault:
        check(env, fleet.model_copy(update={"env": fleet.env | {env: made}}))
    assert told in str(fault.value)


def test_where_two_follow_one_there_is_no_way(fleet):
    two = fleet.env | {"other": fleet.env["staging"]}
    assert fleet.way("dev") == list(ORDER)
    assert fleet.model_copy(update={"env": two}).way("dev") == ["dev"]
    with pytest.raises(ShipyardError, match="no release begins its way here"):
        check("dev", fleet.model_copy(update={"env": two}))


def test_what_it_costs_is_known(template):
    """Of three builds of 100 minutes, that of a release on the larger machine; prices by hand from the book."""
    usage = usage_of(build_minutes=100, action_minutes=300, log_gb=0, storage_gb=0, put_requests=0, get_requests=0)
    found = lines(template.to_json()["Resources"], usage)
    assert [line.item for line in found if line.status == "unknown"] == []
    amounts = sorted(float(line.amount[1]) for line in found if "minutes" in line.item)
    assert amounts == pytest.approx([300 * 0.002, 100 * 0.01, 100 * 0.01, 100 * 0.02])


def test_cfn_lint_finds_nothing(template):
    found = cfnlint.api.lint(json.dumps(template.to_json()), regions=["us-east-1"])
    assert [str(match) for match in found] == []


def test_snapshot(template):
    """SHIPYARD_UPDATE_SNAPSHOTS=1 writes it anew."""
    compare_snapshot("pipeline", template.to_json())


def test_without_it_there_is_no_stack():
    stage = make_stage(*ALL, delivery={"repository": "owner/shop"})
    assert stage.node.try_find_child("pipeline") is None


def test_the_page_tells_every_key_and_shows_a_table_that_holds():
    [row] = [
        line for line in (ROOT / "docs" / "environments.md").read_text().splitlines() if "| `delivery.pipeline`" in line
    ]
    assert [key for key in PipelineSettings.model_fields if f"`{key}`" not in row] == []
    page = (ROOT / "docs" / "training.md").read_text().partition("## The same by CodePipeline")[2]
    shown = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])["env"]["dev"]["delivery"]
    fleet = load_fleet(ROOT / "fleet.toml")
    delivery = fleet.env["dev"].delivery.model_copy(update={"pipeline": PipelineSettings(**shown["pipeline"])})
    env = fleet.env["dev"].model_copy(update={"delivery": delivery})
    check("dev", fleet.model_copy(update={"env": fleet.env | {"dev": env}}))
