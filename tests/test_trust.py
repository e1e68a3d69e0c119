"""Trust: signed releases, attested bundles and the key that signs; whatever was changed is refused."""

import base64
import copy
import json
import math
import multiprocessing
import re
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from models.release import File as ReleaseFile
from models.release import artifact_key, attest, dump, files_digest, read_release, sign, trusted_key
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST, check_bundle, key_id, load_keys, parse_key, verify, verify_attestation
from shipyard.keys import signing_key, write_public

HEX = "0123456789abcdef" * 4


# --- a sample release ------------------------------------------------------------------------------------------------


def interval(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def sample_artifact(name, key, content="1"):
    file = ReleaseFile(path="bundle.json", sha256=HEX, bytes=len(content))
    other = ReleaseFile(path="serve/server.py", sha256=(content * 64)[:64], bytes=7)
    digest = files_digest((file, other))
    return {
        "name": name,
        "submodel": name.replace("-", "_"),
        "target": "cpu",
        "kind": "image-context",
        "key": artifact_key(name, digest),
        "digest": digest,
        "manifest": HEX,
        "attestation": attest(name, HEX, key),
        "files": [file.model_dump(), other.model_dump()],
        "template": {"port": 8080, "environment": {"SHIPYARD_TRUSTED_KEY": "@TRUSTED_KEY@"}},
    }


def sample_body(key, *, after=0.3, content="1"):
    score = {
        "metric": "nDCG@10",
        "examples": 200,
        "households": 180,
        "baseline_name": "popular",
        "baseline": interval(0.25),
        "before": interval(0.2),
        "after": interval(after),
        "over_baseline": interval(0.05),
        "over_before": interval(0.1),
        "relative": interval(0.2),
        "metrics": {"ndcg@10": interval(after)},
        "calibration": {"method": "platt", "x": [1.0], "y": [-2.0]},
    }
    form = {"precision": "int8", "bytes": 10**6, "parity": 1e-3, "order": 0.99, "loss": 0.0, "latency_ms": 2.5}
    return {
        "sequence": 1,
        "profile": "small",
        "source": {
            "data": "sample",
            "data_sha256": HEX,
            "base": "encoder 1.0",
            "base_sha256": HEX,
            "code_sha256": HEX,
            "libraries": {"numpy": "2.4.6"},
        },
        "submodels": {
            "recommend": {
                "target": "cpu",
                "task": "recommend",
                "level": "product",
                "parameters_own": 10,
                "parameters_shared": 20,
                "bytes_own": 40,
                "bytes_shared": 80,
                "score": score,
                "formats": [form | {"precision": "fp32"}, form],
            }
        },
        "fusion": {
            "method": "weighted",
            "sources": ["search", "recommend"],
            "parameters": {"weights": [0.7, 0.3]},
            "examples": 200,
            "best_single_name": "search",
            "best_single": interval(0.4),
            "fused": interval(0.45),
            "over_best_single": interval(0.05),
        },
        "artifacts": [sample_artifact("recommend", key, content), sample_artifact("edge-model", key, content)],
    }


def write_release(folder, key, **changes):
    """Write a signed sample release, and its key into `keys` beside it; return its path."""
    release = sign(sample_body(key, **changes), "0.1.0", key)
    write_public(key, folder / "keys")
    path = folder / f"{release.version}.json"
    path.write_text(dump(release), encoding="utf-8")
    return path


def one_line(fault):
    text = str(fault.value)
    assert "\n" not in text
    return text


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


@pytest.fixture
def path(tmp_path, key):
    return write_release(tmp_path, key)


@pytest.fixture
def keys(path):
    return load_keys(path.parent / "keys")


def rewrite(path, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def put(document, place, value):
    *way, last = place
    for part in way:
        document = document[part]
    document[last] = value


# --- releases --------------------------------------------------------------------------------------------------------


def test_a_release_is_read_as_it_was_signed(path, keys, key):
    release = read_release(path, keys)
    body = sample_body(key)
    assert release.submodels["recommend"].score.after.value == body["submodels"]["recommend"]["score"]["after"]["value"]
    assert release.artifacts[0].bytes == 1 + 7
    assert release == sign(body, "0.1.0", key)
    assert dump(release) == path.read_text(encoding="utf-8")
    assert trusted_key(release, keys).startswith("ssh-ed25519 ")


def test_white_space_and_the_order_of_keys_are_not_content(path, keys):
    before = read_release(path, keys)
    rewrite(path, lambda document: document.update({k: document.pop(k) for k in sorted(document, reverse=True)}))
    assert read_release(path, keys) == before


SCORE = ("submodels", "recommend", "score")
FORM = ("submodels", "recommend", "formats", 0)
TAMPERED = [
    ((*SCORE, "after", "value"), 0.9),
    ((*SCORE, "after", "value"), math.nan),
    ((*SCORE, "examples"), 201),
    ((*SCORE, "metric"), "recall@10"),
    ((*FORM, "latency_ms"), 0.1),
    ((*FORM, "loss"), -0.5),
    (("submodels", "recommend", "target"), "gpu"),
    (("submodels", "recommend", "parameters_own"), 9),
    (("submodels", "more"), {}),
    (("source", "data_sha256"), HEX[::-1]),
    (("source", "libraries", "numpy"), "1.0.0"),
    (("profile",), "quick"),
    (("profile",), "\ud800"),
    (("schema",), "shipyard.release/1"),
    (("version",), "0.1.1-g000000000000"),
    (("unknown",), 1),
    (("artifacts",), []),
    (("artifacts", 0, "name"), "search"),
    (("artifacts", 0, "key"), artifact_key("recommend", HEX)),
    (("artifacts", 0, "digest"), HEX),
    (("artifacts", 0, "manifest"), HEX[::-1]),
    (("artifacts", 0, "attestation"), "0123456789abcdef:AAAA"),
    (("artifacts", 0, "submodel"), None),
    (("artifacts", 0, "unknown"), None),
    (("artifacts", 0, "files", 0, "sha256"), HEX[::-1]),
    (("artifacts", 0, "files", 0, "bytes"), 2),
    (("artifacts", 0, "files", 0, "path"), "bundle2.json"),
    (("artifacts", 0, "template", "port"), 8081),
    (("artifacts", 0, "template", "environment", "SHIPYARD_TRUSTED_KEY"), "ssh-ed25519 AAAA"),
]


@pytest.mark.parametrize(("place", "value"), TAMPERED, ids=lambda v: ".".join(map(str, v)) if type(v) is tuple else "")
def test_a_changed_field_is_refused(path, keys, place, value):
    rewrite(path, lambda document: put(document, place, value))
    with pytest.raises(ShipyardError) as fault:
        read_release(path, keys)
    assert "changed after it was signed" in one_line(fault)


def test_a_removed_field_is_refused(path, keys):
    rewrite(path, lambda document: document["source"].pop("libraries"))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        read_release(path, keys)


def test_another_signature_is_refused(path, keys, key):
    value = base64.b64encode(key.sign(b"something else")).decode()
    rewrite(path, lambda document: put(document, ("signature", "value"), value))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        read_release(path, keys)


GARBAGE = ["", "not base64!", "AAA", "é", "签名", "AAAA\n", "A" * 88, None, 7, ["AAAA"]]


@pytest.mark.parametrize("value", GARBAGE, ids=repr)
def test_a_signature_of_garbage_is_refused(path, keys, value):
    rewrite(path, lambda document: put(document, ("signature", "value"), value))
    with pytest.raises(ShipyardError) as fault:
        read_release(path, keys)
    assert "changed after it was signed" in one_line(fault)


@pytest.mark.parametrize("signature", [None, {}, [], "ed25519", {"algorithm": "none", "key_id": "", "value": ""}])
def test_an_unsigned_release_is_refused(path, keys, signature):
    rewrite(path, lambda document: document.update(signature=signature))
    with pytest.raises(ShipyardError) as fault:
        read_release(path, keys)
    assert "not signed" in one_line(fault)


def test_a_release_without_a_signature_is_refused(path, keys):
    rewrite(path, lambda document: document.pop("signature"))
    with pytest.raises(ShipyardError, match="not signed"):
        read_release(path, keys)


def test_a_release_of_an_untrusted_signer_is_refused(tmp_path, keys):
    stranger = Ed25519PrivateKey.generate()
    foreign = write_release(tmp_path / "foreign", stranger)
    with pytest.raises(ShipyardError) as fault:
        read_release(foreign, keys)
    assert "not trusted" in one_line(fault)
    assert key_id(stranger.public_key()) in str(fault.value)


def test_a_foreign_signature_under_a_trusted_key_id_is_refused(tmp_path, keys):
    foreign = write_release(tmp_path / "foreign", Ed25519PrivateKey.generate())
    rewrite(foreign, lambda document: put(document, ("signature", "key_id"), next(iter(keys))))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        read_release(foreign, keys)


def test_a_renamed_release_is_refused(path, keys):
    renamed = path.rename(path.with_name("0.1.0-g000000000000.json"))
    with pytest.raises(ShipyardError) as fault:
        read_release(renamed, keys)
    assert "its name is not its version" in one_line(fault)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"schema": ', "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"release"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "not signed"),
    ],
    ids=repr,
)
def test_what_is_no_release_is_refused(path, keys, content, said):
    path.write_bytes(content)
    with pytest.raises(ShipyardError) as fault:
        read_release(path, keys)
    assert said in one_line(fault)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_release_is_refused(path, keys, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ShipyardError, match="not valid JSON"):
        read_release(path, keys)


def test_a_file_nested_too_deeply_is_refused(path):
    path.write_bytes(b'{"a": ' + b"[" * 100_000)
    with pytest.raises(ShipyardError) as fault:
        read_json(path)
    assert "not valid JSON" in one_line(fault)


def test_a_missing_release_is_refused(tmp_path, keys):
    with pytest.raises(ShipyardError, match="no such file"):
        read_release(tmp_path / "none.json", keys)


def test_a_number_that_json_cannot_hold_exactly_is_refused(keys, key):
    document = {"signature": {"algorithm": "ed25519", "key_id": next(iter(keys)), "value": ""}, "bytes": 2**60}
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        verify(document, keys, "release")


def test_the_same_content_has_the_same_version_whoever_signs(key):
    body = sample_body(key)
    again, other = sign(copy.deepcopy(body), "0.1.0", key), sign(body, "0.1.0", Ed25519PrivateKey.generate())
    assert sign(body, "0.1.0", key) == again
    assert other.version == again.version
    assert other.signature != again.signature
    assert re.fullmatch(r"0\.1\.0-g[0-9a-f]{12}", again.version)


@pytest.mark.parametrize("changes", [{"after": 0.30001}, {"content": "2"}])
def test_another_content_has_another_version(key, changes):
    assert sign(sample_body(key, **changes), "0.1.0", key).version != sign(sample_body(key), "0.1.0", key).version


def test_signing_leaves_its_input_as_it_was(key):
    body = sample_body(key)
    before = copy.deepcopy(body)
    sign(body, "0.1.0", key)
    assert body == before


BAD_PATHS = ["/artifacts/a/", "../a/", "a/../b/", "a/./b", ".", "..", "a//b", "s3://bucket/a", "a b", "a\\b", "", "/"]


@pytest.mark.parametrize("bad", BAD_PATHS)
def test_an_artifacts_key_stays_below_the_bucket(key, bad):
    body = sample_body(key)
    body["artifacts"][0]["key"] = bad
    with pytest.raises(ShipyardError) as fault:
        sign(body, "0.1.0", key)
    assert "artifacts.0.key: not allowed" in one_line(fault)


@pytest.mark.parametrize("bad", BAD_PATHS)
def test_a_files_path_stays_below_its_artifact(key, bad):
    body = sample_body(key)
    body["artifacts"][0]["files"][0]["path"] = bad
    with pytest.raises(ShipyardError) as fault:
        sign(body, "0.1.0", key)
    assert "artifacts.0.files.0.path: not allowed" in one_line(fault)


def test_a_digest_that_does_not_cover_its_files_is_not_signed(key):
    body = sample_body(key)
    body["artifacts"][0]["files"].pop()
    with pytest.raises(ShipyardError) as fault:
        sign(body, "0.1.0", key)
    assert "does not cover its files" in one_line(fault)


def test_a_figure_that_is_no_number_is_not_signed(key):
    with pytest.raises((ShipyardError, ValueError)):
        sign(sample_body(key, after=math.nan), "0.1.0", key)


# --- trusted keys ----------------------------------------------------------------------------------------------------


def openssh(private):
    return private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def key_texts():
    good = openssh(Ed25519PrivateKey.generate())
    return {
        "empty": "",
        "garbage": "not a key",
        "Chinese": "密钥",
        "rsa": openssh(rsa.generate_private_key(65537, 2048)),
        "cut off": good[:40],
        "without its data": "ssh-ed25519",
        "data of nothing": "ssh-ed25519 AAAA",
        "not base64": "ssh-ed25519 !!!!",
        "a private key": Ed25519PrivateKey.generate()
        .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        .decode(),
    }


@pytest.mark.parametrize("what", key_texts())
def test_what_is_no_public_key_is_refused(tmp_path, what):
    (tmp_path / "signer.pub").write_text(key_texts()[what], encoding="utf-8")
    with pytest.raises(ShipyardError) as fault:
        load_keys(tmp_path)
    assert "not a public key" in one_line(fault)


def test_a_key_file_of_bytes_is_refused(tmp_path):
    (tmp_path / "signer.pub").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ShipyardError, match="not a public key"):
        load_keys(tmp_path)


def test_a_public_key_survives_its_file(tmp_path, key):
    file = write_public(key, tmp_path)
    assert file.stem == key_id(key.public_key())
    assert load_keys(tmp_path).keys() == {file.stem}
    assert parse_key(file.read_text(), "key") == key.public_key()


def test_a_folder_without_keys_trusts_nobody(tmp_path):
    with pytest.raises(ShipyardError, match="no trusted key"):
        load_keys(tmp_path)


# --- attestations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trusted(key):
    return {key_id(key.public_key()): key.public_key()}


def test_an_attestation_holds_for_its_bundle(key, trusted):
    verify_attestation("recommend", HEX, attest("recommend", HEX, key), trusted, "bundle")


def test_attestations_of_two_artifacts_cannot_be_swapped(key, trusted):
    manifests = {"recommend": HEX, "search": HEX[::-1]}
    for mine, other in (("recommend", "search"), ("search", "recommend")):
        for name, manifest in ((mine, manifests[other]), (other, manifests[mine])):
            with pytest.raises(ShipyardError) as fault:
                verify_attestation(name, manifest, attest(mine, manifests[mine], key), trusted, "bundle")
            assert f"not the bundle that was attested as {name}" in one_line(fault)


def test_an_attestation_by_another_key_is_refused(trusted):
    with pytest.raises(ShipyardError) as fault:
        verify_attestation("recommend", HEX, attest("recommend", HEX, Ed25519PrivateKey.generate()), trusted, "bundle")
    assert "key that is not trusted" in one_line(fault)


def test_an_attestation_under_another_keys_name_is_refused(trusted):
    _, _, value = attest("recommend", HEX, Ed25519PrivateKey.generate()).partition(":")
    with pytest.raises(ShipyardError, match="not the bundle that was attested"):
        verify_attestation("recommend", HEX, f"{next(iter(trusted))}:{value}", trusted, "bundle")


@pytest.mark.parametrize("value", [text for text in GARBAGE if isinstance(text, str)], ids=repr)
def test_an_attestation_of_garbage_is_refused(trusted, value):
    with pytest.raises(ShipyardError) as fault:
        verify_attestation("recommend", HEX, f"{next(iter(trusted))}:{value}", trusted, "bundle")
    assert "not the bundle that was attested" in one_line(fault)


@pytest.mark.parametrize("text", ["", ":", "nobody", "nobody:AAAA", "证明"])
def test_an_attestation_of_nobody_is_refused(trusted, text):
    with pytest.raises(ShipyardError, match="key that is not trusted"):
        verify_attestation("recommend", HEX, text, trusted, "bundle")


def test_a_releases_signature_is_no_attestation(key, trusted):
    release = sign(sample_body(key), "0.1.0", key)
    with pytest.raises(ShipyardError, match="not the bundle that was attested"):
        text = f"{release.signature.key_id}:{release.signature.value}"
        verify_attestation("recommend", release.artifacts[0].manifest, text, trusted, "bundle")


# --- bundles on disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "serve").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(range(256)))
    (folder / "serve" / "server.py").write_text("pass\n")
    files = [
        {"path": p.relative_to(folder).as_posix(), "sha256": sha256_file(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    return folder, sha256_file(folder / MANIFEST)


def test_a_whole_bundle_is_accepted(bundle):
    folder, manifest = bundle
    assert [f["path"] for f in check_bundle(folder, manifest)["files"]] == ["model.onnx", "serve/server.py"]


@pytest.mark.parametrize("at", [0, 100, 255])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_refused(bundle, at, bit):
    folder, manifest = bundle
    content = bytearray((folder / "model.onnx").read_bytes())
    content[at] ^= 1 << bit
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ShipyardError) as fault:
        check_bundle(folder, manifest)
    assert "model.onnx: digest differs" in one_line(fault)


@pytest.mark.parametrize("name", ["model.onnx", "serve/server.py"])
def test_a_missing_file_is_refused(bundle, name):
    folder, manifest = bundle
    (folder / name).unlink()
    with pytest.raises(ShipyardError) as fault:
        check_bundle(folder, manifest)
    assert f"{name}: missing" in one_line(fault)


@pytest.mark.parametrize("name", ["more.py", "serve/__init__.py", ".hidden", "serve/bundle.json"])
def test_a_file_more_is_refused(bundle, name):
    folder, manifest = bundle
    (folder / name).write_text("")
    with pytest.raises(ShipyardError) as fault:
        check_bundle(folder, manifest)
    assert f"{name}: not part of the bundle" in one_line(fault)


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
def test_a_link_to_the_same_content_is_refused(bundle, tmp_path, name):
    folder, manifest = bundle
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShipyardError) as fault:
        check_bundle(folder, manifest)
    assert {"model.onnx": "a link", MANIFEST: "no bundle.json"}[name] in one_line(fault)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_more_is_refused(bundle, tmp_path, target):
    folder, manifest = bundle
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / target)
    with pytest.raises(ShipyardError, match="more: not part of the bundle"):
        check_bundle(folder, manifest)


def test_a_folder_that_is_a_link_is_refused(bundle, tmp_path):
    folder, manifest = bundle
    (folder / "serve").rename(tmp_path / "elsewhere")
    (folder / "serve").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShipyardError):
        check_bundle(folder, manifest)


def test_a_changed_manifest_is_refused(bundle):
    folder, manifest = bundle
    (folder / "model.onnx").write_bytes(b"evil")
    document = json.loads((folder / MANIFEST).read_text())
    document["files"][0]["sha256"] = sha256_file(folder / "model.onnx")
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ShipyardError) as fault:
        check_bundle(folder, manifest)
    assert "bundle.json: not the one of the release" in one_line(fault)


# --- the signing key -------------------------------------------------------------------------------------------------


def raw(key):
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    file = tmp_path / "shipyard" / "signing.pem"
    first = signing_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert raw(signing_key(file)) == raw(first)
    assert [p.name for p in file.parent.iterdir()] == ["signing.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path, mode):
    file = tmp_path / "signing.pem"
    signing_key(file)
    file.chmod(mode)
    with pytest.raises(ShipyardError) as fault:
        signing_key(file)
    assert oct(mode) in one_line(fault)
    assert "chmod 600" in str(fault.value)


def private_texts():
    def pem(key, encryption):
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    good = pem(Ed25519PrivateKey.generate(), NoEncryption())
    return {
        "empty": b"",
        "garbage": b"garbage",
        "cut off": good[: len(good) // 2],
        "rsa": pem(rsa.generate_private_key(65537, 2048), NoEncryption()),
        "bytes": bytes(range(256)),
    }


@pytest.mark.parametrize("what", private_texts())
def test_what_is_no_private_key_is_refused_and_kept(tmp_path, what):
    file, content = tmp_path / "signing.pem", private_texts()[what]
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ShipyardError) as fault:
        signing_key(file)
    assert "not an Ed25519 private key" in one_line(fault)
    assert file.read_bytes() == content


def test_a_private_key_with_a_password_is_refused(tmp_path):
    file = tmp_path / "signing.pem"
    key = Ed25519PrivateKey.generate()
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    file.chmod(0o600)
    with pytest.raises(ShipyardError) as fault:
        signing_key(file)
    assert "not an Ed25519 private key" in one_line(fault)


def make_key(file, barrier, found):
    barrier.wait()
    found.put(raw(signing_key(file)))


def test_processes_at_once_end_with_one_key(tmp_path):
    # forked, for a spawned process would import this file by a name that it does not have there
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        file = tmp_path / str(attempt) / "signing.pem"
        barrier, found = context.Barrier(2), context.Queue()
        processes = [context.Process(target=make_key, args=(file, barrier, found)) for _ in range(2)]
        for process in processes:
            process.start()
        keys = {found.get(timeout=30) for _ in processes}
        for process in processes:
            process.join(timeout=30)
        assert keys == {raw(signing_key(file))}
        assert [p.name for p in file.parent.iterdir()] == ["signing.pem"]
