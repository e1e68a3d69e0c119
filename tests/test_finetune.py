"""Fine-tuning: every method moves the tower, the losses have the gradients they claim, a restart changes nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Made
from torch import nn

from models import trunk
from models.behaviour import TRAIN, load_behaviour
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard import finetune
from shipyard.release import base_folder

FLEET = load_fleet(ROOT / "fleet.toml")


@pytest.fixture(scope="module")
def behaviour(small: Made):
    return load_behaviour(small.folder("joint", "data"))


@pytest.mark.parametrize("method", ["full", "lora", "adalora"])
def test_every_method_trains_the_tower(behaviour, method: str, tmp_path: Path) -> None:
    config = FLEET.finetune.model_copy(update={"method": method, "rank": 4})
    profile = FLEET.profile["small"].model_copy(update={"tower_steps": 10, "tower_batch": 8})
    tower, tokenizer = trunk.load_tower(base_folder(FLEET))
    texts = behaviour.texts[:16]
    before = finetune.encode(tower, tokenizer, texts, lambda *_: None, "")
    kept = {name: p.detach().clone() for name, p in tower.state_dict().items()}
    said = finetune.train_tower(tower, tokenizer, behaviour, config, profile, tmp_path, lambda *_: None)
    after = finetune.encode(tower, tokenizer, texts, lambda *_: None, "")
    assert said["weights_moved"] > 0
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


def test_listwise_has_its_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 12, dtype=torch.double, requires_grad=True)
    relevant = torch.tensor([[3, 5, 0], [1, 0, 0], [0, 0, 0], [11, 2, 7]])
    assert torch.autograd.gradcheck(lambda x: finetune.listwise(x, relevant), logits)
    plain = [-logits[i].log_softmax(0)[r[r > 0]].mean() for i, r in enumerate(relevant) if (r > 0).any()]
    torch.testing.assert_close(finetune.listwise(logits, relevant), torch.stack(plain).mean())


def test_sampled_columns_estimate_the_whole_softmax(behaviour) -> None:
    """Average the weighted sum of exponentials over many draws: it must come to the whole catalogue's."""
    batches = finetune.Batches(behaviour, ("recommend",))
    chosen = behaviour.baskets(TRAIN)[:4]
    views = batches.views(chosen, behaviour.queries(chosen))
    values = np.exp(np.random.default_rng(1).normal(size=behaviour.items + 1))
    whole = values[1:].sum()
    sums = []
    for seed in range(200):
        columns = finetune.Columns.draw(batches, views, 1000, np.random.default_rng(seed))
        assert len(np.unique(columns.rows)) == len(columns.rows)
        assert columns.rows.min() >= 1
        sums.append((values[columns.rows] * np.exp(columns.log_weight)).sum())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - whole) < 4 * error
    view = views["recommend"]
    assert set(np.unique(view.bought)) - {0} <= set(columns.rows[columns.log_weight == 0].tolist())


def test_rows_of_a_part_are_its_own_even_with_the_last_item(behaviour) -> None:
    local = behaviour.local.copy()
    local[-1] = True
    part = dataclasses.replace(behaviour, local=local)
    batches = finetune.Batches(part, ("recommend", "edge_recommend"))
    chosen = part.baskets(TRAIN, fewest=20)[:50]
    views = batches.views(chosen, part.queries(chosen))
    assert views["edge_recommend"].items.max() <= len(batches.rows["edge_recommend"]) < part.items
    assert views["recommend"].items.max() > len(batches.rows["edge_recommend"])


class Interrupted(Exception):
    pass


def test_restart_ends_where_an_unbroken_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, stop: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))

        def loss(step: int) -> torch.Tensor:
            if step == stop:
                raise Interrupted
            x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 6))).float()
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        groups = [{"params": list(module.parameters()), "lr": 1e-2}]
        finetune._train("t", module.parameters(), groups, 30, loss, lambda _: None, module, folder, lambda *_: None)
        return module.state_dict()

    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run(whole, None)
    with pytest.raises(Interrupted):
        run(broken, 17)
    assert (broken / "t.checkpoint.pt").exists()
    found = run(broken, None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_diverged_training_is_an_error(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]
    with pytest.raises(ShipyardError, match="loss is nan at step 0"):
        finetune._train(
            "t", module.parameters(), groups, 3, lambda _: module(torch.full((1, 2), torch.nan)).sum(), lambda _: None,
            module, tmp_path, lambda *_: None,
        )  # fmt: skip


def test_blur_writes_queries_as_shoppers_do() -> None:
    rng = np.random.default_rng(0)
    blurred = [finetune.blur("frozen pizza premium", rng) for _ in range(200)]
    assert all(1 <= len(text.split()) <= 3 for text in blurred)
    assert len(set(blurred)) > 5
    assert finetune.blur("", rng) == ""


def test_untrained_model_ranks_by_the_pretrained_similarity(behaviour, small: Made) -> None:
    vectors = finetune.load_vectors(small.folder("joint", "finetune"), "before")
    joint = finetune.build_joint(behaviour, vectors, FLEET.finetune, ("search",)).eval()
    items, features = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 6)
    with torch.inference_mode():
        logits = joint("search", joint.table(), joint.bias["search"], vectors.paths[:2], items, features)
    cosine = vectors.paths[:2] @ vectors.texts.T[:, torch.from_numpy(behaviour.text_of_row)]
    for ours, theirs in zip(logits[:, 1:], cosine, strict=True):
        assert np.corrcoef(ours.numpy(), theirs.numpy())[0, 1] > 0.97


def test_tiny_profile_of_the_tests_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text((ROOT / "fleet.toml").read_text() + TINY)
    assert load_fleet(path).profile["tiny"].households == 200
