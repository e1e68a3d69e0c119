"""Evaluate: what every form of a sub-model is judged by, on which examples, with which intervals.

The metric is nDCG@10 over the full ranking with binary gains; sampled negatives mislead (Krichene and Rendle, KDD 2020).
Repeat and explore items are told apart (Li et al., "A Next Basket Recommendation Reality Check", TOIS 2023). Intervals are
bootstraps over households, differences are paired. Settings, methods and calibrations are chosen on validation; the test
period is scored for the release.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import submodel, trunk
from models.behaviour import TEST, VALIDATION, Behaviour, Ints, Level, load_behaviour
from models.config import Finetune, Profile
from shipyard import calibrate, intervals, losses, metrics
from shipyard.baselines import Baseline, OwnCounts, OwnDecayed, Popularity, RecentPopularity, rank
from shipyard.boosted import Boosted
from shipyard.examples import RETURNED, Answered, Cut, Examples, Scores, answer, load_joint
from shipyard.fuse import fit_fusion
from shipyard.joint import Vectors, build_joint, load_vectors
from shipyard.lexical import Bm25, Bm25Own, ExactPath, ExactPathDecayed, ExactPathOwn
from shipyard.neighbours import TifuKnn, UpCf
from shipyard.purchases import Purchases, group
from shipyard.queries import misspell, paraphrase
from shipyard.tower import encode
from shipyard.train import Progress

BASELINES: dict[str, tuple[Baseline, ...]] = {
    "search": (ExactPath(), ExactPathOwn(), ExactPathDecayed(), Bm25(), Bm25Own()),
    "recommend": (Popularity(), RecentPopularity(), OwnCounts(), OwnDecayed(), TifuKnn(), UpCf(), Boosted()),
}
"""What a task's sub-models have to beat."""

STRONG = (Bm25Own.name, RecentPopularity.name, TifuKnn.name, UpCf.name, Boosted.name)
"""Baselines that cost minutes to tune; a small profile leaves them out."""


@dataclass(frozen=True)
class Judge:
    """What the figures of a release are made of."""

    behaviour: Behaviour
    config: Finetune
    profile: Profile
    names: tuple[str, ...]
    before: tuple[trunk.Joint, Vectors]
    after: tuple[trunk.Joint, Vectors]
    validation: Examples
    test: Examples
    towers: Mapping[str, Any]
    progress: Progress

    def score(self, name: str) -> tuple[dict[str, Any], tuple[Answered, Answered]]:
        """Return the record of a sub-model, and what it answers to its validation and test examples."""
        module = submodel.load(name)
        joint, vectors = self.after
        validation, test = self.validation.of(name), self.test.of(name)
        self.progress(f"evaluate {name}", 0, len(test.baskets))
        found = answer(
            joint,
            test,
            test.text(vectors),
            lambda done: self.progress(f"evaluate {name}", done, len(test.baskets)),
            # one right category a request: a classifier
            keep=(module.ANSWER, module.LEVEL) == ("asked", "category"),
        )
        held = answer(joint, validation, validation.text(vectors), full=False)
        untrained = answer(self.before[0], test, test.text(self.before[1]), full=False)
        relevant, owners = test.relevant, test.owners
        after, before = test.ndcg(found.ranked), test.ndcg(untrained.ranked)
        best, tuned, ranked = self.baselines(name, validation, test)
        rules = {
            rule: {
                **intervals.interval(test.ndcg(rows), owners),
                "over": intervals.difference(after, test.ndcg(rows), owners),
                "settings": tuned[rule][0],
                "validation": tuned[rule][1],
            }
            for rule, rows in ranked.items()
        }
        record = {
            "metric": module.METRIC,
            "level": module.LEVEL,
            "examples": len(relevant),
            "households": len(np.unique(owners)),
            "baseline_name": best,
            "baseline": {bound: rules[best][bound] for bound in ("value", "low", "high")},
            "before": intervals.interval(before, owners),
            "after": intervals.interval(after, owners),
            "over_baseline": rules[best]["over"],
            "over_before": intervals.difference(after, before, owners),
            "over_teacher": None,
            "baselines": rules,
            "metrics": _figures(found, relevant, owners, test.rows),
            "baseline_metrics": _of_ranking(ranked[best], relevant, owners),
            "calibration": _calibration(held, validation, found, test),
        }  # fmt: skip
        if module.TEACHER is not None:
            rows = self.teacher(module.TEACHER, test)
            record["teacher"] = {"name": module.TEACHER, **intervals.interval(test.ndcg(rows), owners)}
            record["over_teacher"] = intervals.difference(after, test.ndcg(rows), owners)
        if not test.logged:
            # a search of the log has no basket, so that nothing of it is told apart
            record |= {
                "kinds": self.kinds(test, found.ranked, ranked[best]),
                "slices": self.slices(test, found.ranked, ranked[best]),
            }
        if module.TASK == "search":
            record["queries"] = self.queries(test, {"after": found.ranked, "before": untrained.ranked})
        if found.logits is not None:
            names = [str(label) for label in self.behaviour.names(module.LEVEL)]
            record["report"] = losses.classification_report(relevant[:, 0] - 1, found.logits.astype(float), names)
        return record, (held, found)

    def fusion(self, search: str, names: Sequence[str], said: tuple[Answered, Answered]) -> dict[str, Any]:
        """Fuse what `search` and the sub-models `names` that rank products answer to the requests of `search`.

        `said` is what `search` answers to its validation and test examples.
        """
        joint, vectors = self.after
        periods = []
        for done, (examples, own) in enumerate(zip((self.validation, self.test), said, strict=True)):
            cut = examples.of(search)
            answers = {search: own}
            for name in names:
                self.progress(f"fusion: {name}", done, len(said))
                asked = replace(cut, name=name)
                answers[name] = answer(joint, asked, asked.text(vectors), full=False)
            # rows of each sub-model to rows of the catalogue
            rows = {name: np.r_[0, self.test.batches.rows[name]] for name in answers}
            rankings = {name: (rows[name][found.ranked], found.scores) for name, found in answers.items()}
            periods.append((rankings, rows[search][cut.relevant], cut.owners))
        (learn, right, _), (judged, relevant, owners) = periods
        return fit_fusion(learn, right, judged, relevant, owners)

    def baselines(
        self, name: str, validation: Cut, test: Cut
    ) -> tuple[str, dict[str, tuple[dict[str, Any], float]], dict[str, Ints]]:
        """Tune every baseline on validation.

        Returns:
            The name of the best there, settings and figure of each there, and what each ranks on the test [B, 10].
        """
        task, level = submodel.load(name).TASK, self.test.batches.levels[name]
        purchases, rows = _purchases(self.behaviour, level), self.test.batches.rows[name]
        ranked, tuned = {}, {}
        for rule in BASELINES[task]:
            if not self.profile.strong_baselines and rule.name in STRONG:
                continue
            if test.logged and rule.name != Bm25.name:
                continue
            self.progress(f"baseline of {name}: {rule.name}", 0, 1)
            if test.logged:
                ranked[rule.name], tuned[rule.name] = self._lexical(rule, validation, test)
                continue
            right = np.r_[0, rows][validation.relevant]
            best, table = rule.tune(purchases, validation.baskets, validation.queries, right, rows, self.config.seed)
            ranks = rank(best.fit(purchases, TEST), test.baskets, test.queries, rows)
            ranked[rule.name] = np.searchsorted(rows, ranks) + 1
            tuned[rule.name] = (best.settings(), max(line["ndcg@10"] for line in table))
        return max(tuned, key=lambda rule: tuned[rule][1]), tuned, ranked

    def _lexical(self, rule: Baseline, validation: Cut, test: Cut) -> tuple[Ints, tuple[dict[str, Any], float]]:
        """Tune and rank a rule that looks at words alone, for searches of the log have no baskets."""
        tried = [replace(rule, **settings) for settings in rule.grid]
        values = [
            float(
                np.nanmean(
                    validation.ndcg(rank(one.fit(self.behaviour, VALIDATION), validation.baskets, validation.words))
                )
            )
            for one in tried
        ]
        best = int(np.argmax(values))
        ranked = rank(tried[best].fit(self.behaviour, TEST), test.baskets, test.words)
        return ranked, (tried[best].settings(), round(values[best], 5))

    def teacher(self, name: str, test: Cut) -> Ints:
        """Return what a teacher ranks [B, 10] of the rows of its student, who answers `test`."""
        joint, vectors = self.after
        among = np.searchsorted(test.batches.rows[name], test.batches.rows[test.name]) + 1
        asked = replace(test, name=name)
        return answer(joint, asked, asked.text(vectors), full=False, among=among).ranked

    def kinds(self, test: Cut, ranked: Ints, rival: Ints) -> dict[str, Any]:
        """Return figures on what the shopper had bought before ("repeat") and on what not ("explore"), apart."""
        own = self._bought_before(test)
        parts = {"repeat": np.where(own, test.relevant, 0), "explore": np.where(own, 0, test.relevant)}
        return {kind: _pair(ranked, rival, right, test.owners) for kind, right in parts.items()}

    def _bought_before(self, test: Cut) -> npt.NDArray[np.bool_]:
        place = test.batches.place[test.name]
        lines = [
            np.isin(right, place[self.behaviour.past(basket)[0]]) & (right > 0)
            for basket, right in zip(test.baskets.tolist(), test.relevant, strict=True)
        ]
        return np.stack(lines)

    def slices(self, test: Cut, ranked: Ints, rival: Ints) -> dict[str, Any]:
        """Return figures by length of history, by how often the right items are sold, and by promotion."""
        start, born = self.behaviour.start[test.baskets], self.behaviour.born[test.baskets]
        lengths = np.digitize(start - born, (50, 200, 500))
        labels = ("under 50 lines", "50 to 199", "200 to 499", "500 and more")
        found: dict[str, Any] = {"history": {}}
        for k, label in enumerate(labels):
            if (lengths == k).sum() >= 20:
                right = np.where((lengths == k)[:, None], test.relevant, 0)
                found["history"][label] = _pair(ranked, rival, right, test.owners)
        place, rows = test.batches.place[test.name], test.rows
        sold = np.bincount(place, self.behaviour.sold(TEST), rows + 1)
        frequent = np.sort(sold[1:])[::-1][: max(1, rows // 100)][-1]
        parts = {
            "new (not sold before)": sold[test.relevant] == 0,
            "rare": (sold[test.relevant] > 0) & (sold[test.relevant] < frequent),
            "frequent (the first percent)": sold[test.relevant] >= max(frequent, 1),
        }
        if test.batches.levels[test.name] == "product":
            promoted = np.concatenate(
                [
                    np.stack([np.isin(r, o[o > 0]) for r, o in zip(test.relevant[part], view.offers, strict=True)])
                    for part, view in test.views()
                ]
            )
            parts |= {"promoted": promoted, "not promoted": ~promoted}
        found["items"] = {}
        for label, which in parts.items():
            right = np.where(which, test.relevant, 0)
            if (right > 0).any(1).sum() >= 20:
                found["items"][label] = _pair(ranked, rival, right, test.owners)
        return found

    def queries(self, test: Cut, written: Mapping[str, Ints]) -> dict[str, Any]:
        """Return figures on misspelt and paraphrased queries, and with the category's words taken out of the texts.

        `written` is what the model after and before fine-tuning ranks for the queries as they are written. The other words
        for a paraphrase are for evaluation alone; training never sees them.
        """
        rng = np.random.default_rng(self.config.seed)
        paths = test.words
        lexical = Bm25(k1=1.2, b=0.0).fit(self.behaviour, TEST)
        record = {"as written": _several({**written, "BM25": rank(lexical, test.baskets, paths)}, test)}
        asked = {
            "misspelt": [misspell(path, rng) for path in paths],
            "paraphrased": [paraphrase(path) for path in paths],
        }
        for kind, words in asked.items():
            chosen = np.flatnonzero([word != path for word, path in zip(words, paths, strict=True)])
            if len(chosen) < 20:
                continue
            part = test.take(chosen)
            words = [words[i] for i in chosen]
            ranked = {
                which: answer(joint, part, self._encode(which, words), full=False).ranked
                for which, (joint, _) in (("after", self.after), ("before", self.before))
            }
            ranked["BM25"] = rank(lexical, part.baskets, words)
            record[kind] = _several(ranked, part)
        if not test.logged:
            record["category's words taken out of the texts"] = self._stripped(test)
        return record

    def _stripped(self, test: Cut) -> dict[str, Any]:
        """Score search over items whose texts have lost the words of their own category path."""
        behaviour = self.behaviour
        words = [set(path.split()) for path in behaviour.paths]
        kept = [
            " ".join(word for word in behaviour.texts[text].split() if word not in words[path])
            for text, path in zip(behaviour.text_of_row, behaviour.path_of_row[1:], strict=True)
        ]
        texts, of_row = np.unique(kept, return_inverse=True)
        bare = replace(behaviour, texts=texts.tolist(), text_of_row=of_row)
        ranked = {}
        for which, (joint, vectors) in (("after", self.after), ("before", self.before)):
            levels: dict[Level, Tensor] = {**vectors.texts, "product": self._encode(which, texts.tolist())}
            # nothing of a type's words is left to match either
            levels["type"] = torch.zeros_like(levels["type"])
            other = build_joint(bare, Vectors(levels, vectors.queries, vectors.searches), self.config, self.names)
            other.load_state_dict(joint.state_dict())
            ranked[which] = answer(other, test, test.text(vectors), full=False).ranked
        ranked["BM25"] = rank(Bm25(k1=1.2, b=0.0).fit(bare, TEST), test.baskets, test.queries)
        return _several(ranked, test)

    def _encode(self, which: str, texts: Sequence[str]) -> Tensor:
        tower, tokenizer = self.towers[which]
        return encode(tower, tokenizer, texts, self.progress, f"encode, {which}")


def _purchases(behaviour: Behaviour, level: Level) -> Purchases:
    if level == "product":
        return behaviour
    return group(behaviour, behaviour.row_of(level), [str(name) for name in behaviour.names(level)])


def _pair(ranked: Ints, rival: Ints, right: Ints, owners: Ints) -> dict[str, Any]:
    """Return nDCG@10 of the model and of the baseline where there is a right answer, and their difference."""
    kept = (right > 0).any(1)
    if not kept.any():
        return {"examples": 0}
    ours, theirs = metrics.ndcg(ranked[kept], right[kept]), metrics.ndcg(rival[kept], right[kept])
    return {
        "examples": int(kept.sum()),
        "after": intervals.interval(ours, owners[kept]),
        "baseline": intervals.interval(theirs, owners[kept]),
        "over_baseline": intervals.difference(ours, theirs, owners[kept]),
    }


def _several(ranked: Mapping[str, Ints], cut: Cut) -> dict[str, Any]:
    values = {which: cut.ndcg(rows) for which, rows in ranked.items()}
    return {
        "examples": len(cut.baskets),
        **{which: intervals.interval(value, cut.owners) for which, value in values.items()},
        "over_before": intervals.difference(values["after"], values["before"], cut.owners),
        "over_BM25": intervals.difference(values["after"], values["BM25"], cut.owners),
    }


def _of_ranking(ranked: Ints, relevant: Ints, owners: Ints) -> dict[str, Any]:
    """Return what the first ten places tell."""
    return {
        "ndcg@10": intervals.interval(metrics.ndcg(ranked, relevant), owners),
        "recall@10": intervals.interval(metrics.recall(ranked, relevant, metrics.PLACES), owners),
        "mrr@10": intervals.interval(metrics.mrr(ranked, relevant, metrics.PLACES), owners),
    }


def _figures(found: Answered, relevant: Ints, owners: Ints, rows: int) -> dict[str, Any]:
    """Return all metrics of a model's full ranking."""
    return {
        **_of_ranking(found.ranked[:, : metrics.PLACES], relevant, owners),
        "recall@100": intervals.interval(metrics.recall(found.ranked, relevant, RETURNED), owners),
        "mrr": intervals.interval(metrics.mrr_of_places(found.places), owners),
        "auc": intervals.interval(metrics.auc(found.places, relevant, rows), owners),
        "log_loss": intervals.interval(found.log_loss, owners),
    }


def _calibration(held: Answered, validation: Cut, found: Answered, test: Cut) -> dict[str, Any]:
    """Fit probabilities of the first ten places to validation and judge them on test."""
    scores, labels, owners = _first_ten(held, validation)
    if labels.all() or not labels.any():
        return {}
    chosen = calibrate.choose(scores, labels, owners)
    scores, labels, _ = _first_ten(found, test)
    probability = chosen.apply(scores)
    return {
        **chosen.to_json(),
        "calibration_error": round(losses.calibration_error(probability, labels), 5),
        "log_loss": round(float(np.mean(losses.log_loss(probability, labels))), 5),
        "brier": round(float(np.mean(losses.brier(probability, labels))), 5),
        "raw_calibration_error": round(losses.calibration_error(1 / (1 + np.exp(-scores.clip(-60, 60))), labels), 5),
        "reliability": losses.reliability(probability, labels),
    }


def _first_ten(found: Answered, cut: Cut) -> tuple[Scores, npt.NDArray[np.bool_], Ints]:
    """Return scores, whether they were right, and owners of the first ten places of each example, one after the other."""
    rows = found.ranked[:, : metrics.PLACES]
    right = (rows[:, :, None] == cut.relevant[:, None, :]).any(2)
    scores = found.scores[:, : metrics.PLACES].astype(np.float64)
    return scores.ravel(), right.ravel(), np.repeat(cut.owners, rows.shape[1])


def evaluate(
    data: Path, finetuned: Path, base: Path, config: Finetune, profile: Profile, names: tuple[str, ...],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Score every sub-model on the test period: baselines, before fine-tuning and after it; fit and score the fusion.

    Returns:
        By "submodels" each one's record, and the "fusion"'s where there is a search to fuse.
    """
    behaviour = load_behaviour(data)
    vectors = load_vectors(finetuned / "before.safetensors")
    before = build_joint(behaviour, vectors, config, names), vectors
    after = load_joint(behaviour, finetuned, config, names)
    untouched, tokenizer = trunk.load_tower(base)
    tuned, _ = trunk.load_tower(base)
    tuned.load_state_dict(load_file(finetuned / "tower.safetensors"))
    judge = Judge(
        behaviour, config, profile, names, before, after,
        Examples(behaviour, VALIDATION, profile.validation_examples, names),
        Examples(behaviour, TEST, profile.test_examples, names, profile.test_each),
        {"before": (untouched, tokenizer), "after": (tuned, tokenizer)}, progress,
    )  # fmt: skip
    scored = {name: judge.score(name) for name in names}
    record = {"submodels": {name: found for name, (found, _) in scored.items()}}
    products = [name for name in names if submodel.load(name).LEVEL == "product"]
    search = next((name for name in products if submodel.load(name).TASK == "search"), None)
    # a search of the log has no basket that the others could answer to
    if search is not None and len(products) > 1 and search not in judge.test.batches.logged:
        record["fusion"] = judge.fusion(search, [name for name in products if name != search], scored[search][1])
    return record
