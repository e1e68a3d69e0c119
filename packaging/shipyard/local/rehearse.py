"""shipyard rehearse: a project of its own, the cases, and the way that shipyard.local.rehearsal walks."""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from models.config import Fleet, load_fleet
from models.release import Release, load_keys, read_release
from serve.errors import ShipyardError
from shipyard.console import Reporter
from shipyard.keys import signing_key, write_public
from shipyard.local.cloud import local_clouds
from shipyard.local.faults import Control, Kind
from shipyard.local.rehearsal import Case, Rehearsal
from shipyard.local.successor import renew

LINKED = ("app.py", "cdk.json", "infra", "models", "packaging", "node_modules", ".venv")
"""What of the project the rehearsal's own copy only points to."""


def cases(fleet: Fleet, env: str) -> list[Case]:
    """Return every fault that is rehearsed in an environment, in the order of a rollout."""
    account, stack = fleet.env[env].account, f"stack {fleet.project.name}-{env.replace('_', '-')}"
    own: tuple[Kind, ...] = ("fails", "lies", "killed before", "killed after")
    last: tuple[Kind, ...] = ("fails", "falls", "killed before", "killed after")
    found = [Case(target, kind, f"{stack}-{target}") for target in ("gpu", "cpu", "gateway") for kind in own]
    found += [Case("edge", kind, f"greengrass {account}") for kind in own]
    found.append(Case("edge", "fails", f"devices {account}"))
    # what is left to the last one is the edge's stack, which pins the components that were published
    return found + [Case("rest", kind, f"{stack}-edge") for kind in last]


def way(fleet: Fleet) -> list[str]:
    """Return the environments in the order in which a release passes them.

    Raises:
        ShipyardError: they are not one after the other.
    """
    sources = {name: env.delivery.promote_from for name, env in fleet.env.items() if env.delivery is not None}
    begins = [name for name, source in sources.items() if source is None]
    order = fleet.way(begins[0]) if len(begins) == 1 else []
    if len(order) < 2 or sorted(order) != sorted(sources):
        told = ", ".join(f"{name} from {source}" for name, source in sources.items())
        raise ShipyardError(
            "rehearse: no way through the environments", value=told, allowed="two or more, each from the one before",
            mend="env.*.delivery.promote_from names where from",
        )  # fmt: skip
    return order


def prepare(fleet_file: Path, first: Path, store: Path, out: Path) -> tuple[Release, Release]:
    """Make a project of its own below `out`, with keys of its own, the release `first` and the one that would follow.

    Its fleet.toml is that of `fleet_file` as a fleet that goes back and forth has it: components are published, and
    production wants approvals.
    """
    shutil.rmtree(out, ignore_errors=True)
    made, releases = out / "build" / "releases", out / "releases"
    (made / "keys").mkdir(parents=True)
    for name in LINKED:
        (out / name).symlink_to(fleet_file.resolve().parent / name)
    (out / "build" / "store").symlink_to(store.resolve())
    keys = first.parent / "keys"
    before = read_release(first, load_keys(keys))
    shutil.copytree(keys, made / "keys", dirs_exist_ok=True)
    shutil.copy(first, made / first.name)
    if (papers := first.with_suffix("")).is_dir():
        shutil.copytree(papers, made / papers.name)
    home = out / "home" / "shipyard"
    key, approver = (signing_key(home / name) for name in ("signing.pem", "approving.pem"))
    write_public(key, releases / "keys")
    write_public(approver, releases / "keys" / "approvers")
    second = renew(before, store, key, made)
    document = tomlkit.parse(fleet_file.read_text(encoding="utf-8"))
    for env in document["env"].values():
        env["release"] = before.version
        env["edge"]["components"] = "published"
        env.pop("approval", None)
    (out / "fleet.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    return before, read_release(second, load_keys(made / "keys"))


def rehearse(
    fleet_file: Path, first: Path, store: Path, out: Path, env: str | None = None, faults: Sequence[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Walk the way with a release file and the one that would follow, in a local cloud that is gone at the end.

    Args:
        store: the folder that holds the artifacts of `first`; it gets those of the other one too.
        out: a folder for the rehearsal's project, which is made anew.
        env: where faults are injected (default: the second environment of the way).
        faults: names of the cases (default: all).

    Raises:
        ShipyardError: there is no such environment or case, or a step does not do what it should.
    """
    order = way(load_fleet(fleet_file))
    releases = prepare(fleet_file, first, store, out)
    fleet = load_fleet(out / "fleet.toml")
    place = env or order[1]
    if place not in order[1:]:
        raise ShipyardError("--env: faults are injected where releases are promoted to", value=place,
                            allowed=", ".join(order[1:]))  # fmt: skip
    known = {case.name: case for case in cases(fleet, place)}
    if unknown := sorted(set(faults or ()) - known.keys()):
        raise ShipyardError("--faults: no such case", value=", ".join(unknown), allowed=", ".join(known))
    chosen = [case for name, case in known.items() if faults is None or name in faults]
    with local_clouds({name: fleet.env[name] for name in order}, out, out / "cloud.log") as clouds:
        control = Control(clouds[place].environment["AWS_ENDPOINT_URL"])
        yield from Rehearsal(out, clouds, control, order, *releases).steps(place, chosen)


def main(chosen: argparse.Namespace, reporter: Reporter) -> int:
    """Walk the way and tell each step; return the exit code.

    Raises:
        ShipyardError: there is no release, or a step does not do what it should.
    """
    build = chosen.fleet.resolve().parent / "build"
    made = sorted((build / "releases").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if chosen.release is None and not made:
        raise ShipyardError(f"{build / 'releases'}: no release", mend="shipyard release, or name one")
    faults = None if chosen.faults is None else [name for name in chosen.faults.split(",") if name not in ("", "none")]
    told = {}
    for name, found in rehearse(
        chosen.fleet, chosen.release or made[-1], build / "store", build / "rehearsal", chosen.env, faults
    ):
        told[name] = found
        reporter.line(f"{name:<32}{found}")
    print(json.dumps(told) if chosen.json else f"{len(told)} steps: after each, all targets were on one release")
    return 0
