"""What is said between a device and the center, as texts of a bounded size, and where in the bucket bytes lie."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import ShipyardError

SHADOW = "shipyard"
"""Name of the named shadow."""

ASK = "shipyard/ask"
ANSWER = "shipyard/answer"
"""Local topics: where clients of this device ask, and below which each of them hears."""

LARGEST_TOLD = 2_400
"""Bytes of what the center tells; it is in the shadow twice, and with the report the shadow stays below 6 KB, for nucleus
lite drops the connection of a message of 10,000 bytes in Base64."""

LARGEST_REPORT = 1_200
"""Bytes of what a device tells, without the echo of what it was told."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Delta:
    """Name the patch from an installed bundle to the archive: `base` is the digest of the installed bundle.json."""

    base: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Pointer:
    """Name a model: digest of its bundle.json, who attests it, and its archive by digest and size."""

    version: str
    manifest: str
    attestation: str
    sha256: str
    bytes: int
    delta: Delta | None = None


@dataclass(frozen=True)
class Told:
    """What the center wants: all models of a generation change together. A later generation counts, whatever it holds."""

    generation: int
    models: Mapping[str, Pointer]


def archive_key(name: str, sha256: str) -> str:
    """Return an archive's key in the bucket, as `models.release.artifact_key` makes it for one file."""
    digest = hashlib.sha256(f"{sha256}  {name}.zip\n".encode()).hexdigest()
    return f"artifacts/{name}/{digest}/{name}.zip"


def delta_key(name: str, base: str, manifest: str) -> str:
    """Return the key of the patch from the bundle `base` to the bundle `manifest`, both digests of bundle.json."""
    return f"deltas/{name}/{base}/{manifest}.zst"


def write_told(told: Told) -> str:
    """Return what the center puts into the shadow.

    Raises:
        ShipyardError: it is larger than a device takes.
    """
    text = dump(dataclasses.asdict(told))
    if len(text.encode()) > LARGEST_TOLD:
        raise ShipyardError(
            "edge: too much for a shadow", value=len(text.encode()), allowed=f"{LARGEST_TOLD} bytes",
            mend="fewer models a device",
        )  # fmt: skip
    return text


def read_told(text: str) -> Told:
    """Read what the center wants.

    Raises:
        ShipyardError: it is too large, also as this runtime writes it, or not of this form.
    """
    if not isinstance(text, str):
        raise ShipyardError("told: not a text", value=type(text).__name__, allowed="as docs/edge-sync.md")
    if len(text.encode(errors="replace")) > LARGEST_TOLD:
        raise ShipyardError("told: too large", value=len(text), allowed=f"{LARGEST_TOLD} bytes")
    try:
        document = json.loads(text)
        models = {name: _pointer(pointer) for name, pointer in document["models"].items()}
        told = Told(document["generation"], models)
        right = document.keys() == {"generation", "models"}
        right &= type(told.generation) is int and told.generation > 0 and bool(models)
        right &= all(_NAME.fullmatch(name) for name in models)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise ShipyardError(f"told: {type(fault).__name__}: {fault}", allowed="as docs/edge-sync.md") from None
    if not right:
        raise ShipyardError("told: wrong", value=text[:80], allowed="as docs/edge-sync.md")
    write_told(told)  # it is kept and echoed as that: one that grows by it could not be read again after a restart
    return told


def _pointer(document: Mapping[str, Any]) -> Pointer:
    delta = None if document["delta"] is None else Delta(**document["delta"])
    pointer = Pointer(**{**document, "delta": delta})
    for part in (pointer, *((delta,) if delta else ())):
        if not _SHA256.fullmatch(part.sha256) or type(part.bytes) is not int or part.bytes < 0:
            raise ValueError("not a digest and a size")
    if not _SHA256.fullmatch(pointer.manifest) or (delta and not _SHA256.fullmatch(delta.base)):
        raise ValueError("not the digest of a bundle")
    if not isinstance(pointer.version, str) or not isinstance(pointer.attestation, str):
        raise ValueError("not a version and an attestation")
    return pointer


def dump(document: Any) -> str:
    """Return a document as compact JSON: the same document is the same text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
