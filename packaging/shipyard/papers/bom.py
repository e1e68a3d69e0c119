"""Bill of materials: a release's code and models in CycloneDX 1.6 (ECMA-424), as JSON, held to the official schema.

Packages that an artifact ships are `required`; those of the lock that only build it are `excluded`. The library has no model
card (ML-BOM), so that cards are added to what it writes, before the schema judges the whole. There is no time in it.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from serve.errors import ShipyardError
from shipyard.papers.ingredients import Ingredient, licence, pypi
from shipyard.papers.uses import INPUTS, USERS, purpose

KINDS = {
    "triton": ComponentType.PLATFORM,
    "image-context": ComponentType.CONTAINER,
    "gateway": ComponentType.CONTAINER,
    "greengrass-model": ComponentType.FILE,
    "greengrass-runtime": ComponentType.APPLICATION,
}
"""What an artifact is to CycloneDX: a platform is what a runtime of others reads."""


def bill(
    project: str, version: str, body: Mapping[str, Any], ingredients: Mapping[str, Ingredient], packages: Mapping[str, str],
    shipped: Mapping[str, str], limits: Sequence[str],
) -> bytes:  # fmt: skip
    """Return the bill of materials of a release that is not signed yet.

    Args:
        project: name of the release.
        version: version of the release.
        body: what the release says.
        ingredients: "data" and "base".
        packages: versions of the environment's lock.
        shipped: what artifacts install, by their names, in pip's form, with digests of wheels where they are known.
        limits: of the models, in words.

    Raises:
        ShipyardError: the official schema does not hold.
    """
    root = Component(name=project, type=ComponentType.APPLICATION, version=version, bom_ref="release",
                     licenses=_licences(licence("shipyard")))  # fmt: skip
    parts = {kind: _ingredient(kind, found, body["source"]) for kind, found in ingredients.items()}
    models = {name: _model(name, version, body, parts) for name in body["submodels"]}
    pinned = {name: _pins(text) for name, text in shipped.items()}
    libraries = _libraries(packages, pinned)
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:shipyard:{project}:{version}"))
    bom.metadata.component = root
    bom.components.update([*parts.values(), *models.values(), *libraries.values()])
    for model in models.values():
        bom.register_dependency(model, parts.values())
    for artifact in body["artifacts"]:
        found = _artifact(artifact)
        bom.components.add(found)
        needs = [libraries[f"{name}@{one}"] for name, (one, _) in pinned.get(artifact["name"], {}).items()]
        bom.register_dependency(found, [*needs, *([models[artifact["submodel"]]] if artifact["submodel"] else [])])
        bom.register_dependency(root, [found])
    written = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    document = json.loads(written)
    document["metadata"].pop("timestamp")
    for component in document["components"]:
        if component["bom-ref"].startswith("model:"):
            component["modelCard"] = _card(body["submodels"][component["name"]], limits)
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    check_bill(text)
    return text.encode()


def check_bill(text: str) -> None:
    """Hold a bill of materials to the schema of CycloneDX 1.6.

    Raises:
        ShipyardError: it is not of that form.
    """
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        told = getattr(fault, "data", fault)
        where = "/".join(map(str, getattr(told, "absolute_path", ())))
        raise ShipyardError(f"bill of materials: {where}: {getattr(told, 'message', told)}"[:400])


def _ingredient(kind: str, found: Ingredient, source: Mapping[str, Any]) -> Component:
    return Component(
        name=found.name, version=found.version or None, bom_ref=kind,
        type=ComponentType.DATA if kind == "data" else ComponentType.MACHINE_LEARNING_MODEL,
        purl=PackageURL.from_string(found.purl) if found.purl else None, licenses=_licences(found.licence),
        # over several files, so that it is no hash of the component
        properties=[Property(name=f"shipyard:{kind}_sha256", value=source[f"{kind}_sha256"])],
    )  # fmt: skip


def _model(name: str, version: str, body: Mapping[str, Any], parts: Mapping[str, Component]) -> Component:
    artifact = next(a for a in body["artifacts"] if a["submodel"] == name)
    # the graph itself, or the zip that it goes up in
    graph = next(f for f in artifact["files"] if f["path"].endswith(("model.onnx", ".zip")))
    sub = body["submodels"][name]
    return Component(
        name=name, version=version, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=f"model:{name}",
        description=purpose(sub["task"], sub["level"]),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=graph["sha256"])],
        properties=[Property(name="shipyard:file", value=artifact["key"] + graph["path"])],
    )  # fmt: skip


def _artifact(artifact: Mapping[str, Any]) -> Component:
    told = {"target": artifact["target"], "key": artifact["key"], "digest": artifact["digest"]}
    return Component(
        name=artifact["name"], version=artifact["digest"][:12], type=KINDS[artifact["kind"]],
        bom_ref=f"artifact:{artifact['name']}",
        properties=[Property(name=f"shipyard:{key}", value=value) for key, value in told.items()],
    )  # fmt: skip


def _pins(text: str) -> dict[str, tuple[str, list[str]]]:
    """Return versions and digests of pip's requirements by name."""
    found = {}
    for line in text.splitlines():
        if pin := re.match(r"([a-z0-9][a-z0-9._-]*)==(\S+)", line):
            found[pin[1]] = pin[2], re.findall(r"--hash=sha256:([0-9a-f]{64})", line)
    return found


def _libraries(
    packages: Mapping[str, str], pinned: Mapping[str, Mapping[str, tuple[str, list[str]]]]
) -> dict[str, Component]:
    """Return a component a package and version, whether an artifact ships it or not."""
    users: dict[str, list[str]] = {}
    wheels: dict[str, set[str]] = {}
    for artifact, pins in pinned.items():
        for name, (version, digests) in pins.items():
            users.setdefault(f"{name}@{version}", []).append(artifact)
            wheels.setdefault(f"{name}@{version}", set()).update(digests)
    shipped = {key.partition("@")[0] for key in users}
    keys = {*users, *(f"{name}@{version}" for name, version in packages.items() if name not in shipped)}
    found = {}
    for key in sorted(keys):
        name, _, version = key.partition("@")
        by = ", ".join(sorted(users.get(key, ())))
        found[key] = Component(
            name=name, version=version, type=ComponentType.LIBRARY, bom_ref=pypi(name, version),
            purl=PackageURL.from_string(pypi(name, version)), licenses=_licences(licence(name)),
            scope=ComponentScope.REQUIRED if by else ComponentScope.EXCLUDED,
            external_references=[_wheel(name, digest) for digest in sorted(wheels.get(key, ()))],
            properties=[Property(name="shipyard:artifacts", value=by)] if by else [],
        )  # fmt: skip
    return found


def _wheel(name: str, digest: str) -> ExternalReference:
    return ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION, url=XsUri(f"https://pypi.org/simple/{name}/#sha256={digest}"),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
    )  # fmt: skip


def _licences(told: str | None) -> list[Any]:
    return [LicenseFactory().make_from_string(told)] if told else []


def _card(sub: Mapping[str, Any], limits: Sequence[str]) -> dict[str, Any]:
    """Return CycloneDX's model card of a sub-model: parameters, figures with intervals, considerations."""
    score, served = sub["score"], sub["formats"][-1]
    told = {"released": "after", "before fine-tuning": "before", f"baseline: {score['baseline_name']}": "baseline"}
    figures = [(score["metric"], label, score[key]) for label, key in told.items()]
    figures += [(name, "released", found) for name, found in score["metrics"].items() if name != score["metric"]]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": sub["task"],
            "architectureFamily": "transformer",
            "modelArchitecture": f"ONNX, {served['precision']}; {sub['parameters_own']} parameters of its own and "
            f"{sub['parameters_shared']} of the shared trunk",
            "datasets": [{"ref": "data"}],
            "inputs": [{"format": text} for text in INPUTS[sub["task"]]],
            "outputs": [{"format": f"{sub['level']} rows with scores, best first"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": metric, "slice": f"{label}, test period", "value": str(found["value"]),
                 "confidenceInterval": {"lowerBound": str(found["low"]), "upperBound": str(found["high"])}}
                for metric, label, found in figures
            ]
        },
        "considerations": {
            "users": [USERS],
            "useCases": [purpose(sub["task"], sub["level"])],
            "technicalLimitations": list(limits),
            "performanceTradeoffs": [
                f"{served['precision']} costs {served['loss']:+.2%} of {score['metric']} against fp32 and keeps "
                f"{served['order']:.1%} of the first ten places"
            ],
        },
    }  # fmt: skip
