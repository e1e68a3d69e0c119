"""Write docs/stacks.md from templates: the diagram, and of each stack its resources and who may do what there, and why."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from infra.diagram import Template, diagram, path, readable
from infra.reasons import REASONS
from models.release import ShipyardError

HEAD = """\
# The stacks

Made by `make docs` from the synthesized stacks of an environment that has every option; a test compares. Names are paths of
constructs. What is kept outlives its stack. An arrow leads from what uses to what is used, through the roles and groups
between them; arrows to the VPC and the key, in which and with which nearly everything is, are left out.
"""
_DIGITS = re.compile(r"\b[0-9a-f]{32,}\b")
_LONGEST = 300


def page(templates: Mapping[str, Template]) -> str:
    """Return the page of an environment's templates, given by the ids of their stacks in the order of deployment.

    Raises:
        ShipyardError: a policy allows an action for which infra/reasons.py has no reason.
    """
    parts = [HEAD, f"```mermaid\n{diagram(templates)}\n```\n"]
    for stack, template in templates.items():
        parts += [f"## {stack}\n", f"{_about(stack)}\n", _resources(template)]
        if allowed := list(_allowed(stack, template)):
            head = "| where | who | may | on | only if | why |\n|---|---|---|---|---|---|"
            parts.append("\n".join([head, *(f"| {' | '.join(line)} |" for line in dict.fromkeys(allowed))]) + "\n")
    return "\n".join(parts)


def _about(stack: str) -> str:
    """Return the first paragraph of the module of a stack."""
    text = importlib.import_module(f"infra.{stack}").__doc__ or ""
    return text.strip().split("\n\n")[0].replace("\n", " ")


def _resources(template: Template) -> str:
    """Return the table of a template's resources by type."""
    names: dict[str, list[str]] = {}
    for name, resource in template["Resources"].items():
        kept = " (kept)" if str(resource.get("DeletionPolicy", "Delete")).startswith("Retain") else ""
        names.setdefault(resource["Type"], []).append(path(name, resource) + kept)
    lines = [f"| {kind} | {len(found)} | {_several(found)} |" for kind, found in sorted(names.items())]
    return "\n".join(["| resource | number | names |", "|---|---|---|", *lines]) + "\n"


def _several(names: list[str]) -> str:
    """Return names in one cell, or none where so many tell nothing, as those of rules between groups."""
    text = ", ".join(sorted(names))
    return text if len(text) <= _LONGEST else ""


def _allowed(stack: str, template: Template) -> Iterator[tuple[str, ...]]:
    """Yield a line of the table of permissions for each statement that allows something."""
    for name, resource in template["Resources"].items():
        for statement in statements(resource.get("Properties", {})):
            actions = listed(statement["Action"])
            if unknown := [action for action in actions if action not in REASONS]:
                raise ShipyardError(
                    f"{stack}: {path(name, resource)}: allowed without a reason", value=", ".join(unknown),
                    mend="say in infra/reasons.py what it is needed for",
                )  # fmt: skip
            who = plain(statement["Principal"]) if "Principal" in statement else "the role"
            reasons = dict.fromkeys(REASONS[action] for action in actions)
            yield (
                path(name, resource),
                who,
                ", ".join(f"`{action}`" for action in actions),
                plain(statement.get("Resource", "itself")),
                plain(statement.get("Condition", "")),
                "; ".join(reasons),
            )


def statements(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the statements of all policies in a resource's properties, at any depth, that allow something."""
    if isinstance(value, list):
        for item in value:
            yield from statements(item)
    elif isinstance(value, dict):
        if value.get("Effect") == "Allow" and "Action" in value:
            yield value
        for item in value.values():
            yield from statements(item)


def listed(value: Any) -> list[Any]:
    """Return a value of a template that may be one or several as a list."""
    return value if isinstance(value, list) else [value]


def plain(value: Any) -> str:
    """Return a value of a policy as text that fits a cell: references by their names, digests left out."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        if "Ref" in value:
            return readable(str(value["Ref"]))
        if "Fn::GetAtt" in value:
            return readable(str(value["Fn::GetAtt"][0]))
        if "Fn::ImportValue" in value:
            stack, _, name = str(value["Fn::ImportValue"]).partition(":ExportsOutput")
            exported = re.match(r"(?:Ref|FnGetAtt)(.*?[0-9A-F]{8})", name)
            return f"{stack.rpartition('-')[2]}.{readable(exported[1] if exported else name)}"
        if "Fn::Join" in value:
            return value["Fn::Join"][0].join(plain(item) for item in value["Fn::Join"][1])
        if "Fn::Sub" in value:
            return plain(listed(value["Fn::Sub"])[0])
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    text = value if isinstance(value, str) else json.dumps(value)
    return _DIGITS.sub("…", text).replace("|", "\\|").replace("*", "\\*")
