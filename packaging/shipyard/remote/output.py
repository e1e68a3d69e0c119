"""Bring a job's output back as the stage's own folder: every file by its digest, nothing that could run."""

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from shipyard.remote.follow import Ended
from shipyard.remote.plan import JOBS, Plan
from shipyard.stage import RECORD, digest
from shipyard.upload import Store

KINDS = (".json", ".safetensors")
"""What a stage of training leaves; none of them can carry code, as pickle does."""

MOST_BYTES = 64 << 30
MOST_FILES = 1000


def bring(plan: Plan, ended: Ended, store: Store, folder: Path) -> None:
    """Write the output of a job into `folder`, as the stage would have.

    Raises:
        ShipyardError: it lies elsewhere, is no archive of plain files, or is not what the job's log tells.
    """
    found = urlparse(ended.output)
    if found.netloc != plan.bucket or not found.path.startswith(f"/{JOBS}{ended.name}/"):
        raise _wrong(ended, "lies elsewhere", ended.output, f"s3://{plan.bucket}/{JOBS}{ended.name}/...")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ".model.tar.gz"
    try:
        with archive.open("wb") as target:
            for piece in store.read(found.path.lstrip("/")):
                target.write(piece)
        _unpack(archive, folder, ended)
    finally:
        archive.unlink(missing_ok=True)
    _verify(plan, ended, folder)


def _unpack(archive: Path, folder: Path, ended: Ended) -> None:
    """Take plain files alone out of an archive, under plain names, and no more than a stage can have."""
    size = count = 0
    try:
        with tarfile.open(archive, "r:gz") as stream:
            for entry in stream:
                name = PurePosixPath(entry.name)
                if entry.isdir():
                    continue
                if not entry.isreg() or name.is_absolute() or ".." in name.parts or name.suffix not in KINDS:
                    raise _wrong(ended, "holds what no stage writes", entry.name, f"files of {', '.join(KINDS)}")
                size, count = size + entry.size, count + 1
                if size > MOST_BYTES or count > MOST_FILES:
                    raise _wrong(ended, "is too large", entry.name, f"{MOST_BYTES} bytes in {MOST_FILES} files")
                stream.extract(entry, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as fault:
        raise _wrong(ended, f"is no whole archive ({fault})", ended.output, "model.tar.gz") from None


def _verify(plan: Plan, ended: Ended, folder: Path) -> None:
    """Hold the record to the log, and the files to the record."""
    path = folder / RECORD
    if not path.is_file():
        raise _wrong(ended, f"has no {RECORD}", ended.output, "the folder of a stage")
    if (is_now := sha256_file(path)) != ended.sha256:
        raise _wrong(ended, f"{RECORD} is not what its log tells", is_now, ended.sha256)
    document: dict[str, Any] = read_json(path)
    if document.get("key") != plan.stage.key:
        raise _wrong(ended, "is of another plan", document.get("key"), plan.stage.key)
    files: dict[str, str] = document["files"]
    there = {item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file()} - {RECORD}
    _same_names(ended, there, files)
    for name, sha256 in files.items():
        if (is_now := sha256_file(folder / name)) != sha256:
            raise _wrong(ended, f"{name} is not what its record tells", is_now, sha256)
    if document["digest"] != digest(files):
        raise _wrong(ended, "has another digest than its files", document["digest"], digest(files))
    # where it was made is told too; what the stage says and its files are as they came
    document["made"] = {**document.get("made", {}), "on": "sagemaker", "job": ended.name}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _same_names(ended: Ended, there: Iterable[str], files: Iterable[str]) -> None:
    if other := sorted(set(there) ^ set(files)):
        raise _wrong(ended, "has other files than its record tells", other[0], ", ".join(sorted(files)))


def _wrong(ended: Ended, what: str, value: object, allowed: object) -> ShipyardError:
    return ShipyardError(
        f"output of training job {ended.name}: {what}", value=value, allowed=allowed,
        mend="find out who wrote it; start anew with --again",
    )  # fmt: skip
