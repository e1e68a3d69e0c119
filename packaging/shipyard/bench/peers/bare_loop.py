"""The limit: the model in a bare loop, and the engine alone on inputs that are made already, each at its best batch.

Reads workloads from the first line of its input, a time from each other; writes a line of JSON for each.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ranker import Ranker

SIZES = (1, 4, 16, 64)


def rate(work: Callable[[], Any], seconds: float) -> float:
    """Return how often a second something is done."""
    begin, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - begin < seconds:
        work()
        rounds += 1
    return rounds / (time.perf_counter() - begin)


def main() -> None:
    """Measure until the input ends."""
    ranker, workloads = Ranker(), json.loads(sys.stdin.readline())
    batches: dict[str, dict[int, list[Any]]] = {
        name: {size: [requests[k % len(requests)] for k in range(size)] for size in SIZES}
        for name, requests in workloads.items()
    }
    best: dict[str, int] = {}
    for line in sys.stdin:
        seconds, told = float(line), {}
        for name, by_size in batches.items():
            if name not in best:
                rates = {size: size * rate(functools.partial(ranker.answer, by_size[size]), 0.5) for size in SIZES}
                best[name] = max(SIZES, key=lambda size, rates=rates: rates[size])
            size = best[name]
            run = functools.partial(ranker.run, ranker.inputs(by_size[size]), name)
            told[name] = {
                "batch": size,
                "model": size * rate(functools.partial(ranker.answer, by_size[size]), seconds),
                "engine": size * rate(run, seconds),
            }
        told["small_ms"] = 1e3 / rate(functools.partial(ranker.answer, [{"history": [], "k": 1}]), seconds / 2)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
