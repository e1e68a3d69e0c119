"""The real CDK CLI: synth without credentials, without network, and twice the same to the byte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import load_fleet
from tests.test_infra import STACKS, write_release

ROOT = Path(__file__).resolve().parents[1]
CDK = ROOT / "node_modules" / ".bin" / "cdk"
NODE = shutil.which("node")
UNSHARE = ["unshare", "-rn"]

pytestmark = pytest.mark.skipif(not CDK.exists() or NODE is None, reason="needs the CDK CLI: make setup")


def can_unshare():
    return (
        shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a command in an environment of nothing but a path, a home that begins empty, and what quiets CDK."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "PATH": f"{Path(NODE).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "CDK_VALIDATION": "false",
        "JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20",
    }

    def run(command):
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture(scope="module")
def synth(run):
    """Synthesize into a folder and return it."""

    def synth(out, *options, prefix=()):
        result = run([*prefix, str(CDK), "synth", "-q", "-o", str(out), *options])
        assert result.returncode == 0, result.stderr
        return out

    return synth


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release") / "sample")


@pytest.fixture(scope="module")
def first(tmp_path_factory, synth, release):
    return synth(tmp_path_factory.mktemp("first"), "-c", f"release={release}")


@pytest.fixture(scope="module")
def isolated():
    """The command prefix that takes the network away."""
    if not can_unshare():
        pytest.skip("this machine does not allow network namespaces (unshare -rn)")
    return UNSHARE


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_environment_has_all_stacks(first):
    fleet = load_fleet(ROOT / "fleet.toml")
    for name, env in fleet.env.items():
        manifest = json.loads((first / f"assembly-{name}" / "manifest.json").read_text())
        stacks = [a for a in manifest["artifacts"].values() if a["type"] == "aws:cloudformation:stack"]
        names = {stack["properties"]["stackName"] for stack in stacks}
        made = {*STACKS, *(table for table in ("link", "observe", "delivery") if getattr(env, table) is not None)}
        assert names == {f"{fleet.project.name}-{name}-{stack}" for stack in made}
        assert {stack["environment"] for stack in stacks} == {f"aws://{env.account}/{env.region}"}


def test_synth_asks_aws_for_nothing(first):
    for manifest in first.rglob("manifest.json"):
        assert "missing" not in json.loads(manifest.read_text())


def test_two_synths_are_equal_to_the_byte(tmp_path, synth, first, release):
    second = synth(tmp_path, "-c", f"release={release}")
    assert tree(second) == tree(first)


def test_synth_needs_no_network(tmp_path, synth, first, release, isolated):
    alone = synth(tmp_path, "-c", f"release={release}", prefix=isolated)
    assert tree(alone) == tree(first)


def test_context_restricts_the_environments(tmp_path, synth, release):
    fleet = load_fleet(ROOT / "fleet.toml")
    name = next(iter(fleet.env))
    out = synth(tmp_path, "-c", f"release={release}", "-c", f"env={name}")
    assert [path.name for path in out.glob("assembly-*")] == [f"assembly-{name}"]


def test_error_is_one_line(tmp_path, run):
    result = run([str(CDK), "synth", "-q", "-o", str(tmp_path), "-c", "release=none.json"])
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no such release" in errors[0]
    assert "Traceback" not in result.stderr


def test_app_imports_neither_torch_nor_boto3(run):
    code = "import json, sys, app; print(json.dumps(sorted(sys.modules)))"
    result = run([sys.executable, "-c", code])
    modules = set(json.loads(result.stdout))
    assert {"app", "infra.gpu", "models.release"} <= modules
    assert not {"torch", "boto3", "botocore", "numpy", "onnxruntime", "shipyard", "shipyard.cli"} & modules


@pytest.mark.skipif(not list((ROOT / "releases").glob("*.json")), reason="no release is published yet")
def test_committed_releases_synthesize(tmp_path, synth):
    assert list(synth(tmp_path).rglob("*.template.json"))
