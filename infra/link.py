"""The way to the customer's own network by option: a VPN or a Direct Connect gateway, routes, and names."""

import aws_cdk as cdk
from aws_cdk import aws_directconnect as directconnect
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_route53resolver as resolver
from constructs import Construct

from infra.cpu import LISTENER_PORT, CpuStack
from infra.gateway import GATEWAY_PORT
from infra.network import NetworkStack, closed_group
from infra.storage import StorageStack
from models.config import LinkSettings

DNS = 53


class LinkStack(cdk.Stack):
    """Wire a virtual private gateway on the VPC with the customer's network, and let that call the services.

    The circuit of a Direct Connect, with its virtual interface, is ordered outside; it is attached to the gateway that is
    made here.
    """

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        settings: LinkSettings,
        cidr: str,
        storage: StorageStack,
        network: NetworkStack,
        cpu: CpuStack,
    ) -> None:
        """Make gateway, routes, resolver and the rules that let the customer's networks in."""
        super().__init__(scope, construct_id)
        gateway = ec2.CfnVPNGateway(self, "Gateway", type="ipsec.1", amazon_side_asn=settings.amazon_asn)
        attached = ec2.CfnVPCGatewayAttachment(
            self, "Attachment", vpc_id=network.vpc.vpc_id, vpn_gateway_id=gateway.attr_vpn_gateway_id
        )
        routes = ec2.CfnVPNGatewayRoutePropagation(
            self,
            "Routes",
            route_table_ids=network.route_tables,
            vpn_gateway_id=gateway.attr_vpn_gateway_id,
        )
        routes.add_resource_dependency(attached)
        if settings.kind == "vpn":
            self._vpn(settings, gateway, storage)
        else:
            self._direct_connect(cidr, settings, gateway, attached)
        for port in (LISTENER_PORT, GATEWAY_PORT):
            for number, cidr_ip in enumerate(settings.networks):
                ec2.CfnSecurityGroupIngress(
                    self,
                    f"From{number}To{port}",
                    group_id=cpu.balancer.connections.security_groups[0].security_group_id,
                    ip_protocol="tcp",
                    from_port=port,
                    to_port=port,
                    cidr_ip=cidr_ip,
                    description="The network of the customer",
                )
        if settings.domain is not None:
            self._resolve(settings, network)

    def _vpn(self, settings: LinkSettings, gateway: ec2.CfnVPNGateway, storage: StorageStack) -> None:
        assert settings.peer is not None
        peer = ec2.CfnCustomerGateway(self, "Peer", type="ipsec.1", ip_address=settings.peer, bgp_asn=settings.asn)
        log = storage.log_group(self, "TunnelLog")
        tunnel = ec2.CfnVPNConnection.VpnTunnelOptionsSpecificationProperty(
            # what is older than this has known weaknesses; the other end has to be able to as well
            ike_versions=[ec2.CfnVPNConnection.IKEVersionsRequestListValueProperty(value="ikev2")],
            phase1_encryption_algorithms=[
                ec2.CfnVPNConnection.Phase1EncryptionAlgorithmsRequestListValueProperty(value="AES256-GCM-16")
            ],
            phase2_encryption_algorithms=[
                ec2.CfnVPNConnection.Phase2EncryptionAlgorithmsRequestListValueProperty(value="AES256-GCM-16")
            ],
            phase1_dh_group_numbers=[
                ec2.CfnVPNConnection.Phase1DHGroupNumbersRequestListValueProperty(value=number) for number in (20, 21)
            ],
            phase2_dh_group_numbers=[
                ec2.CfnVPNConnection.Phase2DHGroupNumbersRequestListValueProperty(value=number) for number in (20, 21)
            ],
            log_options=ec2.CfnVPNConnection.VpnTunnelLogOptionsSpecificationProperty(
                cloudwatch_log_options=ec2.CfnVPNConnection.CloudwatchLogOptionsSpecificationProperty(
                    log_enabled=True, log_group_arn=log.log_group_arn, log_output_format="json"
                )
            ),
        )
        connection = ec2.CfnVPNConnection(
            self,
            "Connection",
            type="ipsec.1",
            customer_gateway_id=peer.attr_customer_gateway_id,
            vpn_gateway_id=gateway.attr_vpn_gateway_id,
            static_routes_only=False,  # routes come by BGP, so that a tunnel that is down takes none
            vpn_tunnel_options_specifications=[tunnel, tunnel],
        )
        cdk.CfnOutput(self, "ConnectionId", value=connection.attr_vpn_connection_id)

    def _direct_connect(
        self,
        cidr: str,
        settings: LinkSettings,
        gateway: ec2.CfnVPNGateway,
        attached: ec2.CfnVPCGatewayAttachment,
    ) -> None:
        entry = directconnect.CfnDirectConnectGateway(
            self,
            "DirectConnect",
            direct_connect_gateway_name=self.stack_name,
            # not that of the virtual private gateway: the two are neighbours
            amazon_side_asn=str(settings.amazon_asn + 1),
        )
        association = directconnect.CfnDirectConnectGatewayAssociation(
            self,
            "Association",
            direct_connect_gateway_id=entry.attr_direct_connect_gateway_id,
            associated_gateway_id=gateway.attr_vpn_gateway_id,
            allowed_prefixes_to_direct_connect_gateway=[cidr],
        )
        association.add_resource_dependency(attached)
        cdk.CfnOutput(self, "DirectConnectGatewayId", value=entry.attr_direct_connect_gateway_id)

    def _resolve(self, settings: LinkSettings, network: NetworkStack) -> None:
        """Let the VPC ask the customer's resolvers for names of the domain, and the customer ask the VPC's resolver."""
        assert settings.domain is not None
        inward = closed_group(self, "Inward", vpc=network.vpc, description="Questions of the customer for names")
        outward = closed_group(self, "Outward", vpc=network.vpc, description="Questions for names of the customer")
        for port in (ec2.Port.tcp(DNS), ec2.Port.udp(DNS)):
            for cidr_ip in settings.networks:
                inward.add_ingress_rule(ec2.Peer.ipv4(cidr_ip), port, "The network of the customer")
            for address in settings.resolvers:
                outward.add_egress_rule(ec2.Peer.ipv4(f"{address}/32"), port, "A resolver of the customer")
        addresses = [
            resolver.CfnResolverEndpoint.IpAddressRequestProperty(subnet_id=subnet.subnet_id)
            for subnet in network.vpc.isolated_subnets
        ]
        resolver.CfnResolverEndpoint(
            self, "In", direction="INBOUND", ip_addresses=addresses, security_group_ids=[inward.security_group_id]
        )
        out = resolver.CfnResolverEndpoint(
            self, "Out", direction="OUTBOUND", ip_addresses=addresses, security_group_ids=[outward.security_group_id]
        )
        rule = resolver.CfnResolverRule(
            self,
            "Names",
            rule_type="FORWARD",
            domain_name=settings.domain,
            resolver_endpoint_id=out.attr_resolver_endpoint_id,
            target_ips=[
                resolver.CfnResolverRule.TargetAddressProperty(ip=address, port=str(DNS))
                for address in settings.resolvers
            ],
        )
        resolver.CfnResolverRuleAssociation(
            self, "Asked", resolver_rule_id=rule.attr_resolver_rule_id, vpc_id=network.vpc.vpc_id
        )
