"""The verbs `shipyard cost` and `shipyard prices`; the command line finds this module by its name."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from infra.cost.assembly import Stack, read_stacks
from infra.cost.comparison import comparison_markdown, comparison_page
from infra.cost.difference import difference
from infra.cost.document import json_schema, read_document, write_difference, write_document, write_places
from infra.cost.grammar import compare_grammar, cost_grammar, prices_grammar, schema_grammar
from infra.cost.guardrails import crossed, over_caps
from infra.cost.page import difference_page, report_page
from infra.cost.places import Load, Throughput, load_throughput, places
from infra.cost.prices import Book, load_book
from infra.cost.report import Report, price
from infra.cost.tables import difference_lines, difference_markdown, print_report, report_markdown
from infra.cost.usage import Usage, load_usage
from models.config import Guardrails, load_fleet
from models.release import ShipyardError, load_keys, read_release

CROSSED = 3
"""The exit code where a guardrail is crossed."""


def main(arguments: Sequence[str]) -> int:
    """Run `cost ...` or `prices ...`; return the exit code.

    Raises:
        ShipyardError: something that the user named is not what it should be.
    """
    verb, *rest = arguments
    if verb == "prices":
        return _prices(prices_grammar().parse_args(rest))
    if rest[:1] == ["schema"]:
        document = schema_grammar().parse_args(rest[1:]).document
        print(json.dumps(json_schema(document), indent=1, ensure_ascii=False))
        return 0
    if rest[:1] == ["diff"]:
        return _diff(cost_grammar("diff").parse_args(rest[1:]))
    if rest[:1] == ["compare"]:
        return _compare(compare_grammar().parse_args(rest[1:]))
    return _cost(cost_grammar("cost").parse_args(rest))


def _cost(chosen: argparse.Namespace) -> int:
    book, usage = load_book(chosen.prices), load_usage(chosen.usage) if chosen.usage else Usage()
    report = price(_stacks(chosen.templates, chosen), book, usage, str(chosen.templates))
    _check(usage, report)
    faults = over_caps(report, _rails(chosen.fleet))
    if chosen.json:
        print(write_document(report), end="")
    elif chosen.markdown:
        print(report_markdown(report, faults))
    else:
        print_report(report, every=chosen.all, console=_console())
    _write(chosen.save, write_document(report) if chosen.save else "")
    _write(chosen.html, report_page(report, faults) if chosen.html else "")
    return _verdict(faults)


def _diff(chosen: argparse.Namespace) -> int:
    book, usage = load_book(chosen.prices), load_usage(chosen.usage) if chosen.usage else Usage()
    old, new = (_either(path, chosen, book, usage) for path in (chosen.old, chosen.new))
    _check(usage, old, new)
    change = difference(old, new)
    faults = crossed(change, _rails(chosen.fleet))
    if chosen.json:
        print(write_difference(change, faults), end="")
    elif chosen.markdown:
        print(difference_markdown(change, faults))
    else:
        for text in difference_lines(change):
            _console().print(text, markup=False, highlight=False, soft_wrap=True)
    _write(chosen.html, difference_page(change, faults) if chosen.html else "")
    return _verdict(faults)


def _either(path: Path, chosen: argparse.Namespace, book: Book, usage: Usage) -> Report:
    """Read a saved report, or price templates."""
    if path.is_file() and '"shipyard.cost/1"' in path.read_text(encoding="utf-8", errors="replace")[:200]:
        return read_document(path)
    return price(_stacks(path, chosen), book, usage, str(path))


def _stacks(path: Path, chosen: argparse.Namespace) -> list[Stack]:
    if not path.exists():
        raise ShipyardError(f"{path}: nothing is there", mend="make synth, or name templates")
    pairs = [text.partition("=") for text in chosen.parameter]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise ShipyardError("--parameter: not NAME=VALUE", value=wrong[0])
    stacks = read_stacks(path, region=chosen.region, parameters={name: value for name, _, value in pairs})
    declared = {str(name) for stack in stacks for name in stack.declared}
    for name, _, _ in pairs:
        if name not in declared:
            allowed = ", ".join(sorted(declared)) or "none: the templates have no parameters"
            raise ShipyardError("--parameter: no template has it", value=name, allowed=allowed)
    wanted = [name for name in chosen.env.split(",") if name]
    known = {stack.name.partition("/")[0] for stack in stacks}
    for name in wanted:
        if name not in known:
            raise ShipyardError("--env: no such environment", value=name, allowed=", ".join(sorted(known)))
    return [stack for stack in stacks if not wanted or stack.name.partition("/")[0] in wanted]


def _check(usage: Usage, *reports: Report) -> None:
    lines = [line for report in reports for line in report.lines]
    usage.check({(line.type, line.resource, line.path, f"{line.stack}/{line.resource}") for line in lines})


def _rails(named: Path | None) -> dict[str, Guardrails]:
    """Return each environment's guardrails; none without a fleet.toml, for other people's templates have none."""
    fleet = named or Path("fleet.toml")
    return {name: env.cost for name, env in load_fleet(fleet).env.items()} if named or fleet.is_file() else {}


def _verdict(faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"guardrail: {fault}", file=sys.stderr)
    return CROSSED if faults else 0


def _console() -> Console:
    """Return the terminal; a pipe gets lines that are not cut."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _prices(chosen: argparse.Namespace) -> int:
    refresh = importlib.import_module("infra.cost.refresh")  # it alone needs boto3
    book = load_book(chosen.book)
    regions = chosen.region or sorted({price.region for price in book.flat()} - {"global"})
    outcome = refresh.refresh(book, regions, refresh.client)
    for text in outcome.told(confirmed=chosen.confirm):
        print(text)
    if not chosen.dry_run:
        refresh.replace_book(chosen.book, outcome.book(confirmed=chosen.confirm))
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    fleet = load_fleet(chosen.fleet)
    name = chosen.env or next(iter(fleet.env))
    if name not in fleet.env:
        raise ShipyardError("--env: no such environment", value=name, allowed=", ".join(fleet.env))
    env = fleet.env[name]
    path = chosen.release or chosen.fleet.resolve().parent / "releases" / f"{env.release}.json"
    if not path.is_file():
        raise ShipyardError(f"{path}: no such release file", mend="name one: --release FILE")
    release = read_release(path, load_keys(path.parent / "keys"))
    load = Load(chosen.request_kb, chosen.response_kb, chosen.devices, chosen.device_cost)
    measured = load_throughput(chosen.throughput) if chosen.throughput else Throughput()
    submodel = chosen.submodel or next(iter(release.submodels))
    book = load_book(chosen.prices)
    largest: dict[str, float] = {name: target.max_size_mb for name, target in fleet.target.items()}
    found = places(book, env, load, release=release, submodel=submodel, measured=measured, largest=largest)
    currency = "CNY" if env.region.startswith("cn-") else "USD"
    print(write_places(found, currency) if chosen.json else comparison_markdown(found, currency), end="")
    title = f"Where {submodel} costs least, sized as {name}"
    _write(chosen.html, comparison_page(found, currency, title) if chosen.html else "")
    return 0
