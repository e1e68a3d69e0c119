"""The edge in figures: sizes, time to ready, memory, latency on one core, and what an update of the model costs to send.

Run by `make bench-edge`; prints a table, writes build/bench/edge.json, and exits with 1 where a figure misses its aim. Three
models of the same store are made of all households, by a short training: last week's; that one with a week of baskets more,
as `shipyard warm` makes it; and one that was trained anew on the same data. The shipped archive is installed by its own
script and serves on one core; a client on another one asks it the golden requests over one connection. Stages that are
done are skipped.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import timedelta
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console
from rich.table import Table

from models.config import load_fleet
from models.release import attest
from serve.engine import machine
from serve.files import sha256_file
from serve.greengrass import recipe
from serve.greengrass.delta import make_delta
from serve.trust import MANIFEST
from shipyard.line import RUNTIME, Line
from shipyard.weekly import WeeklyLine
from tests.conftest import ROOT

NAME, ARTIFACT = "edge_recommend", "edge-recommend"
WEEK = timedelta(days=7)
STARTS, REQUESTS, WARM_UP = 5, 2000, 200
PROFILE = """
[profile.bench]
households = 0
tower_steps = 24
tower_batch = 48
joint_steps = 200
joint_batch = 64
joint_sampled = 4000
validation_examples = 200
test_examples = 500
strong_baselines = false
default_gate = { over_before = -1.0, over_baseline = -1.0, over_teacher = -1.0 }
"""


def run(stage, build):
    """Run a stage and say so."""
    print(f"{build.name}: {stage.name} {stage.unit}", file=sys.stderr)
    return stage.run(build)


def line(fleet, build, back=timedelta(0)):
    """Return the line of the store's model and its teacher, on data that end `back` before those of fleet.toml."""
    days = {key: getattr(fleet.data, key) - back for key in ("valid_from", "test_from")}
    wanted = {name: fleet.submodel[name] for name in ("recommend", NAME)}
    fleet = fleet.model_copy(update={"data": fleet.data.model_copy(update=days), "submodel": wanted})
    return Line(fleet, "bench", ROOT, build, lambda *_: None, run)


def models(fleet, build):
    """Return the lines of last week's model, of the warm update and of the retraining, by name."""
    before, retrained = line(fleet, build / "last-week", WEEK), line(fleet, build / "retrained")
    for found in (before, retrained):
        found.bundle(NAME)
    updated = WeeklyLine(retrained.fleet, "bench", ROOT, build / "warm", lambda *_: None, run, earlier=before.build)
    updated.__dict__["data"] = retrained.data
    return {"last week's": before, "warm update": updated, "retrained": retrained}


def archive(found):
    """Return the zip of a line's model."""
    return found.bundle(NAME).folder / "upload" / f"{ARTIFACT}.zip"


class Device:
    """The shipped runtime, installed and started as a nucleus would, on one core."""

    def __init__(self, root, runtime, model):
        self.work, self.code = root / "work", root / "code"
        self.work.mkdir(parents=True)
        architecture = {"x86_64": "amd64"}.get(platform.machine(), platform.machine())
        self.archive = runtime / "upload" / f"{recipe.archive(architecture)}.zip"
        with zipfile.ZipFile(self.archive) as stream:
            stream.extractall(self.code)
        unarchived = root / "unarchived"
        with zipfile.ZipFile(model) as stream:
            stream.extractall(unarchived / "component" / "1" / ARTIFACT)
        key = Ed25519PrivateKey.generate()
        manifest = sha256_file(unarchived / "component" / "1" / ARTIFACT / MANIFEST)
        trusted = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        words = f"component/1/{ARTIFACT}/{attest(ARTIFACT, manifest, key)}"
        self.arguments = [
            self.code,
            self.work,
            unarchived,
            words,
            trusted,
            self.port,
            "bench",
            "",
            50,
            3600,
            "1.0.0",
            "none",
        ]
        # the interpreter itself: the packages of this environment are not the device's
        self.environment = {"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"}

    def install(self):
        """Install by the component's own script; return seconds."""
        began = time.perf_counter()
        command = ["sh", self.code / "install.sh", self.code, self.work]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        return time.perf_counter() - began

    def installed_bytes(self):
        """Return what lies on the disk: unpacked component, packages, compiled modules, model."""
        roots = (self.code, self.work, self.code.parent / "unarchived")
        return sum(path.stat().st_size for root in roots for path in root.rglob("*") if path.is_file())

    def start(self):
        """Start the process on the first core; return it and the seconds until it is ready."""
        core = min(os.sched_getaffinity(0))
        began = time.perf_counter()
        process = subprocess.Popen(
            ["sh", self.code / "run.sh", *map(str, self.arguments)], env=self.environment, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        while process.poll() is None:
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return process, time.perf_counter() - began
            except (OSError, HTTPException):
                pass
            time.sleep(0.01)
        raise RuntimeError(f"the device ended with {process.returncode}")


def serve(runtime, model, golden):
    """Return the figures of a device that serves a model."""
    with tempfile.TemporaryDirectory() as folder:
        device, ready = Device(Path(folder), runtime, model), []
        install = device.install()
        for number in range(STARTS + 1):
            process, seconds = device.start()
            ready.append(seconds)
            if number < STARTS:
                process.terminate()
                process.wait()
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores - {min(cores)} or cores)
        try:
            before = processor_seconds(process.pid)
            spent = ask(device.port, golden)
            busy = processor_seconds(process.pid) - before
        finally:
            os.sched_setaffinity(0, cores)
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
        process.wait()
        peak = next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("VmHWM:"))
        return {
            "runtime_archive_mb": device.archive.stat().st_size / 1e6,
            "installed_mb": device.installed_bytes() / 1e6, "install_s": install, "first_ready_s": ready[0],
            "ready_s": statistics.median(ready[1:]), "peak_memory_mb": peak / 1e6,
            "p50_ms": float(np.percentile(spent, 50)), "p99_ms": float(np.percentile(spent, 99)),
            "processor_ms": 1000 * busy / (REQUESTS + WARM_UP),
        }  # fmt: skip


def processor_seconds(pid):
    """Return the seconds that a process has spent on processors, which other work on the machine hardly changes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(port, golden):
    """Return the milliseconds of single recommendations over one connection, after some that warm up."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    bodies, spent = [json.dumps(entry["request"]) for entry in golden], []
    for number in range(REQUESTS + WARM_UP):
        began = time.perf_counter()
        connection.request("POST", f"/{ARTIFACT}/v1/recommend", bodies[number % len(bodies)])
        answer = connection.getresponse()
        answer.read()
        spent.append(1000 * (time.perf_counter() - began))
        assert answer.status == 200
    return spent[WARM_UP:]


ROWS = (
    ("model_mb", "model of one store's assortment, MB", 10),
    ("products", "products of it", None),
    ("runtime_archive_mb", "runtime's archive, MB", None),
    ("installed_mb", "on the disk, MB", None),
    ("install_s", "installation, s", None),
    ("first_ready_s", "time to ready after it, s", None),
    ("ready_s", "time to ready, s", None),
    ("peak_memory_mb", "peak memory, MB", 150),
    ("p50_ms", "one recommendation, p50, ms", 5),
    ("p99_ms", "one recommendation, p99, ms", None),
    ("processor_ms", "processor time of one, ms", None),
    ("warm_delta", "delta of a warm weekly update, of the archive", 0.25),
    ("retrained_delta", "delta of a full retraining, of the archive", None),
    ("last_ndcg", "nDCG@10: last week's model, on its own test period", None),
    ("warm_ndcg", "nDCG@10: after the warm update", None),
    ("retrained_ndcg", "nDCG@10: retrained, on the same test period", None),
)
"""Key, words and aim (at most) of each figure."""


def main():
    """Print the figures beside their aims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench", help="folder of results and stages")
    build = parser.parse_args().build.resolve()
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "fleet.toml")
        scratch.write_text((ROOT / "fleet.toml").read_text() + PROFILE)
        made = models(load_fleet(scratch), build / "edge")
    base, folder = made["last week's"], made["last week's"].bundle(NAME).folder / "bundle"
    manifest = json.loads((folder / MANIFEST).read_text())
    figures = {
        "model_mb": archive(base).stat().st_size / 1e6,
        "products": len(json.loads((folder / manifest["catalogue"]).read_text())["products"]),
    } | serve(base.bundle(RUNTIME).folder, archive(base), manifest["golden"])
    for key, name in (("last", "last week's"), ("warm", "warm update"), ("retrained", "retrained")):
        whole = archive(made[name]).read_bytes()
        figures[f"{key}_ndcg"] = made[name].evaluate.said["submodels"][NAME]["after"]["value"]
        if key != "last":
            figures[f"{key}_delta_bytes"] = len(make_delta(folder, whole))
            figures[f"{key}_delta"] = figures[f"{key}_delta_bytes"] / len(whole)
    missed = [words for key, words, most in ROWS if most is not None and figures[key] > most]
    packages = ("numpy", "onnxruntime", "zstandard")
    result = {
        "machine": machine() | {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "versions": {name: version(name) for name in packages}, "figures": figures,
        "aims": {key: most for key, _, most in ROWS if most is not None}, "missed": missed,
    }  # fmt: skip
    (build / "edge.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("figure", "value", "aim", "")
    for key, words, most in ROWS:
        told = "" if most is None else "misses its aim" if words in missed else "holds"
        table.add_row(words, f"{figures[key]:.4g}", "" if most is None else f"at most {most}", told)
    console = Console(width=110)
    console.print(table)
    console.print(f"load of the machine {result['machine']['load']:.1f}; wrote {build / 'edge.json'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
