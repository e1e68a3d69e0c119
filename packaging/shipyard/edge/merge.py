"""Merge: what many devices have learned into one correction of a model's calibration, by federated averaging.

A device reports slope a and intercept b of its log odds and how many answers moved them (`serve.greengrass.adapt`). The mean
of (a - 1, b) is weighted by evidence (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", 2017), each device's part clipped to a length, so that none counts for more. With `epsilon` the mean is released by
OpenDP's Gaussian mechanism: with probability 1 - delta it tells of any one device at most that much (McMahan et al.,
"Learning Differentially Private Recurrent Language Models", 2018).

releases/calibration.lock holds the result; the next release takes it up through its gates. Nothing is counted twice: a
device's numbers belong to the bundle that it serves, and one that serves another begins anew.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import ShipyardError
from serve.greengrass.adapt import BASE_DIGITS, BOUNDS

Vector = tuple[float, float]


@dataclass(frozen=True)
class Learned:
    """What one device has learned of a model."""

    vector: Vector
    evidence: int


@dataclass(frozen=True)
class Terms:
    """What a merge is held to.

    `devices` is the least number that must have learned, from `evidence` answers each or more; beyond `enough` answers more
    evidence weighs no more. `clip` is the largest length of (a - 1, b) of a device. With `epsilon`, and its `delta`, noise.
    """

    devices: int = 20
    evidence: int = 50
    enough: int = 1000
    clip: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-6

    def __post_init__(self) -> None:
        """Hold the terms to their bounds, no number included.

        Raises:
            ShipyardError: one is out of them.
        """
        for flag, value, right, allowed in (
            ("least-devices", self.devices, self.devices >= 1, "1 or more"),
            ("least-evidence", self.evidence, self.evidence >= 1, "1 or more"),
            ("clip", self.clip, 0 < self.clip < math.inf, "more than 0"),
            ("epsilon", self.epsilon, self.epsilon is None or 0 < self.epsilon < math.inf, "more than 0"),
            ("delta", self.delta, 0 < self.delta < 1, "between 0 and 1"),
        ):
            if not right:
                raise ShipyardError(f"edge merge: --{flag}: wrong", value=value, allowed=allowed)


def merge(name: str, serving: int, learned: Mapping[str, Learned], correction: Vector, terms: Terms) -> dict[str, Any]:
    """Return the new correction [a, b] of a model, on top of the one that its devices began with, and what it is made of.

    `serving` devices have the model, `learned` are those of them that said something, by name.

    Raises:
        ShipyardError: too few devices have learned enough, or noise is asked for and OpenDP is not installed.
    """
    # whoever tells no number has learned nothing
    told = [
        found for _, found in sorted(learned.items())
        if found.evidence >= terms.evidence and all(map(math.isfinite, found.vector))
    ]  # fmt: skip
    if len(told) < terms.devices:
        raise ShipyardError(
            f"edge merge: {name}: too few devices have learned enough", value=len(told),
            allowed=f"{terms.devices} with {terms.evidence} answers each", mend="wait for more feedback",
        )  # fmt: skip
    total, weights = [0.0, 0.0], 0.0
    for found in told:
        moved = found.vector[0] - 1, found.vector[1]
        scale = min(1.0, terms.clip / max(math.hypot(*moved), 1e-12))
        weight = min(found.evidence, terms.enough) / terms.enough
        weights += weight
        total = [sum_ + weight * scale * part for sum_, part in zip(total, moved, strict=True)]
    # how many answers there are is a secret of each device: with noise, the mean is over all that could have told some
    parts, noise = [part / (serving if terms.epsilon is not None else weights) for part in total], None
    if terms.epsilon is not None:
        parts, noise = _noised(parts, 2 * terms.clip / serving, terms.epsilon, terms.delta)
    (low_a, high_a), (low_b, high_b) = BOUNDS
    slope = min(high_a, max(low_a, 1 + parts[0]))
    a, b = slope * correction[0], slope * correction[1] + parts[1]
    # exact sums would tell of one device what the noise hides
    exact = {} if noise else {"devices": len(told), "evidence": sum(found.evidence for found in told)}
    return {
        "correction": [round(min(high_a, max(low_a, a)), 6), round(min(high_b, max(low_b, b)), 6)],
        "serving": serving, "noise": noise, **exact,
    }  # fmt: skip


def _noised(
    mean: list[float], sensitivity: float, epsilon: float, delta: float
) -> tuple[list[float], dict[str, float]]:
    """Return a mean [2] by the Gaussian mechanism, and its noise; `sensitivity` is how far one device can move it."""
    try:
        import opendp.prelude as dp  # not at the top: only a merge with noise needs it
    except ModuleNotFoundError:
        raise ShipyardError("edge merge: opendp is not installed", mend="pip install 'shipyard[federate]'") from None
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.l2_distance(T=float)

    def private(scale: float) -> Any:
        return dp.c.make_fix_delta(dp.c.make_zCDP_to_approxDP(space >> dp.m.then_gaussian(scale=scale)), delta)

    scale = dp.binary_search_param(private, d_in=sensitivity, d_out=(epsilon, delta))
    return private(scale)(mean), {"epsilon": epsilon, "delta": delta, "scale": round(scale, 6)}


def learned_of(name: str, manifest: str, reports: Mapping[str, Mapping[str, Any]]) -> tuple[int, dict[str, Learned]]:
    """Return how many devices serve the bundle `manifest` of a model, and what they have learned of it.

    `reports` are the devices' latest, by name. What a device learned of another bundle counts nothing.
    """
    serving, found = 0, {}
    for thing, report in reports.items():
        if report.get("models", {}).get(name) != manifest:
            continue
        serving += 1
        told = report.get("telemetry", {}).get("learned", {}).get(name)
        if told is not None and told[0] == manifest[:BASE_DIGITS]:
            found[thing] = Learned((float(told[1]), float(told[2])), int(told[3]))
    return serving, found
