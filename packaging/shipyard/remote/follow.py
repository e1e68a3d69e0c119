"""Follow a training job to its end: its state, its log, its progress."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import ShipyardError
from shipyard.remote.entry import MARK
from shipyard.remote.launch import MENDS, Report, refused

GROUP = "/aws/sagemaker/TrainingJobs"
FAULT = re.compile(r"error: |[\w.]+(Error|Exception): ")
"""A line that tells what went wrong: the first one is the cause, what torchrun says later its echo."""

LATE_SECONDS = 90.0
"""How long after a job's end its log may still come."""

STATES = {
    "Starting": "starts",
    "Pending": "waits for a machine",
    "LaunchingMLInstances": "waits for a machine",
    "PreparingTrainingStack": "prepares the machine",
    "Downloading": "reads its inputs",
    "DownloadingTrainingImage": "pulls the image",
    "Training": "trains",
    "Interrupted": "was interrupted: spot capacity is gone; it goes on from its checkpoint when there is some again",
    "Restarting": "starts again",
    "Uploading": "writes its output",
    "Stopping": "is being stopped",
}

ENDS = {
    "MaxRuntimeExceeded": (
        "ran for max_hours",
        "raise training.max_hours; the same command goes on from the checkpoint",
    ),
    "MaxWaitTimeExceeded": (
        "waited for max_wait_hours for spot capacity",
        "the same command goes on from the checkpoint; raise max_wait_hours, choose another type, or spot = false",
    ),
    "Stopped": ("was stopped by somebody", "the same command goes on from the checkpoint"),
}
"""Why a job is Stopped, by its secondary status, and what to do."""


@dataclass(frozen=True)
class Ended:
    """A job that is complete: its output's address, and the SHA-256 of its record as its log tells it."""

    name: str
    output: str
    sha256: str


class Follower:
    """Ask for a job's state and log every `interval` seconds; `say` gets lines, `report` progress."""

    def __init__(
        self, sagemaker: Any, logs: Any, *, say: Callable[[str], None], report: Report, interval: float = 10.0,
        late: float = LATE_SECONDS,
    ) -> None:  # fmt: skip
        self._sagemaker, self._logs = sagemaker, logs
        self._say, self._report, self._interval, self._late = say, report, interval, late
        self._tokens: dict[str, str] = {}
        self._sha256 = ""
        self._faults: list[str] = []

    def running(self, base: str) -> str | None:
        """Return the newest job whose name begins with `base` and that runs or is complete."""
        try:
            pages = self._sagemaker.get_paginator("list_training_jobs").paginate(
                NameContains=base, SortBy="CreationTime", SortOrder="Descending"
            )
            jobs = [job for page in pages for job in page["TrainingJobSummaries"]]
        except (ClientError, BotoCoreError) as fault:
            raise self._refused(base, fault) from None
        going = ("InProgress", "Completed")
        return next((str(job["TrainingJobName"]) for job in jobs if job["TrainingJobStatus"] in going), None)

    def follow(self, name: str) -> Ended:
        """Return once the job is complete and its log has told its record.

        Raises:
            ShipyardError: it failed, was stopped, or its log does not tell what it wrote; AWS refuses.
        """
        state = ""
        while True:
            try:
                told = self._sagemaker.describe_training_job(TrainingJobName=name)
                if told["SecondaryStatus"] != state:
                    state = told["SecondaryStatus"]
                    if state in STATES:
                        self._say(f"job      {name} {STATES[state]}")
                self._read_log(name)
            except (ClientError, BotoCoreError) as fault:
                raise self._refused(name, fault) from None
            if told["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"):
                return self._ended(name, told)
            time.sleep(self._interval)

    def _ended(self, name: str, told: Mapping[str, Any]) -> Ended:
        status, state = told["TrainingJobStatus"], told["SecondaryStatus"]
        if status == "Stopped":
            why, mend = ENDS.get(state, ENDS["Stopped"])
            raise ShipyardError(f"training job {name}: {why}", value=state, mend=mend)
        if status == "Failed":
            reason = told.get("FailureReason", "no reason is told")
            code = next((code for code in MENDS if code in reason), "")
            raise ShipyardError(
                f"training job {name}: failed", value=" / ".join([*self._faults[:1], reason]),
                mend=MENDS.get(code, f"read its log, {GROUP}/{name}"),
            )  # fmt: skip
        if not (output := told.get("ModelArtifacts", {}).get("S3ModelArtifacts")):
            raise ShipyardError(f"training job {name}: complete, and has no output", mend="start anew with --again")
        until = time.monotonic() + self._late
        while not self._sha256 and time.monotonic() < until:
            time.sleep(min(self._interval, 2.0))
            self._read_log(name)
        if not self._sha256:
            raise ShipyardError(
                f"training job {name}: its log does not tell what it wrote", value=f"{GROUP}/{name}",
                mend="allow logs:GetLogEvents, and the job's role to write its log; the same command looks again",
            )  # fmt: skip
        return Ended(name, output, self._sha256)

    def _read_log(self, name: str) -> None:
        """Take what the log has had since the last time."""
        try:
            streams = self._logs.describe_log_streams(logGroupName=GROUP, logStreamNamePrefix=f"{name}/")["logStreams"]
        except ClientError as fault:
            if fault.response["Error"]["Code"] == "ResourceNotFoundException":
                return  # the first job of an account has no group until it writes
            raise
        for stream in streams:
            of = stream["logStreamName"]
            while True:
                token = {"nextToken": self._tokens[of]} if of in self._tokens else {}
                page = self._logs.get_log_events(logGroupName=GROUP, logStreamName=of, startFromHead=True, **token)
                for event in page["events"]:
                    self._take(event["message"])
                if self._tokens.get(of) == page["nextForwardToken"]:
                    break
                self._tokens[of] = page["nextForwardToken"]

    def _take(self, line: str) -> None:
        if FAULT.match(line):
            self._faults.append(line.strip())
        try:
            event = json.loads(line)
            kind = event[MARK]
        except (ValueError, KeyError, TypeError):
            return
        if kind == "progress":
            self._report(str(event["what"]), int(event["done"]), int(event["total"]))
        elif kind == "done":
            self._sha256 = str(event["sha256"])

    def _refused(self, name: str, fault: ClientError | BotoCoreError) -> ShipyardError:
        if isinstance(fault, ClientError):
            error = fault.response["Error"]
            return refused(f"training job {name}", error["Code"], error.get("Message", ""))
        return refused(f"training job {name}", type(fault).__name__, str(fault))
