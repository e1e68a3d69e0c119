"""Roll a release out over all targets, one after the other, and return all of them where one fails.

What was done is written into the environment's bucket before and after each step, so that a run that was killed goes on, or
returns. In the end all targets are on one release: the new one, or the last good one.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NoReturn, Protocol

from serve.errors import ShipyardError
from shipyard.delivery.register import FOLDER, Lost, Register, lock

STATE = f"{FOLDER}rollout.json"

Phase = Literal["forward", "return", "done", "returned"]


class Target(Protocol):
    """A place of inference that takes releases."""

    @property
    def name(self) -> str:
        """Return its name, which the state keeps."""
        ...

    def bring(self, version: str) -> None:
        """Deploy a release, to the end; twice is once.

        Raises:
            ShipyardError: it cannot be deployed.
        """
        ...

    def check(self, version: str) -> None:
        """Hold what is live against a release.

        Raises:
            ShipyardError: another one is live, or it does not serve.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """How far a rollout is: `begun` are targets that may hold the new release, `done` those that were found well with it.

    `good` is the release to return to, None where none is known; `fault` is why it returns.
    """

    id: str
    release: str
    good: str | None
    phase: Phase
    by: str
    begun: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    fault: str = ""

    @property
    def over(self) -> bool:
        """Return whether nothing is left to do."""
        return self.phase in ("done", "returned")

    @property
    def stands(self) -> str | None:
        """Return the release that all targets are on once it is over."""
        return self.release if self.phase == "done" else self.good


def read_rollout(register: Register) -> Rollout | None:
    """Return the last rollout of an environment."""
    entry = register.read(STATE)
    return None if entry is None else _rollout(entry.content)


def _rollout(content: Mapping[str, Any]) -> Rollout:
    return Rollout(**{**content, "begun": tuple(content["begun"]), "done": tuple(content["done"])})


class Course:
    """One run over the targets of an environment, under its lock; `said` is told each step."""

    def __init__(
        self, register: Register, targets: Sequence[Target], said: Callable[[str], None], renew: Callable[[], None]
    ) -> None:
        self._register, self._targets, self._said, self._renew = register, targets, said, renew
        entry = register.read(STATE)
        self._tag = None if entry is None else entry.tag
        self.now = None if entry is None else _rollout(entry.content)

    def keep(self, now: Rollout) -> Rollout:
        """Write the state; from here on it counts."""
        self._renew()
        try:
            self._tag = self._register.write(STATE, asdict(now), self._tag)
        except Lost:
            raise ShipyardError("rollout: another run has written its state", mend="shipyard status ENV") from None
        self.now = now
        return now

    def forward(self, now: Rollout) -> Rollout:
        """Bring the release to each target that has not got it; where one fails, return all.

        Raises:
            ShipyardError: one failed, and all are back; or not all could be brought back.
        """
        try:
            for target in self._targets:
                if target.name in now.done:
                    continue
                if target.name not in now.begun:
                    now = self.keep(replace(now, begun=(*now.begun, target.name)))
                self._said(f"{target.name}: to {now.release}")
                target.bring(now.release)
                target.check(now.release)
                now = self.keep(replace(now, done=(*now.done, target.name)))
            # what came later may have taken an earlier one down
            for target in self._targets:
                target.check(now.release)
        except ShipyardError as fault:
            # the state tells who it was, a kill in between too
            self.back(self.keep(replace(self.now or now, phase="return", fault=str(fault))))
        return self.keep(replace(now, phase="done"))

    def back(self, now: Rollout) -> NoReturn:
        """Bring every target that may hold the new release back to the last good one, the last first; then say why.

        Raises:
            ShipyardError: always: with the fault that led here, or with what could not be brought back.
        """
        if now.good is None:
            raise ShipyardError(
                f"rollout of {now.release}: {now.fault}; there is no release before it to return to",
                mend="mend it and run the same command again, or name one: --good VERSION",
            )
        left: dict[str, ShipyardError] = {}
        begun = [target for target in reversed(self._targets) if target.name in now.begun]
        for target in begun:
            self._said(f"{target.name}: back to {now.good}")
            try:
                target.bring(now.good)
            except ShipyardError as fault:
                # the others are brought back all the same
                left[target.name] = fault
        # the last one looks at the places of all, so that none is looked at before all were brought back
        for target in begun:
            try:
                if target.name not in left:
                    target.check(now.good)
            except ShipyardError as fault:
                left[target.name] = fault
        if left:
            told = "; ".join(f"{name}: {fault}" for name, fault in left.items())
            raise ShipyardError(
                f"rollout of {now.release}: {now.fault}; not all targets are back on {now.good}", value=told,
                mend="run the same command again: it goes on returning",
            )  # fmt: skip
        self.keep(replace(now, phase="returned"))
        raise ShipyardError(
            f"rollout of {now.release}: {now.fault}; all targets are back on {now.good}",
            mend="shipyard rollback ENV names that in fleet.toml too",
        )


def roll_out(
    register: Register, targets: Sequence[Target], release: str, good: str | None, by: str, said: Callable[[str], None], *,
    give_up: bool = False, lease_s: float | None = None,
) -> Rollout:  # fmt: skip
    """Bring a release to all targets, or go on with what a killed run has begun.

    Args:
        targets: in their order.
        good: the release to return to, where no earlier rollout tells.
        give_up: return an unfinished rollout instead of going on with it.

    Raises:
        ShipyardError: a target failed (all are back then), another rollout is unfinished, or another run is at it.
    """
    more = {} if lease_s is None else {"lease_s": lease_s}
    with lock(register, f"rollout of {release}", by, **more) as renew:
        course = Course(register, targets, said, renew)
        now = course.now
        if now is not None and not now.over:
            if give_up and now.phase == "forward":
                now = course.keep(replace(now, phase="return", fault=f"given up by {by}"))
            if now.phase == "return":
                said(f"goes on returning from {now.release} to {now.good or good}")
                course.back(now if now.good else course.keep(replace(now, good=good)))
            if now.release != release:
                raise ShipyardError(
                    f"rollout of {now.release} is not finished", value=release, allowed=now.release,
                    mend="finish it first, or return from it: --return",
                )  # fmt: skip
            said(f"goes on with {now.id}: {', '.join(now.done) or 'none'} done")
            return course.forward(now)
        if give_up:
            raise ShipyardError("rollout: none is unfinished", mend="shipyard rollback ENV, then shipyard rollout ENV")
        if now is not None and now.stands is not None:
            good = now.stands
        return course.forward(course.keep(Rollout(uuid.uuid4().hex, release, good, "forward", by)))
