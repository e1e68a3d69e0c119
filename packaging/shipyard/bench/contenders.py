"""The servers of a bench: ours and others, each in an environment of its own, started on one core.

Every one runs the same `serve.runtime.Model` on the same graph with one thread of the engine, and its own batching.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import serve
from models.release import attest
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST
from shipyard.bench import load

OURS = "shipyard"
PEERS = Path(__file__).with_name("peers")
CODE = Path(serve.__file__).parents[1]
ROOM = ("cryptography", "numpy", "onnxruntime", "rfc8785", "tokenizers")
PACKAGES = {
    "fastapi": ("fastapi", "uvicorn[standard]"), "litserve": ("litserve",), "bentoml": ("bentoml",),
    "mlserver": ("mlserver",),
}  # fmt: skip
BATCH_MS = {
    OURS: ("10", "25"),
    "fastapi": ("0",),
    "litserve": ("0.5", "2", "5"),
    "bentoml": ("0",),
    "mlserver": ("2", "10"),
}
"""Settings of a server's batching that are tried; the one with the largest capacity is measured."""

Form = Literal["plain", "listed", "tensor"]
FORMS: dict[str, Form] = {"bentoml": "listed", "mlserver": "tensor"}
"""How a request's document is put to a server, where it is not put plainly."""


@dataclass(frozen=True)
class Contender:
    """One server in one setting: its command, and what it adds to the environment."""

    name: str
    setting: str
    command: tuple[str, ...]
    surroundings: Mapping[str, str]
    port: int

    def request(self, document: Mapping[str, Any]) -> bytes:
        """Return a request as it is sent; one with candidates asks our server at its own path."""
        path = "/v1/rank" if self.name == OURS and "candidates" in document else "/v1/recommend"
        form, body = FORMS.get(self.name, "plain"), json.dumps(document)
        if form == "listed":
            body = json.dumps({"requests": [document]})
        elif form == "tensor":
            path = "/v2/models/recommend/infer"
            tensor = {"name": "requests", "shape": [1, 1], "datatype": "BYTES", "data": [body]}
            body = json.dumps({"inputs": [tensor | {"parameters": {"content_type": "str"}}]})
        return load.request(path, body.encode())


def contenders(name: str, bundle: Path, rooms: Path, constraints: Path, port: int) -> list[Contender]:
    """Return a server in each setting that is tried, its environment below `rooms` made if it is not there.

    Raises:
        ShipyardError: pip cannot install it.
    """
    if name == OURS:
        key = Ed25519PrivateKey.generate()
        artifact = read_json(bundle / MANIFEST)["name"]
        trusted = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        attestation = attest(artifact, sha256_file(bundle / MANIFEST), key)
        command = (sys.executable, "-m", "serve.server", "--bundle", str(bundle), "--artifact", artifact, "--workers", "1",
                   "--attestation", attestation, "--deadline-ms", "20000")  # fmt: skip
        more = {"SHIPYARD_TRUSTED_KEY": trusted}
        return [
            Contender(name, f"{ms} ms", (*command, "--budget-ms", ms, "--port", str(port + i)), more, port + i)
            for i, ms in enumerate(BATCH_MS[name])
        ]
    python = _room(name, rooms, constraints)
    run = (str(python), str(PEERS / f"{name}_app.py"))
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "LIT_SERVER_DISABLE_TELEMETRY": "1"}
    return [
        Contender(name, f"{ms} ms", run, {"BATCH_MS": ms, **quiet}, port + i) for i, ms in enumerate(BATCH_MS[name])
    ]


def _room(name: str, rooms: Path, constraints: Path) -> Path:
    """Return the interpreter of a peer's environment: its own packages as it likes them, those of the model as here."""
    room = rooms / name
    python = room / "bin" / "python"
    if not (room / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(room)], check=True)
        pins = room / "constraints.txt"
        lines = constraints.read_text().splitlines()
        pins.write_text("\n".join(line for line in lines if line.partition("==")[0] in ROOM) + "\n")
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), *PACKAGES[name], *ROOM],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
            raise ShipyardError(f"bench: {name} cannot be installed: {told[-1]}", mend="leave it out of --peers")
        (room / ".complete").touch()
    return python


@contextmanager
def running(found: Contender, bundle: Path, core: int, logs: Path) -> Iterator[tuple[int, float]]:
    """Run a server on one core; yield its process and the seconds until it gave its first right answer.

    Raises:
        ShipyardError: it does not answer.
    """
    surroundings = os.environ | found.surroundings | {
        "PORT": str(found.port), "BUNDLE": str(bundle), "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    begin = time.perf_counter()
    everywhere = os.sched_getaffinity(0)
    path = logs / f"{found.name} {found.setting}.log"
    os.sched_setaffinity(0, {core})  # a child has its parent's
    with path.open("w") as log:
        process = subprocess.Popen(
            found.command, env=surroundings, stdout=log, stderr=log, start_new_session=True, stdin=subprocess.DEVNULL
        )
    os.sched_setaffinity(0, everywhere)
    try:
        _wait(process, found, path)
        yield process.pid, time.perf_counter() - begin
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _wait(process: "subprocess.Popen[bytes]", found: Contender, log: Path) -> None:
    end = time.monotonic() + 120
    head, _, body = found.request({"history": [], "k": 1}).partition(b"\r\n\r\n")
    path = head.split()[1].decode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{found.port}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:  # noqa: S310 - an address of our own
                if b"score" in answer.read():
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            told = log.read_text().strip().splitlines()
            raise ShipyardError(f"bench: {log.stem} does not start", value=told[-1] if told else "")
        time.sleep(0.05)


def memory(pid: int) -> int:
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


def cores() -> Sequence[int]:
    """Return the two cores of a bench: the server's and the load's.

    Raises:
        ShipyardError: there are fewer.
    """
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise ShipyardError("bench: one core alone", allowed="two: one for the server, one for the load")
    return found[:2]
