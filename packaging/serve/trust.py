"""Trust in a release: who signed it, and whether a bundle on disk is the one that it names.

The chain is: trusted public key -> signature of the release -> digest of bundle.json -> digest of every file.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from serve.errors import ShipyardError

MANIFEST = "bundle.json"

Keys = Mapping[str, Ed25519PublicKey]
"""Trusted public keys by key id."""


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 as 64 hex digits, read in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed: `document` without its signature in the form of RFC 8785 (JCS)."""
    return rfc8785.dumps({key: value for key, value in document.items() if key != "signature"})


def key_id(key: Ed25519PublicKey) -> str:
    """Return the first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def parse_key(text: str, where: str) -> Ed25519PublicKey:
    """Read one public key in OpenSSH's one-line form ("ssh-ed25519 AAAA...").

    Raises:
        ShipyardError: it is no key, or a key of another kind.
    """
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ShipyardError(
            f"{where}: not a public key",
            value=text.strip()[:40],
            allowed="one line: ssh-ed25519 AAAA...",
            mend="restore the file from the repository",
        )
    return key


def load_keys(folder: Path) -> Keys:
    """Read the trusted public keys of `folder`/*.pub.

    Raises:
        ShipyardError: there is none, or one cannot be read.
    """
    keys = [parse_key(path.read_text(errors="replace"), str(path)) for path in sorted(folder.glob("*.pub"))]
    if not keys:
        raise ShipyardError(
            f"{folder}: no trusted key (*.pub)", mend="commit the public key of those who sign releases"
        )
    return {key_id(key): key for key in keys}


def verify(document: Mapping[str, Any], keys: Keys, where: str) -> None:
    """Check the signature of a release document against the trusted keys (Ed25519, RFC 8032).

    Raises:
        ShipyardError: it is unsigned, signed by a key that is not trusted, or was changed after signing.
    """
    signature = document.get("signature")
    if not isinstance(signature, dict) or signature.get("algorithm") != "ed25519":
        raise ShipyardError(
            f"{where}: not signed", allowed="an ed25519 signature", mend="take the file from the release"
        )
    key = keys.get(str(signature.get("key_id")))
    if key is None:
        raise ShipyardError(
            f"{where}: signed by a key that is not trusted",
            value=str(signature.get("key_id")),
            allowed=", ".join(keys),
            mend="if you trust the signer, add the public key to the trusted keys",
        )
    try:
        key.verify(base64.b64decode(str(signature.get("value")), validate=True), canonical(document))
    except (InvalidSignature, ValueError, rfc8785.CanonicalizationError):
        raise ShipyardError(
            f"{where}: changed after it was signed", mend="restore the file; never edit a release by hand"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ShipyardError: the file is missing, truncated, or is no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShipyardError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as fault:
        raise ShipyardError(f"{path}: not valid JSON: {fault}", mend="restore the file") from None
    if not isinstance(document, dict):
        raise ShipyardError(f"{path}: not a JSON object", value=type(document).__name__, mend="restore the file")
    return document


def check_bundle(folder: Path, manifest_sha256: str) -> dict[str, Any]:
    """Check every file of a bundle against bundle.json, and bundle.json against its digest in the release.

    Returns:
        The content of bundle.json.

    Raises:
        ShipyardError: a file is missing, is extra, is a link, or has another digest.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        raise ShipyardError(f"{folder}: no {MANIFEST}", mend="fetch the bundle again")
    if (actual := sha256_file(manifest)) != manifest_sha256:
        raise ShipyardError(
            f"{manifest}: not the one of the release",
            value=actual,
            allowed=manifest_sha256,
            mend="fetch the bundle again",
        )
    document = read_json(manifest)
    expected = {entry["path"]: entry["sha256"] for entry in document["files"]}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    for name in sorted(expected.keys() ^ (present - {MANIFEST})):
        state = "missing" if name in expected else "not part of the bundle"
        raise ShipyardError(f"{folder / name}: {state}", mend="fetch the bundle again into an empty folder")
    for name, digest in sorted(expected.items()):
        path = folder / name
        if path.is_symlink() or (actual := sha256_file(path)) != digest:
            found = "a link" if path.is_symlink() else actual
            raise ShipyardError(f"{path}: digest differs", value=found, allowed=digest, mend="fetch the bundle again")
    return document


def statement(name: str, manifest_sha256: str) -> bytes:
    """Return the bytes that attest a bundle: its artifact's name and the digest of its bundle.json, in RFC 8785's form."""
    return rfc8785.dumps({"schema": "shipyard.attestation/1", "name": name, "manifest": manifest_sha256})


def verify_attestation(name: str, manifest_sha256: str, attestation: str, keys: Keys, where: str) -> None:
    """Check that a trusted key attests a bundle; `attestation` is "key id:signature", the signature in Base64.

    Raises:
        ShipyardError: the key is not trusted, or it attests another bundle.
    """
    signer, _, value = attestation.partition(":")
    if signer not in keys:
        raise ShipyardError(
            f"{where}: attested by a key that is not trusted", value=signer, allowed=", ".join(keys),
            mend="if you trust the signer, add the public key to the trusted keys",
        )  # fmt: skip
    try:
        keys[signer].verify(base64.b64decode(value, validate=True), statement(name, manifest_sha256))
    except (InvalidSignature, ValueError):
        raise ShipyardError(
            f"{where}: not the bundle that was attested as {name}", value=manifest_sha256, mend="fetch the bundle again"
        ) from None
