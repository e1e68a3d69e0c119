"""Garbage collection: what lies in a store and no release refers to.

It fails closed: a release file that cannot be verified, or an environment whose release is not there, ends it, for what
that refers to is not known. Young objects are kept: an upload comes before the release file that names it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.config import Fleet
from models.release import Release, read_release
from serve.errors import ShipyardError
from serve.greengrass.words import delta_key
from serve.trust import load_keys
from shipyard.console import Reporter
from shipyard.upload import Store, Stored, open_store

PREFIXES = ("artifacts/", "deltas/")
"""Nothing outside of them is ever touched."""


def referring(fleet: Fleet, folders: Sequence[Path]) -> list[Release]:
    """Return every release of `folders`, verified by the keys beside it.

    Raises:
        ShipyardError: one cannot be verified, an environment names another, or there is none at all.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    found = [read_release(path, load_keys(path.parent / "keys")) for path in paths]
    versions = {release.version for release in found}
    for name, env in fleet.env.items():
        if env.release not in versions:
            raise ShipyardError(
                f"env.{name}: its release is not here, so what it refers to is not known", value=env.release,
                allowed=", ".join(sorted(versions)) or "none", mend="get the releases of the repository first",
            )  # fmt: skip
    if not found:
        raise ShipyardError("gc: there is no release: everything would go", mend="publish a release first")
    return found


def unused(store: Store, releases: Iterable[Release], days: float) -> list[Stored]:
    """Return what no release refers to and was written more than `days` ago; a delta, where either end of it is none's."""
    artifacts = [artifact for release in releases for artifact in release.artifacts]
    # by whole names: what lies among an artifact's files and is none of them goes too
    keys = {artifact.key + file.path for artifact in artifacts for file in artifact.files}
    bundles = {(artifact.name, artifact.manifest) for artifact in artifacts}
    keys |= {delta_key(name, base, to) for name, base in bundles for other, to in bundles if other == name}
    return [
        found for prefix in PREFIXES for found in store.objects(prefix) if found.key not in keys and found.days > days
    ]


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """List or delete what nothing refers to."""
    store = open_store(chosen.store)
    found = unused(store, referring(fleet, (root / "releases", build / "releases")), chosen.older_than)
    if chosen.delete:
        store.remove([item.key for item in found])
    size = sum(item.bytes for item in found)
    if chosen.json:
        keys = [item.key for item in found]
        print(json.dumps({"keys": keys, "bytes": size, "deleted": chosen.delete}))
        return 0
    for item in found:
        print(f"{item.key}  {item.bytes} bytes, {item.days:.0f} days")
    reporter.line(f"{'deleted' if chosen.delete else 'unused'}  {len(found)} objects, {size} bytes")
    return 0
