"""shipyard: parse, run one stage or all, print an error in one line."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from models.approval import check_withdrawn
from models.config import Fleet, load_fleet
from models.release import Release, Signer, read_release
from serve.errors import ShipyardError
from serve.files import read_json
from serve.trust import MANIFEST, load_keys
from shipyard import delivery
from shipyard.console import Reporter, print_release, print_stage, release_markdown
from shipyard.diff import diff, diff_bundles, lines, same
from shipyard.gc import referring, unused
from shipyard.keys import open_key
from shipyard.origin import BUILDER, find_origin
from shipyard.papers import BOM, CARD, FIGURES, read_paper, verify_papers
from shipyard.publish import publish
from shipyard.release import VERBS, Line, base_folder, release
from shipyard.stage import Record, Stage
from shipyard.upload import open_store, upload_release
from shipyard.verbs import VERBS as DELIVERY
from shipyard.verify import verify_bundle, verify_store
from shipyard.weekly import OFTEN, STEPS, WeeklyLine

ABOUT = """\
Shipyard packages one fine-tuned e-commerce model for a hybrid cloud.

  data -> finetune -> evaluate -> split -> export -> quantise -> bundle -> release -> synth

Each verb up to release runs what comes before it too. A stage whose inputs, configuration, code and library versions
have not changed is skipped; one that was killed goes on. They write below build/ alone; publish writes releases/, synth
cdk.out/.
"""

EXAMPLES = """\
examples:
  shipyard release                      walk the whole way with the profile "quick"
  shipyard evaluate --profile small     train on a sample and print the figures
  shipyard finetune --on sagemaker --env dev
                                        train as a SageMaker training job, and bring its record back
  shipyard publish 0.1.0-g0123456789ab  take a local release into releases/, to be committed
  shipyard upload 0.1.0-g0123456789ab --to s3://my-bucket
                                        send a published release's artifacts to an environment's bucket
  shipyard synth --env dev              synthesize one environment
  shipyard diff releases/A.json releases/B.json
                                        what a promotion from A to B changes

exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 3 drift beyond its limit; 130 interrupted
"""

HELP = {
    "data": "fetch, clean, normalise, pin and split the behaviour data by time",
    "finetune": "train the text tower (full, LoRA or AdaLoRA), then the joint model",
    "evaluate": "score baseline, before and after on the test period, and hold the gates",
    "split": "cut the joint model into stand-alone sub-models whose outputs equal its own",
    "export": "write each sub-model as ONNX and check parity with torch",
    "quantise": "write each graph in its target's precision and hold the gate again",
    "bundle": "make each target's artifact, reproducible to the byte",
    "release": "do all of it, sign, upload, write the release file, synthesize the stacks",
    "warm": "make a release from an earlier model and what was bought since, which devices fetch as a small delta",
    "deploy-local": "make a release and deploy, update, roll back and destroy an environment on this machine",
    "report": "write the figures of a profile, or all that is known of a release, as one page",
    "compare": "tune the text tower by several methods and compare them on validation",
    "publish": "verify a local release and copy it into releases/",
    "upload": "send the artifacts of a published release from build/store to a bucket",
    "synth": "synthesize the stacks with the pinned CDK CLI",
    "edge": "bring a release to edge devices and see where they stand",
    "inspect": "print what a release or a bundle holds",
    "verify": "check a release, a bundle of it, or all that a store holds of it, digest by digest",
    "sbom": "print a release's bill of materials, CycloneDX 1.6 in JSON",
    "card": "print a release's model card, in Markdown",
    "register": "put a published release into the SageMaker Model Registry of an environment",
    "diff": "print what differs between two releases, or two bundles",
    "gc": "list, or delete, what lies in a store and no release refers to",
    "up": "serve a local release on this machine: every runtime and the gateway, on loopback",
    "down": "end what up has started",
    "drift": "compare what the gateway has written with its release: requests, scores, calibration",
    "collect": "make training data of what the gateway has written",
    "propose": "propose a release where behaviour has drifted or enough of it is new; deploys nothing",
    "bench": "measure the CPU server beside others on one bundle",
}

REVIEW = {
    "cost": "price the synthesized templates: report, diff, compare, guardrails (shipyard cost --help)",
    "prices": "bring the price book up to date from the AWS Price List API (shipyard prices --help)",
}
"""Verbs of infra.cost.command. It is found by its name: shipyard and infra never import each other."""


EDGE = {
    "publish": "upload a release's models, runtime and deltas, and publish its components",
    "rollout": "publish, then bring the release to the canary devices, and to the fleet once they are well",
    "rollback": "bring every device back to the release before, or to the one that is named",
    "status": "tell the devices in step, behind, silent and failed, by group",
    "merge": "average what devices have learned into releases/calibration.lock, for the next release",
}
"""What `shipyard edge` does."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(
        prog="shipyard", description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--fleet", type=Path, default=Path("fleet.toml"), help="configuration (default: ./fleet.toml)")
    common.add_argument(
        "--build", type=Path, default=None, help="folder of results (default: build/ beside fleet.toml)"
    )
    common.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument(
        "--profile", default="quick", help="size of the run, a [profile.*] of fleet.toml (default: quick)"
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")

    def add(verb: str, *parents: argparse.ArgumentParser, more: str = "") -> argparse.ArgumentParser:
        text = HELP[verb][0].upper() + HELP[verb][1:] + "." + more
        return verbs.add_parser(verb, help=HELP[verb], description=text, parents=[common, *parents])

    for verb in VERBS:
        stage = add(verb, sizes, more=" Runs the stages before it as far as they are not done.")
        if verb == "finetune":
            stage.add_argument("--on", choices=("here", "sagemaker"), default="here", help="where to train: here, or as a "
                               "SageMaker training job whose record is brought back (default: here)")  # fmt: skip
            stage.add_argument("--env", help="with --on sagemaker: an [env.*] of fleet.toml with a training table")
            stage.add_argument(
                "--dry-run", action="store_true", help="print the job's exact request; nothing is called"
            )
            stage.add_argument("--again", action="store_true", help="a new job, also where one of the same is complete")
    making = add("release", sizes)
    making.add_argument("--to", default=None, metavar="STORE", help="a folder or s3://bucket (default: build/store)")
    warming = add(
        "warm",
        sizes,
        more=" Trunk, heads and all rows that were hardly bought stay as they are; the gates are a "
        "release's. Move valid_from and test_from of fleet.toml on first. Writes below build/PROFILE-VALID_FROM.",
    )
    warming.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="build folder of the earlier model: build/quick, or build/quick-2017-10-15",
    )
    warming.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps, at most (default: {STEPS})")
    warming.add_argument("--often", type=int, default=OFTEN, help="purchases in the new days from which on a row learns "
                         f"(default: {OFTEN})")  # fmt: skip
    warming.add_argument("--to", default=None, metavar="STORE", help="a folder or s3://bucket (default: build/store)")
    rehearsing = add("deploy-local", sizes, more=" The CDK CLI is the real one, AWS an imitation on loopback.")
    for one in (making, warming, rehearsing):
        one.add_argument("--key", default=None, help="private key in PEM, or kms:KEY for one in AWS KMS (default: "
                         "$XDG_CONFIG_HOME/shipyard/signing.pem, or ~/.config, made on first use)")  # fmt: skip
    rehearsing.add_argument("--env", default="dev", help="environment of fleet.toml (default: dev)")
    rehearsing.add_argument("--next", type=Path, help="file of the release to update to, its artifacts in build/store "
                            "(default: the one that was made, with the scores of search doubled)")  # fmt: skip
    for one in (making, warming):
        one.add_argument("--builder", default=BUILDER, metavar="URI", help="who builds, for the provenance, e.g. the URL of "
                         f"a workflow (default: {BUILDER})")  # fmt: skip
        one.add_argument("--no-synth", action="store_true", help="stop after the release file")
    reporting = add("report", sizes, more=" Of a profile, runs the stages before it as far as they are not done.")
    reporting.add_argument("release", type=Path, nargs="?", help="a release file, whose page to write instead")
    reporting.add_argument("--previous", type=Path, help="release file to compare with (default: the one that it replaces, "
                           "where it lies beside it or in releases/)")  # fmt: skip
    reporting.add_argument("--cost", type=Path, metavar="JSON", help="what shipyard cost --save has written")
    reporting.add_argument("--out", type=Path, help="file to write (default: build/PROFILE/report.html, or "
                           "build/reports/VERSION.html)")  # fmt: skip
    comparing = add("compare", sizes, more=" Each method is a stage in a process of its own.")
    comparing.add_argument("--methods", default="lora,adalora,full", help="with commas between (default: all three)")
    for verb, text in (REVIEW | DELIVERY).items():  # parsed where they are run
        verbs.add_parser(verb, help=text, add_help=False)
    publishing = add("publish")
    publishing.add_argument("version", help="version of a release in build/releases/, e.g. 0.1.0-g0123456789ab")
    sending = add("upload", more=" What is there already is not sent again.")
    sending.add_argument("version", help="version of a release in releases/, e.g. 0.1.0-g0123456789ab")
    sending.add_argument("--to", required=True, metavar="STORE", help="s3://bucket, or a folder")
    sending.add_argument("--kms-key", help="KMS key that S3 encrypts with (default: the bucket's own)")
    sending.add_argument("--owner", help="account that must own the bucket")
    sending.add_argument("--allow-older", action="store_true", help="also one before project.minimum_sequence")
    synthesizing = add("synth", more=" Needs no credentials and no network.")
    synthesizing.add_argument("--env", default="", help="environments, with commas between (default: all)")
    synthesizing.add_argument("--release", type=Path, help="a release file to take for all of them (default: what "
                              "fleet.toml names in releases/)")  # fmt: skip
    synthesizing.add_argument("--out", type=Path, default=None, help="where to (default: cdk.out beside fleet.toml)")
    synthesizing.add_argument("--validate", action="store_true", help="also run the CDK's own validator (slower)")
    edging = add("edge", more=" " + " ".join(f"{action}: {text}." for action, text in EDGE.items()))
    edging.add_argument("action", choices=EDGE, help="what to do")
    edging.add_argument(
        "version", nargs="?", help="a release in releases/: to publish, roll out, go back to, or learn of"
    )
    edging.add_argument("--env", required=True, help="an [env.*] of fleet.toml")
    edging.add_argument("--wait", type=float, default=3600.0, help="seconds for the canaries (default: 3600)")
    edging.add_argument(
        "--least-devices", type=int, default=20, help="merge: with fewer nothing is merged (default: 20)"
    )
    edging.add_argument(
        "--least-evidence", type=int, default=50, help="merge: answers that a device must have (default: 50)"
    )
    edging.add_argument("--clip", type=float, default=1.0, help="merge: how far one device may pull (default: 1)")
    edging.add_argument("--epsilon", type=float, help="merge: add noise, so that no device can be told from the result; "
                        "1 is strict, 8 is loose (default: none)")  # fmt: skip
    edging.add_argument("--delta", type=float, default=1e-6, help="merge: its other parameter (default: 1e-6)")
    edging.add_argument("--allow-older", action="store_true", help="also one before project.minimum_sequence")
    inspecting = add("inspect", more=" A release is verified by the keys in the folder keys/ beside it.")
    inspecting.add_argument("path", type=Path, help="a release file, or a bundle's folder or zip")
    inspecting.add_argument("--markdown", action="store_true", help="print a release's table in Markdown")
    verifying = add("verify", more=" Trusts the keys in the folder keys/ beside the release file.")
    verifying.add_argument("release", type=Path, help="a release file")
    verifying.add_argument("bundle", type=Path, nargs="?", help="a bundle's folder or zip")
    verifying.add_argument("--store", help="a folder or s3://bucket: read and check all that it holds of the release")
    for verb in ("sbom", "card"):
        papers = add(
            verb, more=" Checks all papers of the release first. Trusts the keys in the folder keys/ beside it."
        )
        papers.add_argument("release", type=Path, help="a release file")
    registering = add("register", more=" Told again, it changes the approval alone. Needs credentials of its account.")
    registering.add_argument("version", help="version of a release in releases/, e.g. 0.1.0-g0123456789ab")
    registering.add_argument("env", help="an [env.*] of fleet.toml")
    registering.add_argument("--approval", choices=("pending", "approved", "rejected"), help="approval to set (default: "
                             "pending for a new one, unchanged for one that is there)")  # fmt: skip
    registering.add_argument("--why", default="", help="reason of the approval, for people")
    differing = add("diff", more=" Ends with 0, or with --exit-code with 1 where they differ.")
    differing.add_argument("old", type=Path, help="a release file, or a bundle's folder or zip")
    differing.add_argument("new", type=Path, help="another of the same kind")
    differing.add_argument("--exit-code", action="store_true", help="end with 1 where they differ")
    collecting = add("gc", more=" Keeps what a release in releases/ or build/releases/ refers to, and what is young.")
    collecting.add_argument("--store", required=True, help="a folder or s3://bucket")
    collecting.add_argument("--older-than", type=float, default=7.0, metavar="DAYS", help="days (default: 7)")
    collecting.add_argument("--delete", action="store_true", help="delete it; without this it is listed alone")
    serving = add("up", more=" Prints the address of a page to try it on.")
    serving.add_argument("--release", type=Path, help="a release file (default: the newest of build/releases/)")
    serving.add_argument("--port", type=int, default=8080, help="of the gateway; the others have the next ones")
    add("down")
    measuring = add("bench", sizes, more=" Wants two cores, and nothing else that runs on them.")
    measuring.add_argument("--unit", default="recommend", help="sub-model of the cpu target (default: recommend)")
    measuring.add_argument(
        "--peers", default="fastapi,litserve,bentoml,mlserver", help="with commas between (default: all)"
    )
    measuring.add_argument("--seconds", type=float, default=2, help="of each measurement (default: 2)")
    measuring.add_argument("--rounds", type=int, default=5, help="turns of all servers (default: 5)")
    drifting = add("drift", more=" Ends with 3 where a measure is beyond its limit: docs/drift.md.")
    drifting.add_argument("journal", type=Path, help="folder of the gateway's --feedback, or a copy of its stream")
    drifting.add_argument("--release", type=Path, help="a release file whose gateway's bundle lies in the build folder "
                          "(default: the newest of build/releases/)")  # fmt: skip
    drifting.add_argument("--against", type=Path, metavar="JOURNAL", help="another journal to compare with, no release")
    drifting.add_argument("--psi", type=float, default=0.25, help="limit of a measure's shift (default: 0.25)")
    drifting.add_argument("--calibration", type=float, default=0.25, help="limit of its error (default: 0.25)")
    drifting.add_argument("--taken", default="purchase", help="feedback that counts as taken, e.g. click,cart,purchase "
                          "(default: purchase, as in the release's own reference)")  # fmt: skip
    gathering = add("collect", more=" Writes events.parquet and searches.parquet in the schema of docs/data.md.")
    gathering.add_argument("journal", type=Path, help="folder of the gateway's --feedback, or a copy of its stream")
    gathering.add_argument("--out", type=Path, required=True, help="folder to write to")
    proposing = add(
        "propose", more=" Asks the environment's alarms; writes releases/proposed/ENV.json where there is a reason."
    )
    proposing.add_argument("--env", required=True, help="an [env.*] of fleet.toml")
    proposing.add_argument("--fresh", type=Path, help="a folder of `shipyard collect`, whose events count too")
    proposing.add_argument("--events", type=int, default=100_000, help="so many are reason enough (default: 100000)")
    proposing.add_argument("--drift", type=Path, metavar="FILE", help="what `shipyard drift --json` has printed")
    proposing.add_argument("--no-alarms", action="store_true", help="ask no alarms")
    return top


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
        return _look(chosen, reporter)
    fleet = load_fleet(chosen.fleet)
    root = chosen.fleet.resolve().parent
    build = (chosen.build or root / "build").resolve()
    if chosen.verb == "publish":
        found = publish(build / "releases" / f"{chosen.version}.json", root / "releases")
        reporter.line(f"published releases/{found.version}.json; commit it and its key, and name it in fleet.toml")
        return _print(found, chosen.json)
    if chosen.verb == "upload":
        oldest = 0 if chosen.allow_older else fleet.project.minimum_sequence
        path = root / "releases" / f"{chosen.version}.json"
        found = _read(path, oldest)
        check_withdrawn(path)
        verify_papers(path, found, load_keys(path.parent / "keys"))
        store = open_store(chosen.to, kms_key=chosen.kms_key, owner=chosen.owner)
        sent = upload_release(found, build / "store", store, reporter.progress)
        print(json.dumps({"version": found.version, "bytes_sent": sent}))
        return 0
    if chosen.verb == "gc":
        return _collect(chosen, fleet, (root / "releases", build / "releases"), reporter)
    if chosen.verb == "collect":
        print(json.dumps(importlib.import_module("shipyard.collect").collect(chosen.journal, chosen.out)))
        return 0
    if chosen.verb == "propose":
        return _propose(chosen, fleet, root, reporter)
    if chosen.verb == "drift":
        return _drift(chosen, build)
    if chosen.verb == "bench":
        return _bench(chosen, fleet, root, build, reporter)
    if chosen.verb in ("up", "down"):
        return _serve(chosen, build, reporter)
    if chosen.verb in ("edge", "register"):
        try:
            # not at the top: only what speaks to AWS needs boto3
            module = importlib.import_module("shipyard.edge" if chosen.verb == "edge" else "shipyard.registry")
        except ModuleNotFoundError as fault:
            raise ShipyardError(
                f"{chosen.verb}: {fault.name} is not installed", mend="pip install 'shipyard[aws,edge]'"
            ) from None
        return int(module.run(chosen, fleet, root, build, reporter))
    if chosen.verb == "report" and chosen.release is not None:
        return _report(chosen, root, build, reporter)
    if chosen.verb == "synth":
        _synth(
            chosen.fleet, chosen.out or root / "cdk.out", reporter, env=chosen.env, release=chosen.release,
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
            importlib.import_module("shipyard.comparison").print_comparison(compared)
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
        _synth(chosen.fleet, line.build / "cdk.out", reporter, release=path)
    page = _page(path, _replaced(found, (root / "releases",), reporter), None, line.build / "report.html")
    reporter.line(f"report   {page}")
    reporter.line(f"release  {path}")
    return _print(found, chosen.json)


def _look(chosen: argparse.Namespace, reporter: Reporter) -> int:
    """Look into releases and bundles, which changes nothing."""
    if chosen.verb == "diff":
        found = _difference(chosen.old, chosen.new)
        print(json.dumps(found, ensure_ascii=False) if chosen.json else "\n".join(lines(found)))
        return int(chosen.exit_code and not same(found))
    if chosen.verb == "inspect":
        if _is_release(chosen.path):
            release = _read(chosen.path)
            if chosen.markdown:
                print(release_markdown(release))
                return 0
            return _print(release, chosen.json)
        module = importlib.import_module("shipyard.inspect")
        told = module.inspect(_bundle(chosen.path))
        print(json.dumps(told, ensure_ascii=False) if chosen.json else "\n".join(module.lines(told)))
        return 0
    release, keys = _read(chosen.release), load_keys(chosen.release.parent / "keys")
    if chosen.verb in ("sbom", "card"):
        text = read_paper(chosen.release, release, keys, BOM if chosen.verb == "sbom" else CARD)
        print(json.dumps({chosen.verb: text}) if chosen.json and chosen.verb == "card" else text, end="")
        return 0
    done: dict[str, object] = {"version": release.version, "key_id": release.signature.key_id}
    done["papers"] = len(verify_papers(chosen.release, release, keys))
    if chosen.bundle is not None:
        done["bundle"] = verify_bundle(chosen.bundle, release, keys)["name"]
    if chosen.store is not None:
        done["bytes_read"] = verify_store(release, open_store(chosen.store), reporter.progress)
    print(json.dumps(done) if chosen.json else "verified " + ", ".join(f"{k} {v}" for k, v in done.items()))
    return 0


def _propose(chosen: argparse.Namespace, fleet: Fleet, root: Path, reporter: Reporter) -> int:
    """Look for reasons to train again and tell them."""
    if chosen.env not in fleet.env:
        raise ShipyardError("--env: no such environment", value=chosen.env, allowed=", ".join(fleet.env))
    module = importlib.import_module("shipyard.propose")
    alarms = [] if chosen.no_alarms else module.alarms_of(fleet, chosen.env)
    events = None if chosen.fresh is None else module.fresh(chosen.fresh)
    measures = [] if chosen.drift is None else module.measured(chosen.drift)
    told = module.propose(
        fleet, chosen.env, alarms=alarms, measures=measures, events=events, threshold=chosen.events,
        folder=root / "releases" / "proposed",
    )  # fmt: skip
    what = ", ".join(reason["what"] for reason in told["reasons"])
    reporter.line(f"proposes a release for {chosen.env}: {what}" if what else "proposes nothing: no reason")
    print(json.dumps(told, ensure_ascii=False))
    return 0


def _is_release(path: Path) -> bool:
    return path.suffix == ".json" and path.name != MANIFEST


def _bundle(path: Path) -> Path:
    """Return the folder or zip of a bundle; its bundle.json stands for its folder."""
    return path.parent if path.name == MANIFEST else path


def _difference(old: Path, new: Path) -> dict[str, object]:
    """Compare two releases, or two bundles."""
    kinds = [_is_release(path) for path in (old, new)]
    if all(kinds):
        return diff(_read(old), _read(new))
    if any(kinds):
        raise ShipyardError(
            "diff: a release and a bundle", value=f"{old} {new}", allowed="two releases, or two bundles"
        )
    inspect = importlib.import_module("shipyard.inspect").inspect
    return diff_bundles(inspect(_bundle(old)), inspect(_bundle(new)))


def _report(chosen: argparse.Namespace, root: Path, build: Path, reporter: Reporter) -> int:
    """Write the page of a release that is there."""
    found = _read(chosen.release)
    folders = chosen.release.parent, root / "releases"
    previous = _read(chosen.previous) if chosen.previous is not None else _replaced(found, folders, reporter)
    page = _page(chosen.release, previous, chosen.cost, chosen.out or build / "reports" / f"{found.version}.html")
    reporter.line(f"report   {page}")
    if chosen.json:
        print(json.dumps({"report": str(page)}))
    return 0


def _replaced(found: Release, folders: Sequence[Path], reporter: Reporter) -> Release | None:
    """Return the release that one replaces, where it lies; one that is not trusted any more is told, and ends nothing."""
    for path in (folder / f"{found.replaces}.json" for folder in folders):
        if path.is_file():
            try:
                return _read(path)
            except ShipyardError as fault:
                reporter.line(f"report   compares with nothing: {fault}")
                return None
    return None


def _page(release: Path, old: Release | None, cost: Path | None, out: Path) -> Path:
    """Write the page of a release; `old` is what to compare with, `cost` a file of prices, if any."""
    found = _read(release)
    figures, card = "{}", ""
    if found.papers:
        keys = load_keys(release.parent / "keys")
        figures, card = (read_paper(release, found, keys, name) for name in (FIGURES, CARD))
    record = json.loads(figures) | {"title": f"Release {found.version}", "profile": found.profile}
    prices = None if cost is None else read_json(cost)
    if prices is not None and not str(prices.get("schema")).startswith("shipyard.cost/"):
        raise ShipyardError(f"{cost}: not a cost report", mend="shipyard cost --save FILE writes one")
    out.parent.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module("shipyard.report")  # not at the top: it draws
    page: Path = module.report(record, out, found, old, prices, card)
    return page


def _collect(chosen: argparse.Namespace, fleet: Fleet, folders: Sequence[Path], reporter: Reporter) -> int:
    """List or delete what nothing refers to."""
    store = open_store(chosen.store)
    found = unused(store, referring(fleet, folders), chosen.older_than)
    if chosen.delete:
        store.remove([item.key for item in found])
    size = sum(item.bytes for item in found)
    if chosen.json:
        keys = [item.key for item in found]
        print(json.dumps({"keys": keys, "bytes": size, "deleted": chosen.delete}))
        return 0
    for item in found:
        print(f"{item.key}  {item.bytes} bytes, {item.days:.0f} days")
    reporter.line(f"{'deleted' if chosen.delete else 'unused'}  {len(found)} objects, {size} bytes")
    return 0


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


def _serve(chosen: argparse.Namespace, build: Path, reporter: Reporter) -> int:
    """Start or end the fleet on this machine."""
    module = importlib.import_module("shipyard.fleet")
    if chosen.verb == "down":
        print(json.dumps({"ended": module.down(build)}))
        return 0
    path = chosen.release or _newest(build)
    keys = load_keys(path.parent / "keys")
    state = module.up(_read(path), keys, build, chosen.port)
    for member in state["members"]:
        reporter.line(f"serves   {member['name']} at {member['url']}, process {member['pid']}")
    print(json.dumps(state) if chosen.json else f"open {state['members'][0]['url']}/ ; end it with shipyard down")
    return 0


def _bench(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Measure the CPU server beside others."""
    module, made = importlib.import_module("shipyard.bench"), build / chosen.profile
    bundle = made / chosen.unit / "bundle" / "bundle"
    if not bundle.is_dir():
        raise ShipyardError(f"{bundle}: no bundle", mend=f"shipyard release --profile {chosen.profile}")
    texts = importlib.import_module("shipyard.fleet").titles(made)
    record = module.bench(
        bundle, [name for name in chosen.peers.split(",") if name], chosen.seconds, chosen.rounds, build / "bench",
        root / "constraints.txt", base_folder(fleet), texts, reporter.progress,
    )  # fmt: skip
    print(json.dumps(record) if chosen.json else module.markdown(record))
    return 0


def _drift(chosen: argparse.Namespace, build: Path) -> int:
    """Compare a journal with its release, or with another journal."""
    module = importlib.import_module("shipyard.drift")
    kinds, bundle = chosen.taken.split(","), None
    if chosen.against is not None:
        reference = module.of_journal(chosen.against, kinds)
    else:
        reference, bundle = module.of_release(_read(chosen.release or _newest(build)), build)
    found = module.drift(reference, module.seen(chosen.journal, kinds, bundle), chosen.psi, chosen.calibration)
    print(json.dumps(found) if chosen.json else "\n".join(module.lines(found)))
    return 3 if found["drifted"] else 0


def _newest(build: Path) -> Path:
    """Return the newest local release."""
    made = sorted((build / "releases").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not made:
        raise ShipyardError(f"{build / 'releases'}: no release", mend="shipyard release")
    return made[-1]


def _read(path: Path, oldest: int = 0) -> Release:
    """Read and verify a release file with the keys beside it."""
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.json"))) or "none"
        raise ShipyardError(f"{path}: no such release file", allowed=there, mend="name one that is there")
    return read_release(path, load_keys(path.parent / "keys"), oldest)


def _synth(
    fleet: Path, out: Path, reporter: Reporter, *, env: str = "", release: Path | None = None, validate: bool = False
) -> None:
    """Run the pinned CDK CLI, offline and without credentials."""
    root = fleet.resolve().parent
    cli = root / "node_modules" / ".bin" / "cdk"
    if not cli.exists():
        raise ShipyardError("synth: the CDK CLI is not installed", value=str(cli), mend="make setup")
    command = [str(cli), "synth", "--quiet", "--output", str(out.resolve()), "--context", f"fleet={fleet.resolve()}"]
    if env:
        command += ["--context", f"env={env}"]
    if release is not None:
        # to look at: what is deployed is named in fleet.toml, and approved
        command += ["--context", f"release={release.resolve()}", "--context", "unapproved=true"]
    # no credentials and no region of the caller may reach a template
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CDK_"))}
    # the CDK's own validator more than doubles the time of a synth
    surroundings |= {
        "CDK_VALIDATION": "true" if validate else "false",
        "JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20",
    }
    with reporter.stage("synth"):
        finished = subprocess.run(command, cwd=root, env=surroundings, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            told = [line.removeprefix("error: ") for line in finished.stderr.splitlines() if line.startswith("error: ")]
            raise ShipyardError(told[0] if told else f"synth failed: {finished.stderr.strip()[-2000:]}")
    reporter.line(f"synthesized {out}")


def _synth_release(fleet: Path, out: Path, reporter: Reporter, env: str, release: Path) -> None:
    """Synthesize one environment with one release."""
    _synth(fleet, out, reporter, env=env, release=release)


def _print(found: Release, as_json: bool) -> int:
    if as_json:
        print(found.model_dump_json(by_alias=True, exclude_unset=True))
    else:
        print_release(found)
    return 0


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
