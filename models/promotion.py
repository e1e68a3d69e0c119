"""Promotions: the record of what an environment took, from where, by whom and when; each names the one before.

A record is signed as a release is, by a key of keys/, and lies beside the releases: promotions/ENV/NUMBER.json.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from models.approval import Approval, HeldGate, Time, Version, Who, digest, parse, release_digest, sign_document
from models.config import Environment, Name, Settings
from models.lineage import Sha256
from models.release import Keys, Release, Signature, Signer
from serve.errors import ShipyardError
from serve.files import read_json


class Promotion(Settings):
    """Record that an environment took a release, the `number`th time that it took one.

    `source` is the environment that it came from, None for a rollback. `replaces` is what ran before, `previous` the digest
    of the record before this one, so that none can be left out, `approval` that of the approval, where one is needed.
    """

    schema_name: Annotated[Literal["shipyard.promotion/1"], Field(alias="schema")]
    number: Annotated[int, Field(ge=1, lt=10**6)]
    environment: Name
    source: Name | None
    release: Version
    sha256: Sha256
    replaces: Version
    by: Who
    at: Time
    gates: tuple[HeldGate, ...]
    approval: Sha256 | None
    previous: Sha256 | None
    signature: Signature


def sign_promotion(
    release: Release, environment: str, source: str | None, gates: tuple[HeldGate, ...], by: str, at: str, key: Signer, *,
    replaces: str, approval: Approval | None, previous: Promotion | None,
) -> Promotion:  # fmt: skip
    """Return the record that an environment takes a release, signed by `key`, after the record `previous`."""
    body = {
        "schema": "shipyard.promotion/1", "number": previous.number + 1 if previous else 1, "environment": environment,
        "source": source, "release": release.version, "sha256": release_digest(release), "replaces": replaces, "by": by,
        "at": at, "gates": [gate.model_dump() for gate in gates], "approval": digest(approval) if approval else None,
        "previous": digest(previous) if previous else None,
    }  # fmt: skip
    return sign_document(body, Promotion, key, f"promotion of {release.version}")


def read_promotions(folder: Path, keys: Keys) -> tuple[Promotion, ...]:
    """Read the promotions of an environment, folder/*.json, in their order.

    Raises:
        ShipyardError: one is missing, was changed, or is not signed by one of `keys`.
    """
    found = [parse(read_json(path), Promotion, keys, str(path)) for path in sorted(folder.glob("*.json"))]
    return check_chain(found, folder.name, str(folder))


def check_chain(found: list[Promotion], environment: str, where: str) -> tuple[Promotion, ...]:
    """Return the records of an environment, which must follow each other without a gap.

    Raises:
        ShipyardError: one is missing, is twice there, or is of another environment.
    """
    before: Promotion | None = None
    for number, one in enumerate(found, 1):
        wanted = (number, environment, digest(before) if before else None)
        if (one.number, one.environment, one.previous) != wanted:
            raise ShipyardError(
                f"{where}: promotion {one.number} of {one.environment} does not follow the one before it",
                allowed=f"number {number} of {environment}", mend="restore the records; each names the one before",
            )  # fmt: skip
        before = one
    return tuple(found)


def check_promoted(release: Release, name: str, env: Environment, releases: Path, keys: Keys) -> None:
    """Check that what fleet.toml names is what the last recorded promotion brought, where approvals are needed.

    An environment without records has none to follow.

    Raises:
        ShipyardError: fleet.toml was changed by hand, to a release that was not promoted or to an older one.
    """
    if not env.needs_approval:
        return
    found = read_promotions(releases / "promotions" / name, keys)
    if found and (found[-1].release, found[-1].sha256) != (release.version, release_digest(release)):
        raise ShipyardError(
            f"env.{name}: fleet.toml names a release that was not promoted", value=release.version,
            allowed=found[-1].release, mend=f"shipyard promote FROM {name}, or shipyard rollback {name}",
        )  # fmt: skip
