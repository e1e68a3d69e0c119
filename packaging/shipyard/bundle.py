"""Bundle: a model and what serves it, in its target's form, reproducible to the byte.

gpu is a Triton model repository, cpu the context of a container image, edge a zip. bundle.json names every file with its
digest and says what a runtime must know; the bundle holds no time, no path and no key.
"""

import hashlib
import importlib.metadata
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import serve
from models import submodel
from models.config import Target, TargetName
from models.cross import MAX_TOKENS as PAIR_TOKENS
from models.release import artifact_key, files_digest
from serve import triton
from serve.codec import SCHEMA
from serve.engine import ENGINE
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.fused import CODEC, FUSION
from serve.greengrass import recipe
from serve.history import FEATURES, LIMIT, OFFER
from serve.runtime import LOGITS, Model
from serve.trust import MANIFEST
from shipyard.archive import write_tar_gz
from shipyard.edge.wheels import LOCK, unpacked
from shipyard.export import IR_VERSION, OPSET
from shipyard.gates import MOST_RUNTIME_MB
from shipyard.golden import golden
from shipyard.reference import REFERENCE
from shipyard.seal import files_of, seal
from shipyard.stage import closure

CODE = Path(serve.__file__).parent

ARCHIVE = "model.tar.gz"
"""Triton's model repository in one object, beside the repository itself, which everything else reads."""

# what a process of the private cluster imports, with the versions that the release was tested with
CPU_PACKAGES = (
    "boto3", "cryptography", "httptools", "numpy", "onnxruntime", "orjson", "prometheus_client", "rfc8785", "tokenizers",
    "uvicorn", "uvloop",
)  # fmt: skip
GATEWAY_PACKAGES = (
    "boto3", "cachetools", "cryptography", "httptools", "numpy", "orjson", "prometheus_client", "rfc8785", "tokenizers",
    "urllib3", "uvicorn", "uvloop",
)  # fmt: skip

DOCKERFILE = """\
# docker build --platform linux/arm64 -t REPOSITORY . ; then name the pushed image's digest in fleet.toml
ARG PYTHON=python:3.11-slim
FROM ${PYTHON}
COPY requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY serve /app/serve
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
# the volume that the model is fetched into: it takes the owner of the folder that it is mounted over
RUN mkdir /model && chown 10001:10001 /model
VOLUME /model
USER 10001
ENTRYPOINT ["python"]
CMD ["-m", "serve.server", "--help"]
"""


def bundle(
    data: Path, split: Path, finetuned: Path, quantised: Path, name: str, target: Target, place: TargetName,
    facts: dict[str, Any], out: Path, crossed: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the bundle of a sub-model under `out`/bundle and, for the edge, its zip under `out`/upload.

    `crossed` holds the cross-encoder that goes with it, if any.

    Returns:
        The artifact as the release names it, without its attestation.

    Raises:
        ShipyardError: the bundle is larger than its target allows.
    """
    kebab = name.replace("_", "-")
    module = submodel.load(name)
    tree = _empty(out)
    # rows mean products by the catalogue alone, and Triton tells its model's version with each answer: a client that has
    # another release's catalogue then knows
    number = int(sha256_file(split / "catalogue.json")[:7], 16) + 1
    model_path = f"model_repository/{kebab}/{number}/model.onnx" if place == "gpu" else "model.onnx"
    _copy(quantised / "model.onnx", tree / model_path)
    graph = onnx.load(tree / model_path)
    inputs = tuple(i.name for i in graph.graph.input)
    columns = {o.name: o.type.tensor_type.shape.dim[1].dim_value for o in graph.graph.output}
    returned, width = (columns[name] for name in ("rows", LOGITS))
    _copy(split / "catalogue.json", tree / "catalogue.json")
    if module.TASK == "search":
        _copy(finetuned / "tokenizer.json", tree / "tokenizer.json")
    reader = None
    if crossed is not None:
        reader = f"model_repository/{kebab}-reader/1/model.onnx" if place == "gpu" else "reader.onnx"
        _copy(crossed / "rerank.onnx", tree / reader)
        _copy(crossed / "texts.json", tree / "texts.json")
        if place == "gpu":
            _write(tree / f"model_repository/{kebab}-reader/{triton.CONFIG}", triton.reader_config(f"{kebab}-reader"))
    if place == "gpu":
        _write(
            tree / f"model_repository/{kebab}/{triton.CONFIG}", triton.config(kebab, inputs, returned, width, number)
        )
    if target.archive is not None and place == "gpu":
        write_tar_gz(tree / "model_repository", tree / ARCHIVE)
    if place == "cpu":
        _write(tree / "Dockerfile", DOCKERFILE)
        # one image for the whole cluster: it serves, it fuses, and it scores offline
        _write(tree / "requirements.txt", requirements(tuple({*CPU_PACKAGES, *GATEWAY_PACKAGES})))
        _copy_code(tree / "serve", "serve.server", "serve.gateway", "serve.score", "serve.fetch")
    document = {
        "schema": SCHEMA,
        "name": kebab,
        "task": module.TASK,
        "model": model_path,
        "level": module.LEVEL,
        "catalogue": "catalogue.json",
        "tokenizer": "tokenizer.json" if module.TASK == "search" else None,
        "max_tokens": facts["max_tokens"],
        "rerank": None
        if reader is None
        else {
            "model": reader,
            "texts": "texts.json",
            "max_tokens": PAIR_TOKENS,
            **facts["rerank"],
        },
        "history": {"limit": LIMIT, "features": list(FEATURES), "offer": list(OFFER)},
        "inputs": list(inputs),
        "returned": returned,
        "precision": facts["precision"],
        "engine": ENGINE | {"ir_version": IR_VERSION, "opset": OPSET},
        "facts": facts,
        "golden": [],
    }
    # more threads add in another order, and the last digit of an answer follows
    document["golden"] = golden(data, name, Model(tree, document, threads=1))
    manifest = seal(tree, document)
    if place == "edge":
        return _zipped(out, kebab, name, manifest, target)
    kind = "triton" if place == "gpu" else "image-context"
    artifact = _artifact(kebab, name, place, kind, manifest, tree, target.max_size_mb)
    artifact["template"] = (
        _triton_template(kebab, target) if place == "gpu" else _image_template(kebab, artifact["key"])
    )
    return artifact


def _triton_template(kebab: str, target: Target) -> dict[str, Any]:
    """Return what a stack needs to start Triton."""
    return {
        "environment": {
            "SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": kebab, "SAGEMAKER_TRITON_LOG_VERBOSE": "false",
            "ORT_DISABLE_TELEMETRY": "1",
        },
        "model_data": "model_repository/" if target.archive is None else ARCHIVE,
    }  # fmt: skip


def _image_template(kebab: str, key: str) -> dict[str, Any]:
    """Return what a stack needs to fetch the bundle at `key` and to serve it."""
    return {
        "environment": {
            "ORT_DISABLE_TELEMETRY": "1", "SHIPYARD_TRUSTED_KEY": "@TRUSTED_KEY@",
            "SHIPYARD_ATTESTATION": "@ATTESTATION@",
        },
        "fetch": ["-m", "serve.fetch", f"s3://@BUCKET@/{key}", "--artifact", kebab, "--into", "/model"],
        "serve": ["-m", "serve.server", "--bundle", "/model", "--artifact", kebab, "--host", "0.0.0.0",  # noqa: S104
                  "--port", "8080", "--prefix", f"/{kebab}", "--drain", "15"],
        "score": ["-m", "serve.score", "s3://@DATA@/scoring/", "--bundle", "/model", "--artifact", kebab],
        "port": 8080, "health": "/readyz", "mount": "/model",
    }  # fmt: skip


def bundle_gateway(
    bundles: Mapping[str, Path], places: Mapping[str, TargetName], fusion: Mapping[str, Any], target: Target, out: Path,
    reference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the fusion gateway's bundle: code, the fusion that was fitted, and what search's requests are encoded by.

    `bundles` are the folders of the fused sub-models' bundles by name, `reference` what drift is measured against.

    Raises:
        ShipyardError: the bundle is larger than its target allows.
    """
    tree = _empty(out)
    manifests = {name: read_json(folder / MANIFEST) for name, folder in bundles.items()}
    asked = {
        name: {"artifact": told["name"], "place": places[name], "manifest": sha256_file(bundles[name] / MANIFEST)}
        | {key: told[key] for key in ("task", "level", "returned")}
        for name, told in manifests.items()
    }
    pinned = {key: fusion[key] for key in ("method", "sources", "parameters")} | {"targets": asked}
    _write(tree / FUSION, json.dumps(pinned, indent=1, sort_keys=True) + "\n")
    if reference is not None:
        _write(tree / REFERENCE, json.dumps(reference, indent=1, sort_keys=True) + "\n")
    search = next(name for name, told in manifests.items() if told["task"] == "search")
    kept = ("schema", "name", "task", "level", "catalogue", "tokenizer", "max_tokens", "inputs", "returned", "model")
    _write(tree / CODEC, json.dumps({key: manifests[search][key] for key in kept}, indent=1, sort_keys=True) + "\n")
    for key in ("catalogue", "tokenizer"):
        _copy(bundles[search] / manifests[search][key], tree / manifests[search][key])
    _write(tree / "Dockerfile", DOCKERFILE.replace("serve.server", "serve.gateway"))
    _write(tree / "requirements.txt", requirements(GATEWAY_PACKAGES))
    _copy_code(tree / "serve", "serve.gateway", "serve.fetch")
    manifest = seal(tree, {"schema": SCHEMA, "name": "gateway"})
    artifact = _artifact("gateway", None, "cpu", "gateway", manifest, tree, target.max_size_mb)
    artifact["template"] = _gateway_template(artifact["key"])
    return artifact


def _gateway_template(key: str) -> dict[str, Any]:
    """Return what a stack needs to fetch the gateway's bundle at `key` and to serve it."""
    template = _image_template("gateway", key)
    del template["score"]
    template["serve"] = [
        "-m", "serve.gateway", "--bundle", template["mount"], "--artifact", "gateway", "--host", "0.0.0.0",  # noqa: S104
        "--port", "8080", "--search", "sagemaker:@ENDPOINT@", "--cluster", "@CLUSTER_URL@", "--feedback",
        "firehose:@FEEDBACK_STREAM@", "--drain", "15",
    ]  # fmt: skip
    return template


EDGE_CODE = (
    "adapt", "agent", "delta", "device", "download", "install", "link", "local", "protocol", "pubsub", "shadow", "store",
    "telemetry", "words",
)  # fmt: skip
"""What of serve.greengrass runs on a device."""


def bundle_runtime(models: tuple[str, ...], wheels: Path, out: Path) -> dict[str, Any]:
    """Write the edge's runtime, code and wheels, as a bundle and a zip for each architecture; return its artifact.

    `models` are the artifacts that it serves, `wheels` the folder of `shipyard.edge.wheels`.
    """
    tree = _empty(out)
    (out / "upload").mkdir(parents=True)
    for architecture in recipe.PLATFORMS:
        code = tree / architecture
        _copy_code(code / "serve", *(f"serve.greengrass.{name}" for name in EDGE_CODE))
        _write(code / "install.sh", recipe.INSTALL)
        _write(code / "run.sh", recipe.RUN)
        _copy(LOCK, code / "requirements.txt")
        packages = sorted((wheels / architecture).glob("*.whl"))
        for wheel in packages:
            _copy(wheel, code / "wheels" / wheel.name)
        _write(code / "installed-bytes", f"{sum(map(unpacked, packages))}\n")
        write_zip(code, out / "upload" / f"{recipe.archive(architecture)}.zip")
    manifest = seal(tree, {"schema": SCHEMA, "name": "edge-runtime", "engine": ENGINE})
    artifact = _artifact(
        "edge-runtime", None, "edge", "greengrass-runtime", manifest, out / "upload", MOST_RUNTIME_MB
    )  # fmt: skip
    prefix = f"s3://@BUCKET@/{artifact['key']}"
    version = component_version(recipe.runtime_recipe("VERSION", prefix, models))
    artifact["template"] = {"recipe": recipe.runtime_recipe(version, prefix, models)}
    return artifact


def _zipped(out: Path, kebab: str, name: str, manifest: str, target: Target) -> dict[str, Any]:
    """Zip a model's bundle for Greengrass and return its artifact, with the recipe as its template."""
    archive = out / "upload" / f"{kebab}.zip"
    archive.parent.mkdir(parents=True)
    write_zip(out / "bundle", archive)
    artifact = _artifact(kebab, name, "edge", "greengrass-model", manifest, archive.parent, target.max_size_mb)
    uri = f"s3://@BUCKET@/{artifact['key']}{archive.name}"
    version = component_version(recipe.model_recipe(kebab, "VERSION", uri))
    artifact["template"] = {
        "recipe": recipe.model_recipe(kebab, version, uri),
        "model": f"{recipe.model_component(kebab)}/{version}/{kebab}/@ATTESTATION@",
    }
    return artifact


def component_version(document: dict[str, Any]) -> str:
    """Return the version of a recipe: a published one can never change, so all that it says, its archive's digest in the
    Uri included, is in it."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return f"1.0.{int(digest[:7], 16)}"


def write_zip(tree: Path, archive: Path) -> None:
    """Zip a folder to the same bytes everywhere: sorted names, one time, one mode, stored (zlib's output varies)."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stream:
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(tree).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            stream.writestr(entry, path.read_bytes())


def _artifact(
    kebab: str, name: str | None, place: TargetName, kind: str, manifest: str, root: Path, most_mb: float
) -> dict[str, Any]:
    """Return the artifact of the files below `root`, without its template."""
    files = files_of(root)
    size = sum(file.bytes for file in files)
    if size > most_mb * 1e6:
        raise ShipyardError(
            f"bundle: {kebab}: too large for target {place}", value=f"{size / 1e6:.1f} MB", allowed=f"{most_mb} MB at most",
            mend="choose a smaller precision or dimension, or raise max_size_mb in fleet.toml",
        )  # fmt: skip
    digest = files_digest(files)
    return {
        "name": kebab, "submodel": name, "target": place, "kind": kind, "key": artifact_key(kebab, digest),
        "digest": digest, "manifest": manifest, "files": [file.model_dump() for file in files],
        "folder": root.name,
    }  # fmt: skip


def _empty(out: Path) -> Path:
    """Remove what a run that was killed has left of a bundle, for it would be sealed too; return the bundle's folder."""
    for name in ("bundle", "upload"):
        shutil.rmtree(out / name, ignore_errors=True)
    return out / "bundle"


def requirements(packages: tuple[str, ...]) -> str:
    """Return pip's requirements of `packages` and of all that they need, each pinned to the version installed here."""
    waiting, found = list(packages), dict[str, str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found[name] = importlib.metadata.version(name).partition("+")[0]
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
            waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found))


def _copy_code(into: Path, *modules: str) -> None:
    """Copy the runtime's modules that `modules` reach by imports."""
    for path in closure(modules)[0].values():
        _copy(path, into / path.relative_to(CODE))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
