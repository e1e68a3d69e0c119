"""Fine-tuning as a SageMaker training job: what is sent, how it is followed, what is brought back, what is refused."""

import hashlib
import io
import json
import socket
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
import torch
from conftest import ROOT, shipyard
from sagemaker_endpoint import Endpoint
from test_log import fleet_of, write_shop
from transformers import BertConfig, BertModel

from models.config import load_fleet
from serve.errors import ShipyardError
from serve.files import sha256_file
from shipyard.line import Line
from shipyard.local.greengrass import Refused
from shipyard.pretrained import base_folder
from shipyard.remote import entry
from shipyard.remote.command import STAGE, train
from shipyard.remote.follow import Ended, Follower
from shipyard.remote.launch import show, start
from shipyard.remote.output import bring
from shipyard.remote.plan import Plan, make_plan
from shipyard.stage import Record, Stage, digest
from shipyard.upload import open_store

KEY = "arn:aws:kms:us-east-1:111111111111:key/11111111-1111-1111-1111-111111111111"
PLACE = (
    f'place = {{ subnets = ["subnet-0123456789abcdef0"], security_groups = ["sg-0123456789abcdef0"], key = "{KEY}" }}'
)
TRAINING = f'training = {{ image = "shipyard/train@sha256:{"0" * 64}", instance_type = "ml.c7i.4xlarge", {PLACE} }}'
SDK = ROOT / ".venv-sagemaker" / "bin" / "python"
needs_sdk = pytest.mark.skipif(not SDK.exists(), reason="SageMaker's SDK is not here: make test-sagemaker")


class Reached(Exception):
    """Ends a line at fine-tuning."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A fleet of one sub-model that learns from a small log, and its environment dev that trains."""
    folder = tmp_path_factory.mktemp("remote")
    write_shop(folder / "shop")
    path = fleet_of(folder, ("search",))
    delivery = 'delivery = { repository = "example/shop" }'
    path.write_text(path.read_text().replace(delivery, f"{delivery}\n{TRAINING}", 1))
    return path


def tiny_encoder(folder: Path) -> Path:
    """Write a BERT of one narrow layer with the words of the fleet's own: what it learns is of no matter here."""
    own = base_folder(load_fleet(ROOT / "fleet.toml"))
    torch.manual_seed(1)
    config = BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).write_bytes((own / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def planned(shop):
    """The line of that fleet with its data made, and the stage that is to be run elsewhere."""
    found = []
    encoder = tiny_encoder(shop.parent / "encoder")

    def watch(stage: Stage, folder: Path) -> Record:
        if stage.name == STAGE:
            found.append(stage)
            raise Reached
        return stage.run(folder)

    line = Line(load_fleet(shop), "tiny", shop.parent, shop.parent / "build" / "tiny", lambda *_: None, watch)
    line.__dict__["base"] = encoder
    with pytest.raises(Reached):
        _ = line.finetune
    return line, found[0]


def plan_of(planned, folder: Path) -> Plan:
    line, stage = planned
    return make_plan(line.fleet, "dev", line, stage, folder)


@pytest.fixture(scope="module")
def plan(planned, tmp_path_factory):
    return plan_of(planned, tmp_path_factory.mktemp("plan"))


@pytest.fixture
def aws(moto, plan, tmp_path, monkeypatch):
    """S3 of moto with the environment's bucket, and the endpoint of training and logs beside it."""
    for name, value in {
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "testing",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=plan.bucket)
    endpoint = Endpoint(s3, tmp_path / "machine")
    for service in ("SAGEMAKER", "CLOUDWATCH_LOGS"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", endpoint.url)
    yield endpoint
    endpoint.shutdown()


def request_of(plan: Plan, name: str) -> dict:
    """Return the request that is wanted of a plan, but for the SDK's own channel of drivers."""
    told = plan.trainer
    channels = told["channels"] | {"code": told["source_code"]["source_dir"]}
    source = {"S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated"}
    sh = "/opt/ml/input/data/sm_drivers/sm_train.sh"
    return {
        "TrainingJobName": name,
        "HyperParameters": {},
        "AlgorithmSpecification": {
            "TrainingInputMode": "File",
            "TrainingImage": f"111111111111.dkr.ecr.us-east-1.amazonaws.com/shipyard/train@sha256:{'0' * 64}",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"chmod +x {sh} && {sh}"],
        },
        "RoleArn": "arn:aws:iam::111111111111:role/shipyard-dev-training",
        "InputDataConfig": [
            {"ChannelName": c, "DataSource": {"S3DataSource": source | {"S3Uri": uri}}, "InputMode": "File"}
            for c, uri in channels.items()
        ],
        "OutputDataConfig": {
            "S3OutputPath": f"s3://{plan.bucket}/training/jobs", "KmsKeyId": KEY, "CompressionType": "GZIP",
        },
        "ResourceConfig": {
            "InstanceType": "ml.c7i.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30, "VolumeKmsKeyId": KEY,
        },
        "VpcConfig": {"SecurityGroupIds": ["sg-0123456789abcdef0"], "Subnets": ["subnet-0123456789abcdef0"]},
        "StoppingCondition": {"MaxRuntimeInSeconds": 6 * 3600, "MaxWaitTimeInSeconds": 24 * 3600},
        "Tags": [{"Key": key, "Value": value} for key, value in {
            "project": "shipyard", "environment": "dev", "stage": "finetune", "profile": "tiny", "key": plan.stage.key,
        }.items()],
        "EnableNetworkIsolation": True,
        "EnableManagedSpotTraining": True,
        "CheckpointConfig": {
            "S3Uri": f"s3://{plan.bucket}/training/checkpoints/{plan.stage.key}/", "LocalPath": "/opt/ml/checkpoints",
        },
        "Environment": {"SHIPYARD_CHECKPOINTS": "/opt/ml/checkpoints", "TOKENIZERS_PARALLELISM": "false"},
    }  # fmt: skip


def start_plainly(plan: Plan) -> str:
    """Start a job without the SDK."""
    name = f"{plan.name}-20260101000000"
    boto3.client("sagemaker").create_training_job(**request_of(plan, name))
    return name


# --- what is sent ------------------------------------------------------------------------------------------------------


def test_code_is_packed_to_the_same_bytes_and_holds_what_the_stage_imports(planned, plan, tmp_path):
    again = plan_of(planned, tmp_path)
    assert (again.inputs, again.trainer) == (tuple(_moved(one, tmp_path) for one in plan.inputs), plan.trainer)
    with tarfile.open(tmp_path / "source.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"train.py", "plan.json", "shipyard/finetune.py", "models/search.py", "models/config.py"} <= names
    assert not [name for name in names if name.endswith(".toml") or "release" in name or "cli" in name]
    assert [one.name for one in plan.inputs] == ["data", "base", "code"]


def _moved(one, folder):
    return replace(one, folder=folder) if one.name == "code" else one


def test_the_key_of_a_plan_changes_with_what_it_trains(planned, plan, tmp_path):
    line, stage = planned
    other = make_plan(line.fleet, "dev", line, replace(stage, config={**stage.config, "seed": 8}), tmp_path)
    assert other.name != plan.name
    assert other.trainer["checkpoint_config"] != plan.trainer["checkpoint_config"]
    assert other.trainer["channels"] == plan.trainer["channels"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ((TRAINING, ""), "env.dev: trains nothing"),
        ((f", {PLACE}", ""), "env.dev.training.place: missing"),
        (("ml.c7i.4xlarge", "ml.g5.xlarge"), "env.dev.training.instance_type: not allowed; value: 'ml.g5.xlarge'"),
        (
            (f", {PLACE}", f", max_hours = 30, {PLACE}"),
            "max_wait_hours: not allowed; value: 24; allowed: max_hours or more",
        ),
        (("shipyard/train@sha256:", "shipyard/train:latest#"), "env.dev.training.image: not allowed"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_is_sent(planned, shop, tmp_path, change, told):
    path = tmp_path / "fleet.toml"
    path.write_text(shop.read_text().replace(*change).replace('folder = "shop"', f'folder = "{shop.parent}/shop"'))
    line, stage = planned
    with pytest.raises(ShipyardError) as fault:
        make_plan(load_fleet(path), "dev", line, stage, tmp_path)
    assert told in str(fault.value)


def test_an_environment_that_is_not_there_is_told(planned, tmp_path):
    line, stage = planned
    with pytest.raises(ShipyardError, match="--env: no such environment"):
        make_plan(line.fleet, "nowhere", line, stage, tmp_path)


# --- the whole way -----------------------------------------------------------------------------------------------------


def test_a_job_that_is_interrupted_goes_on_and_its_record_is_as_if_made_here(aws, plan, planned, tmp_path):
    """The program of the archive runs as a process, is killed in its second phase, and finds its first one again."""
    aws.interrupt_at = "train joint"
    lines, progress = [], []
    build = tmp_path / "build"
    record = train(
        plan, build, lambda: start_plainly(plan), lines.append, lambda *told: progress.append(told), interval=0.1
    )
    [name] = aws.jobs
    assert any("was interrupted" in line for line in lines)
    assert any(what.startswith("train joint") for what, _, _ in progress)
    phases = [json.loads(line)["what"].partition(",")[0] for line in aws.lines[name] if '"progress"' in line]
    first, again = phases[: phases.index("train joint") + 1], phases[phases.index("train joint") + 1 :]
    assert "train tower" in first and "encode" in first
    assert "train joint" in again and not {"train tower", "encode"} & set(again)

    # the line finds it, and a release would skip fine-tuning
    assert record.folder == build / "joint" / "finetune"
    found = plan.stage.find(build)
    assert found is not None and found.said == record.said
    document = json.loads((record.folder / "stage.json").read_text())
    assert document["made"]["job"] == name and document["made"]["libraries"]["torch"].startswith("2.")
    assert not [path for path in record.folder.rglob("*") if path.suffix not in (".json", ".safetensors")]
    # once more: nothing is sent, nothing started
    before = len(aws.calls)
    again = train(plan, build, lambda: pytest.fail("started"), lines.append, lambda *_: None, interval=0.1)
    assert (again.digest, [call for call, _ in aws.calls[before:] if call.startswith("Create")]) == (record.digest, [])


def test_what_does_not_fit_on_the_machine_is_an_error_in_its_log(plan, tmp_path):
    """Another code or library, a channel with more, less or other content than was sent."""
    with tarfile.open(plan.inputs[-1].folder / "source.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    told = json.loads((tmp_path / "plan.json").read_text())
    channels = {one.name: tmp_path / one.name for one in plan.inputs[:-1]}
    for one in plan.inputs[:-1]:
        channels[one.name].mkdir()
        for file in one.files:
            (channels[one.name] / file["path"]).symlink_to(one.folder / file["path"])

    def refusal(**changes):
        with pytest.raises(ShipyardError) as fault:
            entry.train(told | changes, channels, tmp_path / "checkpoints", tmp_path / "model")
        return str(fault.value)

    assert "library torch: another than where the job was planned" in refusal(
        libraries=told["libraries"] | {"torch": "2.0.0"}
    )
    # another build of the same version is the same library
    assert "torch" not in refusal(
        libraries=told["libraries"] | {"torch": "2.13.0+cu130"}, code=told["code"] | {"shipyard.tower": "0"}
    )
    assert "code shipyard.tower: another than where" in refusal(code=told["code"] | {"shipyard.tower": "0"})
    (channels["data"] / "more.parquet").touch()
    assert "channel data: more.parquet was not sent" in refusal()
    (channels["data"] / "more.parquet").unlink()
    items = channels["data"] / "items.parquet"
    other = items.read_bytes()[:-1] + b"?"
    items.unlink()
    items.write_bytes(other)
    assert "channel data: items.parquet: not what was sent" in refusal()
    items.unlink()
    assert "channel data: items.parquet is missing" in refusal()


# --- following ---------------------------------------------------------------------------------------------------------

DONE = json.dumps({"shipyard": "done", "sha256": "a" * 64})


@pytest.mark.parametrize(
    ("ended", "lines", "told"),
    [
        (
            {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": "AlgorithmError: exit code 1"},
            ["Traceback (most recent call last):", "error: channel data: items.parquet is missing", "x.ChildFailedError: "],
            "failed; value: 'error: channel data: items.parquet is missing / AlgorithmError: exit code 1'",
        ),
        (
            {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed"},
            ["RuntimeError: no memory", "torch.distributed.elastic.ChildFailedError: "],
            "failed; value: 'RuntimeError: no memory / no reason is told'",
        ),
        (
            {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": "ResourceLimitExceeded: 0 of 1"},
            [],
            "mend: ask Service Quotas",
        ),
        ({"TrainingJobStatus": "Stopped", "SecondaryStatus": "MaxRuntimeExceeded"}, [], "raise training.max_hours"),
        ({"TrainingJobStatus": "Stopped", "SecondaryStatus": "MaxWaitTimeExceeded"}, [], "for spot capacity"),
        ({"TrainingJobStatus": "Stopped", "SecondaryStatus": "Stopped"}, [DONE], "was stopped by somebody"),
        ({"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed"}, [DONE], "complete, and has no output"),
        (
            {
                "TrainingJobStatus": "Completed", "SecondaryStatus": "Completed",
                "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/training/jobs/job/output/model.tar.gz"},
            },
            ["words"],
            "its log does not tell what it wrote",
        ),
    ],
)  # fmt: skip
def test_every_end_but_a_good_one_is_an_error_with_its_reason(aws, ended, lines, told):
    aws.jobs["job"] = {
        "TrainingJobName": "job", "TrainingJobArn": "arn:aws:sagemaker:us-east-1:111111111111:training-job/job",
        "CreationTime": 1.0, "StoppingCondition": {}, **ended,
    }  # fmt: skip
    aws.lines["job"] = lines
    follower = Follower(
        boto3.client("sagemaker"), boto3.client("logs"), say=lambda _: None, report=lambda *_: None, interval=0.01, late=0.05
    )  # fmt: skip
    with pytest.raises(ShipyardError) as fault:
        follower.follow("job")
    assert told in str(fault.value)


def test_rights_that_are_missing_are_told_with_what_gives_them(aws, plan, tmp_path):
    aws.faults["ListTrainingJobs"] = Refused(
        "AccessDeniedException", 400, "not authorized to sagemaker:ListTrainingJobs"
    )
    with pytest.raises(ShipyardError, match="ListTrainingJobs; mend: attach the managed policy of the stack training"):
        train(plan, tmp_path, lambda: pytest.fail("started"), lambda _: None, lambda *_: None)


# --- what is brought back ----------------------------------------------------------------------------------------------


def output(content, **changes):
    """Return an archive of a stage's folder and the digest of its record as a job's log would tell it."""
    digests = {name: sha256_bytes(body) for name, body in content.items()}
    document = {"key": "k" * 64, "files": digests, "digest": digest(digests), "said": {"seed": 7}} | changes
    text = json.dumps(document).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, body in {**content, "stage.json": text}.items():
            add(archive, name, body)
    return packed.getvalue(), sha256_bytes(text)


def sha256_bytes(content):
    return hashlib.sha256(content).hexdigest()


def add(archive, name, content, **more):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in more.items():
        setattr(entry, key, value)
    archive.addfile(entry, io.BytesIO(content))


def with_more(packed, name, **more):
    """Return an archive with one member more."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(packed)) as old, tarfile.open(fileobj=plain, mode="w:gz") as new:
        for entry in old:
            new.addfile(entry, old.extractfile(entry))
        add(new, name, b"" if more else b"content", **more)
    return plain.getvalue()


GOOD, TOLD = output({"joint.safetensors": b"weights", "tower.json": b"{}"})
OTHER, _ = output({"joint.safetensors": b"Weights", "tower.json": b"{}"})
URI = "s3://bucket/training/jobs/job/output/model.tar.gz"


def brought(tmp_path, packed, sha256=TOLD, uri=URI, key="k" * 64):
    """Bring an output back from a folder that stands for the bucket."""
    stage = Stage("finetune", "joint", (), {}, (), lambda out: {})
    stage.__dict__["key"] = key
    plan = Plan(stage, "us-east-1", "111111111111", "bucket", KEY, "job", (), {})
    store = tmp_path / "store"
    path = store / uri.removeprefix("s3://bucket/")
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed is not None:
        path.write_bytes(packed)
    folder = tmp_path / "folder"
    bring(plan, Ended("job", uri, sha256), open_store(str(store)), folder)
    return folder


def test_a_good_output_is_the_folder_of_the_stage(tmp_path):
    folder = brought(tmp_path, GOOD)
    assert {path.name for path in folder.iterdir()} == {"joint.safetensors", "tower.json", "stage.json"}
    assert json.loads((folder / "stage.json").read_text())["made"] == {"on": "sagemaker", "job": "job"}
    assert sha256_file(folder / "joint.safetensors") == sha256_bytes(b"weights")


FORGED, FORGED_TOLD = output({"joint.safetensors": b"weights"}, key="f" * 64)
SHORT, SHORT_TOLD = output({"joint.safetensors": b"weights"}, digest="0" * 64)
LYING, LYING_TOLD = output({"joint.safetensors": b"weights"}, files={"joint.safetensors": "0" * 64})
LACKING, LACKING_TOLD = output({}, files={"joint.safetensors": "0" * 64})


@pytest.mark.parametrize(
    ("packed", "more", "told"),
    [
        (None, {}, "missing"),
        (GOOD[:100], {}, "is no whole archive"),
        (b"no archive", {}, "is no whole archive"),
        (OTHER, {}, "stage.json is not what its log tells"),
        (GOOD, {"sha256": "0" * 64}, "stage.json is not what its log tells"),
        (GOOD, {"uri": URI.replace("job/", "other/")}, "lies elsewhere"),
        (FORGED, {"sha256": FORGED_TOLD}, "is of another plan"),
        (LYING, {"sha256": LYING_TOLD}, "joint.safetensors is not what its record tells"),
        (LACKING, {"sha256": LACKING_TOLD}, "has other files than its record tells"),
        (SHORT, {"sha256": SHORT_TOLD}, "has another digest than its files"),
        (with_more(GOOD, "../outside.json"), {}, "holds what no stage writes; value: '../outside.json'"),
        (with_more(GOOD, "/outside.json"), {}, "holds what no stage writes; value: '/outside.json'"),
        (with_more(GOOD, "weights.pt"), {}, "holds what no stage writes; value: 'weights.pt'"),
        (with_more(GOOD, "run.pkl"), {}, "holds what no stage writes; value: 'run.pkl'"),
        (with_more(GOOD, "l.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), {}, "holds what no stage writes"),
        (with_more(GOOD, "h.json", type=tarfile.LNKTYPE, linkname="../x"), {}, "holds what no stage writes"),
        (with_more(GOOD, "d.json", type=tarfile.CHRTYPE), {}, "holds what no stage writes"),
        (with_more(GOOD, "more.json"), {}, "has other files than its record tells; value: 'more.json'"),
    ],
    # an archive tells the second it was packed, and a test is called the same in every process
    ids=lambda value: "archive" if isinstance(value, bytes) else None,
)
def test_an_output_that_is_not_what_the_job_wrote_is_refused(tmp_path, packed, more, told):
    with pytest.raises(ShipyardError) as fault:
        brought(tmp_path, packed, **more)
    assert told in str(fault.value)
    assert not list(tmp_path.glob("outside*"))


def test_no_line_of_ours_reads_pickle_and_the_sdk_is_imported_by_one_file_alone():
    from test_layout import SOURCES, imported

    importers = [
        path.relative_to(ROOT).as_posix()
        for folder in SOURCES.values()
        for path in sorted(folder.rglob("*.py"))
        if any(name.split(".")[0] == "sagemaker" for name in imported(path))
    ]
    assert importers == ["packaging/shipyard/remote/trainer.py"]
    for path in (ROOT / "packaging/shipyard/remote").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "torch", "joblib"}


# --- with the SDK ------------------------------------------------------------------------------------------------------


@needs_sdk
def test_a_dry_run_shows_the_request_that_is_wanted_and_calls_nothing(plan, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0.01)
        nowhere = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name in ("AWS_ENDPOINT_URL", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(name, nowhere)
        monkeypatch.setenv("HOME", str(tmp_path))
        shown = show(plan, SDK)
        with pytest.raises(TimeoutError):
            silent.accept()
    request = shown["CreateTrainingJob"]
    job = request["TrainingJobName"]
    assert job.startswith(f"{plan.name}-")
    [drivers] = [c for c in request["InputDataConfig"] if c["ChannelName"] == "sm_drivers"]
    assert drivers["DataSource"]["S3DataSource"]["S3Uri"] == (
        f"s3://{plan.bucket}/training/jobs/{plan.name}/{job}/input/sm_drivers"
    )
    request["InputDataConfig"].remove(drivers)
    assert request == request_of(plan, job)
    assert {one["to"] for one in shown["inputs"]} == {
        f"s3://{plan.bucket}/{one.key}{file['path']}" for one in plan.inputs for file in one.files
    }
    assert shown["drivers"] >= 10


@needs_sdk
def test_the_command_line_shows_the_request_too(shop):
    (shop.parent / ".venv-sagemaker").symlink_to(ROOT / ".venv-sagemaker")
    arguments = ("finetune", "--fleet", shop, "--profile", "tiny", "--on", "sagemaker", "--env", "dev", "--dry-run")
    done = shipyard(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["CreateTrainingJob"]["EnableManagedSpotTraining"] is True


@needs_sdk
@pytest.mark.parametrize(
    ("code", "message", "told"),
    [
        ("ResourceLimitExceeded", "The account-level service limit 'ml.c7i.4xlarge' is 0", "ask Service Quotas"),
        ("AccessDeniedException", "not authorized to perform: iam:PassRole", "attach the managed policy"),
        ("ValidationException", "Could not assume role", "correct the training table"),
    ],
)
def test_a_refusal_of_the_start_is_one_line_with_its_mend(aws, plan, code, message, told):
    aws.faults["CreateTrainingJob"] = Refused(code, 400, message)
    with pytest.raises(ShipyardError) as fault:
        start(plan, SDK)
    assert f"{code}: {message}" in str(fault.value) and told in str(fault.value)


@needs_sdk
def test_the_sdk_starts_the_job_that_the_dry_run_shows(aws, plan, monkeypatch):
    monkeypatch.setattr(aws, "_run", lambda name: None)
    name = start(plan, SDK)
    [given] = [given for call, given in aws.calls if call == "CreateTrainingJob"]
    given["InputDataConfig"] = [c for c in given["InputDataConfig"] if c["ChannelName"] != "sm_drivers"]
    assert given == request_of(plan, name)
    drivers = f"training/jobs/{plan.name}/{name}/input/sm_drivers/"
    keys = [found["Key"] for found in aws.s3.list_objects_v2(Bucket=plan.bucket, Prefix=drivers)["Contents"]]
    script = aws.s3.get_object(Bucket=plan.bucket, Key=f"{drivers}sm_train.sh")["Body"].read().decode()
    assert f"{drivers}distributed_drivers/torchrun_driver.py" in keys
    assert "tar -xzf source.tar.gz" in script and "Running Torchrun Driver" in script


def test_without_the_sdk_the_verb_tells_how_to_get_it(plan, tmp_path):
    with pytest.raises(ShipyardError, match="No such file or directory; mend: make setup-sagemaker"):
        start(plan, tmp_path / "python")
    with pytest.raises(ShipyardError, match="No module named 'sagemaker'; mend: make setup-sagemaker"):
        start(plan, Path(sys.executable))
