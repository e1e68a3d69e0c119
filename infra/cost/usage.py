"""The usage file: what the templates cannot tell, in low, expected and high, for resources that a pattern names."""

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from models.release import ShipyardError

HOURS = Decimal(730)
"""Hours of a month: 365 days of 24 hours in twelve months."""

KB_PER_GB = Decimal(1024 * 1024)
MB_PER_GB = Decimal(1024)

SCENARIOS = ("low", "expected", "high")

Three = tuple[Decimal, Decimal, Decimal]
"""A quantity or an amount in the scenarios low, expected and high."""

Day = tuple[Decimal, ...]
"""A value for each of 24 hours of a day."""

KEYS = {
    # load
    "requests_per_second": "requests a second, one number or 24 by hour of the day",
    "request_kb": "size of a request, KB of 1024 bytes",
    "response_kb": "size of a response, KB",
    "unit_requests_per_second": "requests a second that one instance or task takes before one more is started",
    "connections_per_second": "new connections a second at a load balancer",
    "connection_seconds": "how long a connection stays open",
    "internet_gb": "data sent to the internet, GB a month",
    "cross_zone_gb": "data that tasks, instances or an NLB send across zones, GB a month, each way counted",
    "inter_region_gb": "data sent to another region, GB a month",
    "processed_gb": "data through a NAT gateway, an endpoint or a connection, GB a month",
    # devices
    "devices": "Greengrass core devices that are active in the month",
    "sync_minutes": "minutes between two messages of a device to the cloud",
    "message_kb": "size of such a message, KB",
    "predictions_per_device_per_day": "predictions that a device makes in a day, for the cost of a million",
    # what is kept
    "storage_gb": "data stored, GB, in the first month",
    "storage_growth_gb": "data that is added a month, GB",
    "months": "how many months of growth the priced month has behind it (default 0)",
    "put_requests": "writes and listings a month",
    "get_requests": "reads a month",
    "log_gb": "logs taken in a month, GB",
    "log_scanned_gb": "logs scanned by queries, GB a month",
    "reads": "read units a month",
    "writes": "write units a month",
    # calls
    "api_requests": "calls of the service's own API a month",
    "invocations": "calls of a function a month",
    "duration_ms": "how long one call or execution takes, ms",
    "executions": "executions of a state machine a month",
    "transitions": "state transitions of one execution",
    "memory_mb": "memory of one express execution, MB",
    "messages": "messages or events a month",
    "payload_kb": "size of a message or event, KB",
    "notifications": "notifications sent a month",
    "records": "records taken in a month",
    "record_kb": "size of a record, KB",
    "connection_minutes": "minutes that clients of a WebSocket API stay connected, all together, a month",
    "queries": "DNS queries a month",
    "metrics": "custom metrics that are written",
    "build_minutes": "minutes of builds a month",
    "action_minutes": "minutes of pipeline actions a month",
    "deployment_minutes": "minutes for which a release runs old and new beside each other",
}
"""Every key with its meaning."""

DEFAULTS = {"connection_seconds": Decimal(0), "months": Decimal(0), "storage_growth_gb": Decimal(0)}
"""Keys that need not be given, with the value that then holds."""


@dataclass(frozen=True)
class Usage:
    """Hold the tables of a usage file: a pattern and the values of its keys; a later table wins over an earlier one."""

    tables: tuple[tuple[str, Mapping[str, tuple[Any, Any, Any]]], ...] = ()
    hours: Decimal = HOURS
    free_tier: bool = False
    source: str = "no usage file"
    asked: set[tuple[int, str]] = field(default_factory=set, compare=False)
    """What was looked up, so that a key which nothing reads is found."""

    def find(self, names: Iterable[str], key: str) -> tuple[tuple[Any, Any, Any], str] | None:
        """Return a key's three values and the pattern that gave them, for a resource known by these names."""
        found, called = None, tuple(names)
        for place, (pattern, values) in enumerate(self.tables):
            if key in values and any(fnmatchcase(name, pattern) for name in called):
                self.asked.add((place, key))
                found = values[key], "all" if pattern == "*" else pattern
        return found

    def check(self, names: Iterable[Iterable[str]]) -> None:
        """Refuse keys that nothing has looked up.

        Raises:
            ShipyardError: a pattern matches no resource, or no resource that it matches reads the key.
        """
        known = [tuple(called) for called in names]
        for place, (pattern, values) in enumerate(self.tables):
            for key in values:
                if (place, key) in self.asked:
                    continue
                where = f"{self.source}: {'all' if pattern == '*' else pattern}.{key}"
                if not any(fnmatchcase(name, pattern) for called in known for name in called):
                    every = sorted({name for called in known for name in called})
                    raise ShipyardError(
                        f"{where}: the pattern matches no resource", mend=_hint(pattern, every, "name one of them")
                    )
                raise ShipyardError(f"{where}: no resource that it matches reads this key", mend="remove the key")


def traffic_gb(u: Mapping[str, Any], hours: Decimal) -> Decimal:
    """Return the GB of a month's requests and responses together."""
    return requests(u["requests_per_second"], hours) * (u["request_kb"] + u["response_kb"]) / KB_PER_GB


def requests(rate: Day, hours: Decimal) -> Decimal:
    """Return the requests of a month from requests a second by hour of the day."""
    return sum(rate, Decimal(0)) / 24 * 3600 * hours


def load_usage(path: Path) -> Usage:
    """Read and validate a usage file.

    Raises:
        ShipyardError: no such file, no TOML, an unknown key, or a value that is none.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise ShipyardError(f"{path}: not a usage file: {fault}", mend="see docs/cost.md") from None
    month = table.pop("month", {})
    tables = []
    for name, values in table.items():
        if not isinstance(values, dict):
            raise ShipyardError(
                f"{path}: {name}: not a table", mend=f'write it below [all] or ["PATTERN"], as {name} = 1'
            )
        read = {key: _values(value, f"{path}: {name}.{key}", key) for key, value in values.items()}
        tables.append(("*" if name == "all" else name, read))
    if not isinstance(month, dict):
        raise ShipyardError(f"{path}: month: not a table", value=month, mend="write [month] above hours and free_tier")
    if unknown := sorted(month.keys() - {"hours", "free_tier"}):
        raise ShipyardError(f"{path}: month: unknown key", value=", ".join(unknown), allowed="hours, free_tier")
    hours, free = month.get("hours", HOURS), month.get("free_tier", False)
    if (
        isinstance(hours, bool)
        or not isinstance(hours, int | Decimal)
        or not (Decimal(hours).is_finite() and 0 < hours <= 744)
        or free not in (True, False)
    ):
        raise ShipyardError(
            f"{path}: month: out of range", value=f"{hours}, {free}", allowed="hours up to 744; free_tier true or false"
        )
    return Usage(tuple(tables), Decimal(hours), free, str(path))


def _values(value: Any, where: str, key: str) -> tuple[Any, Any, Any]:
    if key not in KEYS:
        raise ShipyardError(f"{where}: unknown key", allowed=", ".join(KEYS), mend=_hint(key, KEYS, "remove it"))
    if isinstance(value, dict):
        if set(value) != set(SCENARIOS):
            raise ShipyardError(f"{where}: not one value a scenario", allowed="{ low = 1, expected = 2, high = 3 }")
        found = [_value(value[name], where, key) for name in SCENARIOS]
    else:
        found = [_value(value, where, key)] * 3
    days = [part if isinstance(part, tuple) else (part,) for part in found]
    falling = any(not all(a <= b for a, b in zip(less, more, strict=True)) for less, more in itertools.pairwise(days))
    # a long time between messages, and a large unit, cost less
    if falling and key not in ("sync_minutes", "unit_requests_per_second"):
        raise ShipyardError(f"{where}: the scenarios do not rise", allowed="low, then expected, then high")
    return found[0], found[1], found[2]


def _value(value: Any, where: str, key: str) -> Any:
    if key == "requests_per_second":
        hours = value if isinstance(value, list) else [value] * 24
        if len(hours) != 24:
            raise ShipyardError(f"{where}: {len(hours)} hours", allowed="one number, or 24")
        return tuple(_number(part, where) for part in hours)
    found = _number(value, where)
    if found == 0 and key in ("sync_minutes", "unit_requests_per_second"):
        raise ShipyardError(f"{where}: 0", allowed="more than 0")
    return found


def _number(value: Any, where: str) -> Decimal:
    found = value if isinstance(value, int | Decimal) and not isinstance(value, bool) else -1
    if not Decimal(found).is_finite() or not 0 <= found <= 10**15:
        raise ShipyardError(f"{where}: not a quantity", value=value, allowed="a number from 0 to 10^15")
    return Decimal(value)


def _hint(text: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(text, list(known), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else otherwise
