"""Hand a plan to SageMaker's SDK, in a process of its own: python -I trainer.py [--dry-run] < plan.json.

The SDK's requirements do not fit those of the rest (constraints-sagemaker.txt), so it has an environment of its own; this
file imports nothing of ours and is run by its path. It prints one JSON object: the job's name, the request that would be
sent, or an error of AWS by its code.
"""

import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

# what the SDK reads at its import: it checks a role by calls of IAM that a person who may only pass it cannot make
os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"

import boto3
from botocore.awsrequest import AWSResponse
from botocore.exceptions import BotoCoreError, ClientError
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.training.configs import (
    CheckpointConfig,
    Compute,
    InputData,
    Networking,
    OutputDataConfig,
    SourceCode,
    StoppingCondition,
    Tag,
)
from sagemaker.train.distributed import Torchrun
from sagemaker.train.model_trainer import ModelTrainer

# nothing is told to the SDK's makers, and no settings of this machine reach a request
CONFIG = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


class _Session(Session):
    """A session that uses the bucket it is given: the SDK's own lists all buckets, and would create one."""

    def default_bucket(self) -> str:
        """Return the bucket's name."""
        return str(self._default_bucket_name_override)


class _Captured(Exception):
    """Ends a dry run where the request would be sent."""


class _Empty(io.BytesIO):
    """A body without content, as botocore reads one."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


class _DryRun:
    """Answer S3 here and keep what SageMaker would be sent: no byte leaves the process."""

    def __init__(self, session: boto3.Session) -> None:
        self.request: dict[str, Any] = {}
        self.uploads = 0
        session.events.register("before-send", self.answer)

    def answer(self, request: Any, event_name: str, **_: Any) -> AWSResponse:
        service, _, operation = event_name.removeprefix("before-send.").partition(".")
        if (service, operation) == ("sagemaker", "CreateTrainingJob"):
            self.request = json.loads(request.body)
            raise _Captured
        if (service, operation) == ("s3", "PutObject"):
            self.uploads += 1
        return AWSResponse(request.url, 200 if service == "s3" else 403, {}, _Empty())


def trainer_of(plan: dict[str, Any], session: Session) -> ModelTrainer:
    """Return the SDK's trainer of a plan."""
    return ModelTrainer(
        sagemaker_session=session,
        base_job_name=plan["base_job_name"],
        role=plan["role"],
        training_image=plan["training_image"],
        source_code=SourceCode(**plan["source_code"]),
        distributed=Torchrun(**plan["distributed"]),
        compute=Compute(**plan["compute"]),
        networking=Networking(**plan["networking"]),
        stopping_condition=StoppingCondition(**plan["stopping_condition"]),
        output_data_config=OutputDataConfig(**plan["output_data_config"]),
        checkpoint_config=CheckpointConfig(**plan["checkpoint_config"]),
        environment=plan["environment"],
        tags=[Tag(key=key, value=value) for key, value in plan["tags"].items()],
        input_data_config=[InputData(channel_name=name, data_source=uri) for name, uri in plan["channels"].items()],
    )


def main(arguments: list[str]) -> int:
    """Start the job of the plan on standard input, or with --dry-run show its request."""
    plan, dry = json.load(sys.stdin), "--dry-run" in arguments
    shown = {"aws_access_key_id": "dry-run", "aws_secret_access_key": "dry-run"} if dry else {}
    boto = boto3.Session(region_name=plan["region"], **shown)
    kept = _DryRun(boto) if dry else None
    staging = plan["staging"]
    session = _Session(
        boto_session=boto, default_bucket=staging["bucket"], default_bucket_prefix=staging["prefix"],
        sagemaker_config=CONFIG,
    )  # fmt: skip
    try:
        trainer = trainer_of(plan, session)
        trainer.train(wait=False, logs=False)
    except _Captured:
        assert kept is not None
        told = {"request": kept.request, "uploads": kept.uploads}
    except ClientError as fault:
        error = fault.response["Error"]
        told = {"error": {"code": error["Code"], "message": error.get("Message", "")}}
    except BotoCoreError as fault:
        told = {"error": {"code": type(fault).__name__, "message": str(fault)}}
    else:
        told = {"job": trainer._latest_training_job.training_job_name}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
