"""From requests to a model's inputs, and from its rows back to answers: the same on every target, by numpy alone.

A request names products by their ids, an answer too; rows of the model's table never leave this module.
"""

import itertools
import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError
from serve.history import KINDS, MOST_OFFERS, OFFER, Past, histories, pad

SCHEMA = "shipyard.bundle/2"
MOST_HISTORY = 10_000
MOST_CANDIDATES = 10_000
MOST_DAYS = 36_500
PLURALS = {"product": "products", "type": "types", "category": "categories"}
LONGEST_QUERY = 1_000

Id = int | str

AN_ID = "a whole number of 64 bits or a text"

_IDS = {int, str}
_NUMBERS = {int, float}
_KINDS = set(KINDS)


class BadRequest(ShipyardError):
    """The request is wrong, not the server."""


class Codec:
    """What a bundle's catalogue and tokenizer make of requests and of rows.

    A shard of fresh items tells with each answer which items of the catalogue it `replaces`.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        if manifest.get("schema") != SCHEMA:
            raise ShipyardError(f"{folder}: schema is not known", value=str(manifest.get("schema")), allowed=SCHEMA)
        self.manifest = manifest
        self.task: str = manifest["task"]
        catalogue = json.loads((folder / manifest["catalogue"]).read_bytes())
        products: list[Id] = catalogue["products"]
        rows: list[int] = catalogue["rows"] or list(range(1, len(products) + 1))
        self.answers: list[Id] = catalogue["answers"] or products
        self.answer_key: str = manifest["level"]
        self._row = dict(zip(products, rows, strict=True))
        self._place = {answer: row for row, answer in enumerate(self.answers, 1)}
        self.returned: int = manifest["returned"]
        self._replaces: list[Id] | None = manifest.get("replaces")
        self.takes_offers = "offers" in manifest["inputs"]
        self._tokenizer: Any = None
        if manifest["tokenizer"] is not None:
            # not at the top: only search needs it, and an edge device does without
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / manifest["tokenizer"]))
            self._tokenizer.enable_truncation(manifest["max_tokens"])

    def check(self, request: Any, where: str, *, rank: bool = False) -> int:
        """Refuse what is not a request; return how many answers it wants.

        With `rank` it names candidates, and by default wants all of them; those that the model does not have are not ranked.

        Raises:
            BadRequest: it has a wrong key, type or value.
        """
        if not isinstance(request, dict):
            raise BadRequest(f"{where}: not an object", value=type(request).__name__, allowed="an object")
        allowed = {"history", "k"} | ({"query"} if self._tokenizer is not None else set())
        allowed |= {"offers"} if self.takes_offers else set()
        allowed |= {"candidates"} if rank else set()
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
                    f"{where}: query: wrong", value=_shown(query), allowed=f"1 to {LONGEST_QUERY} characters"
                )
        most = MOST_CANDIDATES if rank else self.returned
        k = request.get("k", _check_candidates(request.get("candidates"), where) if rank else min(10, most))
        if type(k) is not int or not 1 <= k <= most:
            raise BadRequest(f"{where}: k: wrong", value=_shown(k), allowed=f"a whole number from 1 to {most}")
        events = request.get("history", [])
        if not isinstance(events, list) or len(events) > MOST_HISTORY:
            raise BadRequest(f"{where}: history: wrong", allowed=f"a list of at most {MOST_HISTORY} events")
        if not _right_events(events):
            for i, event in enumerate(events):
                at = f"{where}: history[{i}]"
                _check_product(event, at, {"product", "days_ago"}, {"kind"})
                _check_number(event["days_ago"], f"{at}.days_ago", MOST_DAYS, f"days from 0 to {MOST_DAYS}")
                if (kind := event.get("kind", KINDS[0])) not in KINDS:
                    raise BadRequest(f"{at}.kind: wrong", value=_shown(kind), allowed=", ".join(KINDS))
        offers = request.get("offers", [])
        if not isinstance(offers, list) or len(offers) > MOST_OFFERS:
            raise BadRequest(f"{where}: offers: wrong", allowed=f"a list of at most {MOST_OFFERS} offers")
        if not _right_offers(offers):
            for i, offer in enumerate(offers):
                at = f"{where}: offers[{i}]"
                _check_product(offer, at, {"product"}, set(OFFER))
                for name in OFFER:
                    _check_number(offer.get(name, 0), f"{at}.{name}", 1, "a number from 0 to 1")
        return k

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
            inputs["query_ids"], inputs["query_mask"] = tokens(ids)
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

    def decode(
        self, requests: list[Any], rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], wanted: list[int]
    ) -> list[dict[str, Any]]:
        """Return the answers: of each request the first `wanted` of its rows [B, P] with their scores [B, P]."""
        return [self._answer(request, rows[i, : wanted[i]], scores[i]) for i, request in enumerate(requests)]

    def rank(self, request: Any, logits: npt.NDArray[np.float32], k: int) -> dict[str, Any]:
        """Return the k best of a request's candidates by the logits [rows] of all answers, ties in the request's order."""
        asked: list[Id] = request["candidates"]
        places = np.fromiter(map(self._place.get, asked, itertools.repeat(0)), np.int64, len(asked))
        # one that is named twice counts once; looked for only where there may be one
        if not np.diff(np.sort(places)).all():
            asked = list(dict.fromkeys(asked))
            places = np.fromiter(map(self._place.get, asked, itertools.repeat(0)), np.int64, len(asked))
        rows = places[places > 0]
        scores = logits[rows]
        order = np.arange(len(rows))
        if k < len(rows):  # all that may be among the first k, ties of the last one too
            order = np.flatnonzero(scores >= np.partition(scores, len(rows) - k)[len(rows) - k])
        order = order[np.argsort(-scores[order], kind="stable")][:k]
        answer = self._answer(request, rows[order], scores[order])
        return answer | {"unknown_candidates": [asked[i] for i in np.flatnonzero(places == 0).tolist()]}

    def _answer(self, request: Any, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> dict[str, Any]:
        best = [
            {self.answer_key: self.answers[row - 1], "score": round(score, 6)}
            for row, score in zip(rows.tolist(), scores.tolist(), strict=False)
        ]
        told = {PLURALS[self.answer_key]: best, "unknown": self.unknown(request)}
        return told if self._replaces is None else told | {"replaces": self._replaces}

    def unknown(self, request: Any) -> list[Id]:
        """Return the products of a request's history that the model does not have, in the order of the request."""
        asked = dict.fromkeys(e["product"] for e in request.get("history", []))
        return [product for product in asked if product not in self._row]


def tokens(ids: list[list[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return token ids and mask [n, L]; padded here and not by the tokenizer, whose saved settings are another's."""
    padded = pad([np.array(tokens, np.int64) for tokens in ids])
    mask = np.arange(padded.shape[1]) < np.array([len(tokens) for tokens in ids])[:, None]
    return padded, mask.astype(np.int64)


def _right_events(events: list[Any]) -> bool:
    """Say whether all events of a history are right, all looked at together; where not, each by itself tells which."""
    columns = _columns(events, ("days_ago", "kind"))
    if columns is None or len(columns[0]) != len(events):
        return False
    days, kinds = columns
    try:
        return _right_numbers(days, MOST_DAYS) and set(kinds) <= _KINDS
    except TypeError:  # a kind that is a list or an object
        return False


def _right_offers(offers: list[Any]) -> bool:
    """Say whether all offers are right, as `_right_events` does."""
    columns = _columns(offers, OFFER)
    return columns is not None and all(_right_numbers(column, 1) for column in columns)


def _columns(entries: list[Any], names: tuple[str, ...]) -> list[list[Any]] | None:
    """Return what entries have under each name, where all are objects with a product's id and no other keys than these."""
    if not set(map(type, entries)) <= {dict}:
        return None
    products, *columns = ([entry[name] for entry in entries if name in entry] for name in ("product", *names))
    if len(products) != len(entries) or not set(map(type, products)) <= _IDS:
        return None
    # as many keys as were found, and so no other
    found = len(products) + sum(map(len, columns))
    return columns if sum(map(len, entries)) == found else None


def _right_numbers(values: list[Any], most: float) -> bool:
    """Say whether all are numbers from 0 to `most`."""
    return not values or (
        set(map(type, values)) <= _NUMBERS
        and min(values) >= 0
        and max(values) <= most
        and not any(map(math.isnan, values))
    )


def _check_candidates(candidates: Any, where: str) -> int:
    """Refuse what is not a list of ids; return how many they are."""
    if not isinstance(candidates, list) or not 1 <= len(candidates) <= MOST_CANDIDATES:
        raise BadRequest(f"{where}: candidates: wrong", allowed=f"a list of 1 to {MOST_CANDIDATES} ids")
    if not set(map(type, candidates)) <= _IDS:  # a thousand are looked at at once
        i = next(i for i, candidate in enumerate(candidates) if type(candidate) not in (int, str))
        raise BadRequest(f"{where}: candidates[{i}]: wrong", value=_shown(candidates[i]), allowed=AN_ID)
    return len(candidates)


def _shown(value: Any) -> str:
    """Return a wrong value in short, however deep or long it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 80
    return short.repr(value)[:80]


def _check_product(value: Any, where: str, needed: set[str], more: set[str]) -> None:
    """Refuse what is not an object with these keys and a product's id."""
    if not isinstance(value, dict) or not needed <= value.keys() <= needed | more:
        allowed = f"an object with {' and '.join(sorted(needed))}" + (
            f", also {', '.join(sorted(more))}" if more else ""
        )
        raise BadRequest(f"{where}: wrong", value=_shown(value), allowed=allowed)
    if type(value["product"]) not in (int, str):
        raise BadRequest(f"{where}.product: wrong", value=_shown(value["product"]), allowed=AN_ID)


def _check_number(value: Any, where: str, most: float, allowed: str) -> None:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise BadRequest(f"{where}: wrong", value=_shown(value), allowed=allowed)
