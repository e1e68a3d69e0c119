"""The targets of a rollout: stacks that the CDK CLI deploys, and devices, each held against what is live."""

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve.errors import ShipyardError
from shipyard.delivery.standing import Row, same

LINES = 15


@dataclass(frozen=True)
class Place:
    """A target: `deploy` brings a release there, `look` tells what is live of it.

    What is not ready is looked at again for `wait_s` seconds, each `pause_s`.
    """

    name: str
    deploy: Callable[[str], None]
    look: Callable[[str], list[Row]]
    wait_s: float = 1800.0
    pause_s: float = 15.0

    def bring(self, version: str) -> None:
        """Deploy a release."""
        self.deploy(version)

    def check(self, version: str) -> None:
        """Wait until the release is live; refuse another one, and what has failed."""
        until = time.monotonic() + self.wait_s
        while True:
            rows = self.look(version)
            if same(rows):
                return
            waiting = all(row.state in ("ok", "not ready") for row in rows)
            if not waiting or time.monotonic() >= until:
                wrong = [row for row in rows if row.state != "ok"]
                told = "; ".join(f"{row.place} {row.unit} {row.state}: {row.live or 'nothing'}" for row in wrong)
                raise ShipyardError(f"{self.name}: does not serve {version}", value=told, allowed=wrong[0].wanted)
            time.sleep(self.pause_s)


def deployer(
    cli: Path, assembly: Callable[[str], Path], pattern: str, surroundings: Mapping[str, str]
) -> Callable[[str], None]:
    """Return what deploys the stacks of a pattern with the CDK CLI, from the assembly of a release."""

    def deploy(version: str) -> None:
        command = [
            str(cli), "deploy", pattern, "--app", str(assembly(version)), "--method", "direct", "--require-approval",
            "never", "--progress", "events", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=dict(surroundings), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise ShipyardError(f"cdk deploy {pattern}: {cdk_fault(done.stdout + done.stderr)}")

    return deploy


def cdk_fault(told: str) -> str:
    """Return in a line why the CDK CLI failed: what it marks as a failure, or the last that it printed."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    marked = next((i for i, line in enumerate(lines) if line.startswith(("❌", "error:"))), max(0, len(lines) - LINES))
    return " | ".join(lines[marked : marked + LINES])[:1500]
