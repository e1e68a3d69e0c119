"""Release: run every stage in order, sign what they made, upload it, and write the release file last."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.release import (
    Release,
    Signer,
    attest,
    dump,
    next_sequence,
    read_release,
    replaced,
    sign,
    version_of,
)
from serve.files import sha256_file
from serve.trust import load_keys
from shipyard.gates import judged, judged_forms
from shipyard.keys import write_public
from shipyard.line import Line, as_json
from shipyard.papers.files import make_papers, named, write_papers
from shipyard.stage import Record, closure, digest, write
from shipyard.upload import open_store, upload

VARIES = {
    "finetune": "torch adds up by thread: the singular vectors that the projection starts from and the gradients of layer "
    "norms follow the number of threads; with more than one the projection's gradient differs between two runs, and on a "
    "GPU every sum may"
}
"""Stages whose output the device and the number of threads decide too, and why; torch's deterministic algorithms change
none of it."""


def release(line: Line, key: Signer, store_uri: str) -> tuple[Path, Release]:
    """Make a release: bundle, sign, upload, verify, and write the release file into build/releases/.

    Returns:
        The release file's path and its content.
    """
    artifacts = {unit: dict(record.said) for unit, record in line.until("bundle").items()}
    folders = {unit: line.bundle(unit).folder / artifact.pop("folder") for unit, artifact in artifacts.items()}
    sequence = next_sequence(line.root / "releases", {artifact["digest"] for artifact in artifacts.values()})
    for artifact in artifacts.values():
        artifact["attestation"] = attest(artifact["name"], artifact["manifest"], key, sequence)
    body = {"sequence": sequence, "replaces": replaced(line.root / "releases", sequence), **_body(line, artifacts)}
    semver = line.fleet.project.version
    sources = {artifact["name"]: folders[unit] for unit, artifact in artifacts.items()}
    papers = make_papers(line, version_of(body, semver), body, sources, key)
    found = sign(body | {"papers": named(papers)}, semver, key)
    store = open_store(store_uri)
    for unit, artifact in artifacts.items():
        upload(store, artifact, folders[unit], line.report)
    releases = line.build.parent / "releases"
    write_public(key, releases / "keys")
    path = releases / f"{found.version}.json"
    write_papers(path, papers)
    write(path, dump(found))
    return path, read_release(path, load_keys(releases / "keys"))


def _body(line: Line, artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the release says, before version and signature."""
    scores, submodels = line.evaluate.said["submodels"], {}
    for name in line.names:
        cut, exported, quantised = line.split(name).said, line.export(name).said, line.quantise(name).said
        submodels[name] = {
            "target": line.fleet.submodel[name].target,
            "task": cut["task"],
            "parameters_own": cut["parameters_own"],
            "parameters_shared": cut["parameters_shared"],
            "level": cut["level"],
            "bytes_own": cut["bytes_own"],
            "bytes_shared": cut["bytes_shared"],
            "score": _score(scores[name], line.calibration(name)),
            "rerank": _rerank(line.rerank(name)),
            "formats": [exported["form"] | {"latency_ms": quantised["fp32_latency_ms"]}, quantised["form"]],
            "losers": quantised["others"],
        }
    lock = line.origin.lock
    sources, libraries = closure((*line.modules, *line.model_modules))
    machine = importlib.import_module(
        "serve.engine"
    ).machine()  # not at the top: the runtime takes half of a verb's start
    return {
        "profile": line.profile_name,
        "source": {
            "data": line.fleet.data.source,
            "data_sha256": line.data.digest,
            "base": line.base_name,
            "base_revision": line.fleet.base.revision,
            "base_sha256": line.base_sha256,
            "commit": line.origin.commit,
            "environment_sha256": None if lock is None else sha256_file(lock),
            "code_sha256": digest({name: sha256_file(path) for name, path in sources.items()}),
            "libraries": libraries,
            "machine": machine
            | {"threads": importlib.import_module("torch").get_num_threads(), "device": line.finetune.said["device"]},
            "varies": VARIES,
        },
        "submodels": submodels,
        "fusion": _fusion(line.evaluate.said.get("fusion")),
        "artifacts": [artifacts[unit] for unit in sorted(artifacts)],
        "gates": [
            gate.model_dump()
            for gate in (
                *judged(scores, line.profile),
                *judged_forms(submodels, artifacts.values(), line.fleet.target),
            )
        ],
        "parameters": {
            # where the files lie tells nothing of what is in them
            "data": {key: value for key, value in as_json(line.fleet.data).items() if key != "folder"},
            "base": as_json(line.fleet.base),
            "finetune": as_json(line.fleet.finetune),
            "profile": as_json(line.profile),
            "target": {name: as_json(target) for name, target in line.fleet.target.items()},
            "submodel": {name: as_json(entry) for name, entry in line.fleet.submodel.items()},
        },
    }


def _score(record: Mapping[str, Any], corrected: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a release says of an evaluation's record, and of the calibration that its bundle carries."""
    over = dict(record["over_baseline"])
    calibration = {k: v for k, v in record["calibration"].items() if k != "reliability"} | dict(corrected)
    kept = ("metric", "examples", "households", "baseline_name", "baseline", "before", "after", "metrics")
    before = {k: v for k, v in record["over_before"].items() if k != "relative"}
    return {key: record[key] for key in kept} | {
        "relative": over.pop("relative"), "over_baseline": over, "over_before": before, "calibration": calibration,
    }  # fmt: skip


def _rerank(record: Record | None) -> dict[str, Any] | None:
    """Return what a release says of a cross-encoder."""
    if record is None:
        return None
    kept = ("depth", "weight", "precision", "bytes", "examples", "search", "reranked")
    over = {key: value for key, value in record.said["over_search"].items() if key != "relative"}
    return {key: record.said[key] for key in kept} | {"over_search": over}


def _fusion(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a release pins of the fusion."""
    if record is None:
        return None
    kept = ("method", "sources", "parameters", "examples")
    return {key: record[key] for key in kept} | {
        "best_single_name": record["best_single"],
        "best_single": record["single"][record["best_single"]]["test"],
        "fused": record["methods"][record["method"]]["test"],
        "over_best_single": {k: v for k, v in record["over_best_single"].items() if k != "relative"},
    }
