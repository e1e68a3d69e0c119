"""Balance: scale the terms of each head's score for the metric, on validation, after training.

The softmax over all rows weighs a term by how well it tells all of a basket; nDCG@10 asks for the first ten places alone, and
what a shopper's vector says of thousands of rows is worth less there. A head's score is a sum of terms, so that the
ranking for any factors follows from one pass with each term left out.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import submodel, trunk
from models.behaviour import Ints
from shipyard import metrics
from shipyard.joint import Batches, Vectors, request
from shipyard.train import Progress

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
ROUNDS = 2
PLACES = 10


def balance(
    joint: trunk.Joint, batches: Batches, vectors: Vectors, baskets: Ints, progress: Progress
) -> dict[str, Any]:
    """Scale the terms of every head in place by the factors that rank validation `baskets` [B] best.

    Returns:
        By sub-model the factors of its terms, and nDCG@10 on `baskets` before and after.
    """
    joint.eval()
    queries = batches.behaviour.queries(baskets)
    record = {}
    for done, name in enumerate(batches.rows):
        progress("balance", done, len(batches.rows))
        terms = _terms(joint.head(name))
        whole, right = _logits(joint, batches, vectors, name, baskets, queries)
        parts = {}
        for term, parameters in terms.items():
            kept = [parameter.detach().clone() for parameter in parameters]
            _scale(term, parameters, 0.0)
            parts[term] = whole - _logits(joint, batches, vectors, name, baskets, queries)[0]
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        factors = dict.fromkeys(terms, 1.0)
        before = best = _ndcg(whole, right)
        for _ in range(ROUNDS):
            for term, part in parts.items():
                start = factors[term]
                for factor in FACTORS:
                    value = _ndcg(whole + (factor - start) * part, right)
                    if value > best:
                        best, factors[term] = value, factor
                whole = whole + (factors[term] - start) * part
        for term, parameters in terms.items():
            _scale(term, parameters, factors[term])
        record[name] = {"factors": factors, "before": round(before, 5), "after": round(best, 5)}
    progress("balance", len(batches.rows), len(batches.rows))
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


def _logits(
    joint: trunk.Joint, batches: Batches, vectors: Vectors, name: str, baskets: Ints, queries: Ints
) -> tuple[Tensor, Ints]:
    """Return logits [B, R] of a sub-model and the right answers [B, K]."""
    level, kind, place = batches.levels[name], submodel.load(name).ANSWER, batches.place[name]
    found = []
    with torch.inference_mode():
        baked = joint.baked(name)
        for k in range(0, len(baskets), 128):
            part = slice(k, k + 128)
            view = batches.behaviour.view(baskets[part], queries[part], place, offers=level == "product")
            found.append(joint(name, baked, request(view, vectors.queries[queries[part], 0]))[:, 1:])
    return torch.cat(found), batches.behaviour.answers(baskets, queries, place, kind)


def _ndcg(logits: Tensor, right: Ints) -> float:
    ranked = torch.topk(logits, min(PLACES, logits.shape[1])).indices.numpy() + 1
    return float(np.nanmean(metrics.ndcg(ranked, right)))
