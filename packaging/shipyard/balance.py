"""Balance: scale the terms of each head's score for the metric, on validation, after training.

The softmax over all rows weighs a term by how well it tells all of a basket; nDCG@10 asks for the first ten places alone,
and what a shopper's vector says of thousands of rows is worth less there. A head's score is a sum of terms, so that the
ranking for any factors follows from one pass with each term left out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import trunk
from shipyard.examples import Cut
from shipyard.joint import Vectors, request
from shipyard.metrics import PLACES
from shipyard.train import Progress

FACTORS = (0.03, 0.06, 0.1, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
ROUNDS = 2


def balance(joint: trunk.Joint, cuts: Mapping[str, Cut], vectors: Vectors, progress: Progress) -> dict[str, Any]:
    """Scale the terms of every head in place by the factors that rank its validation examples best.

    Returns:
        By sub-model the factors of its terms, and nDCG@10 on the examples before and after.
    """
    joint.eval()
    record = {}
    for done, (name, cut) in enumerate(cuts.items()):
        progress("balance", done, len(cuts))
        terms = _terms(joint.head(name))
        whole = _logits(joint, cut, vectors)
        parts = {}
        for term, parameters in terms.items():
            kept = [parameter.detach().clone() for parameter in parameters]
            _scale(term, parameters, 0.0)
            parts[term] = whole - _logits(joint, cut, vectors)
            with torch.no_grad():
                for parameter, was in zip(parameters, kept, strict=True):
                    parameter.copy_(was)
        factors = dict.fromkeys(terms, 1.0)
        before = best = _ndcg(whole, cut)
        for _ in range(ROUNDS):
            for term, part in parts.items():
                start = factors[term]
                for factor in FACTORS:
                    value = _ndcg(whole + (factor - start) * part, cut)
                    if value > best:
                        best, factors[term] = value, factor
                whole = whole + (factors[term] - start) * part
        for term, parameters in terms.items():
            _scale(term, parameters, factors[term])
        record[name] = {"factors": factors, "before": round(before, 5), "after": round(best, 5)}
    progress("balance", len(cuts), len(cuts))
    return record


def _terms(head: trunk.Head) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that a term of the score is linear in, by term: logarithms for those named scale."""
    found = {name: [p] for name, p in head.named_parameters() if name.rpartition(".")[2].endswith("scale")}
    return found | {"repeat": list(head.repeat.out.parameters())}


def _scale(term: str, parameters: list[nn.Parameter], factor: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if term == "repeat":
                parameter.mul_(factor)
            else:
                parameter.add_(float(np.log(factor)) if factor > 0 else -30.0)


def _logits(joint: trunk.Joint, cut: Cut, vectors: Vectors) -> Tensor:
    """Return logits [B, R] of a sub-model."""
    text = cut.text(vectors)
    with torch.inference_mode():
        baked = joint.baked(cut.name)
        return torch.cat([joint(cut.name, baked, request(view, text[part]))[:, 1:] for part, view in cut.views()])


def _ndcg(logits: Tensor, cut: Cut) -> float:
    ranked = torch.topk(logits, min(PLACES, logits.shape[1])).indices.numpy() + 1
    return float(np.nanmean(cut.ndcg(ranked)))
