"""The report: one page that needs nothing beside itself, says what the figures say, and escapes every name."""

import copy
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from models.config import load_fleet
from models.lineage import Gated
from models.release import Release, read_release
from serve.trust import load_keys
from shipyard.pages import plots
from shipyard.pages.comparison import comparison
from shipyard.pages.page import between, judge, number, table
from shipyard.pages.plots import Mark, Row, Series
from shipyard.pages.report import report, verdict

VOID = {"meta", "br", "link", "img", "input", "hr"}
BAD = '<script>alert("1")</script> & 中文'


def interval(value: float, half: float = 0.02) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half}


def over(value: float) -> dict[str, Any]:
    return {**interval(value), "relative": interval(value * 2)}


def score(gain: float, **more: Any) -> dict[str, Any]:
    part = {"examples": 40, "after": interval(0.3), "baseline": interval(0.2), "over_baseline": over(0.1)}
    rule = {**interval(0.3 - gain), "over": over(gain), "settings": {}, "validation": 0.3}
    return {
        "metric": "ndcg@10", "level": "product", "examples": 200, "households": 150, "baseline_name": BAD,
        "baseline": interval(0.3 - gain), "before": interval(0.01, 0.005), "after": interval(0.3),
        "over_baseline": over(gain), "over_before": over(0.29), "baselines": {BAD: rule},
        "metrics": {"ndcg@10": interval(0.3), "auc": interval(0.9)}, "baseline_metrics": {"ndcg@10": interval(0.2)},
        "kinds": {"repeat": part, "explore": {"examples": 0}},
        "slices": {"history": {"under 50 lines": part}, "items": {"promoted": part}},
        "calibration": {
            "method": "platt", "calibration_error": 0.02, "raw_calibration_error": 0.8, "brier": 0.1,
            "reliability": {"predicted": [0.1, 0.3], "observed": [0.0, 0.35], "count": [50, 50]},
        },
    } | more  # fmt: skip


def phase(**more: Any) -> dict[str, Any]:
    return {
        "steps": 20, "steps_most": 20, "best_step": 10, "loss_first": 3.0, "loss_last": 2.0,
        "curve": [3 - k / 20 for k in range(20)], "validation_curve": [[5, 2.9], [10, 2.5], [20, 2.6]], "seconds": 1.5,
    } | more  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    classes = [{"name": "牛奶 <b>", "support": 3, "precision": 0.5, "recall": 1.0, "f1": 0.67}]
    means = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    asked = {"examples": 50, "after": interval(0.3), "before": interval(0.1), "BM25": interval(0.2)}
    asked |= {"over_before": over(0.2), "over_BM25": over(0.1)}
    worse = score(-0.1, level="category", report={
        "examples": 200, "accuracy": 0.1, "top_3_accuracy": 0.2, "cross_entropy": None, "macro": means, "weighted": means,
        "classes": classes,
    })  # fmt: skip
    return {
        "title": BAD, "profile": "small",
        "evaluate": {
            "submodels": {"search": score(0.1, queries={"misspelt": asked}), "intent": worse, "even": score(0.001)},
            "fusion": {
                "method": "weighted", "sources": ["search", "even"], "examples": 100, "best_single": "search",
                "methods": {"weighted": {"validation": 0.4, "test": interval(0.35)}},
                "single": {"search": {"validation": 0.3, "test": interval(0.3)}}, "over_best_single": over(0.05),
            },
        },
        "finetune": {
            "method": "adalora", "seed": 7, "mlm": phase(), "vectors_moved": 0.5,
            "balance": {"search": {"factors": {"state": 0.5}, "before": 0.3, "after": 0.31}},
            "tower": phase(validation_before=3.5, validation_after=2.5, merge_error=1e-7, weights_moved=3.0, memory_mb=900,
                           ranks={"base_model.model.encoder.layer.0.attention.self.query.lora_E": 5,
                                  "base_model.model.encoder.layer.1.attention.self.query.lora_E": 3}),
            "joint": phase(validation_loss={"search": 4.0}),
        },
        "split": {"search": {"rows": 10, "parameters_own": 5, "parameters_shared": 900, "bytes_own": 20,
                             "bytes_shared": 3600000, "error": 0.0}},
        "quantise": {"search": {"fp32_latency_ms": 1.0, "form": {"precision": "int8", "bytes": 1000, "parity": 1e-3,
                                                                 "order": 0.95, "loss": 0.001, "latency_ms": 0.5}}},
        "data": {"report": [{"rule": "<script>", "table": "items", "lines": 5, "of": 10, "note": ""}],
                 "counts": {"users": 3, "train": {"events": 7}}},
    }  # fmt: skip


class Checker(HTMLParser):
    """Hold every element to be closed in its turn, and gather ids, links and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        assert "src" not in given
        assert not any(name.startswith("on") for name in given)
        if tag == "svg":
            assert given["role"] == "img"
            assert len(given["aria-label"] or "") > 10
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.used += re.findall(r"^#(.+)$", given.get("href") or "") + re.findall(r"url\(#(.+?)\)", str(attrs))
        assert (given.get("href") or "#").startswith("#")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: Path) -> tuple[str, Checker]:
    text = page.read_text(encoding="utf-8")
    found = Checker(text)
    assert len(found.ids) == len(set(found.ids)), "an id twice"
    assert set(found.used) <= set(found.ids)
    assert not found.tags & {"script", "link", "img", "iframe", "b\n"}
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    return text, found


def test_every_section_is_there_and_names_are_escaped(record: dict[str, Any], tmp_path: Path) -> None:
    text, found = read(report(record, tmp_path / "report.html"))
    words = " ".join(found.words)
    for told in ("What was reached", "Fusion", "Training", "Size and form", "Data", "Calibration", "F1",
                 "Ranks that AdaLoRA", "state 0.50", "Rules of cleaning", "misspelt", "牛奶 <b>", BAD):  # fmt: skip
        assert told in words, told
    assert text.count("<figure>") == text.count("<figcaption>") == 23
    assert "nan" not in words.lower().split()
    assert "None" not in words


def test_the_verdict_is_what_the_intervals_say(record: dict[str, Any]) -> None:
    said = record["evaluate"]
    words = html.unescape(verdict(said["submodels"], said["fusion"]))
    assert "Better than the strongest baseline, the 95 % interval of the difference above 0: search." in words
    assert "Not told apart from it, the interval holds 0: even." in words
    assert "Worse than it, the interval below 0: intent." in words
    assert "Better than before fine-tuning: all." in words
    assert "The fusion (weighted) is better than its best single source, search: +0.050 [+0.030, +0.070]." in words


def test_a_higher_baseline_that_validation_did_not_choose_is_told(record: dict[str, Any], tmp_path: Path) -> None:
    rules = record["evaluate"]["submodels"]["search"]["baselines"]
    rules["another"] = copy.deepcopy(rules[BAD]) | interval(0.4)
    del record["evaluate"]["submodels"]["even"], record["evaluate"]["submodels"]["intent"]
    _, found = read(report(record, tmp_path / "report.html"))
    assert any("on the test, another is higher (0.400)" in word for word in found.words)


def test_the_same_record_is_the_same_page(record: dict[str, Any], tmp_path: Path) -> None:
    del record["evaluate"]["submodels"]["even"], record["evaluate"]["submodels"]["intent"]
    first = report(record, tmp_path / "a.html").read_bytes()
    assert report(copy.deepcopy(record), tmp_path / "b.html").read_bytes() == first


def without(value: Any, what: Any) -> Any:
    """Put `what` in the place of every number and text of a record."""
    if isinstance(value, dict):
        return {key: without(item, what) for key, item in value.items()}
    if isinstance(value, list):
        return [without(item, what) if isinstance(item, dict | list) else item for item in value]
    return what


@pytest.mark.parametrize("kept", ["data", "finetune", "evaluate", "split", "quantise"])
def test_stages_may_be_missing(record: dict[str, Any], kept: str, tmp_path: Path) -> None:
    if kept == "evaluate":
        del record["evaluate"]["submodels"]["even"], record["evaluate"]["submodels"]["intent"]
    text, _ = read(report({kept: record[kept]}, tmp_path / "report.html"))
    assert 'class="lead"' in text


@pytest.mark.parametrize("what", [None, math.nan, math.inf])
def test_figures_may_be_missing(record: dict[str, Any], what: Any, tmp_path: Path) -> None:
    read(report(without(record, what) | {"title": "t"}, tmp_path / "report.html"))


def test_a_sub_model_may_have_next_to_nothing(tmp_path: Path) -> None:
    _, found = read(report({"evaluate": {"submodels": {"bare": {}}}}, tmp_path / "report.html"))
    assert any("Not judged, no interval is recorded: bare." in word for word in found.words)
    _, found = read(report({}, tmp_path / "empty.html"))
    assert "Nothing is recorded." in found.words


def test_numbers_are_written_with_a_true_minus_and_a_dash_for_none() -> None:
    assert number(-0.1234) == "\u22120.123"
    assert number(math.nan) == number(None) == number("x") == "\u2013"
    assert between({"value": 0.5, "low": None, "high": 0.6}) == "0.500"
    assert judge({"value": 1, "low": 0.1, "high": 2}) == "better"
    assert judge({"value": 0, "low": -0.1, "high": 0.1}) == "even"
    assert judge({"value": -1, "low": -2, "high": -0.1}) == "worse"
    assert judge(None) is None


def test_a_table_escapes_its_cells() -> None:
    assert "&lt;b&gt;" in table("<i>", ("a",), [["<b>"]])
    assert "<i>" not in table("<i>", ("a",), [["<b>"]])
    assert table("nothing", ("a",), []) == ""


def test_figures_take_the_pages_colours_and_leave_no_ids_behind() -> None:
    svg = plots.dots("x", "a label", [Row("$a$ 中文", "1", (Mark("model", 1.0, 0.5, 2.0),))], axis="unit", zero=True)
    assert "var(--model)" in svg
    assert "$a$ 中文" in svg
    assert not re.search(r"#[0-9a-f]{6}|http|font-family", svg)
    assert plots.dots("x", "nothing", [Row("a", "", (Mark("model", None),))], axis="unit") == ""
    assert plots.curves("x", "nothing", [Series("a", "model", [])], axis="loss") == ""
    assert plots.reliability("x", "nothing", [None], [0.5], [3]) == ""


def test_wilson_has_the_known_values() -> None:
    # 8 of 10, as in Newcombe (Statistics in Medicine 1998) and any table of this interval
    assert plots.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert plots.wilson(0.0, 20)[0] == 0.0


def test_an_empty_comparison_is_a_page_too(tmp_path: Path) -> None:
    read(comparison({}, tmp_path / "compare.html"))


# --- what a release adds ---------------------------------------------------------------------------------------------

CARD = "---\nlicense: mit\n---\n\n# A card <b>\n\n## Limits\n\n| a | b |\n| --- | --- |\n| `x` | <script> |\n"
PRICES = {
    "by_target": {"gpu": {"USD": ["10.5", "20.25", "4000"]}, "cpu": {"USD": ["1", "2", "3"]}},
    "totals": {"USD": ["11.5", "22.25", "4003"]}, "by_environment": {"prod": {"USD": ["11.5", "22.25", "4003"]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def released() -> Release:
    version = load_fleet(ROOT / "fleet.toml").env["prod"].release
    return read_release(ROOT / "releases" / f"{version}.json", load_keys(ROOT / "releases" / "keys"))


def test_the_page_of_a_release_has_forms_targets_cost_lineage_gates_and_card(
    record: dict[str, Any], released: Release, tmp_path: Path
) -> None:
    gate = Gated(of="search", gate="loss", figure=0.5, bound=0.01, passed=False)
    found = released.model_copy(update={"gates": (gate,)})
    text, read_back = read(report(record, tmp_path / "page.html", found, None, PRICES, CARD))
    words = " ".join(read_back.words)
    for told in ("Forms", "Targets", "Cost a month by target", "4,000.00", "22.25", "Lineage and gates", "missed",
                 found.source.code_sha256, "Model card", "A card <b>", "greengrass-model", "search, for gpu"):  # fmt: skip
        assert told in words, told
    served = found.submodels["recommend"].formats[-1]
    assert f"{served.bytes / 1e6:.1f} MB, {served.latency_ms:.2f} ms, {served.order:.1%} same" in words
    assert "Since the previous release" not in words
    assert "<h4>Limits</h4>" in text
    assert report(record, tmp_path / "again.html", found, None, PRICES, CARD).read_text() == text


def test_the_page_tells_what_changed_since_another_release(released: Release, tmp_path: Path) -> None:
    search = released.submodels["search"]
    better = search.score.model_copy(update={"after": search.score.after.model_copy(update={"value": 0.9})})
    changed = {
        "version": "0.1.0-g000000000000",
        "submodels": {name: sub for name, sub in released.submodels.items() if name != "intent"}
        | {"search": search.model_copy(update={"score": better})},
        "source": released.source.model_copy(update={"data_sha256": "0" * 64}),
        "artifacts": released.artifacts[1:],
    }
    _, found = read(report({}, tmp_path / "page.html", released.model_copy(update=changed), released))
    words = " ".join(found.words)
    assert f"Against {released.version}, profile {released.profile}. It had intent, which this one has not." in words
    assert "Their data differ" in words
    assert f"+{0.9 - search.score.after.value:.3f}" in words
    assert "removed" in words
    assert "data_sha256" in words


def test_a_release_without_papers_has_a_page_of_its_own_figures(released: Release, tmp_path: Path) -> None:
    _, found = read(report({}, tmp_path / "page.html", released))
    words = " ".join(found.words)
    search = released.submodels["search"].score
    assert between(search.after.model_dump()) in words
    assert search.baseline_name in words
    assert "What was reached" in words
