"""What is watched: a dashboard by target and release, alarms, who is told of them, and the budget."""

from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_iot as iot
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.budget import Budget
from infra.cpu import CpuStack
from infra.gateway import GatewayStack
from infra.gpu import GpuStack
from infra.instances import VARIANT
from infra.notices import tell
from models.config import Environment, ObserveSettings
from models.release import Release

SATURATED_PERCENT = 90
FIVE = cdk.Duration.minutes(5)
HOUR = cdk.Duration.hours(1)
DEVIATIONS = 4  # of the band within which feedback per request is as it always was


@dataclass(frozen=True)
class Watched:
    """Hold the stacks that are watched; an environment may lack a gateway or edge devices."""

    gpu: GpuStack
    cpu: CpuStack
    gateway: GatewayStack | None


class ObserveStack(cdk.Stack):
    """Wire alarms on what deployments do not watch, tell of all of them, and show everything on one page."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: ObserveSettings,
        env: Environment,
        release: Release,
        watched: Watched,
    ) -> None:
        """Make dashboard, alarms, topic and budget.

        What is silent is an alarm in production alone: elsewhere nobody may have asked.
        """
        super().__init__(scope, construct_id)
        self._prefix = self.stack_name.removesuffix(construct_id)
        self._production = env.production
        self.alarms: list[cloudwatch.IAlarm] = []
        rows: list[list[cloudwatch.IWidget]] = [[self._title(release)]]
        for name, endpoint in watched.gpu.endpoints.items():
            self.alarms += endpoint.alarms
            rows.append(self._endpoint(name, endpoint.name, settings))
        services = {service.node.id: service for service in watched.cpu.services}
        if watched.gateway is not None:
            services["gateway"] = watched.gateway.service
        for name, service in services.items():
            self.alarms += service.alarms
            rows.append(self._service(name, service.service, awake=env.hours is None))
        if watched.gateway is not None:
            rows.append(self._entry(watched.gateway, settings, public=env.gateway.api != "private"))
        if release.of("greengrass-model"):
            rows.append(self._edge(env.edge.thing_group))
        rows.insert(1, [cloudwatch.AlarmStatusWidget(alarms=self.alarms, title="Alarms", width=24)])
        dashboard = cloudwatch.Dashboard(self, "Dashboard", default_interval=cdk.Duration.days(1))
        for row in rows:
            dashboard.add_widgets(*row)
        self._trace([service.log_group for service in services.values()])
        tell(self, settings.email, self._prefix)
        Budget(self, "Budget", settings=settings, name=f"{self._prefix}monthly")

    def _title(self, release: Release) -> cloudwatch.TextWidget:
        lines = [f"| {a.name} | {a.target} | `{a.digest[:12]}` |" for a in release.artifacts]
        table = "\n".join(["| artifact | target | digest |", "|---|---|---|", *lines])
        return cloudwatch.TextWidget(markdown=f"# {release.version}\n{table}", width=24, height=2 + len(lines))

    def _alarm(
        self,
        construct_id: str,
        metric: cloudwatch.IMetric,
        threshold: float,
        what: str,
        *,
        below: bool = False,
        missing: cloudwatch.TreatMissingData = cloudwatch.TreatMissingData.NOT_BREACHING,
        periods: int = 3,
    ) -> None:
        operator = cloudwatch.ComparisonOperator
        alarm = cloudwatch.Alarm(
            self,
            construct_id,
            metric=metric,
            threshold=threshold,
            evaluation_periods=periods,
            comparison_operator=operator.LESS_THAN_THRESHOLD if below else operator.GREATER_THAN_THRESHOLD,
            treat_missing_data=missing,
            alarm_description=what,
        )
        self.alarms.append(alarm)

    def _silent(self, construct_id: str, metric: cloudwatch.IMetric, what: str) -> None:
        if self._production:
            breaching = cloudwatch.TreatMissingData.BREACHING
            self._alarm(construct_id, metric, 1, what, below=True, missing=breaching)

    def _endpoint(self, name: str, endpoint: str, settings: ObserveSettings) -> list[cloudwatch.IWidget]:
        dimensions = {"EndpointName": endpoint, "VariantName": VARIANT}

        def metric(metric_name: str, statistic: str, namespace: str = "AWS/SageMaker") -> cloudwatch.Metric:
            return cloudwatch.Metric(
                namespace=namespace,
                metric_name=metric_name,
                dimensions_map=dimensions,
                statistic=statistic,
                period=FIVE,
            )

        asked = metric("Invocations", "Sum")
        busy = metric("GPUUtilization", "Average", "/aws/sagemaker/Endpoints")
        memory = metric("GPUMemoryUtilization", "Maximum", "/aws/sagemaker/Endpoints")
        self._silent(f"{name}-silent", asked, f"Nobody asked the endpoint {endpoint} for 15 minutes")
        self._alarm(
            f"{name}-busy", busy, SATURATED_PERCENT, f"The GPUs of {endpoint} are saturated, and no instance was added"
        )
        return [
            cloudwatch.GraphWidget(title=f"gpu {name}: requests", left=[asked, metric("Invocation5XXErrors", "Sum")]),
            cloudwatch.GraphWidget(
                title=f"gpu {name}: latency in microseconds",
                left=[metric("ModelLatency", "p50"), metric("ModelLatency", "p99"), metric("OverheadLatency", "p99")],
                left_annotations=[cloudwatch.HorizontalAnnotation(value=settings.p99_ms * 1000)],
            ),
            cloudwatch.GraphWidget(title=f"gpu {name}: percent busy", left=[busy, memory]),
        ]

    def _service(self, name: str, service: ecs.FargateService, *, awake: bool) -> list[cloudwatch.IWidget]:
        processor = service.metric_cpu_utilization(period=FIVE)
        memory = service.metric_memory_utilization(period=FIVE, statistic="Maximum")
        running = cloudwatch.Metric(
            namespace="ECS/ContainerInsights",
            metric_name="RunningTaskCount",
            dimensions_map={"ClusterName": service.cluster.cluster_name, "ServiceName": service.service_name},
            statistic="Minimum",
            period=FIVE,
        )
        self._alarm(f"{name}-busy", processor, SATURATED_PERCENT, f"{name} is saturated, and no task was added")
        self._alarm(f"{name}-memory", memory, SATURATED_PERCENT, f"A task of {name} has nearly no memory left")
        if awake:
            breaching = cloudwatch.TreatMissingData.BREACHING
            self._alarm(f"{name}-gone", running, 1, f"No task of {name} runs", below=True, missing=breaching)
        return [
            cloudwatch.GraphWidget(title=f"cpu {name}: percent busy", left=[processor, memory], width=12),
            cloudwatch.GraphWidget(title=f"cpu {name}: tasks", left=[running], width=12),
        ]

    def _entry(self, gateway: GatewayStack, settings: ObserveSettings, *, public: bool) -> list[cloudwatch.IWidget]:
        events_in = cloudwatch.Metric(
            namespace="AWS/Firehose",
            metric_name="IncomingRecords",
            dimensions_map={"DeliveryStreamName": gateway.stream.name},
            statistic="Sum",
            period=HOUR,
        )
        late = cloudwatch.Metric(
            namespace="AWS/Firehose",
            metric_name="DeliveryToS3.DataFreshness",
            dimensions_map={"DeliveryStreamName": gateway.stream.name},
            statistic="Maximum",
            period=FIVE,
        )
        self._alarm("feedback-late", late, 1800, "Feedback has not reached the data bucket for half an hour")
        self._silent(
            "gateway-silent", _requests(gateway, FIVE, public=public), "Nobody asked the gateway for 15 minutes"
        )
        # what shoppers do with answers changes when the model no longer fits them, or when they have changed
        share = cloudwatch.MathExpression(
            expression="events / requests",
            using_metrics={"events": events_in, "requests": _requests(gateway, HOUR, public=public)},
            period=HOUR,
            label="events of feedback a request",
        )
        self.alarms.append(
            cloudwatch.AnomalyDetectionAlarm(
                self,
                "drift",
                metric=share,
                std_devs=DEVIATIONS,
                evaluation_periods=6,
                datapoints_to_alarm=5,
                comparison_operator=cloudwatch.ComparisonOperator.LESS_THAN_LOWER_OR_GREATER_THAN_UPPER_THRESHOLD,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
                alarm_description="Drift: shoppers act on answers otherwise than in the two weeks before",
            )
        )
        widgets: list[cloudwatch.IWidget] = [
            cloudwatch.GraphWidget(title="feedback: events", left=[events_in]),
            cloudwatch.GraphWidget(title="feedback: events a request", left=[share]),
        ]
        if not public:
            return widgets
        failed = gateway.api.metric_server_error(statistic="Sum", period=FIVE)
        slow = gateway.api.metric_latency(statistic="p99", period=FIVE)
        self._alarm("gateway-errors", failed, 5, "The entry answers with a status of 500 or more")
        self._alarm("gateway-slow", slow, 2 * settings.p99_ms, "99 % of the answers at the entry take longer, in ms")
        return [
            cloudwatch.GraphWidget(title="gateway: requests", left=[_requests(gateway, FIVE, public=True), failed]),
            cloudwatch.GraphWidget(title="gateway: latency in ms", left=[slow]),
            *widgets,
        ]

    def _edge(self, thing_group: str) -> list[cloudwatch.IWidget]:
        """Count the devices of the group that are not connected: they keep the models that they have.

        It wants fleet indexing with connectivity, a setting of the account that CloudFormation does not have.
        """
        name = f"{self._prefix}disconnected"
        iot.CfnFleetMetric(
            self,
            "Disconnected",
            metric_name=name,
            index_name="AWS_Things",
            query_string=f"thingGroupNames:{thing_group} AND connectivity.connected:false",
            aggregation_field="registry.version",
            aggregation_type=iot.CfnFleetMetric.AggregationTypeProperty(name="Statistics", values=["count"]),
            period=300,
        )
        stale = cloudwatch.Metric(
            namespace="AWS/IoTFleetIndexing",
            metric_name=name,
            dimensions_map={"AggregationType": "count"},
            statistic="Maximum",
            period=HOUR,
        )
        self._alarm(
            "edge-stale",
            stale,
            0,
            "A device was not connected in each hour of a day: its model may be stale",
            periods=24,
        )
        return [cloudwatch.GraphWidget(title="edge: devices that are not connected", left=[stale], width=24)]

    def _trace(self, groups: list[logs.ILogGroup]) -> None:
        """Save the question for what became of one request: its id is in the entry's log and in each service's."""
        logs.QueryDefinition(
            self,
            "Trace",
            query_definition_name=f"{self._prefix}trace",
            query_string=logs.QueryString(
                fields=["@timestamp", "@logStream", "@message"],
                filter_statements=["@message like /id=REPLACE-BY-THE-REQUEST-ID/"],
                sort="@timestamp asc",
            ),
            log_groups=groups,
        )


def _requests(gateway: GatewayStack, period: cdk.Duration, *, public: bool) -> cloudwatch.IMetric:
    """Return how many requests the gateway gets: at the entry, or where there is none at its two groups of tasks."""
    if public:
        return gateway.api.metric_count(statistic="Sum", period=period)
    counts: dict[str, cloudwatch.IMetric] = {
        f"asked{i}": group.metrics.request_count(period=period) for i, group in enumerate(gateway.service.targets)
    }
    expression = " + ".join(f"FILL({name}, 0)" for name in counts)
    return cloudwatch.MathExpression(expression=expression, using_metrics=counts, period=period, label="requests")
