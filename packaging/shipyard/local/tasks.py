"""Run what a cluster's service says: its containers' own commands as processes, the model fetched from the local bucket.

An image cannot be built or pulled here, so the code that it would hold is taken from the bundle that it is built from.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError
from shipyard.local.cloud import Cloud

SECONDS_TO_FETCH = 120
SECONDS_TO_START = 60


@dataclass(frozen=True)
class Container:
    """A container of a task definition: its command, its variables and where its volume lies."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str]
    mount: str

    def option(self, name: str) -> str | None:
        """Return what follows an option of the command, if it is there."""
        return self.command[self.command.index(name) + 1] if name in self.command else None


def services(cloud: Cloud) -> dict[str, dict[str, Container]]:
    """Return the containers of every service of the cloud's clusters, by artifact and by the container's name."""
    ecs, found = cloud.client("ecs"), {}
    for cluster in ecs.list_clusters()["clusterArns"]:
        for page in ecs.get_paginator("list_services").paginate(cluster=cluster):
            for arn in page["serviceArns"]:
                [service] = ecs.describe_services(cluster=cluster, services=[arn])["services"]
                task = ecs.describe_task_definition(taskDefinition=service["taskDefinition"])["taskDefinition"]
                containers = {told["name"]: _container(told) for told in task["containerDefinitions"]}
                serve = containers.get("serve")
                if serve is not None and (artifact := serve.option("--artifact")) is not None:
                    found[artifact] = containers
    return found


def _container(told: Mapping[str, Any]) -> Container:
    return Container(
        told["name"],
        tuple(told["command"]),
        {pair["name"]: pair["value"] for pair in told.get("environment", [])},
        told["mountPoints"][0]["containerPath"],
    )


def fetch(cloud: Cloud, container: Container, code: Path, into: Path) -> None:
    """Run a service's container `fetch`: it brings the bundle from the local bucket into `into` and verifies it.

    Raises:
        ShipyardError: the bundle is not in the bucket, or is not the attested one.
    """
    command = [str(into) if word == container.mount else word for word in container.command]
    done = subprocess.run(
        [sys.executable, *command], env=_surroundings(cloud, container, code), cwd=code, capture_output=True, text=True,
        check=False, timeout=SECONDS_TO_FETCH, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise ShipyardError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


@contextmanager
def serve(cloud: Cloud, container: Container, code: Path, bundle: Path, log: Path) -> Iterator[str]:
    """Run a service's container `serve` on a fetched bundle; give its address once it is ready, and end it afterwards.

    Raises:
        ShipyardError: it does not become ready.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(bundle) if word == container.mount else word for word in container.command]
    # no load balancer is here that would have to learn that a server goes
    for option, value in (("--host", "127.0.0.1"), ("--port", str(port)), ("--drain", "0")):
        if option in command:
            command[command.index(option) + 1] = value
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *command], env=_surroundings(cloud, container, code), cwd=code, stdout=stream,
            stderr=stream, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _wait(process, f"{url}/readyz", log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def run(
    cloud: Cloud, containers: Mapping[str, Container], code: Path, scratch: Path, more: Sequence[str] = ()
) -> Iterator[str]:
    """Run a service as its task does, `fetch` and then `serve`, that with `more` arguments; give its address.

    `code` is the folder of the bundle that the image is built from; `scratch` takes the fetched bundle and the log.

    Raises:
        ShipyardError: the bundle is not there or not the attested one, or the service does not become ready.
    """
    bundle, container = scratch / "bundle", containers["serve"]
    bundle.mkdir(parents=True)
    fetch(cloud, containers["fetch"], code, bundle)
    container = replace(container, command=(*container.command, *more))
    with serve(cloud, container, code, bundle, scratch / "serve.log") as url:
        yield url


def ask(container: Container, url: str, task: str, requests: list[Any]) -> list[Any]:
    """Send requests to a service that is served at `url`; return its answers."""
    prefix = container.option("--prefix") or ""
    sent = urllib.request.Request(  # noqa: S310 -- the address is ours
        f"{url}{prefix}/v1/{task}", json.dumps(requests).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=60) as answer:  # noqa: S310
        found: list[Any] = json.load(answer)
    return found


def _surroundings(cloud: Cloud, container: Container, code: Path) -> dict[str, str]:
    """Return the environment of a container: the image's code, the task's variables, the cloud's address and role."""
    role = {name: value for name, value in cloud.environment.items() if name.startswith("AWS_")}
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", **role, **container.variables}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ShipyardError(f"{url}: not ready", value=log.read_text(errors="replace")[-500:], mend=f"read {log}")
