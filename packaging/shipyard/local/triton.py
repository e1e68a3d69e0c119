"""Answer an invocation of a local SageMaker endpoint as Triton would: by the ONNX graph that lies in the bucket.

The protocol is KServe's version 2 with Triton's binary extension (Triton, docs/protocol/extension_binary_data.md).
"""

import io
import json
import re
import tarfile
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from moto.s3.models import s3_backends
from moto.sagemaker.models import sagemaker_backends

DTYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4"), "FP16": np.dtype("<f2")}
BINARY = "application/vnd.sagemaker-triton.binary+json;json-header-size="
_HEADER_SIZE = re.compile(r"json-header-size=(\d+)")


class Refused(Exception):
    """SageMaker's answer to a request that it does not serve."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def invoke(account: str, region: str, endpoint: str, kind: str, body: bytes) -> tuple[str, bytes]:
    """Run the model of an endpoint on a request; return the content type and body of the answer.

    The graph is read from the bucket each time, so that what is served is always what lies there.

    Raises:
        Refused: there is no such endpoint, its model is not in the bucket, or the request does not fit the graph.
    """
    name, graph = _graph(account, region, endpoint)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    try:
        inputs, binary = _read(kind, body)
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as fault:  # whatever the graph does not take is the client's fault
        raise Refused(424, "ModelError", f"{name}: {fault}") from None
    return _write(name, outputs, binary)


def _graph(account: str, region: str, endpoint: str) -> tuple[str, bytes]:
    """Return name and bytes of an endpoint's graph, found as SageMaker finds it: configuration, model, S3 prefix."""
    backend = sagemaker_backends[account][region]
    found = backend.endpoints.get(endpoint)
    if found is None:
        raise Refused(400, "ValidationError", f"Endpoint {endpoint} of account {account} not found.")
    config = backend.endpoint_configs[found.endpoint_config_name]
    model = backend._models[config.production_variants[0]["ModelName"]]
    container: dict[str, Any] = model.primary_container
    name = container["Environment"]["SAGEMAKER_TRITON_DEFAULT_MODEL_NAME"]
    bucket, _, prefix = container["ModelDataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    archived = prefix.endswith(".tar.gz")
    place = prefix if archived else f"{prefix}{name}/1/model.onnx"
    key = s3_backends[account]["aws"].get_object(bucket, place)
    if key is None:
        raise Refused(424, "ModelError", f"s3://{bucket}/{place}: no such object")
    if not archived:
        return name, key.value
    with tarfile.open(fileobj=io.BytesIO(key.value)) as stream:
        return name, stream.extractfile(f"{name}/1/model.onnx").read()  # type: ignore[union-attr]


def _read(kind: str, body: bytes) -> tuple[dict[str, npt.NDArray[Any]], bool]:
    """Return the tensors of a request by name, and whether the answer is wanted in binary form."""
    match = _HEADER_SIZE.search(kind)
    head, rest = (body[: int(match[1])], body[int(match[1]) :]) if match else (body, b"")
    inputs = {}
    for told in json.loads(head)["inputs"]:
        dtype = DTYPES[told["datatype"]]
        size = told.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(told["data"], dtype)
        else:
            values, rest = np.frombuffer(rest[:size], dtype), rest[size:]
        inputs[told["name"]] = values.reshape(told["shape"])
    return inputs, match is not None


def _write(name: str, outputs: dict[str, npt.NDArray[Any]], binary: bool) -> tuple[str, bytes]:
    """Return content type and body of an answer."""
    described, tail = [], b""
    for output, values in outputs.items():
        [datatype] = [datatype for datatype, dtype in DTYPES.items() if dtype == values.dtype]
        told: dict[str, Any] = {"name": output, "datatype": datatype, "shape": list(values.shape)}
        if binary:
            raw = values.astype(DTYPES[datatype]).tobytes()
            told["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            told["data"] = values.ravel().tolist()
        described.append(told)
    head = json.dumps({"model_name": name, "model_version": "1", "outputs": described}).encode()
    return (f"{BINARY}{len(head)}" if binary else "application/json"), head + tail
