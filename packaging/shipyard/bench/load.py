"""Load on an HTTP server from one thread of its own: how much it answers, and how late.

Requests are bytes that are made beforehand, connections are kept. Closed: every connection asks again when it is
answered, which finds the capacity. Open: requests leave at set times whatever became of the others, and a delay counts from
the time at which a request should have left, or a stall would hide the requests that it held up.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Load:
    """What a run saw: answers with status 200, their latencies in seconds, the others by status, and how long it took."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    others: dict[int, int] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    def quantile(self, q: float) -> float:
        """Return a quantile of the latencies in milliseconds, nan without any."""
        return float(np.quantile(self.latencies, q) * 1e3) if self.latencies else float("nan")

    def record(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "throughput": round(self.throughput, 1), "p50_ms": round(self.quantile(0.5), 3),
            "p99_ms": round(self.quantile(0.99), 3), "others": {str(k): v for k, v in sorted(self.others.items())},
        }  # fmt: skip


def request(path: str, body: bytes) -> bytes:
    """Return a request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def closed(port: int, requests: Sequence[bytes], seconds: float, connections: int) -> Load:
    """Ask on each of `connections` without a pause."""
    return asyncio.run(_run(port, requests, seconds, connections, None))


def opened(port: int, requests: Sequence[bytes], seconds: float, rate: float, connections: int = 64) -> Load:
    """Ask `rate` times a second, on as many connections as are free, at most `connections`."""
    return asyncio.run(_run(port, requests, seconds, connections, rate))


async def _run(port: int, requests: Sequence[bytes], seconds: float, connections: int, rate: float | None) -> Load:
    found = Load(seconds)
    begin = time.perf_counter()
    end = begin + seconds
    count = iter(range(10**12))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                n = next(count)
                due = time.perf_counter() if rate is None else begin + n / rate
                if due >= end:
                    return
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                writer.write(requests[n % len(requests)])
                status = await _answer(reader)
                now = time.perf_counter()
                if status == 200 and now <= end:
                    found.latencies.append(now - due)
                elif status != 200:
                    found.others[status] = found.others.get(status, 0) + 1
        except (OSError, asyncio.IncompleteReadError):
            found.others[0] = found.others.get(0, 0) + 1
        finally:
            writer.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    return found


async def _answer(reader: asyncio.StreamReader) -> int:
    """Read one answer; return its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
        return status
    await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    return status
