"""Unroll the loops of a template, Fn::ForEach of the transform AWS::LanguageExtensions, and name its other transforms."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.release import ShipyardError

LANGUAGE = "AWS::LanguageExtensions"
HARMLESS = (LANGUAGE, "AWS::SecretsManager-2020-07-23", "AWS::SecretsManager-2024-09-16", "AWS::CodeDeployBlueGreen")
"""Transforms that add no resource of their own, or functions of ours."""

LOOP = "Fn::ForEach::"


def transforms(template: Mapping[str, Any]) -> list[str]:
    """Return the names of a template's transforms."""
    found = template.get("Transform", [])
    named = (
        one.get("Name") if isinstance(one, dict) else one for one in (found if isinstance(found, list) else [found])
    )
    return [str(name) for name in named]


@dataclass
class Loops:
    """Unroll the loops of one template; `value` resolves a collection, `left` is how many rounds it may still take.

    A loop over what is not static, or that is malformed, stays as it is ("Fn::ForEach", CloudFormation user guide).
    """

    value: Callable[[Any], Any]
    left: int = 20_000

    def unroll(self, node: Any, names: Mapping[str, str] | None = None) -> Any:
        """Return a part of a template without loops; `names` holds what those around it have.

        Raises:
            ShipyardError: the loops take more rounds than any real template's.
        """
        names = names or {}
        if isinstance(node, str):
            return _filled(node, names)
        if isinstance(node, list):
            return [self.unroll(item, names) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1 and isinstance(node.get("Ref"), str) and node["Ref"] in names:
            return names[node["Ref"]]
        out: dict[Any, Any] = {}
        for key, item in node.items():
            if isinstance(key, str) and key.startswith(LOOP) and (rounds := self._rounds(item, names)) is not None:
                for inner in rounds:
                    out |= self.unroll(item[2], inner)
            else:
                out[_filled(key, names) if isinstance(key, str) else key] = self.unroll(item, names)
        return out

    def _rounds(self, loop: Any, names: Mapping[str, str]) -> list[dict[str, str]] | None:
        """Return the names of each round; None where the loop is malformed, or over what is not static."""
        if not (isinstance(loop, list) and len(loop) == 3 and isinstance(loop[0], str) and isinstance(loop[2], dict)):
            return None
        items = self.value(self.unroll(loop[1], names))
        if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
            return None
        self.left -= len(items)
        if self.left < 0:
            raise ShipyardError("the template's loops expand to more than 20,000 rounds", mend="make them shorter")
        return [{**names, loop[0]: str(item)} for item in items]


def _filled(text: str, names: Mapping[str, str]) -> str:
    """Put the loops' values into a text; `&{Name}` takes the letters and digits of a value alone."""
    for name, found in names.items():
        text = text.replace(f"${{{name}}}", found).replace(f"&{{{name}}}", re.sub(r"[^A-Za-z0-9]", "", found))
    return text
