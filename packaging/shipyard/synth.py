"""Synth: the pinned CDK CLI in a process of its own, offline and without credentials."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from serve.errors import ShipyardError
from shipyard.console import Reporter


def synth(
    fleet: Path,
    out: Path,
    reporter: Reporter,
    variables: Mapping[str, str],
    *,
    env: str = "",
    release: Path | None = None,
    validate: bool = False,
) -> None:
    """Run the pinned CDK CLI, offline and without credentials."""
    root = fleet.resolve().parent
    cli = root / "node_modules" / ".bin" / "cdk"
    if not cli.exists():
        raise ShipyardError("synth: the CDK CLI is not installed", value=str(cli), mend="make setup")
    command = [str(cli), "synth", "--quiet", "--output", str(out.resolve()), "--context", f"fleet={fleet.resolve()}"]
    if env:
        command += ["--context", f"env={env}"]
    if release is not None:
        # to look at: what is deployed is named in fleet.toml, and approved
        command += ["--context", f"release={release.resolve()}", "--context", "unapproved=true"]
    # no credentials and no region of the caller may reach a template
    surroundings = {name: value for name, value in variables.items() if not name.startswith(("AWS_", "CDK_"))}
    # the CDK's own validator more than doubles the time of a synth
    surroundings |= {
        "CDK_VALIDATION": "true" if validate else "false",
        "JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20",
    }
    with reporter.stage("synth"):
        finished = subprocess.run(command, cwd=root, env=surroundings, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            told = [line.removeprefix("error: ") for line in finished.stderr.splitlines() if line.startswith("error: ")]
            raise ShipyardError(told[0] if told else f"synth failed: {finished.stderr.strip()[-2000:]}")
    reporter.line(f"synthesized {out}")
