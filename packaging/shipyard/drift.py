"""Drift: what the gateway has written beside its release's reference, or beside what it wrote before.

Requests and scores are compared by the population stability index over the reference's ten bins, PSI = sum of
(share - reference share) * ln(share / reference share); from 0.25 on a population is held to have shifted (Siddiqi, "Credit
Risk Scorecards", 2006). Without drift it is about chi-squared with bins - 1 degrees, times 1/n + 1/m (Yurdakul and Naranjo,
"Statistical properties of the population stability index", Journal of Risk Model Validation, 2020).

Calibration is compared by bins of the fused score: the sum over bins of |taken - expected by the reference's rates|, in
shares of what is expected in all. By chance alone the sum of squared differences over their variances is about chi-squared,
one degree a bin (Hosmer and Lemeshow, "Goodness of fit tests for the multiple logistic regression model", 1980).

Drift is what is both as large as its limit and not by chance, at one in a hundred.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from models.config import Fleet
from models.release import Release
from serve.errors import ShipyardError
from serve.feedback import KINDS
from serve.files import read_json
from serve.trust import check_bundle
from shipyard.collect import read_journal
from shipyard.console import Reporter
from shipyard.look import newest, open_release
from shipyard.reference import REFERENCE, Seen, binned, refer

FEWEST = 200
"""Requests of a route below which nothing is said of it."""

CHANCE = 0.01
PSI, CALIBRATION = 0.25, 0.25
"""Limits unless told."""

ASKED = """
SELECT record->>'request_id' AS id, any_value(record->>'route') AS route, any_value(record->'observed') AS observed,
       any_value(record->'items') AS items, any_value(record->'scores') AS scores
FROM records WHERE record->>'kind' = 'impression' AND json_type(record->'observed') = 'OBJECT'
      AND ($bundle IS NULL OR record->>'bundle' = $bundle)
GROUP BY id
"""

VALUES = """
SELECT route, key AS name, TRY_CAST(value AS DOUBLE) AS value FROM asked, json_each(observed)
WHERE TRY_CAST(value AS DOUBLE) IS NOT NULL
"""

SHOWN = """
SELECT route, score, taken.item IS NOT NULL AS taken
FROM (SELECT route, id, unnest(from_json(items, '["VARCHAR"]')) AS item, unnest(from_json(scores, '["DOUBLE"]')) AS score
      FROM asked) shown
LEFT JOIN (SELECT DISTINCT record->>'request_id' AS id, record->>'item' AS item FROM records
           WHERE list_contains($kinds, record->>'kind')) taken USING (id, item)
"""


def seen(journal: Path, kinds: Sequence[str], bundle: str | None = None) -> dict[str, Seen]:
    """Return by route what a journal holds; of the gateway's bundle with that manifest alone, where one is named.

    `kinds` of feedback label an item that was shown as taken.

    Raises:
        ShipyardError: there is no journal, or a kind of feedback that is none.
    """
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ShipyardError("drift: no such kind of feedback", value=wrong[0], allowed=", ".join(KINDS))
    db, _ = read_journal(journal)
    db.execute(f"CREATE TABLE asked AS {ASKED}", {"bundle": bundle})
    values = db.sql(VALUES).fetchnumpy()
    shown = db.execute(SHOWN, {"kinds": list(kinds)}).fetchnumpy()
    found = {}
    for route, count in db.sql("SELECT route, count(*) FROM asked GROUP BY route ORDER BY route").fetchall():
        here, there = values["route"] == route, shown["route"] == route
        told = {str(name): values["value"][here & (values["name"] == name)] for name in np.unique(values["name"][here])}
        found[route] = Seen(count, told, shown["score"][there], shown["taken"][there].astype(bool))
    return found


def drift(
    reference: Mapping[str, Any], now: Mapping[str, Seen], psi: float = PSI, calibration: float = CALIBRATION
) -> dict[str, Any]:
    """Compare what was seen with a reference.

    Returns:
        "drifted", and of each route and measure the value, its limit, the chance of such a value without drift, and the
        requests on both sides; measures of one side alone are "missing" or "new". Routes with too few requests are named.

    Raises:
        ShipyardError: no route has enough requests on both sides.
    """
    lines: list[dict[str, Any]] = []
    few = {}
    for route, told in reference["routes"].items():
        one = now.get(route)
        least = min(told["requests"], one.requests if one is not None else 0)
        if one is None or least < FEWEST:
            few[route] = least
            continue
        for name in sorted(told["measures"].keys() | one.values.keys()):
            line = {"route": route, "measure": name, "limit": psi}
            if name not in one.values or name not in told["measures"]:
                lines.append(line | {"value": None, "chance": None, "drifted": False,
                                     "state": "missing" if name not in one.values else "new"})  # fmt: skip
                continue
            before = told["measures"][name]
            counts = binned(one.values[name], before["edges"])
            lines.append(line | _stability(np.array(before["counts"]), counts, psi))
        line = {"route": route, "measure": "calibration", "limit": calibration}
        if one.labels.any():
            lines.append(line | _calibration(told["calibration"], one, calibration))
        else:
            lines.append(line | {"value": None, "chance": None, "drifted": False, "state": "no feedback"})
    if not lines:
        raise ShipyardError(
            "drift: too few requests", value=", ".join(f"{route}: {count}" for route, count in few.items()) or "none",
            allowed=f"{FEWEST} or more of a route, here and in the reference", mend="wait for more, or name another journal",
        )  # fmt: skip
    return {"drifted": any(line["drifted"] for line in lines), "measures": lines, "too_few": few}


def _stability(before: Any, after: Any, limit: float) -> dict[str, Any]:
    """Return the population stability index of counts [bins] before and after; a half in each bin keeps it finite."""
    old, new = before.sum(), after.sum()
    bins = len(before)
    p, q = (before + 0.5) / (old + 0.5 * bins), (after + 0.5) / (new + 0.5 * bins)
    value = float(((q - p) * np.log(q / p)).sum())
    chance = float(stats.chi2.sf(value / (1 / old + 1 / new), bins - 1)) if bins > 1 else 1.0
    return _told(value, limit, chance) | {"requests": int(new), "reference": int(old)}


def _calibration(told: Mapping[str, Any], now: Seen, limit: float) -> dict[str, Any]:
    """Return how far what was taken is from the rates of the reference, by bins of the score."""
    edges = told["edges"]
    before = np.array(told["shown"])
    # a bin of the reference without anything right or wrong has a rate all the same
    rate = (np.array(told["right"]) + 0.5) / (before + 1)
    shown, taken = binned(now.scores, edges), binned(now.scores[now.labels], edges)
    expected = shown * rate
    value = float(np.abs(taken - expected).sum() / expected.sum())
    # the reference's own rates are estimates too
    spread = shown * rate * (1 - rate) * (1 + shown / (before + 1))
    used = shown > 0
    chance = float(stats.chi2.sf(((taken - expected)[used] ** 2 / spread[used]).sum(), used.sum()))
    return _told(value, limit, chance) | {
        "taken": int(taken.sum()), "expected": round(float(expected.sum()), 1), "requests": now.requests,
    }  # fmt: skip


def _told(value: float, limit: float, chance: float) -> dict[str, Any]:
    return {
        "value": round(value, 4), "chance": float(f"{chance:.3g}"), "drifted": value >= limit and chance < CHANCE,
        "state": "drifted" if value >= limit and chance < CHANCE else "as before",
    }  # fmt: skip


def of_release(release: Release, build: Path) -> tuple[dict[str, Any], str]:
    """Return the reference of a release whose bundles lie in `build`/<profile>, and its gateway's name in journals.

    Raises:
        ShipyardError: the release has no gateway, or its bundle is not there, differs, or has no reference.
    """
    gateways = release.of("gateway")
    if not gateways:
        raise ShipyardError(f"release {release.version} has no gateway", mend="name a journal: --against")
    folder = build / release.profile / "gateway" / "bundle" / "bundle"
    check_bundle(folder, gateways[0].manifest)
    if not (folder / REFERENCE).is_file():
        raise ShipyardError(f"{folder}: no {REFERENCE}", mend="name a journal: --against")
    return read_json(folder / REFERENCE), gateways[0].manifest[:16]


def of_journal(journal: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the reference that a journal is, e.g. that of a release's first days."""
    return refer(seen(journal, kinds))


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return what was found as a table of text."""
    head = f"{'route':<10} {'measure':<24} {'value':>8} {'limit':>6} {'chance':>8}  state"
    rows = [
        f"{one['route']:<10} {one['measure']:<24} {_figure(one['value']):>8} {one['limit']:>6} {_figure(one['chance']):>8}  "
        f"{one['state']}"
        for one in found["measures"]
    ]
    few = [f"{route}: too few requests: {count} of {FEWEST}" for route, count in found["too_few"].items()]
    return [head, *rows, *few]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Compare a journal with its release, or with another journal."""
    kinds, bundle = chosen.taken.split(","), None
    if chosen.against is not None:
        reference = of_journal(chosen.against, kinds)
    else:
        reference, bundle = of_release(open_release(chosen.release or newest(build)), build)
    found = drift(reference, seen(chosen.journal, kinds, bundle), chosen.psi, chosen.calibration)
    print(json.dumps(found) if chosen.json else "\n".join(lines(found)))
    return 3 if found["drifted"] else 0
