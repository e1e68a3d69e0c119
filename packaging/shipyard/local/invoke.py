"""Ask what is deployed, and hold the answers to the golden ones of the bundles."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from models.release import Artifact
from serve.codec import PLURALS, Codec
from serve.errors import ShipyardError
from serve.files import read_json
from serve.triton import CONTENT, read_answer, write_request
from serve.trust import MANIFEST
from shipyard.local import tasks
from shipyard.local.cloud import Cloud

TOLERANCE = 2e-3
"""Largest difference of a score from the golden one, as a part of the largest: processors round sums differently."""
COMPARED = 5

Places = list[tuple[Any, float]]
"""The first places of an answer: what is ranked, and its score."""
Answers = list[Places]
"""Those of each golden request."""


@dataclass(frozen=True)
class Endpoint:
    """A SageMaker endpoint, and where in the bucket its model lies."""

    name: str
    uri: str


def endpoints(cloud: Cloud) -> dict[str, Endpoint]:
    """Return the account's endpoints by the name of the artifact that each serves.

    Raises:
        ShipyardError: one is not in service.
    """
    sagemaker, found = cloud.client("sagemaker"), {}
    for told in sagemaker.list_endpoints()["Endpoints"]:
        endpoint = sagemaker.describe_endpoint(EndpointName=told["EndpointName"])
        if endpoint["EndpointStatus"] != "InService":
            raise ShipyardError(f"{told['EndpointName']}: not in service", value=endpoint["EndpointStatus"])
        config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
        container = sagemaker.describe_model(ModelName=config["ProductionVariants"][0]["ModelName"])["PrimaryContainer"]
        name = container["Environment"]["SAGEMAKER_TRITON_DEFAULT_MODEL_NAME"]
        found[name] = Endpoint(told["EndpointName"], container["ModelDataSource"]["S3DataSource"]["S3Uri"])
    return found


def ask(cloud: Cloud, artifacts: tuple[Artifact, ...], store: Path, scratch: Path) -> dict[str, Answers]:
    """Ask the golden requests of each artifact where it is deployed, all of them at once; return the answers by artifact.

    `store` is the folder that the artifacts were uploaded from: clients take the tokenizer and images the code of there.

    Raises:
        ShipyardError: one is not deployed, does not serve, or answers otherwise than its bundle says.
    """
    deployed, served = endpoints(cloud), tasks.services(cloud)

    def one(artifact: Artifact) -> Answers:
        code = store / artifact.key
        manifest = read_json(code / MANIFEST)
        requests = [golden["request"] for golden in manifest["golden"]]
        if artifact.kind == "triton":
            answers = ask_endpoint(cloud, deployed[artifact.name], Codec(code, manifest), requests, COMPARED)
        else:
            containers = served[artifact.name]
            with tasks.run(cloud, containers, code, scratch / artifact.name) as url:
                found = tasks.ask(containers["serve"], url, manifest["task"], requests)
            answers = [places(answer, manifest["level"]) for answer in found]
        _compare(artifact.name, manifest, answers)
        return answers

    if missing := sorted({artifact.name for artifact in artifacts} - deployed.keys() - served.keys()):
        raise ShipyardError("not deployed", value=", ".join(missing), allowed=", ".join([*deployed, *served]))
    with ThreadPoolExecutor() as pool:
        return dict(zip([artifact.name for artifact in artifacts], pool.map(one, artifacts), strict=True))


def ask_endpoint(cloud: Cloud, endpoint: Endpoint, codec: Codec, requests: list[Any], most: int) -> Answers:
    """Send requests to an endpoint as the gateway does, in Triton's binary form; return the first `most` places of each.

    Raises:
        ShipyardError: it does not answer.
    """
    client, answers = cloud.client("sagemaker-runtime"), []
    for request in requests:
        body, size = write_request(codec.encode([request]))
        try:
            answer = client.invoke_endpoint(
                EndpointName=endpoint.name, ContentType=f"{CONTENT};json-header-size={size}", Body=body
            )
        except ClientError as fault:
            raise ShipyardError(f"{endpoint.name}: {fault}") from None
        _, outputs = read_answer(answer["Body"].read(), int(answer["ContentType"].rpartition("=")[2]))
        [found] = codec.decode([request], outputs["rows"], outputs["scores"], [most])
        answers.append(places(found, codec.answer_key, most))
    return answers


def places(answer: Mapping[str, Any], level: str, most: int = COMPARED) -> Places:
    """Return the first places of an answer."""
    return [(found[level], found["score"]) for found in answer[PLURALS[level]][:most]]


def _compare(name: str, manifest: Mapping[str, Any], answers: Answers) -> None:
    """Refuse scores that are not those of the bundle's golden answers; places of nearly equal scores may change."""
    for golden, got in zip(manifest["golden"], answers, strict=True):
        expected = places(golden["answer"], manifest["level"])
        largest = max(1.0, *(abs(score) for _, score in expected))
        for (_, score), (_, wanted) in zip(got, expected, strict=True):
            if not abs(score - wanted) <= TOLERANCE * largest:
                raise ShipyardError(f"{name}: another answer than its bundle's", value=score, allowed=wanted)
