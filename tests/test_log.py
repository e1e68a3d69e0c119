"""A source that has a log of searches and no purchase: search learns from it, nothing else can."""

import json
from pathlib import Path

import duckdb
import pytest
from conftest import ROOT, TINY, shipyard

from serve.runtime import Model
from shipyard.sources import source_files


def write_shop(folder: Path) -> None:
    """Write items and a graded log of searches, made of the sample's own labels."""
    folder.mkdir()
    products = source_files_of_sample()["products"]
    db = duckdb.connect()
    db.execute(
        f"""CREATE TABLE items AS
        SELECT product_id AS item, product_type AS title, product_category || ' > ' || product_type AS category, brand
        FROM '{products}' WHERE product_category IS NOT NULL AND product_type IS NOT NULL
        QUALIFY dense_rank() OVER (ORDER BY md5(product_category || product_type)) <= 450
            AND row_number() OVER (PARTITION BY product_category, product_type ORDER BY product_id) <= 4"""
    )
    db.execute(
        """CREATE TABLE searches AS
        SELECT lower(a.title) AS query, b.item,
               CASE WHEN a.title = b.title THEN 'exact' ELSE 'substitute' END AS label
        FROM (SELECT DISTINCT title, category FROM items) a
        JOIN items b ON split_part(a.category, ' > ', 1) = split_part(b.category, ' > ', 1)"""
    )
    for name in ("items", "searches"):
        db.execute(f"COPY (FROM {name} ORDER BY ALL) TO '{folder / name}.parquet' (FORMAT parquet)")


def source_files_of_sample() -> dict[str, Path]:
    from models.config import load_fleet

    return dict(source_files(load_fleet(ROOT / "fleet.toml").data))


def fleet_of(tmp_path: Path, names: tuple[str, ...]) -> Path:
    """Return a fleet.toml whose data is the shop's, with some of the sub-models."""
    text = (ROOT / "fleet.toml").read_text() + TINY.replace(
        "test_examples = 100", "test_examples = 60\nrerank_steps = 30"
    )
    text = text.replace('source = "completejourney"', 'source = "files"\nfolder = "shop"')
    for name in ("search", "recommend", "recommend_types", "intent", "edge_recommend"):
        if name not in names:
            start = text.index(f"[submodel.{name}]")
            text = text[:start] + text[text.index("\n\n", start) + 2 :]
            text = "\n".join(line for line in text.split("\n") if not line.startswith(f"gate.{name} "))
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_search_learns_from_a_log_alone(tmp_path: Path) -> None:
    write_shop(tmp_path / "shop")
    fleet = fleet_of(tmp_path, ("search",))
    done = shipyard("bundle", "--fleet", fleet, "--profile", "tiny", "--build", tmp_path / "build", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "build/tiny/joint/evaluate/stage.json").read_text())["said"]
    assert "fusion" not in said
    score = said["submodels"]["search"]
    assert score["examples"] >= 20
    assert score["baseline_name"] == "BM25, popularity"
    assert score["after"]["value"] > 0.3
    assert "kinds" not in score
    assert set(score["queries"]) >= {"as written", "misspelt"}
    [golden, *_] = json.loads((tmp_path / "build/tiny/search/bundle/bundle/bundle.json").read_text())["golden"]
    assert golden["answer"]["products"]
    check_reader(tmp_path / "build/tiny/search")


def check_reader(folder: Path) -> None:
    """The cross-encoder was trained on the log, chosen on validation, and is in the bundle if its word counts."""
    said = json.loads((folder / "rerank/stage.json").read_text())["said"]
    training = said["training"]
    assert training["steps"] == 30 and training["loss_last"] < training["loss_first"]
    assert said["validation"]["reranked"] >= said["validation"]["search"] > 0.3
    assert said["examples"] >= 20 and said["parity"] <= 1e-4 and said["precision"] == "fp16"
    assert (said["over_search"]["value"] == 0) >= (said["weight"] == 0)
    manifest = json.loads((folder / "bundle/bundle/bundle.json").read_text())
    assert (manifest["rerank"] is not None) == (said["weight"] > 0)
    if manifest["rerank"] is None:
        return
    tree = folder / "bundle/bundle"
    assert (tree / "model_repository/search-reader/config.pbtxt").is_file()
    model = Model(tree, manifest)
    [products] = [answer["products"] for answer in model.predict([manifest["golden"][0]["request"] | {"k": 40}])]
    scores = [product["score"] for product in products]
    assert scores == sorted(scores, reverse=True)
    assert scores[said["depth"] - 1] >= 1 and scores[said["depth"]] <= 1
    model.self_test()


def test_what_needs_purchases_says_so(tmp_path: Path) -> None:
    write_shop(tmp_path / "shop")
    fleet = fleet_of(tmp_path, ("search", "recommend"))
    done = shipyard("finetune", "--fleet", fleet, "--profile", "tiny", "--build", tmp_path / "build")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: finetune: nothing for recommend to learn from")


@pytest.mark.parametrize("name", ["items", "searches"])
def test_shop_is_refused_when_a_table_is_damaged(tmp_path: Path, name: str) -> None:
    write_shop(tmp_path / "shop")
    path = tmp_path / "shop" / f"{name}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    done = shipyard("data", "--fleet", fleet_of(tmp_path, ("search",)), "--profile", "tiny", "--build", tmp_path / "b")
    assert done.returncode == 1
    assert f"{name}.parquet" in done.stderr.splitlines()[-1]
