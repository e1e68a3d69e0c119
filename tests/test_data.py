"""The data stage: what it removes, how it cuts time, and that the future cannot reach the past."""

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import ROOT

from models.config import Data, load_fleet
from serve.errors import ShipyardError
from shipyard.data import data, source_sha256
from shipyard.schema import working
from shipyard.sources import source_files

CONFIG = load_fleet(ROOT / "fleet.toml").data
OWN = CONFIG.model_copy(update={"source": "files", "folder": "own"})
HOUSEHOLDS = 120
VALID, TEST = str(CONFIG.valid_from), str(CONFIG.test_from)
JOURNEY = source_files(Data(source="completejourney", valid_from=CONFIG.valid_from, test_from=CONFIG.test_from))
TABLES = ("items", "events", "market", "searches")


def rows(folder: Path, query: str) -> list[tuple]:
    return duckdb.sql(query.format(path=folder)).fetchall()


def lines(said: dict[str, Any], table: str, rule: str) -> int:
    (found,) = [line["lines"] for line in said["report"] if (line["table"], line["rule"]) == (table, rule)]
    return found


@pytest.fixture(scope="module")
def promotions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundredth of the promotions, for the tests that are not about all of them."""
    path = tmp_path_factory.mktemp("promotions") / "promotions.parquet"
    duckdb.sql(f"COPY (FROM '{JOURNEY['promotions']}' WHERE product_id % 100 = 7) TO '{path}' (FORMAT parquet)")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own data, of 40 real households: purchases and views, two stores' promotions, searches with clicks."""
    folder = tmp_path_factory.mktemp("own")
    db = duckdb.connect(config={"threads": 2})
    db.execute(f"""
        CREATE TABLE bought AS
        SELECT household_id AS "user", product_id AS item, transaction_timestamp AS time, quantity, sales_value AS value,
               store_id AS place, basket_id AS basket
        FROM '{JOURNEY["transactions"]}' WHERE household_id <= 40;
        CREATE TABLE products AS FROM '{JOURNEY["products"]}'
        WHERE product_id IN (SELECT item FROM bought) OR product_id % 200 = 0;
    """)
    queries = {
        "items": """
            SELECT product_id AS item, coalesce(product_type, department) AS title,
                   concat_ws(' > ', department, product_category, product_type) AS category, brand, package_size AS size
            FROM products""",
        "events": """
            SELECT *, 'purchase' AS kind FROM bought
            UNION ALL SELECT * REPLACE (time - INTERVAL 5 MINUTE AS time), 'view' FROM bought WHERE item % 3 = 0""",
        "market": f"""
            SELECT product_id AS item, nullif(store_id, 292) AS place,
                   DATE '2016-12-26' + 7 * (week - 1)::INTEGER AS "from", DATE '2016-12-26' + 7 * week::INTEGER AS until,
                   (display_location <> '0')::INTEGER AS display, (mailer_location <> '0')::INTEGER / 2 AS mailer
            FROM '{JOURNEY["promotions"]}' WHERE product_id IN (SELECT product_id FROM products)
            AND (store_id = 292 OR store_id IN (SELECT place FROM bought)) AND product_id % 25 = 0""",
        "searches": """
            SELECT lower(product_type) AS query, item, 1 AS click, "user", time
            FROM bought JOIN products ON product_id = item WHERE item % 4 = 0 AND product_type IS NOT NULL""",
    }
    for name, query in queries.items():
        db.execute(f"COPY ({query} ORDER BY ALL) TO '{folder}/{name}.parquet' (FORMAT parquet)")
    return folder


@pytest.fixture(scope="module")
def said(own: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    return data(OWN, 0, out, own) | {"out": out}


def changed(own: Path, folder: Path, since: str, **queries: str) -> Path:
    """Write the source again, with everything from a date on altered by the queries."""
    shutil.copytree(own, folder, dirs_exist_ok=True)
    for name, query in queries.items():
        text = query.format(own=f"FROM '{own}/{name}.parquet'", since=f"'{since}'")
        duckdb.sql(f"COPY ({text}) TO '{folder}/{name}.parquet' (FORMAT parquet)")
    return folder


FUTURES = {
    "more": {
        # other users, ids of text, stores that open, baskets and searches of the past that go on, unknown items
        "events": """
            {own} UNION ALL BY NAME
            SELECT * REPLACE ("user" + 100000 AS "user", place + 7 AS place) {own} WHERE time >= {since} UNION ALL BY NAME
            SELECT * REPLACE ('x' || "user" AS "user", 'y' || place AS place, 'z' || basket AS basket) {own}
            WHERE time >= {since} UNION ALL BY NAME
            SELECT * REPLACE (TIMESTAMP {since} AS time) {own} WHERE time < {since} AND item % 2 = 0 UNION ALL BY NAME
            SELECT * REPLACE ('?' AS item) {own} WHERE time >= {since} AND item % 7 = 0""",
        "market": '{own} UNION ALL SELECT * REPLACE (1 AS display, 999 AS place) {own} WHERE "from" >= {since}',
        "searches": """
            {own} UNION ALL BY NAME
            SELECT * REPLACE ('a ' || query AS query, "user" + 100000 AS "user") {own} WHERE time >= {since}
            UNION ALL BY NAME SELECT * REPLACE (TIMESTAMP {since} AS time) {own} WHERE time < {since}""",
    },
    "fewer": {
        "events": "{own} WHERE time < {since} OR \"user\" % 3 = 0 AND kind = 'purchase'",
        "market": '{own} WHERE "from" < {since} OR item % 3 = 0',
        "searches": "{own} WHERE time < {since} OR item % 3 = 0",
    },
    "other": {
        "events": """
            SELECT * REPLACE (CASE WHEN time >= {since} THEN 9e8 ELSE quantity END AS quantity,
                              CASE WHEN time >= {since} THEN 9e8 ELSE value END AS value,
                              CASE WHEN time >= {since} THEN 1 ELSE place END AS place,
                              CASE WHEN time >= {since} THEN NULL ELSE basket END AS basket)
            FROM ({own} ORDER BY hash(time))""",
        "market": """
            SELECT * REPLACE (CASE WHEN "from" >= {since} THEN 1 ELSE display END AS display)
            FROM ({own} ORDER BY hash(item)) WHERE "from" < {since} OR place IS NULL""",
        "searches": "SELECT * REPLACE (CASE WHEN time >= {since} THEN 'q' ELSE query END AS query) {own}",
    },
}


@pytest.mark.parametrize("households", [0, 15])
@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("since", [VALID, TEST])
def test_future_does_not_reach_the_past(own: Path, tmp_path: Path, since: str, future: str, households: int) -> None:
    first, second, source = tmp_path / "first", tmp_path / "second", tmp_path / "source"
    first.mkdir(), second.mkdir()
    before = data(OWN, households, first, own)["digests"]
    after = data(OWN, households, second, changed(own, source, since, **FUTURES[future]))["digests"]
    past, later = ("items", "train"), ("validation", "test")
    if since == TEST:
        past, later = (*past, "validation"), later[1:]
    assert {name: before[name] for name in past} == {name: after[name] for name in past}
    assert all(before[name] != after[name] for name in later)


def test_future_of_the_sample_does_not_reach_its_past(promotions: Path, tmp_path: Path) -> None:
    source = tmp_path / "transactions.parquet"
    # the sample's days begin at midnight in New York, in November at 5:00 UTC
    duckdb.sql(f"""
        COPY (SELECT * REPLACE (
                CASE WHEN transaction_timestamp >= '{VALID} 05:00' THEN 1082185 ELSE product_id END AS product_id,
                CASE WHEN transaction_timestamp >= '{VALID} 05:00' THEN 1 ELSE store_id END AS store_id,
                CASE WHEN transaction_timestamp >= '{VALID} 05:00' THEN 5000 ELSE sales_value END AS sales_value)
              FROM '{JOURNEY["transactions"]}'
              WHERE transaction_timestamp < '{VALID} 05:00' OR household_id % 3 <> 0)
        TO '{source}' (FORMAT parquet)""")
    before = data(CONFIG, HOUSEHOLDS, tmp_path, files={"promotions": promotions})["digests"]
    after = data(CONFIG, HOUSEHOLDS, tmp_path, files={"promotions": promotions, "transactions": source})["digests"]
    assert (before["items"], before["train"]) == (after["items"], after["train"])
    assert before["validation"] != after["validation"]
    assert before["test"] != after["test"]


def test_csv_and_parquet_give_the_same_files(own: Path, said: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in TABLES:
        duckdb.sql(f"COPY (FROM '{own}/{name}.parquet') TO '{source}/{name}.csv' (HEADER)")
    again = data(OWN, 0, tmp_path, source)
    assert again["digests"] == said["digests"]
    assert again["report"] == said["report"]
    assert json.loads((tmp_path / "report.json").read_text()) == said["report"]


def test_two_runs_are_equal_to_the_byte(promotions: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        out.mkdir()
        data(CONFIG, HOUSEHOLDS, out, files={"promotions": promotions})
    names = sorted(path.name for path in first.iterdir())
    periods = ("test", "train", "validation")
    assert names == sorted([
        "items.parquet", "places.parquet", "users.parquet", "report.json",
        *(f"{kind}{period}.parquet" for kind in ("", "market-", "searches-") for period in periods),
    ])  # fmt: skip
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_all_of_the_journey(tmp_path: Path) -> None:
    said = data(CONFIG, 0, tmp_path)
    counts = said["counts"]
    assert counts["items"] == 91_679
    assert counts["users"] > 2_400
    assert sum(counts[period]["events"] for period in ("train", "validation", "test")) > 1_430_000
    assert sum(counts[period]["market"] for period in ("train", "validation", "test")) > 20_700_000
    assert counts["local"] > 10_000
    # each rule takes from what the one before left
    events = {line["rule"]: line["lines"] for line in said["report"] if line["table"] == "events"}
    removed = ("departments not shopped", "returned or given away", "no quantity", "unknown item", "duplicates merged")
    assert 1_469_307 - sum(events[rule] for rule in removed) == sum(events[f"{p} period"] for p in counts if p in (
        "train", "validation", "test"))  # fmt: skip
    # the calendar: every week of the source begins on a Monday, at midnight of the store's clock
    market = f"'{tmp_path}/market-*.parquet'"
    spans = rows(tmp_path, f"SELECT DISTINCT day_from, day_until FROM {market} ORDER BY ALL")
    assert spans == [(0, 1), *((day, day + 7) for day in range(1, 365, 7))]


def test_periods_are_cut_by_date(said: dict[str, Any]) -> None:
    out = said["out"]
    for name, first, last in (
        ("train", "2017-01-01", VALID), ("validation", VALID, TEST), ("test", TEST, "2018-01-02"),
    ):  # fmt: skip
        bounds = (
            f"date_diff('day', DATE '2017-01-01', DATE '{first}'), date_diff('day', DATE '2017-01-01', DATE '{last}')"
        )
        for table, column in (("", "day"), ("market-", "day_from"), ("searches-", "day")):
            low, high, least, most, count = rows(
                out, f"SELECT {bounds}, min({column}), max({column}), count(*) FROM '{{path}}/{table}{name}.parquet'"
            )[0]
            assert count > 0
            assert (low <= least or table == "market-") and most < high


def test_numbers_are_dense_and_in_the_order_of_time(said: dict[str, Any]) -> None:
    out = said["out"]
    for period in ("train", "validation", "test"):
        events = rows(out, f"SELECT \"user\", day, basket, row, kind FROM '{{path}}/{period}.parquet'")
        assert events == sorted(events)
        assert len({(user, basket, row, kind) for user, _, basket, row, kind in events}) == len(events)
    for column in ("user", "basket"):
        every = " UNION ALL ".join(f"FROM '{{path}}/{period}.parquet'" for period in ("train", "validation", "test"))
        firsts = rows(out, f'SELECT min(day), "{column}" FROM ({every}) GROUP BY ALL ORDER BY "{column}"')
        assert firsts == sorted(firsts)
        assert [number for _, number in firsts] == list(range(len(firsts)))
    assert [row for (row,) in rows(out, "SELECT row FROM '{path}/items.parquet'")] == list(
        range(1, said["counts"]["items"] + 1)
    )


SMALL = {
    "items": "item,title,category,brand,size\n1,Milk,dairy > milk > whole milk,Farm,1L\n2,Rye-Bread!,bakery > bread,,\n"
    "3,牛奶 — 1L,,農場,\n4,हिन्दी,food,,\n",
    "events": "user,item,time,kind,quantity,value,place,basket\n"
    "a,1,2017-01-05 10:00,purchase,1,2,north,k\na,1,2017-01-05 10:00,purchase,2,4.5,north,k\n"
    "a,1,2017-01-05 10:01,view,,,north,k\nb,2,2017-02-01,purchase,-1,-3,,\nb,2,2017-02-01,purchase,0,3,,\n"
    "b,2,2017-02-01,purchase,,,south,\nb,3,2017-02-02 12:00,cart,,0,,\nb,9,2017-02-02,cart,,,,\n"
    "a,2,2017-11-09,purchase,5000,1e6,north,k\nc,1,2017-12-01,click,,,,\nc,4,2017-12-01,search,,,east,\n",
    "market": "item,place,from,until,display,mailer,discount\n1,north,2017-01-02,2017-01-09,1,,\n"
    "1,north,2017-01-02,2017-01-09,0.5,0.25,\n1,,2017-01-02,2017-01-09,,,0.1\n2,east,2017-02-01,2017-02-08,1,,\n"
    "2,,2017-02-01,2017-02-08,0,,\n9,,2017-12-01,2017-12-08,1,,\n1,east,2017-12-01,2017-12-08,1,,\n",
    "searches": "query,item,gain,user,time\nMILK milk,1,1,a,2017-01-06\nmilk,1,0.5,a,2017-01-06\nmilk,3,1,c,\n"
    "bread,2,1,c,2017-12-02\n",
}  # fmt: skip


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (SMALL | texts).items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


def test_cleaning_of_each_kind(tmp_path: Path) -> None:
    said = data(OWN, 0, tmp_path, write(tmp_path / "own"))
    assert rows(tmp_path, "SELECT item, text, path, category, brand, local FROM '{path}/items.parquet'") == [
        (1, "milk whole dairy farm 1l", "milk whole", "milk", "Farm", True),
        (2, "rye bread bakery", "bread", "bakery", "", False),
        (3, "牛奶 1l 農場", "uncategorised", "uncategorised", "農場", False),
        (4, "हिन्दी food", "food", "food", "", False),
    ]
    # by its statistics, which leave NaN out, the file has none
    told = "CASE WHEN value::VARCHAR <> 'nan' THEN value END"
    events = f'SELECT "user", basket, row, day, kind, quantity, {told}, place FROM '
    assert rows(tmp_path, events + "'{path}/train.parquet'") == [
        (0, 0, 1, 4 + 10 / 24, 0, 3, 6.5, 0),
        (0, 0, 1, pytest.approx(4 + 601 / 1440), 3, 1, None, 0),
        (1, 1, 2, 31, 0, 1, None, 1),
        (1, 2, 3, 32.5, 1, 1, 0, -1),
    ]
    # the bounds are ten times what the train period has; the basket that goes on is another one
    assert rows(tmp_path, events + "'{path}/validation.parquet'") == [(0, 3, 2, 312, 0, 20, 45, 0)]
    assert rows(tmp_path, events + "'{path}/test.parquet'") == [
        (2, 4, 1, 334, 2, 1, None, -1),
        (2, 4, 4, 334, 4, 1, None, 2),
    ]
    assert rows(tmp_path, "FROM '{path}/market-train.parquet'") == [
        (-1, 1, 8, 1, 0, 0, pytest.approx(0.1)), (0, 1, 8, 1, 1, 0.25, 0)
    ]  # fmt: skip
    assert rows(tmp_path, "FROM '{path}/market-test.parquet'") == [(2, 334, 341, 1, 1, 0, 0)]
    assert rows(tmp_path, "SELECT query, row, gain, \"user\", day FROM '{path}/searches-train.parquet' WHERE row = 1") == [
        ("milk", 1, 1, 0, 5)
    ]  # fmt: skip
    assert rows(tmp_path, "FROM '{path}/users.parquet'") == [(0, "a"), (1, "b"), (2, "c")]
    assert rows(tmp_path, "FROM '{path}/places.parquet'") == [(0, "north"), (1, "south"), (2, "east")]
    for table, rule, count in (
        ("events", "returned or given away", 1), ("events", "no quantity", 1), ("events", "unknown item", 1),
        ("events", "outliers of quantity", 1), ("events", "outliers of value", 1), ("events", "duplicates merged", 1),
        ("items", "no category", 1), ("items", "items never sold", 2), ("market", "unknown item", 1),
        ("market", "no strength", 1), ("market", "place without events", 1), ("market", "duplicates merged", 1),
        ("searches", "duplicates merged", 1),
    ):  # fmt: skip
        assert lines(said, table, rule) == count, rule


def test_search_without_a_time_does_not_tell_of_a_later_user(tmp_path: Path) -> None:
    searches = "query,item,gain,user\n" + "".join(f"word{i},1,1,c\n" for i in range(60))
    said = data(OWN, 0, tmp_path, write(tmp_path / "own", searches=searches))
    users = [
        rows(tmp_path, f"SELECT DISTINCT \"user\" FROM '{{path}}/searches-{p}.parquet'") for p in ("train", "test")
    ]
    assert users == [[(-1,)], [(2,)]]
    assert 30 < said["counts"]["train"]["searches"] < 60


def test_searches_alone_are_a_source(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", searches="query,item,click\n" + "".join(f"word {i},1,1\n" for i in range(200)))
    for name in ("events", "market"):
        (folder / f"{name}.csv").unlink()
    whole, part = data(OWN, 0, tmp_path, folder), data(OWN, 5, tmp_path, folder)
    assert whole["counts"]["train"]["queries"] > 120
    assert [part["counts"][period]["queries"] for period in ("train", "validation", "test")] == [5, 5, 5]
    assert part["digests"]["items"] == whole["digests"]["items"]
    assert rows(tmp_path, "SELECT bool_and(local) FROM '{path}/items.parquet'") == [(True,)]


def test_a_sample_of_searches_alone_keeps_those_of_known_users(tmp_path: Path) -> None:
    rows = "".join(f"word {i},1,1,u{i}\n" for i in range(200))
    folder = write(tmp_path / "own", searches="query,item,click,user\n" + rows)
    (folder / "events.csv").unlink()
    counts = data(OWN, 5, tmp_path, folder)["counts"]
    assert [counts[period]["queries"] for period in ("train", "validation", "test")] == [5, 5, 5]


def test_times_with_a_zone_are_counted(tmp_path: Path) -> None:
    times = ("2017-01-05T10:00Z", "2017-01-05T10:00:00Z", "2017-11-09 10:00:00.5+02", "2017-12-01 10:00", "2017-12-01")
    events = "user,item,time,kind\n" + "".join(f"a,1,{time},cart\n" for time in times)
    said = data(OWN, 0, tmp_path, write(tmp_path / "own", events=events))
    assert lines(said, "events", "times with a zone") == 3
    assert lines(said, "searches", "times with a zone") == 0


def test_an_interrupt_is_one_and_a_full_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "own")
    # what DuckDB makes of Ctrl-C while it works; how soon it looks is its own
    with pytest.raises(KeyboardInterrupt), working():
        raise RuntimeError("Query interrupted")
    with pytest.raises(RuntimeError, match="another"), working():
        raise RuntimeError("another")
    few = "SET memory_limit = '4MB'; SET temp_directory = ''; CREATE TABLE t AS SELECT range FROM range(1000000)"
    monkeypatch.setattr("shipyard.data._choose", lambda db, *_: db.execute(few))
    with pytest.raises(ShipyardError, match=r"data: Out of Memory Error: .*; mend: give it more memory or disk"):
        data(OWN, 0, tmp_path, folder)


def test_table_of_other_items_is_an_error(tmp_path: Path) -> None:
    events = "user,item,time,kind\n" + "".join(f"a,{item},2017-01-05,cart\n" for item in ("1", "x8", "x9"))
    with pytest.raises(ShipyardError, match="events: column item: 2 of 3 rows name an item that items does not have"):
        data(OWN, 0, tmp_path, write(tmp_path / "own", events=events))


@pytest.mark.parametrize(("without", "told"), [("items", "a table is missing"), ("folder", "no such folder")])
def test_missing_source_is_an_error(tmp_path: Path, without: str, told: str) -> None:
    folder = write(tmp_path / "own")
    (folder / "items.csv").unlink()
    with pytest.raises(ShipyardError, match=told):
        data(OWN, 0, tmp_path, folder if without == "items" else tmp_path / "none")


def test_table_in_two_formats_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "items.parquet").touch()
    with pytest.raises(ShipyardError, match="items is there twice"):
        source_sha256(OWN, folder)


def test_texts_are_normalised(promotions: Path, tmp_path: Path) -> None:
    data(CONFIG, HOUSEHOLDS, tmp_path, files={"promotions": promotions})
    texts = [text for (text,) in rows(tmp_path, "SELECT DISTINCT text FROM '{path}/items.parquet'")]
    words = {word for text in texts for word in text.split()}
    assert all(text == text.lower().strip() for text in texts)
    assert all(len(text.split()) == len(set(text.split())) for text in texts)
    assert "frozen" in words
    assert not words & {"frzn", "frz", "pckgd", "mxs"}


def test_truncated_file_is_named(tmp_path: Path) -> None:
    for name, path in JOURNEY.items():
        cut = tmp_path / path.name
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ShipyardError, match=rf"{name}\.parquet: cannot be read.*mend: install"):
            data(CONFIG, HOUSEHOLDS, tmp_path, files={name: cut})


def test_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "products.parquet"
    duckdb.sql(f"COPY (SELECT * EXCLUDE product_type FROM '{JOURNEY['products']}') TO '{path}' (FORMAT parquet)")
    with pytest.raises(ShipyardError, match=r"products\.parquet: column product_type: missing"):
        data(CONFIG, HOUSEHOLDS, tmp_path, files={"products": path})


def test_empty_period_is_an_error(promotions: Path, tmp_path: Path) -> None:
    path = tmp_path / "transactions.parquet"
    duckdb.sql(f"COPY (FROM '{JOURNEY['transactions']}' WHERE transaction_timestamp < '2017-10-01') TO '{path}'")
    with pytest.raises(ShipyardError, match="no event in the validation period"):
        data(CONFIG, HOUSEHOLDS, tmp_path, files={"transactions": path, "promotions": promotions})


def test_value_that_is_no_number_is_counted(promotions: Path, tmp_path: Path) -> None:
    path = tmp_path / "transactions.parquet"
    duckdb.sql(f"""
        COPY (SELECT * REPLACE (CASE WHEN household_id % 5 = 0 THEN 'NaN'::DOUBLE ELSE sales_value END AS sales_value)
              FROM '{JOURNEY["transactions"]}') TO '{path}' (FORMAT parquet)""")
    said = data(CONFIG, HOUSEHOLDS, tmp_path, files={"transactions": path, "promotions": promotions})
    assert lines(said, "events", "value that is no number") > 100
