"""Fine-tuning: every method moves the tower, training stops and goes on as it says, queries are written as by shoppers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Made
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import trunk
from models.behaviour import PERIODS, load_behaviour, pack_market
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard import tower as tower_module
from shipyard import train
from shipyard.data import data
from shipyard.finetune import finetune
from shipyard.pretrained import base_folder
from shipyard.queries import PARAPHRASES, blur, misspell, mistype, paraphrase
from shipyard.stage import closure
from shipyard.tower import encode, pretrain, train_tower
from shipyard.train import Training, by_rate, rate

FLEET = load_fleet(ROOT / "fleet.toml")


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def behaviour(small: Made):
    return load_behaviour(small.folder("joint", "data"))


def test_one_category_is_told_before_the_training(tmp_path: Path) -> None:
    # none of the items has a category, as docs/data.md allows
    days = [*(f"2017-{month:02}-{day:02}" for month in range(1, 11) for day in (1, 9)), "2017-11-10", "2017-12-01"]
    (tmp_path / "events.csv").write_text("user,item,time,kind\n" + "".join(f"a,1,{day},purchase\n" for day in days))
    (tmp_path / "items.csv").write_text("item,title,category\n1,milk,\n2,bread,\n")
    data(FLEET.data.model_copy(update={"source": "files", "folder": "own"}), 0, tmp_path, tmp_path)
    for period in PERIODS:
        pack_market(tmp_path, period)
    weights = {"search": 1.0, "recommend": 1.0, "intent": 1.0}
    with pytest.raises(ShipyardError, match=r"nothing to choose from for intent; .*mend: give the items categories"):
        finetune(tmp_path, tmp_path, FLEET.finetune, FLEET.profile["small"], weights, tmp_path, quiet)


# --- the tower -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "adalora"])
def test_every_method_trains_the_tower(behaviour, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_module, "HELD_PAIRS", 24)  # validation would take longer than the training
    config = FLEET.finetune.model_copy(update={"method": method, "rank": 4})
    # the allocator of AdaLoRA begins to prune after a while
    steps = 24 if method == "adalora" else 10
    profile = FLEET.profile["small"].model_copy(update={"tower_steps": steps, "tower_batch": 8})
    tower, tokenizer = trunk.load_tower(base_folder(FLEET))
    texts = behaviour.texts[:16]
    before = encode(tower, tokenizer, texts, quiet, "")
    kept = {name: p.detach().clone() for name, p in tower.state_dict().items()}
    said = train_tower(tower, tokenizer, behaviour, config, profile, tmp_path, quiet)
    after = encode(tower, tokenizer, texts, quiet, "")
    assert said["weights_moved"] > 0
    assert said["steps"] == said["steps_most"] == steps
    assert said["validation_after"] < said["validation_before"]
    assert (after - before).norm(dim=1).min() > 1e-4
    assert set(tower.state_dict()) == set(kept), "an adapter must be merged away"
    moved = {name for name, p in tower.state_dict().items() if not torch.equal(p, kept[name])}
    assert any("query.weight" in name for name in moved)
    assert any("word_embeddings" in name for name in moved) == (method == "full")
    assert not any(p.requires_grad for p in tower.parameters())
    if method == "adalora":
        ranks = said["ranks"]
        assert len(ranks) == 36
        assert max(ranks.values()) <= 8
        assert sum(ranks.values()) < 36 * 8, "the allocator must have pruned"
    else:
        assert said["parameters_trained"] > 100_000


def test_pretraining_learns_hidden_words_with_all_of_the_tower(
    behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_module, "HELD_PAIRS", 64)
    profile = FLEET.profile["small"].model_copy(update={"mlm_steps": 3, "tower_batch": 8})
    tower, tokenizer = trunk.load_tower(base_folder(FLEET))
    kept = {name: p.detach().clone() for name, p in tower.state_dict().items()}
    said = pretrain(tower, tokenizer, behaviour, FLEET.finetune, profile, tmp_path, quiet)
    assert said["steps"] == 3
    assert said["validation_curve"][-1][1] < said["validation_curve"][0][1]
    moved = {name for name, p in tower.state_dict().items() if not torch.equal(p, kept[name])}
    assert any("word_embeddings" in name for name in moved) and any("query.weight" in name for name in moved)
    tokenizer.mask_token = None
    with pytest.raises(ShipyardError, match="no mask token"):
        pretrain(tower, tokenizer, behaviour, FLEET.finetune, profile, tmp_path, quiet)


# --- the training loop -----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def a_module() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))


def training(module: nn.Module, *, stop: int | None = None, values: list[float] | None = None, **changes) -> Training:
    """A training of some steps; it breaks off at `stop`; `values` are what validation says, one after the other."""
    told = iter(values or ())

    def loss(step: int) -> torch.Tensor:
        if step == stop:
            raise Interrupted
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 6))).float()
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    def validate() -> float:
        assert not module.training and torch.is_inference_mode_enabled()
        torch.rand(3)  # what validation draws must not matter
        if values is not None:
            return next(told)
        x = torch.from_numpy(np.random.default_rng(99).normal(size=(32, 6))).float()
        return float((module(x) - x.sum(1, keepdim=True)).square().mean())

    settings = {"steps": 30, "every": 4, "groups": [{"params": list(module.parameters()), "lr": 1e-2}]} | changes
    return Training("t", module, loss_of=loss, validate=validate, **settings)


@pytest.mark.parametrize("stop", [1, 17, 29])
@pytest.mark.parametrize("keep_best", [True, False])
def test_restart_ends_where_an_unbroken_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, keep_best: bool
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    module = a_module()
    expected = training(module, keep_best=keep_best).run(whole, quiet)
    with pytest.raises(Interrupted):
        training(a_module(), stop=stop, keep_best=keep_best).run(broken, quiet)
    assert (broken / "t.checkpoint.pt").exists()
    torch.rand(stop)  # another state of chance than the unbroken run's
    resumed = a_module()
    with torch.no_grad():
        resumed[0].weight.zero_()  # what it starts from must not matter
    found = training(resumed, keep_best=keep_best).run(broken, quiet)
    for name, value in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert {key: value for key, value in found.items() if key != "seconds"} == {
        key: value for key, value in expected.items() if key != "seconds"
    }


def test_a_restart_remembers_what_was_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    values, weights = [5.0, 1.0, 2.0, 3.0, 4.0], []
    with pytest.raises(Interrupted):
        training(
            module := a_module(), stop=13, values=values[:3],
            after=lambda step: weights.append(module[0].weight.detach().clone()),
        ).run(tmp_path, quiet)  # fmt: skip
    said = training(resumed := a_module(), values=values[3:]).run(tmp_path, quiet)
    assert (said["best_step"], said["steps"]) == (8, 20)
    assert torch.equal(resumed[0].weight, weights[7])


def test_a_phase_that_cannot_go_on_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    training(a_module(), resumable=False).run(tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "steps", "best"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.4, 0.3], 30, 30),
        ([1, 2, 3, 4], 16, 4),
        ([3, 4, 4, 2, 3, 3, 3], 28, 16),
        ([2, 2, 2, 2], 16, 4),
        ([4, 5, 5, 3, 4, 4, 2, 3], 30, 28),
    ],
    ids=["ever better", "never better", "better in time", "never better than equal", "better at the last moment"],
)
def test_training_stops_early_and_keeps_the_best(tmp_path: Path, values: list[float], steps: int, best: int) -> None:
    module, weights = a_module(), []
    said = training(module, values=values, after=lambda step: weights.append(module[0].weight.detach().clone())).run(
        tmp_path, quiet
    )
    assert (said["steps"], said["best_step"], said["steps_most"]) == (steps, best, 30)
    assert len(weights) == steps
    assert torch.equal(module[0].weight, weights[best - 1])
    assert [step for step, _ in said["validation_curve"]] == [*range(4, steps + 1, 4)] + [30] * (steps == 30)
    assert [value for _, value in said["validation_curve"]] == values
    assert not module.training
    training(module, steps=1).run(tmp_path, quiet)  # what was kept can be trained on


def test_without_keep_best_it_ends_with_the_last_weights(tmp_path: Path) -> None:
    module, weights = a_module(), []
    said = training(
        module, values=[1.0, 2, 3, 4, 5, 6, 7, 8], keep_best=False,
        after=lambda step: weights.append(module[0].weight.detach().clone()),
    ).run(tmp_path, quiet)  # fmt: skip
    assert said["steps"] == 30
    assert torch.equal(module[0].weight, weights[-1])


def test_a_training_of_one_step_is_told(tmp_path: Path) -> None:
    said = training(a_module(), steps=1).run(tmp_path, quiet)
    assert (said["steps"], said["best_step"], len(said["curve"])) == (1, 1, 1)
    assert said["loss_first"] == said["loss_last"]


def test_diverged_training_is_an_error(tmp_path: Path) -> None:
    module = a_module()
    with torch.no_grad():
        module[2].bias.fill_(torch.nan)
    with pytest.raises(ShipyardError, match="finetune: t: loss is nan at step 0"):
        training(module).run(tmp_path, quiet)
    with pytest.raises(ShipyardError, match="finetune: t: loss is inf at step 4"):
        training(a_module(), values=[float("inf")]).run(tmp_path, quiet)


def test_rates_rise_for_a_tenth_and_fall_to_0() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert [rate(step, 1) for step in range(1)] == [1]


def test_parameters_are_grouped_by_a_whole_part_of_their_name() -> None:
    module = nn.ModuleDict({"scale": nn.Linear(2, 2, bias=False), "rescale": nn.Linear(3, 3, bias=False)})
    groups = by_rate(module, {"scale": 0.5, "cale": 7.0}, 0.1)
    assert {g["lr"]: [p.shape[0] for p in g["params"]] for g in groups} == {0.5: [2], 0.1: [3]}


# --- queries ---------------------------------------------------------------------------------------------------------

words = st.text(alphabet="abcdefgh éß牛", min_size=0, max_size=40)
draws = st.integers(0, 2**32 - 1)


def distance(one: str, other: str) -> int:
    """Edits that make one text of the other, an exchange of neighbours counted as one (optimal string alignment)."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            same = one[i - 1] == other[j - 1]
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (not same))
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


@given(st.text(alphabet="abcdefgh牛", min_size=2, max_size=12), draws)
@settings(deadline=None)
def test_a_mistyped_word_is_one_mistake_away_and_keeps_its_first_letter(word: str, seed: int) -> None:
    typed = mistype(word, np.random.default_rng(seed))
    assert distance(word, typed) <= 1
    assert typed[0] == word[0]


@given(words, draws)
@settings(deadline=None)
def test_a_misspelt_query_has_one_mistake_in_every_longer_word_alone(query: str, seed: int) -> None:
    typed = misspell(query, np.random.default_rng(seed)).split(" ")
    assert len(typed) == max(1, len(query.split()))
    for word, other in zip(query.split(), typed, strict=False):
        assert distance(word, other) <= (1 if len(word) > 3 else 0)


def test_most_misspelt_queries_differ_and_all_kinds_of_mistakes_are_made() -> None:
    rng = np.random.default_rng(0)
    typed = [misspell("potato", rng) for _ in range(300)]
    assert sum(word != "potato" for word in typed) > 270
    assert {len(word) for word in typed} == {5, 6, 7}
    assert {"poatto", "ptoato"} & set(typed)


def test_blur_writes_queries_as_shoppers_do() -> None:
    rng = np.random.default_rng(0)
    blurred = [blur("frozen pizza premium", rng) for _ in range(200)]
    assert all(1 <= len(text.split()) <= 3 for text in blurred)
    assert len(set(blurred)) > 5
    assert blur("", rng) == ""


def test_paraphrases_are_other_words() -> None:
    assert paraphrase("frozen pizza") == "freezer pizza"
    assert paraphrase("soft drinks") == "soda pop"
    assert paraphrase("frozenpizza icecream 牛奶") == "frozenpizza icecream 牛奶"
    assert paraphrase("ice cream milk") == "gelato milk"
    for label, other in PARAPHRASES.items():
        assert paraphrase(label) == other != label


def test_training_never_sees_a_paraphrase() -> None:
    """Blurring only leaves words out and mistypes them; nothing that trains knows the other words."""
    for label, other in PARAPHRASES.items():
        rng = np.random.default_rng(len(label))
        new = set(other.split()) - set(label.split())
        seen = {word for _ in range(60) for word in blur(label, rng).split()}
        assert not {word for word in new & seen if len(word) > 3 and min(distance(word, w) for w in label.split()) > 1}
        assert all(min(distance(word, w) for w in label.split()) <= 1 for word in seen)
    sources, _ = closure(("shipyard.finetune",))
    assert {"shipyard.queries", "shipyard.tower", "shipyard.joint"} <= sources.keys()
    knows = {name for name, path in sources.items() if re.search(r"paraphrase|PARAPHRASES", path.read_text("utf-8"))}
    assert knows == {"shipyard.queries"}


def test_tiny_profile_of_the_tests_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text((ROOT / "fleet.toml").read_text() + TINY)
    assert load_fleet(path).profile["tiny"].households == 60
