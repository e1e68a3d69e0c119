"""shipyard: parse, run one stage or all, print an error in one line."""

import argparse
import importlib
import json
import os
import sys
import warnings
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from models.approval import check_withdrawn
from models.config import Fleet, load_fleet
from models.release import Signer
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.console import Reporter, print_stage
from shipyard.delivery import command as delivery
from shipyard.delivery.grammar import VERBS as DELIVERY
from shipyard.grammar import REVIEW, parser
from shipyard.keys import open_key
from shipyard.line import Line
from shipyard.look import look, open_release, print_found, replaced, report, write_page
from shipyard.papers.files import verify_papers
from shipyard.papers.origin import BUILDER, find_origin
from shipyard.publish import publish
from shipyard.release import release
from shipyard.stage import Record, Stage
from shipyard.synth import synth
from shipyard.upload import open_store, upload_release
from shipyard.weekly import WeeklyLine

APART = {
    "bench": "shipyard.bench.command",
    "change": "shipyard.change",
    "collect": "shipyard.collect",
    "down": "shipyard.fleet",
    "drift": "shipyard.drift",
    "edge": "shipyard.edge.command",
    "gc": "shipyard.gc",
    "propose": "shipyard.delivery.propose",
    "register": "shipyard.delivery.registry",
    "up": "shipyard.fleet",
}
"""Verbs that modules of their own run; they are imported then, for each needs packages that the other verbs do without."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in REVIEW:
            return int(importlib.import_module("infra.cost.command").main(given))
        if given and given[0] in DELIVERY:
            return delivery.main(given, delivery.Surroundings(_home(), os.environ, _synth_release))
        return _run(parser().parse_args(given), Reporter())
    except ShipyardError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    except OSError as fault:
        # a full disk, a folder that cannot be written: the system's own words name the file
        print(f"error: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; mend: the same command goes on where it stopped", file=sys.stderr)
        return 130


def _run(chosen: argparse.Namespace, reporter: Reporter) -> int:
    if chosen.verb in ("inspect", "verify", "diff", "sbom", "card"):
        return look(chosen, reporter)
    fleet = load_fleet(chosen.fleet)
    root = chosen.fleet.resolve().parent
    build = (chosen.build or root / "build").resolve()
    if chosen.verb == "publish":
        found = publish(build / "releases" / f"{chosen.version}.json", root / "releases")
        reporter.line(f"published releases/{found.version}.json; commit it and its key, and name it in fleet.toml")
        return print_found(found, chosen.json)
    if chosen.verb == "upload":
        oldest = 0 if chosen.allow_older else fleet.project.minimum_sequence
        path = root / "releases" / f"{chosen.version}.json"
        found = open_release(path, oldest)
        check_withdrawn(path)
        verify_papers(path, found, load_keys(path.parent / "keys"))
        store = open_store(chosen.to, kms_key=chosen.kms_key, owner=chosen.owner)
        sent = upload_release(found, build / "store", store, reporter.progress)
        print(json.dumps({"version": found.version, "bytes_sent": sent}))
        return 0
    if chosen.verb in APART:
        try:
            module = importlib.import_module(APART[chosen.verb])
        except ModuleNotFoundError as fault:
            raise ShipyardError(
                f"{chosen.verb}: {fault.name} is not installed", mend="pip install 'shipyard[aws,edge]'"
            ) from None
        return int(module.run(chosen, fleet, root, build, reporter))
    if chosen.verb == "items":
        module = importlib.import_module("shipyard.items")  # not at the top: it opens the engine
        with _lock(build):
            return int(module.run(chosen, fleet, build, open_key(chosen.key, _home() / "signing.pem"), reporter))
    if chosen.verb == "report" and chosen.release is not None:
        return report(chosen, root, build, reporter)
    if chosen.verb == "synth":
        synth(
            chosen.fleet, chosen.out or root / "cdk.out", reporter, os.environ, env=chosen.env, release=chosen.release,
            validate=chosen.validate,
        )  # fmt: skip
        return 0
    with _lock(build):
        return _make(chosen, fleet, root, build, reporter)


def _make(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Run a stage and those before it, or make a release."""
    _quieten()

    def watch(stage: Stage, folder: Path) -> Record:
        title = f"{stage.name} {stage.unit}"
        if (done := stage.find(folder)) is not None:
            reporter.line(f"skipped  {title}: nothing that it depends on has changed")
            return done
        reporter.line(f"start    {title}")
        with reporter.stage(title):
            return stage.run(folder)

    origin = find_origin(getattr(chosen, "builder", BUILDER))
    line = Line(fleet, chosen.profile, root, build / chosen.profile, reporter.progress, watch, origin)
    if chosen.verb == "warm":
        # the earlier folder stays: the next update, or a way back, begins there
        folder = build / f"{chosen.profile}-{fleet.data.valid_from}"
        line = WeeklyLine(
            fleet, chosen.profile, root, folder, reporter.progress, watch, origin,
            earlier=chosen.earlier.resolve(), steps=chosen.steps, often=chosen.often,
        )  # fmt: skip
        if line.build == chosen.earlier.resolve():
            raise ShipyardError("--from: the model of these very days", value=str(chosen.earlier),
                                mend="move valid_from and test_from of fleet.toml on")  # fmt: skip
    if chosen.verb == "report":
        page = line.page(chosen.out)
        reporter.line(f"report   {page}")
        if chosen.json:
            print(json.dumps({"report": str(page)}))
        return 0
    if chosen.verb == "compare":
        page, compared = line.compare([method for method in chosen.methods.split(",") if method])
        if chosen.json:
            print(json.dumps(compared, ensure_ascii=False))
        else:
            importlib.import_module("shipyard.pages.comparison").print_comparison(compared)
        reporter.line(f"page     {page}")
        return 0
    if chosen.verb == "finetune" and chosen.on == "sagemaker":
        try:
            remote = importlib.import_module("shipyard.remote.command")  # not at the top: it needs boto3
        except ModuleNotFoundError as fault:
            raise ShipyardError(
                f"finetune: {fault.name} is not installed", mend="pip install 'shipyard[aws]'"
            ) from None
        if chosen.env is None:
            raise ShipyardError("finetune: --on sagemaker: where?", allowed=", ".join(fleet.env), mend="add --env")
        if chosen.dry_run:
            print(json.dumps(remote.dry_run(line, fleet, chosen.env), indent=None if chosen.json else 2))
            return 0
        # its record is found below, as if it had been made here
        remote.finetune(line, fleet, chosen.env, reporter.line, again=chosen.again)
    if chosen.verb not in ("release", "warm", "deploy-local"):
        records = line.until(chosen.verb)
        said = {unit: record.said for unit, record in records.items()}
        if chosen.json or not print_stage(chosen.verb, said):
            print(json.dumps(said, ensure_ascii=False, indent=None if chosen.json else 2))
        return 0
    key_file = _home() / "signing.pem"
    if not key_file.exists() and chosen.key is None:
        reporter.line(f"makes    a signing key, {key_file}")
    # read before hours of training, not after
    key = open_key(chosen.key, key_file)
    if chosen.verb == "deploy-local":
        path, _ = release(line, key, str(build / "store"))
        return _deploy_local(chosen, path, key, build, reporter)
    path, found = release(line, key, chosen.to or str(build / "store"))
    if not chosen.no_synth:
        synth(chosen.fleet, line.build / "cdk.out", reporter, os.environ, release=path)
    page = write_page(path, replaced(found, (root / "releases",), reporter), None, line.build / "report.html")
    reporter.line(f"report   {page}")
    reporter.line(f"release  {path}")
    return print_found(found, chosen.json)


def _deploy_local(chosen: argparse.Namespace, release: Path, key: Signer, build: Path, reporter: Reporter) -> int:
    """Walk an environment's whole life on this machine and tell each step."""
    cycle = importlib.import_module("shipyard.local.cycle")
    told, out = {}, build / chosen.profile / "deploy-local"
    for name, found in cycle.rehearse(chosen.fleet, chosen.env, release, chosen.next, key, build / "store", out):
        told[name] = found
        reporter.line(f"{name:<22}{cycle.sentence(found)}")
    if chosen.json:
        print(json.dumps(told))
    return 0


def _synth_release(fleet: Path, out: Path, reporter: Reporter, env: str, release: Path) -> None:
    """Synthesize one environment with one release."""
    synth(fleet, out, reporter, os.environ, env=env, release=release)


def _home() -> Path:
    """Return the folder of the user's own keys."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "shipyard"


def _lock(build: Path) -> AcquireReturnProxy[FileLock]:
    """Take the lock that one run at a time holds on a build folder."""
    build.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(build / ".lock").acquire(timeout=0)
    except Timeout:
        raise ShipyardError(
            f"{build}: another run is using it", mend="wait until it ends, or give this one another folder: --build"
        ) from None


def _quieten() -> None:
    """Keep libraries' notes on themselves away from our lines."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TORCH_LOGS", "-torch.onnx")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


if __name__ == "__main__":
    sys.exit(main())
