"""A register in an environment's bucket: small documents that are written on a condition, and a lock made of one.

S3 writes an object only where none is (`If-None-Match: *`), or only over the one that was read (`If-Match`), so of two
that write at once one wins and the other is told (Amazon S3 user guide, "Conditional writes"). Nothing is ever deleted: a
lock that is given back is an object that says so.
"""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import ShipyardError

FOLDER = "delivery/"
LOCK = f"{FOLDER}lock.json"

LEASE_S = 120.0
"""Seconds after which a lock that was not renewed may be taken: its run was killed. A run renews it three times as often."""

BEATS_S = 1.0
"""Seconds between two renewals by the thread, at least."""

LOST = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


class Lost(Exception):
    """Another one has written there in the meantime."""


@dataclass(frozen=True)
class Entry:
    """A document as it was read: its content, the tag by which it is written over, and its age by the service's clock."""

    content: Any
    tag: str
    age_s: float


class Register:
    """Documents below delivery/ of a bucket; `owner` is the account that must own it."""

    def __init__(self, bucket: str, client: Any, owner: str) -> None:
        self.bucket, self.client = bucket, client
        self._at = {"Bucket": bucket, "ExpectedBucketOwner": owner}

    def read(self, key: str) -> Entry | None:
        """Return a document, or None where none is."""
        try:
            answer = self.client.get_object(**self._at, Key=key)
            content = json.loads(answer["Body"].read())
        except ClientError as fault:
            if fault.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise self._refused(key, fault) from None
        except (BotoCoreError, ValueError) as fault:
            raise self._refused(key, fault) from None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Entry(content, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def write(self, key: str, content: Any, over: str | None) -> str:
        """Write a document where none is, or over the one with the tag `over`; return its tag.

        Raises:
            Lost: another one was first.
        """
        condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}
        body = json.dumps(content, indent=1, sort_keys=True).encode()
        try:
            return str(self.client.put_object(**self._at, **condition, Key=key, Body=body)["ETag"])
        except ClientError as fault:
            if fault.response["Error"]["Code"] not in LOST:
                raise self._refused(key, fault) from None
        except BotoCoreError as fault:
            raise self._refused(key, fault) from None
        # a try whose answer was lost has been made again by botocore, and has met what it wrote itself
        there = self.read(key)
        if there is None or there.content != content:
            raise Lost(key)
        return there.tag

    def below(self, prefix: str) -> list[Any]:
        """Return the documents below a prefix, in the order of their keys."""
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(**self._at, Prefix=prefix)
            keys = sorted(found["Key"] for page in pages for found in page.get("Contents", ()))
        except (BotoCoreError, ClientError) as fault:
            raise self._refused(prefix, fault) from None
        entries = [self.read(key) for key in keys]
        return [entry.content for entry in entries if entry is not None]

    def _refused(self, key: str, fault: object) -> ShipyardError:
        return ShipyardError(
            f"s3://{self.bucket}/{key}: {fault}",
            mend="check the bucket, your credentials and your rights below delivery/",
        )


def open_register(bucket: str, region: str, owner: str) -> Register:
    """Return the register of a bucket, with the credentials of the surroundings.

    Raises:
        ShipyardError: no client can be made.
    """
    patient = Config(retries={"mode": "standard", "total_max_attempts": 6}, connect_timeout=10, read_timeout=60)
    try:
        return Register(bucket, boto3.client("s3", region_name=region, config=patient), owner)
    except BotoCoreError as fault:
        raise ShipyardError(f"s3://{bucket}: {fault}", mend="check your credentials") from None


@contextmanager
def lock(register: Register, what: str, by: str, lease_s: float = LEASE_S) -> Iterator[Callable[[], None]]:
    """Hold a bucket's lock, renewed by a thread, and give a function that renews it too: call it before a step that counts.

    Raises:
        ShipyardError: another run holds it, or has taken it because this one was silent for `lease_s` seconds.
    """
    own = {"holder": uuid.uuid4().hex, "what": what, "by": by}
    there = register.read(LOCK)
    if there is not None and there.content["holder"] is not None and there.age_s < lease_s:
        raise _held(register, there, lease_s)
    try:
        tag = register.write(LOCK, own, None if there is None else there.tag)
    except Lost:
        raise _held(register, register.read(LOCK), lease_s) from None

    turn, ended = threading.Lock(), threading.Event()

    def renew() -> None:
        nonlocal tag
        with turn:
            own["renewed"] = str(int(own.get("renewed", "0")) + 1)
            try:
                tag = register.write(LOCK, own, tag)
            except Lost:
                raise _held(register, register.read(LOCK), lease_s) from None

    def beat() -> None:
        while not ended.wait(max(lease_s / 3, BEATS_S)):
            with suppress(ShipyardError):  # whoever calls renew is told
                renew()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield renew
    finally:
        ended.set()
        thread.join()
        with suppress(Lost):  # whoever took it holds it
            register.write(LOCK, {"holder": None, "what": what, "by": by}, tag)


def _held(register: Register, there: Entry | None, lease_s: float) -> ShipyardError:
    content, age = (there.content, there.age_s) if there is not None else ({}, 0.0)
    return ShipyardError(
        f"s3://{register.bucket}: another run is delivering",
        value=f"{content.get('what')} by {content.get('by')}, {age:.0f} s ago",
        mend=f"wait until it ends; one that was killed gives way after {lease_s:.0f} s",
    )  # fmt: skip
