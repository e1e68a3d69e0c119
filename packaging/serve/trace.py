"""W3C trace context, https://www.w3.org/TR/trace-context/: a request has a span of its own in its caller's trace."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LONGEST_STATE = 512
"""Characters of tracestate that are passed on; a longer one is dropped whole, as the standard allows."""


@dataclass(frozen=True)
class Trace:
    """Where a request is: its trace, its own span, the span of its caller ("" where it begins the trace), flags, state."""

    id: str
    span: str
    parent: str = ""
    flags: str = "01"
    state: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What goes with each call that the request makes."""
        told = {"traceparent": f"00-{self.id}-{self.span}-{self.flags}"}
        return told | ({"tracestate": self.state} if self.state else {})


def begin(headers: Mapping[str, str]) -> Trace:
    """Return the trace of a request with these headers, by names in small letters; a new one where they tell none."""
    fresh = secrets.token_hex(24)  # one call to the kernel for both
    span = fresh[32:]
    found = PARENT.fullmatch(headers.get("traceparent", ""))
    # version ff is forbidden, 00 has no more fields, and a later one is read by the fields of 00
    if (
        found is None
        or found[1] == "ff"
        or (found[1] == "00" and found[5])
        or not int(found[2], 16) * int(found[3], 16)
    ):
        return Trace(fresh[:32], span)
    state = headers.get("tracestate", "")
    return Trace(found[2], span, found[3], found[4], state if len(state) <= LONGEST_STATE and state.isascii() else "")
