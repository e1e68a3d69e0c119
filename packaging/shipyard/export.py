"""Export: a stand-alone sub-model to ONNX, checked against torch on real and on extreme input.

The graph ranks: its outputs are the first rows [B, 100] and their scores, and the logits [B, R + 1] of all rows, which
ranking given candidates needs. IR and opset stay within what ONNX Runtime 1.23 and newer read, the oldest engine that a
target runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models import submodel, trunk
from models.behaviour import VALIDATION, Floats, Ints, load_behaviour
from models.config import Finetune
from serve.errors import ShipyardError
from serve.history import FEATURES, LIMIT, MOST_OFFERS, OFFER
from shipyard.examples import RETURNED, Cut, Examples
from shipyard.metrics import PLACES, ndcg
from shipyard.split import load_alone
from shipyard.tower import tokenise

OPSET = 20
IR_VERSION = 10
TOLERANCE = 1e-4
"""Largest difference of a logit between torch and fp32 ONNX, relative to the largest logit."""

OUTPUTS = ("rows", "scores", "logits")

FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

Arrays = dict[str, npt.NDArray[Any]]


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


@dataclass(frozen=True)
class Requests:
    """Requests in a model's input form, with the right answers [B, K] and, of a log, their gains [B, K]."""

    inputs: Arrays
    relevant: Ints
    gains: Floats | None = None

    def batches(self, size: int) -> list[Arrays]:
        """Cut the inputs into batches; padding that a batch does not need is cut off."""
        n = len(self.relevant)
        return [trim({name: value[k : k + size] for name, value in self.inputs.items()}) for k in range(0, n, size)]


def export(data: Path, alone: Path, base: Path, config: Finetune, name: str, out: Path) -> dict[str, Any]:
    """Write model.onnx in fp32 and check it against torch.

    Returns:
        The form's record: bytes, parity (largest relative difference of a logit), order (part of equal top-10 places).

    Raises:
        ShipyardError: parity is missed, a value is no number, or the graph is newer than the engines.
    """
    model = load_alone(alone, base, config, name)
    file = out / "model.onnx"
    to_onnx(Ranker(model), file)
    check_graph(file)
    tokenizer = trunk.load_tokenizer(base)
    examples = Examples(load_behaviour(data), VALIDATION, 64, (name,)).of(name)
    session = open_session(file)
    parity, order = 0.0, []
    for case, inputs in cases(model.inputs, examples, tokenizer):
        rows, heard = check_outputs(session, inputs, f"export: {name}: {case}")
        with torch.inference_mode():
            logits = model(*(torch.from_numpy(inputs[i]) for i in model.inputs)).numpy()
        expected = np.argsort(-logits, axis=1, kind="stable")[:, :PLACES]
        parity = max(parity, float(np.abs(heard - logits)[:, 1:].max() / np.abs(logits[:, 1:]).max()))
        # scores that are equal within the tolerance may come in either order
        apart = np.abs(np.take_along_axis(logits, rows[:, :PLACES], 1) - np.take_along_axis(logits, expected, 1))
        same = apart <= TOLERANCE * np.abs(logits[:, 1:]).max()
        order.append(((rows[:, :PLACES] == expected) | same).mean())
    if not parity <= TOLERANCE:
        raise ShipyardError(
            f"export: {name}: ONNX differs from torch", value=f"{parity:.2e}", allowed=f"{TOLERANCE} of the largest logit",
            mend="look for an operator that the exporter approximates",
        )  # fmt: skip
    if not min(order) == 1:
        raise ShipyardError(
            f"export: {name}: ONNX ranks otherwise than torch", value=f"{min(order):.1%} of places equal"
        )
    return {"precision": "fp32", "bytes": file.stat().st_size, "parity": parity, "order": float(np.mean(order))}


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
    model = onnx.load(file, load_external_data=False)
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
        if tensor.data_type in FLOATING and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
            raise ShipyardError(
                f"{file}: a weight is no finite number", value=tensor.name, mend="train again, with a smaller rate"
            )


def cases(names: tuple[str, ...], examples: Cut, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Arrays]]:
    """Return named inputs: real ones, an empty request, an empty, a longest and a Chinese query, the longest history."""
    real = _arrays(examples)
    texts = examples.words
    rows = examples.rows
    rng = np.random.default_rng(0)
    longest = min(LIMIT, rows)
    empty: Arrays = {
        "items": np.zeros((1, 1), np.int64), "features": np.zeros((1, 1, len(FEATURES)), np.float32),
        "offers": np.zeros((1, 1), np.int64), "strengths": np.zeros((1, 1, len(OFFER)), np.float32),
    }  # fmt: skip
    filled = empty | {
        "items": 1 + rng.permutation(rows)[None, :longest],
        "features": rng.random((1, longest, len(FEATURES)), np.float32) * 4,
        "offers": 1 + rng.permutation(rows)[None, :MOST_OFFERS],
        "strengths": rng.random((1, min(rows, MOST_OFFERS), len(OFFER)), np.float32),
    }
    found: list[tuple[str, list[str], Arrays]] = [
        ("real requests", texts, real), ("an empty request", [""], empty), ("the longest history", ["frozen pizza"], filled),
    ]  # fmt: skip
    if "query_ids" in names:
        found += [
            ("the longest query", ["chocolate " * 100], empty),
            ("a Chinese query", ["冷冻比萨 牛奶"], {name: value[:1] for name, value in real.items()}),
        ]
    return [(case, encode_inputs(names, tokenizer, words, arrays)) for case, words, arrays in found]


def _arrays(examples: Cut) -> Arrays:
    view = examples.view(slice(None))
    return {"items": view.items, "features": view.features, "offers": view.offers, "strengths": view.strengths}


def encode_inputs(
    names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, texts: list[str], arrays: Arrays
) -> Arrays:
    """Return the arrays that a model takes, by name."""
    given = dict(arrays)
    if "query_ids" in names:
        ids, mask = tokenise(tokenizer, texts)
        given |= {"query_ids": ids.numpy(), "query_mask": mask.numpy()}
    return {name: given[name] for name in names}


def requests(names: tuple[str, ...], examples: Cut, tokenizer: PreTrainedTokenizerBase) -> Requests:
    """Return examples as requests."""
    texts = examples.words
    return Requests(encode_inputs(names, tokenizer, texts, _arrays(examples)), examples.relevant, examples.gains)


def trim(inputs: Arrays) -> Arrays:
    """Cut off columns that are padding in every request, one column left at least."""
    cut: Arrays = {}
    for given, names in {"items": ("items", "features"), "offers": ("offers", "strengths"),
                         "query_mask": ("query_ids", "query_mask")}.items():  # fmt: skip
        if given in inputs:
            used = max(1, int((inputs[given] != 0).sum(1).max()))
            cut |= {name: inputs[name][:, :used] for name in names}
    return {name: cut[name] for name in inputs}


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


def score_onnx(session: ort.InferenceSession, wanted: Requests, batch: int = 64) -> npt.NDArray[np.float64]:
    """Return nDCG@10 [B] of a graph on requests with known answers."""
    ranked = np.concatenate([run(session, inputs)[0][:, :PLACES] for inputs in wanted.batches(batch)])
    return ndcg(ranked, wanted.relevant, gains=wanted.gains)
