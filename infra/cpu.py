"""The private target: one ECS cluster without internet, one load balancer, and a service for each of its artifacts."""

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from constructs import Construct

from infra.anywhere import AnywhereService, machine_role
from infra.jobs import scheduled_job, score
from infra.network import NetworkStack, closed_group
from infra.service import InferenceService, Sizing, stable_number
from infra.storage import StorageStack
from infra.template import ImageTemplate, read_template
from models.config import CpuSettings, Hours
from models.release import Artifact, Release, ShipyardError

LISTENER_PORT = 80
MAX_SCALE = 4  # times the tasks of fleet.toml, where that does not say how many


class CpuStack(cdk.Stack):
    """Wire one cluster and its load balancer, and one service for each image-context artifact of a release.

    The service of an artifact has the requests below /<name of the artifact>/.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: CpuSettings,
        hours: Hours | None,
        slow_ms: int,
        release: Release,
        values: Mapping[str, str],
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make cluster, load balancer and services; `values` fills the placeholders of templates.

        Raises:
            ShipyardError: two artifacts would have the same place in the listener's order.
        """
        super().__init__(scope, construct_id)
        artifacts = release.of("image-context")
        _check_numbers(artifacts)
        self.cluster = ecs.Cluster(
            self, "Cluster", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENABLED
        )
        capacity = _machines(self, settings, network)
        self.sizing = Sizing(
            cpu=settings.cpu,
            memory_mib=settings.memory_mib,
            tasks=settings.tasks,
            max_tasks=settings.max_tasks or settings.tasks * MAX_SCALE,
            update=settings.update,
            slow_ms=slow_ms,
            hours=hours,
            capacity=capacity,
        )
        """How each of the services is sized."""
        self.balancer = self._balance(network, storage)
        listener = add_listener(self, "Listener", balancer=self.balancer, port=LISTENER_PORT, network=network)
        self.url = f"http://{self.balancer.load_balancer_dns_name}"
        self.services = []
        for artifact in artifacts:
            template = read_template(artifact, ImageTemplate, values)
            service = InferenceService(
                self,
                artifact.name,
                cluster=self.cluster,
                sizing=self.sizing,
                settings=settings,
                artifact=artifact,
                template=template,
                storage=storage,
                network=network,
                listener=listener,
                path=f"/{artifact.name}/",
            )
            self.services.append(service)
            if settings.anywhere:
                AnywhereService(
                    self,
                    f"{artifact.name}-anywhere",
                    cluster=self.cluster,
                    settings=settings,
                    artifact=artifact,
                    template=template,
                    storage=storage,
                )
            if settings.score_at is not None and template.score is not None:
                score(
                    self,
                    f"{artifact.name}-score",
                    cluster=self.cluster,
                    settings=settings,
                    artifact=artifact,
                    template=template,
                    storage=storage,
                    group=service.group,
                )
            cdk.CfnOutput(self, f"{artifact.name}-address", value=f"{self.url}/{artifact.name}/")
        for name, job in settings.job.items():
            scheduled_job(self, f"job-{name}", job=job, cluster=self.cluster, storage=storage, network=network)
        if settings.anywhere:
            cdk.CfnOutput(self, "ClusterName", value=self.cluster.cluster_name)
            cdk.CfnOutput(self, "MachineRoleName", value=machine_role(self, self.cluster).role_name)
        cdk.CfnOutput(self, "Release", value=release.version)

    def _balance(self, network: NetworkStack, storage: StorageStack) -> elbv2.ApplicationLoadBalancer:
        group = closed_group(
            self, "LoadBalancerSecurityGroup", vpc=network.vpc, description="Load balancer in front of the services"
        )
        balancer = elbv2.ApplicationLoadBalancer(
            self,
            "LoadBalancer",
            vpc=network.vpc,
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            internet_facing=False,
            security_group=group,
            drop_invalid_header_fields=True,
            deletion_protection=False,
        )
        balancer.log_access_logs(storage.access_log, "balancer")
        return balancer


def add_listener(
    scope: Construct,
    construct_id: str,
    *,
    balancer: elbv2.ApplicationLoadBalancer,
    port: int,
    network: NetworkStack,
) -> elbv2.ApplicationListener:
    """Return a listener that its rules alone pass anything on from, and that the clients of the network reach.

    Plain HTTP: a certificate needs a domain and an issuer that the fleet does not have. The way from client to task lies
    inside a VPC without internet, is open to named security groups, and carries item numbers and scores.
    """
    listener = elbv2.ApplicationListener(
        scope,
        construct_id,
        load_balancer=balancer,
        port=port,
        protocol=elbv2.ApplicationProtocol.HTTP,
        open=False,
        default_action=elbv2.ListenerAction.fixed_response(
            404, content_type="application/json", message_body='{"error": "no such path"}'
        ),
    )
    listener.connections.allow_from(network.clients, ec2.Port.tcp(port), "Clients of the services")
    return listener


def _check_numbers(artifacts: tuple[Artifact, ...]) -> None:
    """Refuse two artifacts whose names happen to have the same number (infra.service.stable_number)."""
    for low, count in ((1, 49_999), (20_000, 10_000)):
        numbers = {artifact.name: stable_number(artifact.name, low, count) for artifact in artifacts}
        for name, number in numbers.items():
            if others := [other for other in numbers if other < name and numbers[other] == number]:
                raise ShipyardError(
                    f"cpu: {name} and {others[0]} have the same number",
                    value=number,
                    mend="rename one of the sub-models",
                )


def _machines(
    stack: CpuStack, settings: CpuSettings, network: NetworkStack
) -> ecs.ManagedInstancesCapacityProvider | None:
    """Return the machines of the cluster, which ECS starts, patches and replaces, or nothing where Fargate serves."""
    if settings.instance_type is None:
        return None
    group = closed_group(stack, "Machines", vpc=network.vpc, description="Machines of the cluster")
    group.connections.allow_to(network.endpoints, ec2.Port.tcp(443), "ECS, image and logs")
    group.connections.allow_to(network.s3, ec2.Port.tcp(443), "Image layers from S3")
    provider = ecs.ManagedInstancesCapacityProvider(
        stack,
        "Capacity",
        subnets=network.vpc.isolated_subnets,
        security_groups=[group],
        instance_requirements=ec2.InstanceRequirementsConfig(
            allowed_instance_types=[settings.instance_type],
            v_cpu_count_min=1,
            memory_min=cdk.Size.gibibytes(1),
        ),
        propagate_tags=ecs.PropagateManagedInstancesTags.CAPACITY_PROVIDER,
    )
    stack.cluster.add_managed_instances_capacity_provider(provider)
    return provider
