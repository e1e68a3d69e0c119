"""What our HTTP servers share: routes, JSON, bounds on sizes and times, metrics; an application of ASGI 3.

Every fault of a client is told in one line of JSON, {"error": ...}; a fault of ours is a 500 and a trace in the log.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.trace import Trace, begin

LARGEST_BODY = 4 * 1024 * 1024
LARGEST_HEAD = 32 * 1024
SECONDS_TO_SEND = 10
SECONDS_TO_TAKE = 30
DEADLINE_HEADER = "x-request-timeout-ms"

CLOSE = {"connection": "close"}

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

log = logging.getLogger("serve")


@dataclass(frozen=True)
class Asked:
    """A request: headers by name in small letters, its body, an id, and its place in a trace."""

    headers: Mapping[str, str]
    body: bytes
    id: str
    trace: Trace

    def seconds(self, default: float) -> float:
        """Return the time that the client gives the request.

        Raises:
            Refused: its header is no number of milliseconds.
        """
        given = self.headers.get(DEADLINE_HEADER, "")
        if not given:
            return default
        if not given.isascii() or not given.isdecimal() or len(given) > 5 or not int(given):
            raise Refused(400, f"{DEADLINE_HEADER}: wrong; value: {given[:20]!r}; allowed: 1 to 99999")
        return int(given) / 1000

    def json(self) -> Any:
        """Return the body's document.

        Raises:
            Refused: it is not JSON.
        """
        try:
            return load(self.body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not valid JSON") from None


@dataclass(frozen=True)
class Answer:
    """An answer; `content` is sent as it is where it is bytes, else as JSON."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = "application/json"


class Refused(Exception):
    """A request that is answered by a fault."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.answer = Answer(status, {"error": error}, headers or {})


Handler = Callable[[Asked], Awaitable[Answer]]


class App:
    """Routes behind an optional prefix; health checks and metrics are at /healthz, /readyz and /metrics without it too."""

    def __init__(self, routes: Mapping[tuple[str, str], Handler], prefix: str = "") -> None:
        self.prefix = prefix.rstrip("/")
        self.ready = False
        self.draining = False
        self.registry = CollectorRegistry()
        own: dict[tuple[str, str], Handler] = {
            ("GET", "/healthz"): self._alive, ("GET", "/readyz"): self._ready, ("GET", "/metrics"): self._metrics,
        }  # fmt: skip
        self._routes = {**routes, **own}
        self._requests = Counter("requests", "Requests by path and status", ("path", "status"), registry=self.registry)
        self._seconds = Histogram("request_seconds", "From the whole request to the answer", ("path",), buckets=TIMES,
                                  registry=self.registry)  # fmt: skip
        self._running = Gauge("requests_running", "Requests that are being answered", registry=self.registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request of ASGI."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        path = scope["raw_path"].decode("latin-1")
        route = (scope["method"], self._without_prefix(path))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        trace = begin(headers)
        close = self.draining
        whole = b""
        self._running.inc()
        try:
            handler = self._route(route, scope, headers)
            close = True  # until its body is read, what follows is no request
            body = await _body(receive, headers)
            close = self.draining
            answer = await handler(Asked(headers, body, request_id, trace))
            whole = answer.content if isinstance(answer.content, bytes) else dump(answer.content)
        except Refused as refused:
            answer = refused.answer
        except ConnectionError as fault:
            log.info("request id=%s went away: %s", request_id, fault)
            answer = Answer(408, {"error": str(fault)})
        except Exception:
            log.exception("request id=%s failed", request_id)
            answer = Answer(500, {"error": "internal error"})
        finally:
            self._running.dec()
        await _send(send, answer, whole or dump(answer.content), request_id, close)
        known = route[1] if route in self._routes else "other"
        seconds = loop.time() - start
        self._requests.labels(known, str(answer.status)).inc()
        self._seconds.labels(known).observe(seconds)
        # under overload, a line for each refusal would cost more than the refusal; the counter above tells them
        if known not in ("/healthz", "/readyz", "/metrics") and answer.status != 429:
            shown = path[:80].encode("unicode_escape").decode()
            log.info("request id=%s method=%s path=%s status=%d ms=%.1f trace=%s span=%s parent=%s",
                     request_id, scope["method"], shown, answer.status, seconds * 1e3, trace.id, trace.span,
                     trace.parent or "-")  # fmt: skip

    def _without_prefix(self, path: str) -> str:
        # health checks come without it: a load balancer asks each target itself
        return path.removeprefix(self.prefix) if self.prefix and path.startswith(self.prefix + "/") else path

    def _route(self, route: tuple[str, str], scope: Any, headers: Mapping[str, str]) -> Handler:
        if sum(len(name) + len(value) for name, value in headers.items()) + len(scope["raw_path"]) > LARGEST_HEAD:
            raise Refused(431, f"allowed: headers of at most {LARGEST_HEAD} bytes", CLOSE)
        if len(headers) > 100 or len(scope["headers"]) > 100:
            raise Refused(431, "allowed: at most 100 headers", CLOSE)
        if route[0] not in ("GET", "POST"):
            raise Refused(405, f"no such method: {route[0]}; allowed: GET, POST", {"Allow": "GET, POST"})
        handler = self._routes.get(route)
        if handler is None or scope["query_string"]:
            allowed = ", ".join(path for method, path in sorted(self._routes) if method == route[0])
            shown = scope["raw_path"].decode("latin-1")[:80].encode("unicode_escape").decode()
            raise Refused(404, f"no such path: {shown}; allowed: {allowed}")
        if route[0] == "POST" and ("content-length" not in headers or "transfer-encoding" in headers):
            raise Refused(411, f"allowed: one Content-Length of at most {LARGEST_BODY} bytes")
        return handler

    async def _alive(self, asked: Asked) -> Answer:
        return Answer(200, {"status": "alive"})

    async def _ready(self, asked: Asked) -> Answer:
        if self.draining:
            return Answer(503, {"status": "draining"})
        return Answer(200, {"status": "ready"}) if self.ready else Answer(503, {"status": "opening the bundle"})

    async def _metrics(self, asked: Asked) -> Answer:
        return Answer(200, generate_latest(self.registry), type=CONTENT_TYPE_LATEST)


async def _send(send: Any, answer: Answer, whole: bytes, request_id: str, close: bool) -> None:
    headers = [
        (b"content-type", answer.type.encode()), (b"content-length", b"%d" % len(whole)),
        (b"x-request-id", request_id.encode()), (b"content-digest", content_digest(whole)),
        *((name.encode(), value.encode()) for name, value in answer.headers.items()),
        *([(b"connection", b"close")] if close else []),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": whole})


async def _body(receive: Any, headers: Mapping[str, str]) -> bytes:
    """Return the whole body.

    Raises:
        Refused: it is too large.
        ConnectionError: the client went away, or was too slow.
    """
    if int(headers.get("content-length", "0")) > LARGEST_BODY:
        raise Refused(413, f"allowed: one Content-Length of at most {LARGEST_BODY} bytes")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("before its body was whole")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            raise Refused(413, f"allowed: at most {LARGEST_BODY} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def content_digest(content: bytes) -> bytes:
    """Return the Content-Digest of a whole answer, as of RFC 9530."""
    return b"sha-256=:" + base64.b64encode(hashlib.sha256(content).digest()) + b":"


def load(content: bytes) -> Any:
    """Return the document of JSON.

    Raises:
        ValueError, RecursionError: it is none.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:  # it does not take halves of a surrogate pair, which JSON can write
        return json.loads(content)


def dump(document: Any) -> bytes:
    """Return a document as JSON.

    Raises:
        ValueError: a number of it is none of JSON's.
    """
    try:
        content = orjson.dumps(document)
    except orjson.JSONEncodeError:  # halves of a surrogate pair
        content = b"null"
    # which is also what it makes of a number that is none
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode() if b"null" in content else content
