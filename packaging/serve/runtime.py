"""Open a bundle and answer requests: one decoder a task, the same on every target.

A request names products by their ids, an answer too; rows of the model's table never leave this module.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from serve.blend import blend, scaled
from serve.engine import check_engine
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.history import KINDS, MOST_OFFERS, OFFER, Past, histories, pad
from serve.trust import MANIFEST, Keys, check_bundle, verify_attestation

SCHEMA = "shipyard.bundle/2"
MOST_HISTORY = 10_000
PLURALS = {"product": "products", "type": "types", "category": "categories"}
LONGEST_QUERY = 1_000
GOLDEN_TOLERANCE = 1e-3
"""Largest difference of a score from the bundle's golden answers: processors round sums differently."""


Id = int | str


class BadRequest(ShipyardError):
    """The request is wrong, not the server."""


class Model:
    """An opened bundle."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int = 0) -> None:
        if manifest.get("schema") != SCHEMA:
            raise ShipyardError(f"{folder}: schema is not known", value=str(manifest.get("schema")), allowed=SCHEMA)
        check_engine(manifest["engine"], str(folder))
        self.manifest = manifest
        self.task: str = manifest["task"]
        catalogue = json.loads((folder / manifest["catalogue"]).read_bytes())
        products: list[Id] = catalogue["products"]
        rows: list[int] = catalogue["rows"] or list(range(1, len(products) + 1))
        self.answers: list[Id] = catalogue["answers"] or products
        self.answer_key: str = manifest["level"]
        self._row = dict(zip(products, rows, strict=True))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(folder / manifest["model"], options, providers=["CPUExecutionProvider"])
        self._returned: int = manifest["returned"]
        self.takes_offers = "offers" in manifest["inputs"]
        self._tokenizer: Any = None
        self._reader: _Reader | None = None
        if manifest["tokenizer"] is not None:
            # not at the top: only search needs it, and an edge device does without
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / manifest["tokenizer"]))
            self._tokenizer.enable_truncation(manifest["max_tokens"])
            if (again := manifest.get("rerank")) is not None:
                pairs = Tokenizer.from_file(str(folder / manifest["tokenizer"]))
                pairs.enable_truncation(again["max_tokens"])
                self._reader = _Reader(folder, again, pairs, options)

    def predict(self, requests: list[Any]) -> list[dict[str, Any]]:
        """Answer requests in one batch.

        A request is {"history": [{"product": id, "days_ago": days, "kind": "purchase"}, ...], "k": 10}, for search with
        "query" too, and for a model that ranks products with "offers": [{"product": id, "display": 0 to 1, "mailer": 0 to
        1, "discount": 0 to 1}, ...], what the shopper's store promotes now. An answer is {"products": [{"product": id,
        "score": number}, ...], "unknown": products of the history that the model does not have}; a model that ranks types
        or categories answers with "types" or "categories".

        Raises:
            BadRequest: a request has a wrong key, type or value.
        """
        wanted = [self._check(request, f"request {i}") for i, request in enumerate(requests)]
        if not wanted:
            return []
        rows, scores = self._session.run(["rows", "scores"], self.encode(requests))
        if self._reader is not None:
            rows, scores = self._reader.again([request["query"] for request in requests], rows, scores)
        answers = []
        for i, request in enumerate(requests):
            best = [
                {self.answer_key: self.answers[int(row) - 1], "score": round(float(score), 6)}
                for row, score in zip(rows[i, : wanted[i]], scores[i], strict=False)
            ]
            # in the order of the request, for ids may be of two kinds
            asked = dict.fromkeys(e["product"] for e in request.get("history", []))
            unknown = [product for product in asked if product not in self._row]
            answers.append({PLURALS[self.answer_key]: best, "unknown": unknown})
        return answers

    def encode(self, requests: list[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the model's inputs by name.

        items [B, H], features [B, H, F], offers [B, P], strengths [B, P, 3], query_ids and query_mask [B, L].
        """
        owner, rows, days, bought = [], [], [], []
        for i, request in enumerate(requests):
            for event in request.get("history", []):
                if (row := self._row.get(event["product"])) is not None:
                    owner.append(i)
                    rows.append(row)
                    days.append(event["days_ago"])
                    bought.append(event.get("kind", KINDS[0]) == KINDS[0])
        past = Past(
            np.array(owner, np.int64), np.array(rows, np.int64), np.array(days, np.float64), np.array(bought, bool)
        )
        offers, strengths = self._offers(requests)
        items, features = histories(past, len(requests), offers, strengths)
        inputs: dict[str, npt.NDArray[Any]] = {"items": items, "features": features}
        if self.takes_offers:
            inputs |= {"offers": offers, "strengths": strengths}
        if self._tokenizer is not None:
            ids = [self._tokenizer.encode(request["query"]).ids for request in requests]
            inputs["query_ids"], inputs["query_mask"] = _tokens(ids)
        return inputs

    def _offers(self, requests: list[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the promoted rows [B, P] of each request, each once, with their strengths [B, P, 3]."""
        found: list[dict[int, list[float]]] = [{} for _ in requests]
        for told, request in zip(found, requests, strict=True):
            for offer in request.get("offers", []):
                if (row := self._row.get(offer["product"])) is not None:
                    # one that is named twice counts by its strongest offer, as in training
                    told[row] = [
                        max(offer.get(k, 0), was) for k, was in zip(OFFER, told.get(row, [0] * 3), strict=True)
                    ]
        offers = pad([np.array(sorted(told), np.int64) for told in found])
        strengths = np.zeros((*offers.shape, len(OFFER)), np.float32)
        for i, told in enumerate(found):
            for k, row in enumerate(sorted(told)):
                strengths[i, k] = told[row]
        return offers, strengths

    def self_test(self) -> None:
        """Answer the bundle's golden requests and compare.

        Raises:
            ShipyardError: an answer differs from the one that was noted when the bundle was made.
        """
        for i, golden in enumerate(self.manifest["golden"]):
            [answer] = self.predict([golden["request"]])
            key = self.answer_key
            expected = golden["answer"][PLURALS[key]]
            got = {p[key]: p["score"] for p in answer[PLURALS[key]]}
            largest = max(abs(p["score"]) for p in expected)
            for product in expected[:5]:
                score = got.get(product[key], math.nan)
                if not abs(score - product["score"]) <= GOLDEN_TOLERANCE * max(1.0, largest):
                    raise ShipyardError(
                        f"{self.manifest['name']}: golden answer {i} differs for {key} {product[key]}",
                        value=score, allowed=product["score"], mend="do not serve from this machine or engine version",
                    )  # fmt: skip

    def _check(self, request: Any, where: str) -> int:
        """Refuse what is not a request; return how many products it wants."""
        if not isinstance(request, dict):
            raise BadRequest(f"{where}: not an object", value=type(request).__name__, allowed="an object")
        allowed = {"history", "k"} | ({"query"} if self._tokenizer is not None else set())
        allowed |= {"offers"} if self.takes_offers else set()
        if unknown := sorted(map(str, request.keys() - allowed)):
            raise BadRequest(f"{where}: unknown key", value=unknown[0], allowed=", ".join(sorted(allowed)))
        if self._tokenizer is not None:
            query = request.get("query")
            # JSON can write halves of a surrogate pair, which are no text
            if (
                not isinstance(query, str)
                or any("\ud800" <= c <= "\udfff" for c in query)
                or not 0 < len(query) <= LONGEST_QUERY
            ):
                raise BadRequest(
                    f"{where}: query: wrong", value=repr(query)[:80], allowed=f"1 to {LONGEST_QUERY} characters"
                )
        k = request.get("k", min(10, self._returned))
        if type(k) is not int or not 1 <= k <= self._returned:
            raise BadRequest(
                f"{where}: k: wrong", value=repr(k)[:80], allowed=f"a whole number from 1 to {self._returned}"
            )
        events = request.get("history", [])
        if not isinstance(events, list) or len(events) > MOST_HISTORY:
            raise BadRequest(f"{where}: history: wrong", allowed=f"a list of at most {MOST_HISTORY} events")
        for i, event in enumerate(events):
            at = f"{where}: history[{i}]"
            _check_product(event, at, {"product", "days_ago"}, {"kind"})
            _check_number(event["days_ago"], f"{at}.days_ago", 36_500, "days from 0 to 36500")
            if event.get("kind", KINDS[0]) not in KINDS:
                raise BadRequest(f"{at}.kind: wrong", value=repr(event["kind"])[:80], allowed=", ".join(KINDS))
        offers = request.get("offers", [])
        if not isinstance(offers, list) or len(offers) > MOST_OFFERS:
            raise BadRequest(f"{where}: offers: wrong", allowed=f"a list of at most {MOST_OFFERS} offers")
        for i, offer in enumerate(offers):
            at = f"{where}: offers[{i}]"
            _check_product(offer, at, {"product"}, set(OFFER))
            for name in OFFER:
                _check_number(offer.get(name, 0), f"{at}.{name}", 1, "a number from 0 to 1")
        return k


class _Reader:
    """The cross-encoder of a search: it reads query and text of the first products together and ranks them again."""

    def __init__(self, folder: Path, told: Mapping[str, Any], tokenizer: Any, options: ort.SessionOptions) -> None:
        self._depth, self._weight = int(told["depth"]), float(told["weight"])
        self._texts: list[str] = json.loads((folder / told["texts"]).read_bytes())
        self._tokenizer = tokenizer
        self._session = ort.InferenceSession(folder / told["model"], options, providers=["CPUExecutionProvider"])

    def again(
        self, queries: list[str], rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return rows and scores [B, P], the first ones ranked again, their scores from 1 to 2, those of others from 0 to 1.

        Each request is read alone, so that its answer does not depend on what it came with.
        """
        rows, scores = rows.copy(), scaled(scores).astype(np.float32)
        depth = min(self._depth, rows.shape[1])
        for line, query in enumerate(queries):
            found = [self._tokenizer.encode(query, self._texts[row - 1]).ids for row in rows[line, :depth].tolist()]
            ids, mask = _tokens(found)
            [read] = self._session.run(["scores"], {"pair_ids": ids, "pair_mask": mask})
            mixed = blend(scores[line, :depth], read[:, 0], self._weight)
            order = np.argsort(-mixed, kind="stable")
            rows[line, :depth] = rows[line, :depth][order]
            scores[line, :depth] = 1 + mixed[order]
        return rows, scores


def _tokens(ids: list[list[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return token ids and mask [n, L]; padded here and not by the tokenizer, whose saved settings are another's."""
    padded = pad([np.array(tokens, np.int64) for tokens in ids])
    mask = np.arange(padded.shape[1]) < np.array([len(tokens) for tokens in ids])[:, None]
    return padded, mask.astype(np.int64)


def _check_product(value: Any, where: str, needed: set[str], more: set[str]) -> None:
    """Refuse what is not an object with these keys and a product's id."""
    if not isinstance(value, dict) or not needed <= value.keys() <= needed | more:
        allowed = f"an object with {' and '.join(sorted(needed))}" + (
            f", also {', '.join(sorted(more))}" if more else ""
        )
        raise BadRequest(f"{where}: wrong", value=repr(value)[:80], allowed=allowed)
    if type(value["product"]) not in (int, str):
        raise BadRequest(
            f"{where}.product: wrong", value=repr(value["product"])[:80], allowed="a whole number or a text"
        )


def _check_number(value: Any, where: str, most: float, allowed: str) -> None:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise BadRequest(f"{where}: wrong", value=repr(value)[:80], allowed=allowed)


def open_bundle(folder: Path, name: str, attestation: str, keys: Keys, threads: int = 0, oldest: int = 0) -> Model:
    """Verify the bundle of artifact `name`, open it and let it answer its golden requests.

    Raises:
        ShipyardError: no trusted key attests the bundle, it is of a release before `oldest`, a file of it differs, or an
            answer does.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ShipyardError(f"{folder}: no {MANIFEST}", mend="fetch the bundle again")
    digest = sha256_file(manifest)
    verify_attestation(name, digest, attestation, keys, str(folder), oldest)
    model = Model(folder, check_bundle(folder, digest), threads)
    model.self_test()
    return model
