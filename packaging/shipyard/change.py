"""Change: what a change of the synthesized templates does to each stack, as Markdown for who reviews it.

The CDK CLI tells what is replaced and what differs. Environments that differ by their names and accounts alone are told
once, and of a long value, as an inline recipe, what differs in it.
"""

import argparse
import collections
import difflib
import itertools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import Fleet
from models.release import Release
from serve.errors import ShipyardError
from shipyard.console import Reporter
from shipyard.diff import diff, lines
from shipyard.look import open_release

SUFFIX = ".template.json"
LONGEST = 160
"""Characters of a line; of a longer one what differs is told."""

RESOURCE = re.compile(r"^\[(.)\] (\S+::\S+) .*?(replace|may be replaced|destroy|orphan)?$")
SIDE = re.compile(r"^(?P<head>.*?)\[(?P<sign>[-+])\] (?P<value>.*)$")
DONE = {"+": "added", "-": "removed", "~": "updated"}


@dataclass(frozen=True)
class Stack:
    """One stack of two assemblies: environment, name, the templates [before, now] where they are, and what differs."""

    env: str
    name: str
    templates: tuple[dict[str, Any] | None, dict[str, Any] | None]
    told: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """What differs, without the environment's own names and account, and without the numbers of lines."""
        text = "\n".join(self.told).replace(self.env, "ENV")
        return re.sub(r"@@ .* @@", "@@", re.sub(r"(?<![0-9a-f])\d{12}(?![0-9a-f])", "ACCOUNT", text))

    @property
    def counts(self) -> str:
        """How many resources are added, replaced, updated and removed."""
        before, now = self.templates
        if before is None or now is None:
            template = now or before or {}
            return f"{'new' if before is None else 'gone'}, {len(template.get('Resources', {}))} resources"
        found = collections.Counter(
            "replaced" if match[3] in ("replace", "may be replaced") else DONE.get(match[1], "updated")
            for line in self.told
            if (match := RESOURCE.match(line))
        )
        return ", ".join(f"{n} {what}" for what, n in sorted(found.items())) or "outputs alone"


def stacks(before: Path, now: Path, cli: Path) -> list[Stack]:
    """Return the stacks of two folders of `cdk synth` that differ.

    Raises:
        ShipyardError: a folder holds no templates, or the CDK CLI fails.
    """
    there = [{path.relative_to(root): path for path in root.glob(f"assembly-*/*{SUFFIX}")} for root in (before, now)]
    for root, found in zip((before, now), there, strict=True):
        if not found:
            raise ShipyardError(
                f"{root}: no templates are there", allowed="a folder of shipyard synth", mend="make synth"
            )
    changed = []
    for path in sorted({*there[0], *there[1]}):
        files = [found.get(path) for found in there]
        texts = [None if file is None else file.read_bytes() for file in files]
        if texts[0] == texts[1]:
            continue
        env = path.parent.name.removeprefix("assembly-")
        # eight letters of the path's digest stand at its end
        name = path.name.removesuffix(SUFFIX).removeprefix(env)[:-8]
        told = (
            tuple(_told(files[0], f"{env}/{name}", now, cli)) if files[0] is not None and files[1] is not None else ()
        )
        old, new = (None if text is None else json.loads(text) for text in texts)
        changed.append(Stack(env, name, (old, new), told))
    return changed


def _told(before: Path, stack: str, app: Path, cli: Path) -> Iterator[str]:
    """Yield what the CDK CLI tells of a stack, but for its headings."""
    command = [str(cli), "diff", stack, "--exclusively", "--app", str(app), "--template", str(before), "--no-color",
               "--context-lines", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise ShipyardError(f"cdk diff {stack}: {done.stderr.strip()[-500:]}")
    noise = ("Stack ", "✨", "Resources", "Outputs", "Parameters", "Conditions")
    text = (done.stdout + done.stderr).splitlines()
    yield from (line for line in text if line.strip() and not line.startswith(noise))


def shortened(text: Sequence[str]) -> Iterator[str]:
    """Yield lines of a difference; of two long values, one in place of the other, what differs."""
    k = 0
    while k < len(text):
        old, new = SIDE.match(text[k]), SIDE.match(text[k + 1]) if k + 1 < len(text) else None
        if old and new and (old["sign"], new["sign"]) == ("-", "+") and max(len(text[k]), len(text[k + 1])) > LONGEST:
            indent = " " * len(old["head"])
            yield from (f"{indent}[{sign}] {part}" for sign, part in _apart(old["value"], new["value"]))
            k += 2
            continue
        line = text[k]
        yield line if len(line) <= LONGEST else f"{line[:LONGEST]}… ({len(line):,} characters)"
        k += 1


def _apart(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield what differs between two values by its sign: lines of JSON, or the part from shortly before where they do."""
    try:
        sides = [json.dumps(json.loads(value), indent=1, ensure_ascii=False).splitlines() for value in (old, new)]
    except ValueError:
        sides = [[old], [new]]
    for kind, a, b, c, d in difflib.SequenceMatcher(None, sides[0], sides[1], autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        left, right = ([line.strip() for line in side] for side in (sides[0][a:b], sides[1][c:d]))
        for was, now in itertools.zip_longest(left, right, fillvalue=""):
            alike = next((k for k, (x, y) in enumerate(zip(was, now, strict=False)) if x != y), 0)
            start = max(0, alike - 30) if max(len(was), len(now)) > LONGEST else 0
            yield from ((sign, _cut(value, start)) for sign, value in (("-", was), ("+", now)) if value)


def _cut(value: str, start: int) -> str:
    part = value[start : start + LONGEST]
    return f"{'…' if start else ''}{part}{'…' if start + LONGEST < len(value) else ''}"


def markdown(found: Sequence[Stack], releases: Path) -> str:
    """Return the change as Markdown; files of releases lie in the folder `releases`."""
    parts = [*_releases(found, releases), "## Templates", ""]
    if not found:
        return "\n".join([*parts, "No template changes.", ""])
    envs = list(dict.fromkeys(stack.env for stack in found))
    by_name: dict[str, list[Stack]] = collections.defaultdict(list)
    for stack in found:
        by_name[stack.name].append(stack)
    parts += ["| stack | " + " | ".join(envs) + " |", "|---" * (len(envs) + 1) + "|"]
    for name, some in by_name.items():
        counts = {stack.env: stack.counts for stack in some}
        parts.append(f"| {name} | " + " | ".join(counts.get(env, "") for env in envs) + " |")
    parts.append("")
    for name, some in by_name.items():
        alike: dict[str, list[Stack]] = collections.defaultdict(list)
        for stack in some:
            if stack.told:
                alike[stack.plain].append(stack)
        for same in alike.values():
            where = ", ".join(stack.env for stack in same)
            others = f"; told of {same[0].env}, in the others but for names and accounts the same" if same[1:] else ""
            fence = ["```text", *shortened(same[0].told), "```"]
            parts += [f"<details><summary>{name}: {where}{others}</summary>", "", *fence, "", "</details>", ""]
    return "\n".join(parts)


def _releases(found: Sequence[Stack], folder: Path) -> list[str]:
    """Return the part about releases: what each environment is of before and now, and how they differ."""
    of_env: dict[str, tuple[str, str]] = {}
    for stack in found:
        told = [((side or {}).get("Outputs", {}).get("Release") or {}).get("Value") for side in stack.templates]
        if told[0] and told[1] and told[0] != told[1]:
            of_env[stack.env] = (told[0], told[1])
    if not of_env:
        return []
    parts = ["## Release", "", "| environment | before | now |", "|---|---|---|"]
    parts += [f"| {env} | {old} | {new} |" for env, (old, new) in of_env.items()]
    for old, new in dict.fromkeys(of_env.values()):
        was, now = _open(folder / f"{old}.json"), _open(folder / f"{new}.json")
        text = ["the file of one of them is not in releases/"] if was is None or now is None else lines(diff(was, now))
        short = [_cut(line, 0) for line in text]
        parts += ["", f"<details><summary>{old} → {new}</summary>", "", "```text", *short, "```", "", "</details>"]
    return [*parts, ""]


def _open(path: Path) -> Release | None:
    return open_release(path) if path.is_file() else None


def run(chosen: argparse.Namespace, fleet: Fleet, root: Path, build: Path, reporter: Reporter) -> int:
    """Print what changed between two folders of templates."""
    found = stacks(chosen.before, chosen.now, root / "node_modules" / ".bin" / "cdk")
    # those of the fleet in its order; one that is gone comes last
    order = list(fleet.env)
    found.sort(key=lambda stack: order.index(stack.env) if stack.env in order else len(order))
    told = [{"env": s.env, "stack": s.name, "change": s.counts, "told": s.told} for s in found]
    print(json.dumps(told, ensure_ascii=False) if chosen.json else markdown(found, root / "releases"))
    return 0
