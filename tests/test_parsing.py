"""What comes from anywhere is parsed: whatever its bytes, it is read or refused in one line."""

import json
import zipfile
from contextlib import suppress

import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from models.release import read_release
from serve.errors import ShipyardError
from serve.trust import MANIFEST, key_id, load_keys, parse_key, verify_attestation
from shipyard.export import check_graph
from shipyard.inspect import inspect
from shipyard.verify import verify_bundle
from tests.test_contents import Released, graph, seal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
quick = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)

# a place, what is cut out there, what is put in
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4)


def edited(content, edits):
    for part, cut, put in edits:
        at = int(part * len(content))
        content = content[:at] + put + content[at + cut :]
    return content


def refused_in_one_line(work):
    """Let a refusal pass, if it is one line; anything else that is raised fails the test."""
    try:
        work()
    except ShipyardError as fault:
        assert "\n" not in str(fault)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return Released(tmp_path_factory.mktemp("released"), KEY)


@quick
@given(edits=EDITS)
def test_a_zip_of_any_bytes(released, tmp_path, edits):
    source = (released.root / "edge-recommend-zip" / "edge-recommend.zip").read_bytes()
    path = tmp_path / "bundle.zip"
    path.write_bytes(edited(source, edits))
    refused_in_one_line(lambda: inspect(path))
    # what it verifies is what was signed, to the byte of every file
    with suppress(ShipyardError):
        verify_bundle(path, released.release, released.keys)
        with zipfile.ZipFile(path) as stream:
            assert stream.read("model.onnx") == graph()


@quick
@given(document=JSON | st.fixed_dictionaries({"files": JSON}) | st.fixed_dictionaries({"files": st.lists(JSON)}))
@example({"files": [{"path": "../../etc/passwd", "sha256": "0" * 64, "bytes": 1}]})
@example({"files": [{"path": MANIFEST, "sha256": "0" * 64, "bytes": 1}], "golden": 3})
def test_a_manifest_of_any_form(tmp_path, document):
    text = json.dumps(document)
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "folder" / MANIFEST).write_text(text)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as stream:
        stream.writestr(MANIFEST, text)
    for path in (tmp_path / "folder", tmp_path / "bundle.zip"):
        refused_in_one_line(lambda path=path: inspect(path))


@quick
@given(edits=EDITS)
def test_a_graph_of_any_bytes(tmp_path, edits):
    path = tmp_path / "model.onnx"
    path.write_bytes(edited(graph(), edits))
    refused_in_one_line(lambda: check_graph(path))
    # whoever made it names its digest too, so that inspect reads it
    folder = tmp_path / "bundle"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / "model.onnx").write_bytes(path.read_bytes())
    seal(folder, "any")
    refused_in_one_line(lambda: inspect(folder))


@quick
@given(edits=EDITS)
def test_a_release_of_any_bytes(released, edits):
    content = released.path.read_bytes()
    path = released.folder / f"{released.release.version}.json"
    try:
        path.write_bytes(edited(content, edits))
        try:
            found = read_release(path, released.keys)
        except ShipyardError as fault:
            assert "\n" not in str(fault)
        else:
            assert found == released.release  # white space is not content
    finally:
        path.write_bytes(content)


@quick
@given(text=st.text(max_size=60) | st.from_regex(r"[0-9a-f]{16}:[0-9]{1,16}:[A-Za-z0-9+/=]{0,90}", fullmatch=True))
@example(f"{key_id(KEY.public_key())}:0:")
@example(f"{key_id(KEY.public_key())}:0:{'A' * 88}")
def test_an_attestation_of_any_text_is_refused(text):
    keys = {key_id(KEY.public_key()): KEY.public_key()}
    with pytest.raises(ShipyardError) as fault:
        verify_attestation("search", "0" * 64, text, keys, "bundle")
    assert "\n" not in str(fault.value)


@quick
@given(text=st.text(max_size=80) | st.binary(max_size=60).map(lambda raw: f"ssh-ed25519 {raw.hex()}"))
def test_a_public_key_of_any_text(tmp_path, text):
    refused_in_one_line(lambda: parse_key(text, "key.pub"))
    (tmp_path / "any.pub").write_text(text)
    refused_in_one_line(lambda: load_keys(tmp_path))


def test_the_unedited_ones_are_read(released):
    """So that the tests above refuse for what was edited."""
    path = released.root / "edge-recommend-zip" / "edge-recommend.zip"
    assert verify_bundle(path, released.release, released.keys)["name"] == "edge-recommend"
    assert onnx.load_model_from_string(graph()).ir_version == 10
