"""The tables of an environment in fleet.toml: how each place is sized, updated, linked and watched."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from models.settings import Name, Settings

# EventBridge Scheduler user guide, "Cron-based schedules": minute, hour, day of month, month, day of week, year
Cron = Annotated[
    str,
    Field(pattern=r"^cron\(\S+ \S+ \S+ \S+ \S+ \S+\)$", description="cron(minute hour day month weekday year), in UTC"),
]
GpuType = Annotated[
    str,
    Field(
        pattern=r"^ml\.(g4dn|g5|g6|g6e)\.[0-9]*xlarge$",
        description="a type of ml.g4dn, ml.g5, ml.g6 or ml.g6e, as ml.g5.xlarge",
    ),
]
GravitonType = Annotated[
    str,
    Field(
        pattern=r"^(c7g|c8g|m7g|m8g)\.([0-9]*x)?large$",
        description="a Graviton type of c7g, c8g, m7g or m8g, as c8g.xlarge",
    ),
]
Image = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9/_.-]{0,254}@sha256:[0-9a-f]{64}$", description="repository@sha256: and 64 hex digits"
    ),
]
TrainingType = Annotated[
    str,
    Field(
        pattern=r"^ml\.(c5|c6i|c7i|m5|m6i|m7i|r5|r7i)\.[0-9]*xlarge$",
        description="a type without GPU of ml.c5, c6i, c7i, m5, m6i, m7i, r5 or r7i, as ml.c7i.4xlarge",
    ),
]
KeyArn = Annotated[
    str, Field(pattern=r"^arn:aws:kms:[a-z0-9-]+:\d{12}:key/[0-9a-f-]{36}$", description="the ARN of a KMS key")
]
Network = Annotated[str, Field(pattern=r"^\d{1,3}(\.\d{1,3}){3}/\d{1,2}$", description="a network, as 192.168.0.0/16")]
Region = Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$", description="a region, as us-east-1")]
CpuUnits = Literal[256, 512, 1024, 2048, 4096, 8192, 16384]
Memory = Annotated[int, Field(ge=512, le=122880)]


class Hours(Settings):
    """Say when people work with an environment that is not production; in the hours between it shrinks.

    `start` and `end` are hours of the day in `timezone`, `days` is a range of cron. Outside of them the cluster runs no
    task and an endpoint one instance, for SageMaker has no endpoint without.
    """

    start: Annotated[int, Field(ge=0, le=23)]
    end: Annotated[int, Field(ge=0, le=23)]
    days: Annotated[str, Field(pattern=r"^[A-Z]{3}(-[A-Z]{3})?$", description="MON-FRI or one day")] = "MON-FRI"
    timezone: Annotated[str, Field(pattern=r"^[A-Za-z_]+(/[A-Za-z_-]+)*$", description="as Europe/Berlin")] = "UTC"


class GpuSettings(Settings):
    """Size the public SageMaker endpoint.

    It scales from `instances` to `max_instances` so that each has `concurrency` requests at a time; without
    `max_instances` it does not scale. `fallback` are types that are taken, in this order, where `instance_type` is not to
    be had. `update` is how a new model comes in: both fleets side by side and the traffic moved in two steps or in
    several (which takes a quota of twice the instances), or instance by instance. `capture_percent` of requests and
    answers are kept for 30 days. `shadow` is the version of a release whose model gets a copy of the requests; its
    answers go nowhere but into metrics and the capture.
    """

    instance_type: GpuType
    instances: Annotated[int, Field(ge=1, le=100)] = 1
    max_instances: Annotated[int | None, Field(ge=1, le=100)] = None
    concurrency: Annotated[float, Field(gt=0, le=1000)] = 8
    fallback: Annotated[tuple[GpuType, ...], Field(max_length=4)] = ()
    update: Literal["canary", "linear", "rolling"] = "canary"
    capture_percent: Annotated[int, Field(ge=0, le=100)] = 0
    shadow: str | None = None


class Job(Settings):
    """Run a command on the cluster by a schedule: the update of the models, for one.

    It reads the objects of the data bucket whose keys begin with one of `reads`, and writes below those of `writes`.
    """

    at: Cron
    image: Image
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    cpu: CpuUnits
    memory_mib: Memory
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class CpuSettings(Settings):
    """Size the private cluster: each service's `cpu` in units of 1/1024 vCPU, `memory_mib` in MiB, and its tasks.

    A service scales from `tasks` to `max_tasks`, four times as many where that is not given. `image` lies in the
    environment's own account and region; `context` is, instead of it, the folder of an unpacked bundle with its
    Dockerfile, which the CDK builds. Tasks run on Fargate, or on EC2 Graviton machines of `instance_type`. `update` is how a
    new task definition comes in. With `anywhere`, the same tasks also run on each machine of the customer's own that is
    registered with the cluster. `score_at` is when each sub-model that can scores all the households that wait in the data
    bucket.
    """

    cpu: CpuUnits
    memory_mib: Memory
    tasks: Annotated[int, Field(ge=1, le=100)] = 1
    max_tasks: Annotated[int | None, Field(ge=1, le=1000)] = None
    image: Image | None = None
    context: str | None = None
    instance_type: GravitonType | None = None
    update: Literal["canary", "linear", "blue-green", "rolling"] = "canary"
    anywhere: bool = False
    score_at: Cron | None = None
    job: dict[Name, Job] = Field(default_factory=dict)


class GatewaySettings(Settings):
    """Say who enters by the fusion gateway, how often, and how large it is.

    `api` is an HTTPS entry for callers with IAM credentials or with a JWT of `issuer` for `audience`, or none: "private",
    for callers inside the VPC alone.
    """

    api: Literal["iam", "jwt", "private"] = "iam"
    issuer: Annotated[str | None, Field(pattern=r"^https://\S+$", description="an https:// address")] = None
    audience: tuple[str, ...] = ()
    requests_per_second: Annotated[int, Field(ge=1, le=10000)] = 100
    burst: Annotated[int, Field(ge=1, le=10000)] = 200
    waf: bool = False
    cpu: CpuUnits = 1024
    memory_mib: Memory = 2048
    tasks: Annotated[int, Field(ge=1, le=100)] = 2


class Vpc(Settings):
    """Name an existing VPC: one subnet a zone of the environment, in the same order, and their route tables.

    `endpoints` are the services, as "logs" or "ecr.api", that have an interface endpoint with private DNS there, or "s3"
    for the gateway endpoint; those that are missing are made. The environment's `cidr` is that of the VPC.
    """

    id: Annotated[str, Field(pattern=r"^vpc-[0-9a-f]{8,17}$", description="vpc- and hex digits")]
    subnets: tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]{8,17}$")], ...]
    route_tables: tuple[Annotated[str, Field(pattern=r"^rtb-[0-9a-f]{8,17}$")], ...]
    endpoints: tuple[str, ...] = ()


class LinkSettings(Settings):
    """Connect the VPC with the customer's own `networks`: a VPN to `peer`, or a Direct Connect gateway.

    Names below `domain` are asked of the customer's `resolvers`; the customer asks those of the VPC at the
    inbound addresses of the VPC's resolver.
    """

    kind: Literal["vpn", "direct-connect"]
    networks: Annotated[tuple[Network, ...], Field(min_length=1)]
    peer: Annotated[
        str | None,
        Field(pattern=r"^\d{1,3}(\.\d{1,3}){3}$", description="the public IPv4 address of the VPN's other end"),
    ] = None
    asn: Annotated[int, Field(ge=1, le=4294967294)] = 65000
    amazon_asn: Annotated[int, Field(ge=64512, le=4294967294)] = 64512
    domain: Annotated[
        str | None, Field(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)+$", description="a domain, as corp.example.com")
    ] = None
    resolvers: tuple[Annotated[str, Field(pattern=r"^\d{1,3}(\.\d{1,3}){3}$")], ...] = ()


class ObserveSettings(Settings):
    """Say who is told of alarms, what is slow, and what a month may cost.

    At the full `budget_usd` the roles that CloudFormation acts with lose the right to create or scale what costs most: by
    itself where `budget_stops` is "automatic", once somebody has approved where it is "manual".
    """

    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="a mail address")]
    budget_usd: Annotated[int, Field(ge=1)]
    budget_stops: Literal["automatic", "manual"] = "manual"
    p99_ms: Annotated[int, Field(ge=1)] = 500


class PipelineSettings(Settings):
    """Let AWS CodePipeline walk a release from this environment through all that take releases from it.

    `connection` leads to the repository of `delivery`, whose `branch` is released with the `profile`. `signing_key` signs
    releases and promotions, `approving_key` approvals: keys of AWS KMS, whose policies name the roles that may sign.
    """

    connection: Annotated[
        str,
        Field(
            pattern=r"^arn:aws:codeconnections:[a-z0-9-]+:\d{12}:connection/[0-9a-f-]{36}$",
            description="the ARN of a connection of AWS CodeConnections",
        ),
    ]
    signing_key: KeyArn
    approving_key: KeyArn
    branch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,100}$", description="a branch")] = "main"
    profile: Name = "full"


class DeliverySettings(Settings):
    """Name the GitHub repository whose workflows release, plan and deploy, and where releases are promoted from.

    A workflow deploys from the GitHub environment that has the name of the environment here; `promote_from` is an
    environment whose bucket this one's release role may read. With `pipeline`, CodePipeline does it here.
    """

    repository: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$", description="owner/name of a GitHub repository")
    ]
    promote_from: Name | None = None
    pipeline: PipelineSettings | None = None


class TrainingPlace(Settings):
    """Name where training jobs run: what the outputs of the training stack tell, or what is there already.

    `key` encrypts the disk, what a job writes and what is uploaded for it.
    """

    subnets: Annotated[
        tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]{8,17}$")], ...], Field(min_length=1, max_length=16)
    ]
    security_groups: Annotated[
        tuple[Annotated[str, Field(pattern=r"^sg-[0-9a-f]{8,17}$")], ...], Field(min_length=1, max_length=5)
    ]
    key: KeyArn


class TrainingSettings(Settings):
    """Let `shipyard finetune --on sagemaker` train here.

    `image` lies in the environment's own account and region. With `spot`, a job may wait and be interrupted for
    `max_wait_hours` in all, of which it runs `max_hours`. `role` is an ARN that jobs run as, instead of that which the
    training stack makes. `place` is known once that stack is there.
    """

    image: Image
    instance_type: TrainingType
    spot: bool = True
    max_hours: Annotated[int, Field(ge=1, le=120)] = 6
    max_wait_hours: Annotated[int, Field(ge=1, le=240, validate_default=True)] = 24
    disk_gib: Annotated[int, Field(ge=10, le=1000)] = 30
    role: Annotated[
        str | None, Field(pattern=r"^arn:aws:iam::\d{12}:role/[\w+=,.@/-]+$", description="the ARN of a role")
    ] = None
    place: TrainingPlace | None = None

    @field_validator("max_wait_hours")
    @classmethod
    def _no_shorter_than_the_run(cls, hours: int, info: ValidationInfo) -> int:
        """Refuse a wait that ends before the run may (SageMaker: MaxWaitTimeInSeconds, MaxRuntimeInSeconds)."""
        if hours < info.data.get("max_hours", 0):
            raise PydanticCustomError("max_wait_hours", "max_hours or more")
        return hours
