"""Read what is to be priced: a cloud assembly (cdk.out), a folder of templates or one template, JSON or YAML."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from models.release import ShipyardError

SUFFIXES = (".json", ".yaml", ".yml", ".template")
LARGEST = 5_000_000
"""Bytes of a template; CloudFormation itself takes 1 MB."""

DEEPEST = 100
"""Levels of nesting of a YAML template."""


@dataclass(frozen=True)
class Stack:
    """Hold one template with the place where it is deployed.

    `name` is unique among those read, as `dev/gpu`, or `dev/gpu:Child` of a nested stack; `stack_name` is what
    CloudFormation calls it. `parameters` holds values that replace the template's defaults, `nested` the templates of
    nested stacks by logical id.
    """

    name: str
    stack_name: str
    account: str
    region: str
    template: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    nested: Mapping[str, "Stack"] = field(default_factory=dict)

    @property
    def declared(self) -> Mapping[str, Any]:
        """Return the parameters that the template has, by name."""
        found = self.template.get("Parameters")
        return found if isinstance(found, dict) else {}


def read_stacks(path: Path, *, region: str = "us-east-1", parameters: Mapping[str, Any] | None = None) -> list[Stack]:
    """Read every stack below a path; `region` is for templates that name none, `parameters` replace defaults.

    Raises:
        ShipyardError: nothing is there, or a file is neither valid JSON nor valid YAML, or no template.
    """
    given = dict(parameters or {})
    if path.is_file():
        return [_stack(path, path.name.split(".")[0], path.stem, "", region, given)]
    if (path / "manifest.json").is_file():
        stacks = _assembly(path, region, given)
    else:
        files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES) if path.is_dir() else []
        stacks = [_stack(file, file.name, file.stem, "", region, given) for file in files]
    if not stacks:
        raise ShipyardError(f"{path}: no template there", mend="make synth, or name a template or its folder")
    return stacks


def load(path: Path) -> Mapping[str, Any]:
    """Return a template.

    Raises:
        ShipyardError: the file is too large, neither valid JSON nor valid YAML, or has no resources.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ShipyardError(f"{path}: too large for a template", allowed=f"{LARGEST} bytes")
        text = path.read_text(encoding="utf-8-sig")
        found = (
            json.loads(text, parse_float=Decimal, parse_constant=_no_number, object_pairs_hook=_table)
            if text.lstrip().startswith("{")
            else _yaml(text)
        )
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as fault:
        raise ShipyardError(f"{path}: not a template: {fault}", mend="correct the file") from None
    if not isinstance(found, dict) or not isinstance(found.get("Resources"), dict):
        raise ShipyardError(f"{path}: no template: it has no table Resources", mend="name a CloudFormation template")
    return found


def _stack(
    path: Path, name: str, stack_name: str, account: str, region: str, parameters: Mapping[str, Any], depth: int = 0
) -> Stack:
    """Read a template, and those of its nested stacks that lie beside it (the CDK tells where in their metadata)."""
    template, nested = load(path), {}
    for key, resource in template["Resources"].items():
        if isinstance(resource, dict) and resource.get("Type") == "AWS::CloudFormation::Stack" and depth < 5:
            told = resource.get("Metadata")
            beside = told.get("aws:asset:path") if isinstance(told, dict) else None
            if isinstance(beside, str) and (path.parent / Path(beside).name).is_file():
                nested[str(key)] = _stack(
                    path.parent / Path(beside).name,
                    f"{name}:{key}",
                    f"{stack_name}-{key}",
                    account,
                    region,
                    {},
                    depth + 1,
                )
    return Stack(name, stack_name, account, region, template, parameters, nested)


def _assembly(folder: Path, region: str, parameters: Mapping[str, Any]) -> list[Stack]:
    """Follow the manifests of a cloud assembly (cloud-assembly-schema of the CDK)."""
    manifest = folder / "manifest.json"
    try:
        artifacts = json.loads(manifest.read_text(encoding="utf-8"))["artifacts"]
        stacks: list[Stack] = []
        for key, artifact in artifacts.items():
            properties = artifact.get("properties", {})
            if artifact["type"] == "cdk:cloud-assembly":
                stacks += _assembly(folder / properties["directoryName"], region, parameters)
            elif artifact["type"] == "aws:cloudformation:stack":
                _, _, place = str(artifact["environment"]).partition("://")
                account, _, where = place.partition("/")
                stacks.append(
                    _stack(
                        folder / properties["templateFile"],
                        artifact.get("displayName", key),
                        properties.get("stackName", key),
                        "" if account.startswith("unknown") else account,
                        region if where.startswith("unknown") else where,
                        {**properties.get("parameters", {}), **parameters},
                    )
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ShipyardError(f"{manifest}: not a manifest of the CDK: {fault!r}", mend="make synth") from None
    return stacks


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of JSON; of a name that is there twice, one of two resources would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {_twice(name for name, _ in pairs)} is there twice in one table")
    return found


def _twice(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]


def _yaml(text: str) -> Any:
    """Return a value of YAML; one that is nested too deep would end the process within the C library."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader with CloudFormation's tags


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Read YAML safely, with CloudFormation's short forms such as !Ref and !GetAtt, and each name of a table once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a table.

        Raises:
            ConstructorError: a name is there twice.
        """
        names = (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        if name := _twice(names):
            raise yaml.constructor.ConstructorError(None, None, f"the name {name} is there twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _short_form(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    if tag == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


_Loader.add_multi_constructor("!", _short_form)
