"""The life of an environment on this machine: first deployment, next release, rollback, the end; each step is checked.

A step that does not do what it should raises, so that the cycle ends there.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.config import Fleet, load_fleet
from models.release import Artifact, Release, Signer, load_keys, read_release
from serve.errors import ShipyardError
from shipyard.local import tasks
from shipyard.local.cloud import Cloud, local_clouds
from shipyard.local.gateway import ask_gateway, feedback
from shipyard.local.invoke import COMPARED, Answers, ask, endpoints
from shipyard.local.recorded import check_types, templates
from shipyard.local.successor import succeed
from shipyard.s3 import S3Store
from shipyard.upload import upload_release

Asked = TypeVar("Asked")
Identities = dict[str, dict[str, tuple[str, str]]]
"""Type and physical id of every resource, by stack and logical id."""


@dataclass(frozen=True)
class Cycle:
    """An environment of fleet.toml in a local cloud; `store` holds the artifacts, `out` takes what the cycle writes."""

    cloud: Cloud
    fleet: Fleet
    fleet_file: Path
    env: str
    store: Path
    out: Path

    def steps(self, first: Path, second: Path) -> Iterator[tuple[str, Any]]:
        """Walk the whole cycle with two release files; yield each step's name with what it found.

        Raises:
            ShipyardError: a step does not do what it should.
        """
        before, after = (read_release(path, load_keys(path.parent / "keys")) for path in (first, second))
        changed = _served(a for a in after.artifacts if a not in before.artifacts)
        stacks = f"{self.env}/*"
        assembly, following = self.synth(first, "first"), self.synth(second, "second")
        bodies = [*templates(assembly).values(), *templates(following).values()]
        yield "synth", {"recorded alone": check_types(bodies, self.cloud.modelled)}
        self.cloud.bootstrap(assembly)
        yield "bootstrap", sorted(self.cloud.stacks())
        self.cloud.deploy(assembly, f"{self.env}/storage")
        yield "storage", sorted(self._identities())
        yield "upload", {"bytes": self.upload(before)}
        self.cloud.deploy(assembly, stacks)
        started = self._identities()
        yield "deploy", {stack: len(found) for stack, found in started.items()}
        yield "describe", self.describe(before)
        answers = self.invoke(_served(before.artifacts))
        yield "invoke", answers
        fused = self.fuse(before)
        yield "gateway", fused
        yield "feedback", self.feedback(fused)
        self.cloud.deploy(assembly, stacks)
        _want("deploy again: resources changed", _moved(started, self._identities()), [])
        yield "deploy again", {"changed": []}
        yield "diff", self.cloud.diff(following, stacks)
        yield "upload next", {"bytes": self.upload(after)}
        self.cloud.deploy(following, stacks)
        moved = _moved(started, self._identities())
        yield "update", {"changed": moved, **self.describe(after)}
        yield "invoke next", self.invoke(changed)
        self.cloud.deploy(assembly, stacks)
        yield "roll back", self.describe(before)
        old = tuple(a for a in _served(before.artifacts) if a.name in {c.name for c in changed})
        again = self.invoke(old)
        _want("answers after the rollback", again, {name: answers[name] for name in again})
        yield "invoke after rollback", again
        yield "without artifacts", self.without(before)
        self.cloud.destroy(assembly, stacks)
        _want("destroy: stacks left", sorted(self._identities()), [])
        yield "destroy", {"kept": self.kept()}

    def synth(self, release: Path, name: str) -> Path:
        """Synthesize the environment with a release; return the assembly's folder."""
        out = self.out / name
        self.cloud.cdk(
            "synth", "--quiet", "--output", str(out), "--context", f"fleet={self.fleet_file.resolve()}",
            "--context", f"env={self.env}", "--context", f"release={release.resolve()}",
        )  # fmt: skip
        return out

    def upload(self, release: Release) -> int:
        """Upload a release's artifacts into the environment's bucket; return how many bytes were sent."""
        store = S3Store(self.fleet.bucket(self.env), self.cloud.client("s3"))
        return upload_release(release, self.store, store, lambda *_: None)

    def describe(self, release: Release) -> dict[str, str]:
        """Return where each artifact's model is taken from, as the account's own services tell it.

        Raises:
            ShipyardError: an artifact of the release is served nowhere, or another version of it is.
        """
        found = {name: endpoint.uri for name, endpoint in endpoints(self.cloud).items()}
        for name, containers in tasks.services(self.cloud).items():
            found[name] = next(word for word in containers["fetch"].command if word.startswith("s3://"))
        for artifact in _served(release.artifacts):
            place = f"s3://{self.fleet.bucket(self.env)}/{artifact.key}"
            if not found.get(artifact.name, "").startswith(place):
                raise ShipyardError(f"{artifact.name}: not served", value=found.get(artifact.name), allowed=place)
        return found

    def invoke(self, artifacts: tuple[Artifact, ...]) -> dict[str, Answers]:
        """Ask deployed artifacts what their bundles' golden requests ask; return the answers."""
        with tempfile.TemporaryDirectory(dir=self.out) as scratch:
            return ask(self.cloud, artifacts, self.store, Path(scratch))

    def fuse(self, release: Release) -> dict[str, Answers]:
        """Ask the deployed gateway of a release what search's golden requests ask; return the fused answers."""
        served = {artifact.name: artifact for artifact in release.artifacts}
        with tempfile.TemporaryDirectory(dir=self.out) as scratch:
            return {
                gateway.name: ask_gateway(self.cloud, gateway, served, self.store, Path(scratch))
                for gateway in release.of("gateway")
            }

    def feedback(self, fused: dict[str, Answers]) -> dict[str, int]:
        """Return how many impressions and clicks lie in the data bucket: the gateway notes what it answered and is told.

        Raises:
            ShipyardError: one of the answers, or the click on its first place, was not noted.
        """
        noted = feedback(self.cloud, self.fleet.data_bucket(self.env))
        shown = {one["request_id"]: one["items"][:COMPARED] for one in noted if one["kind"] == "impression"}
        clicks = [[shown.get(one["request_id"], []), one["item"]] for one in noted if one["kind"] == "click"]
        for places in (places for answers in fused.values() for places in answers):
            products = [product for product, _ in places]
            if [products, products[0]] not in clicks:
                raise ShipyardError("feedback: an answer and its click were not noted", value=products, allowed=clicks)
        return {"impressions": len(shown), "clicks": len(clicks)}

    def without(self, release: Release) -> dict[str, str]:
        """Delete the models of what serves; return how an invocation of each, and of the gateway, fails then.

        Raises:
            ShipyardError: one still answers: its answers do not come from what was uploaded.
        """
        s3, told = self.cloud.client("s3"), {}
        # those of endpoints first: the gateway is then asked while all else is there
        for artifact in sorted(_served(release.artifacts), key=lambda one: one.kind != "triton"):
            for file in artifact.files:
                if file.path.endswith(".onnx"):
                    s3.delete_object(Bucket=self.fleet.bucket(self.env), Key=artifact.key + file.path)
            told[artifact.name] = _fault(artifact, self.invoke, (artifact,))
            if artifact.kind == "triton":
                told |= {g.name: _fault(artifact, self.fuse, release) for g in release.of("gateway")}
        return told

    def kept(self) -> list[str]:
        """Return the buckets that outlive their stack."""
        buckets = self.cloud.client("s3").list_buckets()["Buckets"]
        return sorted(bucket["Name"] for bucket in buckets if bucket["Name"].startswith(f"{self.fleet.project.name}-"))

    def _identities(self) -> Identities:
        own = [name for name in self.cloud.stacks() if name.startswith(f"{self.fleet.project.name}-")]
        return {name: self.cloud.resources(name) for name in own}


def rehearse(
    fleet_file: Path, env: str, first: Path, second: Path | None, key: Signer, store: Path, out: Path
) -> Iterator[tuple[str, Any]]:
    """Walk the cycle of an environment in a local cloud of its own, which is gone at the end.

    Without a `second` release file, one is made of the first (shipyard.local.successor) and signed with `key`.

    Raises:
        ShipyardError: there is no such environment, or a step does not do what it should.
    """
    fleet = load_fleet(fleet_file)
    if env not in fleet.env:
        raise ShipyardError("--env: no such environment", value=env, allowed=", ".join(fleet.env))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if second is None:
        second = succeed(read_release(first, load_keys(first.parent / "keys")), store, key, out / "releases")
    with local_clouds({env: fleet.env[env]}, fleet_file.resolve().parent, out / "cloud.log") as clouds:
        yield from Cycle(clouds[env], fleet, fleet_file, env, store, out).steps(first, second)


def sentence(told: Any) -> str:
    """Return what a step found in one line, or of a diff the lines that name a resource."""
    if isinstance(told, str):
        return told if "\n" not in told else "\n".join(line for line in told.splitlines() if line.startswith("["))
    if isinstance(told, dict):
        return "; ".join(f"{name}: {sentence(value)}" for name, value in told.items())
    if isinstance(told, list) and told and isinstance(told[0], list):  # answers: the first place of each request
        return ", ".join(f"{places[0][0]} {places[0][1]:.3f}" for places in told)
    return ", ".join(map(str, told)) if isinstance(told, list) else str(told)


def _served(artifacts: Iterable[Artifact]) -> tuple[Artifact, ...]:
    """Return the artifacts that a request can be sent to here: no edge device is at hand."""
    return tuple(artifact for artifact in artifacts if artifact.kind in ("triton", "image-context"))


def _fault(deleted: Artifact, asking: Callable[[Asked], object], about: Asked) -> str:
    """Return how asking fails without an artifact's model."""
    try:
        asking(about)
    except ShipyardError as fault:
        return str(fault)
    raise ShipyardError(f"{deleted.name}: answered though its model was deleted", value=deleted.key)


def _moved(before: Identities, after: Identities) -> list[str]:
    """Return "stack type" of each resource that is new, gone, or has another physical id."""
    found = []
    for stack in sorted(before.keys() | after.keys()):
        old, new = before.get(stack, {}), after.get(stack, {})
        found += [
            f"{stack} {(new.get(name) or old[name])[0]}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    return found


def _want(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ShipyardError(what, value=found, allowed=wanted)
