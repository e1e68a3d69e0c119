"""Publish: take a local release into the repository's releases/, which nothing else writes."""

from pathlib import Path

from models.approval import check_withdrawn, revocation
from models.release import Release, dump, next_sequence, read_release
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.edge.lock import lock
from shipyard.papers.files import copy_papers, verify_papers
from shipyard.stage import write


def publish(release: Path, releases: Path) -> Release:
    """Verify a local release and copy it, with its public key and its papers, into `releases`.

    Raises:
        ShipyardError: it is not signed by the key beside it, a paper is not what was signed, it or its key is revoked, or
            another release was published since, of this version or of its number.
    """
    keys = release.parent / "keys"
    if not release.is_file():
        made = ", ".join(sorted(path.stem for path in release.parent.glob("*.json"))) or "none: make release"
        raise ShipyardError(f"{release}: no such release", value=release.stem, allowed=made)
    found = read_release(release, load_keys(keys))
    verify_papers(release, found, load_keys(keys))
    target = releases / release.name
    check_withdrawn(target)
    withdrawn = releases / "keys" / f"{found.signature.key_id}.revoked"
    if withdrawn.exists():
        raise ShipyardError(
            f"{release}: signed by a key that is revoked",
            value=f"{withdrawn.stem}: {revocation(withdrawn)}",
            mend="make the release again with another key",
        )
    if target.exists() and target.read_text(encoding="utf-8") != dump(found):
        raise ShipyardError(
            f"{target}: published with other content", mend="releases are immutable: make a new one, with a new version"
        )
    digests = {artifact.digest for artifact in found.artifacts}
    if not target.exists() and found.sequence < (number := next_sequence(releases, digests)):
        raise ShipyardError(
            f"{release}: another release was published since it was made, by its sequence", value=found.sequence,
            allowed=f"{number} or more", mend="make release again: what is done is skipped, the number is new",
        )  # fmt: skip
    public = f"{found.signature.key_id}.pub"
    (releases / "keys").mkdir(parents=True, exist_ok=True)
    write(releases / "keys" / public, (keys / public).read_text(encoding="utf-8"))
    lock(found, releases)
    copy_papers(release, found, target)
    write(target, dump(found))
    return found
