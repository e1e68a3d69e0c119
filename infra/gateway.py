"""The way in: one HTTPS entry to the fusion gateway, which asks the endpoint and the cluster and keeps feedback."""

import json
from collections.abc import Mapping
from dataclasses import replace

import aws_cdk as cdk
from aws_cdk import aws_apigatewayv2 as api
from aws_cdk import aws_apigatewayv2_authorizers as authorizers
from aws_cdk import aws_apigatewayv2_integrations as integrations
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_wafv2 as waf
from constructs import Construct

from infra.cpu import LISTENER_PORT, CpuStack, add_listener
from infra.feedback import FeedbackStream
from infra.gpu import GpuStack
from infra.network import NetworkStack, closed_group
from infra.service import InferenceService
from infra.storage import StorageStack
from infra.template import ImageTemplate, read_template
from models.config import CpuSettings, GatewaySettings
from models.release import Artifact, Release, ShipyardError

SEARCH = "search"  # the artifact whose endpoint the gateway asks
GATEWAY_PORT = 8080  # of the load balancer; the services have its other listener
ROUTE = "/v1/{proxy+}"  # its health is no business of those outside


# neither queries nor histories, nor who asked
ACCESS_LOG = {
    "request": "requestId",
    "time": "requestTime",
    "route": "routeKey",
    "status": "status",
    "milliseconds": "responseLatency",
    "service_milliseconds": "integrationLatency",
    "error": "error.message",
    "service_error": "integrationErrorMessage",
}


class GatewayStack(cdk.Stack):
    """Wire the gateway's service, the stream of feedback, and the entry."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: GatewaySettings,
        service: CpuSettings,
        release: Release,
        values: Mapping[str, str],
        storage: StorageStack,
        network: NetworkStack,
        cpu: CpuStack,
        gpu: GpuStack,
    ) -> None:
        """Make the stack of a release's gateway; `service` has the image and the way of an update.

        Raises:
            ShipyardError: the release has not one gateway, or no model of search for it.
        """
        super().__init__(scope, construct_id)
        artifact = _only_gateway(release)
        if SEARCH not in gpu.endpoints:
            raise ShipyardError(
                "gateway: the release has no model to search with",
                allowed=f"a triton artifact named {SEARCH}",
                mend="bundle the sub-model search for the target gpu",
            )
        self.add_stack_dependency(gpu)  # it knows the endpoint by its name alone
        endpoint = gpu.endpoints[SEARCH]
        self.stream = FeedbackStream(
            self, "Feedback", name=f"{self.stack_name.removesuffix(f'-{construct_id}')}-feedback", storage=storage
        )
        filled = {
            **values,
            "ENDPOINT": endpoint.name,
            "CLUSTER_URL": cpu.url,
            "FEEDBACK_STREAM": self.stream.name,
        }
        self.listener = add_listener(self, "Listener", balancer=cpu.balancer, port=GATEWAY_PORT, network=network)
        self.service = InferenceService(
            self,
            artifact.name,
            cluster=cpu.cluster,
            sizing=replace(
                cpu.sizing,
                cpu=settings.cpu,
                memory_mib=settings.memory_mib,
                tasks=settings.tasks,
                max_tasks=settings.tasks * 4,
            ),
            settings=service,
            artifact=artifact,
            template=read_template(artifact, ImageTemplate, filled),
            storage=storage,
            network=network,
            listener=self.listener,
            path="/",
            statements=(
                iam.PolicyStatement(
                    actions=["sagemaker:InvokeEndpoint"],
                    resources=[self.format_arn(service="sagemaker", resource="endpoint", resource_name=endpoint.name)],
                ),
                iam.PolicyStatement(
                    actions=["firehose:PutRecord", "firehose:PutRecordBatch"], resources=[self.stream.arn]
                ),
            ),
        )
        # it asks the cluster as any client does
        self.service.group.connections.allow_to(cpu.balancer, ec2.Port.tcp(LISTENER_PORT), "The cluster's services")
        if settings.waf:
            self._filter(settings, cpu)
        if settings.api == "private":
            cdk.CfnOutput(self, "Address", value=f"{cpu.url}:{GATEWAY_PORT}")
        else:
            self.api = self._entry(settings, storage, network)
            cdk.CfnOutput(self, "Address", value=self.api.api_endpoint)
        cdk.CfnOutput(self, "Release", value=release.version)

    def _entry(self, settings: GatewaySettings, storage: StorageStack, network: NetworkStack) -> api.HttpApi:
        """Return the HTTPS entry, which reaches the load balancer by a link into the VPC."""
        group = closed_group(self, "LinkGroup", vpc=network.vpc, description="Link of API Gateway into the VPC")
        group.connections.allow_to(self.listener, ec2.Port.tcp(GATEWAY_PORT), "The gateway's listener")
        link = api.VpcLink(
            self,
            "Link",
            vpc=network.vpc,
            subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            security_groups=[group],
        )
        entry = api.HttpApi(
            self,
            "Api",
            description="Search and recommendation",
            create_default_stage=False,
            default_authorizer=_authorizer(settings),
        )
        entry.add_routes(
            path=ROUTE,
            methods=[api.HttpMethod.POST],
            integration=integrations.HttpAlbIntegration(
                "Fusion",
                self.listener,
                vpc_link=link,
                # the request's id is the same in the entry's log, the service's and the feedback
                parameter_mapping=api.ParameterMapping().overwrite_header(
                    "x-request-id", api.MappingValue.context_variable("requestId")
                ),
                timeout=cdk.Duration.seconds(5),
            ),
        )
        stage = api.HttpStage(
            self,
            "Stage",
            http_api=entry,
            stage_name="$default",
            auto_deploy=True,
            detailed_metrics_enabled=True,
            throttle=api.ThrottleSettings(rate_limit=settings.requests_per_second, burst_limit=settings.burst),
        )
        log = storage.log_group(self, "AccessLog", retention=logs.RetentionDays.THREE_MONTHS)
        resource = stage.node.default_child
        assert isinstance(resource, api.CfnStage)
        resource.access_log_settings = api.CfnStage.AccessLogSettingsProperty(
            destination_arn=log.log_group_arn,
            format=json.dumps({name: f"$context.{variable}" for name, variable in ACCESS_LOG.items()}),
        )
        return entry

    def _filter(self, settings: GatewaySettings, cpu: CpuStack) -> None:
        """Put a web application firewall before the load balancer: an HTTP API takes none itself."""

        def managed(name: str, priority: int, *counted: str) -> waf.CfnWebACL.RuleProperty:
            return waf.CfnWebACL.RuleProperty(
                name=name,
                priority=priority,
                statement=waf.CfnWebACL.StatementProperty(
                    managed_rule_group_statement=waf.CfnWebACL.ManagedRuleGroupStatementProperty(
                        vendor_name="AWS",
                        name=name,
                        rule_action_overrides=[
                            waf.CfnWebACL.RuleActionOverrideProperty(
                                name=rule, action_to_use=waf.CfnWebACL.RuleActionProperty(count={})
                            )
                            for rule in counted
                        ]
                        or None,
                    )
                ),
                override_action=waf.CfnWebACL.OverrideActionProperty(none={}),
                visibility_config=_visible(name),
            )

        acl = waf.CfnWebACL(
            self,
            "Filter",
            scope="REGIONAL",
            default_action=waf.CfnWebACL.DefaultActionProperty(allow={}),
            visibility_config=_visible("filter"),
            rules=[
                # it would refuse bodies of more than 8 KB, and a long history is one; the servers bound the body themselves
                managed("AWSManagedRulesCommonRuleSet", 1, "SizeRestrictions_BODY"),
                managed("AWSManagedRulesKnownBadInputsRuleSet", 2),
            ],
        )
        waf.CfnWebACLAssociation(
            self, "Filtered", resource_arn=cpu.balancer.load_balancer_arn, web_acl_arn=acl.attr_arn
        )


def _visible(name: str) -> waf.CfnWebACL.VisibilityConfigProperty:
    return waf.CfnWebACL.VisibilityConfigProperty(
        cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=False
    )


def _authorizer(settings: GatewaySettings) -> api.IHttpRouteAuthorizer:
    """Return who is let in: callers with IAM credentials, or with a token of the issuer (checked by infra.checks)."""
    if settings.issuer is None:
        return authorizers.HttpIamAuthorizer()
    return authorizers.HttpJwtAuthorizer("Token", settings.issuer, jwt_audience=list(settings.audience))


def _only_gateway(release: Release) -> Artifact:
    found = release.of("gateway")
    if len(found) != 1:
        raise ShipyardError(
            "gateway: not one in the release", value=len(found), allowed="one", mend="bundle one gateway"
        )
    return found[0]
