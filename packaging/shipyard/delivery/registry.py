"""Registry: a published release as a model package in the SageMaker Model Registry, a group an environment.

The containers are what SageMaker serves of the release: its Triton artifacts. The figures and the lineage are those of the
whole release. A package is found by its description, so that a second registration makes none.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from models.config import Environment, Fleet, triton_image
from models.lineage import papers_folder
from models.release import Artifact, Release, read_release
from serve.errors import ShipyardError
from serve.trust import load_keys
from shipyard.console import Reporter
from shipyard.papers.files import FIGURES, verify_papers
from shipyard.upload import open_store, upload

APPROVALS = {"pending": "PendingManualApproval", "approved": "Approved", "rejected": "Rejected"}

TYPES = ["application/octet-stream", "application/json"]
"""What SageMaker passes on to Triton: its binary form and its JSON."""


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Register a release of releases/; return the exit code.

    Raises:
        ShipyardError: the environment or release is not known, a paper is not what was signed, or AWS refuses.
    """
    if chosen.env not in fleet.env:
        raise ShipyardError("register: no such environment", value=chosen.env, allowed=", ".join(fleet.env))
    path = root / "releases" / f"{chosen.version}.json"
    keys = load_keys(path.parent / "keys")
    found = read_release(path, keys, fleet.project.minimum_sequence)
    verify_papers(path, found, keys)
    env, bucket = fleet.env[chosen.env], fleet.bucket(chosen.env)
    try:
        client = boto3.client("sagemaker", region_name=env.region)
    except BotoCoreError as fault:
        raise ShipyardError(f"register: {fault}", mend="set credentials") from None
    if found.papers:
        named = {
            "name": "papers", "key": papers_key(found),
            "files": [{"path": p.name, "sha256": p.sha256, "bytes": p.bytes} for p in found.papers],
        }  # fmt: skip
        upload(open_store(f"s3://{bucket}", owner=env.account), named, papers_folder(path), reporter.progress)
    group = f"{fleet.project.name}-{chosen.env.replace('_', '-')}"
    told = register(client, found, env, bucket, group, chosen.approval, chosen.why)
    print(json.dumps(told) if chosen.json else f"{told['state']}  {told['arn']}: {told['approval']}")
    return 0


def papers_key(found: Release) -> str:
    """Return the prefix of a release's papers in any bucket."""
    return f"papers/{found.version}/"


def register(
    client: Any, found: Release, env: Environment, bucket: str, group: str, approval: str | None = None, why: str = ""
) -> dict[str, str]:
    """Put a release into a model package group, which is made first where it is not there.

    Args:
        client: boto3's client of SageMaker.
        found: a verified release.
        env: the environment whose account and region it is.
        bucket: the environment's artifact bucket.
        group: name of the model package group.
        approval: of APPROVALS; None leaves what is there, and leaves a new package pending.
        why: reason of the approval.

    Returns:
        `arn`, `state` ("registered", "changed" or "unchanged") and `approval` as SageMaker calls it.

    Raises:
        ShipyardError: AWS refuses, or a package of this version is of another release.
    """
    _group(client, group)
    arn, state = _find(client, group, found), "unchanged"
    wanted = None if approval is None else APPROVALS[approval]
    if arn is None:
        state = "registered"
        made = _ask(
            client.create_model_package,
            ModelPackageGroupName=group,
            ModelPackageDescription=_description(found),
            InferenceSpecification=_inference(found, env, bucket),
            ModelApprovalStatus=APPROVALS["pending"],
            CustomerMetadataProperties=_facts(found),
            # a try that was cut off, or another one at the same time, counts once
            ClientToken=hashlib.sha256(f"{group} {found.version}".encode()).hexdigest()[:36],
            **_metadata(found, bucket),
        )
        arn = str(made["ModelPackageArn"])
    there = _ask(client.describe_model_package, ModelPackageName=arn)["ModelApprovalStatus"]
    if wanted is not None and there != wanted:
        reason = {"ApprovalDescription": why} if why else {}
        # with the facts, so that whoever approves says of what
        _ask(
            client.update_model_package, ModelPackageArn=arn, ModelApprovalStatus=wanted,
            CustomerMetadataProperties=_facts(found), **reason,
        )  # fmt: skip
        state, there = ("changed" if state == "unchanged" else state), wanted
    return {"arn": arn, "state": state, "approval": there}


def _group(client: Any, group: str) -> None:
    """Make the group where there is none; of two that make it at once, one is told that it is there."""

    def there() -> None:
        _ask(client.describe_model_package_group, ModelPackageGroupName=group)

    try:
        there()
    except ShipyardError:
        told = f"Releases of {group}, by shipyard register"
        try:
            _ask(client.create_model_package_group, ModelPackageGroupName=group, ModelPackageGroupDescription=told)
        except ShipyardError as fault:
            try:
                there()
            except ShipyardError:
                raise fault from None


def _find(client: Any, group: str, found: Release) -> str | None:
    """Return the package of a release, None where there is none yet."""
    pages = client.get_paginator("list_model_packages").paginate
    for page in _ask(lambda: list(pages(ModelPackageGroupName=group))):
        for summary in page["ModelPackageSummaryList"]:
            if summary.get("ModelPackageDescription") != _description(found):
                continue
            arn = str(summary["ModelPackageArn"])
            told = _ask(client.describe_model_package, ModelPackageName=arn).get("CustomerMetadataProperties") or {}
            if told != _facts(found):
                raise ShipyardError(
                    f"register: {arn}: registered with other facts", value=told.get("signature", "")[:16],
                    allowed=_facts(found)["signature"][:16], mend="delete that package, or find out who made it",
                )  # fmt: skip
            return arn
    return None


def _description(found: Release) -> str:
    return f"release {found.version}"


def _facts(found: Release) -> dict[str, str]:
    """Return lineage and figures; SageMaker takes 50 of them, of letters, digits and _.:/=+-@ alone."""
    source = found.source
    facts = {
        "version": found.version, "sequence": str(found.sequence), "profile": found.profile,
        "signature": hashlib.sha256(found.signature.value.encode()).hexdigest(), "signer": found.signature.key_id,
        "data_sha256": source.data_sha256, "base": source.base, "base_sha256": source.base_sha256,
        "code_sha256": source.code_sha256,
    }  # fmt: skip
    facts |= {f"papers/{paper.name}": paper.sha256 for paper in found.papers}
    for name, sub in found.submodels.items():
        after, metric = sub.score.after, sub.score.metric
        for part, value in (("", after.value), ("/low", after.low), ("/high", after.high)):
            facts[f"{name}/{metric}{part}"] = f"{value:.5f}"
    return dict(list(facts.items())[:50])


def _metadata(found: Release, bucket: str) -> dict[str, Any]:
    """Return where the figures lie and which commit it is, as far as the release tells."""
    told: dict[str, Any] = {}
    if any(paper.name == FIGURES for paper in found.papers):
        uri = f"s3://{bucket}/{papers_key(found)}{FIGURES}"
        told["ModelMetrics"] = {"ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": uri}}}
    if found.source.commit is not None:
        told["MetadataProperties"] = {"CommitId": found.source.commit}
    return told


def _inference(found: Release, env: Environment, bucket: str) -> dict[str, Any]:
    artifacts = found.of("triton")
    if not artifacts:
        raise ShipyardError(f"register: {found.version} has nothing that SageMaker serves", allowed="a Triton artifact")
    return {
        "Containers": [_container(artifact, env, bucket) for artifact in artifacts],
        "SupportedContentTypes": TYPES,
        "SupportedResponseMIMETypes": TYPES,
        "SupportedRealtimeInferenceInstanceTypes": [env.gpu.instance_type, *env.gpu.fallback],
    }


def _container(artifact: Artifact, env: Environment, bucket: str) -> dict[str, Any]:
    """Return a container as the stack gives it to SageMaker."""
    data = artifact.template["model_data"]
    kind = {"S3DataType": "S3Prefix", "CompressionType": "None"}
    if not data.endswith("/"):
        kind = {"S3DataType": "S3Object", "CompressionType": "Gzip"}
    return {
        "ContainerHostname": artifact.name,
        "Image": triton_image(env.region),
        "ModelDataSource": {"S3DataSource": {"S3Uri": f"s3://{bucket}/{artifact.key}{data}", **kind}},
        "Environment": artifact.template["environment"],
    }


def _ask(work: Callable[..., Any], **arguments: Any) -> Any:
    """Call AWS; say a refusal in one line."""
    try:
        return work(**arguments)
    except (ClientError, BotoCoreError) as fault:
        raise ShipyardError(
            f"register: {fault}", mend="check the region, your credentials and rights; the same command goes on"
        ) from None
