"""The private target: one ECS cluster without internet, and a Fargate service for each of its artifacts."""

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecr as ecr
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.network import NetworkStack, closed_group
from infra.storage import StorageStack
from infra.template import ImageTemplate, read_template
from models.config import CpuSettings
from models.release import Artifact, Release, artifact_key

USER = "10001"  # not root, and not a user of the host
VOLUME = "model"
LISTENER_PORT = 80
MAX_SCALE = 4  # times the tasks of fleet.toml
CPU_PERCENT = 60


class CpuStack(cdk.Stack):
    """Wire one cluster, and one service for each image-context artifact of a release."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: CpuSettings,
        release: Release,
        values: Mapping[str, str],
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make cluster and services; `values` fills the placeholders of templates."""
        super().__init__(scope, construct_id)
        cluster = ecs.Cluster(self, "Cluster", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENABLED)
        for artifact in release.of("image-context"):
            service = InferenceService(
                self,
                artifact.name,
                cluster=cluster,
                settings=settings,
                artifact=artifact,
                template=read_template(artifact, ImageTemplate, values),
                storage=storage,
                network=network,
            )
            address = service.load_balancer.load_balancer_dns_name
            cdk.CfnOutput(self, f"{artifact.name}-address", value=f"http://{address}:{LISTENER_PORT}")
        cdk.CfnOutput(self, "Release", value=release.version)


class InferenceService(Construct):
    """Serve one bundle behind an internal load balancer.

    The image holds code and libraries alone. The container `fetch` brings the bundle of the release, verifies it with
    the trusted key and ends; `serve` starts only where that succeeded.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        cluster: ecs.Cluster,
        settings: CpuSettings,
        artifact: Artifact,
        template: ImageTemplate,
        storage: StorageStack,
        network: NetworkStack,
    ) -> None:
        """Make task definition, service, load balancer and scaling."""
        super().__init__(scope, construct_id)
        task = self._task(settings=settings, artifact=artifact, template=template, storage=storage)
        group = closed_group(self, "SecurityGroup", vpc=network.vpc, description=f"Tasks of {artifact.name}")
        group.connections.allow_to(network.endpoints, ec2.Port.tcp(443), "Image and logs")
        group.connections.allow_to(network.s3, ec2.Port.tcp(443), "Image layers and bundle from S3")
        service = ecs.FargateService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            # no desired_count: it would set back on each deployment what was scaled since; the scaling holds the least
            security_groups=[group],
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            assign_public_ip=False,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            min_healthy_percent=100,
            max_healthy_percent=200,
            health_check_grace_period=cdk.Duration.seconds(120),
            enable_ecs_managed_tags=True,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )
        # a task cannot start before its execution role may pull and log
        service.node.add_dependency(task.obtain_execution_role())
        self.load_balancer = self._balance(service=service, template=template, network=network)
        scaling = service.auto_scale_task_count(min_capacity=settings.tasks, max_capacity=settings.tasks * MAX_SCALE)
        scaling.scale_on_cpu_utilization("Cpu", target_utilization_percent=CPU_PERCENT)

    def _task(
        self, *, settings: CpuSettings, artifact: Artifact, template: ImageTemplate, storage: StorageStack
    ) -> ecs.FargateTaskDefinition:
        repository, digest = settings.image.split("@")
        image = ecs.ContainerImage.from_ecr_repository(
            ecr.Repository.from_repository_name(self, "Repository", repository), digest
        )
        log = ecs.LogDrivers.aws_logs(
            stream_prefix=artifact.name,
            log_group=logs.LogGroup(
                self, "LogGroup", encryption_key=storage.key, retention=logs.RetentionDays.ONE_MONTH
            ),
        )
        task = ecs.FargateTaskDefinition(
            self,
            "Task",
            cpu=settings.cpu,
            memory_limit_mib=settings.memory_mib,
            runtime_platform=ecs.RuntimePlatform(
                cpu_architecture=ecs.CpuArchitecture.ARM64, operating_system_family=ecs.OperatingSystemFamily.LINUX
            ),
            task_role=self._role(artifact, storage),
        )
        task.add_volume(name=VOLUME)

        def container(name: str, command: tuple[str, ...], *, essential: bool) -> ecs.ContainerDefinition:
            linux = ecs.LinuxParameters(self, f"{name}-linux", init_process_enabled=True)
            linux.drop_capabilities(ecs.Capability.ALL)
            added = task.add_container(
                name,
                image=image,
                command=list(command),
                environment=template.environment,
                essential=essential,
                user=USER,
                privileged=False,
                readonly_root_filesystem=True,
                linux_parameters=linux,
                logging=log,
            )
            added.add_mount_points(
                # Fargate takes owner and mode of the volume from the image, which has to declare it for this user
                ecs.MountPoint(source_volume=VOLUME, container_path=template.mount, read_only=essential)
            )
            return added

        fetch = container("fetch", template.fetch, essential=False)
        serve = container("serve", template.serve, essential=True)
        serve.add_port_mappings(ecs.PortMapping(container_port=template.port))
        serve.add_container_dependencies(
            ecs.ContainerDependency(container=fetch, condition=ecs.ContainerDependencyCondition.SUCCESS)
        )
        return task

    def _role(self, artifact: Artifact, storage: StorageStack) -> iam.Role:
        """Return the role of the tasks: it reads their bundle, nothing else.

        It may read every version of the bundle: until a deployment ends, or when the circuit breaker rolls it back,
        tasks of the version before still start and fetch theirs.
        """
        readable = storage.reading(artifact_key(artifact.name, "*") + "*")
        return iam.Role(
            self,
            "Role",
            assumed_by=iam.ServicePrincipal(
                "ecs-tasks.amazonaws.com",
                conditions={"StringEquals": {"aws:SourceAccount": cdk.Stack.of(self).account}},
            ),
            inline_policies={"fetch": iam.PolicyDocument(statements=readable)},
        )

    def _balance(
        self, *, service: ecs.FargateService, template: ImageTemplate, network: NetworkStack
    ) -> elbv2.ApplicationLoadBalancer:
        group = closed_group(
            self,
            "LoadBalancerSecurityGroup",
            vpc=network.vpc,
            description="Load balancer in front of the tasks",
        )
        balancer = elbv2.ApplicationLoadBalancer(
            self,
            "LoadBalancer",
            vpc=network.vpc,
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            internet_facing=False,
            security_group=group,
            drop_invalid_header_fields=True,
        )
        # Plain HTTP: a certificate needs a domain and an issuer that the fleet does not have. The way from client to
        # task lies inside a VPC without internet, is open to one security group, and carries item numbers and scores.
        listener = balancer.add_listener(
            "Listener", port=LISTENER_PORT, protocol=elbv2.ApplicationProtocol.HTTP, open=False
        )
        listener.connections.allow_from(network.clients, ec2.Port.tcp(LISTENER_PORT), "Clients of the service")
        listener.add_targets(
            "Tasks",
            port=template.port,
            protocol=elbv2.ApplicationProtocol.HTTP,
            targets=[service.load_balancer_target(container_name="serve", container_port=template.port)],
            deregistration_delay=cdk.Duration.seconds(30),
            health_check=elbv2.HealthCheck(
                path=template.health,
                healthy_http_codes="200",
                interval=cdk.Duration.seconds(15),
                timeout=cdk.Duration.seconds(5),
                healthy_threshold_count=2,
                unhealthy_threshold_count=3,
            ),
        )
        return balancer
