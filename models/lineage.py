"""What a release says of its own making: the gates that it passed, and the papers that lie beside it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from models.settings import Settings
from serve.errors import ShipyardError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Commit = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})(-dirty)?$")]
"""A commit of git; "-dirty" says that files of the code were not as they are committed."""


class Gated(Settings):
    """Hold one gate with the figure that it judged.

    `of` names a sub-model, or for `size_mb` an artifact. `low` is the lower end of the figure's 95 % interval, which is what
    is compared where there is one. Differences of the metric (`over_before`, `over_baseline`), a student's as a part of its
    teacher (`over_teacher`) and the part of equal top-10 places (`order`) are held to `bound` at least; the part of the
    metric that the served form costs (`loss`) and the size in units of 10^6 bytes (`size_mb`) to `bound` at most.
    """

    of: str
    gate: Literal["over_before", "over_baseline", "over_teacher", "loss", "order", "size_mb"]
    figure: float
    low: float | None = None
    bound: float
    passed: bool


class Paper(Settings):
    """Name a file in the folder beside the release file that bears its version, by its digest."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*(\.[a-z0-9]+)+$", max_length=64)]
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


def papers_folder(release: Path) -> Path:
    """Return the folder of the papers of a release file."""
    return release.with_suffix("")


def check_papers(release: Path, papers: Iterable[Paper]) -> None:
    """Compare the papers beside a release file with the digests that the release, already verified, names.

    Raises:
        ShipyardError: one is missing, or is not the one that was signed.
    """
    for paper in papers:
        path = papers_folder(release) / paper.name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            raise ShipyardError(f"{path}: missing", mend="restore the release's folder from the repository") from None
        if found != paper.sha256:
            raise ShipyardError(
                f"{path}: changed after it was signed", value=found, allowed=paper.sha256,
                mend="restore the file; never edit what belongs to a release",
            )  # fmt: skip
