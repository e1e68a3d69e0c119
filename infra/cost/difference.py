"""What changes between two reports, line by line; a price that is not known stays out of the sum and is named."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from infra.cost.lines import Line
from infra.cost.report import NOTHING, Report, add
from infra.cost.usage import Three
from infra.cost.words import NONE, unit_price

Sign = Literal["+", "-", "~"]
ZERO = Decimal(0)
DIGITS = 12  # of a currency unit


@dataclass(frozen=True)
class Change:
    """Say how one line changes; without `delta` an amount on one side is not known, or depends on usage."""

    sign: Sign
    line: Line
    before: Three | None
    after: Three | None
    delta: Three | None
    why: tuple[str, ...]
    unknown: bool


@dataclass(frozen=True)
class Difference:
    """Hold the changes from one report to another."""

    old: Report
    new: Report
    changes: tuple[Change, ...]

    def total(self, *, release: bool = False) -> dict[str, Three]:
        """Return the change of the sum by currency: a month, or once a release."""
        return _sum(change for change in self.changes if (change.line.status == "release") == release)

    def compared(self, *, release: bool = False) -> tuple[dict[str, Three], dict[str, Three]]:
        """Return the sums of both sides by currency without what one side alone knows: their difference is `total`."""
        alone = [
            change
            for change in self.changes
            if (change.before is None) != (change.after is None)
            and change.delta is None
            and (change.line.status == "release") == release
        ]
        sums = self.old.total(release=release), self.new.total(release=release)
        for change in alone:
            known, side = (change.before, sums[0]) if change.before else (change.after, sums[1])
            low, expected, high = known or NOTHING
            side[change.line.currency] = add(side[change.line.currency], (-low, -expected, -high))
        return sums

    def by_environment(self) -> dict[str, dict[str, Three]]:
        """Return the change a month by stage and currency."""
        names = sorted({line.environment for report in (self.old, self.new) for line in report.lines})
        monthly = [change for change in self.changes if change.line.status != "release"]
        return {name: _sum(change for change in monthly if change.line.environment == name) for name in names}

    @property
    def one_sided(self) -> list[Change]:
        """Return the changes of which usage tells the amount on one side alone."""
        return [
            change
            for change in self.changes
            if change.delta is None and not change.unknown and (change.before is None) != (change.after is None)
        ]

    @property
    def unknown(self) -> list[Change]:
        """Return the changes to or from a price that is not known."""
        return [change for change in self.changes if change.unknown]


def difference(old: Report, new: Report) -> Difference:
    """Compare two reports; two templates that lie alone in files of other names are one that changed."""
    old = _renamed(old, new)
    before, after = _keyed(old.lines), _keyed(new.lines)
    # a resource of which something is not known on one side: what only the other side has is no rise or fall
    hazy = [{(line.stack, line.path) for line in report.lines if line.status == "unknown"} for report in (new, old)]
    changes = []
    for key in [*after, *(key for key in before if key not in after)]:
        less, more = before.get(key), after.get(key)
        unknown = (more is None and key[:2] in hazy[0]) or (less is None and key[:2] in hazy[1])
        if change := _change(less, more, unknown=unknown):
            changes.append(change)
    changes.sort(key=lambda change: (change.line.stack, change.line.path, change.line.item))
    return Difference(old, new, tuple(changes))


def _renamed(old: Report, new: Report) -> Report:
    """Return a report of one template with the stack's name that another report of one template has."""
    names = [{line.stack.partition(":")[0] for line in report.lines} for report in (old, new)]
    if any(len(found) != 1 or "/" in "".join(found) for found in names) or names[0] == names[1]:
        return old
    [[was], [name]] = names
    lines = (replace(line, stack=name + line.stack.removeprefix(was)) for line in old.lines)
    return replace(old, lines=tuple(lines))


def _keyed(lines: Iterable[Line]) -> dict[tuple[str, str, str, int], Line]:
    """Name lines by what stays when a template changes: stack, path, item, and which of the same it is."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = {}
    for line in lines:
        # an item names its size; another size of the same thing is a change of it, not another thing
        key = (
            line.stack,
            line.path,
            line.item.partition(": ")[0] if line.status in ("fixed", "unknown", "release") else line.item,
        )
        found[*key, seen[key]] = line
        seen[key] += 1
    return found


def _change(old: Line | None, new: Line | None, *, unknown: bool) -> Change | None:
    line = new or old
    assert line is not None
    if old is not None and new is not None:
        same = (old.status, old.item, _rounded(old.amount)) == (new.status, new.item, _rounded(new.amount))
        if same and _prices(old) == _prices(new):
            return None
    elif line.status == "free":
        return None
    unknown = unknown or any(side is not None and side.status == "unknown" for side in (old, new))
    before, after = (side.amount if side else None for side in (old, new))
    depends = any(side is not None and side.amount is None and side.status != "free" for side in (old, new))
    delta = None
    if (
        not unknown
        and not depends
        and not (old and new and old.currency and new.currency and old.currency != new.currency)
    ):
        less, more = before or NOTHING, after or NOTHING
        low, expected, high = (b - a if round(b - a, DIGITS) else ZERO for a, b in zip(less, more, strict=True))
        delta = low, expected, high
    sign: Sign = "+" if old is None else "-" if new is None else "~"
    # the line that has the money names the currency
    shown = line if line.amount is not None or old is None or old.amount is None else old
    return Change(sign, shown, before, after, delta, _why(old, new), unknown)


def _rounded(amount: Three | None) -> Three | None:
    # sums of the same numbers in another order differ in the last of their 28 digits
    return amount and (round(amount[0], DIGITS), round(amount[1], DIGITS), round(amount[2], DIGITS))


def _prices(line: Line) -> list[tuple[Decimal, Decimal]]:
    return [(price.tier_from, price.price / price.per) for price in line.prices]


def _why(old: Line | None, new: Line | None) -> tuple[str, ...]:
    """Return the properties and the unit price that differ, as `InstanceType: a -> b`, and why a price is not known."""
    said = [side.note for side in (old, new) if side is not None and side.status == "unknown"]
    if old is None or new is None:
        return tuple(said)
    sides = [dict(text.split(" = ", 1) for text in side.properties) for side in (old, new)]
    names = [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]
    prices = [unit_price(side) for side in (old, new)]
    if NONE not in prices and prices[0] != prices[1]:
        said.append(f"unit price: {prices[0]} -> {prices[1]}")
    return *(f"{name}: {sides[0].get(name, 'none')} -> {sides[1].get(name, 'none')}" for name in names), *said


def _sum(changes: Iterable[Change]) -> dict[str, Three]:
    sums: dict[str, Three] = {}
    for change in changes:
        if change.delta is not None and any(change.delta):
            sums[change.line.currency] = add(sums.get(change.line.currency, NOTHING), change.delta)
    return dict(sorted(sums.items()))
