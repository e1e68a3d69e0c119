"""Collect: what the gateway has written, impressions and feedback, as tables of the data stage's schema.

Feedback becomes `events`; an impression of a search becomes rows of `searches`, an item that was shown each, with a click
where feedback on the same request names it. What was written twice, or cut off by a crash, counts once or not at all.
"""

import argparse
import json
from pathlib import Path

import duckdb

from models.config import Fleet
from serve.errors import ShipyardError
from shipyard.console import Reporter
from shipyard.schema import exact, quoted, reading

MEND = "copy the file or the folder again, or take the record out"

EVENTS = """
SELECT DISTINCT record->>'user' AS "user", record->>'item' AS item, (record->>'time')::TIMESTAMP AS time,
       record->>'kind' AS kind, coalesce((record->>'quantity')::DOUBLE, 1) AS quantity,
       (record->>'value')::DOUBLE AS value, record->>'place' AS place, record->>'basket' AS basket,
       record->>'request_id' AS request_id
FROM records WHERE record->>'kind' IN ('click', 'cart', 'purchase')
"""

SHOWN = """
SELECT record->>'request_id' AS request_id, any_value(record->>'query') AS query, any_value(record->>'user') AS "user",
       min((record->>'time')::TIMESTAMP) AS time, any_value(from_json(record->'items', '["VARCHAR"]')) AS items
FROM records WHERE record->>'kind' = 'impression' AND record->>'query' IS NOT NULL GROUP BY 1
"""

SEARCHES = """
SELECT query, item, CASE WHEN EXISTS (FROM events e WHERE e.request_id = s.request_id AND e.item = s.item)
       THEN 1 ELSE 0 END AS click, "user", time
FROM (SELECT request_id, query, "user", time, unnest(items) AS item FROM shown) s
"""


def collect(journal: Path, out: Path) -> dict[str, int]:
    """Write `out`/events.parquet and `out`/searches.parquet from the *.jsonl and *.jsonl.gz below `journal`.

    Returns:
        The rows of each table that was written, and by "unreadable" the lines that are no record.

    Raises:
        ShipyardError: there is nothing to collect, a file or a record is damaged, or a table is there already.
    """
    db, unreadable = read_journal(journal)
    taken = [str(out / f"{table}.{kind}") for table in ("events", "searches") for kind in ("parquet", "csv")]
    if there := [path for path in taken if Path(path).exists()]:
        raise ShipyardError(
            f"{there[0]}: is there already", mend="name an empty folder, then bring the tables together"
        )
    out.mkdir(parents=True, exist_ok=True)
    counts = {"unreadable": unreadable}
    with reading(journal, MEND):
        db.execute(f"CREATE TABLE events AS {EVENTS}")
        db.execute(f"CREATE TABLE shown AS {SHOWN}")
    for table, query in (("events", "SELECT * EXCLUDE (request_id) FROM events ORDER BY ALL"), ("searches", SEARCHES)):
        found = db.sql(query)
        counts[table] = found.count("*").fetchall()[0][0]
        if counts[table]:
            db.execute(f"COPY ({query}) TO {quoted(out / f'{table}.parquet')} (FORMAT parquet)")
    return counts


def read_journal(journal: Path) -> tuple[duckdb.DuckDBPyConnection, int]:
    """Read the *.jsonl and *.jsonl.gz below a folder into a table `records` of one column, `record`.

    Returns:
        The database in memory, and how many lines are no record.

    Raises:
        ShipyardError: there is no such file, or one is damaged.
    """
    files = sorted(path for path in journal.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz", ".gz")))
    if not files:
        raise ShipyardError(
            f"{journal}: no *.jsonl", mend="name the folder of --feedback, or a copy of the stream's bucket"
        )
    db = duckdb.connect()
    # a line as it is, whatever it holds: no separator, quote or escape
    names = ", ".join(exact(name) for name in files)
    with reading(journal, MEND):
        db.execute(
            "CREATE TABLE lines AS SELECT line FROM "
            f"read_csv([{names}], columns = {{'line': 'VARCHAR'}}, header = false, delim = '\\x01', quote = '', "
            "escape = '', auto_detect = false, strict_mode = false, max_line_size = 16777216, hive_partitioning = false)"
        )
    db.execute("CREATE TABLE records AS SELECT line::JSON AS record FROM lines WHERE json_valid(line)")
    return db, db.sql("SELECT count(*) FROM lines WHERE NOT json_valid(line)").fetchall()[0][0]


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Make training data of a journal and tell how much."""
    print(json.dumps(collect(chosen.journal, chosen.out)))
    return 0
