"""What a device's own programs ask: HTTP/1.1 with JSON on loopback, for every model of the device.

POST /NAME/v1/TASK takes one request of `serve.runtime.Model.predict` or a list of them, as the private cluster's server
does; each answer also has the `probability` that it is taken on this device, which POST /NAME/v1/feedback teaches
(`serve.greengrass.adapt`). GET /healthz, /readyz and /status tell how the device is. Memory is bounded: so many
connections, so large a body, one prediction at a time and a short wait for it; what is beyond is answered with 503 at once.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serve.codec import PLURALS, BadRequest
from serve.greengrass.telemetry import Telemetry
from serve.runtime import Model

LARGEST_BODY = 512 * 1024
FEEDBACK = "feedback"
MOST_REQUESTS = 32
MOST_CONNECTIONS = 16
SECONDS_TO_WAIT = 2.0
SECONDS_TO_SEND = 10

BUSY = b'HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n{"error": "busy"}'

log = logging.getLogger("edge")


class Desk:
    """The models that answer now. They change all at once, between two predictions."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.models: Mapping[str, Model] = {}
        self.telemetry = telemetry
        self._turn = threading.Lock()

    def change(self, models: Mapping[str, Model], manifests: Mapping[str, str]) -> None:
        """Answer by these models from now on; `manifests` are the digests of their bundle.json."""
        calibrations = {name: model.manifest.get("facts", {}).get("calibration", {}) for name, model in models.items()}
        with self._turn:
            self.telemetry.learner.serve({name: (manifests[name], calibrations[name]) for name in models})
            self.models = models

    def answer(self, name: str, task: str, body: bytes) -> tuple[int, Any]:
        """Return status and document to a request in JSON."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return 400, {"error": "the body is not valid JSON"}
        return self.serve(name, task, document)

    def serve(self, name: str, task: str, document: Any) -> tuple[int, Any]:
        """Return status and document: a wrong request is the client's fault (400), anything else ours (500)."""
        if not self.models:
            return 503, {"error": "opening the models"}
        if name not in self.models or task not in (self.models[name].task, FEEDBACK):
            allowed = ", ".join(f"/{name}/v1/{found.task}" for name, found in sorted(self.models.items()))
            return 404, {"error": f"no such model or task; allowed: {allowed}, and {FEEDBACK} of each"}
        requests = document if isinstance(document, list) else [document]
        if len(requests) > MOST_REQUESTS:
            return 400, {"error": f"too many requests at once; allowed: at most {MOST_REQUESTS}"}
        if not self._turn.acquire(timeout=SECONDS_TO_WAIT):
            self.telemetry.refused(name)
            return 503, {"error": "busy"}
        try:
            answers = self._told(name, requests) if task == FEEDBACK else self._predicted(name, requests)
        except BadRequest as fault:
            return 400, {"error": str(fault)}
        except Exception:
            log.exception("a prediction failed")
            self.telemetry.failed(name)
            return 500, {"error": "internal error"}
        finally:
            self._turn.release()
        return 200, answers if isinstance(document, list) else answers[0]

    def _predicted(self, name: str, requests: list[Any]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        answers = self.models[name].predict(requests)
        self.telemetry.answered(name, time.perf_counter() - start, answers)
        for answer in answers:
            for entry in answer[PLURALS[self.models[name].answer_key]]:
                entry["probability"] = self.telemetry.learner.probability(name, entry["score"])
        return answers

    def _told(self, name: str, requests: list[Any]) -> list[dict[str, int]]:
        return [self.telemetry.learner.feedback(name, request) for request in requests]


class Front(ThreadingHTTPServer):
    """Loopback HTTP over a desk; `status` tells how the device is."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, port: int, desk: Desk, status: Callable[[], Any]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.desk, self.status = desk, status
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread of its own, or say that there are enough of them."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.sendall(BUSY)
        except OSError as fault:
            log.info("a client went away: %s", fault)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection; a client that goes away is no error of ours."""
        log.info("a connection ended", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    server: Front
    protocol_version = "HTTP/1.1"
    server_version = "shipyard"
    sys_version = ""
    timeout = SECONDS_TO_SEND
    # head and body are two writes: the second would wait for the client's delayed acknowledgement, 40 ms
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer the health checks and what the device knows of itself."""
        self.close_connection |= "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.path == "/healthz":
            self._answer(200, {"status": "alive"})
        elif self.path == "/readyz":
            ready = bool(self.server.desk.models)
            self._answer(200 if ready else 503, {"status": "ready" if ready else "opening the models"})
        elif self.path == "/status":
            self._answer(200, self.server.status())
        else:
            self._answer(404, {"error": f"no such path: {self.path[:80]}"})

    def do_POST(self) -> None:
        """Answer predictions."""
        length = self.headers.get("Content-Length", "")
        twice = len(self.headers.get_all("Content-Length", [])) > 1
        # the number of its digits first: Python refuses to read a number of thousands of them
        large = length.isdecimal() and (len(length) > 9 or int(length) > LARGEST_BODY)
        if not length.isdecimal() or large or twice or "Transfer-Encoding" in self.headers:
            # the body is not read, so the connection cannot serve another request
            self.close_connection = True
            self._answer(
                413 if large else 411, {"error": f"allowed: one Content-Length of at most {LARGEST_BODY} bytes"}
            )
            return
        body = self.rfile.read(int(length))
        name, _, task = self.path.removeprefix("/").partition("/v1/")
        self._answer(*self.server.desk.answer(name, task, body))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in JSON too what the standard library refuses: a method, a request line, headers."""
        self.close_connection = True
        self._answer(405 if code == 501 else code, {"error": message or "not a request of HTTP/1.1"})

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        if status == 405:
            self.send_header("Allow", "GET, POST")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep single requests out of a device's log: they are counted, and what a shopper asks is nobody's."""
