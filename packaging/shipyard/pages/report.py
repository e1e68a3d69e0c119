"""Report: a release's figures on one page. What a record does not have is left out of the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.release import Release
from shipyard.pages.course import training
from shipyard.pages.dossier import card_of, cost, difference, evaluated, forms, release_facts, targets
from shipyard.pages.page import (
    JUDGED,
    LEVEL,
    NONE,
    VERDICTS,
    Html,
    between,
    escaped,
    figure,
    grid,
    judge,
    listed,
    mark,
    number,
    page,
    paragraph,
    size_of,
    spoken,
    stacked,
    table,
    whole,
)
from shipyard.pages.plots import Kind, Mark, Row, dots, finite
from shipyard.pages.scores import fusion, metric_name, sub_model
from shipyard.stage import write


def report(
    release: Mapping[str, Any], out: Path, found: Release | None = None, old: Release | None = None,
    prices: Mapping[str, Any] | None = None, card: str = "",
) -> Path:  # fmt: skip
    """Write the page of a release, or of a profile that is none yet, to the file `out`.

    Args:
        release: "title" and "profile", what the stages said by their names ("data", "finetune", "evaluate"), and by
            sub-model what "split", "quantise" and "rerank" said. Each may be missing.
        out: file to write.
        found: the release.
        old: the release to compare it with.
        prices: a cost report of it.
        card: its model card, in Markdown.
    """
    said = {
        stage: release.get(stage) or {} for stage in ("data", "finetune", "evaluate", "split", "quantise", "rerank")
    }
    if found is not None and not said["evaluate"]:
        said["evaluate"] = evaluated(found)
    scores = said["evaluate"].get("submodels") or {}
    sections = [("verdict", "What was reached", verdict(scores, said["evaluate"].get("fusion")))]
    if old is not None and found is not None:
        sections.append(("previous", "Since the previous release", difference(old, found)))
    sections += [
        (f"model-{k}", name, sub_model(f"s{k}", score, said["rerank"].get(name)))
        for k, (name, score) in enumerate(scores.items())
    ]
    sections += [
        ("fusion", "Fusion", fusion(said["evaluate"].get("fusion") or {})),
        ("forms", "Forms", forms(found) if found else ""),
        ("targets", "Targets", targets(found) if found else ""),
        ("cost", "Cost", cost(prices) if prices else ""),
        ("training", "Training", training(said["finetune"])),
        ("size", "Size and form", _sizes(said["split"], said["quantise"])),
        ("data", "Data", _data(said["data"])),
        ("release", "Lineage and gates", release_facts(found) if found else ""),
        ("card", "Model card", card_of(card) if card else ""),
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


def verdict(scores: Mapping[str, Any], fusion: Mapping[str, Any] | None) -> str:
    """Return in words and in a table what is better than its strongest baseline and what is not."""
    if not scores:
        return ""
    judged = {name: judge(score.get("over_baseline")) for name, score in scores.items()}
    of: dict[Kind | None, list[str]] = {kind: [n for n, k in judged.items() if k == kind] for kind in (*VERDICTS, None)}
    lines = [
        f"Better than the strongest baseline, the 95 % interval of the difference above 0: {listed(of['better'])}.",
        f"Not told apart from it, the interval holds 0: {listed(of['even'])}.",
        f"Worse than it, the interval below 0: {listed(of['worse'])}.",
    ]
    lines += [f"Not judged, no interval is recorded: {listed(of[None])}."] if of[None] else []
    gained = {name: judge(score.get("over_before")) for name, score in scores.items()}
    if any(gained.values()):
        better = [name for name, kind in gained.items() if kind == "better"]
        lines.append(f"Better than before fine-tuning: {'all' if len(better) == len(scores) else listed(better)}.")
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
            Html(f"<b>{escaped(name)}</b><br><small>ranks {escaped(LEVEL.get(score.get('level', ''), 'rows'))}; "
                 f"{whole(score.get('examples'))} baskets</small>"),
            Html(f"{escaped(str(score.get('baseline_name', NONE)))}<br><small>{between(score.get('baseline'))}</small>"),
            number((score.get("before") or {}).get("value")),
            stacked(score.get("after")),
            stacked(score.get("over_baseline"), "+.3f", part),
            VERDICTS.get(judged[name] or "before", NONE),
        ])  # fmt: skip
    metric = metric_name(next(iter(scores.values())))
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
        svg = dots(key.replace("_", "-"), f"{title}: difference of {metric} by sub-model. {spoken(found)}", found,
                   axis=f"difference of {metric}", zero=True)  # fmt: skip
        overview.append(figure(title, svg, caption, JUDGED))
    return (
        "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>\n"
        + table(
            f"{metric} on the test period. The strongest baseline is chosen on validation; intervals are 95 %, from a "
            "bootstrap over households, differences are paired.",
            ("sub-model", "strongest baseline", "before", "after", "over the baseline", "verdict"), rows, (0, 1),
        )
        + grid(*overview)
    )  # fmt: skip


def _sizes(split: Mapping[str, Any], quantised: Mapping[str, Any]) -> str:
    rows = [
        Row(name, f"{size_of(cut.get('bytes_own'))} own, {size_of(cut.get('bytes_shared'))} shared",
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
            name, str(form.get("precision", NONE)), size_of(form.get("bytes")), number(form.get("order"), ".1%"),
            number(form.get("parity"), ".0e"), number(form.get("loss"), "+.2%"),
            f"{number(found.get('fp32_latency_ms'), '.2f')} → {number(form.get('latency_ms'), '.2f')}",
        ])  # fmt: skip
    svg = dots("sizes", "Megabytes of parameters of each sub-model, own and shared. " + spoken(rows), rows,
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
