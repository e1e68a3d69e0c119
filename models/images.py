"""Images of others that models are served in: Amazon's Triton, by region."""

from serve.errors import ShipyardError

TRITON_REPOSITORY = "sagemaker-tritonserver"
TRITON_TAG = "26.05-py3"
# Amazon's account by region, as `image_uris.retrieve` of the SageMaker SDK has it; GovCloud and China have no image.
TRITON_ACCOUNTS = {
    "ap-northeast-1": "763104351884",
    "ap-northeast-2": "763104351884",
    "ap-south-1": "763104351884",
    "ap-southeast-1": "763104351884",
    "ap-southeast-2": "763104351884",
    "ca-central-1": "763104351884",
    "eu-central-1": "763104351884",
    "eu-north-1": "763104351884",
    "eu-west-1": "763104351884",
    "eu-west-2": "763104351884",
    "eu-west-3": "763104351884",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "sa-east-1": "763104351884",
    "us-east-1": "763104351884",
    "us-east-2": "763104351884",
    "us-west-1": "763104351884",
    "us-west-2": "763104351884",
}


def triton_image(region: str) -> str:
    """Return the URI of Amazon's Triton image in a region.

    Raises:
        ShipyardError: Amazon publishes none there.
    """
    return f"{triton_account(region)}.dkr.ecr.{region}.amazonaws.com/{TRITON_REPOSITORY}:{TRITON_TAG}"


def triton_account(region: str) -> str:
    """Return Amazon's account that publishes the image in a region.

    Raises:
        ShipyardError: Amazon publishes none there.
    """
    if region not in TRITON_ACCOUNTS:
        raise ShipyardError(
            "gpu: no Triton image in this region",
            value=region,
            allowed=", ".join(TRITON_ACCOUNTS),
            mend="choose another region or add Amazon's account to TRITON_ACCOUNTS",
        )
    return TRITON_ACCOUNTS[region]
