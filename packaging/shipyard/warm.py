"""Warm: go on from an earlier model with the purchases that are new since, so that little of it changes.

The trunk and all heads are held, and so is every row but those that were bought often enough in the new days to tell
anything of them: of these the vectors and popularities learn. What the store sells for the first time begins with its text
and its popularity. All other rows are the same bits as before, so that a device's update is a small delta.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import submodel, trunk
from models.behaviour import LEVELS, TRAIN, VALIDATION, Behaviour, Flags, Ints, evenly, load_behaviour
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from shipyard import intervals
from shipyard.examples import Examples, answer
from shipyard.finetune import WAYS, parts
from shipyard.joint import RATE, Trainer, Vectors, build_joint, load_vectors
from shipyard.queries import blur
from shipyard.tower import encode
from shipyard.train import Progress, Training, save

BATCH = 64

MOST_LOSS = 0.01
"""The largest part of its nDCG@10 on validation that an update may cost a sub-model, by the 95 % interval's better end: what
is sure is refused here, and the release's gates ask for the rest."""


@dataclass(frozen=True)
class Earlier:
    """The model to go on from: the folders of its data stage and of its training."""

    data: Path
    finetuned: Path


def warm(
    earlier: Earlier, data: Path, base: Path, config: Finetune, profile: Profile, weights: Mapping[str, float], out: Path,
    progress: Progress, *, steps: int, often: int,
) -> dict[str, Any]:  # fmt: skip
    """Learn from the baskets of `data` that are later than those of the earlier model; write what fine-tuning writes.

    A row learns where it was bought at least `often` times in them; `steps` are optimiser steps, at most.

    Returns:
        The record: baskets that were new, rows that learned, losses, and by how much nDCG@10 moved on validation.

    Raises:
        ShipyardError: no basket is new, the earlier model is of another shape, or the update makes a sub-model worse.
    """
    behaviour, known = load_behaviour(data), load_behaviour(earlier.data)
    # a teacher's scores are there before its student's
    weights = {n: weights[n] for n in sorted(weights, key=lambda name: submodel.load(name).TEACHER is not None)}
    baskets = behaviour.baskets(TRAIN, fewest=10)
    day = behaviour.day[behaviour.start[baskets]]
    last = known.day[known.start[known.baskets(TRAIN, fewest=10)]].max(initial=-np.inf)
    fresh = baskets[day > last]
    if not len(fresh):
        raise ShipyardError(
            "warm: no basket of the train period is later than those of the earlier model", value=f"day {last:.1f}",
            mend="move valid_from and test_from of fleet.toml on",
        )  # fmt: skip
    vectors = _carry_texts(earlier.finetuned, known, behaviour, base, out, progress)
    joint = build_joint(behaviour, vectors, config, tuple(weights))
    trainer = Trainer(joint, behaviour, vectors, weights)
    log = behaviour.searches.of(TRAIN)
    trainer.prepare(evenly(baskets, 512), evenly(log, 512))
    state = load_file(earlier.finetuned / "joint.safetensors")
    _carry_rows(joint, state, Trainer(joint, known, vectors, weights).batches.rows, known, behaviour)
    examples = Examples(behaviour, VALIDATION, profile.validation_examples, tuple(weights))
    before = _ndcg(trainer, examples)
    learning = _hold(trainer, fresh, often)
    held = evenly(behaviour.spread(VALIDATION, 1), profile.validation_examples)
    asked = evenly(behaviour.searches.of(VALIDATION), profile.validation_examples)
    count, rng = max(1, max(len(held), len(asked)) // 128), np.random.default_rng(config.seed)
    fixed = [
        trainer.draw(part, some, 20_000, rng)
        for part, some in zip(np.array_split(held, count), np.array_split(asked, count), strict=True)
    ]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, 4, step])
        some = rng.choice(log, BATCH if len(log) else 0)
        batch = trainer.draw(rng.choice(fresh, BATCH), some, profile.joint_sampled, rng)
        return sum((weights[name] * loss for name, loss in trainer.losses(batch).items()), torch.zeros(()))

    def validate() -> float:
        return float(np.mean([sum(float(loss) for loss in trainer.losses(batch).values()) for batch in fixed]))

    groups = [{"params": [parameter for parameter in joint.parameters() if parameter.requires_grad], "lr": RATE}]
    training = Training("warm", joint, groups, steps, loss_of, validate, every=max(1, steps // 4), weight_decay=0.0)
    record = training.run(out, progress)
    (out / "warm.checkpoint.pt").unlink(missing_ok=True)
    after = _ndcg(trainer, examples)
    moved = {
        name: intervals.difference(after[name], before[name], examples.of(name).owners) for name in trainer.weights
    }  # fmt: skip
    for name, found in moved.items():
        if not found["high"] >= -MOST_LOSS * before[name].mean():
            raise ShipyardError(
                f"warm: {name}: the update costs nDCG@10 on validation",
                value=f"{before[name].mean():.4f} to {after[name].mean():.4f}", allowed=f"{MOST_LOSS:.0%} of it at most",
                mend="take fewer steps, or train anew: shipyard release",
            )  # fmt: skip
    save(out / "joint.safetensors", joint.state_dict())
    return {
        "warm": {**record, "baskets": len(fresh), "rows": learning, "moved": moved},
        "parts": parts(joint, out),
    }


def _hold(trainer: Trainer, fresh: Ints, often: int) -> dict[str, int]:
    """Hold everything but the rows that were bought `often` in these baskets; return how many learn, by sub-model."""
    joint, behaviour = trainer.joint, trainer.behaviour
    lines = np.concatenate([np.arange(behaviour.start[b], behaviour.start[b + 1]) for b in fresh.tolist()])
    bought = behaviour.row[lines][behaviour.bought[lines]]
    joint.requires_grad_(False)
    told: dict[str, Flags] = {}
    for level in dict.fromkeys(trainer.batches.levels.values()):
        of_level = behaviour.row_of(level)
        told[level] = np.bincount(of_level[bought], minlength=len(behaviour.names(level)) + 1) >= often
        told[level][0] = False
    table = joint.tables["of_product"]
    assert isinstance(table, trunk.Table)
    identity = table.identity.weight
    learning = {}
    masks = [(identity, torch.from_numpy(told["product"])[:, None])] if "product" in told else []
    for name, rows in trainer.batches.rows.items():
        own = told[trainer.batches.levels[name]][rows]
        learning[name] = int(own.sum())
        masks.append((joint.bias[name], torch.from_numpy(own)))
    for parameter, mask in masks:
        parameter.requires_grad_(True)
        # without decay, a row that never has a gradient stays the same bits
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)  # type: ignore[no-untyped-call]
    return learning


def _carry_rows(
    joint: trunk.Joint, state: dict[str, Tensor], old_rows: Mapping[str, Ints], known: Behaviour, behaviour: Behaviour
) -> None:
    """Take an earlier model's parameters over, those of rows by the rows' names; new rows keep what they began with."""
    fresh = joint.state_dict()
    if fresh.keys() != state.keys():
        odd = sorted(fresh.keys() ^ state.keys())[0]
        raise ShipyardError(
            "warm: the earlier model has other parts than fleet.toml wants", value=odd,
            allowed="the same sub-models", mend="train anew: shipyard release",
        )  # fmt: skip
    for level in LEVELS:
        if (key := f"tables.of_{level}.identity.weight") in state:
            ours, theirs = _shared(behaviour.names(level), known.names(level))
            carried = fresh[key].clone()
            carried[ours + 1] = state[key][theirs + 1]
            state[key] = carried
    for name, level in joint.levels.items():
        new, old = joint.rows[name].numpy() - 1, old_rows[name] - 1
        ours, theirs = _shared(
            [behaviour.names(level)[row] for row in new.tolist()], [known.names(level)[row] for row in old.tolist()]
        )
        carried = fresh[f"bias.{name}"].clone()
        carried[ours] = state[f"bias.{name}"][theirs]
        state[f"bias.{name}"] = carried
    try:
        joint.load_state_dict(state)
    except RuntimeError as fault:
        raise ShipyardError(
            f"warm: the earlier model is of another shape: {str(fault)[:200]}", mend="train anew: shipyard release"
        ) from None


def _shared(ours: list[Any], theirs: list[Any]) -> tuple[Ints, Ints]:
    """Return where in two lists the names that both have lie."""
    place = {name: k for k, name in enumerate(theirs)}
    found = [(k, place[name]) for k, name in enumerate(ours) if name in place]
    return np.array([k for k, _ in found], np.int64), np.array([k for _, k in found], np.int64)


def _carry_texts(
    finetuned: Path, known: Behaviour, behaviour: Behaviour, base: Path, out: Path, progress: Progress
) -> Vectors:
    """Write the vectors of all texts by the held towers; those that the earlier model had are the same bits."""
    for file in ("tower.safetensors", "tokenizer.json"):
        shutil.copy(finetuned / file, out / file)
    for kind, ways in (("before", 1), ("after", WAYS)):
        old = load_file(finetuned / f"{kind}.safetensors")
        lists = {
            "product": (known.texts, behaviour.texts), "type": (known.paths, behaviour.paths),
            "category": (known.categories, behaviour.categories), "queries": (known.paths, behaviour.paths),
            "searches": (known.searches.text, behaviour.searches.text),
        }  # fmt: skip
        missing = {name: sorted({*new} - {*had}) for name, (had, new) in lists.items()}
        rng = np.random.default_rng(0)
        written = {
            name: [
                [text, *(blur(text, rng) for _ in range(ways - 1))] if name == "queries" else [text] for text in texts
            ]
            for name, texts in missing.items()
        }
        flat = [text for some in written.values() for each in some for text in each]
        found = torch.zeros(0)
        if flat:
            tower, tokenizer = trunk.load_tower(base)
            if kind == "after":
                tower.load_state_dict(load_file(finetuned / "tower.safetensors"))
            found = encode(tower.eval(), tokenizer, flat, progress, f"encode what is new, {kind}")
        vectors, at = {}, 0
        for name, (had, new) in lists.items():
            size = sum(map(len, written[name]))
            fresh, at = found[at : at + size], at + size
            if len(fresh):
                fresh = fresh.reshape(len(written[name]), *old[name].shape[1:])
            place = {text: k for k, text in enumerate([*had, *missing[name]])}
            pool = torch.cat([old[name], fresh]) if len(fresh) else old[name]
            vectors[name] = pool[torch.tensor([place[text] for text in new], dtype=torch.long)]
        save(out / f"{kind}.safetensors", vectors)
    return load_vectors(out / "after.safetensors")


def _ndcg(trainer: Trainer, examples: Examples) -> dict[str, npt.NDArray[np.float64]]:
    """Return nDCG@10 [B] of each sub-model on its validation examples."""
    found = {}
    for name in trainer.weights:
        cut = examples.of(name)
        found[name] = cut.ndcg(answer(trainer.joint, cut, cut.text(trainer.vectors), full=False).ranked)
    return found
