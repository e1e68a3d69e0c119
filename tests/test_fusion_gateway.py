"""The fusion gateway, over real servers as processes on loopback: what it fuses, and what it does when parts of it fail."""

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import http.client
import io
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzzed import fuzz
from test_server import ITEMS, PRODUCTS, Bundle, make_bundle

from models.config import load_fleet
from serve import triton
from serve.asgi import content_digest
from serve.errors import ShipyardError
from serve.feedback import Journal, Unwritten, files, firehose
from serve.files import sha256_file
from serve.fused import open_gateway
from serve.fusion import best, fuse, gather
from serve.gateway import sends, shard
from serve.resilience import Breaker, Hedge, Target
from serve.runtime import Model
from serve.shard import SHARD
from serve.targets import Call, Gone, http_send, sagemaker_send
from serve.trace import begin
from serve.trust import trusted
from shipyard.bundle import bundle_gateway
from shipyard.fleet import Member, command, down, start

ROOT = Path(__file__).resolve().parents[1]
FUSION = {"method": "weighted", "sources": ["search", "recommend", "edge_recommend"],
          "parameters": {"weights": [0.6, 0.3, 0.1]}}  # fmt: skip
HISTORY = [{"product": PRODUCTS[4], "days_ago": 3.5}, {"product": PRODUCTS[0], "days_ago": 0}]
GRAPH = "model_repository/search/77/model.onnx"


def free_ports(number):
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


class Fleet:
    """The fleet of three small bundles and the gateway over them."""

    def __init__(self, folder, fusion=FUSION, **options):
        key = Ed25519PrivateKey.generate()
        other = [*PRODUCTS[::-1][:6], *range(50, 56)]  # the edge knows six of our products and six of its own
        self.models, self.folder = {}, folder
        made = {
            "search": make_bundle(folder / "search", search=True, graph=GRAPH),
            "recommend": make_bundle(folder / "recommend"),
            "edge_recommend": make_bundle(
                folder / "edge", name="edge-recommend", catalogue={"products": other, "rows": None, "answers": None}
            ),
        }
        places = {"search": "gpu", "recommend": "cpu", "edge_recommend": "edge"}
        target = load_fleet(ROOT / "fleet.toml").target["cpu"]
        bundle_gateway({name: found.folder for name, found in made.items()}, places, fusion, target, folder / "gateway")
        made["gateway"] = Bundle(folder / "gateway" / "bundle", "gateway")
        kinds = {
            "gateway": "gateway",
            "search": "triton",
            "recommend": "image-context",
            "edge_recommend": "greengrass-model",
        }
        ports = free_ports(4)
        self.fusion = fusion
        self.members = tuple(
            Member(
                made[name].name, kind, made[name].folder, dataclasses.replace(made[name], key=key).attestation,
                ROOT / "packaging", port,
            )
            for (name, kind), port in zip(kinds.items(), ports, strict=True)
        )  # fmt: skip
        for name in places:
            manifest = json.loads((made[name].folder / "bundle.json").read_text())
            self.models[name] = Model(made[name].folder, manifest, 1)
        (folder / "up").mkdir()
        (folder / "up" / "page.html").write_text("<p>page</p>")
        self.key = dataclasses.replace(made["search"], key=key).trusted
        self.folders, self.places, self.secret = {name: made[name].folder for name in places}, places, key
        self.url = self.members[0].url

    def start(self):
        state = start(self.members, self.key, self.folder / "up", "test")
        self.pids = {one["name"]: one["pid"] for one in state["members"]}
        return self

    def ask(self, path, document, **headers):
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        asked = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as fault:
            return fault.code, json.loads(fault.read())

    def offline(self, request, sources):
        """Return the fused products as evaluation would fuse what the bundles' models say."""
        told = []
        for source in self.fusion["sources"]:
            if source not in sources:
                told.append(None)
                continue
            model = self.models[source]
            asked = request | {"k": model.returned}
            if source != "search":
                asked = {key: value for key, value in asked.items() if key != "query"}
            answer = model.predict([asked])[0]["products"]
            told.append(([one["product"] for one in answer], [one["score"] for one in answer]))
        found = gather(told)
        return best(found, fuse(found, self.fusion["method"], self.fusion["parameters"]), request.get("k", 10))

    def records(self):
        lines = [line for path in (self.folder / "up" / "feedback").glob("*.jsonl") for line in path.open()]
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    found = Fleet(tmp_path_factory.mktemp("fleet")).start()
    yield found
    assert sorted(down(found.folder)) == sorted(member.name for member in found.members)
    assert not any(Path(f"/proc/{pid}").exists() and b"Z" not in status(pid) for pid in found.pids.values())


def status(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    return b"Z"


def states(answer):
    return {name: told["state"] for name, told in answer["targets"].items()}


def requests(number, seed=5):
    rng = np.random.default_rng(seed)
    for k in range(number):
        history = [
            {"product": int(product), "days_ago": round(float(days), 2)}
            for product, days in zip(
                rng.choice(PRODUCTS, k % 30), rng.uniform(0, 300, k % 30), strict=True
            )
        ]  # fmt: skip
        yield {"query": ("milk", "牛奶", f"word {k}")[k % 3], "history": history, "k": 1 + k % 12}


# --- fusion ----------------------------------------------------------------------------------------------------------


def test_online_fusion_is_offline_fusion_request_by_request(fleet):
    for request in requests(40):
        status, answer = fleet.ask("/v1/search", request)
        assert status == 200
        assert set(states(answer).values()) == {"spoke"} and answer["complete"]
        expected = fleet.offline(request, FUSION["sources"])
        assert [one["product"] for one in answer["products"]] == [product for product, _ in expected]
        assert [one["score"] for one in answer["products"]] == pytest.approx([score for _, score in expected], abs=1e-6)


@contextlib.contextmanager
def another_gateway(fleet, folder, member, members, *options):
    """Run a gateway of its own over running targets; its address is the member's."""
    (folder / "page.html").write_text("")
    wanted = [*command(member, members, folder), f"--trusted-key={fleet.key}", *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(wanted, stderr=log)
    try:
        end = time.monotonic() + 30
        while "ready: " not in (folder / "log").read_text():
            assert time.monotonic() < end and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield member.url
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


RULES = {
    "vote": {"depth": 3},
    "rrf": {"weights": [0.5, 0.3, 0.2], "k": 10},
    "stacking": {"weights": [3.0, 0.5, 0.1, 2.0, 0.5, 0.2, 1.0, 0.3, -0.4]},
}


@pytest.mark.parametrize("method", RULES)
def test_every_rule_fuses_online_as_offline_alone_and_at_once(fleet, tmp_path, method):
    fusion = FUSION | {"method": method, "parameters": RULES[method]}
    target = load_fleet(ROOT / "fleet.toml").target["cpu"]
    bundle_gateway(fleet.folders, fleet.places, fusion, target, tmp_path / "gateway")
    bundle = Bundle(tmp_path / "gateway" / "bundle", "gateway", fleet.secret)
    [port] = free_ports(1)
    member = dataclasses.replace(fleet.members[0], bundle=bundle.folder, attestation=bundle.attestation, port=port)
    other = copy.copy(fleet)
    other.fusion, other.url = fusion, member.url
    asked = [request | {"without": FUSION["sources"][: k % 3]} for k, request in enumerate(requests(24, seed=2))]
    with another_gateway(fleet, tmp_path, member, (member, *fleet.members[1:]), "--cache-seconds=0"):
        alone = [other.ask("/v1/search", request) for request in asked]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda request: other.ask("/v1/search", request), asked))
    for request, *answers in zip(asked, alone, together, strict=True):
        plain = {key: value for key, value in request.items() if key != "without"}
        expected = other.offline(plain, [source for source in FUSION["sources"] if source not in request["without"]])
        for status, answer in answers:
            assert (status, answer["method"]) == (200, method)
            assert [(one["product"], one["score"]) for one in answer["products"]] == [
                (product, pytest.approx(score, abs=1e-6)) for product, score in expected
            ]


def test_many_at_once_are_fused_as_one_by_one(fleet):
    asked = list(requests(60, seed=9))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: fleet.ask("/v1/search", request), asked))
    for request, (status, answer) in zip(asked, answers, strict=True):
        assert status == 200
        expected = fleet.offline(request, FUSION["sources"])
        assert [one["product"] for one in answer["products"]] == [product for product, _ in expected]


@pytest.mark.parametrize("off", [["search"], ["recommend"], ["edge_recommend", "search"]], ids="-".join)
def test_what_is_left_out_is_fused_by_the_weights_of_the_rest(fleet, off):
    request = {"query": "milk", "history": HISTORY}
    status, answer = fleet.ask("/v1/search", request | {"without": off})
    assert status == 200
    spoke = [source for source in FUSION["sources"] if source not in off]
    assert states(answer) == dict.fromkeys(off, "off") | dict.fromkeys(spoke, "spoke")
    expected = fleet.offline(request, spoke)
    assert [(one["product"], one["score"]) for one in answer["products"]] == [
        (product, pytest.approx(score, abs=1e-6)) for product, score in expected
    ]


def test_recommendation_asks_no_search(fleet):
    status, answer = fleet.ask("/v1/recommend", {"history": HISTORY, "k": 5})
    assert status == 200
    assert states(answer) == {"search": "off", "recommend": "spoke", "edge_recommend": "spoke"}
    expected = fleet.offline({"history": HISTORY, "k": 5}, ["recommend", "edge_recommend"])
    assert [one["product"] for one in answer["products"]] == [product for product, _ in expected]


def test_an_id_that_is_half_a_character_is_unknown_to_all_targets(fleet):
    half = [{"product": "\ud800", "days_ago": 1}]
    status, answer = fleet.ask("/v1/recommend", {"history": HISTORY + half, "k": 5})
    assert status == 200 and answer["complete"]
    assert answer["products"] == fleet.ask("/v1/recommend", {"history": HISTORY, "k": 5})[1]["products"]


def test_an_answer_from_the_cache_says_so_and_has_its_own_id(fleet):
    request = {"query": "milk", "k": 3, "history": []}
    first, second = (fleet.ask("/v1/search", request)[1] for _ in range(2))
    assert first["cached_seconds"] is None
    assert 0 <= second["cached_seconds"] < 10
    assert first["products"] == second["products"]
    assert first["request_id"] != second["request_id"]


BAD = {
    "no query": {"history": []},
    "a query of a number": {"query": 3},
    "no object": [],
    "a number": 7,
    "an unknown key": {"query": "milk", "histroy": []},
    "user null is none, a list is wrong": {"query": "milk", "user": []},
    "user true": {"query": "milk", "user": True},
    "user empty": {"query": "milk", "user": ""},
    "user too long": {"query": "milk", "user": "x" * 201},
    "place an object": {"query": "milk", "place": {}},
    "without a text": {"query": "milk", "without": "search"},
    "without an unknown source": {"query": "milk", "without": ["intent"]},
    "without a list in it": {"query": "milk", "without": [[]]},
    "k too large": {"query": "milk", "k": ITEMS + 1},
    "without all": {"query": "milk", "without": FUSION["sources"]},
    "k NaN": b'{"query": "milk", "k": NaN}',
    "days NaN": b'{"query": "milk", "history": [{"product": 1, "days_ago": NaN}]}',
    "no JSON": b"milk",
    "not UTF-8": b"\xff\xfe",
    "nested deeply": b"[" * 50_000,
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_refused(fleet, what):
    status, answer = fleet.ask("/v1/search", BAD[what])
    assert status == 400
    assert answer.keys() == {"error"} and answer["error"]


@pytest.mark.parametrize(("path", "status"), [("/v1/search", 200), ("/v1/recommend", 200), ("/v1/feedback", 202)])
def test_the_gateway_is_as_its_description_says(fleet, path, status):
    seen = fuzz(fleet.url, path)
    assert (set(seen["positive"]), set(seen["negative"])) == ({status}, {400})
    assert "Traceback" not in (fleet.folder / "up" / "gateway.log").read_text()


def test_the_page_and_the_description_are_served(fleet):
    with urllib.request.urlopen(f"{fleet.url}/", timeout=20) as page:
        assert page.headers["Content-Type"].startswith("text/html") and page.read() == b"<p>page</p>"
    with urllib.request.urlopen(f"{fleet.url}/openapi.json", timeout=20) as told:
        document = json.loads(told.read())
    assert {"/v1/search", "/v1/recommend", "/v1/feedback"} <= document["paths"].keys()


def logged(fleet, member, request_id):
    """Return what a member has logged of a request, by key."""
    log = fleet.folder / "up" / f"{member.name}.log"
    until = time.monotonic() + 20  # a request is logged after its answer is sent
    while f"id={request_id} " not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    # one that was slow is asked twice
    line = next(line for line in log.read_text().splitlines() if f"id={request_id} " in line)
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def test_a_request_is_a_span_of_its_callers_trace_and_its_calls_are_spans_below_it(fleet):
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    _, answer = fleet.ask(
        "/v1/search", {"query": "trace"}, traceparent=f"00-{trace}-{caller}-01", **{"X-Request-Id": "traced-1"}
    )
    assert answer["request_id"] == "traced-1"
    gateway, *targets = (logged(fleet, member, "traced-1") for member in fleet.members)
    assert (gateway["trace"], gateway["parent"]) == (trace, caller)
    assert {(told["trace"], told["parent"]) for told in targets} == {(trace, gateway["span"])}
    assert len({gateway["span"], caller, *(told["span"] for told in targets)}) == 5


KNOWN = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"


@pytest.mark.parametrize(
    "given",
    ["", "milk", f"00-{KNOWN}", f"00-{KNOWN.upper()}-01", f"ff-{KNOWN}-01", f"00-{KNOWN}-01-more", f"00-{KNOWN}-1",
     f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01"],
)  # fmt: skip
def test_what_is_no_trace_begins_a_new_one(given):
    first, second = (begin({"traceparent": given, "tracestate": "vendor=1"}) for _ in range(2))
    assert len({first.id, second.id, KNOWN[:32]}) == 3
    assert (first.parent, first.state) == ("", "")
    assert begin(first.headers).id == first.id


def test_a_trace_of_a_later_version_is_read_and_its_state_goes_along():
    found = begin({"traceparent": f"cc-{KNOWN}-00-what the future brings", "tracestate": "vendor=1"})
    assert (f"{found.id}-{found.parent}", found.flags) == (KNOWN, "00")
    assert found.headers == {"traceparent": f"00-{found.id}-{found.span}-00", "tracestate": "vendor=1"}
    assert begin({"traceparent": f"00-{KNOWN}-01", "tracestate": "v" * 513}).headers.keys() == {"traceparent"}


# --- feedback --------------------------------------------------------------------------------------------------------


def test_feedback_is_written_before_it_is_acknowledged(fleet):
    _, answer = fleet.ask("/v1/search", {"query": "milk", "user": "u1", "place": "北", "k": 2})
    events = [{"item": PRODUCTS[1], "kind": "click"}, {"item": "牛奶", "kind": "purchase", "quantity": 2, "value": 3.5}]
    told = {"request_id": answer["request_id"], "user": "u1", "place": "北", "events": events}
    assert fleet.ask("/v1/feedback", told) == (202, {"written": 2})
    mine = [record for record in fleet.records() if record["request_id"] == answer["request_id"]]
    assert [record["kind"] for record in mine] == ["impression", "click", "purchase"]
    assert mine[0]["items"] == [one["product"] for one in answer["products"]]
    assert {(record["user"], record["place"]) for record in mine} == {("u1", "北")}
    assert mine[0]["scores"] == [one["score"] for one in answer["products"]]
    assert mine[0]["bundle"] == sha256_file(fleet.members[0].bundle / "bundle.json")[:16]
    assert (mine[2]["item"], mine[2]["quantity"], mine[2]["value"]) == ("牛奶", 2, 3.5)


WRONG_FEEDBACK = {
    "no object": [],
    "no events": {"request_id": "x", "user": 1, "events": []},
    "no user": {"request_id": "x", "user": None, "events": [{"item": 1, "kind": "click"}]},
    "a view": {"request_id": "x", "user": 1, "events": [{"item": 1, "kind": "view"}]},
    "no item": {"request_id": "x", "user": 1, "events": [{"kind": "click"}]},
    "item a float": {"request_id": "x", "user": 1, "events": [{"item": 1.5, "kind": "click"}]},
    "quantity negative": {"request_id": "x", "user": 1, "events": [{"item": 1, "kind": "click", "quantity": -1}]},
    "value NaN": b'{"request_id": "x", "user": 1, "events": [{"item": 1, "kind": "click", "value": NaN}]}',
    "an unknown key": {"request_id": "x", "user": 1, "events": [{"item": 1, "kind": "click", "time": "now"}]},
    "request id a number": {"request_id": 7, "user": 1, "events": [{"item": 1, "kind": "click"}]},
    "too many events": {"request_id": "x", "user": 1, "events": [{"item": 1, "kind": "click"}] * 501},
}


@pytest.mark.parametrize("what", WRONG_FEEDBACK)
def test_wrong_feedback_is_refused_and_not_written(fleet, what):
    before = len(fleet.records())
    assert fleet.ask("/v1/feedback", WRONG_FEEDBACK[what])[0] == 400
    assert len(fleet.records()) == before


def test_an_impression_tells_what_drift_is_seen_by(fleet):
    history = [{"product": PRODUCTS[4], "days_ago": 3.5}, {"product": 5, "days_ago": 9}]
    request = {"query": "牛奶 x", "history": history, "offers": [{"product": PRODUCTS[2], "display": 1}]}
    _, answer = fleet.ask("/v1/search", request)
    [impression] = [record for record in fleet.records() if record["request_id"] == answer["request_id"]]
    measured = {"events": 2, "days": 3.5, "unknown": 0.5, "offers": 1, "characters": 4}
    measured["fused"] = answer["products"][0]["score"]
    for source in FUSION["sources"]:
        asked = {key: value for key, value in request.items() if source == "search" or key != "query"}
        measured[f"source {source}"] = fleet.models[source].predict([asked])[0]["products"][0]["score"]
    assert impression["observed"] == pytest.approx(measured, abs=2e-6)
    _, answer = fleet.ask("/v1/recommend", {"without": ["edge_recommend"]})
    [impression] = [record for record in fleet.records() if record["request_id"] == answer["request_id"]]
    assert impression["observed"].keys() == {"events", "offers", "fused", "source recommend"}


def test_what_was_acknowledged_outlives_a_kill(tmp_path):
    found = Fleet(tmp_path).start()
    try:
        acknowledged, stop = [], threading.Event()

        def send(worker):
            k = 0
            while not stop.is_set():
                k += 1
                told = {"request_id": f"r{worker}-{k}", "user": 1, "events": [{"item": k, "kind": "cart"}]}
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if found.ask("/v1/feedback", told)[0] == 202:
                        acknowledged.append(told["request_id"])

        threads = [threading.Thread(target=send, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        os.kill(found.pids["gateway"], signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()
        assert len(acknowledged) > 20
        assert set(acknowledged) <= {record["request_id"] for record in found.records()}
    finally:
        down(found.folder)


def test_a_disk_that_is_full_is_told_and_nothing_is_acknowledged(tmp_path):
    folder = tmp_path / "feedback"
    put = files(folder)
    folder.rmdir()
    folder.write_text("a file stands where the folder was")

    async def write():
        journal = Journal(put, prompt=True)
        with pytest.raises(Unwritten):
            await journal.write([{"a": 1}], durable=True)

    asyncio.run(asyncio.wait_for(write(), 20))


def test_whoever_waits_for_a_journal_that_fails_for_long_hears_so_and_what_comes_later_is_written(monkeypatch):
    sleep, pauses, down = asyncio.sleep, [], True

    def put(lines, durable):
        if down:
            raise Unwritten("the stream is down")

    async def write():
        nonlocal down
        journal = Journal(put, prompt=False)
        meanwhile = []

        async def pause(seconds):
            pauses.append(seconds)
            meanwhile.append(asyncio.create_task(journal.write([{"durable": len(pauses)}], durable=True)))
            await sleep(0.001)

        monkeypatch.setattr("serve.feedback.asyncio.sleep", pause)
        await journal.write([{"shown": 1}], durable=False)
        while len(pauses) < 9:
            await sleep(0.001)
        down = False
        told = await asyncio.wait_for(asyncio.gather(*meanwhile, return_exceptions=True), 10)
        return journal.dropped, told

    dropped, told = asyncio.run(write())
    assert pauses[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4, 6.4]
    assert dropped == 1
    assert all(isinstance(one, Unwritten) for one in told[:8]) and told[-1] is None


def test_firehose_gets_again_what_it_did_not_take():
    client = boto3.client("firehose", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y")
    lines = [b'{"a":1}\n', b'{"a":2}\n', b'{"a":3}\n']
    with Stubber(client) as stub:
        refused = {"ErrorCode": "ServiceUnavailableException", "ErrorMessage": "slow down"}
        stub.add_response(
            "put_record_batch", {"FailedPutCount": 1, "RequestResponses": [{"RecordId": "1"}, refused, {"RecordId": "3"}]},
            {"DeliveryStreamName": "events", "Records": [{"Data": line} for line in lines]},
        )  # fmt: skip
        stub.add_response(
            "put_record_batch", {"FailedPutCount": 0, "RequestResponses": [{"RecordId": "2"}]},
            {"DeliveryStreamName": "events", "Records": [{"Data": lines[1]}]},
        )  # fmt: skip
        firehose("events", client)(lines, True)
        stub.assert_no_pending_responses()
        stub.add_client_error("put_record_batch", "AccessDeniedException")
        with pytest.raises(Unwritten):
            firehose("events", client)(lines, True)


# --- faults ----------------------------------------------------------------------------------------------------------


def settle(fleet, wanted, seconds=15):
    """Ask until the targets have these states; return how long it took."""
    start_at = time.monotonic()
    k = 0
    while True:
        k += 1
        _, answer = fleet.ask("/v1/search", {"query": f"settle {time.monotonic()}"})
        if "targets" in answer and states(answer) == wanted:
            return time.monotonic() - start_at
        assert time.monotonic() - start_at < seconds, answer
        time.sleep(0.05)


ALL = dict.fromkeys(FUSION["sources"], "spoke")


def test_a_target_that_hangs_is_left_out_in_time_and_comes_back(fleet):
    os.kill(fleet.pids["recommend"], signal.SIGSTOP)
    try:
        for k in range(8):
            begin = time.monotonic()
            status, answer = fleet.ask("/v1/search", {"query": f"hang {k}"})
            assert status == 200 and time.monotonic() - begin < 3
            assert states(answer)["recommend"] in ("late", "open")
            assert not answer["complete"]
            expected = fleet.offline({"query": f"hang {k}"}, ["search", "edge_recommend"])
            assert [one["product"] for one in answer["products"]] == [product for product, _ in expected]
        assert states(answer)["recommend"] == "open"
    finally:
        os.kill(fleet.pids["recommend"], signal.SIGCONT)
    assert settle(fleet, ALL) < 15


def test_a_target_that_is_killed_under_load_costs_no_answer(tmp_path):
    found = Fleet(tmp_path).start()
    try:
        seen, stop = [], threading.Event()

        def load(worker):
            k = 0
            while not stop.is_set():
                k += 1
                request = {"query": f"load {worker} {k}", "k": 5}
                status, answer = found.ask("/v1/search", request)
                seen.append((status, request, answer))

        threads = [threading.Thread(target=load, args=(worker,)) for worker in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(found.pids["search"], signal.SIGKILL)
        time.sleep(1)
        stop.set()
        for thread in threads:
            thread.join()
        assert {status for status, _, _ in seen} == {200}
        assert {states(answer)["search"] for _, _, answer in seen} >= {"spoke", "unreachable"}
        for _, request, answer in seen[:: max(1, len(seen) // 40)]:
            spoke = [name for name, state in states(answer).items() if state == "spoke"]
            expected = found.offline(request, spoke)
            assert [one["product"] for one in answer["products"]] == [product for product, _ in expected]
        for name in ("recommend", "edge-recommend"):
            os.kill(found.pids[name], signal.SIGKILL)
        status, answer = found.ask("/v1/search", {"query": "none left"})
        assert status == 503 and "too few targets" in answer["error"]
    finally:
        down(found.folder)


CORRUPT = {
    "no JSON": b"{",
    "no products": b"{}",
    "null": b"null",
    "a list": b"[]",
    "products of numbers": b'{"products": [1, 2]}',
    "a score NaN": b'{"products": [{"product": 1, "score": NaN}]}',
    "a score of 400 digits": b'{"products": [{"product": 1, "score": 1%s}]}' % (b"0" * 400),
    "a score that no sum holds": b'{"products": [{"product": 1, "score": 1e308}]}',
    "a score of text": b'{"products": [{"product": 1, "score": "1"}]}',
    "a product twice": b'{"products": [{"product": 1, "score": 2}, {"product": 1, "score": 1}]}',
    "a product null": b'{"products": [{"product": null, "score": 2}]}',
    "an order that is none": b'{"products": [{"product": 1, "score": 1}, {"product": 2, "score": 2}]}',
    "nested deeply": b"[" * 100_000,
    "too large": b" " * (5 * 1024 * 1024),
}


@contextlib.contextmanager
def answering(reply):
    """Serve a fixed reply to whatever comes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                reply(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/recommend"
        finally:
            server.shutdown()
            thread.join()


def told(body, status=b"200 OK", more=b""):
    head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n" % (status, len(body), more)
    return lambda c: c.sendall(head + body)


def why(url, seconds=2.0):
    with pytest.raises(Gone) as gone:
        http_send(url, "product")(Call({"k": 3}, seconds, "id"))
    return gone.value.why


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_answer_is_no_answer(what):
    with answering(told(CORRUPT[what])) as url:
        assert why(url) == "corrupt"


def test_an_answer_of_which_one_digit_changed_on_its_way_is_corrupt():
    body = b'{"products": [{"product": 1, "score": 2}]}'
    digest = b"Content-Digest: %s\r\n" % content_digest(body)
    with answering(told(body, more=digest)) as url:
        assert http_send(url, "product")(Call({"k": 3}, 2.0, "id")) == ([1], [2.0])
    with answering(told(body.replace(b"2", b"3"), more=digest)) as url:
        assert why(url) == "corrupt"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (b"429 Busy", "busy"),
        (b"503 Busy", "busy"),
        (b"400 Bad", "refused"),
        (b"500 Ours", "failed"),
        (b"302 Else", "refused"),
    ],
)
def test_another_status_is_no_answer(status, expected):
    with answering(told(b"{}", status)) as url:
        assert why(url) == expected


def test_what_breaks_off_is_tried_once_more_and_then_gone():
    calls = []

    def cut(connection):
        calls.append(1)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    with answering(cut) as url:
        assert why(url) == "unreachable"
    assert len(calls) == 2


def test_a_slow_target_is_late_and_not_asked_again():
    calls = []

    def slow(connection):
        calls.append(1)
        time.sleep(1)

    with answering(slow) as url:
        begin = time.monotonic()
        assert why(url, seconds=0.2) == "late"
        assert time.monotonic() - begin < 0.8
    assert len(calls) == 1


def test_a_breaker_opens_tries_once_and_closes():
    now = [0.0]
    breaker = Breaker(most=3, clock=lambda: now[0])
    for _ in range(3):
        breaker.begin()
        breaker.end(fault=True)
    assert breaker.open
    with pytest.raises(Gone, match="open"):
        breaker.begin()
    now[0] = 0.6
    assert breaker.begin()
    with pytest.raises(Gone):
        breaker.begin()  # one tries at a time
    breaker.end(fault=True, tried=True)
    now[0] = 1.5
    assert breaker.open  # it waits twice as long
    now[0] = 1.7
    assert breaker.begin()
    breaker.end(fault=False, tried=True)
    assert not breaker.open and not breaker.begin()


def test_what_was_on_its_way_when_a_breaker_opened_does_not_open_it_for_longer():
    now = [0.0]
    breaker = Breaker(clock=lambda: now[0])
    for _ in range(16):
        breaker.begin()
    for _ in range(16):
        breaker.end(fault=True)
    assert breaker.open
    now[0] = 0.6
    assert not breaker.open


@pytest.mark.parametrize("fault", [True, None], ids=["fails", "says nothing"])
def test_what_was_on_its_way_when_a_breaker_opened_does_not_end_its_try(fault):
    now = [0.0]
    breaker = Breaker(clock=lambda: now[0])
    for _ in range(6):
        breaker.begin()
    for _ in range(5):
        breaker.end(fault=True)
    now[0] = 0.6
    assert breaker.begin()
    breaker.end(fault=fault)  # the sixth of before
    with pytest.raises(Gone):
        breaker.begin()
    breaker.end(fault=False, tried=True)
    assert breaker.closed


def test_a_question_that_nobody_waits_for_is_no_fault_of_the_target():
    def slow(call):
        time.sleep(0.2)
        return [1], [1.0]

    async def ask():
        target = Target("x", slow, 5.0, breaker=Breaker(most=1))
        asking = asyncio.ensure_future(target.ask({}, 5.0, "id"))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert target.breaker.closed
        assert (await target.ask({}, 5.0, "id")).state == "spoke"
        target.close()

    asyncio.run(ask())


def test_a_call_that_waited_for_a_thread_tells_what_is_left():
    seen = []

    def send(call):
        seen.append(int(call.headers["X-Request-Timeout-Ms"]))
        time.sleep(0.3)
        return [1], [1.0]

    async def ask():
        target = Target("x", send, 2.0, threads=1)
        await asyncio.gather(*(target.ask({}, 2.0, "id") for _ in range(3)))
        target.close()

    asyncio.run(ask())
    first, second, third = seen
    assert 1900 < first <= 2000 and second <= first - 250 and third <= second - 250


def test_a_client_that_gives_too_little_time_takes_no_target_from_the_others():
    def busy(call):
        raise Gone("busy")

    async def told(send, *seconds, **usual):
        target = Target("source", send, 60.0, **usual)
        return [(await target.ask({}, given, "id")).state for given in seconds], target

    hasty = [0.001] * 6
    states, target = asyncio.run(told(lambda call: time.sleep(0.02), *hasty, 1.0, usual=1.0))
    assert states == ["late"] * 6 + ["spoke"]
    assert len(target.hedge._times) == 1
    states, target = asyncio.run(told(busy, *hasty, usual=1.0))
    assert states == ["busy"] * 6 and target.hedge._calm_until < 0
    # what a request mostly gives is enough to tell a slow target by
    states, _ = asyncio.run(told(lambda call: time.sleep(0.02), *hasty, usual=0.001))
    assert states == ["late"] * 5 + ["open"]


def test_a_target_is_not_held_up_by_the_threads_of_another():
    async def both():
        slow = Target("slow", lambda call: time.sleep(1.0), 0.2, threads=1)
        fast = Target("fast", lambda call: ([1], [1.0]), 0.2, threads=1)
        begin = time.monotonic()
        answers = await asyncio.gather(*(target.ask({}, 5, "id") for target in (slow, slow, fast)))
        return answers, time.monotonic() - begin

    answers, took = asyncio.run(both())
    assert [answer.state for answer in answers] == ["late", "late", "spoke"]
    assert took < 0.9


# --- SageMaker, and releases that are mixed --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(fleet):
    member = fleet.members[0]
    return open_gateway(member.bundle, member.name, member.attestation, trusted(fleet.key)).codec


def invoke(codec, version="77", rows=None, content=None, shape=None):
    client = boto3.client(
        "sagemaker-runtime", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
    )
    rows = np.arange(1, ITEMS + 1)[None] if rows is None else rows
    outputs = {"rows": rows.astype(np.int64), "scores": -np.arange(rows.size, dtype=np.float32).reshape(rows.shape)}
    body, size = triton.write_answer("search", version, outputs)
    with Stubber(client) as stub:
        stub.add_response(
            "invoke_endpoint",
            {"Body": StreamingBody(io.BytesIO(body), len(body)),
             "ContentType": content or f"{triton.CONTENT};json-header-size={size}"},
            {"EndpointName": "shipyard-search", "Body": ANY, "ContentType": ANY, "InferenceId": "id"},
        )  # fmt: skip
        return sagemaker_send("shipyard-search", codec, client)(Call({"query": "milk", "k": 4}, 1.0, "id"))


def test_an_endpoint_is_asked_in_tritons_protocol(codec):
    assert invoke(codec) == (PRODUCTS[:4], [0.0, -1.0, -2.0, -3.0])


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"version": "76"}, "another-release"),
        ({"rows": np.zeros((1, ITEMS))}, "corrupt"),
        ({"rows": np.full((1, ITEMS), ITEMS + 1)}, "corrupt"),
        ({"rows": np.ones((1, 3))}, "corrupt"),
        ({"rows": np.ones((1, ITEMS))}, "corrupt"),
        ({"content": "application/json"}, "corrupt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_endpoint_of_another_release_or_with_nonsense_is_left_out(codec, case, expected):
    with pytest.raises(Gone) as gone:
        invoke(codec, **case)
    assert gone.value.why == expected


def test_requests_of_many_lengths_reach_triton_in_one_shape(codec):
    """Triton puts requests of one shape alone into one batch."""
    seen = []

    class Client:
        def invoke_endpoint(self, Body, ContentType, **_):
            seen.append(triton.read_request(Body, int(ContentType.rpartition("=")[2])))
            raise EndpointConnectionError(endpoint_url="x")

    asked = [
        {"query": " ".join(["milk"] * n), "history": [{"product": p, "days_ago": 1} for p in PRODUCTS[:n]], "k": 4}
        for n in range(1, 6)
    ]
    for document in asked:
        with pytest.raises(Gone):
            sagemaker_send("x", codec, Client())(Call(document, 1.0, "id"))
    assert len({tuple((name, array.shape) for name, array in inputs.items()) for inputs in seen}) == 1
    for document, inputs in zip(asked, seen, strict=True):
        for name, array in codec.encode([document]).items():
            np.testing.assert_array_equal(inputs[name][:, : array.shape[1]], array)
            assert not inputs[name][:, array.shape[1] :].any()


def test_an_endpoint_that_throttles_is_busy(codec):
    client = boto3.client(
        "sagemaker-runtime", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
    )
    for code, status, expected in (("ThrottlingException", 429, "busy"), ("ModelError", 424, "refused"),
                                   ("InternalFailure", 500, "failed")):  # fmt: skip
        with Stubber(client) as stub, pytest.raises(Gone) as gone:
            stub.add_client_error("invoke_endpoint", code, http_status_code=status)
            sagemaker_send("x", codec, client)(Call({"query": "milk", "k": 4}, 1.0, "id"))
        assert gone.value.why == expected


# --- the bundle and the command line ---------------------------------------------------------------------------------


def test_a_gateway_opens_its_own_bundle_alone(fleet, tmp_path):
    member = fleet.members[0]
    keys = trusted(fleet.key)
    pinned = open_gateway(member.bundle, "gateway", member.attestation, keys)
    assert (pinned.method, list(pinned.sources), pinned.parameters) == tuple(FUSION.values())
    with pytest.raises(ShipyardError, match="not the bundle that was attested as search"):
        open_gateway(member.bundle, "search", member.attestation, keys)
    copy = tmp_path / "copy"
    shutil.copytree(member.bundle, copy)
    text = (copy / "fusion.json").read_text()
    (copy / "fusion.json").write_text(text.replace("0.6", "0.9"))
    with pytest.raises(ShipyardError, match=r"fusion.json: digest differs"):
        open_gateway(copy, "gateway", member.attestation, keys)


def test_targets_of_the_cloud_are_found_by_two_addresses(fleet, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    member = fleet.members[0]
    pinned = open_gateway(member.bundle, member.name, member.attestation, trusted(fleet.key))
    assert set(sends(pinned, "sagemaker:shipyard-search", "http://internal", {})) == {"search", "recommend"}
    with pytest.raises(ShipyardError, match="--search: wrong"):
        sends(pinned, "shipyard-search", "http://internal", {})


def test_a_shard_goes_with_the_raw_scores_of_search_alone(fleet):
    member = fleet.members[0]
    pinned = open_gateway(member.bundle, member.name, member.attestation, trusted(fleet.key))
    assert pinned.targets["search"]["manifest"] == sha256_file(fleet.folders["search"] / "bundle.json")
    with pytest.raises(ShipyardError, match="--items: search is asked by --target"):
        shard(pinned, "http://127.0.0.1:9", {"search": "http://127.0.0.1:9"}, 1.0, Hedge(), 1.0)


def test_a_gateway_that_was_made_before_there_were_shards_is_told_of_none(fleet, tmp_path):
    gateway, *rest = fleet.members
    beside = Member("search-items-0", SHARD, tmp_path / "none", "", ROOT / "packaging", 9)
    new = command(gateway, (*fleet.members, beside), tmp_path)
    assert new[new.index("--items") + 1] == "http://127.0.0.1:9"
    pinned = json.loads((gateway.bundle / "fusion.json").read_text())
    for target in pinned["targets"].values():
        del target["manifest"]
    (tmp_path / "fusion.json").write_text(json.dumps(pinned))
    old = dataclasses.replace(gateway, bundle=tmp_path)
    assert "--items" not in command(old, (old, *rest, beside), tmp_path)


@pytest.mark.parametrize("option", ["--policy=search=always", "--target=intent=http://x"])
def test_a_wrong_option_is_told_in_one_line(fleet, tmp_path, option):
    wanted = [*command(fleet.members[0], fleet.members, tmp_path), f"--trusted-key={fleet.key}", "--port=0"]
    (tmp_path / "page.html").write_text("")
    done = subprocess.run([*wanted, option], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {option.partition('=')[0]}: wrong") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("policy", "status"), [("strict", 503), ("quorum", 200)])
def test_a_policy_says_how_many_must_speak(fleet, tmp_path, policy, status):
    [port] = free_ports(1)
    member = dataclasses.replace(fleet.members[0], port=port)
    rest = [other for other in fleet.members if other.kind != "greengrass-model"]
    options = (f"--policy=search={policy}", "--target=edge_recommend=http://127.0.0.1:9")
    with another_gateway(fleet, tmp_path, member, tuple(rest), *options) as url:
        asked = urllib.request.Request(f"{url}/v1/search", data=b'{"query": "milk"}')
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                got = answer.status
        except urllib.error.HTTPError as fault:
            got = fault.code
            assert "edge_recommend unreachable" in json.loads(fault.read())["error"]
        assert got == status
