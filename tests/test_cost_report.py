"""The report as its readers meet it: our own templates, differences, guardrails, JSON, Markdown, the page, exit codes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import aws_cdk as cdk
import pytest
from jsonschema import Draft202012Validator, ValidationError

import app
from infra.cost import difference as comparing
from infra.cost.assembly import read_stacks
from infra.cost.difference import difference
from infra.cost.document import DOCUMENTS, json_schema, read_document, write_difference, write_document
from infra.cost.guardrails import crossed, over_caps
from infra.cost.page import difference_page, report_page
from infra.cost.prices import load_book, parse_book, write_book
from infra.cost.report import price
from infra.cost.tables import coverage, difference_lines, difference_markdown, report_markdown
from infra.cost.usage import KEYS, Usage
from models.config import Guardrails, load_fleet
from shipyard.cli import main
from tests.test_cost import everything, stack, usage_of, variant
from tests.test_infra import CONTEXT, write_release

ROOT = Path(__file__).resolve().parents[1]
BOOK = load_book()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The cloud assembly of every environment of fleet.toml, with a sample release."""
    out = tmp_path_factory.mktemp("cdk.out")
    release = write_release(tmp_path_factory.mktemp("release") / "sample")
    made = cdk.App(outdir=str(out), context={**CONTEXT, "release": str(release)}, stack_traces=False)
    app.build(made, ROOT)
    made.synth()
    return out


def report(resources, usage=None, **more):
    return price([stack(resources, **more)], BOOK, usage or Usage(), "here")


def endpoint(count=1, size="ml.g5.xlarge"):
    return {
        "Config": {
            "Type": "AWS::SageMaker::EndpointConfig",
            "Properties": {"ProductionVariants": [variant(count, size)]},
        }
    }


# --- our own templates -----------------------------------------------------------------------------------------------


def test_every_resource_of_our_templates_is_in_the_report(ours):
    found = price(read_stacks(ours), BOOK, Usage())
    templates = {path: json.loads(path.read_text()) for path in ours.rglob("*.template.json")}
    count = sum(len(template["Resources"]) for template in templates.values())
    assert count > 100
    assert sum(found.resources.values()) == count


def test_the_report_knows_every_resource_type_of_our_templates(ours):
    """A new type in a stack fails here until infra.cost prices it or says why it is free."""
    found = price(read_stacks(ours), BOOK, Usage())
    assert {line.type for line in found.lines if "does not know" in line.note} == set()


UNPRICED = {"AWS::IoT::FleetMetric"}
"""Types of ours of which a part is known to be unknown: queries of the fleet's index."""


def test_no_other_price_of_our_templates_is_unknown(ours):
    found = price(read_stacks(ours), BOOK, Usage())
    unknown = [
        (line.path, line.item, line.note)
        for line in found.lines
        if line.status == "unknown" and line.type not in UNPRICED
    ]
    assert unknown == []
    assert all(line.note for line in found.lines if line.status == "free")


def test_our_environments_keep_their_caps(ours):
    rails = {name: env.cost for name, env in load_fleet(ROOT / "fleet.toml").env.items()}
    assert all(rail.cap for rail in rails.values())
    assert over_caps(price(read_stacks(ours), BOOK, Usage()), rails) == []


def test_our_templates_take_less_than_a_second_with_the_process(ours):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom infra.cost.command import main\n"
        "main(['cost', sys.argv[1]])\nprint(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ours)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stderr.splitlines()[-1]) < 1.5  # of which imports are more than half; the report alone is below
    assert "never counted as 0" in done.stdout


# --- differences -----------------------------------------------------------------------------------------------------


def test_nothing_changes_between_a_template_and_itself(ours):
    stacks = read_stacks(ours)
    same = difference(price(stacks, BOOK, Usage()), price(stacks, BOOK, Usage()))
    assert same.changes == ()
    assert "nothing changes" in difference_lines(same)[0]
    used = usage_of(requests_per_second=5, request_kb=1, response_kb=1, storage_gb=1)
    assert difference(report(everything(), used), report(everything(), used)).changes == ()


def test_a_difference_is_a_tree_of_signs_with_amounts_and_reasons():
    change = difference(
        report({**endpoint(1), "Nat": {"Type": "AWS::EC2::NatGateway"}}),
        report({**endpoint(2, "ml.g5.2xlarge"), "Ip": {"Type": "AWS::EC2::EIP"}}),
    )
    told = "\n".join(difference_lines(change))
    assert [(one.sign, one.line.resource, one.delta and one.delta[1]) for one in change.changes] == [
        ("~", "Config", Decimal("3.03") * 730 - Decimal("1.4084") * 730),
        ("+", "Ip", Decimal("3.65")),
        ("-", "Nat", Decimal("-32.85")),
        ("-", "Nat", None),
    ]
    assert "ProductionVariants.0.InstanceType: ml.g5.xlarge -> ml.g5.2xlarge" in told
    assert re.search(r"a month, USD: low \+\$1,154\.57 .*expected \+\$1,154\.57 \(\$1,060\.98 -> \$2,215\.55\)", told)
    assert "depends on usage, $0.045 per GB" in told
    assert "! ~ search" not in difference_markdown(change)
    assert re.search(r"^\+     \+ public IPv4 address", difference_markdown(change), re.MULTILINE)


def test_a_price_that_changed_in_the_book_is_told():
    rows = [replace(row, price=row.price * 2) if row.sku == "public_ipv4.hour" else row for row in BOOK.flat()]
    newer = parse_book(write_book(rows), "newer")
    resources = {"Ip": {"Type": "AWS::EC2::EIP"}}
    [one] = difference(report(resources), price([stack(resources)], newer, Usage(), "here")).changes
    assert one.why == ("unit price: $0.005 per hour -> $0.01 per hour",)


def test_an_unknown_price_stays_out_of_the_difference_and_is_named():
    old = report(endpoint(1, "ml.g5.xlarge"))
    new = report(endpoint(1, "ml.unheard.xlarge"))
    for change in (difference(old, new), difference(new, old)):
        assert change.total() == {}
        assert [one.delta for one in change.unknown] == [None]
        told = "\n".join(difference_lines(change))
        assert "not in the difference, for a price is not known: dev/gpu Config" in told
        assert "the other side is $1,028.13" in told
        # what one side alone knows is in neither sum
        assert "a month, USD: low $0.00 ($0.00 -> $0.00)" in told


def test_a_resource_that_becomes_unknown_is_no_fall_of_its_cost():
    size = {"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": "c5.large"}}}
    lost = {"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": {"Fn::GetAtt": ["X", "Y"]}}}}
    change = difference(report(size), report(lost))
    assert change.total() == {}
    assert change.unknown
    assert difference(report(size), report({})).total()["USD"][1] == Decimal("-62.05")


def test_a_resource_that_stays_is_changed_whatever_its_lines_are():
    change = difference(
        report({"Config": endpoint()["Config"], "Nat": {"Type": "AWS::EC2::NatGateway"}}),
        report({"Config": endpoint()["Config"], "Nat": {"Type": "AWS::EC2::NatGateway"}}, usage_of(internet_gb=1)),
    )
    assert [one.sign for one in change.changes] == ["+"]
    assert "  ~ Nat  (AWS::EC2::NatGateway)" in difference_lines(change)


def test_a_release_that_runs_two_fleets_is_told_apart_from_the_month():
    resources = endpoint() | {
        "E": {"Type": "AWS::SageMaker::Endpoint", "Properties": {"EndpointConfigName": {"Ref": "Config"}}}
    }
    used = usage_of(deployment_minutes=30)
    change = difference(report(endpoint(), Usage()), report(resources, used))
    assert change.total() == {}
    assert change.total(release=True)["USD"][1] == Decimal("0.7042")
    assert any(line.startswith("once a release, USD: low +$0.70") for line in difference_lines(change))


def test_what_rests_on_other_usage_is_told():
    nat = {"Nat": {"Type": "AWS::EC2::NatGateway"}}
    told = difference_lines(difference(report(nat, replace(usage_of(processed_gb=100), source="a.toml")), report(nat)))
    assert "lines not in the difference, for usage tells them on one side alone: 1" in told
    assert told[-1].endswith("a.toml, 730 hours, no free tiers -> no usage file, 730 hours, no free tiers")
    assert "rest on" not in "".join(difference_lines(difference(report(nat), report({}))))


def test_the_last_of_28_digits_is_no_change_of_a_scenario():
    old = report({"Ip": {"Type": "AWS::EC2::EIP"}})
    amount = (Decimal("3.65") + Decimal("1e-25"), Decimal("3.65"), Decimal("4.65"))
    new = replace(old, lines=tuple(replace(line, amount=amount) for line in old.lines))
    assert "public IPv4 address: $0.00 / $0.00 / +$1.00" in "\n".join(difference_lines(difference(old, new)))


def test_an_amount_in_another_currency_is_no_difference():
    size = {"It": {"Type": "AWS::EC2::Instance", "Properties": {"InstanceType": "c5.large"}}}
    change = difference(report(size), price([stack(size, region="cn-north-1")], BOOK, Usage(), "here"))
    assert change.total() == {}
    assert "in another currency, now CN¥539.47" in "".join(difference_lines(change))


# --- guardrails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rail", "told"),
    [
        ({"increase": 1000}, ["dev: $1,028.13 a month more, allowed $1,000.00"]),
        ({"increase": 1100}, []),
        ({"increase_percent": 99}, ["dev: 100.0% more, allowed 99%"]),
        ({"increase_percent": 100}, []),
        ({"cap": 2000}, ["dev: $2,056.26 a month crosses the cap of $2,000.00"]),
        ({"cap": 1000}, []),  # it was over before: this change does not cross it
        ({"cap": 2100}, []),
    ],
)
def test_guardrails_bound_a_change(rail, told):
    change = difference(report(endpoint(1)), report(endpoint(2)))
    assert crossed(change, {"dev": Guardrails(**rail)}) == told
    assert crossed(change, {"prod": Guardrails(**rail)}) == []


def test_a_cap_bounds_a_report():
    rails = {"dev": Guardrails(cap=1000)}
    assert over_caps(report(endpoint()), rails) == ["dev: $1,028.13 a month is over the cap of $1,000.00"]
    assert over_caps(report(endpoint()), {"dev": Guardrails(cap=1100)}) == []
    assert over_caps(report(endpoint(), name="prod/gpu"), rails) == []


# --- forms -----------------------------------------------------------------------------------------------------------


def test_a_report_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "report.json"
    used = usage_of(requests_per_second=5, request_kb=1, response_kb=1, unit_requests_per_second=2)
    made = report(everything(), used)
    path.write_text(write_document(made))
    assert read_document(path) == made
    table = json.loads(path.read_text())
    assert table["schema"] == "shipyard.cost/1"
    assert table["resources"]["unknown"] == 1
    assert Decimal(table["totals"]["USD"][1]) == made.total()["USD"][1]
    assert set(table["million"]) == {"dev/gpu"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_schemas_in_the_documents_are_those_of_the_code(name):
    assert json.loads((ROOT / "docs" / f"cost-{name}.schema.json").read_text()) == json_schema(name)


def test_documents_fit_their_schemas():
    used = usage_of(requests_per_second=5, request_kb=1, response_kb=1, unit_requests_per_second=2)
    made = report(everything(), used)
    Draft202012Validator(json_schema()).validate(json.loads(write_document(made)))
    change = json.loads(write_difference(difference(report(endpoint(1)), made), ["dev: too much"]))
    Draft202012Validator(json_schema("difference")).validate(change)
    assert change["guardrails"] == ["dev: too much"]
    with pytest.raises(ValidationError):
        Draft202012Validator(json_schema("difference")).validate({**change, "changes": [{}]})


def test_guardrails_that_are_crossed_are_in_every_form():
    change = difference(report(endpoint(1)), report(endpoint(2)))
    [told] = crossed(change, {"dev": Guardrails(increase=1)})
    assert f"- **guardrail** {told}" in difference_markdown(change, [told])
    assert f"- **guardrail** {told}" in report_markdown(change.new, [told])
    for page in (difference_page(change, [told]), report_page(change.new, [told])):
        assert f"Guardrail crossed</strong> {told}" in page
    assert "uardrail" not in difference_markdown(change) + report_page(change.new)


def test_the_page_of_a_difference_has_sums_and_signs():
    change = difference(report(endpoint(1)), report({**endpoint(2), "<b>": {"Type": "AWS::EC2::EIP"}}))
    page = difference_page(change)
    assert '<td>dev</td><td class="n">+$1,031.78</td>' in page
    assert '<span class="new">  + &lt;b&gt;  (AWS::EC2::EIP)</span>' in page
    assert 'class="changed"' in page


def test_markdown_has_sums_coverage_and_every_line():
    told = report_markdown(report(everything()))
    assert "| all, USD |" in told
    assert "1 unknown" in told
    assert "`" not in told
    assert len(re.findall(r"^\| dev/gpu: ", told, re.MULTILINE)) > 15


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_nothing_beside_itself_and_escapes_names():
    resources = everything() | {"<script>alert(1)</script>搜索": {"Type": "AWS::EC2::EIP"}}
    used = usage_of(requests_per_second=5, request_kb=1, response_kb=1, unit_requests_per_second=2)
    page = report_page(report(resources, used))
    outline = Outline()
    outline.feed(page)
    assert outline.tags.count("svg") == 4
    assert "script" not in outline.tags
    assert outline.links == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert any("搜索" in text for text in outline.texts)


def test_coverage_says_what_share_is_priced():
    kinds = ("AWS::Quantum::Computer", "AWS::EC2::EIP", "AWS::EC2::NatGateway", "AWS::EC2::VPC")
    made = report({f"R{k}": {"Type": kind} for k, kind in enumerate(kinds)})
    assert coverage(made).startswith(
        "4 resources: 1 free, 1 priced, 1 priced but for usage keys that are not given, 1 unknown; "
        "50.0% of the templates is priced, 25.0% in part."
    )
    assert "0.0% in part" in coverage(report({"N": {"Type": "AWS::EC2::NatGateway"}}, usage_of(processed_gb=1)))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    def write(name, resources):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"Resources": resources}))
        return str(path)

    return write


def test_the_verb_prices_a_template_and_writes_every_form(template, tmp_path, capsys, monkeypatch):
    path, page, saved = template("new", endpoint(2)), tmp_path / "out" / "cost.html", tmp_path / "saved.json"
    monkeypatch.chdir(tmp_path)  # where no fleet.toml is
    assert main(["cost", path, "--html", str(page), "--save", str(saved)]) == 0
    assert "$2,056.26" in capsys.readouterr().out
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["cost", path, "--json"]) == 0
    assert capsys.readouterr().out == saved.read_text()
    assert main(["cost", "diff", str(saved), template("old", endpoint(1)), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == {"USD": ["-1028.1320"] * 3}
    assert {one["sign"] for one in told["changes"]} == {"~"}
    assert main(["cost", "diff", path, template("copy", endpoint(2))]) == 0
    assert capsys.readouterr().out.startswith("nothing changes\n")


def test_a_guardrail_that_is_crossed_is_an_exit_code(ours, tmp_path, capsys):
    fleet = (ROOT / "fleet.toml").read_text()
    tight = tmp_path / "fleet.toml"
    tight.write_text(re.sub(r"cap = \d+", "cap = 100", fleet))
    assert main(["cost", str(ours), "--env", "dev", "--fleet", str(tight)]) == 3
    assert "guardrail: dev: " in capsys.readouterr().err
    assert main(["cost", str(ours), "--env", "dev", "--fleet", str(ROOT / "fleet.toml")]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cost", "nowhere"], "nowhere: nothing is there"),
        (["cost", "{t}", "--usage", "none.toml"], "not a usage file"),
        (["cost", "{t}", "--parameter", "x"], "--parameter: not NAME=VALUE"),
        (["cost", "{t}", "--parameter", "Size=1"], "no template has it; value: 'Size'"),
        (["prices", "refresh", "--book", "none.csv"], "none.csv: cannot be read"),
        (["cost", "{t}", "--env", "qa"], "--env: no such environment"),
        (["cost", "{t}", "--prices", "none.csv"], "cannot be read"),
        (["cost", "diff", "{t}", "nowhere"], "nowhere: nothing is there"),
        (["cost", "{t}", "--fleet", "none.toml"], "none.toml: no such file"),
    ],
)
def test_an_error_is_one_line(template, arguments, told, capsys):
    path = template("t", endpoint())
    assert main([part.replace("{t}", path) for part in arguments]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_the_schema_is_printed(capsys):
    assert main(["cost", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Document"


def test_a_line_that_only_moves_in_the_template_is_no_change():
    assert comparing.difference(report(everything()), report(dict(reversed(everything().items())))).changes == ()


def test_the_usage_that_make_cost_prices_fits_our_templates(ours, tmp_path, capsys):
    page = tmp_path / "report.html"
    fleet = str(ROOT / "fleet.toml")
    assert (
        main(["cost", str(ours), "--usage", str(ROOT / "docs" / "usage.toml"), "--fleet", fleet, "--html", str(page)])
        == 0
    )
    assert "nothing" not in capsys.readouterr().err
    assert page.read_text().count("<svg") == 4


def test_the_documents_tell_every_usage_key():
    told = (ROOT / "docs" / "cost.md").read_text()
    assert [key for key, meaning in KEYS.items() if f"| `{key}` | {meaning} |" not in told] == []
