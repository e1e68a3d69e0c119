"""Resources of types that moto does not make of templates: recorded alone, or made by what moto has besides."""

from typing import Any

from moto.core.common_models import CloudFormationModel
from moto.firehose.models import firehose_backends


class Recorded(CloudFormationModel):
    """A resource of a type that moto does not know: its properties are kept, nothing is done."""

    def __init__(self, kind: str, name: str, properties: dict[str, Any], account: str, region: str) -> None:
        self.kind, self.name, self.properties = kind, name, properties
        self.account, self.region = account, region

    @property
    def physical_resource_id(self) -> str:
        """Return the name that CloudFormation would make."""
        return self.name

    def get_cfn_attribute(self, attribute: str) -> str:
        """Return a stand-in for an attribute: an ARN where one is asked for, a text that names it elsewhere."""
        _, service, resource = self.kind.lower().split("::")
        if attribute.endswith("Arn"):
            return f"arn:aws:{service}:{self.region}:{self.account}:{resource}/{self.name}"
        return f"{self.name}-{attribute.lower()}"

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: dict[str, Any], account_id: str, region_name: str, **kwargs: Any
    ) -> "Recorded":
        """Record a resource, and make it."""
        made = cls(
            kwargs["ResourceType"], resource_name, cloudformation_json.get("Properties", {}), account_id, region_name
        )
        made.make()
        return made

    def make(self) -> None:
        """Do what a resource of its kind does elsewhere once it is made; of itself nothing."""

    @classmethod
    def update_from_cloudformation_json(
        cls, original_resource: "Recorded", new_resource_name: str, cloudformation_json: dict[str, Any],
        account_id: str, region_name: str,
    ) -> "Recorded":  # fmt: skip
        """Record the new properties under the same name."""
        original_resource.properties = cloudformation_json.get("Properties", {})
        return original_resource

    @classmethod
    def delete_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: dict[str, Any], account_id: str, region_name: str
    ) -> None:
        """Forget a resource: its stack holds it alone."""

    def is_created(self) -> bool:
        """Say that nothing is waited for."""
        return True


class FeedbackStream(Recorded):
    """A Firehose stream: its records lie in its bucket at once and as they are, below the first part of its prefix."""

    @property
    def physical_resource_id(self) -> str:
        """Return the stream's own name."""
        name: str = self.properties["DeliveryStreamName"]
        return name

    def make(self) -> None:
        """Make a stream of moto's."""
        told = self.properties["ExtendedS3DestinationConfiguration"]
        firehose_backends[self.account][self.region].create_delivery_stream(
            region=self.region,
            delivery_stream_name=self.physical_resource_id,
            delivery_stream_type=self.properties["DeliveryStreamType"],
            kinesis_stream_source_configuration={},
            delivery_stream_encryption_configuration_input={},
            s3_destination_configuration={},
            # moto knows no expressions in a prefix
            extended_s3_destination_configuration=told | {"Prefix": told["Prefix"].partition("!{")[0]},
            redshift_destination_configuration={},
            elasticsearch_destination_configuration={},
            splunk_destination_configuration={},
            http_endpoint_destination_configuration={},
            snowflake_destination_configuration={},
            iceberg_destination_configuration={},
            tags=[],
        )

    def delete(self, account_id: str, region_name: str) -> None:
        """Remove moto's stream."""
        firehose_backends[account_id][region_name].delete_delivery_stream(self.physical_resource_id)
