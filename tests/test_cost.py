"""The cost report: our templates have no gaps, its arithmetic has no surprises, and hostile input makes no number."""

import json
import random
import re
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cost.assembly import Stack, read_stacks
from infra.cost.free import reason
from infra.cost.lines import Line
from infra.cost.prices import charge, load_book, parse_book, write_book
from infra.cost.report import PRICED, price
from infra.cost.usage import KEYS, Usage, load_usage
from models.release import ShipyardError

ROOT = Path(__file__).resolve().parents[1]
BOOK = load_book()


def stack(resources, *, name="dev/gpu", region="us-east-1", parameters=None, **sections):
    return Stack(name, "s", "1", region, {"Resources": resources, **sections}, parameters or {})


def three(key, value):
    return ((Decimal(value),) * 24 if key == "requests_per_second" else Decimal(value),) * 3


def usage_of(pattern="*", **values):
    return Usage(((pattern, {key: three(key, value) for key, value in values.items()}),))


def lines(resources, usage=None, **more):
    return price([stack(resources, **more)], BOOK, usage or Usage()).lines


def one(kind, properties, usage=None, **more):
    return lines({"It": {"Type": kind, "Properties": properties}}, usage, **more)


def variant(count=1, size="ml.g5.xlarge", **more):
    return {"VariantName": "a", "InstanceType": size, "InitialInstanceCount": count, **more}


def amounts(found):
    return {line.item: tuple(float(a) for a in line.amount) for line in found if line.amount}


def scaled(scheduled=(), **bounds):
    return {
        "Service": {
            "Type": "AWS::ECS::Service",
            "Properties": {"LaunchType": "FARGATE", "TaskDefinition": {"Ref": "Task"}, "Cluster": {"Ref": "Cluster"}},
        },
        "Task": {"Type": "AWS::ECS::TaskDefinition", "Properties": {"Cpu": "1024", "Memory": "2048"}},
        "Cluster": {"Type": "AWS::ECS::Cluster"},
        "Target": {
            "Type": "AWS::ApplicationAutoScaling::ScalableTarget",
            "Properties": {
                "MinCapacity": 2,
                "MaxCapacity": 8,
                "ScalableDimension": "ecs:service:DesiredCount",
                "ResourceId": {
                    "Fn::Join": ["", ["service/", {"Ref": "Cluster"}, "/", {"Fn::GetAtt": ["Service", "Name"]}]]
                },
                "ScheduledActions": list(scheduled),
                **bounds,
            },
        },
    }


# --- the price book --------------------------------------------------------------------------------------------------


def test_every_price_has_source_date_currency_and_confidence():
    rows = BOOK.flat()
    assert len(rows) > 500
    assert all(row.source and row.date and row.confidence for row in rows)
    assert {row.currency for row in rows if row.region.startswith("cn-")} == {"CNY"}
    assert {row.currency for row in rows if not row.region.startswith("cn-")} == {"USD"}
    derived = [row for row in rows if " x 1." in row.source]
    assert derived
    assert {row.confidence for row in derived} == {"derived"}


def test_a_price_has_the_same_tiers_in_every_region_of_its_currency():
    starts = {}
    for (sku, _), tiers in BOOK.rows.items():
        starts.setdefault((sku, tiers[0].currency), set()).add(tuple(tier.tier_from for tier in tiers))
    assert {key: found for key, found in starts.items() if len(found) > 1} == {}


def test_a_book_is_written_as_it_was_read():
    text = (ROOT / "infra/cost/prices/aws.csv").read_text()
    assert write_book(parse_book(text, "here").flat()) == text


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("a,us-east-1,GB,1,USD,0,much,2026,high,,s", "not a number"),
        ("a,us-east-1,GB,1,USD,0,-1,2026,high,,s", "out of range"),
        ("a,us-east-1,GB,0,USD,0,1,2026,high,,s", "out of range"),
        ("a,us-east-1,GB,1,USD,0,1,2026,sure,,s", "missing or unknown"),
        ("a,us-east-1,GB,1,USD,0,1,2026,high,,", "missing or unknown"),
        ("a,us-east-1,GB,1,USD,5,1,2026,high,,s", "do not fit together"),
        ("a,us-east-1", "2 columns"),
    ],
)
def test_a_row_that_is_wrong_is_refused(row, told):
    head = (ROOT / "infra/cost/prices/aws.csv").read_text().splitlines()[0]
    with pytest.raises(ShipyardError, match=told):
        parse_book(f"{head}\n{row}\n", "here")


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=2))
def test_a_charge_never_falls_with_the_quantity(pair):
    low, high = sorted(map(Decimal, pair))
    for sku in ("lambda.gb_s.x86", "egress.internet", "vpce.interface.data"):
        tiers = BOOK.find(sku, "us-east-1")
        assert len(tiers) > 1
        assert charge(tiers, low) <= charge(tiers, high)


# --- what the report knows -------------------------------------------------------------------------------------------


def test_a_type_is_priced_or_free_and_never_both():
    assert not [kind for kind in PRICED if reason(kind)]


def test_an_unknown_type_is_named_and_never_counted_as_nothing():
    [line] = one("AWS::Quantum::Computer", {})
    assert (line.status, line.amount) == ("unknown", None)
    assert "does not know" in line.note


def test_a_type_without_price_in_the_region_says_where_it_has_one():
    found = one(
        "AWS::SageMaker::EndpointConfig", {"ProductionVariants": [variant(size="ml.g6.xlarge")]}, region="eu-west-1"
    )
    assert found[0].status == "unknown"
    assert found[0].amount is None
    assert "no price for sagemaker.hosting.ml.g6.xlarge in eu-west-1; it has one in us-east-1" in found[0].note


def test_prices_of_china_are_yuan_and_are_not_added_to_dollars():
    instance = {"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": "c5.large"}}}
    report = price([stack(instance), stack(instance, name="cn/gpu", region="cn-north-1")], BOOK, Usage())
    assert report.total() == {"CNY": (Decimal("539.47"),) * 3, "USD": (Decimal("62.05"),) * 3}


def test_a_line_says_what_it_was_made_of():
    found = one(
        "AWS::SageMaker::EndpointConfig", {"ProductionVariants": [variant()]},
        usage_of(requests_per_second=1, request_kb=1, response_kb=1),
    )  # fmt: skip
    assert "ProductionVariants.0.InstanceType = ml.g5.xlarge" in found[0].properties
    assert found[0].prices[0].source and found[0].prices[0].date
    assert "request_kb (all)" in found[1].usage


def test_without_usage_a_line_tells_its_price_and_the_keys_that_it_wants():
    found = one("AWS::EC2::NatGateway", {})
    assert [line.status for line in found] == ["fixed", "usage"]
    assert found[1].amount is None
    assert found[1].missing == ("processed_gb",)
    assert found[1].prices[0].price == Decimal("0.045")


# --- resolving -------------------------------------------------------------------------------------------------------


def size_of(node, **more):
    found = one("AWS::EC2::Instance", {"InstanceType": node}, **more)
    return found[0].item.removeprefix("instances: ").removesuffix(", Linux") if found[0].amount else found[0].note


def test_intrinsic_functions_are_resolved():
    more = {
        "Parameters": {
            "Size": {"Type": "String", "Default": "large"},
            "List": {"Type": "CommaDelimitedList", "Default": "a, c5"},
        },
        "Mappings": {"Sizes": {"us-east-1": {"dev": "c5.xlarge"}}},
        "Conditions": {
            "Dev": {"Fn::Equals": [{"Ref": "AWS::Region"}, "us-east-1"]},
            "Not": {"Fn::Not": [{"Condition": "Dev"}]},
            "Both": {"Fn::And": [{"Condition": "Dev"}, {"Fn::Or": [{"Condition": "Not"}, {"Condition": "Dev"}]}]},
        },
    }
    cases = {
        "c5.large": [
            {"Fn::Join": [".", ["c5", {"Ref": "Size"}]]},
            {"Fn::Sub": "c5.${Size}"},
            {"Fn::Sub": ["${family}.${Size}", {"family": {"Fn::Select": [1, {"Ref": "List"}]}}]},
            {"Fn::If": ["Both", "c5.large", "none"]},
            {"Fn::If": ["Not", "none", {"Fn::If": ["Dev", "c5.large", "none"]}]},
            {"Fn::Select": ["1", {"Fn::Split": ["/", "x/c5.large"]}]},
            {"Fn::FindInMap": ["Sizes", "no", "no", {"DefaultValue": "c5.large"}]},
        ],
        "c5.xlarge": [{"Fn::FindInMap": ["Sizes", {"Ref": "AWS::Region"}, "dev"]}],
    }
    for expected, nodes in cases.items():
        for node in nodes:
            assert size_of(node, **more) == expected
    assert size_of({"Fn::Sub": "c5.${Size}"}, parameters={"Size": "xlarge"}, **more) == "c5.xlarge"


def test_conditions_decide_what_is_made():
    more = {"Conditions": {"No": {"Fn::Equals": ["a", "b"]}}}
    found = lines({"Nat": {"Type": "AWS::EC2::NatGateway", "Condition": "No"}}, **more)
    assert [line.status for line in found] == ["free"]


def test_exports_are_followed():
    exporter = stack(
        {}, name="dev/a", Outputs={"O": {"Value": "c5.large", "Export": {"Name": {"Fn::Sub": "${AWS::StackName}-x"}}}}
    )
    taker = stack({"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": {"Fn::ImportValue": "s-x"}}}})
    assert price([taker, exporter], BOOK, Usage()).total()["USD"][1] == Decimal("62.05")


CHILD = {
    "Parameters": {"Size": {"Type": "String"}},
    "Resources": {"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": {"Ref": "Size"}}}},
    "Outputs": {"Size": {"Value": {"Ref": "Size"}}},
}


def nested(tmp_path, size, **more):
    """A parent with a nested stack that is handed a size, written as the CDK does."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "child.nested.template.json").write_text(json.dumps(CHILD))
    resource = {"Type": "AWS::CloudFormation::Stack", "Properties": {"Parameters": {"Size": size}},
                "Metadata": {"aws:asset:path": "child.nested.template.json"}}  # fmt: skip
    resources, sections = more.pop("resources", {}), more.pop("sections", {})
    parent = {"Resources": {"Nested": {**resource, **more}, **{k: {**resource, **v} for k, v in resources.items()}}}
    (tmp_path / "parent.template.json").write_text(json.dumps({**sections, **parent}))
    return read_stacks(tmp_path / "parent.template.json")


def test_nested_stacks_are_followed_and_belong_to_their_parent(tmp_path):
    report = price(nested(tmp_path, "c5.large"), BOOK, Usage())
    assert report.total()["USD"][1] == Decimal("62.05")
    instance = next(line for line in report.lines if line.resource == "It")
    assert (instance.stack, instance.part, instance.environment) == ("parent:Nested", "parent", "")


def test_nested_stacks_hand_values_on_in_whatever_order_they_come(tmp_path):
    from_later = {"Fn::GetAtt": ["Later", "Outputs.Size"]}
    later = {"Later": {"Properties": {"Parameters": {"Size": "c5.large"}}}}
    report = price(nested(tmp_path, from_later, resources=later), BOOK, Usage())
    assert report.total()["USD"][1] == 2 * Decimal("62.05")
    circle = {"Later": {"Properties": {"Parameters": {"Size": {"Fn::GetAtt": ["Nested", "Outputs.Size"]}}}}}
    found = price(nested(tmp_path, from_later, resources=circle), BOOK, Usage())
    assert found.total() == {}
    assert any("circle" in line.note for line in found.lines)


def test_a_nested_stack_is_not_priced_where_it_is_not_made_or_not_known(tmp_path):
    never = {"Conditions": {"No": {"Fn::Equals": ["a", "b"]}}}
    report = price(nested(tmp_path / "a", "c5.large", sections=never, Condition="No"), BOOK, Usage())
    assert [line.status for line in report.lines] == ["free"]
    doubt = {"Conditions": {"No": {"Fn::Equals": [{"Fn::GetAZs": ""}, "b"]}}}
    report = price(nested(tmp_path / "b", "c5.large", sections=doubt, Condition="No"), BOOK, Usage())
    assert {line.status for line in report.lines} == {"unknown"}
    (tmp_path / "b" / "child.nested.template.json").unlink()
    [line] = price(read_stacks(tmp_path / "b" / "parent.template.json"), BOOK, Usage()).lines
    assert line.status == "unknown"
    [line] = one("AWS::CloudFormation::Stack", {"TemplateURL": "https://example.com/t.json"})
    assert (line.status, line.amount) == ("unknown", None)
    assert "not among those read" in line.note


def test_loops_are_unrolled_as_far_as_they_are_static():
    body = {"Nat${Zone}": {"Type": "AWS::EC2::NatGateway"},
            "Box${Zone}": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": {"Ref": "Zone"}}}}  # fmt: skip
    loop = {"Fn::ForEach::Zones": ["Zone", ["c5.large", "c5.xlarge"], body]}
    found = lines(loop, Transform="AWS::LanguageExtensions")
    assert {line.resource for line in found} == {"Natc5.large", "Natc5.xlarge", "Boxc5.large", "Boxc5.xlarge"}
    assert sum(line.amount[1] for line in found if line.amount) == pytest.approx(Decimal("62.05") * 3 + Decimal("65.7"))
    inner = {
        "Fn::ForEach::In": ["Kind", {"Ref": "Kinds"}, {"Nat${Zone}${Kind}&{Kind}": {"Type": "AWS::EC2::NatGateway"}}]
    }
    twice = {"Fn::ForEach::Out": ["Zone", ["a", "b"], inner]}
    kinds = {"Kinds": {"Type": "CommaDelimitedList", "Default": "x, y-"}}
    found = lines(twice, Transform=["AWS::LanguageExtensions"], Parameters=kinds)
    assert {line.resource for line in found} == {"Natay-y", "Natbxx", "Nataxx", "Natby-y"}


@pytest.mark.parametrize(
    ("loop", "more"),
    [
        (["Zone", {"Fn::GetAZs": ""}, {}], {"Transform": "AWS::LanguageExtensions"}),
        (["Zone", [{}], {}], {"Transform": "AWS::LanguageExtensions"}),
        (["Zone"], {"Transform": "AWS::LanguageExtensions"}),
        ("Zone", {"Transform": ["AWS::LanguageExtensions"]}),
        (["Zone", ["a"], {"Nat${Zone}": {"Type": "AWS::EC2::NatGateway"}}], {}),
    ],
)
def test_a_loop_that_is_not_static_or_not_allowed_is_unknown(loop, more):
    [line] = lines({"Fn::ForEach::Zones": loop}, **more)
    assert (line.status, line.amount) == ("unknown", None)
    assert "is not static" in line.note


def test_a_bomb_of_loops_is_refused():
    body = {"R${A}${B}${C}${D}${E}${F}${G}": {"Type": "AWS::EC2::NatGateway"}}
    for name in "ABCDEFG":
        body = {f"Fn::ForEach::{name}": [name, [str(k) for k in range(10)], body]}
    with pytest.raises(ShipyardError, match="20,000 rounds"):
        lines(body, Transform="AWS::LanguageExtensions")


def test_a_transform_that_rewrites_the_template_is_a_line_under_unknown():
    nat = {"Nat": {"Type": "AWS::EC2::NatGateway"}}
    found = lines(nat, Transform=["AWS::LanguageExtensions", "Company-Macro", {"Name": "AWS::Include"}])
    assert [line.resource for line in found if line.status == "unknown"] == ["AWS::Include", "Company-Macro"]
    [line] = lines({"Fn::Transform": {"Name": "Company-Macro"}})
    assert line.status == "unknown"


def test_a_long_chain_of_imports_ends():
    many = [
        stack(
            {},
            name=f"dev/s{k}",
            Outputs={"O": {"Export": {"Name": f"x{k}"}, "Value": {"Fn::ImportValue": f"x{k + 1}"}}},
        )
        for k in range(400)
    ]
    size = {"InstanceType": {"Fn::ImportValue": "x0"}}
    found = price([*many, stack({"It": {"Type": "AWS::EC2::Instance", "Properties": size}})], BOOK, Usage())
    assert [line.status for line in found.lines] == ["unknown"]


def test_yaml_with_short_forms_is_read(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "AWSTemplateFormatVersion: 2010-09-09\nParameters: {Size: {Type: String, Default: large}}\nResources:\n"
        "  It: {Type: AWS::EC2::Instance, Properties: {InstanceType: !Sub 'c5.${Size}'}}\n"
    )
    assert price(read_stacks(path), BOOK, Usage()).total()["USD"][1] == Decimal("62.05")


# --- hostile input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"Resources": ',
        "[]",
        "null",
        '{"Resources": []}',
        '{"Resources": {"A": NaN}}',
        "a: [b",
        "a: !!python/object:x {}",
        "\0",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"Resources": {"A": {}, "A": {}}}',
        "Resources:\n  A: {}\n  A: {}\n",
    ],
)
def test_what_is_no_template_is_an_error_in_one_line(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ShipyardError) as fault:
        read_stacks(path)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize("artifact", [5, {}, {"type": "cdk:cloud-assembly", "properties": {"directoryName": "."}}])
def test_what_is_no_manifest_is_an_error_in_one_line(tmp_path, artifact):
    (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": {"a": artifact}}))
    with pytest.raises(ShipyardError, match="not a manifest of the CDK"):
        read_stacks(tmp_path)


@pytest.mark.parametrize(
    "node",
    [
        {"Ref": "No"},
        {"Ref": ["a"]},
        {"Fn::Magic": 1},
        {"Fn::Join": "x"},
        {"Fn::Select": [9, ["a"]]},
        {"Fn::If": ["A", 1, 2]},
        {"Fn::FindInMap": ["a", "b"]},
        {"Fn::Sub": ["${", 1]},
        {"Fn::ImportValue": "none"},
        {"Fn::GetAtt": "It.Arn"},
        {"Fn::GetAZs": ""},
        {"Fn::Transform": {"Name": "x"}},
        {"Fn::Sub": "${No.Arn}"},
        {"Fn::Select": [{"Ref": "No"}, []]},
        {"Fn::Select": [-1, ["c5.large"]]},
        {"Fn::Base64": "c5.large"},
        {"Fn::Transform": {"Name": "x"}, "Ref": "No"},
        7,
        True,
        [],
        {},
        {"Ref": "Secret"},
    ],
)
def test_what_cannot_be_resolved_is_unknown_with_its_reason(node):
    more = {"Conditions": {"A": {"Condition": "B"}, "B": {"Condition": "A"}},
            "Parameters": {"Secret": {"Type": "AWS::SSM::Parameter::Value<String>", "Default": "/size"}}}  # fmt: skip
    [line] = one("AWS::EC2::Instance", {"InstanceType": node}, **more)
    assert (line.status, line.amount) == ("unknown", None)
    assert line.note


def test_exports_in_a_circle_are_unknown():
    circle = {"O": {"Value": {"Fn::ImportValue": "x"}, "Export": {"Name": "x"}}}
    [line] = one("AWS::EC2::Instance", {"InstanceType": {"Fn::ImportValue": "x"}}, Outputs=circle)
    assert line.status == "unknown"
    assert "cycle" in line.note


def test_a_yaml_bomb_is_refused(tmp_path):
    path = tmp_path / "t.yaml"
    rows = ["Resources:", "  It: {Type: AWS::EC2::Instance, Properties: {InstanceType: c5.large, T: *z9}}"]
    bomb = ["z0: &z0 [a, a, a, a, a, a, a, a]"] + [
        f"z{k}: &z{k} [{', '.join([f'*z{k - 1}'] * 8)}]" for k in range(1, 10)
    ]
    path.write_text("\n".join(bomb + rows))
    with pytest.raises(ShipyardError, match="expands to more"):
        price(read_stacks(path), BOOK, Usage())


def test_chinese_names_are_names():
    found = lines(
        {"搜索端点": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": {"ProductionVariants": [variant()]}}}
    )
    assert found[0].resource == "搜索端点"
    assert found[0].amount is not None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**12)
    | st.text(max_size=8)
    | st.sampled_from(
        ["c5.large", "Interface", "1", "network", "FARGATE", {"Ref": "R0"}, {"Fn::GetAtt": ["R0", "Ids"]}]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Ref", "Fn::Sub", "Fn::Join", "Fn::If", "Fn::GetAtt", "Name", "Value"]), inner, max_size=2
        )
        | st.dictionaries(st.deferred(lambda: st.sampled_from(NAMES)), inner, max_size=2)
    ),
    max_leaves=8,
)
SOURCES = sorted((ROOT / "infra" / "cost").glob("*.py"))
NAMES = sorted({name for path in SOURCES for name in re.findall(r'"([A-Z][A-Za-z]{2,})"', path.read_text())})
"""Every name that the report's code reads of a template, and a few more."""


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PRICED)), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)),
        max_size=4,
    )
)
def test_no_properties_crash_it_and_each_resource_has_a_line(given_resources):
    resources = {
        f"R{k}": {"Type": kind, "Properties": properties} for k, (kind, properties) in enumerate(given_resources)
    }
    used = usage_of(requests_per_second=1, request_kb=1, response_kb=1)
    found = lines(resources, used)
    assert {line.resource for line in found} == set(resources)
    assert all(a.is_finite() and a >= 0 for line in found for a in line.amount or ())
    assert all(line.amount is None for line in found if line.status == "unknown")


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_no_resource_crashes_it(resources):
    assert {line.resource for line in lines(resources)} == set(resources)


MAYBE = {"Fn::If": ["None", "b", {"Ref": "AWS::NoValue"}]}
"""An item that a condition, which is not known, may leave out."""


@pytest.mark.parametrize(
    ("kind", "properties"),
    [
        ("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Interface"}),
        ("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Interface", "SubnetIds": {"Fn::GetAZs": ""}}),
        ("AWS::Route53Resolver::ResolverEndpoint", {}),
        ("AWS::SageMaker::EndpointConfig", {"ProductionVariants": [{"VariantName": "a"}]}),
        ("AWS::ECS::Service", {"LaunchType": "FARGATE"}),
        ("AWS::EC2::Volume", {"VolumeType": "gp3"}),
        ("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Interface", "SubnetIds": "subnet-1,subnet-2"}),
        ("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Interface", "SubnetIds": ["a", MAYBE]}),
        ("AWS::EC2::Instance", {"InstanceType": "c5.large", "Fn::Transform": {"Name": "AWS::Include"}}),
        *[("AWS::EC2::Volume", {"Size": size}) for size in (-5, "NaN", "1e300", "1_000", "٢٠", True, 1.5, "1.5")],
    ],
)
def test_what_decides_the_price_and_is_missing_makes_no_number(kind, properties):
    found = [line for line in one(kind, properties) if line.status != "usage"]
    assert [line.status for line in found] == ["unknown"]


# --- properties ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.sampled_from(["ml.g5.xlarge", "ml.m5.xlarge", "ml.g4dn.xlarge"]))
def test_doubling_the_instances_doubles_the_line(count, size):
    once, twice = (
        one("AWS::SageMaker::EndpointConfig", {"ProductionVariants": [variant(k * count, size)]})[0] for k in (1, 2)
    )
    assert [2 * a for a in once.amount] == list(twice.amount)


def everything():
    return {
        "Nat": {"Type": "AWS::EC2::NatGateway"},
        "Bucket": {"Type": "AWS::S3::Bucket"},
        "Bucket2": {"Type": "AWS::S3::Bucket"},
        "Api": {"Type": "AWS::ApiGatewayV2::Api", "Properties": {"ProtocolType": "HTTP"}},
        "Function": {"Type": "AWS::Lambda::Function", "Properties": {"MemorySize": 1024}},
        "Config": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": {"ProductionVariants": [variant()]}},
        "Deployment": {"Type": "AWS::GreengrassV2::Deployment", "Properties": {"TargetArn": "g"}},
        "Balancer": {"Type": "AWS::ElasticLoadBalancingV2::LoadBalancer", "Properties": {"Subnets": ["a", "b"]}},
        "Strange": {"Type": "AWS::Quantum::Computer"},
        **scaled(),
    }


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False))
def test_the_order_of_resources_changes_nothing(shuffler):
    used = usage_of(requests_per_second=300, request_kb=9, response_kb=90, storage_gb=60_000, internet_gb=99_999)
    items = list(everything().items())
    shuffler.shuffle(items)
    assert lines(dict(items), used) == lines(everything(), used)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(set(KEYS) - {"sync_minutes", "unit_requests_per_second", "requests_per_second"})),
       st.integers(0, 10**6), st.integers(0, 10**6))  # fmt: skip
def test_cost_never_falls_with_usage(key, first, second):
    low, high = sorted((first, second))
    base = {name: 3 for name in KEYS if name not in ("connections_per_second",)}
    totals = []
    for value in (low, high):
        report = price([stack(everything())], BOOK, usage_of(**{**base, key: value}))
        totals.append(report.total()["USD"][1] + report.total(release=True)["USD"][1])
    assert totals[0] <= totals[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**4), st.integers(0, 10**4))
def test_cost_never_falls_with_load(first, second):
    base = {name: 3 for name in KEYS}
    totals = [price([stack(everything())], BOOK, usage_of(**{**base, "requests_per_second": rate})).total()["USD"][1]
              for rate in sorted((first, second))]  # fmt: skip
    assert totals[0] <= totals[1]


# --- usage files -----------------------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "usage.toml"
    path.write_text(text)
    return path


def test_scenarios_patterns_and_hours_of_the_day(tmp_path):
    day = ", ".join("2" if hour < 12 else "4" for hour in range(24))
    path = write(
        tmp_path,
        f"[month]\nhours = 744\n[all]\nprocessed_gb = {{ low = 1, expected = 10, high = 100 }}\n"
        f'["AWS::ApiGatewayV2::*"]\nrequests_per_second = [{day}]\nrequest_kb = 1\nresponse_kb = 1\n'
        '["dev/gpu/Nat"]\nprocessed_gb = 5\n',
    )
    used = load_usage(path)
    found = {
        (line.resource, line.item): line
        for line in lines(everything() | {"Other": {"Type": "AWS::EC2::NatGateway"}}, used)
    }
    assert found["Api", "requests"].quantity[1] == 3 * 3600 * 744
    assert found["Other", "data through it"].quantity == (1, 10, 100)
    assert found["Nat", "data through it"].quantity == (5, 5, 5)
    assert found["Nat", "NAT gateway"].quantity[1] == 744


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[all]\nprocesed_gb = 1", 'unknown key.*did you mean "processed_gb"'),
        ("[all]\nprocessed_gb = -1", "not a quantity"),
        ("[all]\nprocessed_gb = true", "not a quantity"),
        ('[all]\nprocessed_gb = "1"', "not a quantity"),
        ("[all]\nprocessed_gb = inf", "not a quantity|not a usage file"),
        ("[all]\nprocessed_gb = { low = 1, high = 2 }", "not one value a scenario"),
        ("[all]\nprocessed_gb = { low = 3, expected = 2, high = 1 }", "do not rise"),
        ("[all]\nrequests_per_second = [1, 2]", "2 hours"),
        ("[all]\nsync_minutes = 0", "more than 0"),
        ("[month]\nhour = 1", "unknown key"),
        ("[month]\nhours = 0", "out of range"),
        ("[month]\nhours = nan", "out of range"),
        ("month = 5", "not a table"),
        ("[all]\nprocessed_gb = nan", "not a quantity"),
        ("processed_gb = 1", "not a table"),
        ("[all", "not a usage file"),
    ],
)
def test_a_usage_file_that_is_wrong_is_refused(tmp_path, text, told):
    with pytest.raises(ShipyardError, match=told):
        load_usage(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('["AWS::EC2::NatGatewy"]\nprocessed_gb = 1', 'matches no resource.*did you mean "AWS::EC2::NatGateway"'),
        ('["AWS::EC2::NatGateway"]\ndevices = 1', "no resource that it matches reads this key"),
    ],
)
def test_a_key_that_matches_nothing_is_an_error_with_a_hint(tmp_path, text, told):
    used = load_usage(write(tmp_path, text))
    report = price([stack(everything())], BOOK, used)
    with pytest.raises(ShipyardError, match=told):
        used.check({(line.type, line.resource, line.path, f"{line.stack}/{line.resource}") for line in report.lines})


# --- speed -----------------------------------------------------------------------------------------------------------


def test_five_hundred_resources_take_less_than_two_seconds(tmp_path):
    shuffler = random.Random(7)
    kinds = sorted(PRICED)
    resources = {
        f"R{k}": {"Type": shuffler.choice(kinds), "Properties": everything()["Config"]["Properties"]}
        for k in range(480)
    }
    (tmp_path / "t.json").write_text(json.dumps({"Resources": resources | everything()}))
    start = time.process_time()
    report = price(
        read_stacks(tmp_path / "t.json"), load_book(), usage_of(requests_per_second=5, request_kb=1, response_kb=1)
    )
    assert time.process_time() - start < 2
    assert len({line.resource for line in report.lines}) == 480 + len(everything())


def test_a_line_is_hashable_so_that_reports_can_be_compared():
    assert len({*one("AWS::EC2::NatGateway", {})}) == 2
    assert isinstance(one("AWS::EC2::NatGateway", {})[0], Line)
