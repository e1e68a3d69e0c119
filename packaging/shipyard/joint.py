"""Stage B: tables, user encoder and all heads together, on the tower's cached vectors.

Each head is trained by the softmax over all rows that it ranks (ListNet's top-one form, Cao et al. 2007); a head with a
teacher also learns the teacher's distribution (Hinton et al. 2015).
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import submodel, trunk
from models.behaviour import (
    LEVELS,
    TRAIN,
    VALIDATION,
    Behaviour,
    Floats,
    Ints,
    Level,
    View,
    evenly,
    placing,
)
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from shipyard.train import Progress, Training, by_rate

RATES = {
    "project": 2e-4,
    "identity": 5e-3,
    "bias": 5e-3,
    "repeat": 1e-2,
    "offers": 5e-3,
    "scale": 1e-2,
    "match_scale": 1e-2,
    "exact_scale": 1e-2,
}
"""Learning rates by part of a parameter's name: a table's line sees few gradients, what starts at zero needs large steps."""

RATE = 2e-3

LATE = 120.0
"""Days after which a basket of the train period is drawn 1/e as often: long histories, and the season, are those to come."""


@dataclass(frozen=True)
class Vectors:
    """Vectors by one text tower: of a level's texts [T, W], of queries [P, V, W], V ways to write each path, and of the
    log's searches [Q, W].

    The first way is the path itself, the others are blurred as shoppers write.
    """

    texts: dict[Level, Tensor]
    queries: Tensor
    searches: Tensor


def load_vectors(file: Path) -> Vectors:
    """Read the vectors that fine-tuning wrote."""
    found = load_file(file)
    return Vectors({level: found[level] for level in LEVELS}, found["queries"], found["searches"])


def build_joint(behaviour: Behaviour, vectors: Vectors, config: Finetune, names: Iterable[str]) -> trunk.Joint:
    """Make the untrained joint model: it ranks by the pretrained tower's similarity and knows nothing of behaviour."""
    torch.manual_seed(config.seed)
    shape = trunk.Shape(config.dimension, vectors.queries.shape[2])
    modules = {name: submodel.load(name) for name in names}
    text_of_row: dict[Level, Ints] = {
        "product": behaviour.text_of_row,
        "type": np.arange(len(behaviour.paths)),
        "category": np.arange(len(behaviour.categories)),
    }
    # a level that nobody ranks would only be parameters without gradients; types are matched by search too
    wanted = [level for level in LEVELS if level != "category" or any(level == m.LEVEL for m in modules.values())]
    tables = {
        level: trunk.Table(config.dimension, vectors.texts[level], torch.from_numpy(text_of_row[level]))
        for level in wanted
    }
    return trunk.Joint(
        shape,
        tables,
        {name: module.Head(shape) for name, module in modules.items()},
        {name: module.LEVEL for name, module in modules.items()},
        {name: torch.from_numpy(module.rows(behaviour)) for name, module in modules.items()},
        torch.from_numpy(behaviour.row_of("type")),
    )


class Batches:
    """Cut batches for each sub-model; sub-models that rank the same rows share one view."""

    def __init__(self, behaviour: Behaviour, names: Iterable[str]) -> None:
        self.behaviour = behaviour
        modules = {name: submodel.load(name) for name in names}
        self.levels: dict[str, Level] = {name: module.LEVEL for name, module in modules.items()}
        self.rows = {name: module.rows(behaviour) for name, module in modules.items()}
        # own row of each product, and of each row of the level
        self.place: dict[str, Ints] = {}
        self.place_of_level: dict[str, Ints] = {}
        for name, level in self.levels.items():
            of_product = behaviour.row_of(level)
            self.place_of_level[name] = placing(self.rows[name], len(behaviour.names(level)))
            self.place[name] = self.place_of_level[name][of_product]
        # search learns from a log where there is one
        logged = len(behaviour.searches.of(TRAIN)) > 0
        self.logged = {name for name, module in modules.items() if logged and module.TASK == "search"}

    def views(self, baskets: Ints, queries: Ints, searches: Ints | None = None) -> dict[str, View]:
        """Return the view of each sub-model on the same baskets and queries.

        Those that learn from the log see its `searches`, and have no view without any.
        """
        made: dict[bytes, View] = {}
        views = {}
        for name, place in self.place.items():
            if name in self.logged:
                if searches is not None:
                    views[name] = self.behaviour.log_view(searches, place)
                continue
            key = place.tobytes()
            if key not in made:
                made[key] = self.behaviour.view(baskets, queries, place, offers=self.levels[name] == "product")
            views[name] = made[key]
        return views


def request(view: View, text: Tensor | None, device: torch.device | str = "cpu") -> trunk.Request:
    """Return a view as tensors, with the queries' vectors [B, W], on a device."""
    given = [torch.from_numpy(part).to(device) for part in (view.items, view.features, view.offers, view.strengths)]
    return trunk.Request(given[0], given[1], given[2], given[3], None if text is None else text.to(device))


@dataclass(frozen=True)
class Columns:
    """Rows [C] of a level that a training step looks at, with the logarithm of the weight [C] of each.

    All that a batch names is there with weight 1; the rest is sampled, and each of the sample stands for as many as were
    left out, so that the softmax's sum over the whole level is estimated without bias.
    """

    rows: Ints
    log_weight: Floats

    @classmethod
    def draw(cls, named: Iterable[Ints], size: int, sampled: int, rng: np.random.Generator) -> "Columns":
        """Draw the columns of a level of `size` rows that a batch names in part."""
        known = np.zeros(size + 1, bool)
        for rows in named:
            known[rows] = True
        known[0] = True
        rest = np.flatnonzero(~known)
        known[0] = False
        extra = rng.choice(rest, min(sampled, len(rest)), replace=False)
        rows = np.r_[np.flatnonzero(known), extra]
        weight = np.zeros(len(rows), np.float32)
        if len(extra):
            weight[-len(extra) :] = np.log(len(rest) / len(extra))
        return cls(rows, weight)


class Trainer:
    """The joint model with what one step of its training needs."""

    def __init__(
        self, joint: trunk.Joint, behaviour: Behaviour, vectors: Vectors, weights: Mapping[str, float]
    ) -> None:
        self.joint, self.behaviour, self.vectors, self.weights = joint, behaviour, vectors, weights
        self.device = joint.project.weight.device
        self.batches = Batches(behaviour, weights)
        self.modules = {name: submodel.load(name) for name in weights}
        for name, module in self.modules.items():
            _check_teacher(name, module.TEACHER, self.batches)

    def prepare(self, baskets: Ints, searches: Ints) -> None:
        """Start biases from popularity, and feature scales from some baskets and searches of the train period."""
        views = self.batches.views(baskets, self.behaviour.queries(baskets), searches)
        with torch.no_grad():
            for name, place in self.batches.place.items():
                counts = np.bincount(place, self.behaviour.popularity, len(self.batches.rows[name]) + 1)[1:]
                self.joint.bias[name].copy_(torch.log(torch.from_numpy(counts).float() + 0.5))
                view = views[name]
                if (view.items > 0).sum() > 1:
                    self.joint.head(name).repeat.standardise(torch.from_numpy(view.features[view.items > 0]))

    def draw(self, chosen: Ints, searches: Ints, sampled: int, rng: np.random.Generator) -> tuple[Any, ...]:
        """Cut a batch of baskets and searches of the log: views, queries' vectors and columns of each level."""
        queries = self.behaviour.queries(chosen, rng)
        views = self.batches.views(chosen, queries, searches)
        ways = self.vectors.queries.shape[1]
        # half of the queries are written as the path is
        way = np.where(rng.random(len(chosen)) < 0.5, 0, rng.integers(0, ways, len(chosen)))
        columns = {}
        for level in dict.fromkeys(self.batches.levels.values()):
            size = len(self.behaviour.names(level))
            named = [
                np.r_[0, self.batches.rows[n]][rows]
                for n, view in views.items()
                if self.batches.levels[n] == level
                for rows in (view.items.ravel(), view.bought.ravel())
            ]
            columns[level] = Columns.draw(named, size, sampled if level == "product" else size, rng)
        text = dict.fromkeys(views, self.vectors.queries[queries, way])
        text |= dict.fromkeys(self.batches.logged, self.vectors.searches[searches])
        return views, text, columns

    def losses(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Return the loss of each sub-model on a batch."""
        views, text, columns = batch
        tables = {level: self.joint.table(level, self._given(found.rows)) for level, found in columns.items()}
        logits: dict[str, Tensor] = {}
        kept: dict[str, Ints] = {}
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            view, level = views[name], self.batches.levels[name]
            own = self.batches.place_of_level[name][columns[level].rows]
            kept[name] = np.flatnonzero(own)
            seen = np.zeros(len(self.batches.rows[name]) + 1, np.int64)  # own row -> column, 0 for none
            seen[own[kept[name]]] = np.arange(1, len(kept[name]) + 1)
            some = tables[level][self._given(np.r_[0, kept[name] + 1])]
            weight = self._given(columns[level].log_weight[kept[name]])
            bias = self.joint.bias[name][self._given(own[kept[name]] - 1)]
            baked = self.joint.bake(name, some, bias, self._given(columns[level].rows[kept[name]]))
            offers, strengths = _fewer(seen[view.offers], view.strengths)
            seen_view = replace(view, items=seen[view.items], offers=offers, strengths=strengths)
            asked = request(seen_view, text[name], self.device)
            logits[name] = self.joint(name, baked, asked)
            # a column that was sampled stands for several
            weighted = logits[name] + nn.functional.pad(weight, (1, 0))
            right = self._given(seen[view.answer(module.ANSWER)])
            gains = None if view.gains is None else self._given(view.gains)
            found[name] = listwise(weighted, right, gains) + among_history(logits[name], asked.items, right)
            if module.TEACHER is not None:
                shared = self._given(1 + np.searchsorted(kept[module.TEACHER], kept[name]))
                target = (logits[module.TEACHER].detach()[:, shared] + weight).softmax(1)
                found[name] = found[name] + nn.functional.kl_div(
                    weighted[:, 1:].log_softmax(1), target, reduction="batchmean"
                )
        return found

    def _given(self, array: Ints | Floats) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _fewer(offers: Ints, strengths: Floats) -> tuple[Ints, Floats]:
    """Leave out the offers [B, P] that have no column in this step."""
    given = offers > 0
    width = max(1, int(given.sum(1).max(initial=0)))
    order = np.argsort(~given, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(offers, order, 1), np.take_along_axis(strengths, order[:, :, None], 1)


def _check_teacher(name: str, teacher: str | None, batches: Batches) -> None:
    if teacher is not None and not (
        batches.levels[name] == batches.levels[teacher] and np.isin(batches.rows[name], batches.rows[teacher]).all()
    ):
        raise ShipyardError(
            f"submodel.{name}: ranks rows that its teacher does not", value=teacher, allowed="rows of the teacher",
            mend="narrow its rows, or let it learn without a teacher",
        )  # fmt: skip


def train_joint(
    joint: trunk.Joint,
    behaviour: Behaviour,
    vectors: Vectors,
    config: Finetune,
    profile: Profile,
    weights: Mapping[str, float],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train the joint model in place on baskets of the train period."""
    trainer = Trainer(joint, behaviour, vectors, weights)
    baskets, log = behaviour.baskets(TRAIN, fewest=10), behaviour.searches.of(TRAIN)
    trainer.prepare(evenly(baskets, 512), evenly(log, 512))
    held = evenly(behaviour.spread(VALIDATION, 1), profile.validation_examples)
    asked = evenly(behaviour.searches.of(VALIDATION), profile.validation_examples)
    rng = np.random.default_rng(config.seed)
    parts = max(1, max(len(held), len(asked)) // 128)
    fixed = [
        trainer.draw(part, some, 20_000, rng)
        for part, some in zip(np.array_split(held, parts), np.array_split(asked, parts), strict=True)
    ]

    day = behaviour.day[behaviour.start[baskets]]
    often = np.cumsum(np.exp((day - day.max(initial=0)) / LATE))

    def draw(step: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([config.seed, 2, step])
        # a source may lack one of the two
        size, queries = (profile.joint_batch if len(of) else 0 for of in (baskets, log))
        chosen = baskets[np.searchsorted(often, rng.random(size) * often[-1:].sum(), side="right")]
        some = rng.choice(log, queries)
        return trainer.draw(chosen, some, profile.joint_sampled, rng)

    # the next batch is cut while this one trains
    with ThreadPoolExecutor(1) as ahead:
        waiting: dict[int, Future[tuple[Any, ...]]] = {}

        def loss_of(step: int) -> Tensor:
            batch = waiting.pop(step).result() if step in waiting else draw(step)
            if step + 1 < profile.joint_steps:
                waiting[step + 1] = ahead.submit(draw, step + 1)
            found = trainer.losses(batch)
            return sum((weights[name] * loss for name, loss in found.items()), torch.zeros((), device=trainer.device))

        def validation() -> dict[str, float]:
            parts = [trainer.losses(batch) for batch in fixed]
            return {name: float(np.mean([float(part[name]) for part in parts])) for name in weights}

        training = Training(
            "joint", joint, by_rate(joint, RATES, RATE), profile.joint_steps, loss_of,
            lambda: sum(weights[name] * loss for name, loss in validation().items()),
            # an early stop gives away the slow end of the schedule: validation rises for a while before that
            every=max(1, profile.joint_steps // 10), patience=profile.joint_steps,
        )  # fmt: skip
        record = training.run(out, progress)
    with torch.inference_mode():
        return {**record, "validation_loss": validation()}


class Listwise(torch.autograd.Function):
    """Mean over requests of the mean over right answers, weighted by their gains, of -log softmax.

    Shapes: logits [B, R + 1], relevant [B, K] padded with 0, gains [B, K]. A request without a right answer counts nothing.
    Its own gradient, for the derived one makes three more arrays of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, relevant: Tensor, gains: Tensor) -> Tensor:
        """Return the loss."""
        right = torch.where(relevant != 0, gains, 0.0)
        weight = right / right.sum(1, keepdim=True).clamp(min=1e-9) / (right > 0).any(1).sum().clamp(min=1)
        total = logits.logsumexp(1, keepdim=True)
        ctx.save_for_backward(logits, total, relevant, weight)
        return -((logits.gather(1, relevant) - total) * weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return softmax minus the right answers' shares."""
        logits, total, relevant, weight = ctx.saved_tensors
        grad = torch.sub(logits, total).exp_().mul_(weight.sum(1, keepdim=True))
        return grad.scatter_add_(1, relevant, -weight).mul_(grads[0]), None, None


def among_history(logits: Tensor, items: Tensor, right: Tensor) -> Tensor:
    """Return the same loss over what the shopper had bought before alone.

    Most of a basket's answers are new to the shopper and can hardly be known, most of the first ten places are not: the
    loss over all rows looks at the first, the metric at the second. Shapes: items [B, H], right [B, K], padded with 0.
    """
    candidates = torch.where(items == 0, trunk.PADDING_LOGIT, logits.gather(1, items))
    hit = (items.unsqueeze(2) == right.unsqueeze(1)).any(2) & (items != 0)
    weight = hit / hit.sum(1, keepdim=True).clamp(min=1) / hit.any(1).sum().clamp(min=1)
    return -(candidates.log_softmax(1) * weight).sum()


def listwise(logits: Tensor, relevant: Tensor, gains: Tensor | None = None) -> Tensor:
    """Return the loss of `Listwise`; every right answer gains 1 unless told."""
    worth = torch.ones_like(relevant, dtype=logits.dtype) if gains is None else gains
    loss: Tensor = Listwise.apply(logits, relevant, worth)  # type: ignore[no-untyped-call]
    return loss
