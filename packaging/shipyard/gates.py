"""Gates: what a sub-model must reach before anything of it is split off, exported or uploaded. They fail closed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from models.config import Gate, Profile, Target, TargetName
from models.lineage import Gated
from serve.errors import ShipyardError


def judged(scores: Mapping[str, Any], profile: Profile) -> list[Gated]:
    """Return every gate of the profile with the figure that it judges; a figure that is not a number does not pass."""
    found = []
    for name, score in scores.items():
        gate = profile.gate.get(name, profile.default_gate)
        for bound in Gate.model_fields:
            over = score[bound]
            if bound == "over_teacher":
                if over is None:
                    continue
                over = over["relative"] or {"value": math.nan, "low": math.nan}
            low, least = over["low"], getattr(gate, bound)
            told = {
                "of": name,
                "gate": bound,
                "figure": over["value"],
                "low": low,
                "bound": least,
                "passed": low >= least,
            }
            found.append(Gated.model_validate(told))
    return found


def hold(scores: Mapping[str, Any], profile: Profile) -> None:
    """Hold every sub-model to its gates: fail closed when one is missed, or when a figure is not a number.

    Raises:
        ShipyardError: a gate is missed; nothing after this stage runs.
    """
    for gate in judged(scores, profile):
        if not gate.passed:
            raise ShipyardError(
                f"gate: {gate.of}: {scores[gate.of]['metric']} {gate.gate} is too low: its 95 % interval starts at "
                f"{gate.low:+.4f}",
                value=f"{gate.figure:+.4f}", allowed=f"{gate.bound:+.4f} or more at the interval's lower end",
                mend="train longer or on more data; the gate is in fleet.toml under the profile",
            )  # fmt: skip


LEAST_ORDER = 0.8
"""Part of the top-10 places that a form must keep: neighbours with almost equal scores may change places."""

MOST_RUNTIME_MB = 160
"""Size of the edge's runtime for both architectures, most of which are wheels."""


def judged_forms(
    submodels: Mapping[str, Any], artifacts: Iterable[Mapping[str, Any]], targets: Mapping[TargetName, Target]
) -> list[Gated]:
    """Return the gates of the forms that are served and of the artifacts' sizes, which stages before have held."""
    found: list[dict[str, Any]] = []
    for name, sub in submodels.items():
        served, most = sub["formats"][-1], targets[sub["target"]].max_loss
        found.append({"of": name, "gate": "loss", "figure": served["loss"], "bound": most,
                      "passed": served["loss"] <= most})  # fmt: skip
        found.append({"of": name, "gate": "order", "figure": served["order"], "bound": LEAST_ORDER,
                      "passed": served["order"] >= LEAST_ORDER})  # fmt: skip
    for artifact in artifacts:
        size = sum(file["bytes"] for file in artifact["files"]) / 1e6
        runtime = artifact["kind"] == "greengrass-runtime"
        most = MOST_RUNTIME_MB if runtime else targets[artifact["target"]].max_size_mb
        found.append({"of": artifact["name"], "gate": "size_mb", "figure": size, "bound": most, "passed": size <= most})
    return [Gated.model_validate(told) for told in found]
