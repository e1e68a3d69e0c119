"""fleet.toml: the committed one holds, and each fault is one line with what, the value, what is allowed and a mend."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from models import submodel
from models.config import load_fleet
from serve.errors import ShipyardError

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

TEXT = f"""
[project]
name = "shipyard"
version = "0.1.0"

[data]
source = "completejourney"
valid_from = 2017-10-08
test_from = 2017-11-20

[base]
package = "encoder"
revision = "0.1.0"

[finetune]
method = "lora"
rank = 16

[profile.quick]
households = 0
tower_steps = 120
tower_batch = 64
joint_steps = 600
joint_batch = 128
joint_sampled = 4000
validation_examples = 500
test_examples = 2000
default_gate = {{ over_before = 0.01, over_baseline = -0.05 }}
gate.search = {{ over_baseline = 0 }}

[target.gpu]
precision = "fp16"
max_size_mb = 400

[target.cpu]
precision = "int8"
max_size_mb = 100.5

[submodel.search]
target = "gpu"

[submodel.recommend]
target = "cpu"
weight = 2

[env.dev_1]
account = "111111111111"
region = "us-east-1"
zones = ["us-east-1a", "us-east-1b"]
cidr = "10.10.0.0/16"
release = "0.1.0-g0123456789ab"
gpu = {{ instance_type = "ml.g5.xlarge" }}
cpu = {{ cpu = 1024, memory_mib = 2048, image = "shipyard/recommend@sha256:{"0" * 64}" }}
edge = {{ thing_group = "shipyard-dev", nucleus_version = "2.16.0", token_exchange_version = "2.0.3" }}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def changed(file, old, new):
    assert TEXT.count(old) == 1, f"{old!r} is not once in the sample"
    file.write_text(TEXT.replace(old, new), encoding="utf-8")
    return file


def fault_of(file):
    with pytest.raises(ShipyardError) as fault:
        load_fleet(file)
    said = str(fault.value)
    assert "\n" not in said
    assert said.startswith(str(file))
    return said.removeprefix(f"{file}: ")


# --- what holds ------------------------------------------------------------------------------------------------------


def test_the_committed_fleet_loads():
    fleet = load_fleet(ROOT / "fleet.toml")
    assert {"quick", "small"} <= fleet.profile.keys()
    assert {"dev", "staging", "prod"} <= fleet.env.keys()
    assert {entry.target for entry in fleet.submodel.values()} == {"gpu", "cpu", "edge"}


def test_the_committed_fleet_names_every_sub_model_there_is():
    assert sorted(load_fleet(ROOT / "fleet.toml").submodel) == submodel.names()


def test_a_fleet_is_read_as_it_is_written(file):
    fleet = load_fleet(file)
    assert str(fleet.data.valid_from) == "2017-10-08"
    assert fleet.env["dev_1"].zones == ("us-east-1a", "us-east-1b")
    assert fleet.profile["quick"].gate["search"].over_baseline == 0
    assert fleet.submodel["recommend"].weight == 2
    assert fleet.target["cpu"].max_size_mb == 100.5


def test_what_is_left_out_has_its_default(file):
    fleet = load_fleet(file)
    assert (fleet.finetune.alpha, fleet.finetune.dimension, fleet.finetune.seed) == (32, 128, 7)
    assert fleet.profile["quick"].gate["search"].over_before == 0
    assert (fleet.submodel["search"].weight, fleet.target["gpu"].max_loss) == (1, 0.01)
    assert (fleet.env["dev_1"].gpu.instances, fleet.env["dev_1"].cpu.tasks) == (1, 1)


def test_a_hub_model_at_a_commit_is_a_base(file):
    changed(file, 'package = "encoder"\nrevision = "0.1.0"', f'hub = "owner/name"\nrevision = "{COMMIT}"')
    assert load_fleet(file).base.hub == "owner/name"


def test_the_buckets_name_is_a_label_of_a_host_name(file):
    name = load_fleet(file).bucket("dev_1")
    assert name == "shipyard-dev-1-artifacts-111111111111-us-east-1"
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", name)


def test_every_committed_bucket_has_a_valid_name_of_its_own():
    fleet = load_fleet(ROOT / "fleet.toml")
    names = {fleet.bucket(name) for name in fleet.env}
    assert len(names) == len(fleet.env)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", name) for name in names)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ((), "project"),
        (("project",), "version"),
        (("finetune",), "rank"),
        (("finetune",), "unknown"),
        (("data",), "test_from"),
    ],
)
def test_a_fleet_is_frozen(file, way, name):
    table = load_fleet(file)
    for part in way:
        table = getattr(table, part)
    with pytest.raises(ValidationError, match=r"frozen|extra|attribute"):
        setattr(table, name, 1)


def test_a_fleets_lists_are_frozen(file):
    assert isinstance(load_fleet(file).env["dev_1"].zones, tuple)


# --- faults ----------------------------------------------------------------------------------------------------------

# what is written, what instead of it, what is told in this order
FAULTS = {
    "a misspelt key": ("rank = 16", "rnak = 16", "finetune.rnak: unknown key; allowed: ", 'did you mean "rank"?'),
    "a key of another table": ("rank = 16", "zzzzzz = 16", "finetune.zzzzzz: unknown key; allowed: ", "mend: remove it"),
    "a misspelt table": ("[finetune]", "[finetun]", "finetun: unknown key; allowed: ", 'did you mean "finetune"?'),
    "a misspelt key of a profile": (
        "tower_steps = 120", "tower_step = 120", "profile.quick.tower_step: unknown key; allowed: ",
        'did you mean "tower_steps"?',
    ),
    "a misspelt key of a gate": (
        "default_gate = { over_before", "default_gate = { over_befor",
        "profile.quick.default_gate.over_befor: unknown key; allowed: over_baseline, over_before, over_teacher;",
        'did you mean "over_before"?',
    ),
    "a misspelt key of one sub-model's gate": (
        "gate.search = { over_baseline", "gate.search = { over_basline",
        "profile.quick.gate.search.over_basline: unknown key;", 'did you mean "over_baseline"?',
    ),
    "a misspelt key of an environment": (
        "zones = [", "zone = [", "env.dev_1.zone: unknown key; allowed: ", 'did you mean "zones"?',
    ),
    "a misspelt key of a target's size": (
        "memory_mib", "memory_mb", "env.dev_1.cpu.memory_mb: unknown key; allowed: ", 'did you mean "memory_mib"?',
    ),
    "a misspelt key of an optional table": (
        'edge = { thing_group', 'observe = { email = "a@example.com", budget_used = 9 }\nedge = { thing_group',
        "env.dev_1.observe.budget_used: unknown key; allowed: ", 'did you mean "budget_usd"?',
    ),
    "no mail of an optional table": (
        'edge = { thing_group', 'observe = { email = "nobody" }\nedge = { thing_group',
        "env.dev_1.observe.email: not allowed; value: 'nobody'; allowed: a mail address",
    ),
    "an unknown target": ("[target.cpu]", "[target.tpu]", "target.tpu: not allowed; value: 'tpu'; allowed: ", "'edge'"),
    "a missing key": ('version = "0.1.0"', "", "project.version: missing", "mend: add it"),
    "a missing table": ('[project]\nname = "shipyard"\nversion = "0.1.0"', "", "project: missing", "mend: add it"),
    "a missing gate": (
        "default_gate = { over_before = 0.01, over_baseline = -0.05 }", "", "profile.quick.default_gate: missing",
        "mend: add it",
    ),
    "a string for a number": ("rank = 16", 'rank = "16"', "finetune.rank: not allowed; value: '16'; allowed: ", "integer"),
    "a float for a number": ("rank = 16", "rank = 16.5", "finetune.rank: not allowed; value: 16.5; allowed: ", "integer"),
    "a boolean for a number": ("rank = 16", "rank = true", "finetune.rank: not allowed; value: True; allowed: ", "integer"),
    "a number for a string": (
        'account = "111111111111"', "account = 111111111111",
        "env.dev_1.account: not allowed; value: 111111111111; allowed: ", "string",
    ),
    "a string for a date": (
        "valid_from = 2017-10-08", 'valid_from = "2017-10-08"', "data.valid_from: not allowed; value: '2017-10-08'", "date",
    ),
    "a string for a list": (
        'zones = ["us-east-1a", "us-east-1b"]', 'zones = "us-east-1a"',
        "env.dev_1.zones: not allowed; value: 'us-east-1a'; allowed: ", "tuple",
    ),
    "a number for a table": (
        '[submodel.search]\ntarget = "gpu"', "[submodel]\nsearch = 3", "submodel.search: not allowed; value: 3; allowed: ",
        "SubmodelEntry",
    ),
    "a table for a number": ("rank = 16", "rank = { x = 1 }", "finetune.rank: not allowed; value: ", "(a table)", "integer"),
    "rank 0": ("rank = 16", "rank = 0", "finetune.rank: not allowed; value: 0; allowed: ", "greater than or equal to 1"),
    "a width that is no multiple": (
        "rank = 16", "dimension = 100", "finetune.dimension: not allowed; value: 100; allowed: ", "multiple of 16",
    ),
    "a negative number of households": (
        "households = 0", "households = -1", "profile.quick.households: not allowed; value: -1; allowed: ",
        "greater than or equal to 0",
    ),
    "too few test examples": (
        "test_examples = 2000", "test_examples = 19", "profile.quick.test_examples: not allowed; value: 19; allowed: ", "20",
    ),
    "a size of nothing": (
        "max_size_mb = 400", "max_size_mb = 0", "target.gpu.max_size_mb: not allowed; value: 0; allowed: ",
        "greater than 0",
    ),
    "a weight that is no number": (
        "weight = 2", "weight = nan", "submodel.recommend.weight: not allowed; value: nan; allowed: ", "greater than 0",
    ),
    "an unknown method": (
        'method = "lora"', 'method = "qlora"', "finetune.method: not allowed; value: 'qlora'; allowed: ", "'adalora'",
    ),
    "an unknown precision": (
        'precision = "fp16"', 'precision = "fp8"', "target.gpu.precision: not allowed; value: 'fp8'; allowed: ", "'int8'",
    ),
    "a name in capitals": (
        'name = "shipyard"', 'name = "Shipyard"', "project.name: not allowed; value: 'Shipyard'; allowed: ",
        "1 to 16 of a-z, 0-9 and -",
    ),
    "a sub-model's name with a hyphen": (
        "[submodel.recommend]", "[submodel.re-commend]", "submodel.re-commend: not allowed; value: 're-commend'", "pattern",
    ),
    "a Chinese name": (
        'name = "shipyard"', 'name = "船坞"', "project.name: not allowed; value: '船坞'; allowed: ",
        "1 to 16 of a-z, 0-9 and -",
    ),
    "a version of two numbers": (
        'version = "0.1.0"', 'version = "0.1"', "project.version: not allowed; value: '0.1'; allowed: ",
        "major.minor.patch, as 0.1.0",
    ),
    "an account of eleven digits": (
        '"111111111111"', '"11111111111"', "env.dev_1.account: not allowed; value: '11111111111'; allowed: ",
        "12 digits",
    ),
    "an image by tag": (
        f"recommend@sha256:{'0' * 64}", "recommend:latest",
        "env.dev_1.cpu.image: not allowed; value: 'shipyard/recommend:latest'; allowed: ", "sha256",
    ),
    "an instance without a GPU": (
        "ml.g5.xlarge", "ml.m5.xlarge", "env.dev_1.gpu.instance_type: not allowed; value: 'ml.m5.xlarge'",
        "a type of ml.g4dn, ml.g5, ml.g6 or ml.g6e",
    ),
    "a size that Fargate has not": (
        "cpu = 1024", "cpu = 1000", "env.dev_1.cpu.cpu: not allowed; value: 1000; allowed: ", "1024",
    ),
    "a network that is public": (
        "10.10.0.0/16", "8.8.0.0/16", "env.dev_1.cidr: not allowed; value: '8.8.0.0/16'; allowed: ",
        "10.0.0.0/16 to 10.255.0.0/16",
    ),
    "one zone": (
        '["us-east-1a", "us-east-1b"]', '["us-east-1a"]', "env.dev_1.zones: not allowed; value: ", "at least 2 items",
    ),
    "one zone twice": (
        '["us-east-1a", "us-east-1b"]', '["us-east-1a", "us-east-1a"]', "env.dev_1.zones: ", "mend: ",
    ),
    "a zone of another region": (
        '"us-east-1b"', '"eu-west-1b"', "env.dev_1.zones: not of the region; value: 'eu-west-1b'; allowed: ",
        "zones of us-east-1; mend: ",
    ),
    "a name that makes the bucket's longer than S3 allows": (
        "[env.dev_1]", f"[env.{'a' * 32}]", f"env.{'a' * 32}: ", "63",
    ),
    "a target that is not there": (
        'target = "gpu"', 'target = "edge"', "submodel.search.target: no such target; value: 'edge'; allowed: gpu, cpu",
        "mend: add [target.edge] or choose another",
    ),
    "a gate of no sub-model": (
        "gate.search", "gate.searching", "profile.quick.gate.searching: no such sub-model; allowed: search, recommend",
        "mend: remove the gate or add the sub-model",
    ),
    "a test period before validation": (
        "test_from = 2017-11-20", "test_from = 2017-10-01", "data.test_from: not after valid_from; value: 2017-10-01; "
        "allowed: a date after 2017-10-08", "mend: move one of them",
    ),
    "no validation period": (
        "test_from = 2017-11-20", "test_from = 2017-10-08", "data.test_from: not after valid_from; value: 2017-10-08",
        "mend: move one of them",
    ),
    "an archive of no model repository": (
        "max_size_mb = 100.5", 'max_size_mb = 100.5\narchive = "tar.gz"', "target.cpu.archive: only Triton's model "
        "repository is archived; value: 'tar.gz'; allowed: an archive of target gpu", "mend: remove it",
    ),
    "an archive of another kind": (
        "max_size_mb = 400", 'max_size_mb = 400\narchive = "zip"', "target.gpu.archive: not allowed; value: 'zip'", "tar.gz",
    ),
    "two sources of the base": (
        'package = "encoder"', 'package = "encoder"\nhub = "owner/name"', "base: not one source; allowed: exactly one of "
        "package and hub", "mend: keep one",
    ),
    "no source of the base": (
        'package = "encoder"', "", "base: not one source; allowed: exactly one of package and hub", "mend: keep one",
    ),
    "a branch as revision": (
        'package = "encoder"\nrevision = "0.1.0"', 'hub = "owner/name"\nrevision = "main"',
        "base.revision: not a commit; value: 'main'; allowed: 40 hex digits", "mend: copy the commit",
    ),
    "an empty revision": (
        'revision = "0.1.0"', 'revision = ""', "base.revision: not allowed; value: ''; allowed: ", "at least 1 character",
    ),
    "TOML that is cut off": ("[project]", "[project", "not valid TOML: ", "mend: correct that line"),
    "a key twice": ("rank = 16", "rank = 16\nrank = 17", "not valid TOML: ", "mend: correct that line"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_told_in_one_line_with_its_mend(file, what):
    old, new, *told = FAULTS[what]
    said = fault_of(changed(file, old, new))
    assert said.startswith(told[0])
    assert all(part in said for part in told)
    assert "; mend: " in said


@pytest.mark.parametrize(
    "content",
    [TEXT.encode("utf-16"), TEXT.replace("encoder", "密").encode("gb18030"), b"\xff\xfe\x00", b"a = \x80"],
    ids=["UTF-16", "GB 18030", "bytes", "one byte"],
)
def test_another_encoding_is_told_in_one_line(file, content):
    file.write_bytes(content)
    said = fault_of(file)
    assert said.startswith("not valid TOML: ")
    assert "mend: " in said


def test_an_empty_file_is_told_in_one_line(file):
    file.write_bytes(b"")
    assert fault_of(file).endswith(": missing; mend: add it")


def test_a_missing_file_is_told_in_one_line(tmp_path):
    said = fault_of(tmp_path / "none.toml")
    assert said == "no such file; mend: run in the folder of fleet.toml or give --fleet PATH"


def test_a_value_of_many_lines_is_told_in_one(file):
    said = fault_of(changed(file, 'name = "shipyard"', 'name = """\na\nb\n"""'))
    assert said.startswith("project.name: not allowed; value: ")
