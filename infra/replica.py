"""A second region's copy of the artifacts: its bucket and key, and the rule by which the first bucket writes there."""

from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service


@dataclass(frozen=True)
class Replica:
    """Name the copy: across regions CloudFormation refers to nothing, so both stacks know it by these names."""

    account: str
    region: str
    bucket_name: str

    @property
    def alias(self) -> str:
        """Return the alias of the key that encrypts the copy."""
        return f"alias/{self.bucket_name}"


class ReplicaStack(cdk.Stack):
    """Hold the copy, in the region of the stack. It outlives the stack, as the first one does."""

    def __init__(self, scope: Construct, construct_id: str, *, replica: Replica) -> None:
        """Make bucket and key."""
        super().__init__(scope, construct_id, env=cdk.Environment(account=replica.account, region=replica.region))
        key = kms.Key(
            self,
            "Key",
            alias=replica.alias,
            description="Copies of Shipyard's artifacts",
            enable_key_rotation=True,
            removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
        )
        bucket = s3.Bucket(
            self,
            "Artifacts",
            bucket_name=replica.bucket_name,
            versioned=True,
            encryption=s3.BucketEncryption.KMS,
            encryption_key=key,
            bucket_key_enabled=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            removal_policy=cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE,
        )
        acknowledge(
            bucket,
            "AwsSolutions-S1",
            "Nobody reads the copy until a person decides to; what is written is in the first region's log.",
        )


def replicate(bucket: s3.Bucket, bucket_name: str, key: kms.IKey, replica: Replica) -> None:
    """Copy what is uploaded to a bucket of artifacts to its replica (S3 user guide, "Replicating encrypted objects")."""
    stack = cdk.Stack.of(bucket)
    source = f"arn:aws:s3:::{bucket_name}"  # by its name, for the bucket itself refers to the role
    arn = f"arn:aws:s3:::{replica.bucket_name}"
    keys = f"arn:aws:kms:{replica.region}:{replica.account}:key/*"
    role = iam.Role(
        bucket,
        "ReplicationRole",
        assumed_by=own_service(bucket, "s3.amazonaws.com"),
        inline_policies={
            "replicate": iam.PolicyDocument(
                statements=[
                    iam.PolicyStatement(
                        actions=["s3:GetReplicationConfiguration", "s3:ListBucket"], resources=[source]
                    ),
                    iam.PolicyStatement(
                        actions=["s3:GetObjectVersionForReplication", "s3:GetObjectVersionTagging"],
                        resources=[f"{source}/artifacts/*"],
                    ),
                    iam.PolicyStatement(
                        actions=["s3:ReplicateObject", "s3:ReplicateTags"], resources=[f"{arn}/artifacts/*"]
                    ),
                    iam.PolicyStatement(
                        actions=["kms:Decrypt"],
                        resources=[key.key_arn],
                        conditions={"StringEquals": {"kms:ViaService": f"s3.{stack.region}.amazonaws.com"}},
                    ),
                    iam.PolicyStatement(
                        actions=["kms:Encrypt", "kms:GenerateDataKey"],
                        resources=[keys],
                        conditions={"ForAnyValue:StringEquals": {"kms:ResourceAliases": replica.alias}},
                    ),
                ]
            )
        },
    )
    acknowledge(role, WILDCARD, "All artifacts; the copy's key has an id that is not known here, but an alias that is.")
    resource = bucket.node.default_child
    assert isinstance(resource, s3.CfnBucket)
    resource.replication_configuration = s3.CfnBucket.ReplicationConfigurationProperty(
        role=role.role_arn,
        rules=[
            s3.CfnBucket.ReplicationRuleProperty(
                id="artifacts",
                status="Enabled",
                priority=1,
                filter=s3.CfnBucket.ReplicationRuleFilterProperty(prefix="artifacts/"),
                # what is deleted here stays there
                delete_marker_replication=s3.CfnBucket.DeleteMarkerReplicationProperty(status="Disabled"),
                source_selection_criteria=s3.CfnBucket.SourceSelectionCriteriaProperty(
                    sse_kms_encrypted_objects=s3.CfnBucket.SseKmsEncryptedObjectsProperty(status="Enabled")
                ),
                destination=s3.CfnBucket.ReplicationDestinationProperty(
                    bucket=arn,
                    encryption_configuration=s3.CfnBucket.EncryptionConfigurationProperty(
                        replica_kms_key_id=f"arn:aws:kms:{replica.region}:{replica.account}:{replica.alias}"
                    ),
                ),
            )
        ],
    )
