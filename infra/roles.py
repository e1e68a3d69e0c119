"""The roles that release into an environment, by their names, and the keys with which they sign.

They are made of fleet.toml alone, for stacks of other accounts name them too.
"""

from models.config import Fleet


def begins(fleet: Fleet, name: str) -> str:
    """Return how the names of an environment's stacks and roles begin."""
    return f"{fleet.project.name}-{name.replace('_', '-')}"


def release_role(fleet: Fleet, name: str) -> str:
    """Return the ARN of an environment's release role, which environments in other accounts know by its name."""
    return f"arn:aws:iam::{fleet.env[name].account}:role/{begins(fleet, name)}-release"


def promoters(fleet: Fleet, name: str) -> list[str]:
    """Return the release roles that promote artifacts from an environment."""
    return [
        release_role(fleet, other)
        for other, env in fleet.env.items()
        if env.delivery is not None and env.delivery.promote_from == name
    ]


def deploy_role(fleet: Fleet, name: str) -> str:
    """Return the ARN of an environment's deploy role."""
    return f"arn:aws:iam::{fleet.env[name].account}:role/{begins(fleet, name)}-deploy"


def build_role(fleet: Fleet, first: str, name: str) -> str:
    """Return the ARN of the role with which the pipeline of the environment `first` works on the environment `name`."""
    return f"arn:aws:iam::{fleet.env[first].account}:role/{begins(fleet, first)}-pipeline-{name.replace('_', '-')}"


def builders(fleet: Fleet, name: str) -> list[str]:
    """Return the roles of pipelines that release into an environment."""
    return [build_role(fleet, first, name) for first in piped(fleet, name)]


def keys(fleet: Fleet, first: str, name: str) -> dict[str, str]:
    """Return the ARNs of the keys with which the pipeline of `first` signs for the environment `name`, by variable."""
    settings = fleet.env[first].delivery
    assert settings is not None and settings.pipeline is not None
    found = {"SIGNING_KEY": settings.pipeline.signing_key}
    if name != first and fleet.env[name].needs_approval:
        found["APPROVING_KEY"] = settings.pipeline.approving_key
    return found


def piped(fleet: Fleet, name: str) -> list[str]:
    """Return the environments whose pipelines release into an environment."""
    return [
        first
        for first, env in fleet.env.items()
        if env.delivery is not None and env.delivery.pipeline is not None and name in fleet.way(first)
    ]
