"""Settings that do not fit together fail before a synth, with what, the value, what is allowed and the mend."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.checks import GPU_FAMILIES, check, check_release
from infra.network import S3_PREFIX_LISTS
from models.config import (
    CpuSettings,
    DeliverySettings,
    Environment,
    GatewaySettings,
    GpuSettings,
    Hours,
    Job,
    LinkSettings,
    ObserveSettings,
    Vpc,
    load_fleet,
)
from models.release import ShipyardError, sign
from tests.test_infra import IMAGE, ROOT, artifact, fleet_of, recommend, sample, search, synthesize, write_release

OBSERVE = {"email": "alarms@example.com", "budget_usd": 900}
READY = {"production": True, "observe": OBSERVE, "gateway": {"tasks": 2}}
JOB = {"at": "cron(0 2 * * ? *)", "image": IMAGE, "command": ("x",), "cpu": 512, "memory_mib": 1024}
VPC = {"id": "vpc-01234567", "subnets": ("subnet-01234567",), "route_tables": ("rtb-01234567",)}

FAULTS = {
    "instance type that the region has not": (
        {"region": "eu-west-3", "gpu": {"instance_type": "ml.g5.xlarge"}},
        r"env.dev.gpu.instance_type: SageMaker has no such type in eu-west-3; value: 'ml.g5.xlarge'; "
        r"allowed: ml.g4dn, ml.g6; mend: choose",
    ),
    "fallback that the region has not": (
        {"region": "us-west-1", "gpu": {"instance_type": "ml.g4dn.xlarge", "fallback": ("ml.g6.xlarge",)}},
        r"gpu.fallback: SageMaker has no such type in us-west-1; value: 'ml.g6.xlarge'",
    ),
    "fallback to itself": (
        {"gpu": {"fallback": ("ml.g5.xlarge",)}},
        "gpu.fallback: the same type twice; value: 'ml.g5.xlarge'",
    ),
    "most instances below the least": (
        {"gpu": {"instances": 3, "max_instances": 2}},
        "gpu.max_instances: less than instances; value: 2; allowed: 3 or more; mend",
    ),
    "rolling update of one instance": (
        {"gpu": {"instances": 1, "update": "rolling"}},
        "no rolling update of one instance, or beside a shadow; value: 'rolling'; allowed: canary, linear",
    ),
    "no image": ({"cpu": {"image": None}}, "cpu: not one image; allowed: exactly one of image and context; mend"),
    "most tasks below the least": ({"cpu": {"max_tasks": 2}}, "cpu.max_tasks: less than tasks; value: 2; allowed: 3"),
    "size that Fargate has not": (
        {"cpu": {"cpu": 256, "memory_mib": 1536}},
        r"cpu.memory_mib: not a size of Fargate for 256 CPU units; value: 1536; allowed: 512, 1024, 2048 ... 2048",
    ),
    "scoring of a size that Fargate has not, beside services on machines": (
        {"cpu": {"cpu": 256, "memory_mib": 1536, "instance_type": "c8g.large", "score_at": "cron(0 4 * * ? *)"}},
        "cpu.memory_mib: not a size of Fargate for 256 CPU units; value: 1536",
    ),
    "job of a size that Fargate has not": (
        {"cpu": {"job": {"update": JOB | {"memory_mib": 8192}}}},
        "cpu.job.update.memory_mib: not a size of Fargate for 512 CPU units; value: 8192",
    ),
    "token without an issuer": (
        {"gateway": {"api": "jwt"}},
        "gateway: issuer and audience belong to JWT; value: 'jwt'",
    ),
    "subnet for one of two zones": ({"vpc": VPC}, "vpc: not one subnet and one route table a zone; value: '1 and 1'"),
    "copy in the same region": ({"replica": "us-east-1"}, "replica: the environment's own region; value: 'us-east-1'"),
    "VPN to nowhere": ({"link": {"kind": "vpn", "networks": ("10.0.0.0/8",)}}, "link.peer: belongs to a VPN"),
    "names without resolvers": (
        {"link": {"kind": "direct-connect", "networks": ("10.0.0.0/8",), "domain": "corp.example.com"}},
        "domain and resolvers belong together; value: 'corp.example.com'; allowed: both or neither; mend",
    ),
    "promotion from nowhere": (
        {"delivery": {"repository": "owner/shop", "promote_from": "staging"}},
        "delivery.promote_from: no such environment; value: 'staging'",
    ),
    "production without alarms": (
        READY | {"observe": None},
        "env.dev.observe: not for production; allowed: a table observe: production has alarms, and somebody",
    ),
    "production that sleeps": (READY | {"hours": {"start": 7, "end": 19}}, "env.dev.hours: not for production"),
    "production on one instance": (
        READY | {"gpu": {"instances": 1}},
        "gpu.instances: not for production; value: 1; allowed: 2 or more, in two zones; mend",
    ),
    "production on one task": (READY | {"cpu": {"tasks": 1}}, "cpu.tasks: not for production; value: 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_told_before_anything_is_made(fault):
    changes, message = FAULTS[fault]
    with pytest.raises(ShipyardError, match=message) as raised:
        check("dev", fleet_of(**changes))
    assert "mend: " in str(raised.value) and "allowed: " in str(raised.value)


def test_what_is_right_passes():
    check("dev", fleet_of())
    check("dev", fleet_of(**READY))
    check("dev", fleet_of(cpu={"instance_type": "c8g.xlarge", "memory_mib": 1536}))
    check("dev", fleet_of(gateway={"api": "jwt", "issuer": "https://login.example.com", "audience": ("shop",)}))
    fleet = load_fleet(ROOT / "fleet.toml")
    for name in fleet.env:
        check(name, fleet)


def test_one_zone_is_refused():
    with pytest.raises(ValueError, match="at least 2 items"):
        Environment(**fleet_of().env["dev"].model_dump() | {"zones": ("us-east-1a",)})


def test_regions_of_the_network_are_those_whose_types_are_known():
    assert GPU_FAMILIES.keys() == S3_PREFIX_LISTS.keys()


def released(*artifacts):
    key = Ed25519PrivateKey.generate()
    return sign(sample(key, *artifacts), "0.1.0", key)


def test_scoring_wants_a_release_that_can():
    env = fleet_of(cpu={"score_at": "cron(0 3 * * ? *)"}).env["dev"]
    with pytest.raises(ShipyardError, match=r"score_at: no sub-model of the release can score; value: '0.1.0-g"):
        check_release("dev", env, released(search(), recommend()), None)
    able = artifact("intent", "cpu", "image-context", recommend()["template"] | {"score": ["-m", "serve.score"]})
    check_release("dev", env, released(search(), able), None)


def test_shadow_wants_another_model():
    env = fleet_of(gpu={"shadow": "0.1.0-g000000000000"}).env["dev"]
    release = released(search(), recommend())
    with pytest.raises(ShipyardError, match=r"gpu.shadow: has no other model than the release itself"):
        check_release("dev", env, release, released(search()))
    check_release("dev", env, release, released(search("2")))


def test_fault_stops_the_synth(tmp_path):
    (tmp_path / "fleet.toml").write_text(
        (ROOT / "fleet.toml")
        .read_text()
        .replace("instances = 2, max_instances = 6", "instances = 1, max_instances = 6")
    )
    path = write_release(tmp_path / "release")
    with pytest.raises(ShipyardError, match=r"env.prod.gpu.instances: not for production"):
        synthesize(path, fleet=str(tmp_path / "fleet.toml"), env="prod")


# --- docs/environments.md --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Environment, GpuSettings, CpuSettings, GatewaySettings, Job, Vpc, Hours])
def test_every_key_is_told(model):
    page = (ROOT / "docs" / "environments.md").read_text()
    untold = {"account", "region", "zones", "cidr", "release", "gpu", "cpu", "edge", "gateway", "link", "observe"}
    for name in model.model_fields.keys() - untold - {"delivery", "job"}:
        assert f"`{name}`" in page or f"{name} =" in page, name


@pytest.mark.parametrize(
    "table, model", [("link", LinkSettings), ("observe", ObserveSettings), ("delivery", DeliverySettings)]
)
def test_every_key_of_the_stacks_around_is_told(table, model):
    page = (ROOT / "docs" / "environments.md").read_text()
    for name in model.model_fields.keys() - {"peer"}:
        assert f"`{table}.{name}`" in page, name


def test_default_sizes_are_those_of_the_page():
    page = (ROOT / "docs" / "environments.md").read_text()
    gateway, gpu = GatewaySettings(), fleet_of().env["dev"].gpu
    assert f"| {gateway.requests_per_second}, {gateway.burst} |" in page
    assert f"| {gateway.cpu}, {gateway.memory_mib}, {gateway.tasks} |" in page
    assert f"| `concurrency` | {gpu.concurrency:g} |" in page
    assert f"| `observe.p99_ms` | {ObserveSettings(**OBSERVE).p99_ms} |" in page
