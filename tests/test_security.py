"""docs/security.md: its tables are those of the templates, each of its claims has a test, and no role reaches more."""

import copy
import re

import pytest
from aws_cdk.assertions import Template
from conftest import ROOT, check_tables

from infra.reach import READS, WRITES, role_table, roles, way_table, ways
from infra.tables import listed
from tests.test_infra import ACCOUNT, edge, gateway, make_stage, plain, recommend, search
from tests.test_operations import FOLLOWING, LINK, OBSERVE, PIPED, TRAINING
from tests.test_policies import JOB
from tests.test_stacks import ORDER

PAGE = ROOT / "docs" / "security.md"
CLAIM = re.compile(r"^\|.*\| (`tests/.*`) \|$", re.MULTILINE)
HEAD = re.compile(r"^\| ([^|]+?) \|.*\| test \|$", re.MULTILINE)

CODE = ("ecs-tasks.amazonaws.com", "sagemaker.amazonaws.com", "credentials.iot.amazonaws.com")
"""Who takes the roles in which code runs that answers requests."""


@pytest.fixture(scope="module")
def templates():
    """The templates of an environment with every option, by stack."""
    scored = recommend()
    scored["template"]["score"] = ["-m", "serve.score"]
    stage = make_stage(
        *(search(), scored, edge("runtime"), edge("model"), gateway()),
        observe=OBSERVE,
        link=LINK,
        delivery=PIPED,
        following=FOLLOWING,
        training=TRAINING,
        replica="us-west-2",
        production=True,
        gpu={"capture_percent": 5},
        cpu={
            "anywhere": True,
            "score_at": "cron(0 3 * * ? *)",
            "job": {"update": JOB | {"reads": ("feedback/",), "writes": ("updates/",)}},
        },
        gateway={"waf": True},
    )
    there = [name for name in ORDER if stage.node.try_find_child(name)]
    return {name: Template.from_stack(stage.node.find_child(name)).to_json() for name in there}


@pytest.fixture(scope="module")
def made(templates):
    """The roles of all stacks, by stack and name."""
    return {f"{role.stack}: {role.name}": role for role in roles(templates)}


# --- the page ----------------------------------------------------------------------------------------------------------


def test_tables_of_the_page_are_those_of_the_templates(templates):
    """Compare the tables; `make docs` writes them anew."""
    tables = {"roles": role_table(templates), "ways": way_table(templates)}
    check_tables(PAGE, tables)


def test_every_claim_of_the_page_has_its_test():
    text = PAGE.read_text(encoding="utf-8")
    named = [test for line in CLAIM.findall(text) for test in re.findall(r"`(tests/\w+\.py)::(\w+)`", line)]
    assert len(set(named)) >= 40
    assert [test for file, test in set(named) if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")] == []


def test_no_row_of_a_table_of_claims_is_without_a_test():
    text = PAGE.read_text(encoding="utf-8")
    tables = [table for table in text.split("\n\n") if HEAD.match(table.partition("\n")[0])]
    assert len(tables) >= 4
    for table in tables:
        rows = table.strip().splitlines()[2:]
        assert rows and [row for row in rows if not CLAIM.fullmatch(row)] == []


def test_data_is_kept_as_long_as_the_page_says(templates):
    def rules(name):
        [bucket] = [
            resource["Properties"]
            for logical, resource in templates["storage"]["Resources"].items()
            if resource["Type"] == "AWS::S3::Bucket" and logical.startswith(name)
        ]
        return bucket["LifecycleConfiguration"]["Rules"]

    for name in ("Artifacts", "Data"):
        assert {"NoncurrentVersionExpiration": {"NoncurrentDays": 90}, "Status": "Enabled"} in rules(name)
        assert [rule for rule in rules(name) if "ExpirationInDays" in rule and rule.get("Prefix") != "capture/"] == []
    assert {"ExpirationInDays": 30, "Prefix": "capture/", "Status": "Enabled"} in rules("Data")
    assert rules("AccessLog") == [{"ExpirationInDays": 365, "Status": "Enabled"}]
    days = {
        f"{stack}: {name}": resource["Properties"]["RetentionInDays"]
        for stack, template in templates.items()
        for name, resource in template["Resources"].items()
        if resource["Type"] == "AWS::Logs::LogGroup"
    }
    assert {name for name, kept in days.items() if kept != 30} == {name for name in days if "AccessLog" in name}
    assert {kept for name, kept in days.items() if "AccessLog" in name} == {90}


def test_eventbridge_alone_uses_the_key_of_the_alarms(templates):
    [key] = [r["Properties"] for r in templates["observe"]["Resources"].values() if r["Type"] == "AWS::KMS::Key"]
    assert {s["Principal"].get("Service", "the account") for s in key["KeyPolicy"]["Statement"]} == {
        "the account",
        "events.amazonaws.com",
    }
    assert key["EnableKeyRotation"] is True


# --- what one role reaches ---------------------------------------------------------------------------------------------


def faults(made):
    """Return what no role of ours may do, as (role, action)."""
    found = []
    for name, role in made.items():
        for statement in role.statements:
            condition = str(statement.get("Condition", ""))
            for action in listed(statement["Action"]):
                service, _, verb = action.partition(":")
                lasting = verb.startswith(("Delete", "Schedule", "Disable")) and service in ("s3", "kms", "logs")
                changes = verb.startswith(("Put", "Create", "Attach", "Update", "Detach"))
                own = (
                    action == "s3:PutObject"
                    # of its own disk, by way of the service
                    or (action == "kms:CreateGrant" and "kms:GrantIsForAWSResource" in condition)
                    # one policy, which forbids
                    or (action in ("iam:AttachRolePolicy", "iam:DetachRolePolicy") and "iam:PolicyARN" in condition)
                )
                governs = changes and service in ("s3", "kms", "iam") and not own
                passes = action == "iam:PassRole" and "*" in str(statement["Resource"])
                if lasting or governs or passes or "*" in action:
                    found.append((name, action))
    return found


def test_no_role_deletes_or_gives_itself_more(made):
    assert len(made) >= 20
    assert faults(made) == []


@pytest.mark.parametrize("action", ("s3:DeleteObject", "s3:PutBucketPolicy", "kms:ScheduleKeyDeletion", "iam:*"))
def test_a_role_that_could_is_found(templates, action):
    seeded = copy.deepcopy(templates)
    role = next(
        r
        for r in seeded["cpu"]["Resources"].values()
        if r["Type"] == "AWS::IAM::Role" and r["Properties"].get("Policies")
    )
    role["Properties"]["Policies"][0]["PolicyDocument"]["Statement"].append(
        {"Effect": "Allow", "Action": action, "Resource": "arn:aws:s3:::any"}
    )
    [(name, found)] = faults({f"{role.stack}: {role.name}": role for role in roles(seeded)})
    assert (name.startswith("cpu: "), found) == (True, action)


def test_release_alone_writes_artifacts(made):
    writes = {name: role.resources(WRITES) for name, role in made.items() if role.resources(WRITES)}
    assert writes == {
        # the other is the register of promotions: neither a service nor a device reads it
        "delivery: Release": ["storage.Artifacts/artifacts/\\*", "storage.Artifacts/delivery/\\*"],
        # a device holds what it makes of a delta to the digest of the model
        "delivery: Deploy": ["storage.Artifacts/delivery/\\*", "storage.Artifacts/deltas/\\*"],
        "storage: ArtifactsReplicationRole": [
            f"arn:aws:s3:::shipyard-dev-artifacts-{ACCOUNT}-us-west-2/artifacts/\\*",
        ],
        # of the pipeline's own bucket: what its builds hand on
        **{f"pipeline: {name}": ["Store/\\*"] for name in ("Role", "DevRole", "StagingRole", "ProdRole")},
        "gpu: searchRole": ["storage.Data/capture/search/\\*"],
        "cpu: recommendscoreRole": ["storage.Data/scoring/out/recommend/\\*"],
        "cpu: jobupdateRole": ["storage.Data/updates/\\*"],
        "training: Role": ["storage.Data/training/checkpoints/\\*", "storage.Data/training/jobs/\\*"],
        "gateway: FeedbackRole": ["storage.Data/feedback-failed/\\*", "storage.Data/feedback/\\*"],
    }


def test_nobody_writes_over_an_artifact(templates):
    denied = [
        statement
        for resource in templates["storage"]["Resources"].values()
        if resource["Type"] == "AWS::S3::BucketPolicy"
        for statement in resource["Properties"]["PolicyDocument"]["Statement"]
        if statement["Action"] == "s3:PutObject" and statement["Effect"] == "Deny"
    ]
    [statement] = denied
    assert statement["Principal"] == {"AWS": "*"}
    assert statement["Resource"]["Fn::Join"][1][1] == "/artifacts/*"
    assert statement["Resource"]["Fn::Join"][1][0]["Fn::GetAtt"][0].startswith("Artifacts")
    # without the header, and where an object comes into being
    assert statement["Condition"] == {
        "Null": {"s3:if-none-match": "true"},
        "Bool": {"s3:ObjectCreationOperation": "true"},
    }


def test_who_answers_reads_its_own_artifact_alone(made):
    for name, role in made.items():
        if role.taken_by in CODE:
            own = re.sub(r"(anywhere|score)?(Execution)?Role$", "", role.name)
            for resource in role.resources(READS):
                if resource.startswith("storage.Artifacts"):
                    wanted = ("edge-model", "edge-runtime") if role.stack == "edge" else (own,)
                    assert resource.split("/")[2] in wanted, (name, resource)


def test_who_reads_what_shoppers_did(made):
    reads = {name: [r for r in role.resources(READS) if r.startswith("storage.Data")] for name, role in made.items()}
    assert {name: found for name, found in reads.items() if found} == {
        "cpu: recommendscoreRole": ["storage.Data/scoring/in/\\*"],
        "cpu: jobupdateRole": ["storage.Data/feedback/\\*"],
        "training: Role": ["storage.Data/training/\\*"],
    }


def test_the_gateway_alone_asks_the_endpoint_and_feeds_the_stream(made):
    may = {
        action: {name for name, role in made.items() if action in role.besides}
        for action in ("sagemaker:InvokeEndpoint", "firehose:PutRecord", "firehose:PutRecordBatch")
    }
    assert all(names == {"gateway: gatewayRole"} for names in may.values())


def test_what_runs_code_takes_no_other_role(made):
    running = {name: role for name, role in made.items() if role.taken_by in CODE}
    assert {"gateway: gatewayRole", "gpu: searchRole", "edge: TokenExchangeRole"} <= running.keys()
    for name, role in running.items():
        assert not {action for action, _ in role.allowed if action.startswith(("iam:", "sts:"))}, name


def test_pipelines_alone_go_on_to_other_roles(made):
    goes_on = {
        name: sorted({action for action, _ in role.allowed if action.startswith(("iam:", "sts:"))})
        for name, role in made.items()
    }
    starts = ("cpu: AWSCDKSchedulerTarget", "cpu: SchedulerRole")
    assert {name: found for name, found in goes_on.items() if found and not name.startswith(starts)} == {
        "delivery: Plan": ["sts:AssumeRole"],
        "delivery: Deploy": ["sts:AssumeRole"],
        "observe: BudgetActor": ["iam:AttachRolePolicy", "iam:DetachRolePolicy"],
        # those of one environment each: tests/test_codepipeline.py
        **{f"pipeline: {name}": ["sts:AssumeRole"] for name in ("DevRole", "StagingRole", "ProdRole")},
    }
    # a schedule passes on the roles of its own task
    passed = [resource for role in made.values() for action, resource in role.allowed if action == "iam:PassRole"]
    assert passed and all("Role" in resource and "*" not in resource for resource in passed)
    plan = {resource for action, resource in made["delivery: Plan"].allowed if action == "sts:AssumeRole"}
    assert plan == {f"arn:aws:iam::{ACCOUNT}:role/cdk-hnb659fds-lookup-role-{ACCOUNT}-us-east-1"}


def test_roles_decrypt_by_way_of_s3_alone(made):
    found = 0
    for name, role in made.items():
        for statement in role.statements:
            if "kms:Decrypt" in str(statement["Action"]):
                found += 1
                assert statement["Condition"]["StringEquals"]["kms:ViaService"].startswith("s3."), name
    assert found >= 8


def test_services_come_from_this_account_alone(made):
    for name, role in made.items():
        trust, *more = role.trust
        assert not more or name in ("delivery: Release", "delivery: Deploy")
        # the build of a pipeline, by its name
        assert all("aws:PrincipalArn" in str(plain(one["Condition"])) for one in more)
        if role.taken_by.endswith("amazonaws.com") and role.taken_by != "credentials.iot.amazonaws.com":
            assert trust["Condition"]["StringEquals"]["aws:SourceAccount"] == ACCOUNT, name
        elif role.stack == "delivery":
            assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
            assert plain(trust["Condition"])["StringEquals"].keys() >= {
                "token.actions.githubusercontent.com:aud",
                "token.actions.githubusercontent.com:sub",
            }
        else:
            assert name == "edge: TokenExchangeRole"


# --- what one place of the network reaches -----------------------------------------------------------------------------


def test_nothing_calls_the_endpoints_instances_and_they_reach_s3_alone(templates):
    found = ways(templates)
    assert [way for way in found if way[1].startswith("gpu: ")] == []
    assert {end for start, end in found if start.startswith("gpu: ")} == {"S3"}


def test_a_task_reaches_aws_and_no_other_task(templates):
    found = ways(templates)
    balancer, aws = "cpu: LoadBalancerSecurityGroup", {"S3", "network: Endpoints"}
    assert {end for start, end in found if start == "cpu: recommendSecurityGroup"} == aws
    assert {end for start, end in found if start == "gateway: gatewaySecurityGroup"} == aws | {balancer}
    assert found["gateway: gatewaySecurityGroup", balancer] == {"80"}
    for task in ("cpu: recommendSecurityGroup", "gateway: gatewaySecurityGroup"):
        assert {start for start, end in found if end == task} == {balancer}


def test_entry_and_clients_reach_the_load_balancer_alone(templates):
    found, balancer = ways(templates), "cpu: LoadBalancerSecurityGroup"
    for place in ("gateway: LinkGroup", "network: Clients"):
        assert {end for start, end in found if start == place} == {balancer}
    assert found["gateway: LinkGroup", balancer] == {"8080"}
    callers = {start for start, end in found if end == balancer}
    assert callers == {"gateway: LinkGroup", "network: Clients", "gateway: gatewaySecurityGroup", "192.168.0.0/16"}


def test_a_connection_wants_both_ends(templates):
    seeded = copy.deepcopy(templates)
    for resources in (template["Resources"] for template in seeded.values()):
        for name, resource in list(resources.items()):
            into = resource["Type"] == "AWS::EC2::SecurityGroupIngress"
            if into and resource["Properties"]["FromPort"] == 80:
                del resources[name]
    before, after = ways(templates), ways(seeded)
    assert before["network: Clients", "cpu: LoadBalancerSecurityGroup"] == {"80", "8080"}
    assert after["network: Clients", "cpu: LoadBalancerSecurityGroup"] == {"8080"}


def test_no_other_bucket_is_reached_from_the_vpc(templates):
    [gateway] = [
        resource["Properties"]
        for resource in templates["network"]["Resources"].values()
        if resource["Type"] == "AWS::EC2::VPCEndpoint" and resource["Properties"]["VpcEndpointType"] == "Gateway"
    ]
    buckets = set()
    for statement in plain(gateway["PolicyDocument"]["Statement"]):
        resources = statement["Resource"]
        buckets |= {r.split("/")[0] for r in (resources if isinstance(resources, list) else [resources])}
    assert buckets == {"<bucket>", "<data>", "arn:aws:s3:::prod-us-east-1-starport-layer-bucket"}
