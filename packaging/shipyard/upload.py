"""Upload: every file of an artifact to its content-addressed key, in a folder that stands for a bucket, or in S3.

What is there already with the same digest is left; what is there with another one is an error, for a key is its content.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from models.release import Release
from serve.errors import ShipyardError
from serve.trust import sha256_file


class Store(Protocol):
    """Where artifacts are uploaded to."""

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of what lies at a key, or None."""
        ...

    def put(self, key: str, file: Path, sha256: str) -> None:
        """Write a file to a key at once: whoever reads it finds all of it or nothing."""
        ...


class FolderStore:
    """A folder in a bucket's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of the file at a key, or None."""
        path = self.root / key
        return sha256_file(path) if path.is_file() else None

    def put(self, key: str, file: Path, sha256: str) -> None:
        """Copy a file to a key, through a name of its own and a rename."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(file, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def open_store(uri: str) -> Store:
    """Return the store of a folder's path or of s3://bucket.

    Raises:
        ShipyardError: another scheme, a prefix behind the bucket, or no boto3.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "":
        return FolderStore(Path(uri))
    if parsed.scheme != "s3" or not parsed.netloc or parsed.path.strip("/"):
        raise ShipyardError(
            "upload: cannot upload there", value=uri, allowed="a folder, or s3://bucket without a prefix"
        )
    try:
        from shipyard import s3  # not at the top: only an upload to S3 needs boto3
    except ModuleNotFoundError:
        raise ShipyardError("upload to S3: boto3 is not installed", mend="pip install 'shipyard[aws]'") from None
    return s3.open_bucket(parsed.netloc)


def upload_release(found: Release, source: Path, store: Store, progress: Callable[[str, int, int], None]) -> int:
    """Upload all artifacts of a release from `source`, the folder in a bucket's layout where it was made.

    Returns:
        How many bytes were sent.
    """
    return sum(upload(store, artifact.model_dump(), source / artifact.key, progress) for artifact in found.artifacts)


def upload(store: Store, artifact: dict[str, Any], folder: Path, progress: Callable[[str, int, int], None]) -> int:
    """Upload an artifact's files from `folder`; return how many bytes were sent.

    Raises:
        ShipyardError: a local file is not the one of the release, a key holds another content, or the store refuses.
    """
    sent = 0
    for done, file in enumerate(artifact["files"]):
        progress(f"upload {artifact['name']}", done, len(artifact["files"]))
        path, key = folder / file["path"], artifact["key"] + file["path"]
        if not path.is_file() or sha256_file(path) != file["sha256"]:
            raise ShipyardError(
                f"{path}: not the file of the release", allowed=file["sha256"], mend="run the release again"
            )
        if (there := store.digest(key)) is None:
            store.put(key, path, file["sha256"])
            sent += file["bytes"]
            there = store.digest(key)
        if there != file["sha256"]:
            raise ShipyardError(
                f"{key}: the store holds another content", value=there, allowed=file["sha256"],
                mend="remove that object: a key is named by its content and is never written twice",
            )  # fmt: skip
    progress(f"upload {artifact['name']}", len(artifact["files"]), len(artifact["files"]))
    return sent
