"""Correct: a calibration with what was merged from devices, held to the test period before a bundle carries it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.behaviour import TEST, load_behaviour
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from serve.greengrass.adapt import log_odds
from shipyard.examples import Examples, answer, load_joint
from shipyard.losses import log_loss
from shipyard.metrics import PLACES

MOST_LOSS = 0.05
"""How much of its log loss on the test period a correction may cost: shoppers there are others than those of the devices."""


def correct(
    data: Path, finetuned: Path, config: Finetune, profile: Profile, names: tuple[str, ...], name: str,
    calibration: Mapping[str, Any], correction: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Return the `calibration` with its correction, and the log loss of the first ten places without and with it.

    Raises:
        ShipyardError: the correction costs more than it may.
    """
    behaviour = load_behaviour(data)
    joint, vectors = load_joint(behaviour, finetuned, config, names)
    cut = Examples(behaviour, TEST, profile.test_examples, names, profile.test_each).of(name)
    found = answer(joint, cut, cut.text(vectors), full=False)
    right = (found.ranked[:, :PLACES, None] == cut.relevant[:, None, :]).any(2).ravel()
    corrected = {**calibration, "correction": list(correction)}
    before, after = (_log_loss(one, found.scores[:, :PLACES].ravel(), right) for one in (calibration, corrected))
    hold(name, before, after)
    return {"calibration": corrected, "log_loss": before, "corrected_log_loss": after}


def hold(name: str, before: float, after: float) -> None:
    """Hold a correction to its log loss.

    Raises:
        ShipyardError: it costs more than it may, or is no number.
    """
    if not after <= (1 + MOST_LOSS) * before:
        raise ShipyardError(
            f"gate: {name}: what was merged from devices costs log loss on the test period",
            value=f"{before:.4f} to {after:.4f}", allowed=f"{MOST_LOSS:.0%} more at most",
            mend="remove it from releases/calibration.lock, or merge again with a smaller --clip",
        )  # fmt: skip


def _log_loss(calibration: Mapping[str, Any], scores: Any, right: Any) -> float:
    odds = np.array([log_odds(calibration, score) for score in scores.tolist()])
    return round(float(np.mean(log_loss(1 / (1 + np.exp(-odds)), right))), 6)
