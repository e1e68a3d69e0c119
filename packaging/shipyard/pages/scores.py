"""The parts of a page on what a sub-model and the fusion reached: baselines, slices, queries, calibration, classes."""

from collections.abc import Mapping
from typing import Any

from shipyard.pages import plots
from shipyard.pages.page import (
    BANDS,
    JUDGED,
    LEVEL,
    NONE,
    Html,
    between,
    figure,
    grid,
    judge,
    listed,
    mark,
    number,
    paragraph,
    spoken,
    table,
    whole,
)
from shipyard.pages.plots import Kind, Row, dots, finite


def metric_name(score: Mapping[str, Any]) -> str:
    """Return the metric as it is written."""
    return str(score.get("metric", "ndcg@10")).replace("ndcg", "nDCG")


def sub_model(name: str, score: Mapping[str, Any], reranked: Mapping[str, Any] | None = None) -> str:
    """Return what a sub-model reached; `name` is what its figures are named by."""
    metric, best = metric_name(score), str(score.get("baseline_name", ""))
    level, count = LEVEL.get(score.get("level", ""), "rows"), whole(score.get("examples"))
    lead = f"Ranks {level}. Judged on {count} examples of {whole(score.get('households'))} households."
    baselines = score.get("baselines") or {}
    at = finite((score.get("after") or {}).get("value"))
    ordered = sorted(baselines.items(), key=lambda item: finite(item[1].get("value")) or 0)
    rows = [Row("before fine-tuning", between(score.get("before")), (mark(score.get("before"), "before"),))]
    rows += [Row(rule, between(found), (mark(found, "baseline"),), strong=rule == best) for rule, found in ordered]
    taught = score.get("teacher")
    rows += [Row(f"its teacher, {taught['name']}", between(taught), (mark(taught, "third"),))] if taught else []
    rows.append(Row("released model", between(score.get("after")), (mark(score.get("after"), "model"),)))
    levels = figure(
        "Before, after and the baselines",
        dots(f"{name}-levels", f"{metric} with 95 % intervals. " + spoken(rows), rows, axis=metric, guide=at),
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
        dots(f"{name}-over", f"Paired difference of {metric}. " + spoken(rows), rows,
             axis=f"{metric}, released minus baseline", zero=True),
        "Paired on the same baskets, so narrower than the intervals beside it. Right of the line the model is better.",
        JUDGED,
    )  # fmt: skip
    return (
        paragraph(lead)
        + paragraph(_reranked(reranked or {}))
        + grid(levels, over, *_slices(name, score), _queries(name, score.get("queries") or {}, metric),
               _calibration(name, score.get("calibration") or {}), _figures(score))
        + _classes(score.get("report") or {})
    )  # fmt: skip


def _reranked(record: Mapping[str, Any]) -> str:
    """Say what the cross-encoder of a search brings."""
    if not record:
        return ""
    told = (
        f"A cross-encoder reads the first {whole(record.get('depth'))} products again: nDCG@10 "
        f"{between(record.get('search'))} without it, {between(record.get('reranked'))} with it, a difference of "
        f"{between(record.get('over_search'), '+.3f')}."
    )
    weight = finite(record.get("weight"))
    return told + (
        " On validation its word was best left out, so that it is not in the bundle."
        if weight == 0
        else f" Its weight, chosen on validation, is {number(weight, '.1f')}."
    )


def _slices(name: str, score: Mapping[str, Any]) -> list[Html]:
    """Return the figures by part of the examples, the model beside its strongest baseline."""
    metric, parts = metric_name(score), score.get("slices") or {}
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
                   "difference and the number of baskets. " + spoken(rows), rows, axis=metric)  # fmt: skip
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
               "number of queries. " + spoken(rows), rows, axis=metric)  # fmt: skip
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


def fusion(record: Mapping[str, Any]) -> str:
    """Return the methods of fusion and their single sources."""
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
    svg = dots("fusion", "nDCG@10 of single sources and of fusions. " + spoken(rows), rows, axis="nDCG@10 of searches")
    lines = [[label, number(found.get("validation")), between(found.get("test"))] for label, found, _ in parts]
    return (
        paragraph(
            f"The answers of {listed(list(map(str, record.get('sources') or ())))} to the same "
            f"{whole(record.get('examples'))} searches. Released is {chosen}, which was best on validation; over {best} "
            f"alone it is {between(record.get('over_best_single'), '+.4f')} on the test."
        )
        + grid(figure("Single sources and fusions", svg, f"{BANDS} Methods are chosen on validation, shown is the test.",
                      (("baseline", "single source"), ("third", "fusion"), ("model", "released fusion"))),
               table("nDCG@10 by source and method.", ("source or method", "validation", "test"), lines))
    )  # fmt: skip
