"""Gates: what a sub-model must reach before anything of it is split off, exported or uploaded. They fail closed."""

import math
from collections.abc import Mapping
from typing import Any

from models.config import Gate, Profile
from serve.errors import ShipyardError


def hold(scores: Mapping[str, Any], profile: Profile) -> None:
    """Hold every sub-model to its gates: fail closed when one is missed, or when a figure is not a number.

    Raises:
        ShipyardError: a gate is missed; nothing after this stage runs.
    """
    for name, score in scores.items():
        gate = profile.gate.get(name, profile.default_gate)
        for bound in Gate.model_fields:
            found = score[bound]
            if bound == "over_teacher":
                if found is None:
                    continue
                found = found["relative"] or {"value": math.nan, "low": math.nan}
            low, least = found["low"], getattr(gate, bound)
            if not low >= least:
                raise ShipyardError(
                    f"gate: {name}: {score['metric']} {bound} is too low: its 95 % interval starts at {low:+.4f}",
                    value=f"{found['value']:+.4f}", allowed=f"{least:+.4f} or more at the interval's lower end",
                    mend="train longer or on more data; the gate is in fleet.toml under the profile",
                )  # fmt: skip
