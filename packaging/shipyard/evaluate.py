"""Evaluate: one metric for every form of a sub-model, intervals, and baselines.

The metric is nDCG@10 over the full ranking with binary gains; sampled negatives mislead (Krichene and Rendle, KDD 2020).
Intervals are percentile bootstraps over households (Efron 1979): one example a household, so examples are resampled.
Differences are paired. Choices are made on validation, the test period is scored for the release.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from models import submodel, trunk
from models.behaviour import TEST, VALIDATION, Behaviour, Ints, View, load_behaviour
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from shipyard.finetune import Batches, Progress, Vectors, build_joint, load_vectors

PLACES = 10
"""Places of the ranking that the metric looks at."""

Scores = npt.NDArray[np.float64]


def ndcg(ranked: Ints, relevant: Ints) -> Scores:
    """Return nDCG@10 [B] of ranked rows [B, 10 or more] against right answers [B, K] padded with 0.

    Gains are binary, the discount is log2(1 + place) (Jarvelin and Kekalainen 2002).
    """
    places = min(PLACES, ranked.shape[1])
    hits = (ranked[:, :places, None] == relevant[:, None, :]) & (relevant[:, None, :] != 0)
    discount = 1 / np.log2(np.arange(2, places + 2))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, PLACES + 2)))])
    best = ideal[np.minimum((relevant != 0).sum(1), PLACES)]
    gained = (hits.any(2) * discount).sum(1)
    return np.divide(gained, best, out=np.zeros(len(gained)), where=best > 0)


def interval(values: Scores, seed: int = 7, rounds: int = 2000) -> dict[str, float]:
    """Return the mean of `values` with its 95 % bootstrap interval, rounded to 5 places."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": round(float(values.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


class Examples:
    """The examples of one period, one a household, cut for each sub-model.

    Those without a right answer are left out; of the rest at most `most` are taken, spread over all.
    """

    def __init__(self, behaviour: Behaviour, period: int, most: int, names: tuple[str, ...]) -> None:
        self.behaviour = behaviour
        self.most = most
        self.baskets = behaviour.first_baskets(period)
        self.queries = behaviour.queries(self.baskets)
        self.batches = Batches(behaviour, names)

    @cached_property
    def _views(self) -> dict[str, View]:
        return self.batches.views(self.baskets, self.queries)

    def of(self, name: str) -> tuple[View, Ints, Ints, Ints]:
        """Return view, right answers [B, K], baskets [B] and queries [B] of a sub-model."""
        view = self._views[name]
        relevant = submodel.load(name).relevant(view)
        kept = np.flatnonzero((relevant != 0).any(1))
        if len(kept) < 20:
            raise ShipyardError(
                f"evaluate: {name}: too few examples with a right answer", value=len(kept), allowed="20 or more",
                mend="raise households or test_examples of the profile in fleet.toml",
            )  # fmt: skip
        kept = kept[np.linspace(0, len(kept) - 1, min(self.most, len(kept))).astype(int)]
        return view.take(kept), relevant[kept], self.baskets[kept], self.queries[kept]


def rank(scorer: Callable[[View, Ints], npt.NDArray[np.float32]], view: View, queries: Ints, batch: int = 128) -> Ints:
    """Return the first rows [B, 10] by score, ties by the lower row; `scorer` gives [b, R + 1] for a part of the view."""
    found = []
    for k in range(0, len(queries), batch):
        part = slice(k, k + batch)
        found.append(top(scorer(view.take(part), queries[part])))
    return np.concatenate(found)


def top(scores: npt.NDArray[Any]) -> Ints:
    """Return the rows of the ten highest scores [B, 10], the highest first, ties by the lower row; row 0 is left out."""
    ranked = np.empty((len(scores), PLACES), np.int64)
    for line, each in zip(ranked, scores[:, 1:], strict=True):
        # a partition alone takes any of those that tie for the last place, and many products share one text
        least = np.partition(each, -PLACES)[-PLACES]
        above = np.flatnonzero(each > least)
        tied = np.flatnonzero(each == least)[: PLACES - len(above)]
        line[:] = np.r_[above[np.argsort(-each[above], kind="stable")], tied] + 1
    return ranked


def score_joint(joint: trunk.Joint, vectors: Vectors, name: str) -> Callable[[View, Ints], npt.NDArray[np.float32]]:
    """Return a scorer by the joint model."""
    joint.eval()
    with torch.inference_mode():
        table = joint.table(joint.rows[name])

    def scorer(view: View, queries: Ints) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            items, features = torch.from_numpy(view.items), torch.from_numpy(view.features)
            logits: npt.NDArray[np.float32] = joint(
                name, table, joint.bias[name], vectors.paths[queries], items, features
            ).numpy()
            return logits

    return scorer


def rank_by_rule(rule: submodel.Rule, behaviour: Behaviour, rows: Ints, baskets: Ints, queries: Ints) -> Ints:
    """Return the first rows [B, 10] of a baseline in the rows that a sub-model ranks."""
    chosen = np.r_[0, rows]
    ranked = [
        top(rule(behaviour, int(basket), int(query))[None, chosen])[0]
        for basket, query in zip(baskets, queries, strict=True)
    ]
    return np.stack(ranked)


def load_joint(
    behaviour: Behaviour, folder: Path, config: Finetune, names: tuple[str, ...]
) -> tuple[trunk.Joint, Vectors]:
    """Read the fine-tuned joint model and its text vectors."""
    vectors = load_vectors(folder, "after")
    joint = build_joint(behaviour, vectors, config, names)
    joint.load_state_dict(load_file(folder / "joint.safetensors"))
    joint.eval()
    return joint, vectors


def evaluate(
    data: Path, finetuned: Path, config: Finetune, profile: Profile, names: tuple[str, ...], progress: Progress
) -> dict[str, Any]:
    """Score every sub-model on the test period: its strongest baseline, before fine-tuning and after it."""
    behaviour = load_behaviour(data)
    before = load_vectors(finetuned, "before")
    untrained = build_joint(behaviour, before, config, names)
    joint, after = load_joint(behaviour, finetuned, config, names)
    validation = Examples(behaviour, VALIDATION, min(500, profile.test_examples), names)
    test = Examples(behaviour, TEST, profile.test_examples, names)
    record = {}
    for done, name in enumerate(names):
        progress(f"evaluate {name}", done, len(names))
        module, rows = submodel.load(name), test.batches.rows[name]
        _, right, baskets, queries = validation.of(name)
        rules = {
            rule_name: float(ndcg(rank_by_rule(rule, behaviour, rows, baskets, queries), right).mean())
            for rule_name, rule in module.BASELINES.items()
        }
        best = max(rules, key=lambda rule: rules[rule])
        view, relevant, baskets, queries = test.of(name)
        by_rule = ndcg(rank_by_rule(module.BASELINES[best], behaviour, rows, baskets, queries), relevant)
        by_before = ndcg(rank(score_joint(untrained, before, name), view, queries), relevant)
        by_after = ndcg(rank(score_joint(joint, after, name), view, queries), relevant)
        record[name] = {
            "metric": module.METRIC,
            "examples": len(relevant),
            "baseline_name": best,
            "baseline": interval(by_rule),
            "before": interval(by_before),
            "after": interval(by_after),
            "over_baseline": interval(by_after - by_rule),
            "over_before": interval(by_after - by_before),
            "validation_baselines": {rule: round(value, 5) for rule, value in rules.items()},
        }
    progress("evaluate", len(names), len(names))
    return record
