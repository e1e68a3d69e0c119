"""What a device learns from its own shoppers: two numbers a model, that make scores into the probabilities that hold here.

A bundle's calibration turns a score into a probability. On top of it the device learns slope a and intercept b of the log
odds, p = 1 / (1 + exp(-(a z + b))) with z the log odds that the bundle tells, by the recursive form of Bayesian logistic
regression (Spiegelhalter and Lauritzen 1990): mean and precision of (a, b) are all that is kept. An answer that was taken
or left is forgotten as soon as it has moved them.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from serve.codec import BadRequest

PRIOR = 20.0
"""Precision of a and b before any feedback: dozens of answers move them, one hardly does."""

BOUNDS = ((0.2, 5.0), (-4.0, 4.0))
"""What a and b may be. A positive slope never changes a ranking."""

FURTHEST = 8.0
"""Log odds beyond which scores count alike."""

MOST_SHOWN = 32
MOST_IDS = 256
LONGEST_ID = 64
"""Ids of feedback that are remembered, so that a client may send again what was not acknowledged."""


@dataclass
class Adapted:
    """What was learned of one model: `base` is the digest of the bundle.json whose calibration it starts from."""

    base: str
    vector: list[float] = field(default_factory=lambda: [1.0, 0.0])
    precision: list[float] = field(default_factory=lambda: [PRIOR, 0.0, PRIOR])
    evidence: int = 0

    def learn(self, odds: float, taken: bool) -> None:
        """Move by one answer with the bundle's log odds."""
        (a, b), (aa, ab, bb) = self.vector, self.precision
        p = 1 / (1 + math.exp(-(a * odds + b)))
        weight = p * (1 - p)
        aa, ab, bb = aa + weight * odds * odds, ab + weight * odds, bb + weight
        surprise, determinant = taken - p, aa * bb - ab * ab
        a += (bb * odds - ab) * surprise / determinant
        b += (aa - ab * odds) * surprise / determinant
        self.vector = [min(high, max(low, value)) for value, (low, high) in zip((a, b), BOUNDS, strict=True)]
        self.precision = [aa, ab, bb]
        self.evidence += 1


KEPT = {part.name for part in fields(Adapted)}


class Learner:
    """Everything that a device has learned, by model. Threads may share it."""

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        self._lock = threading.Lock()
        told = document or {}
        # what another version of this runtime wrote otherwise is learned anew
        known = {name: found for name, found in told.get("models", {}).items() if found.keys() == KEPT}
        self._of = {name: Adapted(**found) for name, found in known.items()}
        # in the order in which they came
        self._ids: dict[str, None] = dict.fromkeys(told.get("ids", ()))
        self._calibration: Mapping[str, Mapping[str, Any]] = {}

    def serve(self, serving: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
        """Take note of what serves now: of each model the digest of its bundle.json, and its calibration.

        Of another bundle nothing is known yet: what was learned belongs to the calibration that it was learned on.
        """
        with self._lock:
            self._calibration = {name: calibration for name, (_, calibration) in serving.items()}
            self._of = {
                name: found if (found := self._of.get(name)) is not None and found.base == base else Adapted(base)
                for name, (base, _) in serving.items()
            }

    def probability(self, name: str, score: float) -> float:
        """Return how likely an answer with this score is taken on this device."""
        with self._lock:
            a, b = self._of[name].vector
            return round(1 / (1 + math.exp(-(a * log_odds(self._calibration[name], score) + b))), 4)

    def feedback(self, name: str, request: Any) -> dict[str, int]:
        """Learn from {"id": text, "shown": [{"score": number, "taken": true or false}, ...]}; the same id counts once.

        Raises:
            BadRequest: it has a wrong key, type or value.
        """
        given, shown = _check(request)
        with self._lock:
            if given in self._ids:
                return {"counted": 0}
            for score, taken in shown:
                self._of[name].learn(log_odds(self._calibration[name], score), taken)
            self._ids[given] = None
            while len(self._ids) > MOST_IDS:
                del self._ids[next(iter(self._ids))]
        return {"counted": len(shown)}

    def document(self) -> dict[str, Any]:
        """Return what the disk keeps."""
        with self._lock:
            models = {name: dict(vars(found)) for name, found in sorted(self._of.items())}
            return {"models": models, "ids": list(self._ids)}


BASE_DIGITS = 16
"""Of the digest that a report names: three models and their totals have to fit."""


def reported(document: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what the center is told of a saved document: by model how the digest it started from begins, a, b, evidence."""
    return {
        name: [found["base"][:BASE_DIGITS], *(round(value, 4) for value in found["vector"]), found["evidence"]]
        for name, found in document.get("models", {}).items()
        if found["evidence"]
    }


def log_odds(calibration: Mapping[str, Any], score: float) -> float:
    """Return the log odds that a bundle's calibration tells of a score; without one a score is its own.

    A calibration is that of `shipyard.calibrate`, {"method": "platt" or "isotonic", "x", "y"}, with a "correction" [a, b]
    that was merged from devices.
    """
    if calibration.get("method") == "isotonic":
        p = float(np.interp(score, calibration["x"], calibration["y"]))
        odds = math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(FURTHEST, p - 0.5)
    elif calibration.get("method") == "platt":
        odds = calibration["x"][0] * score + calibration["y"][0]
    else:
        odds = score
    a, b = calibration.get("correction", (1.0, 0.0))
    return max(-FURTHEST, min(FURTHEST, a * odds + b))


def _check(request: Any) -> tuple[str, Sequence[tuple[float, bool]]]:
    if not isinstance(request, dict) or request.keys() != {"id", "shown"}:
        raise BadRequest("feedback: wrong", value=repr(request)[:80], allowed='an object with "id" and "shown"')
    given, shown = request["id"], request["shown"]
    if not isinstance(given, str) or not 0 < len(given) <= LONGEST_ID:
        raise BadRequest("feedback: id: wrong", value=repr(given)[:80], allowed=f"1 to {LONGEST_ID} characters")
    if not isinstance(shown, list) or not 0 < len(shown) <= MOST_SHOWN:
        raise BadRequest("feedback: shown: wrong", allowed=f"a list of 1 to {MOST_SHOWN} answers")
    found = []
    for i, one in enumerate(shown):
        if not isinstance(one, dict) or one.keys() != {"score", "taken"} or type(one["taken"]) is not bool:
            raise BadRequest(
                f"feedback: shown[{i}]: wrong",
                value=repr(one)[:80],
                allowed='{"score": number, "taken": true or false}',
            )
        score = one["score"]
        if type(score) not in (int, float) or not abs(score) < 1e6:
            raise BadRequest(f"feedback: shown[{i}].score: wrong", value=repr(score)[:80], allowed="a finite number")
        found.append((float(score), one["taken"]))
    return given, found
