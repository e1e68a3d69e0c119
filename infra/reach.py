"""What one role of an environment reaches, and what one place of its network, computed from the templates.

The tables of docs/security.md are made here. A connection counts where both groups let it pass.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.diagram import Template, path, uses
from infra.tables import listed, plain, statements

READS = {"s3:GetObject", "s3:GetObjectVersionForReplication"}
WRITES = {"s3:PutObject", "s3:ReplicateObject"}
# of no use to an attacker without one of these two, or told beside them
_SMALL = ("s3:", "kms:", "logs:", "ecr:")
ROLES = "| role | taken by | reads | writes | may besides |\n|---|---|---|---|---|"
WAYS = "| from | to | ports |\n|---|---|---|"


@dataclass(frozen=True)
class Role:
    """What may take a role, and what it is allowed: pairs of an action and its resource, and each statement whole."""

    stack: str
    name: str
    taken_by: str
    allowed: tuple[tuple[str, str], ...]
    statements: tuple[Mapping[str, object], ...]
    trust: tuple[Mapping[str, object], ...]

    def resources(self, actions: set[str]) -> list[str]:
        """Return the resources of the actions, in order and once."""
        return sorted({resource for action, resource in self.allowed if action in actions})

    @property
    def besides(self) -> list[str]:
        """The actions that are neither reading nor writing of objects, nor logs and images."""
        return sorted({action for action, _ in self.allowed if not action.startswith(_SMALL)})


def roles(templates: Mapping[str, Template]) -> Iterator[Role]:
    """Yield every role of the templates, which are given by the ids of their stacks."""
    for stack, template in templates.items():
        resources = template["Resources"]
        for name, resource in resources.items():
            if resource["Type"] != "AWS::IAM::Role":
                continue
            own = resource["Properties"]
            policies = [own.get("Policies", [])]
            policies += [
                other["Properties"]["PolicyDocument"]
                for other in resources.values()
                if other["Type"] == "AWS::IAM::Policy" and {"Ref": name} in other["Properties"].get("Roles", [])
            ]
            granted, trust = tuple(statements(policies)), tuple(statements(own["AssumeRolePolicyDocument"]))
            allowed = tuple(
                (action, plain(one))
                for statement in granted
                for action in listed(statement["Action"])
                for one in listed(statement["Resource"])
            )
            by = ", ".join(map(_taker, trust))
            yield Role(stack, path(name, resource), by, allowed, granted, trust)


def _taker(statement: Mapping[str, Any]) -> str:
    """Return who a statement of trust lets in: of an account, the role that its condition names."""
    named = statement.get("Condition", {}).get("ArnEquals", {}).get("aws:PrincipalArn")
    return plain(named or list(statement["Principal"].values()))


def ways(templates: Mapping[str, Template]) -> dict[tuple[str, str], set[str]]:
    """Return the connections that security groups let pass: who calls whom, and on which ports.

    Raises:
        KeyError: a rule refers to a group that no template has.
    """
    leaves: set[tuple[str, str, str]] = set()
    enters: set[tuple[str, str, str]] = set()
    groups: set[str] = set()
    for stack, template in templates.items():
        for name, resource in template["Resources"].items():
            kind, told = resource["Type"], resource.get("Properties", {})
            if kind == "AWS::EC2::SecurityGroup":
                groups.add(_place(templates, stack, {"Ref": name}))
            if kind not in ("AWS::EC2::SecurityGroupIngress", "AWS::EC2::SecurityGroupEgress"):
                continue
            group = _place(templates, stack, told["GroupId"])
            port = str(told["FromPort"]) if told["FromPort"] == told["ToPort"] else f"{told['FromPort']} ff."
            port += " (UDP)" if told["IpProtocol"] == "udp" else ""
            if kind.endswith("Ingress"):
                enters.add((_other(templates, stack, told, "SourceSecurityGroupId"), group, port))
            else:
                leaves.add((group, _other(templates, stack, told, "DestinationSecurityGroupId"), port))
    found: dict[tuple[str, str], set[str]] = {}
    for start, end, port in leaves | enters:
        # what lies outside has no group of ours
        sent = start not in groups or (start, end, port) in leaves
        let_in = end not in groups or (start, end, port) in enters
        if sent and let_in:
            found.setdefault((start, end), set()).add(port)
    return found


def role_table(templates: Mapping[str, Template]) -> str:
    """Return the table of all roles, as Markdown."""
    lines = [ROLES]
    for role in roles(templates):
        cells = (role.resources(READS), role.resources(WRITES), [f"`{action}`" for action in role.besides])
        told = " | ".join(", ".join(cell) or "nothing" for cell in cells)
        lines.append(f"| {role.stack}: {role.name} | {role.taken_by} | {told} |")
    return "\n".join(lines)


def way_table(templates: Mapping[str, Template]) -> str:
    """Return the table of all connections, as Markdown."""
    lines = [f"| {a} | {b} | {', '.join(sorted(ports))} |" for (a, b), ports in sorted(ways(templates).items())]
    return "\n".join([WAYS, *lines])


def _other(templates: Mapping[str, Template], stack: str, rule: Mapping[str, object], key: str) -> str:
    """Return the other end of a rule: a group, a range of addresses, or S3."""
    if key in rule:
        return _place(templates, stack, rule[key])
    return "S3" if "DestinationPrefixListId" in rule else str(rule["CidrIp"])


def _place(templates: Mapping[str, Template], stack: str, reference: object) -> str:
    """Return "stack: path" of the group that a value refers to."""
    [(where, name)] = uses(templates, stack, reference, {})
    return f"{where}: {path(name, templates[where]['Resources'][name])}"
