"""Quantise: the form that a target serves, gated again by parity of rank and by the loss of the metric.

int8 is weights alone, one scale a row (blocks of 16 to 128 inputs where a row is longer): ONNX Runtime's MatMulNBits with
8 bits. Activations keep their own scale for each row, so that a request alone and in a batch gets the same answer; a
dynamic scale for a whole batch does not do that. fp16 halves what is stored and computes in fp32: a text
tower that computes in fp16 moves queries by a thousandth, which reorders a quarter of the first ten places, for products of
one category crowd together.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from models import trunk
from models.behaviour import VALIDATION, load_behaviour
from models.config import Target
from serve.errors import ShipyardError
from shipyard.examples import Examples
from shipyard.export import Requests, check_versions, open_session, requests, run, score_onnx, trim
from shipyard.metrics import PLACES

LARGE = 32768
"""Elements from which a weight is worth quantising."""

LEAST_ORDER = 0.8
"""Part of the top-10 places that must stay: neighbours with almost equal scores may change places."""

SAME = 1e-3
"""Largest difference of a score between a request alone and in a batch, relative to the largest score."""


def quantise(
    data: Path, exported: Path, base: Path, target: Target, name: str, examples: int, out: Path
) -> dict[str, Any]:
    """Write model.onnx in the precision of its target and hold it to the target's gate on validation examples.

    Returns:
        Two forms' records: fp32, and the target's.

    Raises:
        ShipyardError: the metric loses more than `target.max_loss`, the order changes, or a batch changes an answer.
    """
    source, file = exported / "model.onnx", out / "model.onnx"
    model = onnx.load(source)
    precision = target.precision
    if precision == "fp16":
        model = to_fp16(model)
    elif precision == "int8":
        if to_int8(model.graph):
            model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        else:
            # a few hundred rows: nothing to gain, and the record says what it is
            precision = "fp32"
    onnx.save(model, file)
    check_versions(file)

    tokenizer = trunk.load_tokenizer(base)
    plain, small = open_session(source), open_session(file)
    names = tuple(i.name for i in plain.get_inputs())
    wanted = requests(names, Examples(load_behaviour(data), VALIDATION, examples, (name,)).of(name), tokenizer)
    before, after = score_onnx(plain, wanted), score_onnx(small, wanted)
    loss = float((before.mean() - after.mean()) / max(before.mean(), 1e-9))
    if not loss <= target.max_loss:
        raise ShipyardError(
            f"quantise: {name}: {target.precision} costs too much of the metric", value=f"{loss:.2%}",
            allowed=f"{target.max_loss:.2%} at most", mend="choose another precision for the target in fleet.toml",
        )  # fmt: skip
    parity, order = _compare(plain, small, wanted)
    if not order >= LEAST_ORDER:
        raise ShipyardError(
            f"quantise: {name}: {target.precision} changes too many of the first ten places", value=f"{order:.1%} are equal",
            allowed=f"{LEAST_ORDER:.0%} or more", mend="choose another precision for the target in fleet.toml",
        )  # fmt: skip
    alone = _alone_against_batch(small, wanted)
    if not alone <= SAME:
        raise ShipyardError(
            f"quantise: {name}: a request's scores change with the batch that it comes in", value=f"{alone:.1e}",
            allowed=f"{SAME} of the largest score", mend="quantise activations by row, not by batch",
        )  # fmt: skip
    form = {
        "precision": precision, "bytes": file.stat().st_size, "parity": parity, "order": order, "loss": loss,
        "latency_ms": latency(small, wanted),
    }  # fmt: skip
    return {
        "fp32_latency_ms": latency(plain, wanted),
        "metric_fp32": float(before.mean()),
        "form": form,
        "alone": alone,
    }


def to_fp16(model: ModelProto) -> ModelProto:
    """Store large weights in fp16, with a cast where they are used."""
    graph = model.graph
    for tensor in list(graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= LARGE:
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_fp16")
            graph.initializer.remove(tensor)
            graph.initializer.append(half)
            cast = helper.make_node(
                "Cast", [half.name], [tensor.name], f"{tensor.name}_cast", to=onnx.TensorProto.FLOAT
            )
            graph.node.insert(0, cast)
    return model


def to_int8(graph: GraphProto) -> int:
    """Replace large weights of MatMul and Gemm by 8-bit ones in place, tables that are also gathered from included.

    Returns:
        How many weights were replaced.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    turned = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    replaced: dict[str, tuple[str, str, int]] = {}
    for node in [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]:
        source = node.input[1]
        name = turned[source].input[0] if source in turned else source
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        if not plain or name not in weights or len(weights[name].dims) != 2 or np.prod(weights[name].dims) < LARGE:
            continue
        array = numpy_helper.to_array(weights[name]).astype(np.float32)
        by_row = (source in turned) != bool(settings.get("transB", 0))  # [outputs, inputs] as it is stored
        rows = array if by_row else array.T
        block = min(128, int(rows.shape[1] & -rows.shape[1]))
        if block < 16:
            continue
        codes, scales = rows_to_int8(rows, block)
        codes_name, scales_name = f"{name}_int8", f"{name}_scale"
        graph.initializer.extend(
            [numpy_helper.from_array(codes, codes_name), numpy_helper.from_array(scales, scales_name)]
        )
        biased = len(node.input) > 2
        result = f"{node.output[0]}_product" if biased else node.output[0]
        product = helper.make_node(
            "MatMulNBits", [node.input[0], codes_name, scales_name], [result], node.name, domain="com.microsoft",
            K=rows.shape[1], N=rows.shape[0], bits=8, block_size=block, accuracy_level=4,
        )  # fmt: skip
        added = [helper.make_node("Add", [result, node.input[2]], [node.output[0]])] if biased else []
        _replace(graph, node, [product, *added])
        if by_row:
            replaced[name] = codes_name, scales_name, rows.shape[1]
    for gather in [n for n in graph.node if n.op_type == "Gather" and n.input[0] in replaced]:
        _replace(graph, gather, _gather_int8(graph, gather, *replaced[gather.input[0]]))
    _drop_unused(graph)
    return sum(tensor.name.endswith("_int8") for tensor in graph.initializer)


def _drop_unused(graph: GraphProto) -> None:
    """Remove transposes and weights that nothing reads any more."""
    for kind in (graph.node, graph.initializer):
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        for thing in list(kind):
            outputs = thing.output if isinstance(thing, NodeProto) else [thing.name]
            if not used.intersection(outputs):
                kind.remove(thing)


def rows_to_int8(rows: npt.NDArray[np.float32], block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return codes [n, k / block, block], 128 for zero, and scales [n, k / block], symmetric and rounded to nearest."""
    blocks = rows.reshape(len(rows), -1, block)
    scales = np.abs(blocks).max(2) / 127
    codes = np.round(np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0))
    # the scale of numbers next to 0 has few bits left
    codes = codes.clip(-127, 127)
    return (codes + 128).astype(np.uint8), scales.astype(np.float32)


def _gather_int8(graph: GraphProto, gather: NodeProto, codes: str, scales: str, width: int) -> list[NodeProto]:
    """Return nodes that gather rows of 8-bit codes and give them back as floats."""
    name = gather.output[0]
    zero, shape, last = f"{name}_zero", f"{name}_shape", f"{name}_last"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(128, np.float32), zero),
            numpy_helper.from_array(np.array([0, 0, width], np.int64), shape),
            numpy_helper.from_array(np.array([-1], np.int64), last),
        ]
    )
    return [
        helper.make_node("Gather", [codes, gather.input[1]], [f"{name}_codes"]),
        helper.make_node("Cast", [f"{name}_codes"], [f"{name}_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_float", zero], [f"{name}_centred"]),
        helper.make_node("Gather", [scales, gather.input[1]], [f"{name}_scales"]),
        helper.make_node("Unsqueeze", [f"{name}_scales", last], [f"{name}_wide"]),
        helper.make_node("Mul", [f"{name}_centred", f"{name}_wide"], [f"{name}_blocks"]),
        helper.make_node("Reshape", [f"{name}_blocks", shape], [name]),
    ]


def _replace(graph: GraphProto, node: NodeProto, by: list[NodeProto]) -> None:
    at = list(graph.node).index(node)
    graph.node.remove(node)
    for new in reversed(by):
        graph.node.insert(at, new)


def _compare(plain: Any, small: Any, wanted: Requests) -> tuple[float, float]:
    """Return the largest difference of a first score relative to the largest, and the part of equal top-10 places."""
    worst, equal = 0.0, []
    for inputs in wanted.batches(64):
        rows, scores = run(plain, inputs)
        other_rows, other = run(small, inputs)
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
