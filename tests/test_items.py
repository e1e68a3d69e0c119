"""Items that are newer than a release's catalogue: found soon, by a shard that is trusted, beside what was there before."""

import copy
import csv
import json
import os
import random
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, Made, shipyard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_fusion_gateway import answering, told

from models.config import load_fleet
from serve.errors import ShipyardError
from serve.shard import Fresh, merge, shard_send
from serve.targets import Call, Gone
from shipyard.items import TOLERANCE, Catalogue, Item, read_items
from shipyard.shard import logits

DATA = load_fleet(ROOT / "fleet.toml").data

STATED = 120.0
"""Seconds within which docs/serving.md says that a new item is found."""


# --- one answer of two -----------------------------------------------------------------------------------------------


def test_two_answers_become_one_by_their_scores():
    catalogue = ([1, 2, 3], [9.0, 5.0, 1.0])
    assert merge(catalogue, Fresh(([7, 8], [6.0, 0.5]), frozenset()), 10) == (
        [1, 7, 2, 3, 8],
        [9.0, 6.0, 5.0, 1.0, 0.5],
    )
    assert merge(catalogue, Fresh(([7], [6.0]), frozenset()), 2) == ([1, 7], [9.0, 6.0])
    assert merge(catalogue, Fresh(([7], [5.0]), frozenset()), 10)[0] == [1, 2, 7, 3]


def test_a_changed_item_is_never_taken_from_the_catalogue():
    catalogue = ([1, 2, 3], [9.0, 5.0, 1.0])
    assert merge(catalogue, Fresh(([1], [2.0]), frozenset({1})), 10) == ([2, 1, 3], [5.0, 2.0, 1.0])
    # also where it is not among what the shard answers
    assert merge(catalogue, Fresh(([7], [6.0]), frozenset({1})), 10) == ([7, 2, 3], [6.0, 5.0, 1.0])


def test_what_a_shard_says_is_held_to_its_form():
    def ask(body):
        with answering(told(body)) as url:
            return shard_send(url, "product")(Call({"k": 3}, 5.0, "id"))

    assert ask(b'{"products": [{"product": "a", "score": 2}], "replaces": [4]}') == Fresh(
        (["a"], [2.0]), frozenset({4})
    )
    for body in (b"[]", b"{", b'{"products": [], "replaces": 4}', b'{"products": [], "replaces": [[]]}',
                 b'{"products": [{"product": 1, "score": 1}, {"product": 2, "score": 2}]}'):  # fmt: skip
        with pytest.raises(Gone, match="corrupt"):
            ask(body)


# --- the table -------------------------------------------------------------------------------------------------------

HEADER = ("item", "title", "category", "brand", "size")


def table(file, *rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([HEADER, *rows])
    return file


def test_items_are_cleaned_as_the_release_s_were(tmp_path):
    file = table(
        tmp_path / "new.csv",
        (12, "FRZN \uff30izza, frzn", "GROCERY > Frozen > Pizza", "Acme", "12 oz"),
        (7, "金山清水", "", "", ""),
    )
    assert read_items(file, DATA, [1, 2]) == [
        Item(7, "金山清水", "uncategorised"), Item(12, "frozen pizza grocery acme 12 oz", "frozen pizza")
    ]  # fmt: skip
    assert [item.id for item in read_items(file, DATA, ["1"])] == ["7", "12"]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([(1, "a", "b", "", ""), (1, "c", "d", "", "")], "row 2: twice"),
        ([(1, "", "b", "", "")], "column title, row 1: empty"),
        ([("a7", "a", "b", "", "")], "column item: not an integer; value: 'a7'"),
        ([], "no rows"),
    ],
)
def test_a_table_that_breaks_the_schema_is_refused(tmp_path, rows, fault):
    with pytest.raises(ShipyardError, match=fault):
        read_items(table(tmp_path / "new.csv", *rows), DATA, [1])
    with pytest.raises(ShipyardError, match="no table of items"):
        read_items(tmp_path / "new.xlsx", DATA, [1])


# --- the fleet of one machine ----------------------------------------------------------------------------------------

NEW, CHINESE = 990000001, 990000002


class Up:
    """The fleet of a release, as `make up` starts it."""

    def __init__(self, small):
        self.small, self.url = small, f"http://127.0.0.1:{random.randrange(20_000, 30_000)}"

    def run(self, *arguments, code=0):
        done = shipyard(*arguments, "--build", self.small.build, XDG_CONFIG_HOME=str(self.small.build / "config"))
        assert done.returncode == code, done.stderr
        return done

    def state(self):
        return json.loads((self.small.build / "up" / "up.json").read_text())["members"]

    def ask(self, query):
        # what search says, with no other opinion
        body = {"query": query, "without": ["recommend", "edge_recommend"]}
        asked = urllib.request.Request(f"{self.url}/v1/search", data=json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=30) as answer:
            told = json.loads(answer.read())
        return [one["product"] for one in told["products"]], told

    def soon(self, query, right):
        """Ask until the answer is right; return it."""
        end = time.monotonic() + 30
        while not right(found := self.ask(query)):
            assert time.monotonic() < end, found
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def up(small: Made):
    found = Up(small)
    shard = small.build / small.release.profile / "search" / "items" / "items.json"
    shard.unlink(missing_ok=True)  # of an earlier run in a folder that is kept
    found.run("up", "--release", small.path, "--port", found.url.rpartition(":")[2])
    yield found
    found.run("down")


@pytest.fixture(scope="module")
def catalogue(small: Made):
    return Catalogue(small.release, small.build)


def test_rows_of_a_shard_have_the_scores_that_they_have_in_the_catalogue(catalogue):
    asked = [golden["request"] for golden in catalogue.model.manifest["golden"]]
    own = {event["product"] for request in asked for event in request["history"]}
    rows = np.array(sorted({catalogue.row[product] for product in own} | set(range(1, 2000, 100))))
    items = [Item(*line.values()) for line in catalogue._items.take(rows - 1).to_pylist()]
    model = catalogue.search.over(catalogue.rows(items), 100)
    shard = copy.copy(catalogue.model)
    shard._row = {item.id: row for row, item in enumerate(items, 1)}
    assert sum(len(request["history"]) for request in asked) > 20 and any(request.get("offers") for request in asked)
    for request in asked:  # with all that the shopper did
        [whole] = catalogue.model.session.run(["logits"], catalogue.model.encode([request]))
        part = logits(model, shard.encode([request]))
        assert np.abs(whole[0, rows] - part[0, 1:]).max() <= TOLERANCE * np.abs(whole[0, 1:]).max()


def test_a_build_folder_of_which_a_part_is_another_release_makes_no_shard(catalogue):
    catalogue.check()
    other = copy.copy(catalogue)
    other._project = np.roll(catalogue._project, 1, axis=0)
    with pytest.raises(ShipyardError, match="made anew, get other scores than the release gives them"):
        other.check()


def test_a_new_item_is_found_soon_and_a_shard_that_is_not_trusted_never(up, tmp_path, capsys):
    [changed, *_], _ = up.ask("coffee ground")
    rows = [
        (NEW, "Quantum telescope", "Optics > Quantum telescope", "", ""),
        (CHINESE, "金山清水", "水 > 清水", "", "1 l"),
    ]
    for query, new in (("quantum telescope", NEW), ("清水", CHINESE)):
        products, told = up.ask(query)
        assert new not in products
        # a shard that is not there takes nothing away
        assert told["complete"] and told["targets"]["items"]["state"] in ("unreachable", "open")

    # found: in English, in Chinese, and a changed one by what it is now
    begin = time.monotonic()
    rows.append((changed, "Sundial", "Optics > Sundial", "", ""))
    done = up.run("items", table(tmp_path / "items.csv", *rows), "--release", up.small.path, "--json")
    said = json.loads(done.stdout)
    assert (said["new"], said["changed"]) == (2, 1) and said["served"]
    assert up.soon("quantum telescope", lambda found: NEW in found[0])[0][0] == NEW
    took = time.monotonic() - begin
    assert up.soon("清水", lambda found: CHINESE in found[0])[0][0] == CHINESE
    assert up.soon("sundial", lambda found: changed in found[0])[0][0] == changed
    up.soon("coffee ground", lambda found: changed not in found[0])
    with capsys.disabled():
        print(f"\na new item was found after {took:.1f} s, of which the verb took {said['seconds']} s")
    assert took < STATED

    # refused: by the verb where the key is another, by the server where the bundle is not the attested one
    key = tmp_path / "other.pem"
    key.touch(0o600)
    key.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    other = table(tmp_path / "other.csv", (NEW + 5, "Sextant", "Optics > Sextant", "", ""))
    refused = up.run("items", other, "--release", up.small.path, "--key", key, code=1)
    assert "not the key that signed the release" in refused.stderr
    swap, log = up.small.build / "up" / "items.json", up.small.build / "up" / f"{said['name']}.log"
    swap.write_text(json.dumps({"bundle": said["bundle"], "attestation": up.small.release.artifacts[0].attestation}))
    [pid] = [one["pid"] for one in up.state() if one["name"] == said["name"]]
    os.kill(pid, signal.SIGHUP)
    end = time.monotonic() + 20
    while "not swapped, the bundle before it is served on" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert f"not the bundle that was attested as {said['name']}" in log.read_text()
    assert up.ask("telescope quantum")[0][0] == NEW

    # replaced, without an interruption: the table is all that is new
    again = json.loads(up.run("items", other, "--release", up.small.path, "--json").stdout)
    assert (again["new"], again["changed"], again["name"]) == (1, 0, said["name"])
    assert [one["pid"] for one in up.state() if one["name"] == said["name"]] == [pid]
    assert up.soon("sextant", lambda found: NEW + 5 in found[0])[0][0] == NEW + 5
    up.soon("quantum telescope", lambda found: NEW not in found[0])
    up.soon("coffee ground", lambda found: changed in found[0])

    # gone: the catalogue alone answers
    os.kill(pid, signal.SIGKILL)
    products, told = up.soon("sextant optics", lambda found: found[1]["targets"]["items"]["state"] != "spoke")
    assert NEW + 5 not in products and told["complete"] and len(products) == 10
