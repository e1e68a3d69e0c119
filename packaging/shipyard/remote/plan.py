"""What a training job is given, as plain data: code, inputs, machine, limits. It is made without a call of AWS.

Everything that a job reads or writes lies in the environment's data bucket below training/. Inputs and code are named by
their content, so that they are sent once; checkpoints are named by the stage's key, so that a job which goes on for one
that was stopped finds them, and one of other settings does not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import Fleet
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from shipyard.archive import write_tar_gz
from shipyard.line import Line
from shipyard.stage import RECORD, Stage, closure, digest

ROOT = "training/"
JOBS = f"{ROOT}jobs/"
CHECKPOINTS = "/opt/ml/checkpoints"
ENTRY = "train.py"
PLAN = "plan.json"
SOURCE = "source.tar.gz"

STARTER = f'''"""Start a stage of Shipyard inside a training job."""

import sys
from pathlib import Path

from shipyard.remote.entry import main

sys.exit(main(Path(__file__).with_name("{PLAN}")))
'''


@dataclass(frozen=True)
class Input:
    """A folder that is sent: `key` in the bucket, ending in "/", and `files` as path, sha256 and bytes."""

    name: str
    folder: Path
    key: str
    files: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """A training job of one stage: where it runs, what is sent, and `trainer`, what SageMaker's SDK is told."""

    stage: Stage
    region: str
    account: str
    bucket: str
    key: str
    name: str
    inputs: tuple[Input, ...]
    trainer: Mapping[str, Any]


def make_plan(fleet: Fleet, env_name: str, line: Line, stage: Stage, work: Path) -> Plan:
    """Return the plan of fine-tuning; what is sent of it and is not there yet is written into `work`.

    Raises:
        ShipyardError: the environment has no training table, or does not say yet where jobs run.
    """
    settings = _settings(fleet, env_name)
    env, place = fleet.env[env_name], settings.place
    if place is None:
        raise ShipyardError(
            f"env.{env_name}.training.place: missing",
            allowed="{ subnets = [...], security_groups = [...], key = ARN }",
            mend=f"deploy {env_name}/training and copy its outputs (docs/training.md)",
        )
    base = [path for path in sorted(line.base.iterdir()) if path.suffix in (".safetensors", ".json", ".txt")]
    [past] = stage.inputs
    channels = (
        _input("data", past.folder, read_json(past.folder / RECORD)["files"]),
        _input("base", line.base, {path.name: sha256_file(path) for path in base}),
    )
    source = _source(line, stage, channels, work)
    prefix = f"{fleet.project.name}-{env_name.replace('_', '-')}"
    name = f"{prefix}-{stage.name}-{stage.key[:12]}"
    bucket = fleet.data_bucket(env_name)
    hours = {"max_runtime_in_seconds": settings.max_hours * 3600}
    if settings.spot:
        hours["max_wait_time_in_seconds"] = settings.max_wait_hours * 3600
    trainer = {
        "region": env.region,
        "staging": {"bucket": bucket, "prefix": JOBS.rstrip("/")},
        "base_job_name": name,
        "role": fleet.training_role(env_name),
        "training_image": f"{env.account}.dkr.ecr.{env.region}.amazonaws.com/{settings.image}",
        "source_code": {"source_dir": f"s3://{bucket}/{source.key}{SOURCE}", "entry_script": ENTRY},
        # the joint model trains in one process; PyTorch takes every core of the machine
        "distributed": {"process_count_per_node": 1},
        "compute": {
            "instance_type": settings.instance_type,
            "instance_count": 1,
            "volume_size_in_gb": settings.disk_gib,
            "volume_kms_key_id": place.key,
            "enable_managed_spot_training": settings.spot,
        },
        "networking": {
            "subnets": list(place.subnets),
            "security_group_ids": list(place.security_groups),
            "enable_network_isolation": True,
        },
        "stopping_condition": hours,
        "output_data_config": {"s3_output_path": f"s3://{bucket}/{JOBS.rstrip('/')}", "kms_key_id": place.key},
        "checkpoint_config": {
            "s3_uri": f"s3://{bucket}/{ROOT}checkpoints/{stage.key}/", "local_path": CHECKPOINTS,
        },
        "environment": {"SHIPYARD_CHECKPOINTS": CHECKPOINTS, "TOKENIZERS_PARALLELISM": "false"},
        "tags": {
            "project": fleet.project.name, "environment": env_name, "stage": stage.name, "profile": line.profile_name,
            "key": stage.key,
        },
        "channels": {one.name: f"s3://{bucket}/{one.key}" for one in channels},
    }  # fmt: skip
    return Plan(stage, env.region, env.account, bucket, place.key, name, (*channels, source), trainer)


def _settings(fleet: Fleet, env_name: str) -> Any:
    if env_name not in fleet.env:
        raise ShipyardError("--env: no such environment", value=env_name, allowed=", ".join(fleet.env))
    settings = fleet.env[env_name].training
    if settings is None:
        raise ShipyardError(
            f"env.{env_name}: trains nothing", allowed="a table training with image and instance_type",
            mend="add it to fleet.toml (docs/training.md)",
        )  # fmt: skip
    return settings


def _input(name: str, folder: Path, files: Mapping[str, str]) -> Input:
    told = tuple(
        {"path": path, "sha256": sha256, "bytes": (folder / path).stat().st_size}
        for path, sha256 in sorted(files.items())
    )
    return Input(name, folder, f"{ROOT}{name}/{digest(dict(files))}/", told)


def _source(line: Line, stage: Stage, channels: Sequence[Input], work: Path) -> Input:
    """Pack the code of the stage and what it is to be run with; the same stage gives the same bytes."""
    tree = work / "source"
    sources, libraries = closure(stage.modules)
    carried, _ = closure((*stage.modules, "shipyard.remote.entry"), settings=True)
    for module, path in carried.items():
        target = tree / Path(*module.split("."))
        target = target / "__init__.py" if path.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tree / ENTRY).write_text(STARTER, encoding="utf-8")
    plan = {
        "stage": {"name": stage.name, "unit": stage.unit, "modules": stage.modules, "config": dict(stage.config)},
        "inputs": [record.digest for record in stage.inputs],
        "key": stage.key,
        "code": {module: sha256_file(path) for module, path in sources.items()},
        "libraries": libraries,
        "finetune": json.loads(line.fleet.finetune.model_dump_json()),
        "profile": json.loads(line.profile.model_dump_json()),
        "channels": {one.name: {file["path"]: file["sha256"] for file in one.files} for one in channels},
    }
    (tree / PLAN).write_text(json.dumps(plan, indent=1, sort_keys=True), encoding="utf-8")
    write_tar_gz(tree, work / SOURCE)
    return _input("code", work, {SOURCE: sha256_file(work / SOURCE)})
