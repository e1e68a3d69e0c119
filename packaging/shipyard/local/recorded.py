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
    "AWS::ApplicationAutoScaling::ScalableTarget": "test_infra.py::test_service_scales_from_its_tasks_to_four_times_as_many",
    "AWS::ApplicationAutoScaling::ScalingPolicy": "test_infra.py::test_service_scales_from_its_tasks_to_four_times_as_many",
    "AWS::EC2::SecurityGroupEgress": "test_infra.py::test_endpoint_group_reaches_s3_alone",
    "AWS::GreengrassV2::ComponentVersion": "test_infra.py::test_components_are_kept_and_their_recipes_are_static",
    "AWS::GreengrassV2::Deployment": "test_infra.py::test_deployment_pins_every_component",
    "AWS::IoT::Policy": "test_infra.py::test_devices_use_topics_of_their_own_group",
    "AWS::IoT::RoleAlias": "test_deploy.py::test_role_alias_is_that_of_the_devices_role",
    "AWS::IoT::ThingGroup": "test_infra.py::test_deployment_pins_every_component",
    "AWS::KMS::Key": "test_infra.py::test_key_rotates_and_serves_this_environments_logs",
    "AWS::S3::BucketPolicy": "test_infra.py::test_every_bucket_is_private_and_wants_tls",
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
