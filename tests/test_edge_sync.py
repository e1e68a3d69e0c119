"""The edge's protocol: the state machine by rules, and devices on real disks that are cut at any flush or rename."""

import dataclasses
import hashlib
import json
import os
import random
import types
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.release import File, artifact_key, attest, files_digest
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass.agent import Agent
from serve.greengrass.delta import make_delta
from serve.greengrass.local import Desk
from serve.greengrass.protocol import (
    TRIES,
    Failed,
    Fetch,
    Fetched,
    Heard,
    Opened,
    Prove,
    Proved,
    Serve,
    Started,
    State,
    read_state,
    step,
    write_state,
)
from serve.greengrass.shadow import Topics, told_in
from serve.greengrass.store import Store
from serve.greengrass.telemetry import EDGES_MS, Telemetry, add, total
from serve.greengrass.words import LARGEST_TOLD, Delta, Pointer, Told, archive_key, delta_key, read_told, write_told
from serve.trust import MANIFEST, key_id
from shipyard.bundle import write_zip

NAME = "edge-recommend"
KEY = Ed25519PrivateKey.generate()
KEYS = {key_id(KEY.public_key()): KEY.public_key()}


# --- the state machine -----------------------------------------------------------------------------------------------


def pointer(number, delta=None):
    digest = f"{number:064x}"
    return Pointer(f"1.0.{number}", digest, "k:s", digest, 1000, delta)


def told(generation, number):
    return Told(generation, {NAME: pointer(number)})


events = st.one_of(
    st.builds(lambda g: Heard(told(g, g % 5)), st.integers(1, 9)),
    st.builds(Fetched, st.integers(1, 9)),
    st.builds(Proved, st.integers(1, 9)),
    st.builds(lambda g: Failed(g, "why"), st.integers(1, 9)),
    st.builds(lambda n: Started({NAME: f"{n:064x}"}), st.integers(0, 2)),
    st.just(Opened({NAME: "0" * 64})),
)


@given(st.lists(events, max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_order_of_events_takes_a_device_back(happened):
    state = State()
    for event in happened:
        after, action = step(state, event)
        assert after.floor >= state.floor
        assert after.applied <= after.floor
        assert after.target is None or after.target.generation == after.floor
        if after.applied != state.applied and isinstance(event, Proved):
            assert after.applied == event.generation == after.floor > state.applied
            assert action == Serve(after.current)
        if isinstance(action, Prove):
            assert after.ready and 1 <= after.tries <= TRIES
        # what is durable says all: a process that starts from it knows the same
        assert read_state(write_state(after)) == after
        # an event that arrives twice counts once
        if not isinstance(event, Started):
            again, more = step(after, event)
            assert (again, more) == (after, None) or isinstance(event, Opened)
        state = after


def test_a_word_is_fetched_proved_and_served_once():
    state, action = step(State(), Heard(told(3, 7)))
    assert action == Fetch(told(3, 7)) and state.phase == "fetching"
    state, action = step(state, Fetched(3))
    assert action == Prove(told(3, 7)) and state.phase == "proving"
    state, action = step(state, Proved(3))
    assert action == Serve({NAME: f"{7:064x}"}) and state.phase == "serving"
    for late in (Heard(told(3, 7)), Heard(told(2, 6)), Fetched(3), Proved(3), Failed(3, "late")):
        assert step(state, late) == (state, None)


def test_a_refused_generation_is_not_tried_again_and_a_later_one_is():
    state, _ = step(State(current={NAME: "0" * 64}), Heard(told(3, 7)))
    state, _ = step(state, Fetched(3))
    state, action = step(state, Failed(3, "golden answer 0 differs"))
    assert action is None and state.phase == "failed" and state.fault == "generation 3: golden answer 0 differs"
    assert state.current == {NAME: "0" * 64}
    assert step(state, Heard(told(3, 7))) == (state, None)
    state, action = step(state, Heard(told(4, 7)))
    assert action == Fetch(told(4, 7)) and state.fault == ""


def test_a_model_that_ends_the_process_is_given_up():
    state, _ = step(State(current={NAME: "0" * 64}, deployed={NAME: "0" * 64}), Heard(told(3, 7)))
    state, action = step(state, Fetched(3))
    tries = 0
    while isinstance(action, Prove):
        tries += 1
        state, action = step(state, Started({NAME: "0" * 64}))
        state, _ = step(state, Opened(state.current))
    assert tries == TRIES and state.phase == "failed" and "ended 3 times" in state.fault
    assert state.current == {NAME: "0" * 64}


def test_a_deployed_model_that_ends_the_process_is_given_up():
    state, _ = step(State(current={NAME: "a"}, deployed={NAME: "a"}), Started({NAME: "b"}))
    assert state.current == {NAME: "b"} and state.previous == {NAME: "a"}
    for _ in range(TRIES):
        state, _ = step(state, Started({NAME: "b"}))
    assert state.current == {NAME: "a"} and "ended 3 times" in state.fault


def test_a_damaged_model_is_worth_its_own_generation_again():
    state = State(floor=3, applied=3, current={NAME: "b"}, previous={NAME: "a"}, deployed={NAME: "a"})
    state, _ = step(state, Opened({NAME: "a"}, damaged=True, why="digest differs"))
    state, action = step(state, Heard(told(3, 7)))
    assert action == Fetch(told(3, 7))


def test_a_word_for_a_shadow_is_bounded_and_checked():
    delta = Delta("b" * 64, "c" * 64, 10)
    word = Told(3, {f"model-{n}": pointer(n, delta) for n in range(3)})
    assert read_told(write_told(word)) == word
    assert len(write_told(word)) <= LARGEST_TOLD
    with pytest.raises(ShipyardError, match="too much for a shadow"):
        write_told(Told(3, {f"model-{n}": pointer(n, delta) for n in range(9)}))
    good = json.loads(write_told(told(1, 1)))
    bad = good["models"][NAME]
    for wrong in (
        "[]", "{", good | {"generation": 0}, good | {"generation": True}, good | {"generation": "1"}, good | {"more": 1},
        good | {"models": {}}, good | {"models": {"../x": bad}}, good | {"models": {NAME: bad | {"sha256": "../x"}}},
        good | {"models": {NAME: bad | {"bytes": -1}}}, good | {"models": {NAME: bad | {"delta": {"base": "x"}}}},
    ):  # fmt: skip
        with pytest.raises(ShipyardError):
            read_told(wrong if isinstance(wrong, str) else json.dumps(wrong))
    # fits as it is sent, and not as it is kept
    grows = json.dumps(good | {"models": {NAME: bad | {"version": "\U0001f600" * 400}}}, ensure_ascii=False)
    assert len(grows.encode()) < LARGEST_TOLD
    with pytest.raises(ShipyardError, match="too much for a shadow"):
        read_told(grows)


@pytest.mark.parametrize("given", [{"generation": 1, "models": {}}, 5, True, ["x"], None])
def test_a_word_that_is_no_text_is_not_understood(given):
    state = {"told": given}
    for end, said in (("get/accepted", {"desired": state}), ("update/delta", state)):
        with pytest.raises(ShipyardError, match="not understood: told: not a text"):
            told_in(f"{Topics('thing').prefix}/{end}", json.dumps({"state": said}).encode())


def test_keys_are_those_of_the_release():
    digest = files_digest((File(path=f"{NAME}.zip", sha256="a" * 64, bytes=1),))
    assert archive_key(NAME, "a" * 64) == artifact_key(NAME, digest) + f"{NAME}.zip"


# --- devices on real disks -------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The power goes."""


class Bucket:
    """Bundles, their archives and the patches between them."""

    def __init__(self, root):
        self.root, self.objects, self.made, self.up = root, {}, {}, True

    def make(self, number):
        """Return the pointer of model `number`, an archive of 20 kB of which a tenth is its own."""
        if number in self.made:
            return self.made[number]
        folder = self.root / str(number)
        folder.mkdir(parents=True)
        same, own = random.Random(0), random.Random(number + 1)
        (folder / "model.onnx").write_bytes(same.randbytes(18_000) + own.randbytes(2_000))
        files = [{"path": "model.onnx", "sha256": sha256_file(folder / "model.onnx"), "bytes": 20_000}]
        (folder / MANIFEST).write_text(json.dumps({"name": NAME, "number": number, "files": files}))
        write_zip(folder, self.root / f"{number}.zip")
        manifest, archive = sha256_file(folder / MANIFEST), (self.root / f"{number}.zip").read_bytes()
        sha256 = sha256_file(self.root / f"{number}.zip")
        self.objects[archive_key(NAME, sha256)] = archive
        found = Pointer(f"1.0.{number}", manifest, attest(NAME, manifest, KEY), sha256, len(archive))
        self.made[number] = found
        return found

    def with_delta(self, base, number):
        before, after = self.make(base), self.make(number)
        patch = make_delta(self.root / str(base), self.objects[archive_key(NAME, after.sha256)])
        self.objects[delta_key(NAME, before.manifest, after.manifest)] = patch
        path = self.root / "patch"
        path.write_bytes(patch)
        return dataclasses.replace(after, delta=Delta(before.manifest, sha256_file(path), len(patch)))

    def read(self, key, size):
        if not self.up:
            raise OSError("no route to the bucket")
        return self.objects[key][: size + 1]


class Fuse:
    """Cuts the power at the n-th flush or rename from now."""

    def __init__(self):
        self.left = None

    def burn(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Crash

    def install(self, patch):
        flush, rename = os.fsync, Path.replace

        def fsync(descriptor):
            self.burn()
            flush(descriptor)

        def replace(path, target):
            self.burn()
            return rename(path, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "replace", replace)


class World:
    """A center, a shadow for each device, a wire that loses, repeats and reorders, and devices whose power goes."""

    def __init__(self, root, count, fuse):
        self.bucket, self.fuse, self.poison = Bucket(root / "bucket"), fuse, set()
        self.base = self.bucket.make(0)
        self.generation, self.wanted = 0, None
        self.devices = [Device(self, root / f"device-{n}") for n in range(count)]

    def tell(self, number, base=None):
        self.generation += 1
        found = self.bucket.make(number) if base is None else self.bucket.with_delta(base, number)
        self.wanted = Told(self.generation, {NAME: found})
        for device in self.devices:
            device.desired = write_told(self.wanted)
            device.send("update/delta", {"told": device.desired})

    def check(self):
        for device in self.devices:
            device.check()


class Device:
    """One device with its shadow; `wire` is what is under way to it."""

    def __init__(self, world, root):
        self.world, self.root, self.now = world, root, 0.0
        self.wire, self.desired, self.reported, self.reports = [], None, {}, []
        self.agent, self.desk, self.highest = None, None, 0
        root.mkdir()
        self.start()

    # what a link is
    def open(self, topics, hear, connected):
        raise AssertionError("the world speaks for itself")

    def publish(self, topic, payload):
        end = topic.removeprefix(Topics("thing").prefix + "/")
        if end == "get":
            self.send("get/accepted", {"desired": {"told": self.desired}} if self.desired else {})
        else:
            found = json.loads(payload)["state"]["reported"]
            assert len(payload) < 6 * 1024
            self.reported |= found
            self.reports.append(json.loads(found["report"]))
        return True

    def running(self):
        pass

    def close(self):
        pass

    def send(self, end, state):
        self.wire.append((f"{Topics('thing').prefix}/{end}", json.dumps({"state": state}).encode()))

    # what happens to it
    def start(self):
        try:
            store = Store(self.root, KEYS)
            self.desk = Desk(Telemetry())
            agent = Agent(
                store, self.desk, self, "thing", self.world.bucket.read, lambda n, m: self.prove(store, n, m),
                poll=100.0, version="1", clock=lambda: self.now,
            )  # fmt: skip
            deployed = {NAME: store.adopt(NAME, self.world.bucket.root / "0", self.world.base.attestation)}
            action = agent.start(deployed)
            self.agent = agent
            self.check()
            agent.resume(action)
        except Crash:
            self.agent = None

    def prove(self, store, name, manifest):
        if not store.is_whole(name, manifest):
            raise ShipyardError("not whole")
        if manifest in self.world.poison:
            raise ShipyardError("golden answer 0 differs")
        return types.SimpleNamespace(digest=manifest, manifest={})

    def alive(self, work):
        """Do something on a device that runs, until it is done or the power goes."""
        if self.agent is None:
            self.start()
        if self.agent is not None:
            try:
                work()
            except Crash:
                self.agent = None

    def deliver(self, place, twice):
        if self.wire:
            message = self.wire[place % len(self.wire)]
            if not twice:
                self.wire.remove(message)
            self.alive(lambda: self.agent.take(message))

    def tick(self, seconds):
        self.now += seconds
        self.alive(lambda: self.agent.tick())

    def check(self):
        if self.agent is None:
            return
        [served] = [model.digest for model in self.desk.models.values()]
        # whole, attested and proved, whatever happened
        assert Store.is_whole(self.agent._store, NAME, served)
        assert served not in self.world.poison
        status = self.agent.status()
        assert status["models"] == {NAME: served}
        # never back, but for a damaged disk, which nobody has here
        assert status["generation"] >= self.highest
        self.highest = status["generation"]

    def in_step(self):
        status = self.agent.status()
        wanted = self.world.wanted
        if wanted.models[NAME].manifest in self.world.poison:
            return status["phase"] == "failed" and f"generation {wanted.generation}" in status["fault"]
        return status["generation"] == wanted.generation and self.reported.get("told") == self.desired


def live(world, draw, steps):
    """Let things happen."""
    for _ in range(steps):
        device = world.devices[draw(len(world.devices))]
        match draw(12):
            case 0:
                world.tell(draw(6))
            case 1:
                world.tell(draw(6), base=draw(6))
            case 2:
                found = world.bucket.make(draw(6)).manifest
                if found != world.base.manifest and all(d.highest == 0 or d.agent for d in world.devices):
                    serving = {m.digest for d in world.devices for m in d.desk.models.values()}
                    world.poison |= {found} - serving - {m for d in world.devices for m in known(d)}
            case 3:
                world.bucket.up = not world.bucket.up
            case 4 | 5:
                world.fuse.left = draw(25)
            case 6:
                if device.wire:
                    device.wire.pop(draw(len(device.wire)))
            case 7:
                device.tick(draw(120))
            case 8:
                device.agent = None
            case _:
                device.deliver(draw(50), draw(2) == 0)
        device.check()
    world.check()


def known(device):
    state = Store.load(types.SimpleNamespace(root=device.root))
    return {*state.current.values(), *state.previous.values()}


def heal(world):
    """End every fault: all that is wanted is served within two questions of each device."""
    world.fuse.left, world.bucket.up = None, True
    for device in world.devices:
        device.wire.clear()
        for _ in range(2):
            device.tick(1300)
            while device.wire:
                device.deliver(0, False)
        world.check()
        assert device.in_step(), (device.agent.status(), world.wanted)


@pytest.fixture
def fuse(monkeypatch):
    found = Fuse()
    found.install(monkeypatch)
    return found


@given(data=st.data())
@settings(max_examples=8, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
def test_whatever_happens_devices_serve_what_is_proved_and_end_in_step(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        fuse = Fuse()
        fuse.install(patch)
        world = World(tmp_path_factory.mktemp("world"), 3, fuse)
        live(world, lambda most: data.draw(st.integers(0, most - 1)), 60)
        world.tell(7)
        heal(world)


@pytest.mark.parametrize("seed", [int(os.environ.get("SHIPYARD_SEED", "7"))])
def test_twenty_devices_through_hundreds_of_steps(seed, tmp_path, fuse):
    """SHIPYARD_SEED and SHIPYARD_STEPS choose another course; `make simulate` takes a long one."""
    draw = random.Random(seed).randrange
    world = World(tmp_path, 20, fuse)
    live(world, draw, int(os.environ.get("SHIPYARD_STEPS", "400")))
    world.tell(8)
    heal(world)


def test_a_proof_that_the_device_could_not_make_is_made_again(tmp_path, fuse, monkeypatch):
    """Its own trouble, e.g. no file handle left, is none of the model's."""
    world = World(tmp_path, 1, fuse)
    [device] = world.devices
    troubles, prove = [OSError(24, "Too many open files")] * 2, device.prove

    def troubled(*asked):
        if troubles:
            raise troubles.pop()
        return prove(*asked)

    monkeypatch.setattr(device, "prove", troubled)
    world.tell(1)
    device.deliver(0, False)
    status = device.agent.status()
    assert status["models"] == {NAME: world.base.manifest} and status["generation"] == 0
    assert "proof of generation 1: [Errno 24] Too many open files" in status["fault"]
    heal(world)
    assert not troubles and device.agent.status()["generation"] == 1


def test_the_power_may_go_at_every_flush_and_rename(tmp_path, fuse):
    """Cut at the first, the second, ... of one update, until one goes through; each time the device comes back in step."""
    for cut in range(200):
        world = World(tmp_path / str(cut), 1, fuse)
        [device] = world.devices
        world.tell(1)
        fuse.left = cut
        device.deliver(0, False)
        died = device.agent is None
        fuse.left = None
        if device.agent is None:
            device.start()
        device.check()
        heal(world)
        if not died:
            break
    assert 10 < cut < 199


# --- bundles on the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    return Bucket(tmp_path / "bucket")


@pytest.fixture
def store(tmp_path, bucket):
    found = Store(tmp_path / "device", KEYS)
    bucket.make(0)
    found.adopt(NAME, bucket.root / "0", bucket.made[0].attestation)
    return found


def test_an_update_travels_as_a_delta_against_what_is_installed(store, bucket):
    found = bucket.with_delta(0, 1)
    installed = {NAME: bucket.made[0].manifest}
    spent = store.fetch(NAME, found, bucket.read, installed)
    # of 20 kB a tenth is new
    assert spent == found.delta.bytes < found.bytes / 4
    assert store.is_whole(NAME, found.manifest)
    assert store.fetch(NAME, found, bucket.read, installed) == 0


@pytest.mark.parametrize("fault", ["another base", "bytes", "missing", "a lie", "the base is damaged"])
def test_the_full_archive_stands_in_for_a_delta(store, bucket, fault):
    found = bucket.with_delta(0, 1)
    key = delta_key(NAME, found.delta.base, found.manifest)
    installed = {NAME: bucket.made[0].manifest}
    if fault == "another base":
        installed = {NAME: "f" * 64}
    elif fault == "bytes":
        bucket.objects[key] = bucket.objects[key][:-1] + b"x"
    elif fault == "missing":
        found = dataclasses.replace(found, delta=dataclasses.replace(found.delta, sha256="0" * 64))
    elif fault == "a lie":
        other = bucket.with_delta(0, 2)
        bucket.objects[key] = bucket.objects[delta_key(NAME, other.delta.base, other.manifest)]
        found = dataclasses.replace(found, delta=other.delta)
    else:
        (store.folder(NAME, found.delta.base) / "model.onnx").write_bytes(b"x" * 20_000)
    assert store.fetch(NAME, found, bucket.read, installed) >= found.bytes
    assert store.is_whole(NAME, found.manifest)


def test_what_nobody_attested_is_not_even_read(store, bucket):
    other = Ed25519PrivateKey.generate()
    found = bucket.make(1)
    read = []
    for word in (attest(NAME, found.manifest, other), attest("intent", found.manifest, KEY), ""):
        with pytest.raises(ShipyardError, match=r"attested|not trusted"):
            store.fetch(NAME, dataclasses.replace(found, attestation=word), lambda *a: read.append(a), {})
    assert read == []


def test_an_archive_that_is_not_the_one_named_leaves_nothing(store, bucket):
    found = bucket.make(1)
    wrong = dataclasses.replace(bucket.make(2), manifest=found.manifest, attestation=found.attestation)
    with pytest.raises(ShipyardError):
        store.fetch(NAME, wrong, bucket.read, {})
    assert not store.folder(NAME, found.manifest).exists()
    bucket.objects[archive_key(NAME, found.sha256)] = b"PK"
    with pytest.raises(ShipyardError, match="archive"):
        store.fetch(NAME, found, bucket.read, {})
    with pytest.raises(ShipyardError, match="size of the archive"):
        store.fetch(NAME, dataclasses.replace(found, bytes=10**9), bucket.read, {})


@pytest.mark.parametrize("fault", ["encrypted", "a method that nobody knows", "a stream that is none"])
def test_an_archive_that_cannot_be_read_is_told(store, bucket, fault):
    found = bucket.make(1)
    archive = bytearray(bucket.objects[archive_key(NAME, found.sha256)])
    flags, method = {"encrypted": (1, 0), "a method that nobody knows": (0, 97), "a stream that is none": (0, 8)}[fault]
    # of the first file, where it lies and where the directory names it
    for place in (6, archive.find(b"PK\x01\x02") + 8):
        archive[place] |= flags
        archive[place + 2] = method
    sha256 = hashlib.sha256(archive).hexdigest()
    bucket.objects[archive_key(NAME, sha256)] = bytes(archive)
    with pytest.raises(ShipyardError, match="archive: "):
        store.fetch(NAME, dataclasses.replace(found, sha256=sha256), bucket.read, {})
    assert not store.folder(NAME, found.manifest).exists()


def test_the_disk_holds_no_more_than_a_state_can_name(store, bucket):
    pointers = [bucket.make(n) for n in range(5)]
    for found in pointers[1:]:
        store.fetch(NAME, found, bucket.read, {})
    m = [found.manifest for found in pointers]
    store.tidy(State(current={NAME: m[3]}, previous={NAME: m[2]}, deployed={NAME: m[0]}))
    assert {path.name for path in (store.root / "models" / NAME).iterdir() if path.is_dir()} == {m[0], m[2], m[3]}
    assert len(list((store.root / "models" / NAME).iterdir())) == 6  # each with its attestation


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "not json", "\ufffd\ufffd\0", "[]", "null", '{"sequence":null}', '{"models":[]}', '{"models":{"a":[1]}}',
        '{"models":{"a":{}}}', '{"learned":{"models":[]}}',
    ],
)  # fmt: skip
def test_totals_that_cannot_be_read_are_counted_anew(text):
    found = Telemetry(text)
    found.answered("a", 0.003, [{"products": [{"score": 1.0}]}])
    kept = Telemetry(found.close())
    assert (kept.sequence, kept.models["a"]["requests"]) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40), st.randoms())
@settings(max_examples=50, deadline=None)
def test_totals_count_once_whatever_is_lost_repeated_or_reordered(course, rng):
    devices, arrived = [Telemetry() for _ in range(3)], []
    for number, requests in course:
        answers = [{"products": [{"product": 1, "score": 2.0}], "unknown": [5]}] * requests
        devices[number].answered(NAME, 0.0015 * max(1, requests), answers)
        arrived.append((number, json.loads(devices[number].close())))
        # a restart goes on from what was saved
        devices[number] = Telemetry(devices[number].saved)
    last = {number: report for number, report in arrived}
    late = arrived * 2
    rng.shuffle(late)
    known = {}
    for number, report in late:
        known[number] = add(known.get(number), report)
    assert known == last
    wanted = sum(requests for _, requests in course)
    if wanted:
        summed = total(known.values())[NAME]
        assert summed["requests"] == summed["ms"][1] == wanted and len(summed["ms"]) == len(EDGES_MS) + 1
        assert summed["score"] == [wanted, 2.0, 0.0]
