"""What runs at the edge: Greengrass core devices, and what they and AWS IoT Core send each other."""

from decimal import ROUND_CEILING, Decimal

from infra.cost.lines import Meter
from infra.cost.networking import begun
from infra.cost.scaling import Index, Pricer, property_of

MESSAGE_KB = 5
"""AWS IoT Core counts a message for each 5 KB begun."""


def deployment(meter: Meter, index: Index) -> None:
    """Price the core devices of a deployment, their connection and their messages, once for each group of devices."""
    target = str(property_of(meter.resource, "TargetArn"))
    same = [other for other in index.of(meter.resource.type) if str(property_of(other, "TargetArn")) == target
            and other.scope.stack.account == meter.resource.scope.stack.account]  # fmt: skip
    first = min(same, key=lambda other: (other.scope.stack.name, other.id))
    if first is not meter.resource:
        return meter.free(f"its devices are counted with {first.id}")
    minutes = meter.hours * 60
    daily = "predictions_per_device_per_day"
    meter.serves(lambda u: u["devices"] * u[daily] * meter.hours / 24, "devices", daily)
    meter.used(
        "active core devices", "greengrass.active_core_device", lambda u: u["devices"] * meter.hours / 730, "devices"
    )
    meter.used("connection, minutes", "iot.connectivity", lambda u: u["devices"] * minutes, "devices")
    return meter.used(
        "messages, by 5 KB", "iot.messaging",
        lambda u: u["devices"] * (minutes / u["sync_minutes"]).to_integral_value(ROUND_CEILING)
        * begun(u["message_kb"], MESSAGE_KB),
        "devices", "sync_minutes", "message_kb",
    )  # fmt: skip


def topic_rule(meter: Meter, index: Index) -> None:
    """Price a rule of AWS IoT: each time that it fires, and each action."""
    payload = meter.properties.view("TopicRulePayload")
    actions = Decimal(len(payload.items("Actions")))
    meter.used("rule fired", "iot.rules.triggered", lambda u: u["messages"] * begun(u["payload_kb"], MESSAGE_KB),
               "messages", "payload_kb")  # fmt: skip
    meter.used(
        "actions", "iot.rules.action", lambda u: actions * u["messages"] * begun(u["payload_kb"], MESSAGE_KB),
        "messages", "payload_kb", of=payload,
    )  # fmt: skip


def fleet_metric(meter: Meter, index: Index) -> None:
    """Price a fleet metric: the metric that it writes; the queries of the fleet's index have no price in the book."""
    meter.monthly("custom metric", "cw.metric.custom", Decimal(1))
    period = meter.properties.number("Period", 60)
    meter.unknown(
        f"queries of the fleet's index, one each {period.normalize():f} s", "the price book has none for queries"
    )


PRICED: dict[str, Pricer] = {
    "AWS::GreengrassV2::Deployment": deployment,
    "AWS::IoT::TopicRule": topic_rule,
    "AWS::IoT::FleetMetric": fleet_metric,
}
