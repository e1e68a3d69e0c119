"""The guard against a local deployment that passes for the wrong reason.

moto does not imitate every resource type. One that it does not is recorded by the local cloud and does nothing, so a
deployment of it shows only that its template fits the others. For each such type this file names the test that asserts its
properties on the template; a type that is not here makes the rehearsal fail.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError

RECORDED: Mapping[str, str] = {
    "AWS::ApiGatewayV2::Api": "test_stacks.py::test_entry_has_no_address_but_its_own",
    "AWS::ApiGatewayV2::Integration": "test_gateway.py::test_entry_wants_iam_credentials_and_is_throttled_and_logged",
    "AWS::ApiGatewayV2::Route": "test_gateway.py::test_entry_wants_iam_credentials_and_is_throttled_and_logged",
    "AWS::ApiGatewayV2::Stage": "test_gateway.py::test_entry_wants_iam_credentials_and_is_throttled_and_logged",
    "AWS::ApiGatewayV2::VpcLink": "test_stacks.py::test_entry_has_no_address_but_its_own",
    "AWS::ApplicationAutoScaling::ScalableTarget": "test_gpu.py::test_fleet_that_scales_keeps_its_size_in_an_update",
    "AWS::ApplicationAutoScaling::ScalingPolicy": "test_gpu.py::test_fleet_that_scales_keeps_its_size_in_an_update",
    "AWS::Budgets::Budget": "test_operations.py::test_budget_stops_new_capacity_and_nothing_else",
    "AWS::Budgets::BudgetsAction": "test_operations.py::test_budget_stops_new_capacity_and_nothing_else",
    "AWS::CloudWatch::Alarm": "test_gpu.py::test_update_is_taken_back_by_two_alarms_on_the_endpoint",
    "AWS::CodePipeline::Pipeline": "test_codepipeline.py::test_a_person_is_asked_between_staging_and_production",
    "AWS::EC2::CustomerGateway": "test_operations.py::test_vpn_brings_the_routes_of_the_customers_network",
    "AWS::EC2::SecurityGroupEgress": "test_infra.py::test_endpoint_group_reaches_s3_alone",
    "AWS::EC2::VPNConnection": "test_operations.py::test_vpn_brings_the_routes_of_the_customers_network",
    "AWS::EC2::VPNGatewayRoutePropagation": "test_operations.py::test_vpn_brings_the_routes_of_the_customers_network",
    "AWS::GreengrassV2::ComponentVersion": "test_infra.py::test_components_are_kept_and_their_recipes_are_static",
    "AWS::GreengrassV2::Deployment": "test_infra.py::test_deployment_pins_every_component",
    "AWS::IAM::OIDCProvider": "test_stacks.py::test_github_is_the_one_provider_of_identities",
    "AWS::IoT::FleetMetric": "test_stacks.py::test_devices_are_counted",
    "AWS::IoT::Policy": "test_infra.py::test_devices_use_topics_of_their_own_group",
    "AWS::IoT::RoleAlias": "test_stacks.py::test_role_alias_is_that_of_the_devices_role",
    "AWS::IoT::ThingGroup": "test_infra.py::test_deployment_pins_every_component",
    "AWS::KMS::Key": "test_infra.py::test_key_rotates_and_serves_this_environments_logs",
    "AWS::KinesisFirehose::DeliveryStream": "test_gateway.py::test_feedback_lands_in_the_data_bucket_encrypted",
    "AWS::Logs::LogStream": "test_stacks.py::test_feedback_that_is_not_delivered_is_logged",
    "AWS::Logs::QueryDefinition": "test_operations.py::test_one_request_is_followed_through_the_logs_of_all_services",
    "AWS::Route53Resolver::ResolverEndpoint": "test_operations.py::test_names_are_asked_of_each_other",
    "AWS::Route53Resolver::ResolverRule": "test_operations.py::test_names_are_asked_of_each_other",
    "AWS::Route53Resolver::ResolverRuleAssociation": "test_stacks.py::test_names_of_the_customer_are_asked_in_the_vpc",
    "AWS::S3::BucketPolicy": "test_infra.py::test_every_bucket_is_private_and_wants_tls",
    "AWS::SNS::Subscription": "test_operations.py::test_alarms_of_every_stack_reach_the_mailbox",
    "AWS::SNS::TopicPolicy": "test_stacks.py::test_alarms_alone_publish_and_by_tls",
}
"""By type: file and name of the test that asserts it on a template."""


def templates(assembly: Path) -> dict[str, dict[str, Any]]:
    """Return the templates of a synthesized assembly by the name of their file."""
    found = sorted(assembly.rglob("*.template.json"))
    return {path.name.removesuffix(".template.json"): json.loads(path.read_text(encoding="utf-8")) for path in found}


def check_types(bodies: Iterable[Mapping[str, Any]], modelled: frozenset[str]) -> list[str]:
    """Return the types of templates that are recorded alone, each of which a test covers.

    Raises:
        ShipyardError: a type is neither imitated nor covered.
    """
    types = {resource["Type"] for body in bodies for resource in body["Resources"].values()}
    recorded = sorted(types - modelled)
    if unknown := [kind for kind in recorded if kind not in RECORDED]:
        raise ShipyardError(
            "deploy-local: moto does not imitate a resource type, and no test is named that covers it",
            value=", ".join(unknown),
            mend="assert its properties on the template in a test, and name that in shipyard/local/recorded.py",
        )
    return recorded
