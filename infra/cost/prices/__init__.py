"""The price book: dated list prices with source, currency and confidence, and what a quantity costs through its tiers."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field

from models.release import ShipyardError

Confidence = Literal["high", "medium", "low", "derived"]
COLUMNS = ("sku", "region", "unit", "per", "currency", "tier_from", "price", "date", "confidence", "note", "source")
GLOBAL = "global"


@dataclass(frozen=True)
class Price:
    """Say what `per` units cost from `tier_from` units a month on, who says so, when, and how sure that is."""

    sku: str
    region: str
    unit: str
    per: Decimal
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    tier_from: Decimal
    price: Decimal
    date: str
    confidence: Confidence
    note: str
    source: str


@dataclass(frozen=True)
class Book:
    """Hold prices by sku and region, each a tuple of tiers in rising order."""

    rows: Mapping[tuple[str, str], tuple[Price, ...]]

    def find(self, sku: str, region: str) -> tuple[Price, ...]:
        """Return the tiers of a price in a region, or of a global one; empty where the book has none."""
        return self.rows.get((sku, region)) or self.rows.get((sku, GLOBAL), ())

    def regions(self, sku: str) -> list[str]:
        """Name the regions for which the book knows a price."""
        return sorted(region for name, region in self.rows if name == sku)

    def flat(self) -> list[Price]:
        """Return every row, in the order of the file."""
        return [price for key in sorted(self.rows) for price in self.rows[key]]


def charge(tiers: tuple[Price, ...], quantity: Decimal) -> Decimal:
    """Return what a month's quantity costs: each part of it at the price of the tier into which it falls."""
    total = Decimal(0)
    for tier, above in zip(tiers, (*tiers[1:], None), strict=True):
        end = quantity if above is None else min(quantity, above.tier_from)
        if end > tier.tier_from:
            total += (end - tier.tier_from) * tier.price / tier.per
    return total


def load_book(path: Path | None = None) -> Book:
    """Read a price book; without a path the one that comes with this package.

    Raises:
        ShipyardError: no such file, or a row is not what it should be.
    """
    where = str(path or "prices/aws.csv")
    try:
        text = (path or files(__name__) / "aws.csv").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ShipyardError(f"{where}: cannot be read: {fault}", mend="name a price book") from None
    return parse_book(text, where)


def parse_book(text: str, where: str) -> Book:
    """Return the book of a CSV text.

    Raises:
        ShipyardError: a column or a row is not what it should be.
    """
    reader = csv.reader(io.StringIO(text))
    if tuple(next(reader, ())) != COLUMNS:
        raise ShipyardError(f"{where}: not the columns of a price book", allowed=",".join(COLUMNS))
    found: dict[tuple[str, str], list[Price]] = {}
    for row in reader:
        if price := _price(row, f"{where}, line {reader.line_num}"):
            found.setdefault((price.sku, price.region), []).append(price)
    for (sku, region), tiers in found.items():
        tiers.sort(key=lambda tier: tier.tier_from)
        starts = [tier.tier_from for tier in tiers]
        shapes = {(tier.unit, tier.per, tier.currency) for tier in tiers}
        if starts[0] != 0 or len(set(starts)) < len(starts) or len(shapes) > 1:
            raise ShipyardError(
                f"{where}: the tiers of {sku} in {region} do not fit together",
                allowed="a first tier from 0, each start once, one unit and one currency",
            )
    return Book({key: tuple(tiers) for key, tiers in found.items()})


def write_book(prices: Iterable[Price]) -> str:
    """Return prices as the text of a book, in a stable order."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for price in sorted(prices, key=lambda price: (price.sku, price.region, price.tier_from)):
        writer.writerow(
            format(value, "f") if isinstance(value := getattr(price, column), Decimal) else value for column in COLUMNS
        )
    return out.getvalue()


def _price(row: list[str], where: str) -> Price | None:
    if not row:
        return None
    if len(row) != len(COLUMNS):
        raise ShipyardError(f"{where}: {len(row)} columns", allowed=f"{len(COLUMNS)}")
    sku, region, unit, per, currency, tier_from, price, date, confidence, note, source = row
    try:
        numbers = [Decimal(text) for text in (per, tier_from, price)]
    except InvalidOperation:
        raise ShipyardError(f"{where}: not a number", value=f"{per}, {tier_from}, {price}") from None
    if not all(number.is_finite() and number >= 0 for number in numbers) or numbers[0] == 0:
        raise ShipyardError(f"{where}: out of range", value=f"{per}, {tier_from}, {price}", allowed="0 or more")
    if confidence not in ("high", "medium", "low", "derived") or not (sku and region and unit and date and source):
        raise ShipyardError(f"{where}: a field is missing or unknown", mend="see infra/cost/prices/README.md")
    per_, from_, price_ = numbers
    sure = cast(Confidence, confidence)
    return Price(sku, region, unit, per_, currency, from_, price_, date, sure, note, source)
