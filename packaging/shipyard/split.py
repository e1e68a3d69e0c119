"""Split: one joint model into stand-alone sub-models whose outputs equal its own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models import submodel, trunk
from models.behaviour import VALIDATION, load_behaviour
from models.config import Finetune
from serve.errors import ShipyardError
from shipyard.evaluate import Examples, load_joint

TOLERANCE = 1e-6


def split(
    data: Path, finetuned: Path, base: Path, config: Finetune, names: tuple[str, ...], name: str, out: Path
) -> dict[str, Any]:
    """Cut the sub-model `name` out of the joint model and check it against that on real examples.

    Writes model.safetensors (the stand-alone parameters) and products.json (the product ids that it ranks; number k
    has row k + 1).

    Returns:
        Parameters of its own, parameters baked from the shared trunk, and the largest difference of a logit.

    Raises:
        ShipyardError: an output differs by more than 1e-6 of the largest logit.
    """
    behaviour = load_behaviour(data)
    joint, _ = load_joint(behaviour, finetuned, config, names)
    tower, tokenizer = trunk.load_tower(base)
    tower.load_state_dict(load_file(finetuned / "tower.safetensors"))
    tower.eval()
    alone = joint.cut(name, tower)
    examples = Examples(behaviour, VALIDATION, 64, (name,))
    view, _, _, queries = examples.of(name)
    tokens = tokenizer([behaviour.paths[q] for q in queries], padding=True, return_tensors="pt")
    given = {
        "query_ids": tokens["input_ids"], "query_mask": tokens["attention_mask"],
        "items": torch.from_numpy(view.items), "features": torch.from_numpy(view.features),
    }  # fmt: skip
    with torch.inference_mode():
        text = tower(given["query_ids"], given["query_mask"])
        table = joint.table(joint.rows[name])
        expected = joint(name, table, joint.bias[name], text, given["items"], given["features"])
        error = float((alone(*(given[i] for i in alone.inputs)) - expected).abs().max() / expected[:, 1:].abs().max())
    if not error <= TOLERANCE:
        raise ShipyardError(
            f"split: {name}: the stand-alone model differs from the joint one",
            value=error,
            allowed=f"{TOLERANCE} or less",
        )
    rows = joint.rows[name].numpy()
    save_file({k: v.contiguous() for k, v in alone.state_dict().items()}, out / "model.safetensors")
    (out / "products.json").write_text(json.dumps(behaviour.product_id[rows].tolist()), encoding="utf-8")
    own = sum(p.numel() for p in alone.head.parameters()) + alone.bias.numel()
    shared = sum(v.numel() for v in alone.state_dict().values()) - own
    return {
        "task": submodel.load(name).TASK,
        "inputs": list(alone.inputs),
        "rows": len(rows),
        "parameters_own": own,
        "parameters_shared": shared,
        "error": error,
    }


def load_alone(folder: Path, base: Path, config: Finetune, name: str) -> trunk.Standalone:
    """Read what `split` wrote into `folder`."""
    state = load_file(folder / "model.safetensors")
    tower, _ = trunk.load_tower(base)
    width = tower.encoder.config.hidden_size
    rows = len(state["bias"])
    head = submodel.load(name).Head(trunk.Shape(config.dimension, rows, 0, width))
    user = trunk.UserEncoder(config.dimension, layers=trunk.USER_LAYERS) if head.uses_user else None
    alone = trunk.Standalone(head, state["vectors"], state["bias"], user, tower if head.uses_text else None)
    alone.load_state_dict(state)
    return alone.eval()
