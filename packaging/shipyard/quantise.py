"""Quantise: the form that a target serves, chosen from a small grid, each held to the loss of the metric and to rank.

Of the forms that hold, the smallest is taken, of equally small ones the first in the grid. Latency is recorded and decides
nothing: a clock would choose otherwise on another day, and the same inputs would have another bundle. The grid's other forms
stay in the record with their figures.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from models import trunk
from models.behaviour import VALIDATION, load_behaviour
from models.config import Target
from serve.engine import machine
from serve.errors import ShipyardError
from shipyard.examples import Examples
from shipyard.export import Requests, check_graph, check_outputs, open_session, requests, run, score_onnx, trim
from shipyard.forms import FORMS, FP32, TABLES, Form, write_form
from shipyard.gates import LEAST_ORDER
from shipyard.metrics import PLACES

SAME = 1e-3
"""Largest difference of a score between a request alone and in a batch, relative to the largest score."""


def quantise(
    data: Path, exported: Path, base: Path, target: Target, name: str, examples: int, out: Path
) -> dict[str, Any]:
    """Write model.onnx in the best form of its target's precision, held to the target's gate on validation examples.

    Returns:
        The records of fp32 (`fp32_latency_ms`, `metric_fp32`), of the chosen `form`, of the `others` of the grid with why
        they were `refused`, if so, of the `tables` alone, and the `machine` that was measured on.

    Raises:
        ShipyardError: no form holds: the metric loses more than `target.max_loss`, the order changes, or a batch changes
            an answer.
    """
    source = exported / "model.onnx"
    model = onnx.load(source)
    plain = open_session(source)
    names = tuple(i.name for i in plain.get_inputs())
    cut = Examples(load_behaviour(data), VALIDATION, examples, (name,)).of(name)
    judge = _Judge(plain, requests(names, cut, trunk.load_tokenizer(base)), target)

    tried: list[tuple[dict[str, Any], Path]] = []
    for number, form in enumerate(FORMS[target.precision]):
        if (written := write_form(model, form)) is not None:
            file = out / f"form-{number}.onnx"
            onnx.save(written, file)
            check_graph(file)
            tried.append((judge.judge(form, file), file))
    if not tried:
        # a few hundred rows, or nothing is asked for: the record says what it is
        onnx.save(model, out / "model.onnx")
        tried.append((judge.judge(FP32, out / "model.onnx"), out / "model.onnx"))
    holding = [(record, file) for record, file in tried if record["refused"] is None]
    if not holding:
        raise ShipyardError(
            f"quantise: {name}: no form in {target.precision} holds", value="; ".join(
                f"{record['form']}: {record['refused']}" for record, _ in tried
            ), mend="choose another precision for the target in fleet.toml",
        )  # fmt: skip
    chosen, file = min(holding, key=lambda found: found[0]["bytes"])
    tables = _tables(judge, model, target, name, out)
    file.rename(out / "model.onnx")
    for _, other in tried:
        other.unlink(missing_ok=other == file)
    others = [record for record, other in tried if other != file]
    return {
        "fp32_latency_ms": judge.latency_ms,
        "metric_fp32": float(judge.before.mean()),
        "form": {key: value for key, value in chosen.items() if key not in ("refused", "alone")},
        "alone": chosen["alone"],
        "others": others,
        "tables": tables,
        "machine": machine(),
    }


def _tables(judge: "_Judge", model: onnx.ModelProto, target: Target, name: str, out: Path) -> dict[str, Any] | None:
    """Hold the tables' form alone to the gate; return its record, None where the graph has no large table."""
    form = TABLES[target.precision]
    written = None if form is None else write_form(model, form)
    if form is None or written is None:
        return None
    file = out / "tables.onnx"
    onnx.save(written, file)
    record = judge.judge(form, file)
    file.unlink()
    if record["refused"] is not None:
        raise ShipyardError(
            f"quantise: {name}: {form.name}: {record['refused']}",
            mend="choose another precision for the target in fleet.toml",
        )
    return record


class _Judge:
    """Measure forms against fp32 on the same requests."""

    def __init__(self, plain: Any, wanted: Requests, target: Target) -> None:
        self.plain, self.wanted, self.target = plain, wanted, target
        self.before = score_onnx(plain, wanted)
        self.latency_ms = latency(plain, wanted)

    def judge(self, form: Form, file: Path) -> dict[str, Any]:
        """Return a form's figures, and why it is `refused`, or None."""
        session = open_session(file)
        after = score_onnx(session, self.wanted)
        loss = float((self.before.mean() - after.mean()) / max(self.before.mean(), 1e-9))
        parity, order = _compare(self.plain, session, self.wanted)
        alone, took = _alone_against_batch(session, self.wanted), latency(session, self.wanted)
        refused = None
        if not loss <= self.target.max_loss:
            refused = f"costs {loss:.2%} of the metric; {self.target.max_loss:.2%} at most"
        elif not order >= LEAST_ORDER:
            refused = f"{order:.1%} of the first ten places are equal; {LEAST_ORDER:.0%} or more"
        elif not alone <= SAME:
            refused = f"a score changes by {alone:.1e} with the batch that it comes in; {SAME} at most"
        return {
            "form": form.name, "precision": form.precision, "bytes": file.stat().st_size, "parity": parity,
            "order": order, "loss": loss, "latency_ms": took, "alone": alone, "refused": refused,
        }  # fmt: skip


def _compare(plain: Any, small: Any, wanted: Requests) -> tuple[float, float]:
    """Return the largest difference of a first score relative to the largest, and the part of equal top-10 places.

    Raises:
        ShipyardError: the small graph's scores are not its logits.
    """
    worst, equal = 0.0, []
    for inputs in wanted.batches(64):
        rows, scores = run(plain, inputs)
        other_rows, logits = check_outputs(small, inputs, "quantise")
        other = np.take_along_axis(logits, other_rows, 1)
        worst = max(worst, float(np.abs(scores[:, 0] - other[:, 0]).max() / np.abs(scores).max()))
        equal.append((rows[:, :PLACES] == other_rows[:, :PLACES]).mean())
    return worst, float(np.mean(equal))


def _alone_against_batch(session: Any, wanted: Requests, requests: int = 16) -> float:
    """Return the largest difference of a score of the top ten between requests alone and in one batch."""
    _, together = run(session, wanted.batches(requests)[0])
    alone = np.concatenate([run(session, inputs)[1] for inputs in wanted.batches(1)[: len(together)]])
    return float(np.abs(together[:, :PLACES] - alone[:, :PLACES]).max() / np.abs(together[:, :PLACES]).max())


def latency(session: Any, wanted: Requests, rounds: int = 30) -> float:
    """Return the median time of one request in milliseconds on this machine, after a warm-up."""
    singles = [trim(inputs) for inputs in wanted.batches(1)[:rounds]]
    for inputs in singles[:3]:
        run(session, inputs)
    seconds = []
    for inputs in singles:
        start = time.perf_counter()
        run(session, inputs)
        seconds.append(time.perf_counter() - start)
    return round(1000 * float(np.median(seconds)), 3)
