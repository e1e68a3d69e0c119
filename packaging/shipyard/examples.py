"""Examples that models are judged on, and what a model says to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import submodel, trunk
from models.behaviour import Behaviour, Floats, Ints, View, evenly
from models.config import Finetune
from serve.errors import ShipyardError
from shipyard import losses, metrics
from shipyard.joint import Batches, Vectors, build_joint, load_vectors, request

RETURNED = 100
"""Rows that a sub-model returns for each request."""

BATCH = 128

Scores = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


class Examples:
    """The examples of one period, cut for each sub-model, at most `each` baskets of a user.

    Those without a right answer are left out; of the rest at most `most` are taken, spread over all.
    """

    def __init__(self, behaviour: Behaviour, period: int, most: int, names: tuple[str, ...], each: int = 1) -> None:
        self.behaviour, self.most = behaviour, most
        self.baskets = behaviour.spread(period, each)
        self.queries = behaviour.queries(self.baskets)
        self.searches = behaviour.searches.of(period)
        self.batches = Batches(behaviour, names)

    def of(self, name: str) -> "Cut":
        """Return the examples of a sub-model: searches of the log for one that learns from it, baskets for the others."""
        kind, place = submodel.load(name).ANSWER, self.batches.place[name]
        logged, gains = name in self.batches.logged, None
        if logged:
            baskets, queries = np.full(len(self.searches), -1), self.searches
            right, gains = self.behaviour.log_answers(queries, place)
        else:
            baskets, queries = self.baskets, self.queries
            right = self.behaviour.answers(baskets, queries, place, kind)
        answered = np.flatnonzero((right > 0).any(1))
        if len(answered) < 20:
            raise ShipyardError(
                f"evaluate: {name}: too few examples with a right answer", value=len(answered), allowed="20 or more",
                mend="raise households or test_examples of the profile in fleet.toml",
            )  # fmt: skip
        answered = evenly(answered, self.most)
        worth = None if gains is None else gains[answered]
        return Cut(self.behaviour, self.batches, name, baskets[answered], queries[answered], right[answered], worth)


@dataclass(frozen=True)
class Cut:
    """Examples of one sub-model: `baskets` [B], the paths `queries` [B] that are asked for, and the right answers
    `relevant` [B, K] in the sub-model's rows, padded with 0.

    Those of a log have no baskets (-1), their `queries` are searches, and their answers have `gains` [B, K].
    """

    behaviour: Behaviour
    batches: Batches
    name: str
    baskets: Ints
    queries: Ints
    relevant: Ints
    gains: Floats | None = None

    @property
    def logged(self) -> bool:
        """Whether the examples are of the log."""
        return self.gains is not None

    def take(self, which: Ints) -> "Cut":
        """Return some of the examples."""
        gains = None if self.gains is None else self.gains[which]
        return replace(
            self, baskets=self.baskets[which], queries=self.queries[which], relevant=self.relevant[which], gains=gains
        )

    @cached_property
    def words(self) -> list[str]:
        """The queries [B] as they are written."""
        texts = self.behaviour.searches.text if self.logged else self.behaviour.paths
        return [texts[query] for query in self.queries]

    def text(self, vectors: Vectors) -> Tensor:
        """Return the queries' vectors [B, W]."""
        return vectors.searches[self.queries] if self.logged else vectors.queries[self.queries, 0]

    def ndcg(self, ranked: Ints) -> Scores:
        """Return nDCG@10 [B] of ranked rows [B, 10 or more]."""
        return metrics.ndcg(ranked, self.relevant, gains=self.gains)

    def views(self, size: int = BATCH) -> "list[tuple[slice, View]]":
        """Return the examples in blocks, with where each lies."""
        return [(part, self.view(part)) for part in _parts(len(self.baskets), size)]

    def view(self, part: slice) -> View:
        """Return some of the examples."""
        level = self.batches.levels[self.name]
        if self.logged:
            return self.behaviour.log_view(self.queries[part], self.batches.place[self.name])
        return self.behaviour.view(
            self.baskets[part], self.queries[part], self.batches.place[self.name], offers=level == "product"
        )

    @cached_property
    def owners(self) -> Ints:
        """The users [B]; each search of a log stands for itself."""
        return self.queries if self.logged else self.behaviour.owner(self.baskets)

    @property
    def rows(self) -> int:
        """Number of rows that are ranked."""
        return len(self.batches.rows[self.name])


def _parts(n: int, size: int) -> list[slice]:
    return [slice(k, min(k + size, n)) for k in range(0, n, size)]


@dataclass(frozen=True)
class Answered:
    """What a model says to examples: rows [B, 100] with their scores, and for the full ranking the places [B, K] of the
    right answers, their log loss [B] and, where they were asked for, all scores [B, R]."""

    ranked: Ints
    scores: Logits
    places: Scores
    log_loss: Scores
    logits: Logits | None


def answer(
    joint: trunk.Joint, cut: Cut, text: Tensor, report: Callable[[int], None] = lambda done: None, *, full: bool = True,
    keep: bool = False, among: Ints | None = None,
) -> Answered:  # fmt: skip
    """Let the joint model answer examples whose queries' vectors are `text` [B, W].

    Without `full` there is the ranking alone, which may be narrowed to the rows `among` and then tells places in them.
    """
    joint.eval()
    ranked, scores, places, loss, logits = [], [], [], [], []
    relevant = cut.relevant
    with torch.inference_mode():
        baked = joint.baked(cut.name)
        for part, view in cut.views():
            found: Logits = joint(cut.name, baked, request(view, text[part])).numpy()
            if among is not None:
                found = found[:, np.r_[0, among]]
            rows = metrics.top(found, RETURNED)
            ranked.append(rows)
            scores.append(np.take_along_axis(found, rows, 1))
            if full:
                places.append(metrics.places(found, relevant[part]))
                loss.append(losses.softmax_log_loss(found, relevant[part]))
            if keep:
                logits.append(found[:, 1:])
            report(part.stop)
    none = np.zeros(0)
    return Answered(
        np.concatenate(ranked), np.concatenate(scores), np.concatenate(places) if full else none,
        np.concatenate(loss) if full else none, np.concatenate(logits) if keep else None,
    )  # fmt: skip


def load_joint(
    behaviour: Behaviour, folder: Path, config: Finetune, names: tuple[str, ...]
) -> tuple[trunk.Joint, Vectors]:
    """Read the fine-tuned joint model and its text vectors."""
    vectors = load_vectors(folder / "after.safetensors")
    joint = build_joint(behaviour, vectors, config, names)
    joint.load_state_dict(load_file(folder / "joint.safetensors"))
    joint.eval()
    return joint, vectors
