"""A change of templates as it is told to who reviews it."""

import json

import aws_cdk as cdk
import pytest
from conftest import ROOT

from serve.errors import ShipyardError
from shipyard.change import LONGEST, Stack, markdown, shortened, stacks
from shipyard.cli import main

CLI = ROOT / "node_modules" / ".bin" / "cdk"
RECIPE = {"ComponentVersion": "1.0.1", "Manifests": [{"Name": "linux"}] * 20}


def assembly(folder, envs, *, recipe, release="0.1.0-g1", size=None, more=False):
    """Synthesize an app of stages as ours: a stack `edge` each, and `gone` where there is `more`."""
    app = cdk.App(outdir=str(folder), analytics_reporting=False, context={"aws:cdk:disable-asset-staging": True})
    for env, account in envs.items():
        stage = cdk.Stage(app, env, env=cdk.Environment(account=account, region="us-east-1"))
        stack = cdk.Stack(stage, "edge")
        cdk.CfnResource(
            stack, "Component", type="AWS::GreengrassV2::ComponentVersion",
            properties={"InlineRecipe": json.dumps(recipe | {"Uri": f"s3://shipyard-{env}-artifacts-{account}/a"})},
        )  # fmt: skip
        cdk.CfnResource(
            stack, "Topic", type="AWS::SNS::Topic",
            properties={"DisplayName": f"{env} {size or 1}"},
        )  # fmt: skip
        cdk.CfnOutput(stack, "Release", value=release)
        if more:
            cdk.CfnResource(cdk.Stack(stage, "gone"), "Topic", type="AWS::SNS::Topic")
    app.synth()
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    envs = {"dev": "111111111111", "prod": "333333333333"}
    return assembly(tmp_path_factory.mktemp("before"), envs, recipe=RECIPE, more=True)


def test_what_is_alike_is_told_once_and_what_is_replaced_is_counted(before, tmp_path):
    envs = {"dev": "111111111111", "prod": "333333333333"}
    now = assembly(tmp_path / "now", envs, recipe=RECIPE | {"ComponentVersion": "1.0.2"}, size=2, release="0.1.0-g2")
    found = stacks(before, now, CLI)
    assert [(stack.env, stack.name, stack.counts) for stack in found] == [
        ("dev", "edge", "1 replaced, 1 updated"), ("dev", "gone", "gone, 1 resources"),
        ("prod", "edge", "1 replaced, 1 updated"), ("prod", "gone", "gone, 1 resources"),
    ]  # fmt: skip
    text = markdown(found, tmp_path)
    assert "| dev | 0.1.0-g1 | 0.1.0-g2 |\n| prod | 0.1.0-g1 | 0.1.0-g2 |" in text
    assert (
        "| edge | 1 replaced, 1 updated | 1 replaced, 1 updated |\n| gone | gone, 1 resources | gone, 1 resources |"
        in text
    )
    assert text.count("<summary>edge") == 1 and "<summary>edge: dev, prod;" in text
    assert '[-] "ComponentVersion": "1.0.1",' in text and '[+] "ComponentVersion": "1.0.2",' in text
    assert "linux" not in text, "what did not change is not told"


def test_what_one_environment_has_alone_is_told_of_it_alone(before, tmp_path):
    envs = {"dev": "111111111111", "prod": "333333333333"}
    now = assembly(tmp_path / "now", envs, recipe=RECIPE, more=True)
    [path] = (now / "assembly-prod").glob("prodedge*.template.json")
    document = json.loads(path.read_text())
    document["Resources"]["Topic"]["Properties"]["DisplayName"] = "another"
    path.write_text(json.dumps(document))
    [found] = stacks(before, now, CLI)
    assert (found.env, found.name, found.counts) == ("prod", "edge", "1 updated")
    assert "| stack | prod |" in markdown([found], tmp_path)


def test_nothing_changed_and_nothing_there(before, tmp_path):
    assert stacks(before, before, CLI) == []
    assert "No template changes." in markdown([], tmp_path)
    with pytest.raises(ShipyardError, match=r"no templates are there.*make synth"):
        stacks(before, tmp_path, CLI)


def test_a_new_stack_is_told_with_its_size(before, tmp_path):
    now = assembly(tmp_path / "now", {"dev": "111111111111", "new": "222222222222"}, recipe=RECIPE)
    counts = {(stack.env, stack.name): stack.counts for stack in stacks(before, now, CLI)}
    assert counts[("new", "edge")] == "new, 2 resources" and counts[("prod", "edge")] == "gone, 2 resources"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (f"{'a' * 300}1{'b' * 300}", f"{'a' * 300}2{'b' * 300}",
         [f"[-] …{'a' * 30}1{'b' * 129}…", f"[+] …{'a' * 30}2{'b' * 129}…"]),
        (json.dumps({"x": "薯片 " * 50, "y": 1}), json.dumps({"x": "薯片 " * 50, "y": 2}), ['[-] "y": 1', '[+] "y": 2']),
        (json.dumps({"x": "a" * 200}), json.dumps({"x": "a" * 200, "y": 2}),
         [f'[-] …{"a" * 30}"', f'[+] …{"a" * 30}",', '[+] "y": 2']),
    ],
    ids=["text", "JSON", "a key more"],
)  # fmt: skip
def test_of_long_values_what_differs_is_told(old, new, told):
    found = list(shortened([" ├─ head", f" ├─ [-] {old}", f" └─ [+] {new}", " └─ tail"]))
    assert found[0] == " ├─ head" and found[-1] == " └─ tail"
    got = [line.strip() for line in found[1:-1]]
    if len(told) == 3:  # the first line of JSON differs by its comma alone, so all of it stands there
        assert got[-1] == told[-1] and all(len(line) <= LONGEST + 10 for line in got)
    else:
        assert got == told


def test_short_values_stay_and_long_lines_are_cut():
    text = [" ├─ [-] 1", " └─ [+] 2", "x" * 500, "[-] a", "[ ] b"]
    assert list(shortened(text)) == [*text[:2], f"{'x' * LONGEST}… (500 characters)", *text[3:]]


def test_names_of_accounts_are_no_difference_and_digits_of_a_digest_are():
    def stack(env, account, digest):
        return Stack(env, "gpu", ({}, {}), (f"[+] shipyard-{env}-{account}/{digest}",))

    one, other = stack("dev", "111111111111", "ab123456789012cd"), stack("prod", "333333333333", "ab123456789012cd")
    assert one.plain == other.plain != stack("dev", "111111111111", "ab123456789013cd").plain


def test_the_verb_tells_json_too(before, capsys):
    assert main(["change", str(before), str(before), "--fleet", str(ROOT / "fleet.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
