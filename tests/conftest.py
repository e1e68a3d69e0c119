"""What the tests share: one release of the small profile, made once by the command line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before anything imports the CDK: its bundled validator takes seconds, and cfn-lint runs in the tests of stacks
os.environ.setdefault("CDK_VALIDATION", "false")
# on a GPU sums are added up in any order, and some tests want the same bytes twice; `make test-gpu` says otherwise
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# a user's surroundings mostly do not have it, and code that runs out of a bundle must not write into it
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from models.config import Fleet, load_fleet
from models.release import Release, read_release
from serve.trust import Keys, load_keys

ROOT = Path(__file__).resolve().parent.parent

TINY = """
[profile.tiny]
households = 60
tower_steps = 3
tower_batch = 8
joint_steps = 4
joint_batch = 8
joint_sampled = 200
validation_examples = 50
test_examples = 100
strong_baselines = false
default_gate = { over_before = -1.0, over_baseline = -1.0, over_teacher = -1.0 }
"""


@dataclass(frozen=True)
class Made:
    """A release that was made, and where."""

    build: Path
    path: Path
    release: Release
    keys: Keys
    fleet: Fleet
    told: str

    def said(self, unit: str, stage: str) -> Any:
        """Return what a stage noted."""
        return json.loads((self.folder(unit, stage) / "stage.json").read_text())["said"]

    def folder(self, unit: str, stage: str) -> Path:
        """Return a stage's folder."""
        return self.build / self.release.profile / unit / stage

    def bundle(self, unit: str) -> Path:
        """Return the folder of a unit's bundle."""
        return self.folder(unit, "bundle") / "bundle"


def shipyard(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "shipyard.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def make(build: Path, profile: str, *more: object) -> Made:
    """Make a release with a key of its own."""
    done = shipyard(
        "release", "--profile", profile, "--build", build, "--json", *more, XDG_CONFIG_HOME=str(build / "config")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version = json.loads(done.stdout)["version"]
    path = build / "releases" / f"{version}.json"
    keys = load_keys(build / "releases" / "keys")
    return Made(build, path, read_release(path, keys), keys, load_fleet(ROOT / "fleet.toml"), done.stderr)


MADE = re.compile(r"(<!-- made: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def check_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Hold a page's made tables to `tables`, by their names; SHIPYARD_UPDATE_DOCS=1 writes them."""
    text = page.read_text(encoding="utf-8")
    assert {found[2] for found in MADE.finditer(text)} == tables.keys()
    wanted = MADE.sub(lambda found: found[1] + tables[found[2]] + found[3], text)
    if os.environ.get("SHIPYARD_UPDATE_DOCS") == "1":
        page.write_text(wanted, encoding="utf-8")
        text = wanted
    assert text == wanted, f"{page.name}: its tables are others now; if they should be: make docs"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a module's tests on one worker, and those of the small release on the one that made it."""
    from xdist.scheduler import LoadScopeScheduling

    needs = re.compile(r"\bsmall: Made\b|[(,] ?small[,)]")
    modules = {path.name for path in ROOT.glob("tests/test_*.py") if needs.search(path.read_text(encoding="utf-8"))}

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0].rpartition("/")[2]
            return "small" if module in modules else module

    return ByModule(config, log)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a release of the small profile: real data, the real model, all stages, the stacks.

    SHIPYARD_TEST_BUILD names a folder that is kept, so that the next run of the tests skips what has not changed.
    """
    kept = os.environ.get("SHIPYARD_TEST_BUILD")
    return make(Path(kept) if kept else tmp_path_factory.mktemp("build"), "small")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Return the address of a local AWS on loopback."""
    from moto.server import ThreadedMotoServer  # not at the top: most tests do without

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def tiny_fleet(tmp_path: Path) -> Path:
    """Return a fleet.toml with a profile that trains for a few steps and is held to nothing."""
    path = tmp_path / "fleet.toml"
    path.write_text((ROOT / "fleet.toml").read_text() + TINY)
    return path
