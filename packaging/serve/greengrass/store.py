"""What a device keeps on its disk: its state and its bundles, whole after a power cut at any moment.

A file is written beside its place, flushed to the disk, renamed, and its folder flushed: what lies under its name is all of
it. A bundle's folder bears the digest of its bundle.json, and every file is checked against it whenever it is opened.
"""

import hashlib
import io
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass.delta import MOST, apply_delta
from serve.greengrass.protocol import State, read_state, write_state
from serve.greengrass.words import Pointer, archive_key, delta_key
from serve.trust import MANIFEST, Keys, check_bundle, verify_attestation

ATTESTED = ".attestation"

UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
"""What zipfile raises of an archive that it cannot read: damaged, cut off, encrypted, of a method that it does not know."""

Read = Callable[[str, int], bytes]
"""Read an object of the bucket: its key and its size in bytes."""


class Store:
    """The folder of one device."""

    def __init__(self, root: Path, keys: Keys) -> None:
        self.root, self.keys = root, keys
        self._parts = root / "parts"
        # what was being written when the power went is of no use
        shutil.rmtree(self._parts, ignore_errors=True)
        self._parts.mkdir(parents=True)
        (root / "models").mkdir(exist_ok=True)

    def load(self) -> State:
        """Return the state, that of a new device where there is none, or where it cannot be read."""
        try:
            return read_state((self.root / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, ShipyardError):
            return State()

    def save(self, state: State) -> None:
        """Make a state durable."""
        self.write("state.json", write_state(state))

    def write(self, name: str, text: str) -> None:
        """Write a small file at once and for good."""
        part = self._parts / name
        _put(part, text.encode())
        part.replace(self.root / name)
        _flush(self.root)

    def folder(self, name: str, manifest: str) -> Path:
        """Return where a bundle lies, or would lie."""
        return self.root / "models" / name / manifest

    def is_whole(self, name: str, manifest: str) -> bool:
        """Say whether a bundle is there with all its files as they were made, and with its attestation."""
        try:
            check_bundle(self.folder(name, manifest), manifest)
            verify_attestation(name, manifest, self.attestation(name, manifest), self.keys, name)
        except (ShipyardError, OSError):
            return False
        return True

    def attestation(self, name: str, manifest: str) -> str:
        """Return the word of the signer by which a bundle is trusted whenever it is opened; none where it is lost."""
        try:
            return self.folder(name, manifest).with_suffix(ATTESTED).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def adopt(self, name: str, source: Path, attestation: str) -> str:
        """Copy a verified bundle that a component brought; return the digest of its bundle.json.

        Raises:
            ShipyardError: it is not attested, or not whole.
        """
        if not (source / MANIFEST).is_file():
            raise ShipyardError(f"{source}: no {MANIFEST}", mend="deploy the model's component")
        manifest = sha256_file(source / MANIFEST)
        if self.is_whole(name, manifest):
            return manifest
        verify_attestation(name, manifest, attestation, self.keys, str(source))
        check_bundle(source, manifest)
        paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
        self._place(
            name, manifest, attestation, ((path.relative_to(source).as_posix(), path.read_bytes()) for path in paths)
        )
        return manifest

    def fetch(self, name: str, pointer: Pointer, read: Read, installed: Mapping[str, str]) -> int:
        """Bring a bundle onto the disk, by its delta where it fits what is installed; return the bytes that were read.

        Raises:
            ShipyardError: it is not attested, or what was read is not what was named.
            OSError: the bucket does not answer, or the disk is full.
        """
        if self.is_whole(name, pointer.manifest):
            return 0
        # before a byte is read: a word that nobody trusted signed costs nothing
        verify_attestation(name, pointer.manifest, pointer.attestation, self.keys, name)
        if not 0 < pointer.bytes <= MOST:
            raise ShipyardError(f"{name}: size of the archive", value=pointer.bytes, allowed=f"at most {MOST} bytes")
        if (free := shutil.disk_usage(self.root).free) < 3 * pointer.bytes:
            raise ShipyardError(f"{self.root}: disk is full", value=free, allowed=f"{3 * pointer.bytes} bytes free")
        archive, spent = self._delta(name, pointer, read, installed)
        if archive is None:
            archive = read(archive_key(name, pointer.sha256), pointer.bytes)
            spent += len(archive)
        if _sha256(archive) != pointer.sha256:
            raise ShipyardError(f"{name}: archive", value=_sha256(archive), allowed=pointer.sha256)
        self._place(name, pointer.manifest, pointer.attestation, _unzip(archive))
        try:
            check_bundle(self.folder(name, pointer.manifest), pointer.manifest)
        except ShipyardError:
            self.drop(name, pointer.manifest)
            raise
        return spent

    def _delta(self, name: str, pointer: Pointer, read: Read, installed: Mapping[str, str]) -> tuple[bytes | None, int]:
        """Return the archive that the delta makes, None where the full one has to be read, and the bytes that were read."""
        delta = pointer.delta
        if delta is None or installed.get(name) != delta.base or delta.bytes >= pointer.bytes:
            return None, 0
        try:
            patch = read(delta_key(name, delta.base, pointer.manifest), delta.bytes)
        except OSError:
            return None, 0
        if _sha256(patch) != delta.sha256:
            return None, len(patch)
        try:
            archive = apply_delta(self.folder(name, delta.base), patch, pointer.bytes)
        except (ShipyardError, OSError):
            return None, len(patch)
        return (archive if _sha256(archive) == pointer.sha256 else None), len(patch)

    def drop(self, name: str, manifest: str) -> None:
        """Remove a bundle: out of its place at once, then file by file."""
        folder = self.folder(name, manifest)
        if folder.exists():
            part = self._parts / f"dropped-{manifest}"
            shutil.rmtree(part, ignore_errors=True)
            folder.replace(part)
            shutil.rmtree(part)

    def tidy(self, state: State) -> None:
        """Remove the bundles that no state can name any more: the disk holds at most four a model."""
        told = {} if state.target is None else {n: p.manifest for n, p in state.target.models.items()}
        for path in (self.root / "models").glob("*/*"):
            name, manifest = path.parent.name, path.name.removesuffix(ATTESTED)
            if manifest not in {kept.get(name) for kept in (state.current, state.previous, state.deployed, told)}:
                self.drop(name, manifest)
                path.with_suffix(ATTESTED).unlink(missing_ok=True)

    def _place(self, name: str, manifest: str, attestation: str, files: Iterable[tuple[str, bytes]]) -> None:
        part, place = self._parts / manifest, self.folder(name, manifest)
        shutil.rmtree(part, ignore_errors=True)
        self.drop(name, manifest)
        place.parent.mkdir(exist_ok=True)
        word = part.with_suffix(ATTESTED)
        _put(word, attestation.encode())
        word.replace(place.with_suffix(ATTESTED))
        folders = {part}
        part.mkdir()
        for path, content in files:
            target = part / path
            if not target.resolve().is_relative_to(part.resolve()):
                raise ShipyardError(f"{name}: a path leaves the bundle", value=path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(target, content)
            folders.add(target.parent)
        for folder in folders:
            _flush(folder)
        part.replace(place)
        _flush(place.parent)


def _unzip(archive: bytes) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as stream:
            entries = [entry for entry in stream.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > MOST:
                raise ShipyardError("archive: too large", allowed=f"{MOST} bytes unpacked")
            return [(entry.filename, stream.read(entry)) for entry in entries]
    except UNREADABLE as fault:
        raise ShipyardError(f"archive: {fault}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _put(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
