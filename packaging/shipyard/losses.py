"""Losses of probabilities and of classes: log loss, Brier, calibration, the report of a classifier.

Sizes: B requests, K right answers, R rows, N outcomes, C classes. Undefined is NaN; nothing to measure is an error.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import ShipyardError
from shipyard.metrics import (
    Floats,
    Labels,
    Rows,
    Scores,
    against,
    blocks,
    divide,
    rounded,
    same,
    whole_rows,
)


def softmax_log_loss(scores: Scores, relevant: Rows) -> Floats:
    """Return the mean [B] over right answers [B, K] of -log softmax of scores [B, R + 1] over the catalogue, in nats.

    Column 0 of the scores is left out. Minus infinity takes a row out of the catalogue: where that row is right the loss
    is infinite.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, a right answer twice, or a line's scores have no softmax.
    """
    relevant = against(scores, relevant)
    right = relevant != 0
    losses = _log_total(scores[:, 1:])[:, None] - np.take_along_axis(scores, relevant, 1)
    return divide(np.where(right, losses, 0.0).sum(1), right.sum(1))


def _log_total(scores: Scores) -> Floats:
    """Return log(sum(exp(scores))) [B] of scores [B, N] in float64, without overflow."""
    found = np.empty(len(scores))
    for part in blocks(*scores.shape):
        lines = scores[part].astype(np.float64)
        most = lines.max(1, keepdims=True)
        if not np.isfinite(most).all():
            raise ShipyardError(
                "metrics: scores have no softmax", value=most[~np.isfinite(most)][0],
                allowed="numbers, or minus infinity for some rows of a request", mend="look for NaN in the model",
            )  # fmt: skip
        with np.errstate(over="ignore"):  # what is that far below weighs nothing
            lines -= most
        found[part] = most[:, 0] + np.log(np.exp(lines, out=lines).sum(1))
    return found


def log_loss(probability: Floats, label: Labels) -> Floats:
    """Return -log of the probability [N] that was given to what happened [N], 0 or 1, in nats.

    A probability is held a float64 epsilon away from 0 and 1, as scikit-learn does.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, or no probabilities and labels.
    """
    probability, happened = _judged(probability, label)
    epsilon = np.finfo(np.float64).eps
    given = np.clip(probability, epsilon, 1 - epsilon)
    return -np.where(happened, np.log(given), np.log1p(-given))


def brier(probability: Floats, label: Labels) -> Floats:
    """Return the squared distance [N] of the probability [N] to what happened [N], 0 or 1.

    Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950), in the form for two classes.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, or no probabilities and labels.
    """
    probability, happened = _judged(probability, label)
    return np.square(probability - happened)


def reliability(probability: Floats, label: Labels, bins: int = 15) -> dict[str, list[float]]:
    """Return the table of a reliability diagram: mean `predicted`, part `observed` and `count` of each bin, ascending.

    Bins have equal mass (Nixon et al., "Measuring Calibration in Deep Learning", 2019). Equal probabilities share a bin,
    that of their mean place, so that the order of the examples [N] changes nothing; a bin that stays empty is left out.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, fewer than one bin, or no probabilities and labels.
    """
    probability, happened = _judged(probability, label)
    if bins < 1:
        raise ShipyardError("metrics: too few bins", value=bins, allowed="1 or more")
    values, which, count = np.unique(probability, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    place = np.minimum((middle * bins / len(which)).astype(np.int64), bins - 1)
    mass = np.bincount(place, count, bins)
    held = mass > 0
    predicted = np.bincount(place, values * count, bins)[held] / mass[held]
    observed = np.bincount(place[which], happened, bins)[held] / mass[held]
    return {"predicted": predicted.tolist(), "observed": observed.tolist(), "count": mass[held].astype(int).tolist()}


def calibration_error(probability: Floats, label: Labels, bins: int = 15) -> float:
    """Return the expected calibration error: the mean over examples of |observed - predicted| of their bin.

    Naeini, Cooper and Hauskrecht (AAAI 2015), with bins of equal mass (Nixon et al. 2019).

    Raises:
        ShipyardError: shapes disagree, nothing to measure, fewer than one bin, or no probabilities and labels.
    """
    table = {name: np.array(column) for name, column in reliability(probability, label, bins).items()}
    return float(np.average(np.abs(table["observed"] - table["predicted"]), weights=table["count"]))


def _judged(probability: Floats, label: Labels) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return probabilities and labels [N] that are checked."""
    if probability.ndim != 1 or not probability.size:
        raise ShipyardError(
            "metrics: probabilities are none or have the wrong shape", value=probability.shape, allowed="one size"
        )
    same("probabilities and labels", probability.shape, label.shape)
    if not ((probability >= 0) & (probability <= 1)).all():
        wrong = probability[~((probability >= 0) & (probability <= 1))][0]
        raise ShipyardError(
            "metrics: a probability is none", value=wrong, allowed="0 to 1", mend="calibrate the scores first"
        )
    if not ((label == 0) | (label == 1)).all():
        wrong = label[~((label == 0) | (label == 1))][0]
        raise ShipyardError("metrics: a label is none", value=wrong, allowed="0 or 1")
    return probability.astype(np.float64, copy=False), label == 1


def classification_report(true: Rows, scores: Scores, names: Sequence[str], most: int = 20) -> dict[str, Any]:
    """Return how well scores [N, C] tell the class [N], an index of `names` [C]; figures are rounded to 5 places.

    Scores are logits or log probabilities; of equal ones the lower index comes first. `macro` is the mean over classes
    that are true or predicted somewhere, `weighted` the mean weighted by `support`; precision, recall and F1 are 0 where
    undefined (as in scikit-learn, whose definitions these are). `cross_entropy` is in nats, None where it is infinite.
    `classes` is a table of the `most` frequent.

    Raises:
        ShipyardError: shapes disagree, nothing to measure, a class without a name, or a line's scores have no softmax.
    """
    if scores.ndim != 2 or not scores.size:
        raise ShipyardError("metrics: scores of classes are none or have the wrong shape", value=scores.shape)
    same("classes and their scores", true.shape, scores.shape[:1])
    same("scores and names of classes", scores.shape[1], len(names))
    whole_rows("true classes", true[:, None], len(names) - 1)
    losses = _log_total(scores) - scores[np.arange(len(true)), true]
    predicted, size = scores.argmax(1), len(names)
    support, given = np.bincount(true, minlength=size), np.bincount(predicted, minlength=size)
    correct = np.bincount(true[predicted == true], minlength=size)
    known = (support > 0) | (given > 0)
    figures = {
        "precision": np.divide(correct, given, out=np.zeros(size), where=given > 0),
        "recall": np.divide(correct, support, out=np.zeros(size), where=support > 0),
        "f1": np.divide(2 * correct, support + given, out=np.zeros(size), where=known),
    }
    chosen = [int(c) for c in np.argsort(-support, kind="stable")[:most] if support[c]]
    return {
        "examples": len(true),
        "accuracy": rounded(correct.sum() / len(true)),
        "top_3_accuracy": rounded(_among_highest(scores, true).mean()),
        "cross_entropy": rounded(losses.mean()) if np.isfinite(losses).all() else None,
        "macro": {name: rounded(figure[known].mean()) for name, figure in figures.items()},
        "weighted": {name: rounded(np.average(figure, weights=support)) for name, figure in figures.items()},
        "classes": [
            {"name": names[c], "support": int(support[c])} | {n: rounded(figure[c]) for n, figure in figures.items()}
            for c in chosen
        ],
    }


def _among_highest(scores: Scores, true: Rows, k: int = 3) -> npt.NDArray[np.bool_]:
    """Return whether the true class [N] is among the k highest scores [N, C], ties by the lower index."""
    own = np.take_along_axis(scores, true[:, None], 1)
    tied = (scores == own) & (np.arange(scores.shape[1]) < true[:, None])
    return ((scores > own) | tied).sum(1) < k
