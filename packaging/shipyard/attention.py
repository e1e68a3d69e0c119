"""Attention: the text tower's scaled dot-product attention as one node, ONNX Runtime's MultiHeadAttention.

ONNX Runtime's own fusions find none in what torch's exporter writes: it scales queries and keys apart, turns keys by way of
three dimensions, puts a guard behind the softmax and makes the mask by indexing; they want one scale, one transposition and
a mask of a known make.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class _Side:
    """Queries, keys or values: the projection [B, L, N x D] that they are cut from, `heads` = N, `width` = D, and scale."""

    projection: str
    heads: int
    width: int
    scale: float


def fuse_attention(graph: GraphProto) -> int:
    """Replace each attention by one node in place; return how many were found.

    A request must keep one key at least: for one without any the exporter's guard says 0, the node says nothing. A text
    has its two marks.
    """
    made = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    count = 0
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        guard = next((user for user in users.get(softmax.output[0], ()) if user.op_type == "Where"), softmax)
        mixed = _only(users, guard, "MatMul")
        flat = _only(users, _only(users, mixed, "Transpose"), "Reshape")
        masked = made.get(softmax.input[0])
        product = made.get(masked.input[0]) if masked is not None and masked.op_type == "Add" else None
        if masked is None or product is None or product.op_type != "MatMul" or mixed is None or flat is None:
            continue
        q, k, v = (_side(made, weights, name) for name in (*product.input, mixed.input[1]))
        if q is None or k is None or v is None or not q.width == k.width == v.width or v.scale != 1:
            continue
        node = helper.make_node(
            "MultiHeadAttention", [q.projection, k.projection, v.projection, "", "", masked.input[1]], [flat.output[0]],
            flat.name, domain="com.microsoft", num_heads=v.heads, scale=q.scale * k.scale,
        )  # fmt: skip
        at = list(graph.node).index(flat)
        graph.node.remove(flat)
        graph.node.insert(at, node)
        count += 1
    return count


def _only(users: Mapping[str, list[NodeProto]], node: NodeProto | None, kind: str) -> NodeProto | None:
    """Return the node that reads a result, if it is the only one and of that kind."""
    found = users.get(node.output[0], []) if node is not None else []
    return found[0] if [user.op_type for user in found] == [kind] else None


def _side(made: Mapping[str, NodeProto], weights: Mapping[str, TensorProto], name: str) -> _Side | None:
    """Go up from [B, N, L, D], or keys turned to [B, N, D, L], to the projection."""
    scale = 1.0
    while (node := made.get(name)) is not None:
        if node.op_type == "Mul":
            if node.input[1] not in weights or math.prod(weights[node.input[1]].dims) != 1:
                return None
            scale *= float(numpy_helper.to_array(weights[node.input[1]]).reshape(()))
        elif node.op_type == "Transpose" and list(helper.get_attribute_value(node.attribute[0])) == [0, 2, 1, 3]:
            return _cut(made, weights, node.input[0], scale)
        elif node.op_type not in ("Reshape", "Transpose"):
            return None
        name = node.input[0]
    return None


def _cut(made: Mapping[str, NodeProto], weights: Mapping[str, TensorProto], name: str, scale: float) -> _Side | None:
    """Read heads and width where a projection and its bias are cut into [B, L, N, D]."""
    cut = made.get(name)
    shape = made.get(cut.input[1]) if cut is not None and cut.op_type == "Reshape" else None
    added = made.get(cut.input[0]) if cut is not None else None
    if cut is None or shape is None or shape.op_type != "Concat" or added is None or added.op_type != "Add":
        return None
    bias = next((weights[given] for given in added.input if given in weights), None)
    if bias is None or shape.input[-1] not in weights:
        return None
    width = int(numpy_helper.to_array(weights[shape.input[-1]]).reshape(()))
    return _Side(cut.input[0], math.prod(bias.dims) // width, width, scale)
