"""Resolve a template's intrinsic functions as far as they are static; what is not stays unknown, with its reason."""

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.cost.assembly import Stack
from infra.cost.loops import LANGUAGE, Loops, transforms
from models.release import ShipyardError

DEEPEST = 60
"""Levels of nesting that are followed; templates of people and of the CDK stay below 20."""

MOST = 2_000_000
"""Values that one template may expand to: YAML's aliases can make a small file a large one."""

_SUB = re.compile(r"\$\{(!?)([^}]*)\}")
POINTER = re.compile(r"<([^<>|]*)\|([^<>|.]*)\.([^<>|]*)>")
"""How a pointer looks inside a text."""


@dataclass(frozen=True)
class Unknown:
    """Stand for a value that only a deployment decides; `absent` where it may be left out altogether."""

    reason: str
    absent: bool = False


@dataclass(frozen=True)
class Pointer:
    """Stand for a resource, or for one of its attributes, of a stack."""

    stack: str
    resource: str
    attribute: str = ""

    def __str__(self) -> str:
        return f"<{self.stack}|{self.resource}.{self.attribute}>"


class _NoValue:
    """Stand for AWS::NoValue: the property is left out."""


NO_VALUE = _NoValue()


class Exports:
    """Find what stacks of one account and region export to each other."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self._found: dict[tuple[str, str, str], tuple[Scope, Any]] | None = None

    def find(self, scope: "Scope", name: str) -> Any:
        """Return an exported value, or why it is unknown."""
        if self._found is None:
            self._found = {}
            for other in self.scopes:
                outputs = other.template.get("Outputs")
                for output in outputs.values() if isinstance(outputs, dict) else ():
                    export = output.get("Export") if isinstance(output, dict) else None
                    called = other.value(export.get("Name")) if isinstance(export, dict) else None
                    if isinstance(called, str):
                        key = (other.stack.account, other.stack.region, called)
                        self._found[key] = (other, output.get("Value"))
        found = self._found.get((scope.stack.account, scope.stack.region, name))
        return found[0].value(found[1]) if found else Unknown(f"{name} is exported by no stack here")


class Scope:
    """Resolve values within one stack."""

    def __init__(self, stack: Stack, exports: Exports, parent: "Scope | None" = None, named: str = "") -> None:
        self.stack, self.exports, self.parent, self._named = stack, exports, parent, named
        exports.scopes.append(self)
        self._depth = self._count = 0
        self._conditions: dict[str, bool | Unknown | None] = {}
        self._handed: Mapping[str, Any] | Unknown | None = None if parent else stack.parameters
        self._pseudo = _pseudo(stack)
        self.children: dict[str, Scope] = {}
        self.template = stack.template
        self.resources = self.template["Resources"]
        if LANGUAGE in transforms(self.template):
            self.template = Loops(self.value).unroll(self.template)
            self.resources = self.template["Resources"]
        for name, child in stack.nested.items():
            if self.made(self.resources[name]) is not False:
                self.children[name] = Scope(child, exports, self, name)

    def made(self, resource: Mapping[str, Any]) -> bool | Unknown:
        """Return whether the condition of a resource holds, and that of the nested stack in which it is."""
        outer = self.parent.made(self.parent.resources[self._named]) if self.parent else True
        name = resource.get("Condition")
        return self.condition(name) if outer is True and isinstance(name, str) else outer

    @property
    def parameters(self) -> Mapping[str, Any] | Unknown:
        """Return what the template is given: by the caller, or by the stack that nests it."""
        if self._handed is None and self.parent:
            self._handed = Unknown("parameters that are handed on in a circle")  # while they are being resolved
            given = self.parent.value(self.parent.resources[self._named].get("Properties") or {})
            handed = given.get("Parameters", {}) if isinstance(given, dict) else given
            self._handed = handed if isinstance(handed, dict | Unknown) else {}
        return self._handed or {}

    def value(self, node: Any) -> Any:
        """Return a value with its intrinsic functions resolved; a part that is not static is an Unknown.

        Raises:
            ShipyardError: the template expands to more values than any real one.
        """
        self._count += 1
        if self._count > MOST:
            raise ShipyardError(f"{self.stack.name}: expands to more than {MOST} values", mend="remove its aliases")
        if self._depth >= DEEPEST:
            return Unknown(f"nested more than {DEEPEST} deep, or a cycle")
        self._depth += 1
        try:
            return self._value(node)
        finally:
            self._depth -= 1

    def _value(self, node: Any) -> Any:
        if isinstance(node, dict):
            if len(node) == 1:
                [(name, argument)] = node.items()
                if name == "Ref" or (isinstance(name, str) and name.startswith("Fn::")):
                    return self._call(name, argument)
                if name == "Condition" and isinstance(argument, str):
                    return self.condition(argument)
            if "Fn::Transform" in node:
                return Unknown("a transform beside it runs when it is deployed")
            resolved = ((str(key), self.value(item)) for key, item in node.items())
            return {key: item for key, item in resolved if item is not NO_VALUE}
        if isinstance(node, list):
            items = [item for item in map(self.value, node) if item is not NO_VALUE]
            # how many there are decides a price
            return next((item for item in items if isinstance(item, Unknown) and item.absent), items)
        return node

    def _call(self, name: str, argument: Any) -> Any:
        function = _FUNCTIONS.get(name)
        if function is None:
            return Unknown(f"{name} is not known")
        try:
            return function(self, argument)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError):
            return Unknown(f"{name} is malformed")
        except RecursionError:  # a long chain of stacks that import from each other
            return Unknown(f"{name} leads through too many stacks")

    def condition(self, name: str) -> bool | Unknown:
        """Return whether a condition of the template holds."""
        if name not in self._conditions:
            conditions = self.template.get("Conditions")
            if not isinstance(conditions, dict) or name not in conditions:
                return Unknown(f"there is no condition {name}")
            self._conditions[name] = None  # being evaluated
            self._conditions[name] = self._truth(conditions[name])
        known = self._conditions[name]
        return Unknown(f"condition {name} refers to itself") if known is None else known

    def _truth(self, node: Any) -> bool | Unknown:
        found = self.value(node)
        if isinstance(found, bool | Unknown):
            return found
        return {"true": True, "false": False}.get(str(found).lower(), Unknown("a condition is neither true nor false"))

    def ref(self, name: str) -> Any:
        """Return what Ref gives: a pseudo parameter, a parameter's value, or a pointer to a resource."""
        if name in self._pseudo:
            return self._pseudo[name]
        parameters = self.template.get("Parameters")
        if isinstance(parameters, dict) and name in parameters:
            return self._parameter(name, parameters[name])
        if name in self.resources:
            return Pointer(self.stack.name, name)
        return Unknown(f"Ref to {name}, which the template does not have")

    def _parameter(self, name: str, declared: Any) -> Any:
        kind = str(declared.get("Type", "String")) if isinstance(declared, dict) else "String"
        handed = self.parameters
        if isinstance(handed, Unknown):
            return handed
        if name in handed:
            found = handed[name]
        elif kind.startswith("AWS::SSM::"):
            return Unknown(f"parameter {name} is read from SSM when it is deployed; give it by --parameter")
        elif not isinstance(declared, dict) or "Default" not in declared:
            return Unknown(f"parameter {name} has no default; give it by --parameter {name}=VALUE")
        else:
            found = declared["Default"]
        if (kind == "CommaDelimitedList" or kind.startswith("List<")) and isinstance(found, str):
            return [part.strip() for part in found.split(",")]
        return found

    def attribute(self, argument: Any) -> Any:
        """Return a pointer to a resource's attribute; of a nested stack its output."""
        name, attribute = argument.split(".", 1) if isinstance(argument, str) else argument
        attribute = self.value(attribute)
        if name not in self.resources:
            return Unknown(f"GetAtt of {name}, which the template does not have")
        if not isinstance(attribute, str):
            return Unknown(f"an attribute of {name} that is not static")
        if name in self.children and attribute.startswith("Outputs."):
            child = self.children[name]
            outputs = child.template.get("Outputs", {})
            return child.value(outputs[attribute.removeprefix("Outputs.")]["Value"])
        return Pointer(self.stack.name, name, attribute)

    # --- functions, as "Intrinsic function reference" of the CloudFormation user guide has them -------------------

    def _text(self, value: Any) -> str | Unknown:
        if isinstance(value, Unknown):
            return value
        if isinstance(value, dict | list):
            return Unknown("a text is wanted, and a table or list is there")
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _texts(self, values: Iterable[Any], join: Callable[[list[str]], str]) -> str | Unknown:
        texts = [self._text(value) for value in values]
        unknown = next((text for text in texts if isinstance(text, Unknown)), None)
        return unknown or join([text for text in texts if isinstance(text, str)])

    def _join(self, argument: Any) -> Any:
        delimiter, parts = argument
        found = self.value(parts)
        return found if isinstance(found, Unknown) else self._texts(found, str(delimiter).join)

    def _sub(self, argument: Any) -> Any:
        text, given = (argument, {}) if isinstance(argument, str) else argument
        values: list[Any] = []

        def keep(match: re.Match[str]) -> str:
            literal, name = match.groups()
            if literal:
                return "${" + name + "}"
            values.append(
                self.value(given[name]) if name in given
                else self.attribute(name) if "." in name and not name.startswith("AWS::")
                else self.ref(name)
            )  # fmt: skip
            return "\0"

        pieces = _SUB.sub(keep, text).split("\0")
        woven = [piece for pair in zip(pieces, [*values, ""], strict=True) for piece in pair]
        return self._texts(woven, "".join)

    def _select(self, argument: Any) -> Any:
        index, items = (self.value(part) for part in argument)
        unknown = next((found for found in (index, items) if isinstance(found, Unknown)), None)
        if unknown:
            return unknown
        return items[int(index)] if int(index) >= 0 else Unknown(f"Fn::Select of {index}")

    def _split(self, argument: Any) -> Any:
        delimiter, text = argument
        found = self._text(self.value(text))
        return found if isinstance(found, Unknown) else found.split(delimiter)

    def _find_in_map(self, argument: Any) -> Any:
        name, first, second = (self.value(part) for part in argument[:3])
        unknown = next((found for found in (name, first, second) if isinstance(found, Unknown)), None)
        if unknown:
            return unknown
        table: Any = self.template.get("Mappings")
        for key in (name, first, second):
            if not isinstance(table, dict) or str(key) not in table:
                more = argument[3] if len(argument) > 3 else {}
                missing = Unknown(f"the mapping has no {name}, {first}, {second}")
                return self.value(more["DefaultValue"]) if "DefaultValue" in more else missing
            table = table[str(key)]
        return self.value(table)

    def _if(self, argument: Any) -> Any:
        name, yes, no = argument
        holds = self.condition(name)
        if isinstance(holds, Unknown):
            return Unknown(holds.reason, absent={"Ref": "AWS::NoValue"} in (yes, no))
        return self.value(yes if holds else no)

    def _equals(self, argument: Any) -> bool | Unknown:
        left, right = (self._text(self.value(part)) for part in argument)
        for side in (left, right):
            if isinstance(side, Unknown):
                return side
            if POINTER.search(side):
                return Unknown("it compares what only a deployment decides")
        return left == right

    def _and(self, argument: Any) -> bool | Unknown:
        found = [self._truth(part) for part in argument]
        if False in found:
            return False
        return next((part for part in found if isinstance(part, Unknown)), True)

    def _or(self, argument: Any) -> bool | Unknown:
        found = [self._truth(part) for part in argument]
        if True in found:
            return True
        return next((part for part in found if isinstance(part, Unknown)), False)

    def _not(self, argument: Any) -> bool | Unknown:
        found = self._truth(argument[0])
        return found if isinstance(found, Unknown) else not found

    def _import(self, argument: Any) -> Any:
        name = self.value(argument)
        if isinstance(name, Unknown):
            return name
        return self.exports.find(self, name) if isinstance(name, str) else Unknown("an import that is not static")

    def _base64(self, argument: Any) -> Any:
        found = self._text(self.value(argument))
        return found if isinstance(found, Unknown) else base64.b64encode(found.encode()).decode()

    def _json(self, argument: Any) -> Any:
        return json.dumps(self.value(argument), default=str, sort_keys=True)

    def _length(self, argument: Any) -> Any:
        found = self.value(argument)
        return found if isinstance(found, Unknown) else len(found)


def _pseudo(stack: Stack) -> dict[str, Any]:
    china = stack.region.startswith("cn-")
    partition = "aws-cn" if china else "aws-us-gov" if stack.region.startswith("us-gov-") else "aws"
    return {
        "AWS::Region": stack.region,
        "AWS::AccountId": stack.account or "000000000000",
        "AWS::StackName": stack.stack_name,
        "AWS::StackId": Unknown("a stack's id is made when it is deployed"),
        "AWS::Partition": partition,
        "AWS::URLSuffix": "amazonaws.com.cn" if china else "amazonaws.com",
        "AWS::NotificationARNs": [],
        "AWS::NoValue": NO_VALUE,
    }


_FUNCTIONS: dict[str, Callable[[Scope, Any], Any]] = {
    "Ref": lambda scope, argument: scope.ref(argument),
    "Fn::GetAtt": Scope.attribute,
    "Fn::Join": Scope._join,
    "Fn::Sub": Scope._sub,
    "Fn::Select": Scope._select,
    "Fn::Split": Scope._split,
    "Fn::FindInMap": Scope._find_in_map,
    "Fn::If": Scope._if,
    "Fn::Equals": Scope._equals,
    "Fn::And": Scope._and,
    "Fn::Or": Scope._or,
    "Fn::Not": Scope._not,
    "Fn::ImportValue": Scope._import,
    "Fn::Base64": Scope._base64,
    "Fn::ToJsonString": Scope._json,
    "Fn::Length": Scope._length,
    "Fn::GetAZs": lambda scope, argument: Unknown("the zones of a region are known when it is deployed"),
    "Fn::Cidr": lambda scope, argument: Unknown("address ranges are not computed"),
    "Fn::Transform": lambda scope, argument: Unknown("a transform runs when it is deployed"),
}
