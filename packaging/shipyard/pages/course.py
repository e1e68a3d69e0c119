"""The part of a page on a training: learning curves, costs, AdaLoRA's ranks, the balance of terms."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from shipyard.pages import plots
from shipyard.pages.page import Html, figure, grid, number, paragraph, table, whole
from shipyard.pages.plots import Kind, Series, finite

PHASES = {
    "mlm": ("Masked words", "cross entropy, nats", "Fills in hidden words of product texts and baskets."),
    "tower": ("Text tower", "contrastive loss", "A query finds its product among the batch's. Validation's batches are "
              "larger, which makes its loss higher: look at the course of each curve."),
    "joint": ("Joint model", "weighted sum of losses", "All sub-models at once. Training and validation sample products "
              "in different numbers: look at the course of each curve."),
}  # fmt: skip


def learning(record: Mapping[str, Any], kind: Kind = "model", label: str = "validation") -> list[Series]:
    """Return the curves of a phase of training: the loss of the steps, and validation's with its best step."""
    curve, steps = [finite(v) for v in record.get("curve") or ()], finite(record.get("steps")) or 0
    found = []
    if curve and steps:
        middles = [float(part.mean()) for part in np.array_split(np.arange(1, int(steps) + 1), len(curve)) if len(part)]
        points = [(x, y) for x, y in zip(middles, curve, strict=False) if y is not None]
        found.append(Series("training", "before", points, dots=False))
    validation = [(finite(step), finite(value)) for step, value in record.get("validation_curve") or ()]
    start = finite(record.get("validation_before"))
    points = [] if start is None else [(0.0, start)]
    points += [(step, value) for step, value in validation if step is not None and value is not None]
    best = next((point for point in points if point[0] == record.get("best_step")), None)
    return [*found, Series(label, kind, points, best)]


def training(record: Mapping[str, Any]) -> str:
    """Return curves and tables of all phases of a training."""
    figures, rows = [], []
    for phase, (title, axis, caption) in PHASES.items():
        found = record.get(phase)
        if not found:
            continue
        best, steps = whole(found.get("best_step")), whole(found.get("steps"))
        # AdaLoRA's ranks belong to its last step
        last = phase == "tower" and record.get("method") == "adalora"
        at = f"The ring marks the best step, {best} of {steps}" + (
            "; the last is kept." if last else ", which is kept."
        )
        alt = f"{title}: {axis} by step; best on validation at step {best} of {steps}."
        figures.append(
            figure(title, plots.curves(f"curve-{phase}", alt, learning(found), axis=axis), f"{at} {caption}")
        )
        before, after = found.get("validation_before"), found.get("validation_after")
        curve = [point[1] for point in found.get("validation_curve") or ()]
        rows.append([
            title, f"{steps} of {whole(found.get('steps_most'))}", best,
            f"{number(found.get('loss_first'))} → {number(found.get('loss_last'))}",
            f"{number(curve[0] if before is None and curve else before)} → "
            f"{number(min(curve) if after is None and curve else after)}",
            whole(found.get("parameters_trained")), number(found.get("seconds"), ".0f"),
            whole(found.get("memory_mb")) + (f" + {whole(card)} on the GPU" if (card := found.get("gpu_memory_mb")) else ""),
        ])  # fmt: skip
    tower, moved = record.get("tower") or {}, []
    if isinstance(record.get("device"), str):
        moved.append(f"trained on {record['device']}")
    if finite(tower.get("weights_moved")) is not None:
        moved.append(f"trained parameters moved by {number(tower['weights_moved'], '.2f')} (Euclidean norm)")
    if finite(record.get("vectors_moved")) is not None:
        moved.append(f"the products' text vectors by {number(record['vectors_moved'], '.2f')} on average")
    if finite(tower.get("merge_error")) is not None:
        moved.append(f"merging the adapter changed outputs by {number(tower['merge_error'], '.0e')} at most")
    text = "; ".join(moved)
    joint = (record.get("joint") or {}).get("validation_loss") or {}
    return (
        grid(*figures, table("Validation loss of each sub-model at the end of joint training.", ("sub-model", "loss"),
                             [[name, number(loss)] for name, loss in joint.items()]))
        + table("Phases of training. Loss is the mean of the first and of the last tenth of the steps; memory the process's "
                "peak up to then.", ("phase", "steps", "best step", "training loss", "validation loss",
                                     "parameters trained", "seconds", "peak MB"), rows)
        + paragraph(f"{text[:1].upper()}{text[1:]}." if text else "")
        + ranks_kept(tower.get("ranks") or {})
        + _balance(record.get("balance") or {})
    )  # fmt: skip


def _balance(record: Mapping[str, Any]) -> Html:
    """Return by what each head's terms were scaled after training."""
    rows = [
        [name, ", ".join(f"{term} {number(factor, '.2f')}" for term, factor in (found.get("factors") or {}).items()),
         number(found.get("before")), number(found.get("after"))]
        for name, found in record.items()
    ]  # fmt: skip
    caption = (
        "Terms of each head, scaled after training for nDCG@10 on validation, which is also where they are chosen."
    )
    return table(caption, ("sub-model", "factors", "before", "after"), rows, (0, 1))


def ranks_kept(ranks: Mapping[str, Any]) -> Html:
    """Return AdaLoRA's ranks as a table of modules by layers."""
    parsed = {name: re.search(r"layer\.(\d+)\.(.+?)(?:\.lora_\w+)?$", name) for name in ranks}
    if not ranks or not all(parsed.values()):
        return table(
            "Ranks that AdaLoRA kept.", ("module", "rank"), [[name, whole(rank)] for name, rank in ranks.items()]
        )
    cells = {(found[2], int(found[1])): ranks[name] for name, found in parsed.items() if found}
    layers = sorted({layer for _, layer in cells})
    rows = [
        [module, *(whole(cells.get((module, layer))) for layer in layers)]
        for module in dict.fromkeys(module for module, _ in cells)
    ]
    return table("Ranks that AdaLoRA kept, by layer of the encoder.", ("module", *map(str, layers)), rows)
