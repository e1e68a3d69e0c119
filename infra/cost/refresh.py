"""Bring the price book up to date from the AWS Price List API; a large change waits until it is confirmed.

A published table once carried an error for five days, so a change of more than 10 % is held back. Usage types are matched
whole: those of ARM, Windows, Spot and ephemeral storage contain the words of the plain ones.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from infra.cost.prices import GLOBAL, Book, Price, parse_book, write_book
from models.release import ShipyardError

HELD_BACK = Decimal("0.1")

_USAGE = {
    "fargate.linux.x86.vcpu": ("AmazonECS", "Fargate-vCPU-Hours:perCPU"),
    "fargate.linux.x86.memory": ("AmazonECS", "Fargate-GB-Hours"),
    "fargate.linux.arm.vcpu": ("AmazonECS", "Fargate-ARM-vCPU-Hours:perCPU"),
    "fargate.linux.arm.memory": ("AmazonECS", "Fargate-ARM-GB-Hours"),
    "fargate.ephemeral_storage": ("AmazonECS", "Fargate-EphemeralStorage-GB-Hours"),
    "alb.hour": ("AWSELB", "LoadBalancerUsage", "Load Balancer-Application"),
    "alb.lcu": ("AWSELB", "LCUUsage", "Load Balancer-Application"),
    "nlb.hour": ("AWSELB", "LoadBalancerUsage", "Load Balancer-Network"),
    "nlb.nlcu": ("AWSELB", "LCUUsage", "Load Balancer-Network"),
    "nat_gateway.hour": ("AmazonEC2", "NatGateway-Hours"),
    "nat_gateway.data": ("AmazonEC2", "NatGateway-Bytes"),
    "vpce.interface.hour_per_az": ("AmazonVPC", "VpcEndpoint-Hours"),
    "vpce.interface.data": ("AmazonVPC", "VpcEndpoint-Bytes"),
    "public_ipv4.hour": ("AmazonVPC", "PublicIPv4:InUseAddress"),
    "s3.standard.storage": ("AmazonS3", "TimedStorage-ByteHrs"),
    "s3.standard.tier1_put": ("AmazonS3", "Requests-Tier1"),
    "s3.standard.tier2_get": ("AmazonS3", "Requests-Tier2"),
    "ecr.storage": ("AmazonECR", "TimedStorage-ByteHrs"),
    "kms.cmk": ("awskms", "KMS-Keys"),
    "secret.month": ("AWSSecretsManager", "AWSSecretsManager-Secrets"),
    "secret.api": ("AWSSecretsManager", "AWSSecretsManagerAPIRequest"),
    "lambda.requests": ("AWSLambda", "Request"),
    "lambda.gb_s.x86": ("AWSLambda", "Lambda-GB-Second"),
    "lambda.gb_s.arm": ("AWSLambda", "Lambda-GB-Second-ARM"),
    "cw.alarm.standard": ("AmazonCloudWatch", "CW:AlarmMonitorUsage"),
    "cw.alarm.highres": ("AmazonCloudWatch", "CW:HighResAlarmMonitorUsage"),
    "cw.alarm.composite": ("AmazonCloudWatch", "CW:CompositeAlarmMonitorUsage"),
    "cw.logs.ingest.standard": ("AmazonCloudWatch", "DataProcessing-Bytes"),
    "apigw.http.requests": ("AmazonApiGateway", "ApiGatewayHttpRequest"),
    "apigw.rest.requests": ("AmazonApiGateway", "ApiGatewayRequest"),
    "firehose.ingest": ("AmazonKinesisFirehose", "BilledBytes"),
}
"""Service code and usage type, without its region's prefix, of a price; the product family where two share one."""

_PREFIX = r"(?:[A-Z]{2,4}\d?-|[a-z]{2}(?:-[a-z]+)+-\d-)?"
"""Of a region before a usage type: USE1-, us-east-1-, or none."""


@dataclass(frozen=True)
class Query:
    """Say which product of the Price List API a price is."""

    service: str
    filters: Mapping[str, str]
    usage: str
    family: str = ""


@dataclass(frozen=True)
class Found:
    """A price as it is in the book, none for a new one, and as the API has it."""

    old: tuple[Price, ...]
    new: tuple[Price, ...]

    @property
    def change(self) -> Decimal:
        """Return by what part the price or the start of a tier changes, the most of its tiers; 0 for a new one."""
        pairs = [
            pair
            for old, new in zip(self.old, self.new, strict=False)
            for pair in ((old.price, new.price), (old.tier_from, new.tier_from))
        ]
        return max((_part(old, new) for old, new in pairs), default=Decimal(0))

    @property
    def held(self) -> bool:
        """Return whether the change is too large to be taken unseen; so is another number of tiers, or currency."""
        if not self.old:
            return False
        other = len(self.old) != len(self.new) or self.old[0].currency != self.new[0].currency
        return other or self.change > HELD_BACK


def _part(old: Decimal, new: Decimal) -> Decimal:
    return abs(new / old - 1) if old else Decimal(old != new)


@dataclass(frozen=True)
class Outcome:
    """What was found: prices by sku and region, and those that the API did not tell without doubt."""

    old: Book
    found: tuple[Found, ...]
    problems: tuple[str, ...]

    def book(self, *, confirmed: bool) -> Book:
        """Return the book with what was found, without what is held back unless it is confirmed."""
        rows = dict(self.old.rows)
        for found in self.found:
            if confirmed or not found.held:
                rows[found.new[0].sku, found.new[0].region] = found.new
        return Book(rows)

    def told(self, *, confirmed: bool) -> list[str]:
        """Return what changes, what is held back and what was not found, a line each."""
        lines = []
        for found in self.found:
            new = found.new[0]
            name = f"{new.sku} {new.region}"
            texts = [", ".join(map(_told, side)) for side in (found.old, found.new)]
            if not found.old:
                lines.append(f"new        {name}: {texts[1]} {new.currency}")
            elif texts[0] != texts[1]:
                held = found.held and not confirmed
                lines.append(f"{'held back' if held else 'changed'}  {name}: {texts[0]} -> {texts[1]} {new.currency}")
        lines += [f"not found  {problem}" for problem in self.problems]
        held_back = sum(found.held for found in self.found) if not confirmed else 0
        more = f", {held_back} held back: look at them, then --confirm" if held_back else ""
        return [*lines, f"{len(self.found)} prices read, {len(self.problems)} not found{more}"]


def _told(tier: Price) -> str:
    return f"{tier.price.normalize():f}" + (f" from {tier.tier_from.normalize():f}" if tier.tier_from else "")


def query(sku: str) -> Query | None:
    """Return the product that a price of the book is; None for one that this module does not read."""
    if sku.startswith("ec2.ondemand.linux."):
        size = sku.removeprefix("ec2.ondemand.linux.")
        plain = {"operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA", "capacitystatus": "Used"}
        return Query("AmazonEC2", {"instanceType": size, **plain}, f"BoxUsage:{size}")
    if sku.startswith("sagemaker.hosting.ml."):
        size = sku.removeprefix("sagemaker.hosting.")
        return Query("AmazonSageMaker", {"component": "Hosting", "instanceName": size}, f"Host:{size}")
    if sku not in _USAGE:
        return None
    service, usage, *family = _USAGE[sku]
    return Query(service, {"productFamily": family[0]} if family else {}, usage, family[0] if family else "")


def client(region: str) -> Any:
    """Return a client of the Price List API for a region; China has an API of its own."""
    return boto3.client("pricing", region_name="cn-northwest-1" if region.startswith("cn-") else "us-east-1")


def refresh(book: Book, regions: Sequence[str], connect: Callable[[str], Any]) -> Outcome:
    """Read the prices of the book that the API has, in some regions.

    Raises:
        ShipyardError: no credentials, no network, or the API refuses.
    """
    found, problems = [], []
    for region in regions:
        api = connect(region)
        for sku in dict.fromkeys(sku for sku, _ in sorted(book.rows)):
            wanted = query(sku)
            if wanted is None or (sku, GLOBAL) in book.rows:
                continue
            old = book.rows.get((sku, region), ())
            shape = (old or next(rows for (name, _), rows in sorted(book.rows.items()) if name == sku))[0]
            try:
                products = _products(api, wanted, region)
                found.append(Found(old, _tiers(products, wanted, shape, sku, region)))
            except (BotoCoreError, ClientError) as fault:
                raise ShipyardError(
                    f"prices: the Price List API: {fault}", mend="aws configure, then try again"
                ) from None
            except LookupError as fault:
                problems.append(f"{sku} {region}: {fault.args[0]}")
    return Outcome(book, tuple(found), tuple(problems))


def _products(api: Any, wanted: Query, region: str) -> Iterable[dict[str, Any]]:
    filters = {**wanted.filters, "regionCode": region}
    pages = api.get_paginator("get_products").paginate(
        ServiceCode=wanted.service,
        Filters=[{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in filters.items()],
        FormatVersion="aws_v1",
    )
    return [json.loads(text) for page in pages for text in page["PriceList"]]


def _tiers(products: Iterable[dict[str, Any]], wanted: Query, shape: Price, sku: str, region: str) -> tuple[Price, ...]:
    """Return the tiers of the one product that is meant.

    Raises:
        LookupError: none matches, several do, or it has another currency.
    """
    pattern = re.compile(_PREFIX + re.escape(wanted.usage))
    match = [p for p in products if pattern.fullmatch(p["product"]["attributes"].get("usagetype", ""))
             and (not wanted.family or p["product"].get("productFamily") == wanted.family)
             and "OnDemand" in p.get("terms", {})]  # fmt: skip
    if len(match) != 1:
        raise LookupError(f"{len(match)} products have the usage type {wanted.usage}")
    product = match[0]
    currency = "CNY" if region.startswith("cn-") else "USD"
    terms = list(product["terms"]["OnDemand"].values())
    dimensions = [dimension for term in terms for dimension in term["priceDimensions"].values()]
    if any(currency not in dimension["pricePerUnit"] for dimension in dimensions) or not dimensions:
        raise LookupError(f"no price in {currency}")
    if not any(Decimal(dimension["pricePerUnit"][currency]) for dimension in dimensions):
        raise LookupError("a price of 0, as rows have that are billed elsewhere")
    dimensions.sort(key=lambda dimension: Decimal(dimension["beginRange"]))
    # a first tier for nothing is a free tier, which the report takes off by itself, when it is asked to
    if len(dimensions) > 1 and Decimal(dimensions[0]["pricePerUnit"][currency]) == 0:
        dimensions = dimensions[1:]
    usage = product["product"]["attributes"]["usagetype"]
    return tuple(
        Price(
            sku, region, shape.unit, shape.per, currency,
            Decimal(0) if k == 0 else Decimal(dimension["beginRange"]).normalize() + 0,
            (Decimal(dimension["pricePerUnit"][currency]) * shape.per).normalize(),
            product["publicationDate"][:10], "high", "",
            f"AWS Price List API, {product['serviceCode']}, {usage}, rate {dimension['rateCode']}",
        )
        for k, dimension in enumerate(dimensions)
    )  # fmt: skip


def replace_book(path: Path, book: Book) -> None:
    """Write a book in place of another, whole or not at all.

    Raises:
        ShipyardError: the new book is not one, or the folder cannot be written.
    """
    text = write_book(book.flat())
    parse_book(text, f"{path} (new)")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except OSError as fault:
        beside.unlink(missing_ok=True)
        raise ShipyardError(f"{path}: cannot be written: {fault}", mend="make its folder writable") from None
