"""Ask the deployed gateway: its task runs from its bundle, asks the endpoint and the services, and fuses what they say."""

import json
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.release import Artifact
from serve.codec import PLURALS, Codec
from serve.errors import ShipyardError
from serve.files import read_json
from serve.fused import CODEC, FUSION
from serve.fusion import best, fuse, gather
from serve.trust import MANIFEST
from shipyard.local import tasks
from shipyard.local.cloud import Cloud
from shipyard.local.invoke import COMPARED, Answers, ask_endpoint, endpoints

MILLISECONDS = 60_000
"""Given to a request: this machine is no cluster."""


def ask_gateway(cloud: Cloud, gateway: Artifact, served: Mapping[str, Artifact], store: Path, scratch: Path) -> Answers:
    """Ask the gateway what search's bundle has as golden requests; return the first places of each answer.

    `served` are the release's artifacts by name. Each answer has to be what the bundle's fusion makes of what endpoint and
    services say themselves.

    Raises:
        ShipyardError: something is not deployed, does not serve or is silent, or the answer is another one.
    """
    deployed, clusters = endpoints(cloud), tasks.services(cloud)
    if gateway.name not in clusters:
        raise ShipyardError(f"{gateway.name}: not deployed", allowed=", ".join(clusters))
    containers, bundle = clusters[gateway.name], scratch / gateway.name / "bundle"
    # the cluster has one image, built from the bundle of a sub-model
    code = store / next(artifact for artifact in served.values() if artifact.kind == "image-context").key
    _check_addresses(cloud, containers["serve"], {endpoint.name for endpoint in deployed.values()})
    bundle.mkdir(parents=True)
    tasks.fetch(cloud, containers["fetch"], code, bundle)
    pinned = read_json(bundle / FUSION)
    asked = {
        source: told
        for source in pinned["sources"]
        if (told := pinned["targets"][source])["artifact"] in deployed or told["artifact"] in clusters
    }
    search = next(told["artifact"] for told in asked.values() if told["artifact"] in deployed)
    golden = read_json(store / served[search].key / MANIFEST)["golden"]
    requests = [line["request"] for line in golden]
    codec = Codec(bundle, read_json(bundle / CODEC))
    said: dict[str, list[Any]] = {}
    with ExitStack() as running:
        command = list(containers["serve"].command)
        for source, told in asked.items():
            name, most = told["artifact"], told["returned"]
            if name in deployed:
                said[source] = ask_endpoint(cloud, deployed[name], codec, requests, most)
                continue
            folder = scratch / f"{gateway.name}-{name}" / "bundle"
            folder.mkdir(parents=True)
            container, image = clusters[name]["serve"], store / served[name].key
            tasks.fetch(cloud, clusters[name]["fetch"], image, folder)
            log = folder.with_name("serve.log")
            url = running.enter_context(tasks.serve(cloud, container, image, folder, log))
            # in the place of the load balancer, whose name nobody resolves here
            command += ["--target", f"{source}={url}{container.option('--prefix') or ''}"]
            own = [{k: v for k, v in request.items() if k != "query"} | {"k": most} for request in requests]
            found = tasks.ask(container, url, told["task"], own)
            said[source] = [[(p[told["level"]], p["score"]) for p in a[PLURALS[told["level"]]]] for a in found]
        container = replace(containers["serve"], command=tuple(command))
        url = running.enter_context(tasks.serve(cloud, container, code, bundle, bundle.with_name("serve.log")))
        answers = [_ask(url, request) for request in requests]
    places = []
    for i, answer in enumerate(answers):
        if silent := [
            f"{source} {answer['targets'][source]['state']}" for source in asked if source not in _spoke(answer)
        ]:
            raise ShipyardError(f"{gateway.name}: not every target answers", value=", ".join(silent))
        lines = [said[source][i] if source in asked else None for source in pinned["sources"]]
        heard = gather([tuple(zip(*line, strict=True)) if line else None for line in lines])  # type: ignore[misc]
        wanted = best(heard, fuse(heard, pinned["method"], pinned["parameters"]), COMPARED)
        found = [(one["product"], one["score"]) for one in answer["products"][:COMPARED]]
        if [product for product, _ in found] != [product for product, _ in wanted]:
            raise ShipyardError(f"{gateway.name}: another answer than its fusion's", value=found, allowed=wanted)
        places.append(found)
    return places


def impressions(cloud: Cloud, bucket: str) -> list[dict[str, Any]]:
    """Return what lies below feedback/ in the data bucket: by it the next release is trained."""
    s3 = cloud.client("s3")
    told = s3.list_objects_v2(Bucket=bucket, Prefix="feedback/").get("Contents", [])
    bodies = [s3.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in told]
    return [json.loads(line) for body in bodies for line in body.splitlines()]


def _check_addresses(cloud: Cloud, container: tasks.Container, names: set[str]) -> None:
    """Refuse a gateway that is told another endpoint or load balancer than those that are deployed."""
    balancers = {f"http://{b['DNSName']}" for b in cloud.client("elbv2").describe_load_balancers()["LoadBalancers"]}
    for option, allowed in (("--search", {f"sagemaker:{name}" for name in names}), ("--cluster", balancers)):
        if container.option(option) not in allowed:
            raise ShipyardError(
                f"gateway: {option} is not deployed", value=container.option(option), allowed=", ".join(allowed)
            )


def _ask(url: str, request: Mapping[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(  # noqa: S310 -- the address is ours
        f"{url}/v1/search", json.dumps(request).encode(),
        {"Content-Type": "application/json", "X-Request-Timeout-Ms": str(MILLISECONDS)},
    )  # fmt: skip
    with urllib.request.urlopen(sent, timeout=2 * MILLISECONDS / 1000) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
    return found


def _spoke(answer: Mapping[str, Any]) -> set[str]:
    return {source for source, told in answer["targets"].items() if told["state"] == "spoke"}
