"""How the CPU server behaves under load and change: batches, admission, deadlines, drain, swap, and what it tells."""

import asyncio
import concurrent.futures
import contextlib
import importlib.metadata
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from google.protobuf import text_format
from test_server import GOOD, ITEMS, PRODUCTS, Bundle, command, make_bundle, serving
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from models.submodel import MAX_TOKENS
from serve import triton
from serve.batch import Batcher, Busy, Late
from serve.history import FEATURES, LIMIT, MOST_OFFERS
from serve.runtime import Model
from shipyard.bench import load


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("recommend") / "bundle")


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    with serving(bundle, tmp_path_factory.mktemp("log") / "server.log", prefix="/recommend") as running:
        yield running


def metric(running, name):
    """Return a metric's value by its whole name with labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=20).read().decode()
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)


# --- batches, in this process ----------------------------------------------------------------------------------------


def doubled(requests, wanted):
    time.sleep(0.02)
    if any(request == "poison" for request in requests):
        raise ZeroDivisionError
    return [(request, len(requests)) for request in requests]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def ask(batcher, request, length=1, seconds=10.0):
    deadline = asyncio.get_running_loop().time() + seconds
    return (await batcher.run(doubled, [request], [1], [length], deadline))[0]


def test_what_waits_goes_together_and_each_gets_its_own_answer():
    async def all_at_once():
        batcher = Batcher(1, 1.0, 100)
        return await asyncio.gather(*(ask(batcher, k) for k in range(30)))

    answers = run(all_at_once())
    assert [request for request, _ in answers] == list(range(30))
    assert answers[0][1] == 1
    assert {size for _, size in answers[1:]} == {29}


def test_lengths_far_apart_do_not_share_a_batch():
    async def mixed():
        batcher = Batcher(1, 1.0, 100)
        first = asyncio.ensure_future(ask(batcher, "first"))
        await asyncio.sleep(0)
        rest = [ask(batcher, k, length=500 if k % 2 else 3) for k in range(10)]
        return await asyncio.gather(first, *rest)

    assert {size for _, size in run(mixed())[1:]} == {5}


def test_a_batch_keeps_to_its_budget_once_its_requests_were_timed():
    async def timed():
        batcher = Batcher(1, 0.02, 1000)
        for k in range(20):
            await ask(batcher, k)
        return await asyncio.gather(*(ask(batcher, k) for k in range(5)))

    # one takes 20 ms by itself, which is the whole budget
    assert {size for _, size in run(timed())} == {1}


def test_a_fault_stays_with_its_own_request():
    async def poisoned():
        batcher = Batcher(1, 1.0, 100)
        asked = [ask(batcher, request) for request in ("first", "a", "poison", "b")]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, a, poison, b = run(poisoned())
    assert (first[0], a[0], b[0]) == ("first", "a", "b")
    assert isinstance(poison, ZeroDivisionError)


def test_a_full_queue_refuses_and_says_when_to_come_again():
    def slow(requests, wanted):
        time.sleep(0.3)
        return requests

    async def overfull():
        batcher = Batcher(1, 1.0, 5)
        deadline = asyncio.get_running_loop().time() + 0.4
        return await asyncio.gather(
            *(batcher.run(slow, [k], [1], [1], deadline) for k in range(20)), return_exceptions=True
        )

    answers = run(overfull())
    refused = [answer for answer in answers if isinstance(answer, Busy)]
    assert len(refused) == 14  # one runs, five wait, the others have waited for half of their time
    assert all(answer.seconds >= 1 for answer in refused)


def test_who_finds_no_room_waits_outside_for_half_of_the_time():
    async def crowd():
        batcher = Batcher(1, 1.0, 5)
        first = [ask(batcher, k) for k in range(20)]
        unread = [batcher.admit(asyncio.get_running_loop().time() + 10) for _ in range(20)]
        answers = await asyncio.gather(*first, *unread, return_exceptions=True)
        with pytest.raises(Busy):  # a list that never fits waits for nothing
            await asyncio.wait_for(
                batcher.run(doubled, [1] * 6, [1] * 6, [1] * 6, asyncio.get_running_loop().time() + 60), 1
            )
        return answers

    answers = run(crowd())
    assert [answer[0] for answer in answers[:20]] == list(range(20)) and answers[20:] == [None] * 20


def test_a_late_request_costs_no_compute():
    done = []

    def work(requests, wanted):
        time.sleep(0.1)
        done.extend(requests)
        return requests

    async def late():
        batcher = Batcher(1, 1.0, 100)
        now = asyncio.get_running_loop().time()
        asked = [batcher.run(work, [k], [1], [1], now + seconds) for k, seconds in enumerate((5, 0.05, 5))]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = run(late())
    assert answers[0] == [0] and answers[2] == [2]
    assert isinstance(answers[1], Late)
    assert done == [0, 2]


def test_what_would_be_late_is_refused_at_the_door():
    async def slow():
        batcher = Batcher(1, 0.001, 1000)
        for k in range(20):
            await ask(batcher, k)  # now known to take 20 ms each
        asked = [ask(batcher, k, seconds=0.2) for k in range(100)]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = run(slow())
    assert 4 <= sum(isinstance(answer, tuple) for answer in answers) <= 11
    assert sum(isinstance(answer, Busy) for answer in answers) >= 85


def test_a_model_that_is_not_kept_is_let_go():
    async def swapped():
        batcher = Batcher(1, 1.0, 100)
        await ask(batcher, 1)
        batcher.keep(len)
        return batcher._kinds

    assert run(swapped()) == {}


def test_who_waits_for_room_while_a_model_is_let_go_is_answered():
    def slow(requests, wanted):
        time.sleep(0.1)
        return requests

    async def swapped():
        batcher, deadline = Batcher(1, 1.0, 1), asyncio.get_running_loop().time() + 5
        # one is run, one fills the queue, one of another length waits outside
        asked = [
            asyncio.create_task(batcher.run(slow, [k], [1], [length], deadline)) for k, length in enumerate((1, 1, 99))
        ]
        await asyncio.sleep(0.02)
        batcher.keep(len)
        return await asyncio.wait_for(asyncio.gather(*asked), 10), batcher.waiting

    assert run(swapped()) == ([[0], [1], [2]], 0)


# --- the server ------------------------------------------------------------------------------------------------------


def test_routes_are_below_the_prefix_and_health_is_not_only(server):
    for path in ("/recommend/v1/recommend", "/v1/recommend"):
        assert server.predict(GOOD, path)[0] == 200
    assert server.ask("GET", "/readyz")[:2] == (200, {"status": "ready"})
    assert server.predict(GOOD, "/recommended/v1/recommend")[0] == 404


def test_many_clients_at_once_get_their_own_answers(server, bundle):
    requests = [{"history": [{"product": PRODUCTS[k % ITEMS], "days_ago": k % 7}], "k": 1 + k % 5} for k in range(200)]
    model = Model(bundle.folder, json.loads((bundle.folder / "bundle.json").read_text()))
    expected = [model.predict([request])[0] for request in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.predict, requests))
    assert [status for status, _ in answers] == [200] * 200
    assert [answer for _, answer in answers] == expected


def test_candidates_are_ranked_as_the_whole_catalogue_ranks_them(server):
    whole = server.predict(GOOD | {"k": ITEMS})[1]["products"]
    some = [PRODUCTS[k] for k in (7, 4, 2, 0)]
    status, answer = server.predict({"history": GOOD["history"], "candidates": [*some, 5, some[0]]}, "/v1/rank")
    assert status == 200
    assert answer["products"] == [found for found in whole if found["product"] in some]
    assert answer["unknown_candidates"] == [5]


@pytest.mark.parametrize(
    "candidates", [None, [], "1007", {}, [1.5], [True], [None], [[1007]], [1007] * 10_001], ids=lambda c: repr(c)[:20]
)
def test_what_are_no_candidates_is_refused(server, candidates):
    status, answer = server.predict({"candidates": candidates}, "/v1/rank")
    assert status == 400
    assert "candidates" in answer["error"]


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "x", "100000", "²", ""])
def test_a_deadline_is_a_number_of_milliseconds(server, given):
    status, _, _ = server.ask(
        "POST", "/v1/recommend", json.dumps(GOOD), {"X-Request-Timeout-Ms": given.encode("latin-1")}
    )
    assert status == (400 if given else 200)


def test_the_request_id_of_the_client_comes_back_if_it_is_one(server):
    for given, kept in (("abc-1.2_3", True), ("a b", False), ("x" * 65, False)):
        _, _, headers = server.ask("GET", "/v1/recommend", None, {"X-Request-Id": given})
        assert (headers["X-Request-Id"] == given) is kept
        assert headers["X-Request-Id"]


def test_metrics_count_requests_and_batches(server):
    before = metric(server, 'requests_total{path="/v1/recommend",status="200"}')
    server.predict([GOOD] * 7)
    server.predict({"k": 0})
    assert metric(server, 'requests_total{path="/v1/recommend",status="200"}') == before + 1
    assert metric(server, 'requests_total{path="/v1/recommend",status="400"}') >= 1
    assert metric(server, "batch_requests_count") > 0
    assert metric(server, "requests_waiting") == 0


HURRIED = """
import sys, serve.asgi
serve.asgi.SECONDS_TO_SEND = serve.asgi.SECONDS_TO_TAKE = 1
from serve.server import main
sys.exit(main())
"""


def test_a_client_that_sends_nothing_or_half_a_head_is_let_go(bundle, tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(bundle, tmp_path / "server.log", program=("-c", HURRIED)))
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)) for _ in range(4)]
        idle[1].sendall(b"POST /v1/recommend HT")
        idle[2].sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nX: ")
        idle[3].sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        start = time.monotonic()
        told = [b"".join(iter(lambda c=connection: c.recv(65536), b"")) for connection in idle]
        assert 0.5 < time.monotonic() - start < 15
        assert told[:3] == [b"", b"", b""]
        assert told[3].startswith(b"HTTP/1.1 408 ")
        assert server.predict(GOOD)[0] == 200


def test_a_client_that_sends_no_further_request_or_takes_no_answer_is_let_go(bundle, tmp_path):
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(bundle, tmp_path / "server.log", program=("-c", HURRIED)))
        line, body, deaf = (stack.enter_context(socket.socket()) for _ in range(3))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for connection in (line, body, deaf):
            connection.settimeout(20)
            connection.connect(("127.0.0.1", server.port))
        line.sendall(whole)
        body.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        for connection, status in ((line, b"200"), (body, b"404")):
            told = b""
            while not told.endswith(b"}"):
                told += connection.recv(65536)
            assert told.startswith(b"HTTP/1.1 %s " % status)
        line.sendall(b"\r\n")
        body.sendall(b"x")
        start = time.monotonic()
        assert line.recv(1) == body.recv(1) == b""
        assert 0.5 < time.monotonic() - start < 15
        # more than this machine keeps for a connection, asked for at once
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        with pytest.raises(ConnectionError):
            while time.monotonic() - start < 15:
                deaf.sendall(whole)
                time.sleep(0.1)
        assert server.predict(GOOD)[0] == 200


SLOW = """
import asyncio, sys
from serve import asgi
asgi.SECONDS_TO_SEND = 1
from serve.listen import serve
async def slow(asked):
    await asyncio.sleep(2)
    return asgi.Answer(200, asked.json())
serve(asgi.App({("POST", "/slow"): slow}), "127.0.0.1", int(sys.argv[1]), "slow", 0)
"""


@pytest.mark.parametrize(
    ("half", "end"),
    [(b"POST /slow HT", b""), (b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"408")],
)
def test_half_a_request_cuts_no_answer_to_the_one_before_it(half, end):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(port)])
    try:
        for _ in range(200):
            with contextlib.suppress(ConnectionError):
                connection = socket.create_connection(("127.0.0.1", port), timeout=20)
                break
            time.sleep(0.05)
        with connection:
            connection.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" + half)
            told = b"".join(iter(lambda: connection.recv(65536), b""))
    finally:
        process.kill()
        process.wait()
    first, _, second = told.partition(b"{}")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second[9:12] == end


def test_a_head_without_end_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")
            for k in range(2000):
                connection.sendall(b"X-%d: %s\r\n" % (k, b"x" * 100))
        with contextlib.suppress(ConnectionError):
            assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")
    assert server.predict(GOOD)[0] == 200


def test_pipelined_requests_are_answered_in_their_order(server):
    bodies = [json.dumps(GOOD | {"k": k}).encode() for k in (1, 2, 3)]
    text = b"".join(
        b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body) for body in bodies
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(text + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        told = b"".join(iter(lambda: connection.recv(65536), b"")).split(b"HTTP/1.1 200 ")[1:]
    assert [part.count(b'"product":') for part in told] == [1, 2, 3, 0]


def test_the_load_counts_what_the_server_counts(server):
    asked = [load.request("/v1/recommend", json.dumps(request).encode()) for request in (GOOD, {"k": 0})]
    series = 'requests_total{path="/v1/recommend",status="%d"}'
    before = [metric(server, series % status) for status in (200, 400)]
    found = load.closed(server.port, asked, 0.5, 4)
    after = [metric(server, series % status) for status in (200, 400)]
    # those that were under way at the end are not counted by the load
    assert 0 <= after[0] - before[0] - len(found.latencies) <= 4
    assert after[1] - before[1] == found.others[400]
    assert 0 < found.quantile(0.5) <= found.quantile(0.99) < 500


def test_an_open_load_keeps_its_rate(server):
    found = load.opened(server.port, [load.request("/v1/recommend", b"{}")], 1.0, 50)
    assert 45 <= len(found.latencies) <= 51 and not found.others


# --- overload, drain, swap -------------------------------------------------------------------------------------------


def test_overload_is_refused_with_a_time_to_come_again(bundle, tmp_path):
    with serving(bundle, tmp_path / "log", workers=1, queue=8, deadline_ms=30) as running:
        big = [GOOD] * 8
        seen = []
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for status, _, headers in pool.map(
                lambda _: running.ask("POST", "/v1/recommend", json.dumps(big)), range(200)
            ):
                seen.append(status)
                assert status in (200, 429, 503)
                assert status == 200 or int(headers["Retry-After"]) >= 1
        assert {200, 429} <= set(seen)
        assert running.predict(GOOD)[0] == 200
        assert metric(running, 'requests_refused_total{why="busy"}') == seen.count(429)


def test_a_drain_answers_what_comes_and_says_that_it_is_not_ready(bundle, tmp_path):
    with serving(bundle, tmp_path / "log", drain=1) as running:
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.ask("GET", "/readyz")[0] == 503
        status, _, headers = running.ask("POST", "/v1/recommend", json.dumps(GOOD))
        assert (status, headers["Connection"]) == (200, "close")
        assert running.process.wait(timeout=20) == 0
        with pytest.raises(ConnectionError):
            running.predict(GOOD)


def test_a_swap_loses_no_request_and_a_bad_one_changes_nothing(bundle, tmp_path):
    other = make_bundle(tmp_path / "other", catalogue={"products": [p + 1 for p in PRODUCTS], "rows": None,
                                                       "answers": None})  # fmt: skip
    other = Bundle(other.folder, other.name, bundle.key)
    told = tmp_path / "swap.json"
    statuses, first, stop = [], set(), threading.Event()
    with serving(bundle, tmp_path / "log", swap=told) as running:

        def load():
            while not stop.is_set():
                status, answer = running.predict({"k": 1})
                statuses.append(status)
                first.add(answer["products"][0]["product"])

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for attestation, word in (("0:0", "not swapped"), (other.attestation, "swapped: ")):
                told.write_text(json.dumps({"bundle": str(other.folder), "attestation": attestation}))
                running.process.send_signal(signal.SIGHUP)
                deadline = time.monotonic() + 20
                while word not in running.log.read_text():
                    assert time.monotonic() < deadline, running.log.read_text()[-2000:]
                    time.sleep(0.02)
                if word == "not swapped":
                    assert first == {PRODUCTS[0]}
            time.sleep(0.2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert set(statuses) == {200}
        assert first == {PRODUCTS[0], PRODUCTS[0] + 1}
        assert running.predict({"k": 1})[1]["products"][0]["product"] == PRODUCTS[0] + 1


# --- Triton's configuration ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
    """Triton's model_config.proto, as its client has it; loaded by file, for the package wants gRPC."""
    path = next(
        f for f in importlib.metadata.files("tritonclient") if f.as_posix().endswith("grpc/model_config_pb2.py")
    )
    spec = importlib.util.spec_from_file_location("model_config_pb2", path.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("inputs", [tuple(triton.INPUTS), ("items", "features")], ids=["all inputs", "a history alone"])
def test_a_configuration_is_one_of_tritons_schema(schema, inputs):
    found = text_format.Parse(triton.config("search", inputs, 100, 501, 77), schema.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("search", "onnxruntime", 64)
    assert [one.name for one in found.input] == list(inputs)
    told = dict(zip(inputs, found.input, strict=True))
    assert told["items"].data_type == schema.TYPE_INT64 and list(told["items"].dims) == [-1]
    assert told["features"].data_type == schema.TYPE_FP32 and list(told["features"].dims) == [-1, len(FEATURES)]
    assert [(one.name, list(one.dims)) for one in found.output] == [
        ("rows", [100]),
        ("scores", [100]),
        ("logits", [501]),
    ]
    assert list(found.version_policy.specific.versions) == [77]
    assert found.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert [one.batch_size for one in found.model_warmup] == [1, found.max_batch_size]
    for sample, step in zip(found.model_warmup, (0, -1), strict=True):
        assert set(sample.inputs) == set(inputs)
        for name in inputs:  # Triton wants a warm-up's shapes without unknowns
            assert list(sample.inputs[name].dims) == [triton.STEPS[name][step], *told[name].dims[1:]]
            assert sample.inputs[name].data_type == told[name].data_type


def test_a_readers_configuration_is_one_too(schema):
    found = text_format.Parse(triton.reader_config("search-reader"), schema.ModelConfig())
    assert [one.name for one in found.input] == ["pair_ids", "pair_mask"]
    assert [(one.name, list(one.dims)) for one in found.output] == [("scores", [1])]


def test_the_schema_refuses_what_is_misspelt(schema):
    text = triton.config("search", ("items", "features"), 100, 501).replace("max_batch_size", "most_batch_size")
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, schema.ModelConfig())


# --- Triton's protocol -----------------------------------------------------------------------------------------------

ARRAYS = {
    "items": np.array([[3, 0], [1, 2]], np.int64),
    "features": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
}


def theirs():
    inputs = []
    for name, array in triton.padded(ARRAYS).items():
        inputs.append(InferInput(name, list(array.shape), "INT64" if array.dtype == np.int64 else "FP32"))
        inputs[-1].set_data_from_numpy(array)
    outputs = [InferRequestedOutput(name, binary_data=True) for name in ("rows", "scores")]
    return InferenceServerClient.generate_request_body(inputs, outputs)


def test_a_request_is_the_one_that_tritons_own_client_writes():
    ours, size = triton.write_request(ARRAYS)
    body, length = theirs()
    assert json.loads(ours[:size]) == json.loads(body[:length])
    assert ours[size:] == body[length:]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513])
def test_padding_takes_the_next_length_and_leaves_a_longer_one(length):
    found = triton.padded({"items": np.ones((2, length), np.int64), "features": np.ones((2, length, 3), np.float32)})
    wanted = next((step for step in triton.STEPS["items"] if step >= length), length)
    assert found["items"].shape == (2, wanted) and found["features"].shape == (2, wanted, 3)
    assert found["items"].sum() == 2 * length and found["features"].dtype == np.float32


def test_the_longest_step_is_the_longest_request():
    """One that no step holds would be a shape of its own."""
    steps = {name: found[-1] for name, found in triton.STEPS.items()}
    assert steps["query_ids"] == steps["query_mask"] == MAX_TOKENS
    assert steps["items"] == steps["features"] == LIMIT and steps["offers"] == steps["strengths"] == MOST_OFFERS


def test_a_head_without_a_form_is_the_clients_fault(tmp_path):
    found = make_bundle(tmp_path / "bundle", search=True, graph="model_repository/search/1/model.onnx")
    with serving(found, tmp_path / "server.log") as server:
        for head in (b"[" * 100_000, b"{}", b"null"):
            length = {triton.HEADER_LENGTH: str(len(head))}
            status, answer, _ = server.ask("POST", "/v2/models/search/infer", head, length)
            assert status == 400 and answer["error"].startswith("no request of Triton's binary protocol")


def test_tritons_own_client_reads_our_answer():
    outputs = {"rows": np.array([[4, 2]], np.int64), "scores": np.array([[0.5, -1]], np.float32)}
    body, size = triton.write_answer("search", "1", outputs)
    read = InferenceServerClient.parse_response_body(body, header_length=size)
    for name, array in outputs.items():
        np.testing.assert_array_equal(read.as_numpy(name), array)
    version, found = triton.read_answer(body, size)
    assert version == "1"
    np.testing.assert_array_equal(found["scores"], outputs["scores"])


@pytest.mark.parametrize("size", [-1, 0, 1, 5, 10**9])
def test_what_is_no_answer_is_refused(size):
    body, _ = triton.write_answer("search", "1", {"rows": np.array([[4]], np.int64)})
    with pytest.raises((ValueError, KeyError, TypeError)):
        triton.read_answer(body, size)


def test_every_cut_of_an_answer_is_refused():
    body, size = triton.write_answer("search", "1", {"rows": np.array([[4, 5]], np.int64)})
    for end in range(len(body)):
        with pytest.raises((ValueError, KeyError, TypeError)):
            triton.read_answer(body[:end], size)


def test_an_unknown_option_ends_the_server(bundle):
    assert subprocess.run([*command(bundle), "--speed=9"], capture_output=True, timeout=60).returncode == 2
