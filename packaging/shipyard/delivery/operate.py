"""shipyard status and rollout: what is live in an environment, and a release brought to all of its targets."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from models.approval import check_standing, require_approval
from models.config import Environment, Fleet
from models.promotion import check_promoted
from models.release import Keys, Release, load_keys, read_release, trusted_key
from shipyard.console import Reporter
from shipyard.delivery import live
from shipyard.delivery.command import Surroundings, open_register, open_store
from shipyard.delivery.orchestrate import Target, roll_out
from shipyard.delivery.places import Place, deployer
from shipyard.delivery.promote import PROMOTIONS
from shipyard.delivery.register import Register
from shipyard.delivery.standing import Row, same, table
from shipyard.edge import rollout
from shipyard.edge.command import others
from shipyard.edge.components import publish_component, publish_deltas
from shipyard.edge.lock import edge_artifacts

DIFFERS = 3


def main(chosen: argparse.Namespace, fleet: Fleet, around: Surroundings, reporter: Reporter) -> int:
    """Do a verb; return the exit code.

    Raises:
        ShipyardError: the release is not to be trusted, AWS refuses, or a target failed.
    """
    root = chosen.fleet.resolve().parent
    found = _read(root / "releases", fleet.env[chosen.env].release)
    register, services = open_register(fleet, chosen.env), live.open_services(fleet.env[chosen.env])
    if chosen.verb == "status":
        rows = live.status(services, fleet, chosen.env, found, register)
        matches = same(rows)
        told = {
            "environment": chosen.env,
            "release": found.version,
            "same": matches,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(told) if chosen.json else table(rows))
        return 0 if matches else DIFFERS
    if not chosen.give_up:
        # forward goes what was promoted; the way back may go to any release of before
        keys = load_keys(root / "releases" / "keys")
        check_promoted(found, chosen.env, fleet.env[chosen.env], root / "releases", keys)
    known = Targets(chosen, fleet, around, reporter, register, services)
    targets = known.all(known.read(found.version))
    good = chosen.good or before(register, found.version)
    done = roll_out(register, targets, found.version, good, chosen.by, reporter.line, give_up=chosen.give_up)
    print(json.dumps(asdict(done)) if chosen.json else f"{chosen.env}: all targets are on {done.release}")
    return 0


def before(register: Register, version: str) -> str | None:
    """Return what the last promotion to another release than before replaced, where that brought `version`."""
    records = [one for one in register.below(PROMOTIONS) if one["release"] != one["replaces"]]
    return records[-1]["replaces"] if records and records[-1]["release"] == version else None


def _read(releases: Path, version: str) -> Release:
    return read_release(releases / f"{version}.json", load_keys(releases / "keys"))


class Targets:
    """The targets of an environment: each knows how to bring a release of releases/ there, and what to look at."""

    def __init__(
        self, chosen: argparse.Namespace, fleet: Fleet, around: Surroundings, reporter: Reporter, register: Register,
        services: live.Services,
    ) -> None:  # fmt: skip
        self.fleet_file, self.env, self.wait = chosen.fleet.resolve(), chosen.env, chosen.wait
        self.root = self.fleet_file.parent
        self.fleet, self.around, self.reporter = fleet, around, reporter
        self.register, self.services = register, services
        self._assemblies: dict[str, Path] = {}

    @property
    def settings(self) -> Environment:
        """Return the environment's table."""
        return self.fleet.env[self.env]

    def all(self, found: Release) -> list[Target]:
        """Return the targets in their order: those that have artifacts in the release, then what else has stacks."""
        cli = self.root / "node_modules" / ".bin" / "cdk"

        def stack(name: str, pattern: str, *places: str) -> Place:
            deploy = deployer(cli, self.assembly, f"{self.env}/{pattern}", self.around.variables)
            return Place(name, deploy, self.look(*places), self.wait)

        targets: list[Target] = []
        for name, artifacts in (
            ("gpu", found.of("triton")), ("cpu", found.of("image-context")), ("gateway", found.of("gateway")),
        ):  # fmt: skip
            if artifacts:
                targets.append(stack(name, name, name))
        if edge_artifacts(found):
            places = ("edge canary", "edge fleet")
            if self.settings.edge.components == "published":
                targets.append(Place("edge", self.publish, self.look(*places), self.wait))
            else:
                targets.append(stack("edge", "edge", *places))
                # CloudFormation makes no component version that is there
                self.reporter.line(
                    "edge     its stack makes components and could not return to those of before: set edge.components = "
                    '"published"'
                )
        # alarms, replica, delivery: they know the release too
        targets.append(stack("rest", "*", "gpu", "cpu", "gateway", "edge canary", "edge fleet"))
        return targets

    def read(self, version: str) -> Release:
        """Read a release that is about to be deployed: the state that names the one to return to is signed by nobody.

        Raises:
            ShipyardError: it is not to be trusted, is revoked, or is not approved for this environment.
        """
        releases = self.root / "releases"
        found = _read(releases, version)
        check_standing(releases / f"{version}.json", found)
        require_approval(found, self.env, self.settings, releases, releases / "keys")
        return found

    def assembly(self, version: str) -> Path:
        """Synthesize the environment with a release, once; return the folder."""
        if version not in self._assemblies:
            self.read(version)
            out = self.root / "build" / "rollout" / self.env / version
            self.around.synth(self.fleet_file, out, self.reporter, self.env, self.root / "releases" / f"{version}.json")
            self._assemblies[version] = out
        return self._assemblies[version]

    def look(self, *places: str) -> Callable[[str], list[Row]]:
        """Return what looks at some places."""

        def look(version: str) -> list[Row]:
            found = _read(self.root / "releases", version)
            rows = live.status(self.services, self.fleet, self.env, found, self.register)
            return [row for row in rows if row.place in places]

        return look

    def publish(self, version: str) -> None:
        """Publish a release's components and roll them out, the canaries first, judged by the devices' own word."""
        keys: Keys = load_keys(self.root / "releases" / "keys")
        found = self.read(version)
        account, region = self.settings.account, self.settings.region
        # the archives lie in the bucket since the promotion; deltas are made of what this machine has
        store = open_store(self.fleet, self.env)
        deltas = publish_deltas(found, others(self.root / "releases", found), self.root / "build" / "store", store)
        for artifact in edge_artifacts(found):
            publish_component(
                self.services.edge.greengrass, artifact, self.fleet.bucket(self.env), account=account, region=region
            )
        rollout.rollout(
            self.services.edge, found, self.settings.edge, deltas, trusted_key=trusted_key(found, keys),
            said=self.reporter.line, wait=self.wait, account=account, region=region,
        )  # fmt: skip
