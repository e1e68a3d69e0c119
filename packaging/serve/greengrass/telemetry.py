"""What a device counts and learns: totals since it was installed, never a request. What arrives twice or late counts once.

Totals are saved before they are reported, so that a restart goes on from what the center may have seen. What was counted
since the last save is lost with a power cut; it was never reported. What was learned (`adapt`) bears the same number.
"""

import bisect
import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from serve.greengrass.adapt import Learner, reported

EDGES_MS = (1, 2, 5, 10, 20, 50, 100, 500)
"""Upper edges of the latency histogram, in milliseconds; the last bin is what took longer."""

KEYS = ("requests", "failed", "refused")


class Telemetry:
    """Totals by model: requests, failures, refusals, a latency histogram, and count, mean and spread of the best score.

    Mean and squared deviations follow Welford (1962), so that the center can add them up (Chan et al. 1979).
    """

    def __init__(self, text: str = "") -> None:
        self._lock = threading.Lock()
        try:
            self._open(json.loads(text or "{}"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # a device counts anew sooner than it stops serving
            self._open({})

    def _open(self, document: Mapping[str, Any]) -> None:
        self.sequence = int(document.get("sequence", 0))
        self.models: dict[str, dict[str, Any]] = {}
        for name, totals in document.get("models", {}).items():
            self._of(name).update(totals)
        learned = document.get("learned", {})
        self.learner = Learner(learned)
        self.saved = self._told(learned)
        """What was last closed, as the center is told it."""

    def _of(self, name: str) -> dict[str, Any]:
        fresh = dict.fromkeys(KEYS, 0) | {"ms": [0] * (len(EDGES_MS) + 1), "score": [0, 0.0, 0.0]}
        return self.models.setdefault(name, fresh)

    def answered(self, name: str, seconds: float, answers: Iterable[Mapping[str, Any]]) -> None:
        """Count answered requests; a batch counts its mean time for each."""
        best = [entry["score"] for answer in answers for entries in _lists(answer) for entry in entries[:1]]
        with self._lock:
            totals = self._of(name)
            totals["requests"] += len(best)
            place = bisect.bisect_left(EDGES_MS, 1000 * seconds / max(1, len(best)))
            totals["ms"][place] += len(best)
            for score in best:
                count, mean, spread = totals["score"]
                after = mean + (score - mean) / (count + 1)
                totals["score"] = [count + 1, after, spread + (score - mean) * (score - after)]

    def failed(self, name: str) -> None:
        """Count a prediction that failed."""
        with self._lock:
            self._of(name)["failed"] += 1

    def refused(self, name: str) -> None:
        """Count a request that found the desk busy."""
        with self._lock:
            self._of(name)["refused"] += 1

    def close(self) -> str:
        """Number the totals as they are now and return them as text for the disk."""
        with self._lock:
            self.sequence += 1
            learned = self.learner.document()
            self.saved = self._told(learned)
            return json.dumps({**json.loads(self.saved), "learned": learned}, separators=(",", ":"))

    def _told(self, learned: Mapping[str, Any]) -> str:
        rounded = {
            name: totals | {"score": [totals["score"][0], *(round(value, 4) for value in totals["score"][1:])]}
            for name, totals in sorted(self.models.items())
        }
        document = {"sequence": self.sequence, "models": rounded} | (
            {"learned": told} if (told := reported(learned)) else {}
        )
        return json.dumps(document, separators=(",", ":"))


def _lists(answer: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    return [value for key, value in answer.items() if key != "unknown" and isinstance(value, list)]


def add(known: Mapping[str, Any] | None, arrived: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the center keeps of a device: the totals with the highest number, whatever the order of arrival."""
    return arrived if known is None or arrived["sequence"] > known["sequence"] else known


def total(devices: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add up the totals of devices, each with its latest report, by model."""
    summed: dict[str, dict[str, Any]] = {}
    for device in devices:
        for name, totals in device["models"].items():
            into = summed.setdefault(
                name, dict.fromkeys(KEYS, 0) | {"ms": [0] * (len(EDGES_MS) + 1), "score": [0, 0.0, 0.0]}
            )
            for key in KEYS:
                into[key] += totals[key]
            into["ms"] = [a + b for a, b in zip(into["ms"], totals["ms"], strict=True)]
            (n, mean, spread), (m, other, more) = into["score"], totals["score"]
            if m:
                gap = other - mean
                into["score"] = [n + m, mean + gap * m / (n + m), spread + more + gap * gap * n * m / (n + m)]
    return summed
