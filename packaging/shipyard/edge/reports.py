"""Reports: what a device says of itself, taken for no more than it is, for one device must not speak for the others.

Keys that are not known are left out: a device may run another version of the runtime.
"""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from serve.errors import ShipyardError
from serve.greengrass.telemetry import EDGES_MS

Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
"""So far from the largest number that no sum over devices reaches it."""


class Totals(BaseModel):
    """What a device has counted of one model (`serve.greengrass.telemetry`)."""

    requests: Count
    failed: Count
    refused: Count
    ms: Annotated[list[Count], Field(min_length=len(EDGES_MS) + 1, max_length=len(EDGES_MS) + 1)]
    score: tuple[Count, Number, Number]


class Telemetry(BaseModel):
    """Totals by model, and of what was learned: how the bundle's digest begins, a, b and the evidence, by model."""

    sequence: Count
    models: dict[str, Totals]
    learned: dict[str, tuple[str, Number, Number, Count]] = {}


class Report(BaseModel):
    """A device's report; the telemetry is read apart."""

    runtime: str = ""
    generation: Count = 0
    floor: Count = 0
    phase: str
    models: dict[str, str]
    fault: str = ""
    telemetry: Any = None


def read_report(text: Any) -> tuple[dict[str, Any], str]:
    """Read a report.

    Returns:
        The report, and why its telemetry was left out of it, if it was.

    Raises:
        ShipyardError: it is not of this form.
    """
    if not isinstance(text, str):
        raise ShipyardError("not understood", value=type(text).__name__, allowed="a text, as docs/edge-sync.md")
    try:
        report = Report.model_validate_json(text).model_dump(exclude_unset=True)
    except ValidationError as fault:
        raise ShipyardError(f"not understood: {_why(fault)}", allowed="as docs/edge-sync.md") from None
    telemetry = report.pop("telemetry", None)
    if telemetry is None:
        return report, ""
    try:
        return report | {"telemetry": Telemetry.model_validate(telemetry).model_dump()}, ""
    except ValidationError as fault:
        return report, f"not understood: {_why(fault)}"


def _why(fault: ValidationError) -> str:
    first = fault.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'report'}: {first['msg']}"
