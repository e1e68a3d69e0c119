"""The way in: who is let in, what the gateway may reach, and where feedback goes."""

import json

import pytest

from models.release import ShipyardError
from tests.test_infra import (
    ACCOUNT,
    gateway,
    logical_id,
    make_stage,
    only,
    plain,
    recommend,
    search,
    statements,
    template_of,
)


def built(**settings):
    return template_of(make_stage(search(), recommend(), gateway(), gateway=settings), "gateway")


@pytest.fixture(scope="module")
def template():
    return built()


def test_gateway_is_told_where_its_targets_are(template):
    command = only(template, "AWS::ECS::TaskDefinition")["ContainerDefinitions"][1]["Command"]
    told = dict(zip(command[2::2], command[3::2], strict=False))
    assert told["--search"] == "sagemaker:shipyard-dev-search"
    assert told["--feedback"] == "firehose:shipyard-dev-feedback"
    start, address = told["--cluster"]["Fn::Join"][1]
    assert (
        start == "http://" and "LoadBalancer" in address["Fn::ImportValue"] and "DNSName" in address["Fn::ImportValue"]
    )


def test_gateway_may_ask_one_endpoint_and_feed_one_stream(template):
    (role,) = [
        role["Properties"]
        for name, role in template.find_resources("AWS::IAM::Role").items()
        if name.startswith("gatewayRole")
    ]
    allowed = statements(role)
    assert allowed["sagemaker:InvokeEndpoint"] == (
        [f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:endpoint/shipyard-dev-search"],
        None,
    )
    stream = f"arn:aws:firehose:us-east-1:{ACCOUNT}:deliverystream/shipyard-dev-feedback"
    assert allowed["firehose:PutRecord firehose:PutRecordBatch"] == ([stream], None)
    assert allowed["s3:GetObject"] == (["<bucket>/artifacts/gateway/*/*"], None)
    assert len(allowed) == 4


def test_entry_wants_iam_credentials_and_is_throttled_and_logged(template):
    route = only(template, "AWS::ApiGatewayV2::Route")
    assert (route["RouteKey"], route["AuthorizationType"]) == ("POST /v1/{proxy+}", "AWS_IAM")
    stage = only(template, "AWS::ApiGatewayV2::Stage")
    settings = stage["DefaultRouteSettings"]
    assert (settings["ThrottlingRateLimit"], settings["ThrottlingBurstLimit"]) == (100, 200)
    fields = json.loads(stage["AccessLogSettings"]["Format"])
    assert {"request", "status", "milliseconds"} <= fields.keys()
    # who asked from where is nobody's business
    assert not {"$context.identity.sourceIp", "$context.identity.userAgent"} & set(fields.values())
    integration = only(template, "AWS::ApiGatewayV2::Integration")
    assert (integration["ConnectionType"], integration["IntegrationMethod"]) == ("VPC_LINK", "ANY")
    assert integration["RequestParameters"] == {"overwrite:header.x-request-id": "$context.requestId"}
    assert integration["IntegrationUri"] == {"Ref": logical_id(template, "AWS::ElasticLoadBalancingV2::Listener")}


def test_entry_wants_a_token_of_the_issuer():
    template = built(api="jwt", issuer="https://login.example.com", audience=("shop",))
    assert only(template, "AWS::ApiGatewayV2::Route")["AuthorizationType"] == "JWT"
    authorizer = only(template, "AWS::ApiGatewayV2::Authorizer")
    assert authorizer["JwtConfiguration"] == {"Issuer": "https://login.example.com", "Audience": ["shop"]}


def test_private_gateway_has_no_entry_from_outside():
    template = built(api="private")
    for kind in ("Api", "VpcLink", "Route", "Stage"):
        template.resource_count_is(f"AWS::ApiGatewayV2::{kind}", 0)
    assert "8080" in json.dumps(template.to_json()["Outputs"]["Address"])


def test_firewall_stands_before_the_load_balancer_by_option(template):
    template.resource_count_is("AWS::WAFv2::WebACL", 0)
    filtered = built(waf=True)
    rules = only(filtered, "AWS::WAFv2::WebACL")["Rules"]
    assert [rule["Name"] for rule in rules] == ["AWSManagedRulesCommonRuleSet", "AWSManagedRulesKnownBadInputsRuleSet"]
    # bodies of more than 8 KB go through it, for a history of 500 events is one: what they may have is serve.asgi's to say
    common, bad = (rule["Statement"]["ManagedRuleGroupStatement"] for rule in rules)
    assert common["RuleActionOverrides"] == [{"Name": "SizeRestrictions_BODY", "ActionToUse": {"Count": {}}}]
    assert "RuleActionOverrides" not in bad
    assert "LoadBalancer" in json.dumps(only(filtered, "AWS::WAFv2::WebACLAssociation")["ResourceArn"])


def test_feedback_lands_in_the_data_bucket_encrypted(template):
    stream = plain(only(template, "AWS::KinesisFirehose::DeliveryStream"))
    assert stream["DeliveryStreamName"] == "shipyard-dev-feedback"
    assert stream["DeliveryStreamEncryptionConfigurationInput"] == {"KeyType": "AWS_OWNED_CMK"}
    target = stream["ExtendedS3DestinationConfiguration"]
    assert target["BucketARN"] == "<data>"
    assert target["Prefix"] == "feedback/day=!{timestamp:yyyy-MM-dd}/"
    assert target["EncryptionConfiguration"] == {"KMSEncryptionConfig": {"AWSKMSKeyARN": "<key>"}}
    role = next(
        role["Properties"]
        for name, role in template.find_resources("AWS::IAM::Role").items()
        if name.startswith("FeedbackRole")
    )
    allowed = statements(role)
    assert allowed["s3:AbortMultipartUpload s3:PutObject"] == (["<data>/feedback-failed/*", "<data>/feedback/*"], None)
    assert not any("s3:GetObject" in actions or "Delete" in actions for actions in allowed)


def test_release_without_a_gateway_has_no_such_stack():
    stage = make_stage(search(), recommend())
    assert stage.node.try_find_child("gateway") is None


def test_gateway_without_a_search_is_an_error():
    with pytest.raises(ShipyardError, match=r"no model to search with; allowed: a triton artifact named search"):
        make_stage(recommend(), gateway())


def test_two_gateways_are_an_error():
    other = gateway() | {"name": "gateway-b"}
    with pytest.raises(ShipyardError, match="not one in the release; value: 2"):
        make_stage(search(), recommend(), gateway(), other)
