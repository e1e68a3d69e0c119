"""Diff: what differs between two releases, for people and for machines."""

from collections.abc import Iterator
from typing import Any

from models.release import Artifact, Release


def diff(old: Release, new: Release) -> dict[str, Any]:
    """Return what differs: `source` by field, `submodels` by name (metric, form), `fusion`, `artifacts` by name.

    An artifact is `added`, `removed`, `changed` with its files, or `same`.
    """
    before, after = ({a.name: a for a in release.artifacts} for release in (old, new))
    return {
        "old": old.version,
        "new": new.version,
        "sequence": [old.sequence, new.sequence],
        "profile": [old.profile, new.profile],
        "source": _fields(old.source.model_dump(mode="json"), new.source.model_dump(mode="json")),
        "submodels": {name: _submodel(old, new, name) for name in sorted(old.submodels.keys() | new.submodels.keys())},
        "fusion": _fields(_fusion(old), _fusion(new)),
        "artifacts": {
            name: _artifact(before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys())
        },
    }


def same(found: dict[str, Any]) -> bool:
    """Return whether two releases have the same artifacts and say the same of them."""
    return all(a["state"] == "same" for a in found["artifacts"].values()) and not (
        found["source"] or found["fusion"] or any(found["submodels"].values())
    )


def _fields(old: dict[str, Any], new: dict[str, Any], within: str = "") -> dict[str, list[Any]]:
    """Return the fields that differ, those of nested objects by a dotted name, as [old, new]."""
    found: dict[str, list[Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found |= _fields(was, now, f"{within}{name}.")
        elif was != now:
            found[within + name] = [was, now]
    return found


def _submodel(old: Release, new: Release, name: str) -> dict[str, Any]:
    """Return the figures of a sub-model that differ, as [old, new]."""
    was, now = (_facts(release, name) for release in (old, new))
    return _fields(was, now)


def _facts(release: Release, name: str) -> dict[str, Any]:
    if name not in release.submodels:
        return {}
    sub = release.submodels[name]
    return {
        "target": sub.target, "task": sub.task, "parameters": sub.parameters_own + sub.parameters_shared,
        "precision": sub.formats[-1].precision, "bytes": sub.formats[-1].bytes, sub.score.metric: sub.score.after.value,
        "over_baseline": sub.score.over_baseline.value,
    }  # fmt: skip


def _fusion(release: Release) -> dict[str, Any]:
    return release.fusion.model_dump(mode="json") if release.fusion else {}


def _artifact(old: Artifact | None, new: Artifact | None) -> dict[str, Any]:
    if old is None or new is None:
        there = old or new
        assert there is not None
        return {"state": "added" if old is None else "removed", "bytes": there.bytes}
    was, now = ({file.path: file for file in artifact.files} for artifact in (old, new))
    files = {
        path: "added" if path not in was else "removed" if path not in now else "changed"
        for path in sorted(was.keys() | now.keys())
        if was.get(path) != now.get(path)
    }
    template = _fields(old.template, new.template)
    state = "changed" if files or template or old.digest != new.digest else "same"
    return {"state": state, "bytes": [old.bytes, new.bytes], "files": files, "template": template}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the difference for people: + added, - removed, ~ changed."""
    yield f"{found['old']} -> {found['new']}"
    for name, (was, now) in found["source"].items():
        yield f"~ source.{name}: {was} -> {now}"
    for name, fields in found["submodels"].items():
        for field, (was, now) in fields.items():
            yield f"~ {name}.{field}: {_number(was)} -> {_number(now)}"
    for name, (was, now) in found["fusion"].items():
        yield f"~ fusion.{name}: {_number(was)} -> {_number(now)}"
    for name, artifact in found["artifacts"].items():
        if artifact["state"] == "same":
            yield f"  {name}: the same"
        elif artifact["state"] == "changed":
            was, now = artifact["bytes"]
            yield f"~ {name}: {was} -> {now} bytes"
            signs = {"added": "+", "removed": "-", "changed": "~"}
            yield from (f"    {signs[state]} {path}" for path, state in artifact["files"].items())
            yield from (f"    ~ template.{field}" for field in artifact["template"])
        else:
            yield f"{'+' if artifact['state'] == 'added' else '-'} {name}: {artifact['bytes']} bytes"


def _number(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
