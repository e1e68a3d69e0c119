"""The private CPU cluster's HTTP server, and the edge's on loopback: JSON over HTTP/1.1, verified bundle, standard library.

GET /healthz answers once the process runs, /readyz once the bundle is verified and its golden answers hold.
POST /v1/recommend (or /v1/search, by the bundle's task) takes one request of `serve.runtime.Model.predict`, or a list.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError
from serve.runtime import BadRequest, Model, open_bundle
from serve.trust import key_id, parse_key

LARGEST_BODY = 4 * 1024 * 1024
MOST_REQUESTS = 256
SECONDS_TO_SEND = 10

log = logging.getLogger("serve")


class Server(ThreadingHTTPServer):
    """One model behind HTTP; `model` is None until it is verified."""

    daemon_threads = True
    model: Model | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that went away in one line, and what is our fault with its trace."""
        fault = sys.exc_info()[1]
        if isinstance(fault, ConnectionError):
            log.info("%s went away: %s", client_address[0], fault)
        else:
            log.error("a connection of %s failed", client_address[0], exc_info=fault)


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "shipyard"
    sys_version = ""
    timeout = SECONDS_TO_SEND
    # head and body are two writes: the second would wait for the client's delayed acknowledgement, 40 ms
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer the health checks."""
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # its body would be read as the next request
        if self.path == "/healthz":
            self._answer(200, {"status": "alive"})
        elif self.path == "/readyz":
            ready = self.server.model is not None
            self._answer(200 if ready else 503, {"status": "ready" if ready else "opening the bundle"})
        else:
            self._answer(404, {"error": f"no such path: {self.path[:80]}"})

    def do_POST(self) -> None:
        """Answer predictions."""
        model = self.server.model
        length = self.headers.get("Content-Length", "")
        twice = len(self.headers.get_all("Content-Length", [])) > 1
        # the number of its digits first: Python refuses to read a number of thousands of them
        large = length.isdecimal() and (len(length) > 10 or int(length) > LARGEST_BODY)
        if not length.isdecimal() or large or twice or "Transfer-Encoding" in self.headers:
            # the body is not read, so the connection cannot serve another request
            self.close_connection = True
            allowed = f"allowed: one Content-Length of at most {LARGEST_BODY} bytes"
            self._answer(413 if large else 411, {"error": allowed})
            return
        body = self.rfile.read(int(length))
        if model is None:
            self._answer(503, {"error": "opening the bundle"})
        elif self.path != f"/v1/{model.task}":
            self._answer(404, {"error": f"no such path: {self.path[:80]}; allowed: /v1/{model.task}"})
        else:
            self._answer(*_predict(model, body))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in JSON too what the standard library refuses: a method, a request line, headers."""
        self.close_connection = True
        self._answer(405 if code == 501 else code, {"error": message or "not a request of HTTP/1.1"})

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "GET, POST")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log one line a request; a client's control characters do not reach the log."""
        log.info("%s %s", self.address_string(), (format % args).encode("unicode_escape").decode())


def _predict(model: Model, body: bytes) -> tuple[int, Any]:
    """Return status and document: a wrong request is the client's fault (400), anything else ours (500)."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return 400, {"error": "the body is not valid JSON"}
    try:
        if isinstance(document, list):
            if len(document) > MOST_REQUESTS:
                raise BadRequest("too many requests at once", value=len(document), allowed=f"at most {MOST_REQUESTS}")
            return 200, model.predict(document)
        return 200, model.predict([document])[0]
    except BadRequest as fault:
        return 400, {"error": str(fault)}
    except Exception:
        log.exception("a prediction failed")
        return 500, {"error": "internal error"}


def main(arguments: list[str] | None = None) -> int:
    """Serve a bundle until SIGTERM; exit with 1 when it is not to be trusted."""
    parser = argparse.ArgumentParser(prog="python -m serve.server", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--artifact", required=True, help="name that the bundle was attested as, e.g. recommend")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback alone)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=0, help="threads of the engine, 0 for one a core")
    parser.add_argument(
        "--attestation", default=os.environ.get("SHIPYARD_ATTESTATION", ""), help="or SHIPYARD_ATTESTATION"
    )
    parser.add_argument(
        "--trusted-key", default=os.environ.get("SHIPYARD_TRUSTED_KEY", ""), help="or SHIPYARD_TRUSTED_KEY"
    )
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    try:
        key = parse_key(chosen.trusted_key, "--trusted-key")
        server = Server((chosen.host, chosen.port), Handler)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stop.set())
        # alive while the bundle is verified, ready after it
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.model = open_bundle(
            chosen.bundle, chosen.artifact, chosen.attestation, {key_id(key): key}, chosen.threads
        )
    except (ShipyardError, OSError, OverflowError) as fault:  # the last is a port that no machine has
        print(f"error: {fault}", file=sys.stderr)
        return 1
    log.info("ready: %s on %s port %d", chosen.artifact, *server.server_address[:2])
    stop.wait()
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
