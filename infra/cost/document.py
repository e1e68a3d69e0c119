"""A report as JSON, with its schema, and back."""

from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from infra.cost.lines import Line
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
        Field(description="count of resources: free, usage (priced once its keys are given), priced, unknown"),
    ]
    served: Annotated[tuple[tuple[str, Three], ...], Field(description="predictions a month by stack")]
    lines: Annotated[tuple[Line, ...], Field(description="what each thing of each resource costs, and why")]


@cache
def _adapter() -> TypeAdapter[Document]:
    return TypeAdapter(Document)


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
    return _adapter().dump_json(found, indent=1).decode() + "\n"


def read_document(path: Path) -> Report:
    """Read a report that was saved.

    Raises:
        ShipyardError: the file is no report.
    """
    try:
        found = _adapter().validate_json(path.read_bytes())
    except (OSError, ValidationError) as fault:
        told = fault.errors()[0]["msg"] if isinstance(fault, ValidationError) else fault
        raise ShipyardError(f"{path}: not a cost report: {told}", mend="shipyard cost --save FILE writes one") from None
    return Report(found.lines, found.source, found.usage, found.hours, found.free_tier, found.served)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the document."""
    return _adapter().json_schema(mode="serialization")
