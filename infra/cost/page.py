"""A page of a report that needs nothing beside itself: light, dark and printed. Every name is escaped."""

import html
from collections.abc import Sequence

from infra.cost import svg
from infra.cost.difference import Difference
from infra.cost.lines import Line
from infra.cost.report import Report, total
from infra.cost.svg import Bar
from infra.cost.tables import conditions, coverage, difference_lines, summary, worth_telling
from infra.cost.usage import SCENARIOS, Three
from infra.cost.words import amount, because, evidence, money, quantity, unit_price

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2126;--muted:#5d6770;--rule:#dfe3e7;--one:#0b62a4;--two:#c05a00;
--three:#8a4f8f}
@media (prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e6eaed;--muted:#a0abb5;--rule:#333b43;--one:#66b3ee;
--two:#f0a04b;--three:#cf9ad4}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;overflow-wrap:break-word}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.75rem;line-height:1.2;margin:1rem 0 .25rem}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .4rem}p{margin:.5rem 0;max-width:48rem}.lead{color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1.75rem 2rem;margin:1.25rem 0}
figure{margin:0;min-width:0;break-inside:avoid}figure svg{display:block;width:100%;max-width:520px;height:auto}
svg text{fill:var(--ink);font-size:12px;font-family:inherit}svg .axis{fill:var(--muted)}
svg .bar{fill:var(--one)}svg .span{stroke:var(--ink);fill:none;stroke-width:1.5}svg .rule{stroke:var(--rule);fill:none}
svg .curve{fill:none;stroke-width:2.2}svg .one{stroke:var(--one)}svg .two{stroke:var(--two)}svg .three{stroke:var(--three)}
svg .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
figcaption{font-size:.85rem;color:var(--muted);line-height:1.4;margin-top:.4rem;max-width:30rem}
.table{overflow-x:auto;margin:0 0 1rem}table{border-collapse:collapse;font-size:.85rem;line-height:1.35;
font-variant-numeric:tabular-nums;min-width:100%}caption{text-align:left;color:var(--muted);padding:.3rem 0}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--rule)}
thead th{color:var(--muted);font-weight:400;vertical-align:bottom;white-space:normal!important}tbody th{font-weight:400}
td{min-width:5.5rem}.n{text-align:right;white-space:nowrap;min-width:0}.w{min-width:11rem;overflow-wrap:anywhere}.unknown{color:var(--two)}
.crossed{border-left:3px solid var(--two);padding-left:.75rem}pre .new{color:var(--one)}pre .gone{color:var(--two)}
pre .changed{color:var(--three)}
details summary{cursor:pointer;margin:.75rem 0}pre{overflow-x:auto;font-size:.85rem;line-height:1.4}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--muted:#444;--rule:#ccc}body{font-size:10pt}
main{max-width:none;padding:0}.table{overflow:visible}tr{break-inside:avoid}table{font-size:7.5pt}}
"""


MOST_BARS = 30


def report_page(report: Report, crossed: Sequence[str] = ()) -> str:
    """Return a report as a page with plots by stack, target and scenario, and every line with its grounds."""
    currencies = sorted(report.total())
    figures = [figure for currency in currencies for figure in _figures(report, currency)]
    told, free = worth_telling(report), [line for line in report.lines if line.status == "free"]
    unknown = [line for line in report.lines if line.status == "unknown"]
    sections = [
        *rails(crossed), f"<p>{_e(coverage(report))}</p>",
        table("Sums a month, largest first", ("", *SCENARIOS), summary(report), numbers=(1, 2, 3)),
        f'<div class="grid">{"".join(figures)}</div>',
        "<h2>Unknown</h2>" if unknown else "",
        table("", ("stack", "resource", "item", "why"), [(u.stack, u.path, u.item, u.note) for u in unknown]),
        "<h2>Every line</h2>", *_stacks(told),
        f"<h2>Free</h2><details><summary>{len(free)} resources that cost nothing, with the reason</summary>",
        table("", ("stack", "resource", "type", "why"), [(one.stack, one.path, one.type, one.note) for one in free]),
        "</details>",
    ]  # fmt: skip
    return page("Cost a month", conditions(report), sections)


def difference_page(change: Difference, crossed: Sequence[str] = ()) -> str:
    """Return a difference as a page: what each stage's sum changes by, and the tree of what is new, gone and changed."""
    marks = {"+": "new", "-": "gone", "~": "changed"}
    told = "\n".join(
        f'<span class="{marks[text.lstrip()[:1]]}">{_e(text)}</span>'
        if text.startswith(" ") and text.lstrip()[:1] in marks
        else _e(text)
        for text in difference_lines(change)
    )
    rows = [
        (name or "(no stage)", *(money(value, currency, signed=True) for value in sums))
        for name, by_currency in change.by_environment().items()
        for currency, sums in by_currency.items()
    ]
    sums = table("What each stage changes by a month", ("", *SCENARIOS), rows, numbers=(1, 2, 3))
    return page("Change of cost", conditions(change.new), [*rails(crossed), sums, f"<pre>{told}</pre>"])


def rails(crossed: Sequence[str]) -> list[str]:
    """Return the guardrails that are crossed, as paragraphs."""
    return [f'<p class="crossed"><strong>Guardrail crossed</strong> {_e(text)}</p>' for text in crossed]


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """Return a page of parts that are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n<h1>{_e(title)}</h1>\n"
        f'<p class="lead">{_e(lead)}</p>\n' + "\n".join(part for part in sections if part) + "\n</main></body></html>\n"
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; the columns `numbers` are set to the right. None for no rows."""
    if not rows:
        return ""

    def cells(row: Sequence[str], tag: str) -> str:
        styles = ["n" if k in numbers else "w" if k >= 3 else "" for k in range(len(row))]
        marked = [f"{s} unknown".strip() if text == "unknown" else s for s, text in zip(styles, row, strict=True)]
        return "".join(
            f"<{tag}{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{_e(text)}</{tag}>"
            for style, text in zip(marked, row, strict=True)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    title = f"<caption>{_e(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="table"><table>{title}{top}\n<tbody>{body}</tbody></table></div>'


def figure(title: str, drawing: str, caption: str) -> str:
    """Return a drawing with its title and what to see in it; none for no drawing."""
    if not drawing:
        return ""
    return f"<figure><h3>{_e(title)}</h3>{drawing}<figcaption>{_e(caption)}</figcaption></figure>\n"


def _stacks(lines: Sequence[Line]) -> list[str]:
    head = ("resource", "item", "quantity", "unit price", *SCENARIOS, "because", "source, date, confidence")
    parts = []
    for stack in dict.fromkeys(line.stack for line in lines):
        mine = [line for line in lines if line.stack == stack]
        sums = total(line for line in mine if line.status != "release")
        title = f"{stack}: " + (
            ", ".join(f"{money(three[1], currency)} expected" for currency, three in sums.items()) or "by usage"
        )
        rows = [
            (line.path.removeprefix(f"{stack}/"), line.item, quantity(line), unit_price(line),
             *(amount(line, k) for k in range(3)), because(line), evidence(line))
            for line in mine
        ]  # fmt: skip
        parts.append(f"<h3>{_e(title)}</h3>" + table("", head, rows, numbers=(4, 5, 6)))
    return parts


def _figures(report: Report, currency: str) -> list[str]:
    spans = "The bar is the scenario expected, the line spans low to high."

    def rows(sums: dict[str, dict[str, Three]]) -> list[Bar]:
        return [
            _bar(name or "(no stage)", three[currency], currency) for name, three in sums.items() if three.get(currency)
        ]

    whole = report.total()[currency]
    scenarios = [
        Bar(name, float(whole[k]), float(whole[k]), float(whole[k]), money(whole[k], currency))
        for k, name in enumerate(SCENARIOS)
    ]
    million, by_stack = report.million(), rows(report.by(lambda line: line.stack))
    return [
        figure(
            f"By stack, {currency} a month",
            svg.bars("cost by stack", by_stack[:MOST_BARS]),
            spans if len(by_stack) <= MOST_BARS else f"{spans} These are the largest {MOST_BARS} of {len(by_stack)}.",
        ),
        figure(
            f"By target, {currency} a month",
            svg.bars("cost by target", rows(report.by(lambda line: line.part))[:MOST_BARS]),
            f"A target is what a stack is called within its stage; all stages together. {spans}",
        ),
        figure(f"By scenario, {currency} a month", svg.bars("cost by scenario", scenarios), "All stacks together."),
        figure(
            f"A million predictions by target, {currency}",
            svg.bars("cost of a million predictions by stack", _rising(million, currency)),
            "Each stack's cost a month over the predictions that usage gives it; the most load is often the least cost.",
        ),
    ]


def _rising(million: dict[str, dict[str, Three]], currency: str) -> list[Bar]:
    found = []
    for name, sums in million.items():
        if currency in sums:
            low, _, high = sorted(sums[currency])
            found.append(
                Bar(name, float(low), float(sums[currency][1]), float(high), money(sums[currency][1], currency))
            )
    return found


def _bar(label: str, sums: Three, currency: str) -> Bar:
    return Bar(label, float(sums[0]), float(sums[1]), float(sums[2]), money(sums[1], currency))


def _e(text: str) -> str:
    return html.escape(text, quote=True)
