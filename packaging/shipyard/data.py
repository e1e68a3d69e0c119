"""Clean, normalise, number and split the behaviour data of a source (shipyard.sources) by time.

A period's files hold what the models may know in that period: nothing of a later one reaches them, neither lines nor
numbering, bounds, sampling or the choice of the edge's store. All tables are Parquet, compressed by zstd:

items.parquet: row (1..N; 0 is padding), item, text, text_id, path (the levels of its category below the top), path_id,
category (its middle level), category_id, brand ('' for none), local (sold in the edge's store).
train.parquet, validation.parquet, test.parquet: events, one line a user, basket, row and kind: user, basket, row, day
(days since the first of January of the first event's year, the hour as fraction), kind (index of serve.history.KINDS),
quantity, value (NaN where none is given), place (-1 for none); sorted by user, day, basket, row.
market-PERIOD.parquet: place (-1 everywhere), day_from, day_until (exclusive), row, display, mailer, discount; sorted by
day_from, place, day_until, row.
searches-PERIOD.parquet: query_id (of one period), query, row, gain, user (-1 for none), day (NaN for none).
users.parquet, places.parquet: index and the source's own id. report.json: each rule, what it took, and of how many.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from models.behaviour import PERIODS
from models.config import Data
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.history import KINDS
from shipyard.schema import INTEGER, quoted, working
from shipyard.sources import Rule, count, open_source, rule, source_files, source_sha256

__all__ = ["data", "source_files", "source_sha256"]

# lower case, letters and digits of any script, points inside numbers, long forms; each word once, where it came first
WORDS = r"""
CREATE MACRO split_words(label) AS list_transform(
    regexp_split_to_array(lower(label), '[^\p{L}\p{M}\p{N}.]+'), lambda part: trim(part, '.'));
CREATE MACRO spelled(label) AS string_split(array_to_string(list_transform(
    split_words(label), lambda part: coalesce(getvariable('long_form')[part], part)), ' '), ' ');
-- as a lambda's argument the words are made once, as a macro's once for each of them
CREATE MACRO once(parts) AS list_transform([parts], lambda all_parts: array_to_string(list_filter(
    all_parts, lambda word, i: word <> '' AND i = list_position(all_parts, word)), ' '))[1];
-- what has no letter and no digit stays as it is
CREATE MACRO words(label) AS coalesce(nullif(once(spelled(label)), ''), lower(trim(label)), '');
CREATE MACRO period_of(moment) AS
    CASE WHEN moment < getvariable('valid_from') THEN 0 WHEN moment < getvariable('test_from') THEN 1
         WHEN moment IS NOT NULL THEN 2 END;
CREATE MACRO day_of(moment) AS (epoch_us(moment) - epoch_us(getvariable('born'))) / 86400000000.0;
"""

# a value that is this many times what 99 of 100 lines of the train period stay below is no shopping of a household
OUTLIER = 10

MARKET = pa.schema(
    [(name, pa.int32()) for name in ("place", "day_from", "day_until", "row")]
    + [(name, pa.float32()) for name in ("display", "mailer", "discount")]
)
PART = 1_000_000  # lines that are sorted at a time


def data(
    config: Data, households: int, out: Path, folder: Path | None = None, files: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Clean, normalise and split the source into `out`; return the report of rules, the counts and the digests.

    `households` takes that many users by the hash of their id, of those with an event before `valid_from`, or that many
    queries of each period where the source has no events; 0 takes all. `folder` holds the source's files where no
    package does; `files` replaces some of them by name.

    Raises:
        ShipyardError: a file is missing, damaged or breaks the schema, or a period is empty.
    """
    paths = {**source_files(config, folder), **(files or {})}
    with working(), tempfile.TemporaryDirectory() as spill:
        settings: dict[str, Any] = {"threads": 2, "memory_limit": "1200MB", "temp_directory": spill}
        with duckdb.connect(config=settings) as db:
            source = open_source(db, config, paths)
            for name, value in {
                "valid_from": config.valid_from, "test_from": config.test_from, "households": households,
                "long_form": source.long_forms,
            }.items():  # fmt: skip
                if isinstance(value, Mapping):
                    arguments = [list(value), list(value.values())]
                    db.execute(f"SET VARIABLE {name} = map($1::VARCHAR[], $2::VARCHAR[])", arguments)
                else:
                    db.execute(f"SET VARIABLE {name} = $value", {"value": value})
            db.execute(WORDS)
            report = list(source.rules)
            has_events = count(db, "events") > 0
            _choose(db, report, has_events)
            _items(db, report)
            _events(db, report)
            _searches(db, report)
            _number(db)
            market = _market(db, report, out)
            counts = _counts(db, report, market, has_events, config)
            # what a source has no table for has no rules either
            return _write(db, [line for line in report if line["of"]], out) | {"counts": counts}


def _choose(db: duckdb.DuckDBPyConnection, report: list[Rule], has_events: bool) -> None:
    """Sample users and queries, and find the fault of each line of an event."""
    db.execute("""
        CREATE TABLE chosen AS
        SELECT "user" FROM (SELECT "user" FROM events GROUP BY "user"
                            HAVING getvariable('households') = 0 OR min(time) < getvariable('valid_from'))
        QUALIFY getvariable('households') = 0
             OR row_number() OVER (ORDER BY md5("user")) <= getvariable('households')
    """)
    everyone, chosen = count(db, '(SELECT DISTINCT "user" FROM events)'), count(db, "chosen")
    report.append(rule("users outside the sample", "events", everyone - chosen, everyone, "users, by hash of their id"))
    codes = " ".join(f"WHEN {quoted(kind)} THEN {code}" for code, kind in enumerate(KINDS))
    # DuckDB sorts NaN above every number
    db.execute(f"""
        CREATE TABLE lines AS
        SELECT "user", coalesce('b' || basket, 'd' || time::DATE) AS basket, item, time, period_of(time) AS period,
               CASE kind {codes} END::TINYINT AS kind, quantity, value, place,
               CASE WHEN isnan(value) OR isnan(quantity) THEN 1
                    WHEN kind = 'purchase' AND round(value, 4) <= 0 THEN 2
                    WHEN round(quantity, 4) <= 0 THEN 3
                    WHEN item IS NULL OR item NOT IN (SELECT item FROM items) THEN 4 ELSE 0 END AS fault
        FROM events JOIN chosen USING ("user")
    """)
    # a search with neither time nor split is of a period by the hash of its words
    db.execute("""
        CREATE TABLE asked AS
        WITH queries AS (SELECT query, words(query) AS said FROM (SELECT DISTINCT query FROM searches)),
             hashed AS (SELECT * REPLACE (said AS query), ('0x' || left(md5(said), 8))::BIGINT % 10 AS tenth
                        FROM searches JOIN queries USING (query))
        SELECT query, item, gain, "user", time,
               coalesce(list_position(['train', 'validation', 'test'], split) - 1, period_of(time),
                        greatest(tenth - 7, 0))::TINYINT AS period
        FROM hashed WHERE getvariable('households') = 0 OR "user" IS NULL OR "user" IN (FROM chosen)
                          OR NOT EXISTS (FROM events)
    """)
    if not has_events:
        db.execute("""
            DELETE FROM asked WHERE getvariable('households') > 0 AND (period, query) NOT IN (
                SELECT (period, query) FROM (SELECT DISTINCT period, query FROM asked)
                QUALIFY row_number() OVER (PARTITION BY period ORDER BY md5(query)) <= getvariable('households'))
        """)
    there, kept = count(db, "searches"), count(db, "asked")
    report.append(rule("outside the sample", "searches", there - kept, there, "of users, or by the hash of the query"))


def _items(db: duckdb.DuckDBPyConnection, report: list[Rule]) -> None:
    """Make the catalogue, with normal texts and dense ids."""
    # a sample keeps the items of its train period: the later ones would tell of the future
    known = count(db, "items")
    db.execute("""
        CREATE TABLE catalogue AS
        SELECT * REPLACE (coalesce(brand, '') AS brand),
               list_filter(list_transform(string_split(coalesce(category, ''), '>'), lambda level: trim(level)),
                           lambda level: level <> '') AS levels
        FROM items
        WHERE getvariable('households') = 0 OR NOT EXISTS (FROM lines)
           OR item IN (SELECT item FROM lines WHERE fault = 0 AND period = 0)
           OR item IN (SELECT item FROM asked WHERE period = 0)
    """)
    kept = count(db, "catalogue")
    report.append(rule("items outside the sample", "items", known - kept, known, "not of its train period"))
    report.append(rule("no category", "items", count(db, "catalogue WHERE levels = []"), kept, "kept as uncategorised"))
    db.execute("""
        CREATE TABLE described AS
        SELECT item, brand, concat_ws(' ', title, array_to_string(list_reverse(levels), ' '), brand, size) AS label,
               words(label) AS text,
               CASE len(levels) WHEN 0 THEN 'uncategorised' WHEN 1 THEN words(levels[1])
                    ELSE words(array_to_string(levels[2:], ' ')) END AS path,
               CASE len(levels) WHEN 0 THEN 'uncategorised' WHEN 1 THEN words(levels[1]) WHEN 2 THEN words(levels[1])
                    ELSE words(levels[2]) END AS category
        FROM catalogue
    """)
    db.execute("""
        CREATE TABLE numbered AS
        SELECT row_number() OVER (ORDER BY item) AS row, item, text, dense_rank() OVER (ORDER BY text) - 1 AS text_id,
               path, dense_rank() OVER (ORDER BY path) - 1 AS path_id,
               category, dense_rank() OVER (ORDER BY category) - 1 AS category_id, brand
        FROM described
    """)
    long = count(
        db,
        "described WHERE len(list_filter(split_words(label), lambda w: getvariable('long_form')[w] IS NOT NULL)) > 0",
    )
    texts = count(db, "(SELECT DISTINCT text FROM numbered)")
    report.append(rule("abbreviations spelt out", "items", long, kept))
    report.append(rule("identical texts", "items", kept - texts, kept, "kept; they share a text"))


def _events(db: duckdb.DuckDBPyConnection, report: list[Rule]) -> None:
    """Remove lines at fault and outliers, and merge the lines of one user, basket, item and kind."""
    total = count(db, "lines")
    faults = dict(db.execute("SELECT fault, count(*) FROM lines GROUP BY fault").fetchall())
    names = ("value that is no number", "returned or given away", "no quantity", "unknown item")
    notes = ("", "a purchase's value is 0 or less", "quantity is 0 or less", "not in items")
    for fault, (name, note) in enumerate(zip(names, notes, strict=True), 1):
        report.append(rule(name, "events", faults.get(fault, 0), total, note))
    _mostly_known(db, "events", faults.get(4, 0), total)
    db.execute(
        "CREATE TABLE clean AS SELECT * FROM lines JOIN (SELECT row, item FROM numbered) USING (item) WHERE fault = 0"
    )
    sound, clean = int(faults.get(0, 0)), count(db, "clean")
    report.append(rule("item outside the sample", "events", sound - clean, total, "not bought in its train period"))
    for column in ("quantity", "value"):
        bound = db.execute(
            f"SELECT {OUTLIER} * quantile_disc({column}, 0.99) FROM clean WHERE period = 0 AND {column} > 0"
        ).fetchall()[0][0]
        db.execute(f"SET VARIABLE {column}_bound = $bound", {"bound": bound})
        above = count(db, f"clean WHERE {column} > getvariable('{column}_bound')")
        note = "" if bound is None else f"lowered to {bound:g}, {OUTLIER} times the 99th percentile of the train period"
        report.append(rule(f"outliers of {column}", "events", above, clean, note))
    # decimals add up to the same sum in any order; `least` would take the bound for a missing value
    db.execute("""
        CREATE TABLE merged AS
        SELECT "user", basket, period, row, kind, min(time) AS time, min(place) AS place,
               sum((CASE WHEN quantity > getvariable('quantity_bound') THEN getvariable('quantity_bound')
                         ELSE coalesce(quantity, 1) END)::DECIMAL(18, 4))::DOUBLE AS quantity,
               coalesce(sum((CASE WHEN value > getvariable('value_bound') THEN getvariable('value_bound')
                                  ELSE value END)::DECIMAL(18, 4))::DOUBLE, 'nan') AS value
        FROM clean GROUP BY "user", basket, period, row, kind
    """)
    note = "lines of one user, basket, item and kind: quantities and values are added"
    report.append(rule("duplicates merged", "events", clean - count(db, "merged"), clean, note))
    never = count(db, "numbered WHERE row NOT IN (SELECT row FROM merged WHERE kind = 0 AND period = 0)")
    report.append(rule("items never sold", "items", never, count(db, "numbered"), "kept; not in the train period"))


def _mostly_known(db: duckdb.DuckDBPyConnection, table: str, unknown: int, total: int) -> None:
    """Refuse a table that has little to do with the items: its ids are of another kind."""
    if unknown * 2 > total:
        missing = "item IS NULL OR item NOT IN (SELECT item FROM items)"
        value = db.execute(f"SELECT min(item) FROM {table} WHERE {missing}").fetchall()[0][0]
        raise ShipyardError(
            f"{table}: column item: {unknown} of {total} rows name an item that items does not have",
            value="text where items are integers" if value is None else value, allowed="the ids of items",
            mend="write the same ids in both tables",
        )  # fmt: skip


def _searches(db: duckdb.DuckDBPyConnection, report: list[Rule]) -> None:
    """Join searches with items, and merge repeated answers."""
    total = count(db, "asked")
    unknown = count(db, "asked WHERE item IS NULL OR item NOT IN (SELECT item FROM items)")
    report.append(rule("unknown item", "searches", unknown, total, "not in items"))
    _mostly_known(db, "searches", unknown, total)
    db.execute("""
        CREATE TABLE found AS
        SELECT query, row, period, "user", time, max(gain) AS gain
        FROM asked JOIN (SELECT row, item FROM numbered) USING (item) GROUP BY ALL
    """)
    outside = total - unknown - count(db, "asked JOIN numbered USING (item)")
    report.append(rule("item outside the sample", "searches", outside, total, "not of its train period"))
    merged = total - unknown - outside - count(db, "found")
    report.append(rule("duplicates merged", "searches", merged, total, "the highest gain is kept"))


def _number(db: duckdb.DuckDBPyConnection) -> None:
    """Number users, places, baskets and queries by the time of their first line, so that the future renumbers none."""
    db.execute("""
        SET VARIABLE born = date_trunc('year', coalesce(
            (SELECT min(time) FROM (SELECT time FROM merged UNION ALL SELECT time FROM found)),
            getvariable('valid_from')::TIMESTAMP))
    """)
    for name, seen in {
        "users": 'SELECT "user" AS id, time FROM merged UNION ALL SELECT "user", time FROM found',
        "places": "SELECT place AS id, time FROM merged",
    }.items():
        # length before text orders integers as numbers, and does not ask whether later ids are integers too
        db.execute(f"""
            CREATE TABLE {name} AS
            SELECT row_number() OVER (ORDER BY min(time), length(id), id) - 1 AS index, id, period_of(min(time)) AS since
            FROM ({seen}) WHERE id IS NOT NULL AND time IS NOT NULL GROUP BY id ORDER BY index
        """)
    db.execute("""
        CREATE TABLE baskets AS
        SELECT "user", basket, period,
               row_number() OVER (ORDER BY min(time), any_value(index), length(basket), basket, period) - 1 AS index
        FROM merged JOIN users ON id = "user" GROUP BY "user", basket, period
    """)
    db.execute("""
        CREATE TABLE queries AS
        SELECT query, period, row_number() OVER (ORDER BY period, query) - 1 AS query_id
        FROM (SELECT DISTINCT query, period FROM found)
    """)
    # the edge serves the store that sold the most different items in the train period
    db.execute("""
        CREATE TABLE local AS
        WITH sold AS (FROM merged WHERE kind = 0 AND period = 0 AND place IS NOT NULL)
        SELECT DISTINCT row FROM sold WHERE place =
            (SELECT place FROM sold GROUP BY place ORDER BY count(DISTINCT row) DESC, length(place), place LIMIT 1)
    """)


def _market(db: duckdb.DuckDBPyConnection, report: list[Rule], out: Path) -> dict[str, int]:
    """Join the market with items and places, and write it; return how many lines each period has."""
    db.execute("""
        CREATE TABLE shown AS
        SELECT coalesce(p.index, -1)::INTEGER AS place, day_of(m."from")::INTEGER AS day_from,
               day_of(m.until)::INTEGER AS day_until, row::INTEGER AS row, coalesce(display, 0)::FLOAT AS display,
               coalesce(mailer, 0)::FLOAT AS mailer, coalesce(discount, 0)::FLOAT AS discount,
               period_of(m."from")::TINYINT AS period,
               CASE WHEN greatest(display, mailer, discount, 0) = 0 THEN 1
                    WHEN m.place IS NOT NULL AND (since IS NULL OR since > period_of(m."from")) THEN 2
                    ELSE 0 END::TINYINT AS fault
        FROM market m JOIN numbered n ON m.item = n.item LEFT JOIN places p ON m.place = p.id
    """)
    total, known, sampled = (
        count(db, relation) for relation in ("market", "market WHERE item IN (SELECT item FROM items)", "shown")
    )
    faults = dict(db.execute("SELECT fault, count(*) FROM shown GROUP BY fault").fetchall())
    report.append(rule("unknown item", "market", total - known, total, "not in items"))
    _mostly_known(db, "market", total - known, total)
    report.append(rule("item outside the sample", "market", known - sampled, total, "not of its train period"))
    report.append(rule("no strength", "market", faults.get(1, 0), total, "display, mailer and discount are 0"))
    note = "no event there until the end of the period in which it begins"
    report.append(rule("place without events", "market", faults.get(2, 0), total, note))
    kept = {name: _write_market(db, period, out / f"market-{name}.parquet") for period, name in enumerate(PERIODS)}
    merged = faults.get(0, 0) - sum(kept.values())
    note = "lines of one item, place and time: the highest strengths are kept"
    report.append(rule("duplicates merged", "market", merged, total, note))
    return kept


def _write_market(db: duckdb.DuckDBPyConnection, period: int, path: Path) -> int:
    """Write the market of a period in parts, for the whole would not be sorted in memory; return how many lines."""
    parts = db.execute(f"""
        SELECT min(day_from), max(day_from)
        FROM (SELECT day_from, sum(count(*)) OVER (ORDER BY day_from) // {PART} AS part FROM shown
              WHERE period = {period} AND fault = 0 GROUP BY day_from)
        GROUP BY part ORDER BY part
    """).fetchall()
    lines = 0
    with pq.ParquetWriter(path, MARKET, compression="zstd") as writer:
        for first, last in parts:
            part = db.sql(f"""
                SELECT place, day_from, day_until, row, max(display) AS display, max(mailer) AS mailer,
                       max(discount) AS discount
                FROM shown WHERE period = {period} AND fault = 0 AND day_from BETWEEN {first} AND {last}
                GROUP BY place, day_from, day_until, row ORDER BY day_from, place, day_until, row
            """).to_arrow_table()
            lines += part.num_rows
            writer.write_table(part.cast(MARKET).combine_chunks())
    return lines


def _counts(
    db: duckdb.DuckDBPyConnection, report: list[Rule], market: Mapping[str, int], has_events: bool, config: Data
) -> dict[str, Any]:
    """Count what is written, over all and by period.

    Raises:
        ShipyardError: a period is empty.
    """
    counts: dict[str, Any] = {name: count(db, name) for name in ("users", "places", "queries")}
    counts |= {
        name: count(db, f"(SELECT DISTINCT {column} FROM numbered)")
        for name, column in (("items", "row"), ("texts", "text"), ("paths", "path"), ("categories", "category"))
    }
    counts["local"] = count(db, "local") or counts["items"]
    main, table = ("event", "merged") if has_events else ("search", "found")
    for period, name in enumerate(PERIODS):
        its = counts[name] = {
            "events": count(db, f"merged WHERE period = {period}"),
            "baskets": count(db, f"baskets WHERE period = {period}"),
            "users": count(db, f'(SELECT DISTINCT "user" FROM merged WHERE period = {period})'),
            "market": market[name],
            "searches": count(db, f"found WHERE period = {period}"),
            "queries": count(db, f"(SELECT DISTINCT query FROM found WHERE period = {period})"),
        }
        lines, total = its["events" if has_events else "searches"], count(db, table)
        if not lines:
            raise ShipyardError(
                f"data: no {main} in the {name} period",
                allowed=f"some before {config.valid_from}, some from then on before {config.test_from}, some after",
                mend="move valid_from or test_from in fleet.toml, or take more households",
            )
        note = ", ".join(f"{number} {what}" for what, number in its.items())
        report.append(rule(f"{name} period", "events" if has_events else "searches", lines, total, note))
    return counts


def _write(db: duckdb.DuckDBPyConnection, report: list[Rule], out: Path) -> dict[str, Any]:
    """Write all files; return the report, and a digest of the catalogue and of each period."""
    queries = {
        "items": """
            SELECT row, item, text, text_id, path, path_id, category, category_id, brand,
                   row IN (FROM local) OR NOT EXISTS (FROM local) AS local
            FROM numbered ORDER BY row"""
    }
    for period, name in enumerate(PERIODS):
        queries[name] = f"""
            SELECT u.index AS "user", b.index AS basket, row, day_of(time) AS day, kind, quantity::FLOAT AS quantity,
                   value::FLOAT AS value, coalesce(p.index, -1) AS place
            FROM merged m JOIN users u ON u.id = m."user" JOIN baskets b USING ("user", basket, period)
                 LEFT JOIN places p ON p.id = m.place
            WHERE period = {period} ORDER BY u.index, day, b.index, row, kind"""
        # one who is first seen later has a number that this period does not know
        queries[f"searches-{name}"] = f"""
            SELECT query_id, query, row, gain::FLOAT AS gain,
                   CASE WHEN since <= period THEN u.index ELSE -1 END AS "user",
                   coalesce(day_of(time), 'nan'::DOUBLE) AS day
            FROM found JOIN queries USING (query, period) LEFT JOIN users u ON u.id = "user"
            WHERE period = {period} ORDER BY query_id, "user", day, row"""
    for name in ("users", "places"):
        integers = f"(SELECT bool_and(regexp_full_match(id, {quoted(INTEGER)})) FROM {name})"
        cast = "BIGINT" if db.execute(f"SELECT {integers}").fetchall()[0][0] else "VARCHAR"
        queries[name] = f"SELECT index, id::{cast} AS id FROM {name} ORDER BY index"
    for name, query in queries.items():
        # one chunk a column: how DuckDB's threads cut a table would else show in the pages
        table = db.sql(query).to_arrow_table().combine_chunks()
        pq.write_table(table, out / f"{name}.parquet", compression="zstd")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    digests = {"items": sha256_file(out / "items.parquet")} | {
        name: hashlib.sha256(
            "".join(sha256_file(out / f"{kind}{name}.parquet") for kind in ("", "market-", "searches-")).encode()
        ).hexdigest()
        for name in PERIODS
    }
    return {"report": report, "digests": digests}
