"""Listen for an application: uvicorn and httptools, with a bound on a request's head, a drain and a signal to swap."""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.asgi import LARGEST_HEAD, SECONDS_TO_SEND, SECONDS_TO_TAKE, App, dump, log
from serve.trust import add_trust

MOST_CONNECTIONS = 2_000
SECONDS_KEPT = 75
"""An idle connection is kept longer than a load balancer keeps it (60 s by default), or it would send into a closed one."""


class Protocol(HttpToolsProtocol):
    """One connection: JSON also for what is not HTTP, and bounds on a request's head and on the time to take an answer."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock, for a client that says nothing holds a connection too."""
        super().connection_made(transport)
        self._part: Literal["head", "body", ""] = "head"
        self._size = 0
        self._clock: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._wind()
        if len(self.connections) > MOST_CONNECTIONS:
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head without end."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        # what is no request, as an empty line or the rest of a body that was not wanted, ended the clock of an idle one
        if self._part or (self.cycle is not None and self.cycle.response_complete):
            self._wind()
        if self._part == "head":
            self._size += len(data)
            if self._size > LARGEST_HEAD:
                self._refuse(431, f"allowed: headers of at most {LARGEST_HEAD} bytes")

    def pause_writing(self) -> None:
        """Give a client that takes nothing of its answer as long as an answer may take."""
        super().pause_writing()
        self._stuck = self.loop.call_later(SECONDS_TO_TAKE, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        self._let_take()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._unwind()
        self._let_take()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin a head."""
        self._part, self._size = "head", 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End a head."""
        self._part = "body"
        self._unwind()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a body."""
        self._part = ""
        self._unwind()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, "not a valid request of HTTP")

    def _refuse(self, status: int, error: str) -> None:
        body = dump({"error": error})
        if self.cycle is not None:
            self.cycle.disconnected = True  # a request whose end is not known gets this answer alone
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _wind(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(SECONDS_TO_SEND, self._expire)

    def _unwind(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expire(self) -> None:
        self._clock = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (answering and self._part != "body"):
            self._wind()  # what came before it is still being answered
        elif answering:
            self._refuse(408, f"the body did not come within {SECONDS_TO_SEND} s")
        else:
            self.transport.close()

    def _let_take(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class Server(uvicorn.Server):
    """Drain on the first signal, end on the second."""

    app: App
    drain: float
    loop: asyncio.AbstractEventLoop

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Say that we are not ready, serve on for `drain` seconds, then take no more and finish what has begun."""
        if self.app.draining or not self.drain:
            self.should_exit = True
        else:
            # a signal's handler runs between two steps of the loop, not in one
            self.loop.call_soon_threadsafe(self.loop.call_later, self.drain, setattr, self, "should_exit", True)
        self.app.draining = True


def serve(
    app: App, host: str, port: int, name: str, drain: float, start: Callable[[], Awaitable[None]] | None = None,
    swap: Callable[[], Awaitable[None]] | None = None, end: Callable[[], Awaitable[None]] | None = None,
) -> None:  # fmt: skip
    """Serve until a signal: alive at once, ready when `start` is done; SIGHUP calls `swap`, and `end` is awaited last.

    Raises:
        ShipyardError: from `start`.
        OSError, OverflowError: the address is not to be had.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # a line a request: what no line of ours shows is not looked up, https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    listener = socket.create_server((host, port), backlog=1024)
    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=SECONDS_KEPT,
        timeout_graceful_shutdown=20,
    )  # fmt: skip
    server = Server(config)
    server.app, server.drain = app, drain

    async def run() -> None:
        server.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        try:
            if start is not None:
                await start()
        except BaseException:
            server.should_exit = True
            await serving
            raise
        if swap is not None:
            tasks: set[asyncio.Task[None]] = set()

            def swapping() -> None:
                tasks.add(task := asyncio.ensure_future(swap()))
                task.add_done_callback(tasks.discard)

            server.loop.add_signal_handler(signal.SIGHUP, swapping)
        app.ready = True
        log.info("ready: %s on %s port %d", name, *listener.getsockname()[:2])
        await serving
        if end is not None:
            await end()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every server of ours."""
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--artifact", required=True, help="name that the bundle was attested as, e.g. recommend")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback alone)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--prefix", default="", help="path before all routes, e.g. /recommend")
    parser.add_argument(
        "--drain", type=float, default=0, help="seconds to serve on after SIGTERM, not ready (default: 0)"
    )
    add_trust(parser)
