"""Fit the fusion of several sub-models' answers on validation, and judge it on test.

All sources answer the same search requests over one space of product ids. Every method of `serve.fusion` is fitted;
the one with the best nDCG@10 on validation goes into the release, the others are recorded.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from models.behaviour import Ints
from serve.fusion import FEATURES, METHODS, Candidates, Method, describe, fuse, gather
from shipyard import intervals, metrics

STEPS = 10
"""Weights are tried in steps of a tenth."""

Rankings = Mapping[str, tuple[Ints, npt.NDArray[np.float32]]]
"""By source, products [B, P], best first, 0 for padding, with scores [B, P]."""


def fit_fusion(validation: Rankings, right: Ints, test: Rankings, relevant: Ints, owners: Ints) -> dict[str, Any]:
    """Fit all methods to `right` [V, K] and judge them on `relevant` [B, K] of households `owners` [B], padded with 0.

    Returns:
        The chosen method, the sources in the order of its weights, and by method parameters, nDCG@10 on validation and on
        test; the same of the single sources; the paired difference of the chosen method and the best single source,
        which is chosen on validation too.
    """
    sources = list(validation)
    learn, judge = _candidates(validation), _candidates(test)
    methods: dict[Method, Any] = {}
    for method in METHODS:
        tried = _grid(method, len(sources)) if method != "stacking" else [_stack(learn, right)]
        values = [float(np.nanmean(_ndcg(learn, method, parameters, right))) for parameters in tried]
        best = int(np.argmax(values))
        methods[method] = {
            "parameters": tried[best],
            "validation": round(values[best], 5),
            "test": intervals.interval(_ndcg(judge, method, tried[best], relevant), owners),
        }
    single: dict[str, Any] = {
        source: {
            "validation": round(float(np.nanmean(metrics.ndcg(validation[source][0], right))), 5),
            "test": intervals.interval(metrics.ndcg(test[source][0], relevant), owners),
        }
        for source in sources
    }
    chosen = max(methods, key=lambda method: float(methods[method]["validation"]))
    rival = max(single, key=lambda source: float(single[source]["validation"]))
    fused = _ndcg(judge, chosen, methods[chosen]["parameters"], relevant)
    return {
        "method": chosen,
        "sources": sources,
        "parameters": methods[chosen]["parameters"],
        "examples": len(relevant),
        "methods": methods,
        "single": single,
        "best_single": rival,
        "over_best_single": intervals.difference(fused, metrics.ndcg(test[rival][0], relevant), owners),
    }


def _candidates(rankings: Rankings) -> list[Candidates]:
    found = []
    for k in range(len(next(iter(rankings.values()))[0])):
        answers = []
        for products, scores in rankings.values():
            given = products[k] > 0
            answers.append((products[k][given].tolist(), scores[k][given].tolist()))
        found.append(gather(answers))
    return found


def _ndcg(
    found: Sequence[Candidates], method: str, parameters: Mapping[str, Any], right: Ints
) -> npt.NDArray[np.float64]:
    """Return nDCG@10 [B] of a fusion."""
    ranked = np.zeros((len(found), metrics.PLACES), np.int64)
    for line, candidates in zip(ranked, found, strict=True):
        order = np.argsort(-fuse(candidates, method, parameters), kind="stable")[: metrics.PLACES]
        line[: len(order)] = np.array(candidates.products, np.int64)[order]
    return metrics.ndcg(ranked, right)


def _grid(method: Method, sources: int) -> list[dict[str, Any]]:
    """Return the settings of a method that are tried, those that lean on the first source first."""
    if method == "vote":
        return [{"depth": depth} for depth in (3, 5, 10, 20, 50, 100)]
    mixes = [
        [part / STEPS for part in mix]
        for mix in itertools.product(range(STEPS, -1, -1), repeat=sources)
        if sum(mix) == STEPS
    ]
    if method == "weighted":
        return [{"weights": mix} for mix in mixes]
    return [{"weights": mix, "k": k} for k in (1, 10, 60) for mix in mixes]


def _stack(found: Sequence[Candidates], right: Ints, penalty: float = 1e-3) -> dict[str, Any]:
    """Return the weights of stacking: softmax over a request's candidates, the mean log loss of those that are right."""
    told, labels, starts = [], [], [0]
    for candidates, answer in zip(found, right, strict=True):
        hit = np.isin(np.array(candidates.products, np.int64), answer[answer > 0])
        if hit.any():
            told.append(describe(candidates))
            labels.append(hit / hit.sum())
            starts.append(starts[-1] + len(hit))
    width = len(found[0].spoke) * len(FEATURES)
    if not told:
        return {"weights": [0.0] * width}
    x, y = np.concatenate(told), np.concatenate(labels)
    first, sizes = np.array(starts[:-1]), np.diff(starts)

    def loss(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        score = x @ weights
        score -= np.repeat(np.maximum.reduceat(score, first), sizes)
        total = np.add.reduceat(np.exp(score), first)
        log_share = score - np.repeat(np.log(total), sizes)
        value = -(y * log_share).sum() / len(first) + penalty * (weights**2).sum()
        return float(value), x.T @ (np.exp(log_share) - y) / len(first) + 2 * penalty * weights

    solved = optimize.minimize(loss, np.zeros(width), jac=True, method="L-BFGS-B")
    return {"weights": [round(float(weight), 6) for weight in solved.x]}
