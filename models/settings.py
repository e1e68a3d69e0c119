"""What every table of fleet.toml and of a release file has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$", description="a name like edge_recommend")]


class Settings(BaseModel):
    """A frozen table that refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)
