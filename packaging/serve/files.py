"""Files: their digests, and JSON in them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 as 64 hex digits, read in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ShipyardError: the file is missing, truncated, or is no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShipyardError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as fault:
        raise ShipyardError(f"{path}: not valid JSON: {fault}", mend="restore the file") from None
    if not isinstance(document, dict):
        raise ShipyardError(f"{path}: not a JSON object", value=type(document).__name__, mend="restore the file")
    return document
