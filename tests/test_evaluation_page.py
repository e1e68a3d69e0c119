"""docs/evaluation.md says what the figures of the committed release say."""

import json

import pytest

from models.config import load_fleet
from serve.files import sha256_file
from tests.conftest import ROOT, check_tables

PAGE = ROOT / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def figures():
    version = load_fleet(ROOT / "fleet.toml").env["prod"].release
    path = ROOT / "releases" / version / "figures.json"
    named = json.loads((ROOT / "releases" / f"{version}.json").read_text())["papers"]
    assert sha256_file(path) in [paper["sha256"] for paper in named]
    return json.loads(path.read_text())["evaluate"]


def told(found, form=".3f"):
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def over(found):
    return f"{told(found, '+.3f')}, {100 * found['relative']['value']:+.1f} %"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def baselines(figures):
    rows = []
    for name, score in figures["submodels"].items():
        rows.append((f"`{name}`", "*the released model*", told(score["after"]), ""))
        for baseline, found in sorted(score["baselines"].items(), key=lambda item: -item[1]["value"]):
            shown = f"**{baseline}**" if baseline == score["baseline_name"] else baseline
            rows.append(("", shown, told(found), over(found["over"])))
    return table(("sub-model", "", "nDCG@10", "released over it"), rows)


def kinds(figures):
    rows = [
        (f"`{name}`", {"repeat": "bought before", "explore": "new to the shopper"}[kind], str(found["examples"]),
         told(found["baseline"]), told(found["after"]), told(found["over_baseline"], "+.3f"))
        for name, score in figures["submodels"].items() for kind, found in score["kinds"].items()
    ]  # fmt: skip
    return table(("sub-model", "items", "baskets", "strongest baseline", "released", "difference"), rows)


def queries(figures):
    rows = [
        (kind, str(found["examples"]), told(found["before"]), told(found["BM25"]), told(found["after"]))
        for kind, found in figures["submodels"]["search"]["queries"].items()
    ]
    return table(("queries", "examples", "untrained encoder", "BM25", "released"), rows)


def fusion(figures):
    found = figures["fusion"]
    rows = [(f"{name} alone", f"{one['validation']:.3f}", told(one["test"])) for name, one in found["single"].items()]
    for method, one in found["methods"].items():
        shown = f"**{method}**" if method == found["method"] else method
        rows.append((shown, f"{one['validation']:.3f}", told(one["test"])))
    last = f"\n\nThe released one over {found['best_single']} alone: {told(found['over_best_single'], '+.4f')}."
    return table(("source or method", "validation", "test"), rows) + last


def test_the_tables_are_the_committed_releases(figures):
    """Compare the tables; `make docs` writes them anew."""
    tables = {make.__name__: make(figures) for make in (baselines, kinds, queries, fusion)}
    check_tables(PAGE, tables)
