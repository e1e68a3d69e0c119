"""Stages: skipped while nothing has changed, made again when anything has, and taken up again after a kill."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shipyard.data
import shipyard.release
import shipyard.stage
from models.config import load_fleet
from shipyard.line import Line
from shipyard.stage import RECORD, Record, Stage, closure, digest, write

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("shipyard.gates",)


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self):
        self.times = 0

    def __call__(self, out):
        self.times += 1
        (out / "deep").mkdir(exist_ok=True)
        (out / "model.bin").write_bytes(b"weights")
        (out / "deep" / "curve.json").write_text("[1, 2]")
        return {"loss": 0.25, "name": "牛奶"}


def stage(work, *, inputs=(), config=None, name="train"):
    return Stage(name, "joint", inputs, config or {"rank": 16}, MODULES, work)


def record(name):
    return Record(Path(name), digest({"content": name}), {}, skipped=True)


@pytest.fixture
def work():
    return Work()


# --- skipping --------------------------------------------------------------------------------------------------------


def test_a_stage_runs_once_and_is_skipped_then(tmp_path, work):
    first = stage(work).run(tmp_path)
    second = stage(work).run(tmp_path)
    assert work.times == 1
    assert (first.skipped, second.skipped) == (False, True)
    assert dataclasses.replace(second, skipped=False) == first
    assert first.folder == tmp_path / "joint" / "train"
    assert second.said == {"loss": 0.25, "name": "牛奶"}
    assert (first.folder / "model.bin").read_bytes() == b"weights"


def test_find_does_no_work(tmp_path, work):
    assert stage(work).find(tmp_path) is None
    assert work.times == 0
    assert not list(tmp_path.iterdir())
    made = stage(work).run(tmp_path)
    assert stage(work).find(tmp_path).digest == made.digest


def test_the_digest_is_of_the_output_alone(tmp_path, work):
    one = stage(work).run(tmp_path / "one")
    other = stage(work, config={"rank": 8}).run(tmp_path / "other")
    assert one.digest == other.digest

    def differently(out):
        said = work(out)
        (out / "model.bin").write_bytes(b"other weights")
        return said

    assert stage(differently).run(tmp_path / "third").digest != one.digest


def test_a_changed_configuration_runs_it_again(tmp_path, work):
    stage(work).run(tmp_path)
    assert not stage(work, config={"rank": 32}).run(tmp_path).skipped
    assert stage(work, config={"rank": 32}).run(tmp_path).skipped
    assert work.times == 2


def test_a_changed_input_runs_it_again(tmp_path, work):
    stage(work, inputs=(record("data"),)).run(tmp_path)
    assert stage(work, inputs=(record("data"),)).run(tmp_path).skipped
    assert not stage(work, inputs=(record("more data"),)).run(tmp_path).skipped
    assert not stage(work, inputs=(record("more data"), record("data"))).run(tmp_path).skipped
    assert work.times == 3


def test_the_order_of_the_configuration_does_not_matter(work):
    one, other = {"rank": 16, "alpha": [1, 2]}, {"alpha": [1, 2], "rank": 16}
    assert stage(work, config=one).key == stage(work, config=other).key
    assert stage(work, config=one).key != stage(work, config={"rank": 16, "alpha": [2, 1]}).key


def corrupt(folder):
    (folder / "model.bin").write_bytes(b"weightz")


def delete(folder):
    (folder / "deep" / "curve.json").unlink()


def replace_by_folder(folder):
    delete(folder)
    (folder / "deep" / "curve.json").mkdir()


DAMAGE = {
    "a file corrupted": corrupt,
    "a file deleted": delete,
    "a file now a folder": replace_by_folder,
    "the record deleted": lambda folder: (folder / RECORD).unlink(),
    "the record truncated": lambda folder: os.truncate(folder / RECORD, 40),
    "the record empty": lambda folder: (folder / RECORD).write_bytes(b""),
    "the record of bytes": lambda folder: (folder / RECORD).write_bytes(b"\xff\x00\xfe"),
    "the record a list": lambda folder: (folder / RECORD).write_text("[]"),
    "the record without files": lambda folder: (folder / RECORD).write_text('{"key": "x"}'),
    "the record's files a list": lambda folder: (folder / RECORD).write_text('{"key": "x", "files": ["model.bin"]}'),
    "everything deleted": shutil.rmtree,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_runs_it_again(tmp_path, work, what):
    first = stage(work).run(tmp_path)
    DAMAGE[what](first.folder)
    again = stage(work).run(tmp_path)
    assert work.times == 2
    assert again == first
    assert stage(work).run(tmp_path).skipped


def test_a_record_of_numbers_that_json_has_not_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        stage(lambda out: {"loss": float("nan")}).run(tmp_path)
    assert not (tmp_path / "joint" / "train").exists()


# --- kills -----------------------------------------------------------------------------------------------------------


def work_folders(build):
    return list((build / "joint").glob(".train-*"))


def test_what_a_failed_run_had_done_is_found_again(tmp_path):
    def fails(out):
        (out / "phase1").write_text("done")
        raise KeyboardInterrupt

    def goes_on(out):
        assert (out / "phase1").read_text() == "done"
        (out / "phase2").write_text("done")
        return {}

    with pytest.raises(KeyboardInterrupt):
        stage(fails).run(tmp_path)
    assert not (tmp_path / "joint" / "train").exists()
    made = stage(goes_on).run(tmp_path)
    assert sorted(path.name for path in made.folder.iterdir()) == ["phase1", "phase2", RECORD]
    assert work_folders(tmp_path) == []


def test_what_a_failed_run_of_another_key_had_done_is_removed(tmp_path, work):
    def fails(out):
        (out / "phase1").write_text("done")
        raise RuntimeError

    for name, config in (("train", {"rank": 8}), ("other", {"rank": 8}), ("train", {"rank": 16})):
        with pytest.raises(RuntimeError):
            stage(fails, config=config, name=name).run(tmp_path)
    assert len(work_folders(tmp_path)) == 1
    made = stage(work, config={"rank": 4}).run(tmp_path)
    assert not (made.folder / "phase1").exists()
    assert work_folders(tmp_path) == []
    assert len(list((tmp_path / "joint").glob(".other-*"))) == 1


def test_an_earlier_result_stays_until_the_next_is_whole(tmp_path, work):
    first = stage(work).run(tmp_path)

    def fails(out):
        (out / "model.bin").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stage(fails, config={"rank": 8}).run(tmp_path)
    assert stage(work).find(tmp_path).digest == first.digest


KILLED = """
import os, signal, sys
from pathlib import Path
from shipyard import stage

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def work(out):
    (out / "times").open("a").write("x")
    (out / "half").write_bytes(b"half")
    if sys.argv[2] == "work":
        kill()
    (out / "half").write_bytes(b"whole")
    return {}

if sys.argv[2] == "record":
    stage.os.fsync = kill
if sys.argv[2] == "rename":
    Path.rename = kill
made = stage.Stage("train", "joint", (), {"rank": 16}, ("shipyard.gates",), work).run(Path(sys.argv[1]))
print(made.skipped, (made.folder / "times").read_text(), (made.folder / "half").read_text())
"""


def run_to_be_killed(build, moment):
    command = [sys.executable, "-c", KILLED, str(build), moment]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("moment", "left", "times"),
    [
        ("work", {"times", "half"}, "xx"),
        ("record", {"times", "half"}, "xx"),
        ("rename", {"times", "half", RECORD}, "x"),
    ],
)
def test_a_run_that_was_killed_goes_on(tmp_path, moment, left, times):
    killed = run_to_be_killed(tmp_path, moment)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "joint" / "train").exists()
    [folder] = work_folders(tmp_path)
    assert left <= {path.name for path in folder.iterdir()}

    resumed = run_to_be_killed(tmp_path, "never")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == ["False", times, "whole"]
    names = {path.name for path in (tmp_path / "joint" / "train").iterdir()}
    assert names == {"times", "half", RECORD}
    assert run_to_be_killed(tmp_path, "never").stdout.split() == ["True", times, "whole"]


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "release.json"
    write(file, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from shipyard import stage\n"
        "stage.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.write(Path(sys.argv[1]), 'new' * 100_000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(file)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["release.json"]


# --- what a result depends on ----------------------------------------------------------------------------------------


def test_the_closure_holds_the_module_and_what_it_reaches():
    sources, libraries = closure(("shipyard.finetune",))
    reached = {"shipyard.finetune", "models.trunk", "models.behaviour"}
    assert reached | {"models", "serve", "serve.errors", "serve.history"} <= sources.keys()
    assert not {"shipyard.upload", "shipyard.cli", "serve.server"} & sources.keys()
    # what fleet.toml says is in a stage's configuration: another instance type trains nothing again
    assert not {"models.config", "models.places", "models.settings"} & sources.keys()
    assert all(path.is_file() and path.is_relative_to(ROOT) for path in sources.values())
    for name in ("torch", "numpy", "transformers", "peft", "safetensors"):
        assert libraries[name] == importlib.metadata.version(name)
    assert "boto3" not in libraries


def test_the_closure_does_not_import_what_it_names():
    code = (
        "import json, sys; from shipyard.stage import closure\n"
        "sources, libraries = closure(('shipyard.finetune',))\n"
        "print(json.dumps([sorted(sources), sorted(libraries), sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    sources, libraries, loaded = json.loads(result.stdout)
    assert "shipyard.finetune" in sources and "torch" in libraries
    assert not {"torch", "numpy", "shipyard.finetune", "models.trunk"} & set(loaded)


@pytest.fixture
def copied(tmp_path):
    """A copy of the sources, and a function that returns a stage's key as they are now."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source in ("models", "packaging/serve", "packaging/shipyard"):
        shutil.copytree(ROOT / source, tmp_path / Path(source).name, ignore=ignored)
    code = (
        "import shipyard.stage as s; assert s.__file__.startswith(__import__('sys').argv[1]), s.__file__\n"
        "print(s.Stage('train', 'joint', (), {}, ('shipyard.gates',), None).key)"
    )

    def key():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
        ).stdout

    return tmp_path, key


def test_a_changed_source_changes_the_key(copied):
    folder, key = copied
    before = key()
    assert key() == before
    for name in ("shipyard/gates.py", "serve/errors.py"):
        with (folder / name).open("a") as stream:
            stream.write("\nMORE = 1\n")
        after = key()
        assert after != before, name
        before = after


def test_a_changed_source_that_is_not_reached_leaves_the_key(copied):
    folder, key = copied
    before = key()
    for name in ("shipyard/bundle.py", "models/search.py", "serve/server.py"):
        with (folder / name).open("a") as stream:
            stream.write("\nMORE = 1\n")
    assert key() == before


def test_an_added_import_brings_its_module_into_the_key(copied):
    folder, key = copied
    with (folder / "shipyard" / "gates.py").open("a") as stream:
        stream.write("\nimport serve.history\n")
    before = key()
    with (folder / "serve" / "history.py").open("a") as stream:
        stream.write("\nMORE = 1\n")
    assert key() != before


# --- the line --------------------------------------------------------------------------------------------------------

FLEET = load_fleet(ROOT / "fleet.toml")
RUNTIME = {("wheels", "edge_runtime"), ("bundle", "edge_runtime")}
ONCE = functools.cache(closure)
DIGESTS = {"items": "i", "train": "1", "validation": "2", "test": "3"}
PARTS = {"trunk": "t"} | {name: name for name in FLEET.submodel}
TUNED = {"parts": PARTS, "tokenizer_sha256": "w"}
FORM = {"form": {"precision": "fp32"}}
SCORE = {
    "metric": "ndcg@10",
    "after": {"value": 0.3},
    "over_before": {"value": 1, "low": 1},
    "over_baseline": {"value": 1, "low": 1},
    "over_teacher": None,
    "calibration": {"method": "platt", "x": [1.0], "y": [0.0]},
}


def keys_of(fleet=FLEET, profile="small", **changes):
    """The key of every stage, as if each had said what it says here, with some of it changed."""
    said = {
        "data": {"digests": DIGESTS},
        "finetune": TUNED,
        "evaluate": {"submodels": dict.fromkeys(fleet.submodel, SCORE)},
    } | changes
    found = {}

    def watch(stage, build):
        found[stage.name, stage.unit] = stage.key
        told = said.get(stage.name, {})
        # what has said the same has made the same; of the others any change of what they depend on changes what they make
        return Record(build, digest(told) if told else stage.key, told or FORM, skipped=True)

    line = Line(fleet, profile, ROOT, ROOT / "build", lambda *_: None, watch)
    with pytest.MonkeyPatch.context() as patch:
        # neither changes here, and both take their time
        patch.setattr(shipyard.stage, "closure", ONCE)
        patch.setattr(shipyard.release, "closure", ONCE)
        patch.setattr(shipyard.data, "source_sha256", lambda *_: "the source")
        vars(line)["base_sha256"] = "the encoder"
        line.until("bundle")
    return found


@pytest.fixture(scope="module")
def keys():
    return keys_of()


def changed(keys, before):
    assert keys.keys() == before.keys()
    return {stage for stage, key in keys.items() if key != before[stage]}


def test_every_stage_of_every_unit_has_a_key_of_its_own(keys):
    each = {(verb, name) for verb in ("split", "export", "quantise", "bundle") for name in FLEET.submodel}
    whole = {(verb, "joint") for verb in ("data", "finetune", "evaluate")}
    assert keys.keys() == each | whole | RUNTIME
    assert len(set(keys.values())) == len(keys)
    assert keys_of() == keys


@pytest.mark.parametrize("name", FLEET.submodel)
def test_a_heads_change_leaves_the_other_sub_models(keys, name):
    after = changed(keys_of(finetune=TUNED | {"parts": PARTS | {name: "other"}}), keys)
    assert {stage for stage in after if stage[0] in ("split", "export", "quantise")} == {
        (verb, name) for verb in ("split", "export", "quantise")
    }
    assert ("evaluate", "joint") in after and ("bundle", name) in after
    assert not {("data", "joint"), ("finetune", "joint"), *RUNTIME} & after


def test_a_change_of_the_trunk_splits_everything_again(keys):
    after = changed(keys_of(finetune=TUNED | {"parts": PARTS | {"trunk": "other"}}), keys)
    assert {unit for verb, unit in after if verb == "split"} == set(FLEET.submodel)


def test_a_change_of_the_test_period_reaches_the_evaluation_and_no_training(keys):
    after = changed(keys_of(data={"digests": DIGESTS | {"test": "other"}}), keys)
    assert {verb for verb, _ in after} <= {"evaluate", "bundle"}
    assert ("evaluate", "joint") in after


@pytest.mark.parametrize("part", ["items", "train", "validation"])
def test_a_change_of_the_past_reaches_everything(keys, part):
    after = changed(keys_of(data={"digests": DIGESTS | {part: "other"}}), keys)
    assert after == keys.keys() - {("data", "joint")} - RUNTIME


def with_profile(**changes):
    profile = FLEET.profile["small"].model_copy(update=changes)
    return FLEET.model_copy(update={"profile": {"small": profile}})


@pytest.mark.parametrize(
    ("size", "value", "verbs"),
    [
        ("test_examples", 300, {"evaluate"}),
        ("test_each", 2, {"evaluate"}),
        ("strong_baselines", True, {"evaluate"}),
        ("validation_examples", 300, {"finetune", "evaluate"}),
        ("joint_steps", 7, {"finetune"}),
        ("mlm_steps", 7, {"finetune"}),
        ("households", 7, {"data"}),
    ],
)
def test_a_size_reaches_what_it_is_for(keys, size, value, verbs):
    after = changed(keys_of(with_profile(**{size: value})), keys)
    assert {verb for verb, unit in after if unit == "joint"} == verbs


def test_a_gate_reaches_nothing(keys):
    gate = FLEET.profile["small"].default_gate.model_copy(update={"over_baseline": -0.9})
    assert changed(keys_of(with_profile(default_gate=gate)), keys) == set()


def test_a_target_reaches_its_own_sub_models_alone(keys):
    target = FLEET.target | {"edge": FLEET.target["edge"].model_copy(update={"max_loss": 0.05})}
    after = changed(keys_of(FLEET.model_copy(update={"target": target})), keys)
    assert after == {("quantise", "edge_recommend"), ("bundle", "edge_recommend")}
