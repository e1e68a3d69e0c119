"""Diff: what differs between two releases or two bundles, for people and for machines."""

from collections.abc import Iterator, Mapping
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


def diff_bundles(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return what differs between two bundles, as `shipyard.inspect` tells them: `fields` and `graphs` by name, `files`."""
    left_out = ("files", "bytes", "graphs")
    was, now = ({key: value for key, value in told.items() if key not in left_out} for told in (old, new))
    return {
        "old": old["manifest"],
        "new": new["manifest"],
        "bytes": [old["bytes"], new["bytes"]],
        "fields": _fields(was, now),
        "files": _files(old["files"], new["files"]),
        "graphs": _fields(old["graphs"], new["graphs"]),
    }


def same(found: dict[str, Any]) -> bool:
    """Return whether two releases have the same artifacts and say the same of them, or two bundles are the same."""
    if "artifacts" not in found:
        return bool(found["old"] == found["new"])
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
    files = _files(was, now)
    template = _fields(old.template, new.template)
    state = "changed" if files or template or old.digest != new.digest else "same"
    return {"state": state, "bytes": [old.bytes, new.bytes], "files": files, "template": template}


def _files(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return by path whether a file was added, removed or changed."""
    return {
        path: "added" if path not in was else "removed" if path not in now else "changed"
        for path in sorted(was.keys() | now.keys())
        if was.get(path) != now.get(path)
    }


SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the difference for people: + added, - removed, ~ changed."""
    yield f"{found['old']} -> {found['new']}"
    if "artifacts" not in found:
        yield from _bundle_lines(found)
        return
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
            yield from (f"    {SIGNS[state]} {path}" for path, state in artifact["files"].items())
            yield from (f"    ~ template.{field}" for field in artifact["template"])
        else:
            yield f"{'+' if artifact['state'] == 'added' else '-'} {name}: {artifact['bytes']} bytes"


def _bundle_lines(found: dict[str, Any]) -> Iterator[str]:
    if same(found):
        yield "  the same"
        return
    was, now = found["bytes"]
    yield f"~ {was} -> {now} bytes"
    yield from (f"{SIGNS[state]} {path}" for path, state in found["files"].items())
    for part in ("fields", "graphs"):
        yield from (f"~ {name}: {_number(was)} -> {_number(now)}" for name, (was, now) in found[part].items())


def _number(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
