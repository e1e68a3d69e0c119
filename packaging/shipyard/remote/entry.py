"""Inside the training job: check what arrived, run the stage, leave its folder as the job's model.

SageMaker names the folders by environment variables (SM_CHANNEL_*, SM_MODEL_DIR); the folder of checkpoints is copied to
S3 while the job runs, and back when it starts again after an interruption. The stage works in it.
"""

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import Finetune, Profile
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from shipyard.stage import RECORD, Record, Stage, closure

SECONDS_BETWEEN_LINES = 5.0

MARK = "shipyard"
"""The key of a log line that is told to who follows the job."""


def main(plan: Path) -> int:
    """Run the stage that `plan` describes; return the exit code."""
    given = os.environ
    try:
        channels = {name: Path(given[f"SM_CHANNEL_{name.upper()}"]) for name in read_json(plan)["channels"]}
        train(read_json(plan), channels, Path(given["SHIPYARD_CHECKPOINTS"]), Path(given["SM_MODEL_DIR"]))
    except KeyError as fault:
        print(f"error: {fault} is not set; mend: start this as a SageMaker training job", file=sys.stderr)
        return 1
    except (ShipyardError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


def train(plan: Mapping[str, Any], channels: Mapping[str, Path], checkpoints: Path, model: Path) -> None:
    """Run a stage in `checkpoints` and copy its folder into `model`.

    Raises:
        ShipyardError: an input is not what was sent, or code or libraries are others than where the plan was made.
    """
    for name, folder in channels.items():
        _check_channel(name, folder, plan["channels"][name])
    told = plan["stage"]
    modules = tuple(told["modules"])
    libraries = _check_same(plan, modules)
    module = importlib.import_module(f"shipyard.{told['name']}")
    config, profile = Finetune.model_validate(plan["finetune"]), Profile.model_validate(plan["profile"])
    weights = dict(told["config"]["weights"])

    def work(out: Path) -> dict[str, Any]:
        found: dict[str, Any] = module.finetune(
            channels["data"], channels["base"], config, profile, weights, out, _Progress().report
        )
        return found

    inputs = tuple(Record(channels["data"], sha256, {}, skipped=True) for sha256 in plan["inputs"])
    record = Stage(told["name"], told["unit"], inputs, told["config"], modules, work).run(checkpoints)
    model.mkdir(parents=True, exist_ok=True)
    document = read_json(record.folder / RECORD)
    for name in document["files"]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(record.folder / name, model / name)
    # the key is that of where the plan was made: libraries are the same but for their builds, as 2.13.0+cpu
    document |= {"key": plan["key"], "made": {"libraries": libraries}}
    (model / RECORD).write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    say({MARK: "done", "sha256": sha256_file(model / RECORD)})


def _check_channel(name: str, folder: Path, wanted: Mapping[str, str]) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for path in sorted(found ^ set(wanted)):
        what = "was not sent" if path in found else "is missing"
        raise ShipyardError(f"channel {name}: {path} {what}", mend="start the job again; remove what else lies there")
    for path, sha256 in wanted.items():
        if (is_now := sha256_file(folder / path)) != sha256:
            raise ShipyardError(f"channel {name}: {path}: not what was sent", value=is_now, allowed=sha256)


def _check_same(plan: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, str]:
    """Hold code and libraries to those of the plan; return the libraries' versions here."""
    sources, libraries = closure(modules)
    code = {module: sha256_file(path) for module, path in sources.items()}
    here = {name: version.partition("+")[0] for name, version in libraries.items()}
    there = {name: version.partition("+")[0] for name, version in plan["libraries"].items()}
    for what, found, wanted in (("code", code, plan["code"]), ("library", here, there)):
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ShipyardError(
                    f"{what} {name}: another than where the job was planned", value=found.get(name),
                    allowed=wanted.get(name), mend="build the image from the same constraints.txt (docs/training.md)",
                )  # fmt: skip
    return libraries


def say(event: Mapping[str, Any]) -> None:
    """Write a line that who follows the job understands."""
    print(json.dumps(event), flush=True)


class _Progress:
    """Tell progress at most every five seconds, and where something else begins or ends."""

    def __init__(self) -> None:
        self._label, self._said = "", 0.0

    def report(self, what: str, done: int, total: int) -> None:
        label, now = what.partition(",")[0], time.monotonic()
        if label != self._label or done == total or now - self._said >= SECONDS_BETWEEN_LINES:
            self._label, self._said = label, now
            say({MARK: "progress", "what": what, "done": done, "total": total})
