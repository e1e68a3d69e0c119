"""Start a training job: send what it reads, and let SageMaker's SDK make the request."""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError
from shipyard.remote.plan import Plan
from shipyard.upload import Store, upload

TRAINER = Path(__file__).with_name("trainer.py")

Report = Callable[[str, int, int], None]

ALLOW = "attach the managed policy of the stack training, which allows this and iam:PassRole of the role"

MENDS = {
    "ResourceLimitExceeded": "ask Service Quotas for more of this type for (spot) training jobs, or choose another one",
    "AccessDenied": ALLOW,
    "AccessDeniedException": ALLOW,
    "ValidationException": "correct the training table in fleet.toml, or deploy the stack training first",
    "ResourceInUse": "run the same command again in a second",
    "NoCredentialsError": "give credentials of the environment's account",
}
"""What to do about an error of AWS, by its code."""


def send(plan: Plan, store: Store, report: Report) -> int:
    """Send inputs and code that are not there yet; return how many bytes were sent."""
    sent = 0
    for one in plan.inputs:
        artifact = {"name": one.name, "key": one.key, "files": one.files}
        sent += upload(store, artifact, one.folder, report)
    return sent


def start(plan: Plan, python: Path) -> str:
    """Start the job by the SDK of the interpreter `python`; return its name.

    Raises:
        ShipyardError: the SDK is not there, or AWS refuses.
    """
    return str(_trainer(plan, python)["job"])


def show(plan: Plan, python: Path) -> dict[str, Any]:
    """Return the request that would start the job, and what would be sent before; no call is made."""
    told = _trainer(plan, python, "--dry-run")
    sent = [
        {"to": f"s3://{plan.bucket}/{one.key}{file['path']}", "bytes": file["bytes"]}
        for one in plan.inputs
        for file in one.files
    ]
    return {"CreateTrainingJob": told["request"], "inputs": sent, "drivers": told["uploads"]}


def _trainer(plan: Plan, python: Path, *options: str) -> Mapping[str, Any]:
    command = [str(python), "-I", str(TRAINER), *options]
    try:
        done = subprocess.run(command, input=json.dumps(plan.trainer), capture_output=True, text=True, check=False)
    except OSError as fault:
        raise ShipyardError(f"finetune: {python}: {fault.strerror}", mend="make setup-sagemaker") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        mend = "make setup-sagemaker" if "ModuleNotFoundError" in last[0] else "correct the plan"
        raise ShipyardError(f"finetune: SageMaker's SDK in {python}: {last[0]}", mend=mend)
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if error := told.get("error"):
        raise refused(f"training job {plan.name}", error["code"], error["message"])
    return told


def refused(what: str, code: str, message: str) -> ShipyardError:
    """Return the error that AWS refused something."""
    mend = MENDS.get(code, "check your credentials and your rights; the same command goes on")
    return ShipyardError(f"{what}: {code}: {message}", mend=mend)
