"""Upload: every file of an artifact to its content-addressed key, in a folder that stands for a bucket, or in S3.

What is there already with the same content is left; what is there with another one is an error, for a key is its content.
Files go several at a time; a store keeps what it has of a file that was cut off, and goes on from there.
"""

import glob
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from models.release import Release
from serve.errors import ShipyardError
from serve.files import sha256_file

WORKERS = 4
"""Files that are sent at once."""

CHUNK = 1 << 20

Told = Callable[[int], None]
"""Called with the number of bytes that were sent since the last call, by any thread."""


@dataclass(frozen=True)
class Stored:
    """An object of a store: its key, its size and how many days ago it was written."""

    key: str
    bytes: int
    days: float


class Store(Protocol):
    """Where artifacts are uploaded to."""

    def holds(self, key: str, file: Path, sha256: str) -> bool | None:
        """Return whether a key holds the content of `file`, whose SHA-256 is known; None where nothing lies."""
        ...

    def put(self, key: str, file: Path, sha256: str, told: Told) -> None:
        """Write a file to a key at once: whoever reads it finds all of it or nothing.

        Raises:
            ShipyardError: the file is not the one with that SHA-256 (any more), or the store refuses.
        """
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """Yield what lies at a key, in pieces.

        Raises:
            ShipyardError: nothing lies there, or the store refuses.
        """
        ...

    def objects(self, prefix: str) -> Iterator[Stored]:
        """Yield all objects below a prefix."""
        ...

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        ...


class FolderStore:
    """A folder in a bucket's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def holds(self, key: str, file: Path, sha256: str) -> bool | None:
        """Compare digests; what is there counts as written now, for a release is about to name it."""
        path = self.root / key
        if not path.is_file():
            return None
        os.utime(path)
        return sha256_file(path) == sha256

    def put(self, key: str, file: Path, sha256: str, told: Told) -> None:
        """Copy a file to a key, through a name of its own and a rename."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        found = hashlib.sha256()
        try:
            with file.open("rb") as source, part.open("wb") as target:
                while piece := source.read(CHUNK):
                    found.update(piece)
                    target.write(piece)
                    told(len(piece))
                target.flush()
                os.fsync(target.fileno())
            if found.hexdigest() != sha256:
                raise changed(file, sha256)
            try:
                part.replace(path)
            except FileNotFoundError:
                return  # another upload of the same file was first and has removed this part
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                left.unlink(missing_ok=True)  # of uploads that were killed
        finally:
            part.unlink(missing_ok=True)

    def read(self, key: str) -> Iterator[bytes]:
        """Read the file at a key."""
        path = self.root / key
        if not path.is_file():
            raise ShipyardError(f"{path}: missing", mend="upload the release again")
        with path.open("rb") as stream:
            while piece := stream.read(CHUNK):
                yield piece

    def objects(self, prefix: str) -> Iterator[Stored]:
        """List the files below a folder."""
        for path in sorted(self.root.joinpath(prefix).rglob("*")):
            if path.is_file():
                found = path.stat()
                days = (time.time() - found.st_mtime) / 86_400
                yield Stored(path.relative_to(self.root).as_posix(), found.st_size, days)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove files, and folders that are empty then."""
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.root or any(folder.iterdir()):
                    break
                folder.rmdir()


def changed(file: Path, sha256: str) -> ShipyardError:
    """Return the error that a local file is not the one that a release names."""
    return ShipyardError(f"{file}: not the file of the release", allowed=sha256, mend="run the release again")


def open_store(uri: str, *, kms_key: str | None = None, owner: str | None = None) -> Store:
    """Return the store of a folder's path or of s3://bucket.

    Args:
        kms_key: the KMS key that S3 encrypts new objects with (default: the bucket's own).
        owner: the account that must own the bucket, so that nothing goes to a bucket of the same name elsewhere.

    Raises:
        ShipyardError: another scheme, a prefix behind the bucket, no boto3, or an option that a folder does not have.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "":
        if kms_key or owner:
            raise ShipyardError("upload: --kms-key and --owner are for S3", value=uri, allowed="s3://bucket")
        return FolderStore(Path(uri))
    if parsed.scheme != "s3" or not parsed.netloc or parsed.path.strip("/"):
        raise ShipyardError(
            "upload: cannot upload there", value=uri, allowed="a folder, or s3://bucket without a prefix"
        )
    try:
        from shipyard import s3  # not at the top: only an upload to S3 needs boto3
    except ModuleNotFoundError:
        raise ShipyardError("upload to S3: boto3 is not installed", mend="pip install 'shipyard[aws]'") from None
    return s3.open_bucket(parsed.netloc, kms_key=kms_key, owner=owner)


def upload_release(found: Release, source: Path, store: Store, progress: Callable[[str, int, int], None]) -> int:
    """Upload all artifacts of a release from `source`, the folder in a bucket's layout where it was made.

    Returns:
        How many bytes were sent.
    """
    return sum(upload(store, artifact.model_dump(), source / artifact.key, progress) for artifact in found.artifacts)


def upload(store: Store, artifact: Mapping[str, Any], folder: Path, progress: Callable[[str, int, int], None]) -> int:
    """Upload an artifact's files from `folder`; `progress` is told bytes. Return how many bytes were sent.

    Raises:
        ShipyardError: a local file is not the one of the release, a key holds another content, or the store refuses.
    """
    what, total = f"upload {artifact['name']}, bytes", sum(file["bytes"] for file in artifact["files"])
    done, sent, lock = 0, 0, threading.Lock()

    def told(count: int) -> None:
        nonlocal done
        with lock:
            done = min(done + count, total)
            progress(what, done, total)

    def one(file: Mapping[str, Any]) -> int:
        path, key, sha256 = folder / file["path"], artifact["key"] + file["path"], file["sha256"]
        if not path.is_file() or sha256_file(path) != sha256:
            raise changed(path, sha256)
        there, puts = store.holds(key, path, sha256), 0
        # a second time where another upload of the same file was first and was given up
        while there is None and puts < 2:
            store.put(key, path, sha256, told)
            there, puts = store.holds(key, path, sha256), puts + 1
        if not there:
            raise ShipyardError(
                f"{key}: the store holds {'nothing' if there is None else 'another content'}", allowed=sha256,
                mend="remove that object: a key is named by its content and is never written twice",
            )  # fmt: skip
        if not puts:
            told(file["bytes"])
        return int(file["bytes"]) if puts else 0

    progress(what, 0, total)
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for count in pool.map(one, artifact["files"]):
            sent += count
    finally:
        # what has not begun is not begun after an error
        pool.shutdown(cancel_futures=True)
    return sent
