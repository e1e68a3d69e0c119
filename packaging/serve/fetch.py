"""Fetch a bundle from the artifact bucket into a folder, and leave nothing there that is not attested.

The cluster's init container runs it. bundle.json is verified first; each further file is checked as it arrives.
"""

import argparse
import shutil
import sys
from pathlib import Path

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST, Keys, add_trust, check_bundle, trusted, verify_attestation


def fetch(uri: str, name: str, attestation: str, keys: Keys, into: Path) -> None:
    """Download the bundle at `uri` (s3://bucket/prefix/) and move it to `into` once it is whole and verified.

    Raises:
        ShipyardError: the bucket does not answer, or what it holds is not the attested bundle.
    """
    part = into / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _download(uri, name, attestation, keys, part)
        for path in part.iterdir():
            if (place := into / path.name).is_dir():
                shutil.rmtree(place)  # of a fetch before: a folder takes the place of an empty one alone
            path.replace(place)
    finally:
        # what failed halfway is not attested
        shutil.rmtree(part)


def _download(uri: str, name: str, attestation: str, keys: Keys, part: Path) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    try:
        s3 = boto3.client("s3")
        s3.download_file(bucket, prefix + MANIFEST, str(part / MANIFEST))
        digest = sha256_file(part / MANIFEST)
        verify_attestation(name, digest, attestation, keys, uri)
        for entry in read_json(part / MANIFEST)["files"]:
            file = part / entry["path"]
            if not file.resolve().is_relative_to(part.resolve()):
                raise ShipyardError(f"{uri}: a path leaves the bundle", value=entry["path"])
            file.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, prefix + entry["path"], str(file))
    except (Boto3Error, BotoCoreError, ClientError) as fault:
        raise ShipyardError(
            f"{uri}: {fault}", mend="upload the release, or grant this role to read the prefix"
        ) from None
    check_bundle(part, digest)


def main(arguments: list[str] | None = None) -> int:
    """Fetch; exit with 1 when it fails."""
    parser = argparse.ArgumentParser(prog="python -m serve.fetch", description=__doc__)
    parser.add_argument("uri", help="s3://bucket/prefix/ of the bundle")
    parser.add_argument("--artifact", required=True, help="name that the bundle was attested as")
    parser.add_argument("--into", type=Path, required=True, help="empty folder to write to")
    add_trust(parser)
    chosen = parser.parse_args(arguments)
    try:
        fetch(chosen.uri, chosen.artifact, chosen.attestation, trusted(chosen.trusted_key), chosen.into)
    except (ShipyardError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
