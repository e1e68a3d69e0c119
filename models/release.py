"""The release file: what was made, with digests and metrics, signed. infra and runtimes read it, nothing edits it."""

import base64
import hashlib
import json
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field, ValidationError, model_validator

from models.config import Name, Precision, Settings, TargetName, explain
from models.lineage import Commit, Gated, Paper, Sha256
from models.lineage import check_papers as check_papers

# infra and app.py import nothing of serve themselves, so what they need of it they find here
from serve.errors import ShipyardError as ShipyardError
from serve.files import read_json
from serve.trust import Keys as Keys
from serve.trust import PublicKey, Revoked, algorithm, canonical, key_id, statement, verify
from serve.trust import load_keys as load_keys

SCHEMA = "shipyard.release/2"

Kind = Literal["triton", "image-context", "greengrass-model", "greengrass-runtime", "gateway"]
Bytes = Annotated[int, Field(ge=0)]
# relative, so that the release holds in every account, region and environment; no part of it is "." or ".."
_PART = r"\.{0,2}[A-Za-z0-9_-][A-Za-z0-9._-]*"
Key = Annotated[str, Field(pattern=rf"^{_PART}(/{_PART})*/?$", max_length=512)]


class Interval(Settings):
    """A value with its 95 % interval from a bootstrap over households (Efron 1979, percentile form)."""

    value: float
    low: float
    high: float


class Score(Settings):
    """Hold the figures of one sub-model on the test period: `metric` by name, as a part of 1.

    `before` is the untouched pretrained model, `after` the released one. `over_*` are paired differences; `relative` is the
    first of them as a part of the baseline. `metrics` are others of the released model, by name.
    """

    metric: str
    examples: int
    households: int
    baseline_name: str
    baseline: Interval
    before: Interval
    after: Interval
    over_baseline: Interval
    over_before: Interval
    relative: Interval | None
    metrics: dict[str, Interval]
    calibration: dict[str, Any]


class Fusion(Settings):
    """Pin how the answers of several sub-models to one search are fused (serve.fusion), fitted on validation.

    `sources` are sub-models in the order of the weights in `parameters`. `fused` and `best_single` are nDCG@10 on the test
    period, `over_best_single` their paired difference.
    """

    method: Literal["weighted", "vote", "rrf", "stacking"]
    sources: tuple[Name, ...]
    parameters: dict[str, Any]
    examples: int
    best_single_name: Name
    best_single: Interval
    fused: Interval
    over_best_single: Interval


class Format(Settings):
    """Hold one exported form of a sub-model, by name where its precision has several.

    `parity` is the largest difference of a logit from the form before it, relative to the largest logit, `order` the
    part of top-10 places that are equal, `loss` the part of the metric that the form costs, `latency_ms` the median of a
    single request on the machine that made the release.
    """

    form: str = ""
    precision: Precision
    bytes: Bytes
    parity: float
    order: float
    loss: float
    latency_ms: float


class Loser(Format):
    """Hold a form that was tried and not taken: for what it was `refused`, or None where a smaller one held too."""

    refused: str | None


class Rerank(Settings):
    """Hold what the cross-encoder of a search brings: it reads the first `depth` products again, with this `weight`.

    With weight 0, chosen on validation, it is not in the bundle. `search` and `reranked` are the metric on the test period,
    `over_search` their paired difference.
    """

    depth: int
    weight: Annotated[float, Field(ge=0, le=1)]
    precision: Literal["fp32", "fp16"]
    bytes: Bytes
    examples: int
    search: Interval
    reranked: Interval
    over_search: Interval


class Submodel(Settings):
    """Hold what is known of one sub-model of this release."""

    target: TargetName
    task: str
    level: Literal["product", "type", "category"]
    parameters_own: int
    parameters_shared: int
    bytes_own: Bytes
    bytes_shared: Bytes
    score: Score
    rerank: Rerank | None = None
    formats: tuple[Format, ...]
    losers: tuple[Loser, ...] = ()


class File(Settings):
    """One object of an artifact, by path below the artifact's key."""

    path: Key
    sha256: Sha256
    bytes: Bytes


class Artifact(Settings):
    """One bundle: `key` is its content-addressed prefix in any bucket, `manifest` the digest of its bundle.json.

    `digest` covers `files`, in the form that is uploaded. `attestation` signs name and manifest, for runtimes that have
    the bundle and not the release. `template` is what a stack needs to run the bundle (a
    Greengrass recipe, a container's environment) with @PLACEHOLDERS@ for what differs by environment.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    submodel: Name | None
    target: TargetName
    kind: Kind
    key: Key
    digest: Sha256
    manifest: Sha256
    attestation: Annotated[str, Field(pattern=r"^[0-9a-f]{16}:[0-9]{1,15}:[A-Za-z0-9+/=]+$")]
    files: Annotated[tuple[File, ...], Field(min_length=1)]
    template: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.bytes for file in self.files)

    @model_validator(mode="after")
    def _check_digest(self) -> Self:
        if self.digest != files_digest(self.files):
            raise ValueError(f"digest of artifact {self.name} does not cover its files")
        return self


class Machine(Settings):
    """Say what a release was made on: `instructions` are those of serve.engine.KNOWN, `threads` torch's; `device` is where
    the model was trained, cpu or a GPU's name."""

    architecture: str
    instructions: tuple[str, ...]
    threads: Annotated[int, Field(ge=1)]
    device: str = "cpu"


class Source(Settings):
    """Say what the release was made from: digests of data, base model and our code, and the libraries' versions.

    From the same trained weights follow the same bundles to the byte, under any path, language, time zone and number of
    threads. `varies` names the stages whose output depends on the number of threads too, with the reason; `machine` says
    where they ran. `commit` is null where the code was in no git repository, and `environment_sha256`, the
    digest of constraints.txt, where there was none.
    """

    data: str
    data_sha256: Sha256
    base: str
    base_revision: str = ""
    base_sha256: Sha256
    code_sha256: Sha256
    commit: Commit | None = None
    environment_sha256: Sha256 | None = None
    libraries: dict[str, str]
    machine: Machine | None = None
    varies: dict[str, str] = Field(default_factory=dict)


class Signature(Settings):
    """A signature over the canonical form (RFC 8785) of the rest of the document, by an algorithm of `serve.trust`."""

    algorithm: Literal["ed25519", "ecdsa-p256-sha256"]
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    value: str


class Release(Settings):
    """One release. `version` ends in the digest of the content: the same content has the same version.

    `sequence` counts releases that were published: a later one has a larger number, whatever a clock says; `replaces` is
    the version that was published before it. `parameters` are the tables of fleet.toml that it was made by. `papers` may
    tell the version, for it is the digest of the rest; the signature covers them.
    """

    schema_name: Annotated[Literal["shipyard.release/2"], Field(alias="schema")]
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+-g[0-9a-f]{12}$")]
    sequence: Annotated[int, Field(ge=0, lt=10**15)] = 0
    profile: Name
    source: Source
    submodels: dict[Name, Submodel]
    fusion: Fusion | None
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1)]
    gates: tuple[Gated, ...] = ()
    parameters: dict[str, Any] = Field(default_factory=dict)
    replaces: str | None = None
    papers: tuple[Paper, ...] = ()
    signature: Signature

    def of(self, kind: Kind) -> tuple[Artifact, ...]:
        """Return the artifacts of a kind, in the order of their names."""
        return tuple(sorted((a for a in self.artifacts if a.kind == kind), key=lambda a: a.name))


def files_digest(files: tuple[File, ...]) -> str:
    """Return the digest of a set of files: SHA-256 over the sorted lines "sha256  path" (as sha256sum prints them)."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def artifact_key(name: str, digest: str) -> str:
    """Return the content-addressed prefix of an artifact, with a slash at its end."""
    return f"artifacts/{name}/{digest}/"


class Signer(Protocol):
    """A private key, or a service that keeps one: an Ed25519PrivateKey is one, shipyard.keys has another."""

    def sign(self, data: bytes, /) -> bytes:
        """Return the signature of `data`."""
        ...

    def public_key(self) -> PublicKey:
        """Return the public half."""
        ...


def version_of(body: dict[str, Any], semver: str) -> str:
    """Return the version that a release of this content has, whatever its papers are."""
    content = {"schema": SCHEMA, **json.loads(json.dumps(body))}
    content.pop("papers", None)
    return f"{semver}-g{hashlib.sha256(canonical(content)).hexdigest()[:12]}"


def sign(body: dict[str, Any], semver: str, key: Signer) -> Release:
    """Complete `body` with the schema, the version that its content has, and a signature."""
    document = {"schema": SCHEMA, **json.loads(json.dumps(body)), "version": version_of(body, semver)}
    value = base64.b64encode(key.sign(canonical(document))).decode()
    public = key.public_key()
    document["signature"] = {"algorithm": algorithm(public), "key_id": key_id(public), "value": value}
    return _parse(document, f"release {document['version']}")


def attest(name: str, manifest: str, key: Signer, sequence: int = 0) -> str:
    """Return a key's attestation of a bundle of the release `sequence`, as `serve.trust.verify_attestation` reads it."""
    signed = base64.b64encode(key.sign(statement(name, manifest, sequence))).decode()
    return f"{key_id(key.public_key())}:{sequence}:{signed}"


def dump(release: Release) -> str:
    """Return the text of a release file: sorted keys, two spaces, one newline at its end."""
    # what was not signed is not written: a release that is older than a field has it not
    document = release.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def json_schema() -> str:
    """Return the JSON Schema of a release file (draft 2020-12), as docs/release.schema.json has it."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        **Release.model_json_schema(by_alias=True),
    }
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_release(path: Path, keys: Keys, oldest: int = 0) -> Release:
    """Read a release file, verify its signature and validate it.

    Raises:
        ShipyardError: the file is missing, is no release, is not signed by one of `keys`, was changed, does not bear
            the version of its name, or its sequence is smaller than the `oldest` that is allowed.
    """
    document = read_json(path)
    verify(document, keys, str(path))
    release = _parse(document, str(path))
    if path.stem != release.version:
        raise ShipyardError(
            f"{path}: its name is not its version",
            value=path.stem,
            allowed=release.version,
            mend="rename the file back",
        )
    if release.sequence < oldest:
        raise ShipyardError(
            f"{path}: older than project.minimum_sequence in fleet.toml allows", value=release.sequence,
            allowed=f"{oldest} or later", mend="name a later release, or ask for it: --allow-older, -c allow-older=true",
        )  # fmt: skip
    return release


def next_sequence(folder: Path, digests: Set[str]) -> int:
    """Return the number of a new release whose artifacts have these digests, after those that are published in `folder`.

    The same artifacts have the same number again. Files are not verified: one that is not signed only costs a number.
    """
    published = _published(folder)
    for sequence, document in published.values():
        if {artifact["digest"] for artifact in document.get("artifacts", ())} == digests:
            return sequence
    return max((sequence for sequence, _ in published.values()), default=0) + 1


def replaced(folder: Path, sequence: int) -> str | None:
    """Return the version that a release of this number replaces: the newest of those before it in `folder`, if any."""
    before = {version: number for version, (number, _) in _published(folder).items() if number < sequence}
    return max(before, key=lambda version: before[version], default=None)


def _published(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the releases of a folder by version, each with its number."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        document = read_json(path)
        sequence = document.get("sequence", 0)
        if type(sequence) is not int:
            raise ShipyardError(f"{path}: sequence: wrong", value=str(sequence)[:40], mend="restore the file")
        found[path.stem] = sequence, document
    return found


def trusted_key(release: Release, keys: Keys) -> str:
    """Return the public key that signed a verified release, in OpenSSH's one-line form ("ssh-ed25519 AAAA...")."""
    key = keys[release.signature.key_id]
    assert not isinstance(key, Revoked)
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _parse(document: dict[str, Any], where: str) -> Release:
    try:
        # by way of JSON: strict mode then takes lists for tuples, and integers where a float is written without a point
        return Release.model_validate_json(json.dumps(document))
    except ValidationError as fault:
        raise explain(fault, Release, where) from None
