"""Papers: the files beside a release that tell of it in forms that others read. The signed release names their digests.

`figures.json` is what the stages said, from which the report page is drawn; `model-card.md`, `bom.cdx.json` and
`provenance.intoto.jsonl` are the model card, the bill of materials and the provenance.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.lineage import check_papers, papers_folder
from models.release import Release, Signer
from serve.errors import ShipyardError
from serve.trust import Keys
from shipyard.stage import write

if TYPE_CHECKING:
    from shipyard.line import Line

FIGURES, CARD, BOM, PROVENANCE = "figures.json", "model-card.md", "bom.cdx.json", "provenance.intoto.jsonl"


def make_papers(
    line: "Line", version: str, body: Mapping[str, Any], folders: Mapping[str, Path], key: Signer
) -> dict[str, bytes]:
    """Return the papers of a release that is not signed yet, by name.

    `folders` hold the files of the artifacts as they are uploaded, by the artifacts' names.
    """
    # not at the top: only who makes releases has the libraries
    from shipyard.papers import bom, card, ingredients, provenance, uses

    figures = line.record()
    found = {"data": ingredients.data(line.fleet), "base": ingredients.base_model(line.fleet, line.base)}
    limits = uses.limits(line.fleet, figures["data"]["counts"])
    project = line.fleet.project.name
    shipped = {name: path.read_text(encoding="utf-8") for name, path in _requirements(body, folders).items()}
    packages = ingredients.locked(line.origin.lock)
    papers = {
        FIGURES: (json.dumps(figures, separators=(",", ":"), ensure_ascii=False) + "\n").encode(),
        CARD: card.card(project, version, body, figures, found, limits).encode(),
        BOM: bom.bill(project, version, body, found, packages, shipped, limits),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in papers.items()}
    purls = {kind: part.purl for kind, part in found.items()}
    document = provenance.statement(version, body, purls, line.origin.builder, digests)
    return papers | {PROVENANCE: provenance.seal(document, key)}


def _requirements(body: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return what each artifact installs, in pip's form; the edge's runtime brings the wheels of its lock."""
    from shipyard.edge.wheels import LOCK

    found = {}
    for artifact in body["artifacts"]:
        own = folders[artifact["name"]] / "requirements.txt"
        if artifact["kind"] == "greengrass-runtime":
            found[artifact["name"]] = LOCK
        elif own.is_file():
            found[artifact["name"]] = own
    return found


def named(papers: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the papers as a release names them."""
    return [
        {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in sorted(papers.items())
    ]


def write_papers(release: Path, papers: Mapping[str, bytes]) -> None:
    """Write papers into the folder beside a release file."""
    folder = papers_folder(release)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in papers.items():
        write(folder / name, content.decode())


def copy_papers(release: Path, found: Release, into: Path) -> None:
    """Copy the papers of a release, which were checked, to where the release file `into` will lie."""
    if found.papers:
        write_papers(into, {paper.name: (papers_folder(release) / paper.name).read_bytes() for paper in found.papers})


def verify_papers(release: Path, found: Release, keys: Keys) -> list[str]:
    """Check the papers of a verified release: their digests, and that the provenance is its own; return their names.

    A release that is older than papers has none.

    Raises:
        ShipyardError: one is missing or changed, or the provenance is of another release or signer.
    """
    check_papers(release, found.papers)
    names = [paper.name for paper in found.papers]
    if PROVENANCE in names:
        from shipyard.papers.provenance import check_provenance  # not at the top: most verbs do without the library

        path = papers_folder(release) / PROVENANCE
        check_provenance(path.read_bytes(), found, keys, str(path))
    return names


def read_paper(release: Path, found: Release, keys: Keys, name: str) -> str:
    """Return the text of one paper of a verified release.

    Raises:
        ShipyardError: the release has none of this name, or a paper is not what was signed.
    """
    if name not in verify_papers(release, found, keys):
        raise ShipyardError(
            f"{release}: has no {name}", allowed=", ".join(paper.name for paper in found.papers) or "it has no papers",
            mend="it was made before releases had them: make a new one",
        )  # fmt: skip
    return (papers_folder(release) / name).read_text(encoding="utf-8")
