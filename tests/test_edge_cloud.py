"""The way to the devices: components, rollout, rollback and status, through real boto3 and botocore's own models."""

import copy
import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.config import load_fleet
from models.release import File, artifact_key, attest, files_digest, read_release
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass import recipe
from serve.greengrass.telemetry import Telemetry
from serve.greengrass.words import SHADOW, delta_key, read_told
from serve.trust import MANIFEST, load_keys
from shipyard.bundle import component_version, write_zip
from shipyard.console import Reporter
from shipyard.edge import command as edge
from shipyard.edge import components, devices, rollout
from shipyard.edge.devices import Clients
from shipyard.edge.lock import lock
from shipyard.edge.merge import Terms
from shipyard.local.greengrass import Endpoint, Refused
from shipyard.s3 import S3Store

ENV = load_fleet(ROOT / "fleet.toml").env["dev"]
WHERE = {"account": ENV.account, "region": ENV.region}
BUCKET = "shipyard-test"
NAME = "edge-recommend"
RELEASES = ROOT / "releases"


class Made:
    """Releases whose edge artifacts are real archives, below one folder in a bucket's layout."""

    def __init__(self, root):
        self.root, self.key = root, Ed25519PrivateKey.generate()
        keys = load_keys(RELEASES / "keys")
        path = max(RELEASES.glob("0.1.0-g*.json"), key=lambda p: p.stat().st_size)
        self.template = read_release(path, keys)

    def release(self, number, runtime="1.0.5"):
        """A release that differs from others in its model by a tenth, and in its runtime where that is said."""
        tree = self.root / f"tree-{number}"
        if not tree.exists():
            tree.mkdir(parents=True)
            shared = b"".join(hashlib.sha256(bytes([n, m])).digest() for n in range(9) for m in range(60))
            own = b"".join(hashlib.sha256(bytes([number, 77, m])).digest() for m in range(60))
            (tree / "model.onnx").write_bytes(shared + own)
            files = [{"path": "model.onnx", "sha256": sha256_file(tree / "model.onnx"), "bytes": len(shared + own)}]
            (tree / MANIFEST).write_text(json.dumps({"name": NAME, "files": files}))
        model = self.artifact(NAME, "edge_recommend", "greengrass-model", tree, (f"{NAME}.zip",))
        folder = self.root / "code"
        folder.mkdir(exist_ok=True)
        (folder / "run.sh").write_text("exec true\n")
        code = self.artifact("edge-runtime", None, "greengrass-runtime", folder, (
            "edge-runtime-aarch64.zip", "edge-runtime-amd64.zip",
        ))  # fmt: skip
        code.template["recipe"] = recipe.runtime_recipe(runtime, f"s3://@BUCKET@/{code.key}", (NAME,))
        version = f"0.1.0-g{number:010x}{int(runtime[-1]):02x}"
        return self.template.model_copy(update={"version": version, "artifacts": (model, code)})

    def artifact(self, name, submodel, kind, tree, archives):
        staged = self.root / f"staged-{tree.name}"
        staged.mkdir(exist_ok=True)
        for archive in archives:
            write_zip(tree, staged / archive)
        files = tuple(
            File(path=p.name, sha256=sha256_file(p), bytes=p.stat().st_size) for p in sorted(staged.iterdir())
        )
        digest = files_digest(files)
        key = artifact_key(name, digest)
        (self.root / key).mkdir(parents=True, exist_ok=True)
        for path in staged.iterdir():
            (self.root / key / path.name).write_bytes(path.read_bytes())
        prefix = f"s3://@BUCKET@/{key}"
        if submodel:
            version = component_version(recipe.model_recipe(name, "VERSION", f"{prefix}{name}.zip"))
            words = f"{recipe.model_component(name)}/{version}/{name}/@ATTESTATION@"
            template = {"recipe": recipe.model_recipe(name, version, f"{prefix}{name}.zip"), "model": words}
        else:
            template = {}
        manifest = sha256_file(tree / MANIFEST) if submodel else "0" * 64
        base = self.template.artifacts[0]
        return base.model_copy(update={
            "name": name, "submodel": submodel, "target": "edge", "kind": kind, "key": key, "digest": digest,
            "manifest": manifest, "attestation": attest(name, manifest, self.key), "files": files, "template": template,
        })  # fmt: skip


@pytest.fixture
def aws(moto, monkeypatch, tmp_path):
    """Clients of real boto3, a bucket, and the endpoint that the service model drives."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": ENV.region,
        "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST"))
    s3 = boto3.client("s3", endpoint_url=moto)
    s3.create_bucket(Bucket=BUCKET)

    def read(uri):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        try:
            return s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        except s3.exceptions.NoSuchKey:
            return None

    endpoint = Endpoint(read)
    config = Config(retries={"mode": "standard", "max_attempts": 3})
    iot = boto3.client("iot", endpoint_url=moto)
    for group, count in ((f"{ENV.edge.thing_group}-canary", 2), (ENV.edge.thing_group, 3)):
        iot.create_thing_group(thingGroupName=group)
        for number in range(count):
            iot.create_thing(thingName=f"{group}-{number}")
            iot.add_thing_to_thing_group(thingGroupName=group, thingName=f"{group}-{number}")
    clients = Clients(
        boto3.client("greengrassv2", endpoint_url=endpoint.url, config=config), iot,
        boto3.client("iot-data", endpoint_url=moto),
    )  # fmt: skip
    made = Made(tmp_path / "store")
    yield Aws(clients, endpoint, S3Store(BUCKET, s3), made)
    endpoint.shutdown()
    endpoint.server_close()


@dataclasses.dataclass
class Aws:
    clients: Clients
    endpoint: Endpoint
    store: S3Store
    made: Made

    def publish(self, found, *others):
        return components.publish_edge(
            found, list(others), self.made.root, self.store, self.clients.greengrass, BUCKET, **WHERE,
            progress=lambda *_: None, pause=0,
        )  # fmt: skip

    def rollout(self, found, deltas=None, wait=0.0, settings=ENV.edge, canary=True, then=lambda: None):
        """Roll out; `then` is done once the canaries were told, before they are looked at."""

        def said(line):
            if line.startswith("canary: ") and line.endswith(" told"):
                then()

        return rollout.rollout(
            self.clients, found, settings, deltas or {}, **WHERE, trusted_key="ssh-ed25519 AAAA", said=said,
            canary=canary, wait=wait, pause=0,
        )  # fmt: skip

    def device(self, thing, *, fault="", echo=True, learned=None, runtime="1.0.5"):
        """Do what a device does: serve what it was told, or say why not."""
        told = devices.look(self.clients, thing).told
        text = json.loads(self.clients.shadows.get_thing_shadow(thingName=thing, shadowName=SHADOW)["payload"].read())
        models = {name: wanted.manifest for name, wanted in told.models.items()}
        report = {
            "runtime": runtime,
            "generation": told.generation,
            "phase": "failed" if fault else "serving",
            "models": models,
            "fault": fault,
        }
        if learned is not None:
            device = Telemetry()
            device.answered(NAME, 0.002, [{"products": [{"score": 1.0}]}] * 7)
            report["telemetry"] = json.loads(device.close()) | {"learned": {NAME: [models[NAME][:16], *learned]}}
        reported = {"report": json.dumps(report)} | ({"told": text["state"]["desired"]["told"]} if echo else {})
        self.clients.shadows.update_thing_shadow(
            thingName=thing, shadowName=SHADOW, payload=json.dumps({"state": {"reported": reported}})
        )

    def canaries(self, **how):
        for thing in devices.things(self.clients, f"{ENV.edge.thing_group}-canary"):
            self.device(thing, **how)


# --- publish ---------------------------------------------------------------------------------------------------------


def test_publish_creates_waits_compares_and_does_nothing_twice(aws):
    found = aws.made.release(1)
    said, _ = aws.publish(found)
    assert [name.split("@")[0] for name in said["created"]] == ["shipyard.edge-recommend", "shipyard.edge-runtime"]
    assert said["bytes_sent"] > 0
    assert aws.endpoint.calls.count("DescribeComponent") >= 4  # each was REQUESTED first
    again, _ = aws.publish(found)
    assert again["created"] == [] and again["bytes_sent"] == 0


def test_publish_makes_a_delta_from_each_other_release(aws):
    before, after = aws.made.release(1), aws.made.release(2)
    aws.publish(before)
    said, deltas = aws.publish(after, before)
    base = before.artifacts[0].manifest
    assert deltas[NAME][base].bytes < after.artifacts[0].files[0].bytes / 4
    key = delta_key(NAME, base, after.artifacts[0].manifest)
    patch = b"".join(aws.store.read(key))
    assert hashlib.sha256(patch).hexdigest() == deltas[NAME][base].sha256
    assert said["delta_bytes"] == {NAME: {base: deltas[NAME][base].bytes}}
    assert aws.publish(after, before)[1] == deltas


def test_throttling_is_tried_again(aws):
    aws.endpoint.faults = [Refused("ThrottlingException", 429)] * 2
    assert len(aws.publish(aws.made.release(1))[0]["created"]) == 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            Refused("AccessDeniedException", 403, "not authorized to perform"),
            "AccessDeniedException.*mend: check",
        ),
        (Refused("RequestAlreadyInProgressException", 400), "RequestAlreadyInProgress"),
    ],
)
def test_a_refusal_is_told_in_one_line(aws, fault, text):
    aws.endpoint.faults = [fault]
    with pytest.raises(ShipyardError, match=text):
        aws.publish(aws.made.release(1))
    # and the same command goes on
    assert len(aws.publish(aws.made.release(1))[0]["created"]) == 2


def test_a_component_that_does_not_become_deployable_is_an_error(aws):
    aws.endpoint.fate = "FAILED"
    with pytest.raises(ShipyardError, match="not deployable; value: 'FAILED'"):
        aws.publish(aws.made.release(1))


def test_a_version_that_somebody_else_made_is_an_error(aws):
    found = aws.made.release(1)
    aws.publish(found)
    for version in aws.endpoint.versions.values():
        version["recipe"]["Manifests"][0]["Artifacts"][0]["Digest"] = "AAAA"
    with pytest.raises(ShipyardError, match="Greengrass holds another content"):
        aws.publish(found)


def test_the_lock_holds_that_a_version_is_one_content(tmp_path, aws):
    one, two = aws.made.release(1), aws.made.release(2)
    lock(one, tmp_path)
    lock(one, tmp_path)
    lock(two, tmp_path)
    document = json.loads((tmp_path / "components.lock").read_text())
    assert len(document["shipyard.edge-recommend"]) == 2 and len(document["shipyard.edge-runtime"]) == 1
    changed = copy.deepcopy(two.artifacts[0].template)
    changed["recipe"]["ComponentDescription"] = "another"
    other = two.model_copy(update={"artifacts": (two.artifacts[0].model_copy(update={"template": changed}),)})
    with pytest.raises(ShipyardError, match="locked with another content"):
        lock(other, tmp_path)


# --- rollout ---------------------------------------------------------------------------------------------------------


def test_a_rollout_waits_for_the_canaries_and_goes_on_to_the_fleet(aws):
    found = aws.made.release(1)
    aws.publish(found)
    with pytest.raises(ShipyardError, match="canaries did not come in step; the fleet was left as it is"):
        aws.rollout(found)
    assert {d["deploymentStatus"] for d in aws.endpoint.deployments.values()} == {"CANCELED"}
    aws.canaries()
    said = aws.rollout(found)
    # what the canaries were told stands; their deployment was canceled and is made again
    assert said["canary"]["deployment"] and said["canary"]["told"] == 0
    assert said["fleet"]["deployment"] and said["fleet"]["told"] == 3
    again = aws.rollout(found)
    assert [again[g][k] for g in ("canary", "fleet") for k in ("deployment", "told")] == [None, 0, None, 0]
    deployed = aws.endpoint.deployments[said["fleet"]["deployment"]]
    assert deployed["components"]["aws.greengrass.Nucleus"]["componentVersion"] == ENV.edge.nucleus_version
    pinned = {name: entry["componentVersion"] for name, entry in deployed["components"].items()}
    assert pinned["shipyard.edge-recommend"] == found.artifacts[0].template["recipe"]["ComponentVersion"]
    abort = deployed["iotJobConfiguration"]["abortConfig"]["criteriaList"]
    assert [a["action"] for a in abort] == ["CANCEL"]


def test_a_rollout_ends_where_canaries_fail_and_a_rollback_brings_them_back(aws):
    one, two = aws.made.release(1), aws.made.release(2)
    aws.publish(one)
    with pytest.raises(ShipyardError):
        aws.rollout(one)
    aws.canaries()
    aws.rollout(one)
    _, deltas = aws.publish(two, one)
    with pytest.raises(ShipyardError, match=r"canaries failed; .*value: '2 of 2'"):
        aws.rollout(two, deltas, then=lambda: aws.canaries(fault="generation 2: golden answer 0 differs"))
    canary = f"{ENV.edge.thing_group}-canary-0"
    wanted = devices.look(aws.clients, canary).told.models[NAME]
    assert wanted.delta == deltas[NAME][one.artifacts[0].manifest]  # from what this device serves
    told = devices.status(aws.clients, ENV)
    assert told["canary"]["devices"] == {"in step": 0, "behind": 0, "silent": 0, "failed": 2}
    assert set(told["canary"]["faults"].values()) == {"generation 2: golden answer 0 differs"}
    assert told["fleet"]["devices"]["silent"] == 3  # they never spoke

    version = rollout.before(aws.clients, ENV.edge, **WHERE)
    assert version == one.version
    said = aws.rollout(one, canary=False)
    assert said["canary"]["told"] == 2 and said["canary"]["deployment"]
    assert said["fleet"]["told"] == 0 and said["fleet"]["deployment"] is None  # the fleet never left it
    back = devices.look(aws.clients, canary).told
    assert back.generation == said["generation"] > 2 and back.models[NAME].manifest == one.artifacts[0].manifest
    aws.canaries()
    assert devices.status(aws.clients, ENV)["canary"]["devices"]["in step"] == 2


def test_a_release_of_another_runtime_alone_waits_until_the_canaries_run_it(aws):
    one, two = aws.made.release(1), aws.made.release(1, runtime="1.0.6")
    aws.publish(one)
    with pytest.raises(ShipyardError):
        aws.rollout(one)
    aws.canaries()
    aws.rollout(one)
    aws.publish(two)
    # the models are the same, so the devices are told nothing, and what they have said is of the runtime before
    with pytest.raises(
        ShipyardError, match=r"canaries did not come in step; .*value: '0 of 2 in 0 s, 2 by another runtime than 1.0.6'"
    ):
        aws.rollout(two)
    fleet = [d for d in aws.endpoint.deployments.values() if d["targetArn"].endswith(f"/{ENV.edge.thing_group}")]
    assert [d["components"]["shipyard.edge-runtime"]["componentVersion"] for d in fleet] == ["1.0.5"]
    # a device says the version that its component's script was given, which is the component's own
    [artifact] = two.of("greengrass-runtime")
    start = artifact.template["recipe"]["Manifests"][0]["Lifecycle"]["startup"]["Script"]
    aws.canaries(runtime=start.split()[-2].strip('"'))
    said = aws.rollout(two)
    assert said["fleet"]["deployment"] and said["fleet"]["told"] == 0


def test_a_rollout_without_a_canary_is_refused_and_the_way_back_is_not(aws):
    found, group = aws.made.release(1), f"{ENV.edge.thing_group}-canary"
    aws.publish(found)
    for thing in devices.things(aws.clients, group):
        aws.clients.iot.remove_thing_from_thing_group(thingGroupName=group, thingName=thing)
    with pytest.raises(ShipyardError, match=rf"no canary .* 3 devices .*value: 'no device in {group}'; .*mend: move"):
        aws.rollout(found)
    assert aws.endpoint.deployments == {}
    assert aws.rollout(found, canary=False)["fleet"]["told"] == 3


def test_a_shadow_that_cannot_be_read_is_told_in_one_line():
    config = Config(connect_timeout=0.1, retries={"total_max_attempts": 1})
    shadows = boto3.client(
        "iot-data", region_name=ENV.region, endpoint_url="http://127.0.0.1:9", config=config,
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    with pytest.raises(ShipyardError, match=r"^edge: thing-1: .*127\.0\.0\.1:9.*mend: check the region"):
        devices.look_all(Clients(None, None, shadows), ["thing-1"])


def test_status_tells_who_is_behind_and_who_is_silent(aws, monkeypatch):
    found = aws.made.release(1)
    aws.publish(found)
    aws.rollout(found, canary=False)
    fleet = devices.things(aws.clients, ENV.edge.thing_group)
    aws.device(fleet[0])
    aws.device(fleet[1], echo=False)
    standing = devices.status(aws.clients, ENV)["fleet"]["devices"]
    assert standing == {"in step": 1, "behind": 1, "silent": 1, "failed": 0}
    monkeypatch.setattr(devices, "SILENT_S", -1)
    assert devices.status(aws.clients, ENV)["fleet"]["devices"]["silent"] == 3


def test_what_devices_have_learned_is_merged_once(aws, capsys):
    found = aws.made.release(1)
    aws.publish(found)
    aws.rollout(found, canary=False)
    things = [t for group in devices.groups(ENV.edge).values() for t in devices.things(aws.clients, group)]
    for number, thing in enumerate(things):
        aws.device(thing, learned=[1.2, 0.1 * number, 100])
    terms = Terms(devices=5, evidence=100)
    # the totals of all devices, beside where they stand
    counted = devices.status(aws.clients, ENV)
    assert [counted[label]["totals"][NAME]["requests"] for label in ("canary", "fleet")] == [2 * 7, 3 * 7]
    for _ in range(2):  # what was merged is not there a second time
        merged = edge._merge(found, aws.clients, ENV, terms, Reporter())
        assert merged["edge_recommend"]["correction"] == pytest.approx([1.2, 0.2], abs=1e-6)
        assert merged["edge_recommend"]["evidence"] == 500 and merged["edge_recommend"]["of"] == found.version
    with pytest.raises(ShipyardError, match=r"edge merge: edge_recommend: too few devices .*value: 5; allowed: 6"):
        edge._merge(found, aws.clients, ENV, dataclasses.replace(terms, devices=6), Reporter())
    # of the next release nothing is known yet
    with pytest.raises(ShipyardError, match="value: 0"):
        edge._merge(aws.made.release(2), aws.clients, ENV, terms, Reporter())


def test_what_a_device_is_told_is_what_it_reads(aws):
    found = aws.made.release(1)
    aws.publish(found)
    aws.rollout(found, canary=False)
    answer = aws.clients.shadows.get_thing_shadow(thingName=f"{ENV.edge.thing_group}-0", shadowName=SHADOW)
    text = json.loads(answer["payload"].read())["state"]["desired"]["told"]
    wanted = read_told(text).models[NAME]
    archive = found.artifacts[0]
    assert (wanted.manifest, wanted.sha256) == (archive.manifest, archive.files[0].sha256)
    with zipfile.ZipFile(aws.made.root / archive.key / f"{NAME}.zip") as stream:
        assert MANIFEST in stream.namelist()


def test_deployments_are_as_the_stack_makes_them(aws):
    """The stack's deployment, in the API's form, passes the same check."""
    pinned = rollout.deployment(aws.made.release(1), ENV.edge, "ssh-ed25519 AAAA")
    configuration = json.loads(pinned["shipyard.edge-runtime"]["configurationUpdate"]["merge"])
    assert configuration.keys() == {"models", "trustedKey"} and "@" not in configuration["models"]


def test_command_line_names_what_it_does_not_know(tmp_path):
    from conftest import shipyard

    done = shipyard("edge", "status", "--env", "nowhere", AWS_DEFAULT_REGION="us-east-1")
    assert done.returncode == 1 and "--env: no such environment; value: 'nowhere'" in done.stderr
    assert Path(ROOT / "fleet.toml").is_file()
