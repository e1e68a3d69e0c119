"""The workflows: valid, pinned, of least privilege, and each step a verb that a laptop has too."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shipyard.delivery.grammar import VERBS as DELIVERY
from shipyard.delivery.grammar import parser

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


def jobs_of(name):
    return workflow(ROOT / ".github" / "workflows" / f"{name}.yml")["jobs"]


def runs(job):
    return [step["run"].split()[1] for step in job["steps"] if "run" in step]


def test_a_release_reaches_production_by_staging_and_a_persons_word():
    jobs = jobs_of("release")
    assert runs(jobs["release"]) == ["setup", "bundle", "release", "publish", "upload"]
    assert runs(jobs["staging"]) == ["setup", "promote", "rollout", "status", "rollback", "rollout"]
    assert runs(jobs["prod"]) == ["setup", "approve", "promote", "rollout", "status", "rollback", "rollout"]
    assert (jobs["staging"]["needs"], jobs["prod"]["needs"]) == ("release", ["release", "staging"])
    # GitHub lets nobody into an environment without its reviewers, and AWS gives its role to that environment alone
    assert {name: job.get("environment") for name, job in jobs.items()} == {
        "release": "dev", "staging": "staging", "prod": "prod", "record": None,
    }  # fmt: skip
    assert workflow(ROOT / ".github/workflows/release.yml")["concurrency"]["cancel-in-progress"] is False


@pytest.mark.parametrize("name", ["staging", "prod"])
def test_what_failed_is_taken_back_and_nothing_that_was_not_promoted_is(name):
    steps_of = jobs_of("release")[name]["steps"]
    [promote] = [step for step in steps_of if "make promote" in step.get("run", "")]
    assert promote["id"] == "promote" and "if" not in promote
    [rollback] = [step for step in steps_of if "make rollback" in step.get("run", "")]
    assert rollback["if"] == "failure() && steps.promote.outcome == 'success'"
    assert steps_of[-2]["if"] == "failure() && steps.rollback.outcome == 'success'"
    # what was recorded is kept, whatever happened
    assert steps_of[-1]["if"] == "always()" and "upload-artifact" in steps_of[-1]["uses"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_that_takes_a_role_of_aws_is_of_an_environment_and_has_no_key(path):
    for name, job in workflow(path)["jobs"].items():
        aws = [step for step in job["steps"] if "configure-aws-credentials" in step.get("uses", "")]
        assert bool(aws) == (job.get("permissions", {}).get("id-token") == "write"), name
        for step in aws:
            given = dict(step["with"])
            # as long as the role of infra.delivery may be taken; the others are for an hour
            hours = 4 if "DEPLOY_ROLE" in given["role-to-assume"] else 1
            assert given.pop("role-duration-seconds", 3600) == hours * 3600
            assert given.keys() == {"role-to-assume", "aws-region"}
        assert not aws or job["environment"]
    assert "secrets." not in path.read_text()


def test_training_is_over_before_credentials_that_last_an_hour_are_taken():
    steps_of = jobs_of("release")["release"]["steps"]
    does = ["credentials" if "configure-aws" in step.get("uses", "") else step.get("run", "") for step in steps_of]
    assert [word.split()[1] if word.startswith("make") else word for word in does if word] == [
        "setup", "bundle", "credentials", "release", "publish", "credentials", "upload",
    ]  # fmt: skip


def test_a_proposal_deploys_nothing():
    assert runs(jobs_of("propose")["propose"]) == ["setup", "propose", "proposal"]
    makefile = (ROOT / "Makefile").read_text()
    for verb in ("propose", "proposal"):
        recipe = re.search(rf"^{verb}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
        assert not re.search(r"deploy|rollout|promote|upload|release --", recipe)


def test_the_verbs_of_a_release_say_who_asks_as_text_and_name_the_release():
    surroundings = os.environ | {"BY": "x; touch owned", "GITHUB_OUTPUT": ""}
    for verb, told in {
        "approve": "shipyard approve 0.1.0-gabc prod --by \"$BY\" --key 'kms:alias/key'",
        "promote": "shipyard promote staging prod --release 0.1.0-gabc --by \"$BY\" --key 'kms:alias/key'",
        "rollout": 'shipyard rollout prod --by "$BY"',
        "rollback": "shipyard rollback prod --by \"$BY\" --key 'kms:alias/key'",
        "publish": "shipyard publish 0.1.0-gabc",
        "bundle": "shipyard bundle --profile full",
    }.items():
        given = ["PROFILE=full", "RELEASE=0.1.0-gabc", "ENV=prod", "FROM=staging", "KEY=kms:alias/key"]
        done = subprocess.run(
            ["make", "--dry-run", verb, *given], cwd=ROOT, env=surroundings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert any(line.strip().endswith(told) for line in done.stdout.splitlines()), done.stdout
        if verb in DELIVERY:
            assert parser().parse_args(shlex.split(told)[1:]).env == "prod"


def test_a_pull_request_is_opened_once_and_only_for_a_change(tmp_path):
    """The real script and git, with a stand-in for gh that writes down what it is asked."""
    far, near, tools = tmp_path / "far.git", tmp_path / "near", tmp_path / "tools"
    subprocess.run(["git", "init", "--quiet", "--bare", str(far)], check=True)
    subprocess.run(["git", "clone", "--quiet", str(far), str(near)], check=True, capture_output=True)
    (near / ".ci").mkdir()
    (near / ".ci" / "pull-request").write_bytes((ROOT / ".ci" / "pull-request").read_bytes())
    tools.mkdir()
    (tools / "gh").write_text('#!/bin/sh\necho "$*" >> "$ASKED"\n[ "$2" = create ] && touch "$ASKED.there"\n'
                              'test -e "$ASKED.there"\n')  # fmt: skip
    (tools / "gh").chmod(0o755)
    surroundings = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "ASKED": str(tmp_path / "asked")}

    def run(*arguments):
        done = subprocess.run(
            ["bash", str(near / ".ci/pull-request"), *arguments], env=surroundings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "nothing to propose" in run("propose/prod", "A title", "proposed")
    (near / "proposed").mkdir()
    for text in ("{}", '{"more": 1}'):
        (near / "proposed" / "prod.json").write_text(text)
        run("propose/prod", "A title", "proposed", "missing")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [
        "pr view propose/prod", "pr create --head propose/prod --title A title --body A title", "pr view propose/prod",
    ]  # fmt: skip
    show = ["git", "-C", str(far), "show", "propose/prod:proposed/prod.json"]
    assert subprocess.run(show, capture_output=True, text=True).stdout == '{"more": 1}'
