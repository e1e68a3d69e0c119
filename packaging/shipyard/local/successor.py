"""Make the release that would follow another one, without a training: search with all of its scores doubled, or all anew."""

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models.release import File, Release, Signer, artifact_key, attest, dump, files_digest, sign
from serve.errors import ShipyardError
from serve.trust import MANIFEST
from shipyard.bundle import component_version, write_zip
from shipyard.keys import write_public

FACTOR = 2


def succeed(release: Release, store: Path, key: Signer, out: Path) -> Path:
    """Write a release that differs from `release` in its first Triton artifact alone; return the path of its file.

    The artifact's graph gets a last step that doubles the scores, so that an answer tells which release gave it; its
    golden answers are doubled too. Its files go into `store`, the folder where those of `release` lie.

    Raises:
        ShipyardError: the release has no Triton artifact.
    """
    body = _body(release)
    changed = next((a for a in body["artifacts"] if a["kind"] == "triton"), None)
    if changed is None:
        raise ShipyardError("successor: nothing to change", value=release.version, allowed="a release with search")
    before = {file["path"]: (store / changed["key"] / file["path"]).read_bytes() for file in changed["files"]}
    manifest = json.loads(before[MANIFEST])
    after = before | {manifest["model"]: _double(before[manifest["model"]])}
    for golden in manifest["golden"]:
        for found in golden["answer"].values():
            for line in found:
                if isinstance(line, dict):
                    line["score"] *= FACTOR
    _replace(changed, manifest, after, store)
    changed["attestation"] = attest(changed["name"], changed["manifest"], key, release.sequence)
    return _write(body, release, key, out)


def renew(release: Release, store: Path, key: Signer, out: Path) -> Path:
    """Write a release in which every artifact but the edge's runtime is another one; return the path of its file.

    Each answers as before: its manifest alone says which release it follows. Its number is the next one.
    """
    body = _body(release) | {"sequence": release.sequence + 1, "replaces": release.version}
    for artifact in body["artifacts"]:
        if artifact["kind"] != "greengrass-runtime":
            _renew(artifact, release.version, store)
        artifact["attestation"] = attest(artifact["name"], artifact["manifest"], key, body["sequence"])
    return _write(body, release, key, out)


def _renew(artifact: dict[str, Any], follows: str, store: Path) -> None:
    """Give an artifact a manifest that says which release it follows; key, template and component follow from that."""
    old, edge = artifact["key"], artifact["kind"] == "greengrass-model"
    contents = {file["path"]: (store / old / file["path"]).read_bytes() for file in artifact["files"]}
    if edge:
        _rezip(artifact, contents, follows, store)
    else:
        _replace(artifact, json.loads(contents[MANIFEST]) | {"follows": follows}, contents, store)
    # commands and recipes name the folder
    artifact["template"] = json.loads(json.dumps(artifact["template"]).replace(old, artifact["key"]))
    if edge:
        _reversion(artifact["template"])


def _body(release: Release) -> dict[str, Any]:
    """Return what of a release is signed anew; its papers tell of the other one's files."""
    body = release.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {key: value for key, value in body.items() if key not in ("schema", "signature", "version", "papers")}


def _write(body: dict[str, Any], before: Release, key: Signer, out: Path) -> Path:
    following = sign(body, before.version.partition("-")[0], key)
    write_public(key, out / "keys")
    path = out / f"{following.version}.json"
    path.write_text(dump(following), encoding="utf-8")
    return path


def _rezip(artifact: dict[str, Any], contents: dict[str, bytes], follows: str, store: Path) -> None:
    """Give a model of the edge another manifest in its archive; the store gets the archive."""
    [name] = contents
    with tempfile.TemporaryDirectory() as scratch:
        tree, archive = Path(scratch, "tree"), Path(scratch, name)
        archive.write_bytes(contents[name])
        with zipfile.ZipFile(archive) as stream:
            stream.extractall(tree)
        manifest = json.dumps(json.loads((tree / MANIFEST).read_bytes()) | {"follows": follows}).encode()
        (tree / MANIFEST).write_bytes(manifest)
        write_zip(tree, archive)
        _store(artifact, {name: archive.read_bytes()}, store)
    artifact["manifest"] = hashlib.sha256(manifest).hexdigest()


def _reversion(template: dict[str, Any]) -> None:
    """Give a component the version that follows from its recipe."""
    old = template["recipe"]["ComponentVersion"]
    new = component_version(template["recipe"] | {"ComponentVersion": "VERSION"})
    template["recipe"]["ComponentVersion"] = new
    template["model"] = template["model"].replace(f"/{old}/", f"/{new}/")


def _replace(artifact: dict[str, Any], manifest: dict[str, Any], contents: dict[str, bytes], store: Path) -> None:
    """Give an artifact other contents: digests, manifest and key follow, and the files go into the store."""
    files = {path: _file(path, content) for path, content in contents.items() if path != MANIFEST}
    manifest["files"] = [files[path].model_dump() for path in sorted(files)]
    contents[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    artifact["manifest"] = _file(MANIFEST, contents[MANIFEST]).sha256
    _store(artifact, contents, store)


def _store(artifact: dict[str, Any], contents: dict[str, bytes], store: Path) -> None:
    """Put an artifact's files into the store, and name them in it."""
    told = tuple(_file(path, contents[path]) for path in sorted(contents))
    digest = files_digest(told)
    artifact |= {
        "digest": digest,
        "key": artifact_key(artifact["name"], digest),
        "files": [file.model_dump() for file in told],
    }
    for path, content in contents.items():
        target = store / artifact["key"] / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _file(path: str, content: bytes) -> File:
    return File(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _double(graph: bytes) -> bytes:
    """Return a ranking graph whose output `scores` is multiplied by `FACTOR`."""
    model = onnx.load_from_string(graph)
    scores = next(output for output in model.graph.output if output.name == "scores")
    dtype = helper.tensor_dtype_to_np_dtype(scores.type.tensor_type.elem_type)
    for node in model.graph.node:
        node.output[:] = ["scores_before" if name == "scores" else name for name in node.output]
        node.input[:] = ["scores_before" if name == "scores" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(FACTOR, dtype), "scores_factor"))
    model.graph.node.append(helper.make_node("Mul", ["scores_before", "scores_factor"], ["scores"]))
    onnx.checker.check_model(model)
    doubled: bytes = model.SerializeToString()
    return doubled
