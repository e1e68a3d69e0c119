"""One contract for every sub-model, and the proof that one file and one entry add another."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Made

from models import submodel, trunk
from models.behaviour import VALIDATION, load_behaviour
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard.evaluate import Examples, load_joint

FLEET = load_fleet(ROOT / "fleet.toml")


def test_every_file_has_an_entry_and_every_entry_a_file() -> None:
    assert submodel.names() == sorted(FLEET.submodel)


def test_unknown_submodel_is_named_with_those_there_are() -> None:
    with pytest.raises(ShipyardError, match=r"no file models/serach\.py.*allowed: .*search"):
        submodel.load("serach")


def test_file_that_breaks_the_contract_is_named() -> None:
    with pytest.raises(ShipyardError, match=r"models/trunk\.py: defines no TASK"):
        submodel.load("trunk")


@pytest.mark.parametrize("name", sorted(FLEET.submodel))
def test_contract(small: Made, name: str) -> None:
    module = submodel.load(name)
    assert module.TASK in ("search", "recommend")
    assert module.METRIC == "ndcg@10"
    assert module.TEACHER is None or module.TEACHER in FLEET.submodel
    behaviour = load_behaviour(small.folder("joint", "data"))
    rows = module.rows(behaviour)
    assert rows.dtype == np.int64
    assert len(np.unique(rows)) == len(rows) > 100
    assert rows.min() >= 1
    assert rows.max() <= behaviour.items
    assert (np.diff(rows) > 0).all()

    examples = Examples(behaviour, VALIDATION, 64, tuple(FLEET.submodel))
    view, relevant, baskets, queries = examples.of(name)
    assert ((relevant >= 0) & (relevant <= len(rows))).all()
    assert (relevant != 0).any(1).all()
    for rule in module.BASELINES.values():
        scores = rule(behaviour, int(baskets[0]), int(queries[0]))
        assert scores.shape == (behaviour.items + 1,)
        assert np.isfinite(scores).all()

    tuned = small.folder("joint", "finetune")
    joint, vectors = load_joint(behaviour, tuned, FLEET.finetune, tuple(FLEET.submodel))
    head = joint.head(name)
    assert isinstance(head, trunk.Head)
    items, features = torch.from_numpy(view.items[:4]), torch.from_numpy(view.features[:4])
    table = joint.table(joint.rows[name])
    with torch.inference_mode():
        logits = joint(name, table, joint.bias[name], vectors.paths[queries[:4]], items, features)
        empty = joint(
            name,
            table,
            joint.bias[name],
            vectors.paths[queries[:1]],
            torch.zeros(1, 1, dtype=torch.long),
            features[:1, :1],
        )
        alone = joint(name, table, joint.bias[name], vectors.paths[queries[:1]], items[:1], features[:1])
    assert logits.shape == (4, len(rows) + 1)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(empty).all()
    assert (logits[:, 0] < logits[:, 1:].min(1).values).all(), "padding must never win"
    torch.testing.assert_close(alone[0], logits[0], rtol=1e-4, atol=1e-4)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_readme_adds_a_submodel(tmp_path: Path) -> None:
    """Take the file and the entry of the README, put them into a copy of the project, and bundle it."""
    [code] = [block for block in blocks("python") if "TASK" in block]
    [entry] = [block for block in blocks("toml") if "[submodel." in block]
    name = re.search(r"\[submodel\.(\w+)\]", entry)[1]
    for folder in ("models", "packaging"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models" / f"{name}.py").write_text(code)
    (tmp_path / "fleet.toml").write_text((ROOT / "fleet.toml").read_text() + TINY + entry)
    done = subprocess.run(
        [sys.executable, "-m", "shipyard.cli", "bundle", "--profile", "tiny", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'packaging'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert set(made) == {*FLEET.submodel, name, "edge_runtime"}
    assert made[name]["kind"] == "triton"
    bundle = tmp_path / "build" / "tiny" / name / "bundle" / "bundle"
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["name"] == name.replace("_", "-")
    assert manifest["golden"][0]["answer"]["products"]
    products = json.loads((bundle / "products.json").read_text())
    everything = json.loads((tmp_path / "build/tiny/search/bundle/bundle/products.json").read_text())
    assert set(products) < set(everything)
