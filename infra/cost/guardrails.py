"""Guardrails: what an environment may cost, and by how much a change may raise it."""

from collections.abc import Mapping

from infra.cost.difference import Difference
from infra.cost.report import Report
from infra.cost.words import money
from models.config import Guardrails

EXPECTED = 1


def over_caps(report: Report, rails: Mapping[str, Guardrails]) -> list[str]:
    """Tell which environments cost more than their cap, in the scenario expected."""
    return [
        f"{name}: {money(amount[EXPECTED], currency)} a month is over the cap of {money(rails[name].cap, currency)}"
        for name, sums in report.by(lambda line: line.environment).items()
        for currency, amount in sums.items()
        if name in rails and rails[name].cap is not None and amount[EXPECTED] > (rails[name].cap or 0)
    ]


def crossed(change: Difference, rails: Mapping[str, Guardrails]) -> list[str]:
    """Tell which guardrails a change crosses: its rise in money and in per cent, and a cap that was kept before."""
    found = []
    before, after = (report.by(lambda line: line.environment) for report in (change.old, change.new))
    for name, sums in change.by_environment().items():
        rail = rails.get(name)
        for currency, delta in sums.items() if rail else ():
            assert rail is not None
            rise = delta[EXPECTED]
            old = before.get(name, {}).get(currency, (0, 0, 0))[EXPECTED]
            new = after.get(name, {}).get(currency, (0, 0, 0))[EXPECTED]
            if rail.increase is not None and rise > rail.increase:
                found.append(f"{name}: {money(rise, currency)} a month more, allowed {money(rail.increase, currency)}")
            if rail.increase_percent is not None and old and rise / old * 100 > rail.increase_percent:
                found.append(f"{name}: {rise / old:.1%} more, allowed {rail.increase_percent:g}%")
            if rail.cap is not None and old <= rail.cap < new:
                found.append(f"{name}: {money(new, currency)} a month crosses the cap of {money(rail.cap, currency)}")
    return found
