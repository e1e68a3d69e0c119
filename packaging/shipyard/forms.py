"""Forms: the graphs that a target may serve a sub-model by, from its graph in fp32.

int8 is weights alone, one scale a row (blocks of 16 to 128 inputs where a row is longer): ONNX Runtime's MatMulNBits with
8 bits. Activations keep their own scale for each row, so that a request alone and in a batch gets the same answer; a
dynamic scale for a whole batch does not do that. fp16 halves what is stored and computes in fp32: a text tower that
computes in fp16 moves queries by a thousandth, which reorders a quarter of the first ten places, for products of one
category crowd together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.config import Precision
from shipyard.attention import fuse_attention

LARGE = 32768
"""Elements from which a weight is worth quantising."""


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


def to_fp16(graph: GraphProto, *, tables: bool = False) -> int:
    """Store large weights in fp16 in place, with a cast where they are used; only those of `tables`, if wanted.

    Returns:
        How many weights were replaced.
    """
    gathered, count = _gathered(graph), 0
    for tensor in list(graph.initializer):
        wanted = tensor.name in gathered or not tables
        if wanted and tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= LARGE:
            count += 1
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_fp16")
            graph.initializer.remove(tensor)
            graph.initializer.append(half)
            cast = helper.make_node(
                "Cast", [half.name], [tensor.name], f"{tensor.name}_cast", to=onnx.TensorProto.FLOAT
            )
            graph.node.insert(0, cast)
    return count


def _gathered(graph: GraphProto) -> set[str]:
    """Return the names of tables: what rows are looked up in."""
    return {node.input[0] for node in graph.node if node.op_type == "Gather"}


def to_int8(graph: GraphProto, *, block: int = 128, integers: bool = True, tables: bool = False) -> int:
    """Replace large weights of MatMul and Gemm by 8-bit ones in place, and tables that a request's ids are looked up in.

    Args:
        graph: what is changed.
        block: the most inputs that share a scale.
        integers: multiply integers, the activations' too; else weights become floats again before they are multiplied.
        tables: only weights that rows are looked up in.

    Returns:
        How many weights were replaced.
    """
    weights, gathered = {tensor.name: tensor for tensor in graph.initializer}, _gathered(graph)
    turned = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    replaced: dict[str, tuple[str, str, int]] = {}
    for node in [n for n in graph.node if n.op_type in ("MatMul", "Gemm")]:
        source = node.input[1]
        name = turned[source].input[0] if source in turned else source
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        if not plain or name not in weights or len(weights[name].dims) != 2 or np.prod(weights[name].dims) < LARGE:
            continue
        if tables and name not in gathered:
            continue
        array = numpy_helper.to_array(weights[name]).astype(np.float32)
        by_row = (source in turned) != bool(settings.get("transB", 0))  # [outputs, inputs] as it is stored
        rows = array if by_row else array.T
        size = min(block, int(rows.shape[1] & -rows.shape[1]))
        if size < 16:
            continue
        codes, scales = rows_to_int8(rows, size)
        codes_name, scales_name = f"{name}_int8", f"{name}_scale"
        graph.initializer.extend(
            [numpy_helper.from_array(codes, codes_name), numpy_helper.from_array(scales, scales_name)]
        )
        biased = len(node.input) > 2
        result = f"{node.output[0]}_product" if biased else node.output[0]
        product = helper.make_node(
            "MatMulNBits", [node.input[0], codes_name, scales_name], [result], node.name, domain="com.microsoft",
            K=rows.shape[1], N=rows.shape[0], bits=8, block_size=size,
            accuracy_level=4 if integers else 1,
        )  # fmt: skip
        added = [helper.make_node("Add", [result, node.input[2]], [node.output[0]])] if biased else []
        _replace(graph, node, [product, *added])
        if by_row:
            replaced[name] = codes_name, scales_name, rows.shape[1]
    for name in sorted(_looked_up(graph) & weights.keys() - replaced.keys()):
        rows = numpy_helper.to_array(weights[name]).astype(np.float32)
        size = min(block, int(rows.shape[1] & -rows.shape[1]))
        if rows.size >= LARGE and size >= 16:
            codes, scales = rows_to_int8(rows, size)
            replaced[name] = f"{name}_int8", f"{name}_scale", rows.shape[1]
            graph.initializer.extend([numpy_helper.from_array(codes, replaced[name][0])])
            graph.initializer.extend([numpy_helper.from_array(scales, replaced[name][1])])
    for gather in [n for n in graph.node if n.op_type == "Gather" and n.input[0] in replaced]:
        _replace(graph, gather, _gather_int8(graph, gather, *replaced[gather.input[0]]))
    _drop_unused(graph)
    return sum(tensor.name.endswith("_int8") for tensor in graph.initializer)


def _looked_up(graph: GraphProto) -> set[str]:
    """Return the names of tables that ids of a request [B, L] are looked up in, and that nothing else reads."""
    given = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 2}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {
        name
        for name, nodes in readers.items()
        if all(n.op_type == "Gather" and n.input[0] == name and n.input[1] in given for n in nodes)
    }


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


def _gather_int8(graph: GraphProto, gather: NodeProto, codes: str, scales: str, width: int) -> list[NodeProto]:
    """Return nodes that gather rows [B, H] of 8-bit codes and give them back as floats [B, H, width]."""
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


def to_int8_fused(graph: GraphProto) -> int:
    """Fuse attention, then replace large weights as `to_int8` does; nothing where there is no attention of that form."""
    return to_int8(graph) if fuse_attention(graph) else 0


FP32 = Form("fp32", "fp32", lambda graph: 0)

FORMS: dict[Precision, tuple[Form, ...]] = {
    "fp32": (),
    "fp16": (Form("fp16", "fp16", to_fp16),),
    "int8": (
        Form("int8, blocks of 128", "int8", to_int8),
        Form("int8, blocks of 32", "int8", partial(to_int8, block=32)),
        Form("int8, blocks of 128, products of floats", "int8", partial(to_int8, integers=False)),
        Form("int8, blocks of 128, attention fused", "int8", to_int8_fused),
    ),
}
"""The grid by precision. Of forms of equal size the first that holds is taken: products of integers are what VNNI and the
dot products of ARM are for."""

TABLES: dict[Precision, Form | None] = {
    "fp32": None,
    "fp16": Form("tables in fp16", "fp16", partial(to_fp16, tables=True)),
    "int8": Form("tables in int8", "int8", partial(to_int8, tables=True)),
}
"""Forms of the tables alone, which have a gate of their own: what they cost does not hide behind the rest."""
