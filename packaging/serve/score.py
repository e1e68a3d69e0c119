"""Answer all requests that wait in a bucket, by the bundle of one model: offline scoring, as a task that ends.

Below the given address, `in/` holds objects of JSON lines, gzipped where their name ends in .gz: each line is a request with
an `id` of the caller's. `out/ARTIFACT/` gets an object of the same name, with a line of the same id for each: the answer, or
the error of a request that is wrong. A second run writes the same again; who puts requests there takes them away.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from serve.codec import BadRequest
from serve.errors import ShipyardError
from serve.runtime import Model, open_bundle
from serve.trust import add_trust, trusted

BATCH = 64


def score(model: Model, name: str, uri: str) -> dict[str, int]:
    """Answer what waits below `uri` (s3://bucket/prefix/) as artifact `name`; return how many objects, answers and errors.

    Raises:
        ShipyardError: the bucket does not answer, or an object is not of JSON lines.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    told = {"objects": 0, "answers": 0, "errors": 0}
    try:
        s3 = boto3.client("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}in/")
        for key in (found["Key"] for page in pages for found in page.get("Contents", [])):
            content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            lines = list(_answers(model, content, f"s3://{bucket}/{key}", packed=key.endswith(".gz")))
            body = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
            s3.put_object(
                Bucket=bucket, Key=f"{prefix}out/{name}/{key.removeprefix(f'{prefix}in/')}",
                # the same bytes again, whenever it runs
                Body=gzip.compress(body, mtime=0) if key.endswith(".gz") else body,
            )  # fmt: skip
            errors = sum("error" in line for line in lines)
            told["objects"] += 1
            told["errors"] += errors
            told["answers"] += len(lines) - errors
    except (Boto3Error, BotoCoreError, ClientError) as fault:
        raise ShipyardError(f"{uri}: {fault}", mend="let this role list and read in/, and write out/") from None
    return told


def _answers(model: Model, content: bytes, where: str, *, packed: bool) -> Iterator[dict[str, Any]]:
    """Yield the answers of an object's requests, in their order."""
    try:
        documents = [json.loads(line) for line in (gzip.decompress(content) if packed else content).splitlines()]
        waiting = [(document.pop("id"), document) for document in documents]
    except (ValueError, KeyError, AttributeError, TypeError, OSError, EOFError) as fault:
        raise ShipyardError(f"{where}: no lines of requests with an id", value=str(fault)) from None
    for start in range(0, len(waiting), BATCH):
        batch = waiting[start : start + BATCH]
        found: dict[int, dict[str, Any]] = {}
        right: list[tuple[int, dict[str, Any], int]] = []
        for i, (_, request) in enumerate(batch):
            try:
                right.append((i, request, model.check(request, "request")))
            except BadRequest as fault:
                found[i] = {"error": str(fault)}
        answers = model.answer([request for _, request, _ in right], [wanted for _, _, wanted in right])
        found |= {i: answer for (i, _, _), answer in zip(right, answers, strict=True)}
        yield from ({"id": own, **found[i]} for i, (own, _) in enumerate(batch))


def main(arguments: list[str] | None = None) -> int:
    """Score, and print what was done as JSON; exit with 1 when it fails."""
    parser = argparse.ArgumentParser(prog="python -m serve.score", description=__doc__)
    parser.add_argument("uri", help="s3://bucket/prefix/ above in/ and out/")
    parser.add_argument("--bundle", type=Path, required=True, help="folder that serve.fetch has filled")
    parser.add_argument("--artifact", required=True, help="name that the bundle was attested as")
    add_trust(parser)
    chosen = parser.parse_args(arguments)
    try:
        model = open_bundle(chosen.bundle, chosen.artifact, chosen.attestation, trusted(chosen.trusted_key))
        print(json.dumps(score(model, chosen.artifact, chosen.uri)))
    except (ShipyardError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
