"""What the gateway asks: our own servers over HTTP, Triton over HTTP, Triton behind a SageMaker endpoint.

Each target has threads, a circuit breaker and a deadline of its own, so that one that is slow or gone costs the others
nothing. Predictions change nothing, so a call that broke off is made once more; one that was late is not.
"""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from serve.asgi import content_digest
from serve.codec import PLURALS, Codec, Id
from serve.trace import Trace
from serve.triton import CONTENT, HEADER_LENGTH, read_answer, version, write_request

LARGEST_ANSWER = 4 * 1024 * 1024


@dataclass(frozen=True)
class Call:
    """One question to a target: the request, the seconds left, and what the logs join it by."""

    document: dict[str, Any]
    seconds: float
    id: str
    trace: Trace | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        told = {"X-Request-Id": self.id, "X-Request-Timeout-Ms": str(max(1, int(self.seconds * 1000)))}
        return told | (self.trace.headers if self.trace is not None else {})


Heard = tuple[list[Id], list[float]]
"""Products, best first, and their scores."""

Send = Callable[[Call], Heard]


class Gone(Exception):
    """A target has no answer; `why` in one word, and whether it counts against its breaker."""

    def __init__(self, why: str, *, fault: bool = True) -> None:
        super().__init__(why)
        self.why, self.fault = why, fault


class Breaker:
    """Ask no more after `most` faults in a row, for a time that doubles with each further one from 0.5 to 30 seconds.

    When it is over, one call tries; the others still get no answer until it succeeds (Nygard, "Release It!", 2007).
    """

    def __init__(self, most: int = 5, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._faults, self._until, self._trying = 0, 0.0, False

    @property
    def open(self) -> bool:
        """Whether the next call would get no answer."""
        return self._faults >= self._most and (self._trying or self._clock() < self._until)

    def begin(self) -> None:
        """Let a call pass.

        Raises:
            Gone: the breaker is open.
        """
        if self.open:
            raise Gone("open", fault=False)
        self._trying = self._faults >= self._most

    def end(self, *, fault: bool) -> None:
        """Note how a call ended that was let pass."""
        self._trying = False
        self._faults = self._faults + 1 if fault else 0
        if self._faults >= self._most:
            self._until = self._clock() + min(30.0, 0.5 * 2.0 ** (self._faults - self._most))


class Target:
    """One target by name, with its own threads and breaker; `seconds` is its deadline, if shorter than the request's."""

    def __init__(self, name: str, send: Send, seconds: float, threads: int = 16) -> None:
        self.name, self.breaker = name, Breaker()
        self._send, self._seconds = send, seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def ask(self, document: dict[str, Any], seconds: float, request_id: str, trace: Trace | None = None) -> Heard:
        """Return what it answers within the deadline.

        Raises:
            Gone: it is late, cannot be reached, refuses, or does not answer as it should.
        """
        self.breaker.begin()
        seconds = min(seconds, self._seconds)
        call = Call(document, seconds, request_id, trace)
        fault = True
        try:
            loop = asyncio.get_running_loop()
            heard = await asyncio.wait_for(loop.run_in_executor(self._pool, self._send, call), seconds)
            fault = False
            return heard
        except TimeoutError:
            raise Gone("late") from None
        except Gone as gone:
            fault = gone.fault
            raise
        finally:
            self.breaker.end(fault=fault)

    def close(self) -> None:
        """Let its threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def http_send(url: str, answer_key: str) -> Send:
    """Return what asks a server of ours at `url`, e.g. http://host/recommend/v1/recommend."""
    pool = _pool()
    plural = PLURALS[answer_key]

    def send(call: Call) -> Heard:
        body = _post(pool, url, json.dumps(call.document).encode(), call, {"Content-Type": "application/json"})[0]
        try:
            told = json.loads(body)[plural]
            return _checked([one[answer_key] for one in told], [one["score"] for one in told])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Gone("corrupt") from None

    return send


def triton_send(url: str, codec: Codec) -> Send:
    """Return what asks Triton at `url`, e.g. http://host/v2/models/search/infer."""
    pool = _pool()

    def send(call: Call) -> Heard:
        body, size = write_request(codec.encode([call.document]))
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(size)}
        answer, told = _post(pool, url, body, call, headers)
        return _decode(codec, call, answer, told.get(HEADER_LENGTH, ""))

    return send


def sagemaker_send(endpoint: str, codec: Codec, client: Any = None) -> Send:
    """Return what asks Triton behind a SageMaker endpoint, in the region and by the role of this process."""
    # its own timeouts are longer than a deadline: a thread that hangs is left behind, and comes back
    client = client or boto3.client(
        "sagemaker-runtime",
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, max_pool_connections=32),
    )

    def send(call: Call) -> Heard:
        body, size = write_request(codec.encode([call.document]))
        try:
            answer = client.invoke_endpoint(
                EndpointName=endpoint, ContentType=f"{CONTENT};json-header-size={size}", Body=body,
                **({"InferenceId": call.id} if call.id else {}),
            )  # fmt: skip
            told, content = answer["ContentType"], answer["Body"].read()
        except ClientError as fault:
            status = fault.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            raise Gone("busy" if status == 429 else "refused" if status < 500 else "failed") from None
        except BotoCoreError:
            raise Gone("unreachable") from None
        return _decode(codec, call, content, told.rpartition("json-header-size=")[2])

    return send


def _pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=16, block=False, retries=False)


def _post(
    pool: urllib3.PoolManager, url: str, body: bytes, call: Call, headers: dict[str, str]
) -> tuple[bytes, urllib3.HTTPHeaderDict]:
    end = time.monotonic() + call.seconds
    for again in (True, False):
        left = end - time.monotonic()
        if left <= 0:
            raise Gone("late")
        try:
            answer = pool.request(
                "POST", url, body=body, headers=headers | call.headers, timeout=urllib3.Timeout(left), redirect=False,
                preload_content=False,
            )  # fmt: skip
            content = answer.read(LARGEST_ANSWER + 1)
            if len(content) > LARGEST_ANSWER:
                answer.close()
                raise Gone("corrupt")
            answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as fault:
            # a connection that is refused is a timeout to urllib3
            refused = isinstance(fault, urllib3.exceptions.NewConnectionError)
            if isinstance(fault, urllib3.exceptions.TimeoutError) and not refused:
                raise Gone("late") from None
            if again:
                continue
            raise Gone("unreachable") from None
        if answer.status in (429, 503):
            raise Gone("busy", fault=answer.status == 503)
        if answer.status != 200:
            raise Gone("refused" if answer.status < 500 else "failed", fault=answer.status != 400)
        # one that sends none, as Triton does, is held to its form alone
        if (told := answer.headers.get("content-digest")) is not None and told.encode() != content_digest(content):
            raise Gone("corrupt")
        return content, answer.headers
    raise AssertionError("the second try returns or raises")


def _decode(codec: Codec, call: Call, body: bytes, head: str) -> Heard:
    try:
        found, outputs = read_answer(body, int(head) if head.isascii() and head.isdecimal() and len(head) < 10 else -1)
        if found != version(codec.manifest["model"]):
            # its rows are those of another catalogue
            raise Gone("another-release")
        rows, scores = outputs["rows"], outputs["scores"]
        if not rows.shape == scores.shape == (1, codec.returned) or rows.min() < 1:
            raise Gone("corrupt")
        k = call.document["k"]
        return _checked([codec.answers[row - 1] for row in rows[0, :k].tolist()], scores[0, :k].tolist())
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise Gone("corrupt") from None


def _checked(products: list[Any], scores: list[Any]) -> Heard:
    """Refuse what is no ranking: another type, no number, a product named twice, an order that is none."""
    if not all(type(product) in (int, str) for product in products) or len(set(products)) != len(products):
        raise Gone("corrupt")
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise Gone("corrupt")
    if any(low > high for high, low in itertools.pairwise(scores)):
        raise Gone("corrupt")
    return products, [float(score) for score in scores]
