"""Export: a stand-alone sub-model to ONNX, checked against torch on real and on extreme input.

The graph ranks: its outputs are the first rows [B, 100] and their scores, and the logits [B, R + 1] of all rows, which
ranking given candidates needs. IR and opset stay within what ONNX Runtime 1.23 and newer read, the oldest engine that a
target runs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from models import submodel, trunk
from models.behaviour import VALIDATION, Ints, load_behaviour
from models.config import Finetune
from serve.errors import ShipyardError
from serve.history import FEATURES, LIMIT, MOST_OFFERS, OFFER
from shipyard.cases import Arrays, extremes, requests, singles, together
from shipyard.examples import RETURNED, Examples
from shipyard.metrics import PLACES
from shipyard.split import load_alone

OPSET = 20
IR_VERSION = 10
TOLERANCE = 1e-4
"""Largest difference of a logit between torch and fp32 ONNX, relative to the largest logit."""

OUTPUTS = ("rows", "scores", "logits")

FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


class Ranker(nn.Module):
    """A stand-alone sub-model that returns its best rows and their scores beside all logits."""

    def __init__(self, alone: trunk.Standalone) -> None:
        super().__init__()
        self.alone = alone
        self.returned = min(RETURNED, len(alone.vectors) - 1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows [B, 100] and scores [B, 100], the highest first, and logits [B, R + 1]; row 0 is padding."""
        logits = self.alone(*inputs)
        scores, rows = torch.topk(logits, self.returned, dim=1)
        return rows, scores, logits


def export(data: Path, alone: Path, base: Path, config: Finetune, name: str, out: Path) -> dict[str, Any]:
    """Write model.onnx in fp32 and check it against torch, on real and on extreme input, alone and together.

    Returns:
        The `form`'s record: bytes, parity (largest relative difference of a logit), order (part of equal top-10 places), and
        loss (part of nDCG@10). By case its `parity`, and `alone`, the largest relative difference of a logit between a
        request alone and in a batch.

    Raises:
        ShipyardError: parity is missed, a value is no number, or the graph is newer than the engines.
    """
    model = load_alone(alone, base, config, name)
    file = out / "model.onnx"
    to_onnx(Ranker(model), file)
    check_graph(file)
    tokenizer = trunk.load_tokenizer(base)
    wanted = Examples(load_behaviour(data), VALIDATION, 64, (name,)).of(name)
    real, extreme = requests(model.inputs, wanted, tokenizer), extremes(model.inputs, wanted, tokenizer)
    session = open_session(file)
    parity: dict[str, float] = {}
    order: list[float] = []
    ranked: dict[str, tuple[Ints, Ints]] = {}
    for case, inputs in {"real requests": real.inputs, **extreme}.items():
        rows, heard = check_outputs(session, inputs, f"export: {name}: {case}")
        with torch.inference_mode():
            logits = model(*(torch.from_numpy(inputs[i]) for i in model.inputs)).numpy()
        expected = np.argsort(-logits, axis=1, kind="stable")[:, :PLACES]
        ranked[case] = rows[:, :PLACES], expected
        parity[case] = difference(heard, logits)
        # scores that are equal within the tolerance may come in either order
        gap = np.abs(np.take_along_axis(logits, rows[:, :PLACES], 1) - np.take_along_axis(logits, expected, 1))
        same = gap <= TOLERANCE * np.abs(logits[:, 1:]).max()
        order.append(float(((rows[:, :PLACES] == expected) | same).mean()))
    now, before = (real.ndcg(found).mean() for found in ranked["real requests"])
    loss = float((before - now) / max(before, 1e-9))
    apart = alone_against_together(session, singles(real, list(extreme.values())))
    _hold(name, "ONNX differs from torch", max(parity.values()))
    _hold(name, "ONNX has another nDCG than torch", abs(loss))
    _hold(name, "a request alone is answered otherwise than in a batch", apart)
    if not min(order) == 1:
        raise ShipyardError(
            f"export: {name}: ONNX ranks otherwise than torch", value=f"{min(order):.1%} of places equal"
        )
    form = {
        "precision": "fp32", "bytes": file.stat().st_size, "parity": max(parity.values()), "order": float(np.mean(order)),
        "loss": loss,
    }  # fmt: skip
    return {"form": form, "parity": parity, "alone": apart}


def _hold(name: str, what: str, value: float) -> None:
    """Refuse what is larger than the tolerance, and what is no number."""
    if not value <= TOLERANCE:
        raise ShipyardError(
            f"export: {name}: {what}", value=f"{value:.2e}", allowed=f"{TOLERANCE}, as a part of the largest",
            mend="look for an operator that the exporter approximates",
        )  # fmt: skip


def to_onnx(ranker: Ranker, file: Path) -> None:
    """Export with a free number of requests, of items in a history and of tokens."""
    names = ranker.alone.inputs
    # two tensors: one object given twice becomes one input in the graph
    text = [torch.ones(2, 7, dtype=torch.long) for _ in range(2)] if "query_ids" in names else []
    example = [*text, torch.tensor([[1, 2, 0], [1, 0, 0]]), torch.rand(2, 3, len(FEATURES))]
    if "offers" in names:
        example += [torch.tensor([[1, 2, 3, 0], [2, 0, 0, 0]]), torch.rand(2, 4, len(OFFER))]
    batch = torch.export.Dim("batch", min=1, max=4096)
    length = torch.export.Dim("items", min=1, max=LIMIT)
    promoted = torch.export.Dim("offers", min=1, max=MOST_OFFERS)
    tokens = torch.export.Dim("tokens", min=1, max=submodel.MAX_TOKENS)
    of = {"query_ids": tokens, "query_mask": tokens, "offers": promoted, "strengths": promoted}
    shapes = tuple({0: batch, 1: of.get(name, length)} for name in names)
    program = torch.onnx.export(
        ranker.eval(), tuple(example), dynamo=True, opset_version=OPSET, input_names=list(names), verbose=False,
        output_names=list(OUTPUTS), dynamic_shapes=(shapes,),
    )  # fmt: skip
    save_graph(program, file)


def save_graph(program: torch.onnx.ONNXProgram | None, file: Path) -> None:
    """Check an exported graph and write it without what belongs to this machine."""
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    # the exporter notes source lines and folders of this machine, which no artifact needs and which change its bytes
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def check_graph(file: Path) -> None:
    """Refuse a graph that the oldest engine of a target cannot read, that is not whole, or has a weight that is no number.

    Raises:
        ShipyardError: IR or opset is too new, weights lie outside of the graph's folder or are missing, or are not finite.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError:
        raise ShipyardError(f"{file}: no graph of ONNX", mend="run the export again") from None
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if model.ir_version > IR_VERSION or opset > OPSET:
        raise ShipyardError(
            f"{file}: too new for the engines", value=f"IR {model.ir_version}, opset {opset}",
            allowed=f"IR {IR_VERSION}, opset {OPSET} at most",
        )  # fmt: skip
    folder = file.parent.resolve()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in tensor.external_data}
            place = (folder / told.get("location", "")).resolve()
            if not place.is_relative_to(folder) or not place.is_file():
                raise ShipyardError(
                    f"{file}: weights of {tensor.name} lie outside of its folder, or nowhere",
                    value=told.get("location", ""), allowed="a file beside the graph",
                )  # fmt: skip
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        try:
            finite = tensor.data_type not in FLOATING or np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
        except (ValueError, TypeError) as fault:  # fewer bytes than its shape says, or another shape
            raise ShipyardError(
                f"{file}: weight {tensor.name} is not whole: {fault}", mend="run the export again"
            ) from None
        if not finite:
            raise ShipyardError(
                f"{file}: a weight is no finite number", value=tensor.name, mend="train again, with a smaller rate"
            )


def open_session(file: Path) -> ort.InferenceSession:
    """Open a graph on the CPU, as the runtimes do."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: Arrays) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Return rows [B, 100] and scores [B, 100]."""
    rows, scores = session.run(["rows", "scores"], inputs)
    return rows, scores


def check_outputs(session: ort.InferenceSession, inputs: Arrays, where: str) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Return rows [B, 100] and logits [B, R + 1] of a graph.

    Raises:
        ShipyardError: a logit is no finite number, or the scores are not the logits of their rows.
    """
    rows, scores, logits = session.run(OUTPUTS, inputs)
    if not np.isfinite(logits[:, 1:]).all():
        raise ShipyardError(f"{where}: a logit is no finite number")
    if not np.array_equal(scores, np.take_along_axis(logits, rows, 1)):
        raise ShipyardError(f"{where}: the scores are not the logits of their rows")
    return rows, logits


def difference(logits: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Return the largest difference of a logit [B, R + 1], relative to the largest of its request; padding apart."""
    return float((np.abs(logits - expected)[:, 1:].max(1) / np.abs(expected)[:, 1:].max(1)).max())


def alone_against_together(session: ort.InferenceSession, alone: list[Arrays]) -> float:
    """Return the largest relative difference of a logit between requests alone and in one batch that pads them."""
    apart = np.concatenate([check_outputs(session, inputs, "a request alone")[1] for inputs in alone])
    _, batch = check_outputs(session, together(alone), "a batch")
    return difference(batch, apart)
