"""Faults on the fleet under load: each answer is right for the targets that it says spoke, and what was lost comes back.

Between the gateway and each target stands a proxy that can hold answers back or turn a bit of them. Every answer is compared
with the offline fusion of those that spoke. SHIPYARD_FAULTS=all takes every fault on every target (`make soak`).
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import urllib.request

import pytest
from test_fusion_gateway import FUSION, Fleet, another_gateway, free_ports, requests, states

from shipyard.fleet import down, start

SOURCES = FUSION["sources"]
KINDS = ("kill", "pause", "slow", "corrupt")
SOME = (("search", "corrupt"), ("recommend", "pause"), ("edge_recommend", "slow"), ("recommend", "kill"))
FAULTS = tuple(itertools.product(SOURCES, KINDS)) if os.environ.get("SHIPYARD_FAULTS") == "all" else SOME
DEADLINE = 0.4
SLOW = 2.0


class Proxy:
    """Pass bytes on to a port; `mode` "slow" holds answers back, "some" each 40th, "corrupt" turns a bit of their bodies."""

    def __init__(self, port):
        self.mode, self._port, self._passed = "pass", port, itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._random = random.Random(3)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._port)) as target:
            back = threading.Thread(target=self._back, args=(target, client), daemon=True)
            back.start()
            while data := client.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
            back.join(5)

    def _back(self, target, client):
        with contextlib.suppress(OSError):
            while data := target.recv(65536):
                # head and body of an answer may come apart, and it is the answer that is held back
                begins = self.mode == "some" and data.startswith(b"HTTP/")
                if self.mode == "slow" or (begins and next(self._passed) % 40 == 0):
                    time.sleep(SLOW)
                body = data.find(b"\r\n\r\n") + 4
                if self.mode == "corrupt" and body < len(data):
                    at = self._random.randrange(body, len(data))
                    data = data[:at] + bytes([data[at] ^ 1 << self._random.randrange(8)]) + data[at + 1 :]
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.close()


class Faulty:
    """A fleet whose targets can be broken one by one, each behind a proxy."""

    def __init__(self, folder):
        self.fleet, self.folder = Fleet(folder), folder
        self.members = dict(zip(SOURCES, self.fleet.members[1:], strict=True))
        self.proxies = {}
        self.asked = list(requests(24, seed=11))
        self.right = {
            (k, spoke): [product for product, _ in self.fleet.offline(request, spoke)]
            for k, request in enumerate(self.asked)
            for size in (1, 2, 3)
            for spoke in itertools.combinations(SOURCES, size)
        }

    def __enter__(self):
        for source in SOURCES:
            self.begin(source)
            self.proxies[source] = Proxy(self.members[source].port)
        seen = [dataclasses.replace(self.members[source], port=self.proxies[source].port) for source in SOURCES]
        [port] = free_ports(1)
        gateway = dataclasses.replace(self.fleet.members[0], port=port)
        self.fleet.url = gateway.url
        (self.folder / "own").mkdir()
        options = ("--cache-seconds=0", f"--deadline-ms={DEADLINE * 1000:.0f}")
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(another_gateway(self.fleet, self.folder / "own", gateway, (gateway, *seen), *options))
        return self

    def __exit__(self, *_):
        self.stack.close()
        for source in SOURCES:
            down(self.folder / f"run-{source}")
            self.proxies[source].close()
        assert "Traceback" not in (self.folder / "own" / "log").read_text()

    def begin(self, source):
        folder = self.folder / f"run-{source}" / "up"
        folder.mkdir(parents=True, exist_ok=True)
        return start((self.members[source],), self.fleet.key, folder, "test")

    def pid(self, source):
        return json.loads((self.folder / f"run-{source}" / "up" / "up.json").read_text())["members"][0]["pid"]

    def ask(self, k):
        """Ask the k-th request; return its status, its answer and how long it took."""
        begin = time.monotonic()
        status, answer = self.fleet.ask("/v1/search", self.asked[k])
        return status, answer, time.monotonic() - begin

    def wrong(self, k, answer):
        """Say whether an answer is not the fusion of those that it says spoke."""
        spoke = tuple(name for name, state in states(answer).items() if state == "spoke")
        return [one["product"] for one in answer["products"]] != self.right[k, spoke]

    def broken(self, source, kind):
        """Break a target, in a way that ends with the context."""
        if kind in ("slow", "some", "corrupt"):
            return self._mode(source, kind)
        return self._signalled(source, kind)

    @contextlib.contextmanager
    def _mode(self, source, kind):
        self.proxies[source].mode = kind
        yield
        self.proxies[source].mode = "pass"

    @contextlib.contextmanager
    def _signalled(self, source, kind):
        pid = self.pid(source)
        os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        yield
        if kind == "pause":
            os.kill(pid, signal.SIGCONT)
        else:
            self.begin(source)


def suffer(faulty, source, kind, seconds=1.0, clients=3, patience=30.0):
    """Break a target under load for some seconds; return what was seen, and how long it took until all spoke again."""
    seen, stop, whole = [], threading.Event(), threading.Event()
    healed = threading.Event()

    def load(worker):
        for k in itertools.count(worker):
            if stop.is_set():
                return
            at = k % len(faulty.asked)
            status, answer, took = faulty.ask(at)
            wrong = status == 200 and faulty.wrong(at, answer)
            told = states(answer) if status == 200 else None
            seen.append((status, wrong, took, told))
            if healed.is_set() and told is not None and set(told.values()) == {"spoke"}:
                whole.set()

    threads = [threading.Thread(target=load, args=(worker,)) for worker in range(clients)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        with faulty.broken(source, kind):
            time.sleep(seconds)
        since = time.monotonic()
        healed.set()
        assert whole.wait(patience), f"{source} does not come back after {kind}"
        recovery = time.monotonic() - since
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "source": source, "kind": kind, "answers": len(seen), "errors": sum(status != 200 for status, *_ in seen),
        "wrong": sum(wrong for _, wrong, *_ in seen), "without": sum(told is not None and told[source] != "spoke"
                                                                     for *_, told in seen),
        "states": sorted({told[source] for *_, told in seen if told is not None}),
        "slowest_ms": round(max(took for _, _, took, _ in seen) * 1e3), "recovery_seconds": round(recovery, 2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    with Faulty(tmp_path_factory.mktemp("faulty")) as found:
        yield found


# first, while the gateway has learned nothing of faults
def test_a_target_of_which_some_answers_are_slow_is_asked_twice_and_counted_once(faulty):
    answers, won = [], []
    with faulty.broken("search", "some"):
        # on a busy machine answers that nobody holds back may take the budget before the one that is held
        for k in itertools.cycle(range(len(faulty.asked))):
            answers.append((k, *faulty.ask(k)))
            told = answers[-1][2]["targets"]["search"]
            won += [told] if told.get("hedge") == "won" else []
            if len(won) >= 3 or len(answers) >= 1000:
                break
    assert {status for _, status, *_ in answers} == {200}
    assert not any(faulty.wrong(k, answer) for k, _, answer, _ in answers)
    assert len(won) >= 3 and {one["state"] for one in won} == {"spoke"}
    with urllib.request.urlopen(f"{faulty.fleet.url}/metrics", timeout=10) as page:
        metrics = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
    assert float(metrics['target_hedges_total{outcome="won",target="search"}']) >= len(won)
    assert 0 < float(metrics['hedge_delay_seconds{target="search"}']) <= DEADLINE
    # one request is one impression, with what was answered
    lines = [line for path in (faulty.folder / "own" / "feedback").glob("*.jsonl") for line in path.open()]
    seen = [record["request_id"] for record in map(json.loads, lines)]
    assert {answer["request_id"] for *_, answer, _ in answers} <= set(seen)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(("source", "kind"), FAULTS)
def test_a_fault_costs_no_answer_makes_none_wrong_and_heals(faulty, source, kind):
    found = suffer(faulty, source, kind)
    print(json.dumps(found), file=sys.stderr)
    assert found["answers"] > 5 and found["without"] > 0, found
    assert (found["errors"], found["wrong"]) == (0, 0), found
    expected = {"kill": {"unreachable", "open"}, "corrupt": {"corrupt", "open"}}.get(kind, {"late", "open"})
    assert set(found["states"]) & expected, found
    assert found["slowest_ms"] < 1000 * (DEADLINE + 3), found
    assert found["recovery_seconds"] < 20, found


def test_without_any_target_there_is_an_error_and_then_answers_again(faulty):
    with contextlib.ExitStack() as stack:
        for source in SOURCES:
            stack.enter_context(faulty.broken(source, "corrupt"))
        for _ in range(8):
            status, answer, took = faulty.ask(0)
            assert (status, took < DEADLINE + 3) == (503, True)
            assert "too few targets answer" in answer["error"]
    end = time.monotonic() + 20
    while faulty.ask(0)[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert urllib.request.urlopen(f"{faulty.fleet.url}/healthz", timeout=10).status == 200
