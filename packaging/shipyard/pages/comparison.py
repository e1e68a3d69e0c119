"""Ways of fine-tuning, compared: a table for the console and a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shipyard.pages import plots
from shipyard.pages.course import learning, ranks_kept
from shipyard.pages.page import (
    BANDS,
    NONE,
    between,
    escaped,
    figure,
    grid,
    judge,
    mark,
    number,
    page,
    paragraph,
    size_of,
    spoken,
    table,
    whole,
)
from shipyard.pages.plots import Kind, Mark, Row, Series, dots, finite
from shipyard.stage import write

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
            whole(tower.get("parameters_trained")), size_of(said.get("adapter_bytes")), size_of(said.get("merged_bytes")),
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
            f"Queries {kind}", dots(f"asked{k}", f"nDCG@10 of queries {kind}. {spoken(rows)}", rows, axis="nDCG@10"),
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
        svg = dots(f"cost{k}", f"{title}. {spoken(rows)}", rows, axis=units[title])
        figures.append(figure(f"Cost: {title}", svg, "Left is cheaper."))
    words = "".join(f"<li>{escaped(text)}</li>" for text in comparison_words(record))
    ranks = "".join(ranks_kept((said.get("tower") or {}).get("ranks") or {}) for said in methods.values())
    sections = [
        ("verdict", "What was reached", (f"<ul>{words}</ul>\n" if words else "")
         + table("Ways to tune the text tower; columns of nDCG@10 but the loss, MRR and costs.", COMPARED,
                 comparison_lines(record)) + paragraph(comparison_note(record))),
        ("figures", "Figures", grid(*figures)),
        ("ranks", "Ranks", ranks),
    ]  # fmt: skip
    write(out, page("Ways to tune the text tower", f"Profile {record.get('profile', NONE)}", sections))
    return out
