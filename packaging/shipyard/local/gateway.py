"""Ask the deployed gateway: its task runs from its bundle, asks the endpoint and the services, and fuses what they say."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.release import Artifact
from serve.codec import Codec
from serve.errors import ShipyardError
from serve.files import read_json
from serve.fused import CODEC, FUSION
from serve.fusion import best, fuse, gather
from serve.trust import MANIFEST
from shipyard.local import tasks
from shipyard.local.cloud import Cloud
from shipyard.local.invoke import COMPARED, Answers, Places, ask_endpoint, endpoints, places

MILLISECONDS = 60_000
"""Given to a request: this machine is no cluster."""


def ask_gateway(cloud: Cloud, gateway: Artifact, served: Mapping[str, Artifact], store: Path, scratch: Path) -> Answers:
    """Ask the gateway what search's bundle has as golden requests, and click; return the first places of each answer.

    `served` are the release's artifacts by name. Each answer has to be what the bundle's fusion makes of what endpoint and
    services say themselves.

    Raises:
        ShipyardError: something is not deployed, does not serve or is silent, or the answer is another one.
    """
    deployed, clusters = endpoints(cloud), tasks.services(cloud)
    if gateway.name not in clusters:
        raise ShipyardError(f"{gateway.name}: not deployed", allowed=", ".join(clusters))
    _check_addresses(cloud, clusters[gateway.name]["serve"], {endpoint.name for endpoint in deployed.values()})
    # the cluster has one image, built from the bundle of a sub-model
    code = store / next(artifact for artifact in served.values() if artifact.kind == "image-context").key
    targets = read_json(store / gateway.key / FUSION)["targets"]
    asked = {source: told["artifact"] for source, told in targets.items() if told["artifact"] in deployed | clusters}
    search = next(name for name in asked.values() if name in deployed)
    requests = [golden["request"] for golden in read_json(store / served[search].key / MANIFEST)["golden"]]
    with ExitStack() as running:
        urls = {
            source: running.enter_context(tasks.run(cloud, clusters[name], code, scratch / f"asked-{name}"))
            for source, name in asked.items()
            if name in clusters
        }
        more = []
        for source, url in urls.items():
            # in the place of the load balancer, whose name nobody resolves here
            more += ["--target", f"{source}={url}{clusters[asked[source]]['serve'].option('--prefix') or ''}"]
        folder = scratch / gateway.name
        entry = running.enter_context(tasks.run(cloud, clusters[gateway.name], code, folder, more))
        answers = [_post(f"{entry}/v1/search", request) for request in requests]
        for answer in answers:
            states = {source: answer["targets"][source]["state"] for source in asked}
            if silent := [f"{source} {state}" for source, state in states.items() if state != "spoke"]:
                raise ShipyardError(f"{gateway.name}: not every target answers", value=", ".join(silent))
            clicked = [{"item": answer["products"][0]["product"], "kind": "click"}]
            _post(f"{entry}/v1/feedback", {"request_id": answer["request_id"], "user": "shopper", "events": clicked})
        said: dict[str, list[Places]] = {}
        codec = Codec(folder / "bundle", read_json(folder / "bundle" / CODEC))
        for source, name in asked.items():
            told = targets[source]
            if name in deployed:
                said[source] = ask_endpoint(cloud, deployed[name], codec, requests, told["returned"])
            else:
                own = [{k: v for k, v in one.items() if k != "query"} | {"k": told["returned"]} for one in requests]
                found = tasks.ask(clusters[name]["serve"], urls[source], told["task"], own)
                said[source] = [places(answer, told["level"], told["returned"]) for answer in found]
    pinned = read_json(folder / "bundle" / FUSION)
    first = []
    for i, answer in enumerate(answers):
        lines = [said[source][i] if source in said else None for source in pinned["sources"]]
        heard = gather([([p for p, _ in line], [s for _, s in line]) if line else None for line in lines])
        wanted = best(heard, fuse(heard, pinned["method"], pinned["parameters"]), COMPARED)
        got = places(answer, "product")
        if [product for product, _ in got] != [product for product, _ in wanted]:
            raise ShipyardError(f"{gateway.name}: another answer than its fusion's", value=got, allowed=wanted)
        first.append(got)
    return first


def feedback(cloud: Cloud, bucket: str) -> list[dict[str, Any]]:
    """Return what lies below feedback/ in the data bucket, impressions and events: by it the next release is trained."""
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


def _post(url: str, document: Mapping[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(  # noqa: S310 -- the address is ours
        url, json.dumps(document).encode(),
        {"Content-Type": "application/json", "X-Request-Timeout-Ms": str(MILLISECONDS)},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(sent, timeout=2 * MILLISECONDS / 1000) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as fault:
        raise ShipyardError(f"{url}: {fault.code}", value=fault.read()[:500].decode(errors="replace")) from None
    return found
