"""The command line as its users meet it: help, exit codes, and one line for each error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock

from shipyard.grammar import HELP
from tests.test_trust import write_release

ROOT = Path(__file__).resolve().parents[1]
MODULE = (sys.executable, "-m", "shipyard.cli")
SCRIPT = (str(Path(sys.executable).with_name("shipyard")),)
TRAINS = {"torch", "transformers", "peft", "onnx", "pyarrow", "duckdb", "boto3"}


@pytest.fixture
def project(tmp_path):
    """A folder with nothing but the fleet."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "fleet.toml", folder)
    return folder


@pytest.fixture
def run(tmp_path):
    def run(*arguments, cwd=tmp_path, command=MODULE):
        surroundings = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "200"}
        return subprocess.run(
            [*command, *map(str, arguments)],
            cwd=cwd,
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def local(project):
    return write_release(project / "build" / "releases", Ed25519PrivateKey.generate())


def error(result):
    """Return the one line that a failed command has printed."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# --- help and usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_help_tells_the_flow_the_verbs_and_the_exit_codes(run, command):
    result = run("--help", command=command)
    assert (result.returncode, result.stderr) == (0, "")
    for verb, text in HELP.items():
        assert f"\n    {verb}" in result.stdout
        assert text in result.stdout
    assert "data -> finetune -> evaluate -> split -> export -> quantise -> bundle -> release -> synth" in result.stdout
    assert "exit codes: 0 done; 1 an error" in result.stdout


@pytest.mark.parametrize("verb", HELP)
def test_help_of_a_verb_is_a_sentence_and_names_defaults(run, verb):
    result = run(verb, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    usage, said, *_ = result.stdout.split("\n\n")
    assert usage.startswith(f"usage: shipyard {verb} ")
    assert said[0].isupper() and "." in said and len(said.split()) >= 5
    assert "(default: ./fleet.toml)" in result.stdout
    assert "(default: build/ beside fleet.toml)" in result.stdout


def test_every_option_of_a_stage_tells_what_it_is(run):
    for verb in ("data", "release"):
        options = run(verb, "--help").stdout.split("\noptions:\n")[1].split("\n  -")
        assert len(options) >= 5
        assert all(len(option.split(maxsplit=2)) == 3 for option in options)


@pytest.mark.parametrize(
    "arguments", [(), ("deploy",), ("release", "--profil3", "x"), ("publish",), ("inspect",), ("data", "more")]
)
def test_wrong_usage_ends_with_2(run, arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: shipyard" in result.stderr
    assert "Traceback" not in result.stderr


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_profile_is_refused(run, project):
    said = error(run("data", "--profile", "huge", cwd=project))
    assert "--profile: no such profile; value: 'huge'; allowed: quick, full, small" in said


@pytest.mark.parametrize("verb", [("data",), ("release",), ("synth",), ("publish", "0.1.0-g000000000000")])
def test_a_missing_fleet_is_refused(run, tmp_path, verb):
    assert "fleet.toml: no such file" in error(run(*verb))
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[project", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"", "missing; mend: add it"),
        (b"[finetune]\nmethodd = 'lora'\n", "did you mean"),
    ],
)
def test_a_broken_fleet_is_refused(run, project, text, said):
    (project / "fleet.toml").write_bytes(text)
    assert said in error(run("data", cwd=project))


def test_a_fleet_that_is_a_folder_is_refused(run, tmp_path):
    assert str(tmp_path) in error(run("data", "--fleet", tmp_path))


@pytest.mark.parametrize("made", [False, True], ids=["nothing made", "another made"])
def test_an_unknown_release_is_not_published(run, project, request, made):
    if made:
        request.getfixturevalue("local")
    error(run("publish", "0.1.0-g000000000000", cwd=project))
    assert not (project / "releases").exists()


@pytest.mark.parametrize("made", [False, True], ids=["nothing made", "another made"])
def test_an_unknown_release_is_not_shown(run, project, request, made):
    folder = request.getfixturevalue("local").parent if made else project
    error(run("inspect", folder / "none.json"))


def test_a_changed_release_is_not_shown(run, local):
    local.write_text(local.read_text().replace('"examples": 200', '"examples": 2000'))
    assert "changed after it was signed" in error(run("inspect", local))


def test_a_file_as_build_folder_is_refused(run, project, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error(run("data", "--build", tmp_path / "file", cwd=project))


def test_synth_without_the_cdk_tells_how_to_get_it(run, project):
    assert "mend: make setup" in error(run("synth", cwd=project))


@pytest.mark.parametrize("verb", ["data", "release"])
def test_a_second_run_on_a_build_folder_is_refused(run, project, tmp_path, verb):
    (tmp_path / "build").mkdir()
    with FileLock(tmp_path / "build" / ".lock"):
        said = error(run(verb, "--build", tmp_path / "build", cwd=project))
    assert "another run is using it" in said
    assert "--build" in said


def test_a_lock_that_a_dead_run_left_does_not_matter(run, project, tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / ".lock").write_text("")
    said = error(run("data", "--profile", "none", "--build", tmp_path / "build", cwd=project))
    assert "no such profile" in said


# --- show and publish ------------------------------------------------------------------------------------------------


def test_show_prints_the_table(run, local):
    result = run("inspect", local)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Release {local.stem}, profile small" in result.stdout
    figures = ("0.250", "0.200", "0.300", "[0.290, 0.310]", "+0.050", "[+0.040, +0.060]", "1.0 MB", "99.0%", "2.5 ms")
    for text in ("recommend", "cpu", "nDCG@10", "200", "popular", "fp32", "int8", *figures):
        assert text in result.stdout, text
    for artifact in json.loads(local.read_text())["artifacts"]:
        assert artifact["key"] in result.stdout


def test_show_prints_json(run, local):
    result = run("inspect", "--json", local)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads(local.read_text())


def test_publish_takes_a_local_release_into_the_repository(run, project, local):
    result = run("publish", local.stem, "--json", cwd=project)
    assert result.returncode == 0
    assert json.loads(result.stdout)["version"] == local.stem
    assert f"published releases/{local.name}" in result.stderr
    assert (project / "releases" / local.name).read_bytes() == local.read_bytes()
    assert run("inspect", project / "releases" / local.name).returncode == 0


def test_the_fleet_may_lie_elsewhere(run, project, local):
    result = run("publish", local.stem, "--fleet", project / "fleet.toml")
    assert result.returncode == 0
    assert (project / "releases" / local.name).is_file()


LOADED = "import json, sys; from shipyard.cli import main; code = main(sys.argv[2:])\n"
LOADED += "open(sys.argv[1], 'w').write(json.dumps([code, sorted(sys.modules)]))"


@pytest.mark.parametrize("verb", ["inspect", "publish", "locked"])
def test_a_command_that_does_not_train_does_not_load_what_trains(run, project, local, tmp_path, verb):
    arguments = {
        "inspect": ("inspect", local),
        "publish": ("publish", local.stem),
        "locked": ("release", "--build", tmp_path / "build"),
    }[verb]
    (tmp_path / "build").mkdir()
    with FileLock(tmp_path / "build" / ".lock"):
        run(tmp_path / "loaded", *arguments, cwd=project, command=(sys.executable, "-c", LOADED))
    code, loaded = json.loads((tmp_path / "loaded").read_text())
    assert code == (1 if verb == "locked" else 0)
    assert "shipyard.release" in loaded
    assert not TRAINS & set(loaded)
