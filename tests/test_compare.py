"""Comparing ways to tune: the same questions for all, one stage a way, a table that says what the records say."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from models.behaviour import VALIDATION, Behaviour, Market, Searches
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard import compare
from shipyard.pages.comparison import COMPARED, comparison_lines, comparison_note, comparison_words, print_comparison
from shipyard.stage import Record, Stage
from shipyard.train import peak_memory_mb

FLEET = load_fleet(ROOT / "fleet.toml")
PROFILE = FLEET.profile["small"].model_copy(update={"mlm_steps": 0})


def behaviour(items: int = 40, users: int = 30) -> Behaviour:
    """Return shoppers who each buy two products of a path in each of two baskets, the second in validation."""
    rng = np.random.default_rng(0)
    paths = np.arange(items) % 4
    rows = np.concatenate(
        [1 + rng.choice(np.flatnonzero(paths == user % 4), 4, replace=False) for user in range(users)]
    )
    none: Any = np.zeros(0, np.int64)
    logged = [field.name for field in dataclasses.fields(Searches) if field.name != "text"]
    return Behaviour(
        list(range(items)), [f"text of {k}" for k in range(items)], np.arange(items),
        ["frozen pizza", "ground beef", "soft drinks", "xyz"], np.r_[-1, paths], ["food"], np.r_[-1, paths * 0],
        np.ones(items + 1, bool), np.repeat(np.arange(users), 4), rows, np.tile([0.0, 0.0, 1.0, 1.0], users),
        np.ones(4 * users, bool), none, np.arange(0, 4 * users + 1, 2), np.repeat(np.arange(users) * 4, 2),
        np.tile([0, VALIDATION], users), Market(()), Searches([], **dict.fromkeys(logged, none)),
    )  # fmt: skip


def test_questions_are_fixed_and_their_answers_are_among_the_texts() -> None:
    found, again = compare.ask(behaviour(), 32, 7), compare.ask(behaviour(), 32, 7)
    assert found.texts == again.texts
    assert found.asked == again.asked
    assert len(found.texts) == 32
    assert len(found.owners) == 30
    for user, right in enumerate(found.right):
        named = {int(found.texts[k - 1].split()[-1]) % 4 for k in right if k}
        assert named == {user % 4}, "right is of the path that is asked for"
    assert len(compare.ask(behaviour(), None, 7).texts) == 40
    fewer = compare.ask(behaviour(), 1, 7)
    assert len(fewer.texts) == len(np.unique([fewer.texts[k - 1] for k in fewer.right.ravel() if k]))


def test_searches_of_a_log_are_asked_where_there_is_one() -> None:
    none = np.zeros(0, np.int64)
    log = dict.fromkeys([field.name for field in dataclasses.fields(Searches)], none)
    # two products that answer, one of them half, and one that does not
    log |= {"text": ["pizza"], "period": np.array([VALIDATION]), "query": np.zeros(3, int), "row": np.array([5, 9, 11])}
    log |= {"gain": np.array([0.5, 1.0, 0.0], np.float32)}
    found = compare.ask(dataclasses.replace(behaviour(), searches=Searches(**log)), 20, 7)
    assert found.asked["as written"] == ["pizza"]
    answers = {found.texts[k - 1]: float(gain) for k, gain in zip(found.right[0], found.gains[0], strict=True)}
    assert answers == {"text of 4": 0.5, "text of 8": 1.0}
    assert len(found.texts) == 20


def test_retrieval_is_judged_where_the_writing_changed_something(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = compare.ask(behaviour(), None, 7)
    right = {q: questions.right[k] for k, q in enumerate(questions.asked["as written"])}
    paths = sorted(right)

    def encode(tower: Any, tokenizer: Any, texts: Sequence[str], progress: Any, what: str) -> torch.Tensor:
        """Give a path and the texts of its products the same vector, other words none."""
        place = [int(t.split()[-1]) % 4 if t.startswith("text of") else paths_of.get(t, 4) for t in texts]
        return torch.eye(5)[place][:, :4]

    paths_of = {path: behaviour().paths.index(path) for path in paths}
    monkeypatch.setattr(compare, "encode", encode)
    record, values = compare.retrieve(None, None, questions, lambda *_: None)  # type: ignore[arg-type]
    assert record["as written"]["examples"] == 30
    # nothing of "xyz" is misspelt, and only "frozen pizza", "ground beef" and "soft drinks" have other words
    assert record["misspelt"]["examples"] == record["paraphrased"]["examples"] == 23
    written, misspelt = record["as written"], record["misspelt"]
    assert written["ndcg@10"]["value"] > misspelt["ndcg@10"]["value"]
    assert len(values["ndcg@10"]["misspelt"]) == len(values["which"]["misspelt"]) == 23
    assert np.mean(values["mrr"]["misspelt"]) == pytest.approx(misspelt["mrr"]["value"], abs=1e-4)


def said(value: float, **tower: Any) -> dict[str, Any]:
    figures = {"value": value, "low": value - 0.1, "high": value + 0.1}
    part = {"examples": 4, "ndcg@10": figures, "mrr": figures}
    return {
        "tower": tower, "retrieval": {"as written": part, "misspelt": part}, "queries": 4, "logged": False,
        "texts": 9, "texts_of": 20, "merged_bytes": 90_000_000,
        "adapter_bytes": 4 * tower["parameters_trained"] if tower else None,
    }  # fmt: skip


GAINS = {"lora": 0.3, "adalora": 0.1, "full": 0.2}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a stage write what a process of its own would have; name those that worked."""
    names: list[str] = []

    def apart(job: compare.Job, progress: Any) -> dict[str, Any]:
        name = "start" if job.start is None else job.config.method
        names.append(name)
        gain = GAINS.get(name, 0.0)
        each = {kind: [0.2 + gain] * 3 + [0.4 + gain] for kind in ("as written", "misspelt")}
        values = {"owners": [1, 2, 3, 4], "which": {kind: [0, 1, 2, 3] for kind in each}, "ndcg@10": each, "mrr": each}
        (job.out / compare.VALUES).write_text(json.dumps(values))
        return said(0.25 + gain, **({} if job.start is None else {
            "validation_before": 3.0, "validation_after": 2.0, "parameters_trained": 1000, "seconds": 12.0,
            "memory_mb": 1500, "resumed": name == "full", "steps": 4, "curve": [3.0, 2.0], "best_step": 4,
            "validation_curve": [[2, 2.5], [4, 2.0]],
        }))  # fmt: skip

    monkeypatch.setattr(compare, "_apart", apart)
    return names


def run(build: Path, *methods: str, **changed: Any) -> tuple[Path, dict[str, Any]]:
    def watch(stage: Stage, folder: Path) -> Record:
        return stage.run(folder)

    data = Record(build / "data", "0" * 64, {}, True)
    profile = PROFILE.model_copy(update=changed)
    return compare.compare(
        FLEET.finetune, profile, "small", data, build, "1" * 64, methods, build, watch, lambda *_: None
    )


def test_each_way_is_a_stage_that_is_made_once(made: list[str], tmp_path: Path) -> None:
    page, record = run(tmp_path, "lora", "adalora", "full")
    assert made == ["start", "lora", "adalora", "full"]
    assert page == tmp_path / "compare" / "compare.html"
    assert json.loads((tmp_path / "compare" / "compare.json").read_text(encoding="utf-8")) == record
    assert record["best"] == "lora"
    assert record["over_others"]["adalora"]["value"] == pytest.approx(0.2)
    assert record["methods"]["full"]["retrieval"]["misspelt"]["over_start"]["value"] == pytest.approx(0.2)
    again = run(tmp_path, "lora", "adalora", "full")[1]
    assert again == record
    assert len(made) == 4, "nothing is made twice"
    run(tmp_path, "lora", "full", tower_steps=5)
    assert made[4:] == ["lora", "full"], "the start does not depend on the steps of the tower"


def test_the_table_says_what_the_records_say(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, record = run(tmp_path, "lora", "full")
    lines = comparison_lines(record)
    assert [len(line) for line in lines] == [len(COMPARED)] * 3
    assert dict(zip(COMPARED, lines[1], strict=True)) == {
        "method": "lora", "validation loss": "3.000 → 2.000", "nDCG@10 [95 %]": "0.550 [0.450, 0.650]", "MRR": "0.550",
        "misspelt": "0.550", "paraphrased": "\u2013", "parameters": "1\u202f000", "adapter": "4.0 kB", "merged": "90.0 MB",
        "seconds": "12", "peak MB": "1\u202f500",
    }  # fmt: skip
    assert lines[0][:2] == ["none", "\u2013"]
    assert lines[2][9] == "12*"
    assert "lora, the highest, is better than full: +0.100 [+0.100, +0.100]." in comparison_words(record)
    assert "a fixed sample of 9 of 20 texts" in comparison_note(record)
    assert "* went on after a stop" in comparison_note(record)
    print_comparison(record)
    told = capsys.readouterr().out
    assert "3.000 → 2.000" in told
    assert "lora is better than the tower that it starts from" in told
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 6
    assert "http" not in text


@pytest.mark.parametrize("methods", [(), ("lora", "lora"), ("lora", "qlora")])
def test_methods_that_cannot_be_compared_are_an_error(methods: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ShipyardError, match="allowed: full, lora, adalora"):
        run(tmp_path, *methods)


def test_a_fault_of_the_other_process_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = compare.Job(tmp_path / "none", tmp_path, None, FLEET.finetune, PROFILE, tmp_path)
    with pytest.raises(ShipyardError, match="ended early"):
        compare._apart(job, lambda *_: None)
    assert "FileNotFoundError" in capfd.readouterr().err


def test_the_peak_of_memory_is_this_programs_own() -> None:
    before = peak_memory_mb()
    held = np.ones(64 << 17)  # 64 MB
    assert peak_memory_mb() >= before > 10
    del held
