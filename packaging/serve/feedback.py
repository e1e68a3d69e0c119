"""Impressions and feedback, written before they are acknowledged: to files here, or to a Firehose stream in the cloud.

A record is one line of JSON. Feedback is an event of the data stage's schema (docs/data.md) with the request's id; an
impression says what was shown for a request, under the kind "impression".
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from serve.asgi import Refused

MOST_WAITING = 20_000
MOST_RECORDS = 500
MOST_BYTES = 4 * 1024 * 1024
"""Of one call to Firehose, as its PutRecordBatch allows."""

KINDS = ("click", "cart", "purchase")
"""Kinds of feedback."""

MOST_EVENTS = 500

Put = Callable[[Sequence[bytes], bool], None]
"""Write records, on stable storage if the second argument says so."""


class Unwritten(Exception):
    """A record could not be written; whoever sent it has it still."""


class Journal:
    """Write records in the order in which they came, those that wait together in one go.

    A durable record is awaited until it is safe. Others are awaited where that is cheap (`prompt`), else they are kept in
    memory, at most `MOST_WAITING`, until they are written.
    """

    def __init__(self, put: Put, *, prompt: bool) -> None:
        self._put, self._prompt = put, prompt
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting: list[tuple[bytes, bool, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self.dropped = 0

    async def write(self, records: Sequence[dict[str, Any]], *, durable: bool) -> None:
        """Write records.

        Raises:
            Unwritten: they are not safe.
        """
        loop = asyncio.get_running_loop()
        if len(self._waiting) + len(records) > MOST_WAITING:
            if durable:
                raise Unwritten("too many records wait")
            self.dropped += len(records)
            return
        futures = [loop.create_future() for _ in records]
        for record, future in zip(records, futures, strict=True):
            line = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            self._waiting.append((line, durable, future))
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush())
        if durable or self._prompt:
            await asyncio.gather(*futures)

    async def close(self) -> None:
        """Write what waits, then end."""
        if self._flushing is not None:
            await self._flushing
        self._pool.shutdown()

    async def _flush(self) -> None:
        loop, pause = asyncio.get_running_loop(), 0.1
        while self._waiting:
            batch, self._waiting = self._waiting, []
            durable = any(wanted for _, wanted, _ in batch)
            try:
                await loop.run_in_executor(self._pool, self._put, [line for line, _, _ in batch], durable)
            except Unwritten as fault:
                kept, last = [], pause > 5
                if last:
                    # what came meanwhile is given up too; who awaits it has to hear so
                    batch, self._waiting = batch + self._waiting, []
                for one in batch:
                    if one[1] or self._prompt:
                        if not one[2].done():
                            one[2].set_exception(Unwritten(str(fault)))
                    elif last:
                        self.dropped += 1
                    else:
                        kept.append(one)
                self._waiting = kept + self._waiting
                await asyncio.sleep(pause)
                pause = min(2 * pause, 6.4)
                continue
            for _, _, future in batch:
                if not future.done():
                    future.set_result(None)


def files(folder: Path) -> Put:
    """Return what appends to one file a day and process below `folder`, and syncs it for durable records."""
    folder.mkdir(parents=True, exist_ok=True)

    def put(lines: Sequence[bytes], durable: bool) -> None:
        path = folder / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{os.getpid()}.jsonl"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
            try:
                data = memoryview(b"".join(lines))
                while data:
                    data = data[os.write(handle, data) :]
                if durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as fault:
            raise Unwritten(str(fault)) from None

    return put


def firehose(stream: str, client: Any = None) -> Put:
    """Return what sends to a Firehose stream, and sends again what it did not take."""
    client = client or boto3.client(
        "firehose", config=Config(connect_timeout=1, read_timeout=3, retries={"total_max_attempts": 2})
    )

    def put(lines: Sequence[bytes], durable: bool) -> None:
        left = list(lines)
        for attempt in range(3):
            refused: list[bytes] = []
            for batch in _batches(left):
                try:
                    told = client.put_record_batch(
                        DeliveryStreamName=stream, Records=[{"Data": line} for line in batch]
                    )
                except (ClientError, BotoCoreError) as fault:
                    raise Unwritten(str(fault)) from None
                if told["FailedPutCount"]:
                    answers = told["RequestResponses"]
                    refused += [line for line, one in zip(batch, answers, strict=True) if "ErrorCode" in one]
            if not refused:
                return
            left = refused
            time.sleep(0.1 * 2**attempt)
        raise Unwritten(f"{len(left)} records were not taken")

    return put


def _batches(lines: Sequence[bytes]) -> list[list[bytes]]:
    found: list[list[bytes]] = [[]]
    size = 0
    for line in lines:
        if len(found[-1]) == MOST_RECORDS or size + len(line) > MOST_BYTES:
            found.append([])
            size = 0
        found[-1].append(line)
        size += len(line)
    return found if found[0] else []


def events(document: Any) -> list[dict[str, Any]]:
    """Return the records of a feedback.

    Raises:
        Refused: it has a wrong key, type or value.
    """
    needed, more = {"request_id", "user", "events"}, {"place"}
    if not isinstance(document, dict) or not needed <= document.keys() <= needed | more:
        raise Refused(400, f"feedback: wrong; allowed: an object with {', '.join(sorted(needed))}, also place")
    if not isinstance(document["request_id"], str) or not 0 < len(document["request_id"]) <= 64:
        raise Refused(400, "request_id: wrong; allowed: the one of an answer")
    for key, absent in (("user", False), ("place", True)):
        if not is_id(document.get(key), absent=absent):
            raise Refused(400, f"{key}: wrong; allowed: a whole number or a text of at most 200 characters")
    given = document["events"]
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_EVENTS:
        raise Refused(400, f"events: wrong; allowed: a list of 1 to {MOST_EVENTS}")
    records = []
    for i, event in enumerate(given):
        if not isinstance(event, dict) or not {"item", "kind"} <= event.keys() <= {
            "item", "kind", "quantity", "value", "basket",
        }:  # fmt: skip
            raise Refused(
                400, f"events[{i}]: wrong; allowed: an object with item and kind, also quantity, value, basket"
            )
        if event["kind"] not in KINDS:
            raise Refused(400, f"events[{i}].kind: wrong; allowed: {', '.join(KINDS)}")
        if not is_id(event["item"]) or not is_id(event.get("basket"), absent=True):
            raise Refused(400, f"events[{i}]: item or basket: wrong; allowed: a whole number or a text")
        for key in ("quantity", "value"):
            number = event.get(key, 1)
            if type(number) not in (int, float) or not 0 <= number <= 1e9:
                raise Refused(400, f"events[{i}].{key}: wrong; allowed: a number from 0 to 1e9")
        records.append(
            {"user": document["user"], "time": now(), "place": document.get("place"),
             "request_id": document["request_id"], **event}
        )  # fmt: skip
    return records


def is_id(value: Any, *, absent: bool = False) -> bool:
    """Say whether a value may be an id of the data stage."""
    if value is None:
        return absent
    return (type(value) is int and abs(value) < 10**18) or (type(value) is str and 0 < len(value) <= 200)


def now() -> str:
    """Return the time as the data stage reads it, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
