"""What a device's own programs ask and teach: every kind of model, publish and subscribe, a calibration that is learned."""

import base64
import json
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nucleus import Nucleus
from test_edge_component import edge_bundle
from test_server import PRODUCTS, make_bundle

from serve.codec import BadRequest
from serve.greengrass import pubsub
from serve.greengrass.adapt import BOUNDS, MOST_IDS, Adapted, Learner, log_odds, reported
from serve.greengrass.link import IpcLink, NoLink
from serve.greengrass.local import FEEDBACK, MOST_REQUESTS, Desk
from serve.greengrass.pubsub import LARGEST, MOST_WAITING, Mailbox
from serve.greengrass.telemetry import Telemetry, add
from serve.greengrass.words import ANSWER, ASK
from serve.runtime import open_bundle
from shipyard.calibrate import Calibration

NAME = "edge-recommend"
PLATT = {"method": "platt", "x": [1.3], "y": [-0.7]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A desk over three models, as a store has them: recommendation, search, and suggestions of categories."""
    root = tmp_path_factory.mktemp("bundles")
    categories = {"products": PRODUCTS, "rows": list(range(1, 13)), "answers": [f"aisle {n}" for n in range(12)]}
    made = {
        NAME: edge_bundle(root / "a"),
        "local-search": make_bundle(root / "b", search=True, name="local-search"),
        "intent": make_bundle(root / "c", offers=False, level="category", catalogue=categories, name="intent"),
    }
    found = Desk(Telemetry())
    found.change(
        {name: open_bundle(m.folder, name, m.attestation, m.keys, threads=1) for name, m in made.items()},
        {name: f"{number:064x}" for number, name in enumerate(made)},
    )
    return found


def test_a_device_recommends_searches_and_suggests(desk):
    history = [{"product": PRODUCTS[4], "days_ago": 3.5}]
    status, answer = desk.answer(NAME, "recommend", json.dumps({"history": history, "k": 2}).encode())
    assert status == 200 and len(answer["products"]) == 2
    status, answer = desk.answer("local-search", "search", json.dumps({"query": "milk", "k": 1}).encode())
    # the tokenizer of this bundle makes token 7 of milk, which its graph adds to row 7
    assert status == 200 and [p["product"] for p in answer["products"]] == [PRODUCTS[6]]
    status, answer = desk.answer("intent", "recommend", json.dumps({"history": history, "k": 3}).encode())
    assert status == 200 and len(answer["categories"]) == 3
    assert all(0 < entry["probability"] < 1 for entry in answer["categories"])
    assert desk.answer("intent", "search", b"{}")[0] == 404
    assert desk.answer("local-search", "search", b"{}")[0] == 400
    counted = json.loads(desk.telemetry.close())["models"]
    assert {name: entry["requests"] for name, entry in counted.items()} == {NAME: 1, "local-search": 1, "intent": 1}


# --- publish and subscribe -------------------------------------------------------------------------------------------


class Local(NoLink):
    """A bus that keeps what was said on it."""

    def __init__(self):
        self.said, self.hears = [], {}

    def listen(self, topic, hear):
        self.hears[topic] = hear

    def tell(self, topic, payload):
        self.said.append((topic, json.loads(payload)))


def question(**more):
    asked = {"id": "1", "client": "till-7", "model": NAME, "task": "recommend", "request": {"history": [], "k": 2}}
    return json.dumps(asked | more).encode()


def wait(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_local_client_asks_by_publish_and_subscribe(desk):
    link = Local()
    Mailbox(desk, link).open()
    link.hears[ASK](ASK, question())
    link.hears[ASK](ASK, question(id="2", request=[{"history": []}] * (MOST_REQUESTS + 1)))
    link.hears[ASK](ASK, question(id="3", request=[{"history": []}] * MOST_REQUESTS))
    wait(lambda: len(link.said) == 3)
    assert [topic for topic, _ in link.said] == [f"{ANSWER}/till-7"] * 3
    first, second, third = (told for _, told in link.said)
    assert first["id"] == "1" and first["status"] == 200
    assert [p["product"] for p in first["answer"]["products"]] == PRODUCTS[:2]
    assert second["status"] == 400 and "at most 32" in second["answer"]["error"]
    # what lite would end the connection for is told instead
    assert third["status"] == 413 and f"allowed: {LARGEST}" in third["answer"]["error"]


@pytest.mark.parametrize(
    "payload",
    [
        b"{", b"[]", b"[" * 3000, question(client="till/7"), question(client="#"), question(id="x" * 65), question(id=7),
        question(more=1), question(request="x" * LARGEST),
    ],
)  # fmt: skip
def test_what_is_no_question_is_left_out(desk, payload):
    link = Local()
    Mailbox(desk, link).take(ASK, payload)
    assert link.said == []


def test_questions_beyond_what_may_wait_are_answered_at_once(desk):
    link = Local()
    mailbox = Mailbox(desk, link)  # nobody serves yet
    for number in range(MOST_WAITING + 2):
        mailbox.take(ASK, question(id=str(number)))
    assert [(told["id"], told["status"]) for _, told in link.said] == [("32", 503), ("33", 503)]


@pytest.fixture
def nucleus(tmp_path, monkeypatch):
    server = Nucleus(tmp_path / "ipc")
    monkeypatch.setenv("AWS_GG_NUCLEUS_DOMAIN_SOCKET_FILEPATH_FOR_COMPONENT", str(tmp_path / "ipc"))
    monkeypatch.setenv("SVCUID", "token")
    yield server
    server.shutdown()
    server.server_close()


def test_the_client_of_the_nucleus_speaks_its_protocol(nucleus, desk):
    """The vendored client over a socket: shadow topics to the center, local clients, RUNNING, and the end of a stream."""
    lost, connected, heard = threading.Event(), threading.Event(), []
    link = IpcLink(lost.set)
    Mailbox(desk, link).open()
    link.running()
    link.open(("$aws/a", "$aws/b"), lambda *message: heard.append(message), connected.set)
    assert connected.is_set()
    assert {d["topicName"] for d in nucleus.wait("SubscribeToIoTCore", 2)} == {"$aws/a", "$aws/b"}
    assert nucleus.wait("UpdateState") == [{"state": "RUNNING"}]
    assert link.publish("$aws/up", b"report")
    [sent] = nucleus.wait("PublishToIoTCore")
    assert (sent["topicName"], base64.b64decode(sent["payload"]), sent["qos"]) == ("$aws/up", b"report", "1")
    nucleus.core("$aws/b", b"word")
    wait(lambda: heard == [("$aws/b", b"word")])
    nucleus.local(ASK, question())
    [told] = nucleus.wait("PublishToTopic")
    assert told["topic"] == f"{ANSWER}/till-7"
    answer = json.loads(base64.b64decode(told["publishMessage"]["binaryMessage"]["message"]))
    assert answer["status"] == 200 and len(answer["answer"]["products"]) == 2
    assert not lost.is_set()
    nucleus.cut()
    assert lost.wait(20)
    assert not link.publish("$aws/up", b"report")
    link.close()


# --- what is learned -------------------------------------------------------------------------------------------------


def learner(base="0" * 64, calibration=PLATT):
    found = Learner()
    found.serve({NAME: (base, calibration)})
    return found


def shown(number, score, taken):
    return {"id": str(number), "shown": [{"score": score, "taken": taken}]}


def test_a_device_learns_the_probabilities_that_hold_in_its_store():
    rng, found = np.random.default_rng(5), learner()
    scores = rng.normal(0, 1.5, 3000)
    odds = np.array([log_odds(PLATT, score) for score in scores])
    right = rng.random(3000) < 1 / (1 + np.exp(-(0.6 * odds - 1.0)))
    for number, (score, taken) in enumerate(zip(scores.tolist(), right.tolist(), strict=True)):
        assert found.feedback(NAME, shown(number, score, taken)) == {"counted": 1}
    base, a, b, evidence = reported(found.document())[NAME]
    assert (base, evidence) == ("0" * 16, 3000)
    assert abs(a - 0.6) < 0.1 and abs(b + 1.0) < 0.15
    assert abs(found.probability(NAME, 0.0) - 1 / (1 + math.exp(-(0.6 * -0.7 - 1.0)))) < 0.03


def test_a_bundles_calibration_is_the_release_s():
    isotonic = Calibration("isotonic", (-1.0, 0.0, 2.0), (0.1, 0.3, 0.8))
    for calibration in (isotonic, Calibration("platt", (1.3,), (-0.7,))):
        for score in (-0.5, 0.4, 1.7):
            expected = float(calibration.apply(np.array([score]))[0])
            assert 1 / (1 + math.exp(-log_odds(calibration.to_json(), score))) == pytest.approx(expected)
    corrected = PLATT | {"correction": [0.5, 0.2]}
    assert log_odds(corrected, 1.0) == pytest.approx(0.5 * log_odds(PLATT, 1.0) + 0.2)
    assert log_odds({}, 0.25) == 0.25


def test_another_bundle_begins_anew_and_the_same_one_goes_on():
    found = learner()
    found.feedback(NAME, shown(1, 0.5, True))
    found.serve({NAME: ("0" * 64, PLATT), "intent": ("1" * 64, {})})
    assert reported(found.document())[NAME][3] == 1
    found.serve({NAME: ("f" * 64, PLATT)})
    assert reported(found.document()) == {}
    assert found.probability(NAME, 0.5) == pytest.approx(1 / (1 + math.exp(-log_odds(PLATT, 0.5))), abs=1e-4)


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), max_size=200))
@settings(max_examples=40, deadline=None)
def test_whatever_is_said_a_device_keeps_two_bounded_numbers(course):
    found = Adapted("0" * 64)
    for odds, taken in course:
        found.learn(odds, taken)
    assert all(low <= value <= high for value, (low, high) in zip(found.vector, BOUNDS, strict=True))
    aa, ab, bb = found.precision
    assert aa * bb > ab * ab and found.evidence == len(course)


def test_no_behaviour_is_kept(desk):
    """Of feedback the disk and the center hold the numbers of `Adapted` and the client's ids, the same number of bytes."""
    few, many = learner(), learner()
    for number in range(1, 2000):
        many.feedback(NAME, shown(number, 0.37 + number / 7, number % 3 == 0))
    few.feedback(NAME, shown(1, 0.37, True))
    kept = many.document()
    assert kept["models"][NAME].keys() == {"base", "vector", "precision", "evidence"}
    assert len(kept["ids"]) == MOST_IDS
    assert len(json.dumps(reported(kept))) < len(json.dumps(reported(few.document()))) + 12


@pytest.mark.parametrize(
    "wrong",
    [
        [], {"id": "1"}, {"id": "", "shown": []}, {"id": "1", "shown": []},
        {"id": 1, "shown": [{"score": 1, "taken": True}]},
        {"id": "1", "shown": [{"score": 1, "taken": 1}]}, {"id": "1", "shown": [{"score": float("nan"), "taken": True}]},
        {"id": "1", "shown": [{"score": True, "taken": True}]}, {"id": "1", "shown": [{"product": 7, "taken": True}]},
        {"id": "1", "shown": [{"score": 1, "taken": True}] * 33},
    ],
)  # fmt: skip
def test_feedback_of_another_form_is_refused(wrong):
    with pytest.raises(BadRequest, match=r"feedback: .*allowed: "):
        learner().feedback(NAME, wrong)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.booleans()), min_size=1, max_size=60), st.randoms())
@settings(max_examples=40, deadline=None)
def test_evidence_counts_once_whatever_is_repeated_lost_or_cut(course, rng):
    """Clients send again, the power goes after a save, reports arrive late and twice: each answer moves one device once."""
    devices, seen, arrived = [Telemetry() for _ in range(3)], [set() for _ in range(3)], []
    for number, given_id, taken in course:
        device = devices[number]
        device.learner.serve({NAME: ("0" * 64, PLATT)})
        counted = device.learner.feedback(NAME, shown(given_id, 0.5, taken))["counted"]
        assert counted == (given_id not in seen[number])
        seen[number].add(given_id)
        disk = device.close()
        arrived.append((number, json.loads(device.saved)))
        devices[number] = Telemetry(disk)
        # a process that starts again tells what was told before, and no more
        assert devices[number].saved == device.saved
    late = arrived * 2
    rng.shuffle(late)
    known = {}
    for number, report in late:
        known[number] = add(known.get(number), report)
    assert {number: report["learned"][NAME][3] for number, report in known.items()} == {
        number: len(ids) for number, ids in enumerate(seen) if ids
    }


def test_feedback_comes_by_either_way(desk):
    before = reported(desk.telemetry.learner.document()).get("intent", [0, 0, 0, 0])[3]
    assert desk.answer("intent", FEEDBACK, json.dumps(shown("a", 0.5, True)).encode()) == (200, {"counted": 1})
    link = Local()
    Mailbox(desk, link).open()
    link.hears[ASK](ASK, question(model="intent", task=FEEDBACK, request=shown("b", 0.5, False)))
    wait(lambda: link.said)
    assert link.said[0][1]["answer"] == {"counted": 1}
    assert reported(desk.telemetry.learner.document())["intent"][3] == before + 2
    assert pubsub.LARGEST < 10_000 * 3 / 4  # what lite takes in Base64
