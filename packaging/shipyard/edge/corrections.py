"""The lock of corrections: releases/calibration.lock, what `shipyard edge merge` made of what devices have learned.

By sub-model, the correction [a, b] of its calibration's log odds, and of how much it was made. The next release takes it up.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shipyard.stage import write

LOCK = "calibration.lock"


def read_corrections(releases: Path) -> dict[str, dict[str, Any]]:
    """Return what was merged, by sub-model; nothing where nothing was."""
    path = releases / LOCK
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write_corrections(releases: Path, merged: Mapping[str, Mapping[str, Any]]) -> None:
    """Put merged corrections into the lock, beside those of other sub-models."""
    write(releases / LOCK, json.dumps(read_corrections(releases) | dict(merged), indent=1, sort_keys=True) + "\n")
