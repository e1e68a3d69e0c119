"""Model card: what a release is for, what it was made of, what it reaches and where it ends, in Markdown, from the record.

The form is that of Mitchell et al. (FAT* 2019), with the head that the Hugging Face hub reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shipyard.papers.ingredients import Ingredient
from shipyard.papers.uses import NOT_FOR, USERS, purpose


def card(
    project: str, version: str, body: Mapping[str, Any], figures: Mapping[str, Any], ingredients: Mapping[str, Ingredient],
    limits: Sequence[str],
) -> str:  # fmt: skip
    """Return the model card of a release; `body` is what the release says, `figures` what its stages said."""
    parts = (
        _head(body, ingredients), (f"# {project} {version}", ""), _uses(body), _data(body, figures, ingredients),
        _training(body), _metrics(body, figures), _slices(figures), _forms(body), _gates(body), _limits(limits),
        _licences(ingredients), _making(body),
    )  # fmt: skip
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _head(body: Mapping[str, Any], ingredients: Mapping[str, Ingredient]) -> Iterator[str]:
    base = ingredients["base"]
    yield from ("---", "pipeline_tag: text-ranking", f"base_model: {base.name}")
    if base.licence:
        yield f"license: {base.licence.lower()}"
    yield from ("datasets:", f"- {ingredients['data'].name}", "metrics:")
    yield from (f"- {metric}" for metric in sorted({sub["score"]["metric"] for sub in body["submodels"].values()}))
    yield from ("---", "")


def _uses(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Intended use", "", f"For {USERS}.", "")
    for name, sub in body["submodels"].items():
        yield f"- `{name}` ({sub['target']}): {purpose(sub['task'], sub['level'])}"
    yield from ("", "Not for:", "")
    yield from (f"- {text}" for text in NOT_FOR)
    yield ""


def _data(body: Mapping[str, Any], figures: Mapping[str, Any], ingredients: Mapping[str, Ingredient]) -> Iterator[str]:
    data, counts, cut = ingredients["data"], figures["data"]["counts"], body["parameters"]["data"]
    yield from ("## Data", "")
    yield (
        f"`{data.name}` {data.version}".rstrip()
        + f", digest `{body['source']['data_sha256']}` after cleaning. Train ends "
        f"before {cut['valid_from']}, validation before {cut['test_from']}, the test period is what follows."
    )
    yield ""
    periods = {name: found for name, found in counts.items() if isinstance(found, Mapping)}
    columns = list(dict.fromkeys(key for found in periods.values() for key in found))
    yield from _table(("period", *columns), [
        (name, *(f"{found.get(column, 0):,}" for column in columns)) for name, found in periods.items()
    ])  # fmt: skip
    flat = ", ".join(f"{found:,} {name}" for name, found in counts.items() if isinstance(found, int))
    yield from ((f"In all: {flat}.", "") if flat else ())


def _training(body: Mapping[str, Any]) -> Iterator[str]:
    source, tuned = body["source"], body["parameters"]["finetune"]
    yield from ("## Training", "")
    yield (
        f"The text tower starts from `{source['base']}` (digest `{source['base_sha256']}`) and is tuned by "
        f"{tuned['method']}; then one joint model learns all sub-models at once and is cut into them. Profile "
        f"`{body['profile']}`, seed {tuned['seed']}. All parameters are in the release file."
    )
    yield ""


def _metrics(body: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Figures on the test period", "")
    yield "95 % intervals from a bootstrap over households; differences are paired."
    yield ""
    rows: list[tuple[str, ...]] = []
    for name, sub in body["submodels"].items():
        score = sub["score"]
        rows.append((
            f"`{name}`", score["metric"], f"{score['examples']:,}", told(score["before"]),
            f"{told(score['baseline'])} {score['baseline_name']}", told(score["after"]),
            told(score["over_baseline"], "+.3f"),
        ))  # fmt: skip
    yield from _table(
        ("sub-model", "metric", "examples", "before", "strongest baseline", "released", "over baseline"), rows
    )
    fusion = body["fusion"]
    if fusion:
        yield (
            f"Fusion of {', '.join(fusion['sources'])} by {fusion['method']}: ndcg@10 {told(fusion['fused'])}, "
            f"{told(fusion['over_best_single'], '+.4f')} over {fusion['best_single_name']} alone."
        )
        yield ""
    rows = [
        (f"`{name}`", score["calibration"]["method"], f"{score['calibration']['raw_calibration_error']:.3f}",
         f"{score['calibration']['calibration_error']:.3f}", f"{score['calibration']['brier']:.3f}")
        for name, score in figures["evaluate"]["submodels"].items()
    ]  # fmt: skip
    yield from _table(("calibration", "method", "error before", "error after", "Brier score"), rows)


def _slices(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield figures by part of the examples: by length of history, kind of item and kind of query."""
    rows = []
    for name, score in figures["evaluate"]["submodels"].items():
        groups = {
            "bought": score.get("kinds") or {},
            **(score.get("slices") or {}),
            "queries": score.get("queries") or {},
        }
        for group, parts in groups.items():
            for part, found in parts.items():
                if "after" not in found:
                    continue
                over = found.get("over_baseline") or found.get("over_BM25") or found.get("over_before")
                rows.append((f"`{name}`", f"{group}: {part}", f"{found['examples']:,}", told(found["after"]),
                             told(over, "+.3f")))  # fmt: skip
    if rows:
        yield from ("## Figures by slice", "")
        yield "The difference is over the strongest baseline; of kinds of queries over BM25."
        yield ""
        yield from _table(("sub-model", "slice", "examples", "released", "difference"), rows)


def _forms(body: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (f"`{name}`", sub["target"], form["precision"], f"{form['bytes'] / 1e6:.1f}", f"{form['order']:.1%}",
         f"{form['loss']:+.2%}", f"{form['latency_ms']:.1f}")
        for name, sub in body["submodels"].items()
        for form in sub["formats"]
    ]  # fmt: skip
    yield from ("## Forms", "")
    yield from ("The last form of each is served. Latency is the median of single requests where it was made.", "")
    yield from _table(("sub-model", "target", "precision", "MB", "same top 10", "metric lost", "latency, ms"), rows)


def _gates(body: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (f"`{gate['of']}`", gate["gate"], f"{gate['figure']:.4g}", "" if gate["low"] is None else f"{gate['low']:.4g}",
         f"{gate['bound']:.4g}", "passed" if gate["passed"] else "missed")
        for gate in body["gates"]
    ]  # fmt: skip
    yield from ("## Gates", "")
    yield from _table(("of", "gate", "figure", "interval's lower end", "bound", "result"), rows)


def _limits(limits: Sequence[str]) -> Iterator[str]:
    yield from ("## Limits", "")
    yield from (f"- {text}" for text in limits)
    yield ""


def _licences(ingredients: Mapping[str, Ingredient]) -> Iterator[str]:
    yield from ("## Licences", "")
    for kind, words in (("base", "Base model"), ("data", "Data")):
        found = ingredients[kind]
        name = f"`{found.name}` {found.version}".rstrip()
        yield f"- {words} {name}: {found.licence or 'not told; ask who gave it'}"
    yield from ("- Packages: `bom.cdx.json` beside this card", "")


def _making(body: Mapping[str, Any]) -> Iterator[str]:
    source = body["source"]
    lock = source["environment_sha256"]
    yield from ("## How it was made", "")
    yield f"- Commit: {source['commit'] or 'none, the code was in no git repository'}"
    yield f"- Code: `{source['code_sha256']}`"
    yield f"- Environment: {f'constraints.txt, `{lock}`' if lock else 'not locked'}"
    yield f"- Replaces: {body['replaces'] or 'nothing'}"
    yield "- Provenance: `provenance.intoto.jsonl` beside this card; `shipyard verify RELEASE` checks it"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def told(found: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """Return a figure with its interval."""
    return "" if not found else f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
