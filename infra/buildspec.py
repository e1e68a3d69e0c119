"""What CodeBuild runs: the verbs that .github/workflows/release.yml runs, each with the role that it needs."""

import json
from typing import Any

RUNTIMES = {"python": "3.11", "nodejs": "20"}
KEPT = ["fleet.toml", "releases/**/*"]


def release(env: str) -> str:
    """Return the build that makes a release with its gates, publishes it, and uploads it into the first environment.

    It tells RELEASE, the version, to those that follow.
    """
    return _spec(
        [
            # what takes hours needs no right
            'make bundle PROFILE="$PROFILE"',
            _as("release", 'release PROFILE="$PROFILE" KEY="$SIGNING_KEY"'),
            "GITHUB_OUTPUT=.released make publish",
            'export RELEASE="$(sed -n s/^release=//p .released)"',
            _as("release", f'upload RELEASE="$RELEASE" ENV={env}'),
        ],
        told=("RELEASE",),
    )


def deliver(env: str, source: str, *, approve: bool) -> str:
    """Return the build that promotes a release and rolls it out, and takes it back where that fails."""
    approval = [_as("release", f'approve RELEASE="$RELEASE" ENV={env} KEY="$APPROVING_KEY"')] if approve else []
    back = [
        "rm .promoted",
        _as("release", f'rollback ENV={env} KEY="$SIGNING_KEY"'),
        _as("deploy", f"rollout ENV={env}"),
    ]
    return _spec(
        [
            # fleet.toml and releases/ as the build before has left them
            'cp -R "$(printenv | sed -n s/^CODEBUILD_SRC_DIR_Delivery[A-Za-z0-9]*=//p)/." .',
            *approval,
            _as("release", f'promote RELEASE="$RELEASE" FROM={source} ENV={env} KEY="$SIGNING_KEY"'),
            "touch .promoted",
            _as("deploy", f"rollout ENV={env}"),
            _as("deploy", f"status ENV={env}"),
        ],
        # a rollout that fails has returned its targets; this makes the record say so, and the targets too where it was the
        # last look that failed
        after=[f'if [ "$CODEBUILD_BUILD_SUCCEEDING" = 0 ] && [ -e .promoted ]; then {" && ".join(back)}; fi'],
    )


def _as(role: str, verb: str) -> str:
    """Return a verb of the Makefile with the rights of a role of the environment."""
    return f"AWS_PROFILE={role} make {verb}"


def _profile(role: str) -> str:
    """Return what writes a profile: credentials are taken anew, as long as the build runs."""
    variable = f"{role.upper()}_ROLE"
    lines = f"[profile {role}]\\nrole_arn = %s\\ncredential_source = EcsContainer\\n"
    return f'[ -z "${variable}" ] || printf \'{lines}\' "${variable}" >> "$HOME/.aws/config"'


def _spec(commands: list[str], *, after: list[str] | None = None, told: tuple[str, ...] = ()) -> str:
    setup = ['mkdir -p "$HOME/.aws"', _profile("release"), _profile("deploy"), "make setup"]
    phases: dict[str, Any] = {
        "install": {"runtime-versions": RUNTIMES, "commands": setup},
        "build": {"commands": commands},
    }
    if after:
        phases["post_build"] = {"commands": after}
    environment: dict[str, Any] = {"shell": "bash"}
    if told:
        environment["exported-variables"] = list(told)
    document = {"version": 0.2, "env": environment, "phases": phases, "artifacts": {"files": KEPT}}
    return json.dumps(document, indent=1)
