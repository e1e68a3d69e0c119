"""A shard: search's graph as the release serves it, over other rows.

Search scores a row by the query, the row's own vector, bias and type, and the shopper's events with that row alone; no other
row has a part in it. So a graph whose tables hold other rows gives them the scores that they would have in the catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto, numpy_helper
from safetensors.numpy import load_file

from models.config import Precision
from serve.codec import Codec
from serve.errors import ShipyardError
from serve.runtime import LOGITS
from shipyard.forms import FP32, REST, TABLES, Form, combined, write_form

Vectors = npt.NDArray[np.float32]

OF_ROWS = ("vectors", "bias", "types", "type_of_row")
"""What of `split`'s parameters is of rows, and is replaced."""

BATCH = 64


def named(form: str, precision: Precision) -> Form:
    """Return a form by the name that its record has.

    Raises:
        ShipyardError: the precision has no such form.
    """
    rest, tables = REST[precision], TABLES[precision]
    forms = {f.name: f for f in (FP32, *rest, *tables, *(combined(one, table) for one in rest for table in tables))}
    if form not in forms:
        raise ShipyardError(f"{precision}: no such form", value=form, allowed=", ".join(forms))
    return forms[form]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a shard: `vectors` [n, D], `bias` [n], their types' vectors `types` [P, W], and `type_of_row` [n], from 1."""

    vectors: Vectors
    bias: Vectors
    types: Vectors
    type_of_row: npt.NDArray[np.int64]


class Search:
    """Search as the release has it: its graph in fp32, the parameters that were split off, and the form that is served."""

    def __init__(self, exported: Path, split: Path, form: Form) -> None:
        self.state = load_file(split / "model.safetensors")
        self._graph, self._form = onnx.load(exported / "model.onnx"), form
        self._named = {name: self._find(name) for name in (*OF_ROWS, "head.query.weight")}

    def _find(self, name: str) -> tuple[str, bool]:
        """Return what a parameter is called in the graph, and whether it is turned there.

        Raises:
            ShipyardError: the graph does not hold it once.
        """
        wanted, found = self.state[name], []
        for tensor in self._graph.graph.initializer:
            shape = tuple(tensor.dims)
            if shape in (wanted.shape, wanted.shape[::-1]):
                array = numpy_helper.to_array(tensor)
                if np.array_equal(array, wanted):
                    found.append((tensor.name, False))
                elif np.array_equal(array, wanted.T):
                    found.append((tensor.name, True))
        if len(found) != 1:
            raise ShipyardError(
                f"search's graph: {name} is not in it once", value=len(found), mend="make the release again"
            )
        return found[0]

    def embed(self, codec: Codec, texts: Sequence[str]) -> Vectors:
        """Return the vectors [n, W] of texts, by the tower of the form that is served."""
        query = self._named["head.query.weight"][0]
        [name] = [node.input[0] for node in self._graph.graph.node if query in node.input]
        session = _session(self._written(_part(self._graph, name)))
        once = sorted(set(texts), key=lambda text: (len(text), text))
        found: dict[str, Vectors] = {}
        for k in range(0, len(once), BATCH):
            part = once[k : k + BATCH]
            given = codec.encode([{"query": text} for text in part])
            # beside the texts it may ask for another input's size, for how many requests there are
            [vectors] = session.run([name], {one.name: given[one.name] for one in session.get_inputs()})
            found |= zip(part, vectors, strict=True)
        return np.stack([found[text] for text in texts])

    def over(self, rows: Rows, most: int) -> ModelProto:
        """Return the graph that is served over other rows, of which it returns at most `most`."""
        model = ModelProto()
        model.CopyFrom(self._graph)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        padded: dict[str, npt.NDArray[Any]] = {
            "vectors": np.pad(rows.vectors, ((1, 0), (0, 0))), "bias": rows.bias,
            "types": np.pad(rows.types, ((1, 0), (0, 0))), "type_of_row": np.pad(rows.type_of_row, (1, 0)),
        }  # fmt: skip
        for name, array in padded.items():
            called, turned = self._named[name]
            told = np.ascontiguousarray((array.T if turned else array).astype(self.state[name].dtype))
            tensors[called].CopyFrom(numpy_helper.from_array(told, called))
        returned = min(most, len(rows.bias))
        [best] = [node for node in model.graph.node if node.op_type == "TopK"]
        tensors[best.input[1]].CopyFrom(numpy_helper.from_array(np.array([returned]), best.input[1]))
        # shapes between the nodes were those of the other rows
        del model.graph.value_info[:]
        for output in model.graph.output:
            columns = len(rows.bias) + 1 if output.name == LOGITS else returned
            output.type.tensor_type.shape.dim[1].dim_value = columns
        onnx.checker.check_model(model)
        return self._written(model)

    def _written(self, model: ModelProto) -> ModelProto:
        return write_form(model, self._form) or model


def logits(model: ModelProto, inputs: dict[str, npt.NDArray[Any]]) -> Vectors:
    """Return the logits [B, n + 1] of a graph."""
    [found] = _session(model).run([LOGITS], inputs)
    return np.asarray(found)


def _part(model: ModelProto, output: str) -> ModelProto:
    """Return the part of a graph that makes `output`."""
    part = ModelProto()
    part.CopyFrom(model)
    needed, nodes = {output}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    for field, kept in (
        (part.graph.node, reversed(nodes)),
        (part.graph.initializer, [one for one in model.graph.initializer if one.name in needed]),
        (part.graph.input, [one for one in model.graph.input if one.name in needed]),
        (part.graph.output, [one for one in model.graph.value_info if one.name == output]),
        (part.graph.value_info, []),
    ):
        del field[:]
        field.extend(kept)
    return part


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
