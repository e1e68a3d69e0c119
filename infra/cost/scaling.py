"""How many instances or tasks run: what autoscaling targets, their schedules and the load make of a count."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from infra.cost.lines import Meter, NotStatic, Resource, View
from infra.cost.resolve import POINTER, Pointer, Unknown
from infra.cost.usage import Three

Pricer = Callable[[Meter, "Index"], None]
"""Writes the lines of a resource."""

WEEK = 7 * 24
_DAYS = {"SUN": 6, "MON": 0, "TUE": 1, "WED": 2, "THU": 3, "FRI": 4, "SAT": 5}
# numbers of cron on AWS begin with Sunday as 1
_UNIX = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_NUMBERS = {"1": 6, "2": 0, "3": 1, "4": 2, "5": 3, "6": 4, "7": 5}


NAMED = {
    "AWS::ECS::Service": "ServiceName",
    "AWS::SageMaker::Endpoint": "EndpointName",
    "AWS::SageMaker::InferenceComponent": "InferenceComponentName",
    "AWS::DynamoDB::Table": "TableName",
    "AWS::Lambda::Function": "FunctionName",
}
"""The property by which an autoscaling target may name what it scales."""


@dataclass(frozen=True)
class Index:
    """Find resources, and what scales them, across stacks."""

    resources: dict[tuple[str, str], Resource]

    def at(self, pointer: Any, kind: str) -> Resource | None:
        """Return the resource of a type to which a pointer leads."""
        found = self.resources.get((pointer.stack, pointer.resource)) if isinstance(pointer, Pointer) else None
        return found if found and found.type == kind else None

    def of(self, kind: str) -> Iterable[Resource]:
        """Return every resource of a type."""
        return (resource for resource in self.resources.values() if resource.type == kind)

    def named(self, kind: str, key: str, name: Any, by: Resource) -> Resource | None:
        """Return the resource of a type whose property `key` is the name by which another one knows it."""
        found = (
            one for one in self.of(kind) if isinstance(name, str) and property_of(one, key) == name and near(one, by)
        )
        return next(found, None)

    def scaler(self, resource: Resource, dimension: str, tail: str = "") -> Resource | None:
        """Return the autoscaling target of a resource; with `tail` of a part, as `/variant/a` of an endpoint.

        Raises:
            NotStatic: a target may be that of the resource, but what it scales is not static.
        """
        targets = [
            target
            for target in self.of("AWS::ApplicationAutoScaling::ScalableTarget")
            if str(property_of(target, "ScalableDimension")) == dimension
        ]
        for target in targets:
            scaled = str(property_of(target, "ResourceId"))
            if (not tail or scaled.endswith(tail)) and self._names(scaled, resource, target):
                return target
        for target in targets:
            what = property_of(target, "ResourceId")
            if isinstance(what, Unknown) and target.scope is resource.scope:
                raise NotStatic(f"{target.id} may scale it: its ResourceId is not static: {what.reason}")
        return None

    def scaled(self, target: Resource) -> bool:
        """Return whether an autoscaling target's resource is among those read."""
        text = str(property_of(target, "ResourceId"))
        return any(
            self._names(text, resource, target) for resource in self.resources.values() if resource is not target
        )

    def _names(self, text: str, resource: Resource, target: Resource) -> bool:
        place = (resource.scope.stack.name, resource.id)
        # a cluster's name is in the text of each of its services
        last = [match.groups() for match in POINTER.finditer(text) if self._is_unit(match[1], match[2])]
        if last:
            return (last[-1][0], last[-1][1]) == place
        named = NAMED.get(resource.type)
        name = property_of(resource, named) if named else None
        return isinstance(name, str) and name in re.split("[/:]", text) and near(resource, target)

    def _is_unit(self, stack: str, name: str) -> bool:
        found = self.resources.get((stack, name))
        return found is not None and found.type != "AWS::ECS::Cluster"


def near(one: Resource, other: Resource) -> bool:
    """Return whether two resources may know each other by name: of one account, region and stage."""
    stacks = one.scope.stack, other.scope.stack
    places = {(stack.account, stack.region, stack.name.rpartition("/")[0]) for stack in stacks}
    return len(places) == 1


def property_of(resource: Resource, name: str) -> Any:
    """Return a property of a resource as it is, None where there is none."""
    return resource.properties.get(name) if isinstance(resource.properties, dict) else None


def capacity(meter: Meter, initial: Decimal, target: Resource | None, of: View) -> tuple[Three, str]:
    """Return the mean count over the month in each scenario, with a note on how it came about.

    Without autoscaling it is the initial count. With it, and with the keys requests_per_second and
    unit_requests_per_second, it is what the load of each hour wants, within minimum and maximum of that hour; without
    these keys low and expected are the minimum, high the maximum.

    Raises:
        NotStatic: minimum, maximum or a schedule is not static or not understood.
    """
    if target is None:
        return (initial, initial, initial), ""
    properties = View(target.properties, f"{target.id}.")
    low, high = _week(properties)
    of.reads.update(properties.reads)
    return within(meter, low, high, "autoscaling")


def within(meter: Meter, low: list[Decimal], high: list[Decimal], what: str) -> tuple[Three, str]:
    """Return the mean count of what runs between a minimum and a maximum of each hour of a week, with a note on it."""
    rate, unit = meter.ask("requests_per_second"), meter.ask("unit_requests_per_second")
    if rate is None or unit is None:
        return bounds(low, high), (
            f"minimum, minimum and maximum of its {what}; "
            "requests_per_second and unit_requests_per_second would tell more"
        )
    found = []
    for day, per in zip(rate[0], unit[0], strict=True):
        wanted = [(one / per).to_integral_value(ROUND_CEILING) for one in day]
        found.append(mean([min(max(wanted[k % 24], low[k]), high[k]) for k in range(WEEK)]))
    return (found[0], found[1], found[2]), f"what the load of each hour wants, within the bounds of its {what}"


def bounded(view: View, low: str, high: str, default: int | None = None) -> tuple[Decimal, Decimal]:
    """Return a minimum, which may have a default, and a maximum that is not below it."""
    least, most = view.number(low, default), view.number(high)
    if least > most:
        raise NotStatic(f"{low} {least:f} is over {high} {most:f}")
    return least, most


def bounds(low: list[Decimal], high: list[Decimal]) -> Three:
    """Return the means of a minimum, of the same as what is expected, and of a maximum."""
    least, most = mean(low), mean(high)
    return least, least, most


def limits(target: Resource | None, initial: Decimal, of: View) -> Three:
    """Return the mean of what a target of autoscaling allows, and expects to be its minimum; the initial count without.

    Raises:
        NotStatic: minimum, maximum or a schedule is not static or not understood.
    """
    if target is None:
        return initial, initial, initial
    properties = View(target.properties, f"{target.id}.")
    found = bounds(*_week(properties))
    of.reads.update(properties.reads)
    return found


def mean(values: list[Decimal]) -> Decimal:
    """Return the mean over the hours of a week."""
    return sum(values, Decimal(0)) / len(values)


def _week(target: View) -> tuple[list[Decimal], list[Decimal]]:
    """Return minimum and maximum for each hour of a week, as schedules set them."""
    least, most = bounded(target, "MinCapacity", "MaxCapacity")
    actions = [(action, action.view("ScalableTargetAction")) for action in target.items("ScheduledActions")]
    series = [
        week(
            start, [(action.text("Schedule"), new.number(name)) for action, new in actions if new.get(name) is not None]
        )
        for name, start in (("MinCapacity", least), ("MaxCapacity", most))
    ]
    for action, _ in actions:
        target.reads.update(action.reads)
    return series[0], [max(pair) for pair in zip(*series, strict=True)]


def week(start: Decimal, changes: Iterable[tuple[str, Decimal]]) -> list[Decimal]:
    """Return a number for each hour of a week that schedules change; of an hour within which it changes, the mean.

    Raises:
        NotStatic: a schedule is not understood.
    """
    at = sorted({minute: new for schedule, new in changes for minute in _minutes(schedule)}.items())
    # what the last change of a week sets holds when the next begins
    now, found = at[-1][1] if at else start, []
    for hour in range(WEEK):
        since, held = hour * 60, Decimal(0)
        for minute, new in at:
            if minute // 60 == hour:
                held, since, now = held + now * (minute - since), minute, new
        found.append((held + now * (hour * 60 + 60 - since)) / 60)
    return found


def recurrence(text: str) -> str:
    """Return a schedule of EC2 Auto Scaling, which is cron of Unix with Sunday as 0 or 7, in the form of the others."""
    minute, hour, day, month, weekday = (*text.split(), "", "", "", "", "")[:5]
    named = re.sub(r"\d", lambda found: _UNIX[int(found[0]) % 7] if int(found[0]) < 8 else found[0], weekday)
    return f"cron({minute} {hour} {day} {month} {named} *)"


def _minutes(schedule: str) -> list[int]:
    """Return the minutes of a week, from Monday 0, at which cron(minutes hours day month weekday year) fires."""
    if schedule.startswith("at("):
        return []
    match = re.fullmatch(r"cron\((\S+) (\S+) (\S+) (\S+) (\S+) (\S+)\)", schedule.strip())
    if not match or not match[1].isdigit() or match[3] not in "*?" or match[4] != "*" or match[6] != "*":
        raise NotStatic(f"the schedule {schedule} is not understood: daily or weekly cron alone")
    hours: list[int] = []
    for part in ("0-23" if match[2] == "*" else match[2]).split(","):
        span = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if not first <= last < 24 or int(match[1]) > 59:
            raise NotStatic(f"the schedule {schedule} is not understood: hours as 8, 8,20 or 8-20")
        hours += range(first, last + 1)
    return [(day * 24 + hour) * 60 + int(match[1]) for day in _weekdays(match[5]) for hour in hours]


def _weekdays(text: str) -> list[int]:
    if text in ("*", "?"):
        return list(range(7))
    found: list[int] = []
    for part in text.upper().split(","):
        ends = [_DAYS.get(end, _NUMBERS.get(end, -1)) for end in part.split("-")]
        if -1 in ends or len(ends) > 2:
            raise NotStatic(f"the weekdays {text} are not understood")
        first, last = ends[0], ends[-1]
        found += [(first + step) % 7 for step in range((last - first) % 7 + 1)]
    return found
