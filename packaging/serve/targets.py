"""What the gateway asks: our own servers over HTTP, Triton over HTTP, Triton behind a SageMaker endpoint.

Predictions change nothing, so a call that broke off is made once more; one that was late is not. `serve.resilience` tells
when a target is asked at all.
"""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from serve.asgi import content_digest, dump, load
from serve.codec import PLURALS, Codec, Id
from serve.trace import Trace
from serve.triton import CONTENT, HEADER_LENGTH, read_answer, version, write_request

LARGEST_ANSWER = 4 * 1024 * 1024
LARGEST_SCORE = 1e30  # far below what a float holds: fusion adds and multiplies scores


class Stop:
    """Let go of a call that nobody waits for any more: its connection is closed, which ends its thread's wait too."""

    def __init__(self) -> None:
        self.called = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def hold(self, connection: socket.socket | None) -> None:
        """Note what the call waits at, None where it no longer does."""
        with self._lock:
            self._socket = connection
            if self.called:
                self._shut()

    def __call__(self) -> None:
        """Close what the call waits at, now or once it comes to wait."""
        with self._lock:
            self.called = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Call:
    """One question to a target: the request, the seconds that it has since it was `asked`, what the logs join it by, and
    whether it is asked `again`."""

    document: dict[str, Any]
    seconds: float
    id: str
    trace: Trace | None = None
    again: bool = False
    stop: Stop = field(default_factory=Stop)
    asked: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left; it may have waited for a thread."""
        return self.asked + self.seconds - time.monotonic()

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        told = {"X-Request-Id": self.id, "X-Request-Timeout-Ms": str(max(1, int(self.left * 1000)))}
        return told | (self.trace.headers if self.trace is not None else {})


Heard = tuple[list[Id], list[float]]
"""Products, best first, and their scores."""

Send = Callable[[Call], Heard]


class Gone(Exception):
    """A target has no answer; `why` in one word, and whether it counts against its breaker."""

    def __init__(self, why: str, *, fault: bool = True) -> None:
        super().__init__(why)
        self.why, self.fault = why, fault


def http_send(url: str, answer_key: str) -> Send:
    """Return what asks a server of ours at `url`, e.g. http://host/recommend/v1/recommend."""
    pool = connections()
    plural = PLURALS[answer_key]

    def send(call: Call) -> Heard:
        body = post(pool, url, dump(call.document), call, {"Content-Type": "application/json"})[0]
        try:
            told = load(body)[plural]
            return checked([one[answer_key] for one in told], [one["score"] for one in told])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Gone("corrupt") from None

    return send


def triton_send(url: str, codec: Codec) -> Send:
    """Return what asks Triton at `url`, e.g. http://host/v2/models/search/infer."""
    pool = connections()

    def send(call: Call) -> Heard:
        body, size = write_request(codec.encode([call.document]))
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(size)}
        answer, told = post(pool, url, body, call, headers)
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


_running = threading.local()
"""The `stop` of the call that a thread makes."""


class _Held:
    """A connection that tells the call which waits at it."""

    sock: Any

    def getresponse(self) -> Any:
        _running.stop.hold(self.sock)
        return super().getresponse()  # type: ignore[misc]


class _Connection(_Held, urllib3.connection.HTTPConnection):
    pass


class _SecureConnection(_Held, urllib3.connection.HTTPSConnection):
    pass


class _Connections(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecureConnections(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def connections() -> urllib3.PoolManager:
    """Return a pool of connections whose calls can be let go of."""
    found = urllib3.PoolManager(maxsize=16, block=False, retries=False)
    found.pool_classes_by_scheme = {"http": _Connections, "https": _SecureConnections}
    return found


def post(
    pool: urllib3.PoolManager, url: str, body: bytes, call: Call, headers: dict[str, str]
) -> tuple[bytes, urllib3.HTTPHeaderDict]:
    """Return the body and the headers of an answer 200 that came in time and as it was sent.

    Raises:
        Gone: there is none.
    """
    _running.stop = call.stop
    # a call that is a second one is not made a third time
    for again in (not call.again, False):
        if (left := call.left) <= 0 or call.stop.called:
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
            call.stop.hold(None)
            answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as fault:
            call.stop.hold(None)
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
        return checked([codec.answers[row - 1] for row in rows[0, :k].tolist()], scores[0, :k].tolist())
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise Gone("corrupt") from None


def checked(products: list[Any], scores: list[Any]) -> Heard:
    """Refuse what is no ranking: another type, no number, a product named twice, an order that is none."""
    if not all(type(product) in (int, str) for product in products) or len(set(products)) != len(products):
        raise Gone("corrupt")
    if not all(type(score) in (int, float) and abs(score) < LARGEST_SCORE for score in scores):
        raise Gone("corrupt")
    if any(low > high for high, low in itertools.pairwise(scores)):
        raise Gone("corrupt")
    return products, [float(score) for score in scores]
