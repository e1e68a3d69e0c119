"""Split: one joint model into stand-alone sub-models whose outputs equal its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from models import submodel, trunk
from models.behaviour import VALIDATION, load_behaviour
from models.config import Finetune
from serve.errors import ShipyardError
from shipyard.examples import Examples, load_joint
from shipyard.joint import request
from shipyard.tower import tokenise

TOLERANCE = 1e-6
REQUEST = ("items", "features", "offers", "strengths")


def split(
    data: Path, finetuned: Path, base: Path, config: Finetune, names: tuple[str, ...], name: str, out: Path
) -> dict[str, Any]:
    """Cut the sub-model `name` out of the joint model and check it against that on real examples.

    Writes model.safetensors (the stand-alone parameters) and catalogue.json: the ids of the "products" that a history may
    name; their "rows" and what each row is called ("answers"), null where product k is row k + 1 and its own answer.

    Returns:
        Parameters and bytes of its own and of the shared trunk, and the largest difference of a logit.

    Raises:
        ShipyardError: an output differs by more than 1e-6 of the largest logit.
    """
    behaviour = load_behaviour(data)
    joint, _ = load_joint(behaviour, finetuned, config, names)
    tower, tokenizer = trunk.load_tower(base)
    tower.load_state_dict(load_file(finetuned / "tower.safetensors"))
    tower.eval()
    alone = joint.cut(name, tower)
    examples = Examples(behaviour, VALIDATION, 64, (name,)).of(name)
    view = examples.view(slice(None))
    query_ids, query_mask = tokenise(tokenizer, examples.words)
    with torch.inference_mode():
        asked = request(view, tower(query_ids, query_mask))
        given = {"query_ids": query_ids, "query_mask": query_mask, **{i: getattr(asked, i) for i in REQUEST}}
        expected = joint(name, joint.baked(name), asked)
        error = float((alone(*(given[i] for i in alone.inputs)) - expected).abs().max() / expected[:, 1:].abs().max())
    if not error <= TOLERANCE:
        raise ShipyardError(
            f"split: {name}: the stand-alone model differs from the joint one",
            value=error,
            allowed=f"{TOLERANCE} or less",
        )
    rows = joint.rows[name].numpy()
    level = joint.levels[name]
    names_of_level = behaviour.names(level)
    # the row of each product that a history may name, and what each row is called
    place = examples.batches.place[name][1:]
    known = np.flatnonzero(place)
    catalogue = {
        "products": [behaviour.item[k] for k in known.tolist()],
        "rows": None if level == "product" else place[known].tolist(),
        "answers": None if level == "product" else [names_of_level[row - 1] for row in rows.tolist()],
    }
    save_file({k: v.contiguous() for k, v in alone.state_dict().items()}, out / "model.safetensors")
    (out / "catalogue.json").write_text(json.dumps(catalogue, ensure_ascii=False), encoding="utf-8")
    own, shared = _sizes(alone)
    return {
        "task": submodel.load(name).TASK,
        "level": level,
        "inputs": list(alone.inputs),
        "rows": len(rows),
        "parameters_own": own[0],
        "parameters_shared": shared[0],
        "bytes_own": own[1],
        "bytes_shared": shared[1],
        "error": error,
    }


def _sizes(alone: trunk.Standalone) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return numbers and bytes of what is the sub-model's own (head and bias), and of what it has of the trunk."""
    own: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    for name, tensor in alone.state_dict().items():
        (own if name.startswith("head.") or name == "bias" else shared).append(tensor)
    return (
        (sum(t.numel() for t in own), sum(t.nbytes for t in own)),
        (sum(t.numel() for t in shared), sum(t.nbytes for t in shared)),
    )


def load_alone(folder: Path, base: Path, config: Finetune, name: str) -> trunk.Standalone:
    """Read what `split` wrote into `folder`."""
    state = load_file(folder / "model.safetensors")
    tower, _ = trunk.load_tower(base)
    width = tower.encoder.config.hidden_size
    head = submodel.load(name).Head(trunk.Shape(config.dimension, width))
    user = trunk.UserEncoder(config.dimension, layers=trunk.USER_LAYERS) if head.uses_user else None
    baked = trunk.Baked(state["vectors"], state["bias"], state.get("types"), state.get("type_of_row"))
    alone = trunk.Standalone(head, baked, user, tower if head.uses_text else None)
    alone.load_state_dict(state)
    return alone.eval()
