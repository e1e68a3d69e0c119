"""Synthesize the fleet: fleet.toml and the signed releases that it names become one stage of stacks an environment.

Context: `-c env=dev,prod` restricts the environments; `-c release=PATH` takes that release for all of them, with the
trusted keys of `-c keys=FOLDER` or of the folder `keys` beside it; `-c fleet=PATH` names another fleet.toml; `-c
allow-older=true` takes releases before project.minimum_sequence too; `-c unapproved=true` takes that of `-c release` without
an approval, to look at. Paths are relative to the folder of this file.
"""

import sys
from pathlib import Path

import aws_cdk as cdk
from constructs import Construct

from infra.checks import check, check_release
from infra.cpu import CpuStack
from infra.delivery import DeliveryStack
from infra.edge import EdgeStack
from infra.gateway import GatewayStack
from infra.gpu import GpuStack
from infra.link import LinkStack
from infra.network import NetworkStack
from infra.observe import ObserveStack, Watched
from infra.pipeline import PipelineStack
from infra.replica import Replica, ReplicaStack
from infra.roles import promoters
from infra.rules import check_templates
from infra.storage import StorageStack
from infra.template import placeholders
from infra.training import TrainingStack
from models.approval import check_standing, require_approval
from models.config import Fleet, load_fleet
from models.promotion import check_promoted
from models.release import Release, ShipyardError, load_keys, read_release, trusted_key

ROOT = Path(__file__).resolve().parent
SLOW_MS = 500  # of an environment that nobody watches


class FleetStage(cdk.Stage):
    """Wire the stacks of one environment: what is kept, the network, and one stack a target."""

    def __init__(
        self, scope: Construct, name: str, *, fleet: Fleet, release: Release, signer: str, shadow: Release | None = None
    ) -> None:
        """Make the stacks; `signer` is the public key of the release in OpenSSH's one-line form."""
        env, stage_name = fleet.env[name], f"{fleet.project.name}-{name.replace('_', '-')}"
        super().__init__(
            scope, name, stage_name=stage_name, env=cdk.Environment(account=env.account, region=env.region)
        )
        bucket, data = fleet.bucket(name), fleet.data_bucket(name)
        values = placeholders(env, bucket=bucket, data=data, release=release, trusted_key=signer)
        slow_ms = env.observe.p99_ms if env.observe else SLOW_MS
        replica = Replica(env.account, env.replica, fleet.replica_bucket(name)) if env.replica else None
        storage = StorageStack(
            self,
            "storage",
            bucket_name=bucket,
            data_name=data,
            log_group_prefix=f"{stage_name}-",
            replica=replica,
            readers=promoters(fleet, name),
        )
        if replica is not None:
            storage.add_stack_dependency(ReplicaStack(self, "replica", replica=replica))
        network = NetworkStack(self, "network", settings=env, release=release, storage=storage)
        placed = {"release": release, "values": values, "storage": storage, "network": network}
        gpu = GpuStack(self, "gpu", settings=env.gpu, hours=env.hours, slow_ms=slow_ms, shadow=shadow, **placed)
        cpu = CpuStack(self, "cpu", settings=env.cpu, hours=env.hours, slow_ms=slow_ms, **placed)
        gateway = None
        if release.of("gateway"):
            gateway = GatewayStack(self, "gateway", settings=env.gateway, service=env.cpu, cpu=cpu, gpu=gpu, **placed)
        if release.of("greengrass-model"):
            EdgeStack(self, "edge", settings=env.edge, release=release, values=values, storage=storage)
        if env.link is not None:
            LinkStack(self, "link", settings=env.link, cidr=env.cidr, storage=storage, network=network, cpu=cpu)
        if env.observe is not None:
            watched = Watched(gpu=gpu, cpu=cpu, gateway=gateway)
            ObserveStack(self, "observe", settings=env.observe, env=env, release=release, watched=watched)
        if env.delivery is not None:
            DeliveryStack(self, "delivery", settings=env.delivery, fleet=fleet, name=name, storage=storage)
            if env.delivery.pipeline is not None:
                PipelineStack(self, "pipeline", settings=env.delivery, fleet=fleet, name=name, storage=storage)
        if env.training is not None:
            TrainingStack(
                self,
                "training",
                fleet=fleet,
                name=name,
                image=env.training.image,
                own_role=env.training.role is None,
                storage=storage,
                network=network,
            )
        # no release among the tags: each release would touch every resource
        cdk.Tags.of(self).add("project", fleet.project.name)
        cdk.Tags.of(self).add("environment", name)


def build(app: cdk.App, root: Path) -> None:
    """Add a stage for each environment that is asked for, with the release that it names.

    Raises:
        ShipyardError: fleet.toml, a release, a key or the context is not what it should be.
    """
    wanted, release_path, keys_path, fleet_path = map(app.node.try_get_context, ("env", "release", "keys", "fleet"))
    fleet = load_fleet(root / (fleet_path or "fleet.toml"))
    for name in dict.fromkeys(wanted.split(",") if wanted else fleet.env):
        if name not in fleet.env:
            raise ShipyardError("-c env: no such environment", value=name, allowed=", ".join(fleet.env))
        check(name, fleet)
        env = fleet.env[name]
        path = root / (release_path or f"releases/{env.release}.json")
        _check_there(name, path)
        trusted = root / keys_path if keys_path else path.parent / "keys"
        keys = load_keys(trusted)
        oldest = 0 if app.node.try_get_context("allow-older") == "true" else fleet.project.minimum_sequence
        release = read_release(path, keys, oldest)
        check_standing(path, release)
        # what is deployed from fleet.toml is never excused
        if not release_path or app.node.try_get_context("unapproved") != "true":
            require_approval(release, name, env, path.parent, trusted)
        if not release_path:
            check_promoted(release, name, env, path.parent, keys)
        shadow = None
        if env.gpu.shadow is not None:
            _check_there(name, shadow_path := path.parent / f"{env.gpu.shadow}.json")
            shadow = read_release(shadow_path, keys)
            check_standing(shadow_path, shadow)
        check_release(name, env, release, shadow)
        FleetStage(app, name, fleet=fleet, release=release, shadow=shadow, signer=trusted_key(release, keys))


def _check_there(name: str, path: Path) -> None:
    if not path.is_file():
        raise ShipyardError(
            f"env.{name}: no such release", value=str(path), mend="publish it or give one: -c release=PATH"
        )


def main() -> int:
    """Synthesize, or print in one line what is wrong."""
    # traces name a temporary folder of the CDK, so that no two synths would be equal
    app = cdk.App(stack_traces=False, context={"aws:cdk:disable-creation-stack-traces": True})
    try:
        build(app, ROOT)
        check_templates(Path(app.synth().directory))
    except ShipyardError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
