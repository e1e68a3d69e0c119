"""The whole fleet on one machine: every runtime and the gateway from a release's bundles, as processes on loopback.

Each process runs the code of its own bundle. The GPU endpoint alone has a stand-in: our server answers Triton's protocol for
Triton's bundle, on the CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serve
from models.config import Fleet
from models.release import Artifact, Release, trusted_key
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.shard import SHARD, shard_name
from serve.trust import MANIFEST, Keys, load_keys
from shipyard.console import Reporter
from shipyard.look import newest, open_release
from shipyard.pages.live import page

STATE = "up.json"
CURRENT = "items.json"
"""Names the shard of fresh items that is served: its bundle and what attests it."""

SECONDS = 60
OURS = Path(serve.__file__).parents[1]


@dataclass(frozen=True)
class Member:
    """One process: an artifact's bundle, what attests it, the folder of the code, and its place."""

    name: str
    kind: str
    bundle: Path
    attestation: str
    code: Path
    port: int

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"


def artifact_folder(artifact: Artifact, release: Release, build: Path) -> Path:
    """Return the folder of an artifact's bundle below `build`/<profile>.

    Raises:
        ShipyardError: there is none, or it is another's.
    """
    unit = artifact.submodel or artifact.name.replace("-", "_")
    folder = build / release.profile / unit / "bundle" / "bundle"
    if not (folder / MANIFEST).is_file() or sha256_file(folder / MANIFEST) != artifact.manifest:
        raise ShipyardError(
            f"{folder}: not the bundle of release {release.version}",
            mend=f"shipyard release --profile {release.profile}",
        )
    return folder


def searched(release: Release) -> Artifact:
    """Return the artifact that searches.

    Raises:
        ShipyardError: the release has none.
    """
    if not (found := release.of("triton")):
        raise ShipyardError(f"release {release.version} has no search", mend="make a release that searches")
    return found[0]


def members(release: Release, build: Path, port: int) -> tuple[Member, ...]:
    """Return the processes of a release whose bundles lie in `build`/<profile>, the gateway first, at `port` and above.

    The last one is the shard of fresh items, whose bundle is there once `shipyard items` has made one.

    Raises:
        ShipyardError: a bundle is not the release's, or the release has no gateway.
    """
    folders = {a.name: artifact_folder(a, release, build) for a in release.artifacts}
    edge = next((folders[a.name] for a in release.of("greengrass-runtime")), OURS)
    code = {"triton": OURS, "greengrass-model": edge}
    served = [a for kind in ("gateway", "triton", "image-context", "greengrass-model") for a in release.of(kind)]
    if not release.of("gateway"):
        raise ShipyardError(f"release {release.version} has no gateway", mend="make a release that fuses")
    found = [
        Member(a.name, a.kind, folders[a.name], a.attestation, code.get(a.kind, folders[a.name]), port + i)
        for i, a in enumerate(served)
    ]
    search = searched(release)
    name, items = shard_name(search.name, search.manifest), folders[search.name].parents[1] / "items"
    told = read_json(items / CURRENT) if (items / CURRENT).is_file() else {}
    # one that was made for another release is none of this one's
    bundle, attestation = (told["bundle"], told["attestation"]) if told.get("name") == name else (items / "none", "")
    return (*found, Member(name, SHARD, Path(bundle), attestation, OURS, port + len(found)))


def command(member: Member, fleet: tuple[Member, ...], folder: Path) -> list[str]:
    """Return the command line of a member."""
    module = "serve.gateway" if member.kind == "gateway" else "serve.server"
    found = [sys.executable, "-m", module, "--bundle", str(member.bundle), "--artifact", member.name,
             "--attestation", member.attestation, "--port", str(member.port)]  # fmt: skip
    if member.kind == SHARD:
        return [*found, "--workers", "1", "--prefix", f"/{member.name}", "--swap", str(folder / CURRENT)]
    if member.kind != "gateway":
        return [*found, "--workers", "1"]
    told = read_json(member.bundle / "fusion.json")["targets"]
    for other in fleet:
        # a gateway that was made before there were shards knows none
        if other.kind == SHARD and all("manifest" in target for target in told.values()):
            found += ["--items", other.url]
        source = next((name for name, target in told.items() if target["artifact"] == other.name), None)
        if other.kind == "triton":
            found += ["--search", f"triton:{other.url}"]
        elif source is not None:
            found += ["--target", f"{source}={other.url}"]
    return [*found, "--feedback", str(folder / "feedback"), "--page", str(folder / "page.html")]


def up(release: Release, keys: Keys, build: Path, port: int = 8080) -> dict[str, Any]:
    """Start a release's fleet and wait until all of it is ready; return its state, as `down` reads it.

    Raises:
        ShipyardError: it is up already, a bundle is missing, or a process ends.
    """
    folder = build / "up"
    down(build)
    fleet = members(release, build, port)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [member.bundle for member in fleet if member.kind != SHARD]
    (folder / "page.html").write_text(page(shown, build / release.profile), encoding="utf-8")
    return start(fleet, trusted_key(release, keys), folder, release.version)


def start(fleet: tuple[Member, ...], key: str, folder: Path, version: str) -> dict[str, Any]:
    """Start the members, note them in `folder`/up.json, and wait until they are ready."""
    state: dict[str, Any] = {"version": version, "members": []}
    started = []
    for member in fleet:
        if member.kind == SHARD and not member.bundle.is_dir():
            continue
        started.append((member, spawn(member, fleet, key, folder)))
        note(state, *started[-1], folder)
    end = time.monotonic() + SECONDS
    for member, process in started:
        try:
            wait(member, process, folder, end)
        except ShipyardError:
            down(folder.parent)
            raise
    return state


def spawn(member: Member, fleet: tuple[Member, ...], key: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a member, which trusts `key` and logs into `folder`."""
    surroundings = os.environ | {
        "PYTHONPATH": str(member.code), "SHIPYARD_TRUSTED_KEY": key, "OMP_NUM_THREADS": "1",
        # compiled code beside its source would be a file that the bundle does not name
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with (folder / f"{member.name}.log").open("w") as log:
        return subprocess.Popen(
            command(member, fleet, folder), env=surroundings, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True, cwd=folder,
        )  # fmt: skip


def note(state: dict[str, Any], member: Member, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Write down what runs, before anything else can fail: `down` ends what is noted."""
    state["members"].append({"name": member.name, "pid": process.pid, "url": member.url, "born": _born(process.pid)})
    (folder / STATE).write_text(json.dumps(state, indent=1))


def wait(member: Member, process: subprocess.Popen[bytes], folder: Path, end: float) -> None:
    """Wait until a member is ready.

    Raises:
        ShipyardError: it ended, or it is not ready at `end`, by the monotonic clock.
    """
    while not ready(member.url):
        if process.poll() is not None or time.monotonic() > end:
            raise ShipyardError(f"{member.name} does not get ready: {last_line(member, folder)}")
        time.sleep(0.1)


def last_line(member: Member, folder: Path) -> str:
    """Return the last line that a member has logged."""
    told = (folder / f"{member.name}.log").read_text().strip().splitlines()
    return told[-1] if told else "it says nothing"


def down(build: Path) -> list[str]:
    """End what `up` has started, gently at first; return the names."""
    path = build / "up" / STATE
    if not path.is_file():
        return []
    # another process may have the number of one that is gone
    alive = [one for one in read_json(path)["members"] if one["born"] and _born(one["pid"]) == one["born"]]
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        end = time.monotonic() + seconds
        left = [one for one in alive if is_running(one)]
        for one in left:
            os.kill(one["pid"], signal.SIGCONT)
            os.kill(one["pid"], number)
        while any(is_running(one) for one in left) and time.monotonic() < end:
            time.sleep(0.05)
    path.unlink()
    return [one["name"] for one in alive]


def ready(url: str) -> bool:
    """Say whether a server is ready."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:  # noqa: S310 - an address of our own
            return bool(answer.status == 200)
    except OSError:
        return False


def _born(pid: int) -> str:
    """Return when a process was started, in the kernel's ticks; "" where there is none, or one that has ended."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if told[0] == "Z" else told[19]


def is_running(one: Mapping[str, Any]) -> bool:
    """Say whether a process that was noted still runs."""
    return _born(one["pid"]) == one["born"]


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Start or end the fleet on this machine."""
    if chosen.verb == "down":
        print(json.dumps({"ended": down(build)}))
        return 0
    path = chosen.release or newest(build)
    keys = load_keys(path.parent / "keys")
    state = up(open_release(path), keys, build, chosen.port)
    for member in state["members"]:
        reporter.line(f"serves   {member['name']} at {member['url']}, process {member['pid']}")
    print(json.dumps(state) if chosen.json else f"open {state['members'][0]['url']}/ ; end it with shipyard down")
    return 0
