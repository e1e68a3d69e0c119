"""Approval, promotion, rollback: what is forged, skipped, revoked or older is refused; two at once leave one whole."""

import hashlib
import json
import os
import re
import shutil
import urllib.request

import aws_cdk as cdk
import boto3
import pytest
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import app
from models.approval import (
    approval_path,
    check_approval,
    digest,
    hold_gates,
    release_digest,
    require_approval,
    sign_approval,
    text,
)
from models.config import load_fleet
from models.promotion import read_promotions
from models.release import File, artifact_key, attest, dump, files_digest, load_keys, sign
from serve.errors import ShipyardError
from shipyard import cli
from shipyard.delivery import promote, register
from shipyard.delivery.grammar import VERBS
from shipyard.delivery.pin import pin
from shipyard.delivery.register import LOCK, Lost, lock, open_register
from shipyard.keys import write_public
from tests.test_infra import recommend, search
from tests.test_trust import interval, sample_body

ACCOUNT = "111111111111"
AT = "2030-01-31T12:00:00Z"


# --- a project with two releases and three environments ----------------------------------------------------------------


def pem(path, key):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)


def real_artifact(part, key, store, content):
    """A sample artifact whose files lie in a store, with content of its own."""
    contents = {"bundle.json": f'{{"name": "{part["name"]}"}}\n'.encode(), "1/model.onnx": content * 50}
    files = tuple(
        File(path=path, sha256=hashlib.sha256(body).hexdigest(), bytes=len(body)) for path, body in contents.items()
    )
    whole = files_digest(files)
    place = artifact_key(part["name"], whole)
    for path, body in contents.items():
        (store / place / path).parent.mkdir(parents=True, exist_ok=True)
        (store / place / path).write_bytes(body)
    manifest = files[0].sha256
    template = json.loads(json.dumps(part["template"]).replace(part["key"], place))
    return part | {
        "key": place, "digest": whole, "manifest": manifest, "files": [file.model_dump() for file in files],
        "attestation": attest(part["name"], manifest, key), "template": template,
    }  # fmt: skip


class Project:
    """A folder as a user has it: fleet.toml, published releases, the keys, and a local AWS."""

    def __init__(self, folder, home):
        self.folder, self.fleet_file, self.releases = folder, folder / "fleet.toml", folder / "releases"
        self.signer, self.approver = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.store = folder / "build" / "store"
        folder.mkdir()
        pem(home / "signing.pem", self.signer)
        pem(home / "approving.pem", self.approver)
        write_public(self.signer, self.releases / "keys")
        write_public(self.approver, self.releases / "keys" / "approvers")
        self.first, self.second = (self.release(number) for number in (1, 2))
        toml = (ROOT / "fleet.toml").read_text()
        toml = re.sub(r'account = "\d+"', f'account = "{ACCOUNT}"', toml)
        toml = re.sub(r'release = "[^"]+"', f'release = "{self.first.version}"', toml)
        toml = re.sub(r"(?m)^approval = false.*\n", "", toml)
        self.fleet_file.write_text(toml)
        self.pin("dev", self.second)

    @property
    def keys(self):
        return load_keys(self.releases / "keys")

    @property
    def fleet(self):
        return load_fleet(self.fleet_file)

    def release(self, number, *, parts=None, **more):
        key = self.signer
        body = sample_body(key) | {"sequence": number} | more
        made = parts or (search(), recommend())
        body["artifacts"] = [real_artifact(part, key, self.store, b"%d" % number) for part in made]
        found = sign(body, "0.1.0", key)
        (self.releases / f"{found.version}.json").write_text(dump(found))
        return found

    def path(self, found):
        return self.releases / f"{found.version}.json"

    def pin(self, env, found):
        pin(self.fleet_file, env, found.version)

    def approve(self, found, env="prod", key=None, **changes):
        gates = hold_gates(found, self.fleet)
        made = sign_approval(found.model_copy(update=changes), env, gates, "board", AT, key or self.approver)
        path = approval_path(self.releases, env, found.version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(made))
        return path

    def require(self, found, env="prod"):
        return require_approval(found, env, self.fleet.env[env], self.releases, self.releases / "keys")

    def run(self, *arguments):
        return cli.main([*map(str, arguments), "--fleet", str(self.fleet_file)])

    def register(self, env):
        return open_register(self.fleet.bucket(env), "us-east-1", ACCOUNT)

    def names(self, env):
        """What fleet.toml and the last record say that an environment has."""
        records = self.register(env).below(promote.PROMOTIONS)
        return self.fleet.env[env].release, records[-1]["release"] if records else None

    def tree(self):
        files = [path for path in self.folder.rglob("*") if path.is_file() and "build" not in path.parts]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return Project(tmp_path / "project", tmp_path / "home" / "shipyard")


CLIENTS = {}


def client(service, **more):
    """A client that the tests share: to make one takes longer than what most of them do with it."""
    if os.environ["AWS_ENDPOINT_URL"] not in CLIENTS:
        CLIENTS.clear()
        CLIENTS[os.environ["AWS_ENDPOINT_URL"]] = {}
    made = CLIENTS[os.environ["AWS_ENDPOINT_URL"]]
    if service not in made:
        made[service] = MAKE(service, **more)
    return made[service]


MAKE = boto3.client


@pytest.fixture
def aws(moto, monkeypatch, project):
    """The buckets of the three environments; that of dev holds both releases."""
    monkeypatch.setattr(boto3, "client", client)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none", "AWS_ENDPOINT_URL": moto,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST"))
    s3 = boto3.client("s3")
    for env in project.fleet.env:
        s3.create_bucket(Bucket=project.fleet.bucket(env))
    for path in project.store.rglob("*"):
        if path.is_file():
            key = path.relative_to(project.store).as_posix()
            s3.put_object(Bucket=project.fleet.bucket("dev"), Key=key, Body=path.read_bytes())
    return s3


def objects(s3, bucket, prefix="artifacts/"):
    found = s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())
    return {one["Key"]: s3.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in found}


def refused(capsys, code):
    told = capsys.readouterr()
    assert code == 1, told
    [line] = [line for line in told.err.splitlines() if line.startswith("error: ")]
    return line


# --- approval ----------------------------------------------------------------------------------------------------------


def test_an_approval_says_who_when_and_by_which_gates(project, capsys):
    assert project.run("approve", project.second.version, "prod", "--by", "release board", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    found = project.require(project.second)
    assert told["new"] and (found.by, found.environment) == ("release board", "prod")
    assert found.sha256 == release_digest(project.second)
    assert {(g.submodel, g.bound, g.least) for g in found.gates} == {
        ("recommend", "over_before", 0.0), ("recommend", "over_baseline", -0.5),
    }  # fmt: skip
    # the same again is the same file
    before = project.tree()
    assert project.run("approve", project.second.version, "prod", "--by", "another") == 0
    assert project.tree() == before


def test_an_environment_without_approvals_asks_for_none(project):
    assert project.fleet.env["prod"].needs_approval and not project.fleet.env["staging"].needs_approval
    assert project.require(project.second, "staging") is None
    env = project.fleet.env["prod"].model_copy(update={"approval": False})
    assert require_approval(project.second, "prod", env, project.releases, project.releases / "keys") is None


def test_a_release_without_an_approval_is_refused(project):
    with pytest.raises(ShipyardError, match=r"is not approved.*mend: shipyard approve"):
        project.require(project.second)


def test_an_approval_by_a_key_that_may_not_approve_is_refused(project):
    project.approve(project.second, key=Ed25519PrivateKey.generate())
    with pytest.raises(ShipyardError, match="a key that is not trusted"):
        project.require(project.second)


def test_an_approval_by_the_key_that_signed_the_release_is_refused(project):
    project.approve(project.second, key=project.signer)
    with pytest.raises(ShipyardError, match="a key that is not trusted"):
        project.require(project.second)
    write_public(project.signer, project.releases / "keys" / "approvers")
    with pytest.raises(ShipyardError, match="a key signs releases and approves them"):
        project.require(project.second)


def test_an_approval_by_a_revoked_key_is_refused(project):
    project.approve(project.second)
    write_public(Ed25519PrivateKey.generate(), project.releases / "keys" / "approvers")
    [public] = (project.releases / "keys" / "approvers").glob(f"{project.require(project.second).signature.key_id}.pub")
    public.with_suffix(".revoked").write_text("the laptop was lost")
    with pytest.raises(ShipyardError, match=r"a key that is revoked.*the laptop was lost"):
        project.require(project.second)


@pytest.mark.parametrize("field", ["release", "sha256", "environment", "by", "at", "gates"])
def test_a_changed_approval_is_refused(project, field):
    path = project.approve(project.second)
    document = json.loads(path.read_text())
    other = {
        "release": project.first.version,
        "sha256": "0" * 64,
        "environment": "dev",
        "by": "me",
        "at": AT,
        "gates": [],
    }
    document[field] = other[field] if field != "at" else "2031-01-31T12:00:00Z"
    path.write_text(json.dumps(document))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        project.require(project.second)


def test_an_approval_of_another_environment_is_refused(project):
    there = project.approve(project.second, env="staging")
    path = approval_path(project.releases, "prod", project.second.version)
    path.parent.mkdir(parents=True)
    shutil.copy(there, path)
    with pytest.raises(ShipyardError, match="approves another environment; value: 'staging'; allowed: prod"):
        project.require(project.second)


def test_an_approval_of_another_release_is_refused(project):
    there = project.approve(project.first)
    shutil.copy(there, approval_path(project.releases, "prod", project.second.version))
    with pytest.raises(ShipyardError, match="approves another release"):
        project.require(project.second)


def test_an_approval_of_another_provenance_is_refused(project):
    """A release of the same version whose source says otherwise: another signer could make one."""
    source = project.second.source.model_copy(update={"data_sha256": "1" * 64})
    project.approve(project.second, source=source)
    with pytest.raises(ShipyardError, match="approves another sha256"):
        project.require(project.second)


@pytest.mark.parametrize("change", ["left out", "another figure", "missed"])
def test_an_approval_that_skips_a_gate_is_refused(project, change):
    gates = hold_gates(project.second, project.fleet)
    if change == "left out":
        gates = gates[1:]
    else:
        what = {"low": 0.5} if change == "another figure" else {"least": 0.9}
        gates = tuple(gate.model_copy(update=what) for gate in gates)
    found = sign_approval(project.second, "prod", gates, "board", AT, project.approver)
    with pytest.raises(ShipyardError, match="too low" if change == "missed" else "a gate was skipped"):
        check_approval(found, project.second, "prod", "approval")


def test_a_release_that_misses_a_gate_is_not_approved(project, capsys):
    text = project.fleet_file.read_text()
    project.fleet_file.write_text(text.replace("over_baseline = -0.5", "over_baseline = 0.041"))
    line = refused(capsys, project.run("approve", project.second.version, "prod"))
    assert "gate: " in line and "over_baseline is too low" in line and "allowed: +0.0410 or more" in line
    assert not (project.releases / "approvals").exists()


def test_a_key_that_nobody_trusts_signs_no_approval(project, capsys, tmp_path):
    pem(tmp_path / "other.pem", Ed25519PrivateKey.generate())
    code = project.run("approve", project.second.version, "prod", "--key", tmp_path / "other.pem")
    assert "releases/keys/approvers" in refused(capsys, code)
    assert not (project.releases / "approvals").exists()


@pytest.mark.parametrize(("gate", "figure", "low", "bound", "change"), [
    ("over_teacher", 0.9, -0.02, -0.05, ("over_teacher = -0.5", "over_teacher = 0")),
    ("loss", 0.009, None, 0.01, ("max_size_mb = 100", "max_size_mb = 100\nmax_loss = 0.005")),
    ("size_mb", 300.0, None, 400.0, ("max_size_mb = 400", "max_size_mb = 200")),
])  # fmt: skip
def test_a_gate_that_was_raised_since_is_held(project, gate, figure, low, bound, change):
    told = {"gate": gate, "figure": figure, "low": low, "bound": bound, "passed": True}
    found = project.release(9, gates=[told | {"of": "recommend" if gate == "loss" else "search"}])
    assert hold_gates(found, project.fleet)
    toml = project.fleet_file.read_text()
    assert change[0] in toml
    project.fleet_file.write_text(toml.replace(*change))
    with pytest.raises(ShipyardError, match=f"{gate} is not what fleet.toml asks for today"):
        hold_gates(found, project.fleet)


def test_a_dry_approval_writes_nothing(project, capsys, tmp_path):
    before = project.tree()
    assert project.run("approve", project.second.version, "prod", "--dry-run") == 0
    assert project.tree() == before
    # not a key either
    [own] = [path for path in tmp_path.rglob("approving.pem") if path.is_file()]
    own.unlink()
    line = refused(capsys, project.run("approve", project.second.version, "prod", "--dry-run"))
    assert "approving.pem: no such key; mend: give one" in line and not own.exists()


# --- synth -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def synth(project, monkeypatch):
    """Synthesize production as app.py does, up to its stacks; return the releases that would have got there."""
    made = []
    monkeypatch.setattr(app, "FleetStage", lambda *_, release, **__: made.append(release.version))
    monkeypatch.setattr(app, "check_release", lambda *_: None)

    def synth(**context):
        app.build(cdk.App(context={"env": "prod"} | context), project.folder)
        return made

    return synth


def test_synth_takes_an_approved_release_alone(project, synth):
    with pytest.raises(ShipyardError, match=r"env.prod: release .* is not approved"):
        synth()
    project.approve(project.first)
    assert synth() == [project.first.version]


def test_synth_refuses_a_forged_approval(project, synth):
    project.approve(project.first, key=Ed25519PrivateKey.generate())
    with pytest.raises(ShipyardError, match="a key that is not trusted"):
        synth()


def test_synth_refuses_a_revoked_release(project, synth):
    project.approve(project.first)
    project.path(project.first).with_suffix(".revoked").write_text("leaks a price list")
    with pytest.raises(ShipyardError, match="the release is revoked; value: 'leaks a price list'"):
        synth()


def test_synth_refuses_an_older_release_that_was_put_back_by_hand(project, synth, aws):
    project.approve(project.first)
    project.approve(project.second)
    assert project.run("promote", "dev", "prod", "--allow-older") == 1  # prod takes from staging
    assert project.run("promote", "dev", "staging") == project.run("promote", "staging", "prod") == 0
    assert synth() == [project.second.version]
    project.pin("prod", project.first)
    with pytest.raises(ShipyardError, match=r"names a release that was not promoted.*mend: shipyard promote"):
        synth()
    record = project.releases / "promotions" / "prod" / "000001.json"
    record.write_text(record.read_text().replace(project.second.version, project.first.version))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        synth()


def test_an_unapproved_release_is_synthesized_to_look_at_where_it_is_named(project, synth):
    with pytest.raises(ShipyardError, match="is not approved"):
        synth(unapproved="true")
    path = f"releases/{project.second.version}.json"
    with pytest.raises(ShipyardError, match="is not approved"):
        synth(release=path)
    assert synth(release=path, unapproved="true") == [project.second.version]


# --- promotion ---------------------------------------------------------------------------------------------------------


def test_a_promotion_copies_every_byte_records_it_and_changes_one_line(project, aws, capsys):
    before = project.fleet_file.read_text().splitlines()
    assert project.run("promote", "dev", "staging", "--by", "pipeline", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {f"{a.key}{file.path}" for a in project.second.artifacts for file in a.files}
    assert objects(aws, project.fleet.bucket("staging")) == {key: (project.store / key).read_bytes() for key in wanted}
    after = project.fleet_file.read_text().splitlines()
    [(old, new)] = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert (project.first.version in old, project.second.version in new) == (True, True)
    [record] = read_promotions(project.releases / "promotions" / "staging", project.keys)
    assert (record.source, record.release, record.replaces) == ("dev", project.second.version, project.first.version)
    assert (record.by, record.sha256, record.number) == ("pipeline", release_digest(project.second), 1)
    assert told["bytes_sent"] == sum(a.bytes for a in project.second.artifacts) and told["changed"]


def test_a_promotion_twice_changes_nothing_more(project, aws, capsys):
    assert project.run("promote", "dev", "staging") == 0
    before, there = project.tree(), objects(aws, project.fleet.bucket("staging"), "delivery/promotions/")
    capsys.readouterr()
    assert project.run("promote", "dev", "staging", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["changed"], told["bytes_sent"], told["number"]) == (False, 0, 1)
    assert project.tree() == before
    assert objects(aws, project.fleet.bucket("staging"), "delivery/promotions/") == there


def test_a_dry_promotion_checks_all_and_changes_nothing(project, aws, capsys):
    before = project.tree()
    assert project.run("promote", "dev", "staging", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"]
    assert project.tree() == before and objects(aws, project.fleet.bucket("staging"), "") == {}
    assert "is not approved" in refused(capsys, project.run("promote", "staging", "prod", "--dry-run"))


def test_a_promotion_without_an_approval_is_refused(project, aws, capsys):
    assert "is not approved" in refused(capsys, project.run("promote", "staging", "prod"))
    project.approve(project.first)
    assert project.run("promote", "dev", "staging", "--release", project.first.version) == 0
    assert project.run("promote", "staging", "prod") == 0
    [record] = read_promotions(project.releases / "promotions" / "prod", project.keys)
    assert record.approval == digest(project.require(project.first))


def test_a_promotion_of_a_release_that_misses_a_gate_is_refused(project, aws, capsys):
    toml = project.fleet_file.read_text()
    project.fleet_file.write_text(toml.replace("over_baseline = -0.5", "over_baseline = 0.041"))
    assert "over_baseline is too low" in refused(capsys, project.run("promote", "dev", "staging"))
    assert objects(aws, project.fleet.bucket("staging"), "") == {}


def test_a_promotion_of_a_release_with_a_figure_that_was_changed_is_refused(project, aws, capsys):
    path = project.path(project.second)
    document = json.loads(path.read_text())
    document["submodels"]["recommend"]["score"]["over_baseline"] = interval(0.9)
    path.write_text(json.dumps(document))
    assert "changed after it was signed" in refused(capsys, project.run("promote", "dev", "staging"))


def test_a_promotion_of_a_release_whose_provenance_was_changed_is_refused(project, aws, capsys):
    path = project.path(project.second)
    document = json.loads(path.read_text())
    document["source"]["code_sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    assert "changed after it was signed" in refused(capsys, project.run("promote", "dev", "staging"))


def test_a_release_whose_papers_were_changed_is_refused(project, aws, capsys, synth):
    content = b'{"payloadType": "application/vnd.in-toto+json"}\n'
    paper = {"name": "provenance.intoto.jsonl", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    found = project.release(3, papers=[paper])
    folder = project.path(found).with_suffix("")
    folder.mkdir()
    (folder / paper["name"]).write_bytes(content)
    project.pin("dev", found)
    project.pin("prod", found)
    assert project.run("approve", found.version, "prod") == project.run("promote", "dev", "staging", "--dry-run") == 0
    assert synth() == [found.version]
    (folder / paper["name"]).write_bytes(content.replace(b"in-toto", b"in_toto"))
    capsys.readouterr()
    for verb in (("approve", found.version, "prod"), ("promote", "dev", "staging")):
        assert "provenance.intoto.jsonl: changed after it was signed" in refused(capsys, project.run(*verb))
    with pytest.raises(ShipyardError, match=r"provenance.intoto.jsonl: changed after it was signed"):
        synth()


def test_a_release_that_says_that_it_missed_a_gate_is_refused(project, aws, capsys):
    gate = {"of": "recommend", "gate": "loss", "figure": 0.03, "low": None, "bound": 0.01, "passed": False}
    found = project.release(3, gates=[gate])
    for verb in (("approve", found.version, "prod"), ("promote", "dev", "staging", "--release", found.version)):
        assert "recommend: loss was missed when it was made; value: 0.03" in refused(capsys, project.run(*verb))


def test_a_promotion_of_a_revoked_release_is_refused(project, aws, capsys):
    project.path(project.second).with_suffix(".revoked").write_text("leaks a price list")
    assert "the release is revoked; value: 'leaks a price list'" in refused(
        capsys, project.run("promote", "dev", "staging")
    )
    code = project.run("upload", project.second.version, "--to", project.folder / "elsewhere")
    assert "the release is revoked" in refused(capsys, code)


def test_a_promotion_of_an_older_release_is_refused_unless_it_is_asked_for(project, aws, capsys):
    assert project.run("promote", "dev", "staging") == 0
    again = ("promote", "dev", "staging", "--release", project.first.version)
    assert "is older than what staging runs" in refused(capsys, project.run(*again))
    assert project.names("staging") == (project.second.version, project.second.version)
    assert project.run(*again, "--allow-older") == 0
    assert project.names("staging") == (project.first.version, project.first.version)


def test_a_promotion_from_elsewhere_than_promote_from_is_refused(project, aws, capsys):
    line = refused(capsys, project.run("promote", "dev", "prod"))
    assert "prod takes no releases from there; value: 'dev'; allowed: staging" in line


def test_an_object_that_was_exchanged_is_not_promoted(project, aws, capsys):
    artifact = project.second.artifacts[0]
    aws.put_object(Bucket=project.fleet.bucket("dev"), Key=f"{artifact.key}{artifact.files[0].path}", Body=b"other")
    assert "not what the release names" in refused(capsys, project.run("promote", "dev", "staging"))
    assert project.names("staging") == (project.first.version, None)


def test_a_record_by_a_key_that_nobody_trusts_is_refused(project, aws, capsys, tmp_path):
    assert project.run("promote", "dev", "staging") == 0
    folder, key = project.releases / "promotions" / "staging", f"{promote.PROMOTIONS}000002.json"
    forged = json.loads((folder / "000001.json").read_text()) | {"number": 2}
    aws.put_object(Bucket=project.fleet.bucket("staging"), Key=key, Body=json.dumps(forged))
    assert "changed after it was signed" in refused(capsys, project.run("rollback", "staging"))
    aws.delete_object(Bucket=project.fleet.bucket("staging"), Key=key)
    aws.delete_object(Bucket=project.fleet.bucket("staging"), Key=key.replace("2.", "1."))
    aws.put_object(Bucket=project.fleet.bucket("staging"), Key=key, Body=(folder / "000001.json").read_bytes())
    assert project.run("promote", "dev", "staging") == 0  # its content, not its key, tells its number
    pem(tmp_path / "other.pem", Ed25519PrivateKey.generate())
    code = project.run("promote", "dev", "staging", "--key", tmp_path / "other.pem")
    assert "promotion: the key is not trusted for this" in refused(capsys, code)


def test_a_record_that_was_left_out_is_found(project, aws, capsys):
    assert project.run("promote", "dev", "staging") == project.run(
        "rollback", "staging", "--to", project.second.version
    )
    assert project.run("promote", "dev", "staging", "--release", project.first.version, "--allow-older") == 0
    aws.delete_object(Bucket=project.fleet.bucket("staging"), Key=f"{promote.PROMOTIONS}000001.json")
    assert "does not follow the one before it" in refused(capsys, project.run("rollback", "staging"))


# --- rollback ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def promoted(project, aws):
    """Staging had the first release, then the second."""
    assert project.run("promote", "dev", "staging", "--release", project.first.version) == 0
    assert project.run("promote", "dev", "staging") == 0
    return project


def test_a_rollback_goes_to_the_release_before_and_stays_there(promoted, capsys):
    for _ in range(2):
        assert promoted.run("rollback", "staging") == 0
        assert promoted.names("staging") == (promoted.first.version, promoted.first.version)
    records = read_promotions(promoted.releases / "promotions" / "staging", promoted.keys)
    assert [(one.source, one.release) for one in records] == [
        ("dev", promoted.first.version), ("dev", promoted.second.version), (None, promoted.first.version),
    ]  # fmt: skip
    # and on again
    assert promoted.run("promote", "dev", "staging") == 0
    assert promoted.names("staging") == (promoted.second.version, promoted.second.version)


def test_a_dry_rollback_changes_nothing(promoted, capsys):
    before = promoted.tree()
    assert promoted.run("rollback", "staging", "--dry-run") == 0
    assert f"from {promoted.second.version} to {promoted.first.version}" in capsys.readouterr().out
    assert promoted.tree() == before


def test_a_rollback_to_what_the_bucket_does_not_hold_whole_is_refused(promoted, aws, capsys):
    artifact = promoted.first.artifacts[0]
    aws.delete_object(Bucket=promoted.fleet.bucket("staging"), Key=f"{artifact.key}{artifact.files[0].path}")
    assert "NoSuchKey" in refused(capsys, promoted.run("rollback", "staging"))
    assert promoted.names("staging") == (promoted.second.version, promoted.second.version)


def test_a_rollback_to_a_revoked_release_is_refused(promoted, capsys):
    promoted.path(promoted.first).with_suffix(".revoked").write_text("leaks a price list")
    assert "the release is revoked" in refused(capsys, promoted.run("rollback", "staging"))


def test_a_rollback_without_a_promotion_asks_for_a_name(project, aws, capsys):
    assert "no promotion to staging is recorded" in refused(capsys, project.run("rollback", "staging"))


# --- two at once, and kills --------------------------------------------------------------------------------------------


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(project, aws, capsys, monkeypatch):
    """The second begins while the first copies, and goes through every check up to the lock."""
    third = project.release(3)
    for artifact in third.artifacts:
        for file in artifact.files:
            body = (project.store / artifact.key / file.path).read_bytes()
            aws.put_object(Bucket=project.fleet.bucket("dev"), Key=artifact.key + file.path, Body=body)
    copy, codes = promote._copy, []

    def copying(*arguments):
        monkeypatch.setattr(promote, "_copy", copy)
        codes.append(project.run("promote", "dev", "staging", "--release", third.version, "--by", "the second"))
        return copy(*arguments)

    monkeypatch.setattr(promote, "_copy", copying)
    assert project.run("promote", "dev", "staging", "--by", "the first") == 0
    line = refused(capsys, codes.pop())
    assert "another run is delivering" in line and "by the first" in line
    assert project.names("staging") == (project.second.version, project.second.version)
    # nothing of the loser is there
    assert objects(aws, project.fleet.bucket("staging")).keys() == {
        f"{a.key}{file.path}" for a in project.second.artifacts for file in a.files
    }
    # and the lock was given back
    assert project.run("promote", "dev", "staging", "--release", third.version) == 0


def test_two_promotions_from_two_checkouts_leave_one_order(project, aws, capsys, tmp_path):
    other = Project.__new__(Project)
    other.__dict__ = project.__dict__ | {"folder": tmp_path / "other"}
    shutil.copytree(project.folder, other.folder)
    other.fleet_file, other.releases = other.folder / "fleet.toml", other.folder / "releases"
    assert project.run("promote", "dev", "staging") == 0
    # its fleet.toml still names the first release; the bucket knows better
    line = refused(capsys, other.run("promote", "dev", "staging", "--release", other.first.version))
    assert "is older than what staging runs" in line
    assert other.run("promote", "dev", "staging") == 0
    assert other.names("staging") == project.names("staging") == (project.second.version,) * 2


STEPS = ("lock", "copy", "renew", "record", "local record", "pin")


@pytest.mark.parametrize("step", STEPS)
def test_a_promotion_that_is_killed_at_any_step_goes_on_and_names_nothing_that_is_not_there(
    project, aws, monkeypatch, step
):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    write = register.Register.write
    with monkeypatch.context() as patched:
        # a kill leaves the lock as it is
        def dying(self, key, content, over):
            if (step == "renew" and "renewed" in content) or (step == "record" and key.startswith(promote.PROMOTIONS)):
                raise Killed
            if key == LOCK and content["holder"] is None:
                return over
            tag = write(self, key, content, over)
            if step == "lock":
                raise Killed
            return tag

        patched.setattr(register.Register, "write", dying)
        if step == "copy":
            patched.setattr(promote, "upload", kill)
        if step == "local record":
            patched.setattr(promote, "write", kill)
        if step == "pin":
            patched.setattr(promote, "pin", kill)
        with pytest.raises(Killed):
            project.run("promote", "dev", "staging")
    named, recorded = project.names("staging")
    assert named == project.first.version
    assert recorded == (project.second.version if step in ("local record", "pin") else None)
    monkeypatch.setattr(promote, "lock", lambda *arguments: lock(*arguments, lease_s=0))
    assert project.run("promote", "dev", "staging") == 0
    assert project.names("staging") == (project.second.version, project.second.version)
    assert len(project.register("staging").below(promote.PROMOTIONS)) == 1


def test_the_lock_of_a_killed_run_gives_way_to_one_alone(project, aws):
    bucket = project.register("staging")
    with lock(bucket, "a", "first") as renew:
        with pytest.raises(ShipyardError, match=r"another run is delivering; value: 'a by first, \d+ s ago'"):
            lock(bucket, "b", "second").__enter__()
        # silent for too long: another one takes it, and the first is told before it does more
        taken = pytest.raises(ShipyardError, match="another run is delivering; value: 'b by second")
        with lock(bucket, "b", "second", lease_s=0), taken:
            renew()
    assert bucket.read(LOCK).content["holder"] is None


def test_a_write_whose_answer_was_lost_counts_once(project, aws):
    bucket = project.register("staging")
    tag = bucket.write("delivery/x.json", {"a": 1}, None)
    # botocore's second try meets the first one's object
    assert bucket.write("delivery/x.json", {"a": 1}, None) == tag
    with pytest.raises(Lost):
        bucket.write("delivery/x.json", {"a": 2}, None)
    with pytest.raises(Lost):
        bucket.write("delivery/x.json", {"a": 2}, '"another"')


# --- fleet.toml --------------------------------------------------------------------------------------------------------


def test_the_committed_fleet_changes_in_one_line_and_keeps_its_comments(tmp_path):
    path, version = tmp_path / "fleet.toml", "0.1.0-g000000000000"
    for env in ("dev", "prod"):
        shutil.copy(ROOT / "fleet.toml", path)
        assert pin(path, env, version) and not pin(path, env, version)
        old, new = (ROOT / "fleet.toml").read_text().splitlines(), path.read_text().splitlines()
        [(before, after)] = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert after == before.replace(load_fleet(ROOT / "fleet.toml").env[env].release, version)
        assert load_fleet(path).env[env].release == version


def test_a_comment_behind_the_release_and_other_line_ends_stay(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_bytes(b'[env.dev]\r\nrelease   =  "a"  # ours\r\nx = 1\r\n')
    assert pin(path, "dev", "b")
    assert path.read_bytes() == b'[env.dev]\r\nrelease   =  "b"  # ours\r\nx = 1\r\n'


# --- the page ----------------------------------------------------------------------------------------------------------


def test_every_case_of_the_page_has_its_test():
    rows = re.findall(r"^\|[^|]+\|[^|]+\| `(tests/\w+\.py)::(\w+)` \|$", (ROOT / "docs/delivery.md").read_text(), re.M)
    assert len(rows) == len(set(rows)) >= 40
    assert [test for file, test in rows if f"def {test}(" not in (ROOT / file).read_text()] == []


def test_every_verb_of_the_page_is_one():
    page = (ROOT / "docs/delivery.md").read_text()
    assert set(re.findall(r"^shipyard (\w+) ", page, re.M)) == VERBS.keys()
