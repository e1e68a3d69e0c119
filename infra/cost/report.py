"""The report: every resource of the templates priced, free with a reason, or unknown."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from infra.cost import compute, containers, devices, endpoints, networking, stored
from infra.cost.assembly import Stack
from infra.cost.free import reason
from infra.cost.lines import Line, Meter, NotStatic, Resource
from infra.cost.loops import HARMLESS, transforms
from infra.cost.prices import Book, charge
from infra.cost.resolve import Exports, Scope, Unknown
from infra.cost.scaling import Index, Pricer
from infra.cost.usage import Three, Usage

PRICED: dict[str, Pricer] = {
    **endpoints.PRICED,
    **containers.PRICED,
    **compute.PRICED,
    **networking.PRICED,
    **stored.PRICED,
    **devices.PRICED,
}

TRANSFORM = "(transform)"
NESTED = "AWS::CloudFormation::Stack"

NOTHING: Three = (Decimal(0), Decimal(0), Decimal(0))

FREE_TIER: dict[str, tuple[str, int]] = {
    "lambda.requests": ("lambda.requests", 1_000_000),
    "lambda.gb_s.arm": ("lambda.gb_s", 400_000),
    "lambda.gb_s.x86": ("lambda.gb_s", 400_000),
    "sfn.standard.transition": ("sfn.standard.transition", 4_000),
    "sns.publish": ("sns.publish", 1_000_000),
    "sqs.fifo": ("sqs", 1_000_000),
    "sqs.standard": ("sqs", 1_000_000),
    "kms.requests.symmetric": ("kms.requests", 20_000),
    "cw.alarm.standard": ("cw.alarm", 10),
    "cw.dashboard": ("cw.dashboard", 3),
    "cw.metric.custom": ("cw.metric", 10),
    "cw.logs.ingest.standard": ("cw.logs", 5),
    "dynamodb.storage": ("dynamodb.storage", 25),
    "dynamodb.wcu": ("dynamodb.wcu", 25 * 730),
    "dynamodb.rcu": ("dynamodb.rcu", 25 * 730),
    "sns.email": ("sns.email", 1_000),
    "sns.http": ("sns.http", 100_000),
    "egress.internet": ("egress.internet", 100),
    "codebuild.linux.general1.small": ("codebuild", 100),
    "codepipeline.v2.action_minute": ("codepipeline", 100),
    "budgets.action_enabled": ("budgets", 62),
}
"""What each account has for nothing each month, for good, by pool (AWS Free Tier, "Always free"); off unless asked."""


@dataclass(frozen=True)
class Report:
    """Hold the lines of all stacks; `hours` of the month that is priced, and where templates and usage were read."""

    lines: tuple[Line, ...]
    source: str
    usage: str
    hours: Decimal
    free_tier: bool
    served: tuple[tuple[str, Three], ...] = ()
    """Predictions a month by stack, where usage tells them."""
    schema: Literal["shipyard.cost/1"] = "shipyard.cost/1"

    def total(self, keep: Callable[[Line], bool] = lambda line: True, *, release: bool = False) -> dict[str, Three]:
        """Return the sum a month by currency, or, with `release`, what falls due once a release."""
        return total(line for line in self.lines if keep(line) and (line.status == "release") == release)

    def by(self, key: Callable[[Line], str]) -> dict[str, dict[str, Three]]:
        """Return the sums a month by what `key` says of a line, those that cost most first."""
        groups: dict[str, list[Line]] = defaultdict(list)
        for line in self.lines:
            if line.status != "release":
                groups[key(line)].append(line)
        sums = {name: total(lines) for name, lines in groups.items()}
        return dict(sorted(sums.items(), key=lambda pair: (-max((t[1] for t in pair[1].values()), default=0), pair[0])))

    def million(self) -> dict[str, dict[str, Three]]:
        """Return what a million predictions cost by stack and currency; the low cost is that of the low load."""
        sums, found = self.by(lambda line: line.stack), {}
        for stack, count in self.served:
            if all(count):
                found[stack] = {
                    currency: (
                        amount[0] / count[0] * 1_000_000, amount[1] / count[1] * 1_000_000, amount[2] / count[2] * 1_000_000
                    )
                    for currency, amount in sums.get(stack, {}).items()
                }  # fmt: skip
        return found

    @property
    def resources(self) -> dict[str, int]:
        """Count resources: free, priced, but for usage that is not given, and those of which something is unknown."""
        found: dict[tuple[str, str], str] = {}
        order = ("free", "priced", "usage", "unknown")
        for line in self.lines:
            what = {"fixed": "priced", "free": "free", "unknown": "unknown"}.get(
                line.status, "usage" if line.amount is None else "priced"
            )
            if line.status == "release":
                what = "free"
            place = (line.stack, line.resource)
            found[place] = max(found.get(place, "free"), what, key=order.index)
        return {name: sum(what == name for what in found.values()) for name in order}


def total(lines: Iterable[Line]) -> dict[str, Three]:
    """Return the sum of lines by currency; what has no amount is left out."""
    sums: dict[str, Three] = {}
    for line in lines:
        if line.amount is not None:
            sums[line.currency] = add(sums.get(line.currency, NOTHING), line.amount)
    return dict(sorted(sums.items()))


def add(left: Three, right: Three) -> Three:
    """Return the sum in each scenario."""
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def price(stacks: Sequence[Stack], book: Book, usage: Usage, source: str = "") -> Report:
    """Price every resource of some stacks.

    Tiers and free tiers are of an account and region, so lines of one price are charged together and each gets its
    part. The lines come in the order of stacks and paths, whatever the order in the templates.
    """
    exports, resources, lines = Exports(), {}, []
    served: dict[str, Three] = {}
    for stack in stacks:
        Scope(stack, exports)
    for scope in exports.scopes:
        for name in transforms(scope.template):
            if name not in HARMLESS:
                resources[scope.stack.name, name] = Resource(scope, name, TRANSFORM, name, {})
        for name, raw in scope.resources.items():
            resource = _resource(scope, str(name), raw)
            resources[scope.stack.name, resource.id] = resource
    index = Index(resources)
    for resource in resources.values():
        meter = Meter(resource, book, usage)
        _meter(meter, index)
        lines += meter.lines
        if meter.served:
            name = resource.scope.stack.name
            served[name] = add(served.get(name, NOTHING), meter.served)
    place = {scope.stack.name: k for k, scope in enumerate(exports.scopes)}
    lines.sort(key=lambda line: (place[line.stack], line.path, line.resource))
    settled = tuple(_settle(lines, usage))
    return Report(settled, source, usage.source, usage.hours, usage.free_tier, tuple(sorted(served.items())))


def _resource(scope: Scope, name: str, raw: object) -> Resource:
    table = raw if isinstance(raw, dict) else {}
    told = table.get("Metadata")
    path = told.get("aws:cdk:path") if isinstance(told, dict) else None
    kind = table.get("Type")
    return Resource(
        scope, name, kind if isinstance(kind, str) else "(no type)", path if isinstance(path, str) else name, table
    )


def _meter(meter: Meter, index: Index) -> None:
    resource = meter.resource
    made = resource.scope.made(resource.raw)
    pricer, free = PRICED.get(resource.type), reason(resource.type)
    if made is False:
        meter.free(f"its condition {resource.raw.get('Condition')} does not hold, so it is not made")
    elif isinstance(made, Unknown):
        meter.unknown("all of it", f"whether it is made is not known: {made.reason}")
    elif "Fn::Transform" in resource.raw:
        meter.unknown("all of it", "a transform runs when it is deployed")
    elif isinstance(resource.properties, Unknown):
        meter.unknown("all of it", resource.properties.reason)
    elif resource.type == TRANSFORM:
        meter.unknown("what it makes of the template", f"the transform {resource.id} runs when it is deployed")
    elif resource.type == NESTED and resource.id not in resource.scope.children:
        meter.unknown("its resources", "its template is not among those read: the CDK puts it beside its parent")
    elif resource.id.startswith("Fn::"):
        meter.unknown("all of it", f"{resource.id} is not static: what it makes is known when it is deployed")
    elif free is not None:
        meter.free(free)
    elif pricer is None:
        meter.unknown("all of it", "the report does not know this resource type")
    else:
        try:
            pricer(meter, index)
        except NotStatic as fault:
            meter.unknown("the rest" if meter.lines else "all of it", str(fault))


def _settle(lines: Sequence[Line], usage: Usage) -> list[Line]:
    """Charge lines of the same price in the same account and region together, and give each its part."""
    groups: dict[tuple[str, str, str, bool], list[int]] = defaultdict(list)
    for k, line in enumerate(lines):
        if line.quantity is not None and line.prices:
            key = (line.account or line.stack, line.prices[0].sku, line.region, line.status == "release")
            groups[key].append(k)
    settled = list(lines)
    pools: dict[tuple[str, str], list[Decimal]] = {}
    for (account, sku, _, release), members in sorted(groups.items()):
        left = [Decimal(0)] * 3
        if usage.free_tier and sku in FREE_TIER and not release:
            pool, free = FREE_TIER[sku]
            left = pools.setdefault((account, pool), [Decimal(free)] * 3)
        factors = []
        for scenario in range(3):
            quantity = sum((_quantity(lines[k])[scenario] for k in members), Decimal(0))
            free_now = min(left[scenario], quantity)
            left[scenario] -= free_now
            due = charge(lines[members[0]].prices, quantity - free_now)
            factors.append(due / quantity if quantity else Decimal(0))
        for k in members:
            low, expected, high = (q * factor for q, factor in zip(_quantity(lines[k]), factors, strict=True))
            settled[k] = replace(lines[k], amount=(low, expected, high))
    return settled


def _quantity(line: Line) -> Three:
    assert line.quantity is not None
    return line.quantity
