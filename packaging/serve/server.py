"""The private CPU cluster's HTTP server, and the edge's on loopback: JSON over HTTP/1.1, one verified bundle.

GET /healthz answers once the process runs, /readyz once the bundle is verified and its golden answers hold; /metrics is
Prometheus', /openapi.json describes the rest. POST /v1/recommend (or /v1/search, by the bundle's task) takes one request of
`serve.runtime.Model.predict`, or a list of them; POST /v1/rank ranks the candidates that a request names. SIGTERM drains,
SIGHUP takes the bundle that --swap names.
"""

import argparse
import asyncio
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from serve import openapi
from serve.asgi import DEADLINE_HEADER, TIMES, Answer, App, Asked, Refused, log
from serve.batch import Batcher, Busy, Late, Work
from serve.codec import BadRequest
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.listen import add_common, serve
from serve.runtime import Model, open_bundle
from serve.triton import CONTENT, HEADER_LENGTH, read_request, version, write_answer
from serve.trust import MANIFEST, trusted

MOST_REQUESTS = 256


class Service:
    """One model behind routes; `model` is None until it is verified."""

    def __init__(
        self, name: str, task: str, prefix: str, workers: int, budget: float, queue: int, deadline: float
    ) -> None:
        self.model: Model | None = None
        self._deadline = deadline
        routes = {
            ("POST", f"/v1/{name}"): functools.partial(self._answer, rank=name == "rank") for name in (task, "rank")
        }
        self.app = App(
            {**routes, ("GET", "/openapi.json"): self._openapi, ("POST", f"/v2/models/{name}/infer"): self._infer},
            prefix,
        )
        registry = self.app.registry
        sizes = Histogram("batch_requests", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        seconds = Histogram("batch_seconds", "Time of a batch", buckets=TIMES, registry=registry)

        def observe(size: int, took: float) -> None:
            sizes.observe(size)
            seconds.observe(took)

        self._batcher = Batcher(workers, budget, queue, observe)
        waiting = Gauge("requests_waiting", "Requests in the queue", registry=registry)
        waiting.set_function(lambda: self._batcher.waiting)
        self._refused = Counter("requests_refused", "Requests refused or dropped", ("why",), registry=registry)
        self._served = Gauge("bundle", "The bundle that is served", ("name", "manifest"), registry=registry)

    def take(self, model: Model, manifest: str) -> None:
        """Serve a verified model; what was accepted under the one before it is answered by that one."""
        before, self.model = self.model, model
        self._served.clear()
        self._served.labels(model.manifest["name"], manifest).set(1)
        if before is not None:
            self._batcher.keep(model.answer, model.answer_ranked, model.run_each)

    def close(self) -> None:
        """End the workers."""
        self._batcher.close()

    def _present(self) -> Model:
        if self.model is None:
            raise Refused(503, "opening the bundle", {"Retry-After": "1"})
        return self.model

    async def _answer(self, asked: Asked, rank: bool) -> Answer:
        model = self._present()
        deadline = asyncio.get_running_loop().time() + asked.seconds(self._deadline)
        if rank and not model.ranks:
            raise Refused(404, "this bundle's graph ranks its whole catalogue alone; ask its task's path")
        await self._admit(deadline)
        document = asked.json()
        requests = document if isinstance(document, list) else [document]
        if len(requests) > MOST_REQUESTS:
            raise Refused(400, f"too many requests at once; value: {len(requests)}; allowed: at most {MOST_REQUESTS}")
        try:
            wanted = [model.check(request, f"request {i}", rank=rank) for i, request in enumerate(requests)]
        except BadRequest as fault:
            raise Refused(400, str(fault)) from None
        answers = await self._run(model.answer_ranked if rank else model.answer, requests, wanted, deadline)
        return Answer(200, answers if isinstance(document, list) else answers[0])

    async def _admit(self, deadline: float) -> None:
        """Wait for room before anything of a request is read: under overload most of what comes is refused."""
        try:
            await self._batcher.admit(deadline)
        except Busy as busy:
            raise self._too_many(busy) from None

    def _too_many(self, busy: Busy) -> Refused:
        self._refused.labels("busy").inc()
        return Refused(429, "too many requests", {"Retry-After": str(busy.seconds)})

    async def _run(self, work: Work, requests: list[Any], wanted: list[int], deadline: float) -> list[Any]:
        lengths = [_length(request) for request in requests]
        try:
            return await self._batcher.run(work, requests, wanted, lengths, deadline)
        except Busy as busy:
            raise self._too_many(busy) from None
        except Late:
            self._refused.labels("late").inc()
            raise Refused(503, "the deadline passed before the request was begun", {"Retry-After": "1"}) from None

    async def _infer(self, asked: Asked) -> Answer:
        """Answer as Triton does, for a bundle that is Triton's: one machine's stand-in for the GPU endpoint."""
        model = self._present()
        if not model.manifest["model"].startswith("model_repository/"):
            raise Refused(404, "this bundle is none of Triton's")
        deadline = asyncio.get_running_loop().time() + asked.seconds(self._deadline)
        await self._admit(deadline)
        length = asked.headers.get(HEADER_LENGTH.lower(), "")
        try:
            inputs = read_request(asked.body, int(length) if length.isascii() and len(length) < 10 else -1)
            if sorted(inputs) != sorted(model.manifest["inputs"]):
                raise ValueError(f"inputs {', '.join(inputs)}")
        except (ValueError, KeyError, TypeError, RecursionError) as fault:
            raise Refused(400, f"no request of Triton's binary protocol: {str(fault)[:200]}") from None
        # tensors of one request are a batch already
        [(rows, scores)] = await self._run(model.run_each, [inputs], [1], deadline)
        found = {"rows": rows, "scores": scores}
        body, head = write_answer(model.manifest["name"], version(model.manifest["model"]), found)
        return Answer(200, body, {HEADER_LENGTH: str(head)}, f"{CONTENT};json-header-size={head}")

    async def _openapi(self, asked: Asked) -> Answer:
        model = self._present()
        paths = {}
        for name, rank in ((model.task, False), ("rank", True)):
            if rank and not model.ranks:
                continue
            one, answer = openapi.request_schema(model, rank=rank), openapi.answer_schema(model)
            many = openapi.listed(one, MOST_REQUESTS)
            paths[f"/v1/{name}"] = {
                "post": openapi.operation(
                    "Rank the candidates" if rank else "Rank the whole catalogue",
                    {"oneOf": [answer, {"type": "array", "items": answer}]},
                    {"oneOf": [one, many]},
                )
            }
        return Answer(
            200, openapi.document(model.manifest["name"], model.manifest["precision"], paths, self.app.prefix)
        )


def _length(request: Any) -> int:
    """Return what a request's cost goes by: events, offers and about the query's tokens; of tensors, their numbers."""
    if "items" in request:
        return sum(int(array.size) for array in request.values())
    return len(request.get("history", ())) + len(request.get("offers", ())) + len(request.get("query", "")) // 4


def main(arguments: list[str] | None = None) -> int:
    """Serve a bundle until SIGTERM; exit with 1 when it is not to be trusted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m serve.server", description=__doc__)
    add_common(parser)
    parser.add_argument("--workers", type=int, default=0, help="batches at once, all on one model (0: one a core)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine for one batch, 0 for one a core")
    parser.add_argument("--budget-ms", type=float, default=25, help="time that a batch may take")
    parser.add_argument("--queue", type=int, default=1024, help="requests that may wait")
    parser.add_argument(
        "--deadline-ms", type=float, default=2000, help=f"of a request, unless {DEADLINE_HEADER} tells it"
    )
    parser.add_argument(
        "--swap", type=Path, help='JSON {"bundle": folder, "attestation": text} that SIGHUP serves instead'
    )
    chosen = parser.parse_args(arguments)

    try:
        keys = trusted(chosen.trusted_key)
        # routes stand before the bundle is open, and the task is what its manifest will be held to
        task = "search" if (chosen.bundle / "tokenizer.json").exists() else "recommend"
        service = Service(
            chosen.artifact, task, chosen.prefix, chosen.workers or cores, chosen.budget_ms / 1000, chosen.queue,
            chosen.deadline_ms / 1000,
        )  # fmt: skip

        async def take(folder: Path, attestation: str) -> None:
            model = await asyncio.to_thread(open_bundle, folder, chosen.artifact, attestation, keys, chosen.threads)
            if model.task != task:
                raise ShipyardError(f"{folder}: another task", value=model.task, allowed=task)
            service.take(model, sha256_file(folder / MANIFEST)[:16])

        swapping = asyncio.Lock()

        async def swap() -> None:
            try:
                async with swapping:  # of two signals the later one reads the file later, and has the last word
                    told = json.loads(await asyncio.to_thread(chosen.swap.read_bytes))
                    await take(Path(told["bundle"]), told["attestation"])
            except (ShipyardError, OSError, ValueError, KeyError, TypeError) as fault:
                log.error("not swapped, the bundle before it is served on: %s", fault)
            else:
                log.info("swapped: %s", told["bundle"])

        serve(
            service.app, chosen.host, chosen.port, chosen.artifact, chosen.drain,
            lambda: take(chosen.bundle, chosen.attestation), swap if chosen.swap is not None else None,
        )  # fmt: skip
        service.close()
    except (ShipyardError, OSError, OverflowError) as fault:  # the last is a port that no machine has
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
