"""Graphs: what may leave the export, the forms of the grid, and what an engine and a processor must have."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import BertConfig, BertModel

from serve import engine
from serve.engine import ENGINE, check_engine, instructions
from serve.errors import ShipyardError
from shipyard.attention import fuse_attention
from shipyard.export import IR_VERSION, OPSET, check_graph
from shipyard.forms import FORMS, TABLES, Form, write_form

WIDTH, ROWS = 64, 1024


def model(weight=None, *, ir=IR_VERSION, opset=OPSET, external=None):
    """A table that rows are looked up in and that all rows are scored by, and a weight of its own."""
    rng = np.random.default_rng(3)
    table = numpy_helper.from_array(rng.normal(size=(ROWS, WIDTH)).astype(np.float32), "table")
    weight = numpy_helper.from_array(
        rng.normal(size=(WIDTH, ROWS)).astype(np.float32) if weight is None else weight, "weight"
    )
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": external, "offset": "0", "length": str(WIDTH * ROWS * 4)}.items():
            weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["found", "turned"], ["scores"]),
        helper.make_node("MatMul", ["found", "weight"], ["more"]),
        helper.make_node("Add", ["scores", "more"], ["out"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "items"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "items", ROWS])
    graph = helper.make_graph(nodes, "g", [ids], [out], [table, weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def answer(made):
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(6).reshape(2, 3)})[0]


@pytest.mark.parametrize(
    "form", [f for forms in FORMS.values() for f in forms if "attention" not in f.name], ids=lambda form: form.name
)
def test_every_form_is_smaller_and_answers_nearly_the_same(tmp_path, form):
    source = model()
    plain, size = answer(source), len(source.SerializeToString())
    written = write_form(source, form)
    onnx.save(written, tmp_path / "form.onnx")
    check_graph(tmp_path / "form.onnx")
    limit = {"fp16": 0.55, "int8": 0.35}[form.precision]
    assert len(written.SerializeToString()) < limit * size
    assert np.abs(answer(written) - plain).max() < 0.02 * np.abs(plain).max()
    assert len(source.SerializeToString()) == size  # the source is left as it was


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_form_of_tables_leaves_other_weights(precision):
    source = model()
    written = write_form(source, TABLES[precision])
    kept = {tensor.name for tensor in written.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert "weight" in kept and "table" not in kept
    assert np.abs(answer(written) - answer(source)).max() < 0.02 * np.abs(answer(source)).max()


def test_a_graph_without_large_weights_has_no_other_form():
    small = model(np.zeros((WIDTH, 8), np.float32))
    del small.graph.node[2:]
    small.graph.output[0].CopyFrom(helper.make_tensor_value_info("found", TensorProto.FLOAT, ["batch", "items", WIDTH]))
    small.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((9, WIDTH), np.float32), "table"))
    for forms in FORMS.values():
        assert [write_form(small, form) for form in forms] == [None] * len(forms)


class Attending(nn.Module):
    """Two layers of attention as a BERT of transformers has it, behind a table of tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        shape = BertConfig(
            vocab_size=64, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        self.encoder = BertModel(shape, add_pooling_layer=False).eval()

    def forward(self, ids, mask):
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.sum(1)


def test_attention_becomes_one_node_and_answers_the_same():
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=1, max=64)
    program = torch.onnx.export(
        Attending().eval(), (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)), dynamo=True,
        opset_version=OPSET, input_names=["ids", "mask"], dynamic_shapes=({0: batch, 1: tokens},) * 2, verbose=False,
    )  # fmt: skip
    source = program.model_proto
    source.ir_version = IR_VERSION
    inputs = {"ids": np.arange(21).reshape(3, 7), "mask": (np.arange(7) < [[7], [4], [1]]).astype(np.int64)}

    def run(made):
        return ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]

    plain, plain_int8 = run(source), run(write_form(source, FORMS["int8"][0]))
    fused = write_form(source, Form("fused", "fp32", fuse_attention))
    kinds = [node.op_type for node in fused.graph.node]
    assert kinds.count("MultiHeadAttention") == 2
    assert np.abs(run(fused) - plain).max() < 1e-5 * np.abs(plain).max()
    [form] = [form for form in FORMS["int8"] if "attention" in form.name]
    written = write_form(source, form)
    assert "Softmax" not in {node.op_type for node in written.graph.node}
    assert np.abs(run(written) - plain_int8).max() < 1e-4 * np.abs(plain_int8).max()
    assert write_form(model(), form) is None


# --- what may leave the export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(tmp_path, bad):
    weight = np.zeros((WIDTH, ROWS), np.float32)
    weight[5, 7] = bad
    onnx.save(model(weight), tmp_path / "model.onnx")
    with pytest.raises(ShipyardError, match="no finite number; value: 'weight'"):
        check_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("more", [{"ir": IR_VERSION + 1}, {"opset": OPSET + 1}])
def test_a_graph_that_is_too_new_is_refused(tmp_path, more):
    onnx.save(model(**more), tmp_path / "model.onnx")
    with pytest.raises(ShipyardError, match="too new for the engines"):
        check_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("place", ["../outside.bin", "/etc/passwd", "missing.bin", "", "a/../../outside.bin"])
def test_weights_outside_of_the_bundle_are_refused(tmp_path, place):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(WIDTH * ROWS * 4))
    (folder / "model.onnx").write_bytes(model(external=place).SerializeToString())
    with pytest.raises(ShipyardError, match="lie outside of its folder, or nowhere"):
        check_graph(folder / "model.onnx")


def test_weights_behind_a_link_out_of_the_bundle_are_refused(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(WIDTH * ROWS * 4))
    (folder / "weights.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "model.onnx").write_bytes(model(external="weights.bin").SerializeToString())
    with pytest.raises(ShipyardError, match="lie outside of its folder"):
        check_graph(folder / "model.onnx")


def test_weights_beside_the_graph_are_read_and_checked(tmp_path):
    (tmp_path / "model.onnx").write_bytes(model(external="weights.bin").SerializeToString())
    (tmp_path / "weights.bin").write_bytes(np.ones((WIDTH, ROWS), np.float32).tobytes())
    check_graph(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").write_bytes(np.full((WIDTH, ROWS), np.nan, np.float32).tobytes())
    with pytest.raises(ShipyardError, match="no finite number"):
        check_graph(tmp_path / "model.onnx")


# --- what an engine and a processor must have ------------------------------------------------------------------------


def test_this_machine_may_run_what_is_made():
    check_engine(ENGINE, "bundle")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "tensorrt"}, "made for another engine"),
        ({"minimum": "99.0"}, "needs a newer engine"),
        ({"minimum": ort.__version__ + ".1"}, None),
        ({"instructions": {"riscv64": []}}, "not made for this architecture"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(change, said):
    if said is None:
        check_engine(ENGINE | change, "bundle")
        return
    with pytest.raises(ShipyardError, match=said):
        check_engine(ENGINE | change, "bundle")


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "have", "missing"),
    [
        ("x86_64", "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma avx512_vnni\n", ["avx2", "fma", "avx512_vnni"], ""),
        ("x86_64", "flags\t\t: fpu sse2 fma\n", ["fma"], "avx2"),
        ("aarch64", "Features\t: fp asimd asimddp i8mm\n", ["asimd", "asimddp", "i8mm"], ""),
        ("aarch64", "Features\t: fp i8mm\n", ["i8mm"], "asimd"),
        ("x86_64", "nothing that is known\n", [], ""),  # a system that does not tell is tried
    ],
)
def test_a_processor_without_the_instructions_is_refused(monkeypatch, tmp_path, machine, cpuinfo, have, missing):
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert instructions(file) == have
    assert instructions(tmp_path / "none") == []
    monkeypatch.setattr(engine.platform, "machine", lambda: machine)
    monkeypatch.setattr(engine, "instructions", lambda: have)
    if not missing:
        check_engine(ENGINE, "bundle")
        return
    with pytest.raises(ShipyardError, match=f"lacks instructions; value: '{missing}'"):
        check_engine(ENGINE, "bundle")


def test_a_table_that_only_ids_of_the_request_are_looked_up_in_is_stored_in_int8():
    """A tower's words are half of its size; its positions, which no request names, stay."""
    rng = np.random.default_rng(3)
    tensors = {
        "words": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "positions": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "weight": rng.normal(size=(WIDTH, ROWS)).astype(np.float32),
        "at": np.array([[0, 1, 2]], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["said"]),
        helper.make_node("Gather", ["positions", "at"], ["placed"]),
        helper.make_node("Add", ["said", "placed"], ["found"]),
        helper.make_node("MatMul", ["found", "weight"], ["out"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "items"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "items", ROWS])
    graph = helper.make_graph(nodes, "g", [ids], [out], [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    written = write_form(source, FORMS["int8"][0])
    names = {tensor.name: list(tensor.dims) for tensor in written.graph.initializer}
    assert "words" not in names and names["words_int8"] == [ROWS, 1, WIDTH] and "positions" in names
    plain, small = answer(source), answer(written)
    assert np.abs(plain - small).max() < 0.03 * np.abs(plain).max()
