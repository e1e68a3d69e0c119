"""A key of AWS KMS that signs releases and never leaves it."""

import hashlib
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from serve.errors import ShipyardError
from serve.trust import PublicKey


@dataclass(frozen=True)
class KmsKey:
    """An asymmetric key of AWS KMS (ECC_NIST_P256, SIGN_VERIFY): it signs there, and CloudTrail notes who asked.

    `client` is a boto3 client of KMS.
    """

    client: Any
    name: str
    public: ec.EllipticCurvePublicKey

    def sign(self, data: bytes, /) -> bytes:
        """Return the signature of `data`, ECDSA with SHA-256 in DER.

        Raises:
            ShipyardError: KMS refuses or does not answer.
        """
        # the digest, for KMS takes no message of more than 4,096 bytes
        signed = _ask(
            self.client, "sign", self.name, Message=hashlib.sha256(data).digest(), MessageType="DIGEST",
            SigningAlgorithm="ECDSA_SHA_256",
        )  # fmt: skip
        return bytes(signed["Signature"])

    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self.public


def open_key(name: str) -> KmsKey:
    """Open a key of KMS by id, ARN or alias ("alias/shipyard"), with the credentials of the surroundings.

    An ARN tells the region; of an id or alias it is that of the surroundings.

    Raises:
        ShipyardError: KMS refuses, or the key is of another kind.
    """
    region = name.split(":", 4)[3:4] if name.startswith("arn:") else []
    try:
        client = boto3.client("kms", region_name=region[0] if region else None)
    except BotoCoreError as fault:
        raise ShipyardError(f"--key kms:{name}: {fault}", mend="set a region and credentials") from None
    found = _ask(client, "get_public_key", name)
    public = load_der_public_key(found["PublicKey"])
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise ShipyardError(
            f"--key kms:{name}: not a key that Shipyard signs with", value=str(found.get("KeySpec")),
            allowed="ECC_NIST_P256 with usage SIGN_VERIFY", mend="make one: aws kms create-key --key-spec ECC_NIST_P256 "
            "--key-usage SIGN_VERIFY",
        )  # fmt: skip
    return KmsKey(client, name, public)


def _ask(client: Any, operation: str, name: str, **arguments: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = getattr(client, operation)(KeyId=name, **arguments)
    except (BotoCoreError, ClientError) as fault:
        raise ShipyardError(
            f"--key kms:{name}: {fault}", mend="check the key, its policy (kms:GetPublicKey, kms:Sign) and the network"
        ) from None
    return answer
