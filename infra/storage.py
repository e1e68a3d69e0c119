"""The stateful stack: the bucket that artifacts are uploaded to, its key, and the log of who read it."""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from constructs import Construct


class StorageStack(cdk.Stack):
    """Hold the artifact bucket and the key that encrypts it and the environment's logs. Both outlive the stack."""

    def __init__(self, scope: Construct, construct_id: str, *, bucket_name: str, log_group_prefix: str) -> None:
        """Make bucket and key.

        Log groups whose name begins with `log_group_prefix`, and no others, may be encrypted with the key.
        """
        super().__init__(scope, construct_id)
        self.bucket_name = bucket_name
        """The bucket's name as plain text: inside recipes and commands a CloudFormation reference would not be."""

        self.key = kms.Key(
            self,
            "Key",
            description="Artifacts and logs of Shipyard",
            enable_key_rotation=True,
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )
        self.key.add_to_resource_policy(_log_groups(self, log_group_prefix))

        access_log = s3.Bucket(
            self,
            "AccessLog",
            # log delivery cannot write to a bucket with a customer's key
            encryption=s3.BucketEncryption.S3_MANAGED,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            lifecycle_rules=[s3.LifecycleRule(expiration=cdk.Duration.days(365))],
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )
        self.bucket = s3.Bucket(
            self,
            "Artifacts",
            # fixed, for the upload and the edge devices know the bucket by its name alone
            bucket_name=bucket_name,
            versioned=True,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self.key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=access_log,
            server_access_logs_prefix="artifacts/",
            lifecycle_rules=[s3.LifecycleRule(abort_incomplete_multipart_upload_after=cdk.Duration.days(7))],
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )
        cdk.CfnOutput(self, "Bucket", value=self.bucket.bucket_name)

    def reading(self, *patterns: str) -> list[iam.PolicyStatement]:
        """Return what a role needs to read the objects whose keys match `patterns`, and nothing else of the bucket."""
        return [
            iam.PolicyStatement(
                actions=["s3:GetObject"], resources=[self.bucket.arn_for_objects(pattern) for pattern in patterns]
            ),
            iam.PolicyStatement(
                actions=["kms:Decrypt"],
                resources=[self.key.key_arn],
                # the key encrypts logs too, so it opens by way of S3 alone
                conditions={"StringEquals": {"kms:ViaService": f"s3.{self.region}.amazonaws.com"}},
            ),
        ]


def _log_groups(stack: cdk.Stack, prefix: str) -> iam.PolicyStatement:
    """Let CloudWatch Logs use a key for the log groups of one name prefix (CloudWatch Logs user guide, "Encrypt")."""
    group = stack.format_arn(
        service="logs", resource="log-group", resource_name=f"{prefix}*", arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME
    )
    return iam.PolicyStatement(
        principals=[iam.ServicePrincipal(f"logs.{stack.region}.amazonaws.com")],
        actions=["kms:Encrypt*", "kms:Decrypt*", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:Describe*"],
        resources=["*"],  # in a key policy this means the key itself
        conditions={"ArnLike": {"kms:EncryptionContext:aws:logs:arn": group}},
    )
