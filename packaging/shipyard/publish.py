"""Publish: take a local release into the repository's releases/, which nothing else writes."""

from pathlib import Path

from models.release import Release, dump, read_release
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.edge.lock import lock
from shipyard.papers.files import copy_papers, verify_papers
from shipyard.stage import write


def publish(release: Path, releases: Path) -> Release:
    """Verify a local release and copy it, with its public key and its papers, into `releases`.

    Raises:
        ShipyardError: it is not signed by the key beside it, a paper is not what was signed, or a release of this version is
            there with other content.
    """
    keys = release.parent / "keys"
    if not release.is_file():
        made = ", ".join(sorted(path.stem for path in release.parent.glob("*.json"))) or "none: make release"
        raise ShipyardError(f"{release}: no such release", value=release.stem, allowed=made)
    found = read_release(release, load_keys(keys))
    verify_papers(release, found, load_keys(keys))
    target = releases / release.name
    if target.exists() and target.read_text(encoding="utf-8") != dump(found):
        raise ShipyardError(
            f"{target}: published with other content", mend="releases are immutable: make a new one, with a new version"
        )
    public = f"{found.signature.key_id}.pub"
    (releases / "keys").mkdir(parents=True, exist_ok=True)
    write(releases / "keys" / public, (keys / public).read_text(encoding="utf-8"))
    lock(found, releases)
    copy_papers(release, found, target)
    write(target, dump(found))
    return found
