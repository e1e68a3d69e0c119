"""Approvals: who said, when and by which gates, that a release may run in an environment.

An approval is signed as a release is (models.release), by a key of keys/approvers/, and lies beside the releases:
approvals/ENV/VERSION.json.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field, ValidationError

from models.config import Environment, Fleet, Gate, Name, Profile, Settings, explain
from models.lineage import Gated, Sha256, check_papers
from models.release import Keys, Release, Signature, Signer, load_keys
from serve.errors import ShipyardError
from serve.files import read_json
from serve.trust import Revoked, algorithm, canonical, key_id, verify

APPROVERS = "approvers"
"""Folder below the trusted keys that holds those of approvers."""

Version = Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+-g[0-9a-f]{12}$")]
Time = Annotated[
    str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="a time in UTC, 2030-01-31T12:00:00Z")
]
Who = Annotated[str, Field(pattern=r"^[^\s]([^\r\n]{0,98}[^\s])?$", description="1 to 100 characters in one line")]


class HeldGate(Settings):
    """One gate that a sub-model held: `low`, the lower end of the 95 % interval, is at least `least`."""

    submodel: Name
    bound: Literal["over_before", "over_baseline"]
    low: float
    least: float


class Approval(Settings):
    """Say that a release may run in an environment: who said so and when, by which gates.

    `sha256` covers the release's canonical form, without its signature, and so its artifacts, figures and provenance.
    """

    schema_name: Annotated[Literal["shipyard.approval/1"], Field(alias="schema")]
    release: Version
    sha256: Sha256
    environment: Name
    by: Who
    at: Time
    gates: tuple[HeldGate, ...]
    signature: Signature


Document = TypeVar("Document", bound=Settings)


def release_digest(release: Release) -> str:
    """Return the SHA-256 of a release's canonical form (RFC 8785) without its signature, so a new signature keeps it."""
    return digest(release)


def digest(document: Settings) -> str:
    """Return the SHA-256 of a signed document's canonical form, without its signature."""
    plain = document.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return hashlib.sha256(canonical(plain)).hexdigest()


def hold_gates(release: Release, fleet: Fleet) -> tuple[HeldGate, ...]:
    """Hold a release's own figures to the gates of its profile in fleet.toml, as they are today; return them.

    Raises:
        ShipyardError: the profile is not there, or a gate is missed.
    """
    profile = fleet.profile.get(release.profile)
    if profile is None:
        raise ShipyardError(
            f"gate: release {release.version}: its profile is not in fleet.toml", value=release.profile,
            allowed=", ".join(fleet.profile), mend="bring the profile with its gates back",
        )  # fmt: skip
    for told in release.gates:
        figure, wanted = told.figure if told.low is None else told.low, _today(told, release, fleet, profile)
        if not told.passed:
            raise ShipyardError(
                f"gate: release {release.version}: {told.of}: {told.gate} was missed when it was made",
                value=figure, allowed=told.bound, mend="make another release",
            )  # fmt: skip
        most = told.gate in ("loss", "size_mb")
        if not (figure <= wanted if most else figure >= wanted):
            raise ShipyardError(
                f"gate: release {release.version}: {told.of}: {told.gate} is not what fleet.toml asks for today",
                value=f"{figure:.4g}", allowed=f"{wanted:.4g} or {'less' if most else 'more'}", mend="make another release",
            )  # fmt: skip
    held = []
    for name, submodel in sorted(release.submodels.items()):
        gate = profile.gate.get(name, profile.default_gate)
        for bound, found, least in (
            ("over_before", submodel.score.over_before, gate.over_before),
            ("over_baseline", submodel.score.over_baseline, gate.over_baseline),
        ):
            _hold(release.version, name, bound, found.low, least)
            held.append(HeldGate.model_validate({"submodel": name, "bound": bound, "low": found.low, "least": least}))
    return tuple(held)


def _today(told: Gated, release: Release, fleet: Fleet, profile: Profile) -> float:
    """Return a gate's bound as fleet.toml has it now, or as the release has it where fleet.toml has none."""
    if told.gate in Gate.model_fields:
        return float(getattr(profile.gate.get(told.of, profile.default_gate), told.gate))
    if told.gate == "loss" and told.of in release.submodels:
        return fleet.target[release.submodels[told.of].target].max_loss
    targets = [a.target for a in release.artifacts if a.name == told.of and a.kind != "greengrass-runtime"]
    return fleet.target[targets[0]].max_size_mb if told.gate == "size_mb" and targets else told.bound


def _hold(version: str, name: str, bound: str, low: float, least: float) -> None:
    if not low >= least:
        raise ShipyardError(
            f"gate: release {version}: {name}: {bound} is too low at its interval's lower end", value=f"{low:+.4f}",
            allowed=f"{least:+.4f} or more", mend="train longer or on more data; the gates are in fleet.toml",
        )  # fmt: skip


def sign_approval(
    release: Release, environment: str, gates: tuple[HeldGate, ...], by: str, at: str, key: Signer
) -> Approval:
    """Return the approval of a release for an environment, signed by `key`."""
    body = {
        "schema": "shipyard.approval/1", "release": release.version, "sha256": release_digest(release),
        "environment": environment, "by": by, "at": at, "gates": [gate.model_dump() for gate in gates],
    }  # fmt: skip
    return sign_document(body, Approval, key, f"approval of {release.version}")


def sign_document(body: dict[str, Any], model: type[Document], key: Signer, where: str) -> Document:
    """Return a document with the signature of `key` over its canonical form."""
    document: dict[str, Any] = json.loads(json.dumps(body))
    value = base64.b64encode(key.sign(canonical(document))).decode()
    public = key.public_key()
    document["signature"] = {"algorithm": algorithm(public), "key_id": key_id(public), "value": value}
    return _parse(document, model, where)


def text(document: Settings) -> str:
    """Return the text of a document's file: sorted keys, two spaces, one newline at its end."""
    plain = document.model_dump(mode="json", by_alias=True)
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def parse(document: dict[str, Any], model: type[Document], keys: Keys, where: str) -> Document:
    """Verify a document's signature by `keys` and validate it.

    Raises:
        ShipyardError: it is not signed by one of `keys`, was changed, or is no such document.
    """
    verify(document, keys, where)
    return _parse(document, model, where)


def _parse(document: dict[str, Any], model: type[Document], where: str) -> Document:
    try:
        return model.model_validate_json(json.dumps(document))
    except ValidationError as fault:
        raise explain(fault, model, where) from None


def approval_path(releases: Path, environment: str, version: str) -> Path:
    """Return where the approval of a release for an environment lies."""
    return releases / "approvals" / environment / f"{version}.json"


def approver_keys(keys: Path) -> Keys:
    """Read the keys that are trusted for approvals, maybe none: those in `approvers` below the folder of trusted keys.

    Raises:
        ShipyardError: one cannot be read, all are revoked, or one is a key that signs releases too.
    """
    folder = keys / APPROVERS
    found: Keys = load_keys(folder) if any(folder.glob("*.pub")) else {}
    # who makes a release must not be able to approve it
    if both := sorted(found.keys() & load_keys(keys).keys()):
        raise ShipyardError(
            f"{folder}: a key signs releases and approves them", value=", ".join(both), allowed="keys that differ",
            mend="approve with a key of its own",
        )  # fmt: skip
    return found


def check_approval(found: Approval, release: Release, environment: str, where: str) -> None:
    """Check that an approval is of this release, as it is, for this environment, and that every gate was held.

    Raises:
        ShipyardError: it is of another release or environment, or a gate is missing or missed.
    """
    wanted = {"release": release.version, "environment": environment, "sha256": release_digest(release)}
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise ShipyardError(
                f"{where}: approves another {name}", value=getattr(found, name), allowed=value,
                mend=_ask(release, environment),
            )  # fmt: skip
    gates: dict[tuple[str, str], HeldGate] = {(gate.submodel, gate.bound): gate for gate in found.gates}
    for name, submodel in sorted(release.submodels.items()):
        for bound, score in (
            ("over_before", submodel.score.over_before),
            ("over_baseline", submodel.score.over_baseline),
        ):
            gate = gates.get((name, bound))
            if gate is None or gate.low != score.low:
                raise ShipyardError(
                    f"{where}: a gate was skipped", value=None if gate is None else gate.low,
                    allowed=f"{name} {bound} of {score.low:+.4f}", mend=_ask(release, environment),
                )  # fmt: skip
            _hold(release.version, name, bound, gate.low, gate.least)


def require_approval(release: Release, name: str, env: Environment, releases: Path, keys: Path) -> Approval | None:
    """Return the approval of a release for an environment, or None where none is needed.

    Args:
        releases: the folder of release files, with approvals/ in it.
        keys: the folder of trusted keys, with approvers/ in it.

    Raises:
        ShipyardError: an approval is needed, and is missing, forged, signed by a key that is not trusted for approvals or is
            revoked, of another release or environment, or says that a gate was skipped.
    """
    if not env.needs_approval:
        return None
    path = approval_path(releases, name, release.version)
    if not path.is_file():
        raise ShipyardError(
            f"env.{name}: release {release.version} is not approved", value=str(path), mend=_ask(release, name)
        )
    found = parse(read_json(path), Approval, approver_keys(keys), str(path))
    check_approval(found, release, name, str(path))
    return found


def check_withdrawn(path: Path) -> None:
    """Refuse the release of a file beside which VERSION.revoked lies, for the reason that is written there.

    Raises:
        ShipyardError: it is revoked.
    """
    withdrawn = path.with_name(f"{path.stem}.revoked")
    if withdrawn.exists():
        raise ShipyardError(
            f"{path}: the release is revoked",
            value=revocation(withdrawn),
            mend="name another release, or roll back: shipyard rollback ENV",
        )


def revocation(path: Path) -> str:
    """Return the reason that a file VERSION.revoked or KEY_ID.revoked gives, in one line."""
    return " ".join(path.read_text(errors="replace").split())[:200] or "no reason is given"


def check_standing(path: Path, release: Release) -> None:
    """Refuse a release that is revoked, or whose papers, as its provenance, are not those that were signed with it.

    Raises:
        ShipyardError: it is revoked, or a paper is missing or was changed.
    """
    check_withdrawn(path)
    check_papers(path, release.papers)


def check_signer(key: Signer, keys: Keys, what: str, folder: Path) -> None:
    """Refuse a key whose signatures nobody would trust, before anything is signed.

    Raises:
        ShipyardError: its public half is not in `folder`, or is revoked.
    """
    identity = key_id(key.public_key())
    if not isinstance(keys.get(identity, Revoked("")), Revoked):
        return
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    raise ShipyardError(
        f"{what}: the key is not trusted for this", value=identity,
        allowed=", ".join(name for name, one in keys.items() if not isinstance(one, Revoked)) or "none yet",
        mend=f"by review, commit {folder}/{identity}.pub with: {public}",
    )  # fmt: skip


def _ask(release: Release, environment: str) -> str:
    return f"shipyard approve {release.version} {environment} --by WHO --key KEY"
