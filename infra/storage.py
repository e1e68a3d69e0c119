"""The stateful stack: the buckets of artifacts and of data, their key, and the log of who read them."""

from collections.abc import Sequence

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.findings import acknowledge
from infra.replica import Replica, replicate

ENDPOINT_LOGS = "/aws/sagemaker/Endpoints/"  # before an endpoint's name, the name of its log group
CAPTURE = "capture/"  # below it, in the data bucket, requests and answers of the endpoints


class StorageStack(cdk.Stack):
    """Hold the artifact bucket, the data bucket, and the key that encrypts them and the environment's logs.

    The data bucket takes what comes back from where the models serve: feedback, captured requests, scores. All of them
    outlive the stack.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        bucket_name: str,
        data_name: str,
        log_group_prefix: str,
        replica: Replica | None = None,
        readers: Sequence[str] = (),
    ) -> None:
        """Make buckets and key.

        Log groups whose name begins with `log_group_prefix`, and no others, may be encrypted with the key. Artifacts are
        copied to `replica`. `readers` are ARNs of roles, of other accounts too, that promote artifacts from here.
        """
        super().__init__(scope, construct_id)
        self.bucket_name = bucket_name
        """The bucket's name as plain text: inside recipes and commands a CloudFormation reference would not be."""
        self.data_name = data_name
        """The data bucket's name, as plain text too."""

        self.key = kms.Key(
            self,
            "Key",
            description="Artifacts and logs of Shipyard",
            enable_key_rotation=True,
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )
        self.key.add_to_resource_policy(_log_groups(self, log_group_prefix))

        self.access_log = s3.Bucket(
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
        acknowledge(self.access_log, "AwsSolutions-S1", "It is the log itself: to log it would never end.")
        self.bucket = self._bucket("Artifacts", bucket_name, [])
        _write_once(self.bucket)
        self.data = self._bucket(
            "Data",
            data_name,
            [s3.LifecycleRule(prefix=CAPTURE, expiration=cdk.Duration.days(30))],
        )
        if replica is not None:
            replicate(self.bucket, bucket_name, self.key, replica)
        if readers:
            self._share(readers)
        cdk.CfnOutput(self, "Bucket", value=self.bucket.bucket_name)
        cdk.CfnOutput(self, "DataBucket", value=self.data.bucket_name)

    def _bucket(self, construct_id: str, name: str, rules: list[s3.LifecycleRule]) -> s3.Bucket:
        return s3.Bucket(
            self,
            construct_id,
            # fixed, for uploads, jobs and edge devices know the bucket by its name alone
            bucket_name=name,
            versioned=True,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self.key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=self.access_log,
            server_access_logs_prefix=f"{construct_id.lower()}/",
            lifecycle_rules=[
                s3.LifecycleRule(abort_incomplete_multipart_upload_after=cdk.Duration.days(7)),
                # what an upload or a deletion has put aside
                s3.LifecycleRule(noncurrent_version_expiration=cdk.Duration.days(90)),
                *rules,
            ],
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )

    def _share(self, readers: Sequence[str]) -> None:
        """Let roles of other accounts read artifacts.

        They are named by a condition: a policy whose principal is a role is refused for as long as the role is not there.
        """
        accounts: list[iam.IPrincipal] = [iam.AccountPrincipal(arn.split(":")[4]) for arn in readers]
        condition = {"ArnEquals": {"aws:PrincipalArn": list(readers)}}
        self.bucket.add_to_resource_policy(
            iam.PolicyStatement(
                principals=accounts,
                actions=["s3:GetObject"],
                resources=[self.bucket.arn_for_objects("artifacts/*")],
                conditions=condition,
            )
        )
        self.key.add_to_resource_policy(
            iam.PolicyStatement(
                principals=accounts,
                actions=["kms:Decrypt"],
                resources=["*"],  # in a key policy this means the key itself
                conditions={**condition, "StringEquals": {"kms:ViaService": f"s3.{self.region}.amazonaws.com"}},
            )
        )

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

    def data_access(self, *, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> list[iam.PolicyStatement]:
        """Return what a role needs for the objects of the data bucket whose keys begin with one of these prefixes."""
        statements = []
        if reads:
            statements += [
                iam.PolicyStatement(
                    actions=["s3:GetObject"], resources=[self.data.arn_for_objects(f"{prefix}*") for prefix in reads]
                ),
                iam.PolicyStatement(
                    actions=["s3:ListBucket"],
                    resources=[self.data.bucket_arn],
                    conditions={"StringLike": {"s3:prefix": [f"{prefix}*" for prefix in reads]}},
                ),
            ]
        if writes:
            statements.append(
                iam.PolicyStatement(
                    actions=["s3:PutObject", "s3:AbortMultipartUpload"],
                    resources=[self.data.arn_for_objects(f"{prefix}*") for prefix in writes],
                )
            )
        if statements:
            statements.append(
                iam.PolicyStatement(
                    actions=["kms:Decrypt", *(["kms:GenerateDataKey"] if writes else [])],
                    resources=[self.key.key_arn],
                    conditions={"StringEquals": {"kms:ViaService": f"s3.{self.region}.amazonaws.com"}},
                )
            )
        return statements


def _write_once(bucket: s3.Bucket) -> None:
    """Refuse to write over an artifact, whoever asks: SageMaker verifies no signature of what it fetches.

    The parts of a large upload cannot bear the header that this wants, so their end alone is held to it (S3 user guide,
    "Enforce conditional writes"). CopyObject has no such header, so what is promoted is read and written.
    """
    bucket.add_to_resource_policy(
        iam.PolicyStatement(
            effect=iam.Effect.DENY,
            principals=[iam.AnyPrincipal()],
            actions=["s3:PutObject"],
            resources=[bucket.arn_for_objects("artifacts/*")],
            conditions={"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
        )
    )


def _log_groups(stack: cdk.Stack, prefix: str) -> iam.PolicyStatement:
    """Let CloudWatch Logs use a key for the log groups of one name prefix (CloudWatch Logs user guide, "Encrypt")."""
    groups = [
        stack.format_arn(
            service="logs", resource="log-group", resource_name=name, arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME
        )
        for name in (f"{prefix}*", f"{ENDPOINT_LOGS}{prefix}*")
    ]
    return iam.PolicyStatement(
        principals=[iam.ServicePrincipal(f"logs.{stack.region}.amazonaws.com")],
        actions=["kms:Encrypt*", "kms:Decrypt*", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:Describe*"],
        resources=["*"],  # in a key policy this means the key itself
        conditions={"ArnLike": {"kms:EncryptionContext:aws:logs:arn": groups}},
    )
