"""The canonical schema of behaviour data, and the check that a table fulfils it.

docs/data.md tells it for users. A table comes as a relation of the source's own types with its rows' numbers; every
value is checked by one scan of DuckDB, and the first row at fault is named. Only then is the table loaded.
"""

import csv
import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow.compute as pc
from duckdb.func import PythonUDFType

from models.behaviour import PERIODS
from serve.errors import ShipyardError
from serve.history import KINDS

# Reddy et al., "Shopping Queries Dataset" (2022), publish these gains; its letters are taken for the words
GAINS = {"exact": 1.0, "substitute": 0.1, "complement": 0.01, "irrelevant": 0.0}
GAINS |= {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}

HUGE = 1e9  # an amount above it is a sentinel or a slipped column
LONGEST = 10_000  # characters

# an id is a number where its digits are its only spelling: 007 and 7 are two ids
INTEGER = "^(0|-?[1-9][0-9]{0,17})$"
TYPES = {
    "id": {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "VARCHAR"},
    "text": {"VARCHAR"},
    "choice": {"VARCHAR"},
    "time": {"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS", "TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ_NS",
             "DATE", "VARCHAR"},
    "number": {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT",
               "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN", "VARCHAR"},
}  # fmt: skip
TYPES["date"] = TYPES["time"]
TOLD = {
    "id": "integers or text", "text": "text", "choice": "text", "time": "timestamps, or text as 2017-10-08 16:30:00",
    "date": "dates without a time or a zone, or text as 2017-10-08", "number": "numbers",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Describe one column: `required` columns must be there, `filled` ones have a value in every row."""

    type: Literal["id", "text", "choice", "time", "date", "number"]
    required: bool = False
    filled: bool = False
    low: float = -HUGE
    high: float = HUGE
    choices: tuple[str, ...] = ()


KEY = Column("id", required=True, filled=True)
SHARE = Column("number", low=0, high=1)

TABLES: dict[str, dict[str, Column]] = {
    "items": {
        "item": KEY,
        "title": Column("text", required=True, filled=True),
        "category": Column("text", required=True),
        "brand": Column("text"),
        "size": Column("text"),
    },
    "events": {
        "user": KEY,
        "item": KEY,
        "time": Column("time", required=True, filled=True),
        "kind": Column("choice", required=True, filled=True, choices=KINDS),
        "quantity": Column("number"),
        "value": Column("number"),
        "place": Column("id"),
        "basket": Column("id"),
    },
    "market": {
        "item": KEY,
        "place": Column("id"),
        "from": Column("date", required=True, filled=True),
        "until": Column("date", required=True, filled=True),
        "display": SHARE,
        "mailer": SHARE,
        "discount": SHARE,
    },
    "searches": {
        "query": Column("text", required=True, filled=True),
        "item": KEY,
        "label": Column("choice", filled=True, choices=tuple(GAINS)),
        "gain": Column("number", filled=True, low=0, high=1),
        "click": Column("number", filled=True, low=0, high=1),
        "user": Column("id"),
        "time": Column("time"),
        "split": Column("choice", choices=PERIODS),
    },
}


@dataclass(frozen=True)
class Relation:
    """Name a table of a source: its file, and the SQL that yields `line` (1-based) and the canonical columns.

    `names` tells what the file calls a column, where it is another name.
    """

    table: str
    path: Path
    query: str
    names: Mapping[str, str] = field(default_factory=dict)

    def at(self, column: str, line: int | None = None) -> str:
        """Say where a fault is."""
        row = "" if line is None else f", row {line}"
        return f"{self.path}: column {self.names.get(column, column)}{row}"


def quoted(text: object) -> str:
    """Return a text as a literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def exact(path: Path) -> str:
    """Return a path as a literal of SQL in which no character is a pattern: data[1] is not data1."""
    return quoted(re.sub(r"[*?[]", r"[\g<0>]", str(path)))


@contextmanager
def reading(
    path: Path, mend: str = "write the file again; CSV wants UTF-8, commas and doubled quotes"
) -> Iterator[None]:
    """Name the file in an error of DuckDB while it reads it."""
    try:
        yield
    except duckdb.Error as fault:
        # what follows the first lines advises on options of the reader, which a user of Shipyard does not have
        told = " ".join(str(fault).split("Possible")[0].removeprefix("Invalid Input Error: ").splitlines()[:4])
        raise ShipyardError(f"{path}: cannot be read: {told[:300].strip()}", mend=mend) from None


@contextmanager
def working() -> Iterator[None]:
    """Tell in a line what stops DuckDB while it works, and let an interrupt be one: it comes out as RuntimeError."""
    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.IOException) as fault:
        told = str(fault).split("\n")[0][:300]
        raise ShipyardError(f"data: {told}", mend="give it more memory or disk, then start it again") from None
    except RuntimeError as fault:
        if "interrupted" not in str(fault):
            raise
        raise KeyboardInterrupt from None


def open_file(path: Path) -> str:
    """Return SQL that reads a Parquet or CSV file with the number of each row as `line`; CSV is text in all columns.

    Raises:
        ShipyardError: a CSV's first line cannot be read as a header.
    """
    if path.suffix == ".parquet":
        return (
            f"SELECT file_row_number + 1 AS line, * EXCLUDE file_row_number "
            f"FROM read_parquet({exact(path)}, file_row_number = true, hive_partitioning = false)"
        )
    # left to itself, the reader guesses separators and which lines to skip from a sample
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream), [])
    except (UnicodeDecodeError, csv.Error) as fault:
        raise ShipyardError(f"{path}: cannot be read: {fault}", mend="write it as CSV in UTF-8") from None
    # the reader passes over a last row whose quote never ends, and all that it swallowed
    with path.open("rb") as stream:
        quotes = sum(part.count(b'"') for part in iter(lambda: stream.read(1 << 24), b""))
    if quotes % 2:
        raise ShipyardError(
            f"{path}: cannot be read: a quote without its other one", value=f"{quotes} quotes",
            allowed='"text", and "" for a quote inside it', mend="look for a truncated end or a lone quote",
        )  # fmt: skip
    if not header:
        raise ShipyardError(
            f"{path}: empty first line", mend="begin with a header, then write rows, or remove the file"
        )
    names = [name.lower() for name in header]
    if "" in names or len(set(names)) < len(names):
        raise ShipyardError(
            f"{path}: header: a column without a name of its own", value=", ".join(header),
            allowed="each column once, with a name", mend="name it, or remove it with its values",
        )  # fmt: skip
    columns = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in header)
    return (
        f"SELECT row_number() OVER () AS line, * FROM read_csv({exact(path)}, auto_detect = false, header = true, "
        f"columns = {{{columns}}}, delim = ',', quote = '\"', escape = '\"', parallel = false, hive_partitioning = false)"
    )


def load(db: duckdb.DuckDBPyConnection, relations: list[Relation]) -> dict[str, int]:
    """Check each relation and load it as the table of its name, with every canonical column and its own type.

    An item is BIGINT where all of `items` are integers, else VARCHAR; other ids are VARCHAR, and no type depends on
    what a later period adds. Text is in the Unicode normal form NFKC.

    Returns:
        How many times with a zone each table has that has times.

    Raises:
        ShipyardError: the first fault, with file, column, row, value, what is allowed and the mend.
    """
    db.execute("SET TimeZone = 'UTC'")
    db.create_function(
        "nfkc", lambda text: pc.utf8_normalize(text, "NFKC"), ["varchar"], "varchar", type=PythonUDFType.ARROW
    )  # fmt: skip
    given = {relation.table: _columns(db, relation) for relation in relations}
    zoned = {}
    for relation in relations:
        with reading(relation.path):
            lines = _check(db, relation, given[relation.table])
        if "time" in given[relation.table]:
            zoned[relation.table] = lines
    items = next(relation for relation in relations if relation.table == "items")
    integers = db.execute(
        f"SELECT bool_and(regexp_full_match({_raw('item', given['items']['item'])}::VARCHAR, {quoted(INTEGER)})) "
        f"FROM ({items.query})"
    ).fetchall()[0][0]
    for relation in relations:
        columns = [
            f'{_typed(name, column, given[relation.table], bool(integers))} AS "{name}"'
            for name, column in TABLES[relation.table].items()
        ]
        if relation.table == "items":
            columns.append("line")
        with reading(relation.path):
            db.execute(f"CREATE TABLE {relation.table} AS SELECT {', '.join(columns)} FROM ({relation.query})")
        if relation.table == "items":
            _distinct_items(db, relation)
        if relation.table == "searches":
            gains = " ".join(f"WHEN {quoted(label)} THEN {gain}" for label, gain in GAINS.items())
            db.execute(f"UPDATE searches SET gain = coalesce(gain, click, CASE label {gains} END)")
    return zoned


def _columns(db: duckdb.DuckDBPyConnection, relation: Relation) -> dict[str, str]:
    """Return the types of the columns that a relation has, once their names and types are right."""
    with reading(relation.path):
        described = db.execute(f"DESCRIBE {relation.query}").fetchall()
    # the first is the rows' numbers; a Parquet column without any value may have no type, and is empty
    found = {str(row[0]): str(row[1]).split("(")[0].replace('"NULL"', "VARCHAR") for row in described[1:]}
    known = TABLES[relation.table]
    for name in found:
        if name not in known:
            close = [] if set(name) & set(";|\t") else difflib.get_close_matches(name.strip().lower(), known, n=1)
            raise ShipyardError(
                f"{relation.at(name)}: unknown", allowed=", ".join(known),
                mend=f'did you mean "{close[0]}"?' if close else "remove it, and separate columns by commas",
            )  # fmt: skip
    for name, column in known.items():
        if column.required and name not in found:
            needed = [other for other, its in known.items() if its.required]
            raise ShipyardError(
                f"{relation.at(name)}: missing", value=", ".join(found), allowed=", ".join(needed),
                mend="add it, or give one of yours this name",
            )  # fmt: skip
        if name in found and found[name] not in TYPES[column.type]:
            raise ShipyardError(
                f"{relation.at(name)}: wrong type", value=found[name], allowed=TOLD[column.type],
                mend='write whole numbers: in pandas, astype("Int64")' if column.type == "id" and found[name] == "DOUBLE"
                else "write it as one of these",
            )  # fmt: skip
    judged = [name for name in ("label", "gain", "click") if name in found]
    if relation.table == "searches" and len(judged) != 1:
        raise ShipyardError(
            f"{relation.path}: not one judgement", value=", ".join(judged) or "none",
            allowed="exactly one of the columns label, gain and click", mend="keep one",
        )  # fmt: skip
    return found


def _raw(name: str, found: str) -> str:
    """Return the SQL of a value as it is written, NULL where it is blank."""
    return f"nullif(trim(\"{name}\", ' \t\r\n'), '')" if found == "VARCHAR" else f'"{name}"'


def _parsed(name: str, column: Column, found: str) -> str:
    """Return the SQL of a value in its canonical type, NULL where it is empty or cannot be parsed."""
    raw = _raw(name, found)
    match column.type:
        case "number":
            return f"try_cast({raw} AS DOUBLE)"
        case "time" | "date":
            # a time with a zone becomes UTC; without one it is the data's own clock
            time = f"timezone('UTC', try_cast({raw} AS TIMESTAMPTZ))"
            return time if column.type == "time" else f"CASE WHEN isfinite({time}) THEN ({time})::DATE END"
        case _:
            return f"{raw}::VARCHAR"


def _faults(name: str, column: Column, found: str) -> Iterator[tuple[str, str, str]]:
    """Yield the condition of each fault of a column, what it is called and what is allowed."""
    raw, parsed = _raw(name, found), _parsed(name, column, found)
    if column.filled:
        yield f"{raw} IS NULL", "empty", f"a value in every row ({TOLD[column.type]})"
    match column.type:
        case "number":
            limits = f"numbers from {column.low:g} to {column.high:g}"
            yield f"{raw} IS NOT NULL AND {parsed} IS NULL", "not a number", limits
            yield f"NOT isfinite({parsed})", "not a finite number", limits
            yield f"NOT {parsed} BETWEEN {column.low} AND {column.high}", "out of range", limits
        case "time" | "date":
            yield f"{raw} IS NOT NULL AND {parsed} IS NULL", "not a time", TOLD[column.type]
            yield f"NOT {parsed} BETWEEN '1970-01-01' AND '2200-01-01'", "out of range", "1970-01-01 to 2200-01-01"
            if column.type == "date":
                # midnight of another zone would be the day before or after
                moment = _parsed(name, Column("time"), found)
                yield f"{moment} <> date_trunc('day', {moment})", "not a date", TOLD["date"]
        case "choice":
            allowed = ", ".join(map(quoted, column.choices))
            yield f"{raw} NOT IN ({allowed})", "unknown", ", ".join(column.choices)
        case _ if found == "VARCHAR":
            yield f"length({raw}) > {LONGEST}", "too long", f"at most {LONGEST} characters"


def _check(db: duckdb.DuckDBPyConnection, relation: Relation, given: Mapping[str, str]) -> int:
    """Find the first row of each fault in one scan, and raise the one that comes first; count the times with a zone."""
    faults = [
        (name, *fault)
        for name, column in TABLES[relation.table].items()
        if name in given
        for fault in _faults(name, column, given[name])
    ]
    if relation.table == "market":
        begins, ends = (_parsed(name, TABLES["market"][name], given[name]) for name in ("from", "until"))
        faults.append(("until", f"{ends} <= {begins}", "not after from", "a date after that of from; it is exclusive"))
    tallies = [
        f'min(line) FILTER ({condition}), left(arg_min("{name}"::VARCHAR, line) FILTER ({condition}), 100)'
        for name, condition, _, _ in faults
    ]
    # a zone follows the seconds: Z, +02:00, a name
    zoned = """count(*) FILTER (regexp_matches("time"::VARCHAR, ':[0-9.]+ ?[A-Za-z+-]'))""" if "time" in given else "0"
    count, lines, *found = db.execute(
        f"SELECT count(*), {zoned}, {', '.join(tallies)} FROM ({relation.query})"
    ).fetchall()[0]
    if not count:
        raise ShipyardError(f"{relation.path}: no rows", mend="write one row or more, or remove the file")
    wrong = [
        (line, name, fault, allowed, value)
        for (name, _, fault, allowed), line, value in zip(faults, found[::2], found[1::2], strict=True)
        if line is not None
    ]
    if wrong:
        line, name, fault, allowed, value = min(wrong)
        close = difflib.get_close_matches(str(value).strip().lower(), allowed.split(", "), n=1)
        raise ShipyardError(
            f"{relation.at(name, line)}: {fault}", value=value, allowed=allowed,
            mend=f'did you mean "{close[0]}"?' if close else "correct the row or leave it out",
        )  # fmt: skip
    return int(lines)


def _typed(name: str, column: Column, given: Mapping[str, str], integers: bool) -> str:
    """Return the SQL of a column as it is loaded."""
    types = {"number": "DOUBLE", "time": "TIMESTAMP", "date": "DATE"}
    if name == "item":
        raw = _raw(name, given[name])
        if not integers or given[name] != "VARCHAR":
            return f"try_cast({raw} AS {'BIGINT' if integers else 'VARCHAR'})"
        # what is no integer names no item of a catalogue of integers
        return f"CASE WHEN regexp_full_match({raw}, {quoted(INTEGER)}) THEN {raw}::BIGINT END"
    if name not in given:
        return f"NULL::{types.get(column.type, 'VARCHAR')}"
    parsed = _parsed(name, column, given[name])
    return f"nfkc({parsed})" if column.type == "text" else parsed


def _distinct_items(db: duckdb.DuckDBPyConnection, relation: Relation) -> None:
    """Refuse an item that is described twice."""
    twice = db.execute("""
        SELECT item, line, first FROM (SELECT item, line, min(line) OVER (PARTITION BY item) AS first FROM items)
        WHERE line > first ORDER BY line LIMIT 1
    """).fetchall()
    for item, line, first in twice:
        raise ShipyardError(
            f"{relation.at('item', line)}: twice", value=item, allowed=f"one row an item; row {first} has it too",
            mend="keep one of them",
        )  # fmt: skip
