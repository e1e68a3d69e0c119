"""shipyard finetune --on sagemaker: fine-tune elsewhere, and leave the record as if it had been done here."""

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from models.config import Fleet
from serve.errors import ShipyardError
from shipyard.line import Line
from shipyard.remote.follow import Follower
from shipyard.remote.launch import Report, send, show, start
from shipyard.remote.output import bring
from shipyard.remote.plan import Plan, make_plan
from shipyard.stage import Record, Stage
from shipyard.upload import open_store

STAGE = "finetune"


def sdk(root: Path) -> Path:
    """Return the interpreter that has SageMaker's SDK: that of .venv-sagemaker, or this one."""
    own = root / ".venv-sagemaker" / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def dry_run(line: Line, fleet: Fleet, env_name: str) -> dict[str, Any]:
    """Return the request that would start the job, without a call; the data stage is run here."""
    shown: dict[str, Any] = {}

    def watch(stage: Stage, folder: Path) -> Record:
        if stage.name != STAGE:
            return line.watch(stage, folder)
        with tempfile.TemporaryDirectory() as work:
            shown.update(show(make_plan(fleet, env_name, line, stage, Path(work)), sdk(line.root)))
        return Record(folder, "", {}, skipped=True)

    _ = replace(line, watch=watch).finetune
    return shown


def finetune(
    line: Line, fleet: Fleet, env_name: str, say: Callable[[str], None], *, again: bool = False, interval: float = 10.0
) -> Record:
    """Fine-tune as a training job of an environment, unless it is done; return the record.

    A job of the same key that runs or is complete is followed, unless a new one is asked for `again`; one that was stopped
    or failed is gone on from.
    """

    def watch(stage: Stage, folder: Path) -> Record:
        if stage.name != STAGE or stage.find(folder) is not None:
            return line.watch(stage, folder)
        with tempfile.TemporaryDirectory() as work:
            plan = make_plan(fleet, env_name, line, stage, Path(work))
            begin = functools.partial(start, plan, sdk(line.root))
            return train(plan, folder, begin, say, line.report, again=again, interval=interval)

    return replace(line, watch=watch).finetune


def train(
    plan: Plan,
    build: Path,
    begin: Callable[[], str],
    say: Callable[[str], None],
    report: Report,
    *,
    again: bool = False,
    interval: float = 10.0,
) -> Record:
    """Send, start by `begin`, follow, and bring back the record into `build`."""
    patient = Config(retries={"mode": "standard", "total_max_attempts": 6}, connect_timeout=10, read_timeout=60)
    try:
        clients = [boto3.client(name, region_name=plan.region, config=patient) for name in ("sagemaker", "logs")]
    except BotoCoreError as fault:
        raise ShipyardError(f"finetune: {fault}", mend="give credentials of the environment's account") from None
    store = open_store(f"s3://{plan.bucket}", kms_key=plan.key, owner=plan.account)
    follower = Follower(*clients, say=say, report=report, interval=interval)
    name = None if again else follower.running(plan.name)
    if name is None:
        sent = send(plan, store, report)
        say(f"sent     {sent} bytes to s3://{plan.bucket}")
        name = begin()
    say(f"follows  {name}; an interruption here leaves it running, and the same command follows it again")
    ended = follower.follow(name)
    work = build / plan.stage.unit / f".{plan.stage.name}-{plan.stage.key[:16]}"
    if work.exists():
        shutil.rmtree(work)
    try:
        bring(plan, ended, store, work)
    except ShipyardError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    say(f"brought  {json.dumps(ended.output)}")
    # finds the folder of its key, whole, and takes it for its own
    return plan.stage.run(build)
