"""Trust in a release: who signed it, and whether a bundle on disk is the one that it names.

The chain is: trusted public key -> signature of the release -> digest of bundle.json -> digest of every file.

Keys are Ed25519 (RFC 8032), or P-256 for ECDSA with SHA-256 (FIPS 186-5), which a cloud's key service signs with. A key that
is no longer used stays trusted for what it has signed; one that was lost is revoked, and nothing that it signed is trusted.
"""

import argparse
import base64
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from serve.errors import ShipyardError
from serve.files import read_json, sha256_file

MANIFEST = "bundle.json"

ALGORITHMS = ("ed25519", "ecdsa-p256-sha256")

PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Revoked:
    """A key that is no longer trusted, and why."""

    reason: str


Keys = Mapping[str, PublicKey | Revoked]
"""Public keys by key id: those that are trusted, and those that no longer are."""


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed: `document` without its signature in the form of RFC 8785 (JCS)."""
    return rfc8785.dumps({key: value for key, value in document.items() if key != "signature"})


def key_id(key: PublicKey) -> str:
    """Return the first 16 hex digits of the SHA-256 of the raw Ed25519 key, or of the point on P-256, not compressed."""
    if isinstance(key, Ed25519PublicKey):
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    else:
        raw = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return hashlib.sha256(raw).hexdigest()[:16]


def algorithm(key: PublicKey) -> str:
    """Return which of ALGORITHMS a key signs by."""
    return ALGORITHMS[not isinstance(key, Ed25519PublicKey)]


def parse_key(text: str, where: str) -> PublicKey:
    """Read one public key in OpenSSH's one-line form ("ssh-ed25519 AAAA..." or "ecdsa-sha2-nistp256 AAAA...").

    Raises:
        ShipyardError: it is no key, or a key of another kind.
    """
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    on_curve = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    if not isinstance(key, Ed25519PublicKey | ec.EllipticCurvePublicKey) or not (
        on_curve or isinstance(key, Ed25519PublicKey)
    ):
        raise ShipyardError(
            f"{where}: not a public key",
            value=text.strip()[:40],
            allowed="one line: ssh-ed25519 AAAA... or ecdsa-sha2-nistp256 AAAA...",
            mend="restore the file from the repository",
        )
    return key


def load_keys(folder: Path) -> Keys:
    """Read the public keys of `folder`/*.pub; one beside which <key id>.revoked lies is revoked, for what is written there.

    Raises:
        ShipyardError: there is no trusted key, one cannot be read, or a revocation names none.
    """
    parsed = [parse_key(path.read_text(errors="replace"), str(path)) for path in sorted(folder.glob("*.pub"))]
    keys: dict[str, PublicKey | Revoked] = {key_id(key): key for key in parsed}
    for path in sorted(folder.glob("*.revoked")):
        if path.stem not in keys:
            # a mistyped one must not leave its key trusted in silence
            raise ShipyardError(
                f"{path}: revokes no key that is here", allowed=", ".join(keys), mend="name it KEY_ID.revoked"
            )
        keys[path.stem] = Revoked(" ".join(path.read_text(errors="replace").split())[:200] or "no reason is given")
    if all(isinstance(key, Revoked) for key in keys.values()):
        raise ShipyardError(
            f"{folder}: no trusted key (*.pub)", mend="commit the public key of those who sign releases"
        )
    return keys


def _verify(message: bytes, signature: str, signer: str, keys: Keys, where: str, changed: ShipyardError) -> PublicKey:
    """Check a signature in Base64 by the key `signer`; return that key, or raise `changed` where it does not fit."""
    key = keys.get(signer)
    if isinstance(key, Revoked):
        raise ShipyardError(
            f"{where}: signed by a key that is revoked", value=f"{signer}: {key.reason}", allowed=_trusted(keys),
            mend="make the release again and sign it with a trusted key",
        )  # fmt: skip
    if key is None:
        raise ShipyardError(
            f"{where}: signed by a key that is not trusted", value=signer, allowed=_trusted(keys),
            mend="if you trust the signer, add the public key to the trusted keys",
        )  # fmt: skip
    try:
        given = base64.b64decode(signature, validate=True)
        if isinstance(key, Ed25519PublicKey):
            key.verify(given, message)
        else:
            key.verify(given, message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise changed from None
    return key


def _trusted(keys: Keys) -> str:
    return ", ".join(name for name, key in keys.items() if not isinstance(key, Revoked))


def verify(document: Mapping[str, Any], keys: Keys, where: str) -> PublicKey:
    """Check the signature of a release document against the trusted keys; return the key that signed it.

    Raises:
        ShipyardError: it is unsigned, signed by a key that is not trusted or is revoked, or was changed after signing.
    """
    changed = ShipyardError(
        f"{where}: changed after it was signed", mend="restore the file; never edit a release by hand"
    )
    signature = document.get("signature")
    if not isinstance(signature, dict) or signature.get("algorithm") not in ALGORITHMS:
        raise ShipyardError(
            f"{where}: not signed",
            allowed=f"a signature by {' or '.join(ALGORITHMS)}",
            mend="take the file from the release",
        )
    try:
        message = canonical(document)
    except rfc8785.CanonicalizationError:
        raise changed from None
    key = _verify(message, str(signature.get("value")), str(signature.get("key_id")), keys, where, changed)
    if signature["algorithm"] != algorithm(key):
        raise ShipyardError(
            f"{where}: not the algorithm of the key that signed it", value=signature["algorithm"],
            allowed=algorithm(key), mend="take the file from the release",
        )  # fmt: skip
    return key


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


def statement(name: str, manifest_sha256: str, sequence: int) -> bytes:
    """Return the bytes that attest a bundle, in RFC 8785's form: name, digest of bundle.json, number of its release."""
    return rfc8785.dumps(
        {"schema": "shipyard.attestation/2", "name": name, "manifest": manifest_sha256, "sequence": sequence}
    )


def verify_attestation(
    name: str, manifest_sha256: str, attestation: str, keys: Keys, where: str, oldest: int = 0
) -> int:
    """Check that a trusted key attests a bundle; `attestation` is "key id:sequence:signature", the last in Base64.

    Args:
        oldest: the smallest sequence that may be served. What was attested once stays so, so that an attacker who cannot
            sign may still put an older bundle back, with faults that are known by now.

    Returns:
        The sequence of the release that the bundle is of.

    Raises:
        ShipyardError: the key is not trusted, it attests another bundle, or that is older than the oldest allowed.
    """
    signer, _, rest = attestation.partition(":")
    number, _, value = rest.partition(":")
    changed = ShipyardError(
        f"{where}: not the bundle that was attested as {name}", value=manifest_sha256, mend="fetch the bundle again"
    )
    # RFC 8785 writes integers of up to 15 digits exactly; a statement of -1 is signed by nobody
    sequence = int(number) if re.fullmatch("[0-9]{1,15}", number) else -1
    _verify(statement(name, manifest_sha256, sequence), value, signer, keys, where, changed)
    if sequence < oldest:
        raise ShipyardError(
            f"{where}: of an older release than this place may serve", value=sequence, allowed=f"{oldest} or later",
            mend="fetch the newer one, or ask for the older one",
        )  # fmt: skip
    return sequence


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a program verifies its bundle; the environment tells them where they are not given."""
    parser.add_argument(
        "--attestation", default=os.environ.get("SHIPYARD_ATTESTATION", ""), help="or SHIPYARD_ATTESTATION"
    )
    parser.add_argument(
        "--trusted-key", default=os.environ.get("SHIPYARD_TRUSTED_KEY", ""), help="or SHIPYARD_TRUSTED_KEY"
    )


def trusted(text: str) -> Keys:
    """Return the key of --trusted-key by its id."""
    key = parse_key(text, "--trusted-key")
    return {key_id(key): key}
