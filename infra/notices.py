"""Who is told of alarms and of failed deployments, jobs and devices; by EventBridge, so that no stack knows the topic."""

import aws_cdk as cdk
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_kms as kms
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions


def tell(stack: cdk.Stack, email: str, prefix: str) -> None:
    """Mail alarms and failures of what is called `prefix` and more, and failures of the account's cluster and devices."""
    key = kms.Key(stack, "Key", description="Messages about alarms", enable_key_rotation=True)
    # the rules' targets let EventBridge use both
    topic = sns.Topic(stack, "Topic", master_key=key, enforce_ssl=True)
    topic.add_subscription(subscriptions.EmailSubscription(email))
    patterns = {
        "Alarms": events.EventPattern(
            source=["aws.cloudwatch"],
            detail_type=["CloudWatch Alarm State Change"],
            detail={"alarmName": [{"prefix": prefix}], "state": {"value": ["ALARM"]}},
        ),
        "Deployments": events.EventPattern(
            source=["aws.ecs"],
            detail_type=["ECS Deployment State Change"],
            detail={"eventName": ["SERVICE_DEPLOYMENT_FAILED"]},
        ),
        "Endpoints": events.EventPattern(
            source=["aws.sagemaker"],
            detail_type=["SageMaker Endpoint State Change"],
            detail={
                "EndpointName": [{"prefix": prefix}],
                "EndpointStatus": ["FAILED", "UPDATE_ROLLBACK_FAILED"],
            },
        ),
        "Jobs": events.EventPattern(
            source=["aws.ecs"],
            detail_type=["ECS Task State Change"],
            detail={
                "lastStatus": ["STOPPED"],
                "containers": {"name": ["run"], "exitCode": [{"anything-but": 0}]},
            },
        ),
        "Devices": events.EventPattern(
            source=["aws.greengrass"],
            detail_type=["Greengrass V2 Effective Deployment Status Change"],
            detail={"effectiveDeploymentStatus": ["FAILED", "REJECTED", "TIMED_OUT"]},
        ),
    }
    for name, pattern in patterns.items():
        events.Rule(stack, name, event_pattern=pattern, targets=[targets.SnsTopic(topic)])
