"""Amounts, quantities and prices as people read them."""

from decimal import Decimal
from typing import Any

from infra.cost.lines import Line
from infra.cost.prices import Price

SIGNS = {"USD": "$", "CNY": "CN¥"}
NONE = "\u2013"


def money(amount: Any, currency: str, *, signed: bool = False) -> str:
    """Return an amount with its currency, to the cent; of less than a cent what it is."""
    value = Decimal(str(amount))
    sign = "\u2212" if value < 0 else "+" if signed and value > 0 else ""
    text = f"{abs(value):,.2f}" if abs(value) >= Decimal("0.01") or not value else f"{abs(value):.2g}"
    return f"{sign}{SIGNS.get(currency, currency + ' ')}{text}"


def quantity(line: Line) -> str:
    """Return a line's quantity, one number where the scenarios agree."""
    if line.quantity is None:
        return NONE
    numbers = list(dict.fromkeys(_number(value) for value in line.quantity))
    return f"{' / '.join(numbers)} {line.unit}".strip()


def unit_price(line: Line) -> str:
    """Return the price of a unit, and of each tier where there are several."""
    if not line.prices:
        return NONE
    first, *more = line.prices
    tiers = "".join(f"; {_price(tier)} from {_number(tier.tier_from)}" for tier in more)
    return f"{_price(first)} per {_per(first)}{tiers}"


def amount(line: Line, scenario: int) -> str:
    """Return a line's amount in a scenario; what it depends on, or that it is unknown, where it has none."""
    if line.amount is not None:
        return money(line.amount[scenario], line.currency)
    return {"free": "free", "unknown": "unknown"}.get(line.status, "by usage")


def because(line: Line) -> str:
    """Return why a line is what it is: properties, usage keys, keys that are missing, its note."""
    parts = [*line.properties, *(f"usage {key}" for key in line.usage)]
    if line.missing:
        parts.append(f"depends on usage, give {', '.join(line.missing)}")
    return "; ".join([*parts, line.note] if line.note else parts)


def evidence(line: Line) -> str:
    """Return source, date and confidence of a line's price."""
    if not line.prices:
        return ""
    price = line.prices[0]
    doubt = f" ({price.note})" if price.note else ""
    return f"{price.source}, {price.date}, confidence {price.confidence}{doubt}"


def _price(price: Price) -> str:
    return f"{SIGNS.get(price.currency, price.currency + ' ')}{price.price.normalize():f}"


def _per(price: Price) -> str:
    return price.unit if price.per == 1 else f"{_number(price.per)} {price.unit}s"


def _number(value: Decimal) -> str:
    if value >= 1_000_000_000:
        return f"{value / 1_000_000_000:,.4g}B"
    if value >= 1_000_000:
        return f"{value / 1_000_000:,.4g}M"
    return f"{value:,.2f}".rstrip("0").rstrip(".") if value >= 1 or not value else f"{value:.3g}"
