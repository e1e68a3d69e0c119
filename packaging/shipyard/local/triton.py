"""Answer an invocation of a local SageMaker endpoint as Triton would: by the ONNX graph that lies in the bucket.

The protocol is that of `serve.triton`, in its binary form alone.
"""

import functools
import io
import re
import tarfile
from typing import Any

import onnxruntime as ort
from moto.s3.models import s3_backends
from moto.sagemaker.models import sagemaker_backends

from serve.triton import CONTENT, OUTPUTS, read_request, version, write_answer

_HEADER_SIZE = re.compile(r"json-header-size=(\d+)")
_GRAPH = re.compile(r"\d+/model\.onnx")


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
    name, path, graph = _graph(account, region, endpoint)
    session = _session(graph)
    try:
        told = _HEADER_SIZE.search(kind)
        outputs = session.run(OUTPUTS, read_request(body, int(told[1]) if told else -1))
    except Exception as fault:  # whatever the graph does not take is the client's fault
        raise Refused(424, "ModelError", f"{name}: {fault}") from None
    answer, size = write_answer(name, version(path), dict(zip(OUTPUTS, outputs, strict=True)))
    return f"{CONTENT};json-header-size={size}", answer


@functools.lru_cache(maxsize=2)
def _session(graph: bytes) -> ort.InferenceSession:
    """Return an engine of a graph; the same bytes, read anew, have the same one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _graph(account: str, region: str, endpoint: str) -> tuple[str, str, bytes]:
    """Return name, key and bytes of an endpoint's graph, found as SageMaker finds it: configuration, model, S3 prefix."""
    backend = sagemaker_backends[account][region]
    found = backend.endpoints.get(endpoint)
    if found is None:
        raise Refused(400, "ValidationError", f"Endpoint {endpoint} of account {account} not found.")
    config = backend.endpoint_configs[found.endpoint_config_name]
    model = backend._models[config.production_variants[0]["ModelName"]]
    container: dict[str, Any] = model.primary_container
    name = container["Environment"]["SAGEMAKER_TRITON_DEFAULT_MODEL_NAME"]
    bucket, _, prefix = container["ModelDataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    s3 = s3_backends[account]["aws"]
    if prefix.endswith(".tar.gz"):
        if (archive := s3.get_object(bucket, prefix)) is None:
            raise Refused(424, "ModelError", f"s3://{bucket}/{prefix}: no such object")
        folder = f"{name}/"
        with tarfile.open(fileobj=io.BytesIO(archive.value)) as stream:
            members = [member for member in stream if _GRAPH.fullmatch(member.name.removeprefix(folder))]
            graphs = [(member.name, file.read()) for member in members if (file := stream.extractfile(member))]
    else:
        folder = f"{prefix}{name}/"
        keys = [
            key for key in s3.get_bucket(bucket).keys if key.startswith(folder) and _GRAPH.fullmatch(key[len(folder) :])
        ]
        graphs = [(key, graph.value) for key in keys if (graph := s3.get_object(bucket, key)) is not None]
    for key, content in graphs:
        return name, key, content
    raise Refused(424, "ModelError", f"s3://{bucket}/{folder}<version>/model.onnx: no such object")
