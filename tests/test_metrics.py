"""First places, gates, int8 and zips: against slow references, golden values and the engine itself."""

import math
import os
import zipfile

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper, numpy_helper

from models.config import Gate, Profile
from serve.errors import ShipyardError
from shipyard.bundle import write_zip
from shipyard.forms import LARGE, rows_to_int8, to_int8
from shipyard.gates import hold
from shipyard.metrics import PLACES, top

# --- the first ten ---------------------------------------------------------------------------------------------------


def slow_top(scores):
    return 1 + np.argsort(-scores[:, 1:], axis=1, kind="stable")[:, :PLACES]


@given(
    npst.arrays(
        np.float32, st.tuples(st.integers(1, 6), st.integers(11, 60)), elements=st.integers(-3, 3), unique=False
    )
)
@settings(deadline=None)
def test_the_scores_of_the_first_ten_are_those_of_a_full_sort_with_ties(scores):
    found = top(scores)
    assert found.shape == (len(scores), PLACES)
    assert (found > 0).all()
    assert all(len(set(row)) == PLACES for row in found.tolist())
    np.testing.assert_array_equal(np.take_along_axis(scores, found, 1), np.take_along_axis(scores, slow_top(scores), 1))


@given(st.integers(0, 2**32 - 1), st.integers(11, 500))
@settings(deadline=None)
def test_without_ties_the_first_ten_are_those_of_a_full_sort(seed, rows):
    scores = np.random.default_rng(seed).permutation(rows).astype(np.float32)[None]
    np.testing.assert_array_equal(top(scores), slow_top(scores))


def test_padding_is_left_out_however_high_it_scores():
    scores = np.r_[1e9, np.arange(20.0)][None]
    np.testing.assert_array_equal(top(scores)[0], np.arange(20, 10, -1))


# --- gates -----------------------------------------------------------------------------------------------------------


def profile(default, **gates):
    return Profile(
        households=0,
        tower_steps=1,
        tower_batch=2,
        joint_steps=1,
        joint_batch=2,
        joint_sampled=1,
        validation_examples=20,
        test_examples=20,
        default_gate=Gate(over_before=default[0], over_baseline=default[1]),
        gate={name: Gate(over_before=gate[0], over_baseline=gate[1]) for name, gate in gates.items()},
    )


def score(before, baseline):
    return {
        "metric": "nDCG@10",
        "over_before": {"value": before + 0.1, "low": before, "high": before + 0.2},
        "over_baseline": {"value": baseline + 0.1, "low": baseline, "high": baseline + 0.2},
        "over_teacher": None,
    }


@pytest.mark.parametrize("found", [(0.01, -0.05), (0.3, 0.2)], ids=["just", "easily"])
def test_a_gate_that_is_reached_holds(found):
    assert hold({"search": score(*found)}, profile((0.01, -0.05))) is None


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        ((0.0099, 0.2), "over_before"),
        ((0.3, -0.0501), "over_baseline"),
        ((math.nan, 0.2), "over_before"),
        ((0.3, math.nan), "over_baseline"),
        ((-math.inf, 0.2), "over_before"),
    ],
)
def test_a_gate_that_is_missed_stops_the_release(found, bound):
    with pytest.raises(ShipyardError) as fault:
        hold({"recommend": score(0.3, 0.3), "search": score(*found)}, profile((0.01, -0.05)))
    said = str(fault.value)
    assert said.startswith(f"gate: search: nDCG@10 {bound} is too low") and "\n" not in said
    assert "mend: " in said


def test_a_bound_that_is_no_number_stops_the_release():
    with pytest.raises(ShipyardError, match="over_baseline"):
        hold({"search": score(0.5, 0.5)}, profile((0.01, math.nan)))


def test_a_sub_models_own_gate_goes_before_the_default():
    strict, loose = (0.2, 0.2), (-1.0, -1.0)
    hold({"search": score(0, 0)}, profile(strict, search=loose))
    with pytest.raises(ShipyardError, match="gate: search"):
        hold({"search": score(0, 0)}, profile(loose, search=strict))
    with pytest.raises(ShipyardError, match="gate: recommend"):
        hold({"search": score(0, 0), "recommend": score(0, 0)}, profile(strict, search=loose))


def taught(low):
    relative = {"value": low + 0.01, "low": low, "high": low + 0.02}
    return score(0.5, 0.5) | {"over_teacher": {"value": 0.0, "low": -9.0, "high": 9.0, "relative": relative}}


def test_a_student_is_held_to_its_part_of_the_teacher():
    hold({"edge": taught(-0.05)}, profile((0, 0)))
    with pytest.raises(ShipyardError, match=r"over_teacher is too low: its 95 % interval starts at -0\.0501"):
        hold({"edge": taught(-0.0501)}, profile((0, 0)))
    unknown = taught(0.0)
    unknown["over_teacher"]["relative"] = None
    with pytest.raises(ShipyardError, match="over_teacher"):
        hold({"edge": unknown}, profile((0, 0)))


@pytest.mark.parametrize("missing", ["over_before", "over_baseline", "over_teacher"])
def test_a_figure_that_is_missing_stops_the_release(missing):
    found = {name: figure for name, figure in score(0.5, 0.5).items() if name != missing}
    with pytest.raises((ShipyardError, KeyError)):
        hold({"search": found}, profile((0, 0)))


# --- int8 ------------------------------------------------------------------------------------------------------------


def restored(codes, scales):
    return ((codes.astype(np.float64) - 128) * scales[..., None]).reshape(len(codes), -1)


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(64)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([16, 32, 64]),
)
@example(np.full((1, 64), 5.199e-42, np.float32), 16)
@settings(deadline=None)
def test_a_weight_is_restored_to_half_a_step(rows, block):
    codes, scales = rows_to_int8(rows, block)
    assert codes.dtype == np.uint8 and codes.shape == (len(rows), 64 // block, block)
    assert scales.dtype == np.float32 and scales.shape == (len(rows), 64 // block)
    assert codes.min() >= 1
    step = np.repeat(scales, block, axis=1)
    largest = np.repeat(np.abs(rows).reshape(len(rows), -1, block).max(2), block, axis=1)
    assert (np.abs(restored(codes, scales) - rows) <= 0.5 * step + 1e-5 * largest + 1e-37).all()


def test_rows_of_zeros_stay_zeros():
    codes, scales = rows_to_int8(np.zeros((2, 32), np.float32), 16)
    assert (codes == 128).all() and (scales == 0).all()
    assert not restored(codes, scales).any()


def test_the_largest_weights_take_the_outermost_codes():
    codes, scales = rows_to_int8(np.r_[-2.0, 2.0, np.zeros(14)].astype(np.float32)[None], 16)
    assert codes[0, 0, :2].tolist() == [1, 255]
    assert scales[0, 0] == pytest.approx(2 / 127)


ROWS, WIDTH = 1024, 64
assert ROWS * WIDTH >= LARGE


def graph_of(kind, table):
    """Return a graph that multiplies x [B, W] by a large table, and the result that it should have, as a function."""
    weights = {"table": table}
    if kind == "MatMul":
        weights["table"] = table.T.copy()
        nodes, f = [helper.make_node("MatMul", ["x", "table"], ["y"])], lambda x: x @ table.T
    elif kind == "MatMul of a transpose":
        nodes = [
            helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["y"]),
        ]
        f = lambda x: x @ table.T  # noqa: E731
    else:
        weights["bias"] = bias = np.linspace(-1, 1, ROWS, dtype=np.float32)
        turned = kind == "Gemm of a transpose"
        weights["table"] = table if turned else table.T.copy()
        nodes = [helper.make_node("Gemm", ["x", "table", "bias"], ["y"], transB=int(turned))]
        f = lambda x: x @ table.T + bias  # noqa: E731
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", ROWS])]
    return helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(w, n) for n, w in weights.items()]
    ), f


def session(graph):
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(1).normal(0, 1, (ROWS, WIDTH)).astype(np.float32)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["MatMul", "MatMul of a transpose", "Gemm", "Gemm of a transpose"])
def test_a_product_with_an_int8_table_is_that_of_the_floats(table, kind):
    graph, expected = graph_of(kind, table)
    x = np.random.default_rng(2).normal(0, 1, (7, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(session(graph).run(["y"], {"x": x})[0], expected(x), atol=1e-4)
    assert to_int8(graph) == 1
    assert [n.op_type for n in graph.node if n.op_type != "Add"] == ["MatMulNBits"]
    assert sum(np.prod(t.dims) for t in graph.initializer if t.data_type == TensorProto.FLOAT) < table.size / 8
    assert_close(session(graph).run(["y"], {"x": x})[0], expected(x))


def test_alone_and_in_a_batch_an_int8_product_is_the_same(table):
    graph, _ = graph_of("Gemm of a transpose", table)
    to_int8(graph)
    opened = session(graph)
    scales = np.array([[1e-3], [1.0], [1e3]], np.float32)
    x = scales * np.random.default_rng(3).normal(0, 1, (3, WIDTH)).astype(np.float32)
    together = opened.run(["y"], {"x": x})[0]
    alone = np.concatenate([opened.run(["y"], {"x": row[None]})[0] for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_a_table_that_is_gathered_from_too_is_kept_once_and_in_int8(table):
    nodes = [
        helper.make_node("Gather", ["table", "items"], ["rows"], axis=0),
        helper.make_node("ReduceSum", ["rows", "axis"], ["user"], keepdims=0),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["user", "turned"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("items", TensorProto.INT64, ["B", "H"])]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", ROWS]),
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["B", "H", WIDTH]),
    ]
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1], np.int64), "axis")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    items = np.array([[0, 1023, 5], [7, 7, 512]])
    plain = session(graph).run(["y", "rows"], {"items": items})
    np.testing.assert_array_equal(plain[1], table[items])
    assert to_int8(graph) == 1
    assert "table" not in {tensor.name for tensor in graph.initializer}
    small = session(graph).run(["y", "rows"], {"items": items})
    assert_close(small[0], plain[0])
    step = np.abs(table[items]).max(2, keepdims=True) / 127
    assert (np.abs(small[1] - plain[1]) <= 0.5 * step + 1e-6).all()


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [((WIDTH, LARGE // WIDTH - 1), {}), ((WIDTH, ROWS), {"alpha": 0.5}), ((WIDTH + 1, ROWS), {})],
    ids=["small", "scaled", "odd"],
)
def test_what_is_not_worth_it_or_cannot_be_is_left_as_it_was(shape, attributes):
    weight = np.ones(shape, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(shape[1], np.float32), "b")],
    )
    before = graph.SerializeToString(deterministic=True)
    assert to_int8(graph) == 0
    assert graph.SerializeToString(deterministic=True) == before


# --- archives --------------------------------------------------------------------------------------------------------

FILES = {"bundle.json": b"{}", "serve/server.py": b"pass\n", "serve/a/b.bin": bytes(range(256)), "z.txt": b""}


def write_tree(folder, names, *, mode, when):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FILES[name])
        file.chmod(mode)
        os.utime(file, (when, when))


def test_an_archive_has_the_same_bytes_whatever_the_times_modes_and_order(tmp_path):
    for name, names, mode, when in (
        ("one", list(FILES), 0o644, 0),
        ("two", list(reversed(FILES)), 0o777, 2_000_000_000),
        ("three", sorted(FILES), 0o400, 1_234_567_890),
    ):
        write_tree(tmp_path / name, names, mode=mode, when=when)
        (tmp_path / name / "empty").mkdir()
        write_zip(tmp_path / name, tmp_path / f"{name}.zip")
    one, two, three = ((tmp_path / f"{name}.zip").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def test_an_archive_holds_the_files_and_nothing_else(tmp_path):
    write_tree(tmp_path / "tree", FILES, mode=0o600, when=0)
    write_zip(tmp_path / "tree", tmp_path / "tree.zip")
    with zipfile.ZipFile(tmp_path / "tree.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(FILES)
        for entry in archive.infolist():
            assert archive.read(entry) == FILES[entry.filename]
            assert entry.external_attr >> 16 == 0o100644
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.compress_type == zipfile.ZIP_STORED


def test_another_content_or_name_makes_other_bytes(tmp_path):
    write_tree(tmp_path / "tree", FILES, mode=0o644, when=0)
    write_zip(tmp_path / "tree", tmp_path / "one.zip")
    (tmp_path / "tree" / "z.txt").rename(tmp_path / "tree" / "y.txt")
    write_zip(tmp_path / "tree", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() != (tmp_path / "two.zip").read_bytes()


def test_top_breaks_ties_by_the_lower_row():
    scores = np.zeros((1, 500))
    scores[0, 400] = 1.0
    scores[0, [7, 9, 300]] = 0.5
    assert top(scores)[0].tolist() == [400, 7, 9, 300, 1, 2, 3, 4, 5, 6]
