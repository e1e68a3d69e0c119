"""Provenance: how a release was built, as an in-toto Statement v1 with SLSA's predicate v1 in a DSSE envelope.

Sources: github.com/in-toto/attestation (spec/v1), slsa.dev/spec/v1.0/provenance, github.com/secure-systems-lab/dsse. Its
subjects are the files of the artifacts, each by the SHA-256 of its bytes, so that any tool that reads attestations can ask
of any file. There is no time in it: the same release has the same provenance.
"""

import json
from collections.abc import Mapping
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signature, SSlibKey  # type: ignore[attr-defined] # its exports are not marked

from models.release import Release, Signer
from serve.errors import ShipyardError
from serve.trust import Keys, PublicKey, Revoked, key_id

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"

BUILD_TYPE = "urn:shipyard:release:1"
"""SLSA's buildType: docs/trust.md tells the parameters."""


def statement(
    version: str, body: Mapping[str, Any], purls: Mapping[str, str | None], builder: str, byproducts: Mapping[str, str]
) -> dict[str, Any]:
    """Return the statement of a release that is not signed yet.

    `purls` are the package URLs of "data" and "base", None where there is none; `byproducts` are papers' digests by name.
    """
    source = body["source"]
    return {
        "_type": STATEMENT,
        "subject": subjects(body["artifacts"]),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"version": version, "profile": body["profile"], **body["parameters"]},
                "internalParameters": {"code_sha256": source["code_sha256"], "machine": source["machine"]},
                "resolvedDependencies": _dependencies(source, purls),
            },
            "runDetails": {
                "builder": {"id": builder},
                "byproducts": [
                    {"name": name, "digest": {"sha256": byproducts[name]}} for name in sorted(byproducts)
                ],
            },
        },
    }  # fmt: skip


def subjects(artifacts: Any) -> list[dict[str, Any]]:
    """Return every file of the artifacts by its key and digest."""
    return [
        {"name": artifact["key"] + file["path"], "digest": {"sha256": file["sha256"]}}
        for artifact in artifacts
        for file in artifact["files"]
    ]


def _dependencies(source: Mapping[str, Any], purls: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return what went in. The digests of data and base model cover several files, so they are annotations."""
    commit, _, dirty = (source["commit"] or "").partition("-")
    code: dict[str, Any] = {"name": "code", "uri": "urn:shipyard:code"}
    code |= {"digest": {"gitCommit": commit}} if commit else {}
    code["annotations"] = {"dirty": bool(dirty)} if commit else {"repository": "none"}
    found = [code]
    if source["environment_sha256"]:
        found.append({"name": "constraints.txt", "digest": {"sha256": source["environment_sha256"]}})
    for kind in ("data", "base"):
        uri = purls[kind] or f"urn:shipyard:{kind}:{source[kind]}"
        found.append({"name": kind, "uri": uri, "annotations": {"sha256": source[f"{kind}_sha256"]}})
    return [*found, *({"uri": f"pkg:pypi/{name}@{source['libraries'][name]}"} for name in sorted(source["libraries"]))]


def seal(document: Mapping[str, Any], key: Signer) -> bytes:
    """Return the signed envelope of a statement, on one line, as files of the name *.intoto.jsonl have it."""
    payload = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    envelope = Envelope(payload, PAYLOAD, {})
    signer = key_id(key.public_key())
    envelope.signatures[signer] = Signature(signer, key.sign(envelope.pae()).hex())
    return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode() + b"\n"


def open_envelope(content: bytes, keys: Keys, where: str) -> dict[str, Any]:
    """Return the statement of an envelope that a trusted key signed.

    Raises:
        ShipyardError: it is no such envelope, no trusted key signed it, or it was changed.
    """
    try:
        envelope = Envelope.from_dict(json.loads(content))
        document = json.loads(envelope.payload)
        kinds = envelope.payload_type, document["_type"], document["predicateType"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ShipyardError(f"{where}: not an envelope: {fault}", mend="restore the file") from None
    if kinds != (PAYLOAD, STATEMENT, PREDICATE):
        raise ShipyardError(f"{where}: not SLSA provenance", value=" ".join(kinds), allowed=PREDICATE)
    trusted = {name: key for name, key in keys.items() if not isinstance(key, Revoked)}
    try:
        envelope.verify([_public(name, key) for name, key in trusted.items()], 1)
    except (VerificationError, ValueError):  # ValueError: no key is trusted
        raise ShipyardError(
            f"{where}: changed, or not signed by a trusted key", value=", ".join(envelope.signatures) or "no signature",
            allowed=", ".join(trusted), mend="restore the file",
        ) from None  # fmt: skip
    return dict(document)


def _public(name: str, key: PublicKey) -> SSlibKey:
    return SSlibKey.from_crypto(key, keyid=name)


def check_provenance(content: bytes, release: Release, keys: Keys, where: str) -> dict[str, Any]:
    """Hold a provenance to a verified release: signed by the same key, of its version and of its files; return it.

    Raises:
        ShipyardError: it is of another release, or not signed by its key.
    """
    document = open_envelope(content, {release.signature.key_id: keys[release.signature.key_id]}, where)
    told = release.model_dump(mode="json", include={"artifacts"})["artifacts"]
    version = document["predicate"]["buildDefinition"]["externalParameters"].get("version")
    if version != release.version or document["subject"] != subjects(told):
        raise ShipyardError(
            f"{where}: the provenance of another release",
            value=version,
            allowed=release.version,
            mend="restore the file",
        )
    return document
