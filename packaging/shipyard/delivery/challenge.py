"""Outcomes of two releases from what their gateways have written: one of each shopper, of the first request alone.

A shopper's further requests are no independent outcomes, so they count for nothing; nor does a shopper whom both releases
have answered, or a request so young that its feedback may still come.
"""

from pathlib import Path

import duckdb

from serve.errors import ShipyardError
from shipyard.delivery.sequential import Arm
from shipyard.schema import quoted

FIRST = """
CREATE TABLE firsts AS
SELECT arm, coalesce(record->>'user', record->>'request_id') AS shopper,
       arg_min(record->>'request_id', (record->>'time')::TIMESTAMP) AS request_id,
       min((record->>'time')::TIMESTAMP) AS time
FROM records WHERE record->>'kind' = 'impression' GROUP BY ALL
"""

OUTCOMES = """
SELECT arm, count(*), count(*) FILTER (EXISTS (
         FROM records r WHERE r.arm = f.arm AND r.record->>'request_id' = f.request_id
                          AND list_contains($kinds, r.record->>'kind')))
FROM firsts f
WHERE time <= (SELECT max((record->>'time')::TIMESTAMP) FROM records) - to_seconds($settle)
  AND shopper NOT IN (SELECT shopper FROM firsts GROUP BY 1 HAVING count(*) > 1)
GROUP BY 1
"""


def count(champion: Path, challenger: Path, kinds: tuple[str, ...], settle_s: float) -> tuple[Arm, Arm]:
    """Count the outcomes of both arms in their journals, folders of *.jsonl or *.jsonl.gz.

    Args:
        kinds: feedback that makes a request a hit, of serve.feedback.KINDS.
        settle_s: seconds that feedback has time; younger requests are left out.

    Raises:
        ShipyardError: a journal holds nothing.
    """
    db = duckdb.connect()
    db.execute("CREATE TABLE records (arm INTEGER, record JSON)")
    for arm, journal in enumerate((champion, challenger)):
        files = sorted(str(path) for path in journal.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
        if not files:
            raise ShipyardError(f"{journal}: no *.jsonl", mend="name the folder of --feedback, or hits/shown")
        names = ", ".join(quoted(name) for name in files)
        db.execute(
            f"INSERT INTO records SELECT {arm}, line::JSON FROM read_csv([{names}], columns = {{'line': 'VARCHAR'}}, "
            "header = false, delim = '\\x01', quote = '', escape = '', auto_detect = false, strict_mode = false, "
            "max_line_size = 16777216) WHERE json_valid(line)"
        )
    db.execute(FIRST)
    rows = db.execute(OUTCOMES, {"kinds": list(kinds), "settle": settle_s}).fetchall()
    found = {arm: Arm(shown, hits) for arm, shown, hits in rows}
    return found.get(0, Arm(0, 0)), found.get(1, Arm(0, 0))
