"""What is live against what the release says: a rollback that nobody told of is seen, at every place."""

import json

import boto3
import pytest

from models.approval import text
from models.promotion import sign_promotion
from models.release import read_release
from serve.errors import ShipyardError
from serve.greengrass.words import SHADOW
from shipyard.delivery import command as delivery
from shipyard.delivery import live, operate
from shipyard.edge import rollout
from shipyard.edge.lock import component, edge_artifacts
from shipyard.local.greengrass import Endpoint
from tests.test_delivery import ACCOUNT, aws, project  # noqa: F401 -- fixtures
from tests.test_infra import edge, gateway, recommend, search

ENV = "dev"
IMAGE = "0" * 64


def template(found, bucket):
    """Cluster and services as the stacks make them, as far as `status` looks."""
    resources = {"Cluster": {"Type": "AWS::ECS::Cluster", "Properties": {}}}
    for artifact in found:
        containers = [
            {"Name": "fetch", "Image": "i", "Command": ["-m", "serve.fetch", f"s3://{bucket}/{artifact.key}"]},
            {
                "Name": "serve",
                "Image": f"x/shipyard/recommend@sha256:{IMAGE}",
                "Command": ["--artifact", artifact.name],
            },
        ]
        name = artifact.name.title()
        resources[f"{name}Task"] = {
            "Type": "AWS::ECS::TaskDefinition",
            "Properties": {"Family": artifact.name, "ContainerDefinitions": [c | {"Memory": 9} for c in containers]},
        }
        resources[f"{name}Service"] = {
            "Type": "AWS::ECS::Service",
            "Properties": {
                "Cluster": {"Ref": "Cluster"}, "TaskDefinition": {"Ref": f"{name}Task"}, "DesiredCount": 0,
                "ServiceName": artifact.name,
            },
        }  # fmt: skip
    return json.dumps({"Resources": resources})


class Place:
    """A local cloud that runs a release, and may be made to run another one behind the back of everybody."""

    def __init__(self, owner, endpoint):
        self.project, self.endpoint, self.bucket = owner, endpoint, owner.fleet.bucket(ENV)
        self.settings = owner.fleet.env[ENV].edge
        self.sagemaker, self.ecs = boto3.client("sagemaker"), boto3.client("ecs")
        self.clients = live.open_services(owner.fleet.env[ENV])
        for group in rollout.groups(self.settings).values():
            self.clients.edge.iot.create_thing_group(thingGroupName=group)
            self.clients.edge.iot.create_thing(thingName=f"{group}-0")
            self.clients.edge.iot.add_thing_to_thing_group(thingGroupName=group, thingName=f"{group}-0")
        self.number = 0

    def gpu(self, found):
        for artifact in found.of("triton"):
            self.number += 1
            name, own = f"shipyard-{ENV}-{artifact.name}", f"m-{self.number}"
            data = {"S3DataSource": {"S3Uri": f"s3://{self.bucket}/{artifact.key}model_repository/",
                                     "S3DataType": "S3Prefix", "CompressionType": "None"}}  # fmt: skip
            self.sagemaker.create_model(
                ModelName=own, ExecutionRoleArn=f"arn:aws:iam::{ACCOUNT}:role/x",
                PrimaryContainer={"Image": "i", "ModelDataSource": data},
            )  # fmt: skip
            variant = {
                "VariantName": "primary",
                "ModelName": own,
                "InstanceType": "ml.m4.xlarge",
                "InitialInstanceCount": 1,
            }
            self.sagemaker.create_endpoint_config(EndpointConfigName=own, ProductionVariants=[variant])
            if self.number > 1:  # moto knows no update
                self.sagemaker.delete_endpoint(EndpointName=name)
            self.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=own)

    def cpu(self, found):
        cloudformation = boto3.client("cloudformation")
        for place, kind in (("cpu", "image-context"), ("gateway", "gateway")):
            body = template(found.of(kind), self.bucket)
            cloudformation.create_stack(StackName=f"shipyard-{ENV}-{place}", TemplateBody=body)

    def edge(self, found, *labels):
        for label, group in rollout.groups(self.settings).items():
            if label in labels:
                pinned = {}
                for artifact in edge_artifacts(found):
                    name, version = component(artifact)
                    arn = f"arn:aws:greengrass:us-east-1:{ACCOUNT}:components:{name}:versions:{version}"
                    self.endpoint.versions[arn] = {}
                    pinned[name] = {"componentVersion": version}
                self.clients.edge.greengrass.create_deployment(
                    targetArn=f"arn:aws:iot:us-east-1:{ACCOUNT}:thinggroup/{group}", components=pinned
                )

    def rows(self, found):
        return live.status(self.clients, self.project.fleet, ENV, found, self.project.register(ENV))

    def wrong(self, found):
        return {(row.place, row.unit): row.state for row in self.rows(found) if row.state != "ok"}


def parts(version):
    return (
        search(),
        recommend(),
        gateway(),
        edge("model", ComponentVersion=version),
        edge("runtime", ComponentVersion=version),
    )


@pytest.fixture
def place(aws, project, monkeypatch):  # noqa: F811
    endpoint = Endpoint(lambda _: b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL_GREENGRASSV2", endpoint.url)
    project.first, project.second = (project.release(n, parts=parts(f"0.{n}.0")) for n in (3, 4))
    project.pin(ENV, project.second)
    made = Place(project, endpoint)
    made.gpu(project.second)
    made.cpu(project.second)
    made.edge(project.second, "canary", "fleet")
    yield made
    endpoint.shutdown()
    endpoint.server_close()


def test_what_is_live_is_told_and_a_rollback_that_nobody_told_of_is_seen(place, capsys):
    project = place.project  # noqa: F811
    assert project.run("status", ENV) == 0
    told = capsys.readouterr().out
    for artifact in project.second.artifacts:
        assert f" {artifact.name} " in told
    assert told.count(" ok") == len(told.splitlines()) - 1
    # an alarm takes the endpoint back to the configuration before, with the endpoint in service all the while
    place.gpu(project.first)
    assert project.run("status", ENV, "--json") == operate.DIFFERS == 3
    told = json.loads(capsys.readouterr().out)
    [wrong] = [row for row in told["rows"] if row["state"] != "ok"]
    [old], [new] = project.first.of("triton"), project.second.of("triton")
    assert (wrong["place"], wrong["unit"], wrong["state"]) == ("gpu", "search", "differs")
    assert (wrong["wanted"], wrong["live"]) == (new.digest[:12], old.digest[:12])
    assert wrong["by"] == "m-2, InService"
    # a circuit breaker brings back the task definition before, with another image
    [cpu] = project.first.of("image-context")
    containers = [
        {"name": "fetch", "image": "i", "memory": 9, "command": [f"s3://{place.bucket}/{cpu.key}"]},
        {"name": "serve", "image": f"x@sha256:{IMAGE}", "memory": 9, "command": ["--artifact", "recommend"]},
    ]
    older = place.ecs.register_task_definition(family="recommend", containerDefinitions=containers)["taskDefinition"]
    for cluster in place.ecs.list_clusters()["clusterArns"]:
        for arn in place.ecs.list_services(cluster=cluster)["serviceArns"]:
            if arn.endswith("/recommend"):
                place.ecs.update_service(cluster=cluster, service=arn, taskDefinition=older["taskDefinitionArn"])
    # and one thing group gets the components of before
    place.edge(project.first, "fleet")
    assert place.wrong(project.second) == {
        ("gpu", "search"): "differs", ("cpu", "recommend"): "differs", ("edge fleet", "edge-model"): "differs",
        ("edge fleet", "edge-runtime"): "differs",
    }  # fmt: skip
    row = next(row for row in place.rows(project.second) if row.unit == "recommend")
    assert cpu.digest[:12] in row.live and f"image sha256:{IMAGE}" in row.live


def test_what_is_not_there_is_missing(aws, project, monkeypatch):  # noqa: F811
    endpoint = Endpoint(lambda _: b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL_GREENGRASSV2", endpoint.url)
    found = project.release(3, parts=parts("0.3.0"))
    empty = Place(project, endpoint)
    wanted = {("gpu", "search"), ("cpu", "recommend"), ("gateway", "gateway")}
    wanted |= {(f"edge {group}", f"edge-{kind}") for group in ("canary", "fleet") for kind in ("model", "runtime")}
    assert empty.wrong(found) == dict.fromkeys(wanted, "missing")
    endpoint.shutdown()
    endpoint.server_close()


def test_a_device_that_failed_and_a_canceled_deployment_are_seen(place):
    found, shadows = place.project.second, place.clients.edge.shadows
    group = rollout.groups(place.settings)["canary"]
    report = {"generation": 1, "phase": "failed", "models": {}, "fault": "no space left"}
    payload = json.dumps({"state": {"reported": {"report": json.dumps(report)}}})
    shadows.update_thing_shadow(thingName=f"{group}-0", shadowName=SHADOW, payload=payload)
    for deployment in place.endpoint.deployments.values():
        if deployment["targetArn"].endswith(f"/{place.settings.thing_group}"):
            deployment["deploymentStatus"] = "CANCELED"
    assert place.wrong(found) == {
        ("edge canary", "devices"): "failed", ("edge fleet", "edge-model"): "failed",
        ("edge fleet", "edge-runtime"): "failed",
    }  # fmt: skip


def test_a_promotion_that_fleet_toml_does_not_name_is_seen(place):
    project = place.project  # noqa: F811
    project.register(ENV).write("delivery/promotions/000001.json", {"release": project.first.version}, None)
    assert place.wrong(project.second) == {("record", "promotion"): "differs"}


# --- the verb that rolls out -------------------------------------------------------------------------------------------


@pytest.fixture
def rolling(place, monkeypatch):
    """A release after the one that is live, and in the CDK CLI's place what does in the local cloud what stacks would."""
    owner, brought, fails = place.project, [], []
    edges = [edge(kind, ComponentVersion="0.5.0") for kind in ("model", "runtime")]
    following = owner.release(5, parts=(search(), *edges))

    def synth(fleet, out, reporter, env, release):
        out.mkdir(parents=True, exist_ok=True)
        (out / release.name).write_bytes(release.read_bytes())

    def deployer(cli, assembly, pattern, surroundings):
        def deploy(version):
            found = read_release(assembly(version) / f"{version}.json", owner.keys)
            brought.append((pattern.removeprefix(f"{ENV}/"), version))
            if pattern in (f"{ENV}/gpu", f"{ENV}/*"):
                place.gpu(found)
            if pattern in (f"{ENV}/edge", f"{ENV}/*"):
                place.edge(found, "canary", "fleet")
            if (pattern.removeprefix(f"{ENV}/"), version) in fails:
                raise ShipyardError("the stack was taken back")

        return deploy

    monkeypatch.setattr(operate, "deployer", deployer)
    around = delivery.Surroundings(owner.folder, {}, synth)
    owner.register(ENV).write(
        "delivery/promotions/000001.json", {"release": owner.second.version, "replaces": "x"}, None
    )
    record = {"release": following.version, "replaces": owner.second.version}
    owner.register(ENV).write("delivery/promotions/000002.json", record, None)
    owner.pin(ENV, following)

    def run(*more):
        return delivery.main(["rollout", ENV, "--fleet", str(owner.fleet_file), "--wait", "0", *more], around)

    return following, run, brought, fails


def test_a_rollout_goes_from_target_to_target_and_what_is_live_is_the_release(place, rolling, capsys):
    following, run, brought, _ = rolling
    assert run() == 0
    assert 'could not return to those of before: set edge.components = "published"' in capsys.readouterr().err
    assert [pattern for pattern, _ in brought] == ["gpu", "edge", "*"]
    assert place.wrong(following) == {}
    assert place.project.run("status", ENV) == 0


@pytest.mark.parametrize("pattern", ["gpu", "edge", "*"])
def test_a_stack_that_fails_brings_every_target_back_to_what_the_promotion_replaced(place, rolling, pattern):
    following, run, brought, fails = rolling
    fails.append((pattern, following.version))
    with pytest.raises(ShipyardError, match="the stack was taken back; all targets are back on") as fault:
        run()
    assert place.project.second.version in str(fault.value)
    wrong = place.wrong(place.project.second)
    assert wrong == {("record", "promotion"): "differs"}  # fleet.toml still names the other one: status says so
    if pattern == "gpu":
        assert {one for one, _ in brought} == {"gpu"}


def test_a_rollout_does_not_return_to_a_revoked_release(place, rolling):
    following, run, brought, fails = rolling
    fails.append(("gpu", following.version))
    place.project.path(place.project.second).with_suffix(".revoked").write_text("leaks a price list")
    with pytest.raises(ShipyardError, match=r"not all targets are back on .*the release is revoked"):
        run()
    assert {version for _, version in brought} == {following.version}


def test_a_rollout_of_a_release_that_is_not_approved_begins_nothing(place, rolling):
    _, run, brought, _ = rolling
    toml = place.project.fleet_file.read_text()
    place.project.fleet_file.write_text(toml.replace("[env.dev]", "[env.dev]\napproval = true"))
    with pytest.raises(ShipyardError, match=r"env.dev: release .* is not approved"):
        run()
    assert brought == []


def test_a_rollout_of_what_fleet_toml_names_by_hand_begins_nothing(place, rolling):
    following, run, brought, _ = rolling
    owner = place.project
    toml = owner.fleet_file.read_text()
    owner.fleet_file.write_text(toml.replace("[env.dev]", "[env.dev]\napproval = true"))
    record = sign_promotion(
        following, ENV, "staging", (), "ci", "2030-01-31T12:00:00Z", owner.signer, replaces=owner.second.version,
        approval=None, previous=None,
    )  # fmt: skip
    folder = owner.releases / "promotions" / ENV
    folder.mkdir(parents=True)
    (folder / "000001.json").write_text(text(record))
    owner.approve(owner.second, ENV)
    owner.pin(ENV, owner.second)
    with pytest.raises(ShipyardError, match="names a release that was not promoted"):
        run()
    assert brought == []
