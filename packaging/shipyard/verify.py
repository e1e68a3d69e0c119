"""Verify: a release file, a bundle in a folder or a zip, or all that a store holds of a release."""

import hashlib
import json
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from models.release import File, Release
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST, Keys, check_bundle, verify_attestation
from shipyard.upload import Store

MOST_RATIO = 200
"""Bytes that a byte of a zip may unpack to; text packs to a hundredth."""

MOST_BYTES = 8 << 30
"""Bytes that a bundle may unpack to."""

MOST_FILES = 10_000


def checked(store: Store, prefix: str, file: File) -> Iterator[bytes]:
    """Yield an object of a release piece by piece, and hold the whole to its digest after the last.

    Raises:
        ShipyardError: it is missing, or is not what the release names.
    """
    digest = hashlib.sha256()
    for piece in store.read(prefix + file.path):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != file.sha256:
        raise ShipyardError(
            f"{prefix}{file.path}: not what the release names", value=digest.hexdigest(), allowed=file.sha256,
            mend="remove that object and upload the release again",
        )  # fmt: skip


def verify_store(found: Release, store: Store, progress: Callable[[str, int, int], None]) -> int:
    """Read all that a store holds of a release and compare every digest; return the number of bytes.

    Raises:
        ShipyardError: something is missing, is not what the release names, or lies there besides.
    """
    count = 0
    for artifact in found.artifacts:
        done = 0
        for file in artifact.files:
            for piece in checked(store, artifact.key, file):
                done += len(piece)
                progress(f"verify {artifact.name}, bytes", min(done, artifact.bytes), artifact.bytes)
        count += done
        # an engine that starts from the prefix would load what was put there
        named = {artifact.key + file.path for file in artifact.files}
        for stored in store.objects(artifact.key):
            if stored.key not in named:
                raise ShipyardError(f"{stored.key}: not part of the release", mend="remove that object")
    return count


def verify_bundle(path: Path, release: Release, keys: Keys) -> dict[str, Any]:
    """Check a bundle, a folder or a zip, against the release that it is of; return its bundle.json.

    Raises:
        ShipyardError: it is no bundle of the release, its attestation is not by a trusted key, or a file differs.
    """
    document, digest = check_folder(path) if path.is_dir() else check_zip(path)
    found = [artifact for artifact in release.artifacts if artifact.manifest == digest]
    if not found:
        raise ShipyardError(
            f"{path}: not a bundle of release {release.version}", value=digest,
            allowed=", ".join(f"{artifact.name} {artifact.manifest[:12]}" for artifact in release.artifacts),
        )  # fmt: skip
    verify_attestation(found[0].name, digest, found[0].attestation, keys, str(path))
    return document


def check_folder(path: Path) -> tuple[dict[str, Any], str]:
    """Check a bundle's folder against its own bundle.json; return that and its digest.

    Raises:
        ShipyardError: bundle.json is none, or a file is missing, is extra, is a link, or has another digest.
    """
    manifest = path / MANIFEST
    _entries(read_json(manifest), str(manifest))
    digest = sha256_file(manifest)
    return check_bundle(path, digest), digest


def check_zip(path: Path) -> tuple[dict[str, Any], str]:
    """Check a zipped bundle without unpacking it to a disk; return its bundle.json and that file's digest.

    Raises:
        ShipyardError: it is no zip, holds a link, a path that leaves it or a name twice, unpacks to too much, or its files
            are not those of its bundle.json.
    """
    try:
        with zipfile.ZipFile(path) as stream:
            entries = check_entries(path, stream.infolist())
            digests = {}
            for name in entries:
                digest = hashlib.sha256()
                with stream.open(name) as member:
                    while piece := member.read(1 << 20):
                        digest.update(piece)
                digests[name] = digest.hexdigest()
            if MANIFEST not in digests:
                raise ShipyardError(f"{path}: no {MANIFEST}", mend="fetch the bundle again")
            document = json.loads(stream.read(MANIFEST))
    # RuntimeError, which NotImplementedError is one of: it is encrypted, or packed in a way that is not known here, or its
    # bundle.json is nested too deeply
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError, OSError) as fault:
        raise ShipyardError(f"{path}: not a whole zip: {fault}", mend="fetch the bundle again") from None
    expected = {entry["path"]: entry["sha256"] for entry in _entries(document, f"{path}: {MANIFEST}")}
    found = {name: digest for name, digest in digests.items() if name != MANIFEST}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            state = (
                "missing"
                if name not in found
                else "not part of the bundle"
                if name not in expected
                else "digest differs"
            )
            raise ShipyardError(f"{path}: {name}: {state}", mend="fetch the bundle again")
    return document, digests[MANIFEST]


def _entries(document: Any, where: str) -> list[dict[str, Any]]:
    """Return the files that a bundle.json names, once it is known to name some.

    Raises:
        ShipyardError: it is of another form; anybody may have written it.
    """
    files = document.get("files") if isinstance(document, dict) else None
    kinds = {"path": str, "sha256": str, "bytes": int}
    if not isinstance(files, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        for entry in files
    ):
        raise ShipyardError(
            f"{where}: not the manifest of a bundle", allowed="files, each with path, sha256 and bytes",
            mend="fetch the bundle again",
        )  # fmt: skip
    return files


def check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> list[str]:
    """Refuse a zip by its table of contents, before a byte of it is unpacked; return its names."""
    names = [entry.filename for entry in entries if not entry.is_dir()]
    size, packed = sum(entry.file_size for entry in entries), max(1, sum(entry.compress_size for entry in entries))
    if len(names) > MOST_FILES or size > MOST_BYTES or size > MOST_RATIO * packed:
        raise ShipyardError(
            f"{path}: unpacks to too much", value=f"{len(names)} files, {size} bytes from {packed}",
            allowed=f"{MOST_FILES} files, {MOST_BYTES} bytes, {MOST_RATIO} times its size",
        )  # fmt: skip
    if len(set(names)) < len(names):
        raise ShipyardError(f"{path}: a name comes twice", mend="fetch the bundle again")
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename or ":" in entry.filename:
            raise ShipyardError(f"{path}: a path leaves the bundle", value=entry.filename)
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ShipyardError(f"{path}: holds a link or a device", value=entry.filename)
    return names
