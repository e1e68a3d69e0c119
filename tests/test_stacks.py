"""docs/stacks.md and docs/deployment.md are those of the templates; and what no other test asserts."""

import json
import os
import re

import pytest
from aws_cdk.assertions import Template
from conftest import ROOT

from infra.diagram import SHOWN, diagram
from infra.tables import page
from models.config import load_fleet
from models.release import ShipyardError
from shipyard.local.recorded import RECORDED, check_types
from tests.test_operations import ALL, FOLLOWING, LINK, OBSERVE, PIPED, TRAINING, make_stage

PAGE = ROOT / "docs" / "stacks.md"
ORDER = (
    "storage",
    "replica",
    "network",
    "gpu",
    "cpu",
    "gateway",
    "edge",
    "link",
    "observe",
    "delivery",
    "pipeline",
    "training",
)


@pytest.fixture(scope="module")
def templates():
    """The templates of an environment with every option, by stack."""
    options = {
        "observe": OBSERVE,
        "link": LINK,
        "delivery": PIPED,
        "following": FOLLOWING,
        "training": TRAINING,
        "replica": "us-west-2",
    }
    stage = make_stage(*ALL, production=True, **options)
    return {name: Template.from_stack(stage.node.find_child(name)).to_json() for name in ORDER}


def of(templates, stack, kind):
    """Return the properties of the resources of a kind."""
    return [found["Properties"] for found in templates[stack]["Resources"].values() if found["Type"] == kind]


# --- the page ----------------------------------------------------------------------------------------------------------


def test_page_is_that_of_the_templates(templates):
    """Compare the page with the templates; `make docs` writes it anew."""
    text = page(templates)
    if os.environ.get("SHIPYARD_UPDATE_DOCS") == "1":
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "the stacks changed; if they should have: make docs"


def test_every_stack_and_every_allowed_action_is_on_the_page(templates):
    text = page(templates)
    assert re.findall(r"^## (.+)$", text, flags=re.M) == list(ORDER)

    def actions(value):
        if isinstance(value, list):
            return set().union(*map(actions, value))
        if not isinstance(value, dict):
            return set()
        found = set().union(*map(actions, value.values()))
        if value.get("Effect") == "Allow" and "Action" in value:
            found |= {value["Action"]} if isinstance(value["Action"], str) else set(value["Action"])
        return found

    for stack, template in templates.items():
        part = text.partition(f"## {stack}\n")[2].partition("\n## ")[0]
        told = set(re.findall(r"`([a-z0-9-]+:[A-Za-z*]+)`", part))
        assert told == actions(template["Resources"]), stack
        for kind in {resource["Type"] for resource in template["Resources"].values()}:
            assert f"| {kind} | " in part


def test_an_action_without_a_reason_is_an_error():
    statement = {"Effect": "Allow", "Action": "s3:DeleteBucket", "Resource": "*"}
    policy = {"Type": "AWS::IAM::Policy", "Properties": {"PolicyDocument": {"Statement": [statement]}}}
    with pytest.raises(ShipyardError, match="s3:DeleteBucket"):
        page({"storage": {"Resources": {"Policy": policy}}})


def test_diagram_leads_from_the_entry_to_every_place(templates):
    arrows = {tuple(line.split(" --> ")) for line in diagram(templates).splitlines() if "-->" in line}
    arrows = {tuple(re.sub(r"[0-9A-F]{8}$", "", end.strip()) for end in arrow) for arrow in arrows}
    wanted = {
        ("gateway_Api", "gateway_Link"),
        ("gateway_Api", "cpu_LoadBalancer"),
        ("gateway_gatewayService", "gpu_searchEndpoint"),
        ("gateway_gatewayService", "gateway_FeedbackStream"),
        ("gateway_FeedbackStream", "storage_Data"),
        ("gpu_searchEndpoint", "gpu_searchModel"),
        ("gpu_searchModel", "storage_Artifacts"),
        ("cpu_recommendService", "storage_Artifacts"),
        ("edge_edgemodel", "storage_Artifacts"),
        ("storage_Artifacts", "replica_Artifacts"),
    }
    assert wanted <= arrows
    # nothing leads from what is kept to what serves
    assert not {end for start, end in arrows if start.startswith("storage_")} - {
        "storage_AccessLog",
        "replica_Artifacts",
    }


def test_what_is_drawn_is_there(templates):
    drawn = re.findall(r'^    (\w+)\["', diagram(templates), flags=re.M)
    shown = [
        f"{stack}_{name}"
        for stack, template in templates.items()
        for name, resource in template["Resources"].items()
        if resource["Type"] in SHOWN
    ]
    assert drawn == shown


# --- what the local cloud only records, and no other test asserts --------------------------------------------------------


def test_no_type_of_any_option_escapes_the_guard(templates):
    kinds = {r["Type"] for template in templates.values() for r in template["Resources"].values()}
    modelled = frozenset(kinds - RECORDED.keys())
    assert set(check_types(templates.values(), modelled)) == kinds & RECORDED.keys()
    assert kinds >= RECORDED.keys(), "remove from RECORDED what no stack has"


def test_entry_has_no_address_but_its_own(templates):
    [api] = of(templates, "gateway", "AWS::ApiGatewayV2::Api")
    assert api["ProtocolType"] == "HTTP" and "CorsConfiguration" not in api
    [link] = of(templates, "gateway", "AWS::ApiGatewayV2::VpcLink")
    assert len(link["SubnetIds"]) == 2 and all("isolated" in json.dumps(subnet) for subnet in link["SubnetIds"])
    assert len(link["SecurityGroupIds"]) == 1


def test_github_is_the_one_provider_of_identities(templates):
    [provider] = of(templates, "delivery", "AWS::IAM::OIDCProvider")
    assert provider["Url"] == "https://token.actions.githubusercontent.com"
    assert provider["ClientIdList"] == ["sts.amazonaws.com"]


def test_devices_are_counted(templates):
    [metric] = of(templates, "observe", "AWS::IoT::FleetMetric")
    assert metric["QueryString"] == "thingGroupNames:shipyard-dev AND connectivity.connected:false"
    assert (metric["AggregationType"], metric["Period"]) == ({"Name": "Statistics", "Values": ["count"]}, 300)


def test_feedback_that_is_not_delivered_is_logged(templates):
    [stream] = of(templates, "gateway", "AWS::Logs::LogStream")
    [firehose] = of(templates, "gateway", "AWS::KinesisFirehose::DeliveryStream")
    told = firehose["ExtendedS3DestinationConfiguration"]["CloudWatchLoggingOptions"]
    assert told["Enabled"] is True and told["LogGroupName"] == stream["LogGroupName"]


def test_names_of_the_customer_are_asked_in_the_vpc(templates):
    [asked] = of(templates, "link", "AWS::Route53Resolver::ResolverRuleAssociation")
    assert asked["ResolverRuleId"] == {"Fn::GetAtt": ["Names", "ResolverRuleId"]}
    assert "Vpc" in asked["VPCId"]["Fn::ImportValue"]


def test_alarms_alone_publish_and_by_tls(templates):
    [policy] = of(templates, "observe", "AWS::SNS::TopicPolicy")
    denied, allowed = policy["PolicyDocument"]["Statement"]
    assert (denied["Effect"], denied["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert (allowed["Effect"], allowed["Principal"]) == ("Allow", {"Service": "events.amazonaws.com"})


def test_role_alias_is_that_of_the_devices_role(templates):
    [alias] = of(templates, "edge", "AWS::IoT::RoleAlias")
    roles = [name for name, r in templates["edge"]["Resources"].items() if r["Type"] == "AWS::IAM::Role"]
    assert alias["RoleArn"] == {"Fn::GetAtt": [roles[0], "Arn"]} and len(roles) == 1


# --- docs/deployment.md ------------------------------------------------------------------------------------------------

DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def test_what_a_destruction_keeps_is_told(templates):
    kept = {}
    for stack, template in templates.items():
        kinds = {
            resource["Type"]
            for resource in template["Resources"].values()
            if resource.get("DeletionPolicy", "Delete") != "Delete"
        }
        if kinds:
            kept[stack] = ", ".join(sorted(kinds))
    part = DEPLOYMENT.partition("## The end\n")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| (\w+) \| (AWS::[^|]+?) \|", part, flags=re.M))
    assert told == kept


def test_named_resources_of_a_failed_first_deployment_go(templates):
    """Else the next try would meet their names."""
    for stack, template in templates.items():
        for name, resource in template["Resources"].items():
            named = {"BucketName", "LogGroupName"} & resource.get("Properties", {}).keys()
            if named and resource.get("DeletionPolicy", "Delete") != "Delete":
                assert resource["DeletionPolicy"] == "RetainExceptOnCreate", (stack, name)


def test_quotas_are_those_of_production(templates):
    env = load_fleet(ROOT / "fleet.toml").env["prod"]
    release = json.loads((ROOT / "releases" / f"{env.release}.json").read_text(encoding="utf-8"))
    services = sum(artifact["kind"] == "image-context" for artifact in release["artifacts"])
    least = services * env.cpu.tasks * env.cpu.cpu + env.gateway.tasks * env.gateway.cpu
    rows = dict(re.findall(r"^\| ([^|]+?): [^|]+ \| [^|]+ \| ([^|]+?) \|$", DEPLOYMENT, flags=re.M))
    assert rows["SageMaker"] == str(2 * env.gpu.max_instances)
    # everything scales to four times its tasks
    assert env.cpu.max_tasks is None
    assert rows["Fargate"] == f"{2 * least // 1024}, and up to {8 * least // 1024} when everything is scaled out"
    endpoints = of(templates, "network", "AWS::EC2::VPCEndpoint")
    assert rows["VPC"] == str(sum(endpoint["VpcEndpointType"] == "Interface" for endpoint in endpoints))


def test_every_verb_of_the_page_is_there():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"`?make ([a-z-]+)", DEPLOYMENT):
        assert re.search(rf"^{verb}:", text, flags=re.M), verb
    grammar = (ROOT / "packaging" / "shipyard" / "grammar.py").read_text(encoding="utf-8")
    for verb in re.findall(r"shipyard ([a-z]+) ", DEPLOYMENT):
        assert f'"{verb}"' in grammar, verb
