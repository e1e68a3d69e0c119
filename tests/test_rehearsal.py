"""The whole way of a release, with the real CDK CLI, a local cloud and faults: a slice of what `make rehearse` walks."""

import hashlib
import json
import zipfile

import pytest
from botocore.exceptions import ClientError
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.config import load_fleet
from models.release import File, artifact_key, attest, dump, files_digest, load_keys, read_release, sign
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import MANIFEST, verify_attestation
from shipyard.edge.lock import component, recipe_of
from shipyard.keys import write_public
from shipyard.local.cloud import local_clouds
from shipyard.local.faults import Control
from shipyard.local.rehearsal import Rehearsal
from shipyard.local.rehearse import cases, prepare, rehearse, way
from shipyard.local.successor import renew

CDK = ROOT / "node_modules" / ".bin" / "cdk"
FLEET = load_fleet(ROOT / "fleet.toml")
SERVED = {"search", "recommend", "gateway", "edge-recommend", "edge-runtime"}


def small_files(artifact, folder):
    """Write files of a few bytes in the place of an artifact's own; return the digest of its manifest."""
    folder.mkdir(parents=True)
    manifest = json.dumps({"schema": "x", "name": artifact["name"], "model": "model.onnx", "files": []}).encode()
    for file in artifact["files"]:
        path = folder / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as stream:
                stream.writestr(MANIFEST, manifest)
                stream.writestr("model.onnx", file["path"] * 99)
        else:
            path.write_bytes(manifest if path.name == MANIFEST else file["path"].encode())
    return hashlib.sha256(manifest).hexdigest()


def small_release(folder, names=SERVED):
    """The published release with its templates, its artifacts a few bytes each, of one a target; return file and store."""
    key, store = Ed25519PrivateKey.generate(), folder / "store"
    [published] = {env.release for env in FLEET.env.values()}
    whole = read_release(ROOT / "releases" / f"{published}.json", load_keys(ROOT / "releases" / "keys"))
    body = whole.model_dump(mode="json", by_alias=True, exclude_unset=True)
    body = {name: value for name, value in body.items() if name not in ("schema", "version", "signature", "papers")}
    body["artifacts"] = [artifact for artifact in body["artifacts"] if artifact["name"] in names]
    for artifact in body["artifacts"]:
        made = folder / "made" / artifact["name"]
        artifact["manifest"] = small_files(artifact, made)
        paths = sorted(path for path in made.rglob("*") if path.is_file())
        files = tuple(
            File(path=p.relative_to(made).as_posix(), sha256=sha256_file(p), bytes=p.stat().st_size) for p in paths
        )  # fmt: skip
        old, digest = artifact["key"], files_digest(files)
        artifact |= {"digest": digest, "key": artifact_key(artifact["name"], digest),
                     "files": [file.model_dump() for file in files],
                     "attestation": attest(artifact["name"], artifact["manifest"], key, whole.sequence)}  # fmt: skip
        artifact["template"] = json.loads(json.dumps(artifact["template"]).replace(old, artifact["key"]))
        (store / artifact["key"]).parent.mkdir(parents=True, exist_ok=True)
        made.rename(store / artifact["key"])
    found = sign(body, "0.1.0", key)
    path = folder / "releases" / f"{found.version}.json"
    write_public(key, folder / "releases" / "keys")
    path.write_text(dump(found))
    return path, store


# --- a slice of the rehearsal ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    """The rehearsal of a project whose dev has a bucket alone, and whose staging is deployed with the first release."""
    if not CDK.exists():
        pytest.skip("needs the CDK CLI: make setup")
    folder = tmp_path_factory.mktemp("rehearsal")
    path, store = small_release(folder)
    out = folder / "project"
    releases = prepare(ROOT / "fleet.toml", path, store, out)
    fleet = load_fleet(out / "fleet.toml")
    with local_clouds({name: fleet.env[name] for name in ("dev", "staging")}, out, out / "cloud.log") as clouds:
        control = Control(clouds["dev"].environment["AWS_ENDPOINT_URL"])
        made = Rehearsal(out, clouds, control, ("dev", "staging"), *releases)
        clouds["dev"].client("s3").create_bucket(Bucket=fleet.bucket("dev"))
        for release in releases:
            made.run("dev", "publish", release.version)
            made.run("dev", "upload", release.version, "--to", f"s3://{fleet.bucket('dev')}")
        made.found("staging")
        yield made


def case(name):
    [found] = [one for one in cases(FLEET, "staging") if one.name == name]
    return found


def test_every_account_has_its_own_stacks(staging):
    accounts = {name: cloud.client("sts").get_caller_identity()["Account"] for name, cloud in staging.clouds.items()}
    assert accounts == {name: FLEET.env[name].account for name in ("dev", "staging")}
    assert staging.clouds["dev"].stacks() == {}
    stacks = staging.clouds["staging"].stacks()
    assert {f"stack {name}" for name in stacks} >= {c.place for c in cases(FLEET, "staging") if "stack" in c.place}


def test_what_is_deployed_is_the_release(staging):
    assert staging.stands("staging", staging.first.version) == f"10 places on {staging.first.version}"


def test_cloudformation_makes_no_component_version_that_is_there(staging):
    """Else a fleet whose stacks make components would go back and forth here, and not on AWS."""
    cloud, [runtime] = staging.clouds["staging"], staging.first.of("greengrass-runtime")
    recipe = recipe_of(runtime, staging.fleet.bucket("staging")).decode()
    body = {"Resources": {"A": {"Type": "AWS::GreengrassV2::ComponentVersion", "Properties": {"InlineRecipe": recipe}}}}
    with pytest.raises(ClientError, match=f"{component(runtime)[1]}. already exists"):
        cloud.client("cloudformation").create_stack(StackName="twice", TemplateBody=json.dumps(body))


@pytest.mark.parametrize("name", ["gpu:lies", "gpu:killed-after"])
def test_a_fault_ends_with_all_targets_on_one_release(staging, name):
    told = staging.failed("staging", case(name)) if "lies" in name else staging.killed("staging", case(name))
    assert f"10 places on {staging.first.version}" in told
    # why it returned: what was live had not changed
    assert "gpu search differs" in told or name != "gpu:lies"


def test_a_release_that_is_named_and_not_rolled_out_is_no_good_end(staging):
    staging.deliver("staging", staging.second.version)
    with pytest.raises(ShipyardError, match="status staging --json: ended with 3"):
        staging.stands("staging", staging.second.version)


# --- its parts -----------------------------------------------------------------------------------------------------------


def test_every_target_has_every_fault():
    names = [one.name for one in cases(FLEET, "staging")]
    kills = ["killed-before", "killed-after"]
    wanted = {target: ["fails", "lies", *kills] for target in ("gpu", "cpu", "gateway")}
    wanted |= {"edge": ["fails", "lies", *kills, "fails-device"], "rest": ["fails", "falls", *kills]}
    assert names == [f"{target}:{kind}" for target, kinds in wanted.items() for kind in kinds]


def test_the_way_is_that_of_promotions():
    assert way(FLEET) == ["dev", "staging", "prod"]
    apart = FLEET.model_copy(update={"env": {name: FLEET.env[name] for name in ("dev", "prod")}})
    with pytest.raises(ShipyardError, match="no way through the environments; value: 'dev from None, prod from st"):
        way(apart)


@pytest.mark.parametrize(("more", "told"), [
    ({"env": "dev"}, "--env: faults are injected where releases are promoted to; value: 'dev'; allowed: staging, prod"),
    ({"faults": ["gpu:sleeps"]}, "--faults: no such case; value: 'gpu:sleeps'; allowed: gpu:fails, "),
])  # fmt: skip
def test_what_cannot_be_rehearsed_is_told_before_anything_is_done(tmp_path, more, told):
    path, store = small_release(tmp_path)
    with pytest.raises(ShipyardError) as fault:
        next(rehearse(ROOT / "fleet.toml", path, store, tmp_path / "out", **more))
    assert told in str(fault.value)


def test_the_project_of_a_rehearsal_goes_back_and_forth_and_wants_approvals(tmp_path):
    path, store = small_release(tmp_path)
    first, second = prepare(ROOT / "fleet.toml", path, store, tmp_path / "out")
    fleet = load_fleet(tmp_path / "out" / "fleet.toml")
    assert {env.release for env in fleet.env.values()} == {first.version}
    assert {env.edge.components for env in fleet.env.values()} == {"published"}
    assert [name for name, env in fleet.env.items() if env.needs_approval] == ["prod"]
    changed = {one.name: one for one in second.artifacts if one not in first.artifacts}
    assert changed.keys() == SERVED and second.sequence == first.sequence + 1
    assert {name for name, one in changed.items() if one.digest in {a.digest for a in first.artifacts}} == {
        "edge-runtime"
    }


def test_the_next_release_is_whole(tmp_path):
    path, store = small_release(tmp_path)
    key = Ed25519PrivateKey.generate()
    write_public(key, tmp_path / "next" / "keys")
    first = read_release(path, load_keys(path.parent / "keys"))
    keys = load_keys(tmp_path / "next" / "keys")
    second = read_release(renew(first, store, key, tmp_path / "next"), keys)
    before = {artifact.name: artifact for artifact in first.artifacts}
    for artifact in second.artifacts:
        folder = store / artifact.key
        assert {file.path: file.sha256 for file in artifact.files} == {
            p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()
        }  # fmt: skip
        assert verify_attestation(artifact.name, artifact.manifest, artifact.attestation, keys, "") == second.sequence
        old = before[artifact.name]
        if artifact.kind != "greengrass-runtime":
            assert old.key not in json.dumps(artifact.template)
            assert (old.key in json.dumps(old.template)) == (artifact.key in json.dumps(artifact.template))
    [model], [old] = second.of("greengrass-model"), first.of("greengrass-model")
    with zipfile.ZipFile(store / model.key / model.files[0].path) as stream:
        manifest = stream.read(MANIFEST)
    assert hashlib.sha256(manifest).hexdigest() == model.manifest
    assert json.loads(manifest)["follows"] == first.version
    assert component(model)[0] == component(old)[0] and component(model)[1] != component(old)[1]
    assert f"/{component(model)[1]}/" in model.template["model"]
