"""A page that needs nothing beside itself, light, dark and printed: its parts, and figures in words.

Every name is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from shipyard.pages import plots
from shipyard.pages.plots import Kind, Mark, Row, finite

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2126;--muted:#5d6770;--rule:#dfe3e7;--wash:#f5f7f8;
--model:#0b62a4;--baseline:#c05a00;--before:#767f88;--third:#8a4f8f}
@media (prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e6eaed;--muted:#a0abb5;--rule:#333b43;--wash:#1c2227;
--model:#66b3ee;--baseline:#f0a04b;--before:#98a3ad;--third:#cf9ad4}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;overflow-wrap:break-word}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:1rem 0 .25rem}h2{font-size:1.3rem;margin:3rem 0 .5rem;padding-top:.75rem;
border-top:1px solid var(--rule)}h3{font-size:1rem;margin:0 0 .25rem}p{margin:.5rem 0;max-width:44rem}
.lead{color:var(--muted)}nav{margin:1rem 0;font-size:.9rem;line-height:1.9}nav a{margin-right:1.1rem;white-space:nowrap}
a{color:var(--model)}ul{padding-left:1.2rem;max-width:44rem}li{margin:.2rem 0}
.grid>*{min-width:0}.grid .caption{margin-top:0}.grid td,.grid th{padding-right:.6rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.75rem 2rem;margin:1.25rem 0}
figure{margin:0;min-width:0;break-inside:avoid}figure svg{display:block;width:100%;max-width:410px;height:auto;
overflow:visible;font-family:inherit;font-variant-numeric:tabular-nums;stroke-linejoin:round;stroke-linecap:butt}
figure svg text{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
figcaption{font-size:.85rem;color:var(--muted);line-height:1.4;margin-top:.4rem;max-width:26rem}
.key{font-size:.85rem;margin:0 0 .3rem;display:flex;flex-wrap:wrap;gap:0 1rem}
.model{color:var(--model)}.baseline{color:var(--baseline)}.before{color:var(--before)}.third{color:var(--third)}
.table{overflow-x:auto;margin:0 0 1rem}table{border-collapse:collapse;font-size:.875rem;line-height:1.35;
font-variant-numeric:tabular-nums;min-width:100%}
.caption{font-size:.875rem;line-height:1.4;color:var(--muted);margin:1rem 0 .3rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:400}thead th{color:var(--muted);vertical-align:bottom}.n{text-align:right;white-space:nowrap}
.w{min-width:11rem}small{color:var(--muted);font-size:.93em}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--muted:#444;--rule:#ccc;--model:#0b62a4;--baseline:#b35300;
--before:#666;--third:#7a3f80}body{font-size:10.5pt}main{max-width:none;padding:0}nav{display:none}
h2{break-after:avoid;margin-top:1.5rem}.table{overflow:visible}tr{break-inside:avoid}table{font-size:8.5pt}
.grid{grid-template-columns:1fr 1fr}}
"""

GLYPHS: dict[Kind, str] = {
    "model": "●",
    "baseline": "◆",
    "before": "○",
    "third": "■",
    "better": "●",
    "even": "○",
    "worse": "◆",
}

VERDICTS: dict[Kind, str] = {"better": "better", "worse": "worse", "even": "not told apart"}
JUDGED: tuple[tuple[Kind, str], ...] = (("better", "better"), ("even", "not told apart"), ("worse", "worse"))

LEVEL = {"product": "products", "type": "product types", "category": "categories"}

BANDS = "Bars are 95 % intervals from a bootstrap over households."

NONE = "\u2013"
"""What stands for a figure that is not recorded."""


class Html(str):
    """Text that is a part of a page already."""


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a page of sections (id, title, content); those without content are left out."""
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{escaped(name)}</a>\n' for key, name, _ in kept) if len(kept) > 1 else ""
    body = "".join(
        f'<section id="{key}"><h2>{escaped(name)}</h2>\n{content}</section>\n' for key, name, content in kept
    )
    nav = f'<nav aria-label="Sections">{links}</nav>\n' if links else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escaped(title)}</h1>\n<p class="lead">{escaped(lead)}</p>\n{nav}{body or "<p>Nothing is recorded.</p>"}'
        "</main></body></html>\n"
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> Html:
    """Return a table; the columns `words` hold words, the others figures. The first cell of a row is its name."""
    if not rows:
        return Html("")

    def cell(k: int, text: str, tag: str) -> str:
        kind = "w" if k in words and k > 0 else "" if k in words else "n"
        scope = "" if tag == "td" else ' scope="row"' if kind == "" and tag == "th-row" else ' scope="col"'
        tag = tag.partition("-")[0]
        style = f' class="{kind}"' if kind else ""
        return f"<{tag}{scope}{style}>{escaped(text)}</{tag}>"

    top = "".join(cell(k, text, "th") for k, text in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(cell(k, text, "td" if k else "th-row") for k, text in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    named = html.escape(caption, quote=True)
    return Html(
        f'<div><p class="caption">{escaped(caption)}</p>\n'
        f'<div class="table" role="region" aria-label="{named}" tabindex="0">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table></div></div>\n"
    )


def figure(title: str, svg: str, caption: str, key: Sequence[tuple[Kind, str]] = ()) -> Html:
    """Return a figure with its title, what its marks are, and a caption that says what to see."""
    if not svg:
        return Html("")
    marks = "".join(
        f'<span class="{plots.SHAPES[kind][0]}">{GLYPHS[kind]} {escaped(text)}</span>' for kind, text in key
    )
    line = f'<p class="key">{marks}</p>' if marks else ""
    return Html(f"<figure><h3>{escaped(title)}</h3>{line}{svg}<figcaption>{escaped(caption)}</figcaption></figure>\n")


def grid(*figures: str) -> Html:
    """Return figures side by side where there is room."""
    return Html(f'<div class="grid">{"".join(figures)}</div>\n' if any(figures) else "")


def paragraph(text: str) -> Html:
    """Return a paragraph; none for no text."""
    return Html(f"<p>{escaped(text)}</p>\n" if text else "")


def escaped(text: str) -> str:
    """Return text with its marks escaped; what is a part of a page already stays."""
    return text if isinstance(text, Html) else html.escape(text, quote=True)


def number(value: Any, form: str = ".3f") -> str:
    """Return a number as text with a true minus; a dash for none."""
    found = finite(value)
    return NONE if found is None else format(found, form).replace("-", "\u2212")


def whole(value: Any) -> str:
    """Return a count with thin spaces between thousands."""
    return number(value, ",.0f").replace(",", "\u202f")


def between(record: Any, form: str = ".3f") -> str:
    """Return a value with its interval."""
    record = record if isinstance(record, Mapping) else {}
    text, bounds = number(record.get("value"), form), (record.get("low"), record.get("high"))
    if any(finite(bound) is None for bound in bounds):
        return text
    return f"{text} [{number(bounds[0], form)}, {number(bounds[1], form)}]"


def mark(record: Any, kind: Kind) -> Mark:
    """Return the mark of a record with value, low and high."""
    record = record if isinstance(record, Mapping) else {}
    return Mark(kind, *(finite(record.get(key)) for key in ("value", "low", "high")))


def judge(over: Any) -> Kind | None:
    """Say whether a difference's interval is above 0, below it, or holds it; None where it is unknown."""
    found = mark(over, "even")
    if found.low is None or found.high is None:
        return None
    return "better" if found.low > 0 else "worse" if found.high < 0 else "even"


def stacked(record: Any, form: str = ".3f", more: str = "") -> Html:
    """Return a value with its interval below it."""
    value, _, bounds = between(record, form).partition(" ")
    return Html(f"{value}{escaped(more)}<br><small>{bounds}</small>")


def size_of(count: Any) -> str:
    """Return a number of bytes in MB or kB of 1000."""
    found = finite(count)
    return NONE if found is None else f"{found / 1e6:.1f} MB" if found >= 1e5 else f"{found / 1e3:.1f} kB"


def listed(names: Sequence[str]) -> str:
    """Return names as a phrase."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else "none"


def spoken(rows: Sequence[Row]) -> str:
    """Return the rows of a figure as a text that can be read aloud."""
    return "; ".join(f"{row.label}: {row.note}" for row in rows)
