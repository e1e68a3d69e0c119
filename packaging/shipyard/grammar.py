"""The command line's grammar: the verbs, what each takes, and what --help tells of them."""

import argparse
from collections.abc import Callable
from pathlib import Path

from shipyard.delivery.grammar import VERBS as DELIVERY
from shipyard.line import VERBS
from shipyard.papers.origin import BUILDER
from shipyard.weekly import OFTEN, STEPS

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
    "change": "tell what a change of the synthesized templates does to each stack, as Markdown",
    "gc": "list, or delete, what lies in a store and no release refers to",
    "up": "serve a local release on this machine: every runtime and the gateway, on loopback",
    "down": "end what up has started",
    "items": "make new or changed items searchable without a new release",
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

Add = Callable[..., argparse.ArgumentParser]
"""Adds a verb: its name, parsers whose options it has too, and by `more` what its help tells beyond a line."""


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

    _making(add, sizes)
    for verb, text in (REVIEW | DELIVERY).items():  # parsed where they are run
        verbs.add_parser(verb, help=text, add_help=False)
    _bringing(add)
    _looking(add)
    _running(add, sizes)
    return top


def _making(add: Add, sizes: argparse.ArgumentParser) -> None:
    """Add what makes something below build/."""
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
        help="build folder of the earlier model: build/quick, or build/quick-2017-11-13",
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


def _bringing(add: Add) -> None:
    """Add what brings a release somewhere."""
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


def _looking(add: Add) -> None:
    """Add what looks into releases, bundles and stores."""
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


def _running(add: Add, sizes: argparse.ArgumentParser) -> None:
    """Add what serves on this machine and what reads the gateway's journal."""
    serving = add("up", more=" Prints the address of a page to try it on.")
    serving.add_argument("--release", type=Path, help="a release file (default: the newest of build/releases/)")
    serving.add_argument("--port", type=int, default=8080, help="of the gateway; the others have the next ones")
    add("down")
    bringing = add("items", more=" Makes a shard of them beside the release's search, and brings it to what `shipyard up` "
                   "serves: docs/serving.md.")  # fmt: skip
    bringing.add_argument("items", type=Path, metavar="FILE", help="items.parquet or items.csv, in the schema of "
                          "docs/data.md: all that are new or changed since the release")  # fmt: skip
    bringing.add_argument("--release", type=Path, help="a release file (default: the newest of build/releases/)")
    bringing.add_argument("--key", help="the key that signed the release: a file or kms:KEY (default: your own)")
    measuring = add("bench", sizes, more=" Wants two cores, and nothing else that runs on them.")
    measuring.add_argument("--unit", default="recommend", help="sub-model of the cpu target (default: recommend)")
    measuring.add_argument(
        "--peers", default="fastapi,litserve,bentoml,mlserver", help="with commas between (default: all)"
    )
    measuring.add_argument("--seconds", type=float, default=2, help="of each measurement (default: 2)")
    measuring.add_argument("--rounds", type=int, default=5, help="turns of all servers (default: 5)")
    changing = add(
        "change", more=" Stacks that differ by their environment alone are told once. `make change` calls it."
    )
    changing.add_argument("before", type=Path, help="a folder of `shipyard synth` of before")
    changing.add_argument("now", type=Path, nargs="?", default=Path("cdk.out"), help="that of now (default: cdk.out)")
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
