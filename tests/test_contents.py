"""Look into releases, bundles and stores: verify, inspect, diff and garbage collection."""

import json
import os
import struct
import time
import zipfile

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import helper, numpy_helper

from models.config import load_fleet
from models.release import File, artifact_key, attest, dump, files_digest, next_sequence, read_release, sign
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass.words import delta_key
from serve.trust import MANIFEST, load_keys
from shipyard.bundle import write_zip
from shipyard.diff import diff, diff_bundles, lines, same
from shipyard.gc import referring, unused
from shipyard.inspect import inspect
from shipyard.inspect import lines as told_lines
from shipyard.keys import write_public
from shipyard.upload import FolderStore, upload_release
from shipyard.verify import verify_bundle, verify_store
from tests.conftest import ROOT
from tests.test_trust import sample_body


def graph():
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    made = helper.make_graph([node], "g", [value], [out], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def seal(folder, name):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [
        {"path": p.relative_to(folder).as_posix(), "sha256": sha256_file(p), "bytes": p.stat().st_size} for p in paths
    ]
    (folder / MANIFEST).write_text(json.dumps({"name": name, "golden": [], "files": files}))


class Released:
    """A signed release of two small bundles, one of them zipped, and a store that holds it."""

    def __init__(self, root, key, text="{}", sequence=0):
        self.root, self.key, self.bundles = root, key, {}
        made = []
        for name in ("recommend", "edge-recommend"):
            folder = self.bundles[name] = root / name
            (folder / "目录").mkdir(parents=True)
            (folder / "model.onnx").write_bytes(graph())
            (folder / "目录" / "catalogue.json").write_text(text)
            seal(folder, name)
            upload = folder
            if name.startswith("edge"):
                upload = root / f"{name}-zip"
                upload.mkdir()
                write_zip(folder, upload / f"{name}.zip")
            made.append(self.artifact(name, folder, upload, sequence))
        body = sample_body(key)
        found = sign(body | {"artifacts": made, "sequence": sequence}, "0.1.0", key)
        self.folder = root / "releases"
        self.folder.mkdir()
        self.path = self.folder / f"{found.version}.json"
        self.path.write_text(dump(found))
        write_public(key, self.folder / "keys")
        self.release = read_release(self.path, self.keys)
        self.store = FolderStore(root / "store")

    @property
    def keys(self):
        return load_keys(self.folder / "keys")

    def artifact(self, name, folder, upload, sequence):
        paths = sorted(path for path in upload.rglob("*") if path.is_file() and path.name.isascii())
        # keys of a store are plain names; what a bundle calls its files is its own affair
        paths = [path for path in paths if path.relative_to(upload).as_posix().isascii()]
        files = tuple(
            File(path=p.relative_to(upload).as_posix(), sha256=sha256_file(p), bytes=p.stat().st_size) for p in paths
        )
        digest, manifest = files_digest(files), sha256_file(folder / MANIFEST)
        key = artifact_key(name, digest)
        for path in paths:
            target = self.root / "made" / key / path.relative_to(upload)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        return {
            "name": name, "submodel": None, "target": "cpu", "kind": "image-context", "key": key, "digest": digest,
            "manifest": manifest, "attestation": attest(name, manifest, self.key, sequence), "template": {},
            "files": [file.model_dump() for file in files],
        }  # fmt: skip

    def upload(self):
        return upload_release(self.release, self.root / "made", self.store, lambda *told: None)


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def made(tmp_path, key):
    return Released(tmp_path / "made", key)


def quiet(*told):
    pass


# --- verify ----------------------------------------------------------------------------------------------------------


def test_a_whole_store_is_verified_to_the_last_byte(made):
    sent = made.upload()
    assert verify_store(made.release, made.store, quiet) == sent == sum(a.bytes for a in made.release.artifacts)


@pytest.mark.parametrize("change", ["flip", "truncate", "empty", "remove", "swap"])
def test_a_store_that_was_tampered_with_is_found(made, change):
    made.upload()
    artifact = next(a for a in made.release.artifacts if a.name == "recommend")
    path = made.root / "store" / artifact.key / "model.onnx"
    content = path.read_bytes()
    if change == "remove":
        path.unlink()
    elif change == "swap":
        path.write_bytes((path.parent / MANIFEST).read_bytes())
    else:
        other = {"flip": content[:-1] + bytes([content[-1] ^ 1]), "truncate": content[:-1], "empty": b""}[change]
        path.write_bytes(other)
    with pytest.raises(ShipyardError, match=r"model\.onnx"):
        verify_store(made.release, made.store, quiet)


def test_folders_and_zips_are_verified_against_their_release(made):
    for name, path in made.bundles.items():
        assert verify_bundle(path, made.release, made.keys)["name"] == name
    assert verify_bundle(made.root / "edge-recommend-zip" / "edge-recommend.zip", made.release, made.keys)


def test_the_bundle_of_another_release_is_refused(made, key, tmp_path):
    other = Released(tmp_path / "other", key, text='{"another": 1}')
    with pytest.raises(ShipyardError, match="not a bundle of release"):
        verify_bundle(other.bundles["recommend"], made.release, made.keys)


def zipped(path, entries, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as stream:
        for name, content, mode in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            entry.compress_type = compress
            stream.writestr(entry, content)
    return path


FILE, LINK, DEVICE = 0o100644, 0o120777, 0o060644

HOSTILE = {
    "a path above it": [("../evil.py", b"", FILE)],
    "a path above it, further in": [("serve/../../evil.py", b"", FILE)],
    "an absolute path": [("/etc/passwd", b"", FILE)],
    "a path of Windows": [("..\\evil.py", b"", FILE)],
    "a drive": [("C:evil.py", b"", FILE)],
    "a link": [("model.onnx", b"/etc/passwd", LINK)],
    "a device": [("model.onnx", b"", DEVICE)],
    "a name twice": [("model.onnx", b"1", FILE), ("model.onnx", b"2", FILE)],
    "no manifest": [("model.onnx", b"1", FILE)],
    "nothing": [],
    "too many files": [(f"{i}", b"", FILE) for i in range(10_001)],
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_zip_is_refused(tmp_path, what):
    path = zipped(tmp_path / "bundle.zip", HOSTILE[what])
    with pytest.raises(ShipyardError) as fault:
        inspect(path)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = zipped(tmp_path / "bomb.zip", [("model.onnx", bytes(64 << 20), FILE)], zipfile.ZIP_DEFLATED)
    began = time.process_time()
    with pytest.raises(ShipyardError, match="unpacks to too much"):
        inspect(path)
    assert time.process_time() - began < 1


def test_a_bomb_that_lies_of_its_size_is_refused(tmp_path):
    path = zipped(tmp_path / "bomb.zip", [("model.onnx", bytes(1 << 20), FILE)], zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    for size in (1 << 20,):  # of both headers
        content = content.replace(struct.pack("<I", size), struct.pack("<I", 1000))
    path.write_bytes(content)
    with pytest.raises(ShipyardError, match=r"not a whole zip|unpacks to too much"):
        inspect(path)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_zip_is_refused(made, tmp_path, part):
    content = (made.root / "edge-recommend-zip" / "edge-recommend.zip").read_bytes()
    path = tmp_path / "cut.zip"
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ShipyardError, match="not a whole zip"):
        verify_bundle(path, made.release, made.keys)


def test_every_flipped_byte_of_a_zip_is_found_or_changes_nothing(made, tmp_path):
    source = made.root / "edge-recommend-zip" / "edge-recommend.zip"
    content, path = bytearray(source.read_bytes()), tmp_path / "flipped.zip"
    taken = 0
    for at in range(0, len(content), 3):
        content[at] ^= 0xFF
        path.write_bytes(content)
        content[at] ^= 0xFF
        try:
            verify_bundle(path, made.release, made.keys)
            taken += 1
        except ShipyardError:
            pass
    # times, versions and modes in the zip's own tables say nothing of a file; every byte of a file is found
    tables = len(content) - sum(entry.file_size for entry in zipfile.ZipFile(source).infolist())
    assert 3 * taken < tables / 2


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_a_bundle_is_told_with_its_graphs(made):
    for path in (made.bundles["recommend"], made.root / "edge-recommend-zip" / "edge-recommend.zip"):
        told = inspect(path)
        assert told["graphs"]["model.onnx"] == {
            "ir_version": 10, "opset": {"ai.onnx": 20}, "inputs": {"x": ["batch", 4]}, "outputs": {"y": ["batch", 4]},
            "operators": {"MatMul": 1}, "weights": {"float": told["graphs"]["model.onnx"]["weights"]["float"]},
        }  # fmt: skip
        assert told["bytes"] == sum(file["bytes"] for file in told["files"].values())
        assert "目录/catalogue.json" in told["files"]


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ShipyardError, match=f"no {MANIFEST}"):
        inspect(tmp_path)
    (tmp_path / "text.zip").write_text("no zip")
    for path in (tmp_path / "text.zip", tmp_path / "none.zip"):
        with pytest.raises(ShipyardError, match="not a whole zip"):
            inspect(path)


# --- diff ------------------------------------------------------------------------------------------------------------


def test_a_release_does_not_differ_from_itself(made):
    found = diff(made.release, made.release)
    assert same(found)
    assert list(lines(found))[1:] == ["  edge-recommend: the same", "  recommend: the same"]


def test_what_differs_is_told(made, key, tmp_path):
    other = Released(tmp_path / "other", key, text='{"more": 1}', sequence=4).release
    artifacts = tuple(a for a in other.artifacts if a.name == "recommend")
    body = other.model_copy(update={"artifacts": artifacts})
    found = diff(made.release, body)
    assert not same(found)
    assert found["sequence"] == [0, 4]
    assert found["artifacts"]["edge-recommend"]["state"] == "removed"
    changed = found["artifacts"]["recommend"]
    assert changed["state"] == "changed" and changed["files"] == {MANIFEST: "changed"}
    told = list(lines(found))
    assert any(line.startswith("- edge-recommend") for line in told)
    assert any(line.startswith("~ recommend") for line in told)


def test_two_bundles_are_compared_file_by_file(made, key, tmp_path):
    other = Released(tmp_path / "other", key, text='{"more": 1}')
    old, new = (inspect(released.bundles["recommend"]) for released in (made, other))
    zipped = inspect(made.root / "edge-recommend-zip" / "edge-recommend.zip")
    assert same(diff_bundles(inspect(made.bundles["edge-recommend"]), zipped))
    assert list(lines(diff_bundles(old, old)))[1:] == ["  the same"]
    found = diff_bundles(old, new)
    assert not same(found)
    assert found["files"] == {"目录/catalogue.json": "changed"} and found["graphs"] == {}
    assert "~ 目录/catalogue.json" in list(lines(found))
    assert any("model.onnx" in line for line in told_lines(old)) and next(told_lines(old)).startswith(
        "bundle recommend, "
    )


# --- garbage collection ----------------------------------------------------------------------------------------------


def fleet_of(tmp_path, release):
    text = (ROOT / "fleet.toml").read_text()
    fleet = load_fleet(ROOT / "fleet.toml")
    for name in {env.release for env in fleet.env.values()}:
        text = text.replace(name, release.version)
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return load_fleet(path)


def age(root, days):
    for path in root.rglob("*"):
        os.utime(path, (time.time() - days * 86_400,) * 2)


def test_what_a_release_refers_to_stays_and_the_rest_goes(made, key, tmp_path):
    old = Released(tmp_path / "old", key, text='{"old": 1}')
    old.store = made.store
    made.upload()
    old.upload()
    made.store.put("elsewhere/file", made.path, sha256_file(made.path), lambda count: None)
    age(tmp_path / "made" / "store", 30)
    found = unused(made.store, referring(fleet_of(tmp_path, made.release), [made.folder]), 7)
    keys = {item.key for item in found}
    assert keys == {a.key + file.path for a in old.release.artifacts for file in a.files}
    made.store.remove([item.key for item in found])
    verify_store(made.release, made.store, quiet)
    assert {item.key for item in made.store.objects("")} == {
        *(a.key + file.path for a in made.release.artifacts for file in a.files),
        "elsewhere/file",
    }
    assert unused(made.store, referring(fleet_of(tmp_path, made.release), [made.folder, old.folder]), 7) == []


def test_a_delta_goes_with_either_end_of_it(made, key, tmp_path):
    old = Released(tmp_path / "old", key, text='{"old": 1}')
    new, before = (
        next(a.manifest for a in of.release.artifacts if a.name == "edge-recommend") for of in (made, old)
    )  # fmt: skip
    ends = {"way": (before, new), "return": (new, before), "lost": ("0" * 64, new), "no longer": (new, "0" * 64)}
    for base, to in ends.values():
        made.store.put(delta_key("edge-recommend", base, to), made.path, sha256_file(made.path), lambda count: None)
    age(tmp_path / "made" / "store", 30)

    def going(*folders):
        found = {item.key for item in unused(made.store, referring(fleet_of(tmp_path, made.release), folders), 7)}
        return {name for name, pair in ends.items() if delta_key("edge-recommend", *pair) in found}

    assert going(made.folder, old.folder) == {"lost", "no longer"}
    assert going(made.folder) == set(ends)


def test_young_objects_and_those_that_an_upload_found_again_stay(made, key, tmp_path):
    old = Released(tmp_path / "old", key, text='{"old": 1}')
    old.store = made.store
    old.upload()
    releases = referring(fleet_of(tmp_path, made.release), [made.folder])
    assert unused(made.store, releases, 7) == []
    age(tmp_path / "made" / "store", 30)
    assert unused(made.store, releases, 7) != []
    assert old.upload() == 0  # nothing is sent, and a release is about to name them
    assert unused(made.store, releases, 7) == []


def test_without_knowing_what_is_referred_to_nothing_goes(made, tmp_path):
    with pytest.raises(ShipyardError, match="its release is not here"):
        referring(load_fleet(ROOT / "fleet.toml"), [made.folder])
    fleet = fleet_of(tmp_path, made.release)
    made.path.write_text(made.path.read_text().replace("recommend", "recomment", 1))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        referring(fleet, [made.folder])


# --- the order of releases -------------------------------------------------------------------------------------------


def test_a_new_release_has_the_next_number_and_the_same_artifacts_the_same(made, key, tmp_path):
    digests = {artifact.digest for artifact in made.release.artifacts}
    assert next_sequence(tmp_path / "none", digests) == 1
    later = Released(tmp_path / "later", key, text='{"later": 1}', sequence=7)
    assert next_sequence(later.folder, digests) == 8
    assert next_sequence(later.folder, {artifact.digest for artifact in later.release.artifacts}) == 7


def test_a_release_before_the_smallest_number_is_refused(made):
    with pytest.raises(ShipyardError, match=r"project\.minimum_sequence"):
        read_release(made.path, made.keys, oldest=1)
