"""The joint model: its losses against plain ones, what a step draws, and that each part is its own."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from models import search, submodel, trunk
from models.behaviour import LEVELS, TRAIN, VALIDATION
from models.config import Finetune
from serve.errors import ShipyardError
from serve.history import FEATURES
from shipyard import finetune, joint, metrics
from shipyard.balance import balance
from shipyard.examples import Cut
from shipyard.joint import Batches, Columns, Trainer, Vectors, among_history, build_joint, listwise, request
from tests.test_behaviour import PATHS, write

NAMES = ("search", "recommend", "recommend_types", "intent", "edge_recommend")
CONFIG = Finetune(method="lora", dimension=16)
WIDTH = 24


def quiet(*_):
    pass


def vectors_of(behaviour, width=WIDTH):
    """Vectors of no tower, in which equal texts are equal."""
    rng = np.random.default_rng(4)

    def unit(*shape):
        return nn.functional.normalize(torch.from_numpy(rng.normal(size=(*shape, width))).float(), dim=-1)

    texts = {"product": behaviour.texts, "type": behaviour.paths, "category": behaviour.categories}
    return Vectors(
        {level: unit(len(texts[level])) for level in LEVELS}, unit(len(behaviour.paths), 3),
        unit(len(behaviour.searches.text)),
    )  # fmt: skip


def disturb(module, seed=0):
    """Give every parameter some value: much starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)  # of a trained model it makes the softmax too sharp to tell anything here
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def without_log(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shop"), searches=[])


def model(behaviour, names=NAMES):
    return disturb(build_joint(behaviour, vectors_of(behaviour), CONFIG, names)).eval()


# --- losses ----------------------------------------------------------------------------------------------------------

RELEVANT = torch.tensor([[3, 5, 0], [1, 0, 0], [0, 0, 0], [11, 2, 7]])
GAINS = torch.tensor([[1.0, 0.1, 9], [0.5, 9, 9], [9, 9, 9], [0.25, 1, 0.0]], dtype=torch.double)


@pytest.mark.parametrize("gains", [None, GAINS], ids=["equal", "graded"])
def test_listwise_has_its_gradient(gains):
    torch.manual_seed(0)
    logits = torch.randn(4, 12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: 3 * listwise(x, RELEVANT, gains), logits)
    worth = torch.ones(4, 3) if gains is None else gains
    plain = []
    for i, row in enumerate(RELEVANT):
        if (row > 0).any():
            given = worth[i][row > 0]
            plain.append(-(logits[i].log_softmax(0)[row[row > 0]] * given).sum() / given.sum())
    torch.testing.assert_close(listwise(logits, RELEVANT, gains), torch.stack(plain).mean())


def test_listwise_of_nothing_right_is_0_and_pulls_nowhere():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = listwise(logits, torch.zeros(3, 2, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_among_history_is_a_softmax_over_what_was_bought_before():
    torch.manual_seed(1)
    logits = torch.randn(4, 9, dtype=torch.double, requires_grad=True)
    items = torch.tensor([[2, 5, 7], [3, 0, 0], [0, 0, 0], [8, 1, 0]])
    right = torch.tensor([[5, 2, 4], [3, 0, 0], [1, 2, 0], [2, 0, 0]])
    # the third has no past, the fourth bought nothing of its past
    first = logits[0, [2, 5, 7]].log_softmax(0)[:2].mean()
    torch.testing.assert_close(among_history(logits, items, right), -(first + 0) / 2)
    assert torch.autograd.gradcheck(lambda x: among_history(x, items, right), logits)
    assert among_history(logits, torch.zeros_like(items), right) == 0


# --- columns ---------------------------------------------------------------------------------------------------------


def test_sampled_columns_estimate_the_whole_softmax():
    """Average the weighted sum of exponentials over many draws: it must come to the whole level's."""
    size, named = 400, (np.array([0, 3, 400, 3]), np.array([17, 0]))
    values = np.exp(np.random.default_rng(1).normal(size=size + 1))
    sums = []
    for seed in range(400):
        columns = Columns.draw(named, size, 40, np.random.default_rng(seed))
        assert len(np.unique(columns.rows)) == len(columns.rows) == 43
        assert columns.rows.min() >= 1
        assert set(columns.rows[columns.log_weight == 0].tolist()) == {3, 17, 400}
        sums.append((values[columns.rows] * np.exp(columns.log_weight)).sum())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - values[1:].sum()) < 4 * error


@pytest.mark.parametrize("sampled", [7, 8, 1000])
def test_when_all_are_sampled_each_stands_for_itself(sampled):
    columns = Columns.draw([np.array([2])], 8, sampled, np.random.default_rng(0))
    assert sorted(columns.rows.tolist()) == list(range(1, 9))
    assert not columns.log_weight.any()


def test_when_all_are_named_none_is_sampled():
    columns = Columns.draw([np.arange(6)], 5, 100, np.random.default_rng(0))
    assert columns.rows.tolist() == [1, 2, 3, 4, 5]
    assert not columns.log_weight.any()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_sub_models_of_the_same_rows_share_one_view(without_log):
    batches = Batches(without_log, NAMES)
    chosen = without_log.baskets(TRAIN)
    views = batches.views(chosen, without_log.queries(chosen))
    assert views.keys() == set(NAMES)
    assert views["search"] is views["recommend"]
    assert len({id(view) for view in views.values()}) == 4
    assert views["recommend"].offers.any() and not views["recommend_types"].offers.any()


def test_search_learns_from_a_log_where_there_is_one(shop, without_log):
    assert Batches(shop, NAMES).logged == {"search"}
    assert Batches(without_log, NAMES).logged == set()
    chosen = shop.baskets(TRAIN)
    assert Batches(shop, NAMES).views(chosen, shop.queries(chosen)).keys() == {*NAMES} - {"search"}


def test_rows_of_a_part_are_its_own_even_with_the_last_item(shop):
    local = shop.local.copy()
    local[-1] = True
    batches = Batches(dataclasses.replace(shop, local=local), NAMES)
    own = batches.place["edge_recommend"]
    assert own[shop.items] == len(batches.rows["edge_recommend"]) == local.sum() < shop.items
    for name, level in batches.levels.items():
        place = batches.place[name]
        assert len(place) == shop.items + 1 and place[0] == 0
        assert sorted(set(place[place > 0].tolist())) == list(range(1, len(batches.rows[name]) + 1))
        np.testing.assert_array_equal(
            np.r_[0, batches.rows[name]][place], np.where(place > 0, shop.row_of(level), 0), err_msg=name
        )


# --- a step ----------------------------------------------------------------------------------------------------------


def draw(trainer, sampled, seed=2, most=10):
    behaviour = trainer.behaviour
    baskets, searches = behaviour.baskets(TRAIN)[:most], behaviour.searches.of(TRAIN)[:most]
    return trainer.draw(baskets, searches, sampled, np.random.default_rng(seed))


@pytest.mark.parametrize("log", [True, False], ids=["a log", "no log"])
def test_a_step_with_all_columns_has_the_losses_of_the_whole_model(shop, without_log, log):
    behaviour = shop if log else without_log
    trainer = Trainer(model(behaviour), behaviour, vectors_of(behaviour), dict.fromkeys(NAMES, 1.0))
    views, text, columns = batch = draw(trainer, 10_000)
    found = trainer.losses(batch)
    assert found.keys() == set(NAMES)
    logits = {}
    for name in NAMES:
        module, view = submodel.load(name), views[name]
        asked = request(view, text[name])
        logits[name] = trainer.joint(name, trainer.joint.baked(name), asked)
        right = torch.from_numpy(view.answer(module.ANSWER))
        gains = None if view.gains is None else torch.from_numpy(view.gains)
        expected = listwise(logits[name], right, gains) + among_history(logits[name], asked.items, right)
        if module.TEACHER is not None:
            rows = torch.from_numpy(trainer.batches.rows[name])
            target = logits[module.TEACHER][:, rows].softmax(1)
            own = logits[name][:, 1:].log_softmax(1)
            expected = expected + (target * (target.log() - own)).sum(1).mean()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        assert found[name].detach() > 0.01
    assert not any(found.log_weight.any() for found in columns.values())


def test_the_loss_of_a_part_of_the_columns_is_that_of_the_whole_on_average(shop):
    """The logarithm of an unbiased sum is a little low, so that this is no equality; without weights it is far off."""
    trainer = Trainer(model(shop), shop, vectors_of(shop), {"recommend": 1.0})
    with torch.inference_mode():
        whole = float(trainer.losses(draw(trainer, 10_000, most=1))["recommend"])
        drawn = [float(trainer.losses(draw(trainer, 2, seed, most=1))["recommend"]) for seed in range(40)]
        bare = []
        for seed in range(40):
            views, text, columns = draw(trainer, 2, seed, most=1)
            columns = {level: Columns(c.rows, np.zeros_like(c.log_weight)) for level, c in columns.items()}
            bare.append(float(trainer.losses((views, text, columns))["recommend"]))
    assert abs(np.mean(drawn) - whole) < 0.35 * abs(np.mean(bare) - whole)


@pytest.mark.parametrize("log", [True, False], ids=["a log", "no log"])
def test_a_step_reaches_every_parameter(shop, without_log, log):
    behaviour = shop if log else without_log
    trainer = Trainer(model(behaviour).train(), behaviour, vectors_of(behaviour), dict.fromkeys(NAMES, 1.0))
    sum(trainer.losses(draw(trainer, 10_000)).values()).backward()
    still = {name for name, p in trainer.joint.named_parameters() if p.grad is None or not p.grad.any()}
    # a log names no place, so that nothing is promoted
    assert {name.rsplit(".", 2)[0] for name in still} == ({"heads.search.offers"} if log else set())


def test_what_a_step_draws_depends_on_its_seed_alone(shop):
    trainer = Trainer(model(shop), shop, vectors_of(shop), dict.fromkeys(NAMES, 1.0))
    one, again, other = (draw(trainer, 2, seed, most=1) for seed in (2, 2, 5))
    for level in LEVELS:
        np.testing.assert_array_equal(one[2][level].rows, again[2][level].rows)
    assert one[2]["product"].rows.tolist() != other[2]["product"].rows.tolist()
    assert all(torch.equal(one[1][name], again[1][name]) for name in NAMES)
    drawn = {draw(trainer, 2, seed, most=2)[1]["recommend"].numpy().tobytes() for seed in range(12)}
    assert len(drawn) >= 4, "queries are written in several ways"


def test_offers_without_a_column_are_left_out():
    offers = np.array([[0, 4, 0, 2], [0, 0, 0, 0], [1, 0, 0, 0]])
    strengths = np.arange(36, dtype=np.float32).reshape(3, 4, 3)
    kept, told = joint._fewer(offers, strengths)
    assert kept.tolist() == [[4, 2], [0, 0], [1, 0]]
    np.testing.assert_array_equal(told[0], strengths[0, [1, 3]])
    np.testing.assert_array_equal(told[2, 0], strengths[2, 0])
    assert joint._fewer(np.zeros((2, 5), np.int64), np.zeros((2, 5, 3), np.float32))[0].shape == (2, 1)


def test_biases_start_from_popularity(shop):
    trainer = Trainer(model(shop), shop, vectors_of(shop), dict.fromkeys(NAMES, 1.0))
    trainer.prepare(shop.baskets(TRAIN), shop.searches.of(TRAIN))
    biases = {name: trainer.joint.bias[name].exp() - 0.5 for name in NAMES}
    for name in ("search", "recommend"):
        torch.testing.assert_close(biases[name], torch.tensor([2.0, 0, 1, 0, 0, 0, 1]))
    torch.testing.assert_close(biases["recommend_types"], torch.tensor([2.0, 1, 0, 1]))
    torch.testing.assert_close(biases["intent"], torch.tensor([3.0, 1]))
    torch.testing.assert_close(biases["edge_recommend"], torch.tensor([2.0, 0, 0, 0]))


def test_a_teacher_ranks_what_its_pupil_ranks(shop, monkeypatch):
    weights = dict.fromkeys(("intent", "edge_recommend"), 1.0)
    monkeypatch.setattr(submodel.load("edge_recommend"), "TEACHER", "intent")
    with pytest.raises(ShipyardError, match="ranks rows that its teacher does not"):
        Trainer(model(shop, tuple(weights)), shop, vectors_of(shop), weights)


def test_teachers_come_first_and_have_none_themselves(monkeypatch):
    assert list(finetune._teachers_first(dict.fromkeys(("edge_recommend", "search", "recommend"), 1.0))) == [
        "search",
        "recommend",
        "edge_recommend",
    ]
    with pytest.raises(ShipyardError, match=r"mend: add \[submodel.recommend\]"):
        finetune._teachers_first({"edge_recommend": 1.0})
    monkeypatch.setattr(submodel.load("recommend"), "TEACHER", "search")
    with pytest.raises(ShipyardError, match="has no teacher itself"):
        finetune._teachers_first(dict.fromkeys(NAMES, 1.0))


# --- the untrained model, its terms and its parts --------------------------------------------------------------------


def test_the_untrained_model_ranks_by_the_pretrained_similarity(shop):
    vectors = vectors_of(shop, width=16)  # as wide as its own vectors, so that nothing is lost
    untrained = build_joint(shop, vectors, CONFIG, ("search",)).eval()
    empty = trunk.Request(
        torch.zeros(len(PATHS), 1, dtype=torch.long), torch.zeros(len(PATHS), 1, len(FEATURES)),
        torch.zeros(len(PATHS), 1, dtype=torch.long), torch.zeros(len(PATHS), 1, 3), vectors.queries[:, 0],
    )  # fmt: skip
    with torch.inference_mode():
        logits = untrained("search", untrained.baked("search"), empty)
    head = untrained.head("search")
    products = vectors.queries[:, 0] @ vectors.texts["product"].T[:, torch.from_numpy(shop.text_of_row)]
    types = vectors.queries[:, 0] @ vectors.texts["type"].T[:, torch.from_numpy(shop.path_of_row[1:])]
    peak = (search.SHARP * (types - 1)).exp()
    expected = head.scale.exp() * products + head.match_scale.exp() * types + head.exact_scale.exp() * peak
    torch.testing.assert_close(logits[:, 1:], expected, rtol=1e-4, atol=1e-4)
    assert (logits[:, 0] < -9000).all()


def test_balance_scales_terms_to_what_it_says_and_never_for_the_worse(without_log):
    batches, vectors = Batches(without_log, NAMES), vectors_of(without_log)
    balanced = disturb(model(without_log), seed=1)
    held = np.concatenate([without_log.baskets(period) for period in (TRAIN, VALIDATION)])
    queries = without_log.queries(held)

    def cut(name):
        right = without_log.answers(held, queries, batches.place[name], submodel.load(name).ANSWER)
        return Cut(without_log, batches, name, held, queries, right)

    def ndcg(name):
        view = cut(name).view(slice(None))
        with torch.inference_mode():
            logits = balanced(name, balanced.baked(name), request(view, vectors.queries[queries, 0]))
        ranked = 1 + logits[:, 1:].argsort(1, descending=True).numpy()[:, :10]
        return float(np.nanmean(metrics.ndcg(ranked, cut(name).relevant)))

    before = {name: ndcg(name) for name in NAMES}
    record = balance(balanced, {name: cut(name) for name in NAMES}, vectors, quiet)
    for name in NAMES:
        assert record[name]["before"] == pytest.approx(before[name], abs=1e-5)
        assert record[name]["after"] == pytest.approx(ndcg(name), abs=1e-5)
        assert record[name]["after"] >= record[name]["before"]
        assert "repeat" in record[name]["factors"]
    assert any(record[name]["after"] > record[name]["before"] for name in NAMES)


@pytest.fixture
def tuned(tmp_path):
    (tmp_path / "tower.safetensors").write_bytes(b"tower")
    (tmp_path / "after.safetensors").write_bytes(b"vectors")
    return tmp_path


def changed(joint_model, folder, before):
    after = finetune.parts(joint_model, folder)
    assert after.keys() == before.keys()
    return {part for part, digest in after.items() if digest != before[part]}


@pytest.mark.parametrize("name", NAMES)
def test_a_heads_change_is_its_own(shop, tuned, name):
    whole = model(shop)
    before = finetune.parts(whole, tuned)
    assert before.keys() == {"trunk", *NAMES}
    assert changed(whole, tuned, before) == set()
    for parameter in (*whole.head(name).parameters(), whole.bias[name]):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        assert changed(whole, tuned, before) == {name}
        with torch.no_grad():
            parameter.copy_(kept)
    assert changed(whole, tuned, before) == set()


def test_a_change_of_what_is_shared_is_the_trunks(shop, tuned):
    whole = model(shop)
    before = finetune.parts(whole, tuned)
    own = {id(p) for name in NAMES for p in (*whole.head(name).parameters(), whole.bias[name])}
    shared = [p for p in whole.parameters() if id(p) not in own]
    assert len(shared) > 10
    for parameter in shared:
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert changed(whole, tuned, before) == {"trunk"}
        with torch.no_grad():
            parameter.view(-1)[0] -= 1e-3
        before = finetune.parts(whole, tuned)
    for file in ("tower.safetensors", "after.safetensors"):
        (tuned / file).write_bytes(b"other")
        assert changed(whole, tuned, before) == {"trunk"}
        before = finetune.parts(whole, tuned)


def test_swapped_heads_are_a_change(shop, tuned):
    """Equal weights of two heads that change places must not cancel out."""
    whole = model(shop)
    before = finetune.parts(whole, tuned)
    with torch.no_grad():
        one, other = whole.bias["search"], whole.bias["recommend"]
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
    assert changed(whole, tuned, before) == {"search", "recommend"}
    assert len(set(before.values())) == len(before)
    json.dumps(before)
