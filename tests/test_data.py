"""The data stage: what it removes, how it cuts time, and that the future cannot reach the past."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
from conftest import ROOT, Made

from models.behaviour import TEST, TRAIN, VALIDATION, load_behaviour
from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard.data import data, source_files

CONFIG = load_fleet(ROOT / "fleet.toml").data
HOUSEHOLDS = 120


def rows(path: Path, query: str) -> list[tuple]:
    return duckdb.sql(query.format(path=path)).fetchall()


def test_report_counts_add_up(small: Made) -> None:
    report = small.said("joint", "data")
    assert report["transactions"] == 1_469_307
    assert report["products"] == 92_331
    assert report["chosen"] == small.fleet.profile["small"].households
    assert report["events"] == sum(report[f"events: {p}"] for p in ("train", "validation", "test"))
    assert report["removed: returned or given away (value of 0 or less)"] > 0
    assert report["local items"] > 100


def test_all_items_of_the_sample_are_kept(tmp_path: Path) -> None:
    report = data(CONFIG, 0, tmp_path)
    assert report["items"] == report["catalogue"] > 91_000
    assert report["events"] > 1_430_000
    behaviour = load_behaviour(tmp_path)
    assert len(np.unique(behaviour.household)) > 2_400


def test_periods_are_cut_by_date(small: Made) -> None:
    behaviour = load_behaviour(small.folder("joint", "data"))
    day = behaviour.day[behaviour.start[:-1]]
    first = np.datetime64("2017-01-01")
    valid, test = ((np.datetime64(d) - first).astype(int) for d in (CONFIG.valid_from, CONFIG.test_from))
    assert (behaviour.period == np.where(day < valid, TRAIN, np.where(day < test, VALIDATION, TEST))).all()


def test_input_of_an_example_is_older_than_its_answer(small: Made) -> None:
    behaviour = load_behaviour(small.folder("joint", "data"))
    for basket in behaviour.first_baskets(TEST)[:50].tolist():
        bought, days = behaviour.past(basket)
        start, end = behaviour.start[basket], behaviour.start[basket + 1]
        assert (days >= 0).all()
        assert len(set(behaviour.household[behaviour.born[basket] : end])) == 1
        assert len(bought) == start - behaviour.born[basket]
        assert len(set(behaviour.day[start:end])) == 1


def change_future(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Write the source again with everything from the validation period on altered: products, stores, lines left out."""
    changed = dict(files) | {"transactions": folder / "transactions.parquet"}
    duckdb.sql(f"""
        COPY (SELECT * REPLACE (
                CASE WHEN transaction_timestamp >= '{CONFIG.valid_from}' THEN 1082185 ELSE product_id END AS product_id,
                CASE WHEN transaction_timestamp >= '{CONFIG.valid_from}' THEN 1 ELSE store_id END AS store_id)
              FROM '{files["transactions"]}'
              WHERE transaction_timestamp < '{CONFIG.valid_from}' OR household_id % 3 <> 0)
        TO '{changed["transactions"]}' (FORMAT parquet)""")
    return changed


def test_future_does_not_reach_the_past(tmp_path: Path) -> None:
    files = source_files(CONFIG.source)
    first, second, source = (tmp_path / name for name in ("first", "second", "source"))
    for folder in (first, second, source):
        folder.mkdir()
    data(CONFIG, HOUSEHOLDS, first, files)
    data(CONFIG, HOUSEHOLDS, second, change_future(files, source))
    past = "SELECT * FROM '{path}/events.parquet' WHERE period = 0 ORDER BY ALL"
    future = "SELECT * FROM '{path}/events.parquet' WHERE period > 0 ORDER BY ALL"
    assert rows(first, past) == rows(second, past)
    assert rows(first, future) != rows(second, future)
    assert rows(first, "SELECT * FROM '{path}/items.parquet' ORDER BY ALL") == rows(
        second, "SELECT * FROM '{path}/items.parquet' ORDER BY ALL"
    )
    assert (load_behaviour(first).popularity == load_behaviour(second).popularity).all()


def test_texts_are_normalised(small: Made) -> None:
    items = small.folder("joint", "data")
    texts = [text for (text,) in rows(items, "SELECT DISTINCT text FROM '{path}/items.parquet'")]
    words = {word for text in texts for word in text.split()}
    assert all(text == text.lower().strip() for text in texts)
    assert all(len(text.split()) == len(set(text.split())) for text in texts)
    assert "frozen" in words
    assert not words & {"frzn", "frz", "pckgd", "mxs"}


def damaged(tmp_path: Path, name: str) -> dict[str, Path]:
    files = dict(source_files(CONFIG.source))
    files[name] = tmp_path / f"{name}.parquet"
    return files


def test_truncated_file_is_named(tmp_path: Path) -> None:
    files = damaged(tmp_path, "transactions")
    whole = source_files(CONFIG.source)["transactions"].read_bytes()
    files["transactions"].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShipyardError, match=r"transactions\.parquet: cannot be read"):
        data(CONFIG, HOUSEHOLDS, tmp_path, files)


def test_missing_column_is_named(tmp_path: Path) -> None:
    files = damaged(tmp_path, "products")
    source = source_files(CONFIG.source)["products"]
    duckdb.sql(f"COPY (SELECT * EXCLUDE product_type FROM '{source}') TO '{files['products']}' (FORMAT parquet)")
    with pytest.raises(ShipyardError, match=r"products\.parquet: column product_type: missing"):
        data(CONFIG, HOUSEHOLDS, tmp_path, files)


def test_empty_period_is_an_error(tmp_path: Path) -> None:
    files = damaged(tmp_path, "transactions")
    source = source_files(CONFIG.source)["transactions"]
    duckdb.sql(f"COPY (FROM '{source}' WHERE transaction_timestamp < '2017-10-01') TO '{files['transactions']}'")
    with pytest.raises(ShipyardError, match="no event in the validation period"):
        data(CONFIG, HOUSEHOLDS, tmp_path, files)


def test_nan_and_chinese_text(tmp_path: Path) -> None:
    files = damaged(tmp_path, "products")
    source = source_files(CONFIG.source)["products"]
    duckdb.sql(f"""
        COPY (SELECT * REPLACE (CASE WHEN product_type LIKE '%MILK%' THEN '牛奶 — 1L' ELSE product_type END
                                AS product_type) FROM '{source}')
        TO '{files["products"]}' (FORMAT parquet)""")
    transactions = tmp_path / "transactions.parquet"
    shutil.copy(files["transactions"], transactions)
    duckdb.sql(f"""
        COPY (SELECT * REPLACE (CASE WHEN household_id % 50 = 0 THEN 'NaN'::DOUBLE ELSE sales_value END AS sales_value)
              FROM '{source_files(CONFIG.source)["transactions"]}') TO '{transactions}' (FORMAT parquet)""")
    report = data(CONFIG, 0, tmp_path, files | {"transactions": transactions})
    assert report["removed: value that is no number"] > 1000
    texts = " ".join(text for (text,) in rows(tmp_path, "SELECT text FROM '{path}/items.parquet'"))
    assert "牛奶 1l" in texts
