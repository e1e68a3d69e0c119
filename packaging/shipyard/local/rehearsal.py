"""The way of two releases through all environments and back: the real CDK CLI, a local cloud, and a fault in each step.

Every step is a verb of the command line in a process of its own, as a workflow runs it. After each case the verb `status`
has to say that all targets are on one release; what does not do as it should raises, so that the rehearsal ends there.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import Fleet, load_fleet
from models.release import Release
from serve.errors import ShipyardError
from shipyard.delivery.pin import pin
from shipyard.delivery.register import LEASE_S, LOCK
from shipyard.edge.devices import groups
from shipyard.local.cloud import Cloud
from shipyard.local.faults import Control, Kind

SECONDS = 900
BUSY, RETURNED = "another run is delivering", "; all targets are back on"


@dataclass(frozen=True)
class Case:
    """A fault at a target: where in the local cloud it lies, and what kind it is."""

    target: str
    kind: Kind
    place: str

    @property
    def name(self) -> str:
        """Return how it is told and chosen."""
        return f"{self.target}:{self.kind.replace(' ', '-')}" + ("-device" if self.place.startswith("devices") else "")


@dataclass(frozen=True)
class Rehearsal:
    """A project with two releases, and a local cloud with an account for each of its environments."""

    root: Path
    clouds: Mapping[str, Cloud]
    control: Control
    order: Sequence[str]
    first: Release
    second: Release

    def steps(self, place: str, chosen: Sequence[Case]) -> Iterator[tuple[str, Any]]:
        """Walk the whole way; `chosen` faults are injected in the environment `place`. Yield each step with what it told.

        Raises:
            ShipyardError: a step does not do what it should, or targets are on different releases after it.
        """
        before, after = self.first.version, self.second.version
        for release in (before, after):
            self.run(self.order[0], "publish", release)
        yield "publish", f"{before}, then {after}"
        for env in self.order:
            self.found(env)
            self.run(env, "rollout", env)
            yield f"{env}: first", self.stands(env, before)
        for env in self.order:
            self.bring(env, after)
            yield f"{env}: next", self.stands(env, after)
        for env in reversed(self.order):
            self.back(env)
            self.run(env, "rollout", env)
            yield f"{env}: back", self.stands(env, before)
        for case in chosen:
            told = self.killed(place, case) if case.kind.startswith("killed") else self.failed(place, case)
            yield f"{place}: {case.name}", told

    def found(self, env: str) -> None:
        """Deploy an environment for the first time, with the first release, and give each thing group a device."""
        cloud, version = self.clouds[env], self.first.version
        assembly = self.root / "build" / "first" / env
        cloud.cdk(
            "synth", "--quiet", "--output", str(assembly), "--context", f"env={env}", "--context", "unapproved=true",
            "--context", f"release={self.root / 'releases' / version}.json",
            "--context", f"fleet={self.root / 'fleet.toml'}",
        )  # fmt: skip
        cloud.bootstrap(assembly)
        cloud.deploy(assembly, f"{env}/storage")
        self.deliver(env, version)
        # the stack pins what is published
        self.run(env, "edge", "publish", version, "--env", env)
        cloud.deploy(assembly, f"{env}/*")
        iot = cloud.client("iot")
        for group in groups(self.fleet.env[env].edge).values():
            iot.create_thing(thingName=f"{group}-1")
            iot.add_thing_to_thing_group(thingGroupName=group, thingName=f"{group}-1")

    def deliver(self, env: str, version: str) -> None:
        """Bring a release into an environment's bucket and name it there: by upload into the first, by promotion else."""
        source = self.fleet.env[env].delivery.promote_from  # type: ignore[union-attr]  # by `way`
        if self.fleet.env[env].needs_approval:
            self.run(env, "approve", version, env, "--by", "rehearsal")
        if source is None:
            pin(self.root / "fleet.toml", env, version)
            self.run(env, "upload", version, "--to", f"s3://{self.fleet.bucket(env)}")
        else:
            self.run(env, "promote", source, env, "--release", version, "--by", "rehearsal")

    def bring(self, env: str, version: str) -> None:
        """Deliver a release and roll it out."""
        self.deliver(env, version)
        self.run(env, "rollout", env)

    def back(self, env: str) -> None:
        """Name the first release again."""
        # into the first environment nothing is promoted, so that nothing tells what was before
        more = ["--to", self.first.version] if env == self.order[0] else []
        self.run(env, "rollback", env, *more, "--by", "rehearsal")

    def failed(self, env: str, case: Case) -> str:
        """Roll the second release out with a fault: it has to end with all targets back on the first."""
        self.deliver(env, self.second.version)
        self.control.arm(case.place, case.kind)
        told = self.run(env, "rollout", env, code=1)
        if self.control.met() != [case.place]:
            raise ShipyardError(
                f"{case.name}: the fault was not met", value=", ".join(self.control.met()), allowed=case.place
            )
        self._want(case, told, f"{RETURNED} {self.first.version}")
        self.back(env)
        return f"{self.stands(env, self.first.version)}; {_fault(told)}"

    def killed(self, env: str, case: Case) -> str:
        """Kill the rollout of the second release while it deploys: it goes on by the same command, or returns."""
        self.deliver(env, self.second.version)
        self.control.arm(case.place, case.kind)
        self._kill(env, case)
        # the lock is a dead run's until its lease is over
        self._want(case, self.run(env, "rollout", env, code=1), BUSY)
        account = self.fleet.env[env].account
        self.control.age(account, self.fleet.bucket(env), LOCK, LEASE_S)
        if case.kind == "killed before":
            self.run(env, "rollout", env)
            told = f"went on: {self.stands(env, self.second.version)}; back: "
            self.back(env)
            self.run(env, "rollout", env)
        else:
            said = self.run(env, "rollout", env, "--return", code=1)
            self._want(case, said, f"{RETURNED} {self.first.version}")
            told = "returned: "
            self.back(env)
        return told + self.stands(env, self.first.version)

    def stands(self, env: str, version: str) -> str:
        """Return how many places of an environment are on a release, which has to be all of them."""
        told = json.loads(self.run(env, "status", env, "--json").splitlines()[0])
        if told["release"] != version or not told["same"]:
            raise ShipyardError(f"{env}: not on one release", value=json.dumps(told), allowed=version)
        return f"{len(told['rows'])} places on {version}"

    @property
    def fleet(self) -> Fleet:
        """Read fleet.toml, which promotions change."""
        return load_fleet(self.root / "fleet.toml")

    def run(self, env: str, *words: str, code: int = 0) -> str:
        """Run a verb with the rights of an environment's account; return what it printed.

        Raises:
            ShipyardError: it ends with another code than it should.
        """
        done = subprocess.run(
            [sys.executable, "-m", "shipyard.cli", *words], cwd=self.root, env=self._surroundings(env), capture_output=True,
            text=True, check=False, timeout=SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != code:
            raise ShipyardError(
                f"shipyard {' '.join(words)}: ended with {done.returncode}", value=(done.stdout + done.stderr)[-2000:],
                allowed=code,
            )  # fmt: skip
        return done.stdout + done.stderr

    def _kill(self, env: str, case: Case) -> None:
        """Roll out until the fault holds a request, and kill the process with all that it has started."""
        process = subprocess.Popen(
            [sys.executable, "-m", "shipyard.cli", "rollout", env], cwd=self.root, env=self._surroundings(env),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        until = time.monotonic() + SECONDS
        try:
            while case.place not in self.control.met():
                if process.poll() is not None or time.monotonic() > until:
                    told = process.communicate(timeout=1)[0].decode() if process.poll() is not None else "no end"
                    raise ShipyardError(f"{case.name}: the fault was not met", value=told[-2000:], allowed=case.place)
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self.control.clear()

    def _surroundings(self, env: str) -> dict[str, str]:
        return {**self.clouds[env].environment, "XDG_CONFIG_HOME": str(self.root / "home")}

    def _want(self, case: Case, told: str, wanted: str) -> None:
        if wanted not in told:
            raise ShipyardError(f"{case.name}: another end", value=told[-2000:], allowed=wanted)


def _fault(told: str) -> str:
    """Return in a few words why a rollout returned."""
    found = re.search(r"rollout of \S+: (.*?); all targets are back", told, re.DOTALL)
    return " ".join(found[1].split())[:160] if found else ""
