"""The life of an environment with the real CDK CLI and a local cloud: deploy, update, roll back, destroy."""

import ast
import json

import pytest
from conftest import ROOT, Made

from models.config import load_fleet
from models.release import read_release
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import check_bundle, load_keys
from shipyard.keys import signing_key
from shipyard.local.cloudformation import in_order, modelled, references
from shipyard.local.cycle import rehearse, sentence
from shipyard.local.invoke import COMPARED
from shipyard.local.recorded import RECORDED, check_types
from shipyard.local.successor import FACTOR, succeed

CDK = ROOT / "node_modules" / ".bin" / "cdk"
ENV = "dev"


# --- the cycle ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key(small: Made):
    return signing_key(small.build / "config" / "shipyard" / "signing.pem", make=False)


@pytest.fixture(scope="module")
def told(small: Made, key, tmp_path_factory: pytest.TempPathFactory):
    """What each step of the whole cycle found."""
    if not CDK.exists():
        pytest.skip("needs the CDK CLI: make setup")
    out = tmp_path_factory.mktemp("cycle")
    return dict(rehearse(ROOT / "fleet.toml", ENV, small.path, None, key, small.build / "store", out / "out"))


@pytest.fixture(scope="module")
def serving(small: Made):
    return {artifact.name for artifact in small.release.artifacts if artifact.kind in ("triton", "image-context")}


def test_first_deployment_goes_by_way_of_storage_and_upload(told, small: Made):
    assert list(told)[:5] == ["synth", "bootstrap", "storage", "upload", "deploy"]
    assert told["bootstrap"] == ["CDKToolkit"]
    assert told["storage"] == ["shipyard-dev-storage"]
    assert told["upload"]["bytes"] == sum(artifact.bytes for artifact in small.release.artifacts)
    assert {f"shipyard-dev-{name}" for name in ("storage", "network", "gpu", "cpu", "edge")} <= told["deploy"].keys()
    assert all(count >= 2 for count in told["deploy"].values())


def test_services_say_that_they_serve_the_release(told, small: Made, serving):
    bucket = f"s3://{load_fleet(ROOT / 'fleet.toml').bucket(ENV)}/"
    keys = {artifact.name: artifact.key for artifact in small.release.artifacts}
    assert serving <= told["describe"].keys()
    assert all(told["describe"][name].startswith(bucket + keys[name]) for name in serving)


def test_every_place_answers_as_its_bundle_does(told, small: Made, serving):
    assert told["invoke"].keys() == serving >= {"search", "recommend"}
    golden = json.loads((small.bundle("recommend") / "bundle.json").read_text())["golden"]
    wanted = [[found["product"] for found in line["answer"]["products"][:5]] for line in golden]
    assert [[product for product, _ in places] for places in told["invoke"]["recommend"]] == wanted


def test_the_gateway_answers_by_what_endpoint_and_cluster_say(told, small: Made):
    """The cycle itself compares with the fusion of what they say; here is that two sources spoke, and not one."""
    fused, search = told["gateway"]["gateway"], told["invoke"]["search"]
    assert len(fused) == len(search) >= 2
    assert all(len(places) == COMPARED for places in fused)
    pinned = json.loads((small.bundle("gateway") / "fusion.json").read_text())
    assert {"search", "recommend"} <= set(pinned["sources"])
    assert [scores for scores in zip(fused, search, strict=True) if scores[0][0][1] == scores[1][0][1]] == []


def test_what_the_gateway_answered_and_was_told_lies_in_the_data_bucket(told):
    answered = len(told["gateway"]["gateway"])
    assert told["feedback"] == {"impressions": answered, "clicks": answered}


def test_the_same_release_again_changes_nothing(told):
    assert told["deploy again"] == {"changed": []}


def test_diff_between_two_releases_shows_the_models_resources_alone(told):
    lines = [line.split() for line in told["diff"].splitlines() if line.startswith("[")]
    assert [words[:2] + words[-1:] for words in lines if words[1] != "Output"] == [
        ["[~]", "AWS::SageMaker::Model", "replace"],
        ["[~]", "AWS::SageMaker::EndpointConfig", "replace"],
    ]
    # no resource: each stack tells its release
    assert all("Release" in words[2] for words in lines if words[1] == "Output")
    assert "IAM Statement Changes" not in told["diff"] and "Security Group Changes" not in told["diff"]


def test_update_replaces_model_and_configuration_alone(told):
    kinds = ("EndpointConfig", "Model")
    assert told["update"]["changed"] == [f"shipyard-dev-gpu AWS::SageMaker::{kind}" for kind in kinds]
    moved = {name for name in told["describe"] if told["describe"][name] != told["update"][name]}
    assert moved == {"search"}


def test_answers_after_the_update_are_those_of_the_next_release(told):
    assert told["invoke next"].keys() == {"search"}
    for before, after in zip(told["invoke"]["search"], told["invoke next"]["search"], strict=True):
        for (_, score), (_, doubled) in zip(before, after, strict=True):
            assert doubled == pytest.approx(FACTOR * score, rel=1e-3)


def test_rollback_brings_the_first_release_back(told):
    assert told["roll back"] == told["describe"]
    assert told["invoke after rollback"] == {"search": told["invoke"]["search"]}


def test_nothing_answers_without_its_uploaded_model(told, serving):
    assert told["without artifacts"].keys() == serving | {"gateway"}
    assert told["without artifacts"]["gateway"] == "gateway: not every target answers; value: 'search refused'"
    assert "no such object" in told["without artifacts"]["search"]
    assert "Not Found" in told["without artifacts"]["recommend"]


def test_destroy_keeps_the_buckets_alone(told):
    assert load_fleet(ROOT / "fleet.toml").bucket(ENV) in told["destroy"]["kept"]
    assert all(name.startswith("shipyard-dev-") for name in told["destroy"]["kept"])


def test_an_environment_that_is_not_there_is_an_error(small: Made, key, tmp_path):
    steps = rehearse(ROOT / "fleet.toml", "prod2", small.path, None, key, small.build / "store", tmp_path)
    with pytest.raises(ShipyardError, match="no such environment"):
        next(steps)


# --- the guard against false passes --------------------------------------------------------------------------------------


def test_a_type_that_nothing_covers_is_refused():
    body = {"Resources": {"A": {"Type": "AWS::S3::Bucket"}, "B": {"Type": "AWS::MediaLive::Channel"}}}
    with pytest.raises(ShipyardError, match="AWS::MediaLive::Channel") as fault:
        check_types([body], frozenset(modelled()))
    assert "AWS::S3::Bucket" not in str(fault.value)


def test_types_that_a_test_covers_are_told(told):
    assert set(told["synth"]["recorded alone"]) <= RECORDED.keys()
    assert "AWS::GreengrassV2::Deployment" in told["synth"]["recorded alone"]


@pytest.mark.parametrize("kind", RECORDED)
def test_a_recorded_type_is_asserted_on_by_the_test_that_is_named(kind):
    file, _, name = RECORDED[kind].partition("::")
    source = (ROOT / "tests" / file).read_text()
    [function] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    text = ast.unparse(function)
    assert repr(kind) in text
    assert "assert " in text or "has_resource" in text


def test_what_is_recorded_is_not_imitated():
    assert not RECORDED.keys() & set(modelled())


# --- its parts -----------------------------------------------------------------------------------------------------------


def test_references_are_found_in_every_form():
    value = {"A": {"Ref": "One"}, "B": [{"Fn::GetAtt": ["Two", "Arn"]}], "C": {"Fn::Sub": "a ${Three} ${Four.Arn}"}}
    assert references(value | {"DependsOn": "Five"}) == {"One", "Two", "Three", "Four", "Five"}
    containers = {"DependsOn": [{"ContainerName": "fetch"}]}
    assert references({"Properties": containers, "DependsOn": ["Six"]}) == {"Six"}


def test_resources_come_after_what_they_refer_to():
    resources = {"A": {"Ref": "B"}, "B": {"DependsOn": ["C"]}, "C": {"Ref": "AWS::Region"}}
    assert in_order(resources) == ["C", "B", "A"]


def test_successor_differs_in_search_alone_and_verifies(small: Made, key, tmp_path):
    store = small.build / "store"
    path = succeed(small.release, store, key, tmp_path)
    after = read_release(path, load_keys(tmp_path / "keys"))
    assert after.version != small.release.version
    changed = [artifact for artifact in after.artifacts if artifact not in small.release.artifacts]
    assert [artifact.name for artifact in changed] == ["search"]
    for file in changed[0].files:
        assert sha256_file(store / changed[0].key / file.path) == file.sha256
    assert check_bundle(store / changed[0].key, changed[0].manifest)["name"] == "search"
    # the same release has the same successor
    assert succeed(small.release, store, key, tmp_path) == path


def test_a_step_is_told_in_a_line():
    assert sentence({"bytes": 3}) == "bytes: 3"
    assert sentence(["a", "b"]) == "a, b"
    assert sentence({"search": [[("x", 1.5)], [("y", 2.0)]]}) == "search: x 1.500, y 2.000"
    assert sentence("Resources\n[~] AWS::A::B a replace\n └─ more\n") == "[~] AWS::A::B a replace"
