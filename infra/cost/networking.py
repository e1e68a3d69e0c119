"""What connects: load balancers, NAT, endpoints, VPN, Direct Connect, DNS, WAF, API Gateway."""

from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

from infra.cost.lines import Meter, NotStatic, Resource, View
from infra.cost.scaling import Index, Pricer, property_of
from infra.cost.usage import KB_PER_GB, requests

KB_PER_GB_OF_UNITS = 1_000_000
"""KB of a GB as the worked examples of the Elastic Load Balancing pricing page count them: 300 KB a second, 1.08 GB."""

PAID_RULES = tuple(f"AWSManagedRules{name}RuleSet" for name in ("BotControl", "ATP", "ACFP", "AntiDDoS"))
"""Managed rule groups of AWS that cost more than a rule group (AWS WAF pricing, "Intelligent threat mitigation")."""

FREE_RULES = 10
"""Rules of an application load balancer that are evaluated for nothing."""


def units_application(rate: Decimal, u: Mapping[str, Any], rules: int) -> Decimal:
    """Return the capacity units of an application load balancer in an hour with `rate` requests a second.

    One unit holds 25 new connections a second, 3,000 active connections, 1 GB an hour, or 1,000 rule evaluations a
    second; the largest counts (Elastic Load Balancing pricing, "LCU details").
    """
    new = u.get("connections_per_second", rate)
    gigabytes = rate * (u["request_kb"] + u["response_kb"]) * 3600 / KB_PER_GB_OF_UNITS
    evaluated = rate * max(rules - FREE_RULES, 0)
    return max(new / 25, new * u["connection_seconds"] / 3000, gigabytes, evaluated / 1000)


NETWORK_UNITS = {"TCP": (800, 100_000), "TLS": (50, 3_000), "UDP": (400, 50_000)}
"""New connections a second, and active ones, that one unit of a network load balancer holds, by protocol."""


def units_network(rate: Decimal, u: Mapping[str, Any], protocol: str = "TCP") -> Decimal:
    """Return the capacity units of a network load balancer: new and active connections of a protocol, 1 GB an hour."""
    fresh, active = NETWORK_UNITS[protocol]
    new = u.get("connections_per_second", rate)
    gigabytes = rate * (u["request_kb"] + u["response_kb"]) * 3600 / KB_PER_GB_OF_UNITS
    return max(new / fresh, new * u["connection_seconds"] / active, gigabytes)


def load_balancer(meter: Meter, index: Index) -> None:
    """Price an application or network load balancer: hours, capacity units, what it sends to the internet."""
    balancer = meter.properties
    kind = balancer.text("Type", "application")
    keys = ["requests_per_second", "request_kb", "response_kb", "connection_seconds"]
    if meter.ask("connections_per_second"):
        keys.append("connections_per_second")
    if kind == "application":
        rules = _rules(meter, index)
        meter.hourly("application load balancer", "alb.hour", Decimal(1))
        hourly: Callable[[Decimal, Mapping[str, Any]], Decimal] = lambda rate, u: units_application(rate, u, rules)  # noqa: E731
        sku = "alb.lcu"
    elif kind == "network":
        protocols = {View(one.properties).text("Protocol") for one in _listeners(meter, index)} & NETWORK_UNITS.keys()
        protocol = min(protocols, key=lambda name: NETWORK_UNITS[name], default="TCP")
        meter.hourly("network load balancer", "nlb.hour", Decimal(1))
        hourly, sku = lambda rate, u: units_network(rate, u, protocol), "nlb.nlcu"
        if protocol != "TCP":
            balancer.reads["Listeners"] = protocol
    else:
        return meter.unknown("load balancer", f"the price book has none for the type {kind}")

    def units(u: Mapping[str, Any]) -> Decimal:
        return sum((hourly(rate, u) for rate in u["requests_per_second"]), Decimal(0)) / 24 * meter.hours

    meter.used("capacity units", sku, units, *keys)
    if kind == "network":  # what an application load balancer sends to other zones is free
        meter.used(
            "data between zones", "intra_region.inter_az_each_way", lambda u: u["cross_zone_gb"], "cross_zone_gb"
        )
    if balancer.view("MinimumLoadBalancerCapacity").get("CapacityUnits"):
        meter.unknown("reserved capacity units", "the price book has none for units that are reserved")
    if balancer.text("Scheme", "internet-facing") == "internet-facing":
        _egress(meter)
        _addresses(meter)
    return None


def _addresses(meter: Meter) -> None:
    """Price the public addresses of a load balancer, one a zone; those that it is given are priced by themselves."""
    if meter.properties.text("IpAddressType", "ipv4") == "dualstack-without-public-ipv4":
        return
    given = [item.get("AllocationId") for item in meter.properties.items("SubnetMappings")]
    zones = len(meter.properties.listed("Subnets")) + sum(one is None for one in given)
    if zones:
        meter.hourly("public IPv4 addresses, one a zone", "public_ipv4.hour", Decimal(zones))
    elif not given:
        meter.unknown("public IPv4 addresses", "Subnets, and with it the number of zones, is not in the template")


def _listeners(meter: Meter, index: Index) -> list[Resource]:
    return [
        listener
        for listener in index.of("AWS::ElasticLoadBalancingV2::Listener")
        if index.at(property_of(listener, "LoadBalancerArn"), meter.resource.type) is meter.resource
    ]


def _rules(meter: Meter, index: Index) -> int:
    """Count the rules of a load balancer's listeners, their default rules included."""
    mine = {(listener.scope.stack.name, listener.id) for listener in _listeners(meter, index)}
    pointers = (property_of(rule, "ListenerArn") for rule in index.of("AWS::ElasticLoadBalancingV2::ListenerRule"))
    return len(mine) + sum((getattr(p, "stack", ""), getattr(p, "resource", "")) in mine for p in pointers)


def _egress(meter: Meter) -> None:
    if meter.ask("internet_gb"):
        meter.used("data out to the internet", "egress.internet", lambda u: u["internet_gb"], "internet_gb")
        return
    meter.used(
        "data out to the internet", "egress.internet",
        lambda u: requests(u["requests_per_second"], meter.hours) * u["response_kb"] / KB_PER_GB,
        "requests_per_second", "response_kb",
    )  # fmt: skip


def nat_gateway(meter: Meter, index: Index) -> None:
    """Price a NAT gateway: hours and data; a regional one is paid in each zone where it grows."""
    if meter.properties.text("AvailabilityMode", "zonal") != "zonal":
        raise NotStatic("a regional NAT gateway: the number of its zones follows its use")
    meter.hourly("NAT gateway", "nat_gateway.hour", Decimal(1))
    meter.used("data through it", "nat_gateway.data", lambda u: u["processed_gb"], "processed_gb")
    meter.told("data out to the internet", "egress.internet", "internet_gb")


def address(meter: Meter, index: Index) -> None:
    """Price a public IPv4 address, used or not; one that was brought to AWS is free."""
    if meter.properties.text("PublicIpv4Pool", "amazon") != "amazon":
        return meter.free("an address of a pool of your own costs nothing")
    return meter.hourly("public IPv4 address", "public_ipv4.hour", Decimal(1))


def endpoint(meter: Meter, index: Index) -> None:
    """Price a VPC endpoint: an interface by zone and hour and its data; a gateway is free."""
    kind = meter.properties.text("VpcEndpointType", "Gateway")
    if kind == "Gateway":
        return meter.free("gateway endpoints of S3 and DynamoDB cost nothing")
    zones = meter.properties.listed("SubnetIds")
    if not zones:
        raise NotStatic("SubnetIds, and with it the number of zones, is not in the template")
    meter.properties.reads["SubnetIds"] = f"{len(zones)} subnets, one a zone"
    if kind == "Interface":
        meter.hourly("interface endpoint, by zone", "vpce.interface.hour_per_az", Decimal(len(zones)))
        meter.used("data through it", "vpce.interface.data", lambda u: u["processed_gb"], "processed_gb")
    elif kind == "GatewayLoadBalancer":
        meter.hourly("load balancer's endpoint, by zone", "vpce.interface.hour_per_az", Decimal(len(zones)))
        meter.used("data through it", "vpce.gwlb.data", lambda u: u["processed_gb"], "processed_gb")
    else:
        meter.unknown("endpoint", f"the price book has none for the type {kind}")
    return None


def vpn(meter: Meter, index: Index) -> None:
    """Price a site-to-site VPN connection, with its attachment where it ends at a transit gateway."""
    meter.hourly("VPN connection", "vpn.connection", Decimal(1))
    if meter.properties.flag("EnableAcceleration"):
        meter.unknown("acceleration", "the price book has none for accelerators")
    if meter.properties.get("TransitGatewayId") is not None:
        attachment(meter, index)
    else:
        meter.used("data out to the internet", "egress.internet", lambda u: u["internet_gb"], "internet_gb")


def attachment(meter: Meter, index: Index) -> None:
    """Price an attachment of a transit gateway: hours and data."""
    meter.hourly("transit gateway attachment", "tgw.attachment.hour", Decimal(1))
    meter.used("data through it", "tgw.data", lambda u: u["processed_gb"], "processed_gb")


def direct_connect(meter: Meter, index: Index) -> None:
    """Price a Direct Connect port of 1 Gbit/s, and what goes out through it."""
    speed = meter.properties.text("Bandwidth", "1Gbps")
    sku = {"1Gbps": "dx.port.1g"}.get(speed, f"dx.port.{speed}")
    meter.hourly(f"port of {speed}", sku, Decimal(1))
    meter.used("data out", "dx.egress", lambda u: u["processed_gb"], "processed_gb")


def zone(meter: Meter, index: Index) -> None:
    """Price a hosted zone of Route 53 and its queries."""
    meter.monthly("hosted zone", "route53.zone", Decimal(1))
    meter.used("queries", "route53.queries", lambda u: u["queries"], "queries",
               note="those of aliases of AWS resources are free; those by latency or place cost more")  # fmt: skip


def resolver(meter: Meter, index: Index) -> None:
    """Price a resolver endpoint of Route 53: an interface an address, and queries."""
    addresses = meter.properties.items("IpAddresses")
    if not addresses:
        raise NotStatic("IpAddresses is not in the template")
    meter.properties.reads["IpAddresses"] = f"{len(addresses)} addresses"
    meter.hourly("resolver endpoint, by address", "route53.resolver.interface", Decimal(len(addresses)))
    meter.used("queries", "route53.resolver.queries", lambda u: u["queries"], "queries")


def firewall(meter: Meter, index: Index) -> None:
    """Price a web ACL: itself, its rules and rule groups, and requests."""
    rules = meter.properties.items("Rules")
    meter.properties.reads["Rules"] = f"{len(rules)} rules"
    meter.monthly("web ACL", "wafv2.webacl", Decimal(1))
    if rules:
        meter.monthly("rules and rule groups", "wafv2.rule", Decimal(len(rules)))
    for rule in rules:
        managed = rule.view("Statement").view("ManagedRuleGroupStatement")
        name, vendor = managed.text("Name"), managed.text("VendorName", "AWS")
        if vendor != "AWS" or name in PAID_RULES:
            meter.unknown(
                f"the rules {name} of {vendor}", "they have a price of their own, which the book does not have"
            )
    meter.used(
        "requests inspected", "wafv2.requests", lambda u: requests(u["requests_per_second"], meter.hours),
        "requests_per_second",
    )  # fmt: skip


def rule_group(meter: Meter, index: Index) -> None:
    """Price the rules of a rule group."""
    meter.monthly("rules", "wafv2.rule", Decimal(len(meter.properties.items("Rules"))))


def http_api(meter: Meter, index: Index) -> None:
    """Price an HTTP or WebSocket API; an HTTP API counts a request for each 512 KB begun."""
    kind = meter.properties.text("ProtocolType", "HTTP")
    if kind != "HTTP":
        meter.used("messages", "apigw.ws.messages", lambda u: u["messages"] * begun(u["payload_kb"], 32),
                   "messages", "payload_kb")  # fmt: skip
        return meter.used("connections, minutes", "apigw.ws.connection", lambda u: u["connection_minutes"],
                          "connection_minutes")  # fmt: skip
    meter.used(
        "requests", "apigw.http.requests",
        lambda u: requests(u["requests_per_second"], meter.hours) * begun(u["request_kb"] + u["response_kb"], 512),
        "requests_per_second", "request_kb", "response_kb",
    )  # fmt: skip
    return _egress(meter)


def rest_api(meter: Meter, index: Index) -> None:
    """Price a REST API; a private one sends nothing to the internet."""
    meter.used(
        "requests", "apigw.rest.requests", lambda u: requests(u["requests_per_second"], meter.hours),
        "requests_per_second",
    )  # fmt: skip
    if "PRIVATE" not in meter.properties.view("EndpointConfiguration").listed("Types"):
        _egress(meter)


def rest_stage(meter: Meter, index: Index) -> None:
    """Price the cache of a REST API's stage, which its deployment may describe; without one a stage is free."""
    stage = (
        meter.properties.view("StageDescription") if meter.resource.type.endswith("Deployment") else meter.properties
    )
    if not stage.flag("CacheClusterEnabled"):
        return meter.free("a stage without a cache costs nothing")
    size = stage.text("CacheClusterSize", "0.5")
    return meter.hourly(f"cache of {size} GB", f"apigw.cache.{size}", Decimal(1), of=stage)


def begun(kilobytes: Decimal, size: int) -> Decimal:
    """Return how many pieces of a size are begun; at least one."""
    return max((kilobytes / size).to_integral_value(ROUND_CEILING), Decimal(1))


PRICED: dict[str, Pricer] = {
    "AWS::ElasticLoadBalancingV2::LoadBalancer": load_balancer,
    "AWS::EC2::NatGateway": nat_gateway,
    "AWS::EC2::EIP": address,
    "AWS::EC2::VPCEndpoint": endpoint,
    "AWS::EC2::VPNConnection": vpn,
    "AWS::EC2::TransitGatewayAttachment": attachment,
    "AWS::EC2::TransitGatewayVpcAttachment": attachment,
    "AWS::DirectConnect::Connection": direct_connect,
    "AWS::Route53::HostedZone": zone,
    "AWS::Route53Resolver::ResolverEndpoint": resolver,
    "AWS::WAFv2::WebACL": firewall,
    "AWS::WAFv2::RuleGroup": rule_group,
    "AWS::ApiGatewayV2::Api": http_api,
    "AWS::ApiGateway::RestApi": rest_api,
    "AWS::ApiGateway::Deployment": rest_stage,
    "AWS::ApiGateway::Stage": rest_stage,
}
