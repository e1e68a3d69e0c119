"""Install the vendored wheels of this component without a network: pip from its own wheel, every file by its digest.

    python3 install.py [--where] CODE WORK

CODE is the unpacked component, WORK its own folder; --where prints the folder of the packages. Standard library alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON = (3, 11)
"""The interpreter that the wheels are for."""

SPARE = 64 * 1024 * 1024
"""Bytes that have to stay free once everything is installed."""


def digest(code: Path) -> str:
    """Return what names an installation: the digest of the pinned wheels."""
    return hashlib.sha256((code / "requirements.txt").read_bytes()).hexdigest()[:16]


def site(code: Path, work: Path) -> Path:
    """Return where the packages of this component are installed."""
    return work / f"site-{digest(code)}"


def check(code: Path, work: Path) -> None:
    """Check interpreter and disk.

    Raises:
        SystemExit: one of them does not do; its text says which.
    """
    if sys.version_info[:2] != PYTHON:
        raise SystemExit(
            f"error: Python {sys.version_info[0]}.{sys.version_info[1]}; allowed: 3.11, for the wheels are for it"
        )
    needed = int((code / "installed-bytes").read_text()) + SPARE
    if (free := shutil.disk_usage(work).free) < needed:
        raise SystemExit(f"error: {work}: disk is full; value: {free} bytes free; allowed: {needed}; mend: free some")


def install(code: Path, work: Path) -> None:
    """Install what is not installed yet; a kill at any moment leaves it to be done again.

    Raises:
        SystemExit: the interpreter is another one, the disk too full, or a wheel not the one that was pinned.
    """
    target = site(code, work)
    if target.is_dir():
        return
    check(code, work)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    [pip] = (code / "wheels").glob("pip-*.whl")
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--no-compile",
        "--disable-pip-version-check", "--isolated", "--require-hashes", "--find-links", str(code / "wheels"),
        "--target", str(part), "--requirement", str(code / "requirements.txt"),
    ]  # fmt: skip
    # pip runs from its wheel, so that the device needs neither pip nor venv; its settings there count for nothing
    surroundings = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(pip), "PYTHONDONTWRITEBYTECODE": "1",
                    "TMPDIR": str(work), "HOME": str(work)}  # fmt: skip
    done = subprocess.run(command, env=surroundings, check=False)
    if done.returncode != 0:
        shutil.rmtree(part, ignore_errors=True)
        raise SystemExit("error: the vendored wheels cannot be installed; mend: deploy the component again")
    os.sync()
    part.rename(target)
    for stale in work.glob("site-*"):
        # the version before stays: a rollback finds it
        if stale != target and len(list(work.glob("site-*"))) > 2:
            shutil.rmtree(stale, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "--where":
        print(site(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        install(Path(sys.argv[1]), Path(sys.argv[2]))
