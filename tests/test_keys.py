"""Keys over the years: rotation, revocation, a key in KMS, and older bundles that were signed once."""

import base64

import boto3
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from moto import mock_aws
from moto.kms.utils import ECDSAPrivateKey

from models.release import attest, dump, read_release, sign, trusted_key
from serve.errors import ShipyardError
from serve.trust import key_id, load_keys, parse_key, verify_attestation
from shipyard.keys import open_key, write_public
from shipyard.kms import KmsKey
from tests.test_trust import HEX, sample_body


@pytest.fixture
def kms(monkeypatch):
    """AWS's key service in this process, and nothing else of AWS.

    moto does not know MessageType DIGEST, for which AWS signs the 32 bytes as the hash that they are.
    """

    def sign_digest(self, message, signing_algorithm):
        assert (len(message), signing_algorithm) == (32, "ECDSA_SHA_256")
        return self.private_key.sign(message, ec.ECDSA(Prehashed(hashes.SHA256())))

    monkeypatch.setattr(ECDSAPrivateKey, "sign", sign_digest)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        yield boto3.client("kms")


def make_key(kms, spec="ECC_NIST_P256", usage="SIGN_VERIFY"):
    return kms.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]["KeyId"]


def write(folder, key):
    found = sign(sample_body(key), "0.1.0", key)
    folder.mkdir(exist_ok=True)
    path = folder / f"{found.version}.json"
    path.write_text(dump(found))
    return path


# --- KMS -------------------------------------------------------------------------------------------------------------


def test_a_key_in_kms_signs_what_its_public_half_verifies(kms, tmp_path):
    identity = make_key(kms)
    kms.create_alias(AliasName="alias/shipyard", TargetKeyId=identity)
    for name in (identity, "alias/shipyard"):
        key = open_key(f"kms:{name}", tmp_path / "not made")
        assert isinstance(key, KmsKey)
        write_public(key, tmp_path / "keys")
        keys = load_keys(tmp_path / "keys")
        release = read_release(write(tmp_path / "releases", key), keys)
        assert release.signature.algorithm == "ecdsa-p256-sha256"
        assert release.signature.key_id in keys
        for artifact in release.artifacts:
            verify_attestation(artifact.name, artifact.manifest, artifact.attestation, keys, "bundle")
        # a runtime has the key as one line alone
        line = trusted_key(release, keys)
        assert line.startswith("ecdsa-sha2-nistp256 ")
        assert key_id(parse_key(line, "line")) == release.signature.key_id
    assert not (tmp_path / "not made").exists()


def test_what_a_key_in_kms_signed_and_was_changed_is_refused(kms, tmp_path):
    key = open_key(f"kms:{make_key(kms)}", tmp_path / "none")
    write_public(key, tmp_path / "keys")
    path = write(tmp_path / "releases", key)
    path.write_text(path.read_text().replace("recommend", "recomment", 1))
    with pytest.raises(ShipyardError, match="changed after it was signed"):
        read_release(path, load_keys(tmp_path / "keys"))


def test_the_algorithm_must_be_the_keys_own(kms, tmp_path):
    key = open_key(f"kms:{make_key(kms)}", tmp_path / "none")
    write_public(key, tmp_path / "keys")
    path = write(tmp_path / "releases", key)
    path.write_text(path.read_text().replace('"ecdsa-p256-sha256"', '"ed25519"'))
    with pytest.raises(ShipyardError, match="not the algorithm of the key"):
        read_release(path, load_keys(tmp_path / "keys"))


@pytest.mark.parametrize(("spec", "usage"), [("RSA_2048", "SIGN_VERIFY"), ("ECC_NIST_P384", "SIGN_VERIFY")])
def test_a_key_of_another_kind_is_refused(kms, tmp_path, spec, usage):
    with pytest.raises(ShipyardError, match="not a key that Shipyard signs with") as fault:
        open_key(f"kms:{make_key(kms, spec, usage)}", tmp_path / "none")
    assert "ECC_NIST_P256" in str(fault.value)


def test_an_arn_is_looked_up_in_its_own_region(kms, tmp_path):
    there = boto3.client("kms", region_name="eu-west-1")
    made = there.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]
    key = open_key(f"kms:{made['Arn']}", tmp_path / "none")
    key.public.verify(key.sign(b"text"), b"text", ec.ECDSA(hashes.SHA256()))
    # an id is of the region of the surroundings, where there is no such key
    with pytest.raises(ShipyardError, match="NotFoundException"):
        open_key(f"kms:{made['KeyId']}", tmp_path / "none")


@pytest.mark.parametrize("name", ["arn:aws", "alias/none", "12345678-1234-1234-1234-123456789012"])
def test_a_missing_key_is_told_in_one_line(kms, tmp_path, name):
    with pytest.raises(ShipyardError) as fault:
        open_key(f"kms:{name}", tmp_path / "none")
    assert "kms:GetPublicKey" in str(fault.value) and "\n" not in str(fault.value)


def test_a_key_that_is_gone_when_it_should_sign_is_told_in_one_line(kms, tmp_path):
    kms.create_alias(AliasName="alias/shipyard", TargetKeyId=make_key(kms))
    key = open_key("kms:alias/shipyard", tmp_path / "none")
    kms.delete_alias(AliasName="alias/shipyard")
    with pytest.raises(ShipyardError) as fault:
        sign(sample_body(Ed25519PrivateKey.generate()), "0.1.0", key)
    assert "kms:Sign" in str(fault.value) and "\n" not in str(fault.value)


def test_a_curve_that_is_not_known_is_no_key():
    for curve in (ec.SECP384R1(), ec.SECP521R1()):
        public = ec.generate_private_key(curve).public_key()
        text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        with pytest.raises(ShipyardError, match="not a public key"):
            parse_key(text, "key")


# --- rotation and revocation -----------------------------------------------------------------------------------------


@pytest.fixture
def rotated(tmp_path):
    """A folder of releases by an old and a new key, both trusted."""
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for key in (old, new):
        write_public(key, tmp_path / "keys")
    return tmp_path / "keys", old, new


def test_after_a_rotation_both_keys_releases_are_read(rotated, tmp_path):
    folder, old, new = rotated
    for key in (old, new):
        read_release(write(tmp_path / "releases", key), load_keys(folder))


def test_what_a_revoked_key_signed_is_refused_with_the_reason(rotated, tmp_path):
    folder, old, new = rotated
    name = key_id(old.public_key())
    (folder / f"{name}.revoked").write_text("2026-11-01: laptop lost\n失窃\n")
    keys = load_keys(folder)
    with pytest.raises(ShipyardError, match=f"revoked; value: '{name}: 2026-11-01: laptop lost 失窃'") as fault:
        read_release(write(tmp_path / "releases", old), keys)
    assert f"allowed: {key_id(new.public_key())};" in str(fault.value)
    with pytest.raises(ShipyardError, match="revoked"):
        verify_attestation("recommend", HEX, attest("recommend", HEX, old), keys, "bundle")
    read_release(write(tmp_path / "releases", new), keys)


def test_a_revocation_that_names_no_key_is_an_error(rotated):
    folder, _, _ = rotated
    (folder / "0123456789abcdef.revoked").write_text("mistyped")
    with pytest.raises(ShipyardError, match="revokes no key that is here"):
        load_keys(folder)


def test_without_a_key_that_is_not_revoked_nothing_is_trusted(rotated):
    folder, old, new = rotated
    for key in (old, new):
        (folder / f"{key_id(key.public_key())}.revoked").write_text("")
    with pytest.raises(ShipyardError, match="no trusted key"):
        load_keys(folder)


# --- older bundles ---------------------------------------------------------------------------------------------------


def test_an_older_bundle_is_refused_where_a_later_one_has_served():
    key = Ed25519PrivateKey.generate()
    keys = {key_id(key.public_key()): key.public_key()}
    attestation = attest("recommend", HEX, key, 6)
    assert verify_attestation("recommend", HEX, attestation, keys, "bundle") == 6
    assert verify_attestation("recommend", HEX, attestation, keys, "bundle", oldest=6) == 6
    with pytest.raises(ShipyardError, match="of an older release") as fault:
        verify_attestation("recommend", HEX, attestation, keys, "bundle", oldest=7)
    assert "value: 6; allowed: 7 or later" in str(fault.value)


@pytest.mark.parametrize("number", ["7", "06", "6 ", "-6", "6e0", "", "٦", "9" * 16, "6:6"])
def test_the_number_of_an_attestation_cannot_be_changed(number):
    key = Ed25519PrivateKey.generate()
    keys = {key_id(key.public_key()): key.public_key()}
    signer, _, value = attest("recommend", HEX, key, 6).split(":")
    assert base64.b64decode(value)
    if number == "06":
        # the same number, written otherwise, says the same
        assert verify_attestation("recommend", HEX, f"{signer}:06:{value}", keys, "bundle") == 6
        return
    with pytest.raises(ShipyardError, match="not the bundle that was attested"):
        verify_attestation("recommend", HEX, f"{signer}:{number}:{value}", keys, "bundle")
