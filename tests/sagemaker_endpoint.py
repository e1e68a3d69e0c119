"""SageMaker's training and CloudWatch's logs on loopback, driven by botocore's own service models.

Every request is checked against its operation's shapes, and every answer too. A job reads its channels from a bucket, runs
the program of its code channel by torchrun as the SDK's driver does, with SageMaker's environment variables and folders,
and leaves its output in the bucket. `interrupt_at` kills it once, at a line of its log that holds this text, as a spot
interruption does: what lies in its folder of checkpoints is all that it finds again.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.session
import psutil
from botocore.validate import ParamValidator

from shipyard.local.greengrass import Refused, check

SESSION = botocore.session.get_session()
MODELS = {
    model.metadata["targetPrefix"]: model for model in (SESSION.get_service_model(n) for n in ("sagemaker", "logs"))
}


class Endpoint(ThreadingHTTPServer):
    """Both services; `bucket` is a client of S3, `faults` are answered first, by operation."""

    daemon_threads = True

    def __init__(self, s3, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.s3, self.folder = s3, folder
        self.jobs, self.lines, self.calls, self.faults = {}, {}, [], {}
        self.interrupt_at = ""
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    # --- operations ----------------------------------------------------------------------------------------------

    def CreateTrainingJob(self, TrainingJobName, **request):
        if TrainingJobName in self.jobs:
            raise Refused("ResourceInUse", 400, "Job name must be unique")
        arn = f"arn:aws:sagemaker:us-east-1:111111111111:training-job/{TrainingJobName}"
        self.jobs[TrainingJobName] = {
            **request, "TrainingJobName": TrainingJobName, "TrainingJobArn": arn, "CreationTime": time.time(),
            "TrainingJobStatus": "InProgress", "SecondaryStatus": "Starting",
        }  # fmt: skip
        self.lines[TrainingJobName] = []
        threading.Thread(target=self._run, args=(TrainingJobName,), daemon=True).start()
        return {"TrainingJobArn": arn}

    def DescribeTrainingJob(self, TrainingJobName):
        if TrainingJobName not in self.jobs:
            raise Refused("ValidationException", 400, "Requested resource not found.")
        asked = {k: v for k, v in self.jobs[TrainingJobName].items() if k != "Tags"}
        return asked

    def ListTrainingJobs(self, NameContains="", **_):
        kept = ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingJobStatus")
        jobs = [{key: job[key] for key in kept} for name, job in self.jobs.items() if NameContains in name]
        return {"TrainingJobSummaries": jobs[::-1]}

    def DescribeLogStreams(self, logGroupName, logStreamNamePrefix):
        job = logStreamNamePrefix.rstrip("/")
        if not self.lines.get(job):
            raise Refused("ResourceNotFoundException", 400, "The specified log group does not exist.")
        return {"logStreams": [{"logStreamName": f"{job}/algo-1-1700000000"}]}

    def GetLogEvents(self, logGroupName, logStreamName, startFromHead, nextToken="0"):
        lines, start = self.lines[logStreamName.partition("/")[0]], int(nextToken)
        events = [{"message": line} for line in lines[start : start + 100]]
        return {"events": events, "nextForwardToken": str(start + len(events))}

    # --- the life of a job ---------------------------------------------------------------------------------------

    def _run(self, name):
        job = self.jobs[name]
        try:
            while not self._once(name, job):
                job["SecondaryStatus"] = "Interrupted"
                time.sleep(0.3)  # long enough to be seen
        except Exception as fault:
            job |= {
                "TrainingJobStatus": "Failed",
                "SecondaryStatus": "Failed",
                "FailureReason": f"AlgorithmError: {fault}",
            }

    def _once(self, name, job):
        """Run a job until it ends, or is interrupted: return whether it ended."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        data, model, kept = root / "input/data", root / "model", root / "checkpoints"
        job["SecondaryStatus"] = "Downloading"
        for channel in job["InputDataConfig"]:
            self._fetch(channel["DataSource"]["S3DataSource"]["S3Uri"], data / channel["ChannelName"])
        self._fetch(job["CheckpointConfig"]["S3Uri"], kept)
        for folder in (model, kept):
            folder.mkdir(exist_ok=True)
        with tarfile.open(data / "code/source.tar.gz") as source:
            source.extractall(data / "code", filter="data")
        job["SecondaryStatus"] = "Training"
        surroundings = {
            "PATH": os.environ["PATH"], "HOME": str(root), "OMP_NUM_THREADS": "1", **job.get("Environment", {}),
            "SHIPYARD_CHECKPOINTS": str(kept), "SM_MODEL_DIR": str(model),
            **{f"SM_CHANNEL_{c['ChannelName'].upper()}": str(data / c["ChannelName"]) for c in job["InputDataConfig"]},
        }  # fmt: skip
        command = [str(Path(sys.executable).with_name("torchrun")), "--nnodes=1", "--nproc_per_node=1", "train.py"]
        process = subprocess.Popen(
            command, cwd=data / "code", env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        for line in process.stdout:
            self.lines[name].append(line.rstrip("\n") or " ")
            if self.interrupt_at and self.interrupt_at in line:
                self.interrupt_at = ""
                # torchrun's workers are sessions of their own
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
                    one.wait()
                self._store(kept, job["CheckpointConfig"]["S3Uri"])
                return False
        if process.wait() != 0:
            raise RuntimeError(f"ExecuteUserScriptError: ExitCode {process.returncode}")
        job["SecondaryStatus"] = "Uploading"
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(model, arcname=".")
        uri = f"{job['OutputDataConfig']['S3OutputPath']}/{name}/output/model.tar.gz"
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.s3.put_object(Bucket=bucket, Key=key, Body=packed.getvalue())
        job["ModelArtifacts"] = {"S3ModelArtifacts": uri}
        job |= {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}
        return True

    def _fetch(self, uri, folder):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for found in self.s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
            path = folder / (found["Key"].removeprefix(prefix) or Path(prefix).name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(bucket, found["Key"], str(path))

    def _store(self, folder, uri):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for path in folder.rglob("*"):
            if path.is_file():
                self.s3.upload_file(str(path), bucket, prefix + path.relative_to(folder).as_posix())


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.server.lock:
                status, document = 200, self._answer(json.loads(body))
        except Refused as fault:
            status, document = fault.status, {"__type": fault.code, "message": str(fault)}
        except (AssertionError, LookupError, TypeError) as fault:
            status, document = 400, {"__type": "ValidationException", "message": f"{type(fault).__name__}: {fault}"}
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _answer(self, given):
        prefix, _, name = self.headers["X-Amz-Target"].partition(".")
        operation = MODELS[prefix].operation_model(name)
        self.server.calls.append((name, given))
        if name in self.server.faults:
            raise self.server.faults[name]
        shape = operation.input_shape
        assert given.keys() <= shape.members.keys(), f"unknown: {sorted(given.keys() - shape.members.keys())}"
        assert not (report := ParamValidator().validate(given, shape)).has_errors(), report.generate_report()
        check(given, shape)
        answer = getattr(self.server, name)(**given)
        check(
            {key: value for key, value in answer.items() if key in operation.output_shape.members},
            operation.output_shape,
        )
        return answer

    def log_message(self, *_):
        pass
