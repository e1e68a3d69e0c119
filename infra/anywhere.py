"""The private cluster on machines of the customer's own (ECS Anywhere): the same bundles, beside the VPC's services."""

import aws_cdk as cdk
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.findings import WILDCARD, acknowledge
from infra.principals import own_service
from infra.service import stable_number
from infra.storage import StorageStack
from infra.task import Place, bundle_task
from infra.template import ImageTemplate
from models.config import CpuSettings
from models.release import Artifact

PORTS = (20_000, 10_000)  # the first and how many


class AnywhereService(Construct):
    """Run one task of a bundle on each registered machine.

    ECS neither balances nor scales there: whoever calls knows the machines, and the service's port on them.
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
    ) -> None:
        """Make task definition and service, and tell the port."""
        super().__init__(scope, construct_id)
        port = stable_number(artifact.name, *PORTS)
        task = bundle_task(
            self,
            place=Place(ecs.Compatibility.EXTERNAL, cpu=settings.cpu, memory_mib=settings.memory_mib, host_port=port),
            settings=settings,
            artifact=artifact,
            template=template,
            storage=storage,
        )
        service = ecs.ExternalService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            daemon=True,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            # the port is taken until the task before has ended
            min_healthy_percent=0,
            max_healthy_percent=100,
            enable_ecs_managed_tags=True,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )
        service.node.add_dependency(task.obtain_execution_role())
        cdk.CfnOutput(cdk.Stack.of(self), f"{artifact.name}-anywhere-port", value=str(port))


def machine_role(scope: Construct, cluster: ecs.Cluster) -> iam.Role:
    """Return the role of registered machines: they talk to Systems Manager, and take the tasks of this cluster alone.

    It is the part that is needed of AmazonSSMManagedInstanceCore and AmazonEC2ContainerServiceforEC2Role (ECS developer
    guide, "Amazon ECS Anywhere IAM role"). Images are pulled and logs are written by each task's execution role.
    """
    statements = [
        iam.PolicyStatement(
            actions=[
                "ec2messages:AcknowledgeMessage",
                "ec2messages:DeleteMessage",
                "ec2messages:FailMessage",
                "ec2messages:GetEndpoint",
                "ec2messages:GetMessages",
                "ec2messages:SendReply",
                "ecs:DiscoverPollEndpoint",
                "ssm:UpdateInstanceInformation",
                "ssmmessages:CreateControlChannel",
                "ssmmessages:OpenControlChannel",
            ],
            resources=["*"],  # these actions know no resource, or none that is there before the machine is
        ),
        iam.PolicyStatement(
            actions=["ecs:DeregisterContainerInstance", "ecs:RegisterContainerInstance"],
            resources=[cluster.cluster_arn],
        ),
        iam.PolicyStatement(
            actions=[
                "ecs:Poll",
                "ecs:StartTelemetrySession",
                "ecs:SubmitAttachmentStateChanges",
                "ecs:SubmitContainerStateChange",
                "ecs:SubmitTaskStateChange",
                "ecs:UpdateContainerInstancesState",
            ],
            resources=["*"],  # instances have ids that are not known here; the condition bounds them by cluster
            conditions={"ArnEquals": {"ecs:cluster": cluster.cluster_arn}},
        ),
    ]
    role = iam.Role(
        scope,
        "MachineRole",
        assumed_by=own_service(scope, "ssm.amazonaws.com"),
        inline_policies={"machine": iam.PolicyDocument(statements=statements)},
    )
    acknowledge(
        role, WILDCARD, "Machines and tasks have ids that are not known here; a condition bounds them by cluster."
    )
    return role
