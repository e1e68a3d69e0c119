"""Fine-tune: the text tower (stage A, `shipyard.tower`), then the joint model over its vectors (stage B, `shipyard.joint`).

Each phase leaves a file, and training leaves checkpoints, so that a run that was killed goes on where it stopped. What
a step draws depends on the seed and the step's number alone.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from models import submodel, trunk
from models.behaviour import TRAIN, VALIDATION, Behaviour, load_behaviour
from models.config import Finetune, Profile
from serve.errors import ShipyardError
from serve.files import sha256_file
from shipyard.balance import balance
from shipyard.examples import Examples
from shipyard.joint import Batches, Vectors, build_joint, load_vectors, train_joint
from shipyard.queries import blur
from shipyard.tower import encode, pretrain, train_tower
from shipyard.train import Progress, device, device_name, peak_memory, save

WAYS = 3
"""Ways to write each query that stage B sees: the path itself, and blurred ones."""


def finetune(
    data: Path,
    base: Path,
    config: Finetune,
    profile: Profile,
    weights: Mapping[str, float],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train on the data stage's output in `data`, from the encoder in the folder `base`, and write into `out`; on the
    GPU where there is one.

    `weights` are the sub-models with their weight in the joint loss. Writes tower.safetensors, joint.safetensors,
    before.safetensors and after.safetensors (vectors by the untouched and by the tuned tower), tokenizer.json.

    Returns:
        The record: that weights moved, that the merge kept the outputs, ranks, losses.

    Raises:
        ShipyardError: training diverged, or the adapter did nothing.
    """
    torch.manual_seed(config.seed)
    weights = _teachers_first(weights)
    behaviour = load_behaviour(data)
    logged = Batches(behaviour, weights).logged
    if weights.keys() - logged and not len(behaviour.baskets(TRAIN, fewest=10)):
        raise ShipyardError(
            f"finetune: nothing for {', '.join(sorted(weights.keys() - logged))} to learn from in the train period",
            value="no purchase after ten events of the same user",
            allowed="purchases; a log of searches is enough for search alone",
            mend="add events (docs/data.md), or remove the sub-models from fleet.toml",
        )  # fmt: skip
    if sole := [name for name in weights if len(submodel.load(name).rows(behaviour)) < 2]:
        raise ShipyardError(
            f"finetune: nothing to choose from for {', '.join(sorted(sole))}", value="one row to rank",
            allowed="items, types or categories: two or more",
            mend="give the items categories (docs/data.md), or remove the sub-models from fleet.toml",
        )  # fmt: skip
    where = device()
    tower, tokenizer = trunk.load_tower(base)
    tower.to(where)
    before = _vectors(out / "before.safetensors", tower, tokenizer, behaviour, 1, progress, "encode, untouched")
    record: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "device": device_name(where),
        **tune_tower(tower, tokenizer, behaviour, config, profile, out, progress),
    }
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    record["tokenizer_sha256"] = sha256_file(out / "tokenizer.json")
    after = _vectors(out / "after.safetensors", tower, tokenizer, behaviour, WAYS, progress, "encode, tuned")

    record["vectors_moved"] = float((after.texts["product"] - before.texts["product"]).norm(dim=1).mean())
    if not record["vectors_moved"] > 1e-4:
        raise ShipyardError(
            f"finetune: {config.method} left the text tower as it was", value=record["vectors_moved"],
            allowed="a mean move of text vectors above 0.0001", mend="raise tower_steps or rank in fleet.toml",
        )  # fmt: skip
    joint = build_joint(behaviour, after, config, tuple(weights)).to(where)
    record["joint"] = train_joint(joint, behaviour, after, config, profile, weights, out, progress)
    record["joint"] |= peak_memory(where)
    # what is chosen and what is judged after this is the same wherever it was trained
    joint.cpu()
    held = Examples(behaviour, VALIDATION, profile.validation_examples, tuple(weights))
    record["balance"] = balance(joint, {name: held.of(name) for name in weights}, after, progress)
    save(out / "joint.safetensors", joint.state_dict())
    (out / "joint.checkpoint.pt").unlink(missing_ok=True)
    record["parts"] = parts(joint, out)
    return record


def parts(joint: trunk.Joint, out: Path) -> dict[str, str]:
    """Return the digest of the trunk, and of what is each sub-model's own: its head and its bias."""
    found = {"trunk": [sha256_file(out / "tower.safetensors"), sha256_file(out / "after.safetensors")]}
    found |= {name: [] for name in joint.heads}
    for name, tensor in sorted(joint.state_dict().items()):
        kind, *rest = name.split(".")
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        found[rest[0] if kind in ("heads", "bias") else "trunk"].append(f"{name} {digest}")
    return {part: hashlib.sha256("\n".join(lines).encode()).hexdigest() for part, lines in found.items()}


def tune_tower(
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    config: Finetune,
    profile: Profile,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Run stage A in place, or read what an earlier run of it left in `out`; return its records by phase."""
    phases = {"mlm": pretrain, "tower": train_tower} if profile.mlm_steps else {"tower": train_tower}
    record: dict[str, Any] = {}
    for name, phase in phases.items():
        weights, told = out / f"{name}.safetensors", out / f"{name}.json"
        if not weights.exists():
            found = phase(tower, tokenizer, behaviour, config, profile, out, progress)
            found |= peak_memory(tower.device)
            _write_atomically(told, json.dumps(found))
            save(weights, tower.state_dict())
            (out / f"{name}.checkpoint.pt").unlink(missing_ok=True)
        tower.load_state_dict(load_file(weights))
        record[name] = json.loads(told.read_text())
    (out / "mlm.safetensors").unlink(missing_ok=True)
    tower.eval().requires_grad_(False)
    return record


def _teachers_first(weights: Mapping[str, float]) -> dict[str, float]:
    """Order sub-models so that a teacher comes before those that learn from it."""
    teachers = {name: submodel.load(name).TEACHER for name in weights}
    for name, teacher in teachers.items():
        if teacher is not None and teachers.get(teacher, teacher) is not None:
            raise ShipyardError(
                f"submodel.{name}: cannot learn from its teacher", value=teacher,
                allowed="a sub-model of the fleet that has no teacher itself", mend=f"add [submodel.{teacher}]",
            )  # fmt: skip
    return {name: weights[name] for name in sorted(weights, key=lambda name: teachers[name] is not None)}


def _vectors(
    file: Path,
    tower: trunk.TextTower,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    ways: int,
    progress: Progress,
    what: str,
) -> Vectors:
    """Encode the texts of all levels and the queries, or read them where an earlier run has."""
    if not file.exists():
        rng = np.random.default_rng(0)
        parts = {"product": behaviour.texts, "type": behaviour.paths, "category": behaviour.categories}
        queries = [[path, *(blur(path, rng) for _ in range(ways - 1))] for path in behaviour.paths]
        texts = [text for part in parts.values() for text in part] + [text for some in queries for text in some]
        searches = behaviour.searches.text
        found = encode(tower, tokenizer, [*texts, *searches], progress, what)
        sizes = [*map(len, parts.values()), len(queries) * ways, len(searches)]
        *levels, asked, logged = torch.split(found, sizes)
        asked = asked.reshape(len(queries), ways, -1)
        save(file, {**dict(zip(parts, levels, strict=True)), "queries": asked, "searches": logged})
    return load_vectors(file)


def _write_atomically(file: Path, text: str) -> None:
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    file.with_suffix(".tmp").replace(file)
