"""The GPU endpoint: how an update comes in and is taken back, what scales, what is captured and what is shadowed."""

import pytest

from tests.test_infra import ACCOUNT, BUCKET, logical_id, make_stage, only, plain, search, statements, template_of


def gpu(shadow=None, hours=None, **settings):
    return template_of(make_stage(search(), shadow=shadow, hours=hours, gpu=settings), "gpu")


def endpoint(template):
    return only(template, "AWS::SageMaker::Endpoint")


def test_model_comes_from_an_archive_where_the_release_has_one():
    archived = search()
    archived["template"]["model_data"] = "model.tar.gz"
    model = only(template_of(make_stage(archived), "gpu"), "AWS::SageMaker::Model")
    assert model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"] == {
        "S3Uri": f"s3://{BUCKET}/artifacts/search/{archived['digest']}/model.tar.gz",
        "S3DataType": "S3Object",
        "CompressionType": "Gzip",
    }


def test_update_is_taken_back_by_two_alarms_on_the_endpoint():
    template = gpu()
    alarms = template.find_resources("AWS::CloudWatch::Alarm")
    taken_back = endpoint(template)["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"]
    assert [alarm["AlarmName"] for alarm in taken_back] == [{"Ref": name} for name in alarms]
    watched = {a["Properties"]["MetricName"]: a["Properties"] for a in alarms.values()}
    assert watched.keys() == {"Invocation5XXErrors", "ModelLatency"}
    for alarm in watched.values():
        dimensions = {d["Name"]: d["Value"] for d in alarm["Dimensions"]}
        assert dimensions == {"EndpointName": "shipyard-dev-search", "VariantName": "primary"}
    assert endpoint(template)["EndpointName"] == "shipyard-dev-search"
    # the metric counts microseconds, fleet.toml milliseconds
    assert (watched["ModelLatency"]["Threshold"], watched["ModelLatency"]["ExtendedStatistic"]) == (500_000, "p99")


@pytest.mark.parametrize(
    ("settings", "traffic"),
    [
        ({}, {"Type": "CANARY", "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 10}}),
        ({"update": "linear"}, {"Type": "LINEAR", "LinearStepSize": {"Type": "CAPACITY_PERCENT", "Value": 25}}),
        # a canary takes at most half of the fleet, and half of one instance is none
        ({"instances": 1}, {"Type": "ALL_AT_ONCE"}),
    ],
)
def test_blue_green_update(settings, traffic):
    policy = endpoint(gpu(**settings))["DeploymentConfig"]["BlueGreenUpdatePolicy"]
    assert policy["TrafficRoutingConfiguration"] == {"WaitIntervalInSeconds": 300, **traffic}
    assert policy["TerminationWaitInSeconds"] == 600


def test_rolling_update_needs_no_second_fleet():
    deployment = endpoint(gpu(update="rolling"))["DeploymentConfig"]
    assert "BlueGreenUpdatePolicy" not in deployment
    assert deployment["RollingUpdatePolicy"]["MaximumBatchSize"] == {"Type": "CAPACITY_PERCENT", "Value": 50}
    assert len(deployment["AutoRollbackConfiguration"]["Alarms"]) == 2


def excluded(template):
    return {item["VariantPropertyType"] for item in endpoint(template)["ExcludeRetainedVariantProperties"]}


def test_fleet_that_scales_keeps_its_size_in_an_update():
    template = gpu(max_instances=6, concurrency=4)
    assert endpoint(template)["RetainAllVariantProperties"] is True
    assert excluded(template) == {"DataCaptureConfig", "DesiredWeight"}
    target = only(template, "AWS::ApplicationAutoScaling::ScalableTarget")
    assert target["ResourceId"] == "endpoint/shipyard-dev-search/variant/primary"
    assert target["ScalableDimension"] == "sagemaker:variant:DesiredInstanceCount"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 6)
    (resource,) = template.find_resources("AWS::ApplicationAutoScaling::ScalableTarget").values()
    assert logical_id(template, "AWS::SageMaker::Endpoint") in resource["DependsOn"]
    tracking = only(template, "AWS::ApplicationAutoScaling::ScalingPolicy")["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 4
    assert tracking["PredefinedMetricSpecification"] == {
        "PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    }


def test_fleet_that_does_not_scale_has_the_size_of_fleet_toml():
    template = gpu()
    template.resource_count_is("AWS::ApplicationAutoScaling::ScalableTarget", 0)
    assert "DesiredInstanceCount" in excluded(template)


def test_endpoint_keeps_one_instance_outside_of_its_hours():
    template = gpu(hours={"start": 8, "end": 18})
    target = only(template, "AWS::ApplicationAutoScaling::ScalableTarget")
    actions = {a["Schedule"]: (a["Timezone"], a["ScalableTargetAction"]) for a in target["ScheduledActions"]}
    assert actions == {
        "cron(0 8 ? * MON-FRI *)": ("UTC", {"MinCapacity": 2, "MaxCapacity": 2}),
        "cron(0 18 ? * MON-FRI *)": ("UTC", {"MinCapacity": 1, "MaxCapacity": 1}),
    }
    template.resource_count_is("AWS::ApplicationAutoScaling::ScalingPolicy", 0)
    assert "DesiredInstanceCount" not in excluded(template)


def test_fallback_types_are_tried_in_their_order():
    (variant,) = only(gpu(fallback=("ml.g6.xlarge", "ml.g4dn.xlarge")), "AWS::SageMaker::EndpointConfig")[
        "ProductionVariants"
    ]
    assert "InstanceType" not in variant
    assert variant["InstancePools"] == [
        {"InstanceType": name, "Priority": priority}
        for priority, name in enumerate(("ml.g5.xlarge", "ml.g6.xlarge", "ml.g4dn.xlarge"), start=1)
    ]


def test_capture_goes_to_the_data_bucket_encrypted():
    template = gpu(capture_percent=5)
    capture = plain(only(template, "AWS::SageMaker::EndpointConfig"))["DataCaptureConfig"]
    assert capture == {
        "EnableCapture": True,
        "InitialSamplingPercentage": 5,
        "DestinationS3Uri": f"s3://{BUCKET.replace('artifacts', 'data')}/capture/search/",
        "KmsKeyId": "<key>",
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
    }
    allowed = statements(only(template, "AWS::IAM::Role"))
    assert allowed["s3:AbortMultipartUpload s3:PutObject"] == (["<data>/capture/search/*"], None)
    assert "DataCaptureConfig" not in only(gpu(), "AWS::SageMaker::EndpointConfig")


def test_shadow_gets_copies_for_the_model_of_another_release():
    template = gpu(shadow=(search("2"),))
    config = only(template, "AWS::SageMaker::EndpointConfig")
    (shadow,) = config["ShadowProductionVariants"]
    (primary,) = config["ProductionVariants"]
    assert (shadow["VariantName"], shadow["InitialInstanceCount"]) == ("shadow", 1)
    assert shadow["ModelName"] != primary["ModelName"]
    models = template.find_resources("AWS::SageMaker::Model")
    uris = {
        name: model["Properties"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
        for name, model in models.items()
    }
    assert uris[shadow["ModelName"]["Fn::GetAtt"][0]].endswith(f"{search('2')['digest']}/model_repository/")
    assert uris[primary["ModelName"]["Fn::GetAtt"][0]].endswith(f"{search()['digest']}/model_repository/")
    assert all(model["Properties"]["EnableNetworkIsolation"] for model in models.values())
    assert ACCOUNT in str(only(template, "AWS::IAM::Role"))
