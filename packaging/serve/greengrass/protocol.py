"""How a device and the center stay in step: a pure state machine, told in docs/edge-sync.md. It reads no clock and no disk.

`step` takes a state and an event and returns the next state with what the shell has to do, in that order. A state is
durable before anything that follows from it is done.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ShipyardError

SHADOW = "shipyard"
"""Name of the named shadow."""

LARGEST_TOLD = 2_400
"""Bytes of what the center tells; it is in the shadow twice, and with the report the shadow stays below 6 KB, for nucleus
lite drops the connection of a message of 10,000 bytes in Base64."""

LARGEST_REPORT = 1_200
"""Bytes of what a device tells, without the echo of what it was told."""

TRIES = 3
"""How often a model may be proved before it counts as one that kills the process or the device."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Delta:
    """Name the patch from an installed bundle to the archive: `base` is the digest of the installed bundle.json."""

    base: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Pointer:
    """Name a model: digest of its bundle.json, who attests it, and its archive by digest and size."""

    version: str
    manifest: str
    attestation: str
    sha256: str
    bytes: int
    delta: Delta | None = None


@dataclass(frozen=True)
class Told:
    """What the center wants: all models of a generation change together. A later generation counts, whatever it holds.

    `parameters` are small settings by model: calibration and fusion weights.
    """

    generation: int
    models: Mapping[str, Pointer]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a device knows for good.

    `floor` is the highest generation that it has ever taken up, `applied` the one whose models it serves. `current` and
    `previous` are digests of bundle.json by model, `deployed` those that the components of the last deployment brought.
    `target` is the generation that is being fetched, `ready` once it lies on the disk, `tries` how often its proof has
    begun, `starts` how often the process began without opening its models. `refused` is the last generation that failed its
    proof, `fault` says in a line why what was told is not served.
    """

    floor: int = 0
    applied: int = 0
    current: Mapping[str, str] = field(default_factory=dict)
    previous: Mapping[str, str] = field(default_factory=dict)
    deployed: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    target: Told | None = None
    ready: bool = False
    tries: int = 0
    starts: int = 0
    refused: int = 0
    fault: str = ""

    @property
    def phase(self) -> str:
        """Return the state's name in docs/edge-sync.md: serving, fetching, proving or failed."""
        if self.target is not None:
            return "proving" if self.ready else "fetching"
        return "failed" if self.fault else "serving"


@dataclass(frozen=True)
class Heard:
    """The center's word arrived, maybe again, maybe late."""

    told: Told


@dataclass(frozen=True)
class Fetched:
    """All bundles of a generation lie on the disk, verified."""

    generation: int


@dataclass(frozen=True)
class Proved:
    """Every model of a generation opened and gave its golden answers in time."""

    generation: int


@dataclass(frozen=True)
class Failed:
    """A generation cannot be served: one of its models failed its proof."""

    generation: int
    why: str


@dataclass(frozen=True)
class Started:
    """The process began; `deployed` are the bundles that the components hold now, by model."""

    deployed: Mapping[str, str]


@dataclass(frozen=True)
class Opened:
    """What could be opened when the process began, by model; `why` says what could not, `damaged` that it was not whole."""

    serving: Mapping[str, str]
    damaged: bool = False
    why: str = ""


Event = Heard | Fetched | Proved | Failed | Started | Opened


@dataclass(frozen=True)
class Fetch:
    """Bring these bundles onto the disk, as often as it takes; then `Fetched`."""

    told: Told


@dataclass(frozen=True)
class Prove:
    """Open these bundles and compare their golden answers; then `Proved` or `Failed`."""

    told: Told


@dataclass(frozen=True)
class Serve:
    """Answer by these models from now on."""

    models: Mapping[str, str]


Action = Fetch | Prove | Serve


def step(state: State, event: Event) -> tuple[State, Action | None]:
    """Return the state after an event, and what is to be done once that state is durable.

    A second `Heard` of the same generation, an answer to a generation that is no longer wanted, and whatever is older than
    `floor` change nothing.
    """
    match event:
        case Heard(told):
            return _hear(state, told)
        case Fetched(generation) if state.target is not None and state.target.generation == generation:
            if state.ready:
                return state, None
            return dataclasses.replace(state, ready=True, tries=1), Prove(state.target)
        case Proved(generation) if state.target is not None and state.target.generation == generation:
            target = state.target
            current = {name: pointer.manifest for name, pointer in target.models.items()}
            previous = {name: old for name, old in state.current.items() if current.get(name) != old}
            after = dataclasses.replace(
                state, applied=generation, current=current, previous={**state.previous, **previous},
                parameters=target.parameters, target=None, ready=False, tries=0, fault="",
            )  # fmt: skip
            return after, Serve(current)
        case Failed(generation, why) if state.target is not None and state.target.generation == generation:
            return _refuse(state, generation, why), None
        case Started(deployed):
            return _start(state, deployed)
        case Opened(serving, damaged, why):
            after = dataclasses.replace(state, starts=0, current=dict(serving), fault=why or state.fault)
            # what was whole and is not any more is worth fetching again: the same generation counts once more
            return (dataclasses.replace(after, applied=0) if damaged else after), None
        case _:
            return state, None


def _hear(state: State, told: Told) -> tuple[State, Action | None]:
    known = state.target.generation if state.target is not None else state.applied
    if told.generation < state.floor or told.generation in (known, state.refused):
        return state, None
    after = dataclasses.replace(state, floor=told.generation, target=told, ready=False, tries=0, fault="")
    return after, Fetch(told)


def _start(state: State, deployed: Mapping[str, str]) -> tuple[State, Action | None]:
    """Take what a new deployment brought, for it was told too; go on with a generation that was under way."""
    fresh = {name: found for name, found in deployed.items() if state.deployed.get(name) != found}
    moved = {name: state.current[name] for name, found in fresh.items() if state.current.get(name, found) != found}
    after = dataclasses.replace(
        state, deployed=dict(deployed), current={**state.current, **fresh}, previous={**state.previous, **moved},
        starts=0 if fresh else state.starts + 1,
    )  # fmt: skip
    if after.starts >= TRIES:
        why = f"the process ended {TRIES} times while it opened its models"
        after = dataclasses.replace(
            after, current={**after.current, **after.previous}, previous={}, starts=0, fault=why
        )
    if after.target is None:
        return after, None
    if not after.ready:
        return after, Fetch(after.target)
    if after.tries >= TRIES:
        why = f"the process ended {TRIES} times while it proved this generation"
        return _refuse(after, after.target.generation, why), None
    return dataclasses.replace(after, tries=after.tries + 1), Prove(after.target)


def _refuse(state: State, generation: int, why: str) -> State:
    return dataclasses.replace(
        state, target=None, ready=False, tries=0, refused=generation, fault=f"generation {generation}: {why}"
    )


def archive_key(name: str, sha256: str) -> str:
    """Return an archive's key in the bucket, as `models.release.artifact_key` makes it for one file."""
    digest = hashlib.sha256(f"{sha256}  {name}.zip\n".encode()).hexdigest()
    return f"artifacts/{name}/{digest}/{name}.zip"


def delta_key(name: str, base: str, manifest: str) -> str:
    """Return the key of the patch from the bundle `base` to the bundle `manifest`, both digests of bundle.json."""
    return f"deltas/{name}/{base}/{manifest}.zst"


def write_told(told: Told) -> str:
    """Return what the center puts into the shadow.

    Raises:
        ShipyardError: it is larger than a device takes.
    """
    text = _dump(dataclasses.asdict(told))
    if len(text.encode()) > LARGEST_TOLD:
        raise ShipyardError(
            "edge: too much for a shadow", value=len(text.encode()), allowed=f"{LARGEST_TOLD} bytes",
            mend="fewer models a device, or smaller parameters",
        )  # fmt: skip
    return text


def read_told(text: str) -> Told:
    """Read what the center wants.

    Raises:
        ShipyardError: it is too large, or not of this form.
    """
    if len(text.encode(errors="replace")) > LARGEST_TOLD:
        raise ShipyardError("told: too large", value=len(text), allowed=f"{LARGEST_TOLD} bytes")
    try:
        document = json.loads(text)
        models = {name: _pointer(pointer) for name, pointer in document["models"].items()}
        told = Told(document["generation"], models, document["parameters"])
        right = document.keys() == {"generation", "models", "parameters"} and isinstance(told.parameters, dict)
        right &= type(told.generation) is int and told.generation > 0 and bool(models)
        right &= all(_NAME.fullmatch(name) for name in models)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise ShipyardError(f"told: {type(fault).__name__}: {fault}", allowed="as docs/edge-sync.md") from None
    if not right:
        raise ShipyardError("told: wrong", value=text[:80], allowed="as docs/edge-sync.md")
    return told


def _pointer(document: Mapping[str, Any]) -> Pointer:
    delta = None if document["delta"] is None else Delta(**document["delta"])
    pointer = Pointer(**{**document, "delta": delta})
    for part in (pointer, *((delta,) if delta else ())):
        if not _SHA256.fullmatch(part.sha256) or type(part.bytes) is not int or part.bytes < 0:
            raise ValueError("not a digest and a size")
    if not _SHA256.fullmatch(pointer.manifest) or (delta and not _SHA256.fullmatch(delta.base)):
        raise ValueError("not the digest of a bundle")
    if not isinstance(pointer.version, str) or not isinstance(pointer.attestation, str):
        raise ValueError("not a version and an attestation")
    return pointer


def write_state(state: State) -> str:
    """Return a state as text for the disk."""
    return _dump(dataclasses.asdict(state))


def read_state(text: str) -> State:
    """Read a state back.

    Raises:
        ShipyardError: it is not a state.
    """
    try:
        document = json.loads(text)
        target = document.pop("target")
        told = None if target is None else read_told(_dump(target))
        return State(**document, target=told)
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise ShipyardError(f"state: {type(fault).__name__}: {fault}") from None


def _dump(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
