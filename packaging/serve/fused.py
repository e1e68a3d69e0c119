"""Ask every source at once and fuse what they say in time: the gateway's routes.

A source that is late or gone is left out; the answer says which spoke, and the route's policy how many must.
"""

import asyncio
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cachetools import TTLCache
from prometheus_client import Counter, Gauge, Histogram

from serve import described, openapi
from serve.asgi import TIMES, Answer, App, Asked, Refused
from serve.codec import BadRequest, Codec, Id
from serve.errors import ShipyardError
from serve.feedback import Journal, Unwritten, events, is_id, now
from serve.files import read_json, sha256_file
from serve.fusion import best, fuse, gather
from serve.observed import observed
from serve.resilience import T, Target
from serve.shard import SHARD, Fresh, merge
from serve.targets import Heard
from serve.trust import MANIFEST, Keys, check_bundle, verify_attestation

FUSION = "fusion.json"
CODEC = "search.json"
SEARCH, RECOMMEND = "search", "recommend"
Policy = Literal["best-effort", "quorum", "strict"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Pinned:
    """What the bundle pins: the fusion's method, sources and parameters, how each source is asked, and search's codec."""

    method: str
    sources: tuple[str, ...]
    parameters: dict[str, Any]
    targets: dict[str, dict[str, Any]]
    codec: Codec
    manifest: str


def open_gateway(folder: Path, name: str, attestation: str, keys: Keys) -> Pinned:
    """Verify a gateway's bundle and read it.

    Raises:
        ShipyardError: no trusted key attests the bundle, or a file of it differs.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ShipyardError(f"{folder}: no {MANIFEST}", mend="fetch the bundle again")
    digest = sha256_file(manifest)
    verify_attestation(name, digest, attestation, keys, str(folder))
    check_bundle(folder, digest)
    told = read_json(folder / FUSION)
    return Pinned(
        told["method"], tuple(told["sources"]), told["parameters"], told["targets"],
        Codec(folder, read_json(folder / CODEC)), digest[:16],
    )  # fmt: skip


class Gateway:
    """Targets, fusion, cache and journal behind routes."""

    def __init__(
        self, pinned: Pinned, targets: Mapping[str, Target[Heard]], journal: Journal, policies: Mapping[str, Policy],
        seconds: float, cache_seconds: float, prefix: str, page: bytes | None, shard: Target[Fresh] | None = None,
    ) -> None:  # fmt: skip
        self.pinned, self.targets, self.journal, self._shard = pinned, targets, journal, shard
        self._policies, self._seconds = policies, seconds
        self._search = next(s for s in pinned.sources if pinned.targets[s]["task"] == SEARCH)
        self._cache: TTLCache[str, tuple[float, dict[str, Any]]] = TTLCache(10_000, cache_seconds)
        routes: dict[tuple[str, str], Callable[[Asked], Any]] = {
            ("POST", "/v1/search"): lambda asked: self._fused(asked, SEARCH),
            ("POST", "/v1/recommend"): lambda asked: self._fused(asked, RECOMMEND),
            ("POST", "/v1/feedback"): self._feedback, ("GET", "/openapi.json"): self._openapi,
        }  # fmt: skip
        if page is not None:
            routes["GET", "/"] = lambda asked: _page(page)
        self.app = App(routes, prefix)
        registry = self.app.registry
        self._told = Counter(
            "target_answers", "What became of calls to targets", ("target", "state"), registry=registry
        )
        self._took = Histogram("target_seconds", "Time of a call to a target", ("target",), buckets=TIMES,
                               registry=registry)  # fmt: skip
        self._hedges = Counter(
            "target_hedges", "Questions that a target was asked twice, by what became of the second call",
            ("target", "outcome"), registry=registry,
        )  # fmt: skip
        delays = Gauge("hedge_delay_seconds", "After which a target is asked again", ("target",), registry=registry)
        self._hits = Counter("cache_hits", "Answers from the cache", registry=registry)
        dropped = Gauge("records_dropped", "Impressions that could not be written", registry=registry)
        dropped.set_function(lambda: journal.dropped)
        Gauge("bundle", "The bundle that is served", ("name", "manifest"), registry=registry).labels(
            "gateway", pinned.manifest
        ).set(1)
        every: dict[str, Target[Any]] = {**targets} | ({SHARD: shard} if shard is not None else {})
        for name, target in every.items():
            opened = Gauge(f"breaker_open_{name}", "Whether the target's breaker is open", registry=registry)
            opened.set_function(functools.partial(_open, target))
            delays.labels(name).set_function(functools.partial(_delay, target))

    async def _fused(self, asked: Asked, route: str) -> Answer:
        document = asked.json()
        user, place, off = self._own(document)
        request = {key: value for key, value in document.items() if key not in ("user", "place", "without")}
        there = [s for s in self.pinned.sources if s in self.targets]
        if route == RECOMMEND:
            there = [s for s in there if self.pinned.targets[s]["task"] == RECOMMEND]
            if "query" in request:
                raise Refused(400, "query: not here; allowed: at /v1/search")
        sources = [s for s in there if s not in off]
        if there and not sources:
            raise Refused(400, f"without: leaves none to ask; allowed: some of {', '.join(there)}")
        checked = request if route == SEARCH else request | {"query": "-"}
        try:
            wanted = self.pinned.codec.check(checked, "request")
        except BadRequest as fault:
            raise Refused(400, str(fault)) from None
        key = hashlib.sha256(json.dumps([route, request, sources], sort_keys=True).encode()).hexdigest()
        if (found := self._cache.get(key)) is not None:
            self._hits.inc()
            answer = found[1] | {"cached_seconds": round(time.monotonic() - found[0], 3)}
        else:
            answer = await self._asked(request, route, sources, wanted, asked)
            if answer["complete"]:
                self._cache[key] = (time.monotonic(), answer)
            answer = answer | {"cached_seconds": None}
        impression = {
            "kind": "impression", "request_id": asked.id, "user": user, "time": now(), "place": place, "route": route,
            "query": request.get("query"), "items": [one["product"] for one in answer["products"]],
            "scores": [one["score"] for one in answer["products"]], "bundle": self.pinned.manifest,
            "observed": observed(self.pinned.codec, request, answer),
        }  # fmt: skip
        try:
            await self.journal.write([impression], durable=False)
        except Unwritten:
            self.journal.dropped += 1  # a shopper's answer does not wait for a disk
        return Answer(200, {"request_id": asked.id, **answer})

    async def _asked(
        self, request: dict[str, Any], route: str, sources: list[str], wanted: int, asked: Asked
    ) -> dict[str, Any]:
        """Ask the sources, fuse what they say, and hold the route's policy."""
        seconds = asked.seconds(self._seconds)
        states: dict[str, Any] = {source: {"state": "off"} for source in self.pinned.sources}
        answers, fresh = await asyncio.gather(
            asyncio.gather(*(self._source(s, request, seconds, asked, states) for s in sources)),
            self._fresh(request, sources, seconds, asked, states),
        )
        heard = dict(zip(sources, answers, strict=True))
        if fresh is not None and (catalogue := heard[self._search]) is not None:
            heard[self._search] = merge(catalogue, fresh, self.pinned.targets[self._search]["returned"])
        spoke = sum(answer is not None for answer in heard.values())
        policy = self._policies[route]
        least = {"best-effort": 1, "quorum": len(sources) // 2 + 1, "strict": len(sources)}[policy]
        if spoke < max(1, least):
            told = ", ".join(f"{source} {states[source]['state']}" for source in self.pinned.sources)
            raise Refused(503, f"too few targets answer; value: {told}; allowed: {policy}", {"Retry-After": "1"})
        found = gather([heard.get(source) for source in self.pinned.sources])
        ranked = best(found, fuse(found, self.pinned.method, self.pinned.parameters), wanted)
        return {
            "products": [{"product": product, "score": round(score, 9)} for product, score in ranked],
            "method": self.pinned.method, "targets": states, "complete": spoke == len(sources),
        }  # fmt: skip

    async def _source(
        self, source: str, request: dict[str, Any], seconds: float, asked: Asked, states: dict[str, Any]
    ) -> Heard | None:
        """Ask one source."""
        told = self.pinned.targets[source]
        document = request | {"k": told["returned"]}
        if told["task"] != SEARCH:
            document = {key: value for key, value in document.items() if key != "query"}
        heard = await self._ask(source, self.targets[source], document, seconds, asked, states)
        if heard is not None:
            products, scores = heard
            states[source] |= {"products": products[:5], "score": scores[0] if scores else None}
        return heard

    async def _fresh(
        self, request: dict[str, Any], sources: list[str], seconds: float, asked: Asked, states: dict[str, Any]
    ) -> Fresh | None:
        """Ask the shard of fresh items, where search is asked; without it there is the catalogue alone."""
        if self._shard is None or self._search not in sources:
            return None
        document = request | {"k": self.pinned.targets[self._search]["returned"]}
        fresh = await self._ask(SHARD, self._shard, document, seconds, asked, states)
        if fresh is not None:
            states[SHARD]["products"] = fresh.heard[0][:5]
        return fresh

    async def _ask(
        self, name: str, target: Target[T], document: dict[str, Any], seconds: float, asked: Asked,
        states: dict[str, Any],
    ) -> T | None:  # fmt: skip
        """Ask one target, and note in `states` and in the metrics what became of it."""
        start = time.perf_counter()
        found = await target.ask(document, seconds, asked.id, asked.trace)
        took = time.perf_counter() - start
        states[name] = {"state": found.state, "ms": round(took * 1e3, 1)}
        if found.hedge is not None:
            states[name]["hedge"] = found.hedge
            self._hedges.labels(name, found.hedge).inc()
        self._told.labels(name, found.state).inc()
        self._took.labels(name).observe(took)
        return found.heard

    def _own(self, document: Any) -> tuple[Id | None, Id | None, list[str]]:
        """Return user, place and the sources that are to be left out, which are the gateway's own keys."""
        if not isinstance(document, dict):
            raise Refused(400, f"request: not an object; value: {type(document).__name__}; allowed: an object")
        for key in ("user", "place"):
            if not is_id(document.get(key), absent=True):
                raise Refused(400, f"{key}: wrong; allowed: a whole number or a text of at most 200 characters")
        off = document.get("without", [])
        if not isinstance(off, list) or any(source not in self.pinned.sources for source in off):
            raise Refused(400, f"without: wrong; allowed: a list of {', '.join(self.pinned.sources)}")
        return document.get("user"), document.get("place"), off

    async def _feedback(self, asked: Asked) -> Answer:
        document = asked.json()
        records = events(document)
        try:
            await self.journal.write(records, durable=True)
        except Unwritten as fault:
            raise Refused(503, f"not written: {fault}", {"Retry-After": "2"}) from None
        return Answer(202, {"written": len(records)})

    async def _openapi(self, _: Asked) -> Answer:
        mine = [name for name in self.targets if self.pinned.targets[name]["task"] == RECOMMEND]
        found = described.paths(self.pinned.codec, self.pinned.sources, {SEARCH: list(self.targets), RECOMMEND: mine})
        return Answer(200, openapi.document("gateway", self.pinned.manifest, found, self.app.prefix))


async def _page(content: bytes) -> Answer:
    return Answer(200, content, type="text/html; charset=utf-8")


def _open(target: Target[Any]) -> float:
    return float(target.breaker.open)


def _delay(target: Target[Any]) -> float:
    return target.hedge.delay
