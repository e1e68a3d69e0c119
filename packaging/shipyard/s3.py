"""A bucket as a store of artifacts."""

import base64
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import ShipyardError

MEND = "check the bucket, your credentials and your rights"


class S3Store:
    """A bucket, which encrypts by its own default key; S3 checks the SHA-256 of what arrives."""

    def __init__(self, bucket: str, client: Any) -> None:
        self.bucket, self.client = bucket, client

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 that S3 holds of an object, or None."""
        try:
            head = self.client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
        except ClientError as fault:
            if fault.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise ShipyardError(f"s3://{self.bucket}/{key}: {fault}", mend=MEND) from None
        except BotoCoreError as fault:
            raise ShipyardError(f"s3://{self.bucket}/{key}: {fault}", mend=MEND) from None
        return base64.b64decode(head.get("ChecksumSHA256", "")).hex()

    def put(self, key: str, file: Path, sha256: str) -> None:
        """Write an object unless one is there, with its checksum."""
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        try:
            with file.open("rb") as body:
                self.client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=body,
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=checksum,
                    IfNoneMatch="*",
                )
        except ClientError as fault:
            # where another upload was first, the caller compares its digest
            if fault.response["Error"]["Code"] != "PreconditionFailed":
                raise ShipyardError(f"s3://{self.bucket}/{key}: {fault}", mend=MEND) from None
        except BotoCoreError as fault:
            raise ShipyardError(f"s3://{self.bucket}/{key}: {fault}", mend=MEND) from None


def open_bucket(bucket: str) -> S3Store:
    """Return the store of a bucket, with the credentials of the surroundings.

    Raises:
        ShipyardError: no client can be made, as when no region is set.
    """
    try:
        return S3Store(bucket, boto3.client("s3"))
    except BotoCoreError as fault:
        raise ShipyardError(f"s3://{bucket}: {fault}", mend=MEND) from None
