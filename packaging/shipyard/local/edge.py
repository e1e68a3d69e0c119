"""The edge of the local cloud: Greengrass as CloudFormation and a client use it, and devices that do as they are told.

A device is a shadow that echoes: it says at once that it serves what it was told, by the runtime of its group's latest
deployment. tests/test_edge_sync.py runs real ones.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from moto.cloudformation.exceptions import ValidationError
from moto.iot.models import iot_backends
from moto.iotdata.models import IoTDataPlaneBackend
from moto.s3.models import s3_backends

from serve.greengrass.recipe import RUNTIME_COMPONENT
from serve.greengrass.words import SHADOW
from shipyard.local.faults import FAULTS
from shipyard.local.greengrass import Endpoint, Refused
from shipyard.local.resources import Recorded

ENDPOINTS: dict[str, Endpoint] = {}
"""By account: one region of each is imitated."""


def open_greengrass(account: str, region: str) -> str:
    """Start the Greengrass endpoint of an account in this process, unless it is there; return its address."""

    def read(uri: str) -> bytes | None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        found = s3_backends[account]["aws"].get_object(bucket, key)
        return None if found is None else found.value

    def met(operation: str, work: Callable[[], Any]) -> Any:
        def fails() -> Any:
            raise Refused("ValidationException", 400, "a fault of the rehearsal")

        if operation != "CreateDeployment":
            return work()
        # one that is told and not kept
        lies = {"deploymentId": "ffffffff-0000-0000-0000-000000000000"}
        return FAULTS.meet(f"greengrass {account}", work, fails, lambda: lies)

    if account not in ENDPOINTS:
        ENDPOINTS[account] = Endpoint(read, account, region, met)
    return ENDPOINTS[account].url


def _lowered(value: Any) -> Any:
    """Return a property as the API spells it."""
    if isinstance(value, dict):
        return {name[0].lower() + name[1:]: _lowered(inner) for name, inner in value.items()}
    return [_lowered(inner) for inner in value] if isinstance(value, list) else value


def _ask(account: str, work: Callable[[Endpoint], Any]) -> None:
    """Ask an account's endpoint; what it refuses ends the deployment of the stack."""
    try:
        work(ENDPOINTS[account])
    except Refused as fault:
        raise ValidationError(message=str(fault)) from None


class ComponentVersion(Recorded):
    """A component's version, made once: CloudFormation cannot make one that is there."""

    def get_cfn_attribute(self, attribute: str) -> str:
        """Return name and version from the recipe."""
        recipe = json.loads(self.properties["InlineRecipe"])
        told = {"ComponentName": recipe["ComponentName"], "ComponentVersion": recipe["ComponentVersion"]}
        return told.get(attribute) or super().get_cfn_attribute(attribute)

    def make(self) -> None:
        """Make it at the account's endpoint."""
        _ask(self.account, lambda endpoint: endpoint.CreateComponentVersion(self.properties["InlineRecipe"]))


class Deployment(Recorded):
    """A deployment to a thing group."""

    def make(self) -> None:
        """Make it at the account's endpoint."""
        told = dict(self.properties)
        components = {name: _lowered(entry) for name, entry in told.pop("Components").items()}
        _ask(self.account, lambda endpoint: endpoint.CreateDeployment(components=components, **_lowered(told)))


class ThingGroup(Recorded):
    """A thing group that things can be put into."""

    @property
    def physical_resource_id(self) -> str:
        """Return its own name."""
        name: str = self.properties["ThingGroupName"]
        return name

    def make(self) -> None:
        """Make a group of moto's."""
        iot_backends[self.account][self.region].create_thing_group(self.physical_resource_id, "", {})

    def get_cfn_attribute(self, attribute: str) -> str:
        """Return its ARN."""
        if attribute == "Arn":
            return f"arn:aws:iot:{self.region}:{self.account}:thinggroup/{self.physical_resource_id}"
        return super().get_cfn_attribute(attribute)

    def delete(self, account_id: str, region_name: str) -> None:
        """Remove moto's group."""
        iot_backends[account_id][region_name].delete_thing_group(self.physical_resource_id)


TYPES: Mapping[str, Any] = {
    "AWS::GreengrassV2::ComponentVersion": ComponentVersion,
    "AWS::GreengrassV2::Deployment": Deployment,
    "AWS::IoT::ThingGroup": ThingGroup,
}
"""What CloudFormation makes of a template's resource; replaced on every change, as there."""


def _runtime(account: str, thing: str) -> str | None:
    """Return the version of the runtime that was last deployed to the group of a device, which is called GROUP-NUMBER."""
    target = f":thinggroup/{thing.rpartition('-')[0]}"
    found = [d["components"] for d in ENDPOINTS[account].deployments.values() if d["targetArn"].endswith(target)]
    version: str | None = found[-1].get(RUNTIME_COMPONENT, {}).get("componentVersion") if found else None
    return version


_update_shadow = IoTDataPlaneBackend.update_thing_shadow


def update_shadow(self: Any, thing_name: str, payload: Any, shadow_name: str | None) -> Any:
    """Update a shadow, and let the device answer what it was told."""
    made = _update_shadow(self, thing_name, payload, shadow_name)
    told = json.loads(payload)["state"].get("desired", {}).get("told")
    if shadow_name != SHADOW or told is None:
        return made
    models = {name: pointer["manifest"] for name, pointer in json.loads(told)["models"].items()}
    report = {"runtime": _runtime(self.account_id, thing_name), "phase": "serving", "models": models, "fault": ""}
    if FAULTS.take(f"devices {self.account_id}") is not None:
        report |= {"phase": "failed", "models": {}, "fault": "a fault of the rehearsal"}
    reported = {"state": {"reported": {"told": told, "report": json.dumps(report)}}}
    return _update_shadow(self, thing_name, json.dumps(reported), shadow_name)
