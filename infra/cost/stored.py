"""What keeps, watches and passes on: S3, KMS, logs, alarms, tables, queues, topics, streams, budgets, pipelines."""

from decimal import Decimal

from infra.cost.lines import Meter
from infra.cost.networking import begun
from infra.cost.resolve import Unknown
from infra.cost.scaling import Index, Pricer, limits, property_of
from infra.cost.usage import HOURS, KB_PER_GB

ONE = Decimal(1)


def bucket(meter: Meter, index: Index) -> None:
    """Price a bucket in the class Standard: storage with its growth, requests, what leaves it.

    How much of it a lifecycle rule has moved to a cheaper class is not known: the price is then the most that it costs.
    """
    rules = meter.properties.view("LifecycleConfiguration").items("Rules")
    moves = ("Transition", "Transitions", "NoncurrentVersionTransition", "NoncurrentVersionTransitions")
    moved = any(rule.get(name) for rule in rules for name in moves)
    _stored(meter, "storage, class Standard", "s3.standard.storage",
            note="at most: its lifecycle moves objects to cheaper classes" if moved else "")  # fmt: skip
    meter.used("writes and listings", "s3.standard.tier1_put", lambda u: u["put_requests"], "put_requests")
    meter.used("reads", "s3.standard.tier2_get", lambda u: u["get_requests"], "get_requests")
    meter.told("data out to the internet", "egress.internet", "internet_gb")
    meter.told("data out to another region", "inter_region.default", "inter_region_gb")
    for name in ("ReplicationConfiguration", "InventoryConfigurations", "AnalyticsConfigurations"):
        if meter.properties.get(name):
            meter.unknown(name, "copies, transfers, lists and analysis are paid by the object; the price book has none")


def _stored(meter: Meter, item: str, sku: str, note: str = "") -> None:
    meter.used(
        item, sku, lambda u: (u["storage_gb"] + u["storage_growth_gb"] * u["months"]) * meter.hours / HOURS,
        "storage_gb", "storage_growth_gb", "months", note=note,
    )  # fmt: skip


def key(meter: Meter, index: Index) -> None:
    """Price a key of KMS and the calls of it; the first two rotations add a key each."""
    spec = meter.properties.text("KeySpec", "SYMMETRIC_DEFAULT")
    rotated = str(meter.properties.get("EnableKeyRotation", False)).lower() == "true"
    note = "each of the first two rotations, one a year, adds as much" if rotated else ""
    meter.monthly("key", "kms.cmk", ONE, note=note)
    cheap = spec in ("SYMMETRIC_DEFAULT", "RSA_2048") or spec.startswith("HMAC")
    sku = "kms.requests.symmetric" if cheap else "kms.requests.asymmetric_non_rsa2048"
    meter.used("calls", sku, lambda u: u["api_requests"], "api_requests")


def replica_key(meter: Meter, index: Index) -> None:
    """Price a replica of a key, which is paid as a key."""
    meter.monthly("key", "kms.cmk", ONE)


def log_group(meter: Meter, index: Index) -> None:
    """Price a log group: what it takes, what it keeps, what queries scan.

    What is kept is at most what is taken in the days of its retention, for it is kept compressed.
    """
    if meter.properties.text("LogGroupClass", "STANDARD") != "STANDARD":
        return meter.unknown("logs", "the price book has none for this class of logs")
    days = meter.properties.number("RetentionInDays", 0)
    note = "at most: logs are kept compressed" if days else "kept for good: one month's logs are counted, and grow"
    meter.used("logs taken in", "cw.logs.ingest.standard", lambda u: u["log_gb"], "log_gb")
    meter.used(
        "logs kept", "cw.logs.storage", lambda u: u["log_gb"] * (days or Decimal("30.4")) / Decimal("30.4"), "log_gb",
        note=note,
    )  # fmt: skip
    if meter.properties.get("DataProtectionPolicy"):
        meter.unknown("data protection", "the price book has none for the search of logs for personal data")
    return meter.told("logs scanned", "cw.logs.insights_scan", "log_scanned_gb")


def alarm(meter: Meter, index: Index) -> None:
    """Price an alarm by the metrics that it reads; high resolution below a minute, three of each for a band."""
    metrics = meter.properties.items("Metrics")
    read = [metric for metric in metrics if metric.get("MetricStat") is not None]
    if any(metric.text("Expression").lstrip().upper().startswith("SELECT") for metric in metrics):
        return meter.unknown("alarm metrics", "it is paid by each metric that its query finds")
    periods = [metric.view("MetricStat").number("Period", 60) for metric in read]
    period = min(periods) if periods else meter.properties.number("Period", 60)
    band = any("ANOMALY_DETECTION_BAND" in metric.text("Expression") for metric in metrics)
    fine = period < 60
    count = Decimal(max(len(read), 1)) * (3 if band else 1)
    label = f"{'high' if fine else 'standard'} resolution{', with a band' if band else ''}"
    return meter.monthly(f"alarm metrics, {label}", "cw.alarm.highres" if fine else "cw.alarm.standard", count)


def composite_alarm(meter: Meter, index: Index) -> None:
    """Price a composite alarm."""
    meter.monthly("composite alarm", "cw.alarm.composite", ONE)


def dashboard(meter: Meter, index: Index) -> None:
    """Price a dashboard."""
    meter.monthly("dashboard", "cw.dashboard", ONE)


def metric_filter(meter: Meter, index: Index) -> None:
    """Price the custom metrics that a log filter writes, one a transformation without dimensions."""
    found = meter.properties.items("MetricTransformations")
    if any(item.get("Dimensions") for item in found):
        meter.used("metrics, one a value of its dimensions", "cw.metric.custom", lambda u: u["metrics"], "metrics")
    else:
        meter.monthly("metrics", "cw.metric.custom", Decimal(len(found)))


def secret(meter: Meter, index: Index) -> None:
    """Price a secret, its replicas in other regions, each of which is paid as one, and the calls for it."""
    replicas = meter.properties.listed("ReplicaRegions")
    if replicas:
        meter.properties.reads["ReplicaRegions"] = f"{len(replicas)} regions"
    meter.monthly("secret and its replicas" if replicas else "secret", "secret.month", ONE + len(replicas))
    meter.used("calls", "secret.api", lambda u: u["api_requests"], "api_requests")


def parameter(meter: Meter, index: Index) -> None:
    """Price an advanced parameter; a standard one is free."""
    tier = meter.properties.text("Tier", "Standard")
    if tier == "Standard":
        return meter.free("standard parameters cost nothing")
    if tier != "Advanced":
        return meter.unknown("parameter", f"the tier {tier} becomes standard or advanced when it is deployed")
    meter.monthly("advanced parameter", "ssm.parameter.advanced", ONE)
    return meter.used("calls", "ssm.parameter.api", lambda u: u["api_requests"], "api_requests")


def images(meter: Meter, index: Index) -> None:
    """Price a repository of images by what it stores."""
    _stored(meter, "images stored", "ecr.storage")


def table(meter: Meter, index: Index) -> None:
    """Price a DynamoDB table in the class Standard: capacity by the hour or by request, storage, backup."""
    view = meter.properties
    if view.text("TableClass", "STANDARD") != "STANDARD" or view.get("Replicas"):
        return meter.unknown("table", "the price book has none for this class, or for replicas")
    if view.text("BillingMode", "PROVISIONED") == "PAY_PER_REQUEST":
        meter.used("write units", "dynamodb.ondemand.wru", lambda u: u["writes"], "writes")
        meter.used("read units", "dynamodb.ondemand.rru", lambda u: u["reads"], "reads")
    else:
        for node in (view, *view.items("GlobalSecondaryIndexes")):
            units = node.view("ProvisionedThroughput")
            name = "" if node is view else node.text("IndexName")
            for side, sku in (("Write", "dynamodb.wcu"), ("Read", "dynamodb.rcu")):
                dimension = f"dynamodb:{'index' if name else 'table'}:{side}CapacityUnits"
                scaler = index.scaler(meter.resource, dimension, f"/index/{name}" if name else "")
                count = limits(scaler, units.number(f"{side}CapacityUnits"), units)
                meter.hourly(f"{side.lower()} capacity{f' of {name}' if name else ''}", sku, count, of=units)
    _stored(meter, "storage", "dynamodb.storage")
    recovery = view.view("PointInTimeRecoverySpecification")
    if str(recovery.get("PointInTimeRecoveryEnabled", False)).lower() == "true":
        _stored(meter, "point-in-time recovery", "dynamodb.pitr")
    return None


def topic(meter: Meter, index: Index) -> None:
    """Price a topic: publishes, one for each 64 KB begun."""
    if meter.properties.flag("FifoTopic"):
        return meter.unknown("publishes", "the price book has none for topics that keep the order")
    meter.used(
        "publishes, by 64 KB", "sns.publish", lambda u: u["messages"] * begun(u["payload_kb"], 64),
        "messages", "payload_kb",
    )  # fmt: skip
    for inline in meter.properties.items("Subscription"):
        if inline.text("Protocol") not in UNPAID:
            _sent(meter, inline.text("Protocol"))
    return None


UNPAID = ("sqs", "lambda")
"""Where a topic sends for nothing."""


def subscription(meter: Meter, index: Index) -> None:
    """Price what a topic sends; to queues and functions it sends for nothing."""
    protocol = meter.properties.text("Protocol")
    if protocol in UNPAID:
        meter.free(f"a topic sends to {protocol} for nothing")
    else:
        _sent(meter, protocol)


def _sent(meter: Meter, protocol: str) -> None:
    sku = {"http": "sns.http", "https": "sns.http", "email": "sns.email", "email-json": "sns.email",
           "firehose": "sns.firehose"}.get(protocol)  # fmt: skip
    if sku:
        meter.used(f"notifications by {protocol}", sku, lambda u: u["notifications"], "notifications")
    else:
        meter.unknown("notifications", f"the price book has none for {protocol}")


def queue(meter: Meter, index: Index) -> None:
    """Price a queue: requests, one for each 64 KB begun; a message takes three (send, receive, delete)."""
    sku = "sqs.fifo" if str(meter.properties.get("FifoQueue", False)).lower() == "true" else "sqs.standard"
    if meter.ask("api_requests"):
        meter.used("requests", sku, lambda u: u["api_requests"], "api_requests")
        return
    meter.used(
        "requests, three a message, by 64 KB", sku,
        lambda u: u["messages"] * (2 * begun(u["payload_kb"], 64) + 1), "messages", "payload_kb",
    )  # fmt: skip


def event_bus(meter: Meter, index: Index) -> None:
    """Price the events that are put onto a bus, by 64 KB."""
    meter.used(
        "custom events, by 64 KB", "eventbridge.custom_events", lambda u: u["messages"] * begun(u["payload_kb"], 64),
        "messages", "payload_kb",
    )  # fmt: skip


def event_archive(meter: Meter, index: Index) -> None:
    """Price an archive of events: what it takes, and what it keeps."""
    meter.used("events taken in", "eventbridge.archive_processing",
               lambda u: u["messages"] * u["payload_kb"] / KB_PER_GB, "messages", "payload_kb")  # fmt: skip
    _stored(meter, "events kept", "eventbridge.archive_storage")


def event_rule(meter: Meter, index: Index) -> None:
    """Say that a rule is free, and name the tasks and jobs that it starts, for how long is in no template."""
    starts = [target for target in meter.properties.items("Targets")
              if target.get("EcsParameters") is not None or target.get("BatchParameters") is not None]  # fmt: skip
    if starts:
        meter.unknown(f"tasks that it starts, {len(starts)} each time", "how often and how long they run is not known")
    else:
        meter.free("rules, schedules and events of AWS itself cost nothing; what they start does")


def state_machine(meter: Meter, index: Index) -> None:
    """Price a state machine: transitions, or requests and GB-hours of an express one, in steps of 64 MB."""
    if meter.properties.text("StateMachineType", "STANDARD") == "STANDARD":
        meter.used("state transitions", "sfn.standard.transition", lambda u: u["executions"] * u["transitions"],
                   "executions", "transitions")  # fmt: skip
        return
    meter.used("requests", "sfn.express.request", lambda u: u["executions"], "executions")
    meter.used(
        "duration, by 100 ms and 64 MB", "sfn.express.duration",
        lambda u: u["executions"] * begun(u["duration_ms"], 100) / 36_000 * begun(u["memory_mb"], 64) * 64 / 1024,
        "executions", "duration_ms", "memory_mb",
    )  # fmt: skip


def delivery_stream(meter: Meter, index: Index) -> None:
    """Price a Firehose stream: records, each rounded up to 5 KB."""
    meter.used(
        "data taken in, records by 5 KB", "firehose.ingest",
        lambda u: u["records"] * begun(u["record_kb"], 5) * 5 / KB_PER_GB, "records", "record_kb",
    )  # fmt: skip
    for name in ("ExtendedS3DestinationConfiguration", "S3DestinationConfiguration"):
        found = meter.properties.get(name)
        part = found.get("DataFormatConversionConfiguration") if isinstance(found, dict) else None
        if isinstance(part, Unknown) or (isinstance(part, dict) and str(part.get("Enabled", True)).lower() == "true"):
            meter.unknown("format conversion", "the price book has none for the conversion of formats")
        keys = found.get("DynamicPartitioningConfiguration") if isinstance(found, dict) else None
        if isinstance(keys, Unknown) or (isinstance(keys, dict) and str(keys.get("Enabled", False)).lower() != "false"):
            meter.unknown("dynamic partitioning", "the price book has none for partitions by the data's keys")


def trail(meter: Meter, index: Index) -> None:
    """Price a trail: the first copy of management events is free, data events are not."""
    meter.used("data events", "cloudtrail.data", lambda u: u["messages"], "messages",
               note="the first copy of management events in a region is free")  # fmt: skip
    if meter.properties.listed("InsightSelectors"):
        meter.unknown("insights", "the price book has none for the analysis of events")


def budgets_action(meter: Meter, index: Index) -> None:
    """Price a budget that has actions by the day, once however many it has."""
    budget = str(property_of(meter.resource, "BudgetName"))
    same = [other for other in index.of(meter.resource.type) if str(property_of(other, "BudgetName")) == budget
            and other.scope.stack.account == meter.resource.scope.stack.account]  # fmt: skip
    first = min(same, key=lambda other: (other.scope.stack.name, other.id))
    if first is not meter.resource:
        return meter.free(f"its budget is counted with {first.id}")
    return meter.monthly("budget with actions, by the day", "budgets.action_enabled", HOURS / 24)


def pipeline(meter: Meter, index: Index) -> None:
    """Price a CodePipeline: by the month, or by minutes of actions in the type V2."""
    if meter.properties.text("PipelineType", "V1") == "V2":
        meter.used("action minutes", "codepipeline.v2.action_minute", lambda u: u["action_minutes"], "action_minutes")
    else:
        meter.monthly("pipeline", "codepipeline.v1.active_pipeline", ONE)


PRICED: dict[str, Pricer] = {
    "AWS::S3::Bucket": bucket,
    "AWS::KMS::Key": key,
    "AWS::KMS::ReplicaKey": replica_key,
    "AWS::Logs::LogGroup": log_group,
    "AWS::Logs::MetricFilter": metric_filter,
    "AWS::CloudWatch::Alarm": alarm,
    "AWS::CloudWatch::CompositeAlarm": composite_alarm,
    "AWS::CloudWatch::Dashboard": dashboard,
    "AWS::SecretsManager::Secret": secret,
    "AWS::SSM::Parameter": parameter,
    "AWS::ECR::Repository": images,
    "AWS::DynamoDB::Table": table,
    "AWS::SNS::Topic": topic,
    "AWS::SNS::Subscription": subscription,
    "AWS::SQS::Queue": queue,
    "AWS::Events::EventBus": event_bus,
    "AWS::Events::Archive": event_archive,
    "AWS::Events::Rule": event_rule,
    "AWS::StepFunctions::StateMachine": state_machine,
    "AWS::KinesisFirehose::DeliveryStream": delivery_stream,
    "AWS::CloudTrail::Trail": trail,
    "AWS::Budgets::BudgetsAction": budgets_action,
    "AWS::CodePipeline::Pipeline": pipeline,
}
