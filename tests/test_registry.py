"""The SageMaker Model Registry on a local AWS: group, package, figures and approval; told twice, nothing is there twice."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.config import load_fleet
from models.release import Release, dump, read_release, sign
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.cli import main
from shipyard.delivery import registry
from shipyard.keys import write_public
from shipyard.papers.files import FIGURES, named, write_papers

FLEET = load_fleet(ROOT / "fleet.toml")
ENV, BUCKET = FLEET.env["dev"], FLEET.bucket("dev")


@pytest.fixture
def client(moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_SESSION_TOKEN": "test",
        "AWS_DEFAULT_REGION": ENV.region,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return boto3.client("sagemaker", region_name=ENV.region)


def a_release(folder: Path, **changes: Any) -> tuple[Path, Release]:
    """Write a release of the committed figures with a paper, signed by a key of its own."""
    committed = json.loads((ROOT / "releases" / f"{ENV.release}.json").read_text())
    body = {key: value for key, value in committed.items() if key not in ("schema", "version", "signature")} | changes
    papers, key = {FIGURES: b"{}\n"}, Ed25519PrivateKey.from_private_bytes(bytes(32))
    found = sign(body | {"papers": named(papers)}, "0.1.0", key)
    write_public(key, folder / "keys")
    path = folder / f"{found.version}.json"
    write_papers(path, papers)
    path.write_text(dump(found), encoding="utf-8")
    return path, found


def packages(client: Any, group: str) -> list[dict[str, Any]]:
    listed = client.list_model_packages(ModelPackageGroupName=group)["ModelPackageSummaryList"]
    return [client.describe_model_package(ModelPackageName=one["ModelPackageArn"]) for one in listed]


def test_a_release_is_a_package_with_figures_lineage_and_containers(client: Any, tmp_path: Path) -> None:
    _, found = a_release(tmp_path)
    told = registry.register(client, found, ENV, BUCKET, "whole")
    assert (told["state"], told["approval"]) == ("registered", "PendingManualApproval")
    [package] = packages(client, "whole")
    [container] = package["InferenceSpecification"]["Containers"]
    [artifact] = found.of("triton")
    data = container["ModelDataSource"]["S3DataSource"]
    assert data["S3Uri"] == f"s3://{BUCKET}/{artifact.key}model_repository/"
    assert (data["S3DataType"], data["CompressionType"]) == ("S3Prefix", "None")
    assert ".dkr.ecr.us-east-1.amazonaws.com/sagemaker-tritonserver:" in container["Image"]
    assert package["InferenceSpecification"]["SupportedRealtimeInferenceInstanceTypes"][0] == ENV.gpu.instance_type
    facts = package["CustomerMetadataProperties"]
    assert facts["version"] == found.version
    assert facts["search/ndcg@10"] == f"{found.submodels['search'].score.after.value:.5f}"
    assert facts["data_sha256"] == found.source.data_sha256
    assert facts[f"papers/{FIGURES}"] == found.papers[0].sha256
    metrics = package["ModelMetrics"]["ModelQuality"]["Statistics"]
    assert metrics == {"ContentType": "application/json", "S3Uri": f"s3://{BUCKET}/papers/{found.version}/{FIGURES}"}


def test_the_same_release_is_registered_once_and_its_approval_is_kept(client: Any, tmp_path: Path) -> None:
    _, found = a_release(tmp_path)
    first = registry.register(client, found, ENV, BUCKET, "once")
    assert registry.register(client, found, ENV, BUCKET, "once") == first | {"state": "unchanged"}
    approved = registry.register(client, found, ENV, BUCKET, "once", "approved", "looked at")
    assert (approved["state"], approved["approval"]) == ("changed", "Approved")
    assert registry.register(client, found, ENV, BUCKET, "once")["approval"] == "Approved"
    assert registry.register(client, found, ENV, BUCKET, "once", "approved")["state"] == "unchanged"
    assert registry.register(client, found, ENV, BUCKET, "once", "rejected")["approval"] == "Rejected"
    _, other = a_release(tmp_path, sequence=found.sequence + 1)
    assert registry.register(client, other, ENV, BUCKET, "once")["state"] == "registered"
    assert {p["ModelApprovalStatus"] for p in packages(client, "once")} == {"Rejected", "PendingManualApproval"}
    assert len(packages(client, "once")) == 2


def test_a_package_that_names_the_release_and_has_other_facts_is_refused(client: Any, tmp_path: Path) -> None:
    _, found = a_release(tmp_path)
    told = registry.register(client, found, ENV, BUCKET, "forged")
    client.update_model_package(ModelPackageArn=told["arn"], CustomerMetadataProperties={"signature": "0" * 64})
    with pytest.raises(ShipyardError, match="registered with other facts"):
        registry.register(client, found, ENV, BUCKET, "forged")


def test_one_group_is_made_where_two_make_it_at_once(client: Any, tmp_path: Path) -> None:
    made = [a_release(tmp_path, sequence=number)[1] for number in (5, 6)]
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda found: registry.register(client, found, ENV, BUCKET, "race"), made))
    assert {one["state"] for one in told} == {"registered"}
    assert len(packages(client, "race")) == 2


def test_aws_refusals_are_told_in_one_line(client: Any, tmp_path: Path) -> None:
    _, found = a_release(tmp_path)
    config = Config(retries={"total_max_attempts": 1})
    nobody = boto3.client("sagemaker", region_name=ENV.region, endpoint_url="http://127.0.0.1:9", config=config)
    with pytest.raises(ShipyardError, match=r"register: Could not connect .*; mend: check the region") as fault:
        registry.register(nobody, found, ENV, BUCKET, "group")
    assert "\n" not in str(fault.value)
    without = found.model_copy(update={"artifacts": tuple(a for a in found.artifacts if a.kind != "triton")})
    with pytest.raises(ShipyardError, match="nothing that SageMaker serves"):
        registry.register(client, without, ENV, BUCKET, "none")


def test_the_verb_uploads_the_papers_and_refuses_what_was_changed(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "fleet.toml", tmp_path / "fleet.toml")
    path, found = a_release(tmp_path / "releases")
    s3 = boto3.client("s3", region_name=ENV.region)
    s3.create_bucket(Bucket=BUCKET)
    arguments = ["register", found.version, "dev", "--fleet", str(tmp_path / "fleet.toml"), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "registered"
    assert s3.get_object(Bucket=BUCKET, Key=f"papers/{found.version}/{FIGURES}")["Body"].read() == b"{}\n"
    (path.with_suffix("") / FIGURES).write_text("{ }\n")
    assert main(arguments) == 1
    assert f"{FIGURES}: changed after it was signed" in capsys.readouterr().err
    assert read_release(path, load_keys(path.parent / "keys")) == found
    assert main(["register", found.version, "nowhere", "--fleet", str(tmp_path / "fleet.toml")]) == 1
    assert "no such environment" in capsys.readouterr().err
