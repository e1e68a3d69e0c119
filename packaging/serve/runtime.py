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

from serve.errors import ShipyardError
from serve.history import history, stack
from serve.trust import MANIFEST, Keys, check_bundle, sha256_file, verify_attestation

SCHEMA = "shipyard.bundle/1"
MOST_HISTORY = 10_000
LONGEST_QUERY = 1_000
GOLDEN_TOLERANCE = 1e-3
"""Largest difference of a score from the bundle's golden answers: processors round sums differently."""


class BadRequest(ShipyardError):
    """The request is wrong, not the server."""


class Model:
    """An opened bundle."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int = 0) -> None:
        if manifest.get("schema") != SCHEMA:
            raise ShipyardError(f"{folder}: schema is not known", value=str(manifest.get("schema")), allowed=SCHEMA)
        self.manifest = manifest
        self.task: str = manifest["task"]
        self.products: list[int] = json.loads((folder / manifest["products"]).read_bytes())
        self._row = {product: row for row, product in enumerate(self.products, start=1)}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(folder / manifest["model"], options, providers=["CPUExecutionProvider"])
        self._returned: int = manifest["returned"]
        self._tokenizer: Any = None
        if manifest["tokenizer"] is not None:
            # not at the top: only search needs it, and an edge device does without
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / manifest["tokenizer"]))
            self._tokenizer.enable_truncation(manifest["max_tokens"])

    def predict(self, requests: list[Any]) -> list[dict[str, Any]]:
        """Answer requests in one batch.

        A request is {"history": [{"product": id, "days_ago": days}, ...], "k": 10}, for search with "query" too. An
        answer is {"products": [{"product": id, "score": number}, ...], "unknown": products of the history that the
        model does not have}.

        Raises:
            BadRequest: a request has a wrong key, type or value.
        """
        wanted = [self._check(request, f"request {i}") for i, request in enumerate(requests)]
        if not wanted:
            return []
        rows, scores = self._session.run(["rows", "scores"], self.encode(requests))
        answers = []
        for i, request in enumerate(requests):
            best = [
                {"product": self.products[int(row) - 1], "score": round(float(score), 6)}
                for row, score in zip(rows[i, : wanted[i]], scores[i], strict=False)
            ]
            unknown = sorted({e["product"] for e in request.get("history", [])} - self._row.keys())
            answers.append({"products": best, "unknown": unknown})
        return answers

    def encode(self, requests: list[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the model's inputs by name: items [B, H], features [B, H, 6], query_ids and query_mask [B, L]."""
        histories = []
        for request in requests:
            known = [e for e in request.get("history", []) if e["product"] in self._row]
            rows = np.array([self._row[e["product"]] for e in known], np.int64)
            histories.append(history(rows, np.array([e["days_ago"] for e in known], np.float64)))
        items, features = stack(histories)
        inputs: dict[str, npt.NDArray[Any]] = {"items": items, "features": features}
        if self._tokenizer is not None:
            # padded here and not by the tokenizer, whose saved settings are another's
            ids = [self._tokenizer.encode(request["query"]).ids for request in requests]
            inputs["query_ids"] = np.zeros((len(ids), max(map(len, ids))), np.int64)
            inputs["query_mask"] = np.zeros_like(inputs["query_ids"])
            for i, tokens in enumerate(ids):
                inputs["query_ids"][i, : len(tokens)] = tokens
                inputs["query_mask"][i, : len(tokens)] = 1
        return inputs

    def self_test(self) -> None:
        """Answer the bundle's golden requests and compare.

        Raises:
            ShipyardError: an answer differs from the one that was noted when the bundle was made.
        """
        for i, golden in enumerate(self.manifest["golden"]):
            [answer] = self.predict([golden["request"]])
            expected = golden["answer"]["products"]
            got = {p["product"]: p["score"] for p in answer["products"]}
            largest = max(abs(p["score"]) for p in expected)
            for product in expected[:5]:
                score = got.get(product["product"], math.nan)
                if not abs(score - product["score"]) <= GOLDEN_TOLERANCE * max(1.0, largest):
                    raise ShipyardError(
                        f"{self.manifest['name']}: golden answer {i} differs for product {product['product']}",
                        value=score, allowed=product["score"], mend="do not serve from this machine or engine version",
                    )  # fmt: skip

    def _check(self, request: Any, where: str) -> int:
        """Refuse what is not a request; return how many products it wants."""
        if not isinstance(request, dict):
            raise BadRequest(f"{where}: not an object", value=type(request).__name__, allowed="an object")
        allowed = {"history", "k"} | ({"query"} if self._tokenizer is not None else set())
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
            raise BadRequest(f"{where}: history: wrong", allowed=f"a list of at most {MOST_HISTORY} purchases")
        for i, event in enumerate(events):
            if not isinstance(event, dict) or event.keys() != {"product", "days_ago"}:
                raise BadRequest(
                    f"{where}: history[{i}]: wrong",
                    value=repr(event)[:80],
                    allowed="an object with product and days_ago",
                )
            if type(event["product"]) is not int:
                raise BadRequest(
                    f"{where}: history[{i}].product: wrong", value=repr(event["product"])[:80], allowed="a whole number"
                )
            days = event["days_ago"]
            if type(days) not in (int, float) or not 0 <= days <= 36_500:
                raise BadRequest(
                    f"{where}: history[{i}].days_ago: wrong", value=repr(days)[:80], allowed="days from 0 to 36500"
                )
        return k


def open_bundle(folder: Path, name: str, attestation: str, keys: Keys, threads: int = 0) -> Model:
    """Verify the bundle of artifact `name`, open it and let it answer its golden requests.

    Raises:
        ShipyardError: no trusted key attests the bundle, a file of it differs, or an answer does.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ShipyardError(f"{folder}: no {MANIFEST}", mend="fetch the bundle again")
    digest = sha256_file(manifest)
    verify_attestation(name, digest, attestation, keys, str(folder))
    model = Model(folder, check_bundle(folder, digest), threads)
    model.self_test()
    return model
