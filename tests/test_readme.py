"""What the README says is so."""

import re

import pytest
from conftest import ROOT

from models.config import load_fleet
from models.release import read_release
from serve.trust import load_keys
from shipyard.console import release_markdown

README = (ROOT / "README.md").read_text()
FLEET = load_fleet(ROOT / "fleet.toml")


@pytest.mark.parametrize("env", FLEET.env)
def test_every_environment_names_a_published_release(env: str) -> None:
    path = ROOT / "releases" / f"{FLEET.env[env].release}.json"
    release = read_release(path, load_keys(ROOT / "releases" / "keys"))
    assert set(release.submodels) == set(FLEET.submodel)


def test_table_is_that_of_the_release_in_production() -> None:
    version = FLEET.env["prod"].release
    release = read_release(ROOT / "releases" / f"{version}.json", load_keys(ROOT / "releases" / "keys"))
    assert release_markdown(release) in README
    assert f"releases/{version}.json" in README


def test_verbs_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.M))
    named = set(re.findall(r"`make ([a-z]+)`", README)) | set(re.findall(r"^make ([a-z]+)", README, flags=re.M))
    assert {"release", "test"} <= named <= targets


def test_files_and_folders_exist() -> None:
    for path in re.findall(r"`((?:docs|models|packaging|infra|releases)/[\w./-]*)`", README):
        assert (ROOT / path).exists() or path == "models/local_search.py", path
