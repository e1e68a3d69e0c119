"""Inspect: what a bundle holds and needs, read from its bundle.json and its graphs."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from serve.errors import ShipyardError
from serve.trust import MANIFEST
from shipyard.verify import check_folder, check_zip

MOST_OPERATORS = 8
"""Operators that are told to people, the most frequent first."""


def inspect(path: Path) -> dict[str, Any]:
    """Return what a bundle is, a folder or a zip: its bundle.json, with its files by path and what its graphs are made of.

    The bundle is checked against its own bundle.json; whether anybody attests that, `verify` tells.

    Raises:
        ShipyardError: it is no bundle, or a file of it differs.
    """
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise ShipyardError(f"{path}: no {MANIFEST}", allowed="the folder or the zip of a bundle, or a release file")
    document, digest = check_folder(path) if path.is_dir() else check_zip(path)
    files = {entry["path"]: {"sha256": entry["sha256"], "bytes": entry["bytes"]} for entry in document["files"]}
    graphs = {name: _graph(_read(path, name), f"{path}: {name}") for name in files if name.endswith(".onnx")}
    return document | {
        "manifest": digest,
        "files": files,
        "bytes": sum(file["bytes"] for file in files.values()),
        "golden": len(document.get("golden", ())),
        "graphs": graphs,
    }


def lines(told: dict[str, Any]) -> Iterator[str]:
    """Yield what `inspect` has found for people: what it is, its files by size, its graphs."""
    size = f"{told['bytes'] / 1e6:.1f} MB in {len(told['files'])} files"
    yield f"bundle {told.get('name')}, {size}, {MANIFEST} {told['manifest']}"
    apart = {"name", "files", "bytes", "manifest", "graphs"}
    for name, value in flat({key: told[key] for key in sorted(told.keys() - apart)}):
        yield f"  {name:<31} {value}"
    for name, file in sorted(told["files"].items(), key=lambda item: -item[1]["bytes"]):
        yield f"{file['bytes']:>12}  {file['sha256'][:12]}  {name}"
    for name, graph in told["graphs"].items():
        yield f"graph {name}: IR {graph['ir_version']}, opset " + ", ".join(
            f"{k} {v}" for k, v in graph["opset"].items()
        )
        for side in ("inputs", "outputs"):
            yield f"  {side:<24}" + ", ".join(f"{k} {v}" for k, v in graph[side].items())
        operators = list(graph["operators"].items())
        more = f" and {len(operators) - MOST_OPERATORS} others" if len(operators) > MOST_OPERATORS else ""
        yield f"  {'operators':<24}" + ", ".join(f"{v} {k}" for k, v in operators[:MOST_OPERATORS]) + more
        yield f"  {'weights':<24}" + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in graph["weights"].items())


def flat(document: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects with their dotted names."""
    for name, value in document.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{within}{name}.")
        else:
            yield within + name, ", ".join(map(str, value)) if isinstance(value, list) else value


def _read(path: Path, name: str) -> bytes:
    if path.is_dir():
        return (path / name).read_bytes()
    with zipfile.ZipFile(path) as stream:
        return stream.read(name)


def _graph(content: bytes, where: str) -> dict[str, Any]:
    """Return a graph's versions, inputs and outputs with their shapes, operators by number, and bytes of weights by type."""
    try:
        model = onnx.load_model_from_string(content)
        types = onnx.TensorProto.DataType
        weights: Counter[str] = Counter()
        for tensor in model.graph.initializer:
            weights[types.Name(tensor.data_type).lower()] += tensor.ByteSize()
    except (DecodeError, ValueError) as fault:  # ValueError: a type of numbers that ONNX does not have
        raise ShipyardError(f"{where}: no graph of ONNX: {fault}", mend="make the bundle again") from None
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
