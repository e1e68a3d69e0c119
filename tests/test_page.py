"""The page of `make up` in a real browser: what a person does with it, over a real fleet.

The browser is Debian's chromium-headless-shell (`make browser`).
"""

import os
import shutil

import pytest
from conftest import ROOT
from playwright.sync_api import expect, sync_playwright
from test_fusion_gateway import FUSION, Fleet

from shipyard.fleet import down
from shipyard.pages.live import page

UNPACKED = ROOT / "build" / "browser"


def browser():
    """Return the browser's program and what it needs to find its libraries, or None."""
    if (found := shutil.which("chromium-headless-shell")) is not None:
        return found, {}
    if (program := UNPACKED / "usr" / "lib" / "chromium" / "chromium-headless-shell").is_file():
        return str(program), {"LD_LIBRARY_PATH": ":".join(sorted({str(p.parent) for p in UNPACKED.rglob("*.so*")}))}
    return None


pytestmark = pytest.mark.skipif(browser() is None, reason="no chromium-headless-shell: make browser")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    found = Fleet(tmp_path_factory.mktemp("page"))
    (found.folder / "up" / "page.html").write_text(
        page([member.bundle for member in found.members], found.folder), encoding="utf-8"
    )
    found.start()
    yield found
    down(found.folder)


@pytest.fixture(scope="module")
def chromium():
    program, more = browser()
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"], env=dict(os.environ) | more)
        yield found
        found.close()


@pytest.fixture
def opened(fleet, chromium):
    """The page, opened and answered; whatever it logs or fails to load is a fault."""
    found, faults = chromium.new_page(), []
    # what it asks for and is refused is told on the page
    found.on(
        "console", lambda told: faults.append(told.text) if told.type == "error" and "400 (" not in told.text else None
    )
    found.on("pageerror", lambda fault: faults.append(str(fault)))
    found.goto(f"{fleet.url}/")
    expect(found.locator("#fused > li")).to_have_count(10)
    yield found
    found.close()
    assert faults == []


def fused(found):
    return [line.split()[0] for line in found.locator("#fused > li").all_inner_texts()]


def test_a_shopper_a_search_and_each_targets_answer_are_shown(fleet, opened):
    expect(opened.locator("#shopper option")).to_have_count(2)
    opened.fill("#query", "牛奶")
    with opened.expect_response("**/v1/search") as answered:
        opened.click("#ask button")
    told = answered.value.json()
    expect(opened.locator("#fused > li").first).to_contain_text(str(told["products"][0]["product"]))
    assert fused(opened) == [str(one["product"]) for one in told["products"]]
    for source in FUSION["sources"]:
        section = opened.locator(f"#target-{source}")
        expect(section.locator("small")).to_have_text(f"spoke, {told['targets'][source]['ms']} ms")
        shown = section.locator("li").all_inner_texts()
        assert shown == [str(product) for product in told["targets"][source]["products"]]
    expect(opened.locator("#how")).to_contain_text("by weighted,")


def test_a_target_that_is_switched_off_is_left_out_and_comes_back(fleet, opened):
    opened.uncheck("#on-search")
    expect(opened.locator("#target-search small")).to_have_text("off")
    expect(opened.locator("#target-search li")).to_have_count(0)
    query = {"query": opened.input_value("#query"), "history": [], "k": 10}
    expected = [str(product) for product, _ in fleet.offline(query, ["recommend", "edge_recommend"])]
    assert fused(opened) == expected
    for source in ("recommend", "edge_recommend"):
        opened.uncheck(f"#on-{source}")
    expect(opened.locator("#told")).to_contain_text("leaves none to ask")
    expect(opened.locator("#fused > li")).to_have_count(0)
    for source in FUSION["sources"]:
        opened.check(f"#on-{source}")
    expect(opened.locator("#target-search small")).to_contain_text("spoke")
    expect(opened.locator("#fused > li")).to_have_count(10)


def test_without_a_query_it_recommends_and_a_click_is_written(fleet, opened):
    opened.select_option("#shopper", "1")
    expect(opened.locator("#fused > li")).to_have_count(10)
    opened.fill("#query", "")
    with opened.expect_response("**/v1/recommend") as answered:
        opened.click("#ask button")
    told = answered.value.json()
    expect(opened.locator("#target-search small")).to_have_text("off")
    opened.locator("#fused > li").first.get_by_role("button", name="click").click()
    expect(opened.locator("#told")).to_have_text(f"written: click of {told['products'][0]['product']}")
    clicks = [one for one in fleet.records() if one["kind"] == "click" and one["request_id"] == told["request_id"]]
    assert [(one["user"], one["item"]) for one in clicks] == [("page", told["products"][0]["product"])]
