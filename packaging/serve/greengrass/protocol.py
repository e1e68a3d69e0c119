"""How a device and the center stay in step: a pure state machine, told in docs/edge-sync.md. It reads no clock and no disk.

`step` takes a state and an event and returns the next state with what the shell has to do, in that order. A state is
durable before anything that follows from it is done.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.errors import ShipyardError
from serve.greengrass.words import Told, dump, read_told

TRIES = 3
"""How often a model may be proved before it counts as one that kills the process or the device."""


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
                target=None, ready=False, tries=0, fault="",
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


def write_state(state: State) -> str:
    """Return a state as text for the disk."""
    return dump(dataclasses.asdict(state))


def read_state(text: str) -> State:
    """Read a state back.

    Raises:
        ShipyardError: it is not a state.
    """
    try:
        document = json.loads(text)
        target = document.pop("target")
        told = None if target is None else read_told(dump(target))
        return State(**document, target=told)
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise ShipyardError(f"state: {type(fault).__name__}: {fault}") from None
