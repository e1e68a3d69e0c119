"""One line of a report, and the meter with which a resource's lines are written."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any, Literal

from infra.cost.prices import Book, Price
from infra.cost.resolve import POINTER, Pointer, Scope, Unknown
from infra.cost.usage import DEFAULTS, HOURS, KEYS, Three, Usage

Status = Literal["fixed", "usage", "free", "unknown", "release"]
"""Whether an amount is fixed, follows usage, is none, is not known, or falls due once a release."""


@dataclass(frozen=True)
class Line:
    """Say what one thing of one resource costs a month, and why.

    `quantity` and `amount` are by scenario: low, expected, high. A usage line without them depends on keys that were not
    given; an unknown line has none and counts as nothing, not as 0.
    """

    stack: str
    account: str
    region: str
    resource: str
    path: str
    type: str
    item: str
    status: Status
    currency: str = ""
    quantity: Three | None = None
    unit: str = ""
    prices: tuple[Price, ...] = ()
    amount: Three | None = None
    properties: tuple[str, ...] = ()
    usage: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""

    @property
    def environment(self) -> str:
        """Return the stage, as `dev`; empty where there is none."""
        return self.stack.partition("/")[0] if "/" in self.stack else ""

    @property
    def part(self) -> str:
        """Return the stack's name within its stage."""
        return part_of(self.stack)


def part_of(stack: str) -> str:
    """Return a stack's name within its stage, as `gpu` of `dev/gpu`; of a nested stack that of its root."""
    return (stack.split("/")[1] if "/" in stack else stack).partition(":")[0]


class NotStatic(Exception):
    """Tell that a property which decides the price is not in the template."""


class View:
    """Read properties of a resource, or of a table in it, and note what was read."""

    def __init__(self, node: Any, where: str = "", reads: dict[str, str] | None = None) -> None:
        self._node, self._where = node, where
        self.reads: dict[str, str] = {} if reads is None else reads

    def get(self, name: str, default: Any = None) -> Any:
        """Return a property as it is; the default where it is left out.

        Raises:
            NotStatic: only a deployment decides it.
        """
        if isinstance(self._node, Unknown):
            raise NotStatic(self._node.reason)
        found = self._node.get(name) if isinstance(self._node, dict) else None
        if isinstance(found, Unknown):
            raise NotStatic(f"{self._where}{name}: {found.reason}")
        if found is None:
            return default
        if isinstance(found, str) and "{{resolve:" in found:
            raise NotStatic(f"{self._where}{name}: a dynamic reference is read when it is deployed")
        if not isinstance(found, dict | list):
            self.reads[f"{self._where}{name}"] = str(found)
        return found

    def whole(self) -> dict[str, Any]:
        """Return all of it, which has been resolved; what is no table is an empty one."""
        return self._node if isinstance(self._node, dict) else {}

    def number(self, name: str, default: int | None = None, *, whole: bool = True) -> Decimal:
        """Return a property that is a number of 0 or more; nearly all that a template has are whole."""
        found = self.get(name, default)
        if found is None:
            raise NotStatic(f"{self._where}{name} is missing")
        try:
            # Python reads 1_000 and digits of other scripts, CloudFormation does not
            number = Decimal(str(found) if str(found).isascii() and "_" not in str(found) else "NaN")
        except InvalidOperation:
            number = Decimal("NaN")
        if isinstance(found, bool) or not number.is_finite() or not 0 <= number <= 10**9:
            raise NotStatic(f"{self._where}{name} is no number: {str(found)[:60]}")
        if whole and number != number.to_integral_value():
            raise NotStatic(f"{self._where}{name} is no whole number: {str(found)[:60]}")
        return number

    def listed(self, name: str) -> list[Any]:
        """Return a property that is a list; an empty one where it is left out."""
        found = self.get(name, [])
        if not isinstance(found, list):
            raise NotStatic(f"{self._where}{name} is no list: {str(found)[:60]}")
        return found

    def text(self, name: str, default: str = "") -> str:
        """Return a property that is a text."""
        found = self.get(name, default)
        if isinstance(found, dict | list | Pointer) or (isinstance(found, str) and POINTER.search(found)):
            raise NotStatic(f"{self._where}{name} is not a static text")
        return str(found)

    def flag(self, name: str) -> bool:
        """Return whether a property is true; left out it is not."""
        return self.text(name, "false").lower() == "true"

    def view(self, name: str) -> "View":
        """Return a table within; an empty one where it is left out."""
        return View(self.get(name, {}), f"{self._where}{name}.", self.reads)

    def items(self, name: str) -> list["View"]:
        """Return the tables of a list within, each with notes of its own."""
        return [View(item, f"{self._where}{name}.{k}.") for k, item in enumerate(self.listed(name))]


@dataclass(frozen=True)
class Resource:
    """A resource of a template, its properties resolved when they are first read."""

    scope: Scope
    id: str
    type: str
    path: str
    raw: Mapping[str, Any] = field(repr=False)

    @cached_property
    def properties(self) -> Any:
        """Return the resolved properties."""
        return self.scope.value(self.raw.get("Properties") or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Return what a usage file may call it: type, logical id, path, and id with its stack's name before."""
        return self.type, self.id, self.path, f"{self.scope.stack.name}/{self.id}"


class Meter:
    """Write the lines of one resource."""

    def __init__(self, resource: Resource, book: Book, usage: Usage) -> None:
        self.resource, self.book, self.usage = resource, book, usage
        self.region = resource.scope.stack.region
        self.hours = usage.hours
        self.lines: list[Line] = []
        self.served: Three | None = None
        self.properties = View(resource.properties)

    def ask(self, key: str) -> tuple[tuple[Any, Any, Any], str] | None:
        """Return a usage key's three values and where they are from."""
        assert key in KEYS, key
        return self.usage.find(self.resource.names, key)

    def serves(self, count: Callable[[Mapping[str, Any]], Decimal], *keys: str) -> None:
        """Note how many predictions the resource makes in the month, where the keys that tell it are given."""
        found = {key: self.ask(key) for key in keys}
        if all(found.values()):
            low, expected, high = (count({k: v[0][s] for k, v in found.items() if v}) for s in range(3))
            self.served = low, expected, high

    def hourly(self, item: str, sku: str, count: Decimal | Three, *, of: View | None = None, **more: Any) -> None:
        """Add what is paid by the hour, for `count` of it that run all the month."""
        self._add(item, sku, each(count, self.hours), "fixed", of=of, **more)

    def monthly(self, item: str, sku: str, count: Decimal | Three, *, of: View | None = None, **more: Any) -> None:
        """Add what is paid by the month; of a part of a month it is a part."""
        self._add(item, sku, each(count, self.hours / HOURS), "fixed", of=of, **more)

    def used(
        self, item: str, sku: str, quantity: Callable[[Mapping[str, Any]], Decimal], *keys: str, of: View | None = None,
        note: str = "", status: Status = "usage",
    ) -> None:  # fmt: skip
        """Add what follows usage: `quantity` computes it from the values of `keys`.

        Without one of them the line has no amount, and tells the price and the keys that it wants. With the status
        "release" it falls due once a release, not each month.
        """
        found = {key: self.ask(key) for key in keys}
        missing = tuple(key for key in keys if found[key] is None and key not in DEFAULTS)
        given = tuple(f"{key} ({source[1]})" for key, source in found.items() if source)
        if missing:
            self._add(item, sku, None, status, of=of, note=note, usage=given, missing=missing)
            return
        three = [quantity({k: found[k][0][s] if found[k] else DEFAULTS[k] for k in keys}) for s in range(3)]  # type: ignore[index]
        # two keys may pull apart; the scenarios of a line still rise
        low, expected, high = sorted(three) if "sync_minutes" in keys else three
        self._add(item, sku, (low, expected, high), status, of=of, note=note, usage=given)

    def told(self, item: str, sku: str, key: str) -> None:
        """Add what one usage key counts, where it is given."""
        if self.ask(key):
            self.used(item, sku, lambda u: u[key], key)

    def release(self, item: str, sku: str, quantity: Decimal, *, of: View | None = None, note: str = "") -> None:
        """Add what falls due once a release."""
        self._add(item, sku, three(quantity), "release", of=of, note=note)

    def free(self, reason: str) -> None:
        """Say that the resource costs nothing, and why."""
        self._line("nothing", "free", note=reason)

    def unknown(self, item: str, reason: str) -> None:
        """Say that something's cost is not known, and why."""
        self._line(item, "unknown", note=reason, properties=_reads(self.properties))

    def _add(
        self, item: str, sku: str, quantity: Three | None, status: Status, *, of: View | None = None, note: str = "",
        usage: Iterable[str] = (), missing: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        properties = _reads(of or self.properties)
        tiers = self.book.find(sku, self.region)
        if not tiers:
            elsewhere = ", ".join(self.book.regions(sku)[:4])
            known = f"; it has one in {elsewhere}" if elsewhere else ""
            reason = f"the price book has no price for {sku} in {self.region}{known}"
            self._line(item, "unknown", note=reason, properties=properties, usage=tuple(usage), quantity=quantity)
            return
        self._line(
            item, status, currency=tiers[0].currency, quantity=quantity, unit=tiers[0].unit, prices=tiers, note=note,
            properties=properties, usage=tuple(usage), missing=missing,
        )  # fmt: skip

    def _line(self, item: str, status: Status, **more: Any) -> None:
        stack = self.resource.scope.stack
        self.lines.append(
            Line(
                stack=stack.name, account=stack.account, region=stack.region, resource=self.resource.id,
                path=self.resource.path, type=self.resource.type, item=item, status=status, **more,
            )
        )  # fmt: skip


def three(count: Decimal | Three) -> Three:
    """Return a count for each scenario."""
    return count if isinstance(count, tuple) else (count, count, count)


def each(count: Decimal | Three, times: Decimal) -> Three:
    """Return a count of units in each scenario, times what each of them has."""
    low, expected, high = three(count)
    return low * times, expected * times, high * times


def _reads(view: View) -> tuple[str, ...]:
    return tuple(f"{name} = {value}" for name, value in view.reads.items())
