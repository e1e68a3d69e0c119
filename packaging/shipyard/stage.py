"""Stages: each writes a folder and a stage.json, is skipped while nothing that it depends on has changed, and goes on
after a kill.

A stage's key hashes its inputs' digests, its configuration, the source of every module of ours that it imports, and the
versions of every library that those import. While it works, it writes into a folder beside its own that bears its key;
that folder is renamed when it is complete, so what lies under a stage's name is whole. A stage that is killed finds its
folder again, with what it had finished, as long as its key is the same.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import rfc8785

from serve.errors import ShipyardError
from serve.files import read_json, sha256_file

OURS = ("models", "shipyard", "serve")
RECORD = "stage.json"

SETTINGS = "models.config"
"""The module that reads fleet.toml: what a stage depends on of it, and of what it imports, is in its configuration."""


@dataclass(frozen=True)
class Record:
    """What a finished stage left: its folder, the digest of its output, what it had to say, and whether it was skipped."""

    folder: Path
    digest: str
    said: dict[str, Any]
    skipped: bool


@dataclass(frozen=True)
class Stage:
    """One step of one unit ("joint", or a sub-model), with what its result depends on.

    `modules` are the modules whose code decides the result, their imports included by themselves.
    """

    name: str
    unit: str
    inputs: tuple[Record, ...]
    config: Mapping[str, Any]
    modules: tuple[str, ...]
    work: Callable[[Path], dict[str, Any]]

    def find(self, build: Path) -> Record | None:
        """Return the record of an earlier run, if nothing that it depends on has changed since."""
        return _whole(build / self.unit / self.name, self.key)

    @cached_property
    def key(self) -> str:
        """Return the digest of everything that the result depends on."""
        sources, libraries = closure(self.modules)
        return digest(
            {
                "inputs": [record.digest for record in self.inputs],
                "config": dict(self.config),
                "code": {name: sha256_file(path) for name, path in sources.items()},
                "libraries": libraries,
                "python": ".".join(map(str, sys.version_info[:2])),
            }
        )

    def run(self, build: Path) -> Record:
        """Do the work, or find that it is done."""
        if (found := self.find(build)) is not None:
            return found
        folder, key = build / self.unit / self.name, self.key
        work = folder.with_name(f".{self.name}-{key[:16]}")
        if (record := _whole(work, key)) is None:
            for stale in folder.parent.glob(f".{self.name}-*"):
                if stale != work:
                    shutil.rmtree(stale)
            for unfinished in (RECORD, f".{RECORD}.part"):
                (work / unfinished).unlink(missing_ok=True)
            work.mkdir(parents=True, exist_ok=True)
            said = self.work(work)
            files = {
                path.relative_to(work).as_posix(): sha256_file(path)
                for path in sorted(work.rglob("*"))
                if path.is_file()
            }
            output = digest(files)
            document = {"key": key, "files": files, "digest": output, "said": said}
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
            write(work / RECORD, text)
            # as a later run reads it: JSON has no tuples
            record = Record(work, output, json.loads(text)["said"], skipped=False)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        return replace(record, folder=folder, skipped=False)


def write(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def closure(modules: tuple[str, ...], *, settings: bool = False) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files of our modules that `modules` reach by imports, and the libraries' versions that these name.

    `SETTINGS` is left out unless asked for: an instance type that is allowed anew is no reason to train again.
    """
    sources: dict[str, Path] = {}
    libraries: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in sources or (name == SETTINGS and not settings) or path is None:
            continue
        sources[name] = path
        for imported in _imports(path):
            top = imported.split(".")[0]
            if top in OURS:
                waiting += [imported, imported.rpartition(".")[0]]
            else:
                libraries |= {dist: importlib.metadata.version(dist) for dist in _distributions().get(top, [])}
    return dict(sorted(sources.items())), dict(sorted(libraries.items()))


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@functools.cache
def _source(name: str) -> Path | None:
    """Return the file of a module of ours; None for what is no module, as a name imported from one."""
    top, *rest = name.split(".")
    # find_spec of a submodule would import its parents, torch and all
    spec = importlib.util.find_spec(top) if top in OURS else None
    for location in spec.submodule_search_locations or () if spec else ():
        for path in (Path(location, *rest, "__init__.py"), Path(location, *rest).with_suffix(".py")):
            if path.is_file():
                return path
    return None


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Name everything that a file imports, each name of `from a import b` as a.b too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _whole(folder: Path, key: str) -> Record | None:
    """Return the record of a folder that was written under `key` and whose files are as they were; else None."""
    if not (folder / RECORD).is_file():
        return None
    try:
        document = read_json(folder / RECORD)
        files = document["files"]
        whole = document["key"] == key and all(sha256_file(folder / name) == found for name, found in files.items())
    except (ShipyardError, OSError, KeyError, TypeError, AttributeError) as fault:
        # a damaged record only means that the stage runs again
        print(f"{folder}: {type(fault).__name__}: made again", file=sys.stderr)
        return None
    return Record(folder, document["digest"], document["said"], skipped=True) if whole else None


def digest(document: Any) -> str:
    """Return the SHA-256 of a JSON document in its canonical form (RFC 8785)."""
    return hashlib.sha256(rfc8785.dumps(document)).hexdigest()
