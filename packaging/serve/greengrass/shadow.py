"""The named shadow on the wire: its topics, the center's word in a message, and a device's report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import ShipyardError
from serve.greengrass.words import LARGEST_REPORT, LARGEST_TOLD, SHADOW, Told, dump, read_told


@dataclass(frozen=True)
class Topics:
    """The reserved topics of a thing's named shadow (AWS IoT developer guide, "Device Shadow MQTT topics")."""

    thing: str

    @property
    def prefix(self) -> str:
        """What all begin with."""
        return f"$aws/things/{self.thing}/shadow/name/{SHADOW}"

    @property
    def heard(self) -> tuple[str, ...]:
        """What a device listens to."""
        return tuple(f"{self.prefix}/{end}" for end in ("get/accepted", "get/rejected", "update/delta"))


def told_in(topic: str, payload: bytes) -> Told | None:
    """Return the center's word in a message of the shadow, None where there can be none.

    Raises:
        ShipyardError: there is no word in it yet, or one that this runtime does not understand.
    """
    if len(payload) > 4 * LARGEST_TOLD or not topic.endswith(("/get/accepted", "/update/delta")):
        return None
    try:
        state = json.loads(payload)["state"]
        text = (state["desired"] if topic.endswith("/get/accepted") else state)["told"]
        return read_told(text)
    except (ShipyardError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise ShipyardError(f"not understood: {fault}") from None


def update(status: Mapping[str, Any], telemetry: Mapping[str, Any], echo: str | None) -> bytes:
    """Return the message that reports: the totals where they fit, and what the center told once it is settled."""
    text = dump({**status, "telemetry": telemetry})
    if len(text.encode()) > LARGEST_REPORT:
        text = dump(status)
    reported = {"report": text} | ({} if echo is None else {"told": echo})
    return dump({"state": {"reported": reported}}).encode()
