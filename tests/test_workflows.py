"""The workflows: valid, pinned, of least privilege, and each step a verb that a laptop has too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERBS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def workflow(path):
    # YAML 1.1 reads `on` as a boolean
    return yaml.safe_load(path.read_text().replace("\non:", '\n"on":'))


def steps(path):
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def test_workflows_fit_their_schema():
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, WORKFLOWS),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_finds_a_fault(tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "runs_on:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(broken)]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_digest_and_say_their_version(path):
    lines = [line.strip() for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_is_a_verb_of_the_makefile(path):
    runs = [step["run"] for step in steps(path) if "run" in step]
    assert runs
    for run in runs:
        [line] = run.strip().splitlines()
        words = line.split()
        assert words[0] == "make", line
        assert {word for word in words[1:] if "=" not in word} <= VERBS, line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_that_a_stranger_wrote_is_pasted_into_a_shell(path):
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_reads_alone_until_a_job_asks_for_more(path):
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    assert "concurrency" in found
    assert "pull_request_target" not in found["on"]
    for job in found["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 360
        assert "write-all" not in json.dumps(job.get("permissions", {}))
        for step in job["steps"]:
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False or job["permissions"]["contents"] == "write"


def test_the_script_of_a_change_may_be_run():
    assert os.access(ROOT / ".ci" / "change", os.X_OK)
