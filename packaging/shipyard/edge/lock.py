"""The lock of edge components: releases/components.lock, each version that was ever published with its recipe's digest.

A version follows from its content; the lock holds that it stays so. `shipyard publish` writes it.
"""

import hashlib
import json
from pathlib import Path

from models.release import Artifact, Release
from serve.errors import ShipyardError
from shipyard.stage import write

LOCK = "components.lock"


def edge_artifacts(found: Release) -> tuple[Artifact, ...]:
    """Return what of a release runs on devices, the models first, for the runtime depends on them."""
    return found.of("greengrass-model") + found.of("greengrass-runtime")


def component(artifact: Artifact) -> tuple[str, str]:
    """Return the name and version of an artifact's component."""
    recipe = artifact.template["recipe"]
    return recipe["ComponentName"], recipe["ComponentVersion"]


def recipe_of(artifact: Artifact, bucket: str) -> bytes:
    """Return the recipe as it is published: compact JSON, so that the same content is the same bytes."""
    text = json.dumps(artifact.template["recipe"], sort_keys=True, separators=(",", ":"))
    return text.replace("@BUCKET@", bucket).encode()


def lock(found: Release, releases: Path) -> None:
    """Add the components of a release to the lock.

    Raises:
        ShipyardError: a version of the lock has another content.
    """
    path = releases / LOCK
    known: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for artifact in edge_artifacts(found):
        name, version = component(artifact)
        digest = hashlib.sha256(recipe_of(artifact, "@BUCKET@")).hexdigest()
        if known.setdefault(name, {}).setdefault(version, digest) != digest:
            raise ShipyardError(
                f"{path}: {name} {version}: locked with another content", value=digest, allowed=known[name][version],
                mend="a version is never used twice: change the model or the code and release again",
            )  # fmt: skip
    if known:
        write(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
