"""Read an artifact's template: its shape by kind, and its placeholders filled with what differs by environment."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, field_validator

from models.config import Environment, Settings, explain
from models.release import Artifact, Key, Release, ShipyardError

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")

AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]
Command = Annotated[tuple[str, ...], Field(min_length=1)]


class TritonTemplate(Settings):
    """Say how Triton is started, and where below the artifact's key its model repository lies: a prefix, or a .tar.gz."""

    environment: dict[str, str]
    model_data: Key


class ImageTemplate(Settings):
    """Say how a container fetches its model into `mount`, serves it on `port`, and where it tells that it is ready.

    `score` is, for a model that can, the command that answers all the requests that wait in the data bucket.
    """

    environment: dict[str, str]
    fetch: Command
    serve: Command
    port: Annotated[int, Field(ge=1024, le=65535)]
    health: AbsolutePath
    mount: AbsolutePath
    score: Command | None = None


class ComponentTemplate(Settings):
    """Hold a Greengrass recipe and, for a model, the words by which the runtime finds and verifies it on a device."""

    recipe: dict[str, Any]
    model: str | None = None

    @field_validator("recipe")
    @classmethod
    def _check_names(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        for key in ("ComponentName", "ComponentVersion"):
            if not isinstance(recipe.get(key), str):
                raise ValueError(f"a recipe with {key}")
        return recipe


TemplateType = TypeVar("TemplateType", bound=Settings)


def placeholders(env: Environment, *, bucket: str, data: str, release: Release, trusted_key: str) -> dict[str, str]:
    """Return the values that an environment gives to placeholders, by name without the @ around it."""
    return {
        "ACCOUNT": env.account,
        "REGION": env.region,
        "BUCKET": bucket,
        "DATA": data,
        "RELEASE": release.version,
        "TRUSTED_KEY": trusted_key,
    }


def fill(template: Any, values: Mapping[str, str], where: str) -> Any:
    """Replace each @PLACEHOLDER@ in the strings and keys of a JSON value, at any depth.

    Raises:
        ShipyardError: a placeholder has no value.
    """
    if isinstance(template, dict):
        return {fill(key, values, where): fill(value, values, where) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return [fill(value, values, where) for value in template]
    if not isinstance(template, str):
        return template
    if unknown := [name for name in _PLACEHOLDER.findall(template) if name not in values]:
        raise ShipyardError(
            f"{where}: unknown placeholder",
            value=f"@{unknown[0]}@",
            allowed=", ".join(f"@{name}@" for name in values),
            mend="correct the template where the artifact is bundled",
        )
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def read_template(artifact: Artifact, shape: type[TemplateType], values: Mapping[str, str]) -> TemplateType:
    """Fill and validate the template of an artifact: @ATTESTATION@ is its own, the other placeholders have `values`.

    Raises:
        ShipyardError: a placeholder has no value, or a field is unknown, missing or out of range.
    """
    where = f"template of artifact {artifact.name}"
    filled = fill(artifact.template, {**values, "ATTESTATION": artifact.attestation}, where)
    try:
        # by way of JSON: strict mode then takes lists for tuples
        return shape.model_validate_json(json.dumps(filled))
    except ValidationError as fault:
        raise explain(fault, shape, where) from None
