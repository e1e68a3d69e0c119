"""The refresh of the price book: recorded answers in the Price List API's own form, through botocore's stubber."""

import json
from decimal import Decimal

import boto3
import pytest
from botocore.stub import ANY, Stubber

from infra.cost.prices import load_book, parse_book, write_book
from infra.cost.refresh import query, refresh, replace_book
from models.release import ShipyardError

HEAD = "sku,region,unit,per,currency,tier_from,price,date,confidence,note,source\n"


def product(usage, *tiers, service="AmazonECS", family="Compute", currency="USD", sku="XSZATS4VYMDC9CYN", **attributes):
    """A product as `get_products` has it: a text of JSON, prices as texts of ten decimals, a dimension a tier."""
    dimensions = {
        f"{sku}.JRTCKXETXF.{k}": {
            "unit": "hours",
            "beginRange": begin,
            "endRange": "Inf" if k == len(tiers) - 1 else tiers[k + 1][0],
            "description": usage,
            "appliesTo": [],
            "rateCode": f"{sku}.JRTCKXETXF.{k}",
            "pricePerUnit": {currency: f"{Decimal(price):.10f}"},
        }
        for k, (begin, price) in enumerate(tiers)
    }
    return json.dumps(
        {
            "product": {
                "productFamily": family,
                "attributes": {"regionCode": "us-east-1", "usagetype": usage, "servicecode": service, **attributes},
                "sku": sku,
            },
            "serviceCode": service,
            "terms": {
                "OnDemand": {
                    f"{sku}.JRTCKXETXF": {
                        "priceDimensions": dimensions,
                        "sku": sku,
                        "effectiveDate": "2026-11-01T00:00:00Z",
                        "offerTermCode": "JRTCKXETXF",
                        "termAttributes": {},
                    }
                }
            },
            "version": "20261121182130",
            "publicationDate": "2026-11-21T18:21:30Z",
        }
    )


FARGATE = [
    product("USE1-ECS-Anywhere-Instance-hours-WithFree", ("0", "0"), ("2200", "0.01025")),
    product("USE1-Fargate-vCPU-Hours:perCPU", ("0", "0.04048")),
    product("USE1-Fargate-ARM-vCPU-Hours:perCPU", ("0", "0.03238")),
    product("USE1-Fargate-Windows-vCPU-Hours:perCPU", ("0", "0.09148")),
    product("USE1-SpotUsage-Fargate-vCPU-Hours:perCPU", ("0", "0.012")),
    product("USE1-Fargate-EphemeralStorage-GB-Hours", ("0", "0.000111")),
]


def book(*rows):
    return parse_book(HEAD + "".join(f"{row}\n" for row in rows), "here")


def row(sku, price, unit="hour", per=1, tier=0, region="us-east-1", currency="USD"):
    return f"{sku},{region},{unit},{per},{currency},{tier},{price},2025-01-01,medium,,a file"


def ask(old, *pages, regions=("us-east-1",), expected=ANY):
    """Refresh a book of one price; each page is an answer of the API."""
    api = boto3.client("pricing", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(api) as stub:
        for k, page in enumerate(pages):
            more = {"NextToken": str(k)} if k < len(pages) - 1 else {}
            wanted = {
                "ServiceCode": ANY,
                "Filters": expected,
                "FormatVersion": "aws_v1",
                **({"NextToken": ANY} if k else {}),
            }
            stub.add_response("get_products", {"FormatVersion": "aws_v1", "PriceList": page, **more}, wanted)
        outcome = refresh(old, regions, lambda region: api)
        stub.assert_no_pending_responses()
    return outcome


@pytest.mark.parametrize(
    ("sku", "price"),
    [
        ("fargate.linux.x86.vcpu", "0.04048"),
        ("fargate.linux.arm.vcpu", "0.03238"),
        ("fargate.ephemeral_storage", "0.000111"),
    ],
)
def test_usage_types_are_matched_whole(sku, price):
    outcome = ask(book(row(sku, price)), FARGATE)
    [found] = outcome.found
    assert [tier.price for tier in found.new] == [Decimal(price)]
    assert (found.new[0].date, found.new[0].confidence) == ("2026-11-21", "high")
    assert "AWS Price List API, AmazonECS, USE1-Fargate" in found.new[0].source


def test_the_prefix_of_a_region_may_be_missing():
    old = book(row("alb.hour", "0.0225"))
    shared = [
        product("LoadBalancerUsage", ("0", "0.0225"), service="AWSELB", family="Load Balancer-Application"),
        product("Outposts-LoadBalancerUsage", ("0", "9"), service="AWSELB", family="Load Balancer-Application"),
        product("TS-LoadBalancerUsage2", ("0", "9"), service="AWSELB", family="Load Balancer-Application"),
        product("LoadBalancerUsage", ("0", "0.025"), service="AWSELB", family="Load Balancer"),
    ]
    assert [tier.price for tier in ask(old, shared).found[0].new] == [Decimal("0.0225")]


def test_answers_of_several_pages_are_read_with_the_right_filters():
    old = book(row("sagemaker.hosting.ml.g5.xlarge", "1.4084"))
    wanted = [
        {"Type": "TERM_MATCH", "Field": name, "Value": value}
        for name, value in (("component", "Hosting"), ("instanceName", "ml.g5.xlarge"), ("regionCode", "us-east-1"))
    ]
    right = product("USE1-Host:ml.g5.xlarge", ("0", "1.408"), service="AmazonSageMaker", family="ML Instance")
    other = product("USE1-AsyncInf:ml.g5.xlarge", ("0", "1.408"), service="AmazonSageMaker", family="ML Instance")
    outcome = ask(old, [other], [right], expected=wanted)
    assert outcome.found[0].new[0].price == Decimal("1.408")
    assert not outcome.found[0].held


def test_tiers_are_read_and_a_free_one_is_left_out():
    old = book(
        row("apigw.http.requests", 1, "request", 1000000),
        row("apigw.http.requests", "0.9", "request", 1000000, 300000000),
    )
    api = product(
        "USE1-ApiGatewayHttpRequest", ("0", "0.000001"), ("300000000", "0.0000009"), service="AmazonApiGateway"
    )
    [found] = ask(old, [api]).found
    assert [(tier.tier_from, tier.price) for tier in found.new] == [(0, 1), (300000000, Decimal("0.9"))]
    free = product("USE1-ApiGatewayHttpRequest", ("0", "0"), ("1000000", "0.000001"), ("300000000", "0.0000009"))
    assert [(t.tier_from, t.price) for t in ask(old, [free]).found[0].new] == [(0, 1), (300000000, Decimal("0.9"))]


def test_a_change_over_ten_per_cent_is_held_back_until_it_is_confirmed():
    old = book(row("fargate.linux.x86.vcpu", "0.0300"))
    outcome = ask(old, FARGATE)
    assert outcome.found[0].held
    assert outcome.book(confirmed=False) == old
    assert outcome.book(confirmed=True).find("fargate.linux.x86.vcpu", "us-east-1")[0].price == Decimal("0.04048")
    assert "held back  fargate.linux.x86.vcpu us-east-1: 0.03 -> 0.04048 USD" in outcome.told(confirmed=False)
    assert "1 held back: look at them, then --confirm" in outcome.told(confirmed=False)[-1]
    small = ask(book(row("fargate.linux.x86.vcpu", "0.0400")), FARGATE)
    assert small.book(confirmed=False).flat()[0].price == Decimal("0.04048")


def test_a_tier_that_begins_elsewhere_is_held_back_too():
    old = book(
        row("apigw.http.requests", 1, "request", 1000000), row("apigw.http.requests", "0.9", "request", 1000000, 10**8)
    )
    api = product("USE1-ApiGatewayHttpRequest", ("0", "0.000001"), ("300000000", "0.0000009"))
    outcome = ask(old, [api])
    assert outcome.book(confirmed=False) == old
    assert outcome.told(confirmed=False)[0] == (
        "held back  apigw.http.requests us-east-1: 1, 0.9 from 100000000 -> 1, 0.9 from 300000000 USD"
    )
    fewer = ask(old, [product("USE1-ApiGatewayHttpRequest", ("0", "0.000001"))])
    assert fewer.found[0].held


def test_a_price_that_the_api_does_not_tell_without_doubt_stays():
    old = book(row("fargate.linux.x86.vcpu", "0.0400"))
    twice = [product("USE1-Fargate-vCPU-Hours:perCPU", ("0", "1"), sku=name) for name in ("A", "B")]
    nothing = [product("USE1-Fargate-vCPU-Hours:perCPU", ("0", "0"))]
    yuan = [product("USE1-Fargate-vCPU-Hours:perCPU", ("0", "1"), currency="CNY")]
    told_of = {"0 products": [], "2 products": twice, "a price of 0": nothing, "no price in USD": yuan}
    for told, page in told_of.items():
        outcome = ask(old, page)
        assert outcome.book(confirmed=True) == old
        assert told in outcome.problems[0]


def test_a_region_that_is_new_gets_rows_and_china_its_currency():
    old = book(row("nat_gateway.hour", "0.045"))
    outcome = ask(old, [product("CNN1-NatGateway-Hours", ("0", "0.427"), service="AmazonEC2", currency="CNY")],
                  regions=("cn-north-1",))  # fmt: skip
    [price] = outcome.book(confirmed=False).find("nat_gateway.hour", "cn-north-1")
    assert (price.price, price.currency) == (Decimal("0.427"), "CNY")
    assert outcome.told(confirmed=False)[0] == "new        nat_gateway.hour cn-north-1: 0.427 CNY"


def test_an_answer_that_fails_leaves_the_book_as_it_is(tmp_path):
    api = boto3.client("pricing", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(api) as stub:
        stub.add_client_error("get_products", "ThrottlingException", "Rate exceeded")
        with pytest.raises(ShipyardError, match="Rate exceeded"):
            refresh(book(row("nat_gateway.hour", "0.045")), ["us-east-1"], lambda region: api)


def test_a_book_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "aws.csv"
    path.write_text(HEAD + row("nat_gateway.hour", "0.045") + "\n")
    replace_book(path, book(row("nat_gateway.hour", "0.05")))
    assert path.read_text() == write_book(book(row("nat_gateway.hour", "0.05")).flat())
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ShipyardError, match="No space left"):
        replace_book(path, book(row("nat_gateway.hour", "0.06")))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_most_of_what_the_book_holds_can_be_refreshed():
    known = {price.sku for price in load_book().flat() if query(price.sku)}
    assert len(known) > 250
    assert {"sagemaker.hosting.ml.g5.xlarge", "ec2.ondemand.linux.c7g.xlarge", "fargate.linux.arm.memory"} <= known
