"""The public GPU endpoint: the Triton model repository's config.pbtxt, and the protocol that it speaks.

Fields are those of Triton's model_config.proto; the ONNX Runtime back end reads the graph from <model>/<version>/model.onnx.
Requests and answers are the KServe v2 inference protocol with Triton's binary tensor data extension: a head in JSON, then
the tensors' bytes, little-endian. SageMaker has the head's length in the content type.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.history import FEATURES, OFFER

CONTENT = "application/vnd.sagemaker-triton.binary+json"
HEADER_LENGTH = "Inference-Header-Content-Length"
TYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}

Arrays = Mapping[str, npt.NDArray[Any]]

STEPS = {
    "query_ids": (8, 32), "query_mask": (8, 32), "items": (64, 512), "features": (64, 512),
    "offers": (16, 1024, 8192, 20_000), "strengths": (16, 1024, 8192, 20_000),
}  # fmt: skip
"""Lengths that requests are padded to: Triton puts requests of one shape alone into one batch."""

CONFIG = "config.pbtxt"

OUTPUTS = ("rows", "scores")
"""What a client of the endpoint asks for."""

INPUTS = {
    "query_ids": ("TYPE_INT64", "[ -1 ]"),
    "query_mask": ("TYPE_INT64", "[ -1 ]"),
    "items": ("TYPE_INT64", "[ -1 ]"),
    "features": ("TYPE_FP32", f"[ -1, {len(FEATURES)} ]"),
    "offers": ("TYPE_INT64", "[ -1 ]"),
    "strengths": ("TYPE_FP32", f"[ -1, {len(OFFER)} ]"),
}


def reader_config(name: str, most: int = 256) -> str:
    """Return config.pbtxt of a cross-encoder: batches of at most `most` pairs."""
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {most}",
        *(f'input {{ name: "{i}" data_type: TYPE_INT64 dims: [ -1 ] }}' for i in ("pair_ids", "pair_mask")),
        'output { name: "scores" data_type: TYPE_FP32 dims: [ 1 ] }',
        "instance_group [ { count: 1 kind: KIND_GPU } ]",
        "dynamic_batching { max_queue_delay_microseconds: 1000 }",
        "version_policy { specific { versions: [ 1 ] } }",
    ]
    return "\n".join(lines) + "\n"


def config(name: str, inputs: tuple[str, ...], returned: int, width: int, number: int = 1, most: int = 64) -> str:
    """Return config.pbtxt of version `number` of a ranking graph: `inputs`, `returned` rows with their scores, `width`
    logits, batches of at most `most`.

    Batch, instances and lengths are those that `make bench-gpu` found (docs/benchmarks.md).
    """
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {most}",
        *(
            f'input {{ name: "{i}" data_type: {INPUTS[i][0]} dims: {INPUTS[i][1]} allow_ragged_batch: false }}'
            for i in inputs
        ),
        f'output {{ name: "rows" data_type: TYPE_INT64 dims: [ {returned} ] }}',
        f'output {{ name: "scores" data_type: TYPE_FP32 dims: [ {returned} ] }}',
        # large, and sent to whoever asks for it by name alone
        f'output {{ name: "logits" data_type: TYPE_FP32 dims: [ {width} ] }}',
        # one takes a batch in while the other computes
        "instance_group [ { count: 2 kind: KIND_GPU } ]",
        "dynamic_batching { max_queue_delay_microseconds: 1000 }",
        "model_warmup [",
        # kernels are loaded, and the memory of the largest batch is taken, before the first request comes
        *_warm("one request", inputs, 1, 0),
        "  ,",
        *_warm("the largest batch", inputs, most, -1),
        "]",
        f"version_policy {{ specific {{ versions: [ {number} ] }} }}",
    ]
    return "\n".join(lines) + "\n"


def _warm(name: str, inputs: tuple[str, ...], size: int, step: int) -> list[str]:
    """Return a sample of `size` requests whose inputs have the length of one of their `STEPS`."""
    lines = []
    for i in inputs:
        kind, dims = INPUTS[i]
        told = f"data_type: {kind} dims: {dims.replace('-1', str(STEPS[i][step]))} zero_data: true"
        lines.append(f'    inputs {{ key: "{i}" value {{ {told} }} }}')
    return ["  {", f'    name: "{name}" batch_size: {size}', *lines, "  }"]


def padded(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Pad the second axis of inputs [B, n, ...] with 0 to the next of its `STEPS`; a longer one stays as it is.

    To the graph a 0 is no item, no offer and no word.
    """
    found = {}
    for name, array in inputs.items():
        most = next((step for step in STEPS.get(name, ()) if step >= array.shape[1]), array.shape[1])
        found[name] = np.pad(array, [(0, 0), (0, most - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])
    return found


def write_request(inputs: Arrays, outputs: tuple[str, ...] = OUTPUTS) -> tuple[bytes, int]:
    """Return the body of an inference request, its inputs `padded`, and the length of its head in bytes."""
    told, data = _tensors(padded(inputs))
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"inputs": told, "outputs": wanted}).encode()
    return head + data, len(head)


def read_request(body: bytes, head_length: int) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a request.

    Raises:
        ValueError, KeyError, TypeError: the body is none.
    """
    head = json.loads(body[:head_length]) if 0 < head_length <= len(body) else None
    return _arrays(head["inputs"] if isinstance(head, dict) else None, body[max(0, head_length) :])


def write_answer(name: str, version: str, outputs: Arrays) -> tuple[bytes, int]:
    """Return the body of an answer of a model, and the length of its head in bytes."""
    told, data = _tensors(outputs)
    head = json.dumps({"model_name": name, "model_version": version, "outputs": told}).encode()
    return head + data, len(head)


def read_answer(body: bytes, head_length: int) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """Return the version of the model that answered, and its outputs by name.

    Raises:
        ValueError, KeyError, TypeError: the body is no answer.
    """
    head = json.loads(body[:head_length]) if 0 < head_length <= len(body) else None
    if not isinstance(head, dict):
        raise ValueError("no head")
    return str(head["model_version"]), _arrays(head["outputs"], body[head_length:])


def version(model: str) -> str:
    """Return the version in a path as model_repository/search/1/model.onnx."""
    return model.split("/")[-2]


def _tensors(arrays: Arrays) -> tuple[list[dict[str, Any]], bytes]:
    told, parts = [], []
    for name, array in arrays.items():
        kind = next(kind for kind, found in TYPES.items() if found == array.dtype)
        parts.append(np.ascontiguousarray(array, TYPES[kind]).tobytes())
        told.append(
            {
                "name": name, "shape": list(array.shape), "datatype": kind,
                "parameters": {"binary_data_size": len(parts[-1])},
            }
        )  # fmt: skip
    return told, b"".join(parts)


def _arrays(told: Any, data: bytes) -> dict[str, npt.NDArray[Any]]:
    if not isinstance(told, list):
        raise ValueError("no tensors")
    found, at = {}, 0
    for tensor in told:
        size = tensor["parameters"]["binary_data_size"]
        shape = tensor["shape"]
        if type(size) is not int or size < 0 or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"size of {tensor['name']}")
        # reshape and frombuffer refuse what does not fit
        found[str(tensor["name"])] = np.frombuffer(data[at : at + size], TYPES[tensor["datatype"]]).reshape(shape)
        at += size
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, told {at}")
    return found
