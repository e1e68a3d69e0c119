"""The verbs of delivery, from an approval to what is live: parse, open what they need, print what they found."""

import argparse
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    check_withdrawn,
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
from shipyard.keys import open_key
from shipyard.stage import write

VERBS = {
    "approve": "sign that a release may run in an environment, into releases/approvals/",
    "promote": "copy an environment's release to another one, record it, and name it in fleet.toml",
    "rollback": "go back to the release before the last promotion, record it, and name it in fleet.toml",
    "rollout": "deploy an environment's release to all targets in turn, and return all where one fails",
    "status": "tell what is live in an environment against what its release says",
}

MORE = {
    "approve": "The gates of fleet.toml are held against the release's figures first, and written into the approval. "
    "The key must be one of releases/keys/approvers/, and none that signs releases.",
    "promote": "Objects are copied by way of this machine, each held to its digest; what is there is not sent again. "
    "Two at once: one wins, the other is told. The same command twice, or after a kill, goes on where it stopped.",
    "rollback": "Nothing is copied: what the bucket holds of the release is read and compared. Deploy afterwards, as after "
    "a promotion.",
    "rollout": "GPU, CPU, gateway, edge, then what else there is; each is held against what is live before the next. "
    "Where one fails, all return to the last good release. A run that was killed goes on by the same command, or returns "
    "by --return.",
    "status": "Asks SageMaker, ECS and Greengrass, and the last recorded promotion. Ends with 3 where they differ.",
}

EXIT = "exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 3 what is live is not the release (status)"


def parser() -> argparse.ArgumentParser:
    """Return the grammar of the verbs of delivery."""
    top = argparse.ArgumentParser(prog="shipyard")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(verb: str, *, signs: bool = False) -> argparse.ArgumentParser:
        words = f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}. {MORE[verb]}"
        one = verbs.add_parser(verb, help=VERBS[verb], description=words, epilog=EXIT)
        one.add_argument("--fleet", type=Path, default=Path("fleet.toml"), help="configuration (default: ./fleet.toml)")
        one.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        if signs:
            one.add_argument("--by", metavar="WHO", help="who asks for it, as it is recorded (default: the key's id)")
            one.add_argument(
                "--dry-run", action="store_true", help="check all, tell what would be done, change nothing"
            )
        return one

    approving = add("approve", signs=True)
    approving.add_argument("version", help="version of a release in releases/, e.g. 0.1.0-g0123456789ab")
    approving.add_argument("env", help="the environment of fleet.toml that it may run in")
    approving.add_argument("--key", metavar="KEY", help="private key in PEM, or kms:KEY for one in AWS KMS (default: "
                           "$XDG_CONFIG_HOME/shipyard/approving.pem, or ~/.config, made on first use)")  # fmt: skip
    promoting = add("promote", signs=True)
    promoting.add_argument("source", metavar="FROM", help="the environment whose release is taken")
    promoting.add_argument("env", metavar="TO", help="the environment that gets it")
    promoting.add_argument("--release", metavar="VERSION", help="another release, which FROM's bucket holds")
    returning = add("rollback", signs=True)
    returning.add_argument("env", help="an environment of fleet.toml")
    returning.add_argument("--to", metavar="VERSION", help="the release to go back to")
    for one in (promoting, returning):
        one.add_argument("--key", metavar="KEY", help="private key of a release signer (default: signing.pem there)")
        one.add_argument("--allow-older", action="store_true",
                         help="also a release older than what runs, or before project.minimum_sequence")  # fmt: skip
    rolling = add("rollout")
    rolling.add_argument("env", help="an environment of fleet.toml")
    rolling.add_argument("--good", metavar="VERSION", help="the release to return to (default: that of the last rollout, or "
                         "what the last promotion replaced)")  # fmt: skip
    rolling.add_argument("--return", dest="give_up", action="store_true", help="return an unfinished rollout")
    rolling.add_argument("--by", metavar="WHO", default="shipyard rollout", help="who rolls out, as it is recorded")
    rolling.add_argument("--wait", type=float, default=1800.0, help="seconds for a target to be ready (default: 1800)")
    looking = add("status")
    looking.add_argument("env", help="an environment of fleet.toml")
    return top


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
    fleet = load_fleet(chosen.fleet)
    for name in (chosen.env, getattr(chosen, "source", chosen.env)):
        if name not in fleet.env:
            raise ShipyardError(f"{chosen.verb}: no such environment", value=name, allowed=", ".join(fleet.env))
    reporter = Reporter()
    if chosen.verb in ("status", "rollout"):
        return int(load("shipyard.operate").main(chosen, fleet, around, reporter))
    told = RUN[chosen.verb](chosen, fleet, around.home, reporter)
    print(json.dumps(told) if chosen.json else sentence(chosen.verb, told))
    return 0


def _key(chosen: argparse.Namespace, default: Path, reporter: Reporter) -> tuple[Signer, str, str]:
    """Open the key; return it with who signs and when."""
    if chosen.key is None and not default.exists():
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
    check_withdrawn(path)
    gates = hold_gates(found, fleet)
    trusted, file = approver_keys(releases / "keys"), approval_path(releases, chosen.env, chosen.version)
    if file.exists():
        there = parse(read_json(file), Approval, trusted, str(file))
        check_approval(there, found, chosen.env, str(file))
        return _approved(there, new=False)
    key, by, at = _key(chosen, home / "approving.pem", reporter)
    check_signer(key, trusted, "approval", releases / "keys" / "approvers")
    made = sign_approval(found, chosen.env, gates, by, at, key)
    if not chosen.dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, text(made))
    return _approved(made, new=True)


def _approved(found: Approval, *, new: bool) -> dict[str, Any]:
    plain = found.model_dump(mode="json", by_alias=True)
    return {
        "new": new,
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


def _desk(chosen: argparse.Namespace, fleet: Fleet, home: Path, reporter: Reporter) -> tuple[ModuleType, Any]:
    module = load("shipyard.promote")
    key, by, at = _key(chosen, home / "signing.pem", reporter)
    desk = module.Desk(
        fleet, chosen.fleet.resolve(), key, by, at, reporter.progress, chosen.allow_older, chosen.dry_run
    )
    return module, desk


def load(name: str) -> ModuleType:
    """Import a module that speaks to AWS, which the other verbs do without."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as fault:
        raise ShipyardError(f"{fault.name} is not installed", mend="pip install 'shipyard[aws]'") from None


def open_store(fleet: Fleet, name: str) -> Any:
    """Return the store of an environment's artifacts, in its bucket."""
    return load("shipyard.s3").open_bucket(fleet.bucket(name), owner=fleet.env[name].account)


def open_register(fleet: Fleet, name: str) -> Any:
    """Return the register of an environment, in the same bucket."""
    env = fleet.env[name]
    return load("shipyard.register").open_register(fleet.bucket(name), env.region, env.account)


def sentence(verb: str, told: dict[str, Any]) -> str:
    """Return in a line what a verb did, and what comes next."""
    if verb == "approve":
        state = "approved" if told["new"] else "was approved before"
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
