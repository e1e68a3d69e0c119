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


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "shipyard"
    sys_version = ""
    timeout = SECONDS_TO_SEND

    def do_GET(self) -> None:
        """Answer the health checks."""
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
        if not length.isdecimal() or int(length) > LARGEST_BODY or "Transfer-Encoding" in self.headers:
            # the body is not read, so the connection cannot serve another request
            self.close_connection = True
            self._answer(
                413 if length.isdecimal() else 411, {"error": f"allowed: a body of at most {LARGEST_BODY} bytes"}
            )
            return
        body = self.rfile.read(int(length))
        if model is None:
            self._answer(503, {"error": "opening the bundle"})
        elif self.path != f"/v1/{model.task}":
            self._answer(404, {"error": f"no such path: {self.path[:80]}; allowed: /v1/{model.task}"})
        else:
            self._answer(*_predict(model, body))

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log one line a request."""
        log.info("%s %s", self.address_string(), format % args)


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
    except (ShipyardError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    log.info("ready: %s on %s port %d", chosen.artifact, *server.server_address[:2])
    stop.wait()
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
