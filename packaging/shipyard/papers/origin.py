"""Origin: the commit that a release's code is of, the lock of its environment, and who builds. Asked once, in cli.py."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import models

CODE = ("models", "packaging", "fleet.toml", "constraints.txt", "pyproject.toml")
"""What a change of makes a commit "-dirty": nothing else goes into a release."""

BUILDER = "urn:shipyard:builder:local"
"""Who builds where nobody is named: somebody on a machine of their own, whom only the signature tells."""


@dataclass(frozen=True)
class Origin:
    """Where a release comes from.

    `commit` is None where the code is in no git repository, `lock` where no constraints.txt lies beside the code. `builder`
    is the URI of who builds (SLSA's builder.id).
    """

    commit: str | None = None
    lock: Path | None = None
    builder: str = BUILDER


NOWHERE = Origin()
"""Of code whose repository nobody asked for."""


def find_origin(builder: str = BUILDER, folder: Path | None = None) -> Origin:
    """Ask git of the code in `folder`, this one's own; what is installed inside of another's repository is not of it."""
    folder = folder or Path(models.__file__).resolve().parents[1]
    lock = folder / "constraints.txt"
    return Origin(_commit(folder), lock if lock.is_file() else None, builder)


def _commit(folder: Path) -> str | None:
    if _git(folder, "ls-files", "--error-unmatch", "models/release.py") is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", *CODE)
    # without a commit, or where git fails half-way, nothing is claimed
    if head is None or changed is None:
        return None
    return f"{head.strip()}-dirty" if changed.strip() else head.strip()


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it is missing or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],  # noqa: S607 - git is found where the user has it
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
