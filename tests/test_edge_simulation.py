"""The shipped process on a real MQTT broker: killed at its flushes and renames, cut off, told late, twice or not at all.

The broker is Debian's mosquitto (`make broker`). What AWS does behind it, the service of named shadows, is told here by its
documentation: it answers `get`, keeps versions, and publishes the difference. It loses, repeats and reorders what it says.
SHIPYARD_DEVICES, SHIPYARD_ROUNDS and SHIPYARD_SEED choose another course; `make simulate` takes fifty devices.
"""

import dataclasses
import json
import os
import queue
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.client import HTTPException

import paho.mqtt.client as mqtt
import pytest
from conftest import ROOT
from paho.mqtt.enums import CallbackAPIVersion
from test_edge_component import Machine, ask, edge_bundle, free_port

from models.release import attest
from serve.files import sha256_file
from serve.greengrass.delta import make_delta
from serve.greengrass.words import ANSWER, ASK, Delta, Pointer, Told, archive_key, delta_key, write_told
from serve.trust import MANIFEST
from shipyard.bundle import write_zip

NAME = "edge-recommend"
DEVICES = int(os.environ.get("SHIPYARD_DEVICES", "4"))
ROUNDS = int(os.environ.get("SHIPYARD_ROUNDS", "2"))
SEED = int(os.environ.get("SHIPYARD_SEED", "11"))

UNPACKED = ROOT / "build" / "broker"

# Runs the shipped module and sends itself SIGKILL at the n-th flush or rename; n is counted down across the process.
KILLER = """
import os, pathlib, runpy, signal, sys
left = int(sys.argv[1])
flush, rename = os.fsync, pathlib.Path.replace
def burn():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def fsync(descriptor):
    burn()
    flush(descriptor)
def replace(path, target):
    burn()
    return rename(path, target)
os.fsync, pathlib.Path.replace = fsync, replace
sys.argv = ["device", *sys.argv[2:]]
runpy.run_module("serve.greengrass.device", run_name="__main__")
"""


def mosquitto():
    """Return the broker's command and what it needs to find its libraries, or None."""
    if (found := shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")) is not None:
        return [found], {}
    if (program := UNPACKED / "usr" / "sbin" / "mosquitto").is_file():
        libraries = ":".join(sorted({str(p.parent) for p in UNPACKED.rglob("*.so*")}))
        return [str(program)], {"LD_LIBRARY_PATH": libraries}
    return None


pytestmark = pytest.mark.skipif(mosquitto() is None, reason="no mosquitto: make broker")


class Broker:
    """Debian's mosquitto on loopback; while it is down all devices are cut off."""

    def __init__(self, root):
        self.port, self.root, self.process = free_port(), root, None
        (root / "broker.conf").write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n")
        self.up()

    def up(self):
        command, more = mosquitto()
        self.process = subprocess.Popen(
            [*command, "-c", str(self.root / "broker.conf")], env=os.environ | more, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("mosquitto does not listen")

    def down(self):
        self.process.kill()
        self.process.wait()


class Shadows:
    """The service of named shadows on a broker. While `lossy` it leaves out, repeats and delays what it says."""

    def __init__(self, port, rng):
        self.desired, self.reported, self.reports = {}, {}, {}
        self.rng, self.lossy, self.lock, self.late = rng, True, threading.Lock(), []
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="shadows")
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda c, *_: c.subscribe("$aws/things/#", 1)
        self.client.on_message = self.take
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def take(self, _client, _data, message):
        thing, end = message.topic.split("/")[2], message.topic.split("/shadow/name/shipyard/")[1]
        with self.lock:
            if end == "get":
                wanted = self.desired.get(thing)
                if wanted is None:
                    self.say(thing, "get/rejected", {"code": 404})
                else:
                    self.say(thing, "get/accepted", {"state": {"desired": {"told": wanted}}})
            elif end == "update":
                assert len(message.payload) < 6 * 1024
                reported = json.loads(message.payload)["state"]["reported"]
                self.reported.setdefault(thing, {}).update(reported)
                self.reports.setdefault(thing, []).append(json.loads(reported["report"]))

    def tell(self, thing, text):
        with self.lock:
            self.desired[thing] = text
            self.say(thing, "update/delta", {"state": {"told": text}})

    def say(self, thing, end, document):
        topic, payload = f"$aws/things/{thing}/shadow/name/shipyard/{end}", json.dumps(document)
        self.late.append((topic, payload))
        if not self.lossy:
            self.late = self.late[-1:]
        elif self.rng.random() < 0.3:
            return  # lost, or said much later
        elif self.rng.random() < 0.4:
            self.client.publish(*self.rng.choice(self.late), qos=1)  # late, and maybe a second time
        self.client.publish(topic, payload, qos=1)


class Center:
    """Models in a folder of a bucket's layout; each word is a new generation."""

    def __init__(self, root, shadows, things):
        self.root, self.shadows, self.things = root, shadows, things
        self.generation, self.key, self.made = 0, None, {}
        self.words = {}

    def model(self, number, broken=False):
        if number not in self.made:
            made = edge_bundle(self.root / f"model-{number}", first=number)
            self.key = self.key or made.key
            made = dataclasses.replace(made, key=self.key)
            if broken:
                made.rewrite(lambda d: d["golden"][0]["answer"]["products"][0].update(score=9.0))
            self.made[number] = made
            write_zip(made.folder, self.root / f"{number}.zip")
            target = self.root / "bucket" / archive_key(NAME, sha256_file(self.root / f"{number}.zip"))
            target.parent.mkdir(parents=True)
            shutil.copy(self.root / f"{number}.zip", target)
            with zipfile.ZipFile(target) as stream:
                assert MANIFEST in stream.namelist()
        return self.made[number]

    def pointer(self, number, base, broken=False):
        made, archive = self.model(number, broken), self.root / f"{number}.zip"
        manifest = sha256_file(made.folder / MANIFEST)
        old = self.model(base).folder
        patch = make_delta(old, archive.read_bytes())
        delta_file = self.root / "bucket" / delta_key(NAME, sha256_file(old / MANIFEST), manifest)
        delta_file.parent.mkdir(parents=True, exist_ok=True)
        delta_file.write_bytes(patch)
        delta = Delta(sha256_file(old / MANIFEST), sha256_file(delta_file), len(patch))
        sha256, size = sha256_file(archive), archive.stat().st_size
        return Pointer(f"1.0.{number}", manifest, attest(NAME, manifest, self.key), sha256, size, delta)

    def tell(self, number, base, broken=False):
        self.generation += 1
        word = Told(self.generation, {NAME: self.pointer(number, base, broken)})
        self.words[self.generation] = word.models[NAME].manifest
        for thing in self.things:
            self.shadows.tell(thing, write_told(word))


class Device:
    """The shipped process of one device; it dies at a flush or rename while `deadly`, and is started again."""

    def __init__(self, root, thing, center, broker, rng):
        self.thing, self.center, self.rng, self.deaths, self.process = thing, center, rng, 0, None
        self.machine = Machine(root / thing, free_port())
        self.machine.deploy(center.model(0))
        self.machine.work.mkdir(parents=True)
        self.flags = [
            "--work", str(self.machine.work), "--unarchived", str(self.machine.unarchived), "--models", self.machine.words,
            "--trusted-key", self.machine.trusted, "--port", str(self.machine.port), "--thing", thing, "--poll-s", "2",
            "--store", str(center.root / "bucket"), "--link", f"mqtt://127.0.0.1:{broker.port}", "--budget-ms", "5000",
        ]  # fmt: skip
        self.generation = 0

    def start(self, deadly):
        left = self.rng.randrange(1, 30) if deadly else 10**9
        self.process = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(left), *self.flags], stderr=(self.machine.root / "log").open("a")
        )

    def keep(self, deadly):
        """Start it again where it died, as a supervisor does."""
        if self.process is None or self.process.poll() is not None:
            if self.process is not None:
                assert self.process.returncode == -9, (self.machine.root / "log").read_text()[-2000:]
                self.deaths += 1
            self.start(deadly)

    def look(self):
        """Hold what has to hold whenever the device answers; return its status, or None."""
        try:
            status, told = ask(self.machine.port, "/status", seconds=0)
            served = ask(self.machine.port, f"/{NAME}/v1/recommend", {"history": [], "k": 1}, seconds=0)
        except (OSError, ValueError, HTTPException):  # it died before, or in the middle of, its answer
            return None
        if served[0] == 503:
            return None
        assert (status, served[0]) == (200, 200)
        # what answers is a model that was told, or the component's, and never the broken one
        first = served[1]["products"][0]["product"]
        assert first in {1007 + number for number in self.center.made}
        assert first != 1007 + 99
        assert told["generation"] >= self.generation
        self.generation = told["generation"]
        return told

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)


def test_devices_on_a_real_broker_serve_what_is_proved_and_end_in_step(tmp_path):
    print(f"seed {SEED}, {DEVICES} devices, {ROUNDS} rounds")
    rng = random.Random(SEED)
    broker = Broker(tmp_path)
    shadows = Shadows(broker.port, rng)
    things = [f"shipyard-dev-{number}" for number in range(DEVICES)]
    center = Center(tmp_path / "center", shadows, things)
    devices = [Device(tmp_path, thing, center, broker, rng) for thing in things]
    try:
        for turn in range(ROUNDS):
            center.tell(turn + 1, base=turn)
            if turn % 2 == 1:
                broker.down()  # all are cut off
            until = time.monotonic() + 4 + DEVICES / 4
            while time.monotonic() < until:
                for device in devices:
                    device.keep(deadly=True)
                    device.look()
                time.sleep(0.05)
            if turn % 2 == 1:
                broker.up()
        # a model whose golden answers are another machine's: nobody may serve it
        center.tell(99, base=0, broken=True)
        # everything heals: no more loss, no more death
        shadows.lossy = False
        center.tell(ROUNDS + 1, base=ROUNDS)
        until = time.monotonic() + 20 + 2 * DEVICES
        behind = list(devices)
        while behind and time.monotonic() < until:
            for device in list(behind):
                device.keep(deadly=device.process is not None and device.process.poll() is None)
                told = device.look()
                wanted = center.words[center.generation]
                if told is not None and told["models"] == {NAME: wanted}:
                    behind.remove(device)
            time.sleep(0.1)
        assert not behind, [(device.thing, device.look()) for device in behind]
        assert sum(device.deaths for device in devices) >= DEVICES // 2
        time.sleep(1)
        for thing in things:
            # a report of a device never names an older generation after a later one
            generations = [report["generation"] for report in shadows.reports[thing]]
            assert generations == sorted(generations)
    finally:
        for device in devices:
            device.stop()
        shadows.client.loop_stop()
        broker.down()


def test_local_clients_ask_by_the_broker_too(tmp_path):
    """A store's gateway with a broker of its own: the shipped process hears, answers and learns by publish and subscribe."""
    broker = Broker(tmp_path)
    center = Center(tmp_path / "center", None, [])
    device = Device(tmp_path, "shipyard-dev-0", center, broker, random.Random(0))
    answers = queue.Queue()
    till = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="till-7")
    till.on_connect = lambda c, *_: c.subscribe(f"{ANSWER}/till-7", 1)
    till.on_message = lambda _, __, message: answers.put(json.loads(message.payload))

    def asked(task, request):
        """Ask until there is an answer: the device may still be connecting."""
        question = {"id": task, "client": "till-7", "model": NAME, "task": task, "request": request}
        for _ in range(60):
            till.publish(ASK, json.dumps(question))
            try:
                while (told := answers.get(timeout=1))["id"] != task:
                    pass  # of a question before
                return told
            except queue.Empty:
                continue
        raise TimeoutError((device.machine.root / "log").read_text()[-2000:])

    try:
        till.connect("127.0.0.1", broker.port)
        till.loop_start()
        device.start(deadly=False)
        told = asked("recommend", {"history": [], "k": 2})
        assert told["status"] == 200 and [p["product"] for p in told["answer"]["products"]] == [1007, 1014]
        visit = {"id": "visit", "shown": [{"score": p["score"], "taken": True} for p in told["answer"]["products"]]}
        first = asked("feedback", visit)
        assert first["id"] == "feedback" and first["answer"]["counted"] in (0, 2)
        assert asked("feedback", visit)["answer"] == {"counted": 0}
    finally:
        device.stop()
        till.loop_stop()
        broker.down()
    kept = json.loads((device.machine.work / "telemetry.json").read_text())
    assert kept["learned"]["models"][NAME]["evidence"] == 2
