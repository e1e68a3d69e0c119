"""Wheels: what an edge device installs, pinned by digest for one interpreter and two architectures.

wheels.txt beside this file is the lock, in pip's own form: versions from constraints.txt, a SHA-256 of each wheel.
`make edge-lock` writes it anew; a release reads it and takes no other wheel.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve.errors import ShipyardError

LOCK = Path(__file__).with_name("wheels.txt")

ROOTS = (
    "awsiotsdk",
    "boto3",
    "cryptography",
    "numpy",
    "onnxruntime",
    "paho-mqtt",
    "rfc8785",
    "tokenizers",
    "zstandard",
)
"""What the runtime of the edge imports; a test compares it with the code."""

SPARED = ("huggingface-hub",)
"""What these name and a device does without: tokenizers imports it to download, which nothing here does."""

PIP = "pip==26.3"
"""What installs them on the device, from its own wheel."""

ARCHITECTURES = {"amd64": "x86_64", "aarch64": "aarch64"}
"""Greengrass' name of an architecture, and that of Python's wheels."""

_GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
PYTHON = "3.11"


def pins() -> list[str]:
    """Return name==version of `ROOTS` and of all that they need, as they are installed here, and pip."""
    found: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in SPARED:
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": "", "python_version": PYTHON}):
                waiting.append(needed.name)
    return [*sorted(f"{name}=={version}" for name, version in found.items()), PIP]


def download(requirements: Path, architecture: str, into: Path, *flags: str) -> None:
    """Let pip fetch the wheels of an architecture.

    Raises:
        ShipyardError: the registry does not answer, or a wheel is not the one of the lock.
    """
    platforms = [word for glibc in _GLIBC for word in ("--platform", f"{glibc}_{ARCHITECTURES[architecture]}")]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--abi", "cp311", "--abi", "abi3",
        "--abi", "none", *platforms, *flags, "--dest", str(into), "--requirement", str(requirements),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or done.stderr.splitlines()
        raise ShipyardError(
            f"wheels for {architecture}: {' '.join(told[:3])}",
            mend="check the package registry; after a change of constraints.txt: make edge-lock",
        )


def wheels(out: Path) -> dict[str, Any]:
    """Fetch the wheels of the lock into `out`/<architecture>; return their number and the bytes that they install."""
    said: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        folder = out / architecture
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        download(LOCK, architecture, folder, "--require-hashes")
        found = sorted(folder.glob("*.whl"))
        said[architecture] = {"wheels": len(found), "installed_bytes": sum(map(unpacked, found))}
    return said


def unpacked(wheel: Path) -> int:
    """Return the bytes that a wheel installs."""
    with zipfile.ZipFile(wheel) as stream:
        return sum(entry.file_size for entry in stream.infolist())


def lock() -> str:
    """Return the lock's text for what is installed here: every wheel of every architecture with its digest."""
    digests: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "pins.txt")
        listed.write_text("\n".join(pins()) + "\n")
        for architecture in ARCHITECTURES:
            into = Path(folder, architecture)
            download(listed, architecture, into)
            for wheel in into.glob("*.whl"):
                name, version = wheel.name.split("-")[:2]
                digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
                digests.setdefault(f"{canonicalize_name(name)}=={version}", set()).add(digest)
    lines = [f"{pin} {' '.join(f'--hash=sha256:{d}' for d in sorted(found))}" for pin, found in sorted(digests.items())]
    return "# Wheels of the edge's runtime. Written by `make edge-lock`, never by hand.\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    LOCK.write_text(lock(), encoding="utf-8")
