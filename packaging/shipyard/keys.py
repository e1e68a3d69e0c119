"""The key that signs releases: a file outside the repository, made on first use, or a key that never leaves AWS KMS."""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from models.release import Signer
from serve.errors import ShipyardError
from serve.trust import key_id
from shipyard.stage import write

KMS = "kms:"


def open_key(given: str | None, default: Path) -> Signer:
    """Return the key that signs: `given` is a file or kms:KEY; without it the file `default`, made on first use.

    Raises:
        ShipyardError: there is no such key, or it is not fit to sign.
    """
    if given is not None and given.startswith(KMS):
        try:
            from shipyard import kms  # not at the top: only a key in KMS needs boto3
        except ModuleNotFoundError:
            raise ShipyardError("--key: boto3 is not installed", mend="pip install 'shipyard[aws]'") from None
        return kms.open_key(given.removeprefix(KMS))
    return signing_key(Path(given) if given is not None else default, make=given is None)


def signing_key(file: Path, *, make: bool = True) -> Ed25519PrivateKey:
    """Read the private key of `file` (PKCS 8, PEM), or make it there with mode 0600 if `make` allows it.

    Raises:
        ShipyardError: the file is missing and may not be made, is no Ed25519 key, or others can read it.
    """
    if not file.exists() and not make:
        raise ShipyardError(f"{file}: no such signing key", mend="correct --key; without it a key of your own is made")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = Ed25519PrivateKey.generate()
        part = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        try:
            os.link(part, file)  # fails where another process was first, whose key then counts
        except FileExistsError:
            pass
        finally:
            part.unlink()
    if (mode := file.stat().st_mode & 0o777) & 0o077:
        raise ShipyardError(
            f"{file}: others can read the signing key", value=oct(mode), allowed="0o600", mend="chmod 600"
        )
    try:
        found = load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise ShipyardError(f"{file}: not an Ed25519 private key in PEM", mend="move it away; a new one is made")
    return found


def write_public(key: Signer, folder: Path) -> Path:
    """Write the public half as <key id>.pub in OpenSSH's one-line form; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    public = key.public_key()
    file = folder / f"{key_id(public)}.pub"
    write(file, public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + " shipyard release\n")
    return file
