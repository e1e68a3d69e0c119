"""The edge component's process: open the last good models, prove them, say RUNNING, serve loopback, stay in step.

python -m serve.greengrass.device --work FOLDER --unarchived FOLDER --models WORDS --trusted-key KEY
    --thing NAME --store s3://bucket --link ipc
"""

import argparse
import logging
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

from serve.errors import ShipyardError
from serve.greengrass.agent import Agent
from serve.greengrass.link import IpcLink, Link, MqttLink, NoLink
from serve.greengrass.local import Desk, Front
from serve.greengrass.protocol import Action
from serve.greengrass.pubsub import Mailbox
from serve.greengrass.store import Read, Store
from serve.greengrass.telemetry import Telemetry
from serve.runtime import Model, open_bundle
from serve.trust import key_id, parse_key

ROUNDS = 5
"""How often each golden request is timed."""

log = logging.getLogger("edge")


def prove(store: Store, name: str, manifest: str, budget_ms: float) -> Model:
    """Open a model of the store: attestation, digests, golden answers, and their time on this device.

    Raises:
        ShipyardError: one of them does not hold.
        OSError: the device's own trouble, which may pass.
    """
    folder, spent = store.folder(name, manifest), []
    try:
        model = open_bundle(folder, name, store.attestation(name, manifest), store.keys, threads=1)
        for golden in model.manifest["golden"]:
            for _ in range(ROUNDS):
                start = time.perf_counter()
                model.predict([golden["request"]])
                spent.append(1000 * (time.perf_counter() - start))
    except (ShipyardError, OSError):
        raise
    except Exception as fault:  # libraries raise classes of their own of a file that they cannot take
        raise ShipyardError(
            f"{name}: cannot be opened on this device", value=f"{type(fault).__name__}: {fault}"[:150]
        ) from None
    if spent and (median := statistics.median(spent)) > budget_ms:
        raise ShipyardError(
            f"{name}: too slow on this device", value=f"{median:.1f} ms", allowed=f"{budget_ms} ms",
            mend="raise budgetMs in the deployment, or deploy a smaller model",
        )  # fmt: skip
    return model


def reader(store: str) -> Read:
    """Return the way to read an object of a bucket, or of a folder in a bucket's layout, as a stick that is carried there.

    A bucket is read by a process of its own, so that the memory of its client is given back.
    """
    if not store.startswith("s3://"):
        root = Path(store)

        def read_file(key: str, size: int) -> bytes:
            with (root / key).open("rb") as stream:
                return stream.read(size + 1)

        return read_file

    def read_object(key: str, size: int) -> bytes:
        command = [sys.executable, "-m", "serve.greengrass.download", f"{store.rstrip('/')}/{key}", str(size)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=600)
        except subprocess.TimeoutExpired:
            raise OSError(f"{key}: no answer in 600 s") from None
        if done.returncode != 0:
            raise OSError(done.stderr.decode(errors="replace").strip()[-200:])
        return done.stdout

    return read_object


def parse_models(words: str, unarchived: Path) -> dict[str, tuple[Path, str]]:
    """Read the deployment's words: component/version/archive/attestation, one a model, with spaces between.

    Returns:
        Folder and attestation of each model, by name.

    Raises:
        ShipyardError: a word is not of this form.
    """
    found = {}
    for word in words.split():
        parts = word.split("/", 3)
        if len(parts) < 4 or any(part in ("", ".", "..") for part in parts[:3]):
            raise ShipyardError("--models: wrong", value=word[:80], allowed="component/version/archive/attestation")
        component, version, archive, attestation = parts
        found[archive] = (unarchived / component / version / archive, attestation)
    return found


def open_link(uri: str, thing: str, lost: threading.Event) -> Link:
    """Return the link that is asked for: none, ipc, or mqtt://host:port.

    Raises:
        ShipyardError: another one, or a nucleus that does not answer.
    """
    if uri == "none":
        return NoLink()
    if uri == "ipc":
        return IpcLink(lost.set)
    parsed = urlparse(uri)
    if parsed.scheme != "mqtt" or not parsed.hostname:
        raise ShipyardError("--link: no such link", value=uri, allowed="none, ipc, mqtt://host:port")
    return MqttLink(thing, parsed.hostname, parsed.port or 1883)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.greengrass.device", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that outlives versions of this component")
    parser.add_argument("--unarchived", type=Path, required=True, help="where the nucleus unpacks components")
    parser.add_argument("--models", default="", help="component/version/archive/attestation of each deployed model")
    parser.add_argument("--trusted-key", required=True, help="public key of who signs releases")
    parser.add_argument("--thing", default="", help="name of this device")
    parser.add_argument("--store", default="", help="s3://bucket of models, or a folder in its layout")
    parser.add_argument("--link", default="none", help="none, ipc or mqtt://host:port")
    parser.add_argument("--port", type=int, default=8180)
    parser.add_argument("--budget-ms", type=float, default=50.0, help="time of one recommendation, the median")
    parser.add_argument("--poll-s", type=float, default=3600.0, help="how long a lost word stays unheard, at most")
    parser.add_argument("--version", default="0.0.0", help="version of this component, for reports")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM; exit with 1 when nothing can be served or the nucleus is gone."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop, lost = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        key = parse_key(chosen.trusted_key, "--trusted-key")
        store = Store(chosen.work, {key_id(key): key})
        deployed = {}
        for name, (folder, attestation) in parse_models(chosen.models, chosen.unarchived).items():
            try:
                deployed[name] = store.adopt(name, folder, attestation)
            except (ShipyardError, OSError) as fault:
                # the last good one serves, if there is one
                log.error("deployed model %s: %s", name, fault)
        totals = chosen.work / "telemetry.json"
        desk = Desk(Telemetry(totals.read_text(encoding="utf-8", errors="replace") if totals.is_file() else ""))
        link = open_link(chosen.link, chosen.thing, lost)
        agent = Agent(
            store, desk, link, chosen.thing, reader(chosen.store), lambda n, m: prove(store, n, m, chosen.budget_ms),
            poll=chosen.poll_s, version=chosen.version,
        )  # fmt: skip
        front = Front(chosen.port, desk, agent.status)
        threading.Thread(target=front.serve_forever, daemon=True).start()
        action = agent.start(deployed)
        Mailbox(desk, link).open()
        link.running()
    except (ShipyardError, OSError, OverflowError) as fault:  # the last is a port that no machine has
        print(f"error: {fault}", file=sys.stderr)
        return 1
    log.info("ready: %s on port %d", ", ".join(sorted(desk.models)), front.server_address[1])
    # a daemon: a process that is to end does not wait for a download, which may take minutes
    worker = threading.Thread(target=_guard, args=(agent, stop, lost, action), daemon=True)
    worker.start()
    while not stop.is_set() and not lost.wait(1.0):
        pass
    stop.set()
    worker.join(timeout=20)
    front.shutdown()
    return 1 if lost.is_set() else 0


def _guard(agent: Agent, stop: threading.Event, lost: threading.Event, action: Action | None) -> None:
    """Run the agent; a fault that it does not know ends the process, for the supervisor starts it again from its state."""
    try:
        agent.run(stop, action)
    except Exception:
        log.exception("the agent failed")
        lost.set()


if __name__ == "__main__":
    sys.exit(main())
