"""kill -9 in each stage: the next run goes on, and ends as if nothing had happened, elsewhere and in another language."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, shipyard

STAGES = ("data joint", "finetune joint", "evaluate joint", "split search", "export search", "quantise search",
          "bundle search", "split intent")  # fmt: skip


ELSEWHERE = {"LC_ALL": "C", "TZ": "Asia/Shanghai", "PYTHONHASHSEED": "7"}
HERE = {"LC_ALL": "C.UTF-8", "TZ": "America/New_York", "PYTHONHASHSEED": "1"}


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of a release's artifacts by name."""
    [path] = (folder / "releases").glob("*.json")
    return {artifact["name"]: artifact["digest"] for artifact in json.loads(path.read_text())["artifacts"]}


def kill_in(stage: str, arguments: list[str], config: Path) -> list[str]:
    """Start the command and kill it when it says that it starts `stage`; return what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shipyard.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True, env=os.environ | ELSEWHERE | {"COLUMNS": "200", "XDG_CONFIG_HOME": str(config)},
    )  # fmt: skip
    told = []
    assert process.stderr is not None
    for line in process.stderr:
        told.append(line.strip())
        if told[-1] == f"start    {stage}":
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    return told


def test_kill_in_every_stage(tiny_fleet: Path, tmp_path: Path) -> None:
    build = tmp_path / "构建 folder"
    arguments = [
        "release", "--fleet", str(tiny_fleet), "--profile", "tiny", "--build", str(build), "--no-synth",
        "--json",
    ]  # fmt: skip
    for number, stage in enumerate(STAGES):
        told = kill_in(stage, arguments, tmp_path)
        done = [line.partition(":")[0].removeprefix("skipped").strip() for line in told if line.startswith("skipped")]
        # what had ended before the earlier kills is not done again
        assert set(STAGES[: max(0, number - 1)]) <= set(done), told
        unit, name = stage.split()[1], stage.split()[0]
        assert not (build / "tiny" / unit / name).exists()
        assert not (build / "releases").exists()
    last = shipyard(*arguments, XDG_CONFIG_HOME=str(tmp_path), **ELSEWHERE)
    assert last.returncode == 0, last.stderr[-3000:]
    assert list((build / "releases").glob("*.json"))
    leftovers = [p for p in build.rglob(".*") if p.is_dir() or p.suffix == ".part"]
    assert leftovers == []
    again = shipyard(*arguments, XDG_CONFIG_HOME=str(tmp_path), **ELSEWHERE)
    assert "start " not in again.stderr
    assert again.stdout == last.stdout

    # from the same training and wheels, under another path, language, time zone, order of hashes and number of threads:
    # the same bundles to the byte
    here = tmp_path / "here"
    for kept in ("joint", "edge_runtime/wheels"):
        shutil.copytree(build / "tiny" / kept, here / "tiny" / kept)
    arguments[arguments.index("--build") + 1] = str(here)
    threads = str(1 + int(json.loads(last.stdout)["source"]["machine"]["threads"] == 1))
    other = shipyard(*arguments, XDG_CONFIG_HOME=str(tmp_path), OMP_NUM_THREADS=threads, **HERE)
    assert other.returncode == 0, other.stderr[-3000:]
    assert "skipped  finetune joint" in other.stderr and "start    split search" in other.stderr
    assert digests(here) == digests(build)
