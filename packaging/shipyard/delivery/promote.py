"""Promote and roll back: copy a release between environments' buckets, record it, and name it in fleet.toml.

The record in the target's bucket is the point from which on it counts. What comes before changes nothing that runs; what
comes after is done again by the same command.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.approval import (
    HeldGate,
    approval_path,
    check_signer,
    check_standing,
    hold_gates,
    parse,
    release_digest,
    require_approval,
    text,
)
from models.config import Fleet
from models.promotion import Promotion, check_chain, sign_promotion
from models.release import Release, Signer, load_keys, read_release
from serve.errors import ShipyardError
from shipyard.delivery.pin import pin
from shipyard.delivery.register import FOLDER, Lost, Register, lock
from shipyard.stage import write
from shipyard.upload import Store, upload
from shipyard.verify import checked, verify_store

PROMOTIONS = f"{FOLDER}promotions/"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Desk:
    """What a promotion works with: the files of the repository, the key that signs its record, and who asks, when."""

    fleet: Fleet
    fleet_file: Path
    key: Signer
    by: str
    at: str
    progress: Progress
    allow_older: bool = False
    dry_run: bool = False

    @property
    def releases(self) -> Path:
        """Return the folder of published releases."""
        return self.fleet_file.parent / "releases"

    def read(self, version: str) -> Release:
        """Read a published release; refuse one that is revoked, or older than fleet.toml allows."""
        path = self.releases / f"{version}.json"
        oldest = 0 if self.allow_older else self.fleet.project.minimum_sequence
        found = read_release(path, load_keys(self.releases / "keys"), oldest)
        check_standing(path, found)
        return found


def promote(
    desk: Desk, source: str, target: str, version: str | None, stores: tuple[Store, Store], register: Register
) -> Any:
    """Bring the release of `source`, or the one that is named, to `target`; doing it twice changes nothing more.

    Args:
        stores: the buckets of the two.
        register: that of the target.

    Returns:
        What was done, for machines.

    Raises:
        ShipyardError: a gate, the approval or the signature is missing, the release is revoked or older than what runs, an
            object differs, or another run is delivering to the target.
    """
    wanted = desk.fleet.env[target].delivery
    if source == target or (wanted is not None and wanted.promote_from not in (None, source)):
        raise ShipyardError(
            f"promote: {target} takes no releases from there", value=source,
            allowed=(wanted.promote_from if wanted else None) or "another environment",
            mend=f"env.{target}.delivery.promote_from names where from",
        )  # fmt: skip
    found = desk.read(version or desk.fleet.env[source].release)
    gates = hold_gates(found, desk.fleet)

    def copy(renew: Callable[[], None]) -> int:
        return _copy(found, *stores, desk.progress, renew)

    return _deliver(desk, found, source, target, gates, register, copy)


def rollback(desk: Desk, target: str, version: str | None, store: Store, register: Register) -> dict[str, Any]:
    """Bring an environment back to the release before its last promotion, or to the one that is named.

    Gates are not held again: they may have been raised since. An older release is what is asked for.

    Raises:
        ShipyardError: there is none to go back to, it is not to be trusted, or its artifacts are not whole in the bucket.
    """
    chain = _chain(desk, target, register)
    last = chain[-1:]
    if version is None:
        if not last:
            raise ShipyardError(
                f"rollback: no promotion to {target} is recorded",
                mend=f"name one: shipyard rollback {target} --to VERSION",
            )
        # after a rollback the one before it is the one that was fled from
        version = last[0].replaces if last[0].source is not None else last[0].release
    found = desk.read(version)
    gates = next((one.gates for one in reversed(chain) if one.release == version), ())

    def check(renew: Callable[[], None]) -> int:
        verify_store(found, store, desk.progress)
        renew()
        return 0

    return _deliver(desk, found, None, target, gates, register, check)


def _deliver(
    desk: Desk, found: Release, source: str | None, target: str, gates: tuple[HeldGate, ...], register: Register,
    bring: Callable[[Callable[[], None]], int],
) -> dict[str, Any]:  # fmt: skip
    """Check what promotion and rollback have in common, bring the artifacts, record it, and name it in fleet.toml."""
    keys_folder = desk.releases / "keys"
    keys = load_keys(keys_folder)
    check_signer(desk.key, keys, "promotion", keys_folder)
    approval = require_approval(found, target, desk.fleet.env[target], desk.releases, keys_folder)
    told: dict[str, Any] = {
        "environment": target, "source": source, "release": found.version, "sha256": release_digest(found),
        "approval": str(approval_path(Path("releases"), target, found.version)) if approval else None,
        "dry_run": desk.dry_run,
    }  # fmt: skip

    def latest() -> tuple[list[Promotion], str]:
        chain = _chain(desk, target, register)
        now = chain[-1].release if chain else desk.fleet.env[target].release
        if source is not None and now != found.version:
            _not_older(desk, found, now, target)
        return chain, now

    chain, now = latest()
    if desk.dry_run:
        return told | {"replaces": now, "changed": now != found.version}
    what = f"{'rollback' if source is None else 'promotion'} to {found.version}"
    with lock(register, what, desk.by) as renew:
        sent = bring(renew)
        renew()
        # under the lock: another run may have ended since
        chain, now = latest()
        if not chain or now != found.version:
            record = sign_promotion(
                found, target, source, gates, desk.by, desk.at, desk.key, replaces=now, approval=approval,
                previous=chain[-1] if chain else None,
            )  # fmt: skip
            try:
                register.write(f"{PROMOTIONS}{record.number:06d}.json", _plain(record), None)
            except Lost:
                raise ShipyardError(
                    f"promotion {record.number} to {target}: another run was first", mend="run the same command again"
                ) from None
            chain.append(record)
        folder = desk.releases / "promotions" / target
        folder.mkdir(parents=True, exist_ok=True)
        for one in chain:
            write(folder / f"{one.number:06d}.json", text(one))
        pinned = pin(desk.fleet_file, target, found.version)
    return told | {
        "replaces": now, "changed": pinned or now != found.version, "number": chain[-1].number, "bytes_sent": sent,
    }  # fmt: skip


def _plain(record: Promotion) -> dict[str, Any]:
    return record.model_dump(mode="json", by_alias=True)


def _chain(desk: Desk, target: str, register: Register) -> list[Promotion]:
    """Read and verify the promotions of an environment as its bucket has them."""
    keys, where = load_keys(desk.releases / "keys"), f"s3://{register.bucket}/{PROMOTIONS}"
    found = [parse(document, Promotion, keys, where) for document in register.below(PROMOTIONS)]
    return list(check_chain(found, target, where))


def _not_older(desk: Desk, found: Release, now: str, target: str) -> None:
    """Refuse a release that is older than what runs, unless it is asked for."""
    if desk.allow_older:
        return
    path = desk.releases / f"{now}.json"
    if not path.is_file():
        raise ShipyardError(
            f"promote: {target} runs a release that is not here",
            value=now,
            mend="bring your checkout up to date, then again",
        )
    runs = read_release(path, load_keys(desk.releases / "keys"))
    if found.sequence < runs.sequence:
        raise ShipyardError(
            f"promote: {found.version} is older than what {target} runs", value=found.sequence,
            allowed=f"{runs.sequence} or later", mend=f"shipyard rollback {target}, or ask for it: --allow-older",
        )  # fmt: skip


def _copy(found: Release, source: Store, target: Store, progress: Progress, renew: Callable[[], None]) -> int:
    """Copy a release's artifacts by way of this machine, where each byte is held to its digest; return the bytes sent."""
    sent = 0
    for artifact in found.artifacts:
        with tempfile.TemporaryDirectory() as folder:
            renew()
            done = 0
            for file in artifact.files:
                path = Path(folder, file.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as stream:
                    for piece in checked(source, artifact.key, file):
                        stream.write(piece)
                        done += len(piece)
                        progress(f"fetch {artifact.name}, bytes", min(done, artifact.bytes), artifact.bytes)
            sent += upload(target, artifact.model_dump(), Path(folder), progress)
    return sent
