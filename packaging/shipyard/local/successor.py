"""Make the release that would follow another one, without a training: search with all of its scores doubled."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models.release import File, Release, Signer, artifact_key, attest, dump, files_digest, sign
from serve.errors import ShipyardError
from serve.trust import MANIFEST
from shipyard.keys import write_public

FACTOR = 2


def succeed(release: Release, store: Path, key: Signer, out: Path) -> Path:
    """Write a release that differs from `release` in its first Triton artifact alone; return the path of its file.

    The artifact's graph gets a last step that doubles the scores, so that an answer tells which release gave it; its
    golden answers are doubled too. Its files go into `store`, the folder where those of `release` lie.

    Raises:
        ShipyardError: the release has no Triton artifact.
    """
    body = release.model_dump(mode="json", by_alias=True, exclude_unset=True)
    version = body.pop("version").partition("-")[0]
    for name in ("schema", "signature"):
        del body[name]
    body.pop("papers", None)  # they tell of the other one's files
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
    following = sign(body, version, key)
    write_public(key, out / "keys")
    path = out / f"{following.version}.json"
    path.write_text(dump(following), encoding="utf-8")
    return path


def _replace(artifact: dict[str, Any], manifest: dict[str, Any], contents: dict[str, bytes], store: Path) -> None:
    """Give an artifact other contents: digests, manifest and key follow, and the files go into the store."""
    files = {path: _file(path, content) for path, content in contents.items() if path != MANIFEST}
    manifest["files"] = [files[path].model_dump() for path in sorted(files)]
    contents[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    files[MANIFEST] = _file(MANIFEST, contents[MANIFEST])
    told = tuple(files[path] for path in sorted(files))
    digest = files_digest(told)
    artifact |= {
        "digest": digest,
        "key": artifact_key(artifact["name"], digest),
        "manifest": files[MANIFEST].sha256,
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
