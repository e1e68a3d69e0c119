"""One contract for every sub-model, and the proof that one file and one entry add another."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Made
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models import submodel, trunk
from models.behaviour import LEVELS, VALIDATION, load_behaviour
from models.config import load_fleet
from models.release import attest
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass.device import prove
from serve.greengrass.local import Desk
from serve.greengrass.shadow import update
from serve.greengrass.store import Store
from serve.greengrass.telemetry import Telemetry
from serve.history import FEATURES, OFFER
from serve.trust import MANIFEST, key_id
from shipyard.examples import Examples, load_joint
from shipyard.joint import request

FLEET = load_fleet(ROOT / "fleet.toml")


def test_every_file_has_an_entry_and_every_entry_a_file() -> None:
    assert submodel.names() == sorted(FLEET.submodel)


def test_unknown_submodel_is_named_with_those_there_are() -> None:
    with pytest.raises(ShipyardError, match=r"no file models/serach\.py.*allowed: .*search"):
        submodel.load("serach")


def test_file_that_breaks_the_contract_is_named() -> None:
    with pytest.raises(ShipyardError, match=r"models/trunk\.py: defines no TASK"):
        submodel.load("trunk")


@pytest.fixture(scope="module")
def tuned(small: Made):
    """The behaviour, the joint model and its vectors, and the validation's examples."""
    behaviour = load_behaviour(small.folder("joint", "data"))
    joint, vectors = load_joint(behaviour, small.folder("joint", "finetune"), FLEET.finetune, tuple(FLEET.submodel))
    return behaviour, joint, vectors, Examples(behaviour, VALIDATION, 64, tuple(FLEET.submodel))


@pytest.mark.parametrize("name", sorted(FLEET.submodel))
def test_contract_of_the_file(tuned, name: str) -> None:
    behaviour, joint, _, _ = tuned
    module = submodel.load(name)
    assert module.TASK in get_args(submodel.Task)
    assert module.LEVEL in LEVELS
    assert module.ANSWER in get_args(submodel.Answer)
    assert module.METRIC == "ndcg@10"
    assert module.TEACHER is None or module.TEACHER in FLEET.submodel
    rows = module.rows(behaviour)
    assert rows.dtype == np.int64
    assert len(rows) > 100
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 1
    assert rows.max() <= len(behaviour.names(module.LEVEL))
    head = joint.head(name)
    assert isinstance(head, trunk.Head)
    # a row that is no product has no offer, and a query belongs to a search
    assert head.uses_offers == (module.LEVEL == "product")
    assert head.uses_text == (module.TASK == "search")


def wanted(cut, vectors, size: int):
    """Return the first requests of the examples."""
    return request(cut.view(slice(0, size)), cut.text(vectors)[:size])


def alone_of(asked, i: int):
    return trunk.Request(*(None if part is None else part[i : i + 1] for part in vars(asked).values()))


@pytest.mark.parametrize("name", sorted(FLEET.submodel))
def test_contract_of_the_head(tuned, name: str) -> None:
    _, joint, vectors, examples = tuned
    cut = examples.of(name)
    assert ((cut.relevant >= 0) & (cut.relevant <= cut.rows)).all()
    assert (cut.relevant != 0).any(1).all()
    asked = wanted(cut, vectors, 4)
    with torch.inference_mode():
        baked = joint.baked(name)
        logits = joint(name, baked, asked)
        alone = joint(name, baked, alone_of(asked, 2))
        nothing = trunk.Request(
            torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, len(FEATURES)),
            torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, len(OFFER)), asked.text[:1],
        )  # fmt: skip
        empty = joint(name, baked, nothing)
    assert logits.shape == (4, cut.rows + 1)
    assert torch.isfinite(logits).all() and torch.isfinite(empty).all()
    assert (logits[:, 0] < logits[:, 1:].min(1).values).all(), "padding must never win"
    assert empty[0, 0] < empty[0, 1:].min()
    torch.testing.assert_close(alone[0], logits[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(FLEET.submodel))
def test_padding_of_a_request_changes_nothing(tuned, name: str) -> None:
    _, joint, vectors, examples = tuned
    asked = wanted(examples.of(name), vectors, 3)
    pad = torch.nn.functional.pad
    wider = trunk.Request(
        pad(asked.items, (0, 9)), pad(asked.features, (0, 0, 0, 9)), pad(asked.offers, (0, 7)),
        pad(asked.strengths, (0, 0, 0, 7)), asked.text,
    )  # fmt: skip
    with torch.inference_mode():
        baked = joint.baked(name)
        torch.testing.assert_close(joint(name, baked, wider), joint(name, baked, asked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(FLEET.submodel))
def test_a_head_hears_what_it_says_that_it_uses(tuned, name: str) -> None:
    _, joint, vectors, examples = tuned
    asked = wanted(examples.of(name), vectors, 3)
    head = joint.head(name)
    changes = {
        "items": (asked.items.flip(1), True),
        "features": (asked.features + 0.5, True),
        "strengths": (1 - asked.strengths, head.uses_offers),
        "text": (asked.text.roll(1, 0), head.uses_text),
    }
    with torch.inference_mode():
        baked = joint.baked(name)
        before = joint(name, baked, asked)
        for part, (value, heard) in changes.items():
            after = joint(name, baked, dataclasses.replace(asked, **{part: value}))
            assert torch.equal(after, before) != heard, part


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_readme_adds_a_submodel(tmp_path: Path) -> None:
    """Take the file and the entry of the README, put them into a copy of the project, bundle it, and ask it on a desk.

    A second file places suggestions beside it: two of the tasks that a device has besides recommendation.
    """
    [code] = [block for block in blocks("python") if "TASK" in block]
    [entry] = [block for block in blocks("toml") if "[submodel." in block]
    name = re.search(r"\[submodel\.(\w+)\]", entry)[1]
    for folder in ("models", "packaging"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models" / f"{name}.py").write_text(code)
    suggest = (ROOT / "models" / "intent.py").read_text()
    (tmp_path / "models" / "local_intent.py").write_text(suggest)
    # its rows are one store's, where fewer searches have an answer
    tiny = TINY.replace("households = 60", "households = 140")
    (tmp_path / "fleet.toml").write_text(
        (ROOT / "fleet.toml").read_text() + tiny + entry + '[submodel.local_intent]\ntarget = "edge"\n'
    )
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
    assert set(made) == {*FLEET.submodel, name, "local_intent", "edge_runtime", "gateway"}
    assert made[name]["kind"] == made["local_intent"]["kind"] == "greengrass-model"
    needed = made["edge_runtime"]["template"]["recipe"]["ComponentDependencies"]
    assert {"shipyard.edge-recommend", "shipyard.local-search", "shipyard.local-intent"} <= needed.keys()
    bundle = tmp_path / "build" / "tiny" / name / "bundle" / "bundle"
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["name"] == name.replace("_", "-")
    assert (manifest["task"], manifest["level"]) == ("search", "product")
    assert manifest["golden"][0]["answer"]["products"]
    products = json.loads((bundle / "catalogue.json").read_text())["products"]
    local = json.loads((tmp_path / "build/tiny/edge_recommend/bundle/bundle/catalogue.json").read_text())["products"]
    everything = json.loads((tmp_path / "build/tiny/search/bundle/bundle/catalogue.json").read_text())["products"]
    assert products == local
    assert set(products) < set(everything)
    ask_on_a_device(tmp_path / "build" / "tiny")


def ask_on_a_device(build: Path) -> None:
    """Attest the edge's bundles, prove them as a device does, and ask each for what it is for."""
    key = Ed25519PrivateKey.generate()
    store, models, manifests = Store(build / "device", {key_id(key.public_key()): key.public_key()}), {}, {}
    for name in ("edge-recommend", "local-search", "local-intent"):
        folder = build / name.replace("-", "_") / "bundle" / "bundle"
        manifests[name] = store.adopt(name, folder, attest(name, sha256_file(folder / MANIFEST), key))
        models[name] = prove(store, name, manifests[name], budget_ms=5000)
    desk = Desk(Telemetry())
    desk.change(models, manifests)
    for name, task, answers in (
        ("edge-recommend", "recommend", "products"), ("local-search", "search", "products"),
        ("local-intent", "recommend", "categories"),
    ):  # fmt: skip
        request = {"history": [], "k": 3} | ({"query": "milk"} if task == "search" else {})
        status, answer = desk.answer(name, task, json.dumps(request).encode())
        assert status == 200 and len(answer[answers]) == 3, answer
        told = json.dumps(feedback(name, answer[answers])).encode()
        assert desk.answer(name, "feedback", told) == (200, {"counted": 3})
    # all three, with what was learned, fit into one report
    telemetry = desk.telemetry.close()
    assert json.loads(telemetry)["learned"]["models"].keys() == models.keys()
    status = {"runtime": "1.0.268435455", "generation": 10**6, "floor": 10**6, "phase": "serving", "models": manifests,
              "fault": ""}  # fmt: skip
    sent = json.loads(json.loads(update(status, json.loads(desk.telemetry.saved), None))["state"]["reported"]["report"])
    assert sent["telemetry"]["learned"].keys() == models.keys()


def feedback(name: str, answers: list[dict[str, float]]) -> dict[str, object]:
    return {
        "id": f"visit-{name}",
        "shown": [{"score": entry["score"], "taken": k == 0} for k, entry in enumerate(answers)],
    }
