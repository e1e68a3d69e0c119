"""Items: what is new or changed becomes searchable without a new release, as a shard beside search.

The shard's rows are made as the release's were: the same cleaning, the text tower that is served, the same projection. A new
item has no vector of its id and the catalogue's median bias, for nobody knows yet how it sells; a changed one keeps its own.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import onnx
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from models.config import Data, Fleet
from models.release import Artifact, Release, Signer, attest
from serve.codec import Codec, Id
from serve.errors import ShipyardError
from serve.files import read_json
from serve.runtime import Model
from serve.shard import shard_name
from serve.trust import MANIFEST, key_id, load_keys
from shipyard import data as cleaning
from shipyard.console import Reporter
from shipyard.fleet import CURRENT, artifact_folder, searched
from shipyard.look import newest, open_release
from shipyard.seal import seal
from shipyard.shard import Rows, Search, logits, named
from shipyard.sources import ABBREVIATIONS, open_source
from shipyard.stage import write
from shipyard.swap import bring

CHECKED = 24
"""Rows of the catalogue that are made anew, to see that they get the scores that the release gives them."""

TOLERANCE = 1e-3
"""Largest difference of such a score, relative to the largest of its request; the tables' form rounds."""


@dataclass(frozen=True)
class Item:
    """An item as the data stage describes it: its id, its text, and the path of its category."""

    id: Id
    text: str
    path: str


def read_items(file: Path, config: Data, known: Sequence[Id]) -> list[Item]:
    """Read and clean a table of items in the schema of docs/data.md, by the rules that the release's own went through.

    Raises:
        ShipyardError: the file is missing or breaks the schema, or its ids are of another kind than the `known` ones.
    """
    if not file.is_file() or file.suffix not in (".parquet", ".csv"):
        raise ShipyardError(
            f"{file}: no table of items", allowed="a .parquet or .csv file in the schema of docs/data.md"
        )
    with duckdb.connect() as db:
        open_source(db, config.model_copy(update={"source": "files"}), {"items": file})
        long = ABBREVIATIONS if config.source == "completejourney" else {}
        db.execute("SET VARIABLE households = 0")
        db.execute("SET VARIABLE long_form = map($1::VARCHAR[], $2::VARCHAR[])", [list(long), list(long.values())])
        db.execute(cleaning.WORDS)
        # no events choose among these items
        db.execute("CREATE TABLE lines AS SELECT item, 0 AS fault, 0 AS period FROM items LIMIT 0")
        db.execute("CREATE TABLE asked AS FROM lines")
        cleaning._items(db, [])
        found = [Item(*row) for row in db.execute("SELECT item, text, path FROM numbered ORDER BY row").fetchall()]
    if isinstance(known[0], str):
        return [Item(str(item.id), item.text, item.path) for item in found]
    if isinstance(found[0].id, str):
        other = next(item.id for item in found if not str(item.id).lstrip("-").isdecimal())
        raise ShipyardError(
            f"{file}: column item: not an integer", value=other, allowed="integers, as the release's ids are"
        )
    return found


class Catalogue:
    """A release's search on this machine: its bundle, its graph, and what rows of its catalogue are made of."""

    def __init__(self, release: Release, build: Path) -> None:
        self.artifact: Artifact = searched(release)
        self.bundle = artifact_folder(self.artifact, release, build)
        unit, joint = self.bundle.parents[1], build / release.profile / "joint"
        form = read_json(unit / "quantise" / "stage.json")["said"]["form"]
        self.search = Search(unit / "export", unit / "split", named(form["form"], form["precision"]))
        self.model = Model(self.bundle, read_json(self.bundle / MANIFEST), threads=1)
        learned = load_file(joint / "finetune" / "joint.safetensors")
        self._project = learned["project.weight"]
        self._identity = learned["tables.of_product.identity.weight"]
        self._items = pq.read_table(joint / "data" / "items.parquet", columns=["item", "text", "path"])
        self.row = {item: row for row, item in enumerate(self.model.answers, 1)}

    def rows(self, items: Sequence[Item]) -> Rows:
        """Return the rows of some items, new ones and such as the catalogue has."""
        texts, paths = [item.text for item in items], sorted({item.path for item in items})
        vectors = self.search.embed(self.model, [*texts, *paths])
        types = vectors[len(texts) :] @ self.search.state["head.match.weight"].T
        bias, place = self.search.state["bias"], {path: k for k, path in enumerate(paths, 1)}
        rows = np.array([self.row.get(item.id, 0) for item in items])
        return Rows(
            # row 0 of the ids' table is zero
            vectors[: len(texts)] @ self._project.T + self._identity[rows],
            np.where(rows > 0, bias[rows - 1], np.median(bias)).astype(np.float32),
            types / np.linalg.norm(types, axis=1, keepdims=True),
            np.array([place[item.path] for item in items]),
        )

    def check(self) -> None:
        """Make some rows of the catalogue anew and compare their scores with the release's.

        Raises:
            ShipyardError: they differ, so that a shard's scores would be of another scale.
        """
        rows = np.linspace(1, len(self.model.answers), CHECKED).astype(int)
        some = [Item(*line.values()) for line in self._items.take(rows - 1).to_pylist()]
        model = self.search.over(self.rows(some), self.model.returned)
        for golden in self.model.manifest["golden"]:
            # without a history: it names other rows in the one graph than in the other
            inputs = self.model.encode([{"query": golden["request"]["query"]}])
            [whole] = self.model.session.run(["logits"], inputs)
            error = float(np.abs(whole[0, rows] - logits(model, inputs)[0, 1:]).max() / np.abs(whole[0, 1:]).max())
            if not error <= TOLERANCE:
                raise ShipyardError(
                    f"{self.bundle}: rows of the catalogue, made anew, get other scores than the release gives them",
                    value=f"{error:.1e}", allowed=f"{TOLERANCE}, as a part of the largest",
                    mend="make the release again: what lies in the build folder is of another",
                )  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A shard on disk: the name that it is attested by, its bundle, what attests it, and its items, new and changed."""

    name: str
    bundle: Path
    attestation: str
    new: int
    changed: int


def make_shard(release: Release, file: Path, config: Data, key: Signer, build: Path) -> Shard:
    """Make the shard of a table of items for a release whose stages lie in `build`, and attest it.

    Raises:
        ShipyardError: the table breaks the schema, the key is not the release's, or the folder holds another release.
    """
    if key_id(key.public_key()) != release.signature.key_id:
        raise ShipyardError(
            "items: not the key that signed the release, and the runtimes trust that one alone",
            value=key_id(key.public_key()), allowed=release.signature.key_id, mend="--key",
        )  # fmt: skip
    catalogue = Catalogue(release, build)
    items = read_items(file, config, catalogue.model.answers)
    catalogue.check()
    name = shard_name(catalogue.artifact.name, catalogue.artifact.manifest)
    folder = catalogue.bundle.parents[1] / "items"
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model = catalogue.search.over(catalogue.rows(items), catalogue.model.returned)
    onnx.save(model, part / "model.onnx")
    shutil.copyfile(catalogue.bundle / "tokenizer.json", part / "tokenizer.json")
    ids = [item.id for item in items]
    write(part / "catalogue.json", json.dumps({"products": ids, "rows": None, "answers": None}, ensure_ascii=False))
    manifest = _document(catalogue.model, release, name, [item for item in ids if item in catalogue.row])
    manifest["golden"] = _golden(Model(part, manifest, threads=1), catalogue.model)
    digest = seal(part, manifest)
    whole = folder / digest[:16]
    shutil.rmtree(whole, ignore_errors=True)
    part.rename(whole)
    changed = len(manifest["replaces"])
    return Shard(name, whole, attest(name, digest, key, release.sequence), len(ids) - changed, changed)


def _document(search: Codec, release: Release, name: str, replaces: list[Id]) -> dict[str, Any]:
    """Return the manifest of a shard: search's, but for what is of its rows; a cross-encoder reads no shard."""
    told = {key: value for key, value in search.manifest.items() if key not in ("files", "golden")}
    return told | {
        "name": name, "model": "model.onnx", "catalogue": "catalogue.json", "tokenizer": "tokenizer.json", "rerank": None,
        "replaces": replaces, "facts": told["facts"] | {"release": release.version},
    }  # fmt: skip


def _golden(shard: Model, search: Model) -> list[dict[str, Any]]:
    asked = [golden["request"] for golden in search.manifest["golden"]]
    return [{"request": r, "answer": a} for r, a in zip(asked, shard.predict(asked), strict=True)]


def run(chosen: argparse.Namespace, fleet: Fleet, build: Path, key: Signer, reporter: Reporter) -> int:
    """Make a shard, and bring it to the fleet of this machine where that is up."""
    start = time.monotonic()
    path = chosen.release or newest(build)
    release = open_release(path)
    shard = make_shard(release, chosen.items, fleet.data, key, build)
    served = bring(release, load_keys(path.parent / "keys"), build, shard.bundle, shard.attestation)
    told = {"name": shard.name, "bundle": str(shard.bundle), "attestation": shard.attestation}
    # only now: the next `up` is to start what is known to serve
    write(shard.bundle.parent / CURRENT, json.dumps(told))
    for other in shard.bundle.parent.iterdir():
        if other.is_dir() and other != shard.bundle:
            shutil.rmtree(other)
    seconds = time.monotonic() - start
    where = f"served at {served}" if served else "to be served by the next shipyard up"
    reporter.line(f"items    {shard.new} new, {shard.changed} changed; {where}; {seconds:.1f} s")
    if chosen.json:
        print(
            json.dumps(
                told | {"new": shard.new, "changed": shard.changed, "served": served, "seconds": round(seconds, 1)}
            )
        )
    return 0
