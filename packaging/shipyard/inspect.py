"""Inspect: what a bundle holds and needs, read from its bundle.json and its graphs."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import MANIFEST, check_bundle
from shipyard.verify import check_zip


def inspect(path: Path) -> dict[str, Any]:
    """Return what a bundle is, a folder or a zip: its bundle.json, with sizes for files and what its graphs are made of.

    The bundle is checked against its own bundle.json; whether anybody attests that, `verify` tells.

    Raises:
        ShipyardError: it is no bundle, or a file of it differs.
    """
    if path.is_dir():
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise ShipyardError(
                f"{path}: no {MANIFEST}", allowed="the folder or the zip of a bundle, or a release file"
            )
        digest = sha256_file(manifest)
        document = check_bundle(path, digest)
    else:
        document, digest = check_zip(path)
    sizes = {entry["path"]: entry["bytes"] for entry in document["files"]}
    graphs = {}
    for name in sizes:
        if name.endswith(".onnx"):
            graphs[name] = _graph(_read(path, name))
    return document | {
        "manifest": digest,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "golden": len(document.get("golden", ())),
        "graphs": graphs,
    }


def _read(path: Path, name: str) -> bytes:
    if path.is_dir():
        return (path / name).read_bytes()
    with zipfile.ZipFile(path) as stream:
        return stream.read(name)


def _graph(content: bytes) -> dict[str, Any]:
    """Return a graph's versions, inputs and outputs with their shapes, operators by number, and bytes of weights by type."""
    model = onnx.load_model_from_string(content)
    types = onnx.TensorProto.DataType
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weights[types.Name(tensor.data_type).lower()] += tensor.ByteSize()
    return {
        "ir_version": model.ir_version,
        "opset": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "inputs": {value.name: _shape(value) for value in model.graph.input},
        "outputs": {value.name: _shape(value) for value in model.graph.output},
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "weights": dict(weights.most_common()),
    }


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]
