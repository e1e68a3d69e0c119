"""Offline scoring: what waits in the bucket is answered as the bundle answers, whatever stands between."""

import gzip
import json

import boto3
import pytest
from conftest import Made

from serve import score as scoring
from serve.errors import ShipyardError
from serve.runtime import open_bundle
from tests.test_upload import aws  # noqa: F401 -- a fixture

BUCKET = "shipyard-data"
URI = f"s3://{BUCKET}/scoring/"


@pytest.fixture
def s3(aws):  # noqa: F811
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture(scope="module")
def artifact(small: Made):
    return next(artifact for artifact in small.release.artifacts if artifact.name == "recommend")


@pytest.fixture(scope="module")
def model(small: Made, artifact):
    return open_bundle(small.bundle("recommend"), "recommend", artifact.attestation, small.keys)


def lines(documents):
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def test_every_object_is_answered_line_by_line(s3, model, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH", 3)
    golden = model.manifest["golden"]
    waiting = [{"id": f"shopper {i}", **golden[i % len(golden)]["request"]} for i in range(7)]
    waiting[4] = {"id": 4, "history": "none"}
    s3.put_object(Bucket=BUCKET, Key="scoring/in/a.jsonl", Body=lines(waiting))
    s3.put_object(Bucket=BUCKET, Key="scoring/in/day=2/b.jsonl.gz", Body=gzip.compress(lines(waiting[:1])))
    s3.put_object(Bucket=BUCKET, Key="scoring/out/recommend/old.jsonl", Body=b"kept")

    assert scoring.score(model, "recommend", URI) == {"objects": 2, "answers": 7, "errors": 1}

    def read(key):
        return s3.get_object(Bucket=BUCKET, Key=f"scoring/out/recommend/{key}")["Body"].read()

    found = [json.loads(line) for line in read("a.jsonl").splitlines()]
    assert [line["id"] for line in found] == [document["id"] for document in waiting]
    assert "history" in found[4].pop("error") and found[4] == {"id": 4}
    for i, line in enumerate(found):
        if i != 4:
            wanted = golden[i % len(golden)]["answer"]["products"][:5]
            assert [p["product"] for p in line["products"][:5]] == [p["product"] for p in wanted]
    packed = read("day=2/b.jsonl.gz")
    assert json.loads(gzip.decompress(packed)) == found[0]
    assert read("old.jsonl") == b"kept"
    # again: the same bytes
    scoring.score(model, "recommend", URI)
    assert read("day=2/b.jsonl.gz") == packed


@pytest.mark.parametrize("body", (b"no json\n", b'{"history": []}\n', b"[1]\n", b"\x1f\x8b\x00\n"))
def test_an_object_of_something_else_is_told_in_one_line(s3, model, body):
    s3.put_object(Bucket=BUCKET, Key="scoring/in/wrong.jsonl", Body=body)
    with pytest.raises(ShipyardError, match=r"scoring/in/wrong\.jsonl: no lines of requests with an id") as fault:
        scoring.score(model, "recommend", URI)
    assert "\n" not in str(fault.value)


def test_the_command_is_that_of_the_stacks(s3, small: Made, artifact, capsys):
    [module, address] = artifact.template["score"][1:3]
    assert (artifact.template["score"][0], module) == ("-m", "serve.score")
    arguments = [word.replace("/model", str(small.bundle("recommend"))) for word in artifact.template["score"][3:]]
    trusted = next((small.path.parent / "keys").glob("*.pub")).read_text()
    more = ["--attestation", artifact.attestation, "--trusted-key", trusted]
    assert scoring.main([address.replace("@DATA@", BUCKET), *arguments, *more]) == 0
    assert json.loads(capsys.readouterr().out) == {"objects": 0, "answers": 0, "errors": 0}
    assert scoring.main(["s3://not-there/scoring/", *arguments, *more]) == 1
    assert capsys.readouterr().err.startswith("error: s3://not-there/scoring/: ")


def test_the_image_of_any_bundle_runs_the_whole_cluster(small: Made):
    """The services, the gateway and the scoring are told one image."""
    modules = {
        artifact.template[command][1]
        for kind in ("image-context", "gateway")
        for artifact in small.release.of(kind)
        for command in ("fetch", "serve", "score")
        if command in artifact.template
    }
    assert modules == {"serve.fetch", "serve.server", "serve.gateway", "serve.score"}
    for artifact in small.release.of("image-context"):
        held = {file.path for file in artifact.files}
        assert {f"{module.replace('.', '/')}.py" for module in modules} <= held
