"""Golden: real requests of the validation period, and what bundles answer to them.

A few go into each bundle with their answers. Many, fused as the gateway fuses, are the reference for drift; what is
right there is what the shopper bought next (in a log of searches, took).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.behaviour import VALIDATION, load_behaviour
from serve.codec import PLURALS, Id
from serve.files import read_json
from serve.fused import RECOMMEND, SEARCH
from serve.fusion import best, fuse, gather
from serve.history import OFFER
from serve.observed import observed
from serve.runtime import Model
from serve.trust import MANIFEST
from shipyard.examples import Examples
from shipyard.reference import gathered, refer

REQUESTS = 500
SHOWN = 10
BATCH = 16


def golden(data: Path, name: str, model: Model) -> list[dict[str, Any]]:
    """Return three real requests with the model's answers, and one without a history."""
    queries = requests(Examples(load_behaviour(data), VALIDATION, 64, (name,)), name, model, 3)
    queries.insert(0, {key: queries[0][key] for key in ("query",) if key in queries[0]} | {"history": []})
    return [{"request": r, "answer": a} for r, a in zip(queries, model.predict(queries), strict=True)]


def reference(data: Path, bundles: Mapping[str, Path], fusion: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reference of a release: its bundles' folders by name, fused by `fusion`, on requests of validation."""
    models = {name: Model(folder, read_json(folder / MANIFEST), threads=1) for name, folder in bundles.items()}
    behaviour = load_behaviour(data)
    seen = {}
    for route in (SEARCH, RECOMMEND):
        sources = [name for name in fusion["sources"] if route == SEARCH or models[name].task == RECOMMEND]
        first = next((name for name in sources if models[name].task == route), None)
        if first is None:
            continue
        examples = Examples(behaviour, VALIDATION, REQUESTS, (first,))
        cut = examples.of(first)
        asked = requests(examples, first, models[first], REQUESTS)
        told = {name: _answers(models[name], asked) for name in sources}
        rows = []
        for i, (request, relevant) in enumerate(zip(asked, cut.relevant, strict=True)):
            heard = {name: answers[i] for name, answers in told.items()}
            found = gather([heard.get(name) for name in fusion["sources"]])
            ranked = best(found, fuse(found, fusion["method"], fusion["parameters"]), SHOWN)
            right = {models[first].answers[row - 1] for row in relevant[relevant > 0].tolist()}
            answer = {
                "products": [{"product": product, "score": score} for product, score in ranked],
                "targets": {name: {"score": scores[0] if scores else None} for name, (_, scores) in heard.items()},
            }
            measures = observed(models[first], request, answer)
            rows.append((measures, [(score, product in right) for product, score in ranked]))
        seen[route] = gathered(rows)
    return refer(seen)


def _answers(model: Model, asked: Sequence[Mapping[str, Any]]) -> list[tuple[list[Id], list[float]]]:
    """Return what a model says to requests: products and scores, as many as it returns."""
    keys = ("history", "query", "offers") if model.task == SEARCH else ("history", "offers")
    own = [{key: request[key] for key in keys if key in request} for request in asked]
    found = []
    for k in range(0, len(own), BATCH):
        part = own[k : k + BATCH]
        # without the cross-encoder, which the gateway does not ask
        answers = model.decode(part, *model.run(model.encode(part)), [model.returned] * len(part))
        for answer in answers:
            told = answer[PLURALS[model.answer_key]]
            found.append(([one[model.answer_key] for one in told], [one["score"] for one in told]))
    return found


def requests(examples: Examples, name: str, model: Model, most: int) -> list[dict[str, Any]]:
    """Return the first examples of a sub-model as requests to its bundle."""
    behaviour, cut = examples.behaviour, examples.of(name)
    found: list[dict[str, Any]] = []
    for basket, words in zip(cut.baskets[:most].tolist(), cut.words[:most], strict=True):
        request: dict[str, Any] = {"history": []}
        if not cut.logged:
            rows, days = behaviour.past(basket)
            request["history"] = [
                {"product": behaviour.item[row - 1], "days_ago": round(day, 3)}
                for row, day in zip(rows[-40:].tolist(), days[-40:].tolist(), strict=True)
            ]
            if model.takes_offers:
                start = behaviour.start[basket]
                promoted, strengths = behaviour.market.offers(int(behaviour.place[start]), float(behaviour.day[start]))
                own = np.isin(promoted, rows)
                request["offers"] = [
                    {"product": behaviour.item[row - 1], **dict(zip(OFFER, (round(s, 3) for s in told), strict=True))}
                    for row, told in zip(promoted[own][:20].tolist(), strengths[own][:20].tolist(), strict=True)
                ]
        if model.task == SEARCH:
            request["query"] = words
        found.append(request)
    return found
