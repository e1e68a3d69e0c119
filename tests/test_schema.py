"""A user's own data: what is accepted, and how each fault is told."""

import datetime
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from models.config import load_fleet
from serve.errors import ShipyardError
from shipyard.sources import open_source, source_files

OWN = load_fleet(ROOT / "fleet.toml").data.model_copy(update={"source": "files", "folder": "own"})

ITEMS = "item,title,category,brand,size\n1,whole milk,dairy > milk > whole,Farm,1 l\n2,rye bread,bakery > bread,,\n"
EVENTS = "user,item,time,kind,quantity,value,place\n7,1,2024-01-02 10:00:00,purchase,1,2.5,3\n7,2,2024-01-03,view,,,\n"
MARKET = (
    "item,place,from,until,display,mailer,discount\n1,3,2024-01-01,2024-01-08,1,0,0.2\n2,,2024-01-01,2024-01-08,,,0.1\n"
)
SEARCHES = "query,item,label,user,time\nmilk,1,exact,7,2024-01-02\nmilk,2,irrelevant,,\n"
WHOLE = {"items": ITEMS, "events": EVENTS, "market": MARKET, "searches": SEARCHES}


def opened(folder: Path) -> duckdb.DuckDBPyConnection:
    db = duckdb.connect(config={"threads": 2})
    open_source(db, OWN, source_files(OWN, folder))
    return db


def read(folder: Path, **texts: str | bytes) -> duckdb.DuckDBPyConnection:
    for name, text in (WHOLE | texts).items():
        (folder / f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return opened(folder)


def test_tables_have_every_column_and_its_type(tmp_path: Path) -> None:
    db = read(tmp_path)
    (first, second) = db.execute("FROM events").fetchall()
    assert (first[0], first[1], str(first[2]), *first[3:]) == (
        "7", 1, "2024-01-02 10:00:00", "purchase", 1.0, 2.5, "3", None
    )  # fmt: skip
    assert (str(second[2]), *second[3:]) == ("2024-01-03 00:00:00", "view", None, None, None, None)
    assert db.execute("SELECT query, item, gain FROM searches").fetchall() == [("milk", 1, 1.0), ("milk", 2, 0.0)]
    assert db.execute("SELECT place, display, discount FROM market").fetchall() == [("3", 1.0, 0.2), (None, None, 0.1)]


def test_example_of_the_documentation_is_accepted(tmp_path: Path) -> None:
    (block,) = [part for part in (ROOT / "docs/data.md").read_text().split("```") if part.startswith("\nitems.csv")]
    for table in block.strip().split("\n\n"):
        name, text = table.split(maxsplit=1)
        (tmp_path / name).write_text("\n".join(line.strip() for line in text.splitlines()))
    db = opened(tmp_path)
    assert [db.table(name).shape[0] for name in WHOLE] == [2, 2, 2, 2]


@pytest.mark.parametrize("judged", ["gain\nmilk,1,0.5\n", "click\nmilk,1,1\n", "label\nmilk,1,S\n"])
def test_each_kind_of_judgement_becomes_a_gain(tmp_path: Path, judged: str) -> None:
    (gain,) = read(tmp_path, searches=f"query,item,{judged}").execute("SELECT gain FROM searches").fetchall()[0]
    assert gain == {"g": 0.5, "c": 1.0, "l": 0.1}[judged[0]]


def test_text_of_any_script_passes_in_normal_form(tmp_path: Path) -> None:
    # half of it is full width, which NFKC makes plain; with a byte order mark, quotes, a line break in a field
    items = '\ufeffitem,title,category,brand\r\n1,"牛奶 ""全脂"", \uff11 ㎏\n大",食品 > 乳品,"\uff26arm, 農場"\r\n'
    items += "2,हिन्दी ไทย,x,\r\n"
    found = read(tmp_path, items=items).execute("SELECT title, category, brand FROM items").fetchall()
    assert found == [('牛奶 "全脂", 1 kg\n大', "食品 > 乳品", "Farm, 農場"), ("हिन्दी ไทย", "x", None)]


def test_times_with_a_zone_become_utc(tmp_path: Path) -> None:
    times = ("2024-01-02T10:00:00Z", "2024-01-02 10:00:00+02:00", "2024-01-02T10:00")
    events = "user,item,time,kind\n" + "".join(f"7,1,{time},cart\n" for time in times)
    found = read(tmp_path, events=events).execute("SELECT strftime(time, '%H:%M') FROM events").fetchall()
    assert found == [("10:00",), ("08:00",), ("10:00",)]


def test_ids_are_text_unless_all_items_are_integers(tmp_path: Path) -> None:
    db = read(tmp_path, items=ITEMS + "007,butter,dairy,,\n", events=EVENTS + "ünal,007,2024-01-02,cart,,,\n")
    assert db.execute('SELECT "user", item FROM events').fetchall() == [("7", "1"), ("7", "2"), ("ünal", "007")]
    # what is no integer cannot be one of the items; the cleaning counts it
    db = read(tmp_path, events=EVENTS + "8,007,2024-01-02,cart,,,\n8,x,2024-01-02,cart,,,\n")
    assert db.execute("SELECT item FROM events").fetchall() == [(1,), (2,), (None,), (None,)]


FAULTS = {
    "missing column": ("items", "item,category\n1,x\n", r"items\.csv: column title: missing"),
    "unknown column": ("items", "item,titel,category\n1,a,x\n", r'column titel: unknown.*did you mean "title"\?'),
    "another separator": ("items", "item;title;category\n1;a;x\n", "unknown.*separate columns by commas"),
    "a column of the reader's own": ("events", "user,item,time,kind,line\n7,1,2024-01-02,cart,9\n", "column line: unknown"),
    "column without a name": ("items", "item,title,category,\n1,a,x,\n", "a column without a name of its own"),
    "column twice": ("items", "item,title,title,category\n1,a,b,x\n", "a column without a name of its own"),
    "column twice, but for case": ("items", "item,title,category,Title\n1,a,x,b\n", "a column without a name of its own"),
    "blank first line": ("events", "\n" + EVENTS, r"events\.csv: empty first line; mend: begin with a header"),
    "no rows": ("events", "user,item,time,kind\n", r"events\.csv: no rows"),
    "no header": ("events", "", r"events\.csv: empty"),
    "item twice": ("items", ITEMS + "1,cream,dairy,,\n", r"column item, row 3: twice; value: 1; .*row 1 has it too"),
    "null id": ("items", ITEMS + ",cream,dairy,,\n", "column item, row 3: empty"),
    "null user": ("events", EVENTS + " ,1,2024-01-02,cart,,,\n", "column user, row 3: empty"),
    "no title": ("items", ITEMS + "3,,dairy,,\n", "column title, row 3: empty"),
    "endless title": ("items", f"{ITEMS}3,{'x' * 10_001},dairy,,\n", "column title, row 3: too long.*at most 10000"),
    "time": ("events", EVENTS + "7,1,2024-13-02,cart,,,\n", "column time, row 3: not a time; value: '2024-13-02'.*as 2017"),
    "time out of range": ("events", EVENTS + "7,1,9999-01-01,cart,,,\n", "column time, row 3: out of range"),
    "endless time": ("events", EVENTS + "7,1,infinity,cart,,,\n", "column time, row 3: (out of range|not a time)"),
    "kind": ("events", EVENTS + "7,1,2024-01-02,purchse,,,\n", 'row 3: unknown; value: .purchse.*did you mean "purchase"'),
    "number": ("events", EVENTS + '7,1,2024-01-02,cart,"1,5",,\n', "column quantity, row 3: not a number; value: '1,5'"),
    "nan": ("events", EVENTS + "7,1,2024-01-02,cart,nan,,\n", "column quantity, row 3: not a finite number"),
    "inf": ("events", EVENTS + "7,1,2024-01-02,cart,,-inf,\n", "column value, row 3: not a finite number"),
    "huge": ("events", EVENTS + "7,1,2024-01-02,cart,,1e30,\n", r"column value, row 3: out of range; .*to 1e\+09"),
    "share": ("market", MARKET + "1,,2024-01-01,2024-01-08,,,20\n", "column discount, row 3: out of range.*from 0 to 1"),
    "until": ("market", MARKET + "1,,2024-01-08,2024-01-08,1,,\n", "column until, row 3: not after from"),
    "date with a zone": ("market", MARKET + "1,,2024-01-29T00:00+08:00,2024-02-05,,,1\n", "column from, row 3: not a date"),
    "date with a time": ("market", MARKET + "1,,2024-01-29,2024-02-05 18:00,,,1\n", "column until, row 3: not a date"),
    "label": ("searches", SEARCHES + "milk,1,exakt,,\n", 'column label, row 3: unknown.*did you mean "exact"'),
    "two judgements": ("searches", "query,item,gain,click\na,1,1,1\n", "not one judgement; value: 'gain, click'"),
    "no judgement": ("searches", "query,item\na,1\n", "not one judgement; value: 'none'"),
    "too many fields": ("events", EVENTS + "7,1,2024-01-02,cart,1,1,1,1\n", "cannot be read: CSV Error on Line: 4"),
    "too few fields": ("events", EVENTS + "7,1,2024-01-02\n", "cannot be read: CSV Error on Line: 4"),
    "open quote": ("items", ITEMS + '3,"cream,dairy,,\n4,x,y,,\n', r"items\.csv: cannot be read: a quote"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_told_with_its_place_and_mend(tmp_path: Path, case: str) -> None:
    table, text, told = FAULTS[case]
    with pytest.raises(ShipyardError, match=told):
        read(tmp_path, **{table: text})


@pytest.mark.parametrize(
    "text", [ITEMS.encode("utf-16"), ITEMS.encode() + "3,Käse,x,,\n".encode("latin-1"), b"\0\1\2\xff"]
)
def test_bytes_that_are_no_utf8_are_an_error(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ShipyardError, match=r"items\.csv: (cannot be read|header|column)"):
        read(tmp_path, items=text)


def test_first_row_at_fault_is_told_in_a_long_file(tmp_path: Path) -> None:
    many = "".join(f'{i},"note\n{i}",2024-01-02,{"gift" if i > 70_000 else "view"}\n' for i in range(1, 90_000))
    with pytest.raises(ShipyardError, match="column kind, row 70001: unknown; value: 'gift'"):
        read(tmp_path, events="user,item,time,kind\n" + many)


def parquet(folder: Path, query: str) -> None:
    (folder / "items.csv").write_text(ITEMS)
    duckdb.sql(f"COPY ({query}) TO '{folder}/events.parquet' (FORMAT parquet)")
    opened(folder)


EVENT = "7 AS \"user\", 1 AS item, now() AS time, 'cart' AS kind"


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (f"SELECT * REPLACE (7.5 AS \"user\") FROM (SELECT {EVENT})", "column user: wrong type; value: 'DECIMAL'"),
        (f"SELECT * REPLACE (1704103200 AS time) FROM (SELECT {EVENT})", "column time: wrong type.*timestamps"),
        (f"SELECT {EVENT}, 'NaN'::DOUBLE AS value", "column value, row 1: not a finite number"),
        (f"SELECT {EVENT} UNION ALL SELECT 7, NULL, now(), 'cart'", "column item, row 2: empty"),
        (f"SELECT {EVENT}, [1] AS quantity", "column quantity: wrong type"),
        (f"SELECT {EVENT}, 3.0::DOUBLE AS place", r"column place: wrong type.*mend: .*astype\(\"Int64\"\)"),
        (f"SELECT {EVENT}, 3 AS line", "column line: unknown"),
    ],
)  # fmt: skip
def test_parquet_is_held_to_the_same(tmp_path: Path, query: str, told: str) -> None:
    with pytest.raises(ShipyardError, match=told):
        parquet(tmp_path, query)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_a_file_has_no_statistics_of_is_found(tmp_path: Path, value: float) -> None:
    parquet(tmp_path, f"SELECT {EVENT}")
    path = tmp_path / "events.parquet"
    table = pa.concat_tables([pq.read_table(path)] * 3)
    pq.write_table(table.append_column("value", pa.array([1.0, value, 2.0])), path)
    with pytest.raises(ShipyardError, match="column value, row 2: not a finite number"):
        opened(tmp_path)


def test_columns_as_pandas_writes_them_are_accepted(tmp_path: Path) -> None:
    # times with a zone are of nanoseconds, and a column without any value has no type
    times = pa.array([datetime.datetime(2024, 1, 2, 10)], pa.timestamp("ns", "Asia/Shanghai"))
    columns = {"user": [7], "item": [1], "time": times, "kind": ["cart"], "place": pa.nulls(1), "value": pa.nulls(1)}
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    (tmp_path / "items.csv").write_text(ITEMS)
    found = opened(tmp_path).execute("SELECT time::VARCHAR, place, value FROM events").fetchall()
    assert found == [("2024-01-02 10:00:00", None, None)]


@pytest.mark.parametrize("folder", ["data[1]", "data*", "user=5"])
def test_no_character_of_a_folder_is_a_pattern(tmp_path: Path, folder: str) -> None:
    for name in ("data1", folder):
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.csv").write_text(ITEMS.replace("whole milk", name))
        events = f"SELECT '{name}' AS \"user\", 1 AS item, now() AS time, 'cart' AS kind"
        duckdb.sql(f"COPY ({events}) TO '{tmp_path / name}/events.parquet' (FORMAT parquet)")
    db = opened(tmp_path / folder)
    assert db.execute('SELECT title, "user" FROM items, events WHERE items.item = events.item').fetchall() == [
        (folder,) * 2
    ]


@pytest.mark.parametrize(
    "name",
    ["market.csv.gz", "Market.csv", "events-2.csv", "search.csv", "market.parquet/0.parquet", "events/0", "items.xls"],
)
def test_what_was_meant_as_a_table_is_not_left_out(tmp_path: Path, name: str) -> None:
    read(tmp_path)
    (tmp_path / "market.csv").unlink()
    for other in ("README.md", ".events.csv.swp", "_SUCCESS"):
        (tmp_path / other).touch()
    opened(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(
        ShipyardError, match=rf"{re.escape(name.split('/')[0])}: no table of this name; .*mend: rename it"
    ):
        opened(tmp_path)


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    parquet(tmp_path, f"SELECT {EVENT} FROM range(5000)")
    path = tmp_path / "events.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ShipyardError, match=r"events\.parquet: cannot be read"):
        opened(tmp_path)
