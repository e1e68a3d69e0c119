"""Bundle: a model and what serves it, in its target's form, reproducible to the byte.

gpu is a Triton model repository, cpu the context of a container image, edge a zip. bundle.json names every file with its
digest and says what a runtime must know; the bundle holds no time, no path and no key.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import serve
from models import submodel
from models.behaviour import VALIDATION, load_behaviour
from models.config import Target, TargetName
from models.cross import MAX_TOKENS as PAIR_TOKENS
from models.release import File, artifact_key, files_digest
from serve import triton
from serve.engine import ENGINE
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass import recipe
from serve.history import FEATURES, LIMIT, OFFER
from serve.runtime import SCHEMA, Model
from serve.trust import MANIFEST, check_bundle
from shipyard.examples import Examples
from shipyard.export import IR_VERSION, OPSET
from shipyard.wheels import LOCK, unpacked

CODE = Path(serve.__file__).parent

# what a process of the private cluster imports, with the versions that the release was tested with
CPU_PACKAGES = ("boto3", "cryptography", "numpy", "onnxruntime", "rfc8785", "tokenizers")

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
    facts: dict[str, Any], libraries: dict[str, str], out: Path, crossed: Path | None = None,
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
    model_path = f"model_repository/{kebab}/1/model.onnx" if place == "gpu" else "model.onnx"
    _copy(quantised / "model.onnx", tree / model_path)
    graph = onnx.load(tree / model_path)
    inputs = tuple(i.name for i in graph.graph.input)
    returned = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
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
        _write(tree / f"model_repository/{kebab}/{triton.CONFIG}", triton.config(kebab, inputs, returned))
    if place == "cpu":
        _write(tree / "Dockerfile", DOCKERFILE)
        _write(tree / "requirements.txt", "".join(f"{p}=={libraries[p].partition('+')[0]}\n" for p in CPU_PACKAGES))
        _copy_code(tree / "serve", ("server.py", "fetch.py"))
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
    document["golden"] = _golden(data, name, Model(tree, document))
    manifest = _seal(tree, document)
    if place == "edge":
        return _zipped(out, kebab, name, manifest, target)
    kind = "triton" if place == "gpu" else "image-context"
    artifact = _artifact(kebab, name, place, kind, manifest, tree, target.max_size_mb)
    artifact["template"] = _triton_template(kebab) if place == "gpu" else _image_template(kebab, artifact["key"])
    return artifact


def _triton_template(kebab: str) -> dict[str, Any]:
    """Return what a stack needs to start Triton."""
    return {
        "environment": {
            "SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": kebab, "SAGEMAKER_TRITON_LOG_VERBOSE": "false",
            "ORT_DISABLE_TELEMETRY": "1",
        },
        "model_data": "model_repository/",
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
                  "--port", "8080"],
        "port": 8080, "health": "/readyz", "mount": "/model",
    }  # fmt: skip


EDGE_CODE = ("agent", "delta", "device", "download", "install", "link", "local", "protocol", "store", "telemetry")
"""What of serve.greengrass runs on a device."""

MOST_RUNTIME_MB = 160
"""Size of the runtime for both architectures, most of which are wheels."""


def bundle_runtime(models: tuple[str, ...], wheels: Path, out: Path) -> dict[str, Any]:
    """Write the edge's runtime, code and wheels, as a bundle and a zip for each architecture; return its artifact.

    `models` are the artifacts that it serves, `wheels` the folder of `shipyard.wheels`.
    """
    tree = _empty(out)
    (out / "upload").mkdir(parents=True)
    for architecture in recipe.PLATFORMS:
        code = tree / architecture
        _copy_code(code / "serve", ("greengrass/__init__.py", *(f"greengrass/{name}.py" for name in EDGE_CODE)))
        _write(code / "install.sh", recipe.INSTALL)
        _write(code / "run.sh", recipe.RUN)
        _copy(LOCK, code / "requirements.txt")
        packages = sorted((wheels / architecture).glob("*.whl"))
        for wheel in packages:
            _copy(wheel, code / "wheels" / wheel.name)
        _write(code / "installed-bytes", f"{sum(map(unpacked, packages))}\n")
        write_zip(code, out / "upload" / f"{recipe.archive(architecture)}.zip")
    manifest = _seal(tree, {"schema": SCHEMA, "name": "edge-runtime", "engine": ENGINE})
    artifact = _artifact(
        "edge-runtime", None, "edge", "greengrass-runtime", manifest, out / "upload", MOST_RUNTIME_MB
    )  # fmt: skip
    prefix = f"s3://@BUCKET@/{artifact['key']}"
    version = _version(recipe.runtime_recipe("VERSION", prefix, models))
    artifact["template"] = {"recipe": recipe.runtime_recipe(version, prefix, models)}
    return artifact


def _zipped(out: Path, kebab: str, name: str, manifest: str, target: Target) -> dict[str, Any]:
    """Zip a model's bundle for Greengrass and return its artifact, with the recipe as its template."""
    archive = out / "upload" / f"{kebab}.zip"
    archive.parent.mkdir(parents=True)
    write_zip(out / "bundle", archive)
    artifact = _artifact(kebab, name, "edge", "greengrass-model", manifest, archive.parent, target.max_size_mb)
    uri = f"s3://@BUCKET@/{artifact['key']}{archive.name}"
    version = _version(recipe.model_recipe(kebab, "VERSION", uri))
    artifact["template"] = {
        "recipe": recipe.model_recipe(kebab, version, uri),
        "model": f"{recipe.model_component(kebab)}/{version}/{kebab}/@ATTESTATION@",
    }
    return artifact


def _version(document: dict[str, Any]) -> str:
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
    files = _files(root)
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


def _golden(data: Path, name: str, model: Model) -> list[dict[str, Any]]:
    """Return three real requests with the model's answers, and one without a history."""
    behaviour = load_behaviour(data)
    examples = Examples(behaviour, VALIDATION, 64, (name,)).of(name)
    queries: list[dict[str, Any]] = [{"history": []}]
    for basket in examples.baskets[:3].tolist():
        if examples.logged:
            queries.append({"history": []})
            continue
        rows, days = behaviour.past(basket)
        events = [
            {"product": behaviour.item[row - 1], "days_ago": round(day, 3)}
            for row, day in zip(rows[-40:].tolist(), days[-40:].tolist(), strict=True)
        ]
        queries.append({"history": events})
        if model.takes_offers:
            start = behaviour.start[basket]
            promoted, strengths = behaviour.market.offers(int(behaviour.place[start]), float(behaviour.day[start]))
            own = np.isin(promoted, rows)
            queries[-1]["offers"] = [
                {"product": behaviour.item[row - 1], **dict(zip(OFFER, (round(s, 3) for s in told), strict=True))}
                for row, told in zip(promoted[own][:20].tolist(), strengths[own][:20].tolist(), strict=True)
            ]
    if model.task == "search":
        for request, words in zip(queries, examples.words[:4], strict=True):
            request["query"] = words
    return [{"request": r, "answer": a} for r, a in zip(queries, model.predict(queries), strict=True)]


def _empty(out: Path) -> Path:
    """Remove what a run that was killed has left of a bundle, for it would be sealed too; return the bundle's folder."""
    for name in ("bundle", "upload"):
        shutil.rmtree(out / name, ignore_errors=True)
    return out / "bundle"


def _seal(tree: Path, document: dict[str, Any]) -> str:
    """Write bundle.json with the digests of all other files; return its own digest."""
    document["files"] = [file.model_dump() for file in _files(tree)]
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    _write(tree / MANIFEST, text)
    digest = sha256_file(tree / MANIFEST)
    check_bundle(tree, digest)
    return digest


def _files(tree: Path) -> tuple[File, ...]:
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    return tuple(
        File(path=p.relative_to(tree).as_posix(), sha256=sha256_file(p), bytes=p.stat().st_size) for p in paths
    )


def _copy_code(into: Path, entries: tuple[str, ...]) -> None:
    """Copy the runtime's code: what every target runs, and the entry points of this one."""
    for name in (
        "__init__.py",
        "engine.py",
        "errors.py",
        "files.py",
        "blend.py",
        "history.py",
        "runtime.py",
        "trust.py",
        *entries,
    ):
        _copy(CODE / name, into / name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
