"""Reports, differences and comparisons as JSON, with their schemas; reports also back."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from infra.cost.difference import Difference, Sign
from infra.cost.lines import Line, Status
from infra.cost.places import Crossing, Place, crossings, rates, verdict
from infra.cost.report import Report
from infra.cost.usage import Three
from models.release import ShipyardError

Sums = dict[str, Three]


@dataclass(frozen=True)
class Document:
    """A cost report; amounts are decimal texts, three of them by scenario: low, expected, high."""

    schema: Annotated[Literal["shipyard.cost/1"], Field(description="name and version of this form")]
    source: Annotated[str, Field(description="where the templates were read")]
    usage: Annotated[str, Field(description="where usage was read")]
    hours: Annotated[Decimal, Field(description="hours of the month that is priced")]
    free_tier: Annotated[bool, Field(description="whether what AWS gives for nothing each month was taken off")]
    totals: Annotated[Sums, Field(description="a month by currency; currencies are never added to each other")]
    release: Annotated[Sums, Field(description="what falls due once a release, by currency")]
    by_environment: Annotated[dict[str, Sums], Field(description="a month by stage")]
    by_stack: Annotated[dict[str, Sums], Field(description="a month by stack")]
    by_target: Annotated[dict[str, Sums], Field(description="a month by stack's name within its stage")]
    million: Annotated[dict[str, Sums], Field(description="a million predictions by stack, where usage tells the load")]
    resources: Annotated[
        dict[str, int],
        Field(description="count of resources: free, priced, usage (priced but for keys that are not given), unknown"),
    ]
    served: Annotated[tuple[tuple[str, Three], ...], Field(description="predictions a month by stack")]
    lines: Annotated[tuple[Line, ...], Field(description="what each thing of each resource costs, and why")]


@dataclass(frozen=True)
class Changed:
    """One line that differs; `delta` is null where an amount is not known or depends on usage."""

    sign: Sign
    stack: str
    resource: str
    path: str
    type: str
    item: str
    status: Status
    currency: str
    before: Three | None
    after: Three | None
    delta: Three | None
    unknown: Annotated[bool, Field(description="whether a price is not known on one side: it is in no sum")]
    why: Annotated[tuple[str, ...], Field(description="properties that differ, as `InstanceType: a -> b`")]


@dataclass(frozen=True)
class DifferenceDocument:
    """What changes between two reports; amounts are decimal texts, three of them by scenario: low, expected, high."""

    schema: Annotated[Literal["shipyard.cost.difference/1"], Field(description="name and version of this form")]
    total: Annotated[Sums, Field(description="change a month by currency")]
    release: Annotated[Sums, Field(description="change of what falls due once a release, by currency")]
    by_environment: Annotated[dict[str, Sums], Field(description="change a month by stage")]
    guardrails: Annotated[tuple[str, ...], Field(description="guardrails of fleet.toml that the change crosses")]
    changes: tuple[Changed, ...]


@dataclass(frozen=True)
class PlaceAt:
    """What a place needs and costs under one load."""

    units: int
    month: Decimal
    million: Annotated[Decimal, Field(description="a million predictions")]


@dataclass(frozen=True)
class LoadDocument:
    """One load in requests a second, and each place under it."""

    rate: Decimal
    places: dict[str, PlaceAt]


@dataclass(frozen=True)
class PlacesDocument:
    """The same load on each place of inference; amounts are decimal texts."""

    schema: Annotated[Literal["shipyard.cost.places/1"], Field(description="name and version of this form")]
    currency: str
    verdict: Annotated[str, Field(description="from which load on the GPU is worth its price")]
    grounds: Annotated[tuple[str, ...], Field(description="what a unit of each place takes, and how that is known")]
    assumed: Annotated[tuple[str, ...], Field(description="places whose throughput was assumed, not measured")]
    crossings: Annotated[
        tuple[Crossing, ...], Field(description="from which load on one place costs less than another")
    ]
    loads: tuple[LoadDocument, ...]


DOCUMENTS: dict[str, type] = {"report": Document, "difference": DifferenceDocument, "places": PlacesDocument}


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(DOCUMENTS[name])


def _text(name: str, found: object) -> str:
    return _adapter(name).dump_json(found, indent=1).decode() + "\n"


def write_document(report: Report) -> str:
    """Return a report as JSON."""
    found = Document(
        schema=report.schema,
        source=report.source,
        usage=report.usage,
        hours=report.hours,
        free_tier=report.free_tier,
        totals=report.total(),
        release=report.total(release=True),
        by_environment=report.by(lambda line: line.environment),
        by_stack=report.by(lambda line: line.stack),
        by_target=report.by(lambda line: line.part),
        million=report.million(),
        resources=report.resources,
        served=report.served,
        lines=report.lines,
    )
    return _text("report", found)


def write_difference(change: Difference, guardrails: Sequence[str]) -> str:
    """Return a difference as JSON, with the guardrails that it crosses."""
    changes = tuple(
        Changed(
            one.sign, line.stack, line.resource, line.path, line.type, line.item, line.status, line.currency,
            one.before, one.after, one.delta, one.unknown, one.why,
        )
        for one in change.changes
        for line in [one.line]
    )  # fmt: skip
    return _text(
        "difference",
        DifferenceDocument(
            "shipyard.cost.difference/1", change.total(), change.total(release=True), change.by_environment(),
            tuple(guardrails), changes,
        )
    )  # fmt: skip


def write_places(found: Sequence[Place], currency: str) -> str:
    """Return a comparison of places as JSON: every load, each place, the crossings, the grounds."""
    return _text(
        "places",
        PlacesDocument(
            schema="shipyard.cost.places/1",
            currency=currency,
            verdict=verdict(found),
            grounds=tuple(place.told for place in found),
            assumed=tuple(place.name for place in found if place.assumed),
            crossings=tuple(crossings(found)),
            loads=tuple(
                LoadDocument(
                    rate,
                    {
                        place.name: PlaceAt(
                            int(place.units(rate)), round(place.cost(rate), 4), round(place.million(rate), 6)
                        )
                        for place in found
                    },
                )
                for rate in rates()
            ),
        ),
    )


def read_document(path: Path) -> Report:
    """Read a report that was saved.

    Raises:
        ShipyardError: the file is no report.
    """
    try:
        found: Document = _adapter("report").validate_json(path.read_bytes())
    except (OSError, ValidationError) as fault:
        told = fault.errors()[0]["msg"] if isinstance(fault, ValidationError) else fault
        raise ShipyardError(f"{path}: not a cost report: {told}", mend="shipyard cost --save FILE writes one") from None
    return Report(found.lines, found.source, found.usage, found.hours, found.free_tier, found.served)


def json_schema(document: str = "report") -> dict[str, Any]:
    """Return the JSON schema of a document, by its name in DOCUMENTS."""
    return _adapter(document).json_schema(mode="serialization")
