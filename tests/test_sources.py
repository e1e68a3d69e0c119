"""Sources that bring a schema of their own: Amazon's Shopping Queries in its layout, the journey's promotion codes."""

from pathlib import Path

import duckdb
import pytest
from conftest import ROOT

from models.config import Data, load_fleet
from serve.errors import ShipyardError
from shipyard.data import data, source_sha256
from shipyard.sources import DISPLAYS, MAILERS, open_source, source_files

JOURNEY = load_fleet(ROOT / "fleet.toml").data.model_copy(update={"source": "completejourney", "folder": None})
ESCI = JOURNEY.model_copy(update={"source": "esci", "folder": "esci"})


def esci(folder: Path, examples: str = "", products: str = "") -> Path:
    """Write a few real-looking lines in the published layout: 60 queries for training, 6 for the test."""
    duckdb.sql(f"""
        COPY (SELECT i * 10 + j AS example_id, 'query ' || i AS query, i AS query_id, 'B00' || (i + j) % 50 AS product_id,
                     CASE WHEN i = 7 THEN 'jp' ELSE 'us' END AS product_locale, ['E', 'S', 'C', 'I'][j + 1] AS esci_label,
                     1 AS small_version, 1 AS large_version, CASE WHEN i < 60 THEN 'train' ELSE 'test' END AS split
              FROM range(66) q(i), range(4) p(j) {examples})
        TO '{folder}/shopping_queries_dataset_examples.parquet' (FORMAT parquet);
        COPY (SELECT 'B00' || i AS product_id, CASE WHEN i <> 3 THEN 'cable ' || i || ' ケーブル' END AS product_title,
                     'long' AS product_description, 'points' AS product_bullet_point,
                     CASE WHEN i % 2 = 0 THEN 'Anker' END AS product_brand, 'Black' AS product_color,
                     locale AS product_locale FROM range(50) p(i), (VALUES ('us'), ('jp')) l(locale) {products})
        TO '{folder}/shopping_queries_dataset_products.parquet' (FORMAT parquet)""")
    return folder


def rows(folder: Path, query: str) -> list[tuple]:
    return duckdb.sql(query.format(path=folder)).fetchall()


def test_shopping_queries_become_searches(tmp_path: Path) -> None:
    said = data(ESCI, 0, tmp_path, esci(tmp_path))
    counts = [said["counts"][period]["queries"] for period in ("train", "validation", "test")]
    assert sum(counts[:2]) == 59
    assert counts[1] > 0
    assert counts[2] == 6
    assert rows(
        tmp_path, "SELECT text, path, brand, local FROM '{path}/items.parquet' WHERE item IN ('B003', 'B004')"
    ) == [
        ("b003 black", "uncategorised", "", True),
        ("cable 4 ケーブル anker black", "anker", "Anker", True),
    ]
    gains = (
        "SELECT query, item, round(gain, 4) FROM '{path}/searches-test.parquet' JOIN '{path}/items.parquet' USING (row)"
    )
    assert rows(tmp_path, gains + " WHERE query = 'query 60' ORDER BY gain DESC") == [
        ("query 60", "B0010", 1.0), ("query 60", "B0011", pytest.approx(0.1)), ("query 60", "B0012", pytest.approx(0.01)),
        ("query 60", "B0013", 0.0),
    ]  # fmt: skip
    assert rows(tmp_path, "SELECT count(*) FROM '{path}/train.parquet'") == [(0,)]
    assert source_sha256(ESCI, tmp_path) != source_sha256(JOURNEY)


def test_test_queries_do_not_reach_the_training_ones(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    before = data(ESCI, 0, tmp_path, esci(tmp_path))["digests"]
    after = data(ESCI, 0, tmp_path, esci(tmp_path / "other", "WHERE i <> 62 AND (i < 60 OR j < 2)"))["digests"]
    assert [name for name in before if before[name] != after[name]] == ["test"]


@pytest.mark.parametrize(
    ("examples", "products", "told"),
    [
        (
            "UNION ALL SELECT 1, 'q', 1, 'B001', 'us', 'X', 1, 1, 'test'",
            "",
            "examples.*column esci_label, row 265: unknown",
        ),
        (
            "UNION ALL SELECT 1, 'q', 1, 'B001', 'us', 'E', 1, 1, 'dev'",
            "",
            "column split, row 265: unknown; value: 'dev'",
        ),
        ("UNION ALL SELECT 1, NULL, 1, 'B001', 'us', 'E', 1, 1, 'test'", "", "column query, row 265: empty"),
        ("", "UNION ALL SELECT 'B001', 'a', '', '', '', '', 'us'", "column product_id, row 101: twice; value: 'B001'"),
        ("", "WHERE locale = 'jp'", "products.*: no rows"),
    ],
)
def test_fault_is_named_by_the_file_s_own_column(tmp_path: Path, examples: str, products: str, told: str) -> None:
    with pytest.raises(ShipyardError, match=told):
        data(ESCI, 0, tmp_path, esci(tmp_path, examples, products))


def test_missing_file_and_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShipyardError, match=r"shopping_queries_dataset_examples\.parquet: missing; mend: download"):
        data(ESCI, 0, tmp_path, tmp_path)
    path = esci(tmp_path) / "shopping_queries_dataset_examples.parquet"
    duckdb.sql(f"COPY (SELECT * EXCLUDE esci_label FROM '{path}') TO '{path}.new' (FORMAT parquet)")
    Path(f"{path}.new").replace(path)
    with pytest.raises(ShipyardError, match=r"examples\.parquet: column esci_label: missing"):
        data(ESCI, 0, tmp_path, tmp_path)


def test_every_code_of_the_promotions_has_a_strength() -> None:
    path = source_files(JOURNEY)["promotions"]
    for column, strengths in (("display_location", DISPLAYS), ("mailer_location", MAILERS)):
        codes = {code for (code,) in duckdb.sql(f"SELECT DISTINCT {column} FROM '{path}'").fetchall()}
        assert codes == strengths.keys()


def test_weeks_of_the_promotions_are_those_of_the_purchases() -> None:
    db = duckdb.connect(config={"threads": 2})
    open_source(db, JOURNEY, source_files(JOURNEY))
    wrong = db.execute("""
        WITH weeks AS (SELECT DISTINCT "from", until FROM market),
             bought AS (SELECT timezone('America/New_York', timezone('UTC', transaction_timestamp)) AS time, week
                        FROM journey_transactions)
        SELECT count(*) FROM bought
        WHERE (SELECT count(*) FROM weeks WHERE time >= "from" AND time < until
               AND week = 1 + date_diff('day', DATE '2016-12-26', "from") // 7) <> 1
    """).fetchall()
    assert wrong == [(0,)]


def test_folder_belongs_to_the_sources_without_a_package() -> None:
    dates = {"valid_from": JOURNEY.valid_from, "test_from": JOURNEY.test_from}
    assert Data(source="completejourney", **dates).folder is None
    for source, folder in (("completejourney", "x"), ("esci", None), ("files", None)):
        with pytest.raises(ValueError, match="folder"):
            Data(source=source, folder=folder, **dates)
