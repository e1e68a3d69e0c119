"""Quantise: the form that a target serves, chosen from a small grid, each held to the loss of the metric and to rank.

Of the forms that hold, the smallest is taken, of almost equal ones the first in the grid. Latency is recorded, and decides
where a target asks for it (`choose = "latency"`): a clock chooses otherwise on another day, and the same inputs then have
another bundle. The grid's other forms stay in the record with their figures.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scipy.stats import spearmanr

from models import trunk
from models.behaviour import VALIDATION, Floats, Ints, load_behaviour
from models.config import Target
from serve.engine import machine
from serve.errors import ShipyardError
from shipyard.cases import Arrays, Requests, extremes, requests, singles
from shipyard.examples import Examples
from shipyard.export import alone_against_together, check_graph, check_outputs, open_session, run
from shipyard.forms import FP32, REST, TABLES, Form, combined, write_form
from shipyard.gates import LEAST_ORDER
from shipyard.metrics import PLACES

LEAST_CORRELATION = 0.99
"""Rank correlation over all rows with fp32, for a request that is empty, the longest or Chinese."""

ALIKE = 1.01
"""Forms whose size or latency differs by less are taken for equal."""

SAME = 1e-3
"""Largest difference of a logit between a request alone and in a batch, relative to the largest of the request."""


def quantise(
    data: Path, exported: Path, base: Path, target: Target, name: str, examples: int, out: Path
) -> dict[str, Any]:
    """Write model.onnx in the best form of its target's precision, held to the target's gate on validation examples.

    The form of the tables is chosen first, alone: the first that holds, for the smallest come first. Then that of all other
    weights beside them.

    Returns:
        The records of fp32 (`fp32_latency_ms`, `metric_fp32`), of the chosen `form` with its `checks`, of the `others` with
        why they were `refused`, if so, those of the tables first, of the chosen `tables` alone, and the `machine` that was
        measured on.

    Raises:
        ShipyardError: no form holds: the metric loses more than `target.max_loss`, the order changes, or a batch changes
            an answer.
    """
    source = exported / "model.onnx"
    model = onnx.load(source)
    plain = open_session(source)
    names = tuple(i.name for i in plain.get_inputs())
    cut = Examples(load_behaviour(data), VALIDATION, examples, (name,)).of(name)
    tokenizer = trunk.load_tokenizer(base)
    judge = _Judge(plain, requests(names, cut, tokenizer), extremes(names, cut, tokenizer), target)
    where = f"quantise: {name}: {target.precision}"

    tables = _tried(judge, model, TABLES[target.precision], out, "tables", enough=1)
    table = _best(tables, target, f"{where}: tables") if tables else None
    rest = REST[target.precision]
    grid = rest if table is None else tuple(combined(form, table.form) for form in rest)
    tried = _tried(judge, model, grid, out, "form")
    if not tried:
        # nothing but tables is large, or nothing at all is, or nothing is asked for: the record says what it is
        tried = [table] if table is not None else [judge.judge(FP32, source)]
    chosen = _best(tried, target, where)
    onnx.save(onnx.load(chosen.file), out / "model.onnx")
    found = [*tables, *(one for one in tried if one not in tables)]
    for one in found:
        if one.file.parent == out:
            one.file.unlink()
    return {
        "fp32_latency_ms": judge.latency_ms,
        "metric_fp32": float(judge.before.mean()),
        "form": chosen.record,
        "checks": chosen.checks,
        "others": [one.record | {"refused": one.refused} for one in found if one not in (chosen, table)],
        "tables": None if table is None else table.record,
        "machine": machine(),
    }


@dataclass(frozen=True, eq=False)
class _Tried:
    """A form that was written and measured: its `record` as the release has it, and why it is `refused`, or None.

    `checks` are `alone`, the largest relative difference of a logit between a request alone and in a batch, and by extreme
    case the rank correlation with fp32 over all rows.
    """

    form: Form
    file: Path
    record: dict[str, Any]
    checks: dict[str, float]
    refused: str | None


def _tried(
    judge: "_Judge", model: onnx.ModelProto, forms: tuple[Form, ...], out: Path, prefix: str, enough: int | None = None
) -> list[_Tried]:
    """Write and measure the forms that change something, until `enough` of them hold."""
    found: list[_Tried] = []
    for number, form in enumerate(forms):
        if (written := write_form(model, form)) is not None:
            file = out / f"{prefix}-{number}.onnx"
            onnx.save(written, file)
            check_graph(file)
            found.append(judge.judge(form, file))
            if sum(one.refused is None for one in found) == enough:
                break
    return found


def _best(tried: list[_Tried], target: Target, where: str) -> _Tried:
    """Return the smallest form that holds, or by the target's wish the fastest; of almost equal ones the first.

    Raises:
        ShipyardError: none holds.
    """
    holding = [one for one in tried if one.refused is None]
    if not holding:
        raise ShipyardError(
            f"{where}: no form holds", value="; ".join(f"{one.record['form']}: {one.refused}" for one in tried),
            mend="choose another precision for the target in fleet.toml",
        )  # fmt: skip
    by = "latency_ms" if target.choose == "latency" else "bytes"
    least = min(one.record[by] for one in holding)
    return next(one for one in holding if one.record[by] <= ALIKE * least)


class _Judge:
    """Measure forms against fp32 on the same requests."""

    def __init__(self, plain: Any, wanted: Requests, extreme: dict[str, Arrays], target: Target) -> None:
        self.wanted, self.extreme, self.target = wanted, extreme, target
        self.alone = singles(wanted, list(extreme.values()))
        self.rows, self.first = _answers(plain, wanted)
        self.before = wanted.ndcg(self.rows)
        self.logits = {case: check_outputs(plain, inputs, case)[1][0, 1:] for case, inputs in extreme.items()}
        self.latency_ms = latency(plain, wanted)

    def judge(self, form: Form, file: Path) -> _Tried:
        """Return a form's figures, and why it is refused, or None."""
        session = open_session(file)
        rows, first = _answers(session, self.wanted)
        loss = float((self.before.mean() - self.wanted.ndcg(rows).mean()) / max(self.before.mean(), 1e-9))
        order = float((rows == self.rows).mean())
        checks = {"alone": alone_against_together(session, self.alone)}
        for case, inputs in self.extreme.items():
            logits = check_outputs(session, inputs, f"quantise: {form.name}: {case}")[1][0, 1:]
            checks[case] = float(spearmanr(self.logits[case], logits).statistic)
        worst = min(self.extreme, key=checks.__getitem__)
        refused = None
        if not loss <= self.target.max_loss:
            refused = f"costs {loss:.2%} of the metric; {self.target.max_loss:.2%} at most"
        elif not order >= LEAST_ORDER:
            refused = f"{order:.1%} of the first ten places are equal; {LEAST_ORDER:.0%} or more"
        elif not checks[worst] >= LEAST_CORRELATION:
            refused = f"ranks {worst} otherwise: rank correlation {checks[worst]:.4f}; {LEAST_CORRELATION} or more"
        elif not checks["alone"] <= SAME:
            refused = f"a score changes by {checks['alone']:.1e} with the batch that it comes in; {SAME} at most"
        record = {
            "form": form.name, "precision": form.precision, "bytes": file.stat().st_size,
            "parity": float(np.abs(first - self.first).max() / np.abs(self.first).max()), "order": order, "loss": loss,
            "latency_ms": latency(session, self.wanted),
        }  # fmt: skip
        return _Tried(form, file, record, checks, refused)


def _answers(session: Any, wanted: Requests) -> tuple[Ints, Floats]:
    """Return the first ten rows [B, 10] of a graph, and the scores [B] of the first of them.

    Raises:
        ShipyardError: a logit is no finite number, or the scores are not the logits of their rows.
    """
    found = [check_outputs(session, inputs, "quantise") for inputs in wanted.batches(64)]
    rows = np.concatenate([rows[:, :PLACES] for rows, _ in found])
    first = np.concatenate([np.take_along_axis(logits, rows[:, :1], 1)[:, 0] for rows, logits in found])
    return rows, first


def latency(session: Any, wanted: Requests, rounds: int = 30) -> float:
    """Return the median time of one request in milliseconds on this machine, after a warm-up."""
    asked = wanted.batches(1)[:rounds]
    for inputs in asked[:3]:
        run(session, inputs)
    seconds = []
    for inputs in asked:
        start = time.perf_counter()
        run(session, inputs)
        seconds.append(time.perf_counter() - start)
    return round(1000 * float(np.median(seconds)), 3)
