"""Pin: name a release in fleet.toml, one line of it, as a person would."""

import tomllib
from pathlib import Path

import tomlkit

from serve.errors import ShipyardError
from shipyard.stage import write


def pin(path: Path, env: str, version: str) -> bool:
    """Set `release` of an environment in fleet.toml and leave every other byte as it is; say whether that was new.

    Raises:
        ShipyardError: it cannot be changed in one line.
    """
    before = path.read_bytes().decode()
    table = tomllib.loads(before)
    if table["env"][env]["release"] == version:
        return False
    document = tomlkit.parse(before)
    document["env"][env]["release"] = version
    after = tomlkit.dumps(document)
    table["env"][env]["release"] = version
    old, new = before.splitlines(), after.splitlines()
    changed = sum(one != other for one, other in zip(old, new, strict=False)) + abs(len(old) - len(new))
    # the edit is a library's; what it did is read again before it counts
    if tomllib.loads(after) != table or changed != 1:
        raise ShipyardError(
            f"{path}: env.{env}.release: not to be changed in one line", value=f"{changed} lines",
            mend=f'write release = "{version}" under [env.{env}] by hand',
        )  # fmt: skip
    write(path, after)
    return True
