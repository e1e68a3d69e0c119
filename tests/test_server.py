"""The private cluster's HTTP server as a process of its own, on a small real bundle."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fuzzed import fuzz
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.release import attest
from serve.asgi import LARGEST_BODY, Answer, App, dump
from serve.codec import LONGEST_QUERY, MOST_HISTORY, SCHEMA, BadRequest
from serve.engine import ENGINE
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.history import FEATURES, KINDS, LIMIT, MOST_OFFERS, OFFER
from serve.runtime import Model, open_bundle
from serve.server import MOST_REQUESTS
from serve.trust import MANIFEST, key_id

ITEMS = 12
PRODUCTS = [1000 + 7 * row for row in range(1, ITEMS + 1)]
GOOD = {"history": [{"product": PRODUCTS[4], "days_ago": 3.5}, {"product": PRODUCTS[0], "days_ago": 0}], "k": 3}


# --- a small bundle --------------------------------------------------------------------------------------------------


def write_graph(file, *, search=False, offers=True):
    """Write a graph with a real one's inputs and outputs: a bias, more for purchases, for display and for the query."""
    bias = np.r_[-1e9, np.linspace(0.12, 0.01, ITEMS)].astype(np.float32)
    constants = {
        "bias": bias[None],
        "zero": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "width": np.array([ITEMS + 1], np.int64),
        "returned": np.array([ITEMS], np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["items"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "width"], ["shape"], axis=0),
        helper.make_node("Expand", ["bias", "shape"], ["start"]),
        helper.make_node("Gather", ["features", "zero"], ["bought"], axis=2),
        helper.make_node("ScatterElements", ["start", "items", "bought"], ["heard"], axis=1, reduction="add"),
    ]
    inputs = [
        helper.make_tensor_value_info("items", TensorProto.INT64, ["B", "H"]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", "H", len(FEATURES)]),
    ]
    logits = "heard"
    if offers:
        inputs += [
            helper.make_tensor_value_info("offers", TensorProto.INT64, ["B", "P"]),
            helper.make_tensor_value_info("strengths", TensorProto.FLOAT, ["B", "P", len(OFFER)]),
        ]
        nodes += [
            helper.make_node("Gather", ["strengths", "zero"], ["display"], axis=2),
            helper.make_node("ScatterElements", ["heard", "offers", "display"], ["offered"], axis=1, reduction="add"),
        ]
        logits = "offered"
    if search:
        inputs += [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "L"]) for n in ("query_ids", "query_mask")]
        nodes += [
            helper.make_node("Cast", ["query_mask"], ["asked"], to=TensorProto.FLOAT),
            helper.make_node("ScatterElements", [logits, "query_ids", "asked"], ["met"], axis=1, reduction="add"),
        ]
        logits = "met"
    nodes.append(helper.make_node("TopK", [logits, "returned"], ["scores", "rows"], axis=1))
    nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    outputs = [
        helper.make_tensor_value_info("rows", TensorProto.INT64, ["B", ITEMS]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", ITEMS]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", ITEMS + 1]),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "ranker", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, file)


def write_tokenizer(file):
    words = Tokenizer(WordLevel({"[UNK]": 0, "milk": 7, "牛奶": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save(str(file))


@dataclass(frozen=True)
class Bundle:
    """A sealed bundle on disk, with the key that attests it."""

    folder: Path
    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def attestation(self):
        return attest(self.name, sha256_file(self.folder / MANIFEST), self.key)

    @property
    def keys(self):
        public = self.key.public_key()
        return {key_id(public): public}

    @property
    def trusted(self):
        return self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def rewrite(self, change):
        document = json.loads((self.folder / MANIFEST).read_text())
        change(document)
        (self.folder / MANIFEST).write_text(json.dumps(document))


def make_bundle(folder, *, search=False, offers=True, level="product", catalogue=None, graph="model.onnx", name=None):
    (folder / graph).parent.mkdir(parents=True)
    write_graph(folder / graph, search=search, offers=offers)
    catalogue = catalogue or {"products": PRODUCTS, "rows": None, "answers": None}
    (folder / "catalogue.json").write_text(json.dumps(catalogue))
    if search:
        write_tokenizer(folder / "tokenizer.json")
    task = "search" if search else "recommend"
    name = name or task
    document = {
        "schema": SCHEMA,
        "name": name,
        "task": task,
        "model": graph,
        "level": level,
        "catalogue": "catalogue.json",
        "tokenizer": "tokenizer.json" if search else None,
        "max_tokens": 8,
        "history": {"limit": LIMIT, "features": list(FEATURES), "offer": list(OFFER)},
        "inputs": [
            *(["query_ids", "query_mask"] if search else []),
            "items",
            "features",
            *(["offers", "strengths"] if offers else []),
        ],
        "returned": ITEMS,
        "precision": "fp32",
        "engine": ENGINE | {"ir_version": 10, "opset": 20},
        "facts": {},
        "golden": [],
    }
    query = {"query": "milk"} if search else {}
    events = [{"product": catalogue["products"][k], "days_ago": days} for k, days in ((4, 3.5), (0, 0))]
    requests = [{"history": []} | query, {"history": events} | query]
    answers = Model(folder, document).predict(requests)
    document["golden"] = [{"request": r, "answer": a} for r, a in zip(requests, answers, strict=True)]
    document["files"] = [
        {"path": path.relative_to(folder).as_posix(), "sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / MANIFEST).write_text(json.dumps(document, indent=1, sort_keys=True))
    return Bundle(folder, name)


# --- the server as a process -----------------------------------------------------------------------------------------


def command(bundle, /, program=("-m", "serve.server"), **options):
    chosen = {
        "bundle": bundle.folder,
        "artifact": bundle.name,
        "attestation": bundle.attestation,
        "trusted_key": bundle.trusted,
        "port": 0,
        "threads": 1,
    } | options
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    return [sys.executable, *program, *flags]


@dataclass
class Running:
    """A server that has said that it is ready."""

    process: subprocess.Popen
    log: Path
    port: int

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or "null"), answer.headers

    def predict(self, document, path="/v1/recommend"):
        status, answer, _ = self.ask("POST", path, json.dumps(document).encode())
        return status, answer

    def raw(self, text):
        """Send bytes as they are; return status and body of the first answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(text)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def serving(bundle, log, /, **options):
    with log.open("w") as stream:
        process = subprocess.Popen(command(bundle, **options), stderr=stream, stdout=stream)
    try:
        deadline = time.monotonic() + 60
        while "ready: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        port = int(log.read_text().partition("ready: ")[2].split()[4])
        yield Running(process, log, port)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("recommend") / "bundle")


@pytest.fixture
def own_bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    with serving(bundle, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    bundle = make_bundle(tmp_path_factory.mktemp("search") / "bundle", search=True)
    with serving(bundle, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


# --- good requests ---------------------------------------------------------------------------------------------------


def test_health_checks_answer(server):
    assert server.ask("GET", "/healthz")[:2] == (200, {"status": "alive"})
    assert server.ask("GET", "/readyz")[:2] == (200, {"status": "ready"})


def test_answers_name_products_and_not_rows(server):
    status, answer = server.predict(GOOD)
    assert status == 200
    assert [p["product"] for p in answer["products"]] == [PRODUCTS[0], PRODUCTS[4], PRODUCTS[1]]
    scores = [p["score"] for p in answer["products"]]
    assert scores == pytest.approx([0.12 + np.log(2), 0.08 + np.log(2), 0.11], abs=1e-5)
    assert answer["unknown"] == []


def test_unknown_products_are_listed_and_change_nothing(server):
    known = server.predict(GOOD)[1]
    strange = [{"product": p, "days_ago": 1} for p in (5, -3, 2**64 - 1, 5)]
    status, answer = server.predict(GOOD | {"history": GOOD["history"] + strange})
    assert status == 200
    assert answer == known | {"unknown": [5, -3, 2**64 - 1]}


def test_a_request_without_anything_gets_ten_products(server):
    status, answer = server.predict({})
    assert status == 200
    assert [p["product"] for p in answer["products"]] == PRODUCTS[:10]


def test_every_product_can_be_asked_for(server):
    _, answer = server.predict({"k": ITEMS})
    assert sorted(p["product"] for p in answer["products"]) == PRODUCTS


def test_alone_and_in_a_batch_the_answer_is_the_same(server):
    rng = np.random.default_rng(3)
    requests = [
        {
            "history": [
                {"product": int(product), "days_ago": float(days)}
                for product, days in zip(rng.choice(PRODUCTS, n), rng.uniform(0, 300, n).round(2), strict=True)
            ],
            "k": int(rng.integers(1, ITEMS + 1)),
        }
        for n in rng.integers(0, 40, 30)
    ]
    status, together = server.predict(requests)
    assert status == 200
    assert together == [server.predict(request)[1] for request in requests]


def test_an_empty_batch_gets_an_empty_answer(server):
    assert server.predict([]) == (200, [])


def test_an_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    seconds = []
    with contextlib.closing(connection):
        for _ in range(30):
            start = time.perf_counter()
            connection.request("POST", "/v1/recommend", json.dumps(GOOD))
            connection.getresponse().read()
            seconds.append(time.perf_counter() - start)
    assert min(seconds[5:]) < 0.03


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        for body, expected in ((json.dumps(GOOD), 200), ("{", 400), (json.dumps(GOOD), 200)):
            connection.request("POST", "/v1/recommend", body)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == expected
            assert connection.sock is not None


def test_search_reads_the_query_in_any_script(searcher):
    for query, row in (("milk", 7), ("牛奶", 9), ("  milk 🥛 unheard-of ", 7)):
        status, answer = searcher.predict({"query": query, "k": 1}, "/v1/search")
        assert status == 200
        assert answer["products"][0]["product"] == PRODUCTS[row - 1]


@pytest.mark.parametrize(
    "query", [None, 3, "", "x" * (LONGEST_QUERY + 1), ["milk"], {"text": "milk"}], ids=lambda query: repr(query)[:20]
)
def test_search_refuses_what_is_no_query(searcher, query):
    status, answer = searcher.predict({"query": query}, "/v1/search")
    assert status == 400
    assert "query" in answer["error"]
    assert searcher.predict({"history": []}, "/v1/search")[0] == 400
    assert searcher.predict({"query": "milk"}, "/v1/search")[0] == 200


# --- bad requests ----------------------------------------------------------------------------------------------------


def event(product="1007", days="1"):
    return f'{{"history": [{{"product": {product}, "days_ago": {days}}}]}}'


BODIES = {
    "empty": "",
    "not JSON": "history",
    "cut off": '{"history": [',
    "two documents": "{} {}",
    "a number": "7",
    "a string": '"recommend"',
    "null": "null",
    "true": "true",
    "Chinese text": "推荐一些牛奶",
    "emoji": "🛒🥛",
    "not UTF-8": b"\xff\xfe\x80{}",
    "a list of a number": "[1]",
    "a list in a list": "[[{}]]",
    "too many requests": "[" + ",".join(["{}"] * (MOST_REQUESTS + 1)) + "]",
    "one bad among good": '[{}, {"k": 0}]',
    "an unknown key": '{"histroy": []}',
    "an unknown key in Chinese": '{"历史": []}',
    "a lone surrogate as a key": '{"\\ud800": 1}',
    "a query without a tokenizer": '{"query": "milk"}',
    "history a string": '{"history": "milk"}',
    "history an object": '{"history": {}}',
    "history null": '{"history": null}',
    "a purchase of a number": '{"history": [1]}',
    "a purchase of a list": '{"history": [[1007, 1]]}',
    "a purchase without days": '{"history": [{"product": 1007}]}',
    "a purchase without product": '{"history": [{"days_ago": 1}]}',
    "a purchase with more": '{"history": [{"product": 1007, "days_ago": 1, "price": 2}]}',
    "too long a history": json.dumps({"history": [{"product": 1007, "days_ago": 1}] * (MOST_HISTORY + 1)}),
    "product a float": event(product="1007.0"),
    "product true": event(product="true"),
    "product null": event(product="null"),
    "product a list": event(product="[1007]"),
    "days negative": event(days="-0.5"),
    "days NaN": event(days="NaN"),
    "days Infinity": event(days="Infinity"),
    "days -Infinity": event(days="-Infinity"),
    "days 1e999": event(days="1e999"),
    "days beyond a century": event(days="36501"),
    "days of 4,000 digits": event(days="9" * 4000),
    "days of 5,000 digits": event(days="9" * 5000),
    "days a string": event(days='"1"'),
    "days false": event(days="false"),
    "kind unknown": '{"history": [{"product": 1007, "days_ago": 1, "kind": "return"}]}',
    "kind in Chinese": '{"history": [{"product": 1007, "days_ago": 1, "kind": "购买"}]}',
    "kind in capitals": '{"history": [{"product": 1007, "days_ago": 1, "kind": "Purchase"}]}',
    "kind null": '{"history": [{"product": 1007, "days_ago": 1, "kind": null}]}',
    "kind a number": '{"history": [{"product": 1007, "days_ago": 1, "kind": 0}]}',
    "kind a list": '{"history": [{"product": 1007, "days_ago": 1, "kind": ["purchase"]}]}',
    "offers a string": '{"offers": "1007"}',
    "offers an object": '{"offers": {"product": 1007}}',
    "offers null": '{"offers": null}',
    "offers true": '{"offers": true}',
    "an offer of a number": '{"offers": [1007]}',
    "an offer of a list": '{"offers": [[1007, 1]]}',
    "an offer without product": '{"offers": [{"display": 1}]}',
    "an offer with more": '{"offers": [{"product": 1007, "price": 1}]}',
    "an offer of a product null": '{"offers": [{"product": null}]}',
    "an offer of a product true": '{"offers": [{"product": true}]}',
    "an offer of a product that is a float": '{"offers": [{"product": 1007.0}]}',
    "an offer of a product that is an object": '{"offers": [{"product": {"id": 1007}}]}',
    "display negative": '{"offers": [{"product": 1007, "display": -0.01}]}',
    "mailer above 1": '{"offers": [{"product": 1007, "mailer": 1.01}]}',
    "discount in percent": '{"offers": [{"product": 1007, "discount": 25}]}',
    "discount NaN": '{"offers": [{"product": 1007, "discount": NaN}]}',
    "discount Infinity": '{"offers": [{"product": 1007, "discount": Infinity}]}',
    "display true": '{"offers": [{"product": 1007, "display": true}]}',
    "display a string": '{"offers": [{"product": 1007, "display": "1"}]}',
    "display null": '{"offers": [{"product": 1007, "display": null}]}',
    "display of 4,000 digits": '{"offers": [{"product": 1007, "display": ' + "9" * 4000 + "}]}",
    "the second offer wrong": '{"offers": [{"product": 1007}, {"product": 1014, "display": 2}]}',
    "too many offers": json.dumps({"offers": [{"product": 1007}] * (MOST_OFFERS + 1)}),
    "k 0": '{"k": 0}',
    "k negative": '{"k": -1}',
    "k too large": f'{{"k": {ITEMS + 1}}}',
    "k huge": f'{{"k": 1{"0" * 4000}}}',
    "k a string": '{"k": "3"}',
    "k a float": '{"k": 3.0}',
    "k true": '{"k": true}',
    "k null": '{"k": null}',
    "nested far too deeply": "[" * 100_000,
    "nested deeply": '{"history": ' + "[" * 5000 + "]" * 5000 + "}",
}


def assert_refused(server, status, answer, allowed=range(400, 500)):
    assert status in allowed
    assert answer.keys() == {"error"}
    assert answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 500
    assert server.predict(GOOD)[0] == 200


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_the_clients_fault(server, what):
    body = BODIES[what]
    status, answer, _ = server.ask("POST", "/v1/recommend", body if isinstance(body, bytes) else body.encode())
    assert_refused(server, status, answer, allowed={400})


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/rank"])
def test_the_server_is_as_its_description_says(server, path):
    seen = fuzz(f"http://127.0.0.1:{server.port}", path)
    assert (set(seen["positive"]), set(seen["negative"])) == ({200}, {400})
    assert "Traceback" not in server.log.read_text()


def test_no_depth_of_nesting_is_our_fault(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        for depth in range(900, 1010):
            connection.request("POST", "/v1/recommend", '{"history": [' + "[" * depth + "]" * depth + "]}")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 400, depth


@pytest.mark.parametrize(
    "path", ["/", "/v1/search", "/v1/recommend/", "/v1/recommend?k=3", "/../etc/passwd", "/%E6%8E%A8", "/\x80"]
)
def test_a_wrong_path_is_refused(server, path):
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
    assert_refused(server, *server.raw(request.encode("latin-1")), allowed={404} if path.isascii() else {400})


@pytest.mark.parametrize("path", ["/", "/readyz/", "/v1/recommend"])
def test_there_is_nothing_else_to_get(server, path):
    assert_refused(server, *server.ask("GET", path)[:2], allowed={404})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_a_wrong_method_is_refused(server, method):
    status, answer, headers = server.ask(method, "/v1/recommend", b"{}")
    assert_refused(server, status, answer, allowed={405})
    assert headers["Allow"] == "GET, POST"


def test_an_answer_to_head_has_no_body(server):
    assert server.ask("HEAD", "/healthz")[:2] == (405, None)


HEADERS = {
    "no length": ("", 411),
    "length of no number": ("Content-Length: two\r\n", 400),
    "length negative": ("Content-Length: -2\r\n", 400),
    "length with a sign": ("Content-Length: +2\r\n", 400),
    "length of a superscript": ("Content-Length: ²\r\n", 400),
    "length twice": ("Content-Length: 2\r\nContent-Length: 3\r\n", 400),
    "length too large": (f"Content-Length: {LARGEST_BODY + 1}\r\n", 413),
    "length of 5,000 digits": (f"Content-Length: {'9' * 5000}\r\n", 400),
    "chunked": ("Transfer-Encoding: chunked\r\n", 411),
    "chunked with a length": ("Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", 400),
    "too many headers": ("".join(f"X-{i}: 1\r\n" for i in range(200)), 431),
    "too long a header": (f"X: {'x' * 70_000}\r\n", 431),
}


@pytest.mark.parametrize("what", HEADERS)
def test_bad_headers_are_refused(server, what):
    headers, expected = HEADERS[what]
    request = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
    assert_refused(server, *server.raw(request.encode("latin-1")), allowed={expected})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("POST", 400),
        ("POST /v1/recommend HTTP/1.1 more", 400),
        ("POST /v1/recommend HTTP/x.y", 400),
        ("BREW /v1/recommend HTTP/1.1", 400),
        ("\x16\x03\x01 hello", 400),
        ("POST /" + "a" * 40_000 + " HTTP/1.1", 431),
        ("POST /v1/recommend HTTP/3.0", 400),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_request_line_is_refused_in_json(server, line, expected):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{line}\r\n\r\n".encode("latin-1"))
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    document = json.loads(text[text.index("{") :])
    assert document.keys() == {"error"}
    assert text.startswith((f"HTTP/1.1 {expected} ", "{"))
    assert server.predict(GOOD)[0] == 200


@pytest.mark.parametrize("method", ["GET /healthz", "POST /v1/recommend"])
@pytest.mark.parametrize("header", ["Content-Length: 2\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked"])
def test_a_body_that_is_not_read_is_never_taken_for_a_request(server, method, header):
    hidden = "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{method} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n{hidden}".encode())
        text = b""
        with contextlib.suppress(ConnectionResetError):
            text = b"".join(iter(lambda: connection.recv(65536), b""))
    assert text.count(b"HTTP/1.1") == 1


def test_a_client_that_goes_away_leaves_no_trace_and_no_harm(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert server.predict(GOOD)[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in server.log.read_text()


def test_control_characters_do_not_reach_the_log(server):
    server.raw(b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert "\x1b" not in server.log.read_text()


# --- start and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_server_with_success(bundle, tmp_path, name):
    with serving(bundle, tmp_path / "server.log") as running:
        running.predict(GOOD)
        running.process.send_signal(getattr(signal, name))
        assert running.process.wait(timeout=20) == 0
        assert "Traceback" not in running.log.read_text()


def test_attestation_and_key_may_come_from_the_environment(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SHIPYARD_ATTESTATION", bundle.attestation)
    monkeypatch.setenv("SHIPYARD_TRUSTED_KEY", bundle.trusted)
    plain = [part for part in command(bundle) if not part.startswith(("--attestation", "--trusted-key"))]
    with (tmp_path / "log").open("w") as stream:
        process = subprocess.Popen(plain, stderr=stream)
    try:
        deadline = time.monotonic() + 60
        while "ready: " not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def refused(bundle, /, **options):
    """Start the server on what is not to be trusted; return the one line that it ends with."""
    result = subprocess.run(command(bundle, **options), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_flipped_byte_in_the_model_is_refused(own_bundle):
    file = own_bundle.folder / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "model.onnx: digest differs" in refused(own_bundle)


def test_another_bundles_attestation_is_refused(bundle):
    other = attest("search", sha256_file(bundle.folder / MANIFEST), bundle.key)
    assert "not the bundle that was attested as recommend" in refused(bundle, attestation=other)


def test_an_untrusted_key_is_refused(bundle, tmp_path):
    stranger = Bundle(tmp_path, "recommend")
    assert "key that is not trusted" in refused(bundle, trusted_key=stranger.trusted)


def test_no_attestation_is_refused(bundle):
    assert "key that is not trusted" in refused(bundle, attestation="")


@pytest.mark.parametrize("text", ["", "ssh-ed25519 AAAA", "ssh-rsa AAAAB3NzaC1yc2E="])
def test_what_is_no_key_is_refused(bundle, text):
    assert "--trusted-key: not a public key" in refused(bundle, trusted_key=text)


def test_a_golden_answer_that_differs_is_refused_although_it_is_attested(own_bundle):
    def change(document):
        document["golden"][1]["answer"]["products"][0]["score"] += 0.01

    own_bundle.rewrite(change)
    assert "golden answer 1 differs" in refused(own_bundle)


def test_a_golden_product_that_is_not_found_is_refused(own_bundle):
    def change(document):
        document["golden"][0]["answer"]["products"][0]["product"] = 1

    own_bundle.rewrite(change)
    assert "golden answer 0 differs for product 1" in refused(own_bundle)


def test_a_graph_that_the_engine_does_not_run_is_refused(own_bundle):
    file = own_bundle.folder / "model.onnx"
    file.write_bytes(b"no graph")
    known = {"path": file.name, "sha256": sha256_file(file), "bytes": file.stat().st_size}
    own_bundle.rewrite(
        lambda document: document.update(files=[known if f["path"] == file.name else f for f in document["files"]])
    )
    assert "the engine does not run it" in refused(own_bundle)


def test_another_schema_is_refused(own_bundle):
    own_bundle.rewrite(lambda document: document.update(schema="shipyard.bundle/1"))
    assert "schema is not known" in refused(own_bundle)


def test_a_folder_without_a_bundle_is_refused(bundle, tmp_path):
    assert "no bundle.json" in refused(bundle, bundle=tmp_path)


def test_a_port_that_is_taken_is_refused(server, bundle):
    assert "in use" in refused(bundle, port=server.port)


def test_a_port_that_does_not_exist_is_refused(bundle):
    assert "65535" in refused(bundle, port=99999)


# --- in this process -------------------------------------------------------------------------------------------------


def test_the_default_number_of_products_is_never_more_than_the_model_returns(bundle):
    manifest = json.loads((bundle.folder / MANIFEST).read_text()) | {"returned": 4}
    model = Model(bundle.folder, manifest)
    assert len(model.predict([{}])[0]["products"]) == 4
    with pytest.raises(BadRequest, match="from 1 to 4"):
        model.predict([{"k": 5}])


def test_a_golden_answer_may_differ_by_rounding(own_bundle):
    def change(document):
        document["golden"][1]["answer"]["products"][0]["score"] += 0.0005

    own_bundle.rewrite(change)
    model = open_bundle(own_bundle.folder, own_bundle.name, own_bundle.attestation, own_bundle.keys)
    assert model.answers == PRODUCTS


BARE = 0.12 - 0.01 * np.arange(ITEMS)
"""Scores of the products of a request that says nothing."""


def scores_of(model, request):
    [answer] = model.predict([{"k": ITEMS} | request])
    return {found[model.answer_key]: found["score"] for found in answer[f"{model.answer_key}s"]}


@pytest.fixture(scope="module")
def model(bundle):
    return Model(bundle.folder, json.loads((bundle.folder / MANIFEST).read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_is_no_purchase(model, kind):
    told = scores_of(model, {"history": [{"product": PRODUCTS[3], "days_ago": 2, "kind": kind}]})
    assert told[PRODUCTS[3]] == pytest.approx(BARE[3] + (np.log(2) if kind == "purchase" else 0), abs=1e-6)
    features = model.encode([{"history": [{"product": PRODUCTS[3], "days_ago": 2, "kind": kind}]}])["features"][0, 0]
    looked = features[FEATURES.index("looks")]
    assert looked == pytest.approx(0 if kind == "purchase" else np.log1p(np.exp(-2 / 14)))


def test_an_event_without_a_kind_is_a_purchase(model):
    history = [{"product": PRODUCTS[3], "days_ago": 2}]
    named = [{"product": PRODUCTS[3], "days_ago": 2, "kind": "purchase"}]
    assert scores_of(model, {"history": history}) == scores_of(model, {"history": named})


def test_an_offer_lifts_its_product_alone(model):
    told = scores_of(model, {"offers": [{"product": PRODUCTS[7], "display": 0.5, "mailer": 1}]})
    expected = dict(zip(PRODUCTS, BARE, strict=True)) | {PRODUCTS[7]: BARE[7] + 0.5}
    assert told == pytest.approx(expected, abs=1e-6)


def test_what_an_offer_does_not_say_is_0(model):
    inputs = model.encode([{"offers": [{"product": PRODUCTS[2]}, {"product": PRODUCTS[1], "discount": 1}]}, {}])
    np.testing.assert_array_equal(inputs["offers"], [[2, 3], [0, 0]])
    np.testing.assert_array_equal(inputs["strengths"], [[[0, 0, 1], [0, 0, 0]], np.zeros((2, 3))])


@pytest.mark.parametrize("more", [[], [{"product": "nothing of ours", "display": 1}, {"product": -1, "display": 1}]])
def test_an_offer_named_twice_is_one_offer(model, more):
    """Its strongest one, as in training; what the model does not have counts nothing."""
    twice = [{"product": PRODUCTS[5], "display": display} for display in (0.25, 1, 0.5)]
    told = scores_of(model, {"offers": twice + more})
    assert told[PRODUCTS[5]] == pytest.approx(BARE[5] + 1, abs=1e-6)
    assert model.encode([{"offers": twice + more}])["offers"].tolist() == [[6]]


def test_an_offer_of_an_item_of_the_history_is_told_with_it(model):
    history = [{"product": PRODUCTS[3], "days_ago": 2}, {"product": PRODUCTS[8], "days_ago": 2}]
    offers = [{"product": PRODUCTS[8], "display": 1, "mailer": 0.5, "discount": 0.25}]
    told = model.encode([{"history": history, "offers": offers}])["features"][0, :, -len(OFFER) :]
    np.testing.assert_array_equal(told, [[0, 0, 0], [1, 0.5, 0.25]])


def test_the_order_of_events_and_offers_does_not_matter(model):
    rng = np.random.default_rng(5)
    events = [
        {"product": int(product), "days_ago": int(days), "kind": str(kind)}
        for product, days, kind in zip(
            rng.choice(PRODUCTS, 30), rng.integers(0, 40, 30), rng.choice(KINDS, 30), strict=True
        )
    ]
    offers = [{"product": product, "display": 0.1} for product in PRODUCTS[::2]]
    forward = scores_of(model, {"history": events, "offers": offers})
    assert scores_of(model, {"history": events[::-1], "offers": offers[::-1]}) == pytest.approx(forward, abs=1e-6)


IDS = ["牛奶", "牛奶 ", "7", 7, "", "😀", "é", "e\u0301", "a/b", "x" * 500, -1, 10**30]
"""Ids that are easily taken for each other."""


@pytest.fixture(scope="module")
def of_text(tmp_path_factory):
    catalogue = {"products": IDS, "rows": None, "answers": None}
    made = make_bundle(tmp_path_factory.mktemp("text") / "bundle", catalogue=catalogue)
    return open_bundle(made.folder, made.name, made.attestation, made.keys)


@pytest.mark.parametrize("k", range(len(IDS)), ids=lambda k: repr(IDS[k])[:20])
def test_an_id_may_be_any_text(of_text, k):
    told = scores_of(of_text, {"history": [{"product": IDS[k], "days_ago": 1}]})
    rise = [told[product] - bare for product, bare in zip(IDS, BARE, strict=True)]
    assert rise == pytest.approx(np.log(2) * (np.arange(ITEMS) == k), abs=1e-6)
    [answer] = of_text.predict([{"history": [{"product": IDS[k], "days_ago": 1}]}])
    assert answer["unknown"] == []


def test_a_text_is_no_number(of_text):
    events = [{"product": product, "days_ago": 1} for product in ("-1", "牛", "07", 70, "\ud800")]
    [answer] = of_text.predict([{"history": events}])
    assert answer["unknown"] == ["-1", "牛", "07", 70, "\ud800"]
    assert [p["product"] for p in answer["products"]] == IDS[:10]


def test_an_id_that_is_half_a_character_can_be_answered(server):
    status, answer = server.predict({"history": [{"product": "\ud800", "days_ago": 1}]})
    assert (status, answer["unknown"]) == (200, ["\ud800"])


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    """A bundle that ranks types: the first three products have one, the last two types have no product."""
    answers = [f"类 {row}" for row in range(1, ITEMS + 1)]
    catalogue = {"products": PRODUCTS, "rows": [1, 1, 1, *range(2, 11)], "answers": answers}
    folder = tmp_path_factory.mktemp("types") / "bundle"
    return make_bundle(folder, offers=False, level="type", catalogue=catalogue)


@pytest.fixture(scope="module")
def of_types(types):
    return open_bundle(types.folder, types.name, types.attestation, types.keys)


def test_a_model_of_types_answers_with_types(of_types):
    [answer] = of_types.predict([{"k": 2}])
    assert answer == {"types": [{"type": "类 1", "score": 0.12}, {"type": "类 2", "score": 0.11}], "unknown": []}


def test_purchases_of_one_type_are_told_together(of_types):
    history = [{"product": PRODUCTS[k], "days_ago": 3} for k in (0, 1, 2, 4)] + [{"product": 1, "days_ago": 3}]
    told = scores_of(of_types, {"history": history})
    assert told["类 1"] == pytest.approx(0.12 + np.log(4), abs=1e-5)
    assert told["类 3"] == pytest.approx(0.10 + np.log(2), abs=1e-5)
    assert of_types.predict([{"history": history}])[0]["unknown"] == [1]


def test_a_model_of_types_takes_no_offers(of_types):
    with pytest.raises(BadRequest, match="unknown key"):
        of_types.predict([{"offers": []}])


def test_a_golden_type_that_differs_is_refused(types):
    manifest = json.loads((types.folder / MANIFEST).read_text())
    manifest["golden"][1]["answer"]["types"][0]["score"] += 0.01
    with pytest.raises(ShipyardError, match="golden answer 1 differs for type 类"):
        Model(types.folder, manifest).self_test()


def test_the_bundle_is_verified_before_anything_of_it_is_opened(own_bundle):
    (own_bundle.folder / "catalogue.json").write_text("{")
    with pytest.raises(ShipyardError, match="digest differs"):
        open_bundle(own_bundle.folder, own_bundle.name, own_bundle.attestation, own_bundle.keys)


def test_the_server_writes_nothing_into_its_bundle(bundle, server):
    names = {path.name for path in bundle.folder.rglob("*")}
    assert names == {MANIFEST, "model.onnx", "catalogue.json"}
    assert os.access(bundle.folder, os.R_OK)


# --- what JSON cannot say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "text"),
    [({"a": None}, b'{"a":null}'), ({"a": "null", "b": 0.1}, b'{"a":"null","b":0.1}'), (["\ud800"], b'["\\ud800"]'),
     ({"牛奶": 2**64 - 1}, '{"牛奶":18446744073709551615}'.encode())],
)  # fmt: skip
def test_an_answer_is_json(document, text):
    assert dump(document) == text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_our_fault(number, caplog):
    async def handler(asked):
        return Answer(200, {"score": number})

    said = []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        said.append(message)

    scope = {"raw_path": b"/x", "method": "POST", "headers": [(b"content-length", b"2")], "query_string": b""}
    asyncio.run(App({("POST", "/x"): handler})(scope, receive, send))
    assert (said[0]["status"], said[1]["body"]) == (500, b'{"error":"internal error"}')
    assert "not JSON compliant" in caplog.text
