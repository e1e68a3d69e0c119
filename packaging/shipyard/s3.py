"""A bucket as a store of artifacts.

A file of more than one part is sent by multipart upload. S3 holds the SHA-256 of every part (not of the whole), so that a
later upload of the same file finds the parts that have arrived, and that what lies there is compared without reading it.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import ShipyardError
from shipyard.upload import CHUNK, Stored, Told, changed

MEND = "check the bucket, your credentials and your rights"

PART = 8 << 20
"""Bytes of a part; S3 allows 5 MiB or more."""

MOST_PARTS = 10_000

STREAMS = 4
"""Parts of one file that are sent at once; the memory of an upload is bounded by those of all its files."""

LATE = frozenset({"NoSuchUpload", "PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
"""Another upload of the same file was first: whoever asks what lies there now learns whether it is the same."""


class S3Store:
    """A bucket; S3 checks the SHA-256 of what arrives, and encrypts by `kms_key` or the bucket's own key.

    `owner` is the account that must own the bucket.
    """

    def __init__(self, bucket: str, client: Any, *, kms_key: str | None = None, owner: str | None = None) -> None:
        self.bucket, self.client = bucket, client
        self._at: dict[str, Any] = {"Bucket": bucket} | ({"ExpectedBucketOwner": owner} if owner else {})
        self._encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}

    def holds(self, key: str, file: Path, sha256: str) -> bool | None:
        """Compare by the checksums that S3 holds; an object without fitting ones is read."""
        try:
            head = self.client.head_object(**self._at, Key=key, ChecksumMode="ENABLED")
        except ClientError as fault:
            if fault.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise self._refused(key, fault) from None
        except BotoCoreError as fault:
            raise self._refused(key, fault) from None
        size = file.stat().st_size
        if head["ContentLength"] != size:
            return False
        checksum, _, _ = head.get("ChecksumSHA256", "").partition("-")
        if checksum == _base64(bytes.fromhex(sha256)) or (checksum and size > PART and checksum == _composite(file)):
            return True
        found = hashlib.sha256()
        for piece in self.read(key):
            found.update(piece)
        return found.hexdigest() == sha256

    def put(self, key: str, file: Path, sha256: str, told: Told) -> None:
        """Write an object unless one is there, with its checksums; go on where an earlier upload was cut off."""
        try:
            if file.stat().st_size <= PART:
                body = file.read_bytes()
                if hashlib.sha256(body).hexdigest() != sha256:
                    raise changed(file, sha256)
                self.client.put_object(
                    **self._at, **self._encrypted, Key=key, Body=body, ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=_base64(bytes.fromhex(sha256)), IfNoneMatch="*",
                )  # fmt: skip
                told(len(body))
            else:
                self._put_parts(key, file, sha256, told)
        except ClientError as fault:
            # where another upload was first, the caller compares what lies there
            if fault.response["Error"]["Code"] not in LATE:
                raise self._refused(key, fault) from None
        except BotoCoreError as fault:
            raise self._refused(key, fault) from None

    def _put_parts(self, key: str, file: Path, sha256: str, told: Told) -> None:
        upload = self._begun(key)
        there = {}
        if upload is None:
            upload = self.client.create_multipart_upload(
                **self._at, **self._encrypted, Key=key, ChecksumAlgorithm="SHA256", ChecksumType="COMPOSITE"
            )["UploadId"]
        else:
            pages = self.client.get_paginator("list_parts").paginate(**self._at, Key=key, UploadId=upload)
            there = {part["PartNumber"]: part for page in pages for part in page.get("Parts", ())}

        def send(number: int, body: bytes, checksum: str) -> dict[str, Any]:
            tag = self.client.upload_part(
                **self._at, Key=key, UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256",
                ChecksumSHA256=checksum,
            )["ETag"]  # fmt: skip
            told(len(body))
            return {"PartNumber": number, "ETag": tag, "ChecksumSHA256": checksum}

        parts: list[dict[str, Any]] = []
        waiting: list[Future[dict[str, Any]]] = []
        whole = hashlib.sha256()
        with ThreadPoolExecutor(STREAMS) as pool:
            for number, body in enumerate(_pieces(file), 1):
                whole.update(body)
                checksum = _base64(hashlib.sha256(body).digest())
                have = there.get(number)
                if have is not None and _same(have, body, checksum):
                    told(len(body))
                    parts.append({"PartNumber": number, "ETag": have["ETag"], "ChecksumSHA256": checksum})
                    continue
                if len(waiting) == STREAMS:
                    parts.append(waiting.pop(0).result())
                waiting.append(pool.submit(send, number, body, checksum))
            parts += [part.result() for part in waiting]
        if whole.hexdigest() != sha256:
            self.client.abort_multipart_upload(**self._at, Key=key, UploadId=upload)
            raise changed(file, sha256)
        parts.sort(key=lambda part: int(part["PartNumber"]))
        self.client.complete_multipart_upload(
            **self._at, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
        )

    def _begun(self, key: str) -> str | None:
        """Return the newest upload of a key that was begun and not ended."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(**self._at, Prefix=key)
        found = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == key]
        return max(found, key=lambda upload: upload["Initiated"])["UploadId"] if found else None

    def read(self, key: str) -> Iterator[bytes]:
        """Read an object in pieces; the connection's own checksums hold on the way."""
        try:
            yield from self.client.get_object(**self._at, Key=key)["Body"].iter_chunks(CHUNK)
        except (BotoCoreError, ClientError) as fault:
            raise self._refused(key, fault) from None

    def objects(self, prefix: str) -> Iterator[Stored]:
        """List objects in pages of a thousand."""
        try:
            for page in self.client.get_paginator("list_objects_v2").paginate(**self._at, Prefix=prefix):
                # by the clock that wrote the objects' times: this machine's may be wrong
                now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for found in page.get("Contents", ()):
                    days = (now - found["LastModified"]).total_seconds() / 86_400
                    yield Stored(found["Key"], found["Size"], days)
        except (BotoCoreError, ClientError) as fault:
            raise self._refused(prefix, fault) from None

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, a thousand a call; a bucket with versions keeps them behind a marker."""
        for first in range(0, len(keys), 1000):
            some = keys[first : first + 1000]
            try:
                answer = self.client.delete_objects(
                    **self._at, Delete={"Objects": [{"Key": key} for key in some], "Quiet": True}
                )
            except (BotoCoreError, ClientError) as fault:
                raise self._refused(some[0], fault) from None
            for error in answer.get("Errors", ()):
                raise self._refused(error["Key"], error.get("Message"))

    def _refused(self, key: str, fault: object) -> ShipyardError:
        return ShipyardError(f"s3://{self.bucket}/{key}: {fault}", mend=MEND)


def _part(size: int) -> int:
    """Return the size of a part of a file: of one that would have too many parts, larger ones."""
    return max(PART, -(-size // MOST_PARTS))


def _pieces(file: Path) -> Iterator[bytes]:
    part = _part(file.stat().st_size)
    with file.open("rb") as stream:
        while body := stream.read(part):
            yield body


def _composite(file: Path) -> str:
    """Return what S3 holds of an object in parts, without their number: the SHA-256 of its parts' ones."""
    digests = b"".join(hashlib.sha256(body).digest() for body in _pieces(file))
    return _base64(hashlib.sha256(digests).digest())


def _same(part: Mapping[str, Any], body: bytes, checksum: str) -> bool:
    """Return whether a part that has arrived is `body`, by its SHA-256, or by the ETag of stores that tell that alone.

    An ETag is no proof, but the whole object is compared when it is complete.
    """
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    return bool(part["ETag"].strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def open_bucket(bucket: str, *, kms_key: str | None = None, owner: str | None = None) -> S3Store:
    """Return the store of a bucket, with the credentials of the surroundings.

    Raises:
        ShipyardError: no client can be made, as when no region is set.
    """
    # a service that is slow or answers 500 and 503 is asked again, later each time
    patient = Config(
        retries={"mode": "standard", "total_max_attempts": 6}, connect_timeout=10, read_timeout=60,
        max_pool_connections=32,
    )  # fmt: skip
    try:
        return S3Store(bucket, boto3.client("s3", config=patient), kms_key=kms_key, owner=owner)
    except BotoCoreError as fault:
        raise ShipyardError(f"s3://{bucket}: {fault}", mend=MEND) from None
