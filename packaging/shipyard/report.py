"""Report: a release's figures on one page that needs nothing beside itself, light, dark and printed.

What a record does not have is left out of the page. Every name is escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shipyard import plots
from shipyard.plots import Kind, Mark, Row, Series, dots, finite
from shipyard.stage import write

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
LEVEL = {"product": "products", "type": "product types", "category": "categories"}
BANDS = "Bars are 95 % intervals from a bootstrap over households."


NONE = "\u2013"
"""What stands for a figure that is not recorded."""


class Html(str):
    """Text that is a part of a page already."""


def report(release: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a release to the file `out`.

    `release` has "title" and "profile", what the stages said by their names ("data", "finetune", "evaluate"), and by
    sub-model what "split" and "quantise" said. Each may be missing.
    """
    said = {stage: release.get(stage) or {} for stage in ("data", "finetune", "evaluate", "split", "quantise")}
    scores = said["evaluate"].get("submodels") or {}
    sections = [("verdict", "What was reached", verdict(scores, said["evaluate"].get("fusion")))]
    sections += [(f"model-{k}", name, _submodel(f"s{k}", score)) for k, (name, score) in enumerate(scores.items())]
    sections += [
        ("fusion", "Fusion", _fusion(said["evaluate"].get("fusion") or {})),
        ("training", "Training", _training(said["finetune"])),
        ("size", "Size and form", _sizes(said["split"], said["quantise"])),
        ("data", "Data", _data(said["data"])),
    ]
    method, seed = said["finetune"].get("method"), said["finetune"].get("seed")
    told = [
        f"Profile {release['profile']}" if release.get("profile") else "",
        f"text tower by {method}" if method else "",
    ]
    told += [f"seed {seed}"] if seed is not None else []
    title = str(release.get("title") or "Release")
    write(out, page(title, ", ".join(part for part in told if part), sections))
    return out


# --- a page and its parts ----------------------------------------------------------------------------------------------


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a page of sections (id, title, content); those without content are left out."""
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{_text(name)}</a>\n' for key, name, _ in kept) if len(kept) > 1 else ""
    body = "".join(f'<section id="{key}"><h2>{_text(name)}</h2>\n{content}</section>\n' for key, name, content in kept)
    nav = f'<nav aria-label="Sections">{links}</nav>\n' if links else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>\n{nav}{body or "<p>Nothing is recorded.</p>"}'
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
        return f"<{tag}{scope}{style}>{_text(text)}</{tag}>"

    top = "".join(cell(k, text, "th") for k, text in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(cell(k, text, "td" if k else "th-row") for k, text in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    named = html.escape(caption, quote=True)
    return Html(
        f'<div><p class="caption">{_text(caption)}</p>\n<div class="table" role="region" aria-label="{named}" tabindex="0">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table></div></div>\n"
    )


def figure(title: str, svg: str, caption: str, key: Sequence[tuple[Kind, str]] = ()) -> Html:
    """Return a figure with its title, what its marks are, and a caption that says what to see."""
    if not svg:
        return Html("")
    marks = "".join(f'<span class="{plots.SHAPES[kind][0]}">{GLYPHS[kind]} {_text(text)}</span>' for kind, text in key)
    line = f'<p class="key">{marks}</p>' if marks else ""
    return Html(f"<figure><h3>{_text(title)}</h3>{line}{svg}<figcaption>{_text(caption)}</figcaption></figure>\n")


def grid(*figures: str) -> Html:
    """Return figures side by side where there is room."""
    return Html(f'<div class="grid">{"".join(figures)}</div>\n' if any(figures) else "")


def paragraph(text: str) -> Html:
    """Return a paragraph; none for no text."""
    return Html(f"<p>{_text(text)}</p>\n" if text else "")


def _text(text: str) -> str:
    return text if isinstance(text, Html) else html.escape(text, quote=True)


# --- figures in words ----------------------------------------------------------------------------------------------


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


def _stacked(record: Any, form: str = ".3f", more: str = "") -> Html:
    """Return a value with its interval below it."""
    value, _, bounds = between(record, form).partition(" ")
    return Html(f"{value}{_text(more)}<br><small>{bounds}</small>")


def _size(count: Any) -> str:
    found = finite(count)
    return NONE if found is None else f"{found / 1e6:.1f} MB" if found >= 1e5 else f"{found / 1e3:.1f} kB"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else "none"


# --- sections of a release -------------------------------------------------------------------------------------------


def verdict(scores: Mapping[str, Any], fusion: Mapping[str, Any] | None) -> str:
    """Return in words and in a table what is better than its strongest baseline and what is not."""
    if not scores:
        return ""
    judged = {name: judge(score.get("over_baseline")) for name, score in scores.items()}
    of: dict[Kind | None, list[str]] = {kind: [n for n, k in judged.items() if k == kind] for kind in (*VERDICTS, None)}
    lines = [
        f"Better than the strongest baseline, the 95 % interval of the difference above 0: {_listed(of['better'])}.",
        f"Not told apart from it, the interval holds 0: {_listed(of['even'])}.",
        f"Worse than it, the interval below 0: {_listed(of['worse'])}.",
    ]
    lines += [f"Not judged, no interval is recorded: {_listed(of[None])}."] if of[None] else []
    gained = {name: judge(score.get("over_before")) for name, score in scores.items()}
    if any(gained.values()):
        better = [name for name, kind in gained.items() if kind == "better"]
        lines.append(f"Better than before fine-tuning: {'all' if len(better) == len(scores) else _listed(better)}.")
    if fusion:
        kind = judge(fusion.get("over_best_single"))
        told = {"better": "better than", "worse": "worse than", "even": "not told apart from"}.get(kind or "", "beside")
        lines.append(
            f"The fusion ({fusion.get('method')}) is {told} its best single source, {fusion.get('best_single')}: "
            f"{between(fusion.get('over_best_single'), '+.3f')}."
        )
    for name, score in scores.items():
        baselines = {rule: finite(found.get("value")) for rule, found in (score.get("baselines") or {}).items()}
        known = {rule: value for rule, value in baselines.items() if value is not None}
        highest = max(known, key=lambda rule: known[rule], default=None)
        chosen = score.get("baseline_name")
        if highest is not None and chosen in known and known[highest] > known[chosen]:
            lines.append(
                f"{name}: on the test, {highest} is higher ({number(known[highest])}) than the baseline that validation "
                f"chose, {chosen} ({number(known[chosen])})."
            )
    rows = []
    for name, score in scores.items():
        relative = (score.get("over_baseline") or {}).get("relative") or {}
        part = f" ({number(relative.get('value'), '+.1%')})" if finite(relative.get("value")) is not None else ""
        rows.append([
            Html(f"<b>{_text(name)}</b><br><small>ranks {_text(LEVEL.get(score.get('level', ''), 'rows'))}; "
                 f"{whole(score.get('examples'))} baskets</small>"),
            Html(f"{_text(str(score.get('baseline_name', NONE)))}<br><small>{between(score.get('baseline'))}</small>"),
            number((score.get("before") or {}).get("value")),
            _stacked(score.get("after")),
            _stacked(score.get("over_baseline"), "+.3f", part),
            VERDICTS.get(judged[name] or "before", NONE),
        ])  # fmt: skip
    metric = _metric(next(iter(scores.values())))
    overview = []
    for key, title, caption in (
        ("over_baseline", "Over the strongest baseline", "Right of the line the released model is better. Only an interval "
         "that stays clear of the line tells the two apart."),
        ("over_before", "Over the untuned model", "What fine-tuning brought: it starts from the pretrained encoder under "
         "untrained heads."),
    ):  # fmt: skip
        found = [
            Row(name, between(score.get(key), "+.3f"), (mark(score.get(key), judge(score.get(key)) or "even"),))
            for name, score in scores.items()
        ]
        svg = dots(key.replace("_", "-"), f"{title}: difference of {metric} by sub-model. {_told(found)}", found,
                   axis=f"difference of {metric}", zero=True)  # fmt: skip
        overview.append(figure(title, svg, caption, _JUDGED))
    return (
        "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>\n"
        + table(
            f"{metric} on the test period. The strongest baseline is chosen on validation; intervals are 95 %, from a "
            "bootstrap over households, differences are paired.",
            ("sub-model", "strongest baseline", "before", "after", "over the baseline", "verdict"), rows, (0, 1),
        )
        + grid(*overview)
    )  # fmt: skip


_JUDGED: tuple[tuple[Kind, str], ...] = (("better", "better"), ("even", "not told apart"), ("worse", "worse"))


def _metric(score: Mapping[str, Any]) -> str:
    return str(score.get("metric", "ndcg@10")).replace("ndcg", "nDCG")


def _told(rows: Sequence[Row]) -> str:
    """Return the rows of a figure as a text that can be read aloud."""
    return "; ".join(f"{row.label}: {row.note}" for row in rows)


def _submodel(name: str, score: Mapping[str, Any]) -> str:
    metric, best = _metric(score), str(score.get("baseline_name", ""))
    level, count = LEVEL.get(score.get("level", ""), "rows"), whole(score.get("examples"))
    lead = f"Ranks {level}. Judged on {count} examples of {whole(score.get('households'))} households."
    baselines = score.get("baselines") or {}
    at = finite((score.get("after") or {}).get("value"))
    ordered = sorted(baselines.items(), key=lambda item: finite(item[1].get("value")) or 0)
    rows = [Row("before fine-tuning", between(score.get("before")), (mark(score.get("before"), "before"),))]
    rows += [Row(rule, between(found), (mark(found, "baseline"),), strong=rule == best) for rule, found in ordered]
    rows.append(Row("released model", between(score.get("after")), (mark(score.get("after"), "model"),)))
    levels = figure(
        "Before, after and the baselines",
        dots(f"{name}-levels", f"{metric} with 95 % intervals. " + _told(rows), rows, axis=metric, guide=at),
        f"{BANDS} In bold the strongest baseline, which is the one that was best on validation, not on this test.",
        (("before", "before"), ("baseline", "baseline"), ("model", "released")),
    )
    rows = [
        Row(
            rule,
            between(found.get("over"), "+.3f"),
            (mark(found.get("over"), judge(found.get("over")) or "even"),),
            strong=rule == best,
        )
        for rule, found in ordered
    ]
    over = figure(
        "Difference over each baseline",
        dots(f"{name}-over", f"Paired difference of {metric}. " + _told(rows), rows,
             axis=f"{metric}, released minus baseline", zero=True),
        "Paired on the same baskets, so narrower than the intervals beside it. Right of the line the model is better.",
        _JUDGED,
    )  # fmt: skip
    return (
        paragraph(lead)
        + grid(levels, over, *_slices(name, score), _queries(name, score.get("queries") or {}, metric),
               _calibration(name, score.get("calibration") or {}), _figures(score))
        + _classes(score.get("report") or {})
    )  # fmt: skip


def _slices(name: str, score: Mapping[str, Any]) -> list[Html]:
    """Return the figures by part of the examples, the model beside its strongest baseline."""
    metric, parts = _metric(score), score.get("slices") or {}
    kinds = {"bought before": "repeat", "new to the shopper": "explore"}
    known = {label: (score.get("kinds") or {}).get(kind) for label, kind in kinds.items()}
    lines = {
        "By length of the shopper's history": (parts.get("history") or {}, "Lines bought before the basket."),
        "By kind of item": (
            known | (parts.get("items") or {}),
            "Only the items of that kind count as right. What ranks by what was bought before cannot find what is new to "
            "the shopper, and most such places are lost to both.",
        ),
    }
    lines |= {f"By {key}": (groups, "") for key, groups in parts.items() if key not in ("history", "items")}
    found = []
    for k, (title, (groups, caption)) in enumerate(lines.items()):
        rows = [
            Row(str(label), f"{between(one.get('over_baseline'), '+.3f')} · {whole(one.get('examples'))}",
                (mark(one.get("after"), "model"), mark(one.get("baseline"), "baseline")))
            for label, one in groups.items() if one and one.get("examples")
        ]  # fmt: skip
        svg = dots(f"{name}-slice{k}", f"{title}: {metric} of the model and its strongest baseline; figures are the "
                   "difference and the number of baskets. " + _told(rows), rows, axis=metric)  # fmt: skip
        text = f"{caption} Figures: paired difference with its interval, number of baskets.".strip()
        found.append(figure(title, svg, text, (("model", "released"), ("baseline", "strongest baseline"))))
    return found


def _queries(name: str, queries: Mapping[str, Any], metric: str) -> Html:
    rows = [
        Row(kind, f"{between(one.get('over_BM25'), '+.3f')} · {whole(one.get('examples'))}",
            (mark(one.get("after"), "model"), mark(one.get("BM25"), "baseline"), mark(one.get("before"), "before")))
        for kind, one in queries.items()
    ]  # fmt: skip
    svg = dots(f"{name}-queries", f"{metric} by the way a query is written; figures are the difference over BM25 and the "
               "number of queries. " + _told(rows), rows, axis=metric)  # fmt: skip
    return figure(
        "Queries as shoppers write them", svg,
        "Misspelt: one mistake in every longer word. Paraphrased: other words for the same thing, which training never "
        "sees. Figures: difference over BM25 with its interval, number of queries.",
        (("model", "released"), ("baseline", "BM25"), ("before", "before fine-tuning")),
    )  # fmt: skip


def _calibration(name: str, record: Mapping[str, Any]) -> Html:
    bins = record.get("reliability") or {}
    error, raw = number(record.get("calibration_error")), number(record.get("raw_calibration_error"))
    svg = plots.reliability(
        f"{name}-cal", f"Reliability: predicted against observed probability of the first ten places; calibration error "
        f"{error}, uncalibrated {raw}.", *(bins.get(key) or () for key in ("predicted", "observed", "count")),
    )  # fmt: skip
    return figure(
        "Calibration of the first ten places", svg,
        f"Points on the line mean what they say. Calibrated by {record.get('method', NONE)} on validation: expected error "
        f"{error}, uncalibrated {raw}; Brier {number(record.get('brier'))}. Upright lines are binomial 95 % "
        "intervals of a bin.",
    )  # fmt: skip


def _figures(score: Mapping[str, Any]) -> Html:
    """Return the table of all metrics."""
    rival = score.get("baseline_metrics") or {}
    rows = [
        [metric.replace("ndcg", "nDCG").replace("mrr", "MRR").replace("auc", "AUC").replace("_", " "),
         between(found, ".4f" if metric == "auc" else ".3f"), between(rival.get(metric))]
        for metric, found in (score.get("metrics") or {}).items()
    ]  # fmt: skip
    return table(
        "All metrics of the full ranking, with 95 % intervals.", ("metric", "released", "strongest baseline"), rows
    )


def _classes(record: Mapping[str, Any]) -> str:
    """Return the classification report."""
    if not record:
        return ""
    columns = ("precision", "recall", "f1")
    rows = [
        [str(one.get("name", NONE)), whole(one.get("support")), *(number(one.get(column), ".2f") for column in columns)]
        for one in record.get("classes") or ()
    ]
    means = [
        [f"{kind} mean", whole(record.get("examples")), *(number(record[kind].get(c), ".2f") for c in columns)]
        for kind in ("weighted", "macro")
        if record.get(kind)
    ]
    text = (
        f"As a classifier: accuracy {number(record.get('accuracy'), '.1%')}, right among the first three "
        f"{number(record.get('top_3_accuracy'), '.1%')}, cross entropy {number(record.get('cross_entropy'))} nats."
    )
    caption = "The most frequent classes; means are over all classes."
    return paragraph(text) + table(caption, ("class", "support", "precision", "recall", "F1"), means + rows)


def _fusion(record: Mapping[str, Any]) -> str:
    if not record:
        return ""
    chosen, best = record.get("method"), record.get("best_single")
    parts: list[tuple[str, Any, Kind]] = []
    for source, found in (record.get("single") or {}).items():
        parts.append((f"{source} alone" + (" (best on validation)" if source == best else ""), found, "baseline"))
    for method, found in (record.get("methods") or {}).items():
        parts.append(
            (f"{method} (released)" if method == chosen else method, found, "model" if method == chosen else "third")
        )
    rows = [Row(label, between(found.get("test")), (mark(found.get("test"), kind),)) for label, found, kind in parts]
    svg = dots("fusion", "nDCG@10 of single sources and of fusions. " + _told(rows), rows, axis="nDCG@10 of searches")
    lines = [[label, number(found.get("validation")), between(found.get("test"))] for label, found, _ in parts]
    return (
        paragraph(
            f"The answers of {_listed(list(map(str, record.get('sources') or ())))} to the same "
            f"{whole(record.get('examples'))} searches. Released is {chosen}, which was best on validation; over {best} "
            f"alone it is {between(record.get('over_best_single'), '+.4f')} on the test."
        )
        + grid(figure("Single sources and fusions", svg, f"{BANDS} Methods are chosen on validation, shown is the test.",
                      (("baseline", "single source"), ("third", "fusion"), ("model", "released fusion"))),
               table("nDCG@10 by source and method.", ("source or method", "validation", "test"), lines))
    )  # fmt: skip


PHASES = {
    "mlm": ("Masked words", "cross entropy, nats", "Fills in hidden words of product texts and baskets."),
    "tower": ("Text tower", "contrastive loss", "A query finds its product among the batch's. Validation's batches are "
              "larger, which makes its loss higher: look at the course of each curve."),
    "joint": ("Joint model", "weighted sum of losses", "All sub-models at once. Training and validation sample products "
              "in different numbers: look at the course of each curve."),
}  # fmt: skip


def learning(record: Mapping[str, Any], kind: Kind = "model", label: str = "validation") -> list[Series]:
    """Return the curves of a phase of training: the loss of the steps, and validation's with its best step."""
    curve, steps = [finite(v) for v in record.get("curve") or ()], finite(record.get("steps")) or 0
    found = []
    if curve and steps:
        middles = [float(part.mean()) for part in np.array_split(np.arange(1, int(steps) + 1), len(curve)) if len(part)]
        points = [(x, y) for x, y in zip(middles, curve, strict=False) if y is not None]
        found.append(Series("training", "before", points, dots=False))
    validation = [(finite(step), finite(value)) for step, value in record.get("validation_curve") or ()]
    start = finite(record.get("validation_before"))
    points = [] if start is None else [(0.0, start)]
    points += [(step, value) for step, value in validation if step is not None and value is not None]
    best = next((point for point in points if point[0] == record.get("best_step")), None)
    return [*found, Series(label, kind, points, best)]


def _training(record: Mapping[str, Any]) -> str:
    figures, rows = [], []
    for phase, (title, axis, caption) in PHASES.items():
        found = record.get(phase)
        if not found:
            continue
        best, steps = whole(found.get("best_step")), whole(found.get("steps"))
        # AdaLoRA's ranks belong to its last step
        last = phase == "tower" and record.get("method") == "adalora"
        at = f"The ring marks the best step, {best} of {steps}" + (
            "; the last is kept." if last else ", which is kept."
        )
        alt = f"{title}: {axis} by step; best on validation at step {best} of {steps}."
        figures.append(
            figure(title, plots.curves(f"curve-{phase}", alt, learning(found), axis=axis), f"{at} {caption}")
        )
        before, after = found.get("validation_before"), found.get("validation_after")
        curve = [point[1] for point in found.get("validation_curve") or ()]
        rows.append([
            title, f"{steps} of {whole(found.get('steps_most'))}", best,
            f"{number(found.get('loss_first'))} → {number(found.get('loss_last'))}",
            f"{number(curve[0] if before is None and curve else before)} → "
            f"{number(min(curve) if after is None and curve else after)}",
            whole(found.get("parameters_trained")), number(found.get("seconds"), ".0f"), whole(found.get("memory_mb")),
        ])  # fmt: skip
    tower, moved = record.get("tower") or {}, []
    if finite(tower.get("weights_moved")) is not None:
        moved.append(f"trained parameters moved by {number(tower['weights_moved'], '.2f')} (Euclidean norm)")
    if finite(record.get("vectors_moved")) is not None:
        moved.append(f"the products' text vectors by {number(record['vectors_moved'], '.2f')} on average")
    if finite(tower.get("merge_error")) is not None:
        moved.append(f"merging the adapter changed outputs by {number(tower['merge_error'], '.0e')} at most")
    text = "; ".join(moved)
    joint = (record.get("joint") or {}).get("validation_loss") or {}
    return (
        grid(*figures, table("Validation loss of each sub-model at the end of joint training.", ("sub-model", "loss"),
                             [[name, number(loss)] for name, loss in joint.items()]))
        + table("Phases of training. Loss is the mean of the first and of the last tenth of the steps; memory the process's "
                "peak up to then.", ("phase", "steps", "best step", "training loss", "validation loss",
                                     "parameters trained", "seconds", "peak MB"), rows)
        + paragraph(f"{text[:1].upper()}{text[1:]}." if text else "")
        + _ranks(tower.get("ranks") or {})
        + _balance(record.get("balance") or {})
    )  # fmt: skip


def _balance(record: Mapping[str, Any]) -> Html:
    """Return by what each head's terms were scaled after training."""
    rows = [
        [name, ", ".join(f"{term} {number(factor, '.2f')}" for term, factor in (found.get("factors") or {}).items()),
         number(found.get("before")), number(found.get("after"))]
        for name, found in record.items()
    ]  # fmt: skip
    caption = (
        "Terms of each head, scaled after training for nDCG@10 on validation, which is also where they are chosen."
    )
    return table(caption, ("sub-model", "factors", "before", "after"), rows, (0, 1))


def _ranks(ranks: Mapping[str, Any]) -> Html:
    """Return AdaLoRA's ranks as a table of modules by layers."""
    parsed = {name: re.search(r"layer\.(\d+)\.(.+?)(?:\.lora_\w+)?$", name) for name in ranks}
    if not ranks or not all(parsed.values()):
        return table(
            "Ranks that AdaLoRA kept.", ("module", "rank"), [[name, whole(rank)] for name, rank in ranks.items()]
        )
    cells = {(found[2], int(found[1])): ranks[name] for name, found in parsed.items() if found}
    layers = sorted({layer for _, layer in cells})
    rows = [
        [module, *(whole(cells.get((module, layer))) for layer in layers)]
        for module in dict.fromkeys(module for module, _ in cells)
    ]
    return table("Ranks that AdaLoRA kept, by layer of the encoder.", ("module", *map(str, layers)), rows)


def _sizes(split: Mapping[str, Any], quantised: Mapping[str, Any]) -> str:
    rows = [
        Row(name, f"{_size(cut.get('bytes_own'))} own, {_size(cut.get('bytes_shared'))} shared",
            (Mark("model", finite(cut.get("bytes_own")) and cut["bytes_own"] / 1e6),
             Mark("baseline", finite(cut.get("bytes_shared")) and cut["bytes_shared"] / 1e6)))
        for name, cut in split.items() if finite(cut.get("bytes_own")) is not None
    ]  # fmt: skip
    cuts = [
        [name, whole(cut.get("rows")), whole(cut.get("parameters_own")), whole(cut.get("parameters_shared")),
         number(cut.get("error"), ".0e") if cut.get("error") else "0" if cut.get("error") == 0 else NONE]
        for name, cut in split.items()
    ]  # fmt: skip
    forms = []
    for name, found in quantised.items():
        form = found.get("form") or {}
        forms.append([
            name, str(form.get("precision", NONE)), _size(form.get("bytes")), number(form.get("order"), ".1%"),
            number(form.get("parity"), ".0e"), number(form.get("loss"), "+.2%"),
            f"{number(found.get('fp32_latency_ms'), '.2f')} → {number(form.get('latency_ms'), '.2f')}",
        ])  # fmt: skip
    svg = dots("sizes", "Megabytes of parameters of each sub-model, own and shared. " + _told(rows), rows,
               axis="MB in fp32, each step ten times the last", log=True)  # fmt: skip
    return (
        grid(figure("Own and shared parameters", svg, "Own is the head and the bias of a row; shared is what comes from the "
                    "trunk: item vectors, the encoder of histories, for search the text tower.",
                    (("model", "own"), ("baseline", "shared"))),
               table("Rows, parameters own and shared; the error of the cut is the largest difference of a logit from the "
                     "joint model's, as a part of the largest.", ("sub-model", "rows", "own", "shared", "error"), cuts))
        + table("The form that is served, against fp32 on validation; latency is the median of single requests, in "
                "both.",
                ("sub-model", "precision", "size", "same top 10", "logits' error", "metric lost", "latency, ms"), forms)
    )  # fmt: skip


def _data(record: Mapping[str, Any]) -> str:
    counts = record.get("counts") or {}
    periods = {name: found for name, found in counts.items() if isinstance(found, Mapping)}
    columns = list(dict.fromkeys(key for found in periods.values() for key in found))
    flat = ", ".join(f"{whole(found)} {name}" for name, found in counts.items() if finite(found) is not None)
    rules = []
    for rule in record.get("report") or ():
        lines, of = finite(rule.get("lines")), finite(rule.get("of"))
        share = number(lines / of, ".2%") if lines is not None and of else NONE
        rules.append([str(rule.get("rule", NONE)), str(rule.get("table", "")), whole(lines), whole(of), share,
                      str(rule.get("note") or "")])  # fmt: skip
    return (
        paragraph(f"After cleaning: {flat}." if flat else "")
        + table("Periods, in the order of time.", ("period", *columns),
                [[name, *(whole(found.get(column)) for column in columns)] for name, found in periods.items()])
        + table("Rules of cleaning, in their order, with the lines that each concerns.",
                ("rule", "table", "lines", "of", "share", "note"), rules, (0, 1, 5))
    )  # fmt: skip


# --- ways of fine-tuning, compared -----------------------------------------------------------------------------------

COMPARED = ("method", "validation loss", "nDCG@10 [95 %]", "MRR", "misspelt", "paraphrased", "parameters", "adapter",
            "merged", "seconds", "peak MB")  # fmt: skip
ASKED = ("as written", "misspelt", "paraphrased")
KINDS: tuple[Kind, ...] = ("model", "baseline", "third")


def comparison_lines(record: Mapping[str, Any]) -> list[list[str]]:
    """Return a line a method for `COMPARED`, the tower that all start from first."""
    lines = []
    for name, said in {"none": record.get("start") or {}, **(record.get("methods") or {})}.items():
        tower, found = said.get("tower") or {}, said.get("retrieval") or {}
        written = found.get(ASKED[0]) or {}
        lines.append([
            name,
            f"{number(tower.get('validation_before'))} → {number(tower.get('validation_after'))}" if tower else NONE,
            between(written.get("ndcg@10")),
            number((written.get("mrr") or {}).get("value")),
            *(number(((found.get(kind) or {}).get("ndcg@10") or {}).get("value")) for kind in ASKED[1:]),
            whole(tower.get("parameters_trained")), _size(said.get("adapter_bytes")), _size(said.get("merged_bytes")),
            number(tower.get("seconds"), ".0f") + ("*" if tower.get("resumed") else ""), whole(tower.get("memory_mb")),
        ])  # fmt: skip
    return lines


def comparison_words(record: Mapping[str, Any]) -> list[str]:
    """Say which method is best on validation, whether that is more than chance, and what it costs."""
    methods = record.get("methods") or {}
    best, told = record.get("best"), []
    for name, said in methods.items():
        over = ((said.get("retrieval") or {}).get(ASKED[0]) or {}).get("over_start")
        kind = {"better": "better than", "worse": "worse than", "even": "not told apart from"}.get(
            judge(over) or "", "beside"
        )
        told.append(f"{name} is {kind} the tower that it starts from: {between(over, '+.3f')} nDCG@10.")
    for name, over in (record.get("over_others") or {}).items():
        kind = {"better": "better than", "worse": "worse than", "even": "not told apart from"}.get(
            judge(over) or "", "beside"
        )
        told.append(f"{best}, the highest, is {kind} {name}: {between(over, '+.3f')}.")
    return told


def comparison_note(record: Mapping[str, Any]) -> str:
    """Say what the figures of a comparison are of."""
    texts, of = record.get("texts"), record.get("texts_of")
    some = f"a fixed sample of {whole(texts)} of {whole(of)} texts, the right ones among them" if texts != of else (
        f"all {whole(of)} texts of the catalogue")  # fmt: skip
    resumed = any((said.get("tower") or {}).get("resumed") for said in (record.get("methods") or {}).values())
    query, right = (
        ("a search of the log", "are the products that answer it, by their grades")
        if record.get("logged")
        else ("the category path of a product that was bought", "is the text of what was bought of that path")
    )
    return (
        f"Validation alone: {whole(record.get('queries'))} queries, each {query}, ranked over {some}; right {right}. "
        "Same data, seed and most steps for each method; "
        "each in a process of its own, whose peak of memory is that of training. Adapter: parameters trained, 4 bytes each."
        + (" * went on after a stop: seconds and memory are of the last part." if resumed else "")
    )


def print_comparison(record: Mapping[str, Any]) -> None:
    """Print the table of a comparison on standard output."""
    console = Console(highlight=False, width=None if Console().is_terminal else 176)
    found = Table(
        *COMPARED, title=f"Ways to tune the text tower, profile {record.get('profile')}", title_justify="left"
    )
    for line in comparison_lines(record):
        found.add_row(*line)
    console.print(found)
    for text in (*comparison_words(record), comparison_note(record)):
        console.print(text, markup=False, soft_wrap=True)


def comparison(record: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a comparison to the file `out`."""
    methods = record.get("methods") or {}
    kinds = {name: KINDS[k % len(KINDS)] for k, name in enumerate(methods)}
    curves = [
        Series(name, kinds[name], one.points, one.best)
        for name, said in methods.items() for one in learning(said.get("tower") or {})[-1:]
    ]  # fmt: skip
    figures = [figure(
        "Validation loss while training",
        plots.curves("curves", "Contrastive loss on validation by step, for each method.", curves, axis="contrastive loss"),
        "The ring marks the best step, whose weights are kept; AdaLoRA keeps its last, to which its ranks belong.",
    )]  # fmt: skip
    for k, kind in enumerate(ASKED):
        found = {"none": record.get("start") or {}, **methods}
        parts = [(name, ((said.get("retrieval") or {}).get(kind) or {})) for name, said in found.items()]
        rows = [
            Row("not tuned" if name == "none" else name, between(part.get("ndcg@10")),
                (mark(part.get("ndcg@10"), kinds.get(name, "before")),))
            for name, part in parts if part
        ]  # fmt: skip
        queries = whole(parts[-1][1].get("examples")) if parts else NONE
        figures.append(figure(
            f"Queries {kind}", dots(f"asked{k}", f"nDCG@10 of queries {kind}. {_told(rows)}", rows, axis="nDCG@10"),
            f"{queries} queries. {BANDS}",
        ))  # fmt: skip
    costs = {"seconds": ("seconds", ".0f", 1.0), "peak memory": ("memory_mb", ".0f", 1.0),
             "parameters trained": ("parameters_trained", ".2f", 1e-6)}  # fmt: skip
    units = {"seconds": "s of training", "peak memory": "MB", "parameters trained": "million"}
    for k, (title, (key, form, scale)) in enumerate(costs.items()):
        values = {name: finite((said.get("tower") or {}).get(key)) for name, said in methods.items()}
        rows = [
            Row(name, f"{number(value * scale, form)} {units[title]}", (Mark(kinds[name], value * scale),))
            for name, value in values.items() if value is not None
        ]  # fmt: skip
        svg = dots(f"cost{k}", f"{title}. {_told(rows)}", rows, axis=units[title])
        figures.append(figure(f"Cost: {title}", svg, "Left is cheaper."))
    words = "".join(f"<li>{_text(text)}</li>" for text in comparison_words(record))
    ranks = "".join(_ranks((said.get("tower") or {}).get("ranks") or {}) for said in methods.values())
    sections = [
        ("verdict", "What was reached", (f"<ul>{words}</ul>\n" if words else "")
         + table("Ways to tune the text tower; columns of nDCG@10 but the loss, MRR and costs.", COMPARED,
                 comparison_lines(record)) + paragraph(comparison_note(record))),
        ("figures", "Figures", grid(*figures)),
        ("ranks", "Ranks", ranks),
    ]  # fmt: skip
    write(out, page("Ways to tune the text tower", f"Profile {record.get('profile', NONE)}", sections))
    return out
