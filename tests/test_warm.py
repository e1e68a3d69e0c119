"""The weekly update: what learns and what is held to the bit, that new names find their place, and what is refused."""

import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Made, shipyard
from safetensors.torch import load_file

from models.behaviour import TRAIN, load_behaviour
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard import weekly
from shipyard.bundle import write_zip
from shipyard.pretrained import base_folder
from shipyard.stage import Record
from shipyard.warm import Earlier, _shared, warm
from shipyard.weekly import WeeklyLine, left

OFTEN = 3


@pytest.fixture(scope="module")
def later(small: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the small release a week later: seven days of its validation period have become training."""
    data, out = small.folder("joint", "data"), tmp_path_factory.mktemp("later")
    for path in data.iterdir():
        (out / path.name).symlink_to(path)
    found = {name: pq.read_table(data / f"{name}.parquet") for name in ("train", "validation")}
    day = found["validation"]["day"].to_numpy()
    moved = day < np.floor(day.min()) + 7
    tables = {
        "train": pa.concat_tables([found["train"], found["validation"].filter(moved)]),
        "validation": found["validation"].filter(~moved),
    }
    for name, table in tables.items():
        (out / f"{name}.parquet").unlink()
        pq.write_table(
            table.sort_by([(key, "ascending") for key in ("user", "day", "basket", "row")]), out / f"{name}.parquet"
        )
    return out


def update(small: Made, data: Path, out: Path):
    out.mkdir()
    profile = small.fleet.profile["small"].model_copy(update={"validation_examples": 40, "joint_sampled": 500})
    earlier = Earlier(small.folder("joint", "data"), small.folder("joint", "finetune"))
    weights = dict.fromkeys(small.fleet.submodel, 1.0)
    return warm(
        earlier, data, base_folder(small.fleet), small.fleet.finetune, profile, weights, out, lambda *_: None, steps=4,
        often=OFTEN,
    )  # fmt: skip


def test_only_rows_that_were_bought_often_learn(small: Made, later: Path, tmp_path: Path) -> None:
    said = update(small, later, tmp_path / "out")
    before = load_file(small.folder("joint", "finetune") / "joint.safetensors")
    after = load_file(tmp_path / "out" / "joint.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name].numpy(), after[name].numpy())}
    identity = "tables.of_product.identity.weight"
    assert identity in moved and moved <= {identity, *(f"bias.{name}" for name in small.fleet.submodel)}
    behaviour, known = load_behaviour(later), load_behaviour(small.folder("joint", "data"))
    last = known.day[known.start[known.baskets(TRAIN, fewest=10)]].max()
    baskets = behaviour.baskets(TRAIN, fewest=10)
    fresh = baskets[behaviour.day[behaviour.start[baskets]] > last]
    assert said["warm"]["baskets"] == len(fresh) > 0
    lines = np.concatenate([np.arange(behaviour.start[b], behaviour.start[b + 1]) for b in fresh])
    often = np.bincount(behaviour.row[lines][behaviour.bought[lines]], minlength=behaviour.items + 1) >= OFTEN
    rows = (before[identity] != after[identity]).any(1).numpy()
    # some of these rows no basket of four steps named; no other row moved, not in its last bit
    assert rows.any() and not (rows & ~often).any()
    assert said["warm"]["rows"]["recommend"] == often.sum()
    for file in ("tower.safetensors", "after.safetensors", "before.safetensors", "tokenizer.json"):
        ours, theirs = tmp_path / "out" / file, small.folder("joint", "finetune") / file
        if file.endswith("json"):
            assert ours.read_bytes() == theirs.read_bytes()
        else:
            a, b = load_file(ours), load_file(theirs)
            assert a.keys() == b.keys() and all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)
    assert said["parts"].keys() == {"trunk", *small.fleet.submodel}


def test_without_a_later_basket_nothing_is_updated(small: Made, tmp_path: Path) -> None:
    with pytest.raises(ShipyardError, match=r"no basket of the train period is later.*mend: move valid_from"):
        update(small, small.folder("joint", "data"), tmp_path / "out")


def test_the_same_days_are_no_update(tmp_path: Path) -> None:
    same = tmp_path / f"small-{load_fleet(ROOT / 'fleet.toml').data.valid_from}"
    done = shipyard("warm", "--profile", "small", "--build", tmp_path, "--from", same)
    assert done.returncode == 1 and "--from: the model of these very days" in done.stderr
    done = shipyard("warm", "--profile", "small", "--build", tmp_path, "--from", tmp_path / "none")
    assert (
        done.returncode == 1 and "no finished stage; mend: name the build folder of an earlier release" in done.stderr
    )


def test_the_folder_that_help_and_the_page_name_is_that_of_a_week_later() -> None:
    later = load_fleet(ROOT / "fleet.toml").data.valid_from + datetime.timedelta(days=7)
    page = (ROOT / "docs" / "edge-sync.md").read_text()
    told = shipyard("warm", "--help").stdout
    assert page.count(f"build/quick-{later}") == page.count("build/quick-") == 2
    assert told.count(f"build/quick-{later}") == told.count("build/quick-") == 1


def test_rows_are_carried_by_their_names() -> None:
    ours, theirs = _shared(["b", "new", "a"], ["a", "gone", "b"])
    assert ours.tolist() == [0, 2] and theirs.tolist() == [2, 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundled(WeeklyLine):
    """A line whose bundles are there already."""

    folder: Path = Path()

    def bundle(self, name: str) -> Record:
        return Record(self.folder, "", {}, skipped=True)


def test_an_update_whose_delta_is_large_is_refused(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small.bundle("edge_recommend")
    (tmp_path / "upload").mkdir()
    line = Bundled(
        small.fleet, "small", ROOT, tmp_path, lambda *_: None, lambda stage, build: stage.run(build),
        earlier=small.build / "small", folder=tmp_path,
    )  # fmt: skip
    write_zip(base, tmp_path / "upload" / "edge-recommend.zip")
    assert line.deltas()["edge_recommend"] < 0.01
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in base.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    content = np.frombuffer((base / "model.onnx").read_bytes(), np.uint8)
    (changed / "model.onnx").write_bytes(
        (content ^ np.random.default_rng(0).integers(0, 256, len(content), np.uint8)).tobytes()
    )
    write_zip(changed, tmp_path / "upload" / "edge-recommend.zip")
    with pytest.raises(ShipyardError, match=r"edge_recommend: the delta is too large.*allowed: 25%"):
        line.deltas()
    monkeypatch.setattr(weekly, "MOST_DELTA", 1.0)
    assert line.deltas()["edge_recommend"] > 0.5


def test_a_stage_that_was_changed_is_no_beginning(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a")
    (tmp_path / "stage.json").write_text(json.dumps({"digest": "d", "said": {}, "files": {"model": "0" * 64}}))
    with pytest.raises(ShipyardError, match="model: changed since it was made"):
        left(tmp_path)
    with pytest.raises(ShipyardError, match="no finished stage; mend: name the build folder"):
        left(tmp_path / "none")
