"""The local cloud as a user of the command line meets it: an address, an account, and the pinned CDK CLI pointed at it."""

import json
import os
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
from shipyard.delivery.places import cdk_fault

SECONDS = 600
RUNNING = "MOTO_ECS_SERVICE_RUNNING"
"""How many tasks moto has running; a deployment of no more than that is done."""


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
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            aws_session_token=self.environment["AWS_SESSION_TOKEN"],
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
            raise ShipyardError(f"cdk {arguments[0]}: {cdk_fault(told)}")
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
def local_clouds(envs: Mapping[str, Environment], root: Path, log: Path) -> Iterator[dict[str, Cloud]]:
    """Start a local cloud on a free port of loopback, with an account for each environment, and end it afterwards.

    `root` is the folder of the project, which has the CDK CLI; `log` takes what the cloud prints.

    Returns:
        The account and region of each environment, by its name.

    Raises:
        ShipyardError: the CLI or moto is not installed, or the cloud does not start.
    """
    cli = root / "node_modules" / ".bin" / "cdk"
    if not cli.exists():
        raise ShipyardError("local cloud: the CDK CLI is not installed", value=str(cli), mend="make setup")
    # nothing of the caller's AWS may be reached, whatever goes wrong
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CDK_"))}
    kept |= {"JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION": "20", "CDK_VALIDATION": "false"}
    kept["PYTHONPATH"] = os.pathsep.join([str(root / "packaging"), str(root), kept.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    edges = [word for env in envs.values() for word in ("--account", env.account, env.region)]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "shipyard.local.server", *edges],
            env=kept | {"AWS_DEFAULT_REGION": next(iter(envs.values())).region, RUNNING: "1000"},
            stdout=subprocess.PIPE, stderr=stream, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise ShipyardError("local cloud: it does not start", mend=f"read {log}; it needs shipyard[dev,export]")
        told = json.loads(line)
        yield {
            name: Cloud(
                env.account, env.region, root, kept | _surroundings(told, env, root), frozenset(told["modelled"])
            )
            for name, env in envs.items()
        }
    finally:
        server.terminate()
        server.wait(timeout=30)


def _surroundings(told: Mapping[str, Any], env: Environment, root: Path) -> dict[str, str]:
    """Return the variables by which a process acts in an account of the local cloud that has said where it is."""
    # whose key it is decides in which account a request acts
    assumed = boto3.client(
        "sts", region_name=env.region, endpoint_url=told["url"], aws_access_key_id="local",
        aws_secret_access_key="local",  # noqa: S106 -- the local cloud asks for one and takes any
    ).assume_role(RoleArn=f"arn:aws:iam::{env.account}:role/local", RoleSessionName="local")["Credentials"]  # fmt: skip
    nowhere = str(root / "build" / "no-such-file")
    return {
        "AWS_ENDPOINT_URL": told["url"],
        "AWS_ENDPOINT_URL_GREENGRASSV2": told["greengrass"][env.account],
        "AWS_ACCESS_KEY_ID": assumed["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": assumed["SecretAccessKey"],
        "AWS_SESSION_TOKEN": assumed["SessionToken"],
        "AWS_REGION": env.region,
        "AWS_DEFAULT_REGION": env.region,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
        # a text in the call alone: by it the local cloud tells the bucket's name in a template's address
        "AWS_ENDPOINT_URL_S3_FOR_CLOUDFORMATION": f"https://s3.{env.region}.amazonaws.com",
    }
