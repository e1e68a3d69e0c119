"""The verbs of delivery: open what they need, do it, print what they found. Their grammar is `shipyard.delivery.grammar`."""

import argparse
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from models.approval import (
    Approval,
    approval_path,
    approver_keys,
    check_approval,
    check_signer,
    check_standing,
    hold_gates,
    parse,
    sign_approval,
    text,
)
from models.config import Fleet, load_fleet
from models.release import Signer, load_keys, read_release
from serve.errors import ShipyardError
from serve.files import read_json
from serve.trust import key_id
from shipyard.console import Reporter
from shipyard.delivery.grammar import parser
from shipyard.delivery.sequential import Arm, judge
from shipyard.keys import open_key
from shipyard.stage import write

KINDS = ("click", "cart", "purchase")
"""Kinds of feedback, as serve.feedback has them; that module speaks to AWS."""


@dataclass(frozen=True)
class Surroundings:
    """What the command line hands down: the folder of the user's own keys, the process's variables, and its synth.

    `synth` writes the stacks of one environment with a release file into a folder.
    """

    home: Path
    variables: Mapping[str, str]
    synth: Callable[[Path, Path, Reporter, str, Path], None]


def main(given: Sequence[str], around: Surroundings) -> int:
    """Run a verb of delivery; return the exit code.

    Raises:
        ShipyardError: it cannot be done.
    """
    chosen = parser().parse_args(given)
    if chosen.verb == "challenge":
        return challenge(chosen)
    if chosen.verb == "rehearse":
        return int(load("shipyard.local.rehearse", "dev").main(chosen, Reporter()))
    fleet = load_fleet(chosen.fleet)
    for name in (chosen.env, getattr(chosen, "source", chosen.env)):
        if name not in fleet.env:
            raise ShipyardError(f"{chosen.verb}: no such environment", value=name, allowed=", ".join(fleet.env))
    reporter = Reporter()
    if chosen.verb in ("status", "rollout"):
        return int(load("shipyard.delivery.operate").main(chosen, fleet, around, reporter))
    told = RUN[chosen.verb](chosen, fleet, around.home, reporter)
    print(json.dumps(told) if chosen.json else sentence(chosen.verb, told))
    return 0


def _key(chosen: argparse.Namespace, default: Path, reporter: Reporter) -> tuple[Signer, str, str]:
    """Open the key; return it with who signs and when."""
    if chosen.key is None and not default.exists():
        if chosen.dry_run:
            raise ShipyardError(
                f"{default}: no such key", mend="give one: --key FILE; the same command without --dry-run makes one"
            )
        reporter.line(f"makes    a key, {default}")
    key = open_key(chosen.key, default)
    return key, chosen.by or f"key {key_id(key.public_key())}", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def approve(chosen: argparse.Namespace, fleet: Fleet, home: Path, reporter: Reporter) -> dict[str, Any]:
    """Approve a release for an environment, unless a valid approval is there; return what it says.

    Raises:
        ShipyardError: the release is not to be trusted or is revoked, a gate is missed, or the key may not approve.
    """
    releases = chosen.fleet.resolve().parent / "releases"
    path = releases / f"{chosen.version}.json"
    found = read_release(path, load_keys(releases / "keys"), fleet.project.minimum_sequence)
    check_standing(path, found)
    gates = hold_gates(found, fleet)
    trusted, file = approver_keys(releases / "keys"), approval_path(releases, chosen.env, chosen.version)
    if file.exists():
        there = parse(read_json(file), Approval, trusted, str(file))
        check_approval(there, found, chosen.env, str(file))
        return _approved(there, new=False, dry_run=chosen.dry_run)
    key, by, at = _key(chosen, home / "approving.pem", reporter)
    check_signer(key, trusted, "approval", releases / "keys" / "approvers")
    made = sign_approval(found, chosen.env, gates, by, at, key)
    if not chosen.dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, text(made))
    return _approved(made, new=True, dry_run=chosen.dry_run)


def _approved(found: Approval, *, new: bool, dry_run: bool) -> dict[str, Any]:
    plain = found.model_dump(mode="json", by_alias=True)
    return {
        "new": new,
        "dry_run": dry_run,
        "approver": found.signature.key_id,
        **{k: v for k, v in plain.items() if k not in ("schema", "signature")},
    }


def promote(chosen: argparse.Namespace, fleet: Fleet, home: Path, reporter: Reporter) -> Any:
    """Promote a release from one environment to another."""
    module, desk = _desk(chosen, fleet, home, reporter)
    stores = tuple(open_store(fleet, name) for name in (chosen.source, chosen.env))
    return module.promote(desk, chosen.source, chosen.env, chosen.release, stores, open_register(fleet, chosen.env))


def rollback(chosen: argparse.Namespace, fleet: Fleet, home: Path, reporter: Reporter) -> Any:
    """Roll an environment back."""
    module, desk = _desk(chosen, fleet, home, reporter)
    return module.rollback(desk, chosen.env, chosen.to, open_store(fleet, chosen.env), open_register(fleet, chosen.env))


def challenge(chosen: argparse.Namespace) -> int:
    """Judge a challenger; return the exit code.

    Raises:
        ShipyardError: counts or numbers that cannot be, or traffic that was not split as intended.
    """
    given = (chosen.champion, chosen.challenger)
    counts = [re.fullmatch(r"(\d+)/(\d+)", text) for text in given]
    if all(counts):
        arms = tuple(Arm(int(found[2]), int(found[1])) for found in counts if found)
    else:
        kinds = tuple(chosen.kinds.split(","))
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ShipyardError("--kinds: no such feedback", value=", ".join(unknown), allowed=", ".join(KINDS))
        arms = load("shipyard.delivery.challenge").count(*map(Path, given), kinds, chosen.settle)
    found = judge(
        *arms, alpha=chosen.alpha, expected=chosen.expect, least=chosen.least, most=chosen.most, share=chosen.share
    )
    told = {"champion": asdict(arms[0]), "challenger": asdict(arms[1]), **asdict(found)}
    line = f"{found.decision}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {found.why}"
    print(json.dumps(told) if chosen.json else line)
    return {"promote": 0, "stop": 3, "go on": 4}[found.decision] if chosen.exit_code else 0


def _desk(chosen: argparse.Namespace, fleet: Fleet, home: Path, reporter: Reporter) -> tuple[ModuleType, Any]:
    module = load("shipyard.delivery.promote")
    key, by, at = _key(chosen, home / "signing.pem", reporter)
    desk = module.Desk(
        fleet, chosen.fleet.resolve(), key, by, at, reporter.progress, chosen.allow_older, chosen.dry_run
    )
    return module, desk


def load(name: str, extra: str = "aws") -> ModuleType:
    """Import a module that speaks to AWS, or to an imitation of it, which the other verbs do without."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as fault:
        raise ShipyardError(f"{fault.name} is not installed", mend=f"pip install 'shipyard[{extra}]'") from None


def open_store(fleet: Fleet, name: str) -> Any:
    """Return the store of an environment's artifacts, in its bucket."""
    return load("shipyard.s3").open_bucket(fleet.bucket(name), owner=fleet.env[name].account)


def open_register(fleet: Fleet, name: str) -> Any:
    """Return the register of an environment, in the same bucket."""
    env = fleet.env[name]
    return load("shipyard.delivery.register").open_register(fleet.bucket(name), env.region, env.account)


def sentence(verb: str, told: dict[str, Any]) -> str:
    """Return in a line what a verb did, and what comes next."""
    if verb == "approve":
        state = "was approved before" if not told["new"] else "would be approved" if told["dry_run"] else "is approved"
        return f"{told['release']} {state} for {told['environment']} by {told['by']}, {len(told['gates'])} gates held"
    where, version = told["environment"], told["release"]
    if told["dry_run"]:
        return (
            f"would bring {where} from {told['replaces']} to {version}" if told["changed"] else f"{where} has {version}"
        )
    if not told["changed"]:
        return f"{where} has {version}, promotion {told['number']}: nothing to do"
    return (
        f"{where}: {told['replaces']} -> {version}, promotion {told['number']}, {told['bytes_sent']} bytes sent; "
        f"commit fleet.toml and releases/promotions/, then deploy"
    )


RUN: dict[str, Callable[[argparse.Namespace, Fleet, Path, Reporter], Any]] = {
    "approve": approve,
    "promote": promote,
    "rollback": rollback,
}
