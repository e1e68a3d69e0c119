"""The public GPU endpoint: the Triton model repository's config.pbtxt.

Fields are those of Triton's model_config.proto; the ONNX Runtime back end reads the graph from <model>/<version>/model.onnx.
"""

from collections.abc import Mapping

from serve.history import FEATURES, OFFER

CONFIG = "config.pbtxt"

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


def config(name: str, inputs: tuple[str, ...], returned: int, most: int = 32) -> str:
    """Return config.pbtxt of a ranking graph that takes `inputs` and returns `returned` rows, batches of at most `most`."""
    warm: Mapping[str, str] = {
        "query_ids": "dims: [ 4 ] zero_data: true", "query_mask": "dims: [ 4 ] zero_data: true",
        "items": "dims: [ 1 ] zero_data: true", "features": f"dims: [ 1, {len(FEATURES)} ] zero_data: true",
        "offers": "dims: [ 1 ] zero_data: true", "strengths": f"dims: [ 1, {len(OFFER)} ] zero_data: true",
    }  # fmt: skip
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
        "instance_group [ { count: 1 kind: KIND_GPU } ]",
        # Triton batches requests of one shape alone: clients that pad to few lengths gain most
        "dynamic_batching { max_queue_delay_microseconds: 1000 }",
        "model_warmup [ {",
        '  name: "one request" batch_size: 1',
        *(f'  inputs {{ key: "{i}" value {{ data_type: {INPUTS[i][0]} {warm[i]} }} }}' for i in inputs),
        "} ]",
        "version_policy { specific { versions: [ 1 ] } }",
    ]
    return "\n".join(lines) + "\n"
