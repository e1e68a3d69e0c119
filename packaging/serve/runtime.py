"""Open a bundle and answer requests by its graph, in batches; the engine is ONNX Runtime on the CPU."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from serve.blend import blend, scaled
from serve.codec import PLURALS, Codec, tokens
from serve.engine import FAULTS, check_engine
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import MANIFEST, Keys, check_bundle, verify_attestation

GOLDEN_TOLERANCE = 1e-3
"""Largest difference of a score from the bundle's golden answers: processors round sums differently."""

LOGITS = "logits"
"""Output of a graph that also tells the scores of all rows, which ranking given candidates needs."""


class Model(Codec):
    """An opened bundle. Threads may share it: the engine and the tokenizer hold no state between calls."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int = 0) -> None:
        super().__init__(folder, manifest)
        check_engine(manifest["engine"], str(folder))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(folder / manifest["model"], options, providers=["CPUExecutionProvider"])
        self.ranks = LOGITS in {output.name for output in self.session.get_outputs()}
        self._reader: _Reader | None = None
        if self._tokenizer is not None and (again := manifest.get("rerank")) is not None:
            from tokenizers import Tokenizer

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
        return self.answer(requests, [self.check(request, f"request {i}") for i, request in enumerate(requests)])

    def answer(self, requests: list[Any], wanted: list[int]) -> list[dict[str, Any]]:
        """Answer requests that `check` has let pass, with as many answers as it told."""
        if not requests:
            return []
        rows, scores = self.run(self.encode(requests))
        if self._reader is not None:
            rows, scores = self._reader.again([request["query"] for request in requests], rows, scores)
        return self.decode(requests, rows, scores, wanted)

    def answer_ranked(self, requests: list[Any], wanted: list[int]) -> list[dict[str, Any]]:
        """Rank the candidates that checked requests name, as `answer` ranks everything; `ranks` says whether it can."""
        if not requests:
            return []
        [logits] = self.session.run([LOGITS], self.encode(requests))
        return [self.rank(*found) for found in zip(requests, logits, wanted, strict=True)]

    def run_each(self, requests: list[Any], wanted: list[int]) -> list[Any]:
        """Return rows and scores of each of several inputs."""
        return [self.run(inputs) for inputs in requests]

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return rows [B, P] and scores [B, P] of inputs as `encode` returns them."""
        rows, scores = self.session.run(["rows", "scores"], dict(inputs))
        return rows, scores

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
            ids, mask = tokens(found)
            [read] = self._session.run(["scores"], {"pair_ids": ids, "pair_mask": mask})
            mixed = blend(scores[line, :depth], read[:, 0], self._weight)
            order = np.argsort(-mixed, kind="stable")
            rows[line, :depth] = rows[line, :depth][order]
            scores[line, :depth] = 1 + mixed[order]
        return rows, scores


def open_bundle(folder: Path, name: str, attestation: str, keys: Keys, threads: int = 0, oldest: int = 0) -> Model:
    """Verify the bundle of artifact `name`, open it and let it answer its golden requests.

    Raises:
        ShipyardError: no trusted key attests the bundle, it is of a release before `oldest`, a file of it differs, or an
            answer does, or the engine cannot run it.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ShipyardError(f"{folder}: no {MANIFEST}", mend="fetch the bundle again")
    digest = sha256_file(manifest)
    verify_attestation(name, digest, attestation, keys, str(folder), oldest)
    try:
        model = Model(folder, check_bundle(folder, digest), threads)
        model.self_test()
    except FAULTS as fault:
        raise ShipyardError(f"{folder}: the engine does not run it: {fault}") from None
    return model
