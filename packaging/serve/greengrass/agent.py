"""The shell around the protocol: it hears the center, does what `protocol.step` says, and reports. One thread, one queue."""

import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.errors import ShipyardError
from serve.greengrass.link import Link
from serve.greengrass.local import Desk
from serve.greengrass.protocol import (
    Action,
    Event,
    Failed,
    Fetch,
    Fetched,
    Heard,
    Opened,
    Prove,
    Proved,
    Serve,
    Started,
    State,
    step,
)
from serve.greengrass.shadow import Topics, told_in, update
from serve.greengrass.store import Read, Store
from serve.greengrass.words import Told, write_told
from serve.runtime import Model

MOST_WAITING = 64
RETRY = (1.0, 600.0)
"""Seconds before a fetch or a proof is tried again: the first time, and at most."""

log = logging.getLogger("edge")

Open = Callable[[str, str], Model]
"""Open a model by name and digest of its bundle.json, and prove it.

Raises:
    ShipyardError: it is not attested, not whole, gives other answers, or is too slow.
    OSError: the device's own trouble, which may pass.
"""


class Agent:
    """One device: it serves what is proved, whatever the center says and whether or not it speaks."""

    def __init__(
        self,
        store: Store,
        desk: Desk,
        link: Link,
        thing: str,
        read: Read,
        open_model: Open,
        *,
        poll: float,
        version: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._desk, self._link, self._read, self._open = store, desk, link, read, open_model
        self._topics, self._poll, self._version, self._clock = Topics(thing), poll, version, clock
        self._inbox: queue.Queue[tuple[str, bytes] | None] = queue.Queue(MOST_WAITING)
        self._state = State()
        self._fresh: dict[str, Model] = {}
        self._echo: str | None = None
        self._note = ""
        self._delay = 0.0
        self._retry: float | None = None
        self._due = 0.0

    def start(self, deployed: Mapping[str, str]) -> Action | None:
        """Open the last good models; return what an earlier process left to do.

        `deployed` are the bundles of the components, by model, as they lie in the store.

        Raises:
            ShipyardError: no version of any model can be served.
        """
        self._state, action = step(self._store.load(), Started(deployed))
        self._store.save(self._state)
        opened, damaged, faults = self._open_any()
        if not opened:
            raise ShipyardError("edge: no model can be served: " + ("; ".join(faults) or "none is deployed"))
        serving = {name: manifest for name, (manifest, _) in opened.items()}
        self._state, _ = step(self._state, Opened(serving, damaged, "; ".join(faults)))
        self._store.save(self._state)
        self._desk.change({name: model for name, (_, model) in opened.items()}, serving)
        self._store.tidy(self._state)
        return action

    def _open_any(self) -> tuple[dict[str, tuple[str, Model]], bool, list[str]]:
        """Open of each model the current version, or the previous one, or the component's."""
        opened: dict[str, tuple[str, Model]] = {}
        damaged, faults = False, []
        state = self._state
        for name in sorted(state.current):
            for manifest in dict.fromkeys(
                s[name] for s in (state.current, state.previous, state.deployed) if name in s
            ):
                try:
                    opened[name] = (manifest, self._open(name, manifest))
                    break
                except (ShipyardError, OSError) as fault:
                    log.error("%s is not served: %s", name, fault)
                    faults.append(str(fault))
                    damaged |= self._is_damaged(name, manifest)
        return opened, damaged, faults

    def _is_damaged(self, name: str, manifest: str) -> bool:
        """Say whether files are not whole, and remove them if so."""
        damaged = not self._store.is_whole(name, manifest)
        if damaged:
            self._store.drop(name, manifest)
        return damaged

    def run(self, stop: threading.Event, action: Action | None = None) -> None:
        """Stay in step until `stop` is set; `action` is what `start` returned."""
        self._link.open(self._topics.heard, self.hear, lambda: self._put(None))
        self.resume(action)
        while not stop.is_set():
            try:
                message = self._inbox.get(timeout=0.5)
            except queue.Empty:
                self.tick()
            else:
                self.take(message)
        self._save_totals()
        self._link.close()

    def resume(self, action: Action | None) -> None:
        """Go on with what an earlier process left to do."""
        self._retry = self._do(action)

    def take(self, message: tuple[str, bytes] | None) -> None:
        """Take one message of the shadow, or None for a connection that is made."""
        if message is None:
            # for the first time or again: what was said meanwhile was not heard
            self._ask()
        elif (told := self._told(*message)) is not None:
            before = self._state.target
            action = self._step(Heard(told))
            self._echo = write_told(told)
            if self._state.target != before:
                self._delay = 0.0
                self._retry = self._do(action)
            elif self._state.target is None:
                self._report()

    def tick(self) -> None:
        """Do what is due: a fetch that failed, and the question what is wanted, for a word may have been lost."""
        if self._retry is not None and self._clock() >= self._retry:
            self._retry = None
            if (told := self._state.target) is not None:
                self._retry = self._do(Prove(told) if self._state.ready else Fetch(told))
        if self._clock() >= self._due:
            self._ask()

    def _ask(self) -> None:
        # not all of a thousand devices at once
        self._due = self._clock() + self._poll * random.uniform(0.8, 1.0)  # noqa: S311 -- no secret
        self._link.publish(f"{self._topics.prefix}/get", b"{}")
        self._save_totals()
        self._report()

    def _save_totals(self) -> None:
        self._store.write("telemetry.json", self._desk.telemetry.close())

    def hear(self, topic: str, payload: bytes) -> None:
        """Put a message where `run` takes it from; never waits."""
        self._put((topic, payload))

    def _put(self, message: tuple[str, bytes] | None) -> None:
        try:
            self._inbox.put_nowait(message)
        except queue.Full:
            # whatever it was, the next question is answered with the whole truth
            log.warning("too much to hear; a message is left out")

    def _told(self, topic: str, payload: bytes) -> Told | None:
        """Return the center's word in a message; where there is none yet, or one of another form, go on and say so."""
        try:
            return told_in(topic, payload)
        except ShipyardError as fault:
            self._note = str(fault)
            self._report()
            return None

    def _step(self, event: Event) -> Action | None:
        after, action = step(self._state, event)
        if after != self._state:
            self._store.save(after)
            self._state, self._note = after, ""
        return action

    def _do(self, action: Action | None) -> float | None:
        """Do an action and what follows from it; return when to try again what could not be done."""
        while action is not None:
            self._report()
            match action:
                case Fetch(told):
                    try:
                        for name, pointer in sorted(told.models.items()):
                            self._store.fetch(name, pointer, self._read, self._state.current)
                    except (ShipyardError, OSError) as fault:
                        return self._later(f"fetch of generation {told.generation}: {fault}")
                    action = self._step(Fetched(told.generation))
                case Prove(told):
                    try:
                        action = self._step(self._prove(told))
                    except OSError as fault:
                        return self._later(f"proof of generation {told.generation}: {fault}")
                case Serve(models):
                    self._desk.change({name: self._fresh[name] for name in models}, models)
                    self._fresh = {}
                    log.info("serves generation %d", self._state.applied)
                    action = None
        self._store.tidy(self._state)
        self._report()
        return None

    def _later(self, note: str) -> float:
        """Say what could not be done; return when to try it again."""
        self._note = note
        log.warning("%s", note)
        self._delay = min(RETRY[1], max(RETRY[0], 2 * self._delay))
        self._report()
        return self._clock() + self._delay

    def _prove(self, told: Told) -> Proved | Failed:
        self._fresh = {}
        try:
            for name, pointer in sorted(told.models.items()):
                self._fresh[name] = self._open(name, pointer.manifest)
        except ShipyardError as fault:
            log.error("generation %d is not served: %s", told.generation, fault)
            self._fresh = {}
            return Failed(told.generation, str(fault)[:200])
        return Proved(told.generation)

    def status(self) -> dict[str, Any]:
        """Return what the device says of itself."""
        state = self._state
        return {
            "runtime": self._version, "generation": state.applied, "floor": state.floor, "phase": state.phase,
            "models": dict(state.current), "fault": (state.fault or self._note)[:200],
        }  # fmt: skip

    def _report(self) -> None:
        """Tell the center; what it told is echoed once it is served or refused, so that the shadow shows no difference."""
        echo = self._echo if self._state.target is None else None
        telemetry = json.loads(self._desk.telemetry.saved)
        self._link.publish(f"{self._topics.prefix}/update", update(self.status(), telemetry, echo))
