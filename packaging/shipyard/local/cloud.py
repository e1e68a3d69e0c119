"""The local cloud as a user of the command line meets it: an address, an account, and the pinned CDK CLI pointed at it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from models.config import Environment
from serve.errors import ShipyardError

SECONDS = 600
_FAULT = re.compile(r"^(?:error:|❌).*", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Cloud:
    """An imitation of one account and region; `modelled` are the resource types that it knows to imitate."""

    account: str
    region: str
    root: Path
    environment: Mapping[str, str]
    modelled: frozenset[str]

    def client(self, service: str) -> Any:
        """Return a boto3 client of the local cloud."""
        return boto3.client(
            service,
            region_name=self.region,
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="local",
            aws_secret_access_key="local",  # noqa: S106 -- the local cloud asks for one and takes any
        )

    def cdk(self, *arguments: str) -> str:
        """Run the pinned CDK CLI against the local cloud; return what it printed.

        Raises:
            ShipyardError: it failed.
        """
        command = [str(self.root / "node_modules" / ".bin" / "cdk"), *arguments, "--no-color"]
        done = subprocess.run(
            command, cwd=self.root, env=dict(self.environment), capture_output=True, text=True, check=False,
            timeout=SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        told = done.stdout + done.stderr
        if done.returncode != 0:
            found = _FAULT.search(told)
            raise ShipyardError(f"cdk {arguments[0]}: {(found[0] if found else told)[-1500:].strip()}")
        return told

    def bootstrap(self, assembly: Path) -> None:
        """Make what the CLI needs in the account: the bucket of templates and the roles of a deployment."""
        self.cdk("bootstrap", f"aws://{self.account}/{self.region}", "--app", str(assembly))

    def deploy(self, assembly: Path, *stacks: str) -> str:
        """Deploy stacks of a synthesized assembly, by pattern; return what the CLI printed."""
        return self.cdk(
            "deploy", *stacks, "--app", str(assembly), "--method", "direct", "--require-approval", "never",
            "--progress", "events",
        )  # fmt: skip

    def diff(self, assembly: Path, *stacks: str) -> str:
        """Return what a deployment of these stacks would change."""
        return self.cdk("diff", *stacks, "--app", str(assembly), "--method", "template")

    def destroy(self, assembly: Path, *stacks: str) -> None:
        """Delete stacks."""
        self.cdk("destroy", *stacks, "--app", str(assembly), "--force")

    def stacks(self) -> dict[str, dict[str, Any]]:
        """Return the stacks that are there, by name."""
        pages = self.client("cloudformation").get_paginator("describe_stacks").paginate()
        return {stack["StackName"]: stack for page in pages for stack in page["Stacks"]}

    def resources(self, stack: str) -> dict[str, tuple[str, str]]:
        """Return the resources of a stack: type and physical id, by logical id."""
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stack)
        return {
            found["LogicalResourceId"]: (found["ResourceType"], found["PhysicalResourceId"])
            for page in pages
            for found in page["StackResourceSummaries"]
        }


@contextmanager
def local_cloud(env: Environment, root: Path, log: Path) -> Iterator[Cloud]:
    """Start a local cloud of an environment's account and region on a free port of loopback, and end it afterwards.

    `root` is the folder of the project, which has the CDK CLI; `log` takes what the cloud prints.

    Raises:
        ShipyardError: the CLI or moto is not installed, or the cloud does not start.
    """
    cli = root / "node_modules" / ".bin" / "cdk"
    if not cli.exists():
        raise ShipyardError("deploy-local: the CDK CLI is not installed", value=str(cli), mend="make setup")
    # nothing of the caller's AWS may be reached, whatever goes wrong
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CDK_"))}
    kept |= {"JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20", "CDK_VALIDATION": "false"}
    kept["PYTHONPATH"] = os.pathsep.join([str(root / "packaging"), str(root), kept.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "shipyard.local.server"],
            env=kept | {"MOTO_ACCOUNT_ID": env.account, "AWS_DEFAULT_REGION": env.region},
            stdout=subprocess.PIPE, stderr=stream, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise ShipyardError(
                "deploy-local: the local cloud does not start", mend=f"read {log}; it needs shipyard[dev,export]"
            )
        told = json.loads(line)
        nowhere = str(root / "build" / "no-such-file")
        surroundings = kept | {
            "AWS_ENDPOINT_URL": told["url"],
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": env.region,
            "AWS_DEFAULT_REGION": env.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": nowhere,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            # a text in the call alone: by it the local cloud tells the bucket's name in a template's address
            "AWS_ENDPOINT_URL_S3_FOR_CLOUDFORMATION": f"https://s3.{env.region}.amazonaws.com",
        }
        yield Cloud(env.account, env.region, root, surroundings, frozenset(told["modelled"]))
    finally:
        server.terminate()
        server.wait(timeout=30)
