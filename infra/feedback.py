"""What shoppers did with the answers: a stream of events into the data bucket, where the next release trains on it."""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kinesisfirehose as firehose
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service
from infra.storage import KEPT, StorageStack

FEEDBACK = "feedback/"  # below it, in the data bucket, a folder a day of JSON lines (docs/data.md), gzipped
FAILED = "feedback-failed/"


class FeedbackStream(Construct):
    """Collect events for five minutes or 64 MiB, whichever is first, and write them as one object."""

    def __init__(self, scope: Construct, construct_id: str, *, name: str, storage: StorageStack) -> None:
        """Make the stream of that name, its log and its role."""
        super().__init__(scope, construct_id)
        stack = cdk.Stack.of(self)
        self.name = name
        self.arn = stack.format_arn(service="firehose", resource="deliverystream", resource_name=name)
        log = storage.log_group(self, "LogGroup")
        stream = logs.LogStream(self, "LogStream", log_group=log, removal_policy=KEPT)
        statements = [
            *storage.data_access(writes=(FEEDBACK, FAILED)),
            iam.PolicyStatement(
                actions=["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"],
                resources=[storage.data.bucket_arn],
            ),
            iam.PolicyStatement(
                actions=["logs:PutLogEvents"], resources=[f"{log.log_group_arn}:log-stream:{stream.log_stream_name}"]
            ),
        ]
        role = iam.Role(
            self,
            "Role",
            assumed_by=own_service(self, "firehose.amazonaws.com"),
            inline_policies={"deliver": iam.PolicyDocument(statements=statements)},
        )
        acknowledge(role, WILDCARD, "Firehose names the objects below its prefixes itself.")
        firehose.CfnDeliveryStream(
            self,
            "Stream",
            # fixed, for the gateway is told it in its command
            delivery_stream_name=name,
            delivery_stream_type="DirectPut",
            delivery_stream_encryption_configuration_input=(
                firehose.CfnDeliveryStream.DeliveryStreamEncryptionConfigurationInputProperty(key_type="AWS_OWNED_CMK")
            ),
            extended_s3_destination_configuration=(
                firehose.CfnDeliveryStream.ExtendedS3DestinationConfigurationProperty(
                    bucket_arn=storage.data.bucket_arn,
                    role_arn=role.role_arn,
                    prefix=f"{FEEDBACK}day=!{{timestamp:yyyy-MM-dd}}/",
                    error_output_prefix=f"{FAILED}!{{firehose:error-output-type}}/day=!{{timestamp:yyyy-MM-dd}}/",
                    compression_format="GZIP",
                    file_extension=".jsonl.gz",
                    buffering_hints=firehose.CfnDeliveryStream.BufferingHintsProperty(
                        interval_in_seconds=300, size_in_m_bs=64
                    ),
                    encryption_configuration=firehose.CfnDeliveryStream.EncryptionConfigurationProperty(
                        kms_encryption_config=firehose.CfnDeliveryStream.KMSEncryptionConfigProperty(
                            awskms_key_arn=storage.key.key_arn
                        )
                    ),
                    cloud_watch_logging_options=firehose.CfnDeliveryStream.CloudWatchLoggingOptionsProperty(
                        enabled=True, log_group_name=log.log_group_name, log_stream_name=stream.log_stream_name
                    ),
                )
            ),
        )
