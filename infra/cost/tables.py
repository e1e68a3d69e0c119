"""Reports as tables: for a terminal, and as Markdown for a pull request."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.cost.difference import Change, Difference
from infra.cost.lines import Line
from infra.cost.report import Report
from infra.cost.usage import SCENARIOS, Three
from infra.cost.words import NONE, amount, because, evidence, money, quantity, unit_price

HEAD = ("resource", "item", "quantity", "unit price", *SCENARIOS)


def summary(report: Report) -> list[tuple[str, ...]]:
    """Return the sums a month by stack and in all, one row a currency."""
    rows: list[tuple[str, ...]] = [
        (name or "(no stage)", *_three(sums[currency], currency))
        for name, sums in report.by(lambda line: line.stack).items()
        for currency in sums
    ]
    rows += [(f"all, {currency}", *_three(sums, currency)) for currency, sums in report.total().items()]
    rows += [
        (f"once a release, {currency}", *_three(sums, currency))
        for currency, sums in report.total(release=True).items()
    ]
    return rows


def coverage(report: Report) -> str:
    """Return in a sentence what share of the templates is priced."""
    found = report.resources
    count = sum(found.values())
    whole, part = (
        f"{share / count:.1%}" if count else NONE for share in (found["free"] + found["priced"], found["usage"])
    )
    return (
        f"{count} resources: {found['free']} free, {found['priced']} priced, {found['usage']} priced but for usage keys "
        f"that are not given, {found['unknown']} unknown; {whole} of the templates is priced, {part} in part. "
        "Unknown is never counted as 0."
    )


def conditions(report: Report) -> str:
    """Return in a sentence on what the report rests."""
    # of a span the end: until then the source said so
    dates = sorted({price.date.rpartition("..")[2] for line in report.lines for price in line.prices})
    span = f"; prices as of {dates[0]} to {dates[-1]}" if dates else ""
    free = "free tiers taken off" if report.free_tier else "no free tiers"
    hours = f"{report.hours.normalize():f} hours"
    return f"List prices on demand for {hours}, {free}, before taxes and discounts{span}; {report.usage}."


def worth_telling(report: Report) -> list[Line]:
    """Return the lines that are not free."""
    return [line for line in report.lines if line.status != "free"]


def print_report(report: Report, *, every: bool, console: Console) -> None:
    """Print a report to a terminal; with `every` the free resources too, and what each line rests on."""
    stack = None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        table.add_column(name, justify="right" if name in SCENARIOS else "left", overflow="fold")
    for line in report.lines if every else worth_telling(report):
        if line.stack != stack:
            stack = line.stack
            table.add_row(Text(f"\n{stack}"), style="bold")
        costs = (amount(line, k) for k in range(3))
        cells = (line.path.removeprefix(f"{stack}/"), line.item, quantity(line), unit_price(line), *costs)
        table.add_row(*map(Text, cells))
        if every or line.status == "unknown":
            for told in filter(None, (because(line), evidence(line))):
                table.add_row("", Text(f"  {told}"), style="dim")
    console.print(table)
    sums = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("a month", *SCENARIOS):
        sums.add_column(name, justify="right" if name in SCENARIOS else "left")
    for row in summary(report):
        sums.add_row(*map(Text, row), style="bold" if row[0].startswith("all,") else "")
    console.print()
    console.print(sums)
    for text in ("", coverage(report), conditions(report)):
        console.print(text, markup=False, highlight=False)


def report_markdown(report: Report, crossed: Sequence[str] = ()) -> str:
    """Return a report as Markdown, with the guardrails that it crosses, and every line behind a fold."""
    rows = [
        (f"{line.stack}: {line.path.removeprefix(line.stack + '/')}", line.item, quantity(line), unit_price(line),
         *(amount(line, k) for k in range(3)), because(line), evidence(line))
        for line in worth_telling(report)
    ]  # fmt: skip
    head = (*HEAD, "because", "source, date, confidence")
    return "\n".join(
        [
            "### Cost a month", "", *_rails(crossed), *_markdown(("stack", *SCENARIOS), summary(report)), "",
            coverage(report), "",
            conditions(report), "", "<details><summary>Every line</summary>", "",
            *_markdown(head, rows), "", "</details>", "",
        ]
    )  # fmt: skip


# --- differences -----------------------------------------------------------------------------------------------------


def tree(change: Difference) -> list[str]:
    """Return the changes as a tree of + - ~ by stack and resource."""
    out: list[str] = []
    before, after = ({(line.stack, line.path) for line in report.lines} for report in (change.old, change.new))
    stack = path = None
    for one in change.changes:
        if one.line.stack != stack:
            stack, path = one.line.stack, None
            out.append(str(stack))
        if one.line.path != path:
            path = one.line.path
            sign = "+" if (stack, path) not in before else "-" if (stack, path) not in after else "~"
            out.append(f"  {sign} {path.removeprefix(f'{stack}/')}  ({one.line.type})")
        out.append(f"    {one.sign} {one.line.item}: {_delta(one)}")
        out += [f"        {told}" for told in one.why]
    return out


def difference_lines(change: Difference) -> list[str]:
    """Return a difference as lines of text: the tree, the sums in each scenario, what is not known."""
    out = tree(change) or ["nothing changes"]
    out += difference_sums(change)
    if change.unknown:
        names = "; ".join(dict.fromkeys(f"{one.line.stack} {one.line.path}: {one.line.item}" for one in change.unknown))
        out.append(f"not in the difference, for a price is not known: {names}")
    if change.one_sided:
        out.append(f"lines not in the difference, for usage tells them on one side alone: {len(change.one_sided)}")
    sides = [f"{report.usage}, {report.hours:f} hours, {'free tiers off' if report.free_tier else 'no free tiers'}"
             for report in (change.old, change.new)]  # fmt: skip
    if sides[0] != sides[1]:
        out.append(f"the two rest on other usage, which changes amounts too: {sides[0]} -> {sides[1]}")
    return out


def difference_sums(change: Difference) -> list[str]:
    """Return what the sums change by in each scenario, a line each for the month and for a release."""
    out = []
    for title, release in (("a month", False), ("once a release", True)):
        before, after = change.compared(release=release)
        for currency in sorted({*before, *after}):
            old, new = (sums.get(currency, (0, 0, 0)) for sums in (before, after))
            delta = change.total(release=release).get(currency, (0, 0, 0))
            texts = (
                f"{name} {money(delta[k], currency, signed=True)} ({money(old[k], currency)} -> {money(new[k], currency)})"
                for k, name in enumerate(SCENARIOS)
            )
            out.append(f"{title}, {currency}: {', '.join(texts)}")
    return out


def difference_markdown(change: Difference, crossed: Sequence[str] = ()) -> str:
    """Return a difference as Markdown, with the guardrails that it crosses."""
    told = map(_marked, difference_lines(change))
    return "\n".join(["### Change of cost", "", *_rails(crossed), "```diff", *told, "```", ""])


def _rails(crossed: Sequence[str]) -> list[str]:
    return [*(f"- **guardrail** {text}" for text in crossed), ""] if crossed else []


def _marked(text: str) -> str:
    """Move the sign to the front, where diff colouring looks for it; a change is marked by an exclamation mark."""
    sign = text.lstrip()[:1]
    return f"{ {'~': '!'}.get(sign, sign) } {text}" if sign in "+-~" and text.startswith(" ") else f"  {text}"


def _delta(one: Change) -> str:
    currency = one.line.currency
    if one.delta is None:
        if one.unknown:
            known = next((a for a in (one.before, one.after) if a is not None), None)
            return "not known" + (f"; the other side is {money(known[1], currency)}" if known else "")
        if one.before is not None and one.after is not None:
            return f"in another currency, now {money(one.after[1], currency)}"
        return f"depends on usage, {unit_price(one.line)}"
    texts = list(dict.fromkeys(money(value, currency, signed=True) for value in one.delta))
    return texts[0] if len(texts) == 1 else " / ".join(money(value, currency, signed=True) for value in one.delta)


def _three(sums: Three, currency: str) -> tuple[str, str, str]:
    return money(sums[0], currency), money(sums[1], currency), money(sums[2], currency)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def cells(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    rule = ["---:" if name in SCENARIOS else "---" for name in head]
    return [cells(head), cells(rule), *map(cells, rows)]
