"""Forms: the graphs that a target may serve a sub-model by, from its graph in fp32.

int8 is weights alone, one scale for 16 to 128 inputs of a row: ONNX Runtime's MatMulNBits with 8 bits. Activations keep
their own scale for each row, so that a request alone and in a batch gets the same answer; a dynamic scale for a whole batch
does not do that. fp16 halves what is stored and computes in fp32: a text tower that computes in fp16 moves queries by a
thousandth, which reorders a quarter of the first ten places, for products of one category crowd together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.config import Precision
from shipyard.attention import fuse_attention

LARGE = 32768
"""Elements from which a weight is worth quantising."""

LEAST_BLOCK = 16
"""Inputs that share a scale, at least; MatMulNBits has no smaller blocks."""


@dataclass(frozen=True)
class Form:
    """One way to write a graph: `change` works in place and returns how many weights it replaced."""

    name: str
    precision: Precision
    change: Callable[[GraphProto], int]


def write_form(source: ModelProto, form: Form) -> ModelProto | None:
    """Return a graph in another form, or None where it has no weight that is worth it."""
    model = ModelProto()
    model.CopyFrom(source)
    if not form.change(model.graph):
        return None
    if any(node.domain == "com.microsoft" for node in model.graph.node):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


Which = Literal["all", "tables", "rest"]
"""Weights that a change may take: all, those that rows are looked up in, or all but these."""


def to_fp16(graph: GraphProto, *, which: Which = "all") -> int:
    """Store large weights in fp16 in place, with a cast where they are used; return how many were replaced."""
    count = 0
    for tensor in _large(graph, which):
        count += 1
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_fp16")
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
        cast = helper.make_node("Cast", [half.name], [tensor.name], f"{tensor.name}_cast", to=TensorProto.FLOAT)
        graph.node.insert(0, cast)
    return count


def _large(graph: GraphProto, which: Which) -> list[TensorProto]:
    """Return the weights in fp32 that are worth it and may be taken."""
    gathered = {node.input[0] for node in _gathers(graph)}
    return [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and np.prod(tensor.dims) >= LARGE
        and (which == "all" or (tensor.name in gathered) == (which == "tables"))
    ]


def _gathers(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes that look up rows."""
    return [
        node
        for node in graph.node
        if node.op_type == "Gather" and all(helper.get_attribute_value(axis) == 0 for axis in node.attribute)
    ]


@dataclass(frozen=True)
class _Coded:
    """A weight in 8 bits: names of its codes and scales, outputs, inputs, and inputs that share a scale."""

    codes: str
    scales: str
    rows: int
    width: int
    block: int


def to_int8(graph: GraphProto, *, block: int = 128, integers: bool = True, which: Which = "all") -> int:
    """Replace large weights of MatMul, of Gemm and of tables by 8-bit ones in place; return how many were replaced.

    Args:
        graph: what is changed.
        block: the most inputs that share a scale.
        integers: multiply integers, the activations' too; else weights become floats again before they are multiplied.
        which: the weights that may be taken.
    """
    weights = {tensor.name: tensor for tensor in _large(graph, which) if len(tensor.dims) == 2}
    turned = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    # by weight and by whether its rows are the outputs
    coded: dict[tuple[str, bool], _Coded] = {}

    def code(name: str, by_row: bool) -> _Coded | None:
        if (name, by_row) not in coded:
            array = numpy_helper.to_array(weights[name])
            rows = array if by_row else np.ascontiguousarray(array.T)
            size = min(block, int(rows.shape[1] & -rows.shape[1]))
            if size < LEAST_BLOCK:
                return None
            codes, scales = rows_to_int8(rows, size)
            suffix = "" if by_row else "_turned"
            found = _Coded(f"{name}_int8{suffix}", f"{name}_scale{suffix}", len(rows), rows.shape[1], size)
            graph.initializer.extend(
                [numpy_helper.from_array(codes, found.codes), numpy_helper.from_array(scales, found.scales)]
            )
            coded[name, by_row] = found
        return coded[name, by_row]

    for node in [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]:
        source = node.input[1]
        name = turned[source].input[0] if source in turned else source
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        if not plain or name not in weights:
            continue
        # [outputs, inputs] as it is stored
        if (found := code(name, (source in turned) != bool(settings.get("transB", 0)))) is None:
            continue
        biased = len(node.input) > 2
        result = f"{node.output[0]}_product" if biased else node.output[0]
        product = helper.make_node(
            "MatMulNBits", [node.input[0], found.codes, found.scales], [result], node.name, domain="com.microsoft",
            K=found.width, N=found.rows, bits=8, block_size=found.block, accuracy_level=4 if integers else 1,
        )  # fmt: skip
        added = [helper.make_node("Add", [result, node.input[2]], [node.output[0]])] if biased else []
        _replace(graph, node, [product, *added])
    for gather in _gathers(graph):
        name = gather.input[0]
        if name in weights and (found := code(name, True)) is not None:
            _replace(graph, gather, _gather_int8(graph, gather, found))
    _drop_unused(graph)
    return len(coded)


def _drop_unused(graph: GraphProto) -> None:
    """Remove nodes and weights that nothing reads any more."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    unused: list[NodeProto | TensorProto] = [node for node in graph.node if not used.intersection(node.output)]
    unused += [tensor for tensor in graph.initializer if tensor.name not in used]
    for thing in unused:
        (graph.node if isinstance(thing, NodeProto) else graph.initializer).remove(thing)
    if unused:  # what only these have read
        _drop_unused(graph)


def rows_to_int8(rows: npt.NDArray[np.float32], block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return codes [n, k / block, block], 128 for zero, and scales [n, k / block], symmetric and rounded to nearest."""
    blocks = rows.reshape(len(rows), -1, block)
    scales = np.abs(blocks).max(2) / 127
    codes = np.round(np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0))
    # the scale of numbers next to 0 has few bits left
    codes = codes.clip(-127, 127)
    return (codes + 128).astype(np.uint8), scales.astype(np.float32)


def _gather_int8(graph: GraphProto, gather: NodeProto, table: _Coded) -> list[NodeProto]:
    """Return nodes that gather rows of 8-bit codes and give them back as floats, the indices' shape and `width` behind."""
    name = gather.output[0]
    zero, width, last = f"{name}_zero", f"{name}_width", f"{name}_last"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(128, np.float32), zero),
            numpy_helper.from_array(np.array([table.width], np.int64), width),
            numpy_helper.from_array(np.array([-1], np.int64), last),
        ]
    )
    return [
        helper.make_node("Gather", [table.codes, gather.input[1]], [f"{name}_codes"]),
        helper.make_node("Cast", [f"{name}_codes"], [f"{name}_float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_float", zero], [f"{name}_centred"]),
        helper.make_node("Gather", [table.scales, gather.input[1]], [f"{name}_scales"]),
        helper.make_node("Unsqueeze", [f"{name}_scales", last], [f"{name}_wide"]),
        helper.make_node("Mul", [f"{name}_centred", f"{name}_wide"], [f"{name}_blocks"]),
        helper.make_node("Shape", [gather.input[1]], [f"{name}_indices"]),
        helper.make_node("Concat", [f"{name}_indices", width], [f"{name}_shape"], axis=0),
        helper.make_node("Reshape", [f"{name}_blocks", f"{name}_shape"], [name]),
    ]


def _replace(graph: GraphProto, node: NodeProto, by: list[NodeProto]) -> None:
    at = list(graph.node).index(node)
    graph.node.remove(node)
    for new in reversed(by):
        graph.node.insert(at, new)


def to_int8_fused(graph: GraphProto) -> int:
    """Fuse attention, then replace weights but those of tables; nothing where there is no attention of that form."""
    return to_int8(graph, which="rest") if fuse_attention(graph) else 0


FP32 = Form("fp32", "fp32", lambda graph: 0)

TABLES: dict[Precision, tuple[Form, ...]] = {
    "fp32": (),
    "fp16": (Form("tables in fp16", "fp16", partial(to_fp16, which="tables")),),
    "int8": (
        Form("tables in int8", "int8", partial(to_int8, which="tables")),
        Form(
            "tables in int8, blocks of 32, products of floats",
            "int8",
            partial(to_int8, which="tables", integers=False, block=32),
        ),
        Form("tables in fp16", "fp16", partial(to_fp16, which="tables")),
    ),
}
"""Forms of the tables by a target's precision, the smallest first. They have a gate of their own: what they cost does not
hide behind the rest. Products of one category crowd together, and where int8 mixes them up, fp16 is left."""

REST: dict[Precision, tuple[Form, ...]] = {
    "fp32": (),
    "fp16": (Form("fp16", "fp16", partial(to_fp16, which="rest")),),
    "int8": (
        Form("int8", "int8", partial(to_int8, which="rest")),
        Form("int8, blocks of 32", "int8", partial(to_int8, which="rest", block=32)),
        Form("int8, products of floats", "int8", partial(to_int8, which="rest", integers=False)),
        Form("int8, attention fused", "int8", to_int8_fused),
    ),
}
"""Forms of all other weights. Products of integers are what VNNI and the dot products of ARM are for; those of floats need
AVX2 or NEON alone."""


def combined(rest: Form, tables: Form) -> Form:
    """Return the form of both; it changes nothing where `rest` has nothing to change."""

    def change(graph: GraphProto) -> int:
        count = rest.change(graph)
        return count + tables.change(graph) if count else 0

    return Form(f"{rest.name}; {tables.name}", rest.precision, change)
