"""Our CPU server beside others on the same bundle, requests and machine: capacity, latency, memory, start-up.

Every server runs the same `serve.runtime.Model` on the same graph, with one thread of the engine and its own batching, in
an environment of its own, pinned to one core; the load comes from another. The limit is the model in a bare loop on the
server's core, at its best batch. Figures are of this machine and of this moment: run it where nothing else runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import serve
from models.release import attest
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST
from shipyard import load

PATH = "/v1/recommend"
OURS = "shipyard"
PEERS = Path(__file__).with_name("peers")
CODE = Path(serve.__file__).parents[1]
ROOM = ("cryptography", "numpy", "onnxruntime", "rfc8785", "tokenizers")
PACKAGES = {"fastapi": ("fastapi", "uvicorn[standard]"), "litserve": ("litserve",), "bentoml": ("bentoml",)}
CONNECTIONS = 32
BATCH_MS = {OURS: ("10", "25"), "fastapi": ("0",), "litserve": ("0.5", "2", "5"), "bentoml": ("0",)}
"""Settings of a server's batching that are tried; the one with the largest capacity is reported."""

BARE = """
import json, os, sys, time
from pathlib import Path
from serve.runtime import Model
folder, seconds, requests = Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.stdin.read())
model = Model(folder, json.loads((folder / "bundle.json").read_bytes()), threads=1)
found = {}
for size in (1, 4, 16, 64):
    batch = [requests[k % len(requests)] for k in range(size)]
    model.predict(batch)
    begin, rounds = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        model.predict(batch)
        rounds += 1
    found[size] = rounds * size / (time.perf_counter() - begin)
empty = [{"history": [], "k": 1}]
times = []
for _ in range(300):
    begin = time.perf_counter()
    model.predict(empty)
    times.append(time.perf_counter() - begin)
print(json.dumps({"requests_per_second": found, "small_ms": sorted(times)[150] * 1e3}))
"""


@dataclass(frozen=True)
class Contender:
    """One server: its command, what it adds to the environment, and how a request's document is put to it."""

    name: str
    command: tuple[str, ...]
    surroundings: Mapping[str, str]
    wrapped: bool = False


def bench(
    bundle: Path,
    names: Sequence[str],
    seconds: float,
    out: Path,
    constraints: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measure our server, the peers `names` and the bare model on a cpu bundle; write `out`/bench.json and bench.md.

    Raises:
        ShipyardError: there are fewer than two cores, a peer is unknown, or a server does not start.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ShipyardError("bench: one core alone", allowed="two: one for the server, one for the load")
    if unknown := [name for name in names if name not in PACKAGES]:
        raise ShipyardError("bench: unknown server", value=unknown[0], allowed=", ".join(PACKAGES))
    requests = [golden["request"] for golden in read_json(bundle / MANIFEST)["golden"] if golden["request"]["history"]]
    out.mkdir(parents=True, exist_ok=True)
    progress("bench: the bare model", 0, len(names) + 2)
    record: dict[str, Any] = {"bare": _bare(bundle, requests, seconds, cores[0]), "servers": {}, "seconds": seconds,
                              "processor": _processor(), "bundle": sha256_file(bundle / MANIFEST)}  # fmt: skip
    for done, name in enumerate((OURS, *names)):
        progress(f"bench: {name}", done + 1, len(names) + 2)
        tried = [
            _measure(found, bundle, requests, seconds, cores, out)
            for found in _contenders(name, bundle, out, constraints)
        ]
        record["servers"][name] = max(tried, key=lambda told: float(told["capacity"]["throughput"]))
    (out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "bench.md").write_text(markdown(record))
    return record


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a bench."""
    best = max(record["bare"]["requests_per_second"].values())
    lines = [
        "| server | requests/s | of the bare model | p50, p99 at half load | one small request over the bare model | memory "
        "| start-up |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, told in record["servers"].items():
        half, over = told["half"], (told["small_ms"] - record["bare"]["small_ms"]) * 1e3
        lines.append(
            f"| {name} | {told['capacity']['throughput']:.0f} | {told['capacity']['throughput'] / best:.0%} | "
            f"{half['p50_ms']:.1f} ms, {half['p99_ms']:.1f} ms | {over:.0f} µs | {told['memory_mb']:.0f} MB | "
            f"{told['start_seconds']:.1f} s |"
        )
    bare = ", ".join(f"{rate:.0f} at {size}" for size, rate in record["bare"]["requests_per_second"].items())
    return "\n".join(lines) + f"\n\nThe bare model, requests/s by batch: {bare}. {record['processor']}.\n"


def _contenders(name: str, bundle: Path, out: Path, constraints: Path) -> list[Contender]:
    """Return a server in each setting that is tried, its environment made if it is not there."""
    if name == OURS:
        key = Ed25519PrivateKey.generate()
        artifact = read_json(bundle / MANIFEST)["name"]
        trusted = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        command = (sys.executable, "-m", "serve.server", "--bundle", str(bundle), "--artifact", artifact, "--workers", "1",
                   "--attestation", attest(artifact, sha256_file(bundle / MANIFEST), key))  # fmt: skip
        return [
            Contender(f"{name} {ms} ms", (*command, "--budget-ms", ms), {"SHIPYARD_TRUSTED_KEY": trusted})
            for ms in BATCH_MS[name]
        ]
    room = out / name
    python = room / "bin" / "python"
    if not (room / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(room)], check=True)
        # the peer's own packages as it likes them; those that the model needs as here
        pins = room / "constraints.txt"
        lines = constraints.read_text().splitlines()
        pins.write_text("\n".join(line for line in lines if line.partition("==")[0] in ROOM) + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), *PACKAGES[name], *ROOM],
                       check=True)  # fmt: skip
        (room / ".complete").touch()
    run = (str(python), str(PEERS / f"{name}_app.py"))
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "LIT_SERVER_DISABLE_TELEMETRY": "1"}
    return [
        Contender(f"{name} {ms} ms", run, {"BATCH_MS": ms, **quiet}, wrapped=name == "bentoml") for ms in BATCH_MS[name]
    ]


def _measure(
    found: Contender, bundle: Path, requests: Sequence[Any], seconds: float, cores: Sequence[int], out: Path
) -> dict[str, Any]:
    """Start a server, measure it and end it."""
    port = 18_500
    surroundings = os.environ | found.surroundings | {
        "PORT": str(port), "BUNDLE": str(bundle), "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command: list[str] = [*found.command, *(["--port", str(port)] if found.name.startswith(OURS) else [])]
    everywhere = os.sched_getaffinity(0)
    begin = time.perf_counter()
    os.sched_setaffinity(0, {cores[0]})  # a child has its parent's
    with (out / f"{found.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=surroundings, stdout=log, stderr=log,
            start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        small = _body(found, {"history": [], "k": 1})
        _wait(process, port, small, out / f"{found.name}.log")
        started = time.perf_counter() - begin
        os.sched_setaffinity(0, {cores[1]})
        asked = [load.request(PATH, _body(found, request)) for request in requests]
        load.closed(port, asked, min(1.0, seconds), CONNECTIONS)  # batchers learn
        capacity = load.closed(port, asked, seconds, CONNECTIONS)
        half = load.opened(port, asked, seconds, max(1.0, capacity.throughput / 2))
        alone = load.closed(port, [load.request(PATH, small)], min(2.0, seconds), 1)
        return {
            "setting": found.name, "capacity": capacity.record(), "half": half.record(),
            "small_ms": round(alone.quantile(0.5), 4), "memory_mb": round(_memory(process.pid) / 1e6, 1),
            "start_seconds": round(started, 2),
        }  # fmt: skip
    finally:
        os.sched_setaffinity(0, everywhere)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _body(found: Contender, request: Any) -> bytes:
    return json.dumps({"requests": [request]} if found.wrapped else request).encode()


def _wait(process: "subprocess.Popen[bytes]", port: int, body: bytes, log: Path) -> None:
    end = time.monotonic() + 60
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{PATH}", data=body, headers={"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                told = log.read_text().strip().splitlines()
                raise ShipyardError(f"bench: {log.stem} does not start", value=told[-1] if told else "") from None
            time.sleep(0.05)


def _bare(bundle: Path, requests: Sequence[Any], seconds: float, core: int) -> dict[str, Any]:
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(bundle), str(min(seconds, 3))],
        input=json.dumps(list(requests)), env=os.environ | {"PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    os.sched_setaffinity(0, everywhere)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _memory(pid: int) -> int:
    """Return the bytes that a process and all below it hold, what they share counted once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            told = Path(f"/proc/{one}/smaps_rollup").read_text()
            waiting += [int(child) for task in Path(f"/proc/{one}/task").iterdir()
                        for child in (task / "children").read_text().split()]  # fmt: skip
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("Pss:"))
    return total


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
