"""moto's CloudFormation, lifted to what these stacks need.

moto leaves out resource types that it does not know, keeps what depends on a replaced resource as it was, and answers
every invocation of an endpoint with the same bytes. Here an unknown type is recorded with its properties, an update goes
on to what depends on it, and an invocation is answered by the model in the bucket.
"""

import json
import re
from typing import Any

from moto.cloudformation import parsing
from moto.cloudformation.exceptions import UnformattedGetAttTemplateException
from moto.cloudformation.models import CloudFormationBackend, Stack
from moto.ec2.models.route_tables import RouteTable
from moto.ecs.models import Service
from moto.iotdata.models import IoTDataPlaneBackend
from moto.sagemaker.models import FakeEndpoint, FakeEndpointConfig, sagemaker_backends
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

from shipyard.local import edge
from shipyard.local.faults import FAULTS
from shipyard.local.resources import FeedbackStream, Recorded
from shipyard.local.triton import Refused, invoke

# what moto models and cannot make of a template as CloudFormation takes it: recorded as if it were unknown
_POOR = {"AWS::IoT::Policy", "AWS::IoT::RoleAlias", "AWS::KMS::Key"}
# moto updates these into a form that it cannot read itself; CloudFormation replaces them on every change anyway
_REPLACED = {"AWS::ECS::TaskDefinition", "AWS::GreengrassV2::ComponentVersion", "AWS::GreengrassV2::Deployment"}
_SUBSTITUTED = re.compile(r"\$\{([A-Za-z0-9]+)")


def modelled() -> list[str]:
    """Return the resource types that moto itself models."""
    return sorted({*parsing.get_model_map(), *parsing.NULL_MODELS} - {"?", "AWS::SERVICE::RESOURCE"} - _POOR)


def references(value: Any) -> set[str]:
    """Return the logical ids that a part of a template refers to, by Ref, Fn::GetAtt, Fn::Sub or DependsOn."""
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(references, value.values()))
    if isinstance(name := value.get("Ref"), str):
        found.add(name)
    if "Fn::GetAtt" in value:
        found.add(value["Fn::GetAtt"][0])
    if "Fn::Sub" in value:
        text = value["Fn::Sub"]
        found.update(_SUBSTITUTED.findall(text if isinstance(text, str) else text[0]))
    needed = value.get("DependsOn", [])
    # a container's property of this name is a list of objects
    found.update(name for name in ([needed] if isinstance(needed, str) else needed) if isinstance(name, str))
    return found


def in_order(resources: dict[str, Any]) -> list[str]:
    """Return logical ids so that each comes after those that it refers to."""
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in resources and name not in ordered:
            for needed in sorted(references(resources[name]) - {name}):
                visit(needed)
            ordered.setdefault(name)

    for name in resources:
        visit(name)
    return list(ordered)


def _update(self: parsing.ResourceMap, template: dict[str, Any], parameters: dict[str, Any] | None = None) -> None:
    """Update resources in the order of their references, what depends on a replaced one too; remove others at the end."""
    before, after = self._resource_json_map, template["Resources"]
    self._template, self._resource_json_map = template, after
    if parameters:
        self.input_parameters = parameters
    self.load_mapping()
    self.load_parameters()
    self.load_conditions()
    where = {"account_id": self._account_id, "region_name": self._region_name}
    replaced: set[str] = set()
    for name in in_order(after):
        if name not in before:
            _ = self[name]  # the map makes what is asked for
        elif after[name] != before[name] or references(after[name]) & replaced:
            old = self._parsed_resources.get(name)
            # moto changes some resources in place and hands them back: the name has to be kept from before
            identity = getattr(old, "physical_resource_id", None)
            new = None
            if old is not None and after[name]["Type"] not in _REPLACED:
                new = parsing.parse_and_update_resource(name, after[name], self, **where)
            if new is None:  # moto cannot update this type
                if old is not None:
                    self._delete_resource(old, before[name])
                new = parsing.parse_and_create_resource(name, after[name], self, **where)
            if new is not None:
                new.cf_resource_type = after[name]["Type"]
                new.logical_resource_id = name
                self._parsed_resources[name] = new
                if new.physical_resource_id != identity:
                    replaced.add(name)
    for name in reversed(in_order(before)):
        if name not in after and (gone := self._parsed_resources.pop(name, None)) is not None:
            self._delete_resource(gone, before[name])


def _delete(self: parsing.ResourceMap) -> None:
    """Delete resources in the reverse order of their references, but for those that outlive their stack."""
    for name in reversed(in_order(self._resource_json_map)):
        told = self._resource_json_map[name]
        if told.get("DeletionPolicy", "Delete") != "Delete":
            continue
        if (gone := self._parsed_resources.pop(name, None)) is not None:
            self._delete_resource(gone, told)


def lift() -> None:
    """Put the lifts into this process's moto."""
    clean, update_stack = parsing.clean_json, CloudFormationBackend.update_stack
    known, types = parsing.resource_class_from_type, frozenset(modelled())

    def clean_json(value: Any, resources: Any) -> Any:
        if not isinstance(value, dict) or "Fn::GetAtt" not in value:
            return clean(value, resources)
        name, attribute = value["Fn::GetAtt"]
        resource = resources[name]
        try:
            return resource.get_cfn_attribute(attribute)
        except (AttributeError, NotImplementedError, UnformattedGetAttTemplateException):
            # an attribute that moto does not model, of a type that it does
            identity: str = resource.physical_resource_id
            return identity if attribute.endswith("Arn") else f"{identity}-{attribute.lower()}"

    def resource_class(kind: str) -> Any:
        if kind == "AWS::KinesisFirehose::DeliveryStream":
            return FeedbackStream
        if kind in edge.TYPES:
            return edge.TYPES[kind]
        return known(kind) if kind in types else Recorded

    def update(self: Any, name: str, parameters: list[dict[str, Any]], **more: Any) -> Any:
        # moto keeps no value of a parameter that had its default: the default counts again
        known = self.get_stack(name).parameters
        given = [p for p in parameters if not p.get("UsePreviousValue") or p["ParameterKey"] in known]
        stack = self.get_stack(name)

        def work() -> Any:
            done = update_stack(self, name=name, parameters=given, **more)
            for export in done.exports:
                self.exports[export.name] = export
            return done

        def fails() -> Any:
            stack.status = "UPDATE_ROLLBACK_COMPLETE"
            stack._add_stack_event(stack.status, resource_status_reason="a fault of the rehearsal")
            return stack

        def lies() -> Any:
            stack.resource_map.update = lambda *_: None
            try:
                return work()
            finally:
                del stack.resource_map.update

        def falls() -> None:
            for endpoint in sagemaker_backends[self.account_id][self.region_name].endpoints.values():
                endpoint.endpoint_status = "Failed"

        return FAULTS.meet(f"stack {stack.name}", work, fails, lies, falls)

    def invoke_endpoint(self: Any) -> tuple[int, dict[str, str], bytes | str]:
        name = self.path.split("/")[2]
        try:
            kind, body = invoke(
                self.current_account, self.region, name, self.headers.get("Content-Type", ""), self.body
            )
        except Refused as fault:
            told = {"__type": fault.code, "Message": str(fault)}
            headers = {"status": str(fault.status), "Content-Type": "application/json", "x-amzn-ErrorType": fault.code}
            return fault.status, headers, json.dumps(told)
        return 200, {"Content-Type": kind, "x-Amzn-Invoked-Production-Variant": "primary"}, body

    def delete_route_table(self: Any, account: str, region: str) -> None:
        self.ec2_backend.route_tables.pop(self.id)

    lifts: tuple[tuple[Any, str, Any], ...] = (
        (parsing, "clean_json", clean_json),
        (parsing, "resource_class_from_type", resource_class),
        (parsing.ResourceMap, "update", _update),
        (parsing.ResourceMap, "delete", _delete),
        (CloudFormationBackend, "update_stack", update),
        # moto reads JSON as YAML, which takes seconds
        (Stack, "parse_template", staticmethod(_parse)),
        # it would make up another name than the template's
        (FakeEndpoint, "cloudformation_name_type", staticmethod(lambda: "EndpointName")),
        # all tasks of a service run: a part of them never does here
        (Service, "running_count", property(lambda self: self.desired_count, lambda self, count: None)),
        (IoTDataPlaneBackend, "update_thing_shadow", edge.update_shadow),
        # its list of instance types ends before g5, and it knows no pools of them
        (FakeEndpointConfig, "validate_production_variants", lambda self, production_variants: None),
        # it leaves route tables behind, and then cannot delete their network
        (RouteTable, "delete", delete_route_table),
        # tensors are no text
        (SageMakerRuntimeResponse, "use_raw_body", True),
        (SageMakerRuntimeResponse, "invoke_endpoint", invoke_endpoint),
    )
    for place, name, lifted in lifts:
        setattr(place, name, lifted)


_yaml = Stack.parse_template


def _parse(template: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(template)
    except ValueError:
        found = _yaml(template)
    return found
