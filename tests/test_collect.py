"""From the gateway's journal to training data: each record once, and the data stage takes what comes out."""

import asyncio
import gzip
import json

import duckdb
import pytest
from conftest import ROOT

from models.config import load_fleet
from serve.errors import ShipyardError
from serve.feedback import Journal, events, files
from shipyard.collect import collect
from shipyard.data import data

OWN = load_fleet(ROOT / "fleet.toml").data.model_copy(update={"source": "files", "folder": "own"})


def impression(request_id, query, items, user="u1"):
    return {"kind": "impression", "request_id": request_id, "user": user, "time": "2017-06-01 10:00:00", "place": "p",
            "route": "search" if query else "recommend", "query": query, "items": items}  # fmt: skip


def feedback(request_id, item, kind="click", user="u1", **more):
    told = {"request_id": request_id, "user": user, "events": [{"item": item, "kind": kind, **more}]}
    return [record | {"time": "2017-06-01 10:01:00"} for record in events(told)]


def write(folder, *records):
    async def go():
        journal = Journal(files(folder), prompt=True)
        await journal.write(records, durable=True)
        await journal.close()

    asyncio.run(go())


@pytest.fixture
def journal(tmp_path):
    write(
        tmp_path / "journal",
        impression("r1", 'milk, "2 %"\t牛奶\n', [11, 12, 13]),
        impression("r2", None, [14]),
        *feedback("r1", 12),
        *feedback("r1", 12),
        *feedback("r1", 13, "purchase", quantity=2, value=3.5, basket="b1"),
        *feedback("r2", 14, "cart", user="u2"),
    )
    return tmp_path / "journal"


def test_each_record_becomes_its_rows(journal, tmp_path):
    counts = collect(journal, tmp_path / "own")
    assert counts == {"unreadable": 0, "events": 3, "searches": 3}
    searches = duckdb.sql(f"SELECT query, item, click FROM '{tmp_path}/own/searches.parquet' ORDER BY item").fetchall()
    query = 'milk, "2 %"\t牛奶\n'
    assert searches == [(query, "11", 0), (query, "12", 1), (query, "13", 1)]
    made = duckdb.sql(f"SELECT item, kind, quantity, value, basket FROM '{tmp_path}/own/events.parquet' ORDER BY item")
    assert made.fetchall() == [
        ("12", "click", 1, None, None), ("13", "purchase", 2, 3.5, "b1"), ("14", "cart", 1, None, None),
    ]  # fmt: skip


def test_a_line_that_a_crash_cut_off_is_counted_and_the_rest_is_kept(journal, tmp_path):
    [path] = journal.glob("*.jsonl")
    with path.open("ab") as stream:
        stream.write(json.dumps(impression("r3", "cut", [1])).encode()[:-9])
    assert collect(journal, tmp_path / "own")["unreadable"] == 1


def test_what_the_stream_delivered_twice_counts_once(journal, tmp_path):
    [path] = journal.glob("*.jsonl")
    (journal / "2017").mkdir()
    (journal / "2017" / "again.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert collect(journal, tmp_path / "own") == {"unreadable": 0, "events": 3, "searches": 3}


def test_the_data_stage_takes_it(journal, tmp_path):
    own = tmp_path / "own"
    later = [
        record | {"time": f"{day} 09:00:00"} for day in ("2017-11-10", "2017-12-01") for record in feedback("r9", 11)
    ]
    write(journal, *later)
    collect(journal, own)
    rows = "\n".join(f"{item},title {item},food > milk,brand,1 l" for item in range(11, 15))
    (own / "items.csv").write_text(f"item,title,category,brand,size\n{rows}\n")
    (tmp_path / "out").mkdir()
    said = data(OWN, 0, tmp_path / "out", own)
    assert said["counts"]["train"]["queries"] == 1
    found = duckdb.sql(f"SELECT item, gain FROM '{tmp_path}/out/searches-train.parquet' JOIN "
                       f"'{tmp_path}/out/items.parquet' USING (row) WHERE gain > 0 ORDER BY item")  # fmt: skip
    assert [item for item, _ in found.fetchall()] == [12, 13]
    assert duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/out/train.parquet'").fetchall() == [(3,)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"kind":"click"}\n' * 5000)[:-20], "journal: cannot be read: .*GZIP"),
        ("odd.jsonl", b'{"kind":"click","user":"u","item":"1","time":"soon"}\n', 'cannot be read: .*"soon"'),
    ],
)
def test_a_damaged_file_and_a_time_that_is_none_are_told(journal, tmp_path, name, content, told):
    (journal / name).write_bytes(content)
    with pytest.raises(ShipyardError, match=told + ".*mend: copy"):
        collect(journal, tmp_path / "own")
    assert not list(tmp_path.glob("own/*"))


def test_nothing_to_collect_and_a_folder_that_is_taken_are_refused(journal, tmp_path):
    with pytest.raises(ShipyardError, match=r"no \*.jsonl"):
        collect(tmp_path / "nowhere", tmp_path / "own")
    collect(journal, tmp_path / "own")
    with pytest.raises(ShipyardError, match="is there already"):
        collect(journal, tmp_path / "own")
