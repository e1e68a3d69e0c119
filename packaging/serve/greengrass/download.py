"""Read one object of a bucket to standard output, with the device's own credentials (Greengrass' token exchange)."""

import sys

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def main(arguments: list[str]) -> int:
    """Take s3://bucket/key and its size; write that many bytes, or exit with 1."""
    uri, size = arguments
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        s3 = boto3.client("s3", config=Config(connect_timeout=20, read_timeout=60, retries={"max_attempts": 3}))
        body = s3.get_object(Bucket=bucket, Key=key)["Body"].read(int(size) + 1)
    except (BotoCoreError, ClientError, OSError) as fault:
        print(f"error: {uri}: {fault}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(body)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
