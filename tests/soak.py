"""`make soak`: our CPU server at three times its capacity, then the fleet under steady load; goodput, memory, errors.

Ends with 1 where goodput is below nine tenths of capacity, memory grows, or something is answered that must not be.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from test_fusion_gateway import FUSION, Fleet, requests, states
from test_server import PRODUCTS, make_bundle, serving

from shipyard.bench import load
from shipyard.fleet import down

CLIENTS = 3
OVER = 3
SAMPLES = 12
MOST_GROWTH = 0.05
LEAST_GOODPUT = 0.9


def overload(seconds, together):
    """Return capacity, and goodput and memory of a server that is asked three times as often for lists of `together`."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "bundle")
        history = [{"product": product, "days_ago": k} for k, product in enumerate(PRODUCTS * 8)]
        asked = [load.request("/v1/recommend", json.dumps([{"history": history}] * together).encode())]
        with serving(bundle, Path(folder) / "log", workers=1, queue=64, deadline_ms=500) as running:
            load.closed(running.port, asked, 2, 8)
            found = load.closed(running.port, asked, min(10, seconds), 8).throughput
            held = []
            done = threading.Event()

            def watch():
                while not done.wait(seconds / SAMPLES):
                    held.append(own(running.process.pid))

            watching = threading.Thread(target=watch)
            watching.start()
            over = load.opened(running.port, asked, seconds, OVER * found, connections=128)
            done.set()
            watching.join()
            again = load.closed(running.port, asked, min(10, seconds), 8).throughput
            assert running.process.poll() is None
    # the machine may have changed in between: the capacity is that before and after
    capacity = (found + again) / 2
    return {
        "capacity": round(capacity, 1), "capacity_before_after": [round(found, 1), round(again, 1)],
        "asked": round(OVER * found, 1), "goodput": round(over.throughput, 1),
        "goodput_of_capacity": round(over.throughput / capacity, 3), "p99_ms": round(over.quantile(0.99), 1),
        "others": over.others, "memory_mb": [round(one, 1) for one in held], "growth": growth(held),
    }  # fmt: skip


def soak(seconds):
    """Return answers, errors and memory of the fleet under steady load."""
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder)).start()
        try:
            asked = [request for request in requests(50, seed=3)]
            right = [[product for product, _ in fleet.offline(request, FUSION["sources"])] for request in asked]
            seen, end = [], time.monotonic() + seconds
            held = {name: [] for name in fleet.pids}

            def ask(worker):
                k = worker
                while time.monotonic() < end:
                    k += CLIENTS
                    # one in two is new to the cache
                    at = k % len(asked)
                    more = {"user": k} if k % 2 else {}
                    status, answer = fleet.ask("/v1/search", asked[at] | more)
                    wrong = status == 200 and set(states(answer).values()) == {"spoke"} and right[at] != [
                        one["product"] for one in answer["products"]]  # fmt: skip
                    seen.append((status, wrong))
                    if k % 10 == 0 and status == 200:
                        event = {"item": answer["products"][0]["product"], "kind": "click"}
                        told = {"request_id": answer["request_id"], "user": k, "events": [event]}
                        seen.append((fleet.ask("/v1/feedback", told)[0], False))

            threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(CLIENTS)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(min(seconds / SAMPLES, 30))
                for name, pid in fleet.pids.items():
                    held[name].append(own(pid))
            for thread in threads:
                thread.join()
            handles = {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in fleet.pids.items()}
            written = sum(record["kind"] == "click" for record in fleet.records())
        finally:
            down(fleet.folder)
    statuses = [status for status, _ in seen]
    return {
        "seconds": seconds, "answers": len(seen), "errors": sum(status not in (200, 202) for status in statuses),
        "wrong": sum(wrong for _, wrong in seen), "feedback": statuses.count(202), "feedback_written": written,
        "memory_mb": {name: [round(one, 1) for one in told] for name, told in held.items()},
        "growth": {name: growth(told) for name, told in held.items()}, "handles": handles,
    }  # fmt: skip


def own(pid):
    """Return the megabytes that a process alone holds and has written: what it shares changes as others come and go."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Private_Dirty:"))


def growth(held):
    """Return how much memory grows from the second quarter of the time to the last, as a share."""
    part = max(1, len(held) // 4)
    return round(float(np.median(held[-part:]) / np.median(held[part : 2 * part]) - 1), 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overload", type=float, default=60, help="seconds")
    parser.add_argument("--soak", type=float, default=600, help="seconds")
    chosen = parser.parse_args()
    # many in one request, so that the model is what is scarce, and not the load's own core
    over, steady = overload(chosen.overload, 4), soak(chosen.soak)
    print(json.dumps({"overload": over, "soak": steady}, indent=1))
    faults = [
        *(["overload: goodput"] if over["goodput_of_capacity"] < LEAST_GOODPUT else []),
        *(["overload: memory grows"] if over["growth"] > MOST_GROWTH else []),
        *(["overload: other answers than 200, 429, 503"] if set(over["others"]) - {429, 503} else []),
        *(["soak: errors"] if steady["errors"] else []),
        *(["soak: a wrong answer"] if steady["wrong"] else []),
        *(["soak: feedback was lost"] if steady["feedback"] != steady["feedback_written"] else []),
        *(f"soak: memory of {name} grows" for name, share in steady["growth"].items() if share > MOST_GROWTH),
    ]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
