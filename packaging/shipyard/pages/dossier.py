"""The parts of a page that a release adds to its stages' figures: what it is, its forms, targets, cost, what changed."""

from collections.abc import Mapping
from typing import Any

from markdown_it import MarkdownIt

from models.release import Format, Release
from shipyard.diff import diff
from shipyard.pages.page import (
    NONE,
    Html,
    between,
    escaped,
    figure,
    grid,
    mark,
    number,
    paragraph,
    size_of,
    spoken,
    table,
)
from shipyard.pages.plots import Kind, Mark, Row, dots, finite

KINDS: tuple[tuple[Kind, str], ...] = (
    ("before", "fp32"), ("model", "served"), ("third", "tried"), ("worse", "refused"),
)  # fmt: skip


def evaluated(found: Release) -> dict[str, Any]:
    """Return what a release itself says of its evaluation, in the form of that stage, for one that has no papers."""
    submodels = {}
    for name, sub in found.submodels.items():
        score = sub.score.model_dump(mode="json")
        over = score["over_baseline"] | {"relative": score.pop("relative")}
        rule = {score["baseline_name"]: score["baseline"] | {"over": over}}
        submodels[name] = score | {"level": sub.level, "over_baseline": over, "baselines": rule}
    if found.fusion is None:
        return {"submodels": submodels}
    fusion = found.fusion.model_dump(mode="json")
    return {"submodels": submodels, "fusion": fusion | {"best_single": fusion["best_single_name"]}}


def release_facts(found: Release) -> str:
    """Return what a release is: lineage, gates, papers."""
    source, signer = found.source, found.signature
    commit = source.commit or ("none: the code was in no git repository" if found.papers else NONE)
    rows = [
        ("version", found.version), ("number", str(found.sequence)), ("replaces", found.replaces or NONE),
        ("profile", found.profile), ("commit", commit), ("code", source.code_sha256),
        ("environment", source.environment_sha256 or NONE), ("data", f"{source.data}, {source.data_sha256}"),
        ("base model", f"{source.base}, {source.base_sha256}"),
        ("signed by", f"{signer.key_id}, {signer.algorithm}"),
    ]  # fmt: skip
    gates = [
        [gate.of, gate.gate, number(gate.figure, ".4g"), number(gate.low, ".4g"), number(gate.bound, ".4g"),
         "passed" if gate.passed else "missed"]
        for gate in found.gates
    ]  # fmt: skip
    papers = [[paper.name, paper.sha256, size_of(paper.bytes)] for paper in found.papers]
    return (
        table("What it was made from. Changes beside a commit that ends in -dirty are in no commit.", ("", "is"), rows,
              (0, 1))
        + table("Gates. Differences are judged by the lower end of their interval; loss and size_mb are bounded from above, "
                "the others from below.", ("of", "gate", "figure", "interval's lower end", "bound", "result"), gates,
                (0, 1, 5))
        + table("Papers beside the release file, with the digests that were signed.", ("paper", "sha256", "size"), papers,
                (0, 1))
    )  # fmt: skip


def forms(found: Release) -> str:
    """Return what each form that was tried costs of the metric and saves of the size, by sub-model."""
    figures = []
    for name, sub in found.submodels.items():
        plain, served = sub.formats[0], sub.formats[-1]
        tried: list[tuple[Format, Kind]] = [(plain, "before")] if len(sub.formats) > 1 else []
        tried += [(served, "model"), *((other, "worse" if other.refused else "third") for other in sub.losers)]
        rows = [
            Row(form.form or form.precision,
                f"{size_of(form.bytes)}, {number(form.latency_ms, '.2f')} ms, {form.order:.1%} same",
                (Mark(kind, 100 * form.loss),), strong=form is served)
            for form, kind in tried
        ]  # fmt: skip
        spelt = f"Part of the metric that each form of {name} costs. {spoken(rows)}"
        svg = dots(f"forms-{name.replace('_', '-')}", spelt, rows,
                   axis=f"{sub.score.metric} lost on validation, %", zero=True)  # fmt: skip
        refused = "; ".join(f"{other.form}: {other.refused}" for other in sub.losers if other.refused)
        refused = f" Refused: {refused}." if refused else ""
        figures.append(figure(
            f"{name}, for {sub.target}", svg, f"Right of the line a form is worse than fp32.{refused}",
            [(kind, word) for kind, word in KINDS if kind in {mark for _, mark in tried}],
        ))  # fmt: skip
    return (
        paragraph("Of the forms that hold, the smallest is served. Beside each: its size, the median of single requests, "
                  "and the part of the first ten places that stays.")
        + grid(*figures)
    )  # fmt: skip


def targets(found: Release) -> str:
    """Return size and latency by target."""
    machine = found.source.machine
    where = f"{machine.architecture}, threads: {machine.threads}" if machine else "the machine that made it"
    rows = []
    for target in ("gpu", "cpu", "edge"):
        for artifact in (a for a in found.artifacts if a.target == target):
            sub = found.submodels.get(artifact.submodel or "")
            served = sub.formats[-1] if sub else None
            rows.append([
                target, artifact.name, artifact.kind, size_of(artifact.bytes), served.precision if served else NONE,
                size_of(served.bytes) if served else NONE, number(served.latency_ms, ".2f") if served else NONE,
                number(sub.formats[0].latency_ms, ".2f") if sub else NONE,
            ])  # fmt: skip
    return table(
        f"Artifacts by target. Latency is the median of single requests to the graph in ONNX Runtime on {where}, wherever "
        "it is served: it compares forms, and promises no endpoint's latency.",
        ("target", "artifact", "kind", "size", "form", "graph", "latency, ms", "fp32, ms"), rows, (0, 1, 2, 4),
    )  # fmt: skip


def cost(prices: Mapping[str, Any]) -> str:
    """Return what a cost report (shipyard cost --save) says by target."""
    rows, lines = [], []
    for target, sums in (prices.get("by_target") or {}).items():
        for currency, amounts in sums.items():
            low, expected, high = (float(amount) for amount in amounts)
            rows.append(Row(target, f"{expected:,.0f} {currency}", (Mark("model", expected, low, high),)))
            lines.append([target, currency, *(number(amount, ",.2f") for amount in (low, expected, high))])
    for currency, amounts in (prices.get("totals") or {}).items():
        lines.append([Html("<b>all</b>"), currency, *(number(float(amount), ",.2f") for amount in amounts)])
    svg = dots("cost", "Cost a month by target. " + spoken(rows), rows, axis="a month; the bar goes from low to high")
    places = ", ".join(prices.get("by_environment") or {})
    return grid(
        figure("Cost a month by target", svg, f"Of {places or 'the templates that were priced'}, as shipyard cost estimates "
               "it from synthesized templates; networks, storage and observation are shared by the targets.",
               (("model", "expected"),)),
    ) + table("A month, by scenario.", ("target", "currency", "low", "expected", "high"), lines, (0, 1))  # fmt: skip


def difference(old: Release, new: Release) -> str:
    """Return what changed since another release: figures, sizes, artifacts, sources."""
    rows, lines = [], []
    for name, sub in new.submodels.items():
        was = old.submodels.get(name)
        before, after = (None if was is None else was.score.after), sub.score.after
        change = NONE if before is None else number(after.value - before.value, "+.3f")
        rows.append(
            Row(name, change, (mark(before and before.model_dump(), "before"), mark(after.model_dump(), "model")))
        )
        own = was.formats[-1] if was else None
        served = sub.formats[-1]
        lines.append([
            name, f"{sub.score.metric}, {sub.score.examples}", between(before and before.model_dump()),
            between(after.model_dump()), f"{size_of(own and own.bytes)} → {size_of(served.bytes)}",
            f"{number(own and own.latency_ms, '.2f')} → {number(served.latency_ms, '.2f')}",
        ])  # fmt: skip
    gone = ", ".join(name for name in old.submodels if name not in new.submodels)
    found = diff(old, new)
    changed = [
        [name, artifact["state"], _sizes(artifact["bytes"]) if artifact["state"] != "same" else NONE,
         str(len(artifact.get("files") or ()) or NONE)]
        for name, artifact in found["artifacts"].items()
    ]  # fmt: skip
    source = [[name, _short(was), _short(now)] for name, (was, now) in found["source"].items()]
    told = f"Metric of the previous release and of this one. {spoken(rows)}"
    svg = dots("previous", told, rows, axis="metric on the test")
    return (
        paragraph(f"Against {old.version}, profile {old.profile}."
                  + (f" It had {gone}, which this one has not." if gone else "")
                  + (" Their data differ, so that their figures are of other examples." if old.source.data_sha256
                     != new.source.data_sha256 or old.profile != new.profile else ""))
        + grid(figure("This release and the previous one", svg, "Bars are 95 % intervals of each release alone; they were "
                      "not measured in pairs, so that bars that overlap tell nothing.",
                      (("before", "previous"), ("model", "this"))))
        + table("Served forms and figures.", ("sub-model", "metric, examples", "previous", "this", "size", "latency, ms"),
                lines, (0, 1))
        + table("Artifacts.", ("artifact", "is", "size", "files changed"), changed, (0, 1))
        + table("Sources that differ.", ("source", "previous", "this"), source, (0, 1, 2))
    )  # fmt: skip


def _sizes(told: Any) -> str:
    return size_of(told) if finite(told) is not None else " → ".join(size_of(size) for size in told)


def _short(value: Any) -> str:
    """Return a value; of a digest its first digits."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or NONE)
    return f"{text[:12]}…" if len(text) == 64 else text


def card_of(text: str) -> str:
    """Return a model card in Markdown as a part of a page, folded, its headings below those of the page."""
    body = text.split("---\n", 2)[-1]
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(body)
    for token in tokens:
        if token.tag in ("h1", "h2"):
            token.tag = f"h{int(token.tag[1]) + 2}"
    told = parser.renderer.render(tokens, parser.options, {})
    tables = told.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return Html(f"<details><summary>{escaped('The card as it lies beside the release')}</summary>{tables}</details>\n")
