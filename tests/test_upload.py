"""The way of an artifact: into a store, out of it again on a target, and a release into the repository."""

import json
import os
import subprocess
import sys

import boto3
import pytest
from botocore.config import Config
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from models.release import File, artifact_key, attest, dump, files_digest, read_release, sign
from serve import fetch as fetching
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import MANIFEST, key_id, load_keys
from shipyard.publish import publish
from shipyard.s3 import S3Store
from shipyard.upload import FolderStore, open_store, upload
from tests.test_trust import sample_body, write_release

BUCKET = "shipyard-test"
CONTENTS = {"model.onnx": b"\0weights\xff" * 1000, "catalogue.json": b"{}", "serve/server.py": b"pass\n"}


# --- stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def aws(monkeypatch, moto, tmp_path):
    """The surroundings in which boto3 finds the local S3 and nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    surroundings = {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(aws):
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


class Folder:
    """A folder as a store, looked at from outside."""

    def __init__(self, root):
        self.root = root
        self.store = open_store(str(root))

    def contents(self):
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}

    def replace(self, key, content):
        (self.root / key).write_bytes(content)


class Bucket:
    """A bucket as a store, looked at from outside."""

    def __init__(self, client):
        self.client = client
        self.store = S3Store(BUCKET, client)

    def contents(self):
        listed = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {o["Key"]: self.client.get_object(Bucket=BUCKET, Key=o["Key"])["Body"].read() for o in listed}

    def replace(self, key, content):
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content, ChecksumAlgorithm="SHA256")


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    if request.param == "folder":
        return Folder(tmp_path / "store")
    return Bucket(request.getfixturevalue("s3"))


def make_artifact(folder, contents=CONTENTS):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = tuple(File(path=n, sha256=sha256_file(folder / n), bytes=len(c)) for n, c in contents.items())
    digest = files_digest(files)
    key = artifact_key("recommend", digest)
    return {"name": "recommend", "key": key, "digest": digest, "files": [file.model_dump() for file in files]}


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "bundle")


def quiet(what, done, total):
    assert 0 <= done <= total


# --- upload ----------------------------------------------------------------------------------------------------------


def test_every_file_lies_under_its_key(place, artifact, tmp_path):
    sent = upload(place.store, artifact, tmp_path / "bundle", quiet)
    assert sent == sum(map(len, CONTENTS.values()))
    assert place.contents() == {artifact["key"] + name: content for name, content in CONTENTS.items()}


def test_a_second_upload_sends_nothing(place, artifact, tmp_path):
    upload(place.store, artifact, tmp_path / "bundle", quiet)
    before = place.contents()
    assert upload(place.store, artifact, tmp_path / "bundle", quiet) == 0
    assert place.contents() == before


def test_an_interrupted_upload_goes_on(place, artifact, tmp_path):
    (tmp_path / "bundle" / "serve" / "server.py").rename(tmp_path / "server.py")
    with pytest.raises(ShipyardError, match="not the file of the release"):
        upload(place.store, artifact, tmp_path / "bundle", quiet)
    there = place.contents()
    assert artifact["key"] + "serve/server.py" not in there
    (tmp_path / "server.py").rename(tmp_path / "bundle" / "serve" / "server.py")
    sent = upload(place.store, artifact, tmp_path / "bundle", quiet)
    assert sent == sum(map(len, CONTENTS.values())) - sum(map(len, there.values()))
    assert len(place.contents()) == len(CONTENTS)


def test_progress_tells_the_artifact_and_ends_with_all(artifact, tmp_path):
    told = []
    size = sum(map(len, CONTENTS.values()))
    for _ in range(2):  # the second time nothing is sent, and all is done
        told.clear()
        upload(FolderStore(tmp_path / "store"), artifact, tmp_path / "bundle", lambda *what: told.append(what))
        assert {(what, total) for what, _, total in told} == {("upload recommend, bytes", size)}
        done = [count for _, count, _ in told]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, size)


def test_another_content_under_the_key_is_refused_and_kept(place, artifact, tmp_path):
    upload(place.store, artifact, tmp_path / "bundle", quiet)
    key = artifact["key"] + "catalogue.json"
    place.replace(key, b"[6, 6, 6]")
    with pytest.raises(ShipyardError) as fault:
        upload(place.store, artifact, tmp_path / "bundle", quiet)
    assert "the store holds another content" in str(fault.value)
    assert key in str(fault.value)
    assert place.contents()[key] == b"[6, 6, 6]"


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"[1, 3]"), lambda p: p.unlink()], ids=["other", "gone"])
def test_a_changed_local_file_is_refused_before_it_is_sent(place, artifact, tmp_path, change):
    change(tmp_path / "bundle" / "catalogue.json")
    with pytest.raises(ShipyardError) as fault:
        upload(place.store, artifact, tmp_path / "bundle", quiet)
    assert "catalogue.json: not the file of the release" in str(fault.value)
    assert artifact["key"] + "catalogue.json" not in place.contents()


@pytest.mark.parametrize("same", [True, False])
def test_an_object_without_a_checksum_is_read_and_compared(s3, artifact, tmp_path, same):
    content = CONTENTS["model.onnx"] if same else CONTENTS["model.onnx"][:-1] + b"!"
    s3.put_object(Bucket=BUCKET, Key="key", Body=content, ChecksumAlgorithm="CRC32")
    file = tmp_path / "bundle" / "model.onnx"
    assert S3Store(BUCKET, s3).holds("key", file, artifact["files"][0]["sha256"]) is same


def test_an_object_that_came_first_is_not_overwritten(s3, artifact, tmp_path):
    store = S3Store(BUCKET, s3)
    s3.put_object(Bucket=BUCKET, Key="key", Body=b"first")
    store.put("key", tmp_path / "bundle" / "model.onnx", artifact["files"][0]["sha256"], lambda count: None)
    assert Bucket(s3).contents()["key"] == b"first"


FULL_DISK = """
import resource, sys
from pathlib import Path
from shipyard.upload import FolderStore

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    FolderStore(Path(sys.argv[1])).put("artifacts/a/model.onnx", Path(sys.argv[2]), "", int)
except OSError:
    sys.exit(7)
"""


def test_a_failed_put_leaves_nothing_in_the_folder(artifact, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-c", FULL_DISK, str(store), str(tmp_path / "bundle" / "model.onnx")]
    assert subprocess.run(command, timeout=60).returncode == 7
    assert [path for path in store.rglob("*") if path.is_file()] == []


def test_a_failed_put_over_an_earlier_file_leaves_the_earlier_one(artifact, tmp_path):
    store = Folder(tmp_path / "store")
    (tmp_path / "store" / "artifacts" / "a").mkdir(parents=True)
    store.replace("artifacts/a/model.onnx", b"earlier")
    command = [sys.executable, "-c", FULL_DISK, str(store.root), str(tmp_path / "bundle" / "model.onnx")]
    assert subprocess.run(command, timeout=60).returncode == 7
    assert store.contents() == {"artifacts/a/model.onnx": b"earlier"}


def test_a_missing_bucket_is_told_in_one_line(s3, artifact, tmp_path):
    with pytest.raises(ShipyardError) as fault:
        upload(S3Store("shipyard-no-such-bucket", s3), artifact, tmp_path / "bundle", quiet)
    assert "check the bucket, your credentials and your rights" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_store_that_does_not_answer_is_told_in_one_line(aws, artifact, tmp_path):
    client = boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=Config(retries={"total_max_attempts": 1}))
    with pytest.raises(ShipyardError) as fault:
        upload(S3Store(BUCKET, client), artifact, tmp_path / "bundle", quiet)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("uri", ["s3://bucket/prefix", "https://bucket.example", "gs://bucket", "s3://"])
def test_what_is_no_store_is_refused(aws, uri):
    with pytest.raises(ShipyardError) as fault:
        open_store(uri)
    assert "cannot upload there" in str(fault.value)


def test_stores_are_chosen_by_their_address(aws, tmp_path):
    assert open_store("s3://bucket").bucket == open_store("s3://bucket/").bucket == "bucket"
    assert open_store(str(tmp_path)).root == tmp_path


# --- fetch -----------------------------------------------------------------------------------------------------------


class Bundle:
    """A bundle in a bucket, and the folder that it is fetched into, where something lies already."""

    def __init__(self, client, tmp_path):
        self.client, self.key = client, Ed25519PrivateKey.generate()
        self.folder, self.into, self.outside = tmp_path / "bundle", tmp_path / "target" / "into", tmp_path / "target"
        self.into.mkdir(parents=True)
        (self.into / "kept").write_text("kept")
        self.prefix = "artifacts/recommend/" + "ab" * 32 + "/"
        make_artifact(self.folder)
        self.seal()

    @property
    def trusted(self):
        return {key_id(self.key.public_key()): self.key.public_key()}

    def seal(self, **other):
        files = [{"path": name, "sha256": sha256_file(self.folder / name)} for name in CONTENTS]
        files += [{"path": path, "sha256": digest} for path, digest in other.items()]
        (self.folder / MANIFEST).write_text(json.dumps({"files": files}))
        self.attestation = attest("recommend", sha256_file(self.folder / MANIFEST), self.key)
        for name in (*CONTENTS, MANIFEST):
            self.put(name, (self.folder / name).read_bytes())

    def put(self, name, content):
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=content)

    def fetch(self, **other):
        arguments = {
            "uri": f"s3://{BUCKET}/{self.prefix}",
            "name": "recommend",
            "attestation": self.attestation,
            "keys": self.trusted,
            "into": self.into,
        }
        fetching.fetch(**arguments | other)

    def present(self):
        return {p.relative_to(self.outside).as_posix() for p in self.outside.rglob("*")}

    def refuse(self, said, **other):
        with pytest.raises(ShipyardError) as fault:
            self.fetch(**other)
        assert said in str(fault.value)
        assert "\n" not in str(fault.value)
        assert self.present() == {"into", "into/kept"}


@pytest.fixture
def bundle(s3, tmp_path):
    return Bundle(s3, tmp_path)


def test_a_whole_bundle_arrives(bundle):
    bundle.put("not-part-of-it.py", b"evil")
    bundle.fetch()
    files = {path.relative_to(bundle.into).as_posix() for path in bundle.into.rglob("*") if path.is_file()}
    assert files == {*CONTENTS, MANIFEST, "kept"}
    assert all((bundle.into / name).read_bytes() == content for name, content in CONTENTS.items())


def test_a_bundle_that_was_fetched_already_is_fetched_again(bundle):
    bundle.fetch()
    [name] = [name for name in CONTENTS if "/" in name]
    (bundle.into / name).write_bytes(b"of before")
    bundle.fetch()
    assert (bundle.into / name).read_bytes() == CONTENTS[name]


def test_what_a_killed_fetch_left_is_removed(bundle):
    (bundle.into / ".part").mkdir()
    (bundle.into / ".part" / "evil.py").write_text("evil")
    bundle.fetch()
    assert not (bundle.into / ".part").exists()
    assert not (bundle.into / "evil.py").exists()


@pytest.mark.parametrize("name", CONTENTS)
def test_a_tampered_object_is_refused(bundle, name):
    bundle.put(name, CONTENTS[name][:-1] + b"!")
    bundle.refuse(f"{name}: digest differs")


@pytest.mark.parametrize("name", [*CONTENTS, MANIFEST])
def test_a_missing_object_is_refused(bundle, name):
    bundle.client.delete_object(Bucket=BUCKET, Key=bundle.prefix + name)
    bundle.refuse("Not Found")


def test_another_artifacts_manifest_is_refused(bundle):
    bundle.refuse(
        "not the bundle that was attested as recommend",
        attestation=attest("search", sha256_file(bundle.folder / MANIFEST), bundle.key),
    )
    bundle.refuse("not the bundle that was attested as search", name="search")


def test_a_changed_manifest_is_refused_before_any_file_is_fetched(bundle):
    bundle.put(MANIFEST, (bundle.folder / MANIFEST).read_bytes() + b" ")
    bundle.client.delete_object(Bucket=BUCKET, Key=bundle.prefix + "model.onnx")
    bundle.refuse("not the bundle that was attested as recommend")


def test_an_untrusted_attestation_is_refused(bundle):
    stranger = Ed25519PrivateKey.generate().public_key()
    bundle.refuse("key that is not trusted", keys={key_id(stranger): stranger})


@pytest.mark.parametrize("path", ["../evil.py", "serve/../../evil.py", "../into/kept", "{outside}/evil.py"])
def test_a_path_out_of_the_bundle_is_refused_although_it_is_attested(bundle, path):
    path = path.format(outside=bundle.outside)
    bundle.seal(**{path: sha256_file(bundle.folder / "model.onnx")})
    bundle.put(path, CONTENTS["model.onnx"])
    bundle.refuse("a path leaves the bundle")
    assert (bundle.into / "kept").read_text() == "kept"


def test_a_missing_bucket_is_refused(bundle):
    bundle.refuse("Not Found", uri=f"s3://shipyard-no-such-bucket/{bundle.prefix}")


def run_fetch(bundle, *more):
    key = bundle.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    environment = os.environ | {"SHIPYARD_ATTESTATION": bundle.attestation, "SHIPYARD_TRUSTED_KEY": key}
    command = [sys.executable, "-m", "serve.fetch", f"s3://{BUCKET}/{bundle.prefix}", "--artifact", "recommend"]
    return subprocess.run(
        [*command, "--into", str(bundle.into), *more], env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_init_container_fetches_and_ends(bundle):
    result = run_fetch(bundle)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (bundle.into / "serve" / "server.py").read_bytes() == CONTENTS["serve/server.py"]


@pytest.mark.parametrize("more", [("--attestation", "nobody:AAAA"), ("--trusted-key", "none"), ("--artifact", "x")])
def test_the_init_container_fails_in_one_line(bundle, more):
    result = run_fetch(bundle, *more)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert bundle.present() == {"into", "into/kept"}


# --- publish ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def local(tmp_path, key):
    return write_release(tmp_path / "build" / "releases", key)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release_is_published_with_its_key(local, tmp_path, key):
    releases = tmp_path / "releases"
    found = publish(local, releases)
    assert tree(releases).keys() - {"components.lock"} == {local.name, f"keys/{key_id(key.public_key())}.pub"}
    assert read_release(releases / local.name, load_keys(releases / "keys")) == found
    assert (releases / local.name).read_bytes() == local.read_bytes()


def test_publishing_again_changes_nothing(local, tmp_path):
    releases = tmp_path / "releases"
    first = publish(local, releases)
    before = tree(releases)
    assert publish(local, releases) == first
    assert tree(releases) == before


def renumbered(local, key, number, digit="b"):
    """The release again with another artifact and a number of its own."""
    body = {k: v for k, v in json.loads(local.read_text()).items() if k not in ("signature", "schema", "version")}
    files = [file | {"sha256": digit * 64} for file in body["artifacts"][0]["files"]]
    made = {"files": files, "digest": files_digest(tuple(File.model_validate(file) for file in files))}
    body |= {"sequence": number, "artifacts": [body["artifacts"][0] | made, *body["artifacts"][1:]]}
    found = sign(body, "0.1.0", key)
    path = local.with_name(f"{found.version}.json")
    path.write_text(dump(found))
    return path


def test_releases_lie_beside_each_other(local, tmp_path, key):
    releases = tmp_path / "releases"
    publish(local, releases)
    # the same artifacts under other figures have the same number
    other = write_release(tmp_path / "build" / "releases", key, after=0.31)
    publish(other, releases)
    third = renumbered(local, key, 2)
    publish(third, releases)
    assert {path.name for path in releases.glob("*.json")} == {local.name, other.name, third.name}


def test_a_release_with_the_number_of_another_one_is_not_published(local, tmp_path, key):
    releases = tmp_path / "releases"
    publish(renumbered(local, key, 3), releases)
    before = tree(releases)
    for number in (2, 3):
        other = renumbered(local, key, number, "c")
        with pytest.raises(ShipyardError, match=rf"made, by its sequence; value: {number}; allowed: 4 or more;"):
            publish(other, releases)
    assert tree(releases) == before
    publish(renumbered(local, key, 4, "c"), releases)


def test_what_is_revoked_is_not_published_again(local, tmp_path, key):
    releases = tmp_path / "releases"
    publish(local, releases)
    (releases / f"{local.stem}.revoked").write_text("leaks a price list")
    with pytest.raises(ShipyardError, match="the release is revoked; value: 'leaks a price list'"):
        publish(local, releases)
    (releases / f"{local.stem}.revoked").unlink()
    (releases / "keys" / f"{key_id(key.public_key())}.revoked").write_text("the laptop was stolen")
    with pytest.raises(ShipyardError, match=r"signed by a key that is revoked.*the laptop was stolen"):
        publish(local, releases)


def test_another_content_under_a_published_version_is_refused(local, tmp_path):
    releases = tmp_path / "releases"
    publish(local, releases)
    before = tree(releases)
    stranger = Ed25519PrivateKey.generate()
    write_release(local.parent, stranger)
    document = json.loads(local.read_text())
    body = {k: v for k, v in document.items() if k not in ("signature", "schema", "version")}
    again = sign(body, "0.1.0", stranger)
    assert again.version == local.stem
    local.write_text(dump(again))
    with pytest.raises(ShipyardError) as fault:
        publish(local, releases)
    assert "published with other content" in str(fault.value)
    assert tree(releases) == before


def test_a_release_of_an_untrusted_signer_is_not_published(local, tmp_path):
    foreign = sign(sample_body(Ed25519PrivateKey.generate()), "0.1.0", Ed25519PrivateKey.generate())
    path = local.with_name(f"{foreign.version}.json")
    path.write_text(dump(foreign))
    with pytest.raises(ShipyardError, match="not trusted"):
        publish(path, tmp_path / "releases")
    assert not (tmp_path / "releases").exists()


def test_a_changed_release_is_not_published(local, tmp_path):
    local.write_text(local.read_text().replace('"examples": 200', '"examples": 2000'))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        publish(local, tmp_path / "releases")
    assert not (tmp_path / "releases").exists()
