"""The grid's gates on a small ranker: what each refuses, what is chosen, and requests alone against a batch."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard.cases import Requests, singles, together, trim
from shipyard.export import IR_VERSION, OPSET, alone_against_together, open_session
from shipyard.forms import REST, TABLES, Form, write_form
from shipyard.quantise import SAME, _best, _Judge, _tried
from tests.conftest import ROOT

WIDTH, ROWS = 64, 700
TARGET = load_fleet(ROOT / "fleet.toml").target["cpu"]


def ranker(dynamic=False):
    """Sum up the rows of a history, and rank all rows by the product; `dynamic` multiplies in int8 by one scale a batch."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(ROWS + 1, WIDTH)).astype(np.float32)
    table[0] = 0
    weights = {"table": table, "axes": np.array([1], np.int64), "first": np.array([50], np.int64)}
    nodes = [
        helper.make_node("Gather", ["table", "items"], ["found"]),
        helper.make_node("ReduceSum", ["found", "axes"], ["state"], keepdims=0),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
    ]
    if dynamic:
        nodes += [
            helper.make_node("DynamicQuantizeLinear", ["state"], ["codes", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
        ]
    nodes += [
        helper.make_node("MatMul", ["rounded" if dynamic else "state", "turned"], ["logits"]),
        helper.make_node("TopK", ["logits", "first"], ["scores", "rows"], axis=1),
    ]
    items = helper.make_tensor_value_info("items", TensorProto.INT64, ["batch", "items"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "items", 1])
    outputs = [
        helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch", 50]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 50]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", ROWS + 1]),
    ]
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [items, features], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def opened(made, folder):
    onnx.save(made, folder / "opened.onnx")
    return open_session(folder / "opened.onnx")


def asked(n=40, width=9):
    rng = np.random.default_rng(6)
    items = rng.integers(1, ROWS + 1, (n, width)) * (np.arange(width) < rng.integers(1, width + 1, (n, 1)))
    inputs = {"items": items, "features": np.zeros((n, width, 1), np.float32)}
    return Requests(inputs, items[:, :1].copy())


@pytest.fixture
def judge(tmp_path):
    long = {"items": 1 + np.arange(60)[None], "features": np.zeros((1, 60, 1), np.float32)}
    return _Judge(opened(ranker(), tmp_path), asked(), {"the longest history": long}, TARGET)


def judged(judge, folder, change):
    """Judge a form of the table alone, whose rows are changed."""
    made = ranker()
    [tensor] = [tensor for tensor in made.graph.initializer if tensor.name == "table"]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()).astype(np.float32), "table"))
    onnx.save(made, folder / "changed.onnx")
    return judge.judge(Form("changed", "int8", lambda graph: 1), folder / "changed.onnx")


def test_an_equal_graph_costs_nothing(judge, tmp_path):
    found = judged(judge, tmp_path, lambda table: table)
    assert found.refused is None
    assert found.record["loss"] == found.record["parity"] == 0
    assert found.record["order"] == 1
    assert found.checks["the longest history"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "changed", "said"),
    [
        ({}, lambda table: np.roll(table, 1, axis=0), "of the metric; 1.00% at most"),
        (
            {"max_loss": 0.5},
            lambda table: table + 0.4 * np.sin(np.arange(table.size)).reshape(table.shape),
            "places are",
        ),
    ],
)
def test_what_costs_the_metric_or_changes_the_order_is_refused(judge, tmp_path, change, changed, said):
    judge.target = TARGET.model_copy(update=change)
    assert said in judged(judge, tmp_path, changed).refused


def test_what_ranks_an_extreme_request_otherwise_is_refused(judge, tmp_path):
    judge.logits["the longest history"] = -judge.logits["the longest history"]
    assert "ranks the longest history otherwise: rank correlation -1" in judged(judge, tmp_path, lambda t: t).refused


def test_a_scale_of_a_whole_batch_is_refused_and_scales_of_rows_are_not(judge, tmp_path):
    """A request that adds up sixty rows beside one that adds up one: their common scale suits neither."""
    apart = alone_against_together(opened(ranker(dynamic=True), tmp_path), judge.alone)
    assert apart > 10 * SAME
    onnx.save(ranker(dynamic=True), tmp_path / "dynamic.onnx")
    found = judge.judge(Form("dynamic", "int8", lambda graph: 1), tmp_path / "dynamic.onnx")
    assert "with the batch that it comes in" in found.refused
    for form in TABLES["int8"]:
        assert alone_against_together(opened(write_form(ranker(), form), tmp_path), judge.alone) < SAME


def test_tables_are_tried_until_one_holds(judge, tmp_path):
    assert len(_tried(judge, ranker(), TABLES["int8"], tmp_path, "tables", enough=1)) == 1
    judge.target = TARGET.model_copy(update={"max_loss": -1.0})  # nothing holds
    tried = _tried(judge, ranker(), TABLES["int8"], tmp_path, "tables", enough=1)
    assert [one.form for one in tried] == list(TABLES["int8"])
    sizes = [one.record["bytes"] for one in tried]
    assert sizes == sorted(sizes)
    with pytest.raises(ShipyardError, match="no form holds; value: 'tables in int8: costs"):
        _best(tried, TARGET, "quantise: recommend: int8")


def test_of_those_that_hold_size_decides_or_by_wish_latency(judge, tmp_path):
    one = judged(judge, tmp_path, lambda table: table)

    def of(name, size, latency, refused=None):
        return replace(one, record={"form": name, "bytes": size, "latency_ms": latency}, refused=refused)

    tried = [of("refused", 1, 1, "why"), of("fast", 30, 2), of("small", 20, 5), of("as small", 19.9, 4)]
    assert _best(tried, TARGET, "").record["form"] == "small"
    by_latency = TARGET.model_copy(update={"choose": "latency"})
    assert _best(tried, by_latency, "").record["form"] == "fast"


def test_the_rankers_table_has_no_rest():
    assert [write_form(ranker(), form) for form in REST["int8"]] == [None] * len(REST["int8"])


# --- alone and together ----------------------------------------------------------------------------------------------

HISTORIES = st.lists(st.lists(st.integers(1, 99), max_size=7), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(HISTORIES)
def test_requests_come_out_of_a_batch_as_they_went_in(histories):
    alone = [
        {
            "items": np.array([history or [0]], np.int64),
            "features": np.array([history or [0]], np.float32)[:, :, None],
        }
        for history in histories
    ]
    batch = together(alone)
    assert batch["items"].shape == batch["features"].shape[:2] == (len(histories), max(1, *map(len, histories)))
    for k, one in enumerate(alone):
        back = trim({name: value[k : k + 1] for name, value in batch.items()})
        for name in one:
            np.testing.assert_array_equal(back[name], one[name])


def test_the_extreme_requests_are_among_those_that_are_asked_alone():
    found = singles(asked(), [{"items": np.zeros((1, 1), np.int64), "features": np.zeros((1, 1, 1), np.float32)}])
    assert len(found) == 17
    assert not found[-1]["items"].any()
    assert all(one["items"].shape[0] == 1 and one["items"].all() for one in found[:-1])
