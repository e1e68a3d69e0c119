"""Calibrate: turn a score into a probability, fit on validation and applied wherever scores are fused.

A calibration is plain numbers, so that a gateway applies it with numpy alone. Platt scaling is two numbers; isotonic
regression is at most 50 knots, read off by linear interpolation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError
from shipyard.losses import log_loss

METHODS = ("platt", "isotonic")

KNOTS = 50
"""Most knots of an isotonic calibration."""

LARGEST = 1e100
"""Largest size of a score to fit on: its square must not overflow."""

FOLDS = 5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Hold a map from score to probability.

    `platt`: the probability is 1 / (1 + exp(-(x s + y))), with x and y of one number each. `isotonic`: x are scores,
    ascending, y their probabilities, none lower than the one before; constant outside, linear between.
    """

    method: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no calibration.

        Raises:
            ShipyardError: an unknown method, or numbers that are no map of this method.
        """
        x, y = np.array(self.x, np.float64), np.array(self.y, np.float64)
        if self.method not in METHODS:
            raise ShipyardError("calibrate: unknown method", value=self.method, allowed=", ".join(METHODS))
        if self.method == "platt":
            sound = x.shape == y.shape == (1,) and np.isfinite([*x, *y]).all()
        else:
            sound = x.ndim == y.ndim == 1 and 1 <= len(x) == len(y) and np.isfinite(x).all() and (np.diff(x) > 0).all()
            sound = sound and (np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1
        if not sound:
            raise ShipyardError(
                f"calibrate: numbers are no {self.method} calibration", value=f"{len(x)} and {len(y)} of them",
                allowed="platt: two finite numbers; isotonic: ascending scores, ascending probabilities",
                mend="fit it again",
            )  # fmt: skip

    def apply(self, scores: npt.NDArray[Any]) -> Floats:
        """Return the probability of each score, any shape; infinite scores get the probability of the far end.

        Raises:
            ShipyardError: a score is not a number.
        """
        found = np.asarray(scores, np.float64)
        if np.isnan(found).any():
            raise ShipyardError("calibrate: a score is not a number", mend="look for NaN in the model")
        if self.method == "isotonic":
            return np.interp(found, self.x, self.y)
        largest = np.finfo(np.float64).max
        with np.errstate(over="ignore"):
            logit = self.x[0] * np.clip(found, -largest, largest) + self.y[0]
        return _sigmoid(logit)

    def to_json(self) -> dict[str, Any]:
        """Return what a JSON document holds of it: the method and two lists of floats, read back without any loss."""
        return {"method": self.method, "x": list(self.x), "y": list(self.y)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return the calibration of a JSON document.

        Raises:
            ShipyardError: keys are missing or unknown, or numbers that are no calibration.
        """
        if set(document) != {"method", "x", "y"}:
            raise ShipyardError("calibrate: a document with other keys", value=sorted(document), allowed="method, x, y")
        try:
            x, y = (tuple(float(number) for number in document[key]) for key in ("x", "y"))
        except (TypeError, ValueError) as error:
            raise ShipyardError("calibrate: a document with no lists of numbers", value=str(error)) from error
        return cls(document["method"], x, y)


def fit(scores: npt.NDArray[Any], labels: npt.NDArray[Any], method: str) -> Calibration:
    """Return the calibration of scores [N] that were followed by labels [N], 0 or 1.

    `platt`: Platt, "Probabilistic Outputs for Support Vector Machines" (1999), by Newton's method with backtracking as of
    Lin, Lin and Weng (2007). Platt's targets, (P + 1) / (P + 2) and 1 / (N + 2) for P ones and N zeros, keep the slope
    finite where the labels can be told apart. A slope below 0 says that higher scores are wrong more often.
    `isotonic`: Zadrozny and Elkan (KDD 2002), held between Platt's targets, so that no probability is 0 or 1.

    Raises:
        ShipyardError: shapes disagree, an unknown method, labels all alike, or a score that is not finite.
    """
    scores, labels = _examples(scores, labels)
    if method not in METHODS:
        raise ShipyardError("calibrate: unknown method", value=method, allowed=", ".join(METHODS))
    ones = int(labels.sum())
    if not 0 < ones < len(labels):
        raise ShipyardError(
            "calibrate: labels are all alike", value=f"{ones} ones of {len(labels)}", allowed="some 0 and some 1",
            mend="fit on more validation examples",
        )  # fmt: skip
    low, high = 1 / (len(labels) - ones + 2), (ones + 1) / (ones + 2)
    if method == "platt":
        return _platt(scores, np.where(labels, high, low))
    return _isotonic(scores, labels, low, high)


def choose(
    scores: npt.NDArray[Any], labels: npt.NDArray[Any], groups: npt.NDArray[Any] | None = None, seed: int = 7
) -> Calibration:
    """Return the calibration by the method with the lowest cross-fitted log loss, fitted on all; a tie is Platt's.

    Raises:
        ShipyardError: as `cross_fit` and `fit`.
    """
    losses = {m: float(log_loss(cross_fit(scores, labels, m, groups, seed), labels).mean()) for m in METHODS}
    return fit(scores, labels, min(losses, key=lambda method: losses[method]))


def cross_fit(
    scores: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    method: str,
    groups: npt.NDArray[Any] | None = None,
    seed: int = 7,
) -> Floats:
    """Return the probability of each score [N] by a calibration that was fitted without its group, in five folds.

    Groups [N] (households) stay whole; without them each score is its own. Folds share the labels out evenly.

    Raises:
        ShipyardError: as `fit`, or a label that fewer than two groups have.
    """
    scores, labels = _examples(scores, labels)
    if groups is None:
        groups = np.arange(len(scores))
    if groups.shape != scores.shape:
        raise ShipyardError("calibrate: shapes of scores and groups disagree", value=f"{scores.shape}, {groups.shape}")
    names, which = np.unique(groups, return_inverse=True)
    ones, zeros = np.bincount(which, labels) > 0, np.bincount(which, ~labels) > 0
    if min(ones.sum(), zeros.sum()) < 2:
        raise ShipyardError(
            "calibrate: too few groups to cross-fit", value=f"{ones.sum()} with a 1, {zeros.sum()} with a 0",
            allowed="2 or more of each", mend="fit on more validation examples",
        )  # fmt: skip
    # only ones, both, only zeros: those with a 1 are neighbours and so are those with a 0, and neighbours get other folds
    order = np.lexsort([np.random.default_rng(seed).permutation(len(names)), zeros, ~ones])
    fold = np.empty(len(names), np.int64)
    fold[order] = np.arange(len(names)) % FOLDS
    found = np.empty(len(scores))
    for each in range(min(FOLDS, len(names))):
        held = fold[which] == each
        found[held] = fit(scores[~held], labels[~held], method).apply(scores[held])
    return found


def _examples(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return scores and labels [N] that are checked."""
    if scores.ndim != 1 or scores.shape != labels.shape or not scores.size:
        raise ShipyardError(
            "calibrate: scores and labels are none or their shapes disagree", value=f"{scores.shape}, {labels.shape}",
            allowed="one size, the same, 1 or more",
        )  # fmt: skip
    found = scores.astype(np.float64)
    sound = np.abs(found) <= LARGEST
    if not sound.all():
        raise ShipyardError(
            "calibrate: a score is not finite or too large to fit on", value=found[~sound][0],
            allowed=f"-{LARGEST:g} to {LARGEST:g}", mend="leave out rows that the model masks",
        )  # fmt: skip
    if not ((labels == 0) | (labels == 1)).all():
        raise ShipyardError(
            "calibrate: a label is none", value=labels[(labels != 0) & (labels != 1)][0], allowed="0 or 1"
        )
    return found, labels == 1


def _sigmoid(logit: Floats) -> Floats:
    small = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1 / (1 + small), small / (1 + small))


def _platt(scores: Floats, target: Floats) -> Calibration:
    """Fit slope and intercept to targets [N] by Newton's method on scores of mean 0 and deviation 1."""
    middle, scale = float(scores.mean()), float(scores.std())
    if scores.min() == scores.max() or not scale > 0:
        mean = float(target.mean())
        return Calibration("platt", (0.0,), (float(np.log(mean / (1 - mean))),))
    inputs = np.stack([(scores - middle) / scale, np.ones_like(scores)], axis=1)

    def loss(weights: Floats) -> float:
        logit = inputs @ weights
        return float((np.logaddexp(0, logit) - target * logit).mean())

    weights, now = np.zeros(2), loss(np.zeros(2))
    for _ in range(100):
        probability = _sigmoid(inputs @ weights)
        slope = inputs.T @ (probability - target) / len(target)
        curve = (inputs * (probability * (1 - probability))[:, None]).T @ inputs / len(target) + 1e-12 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        size, gain = 1.0, float(slope @ step)
        while (after := loss(weights - size * step)) > now - 1e-4 * size * gain and size > 1e-10:
            size /= 2
        if size <= 1e-10:  # no step is better, to the last digit
            break
        weights, now = weights - size * step, after
        if gain < 1e-16:
            break
    steep = float(weights[0]) / scale
    return Calibration("platt", (steep,), (float(weights[1]) - steep * middle,))


def _isotonic(scores: Floats, labels: npt.NDArray[np.bool_], low: float, high: float) -> Calibration:
    """Fit blocks of equal probability, and join neighbours until two knots a block are few enough."""
    from sklearn.isotonic import isotonic_regression  # not at the top: only a fit needs scikit-learn

    at, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    rate = np.bincount(which, labels) / count
    rate = isotonic_regression(rate, sample_weight=count.astype(np.float64))
    start = np.flatnonzero(np.r_[True, np.diff(rate) > 0])
    mass, ones = np.add.reduceat(count, start).astype(np.float64), np.add.reduceat(rate * count, start)
    first, last = at[start], at[np.r_[start[1:], len(at)] - 1]
    while len(mass) > KNOTS // 2:
        # the neighbours whose joining adds least to the squared error (Ward 1963)
        apart = np.diff(ones / mass)
        join = int(np.argmin(apart**2 * mass[1:] * mass[:-1] / (mass[1:] + mass[:-1])))
        mass[join], ones[join], last[join] = mass[join] + mass[join + 1], ones[join] + ones[join + 1], last[join + 1]
        mass, ones, first, last = (np.delete(column, join + 1) for column in (mass, ones, first, last))
    height = np.maximum.accumulate(np.clip(ones / mass, low, high))
    x, y = np.stack([first, last], axis=1).ravel(), np.repeat(height, 2)
    kept = np.r_[True, np.diff(x) > 0]  # a block of a single score is one knot
    return Calibration("isotonic", tuple(x[kept].tolist()), tuple(y[kept].tolist()))
