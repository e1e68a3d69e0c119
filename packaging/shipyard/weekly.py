"""The weekly line: a release from an earlier model and what was bought since, so that devices fetch a small delta.

It differs from a release's line in its training alone (`shipyard.warm`): evaluation, gates, export, quantisation and bundles
are the same. It is held to one thing more: what its deltas cost.
"""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from shipyard.line import Line
from shipyard.stage import RECORD, Record

STEPS = 40
OFTEN = 5
"""Purchases in the new days from which on a row learns."""

MOST_DELTA = 0.25
"""The largest delta, as a part of the archive: what is more than that is no small update."""


@dataclasses.dataclass(frozen=True, eq=False)
class WeeklyLine(Line):
    """The assembly line of an update; `earlier` is the build folder of the release that devices have."""

    earlier: Path = dataclasses.field(kw_only=True)
    steps: int = STEPS
    often: int = OFTEN

    modules = (*Line.modules, "shipyard.weekly", "shipyard.warm")

    @functools.cached_property
    def beginning(self) -> tuple[Record, Record]:
        """Data and training of the earlier model."""
        joint = self.earlier / "joint"
        return left(joint / "data"), left(joint / ("warm" if (joint / "warm").is_dir() else "finetune"))

    @functools.cached_property
    def finetune(self) -> Record:
        """The earlier model, with what its rows learned from the new days."""
        weights = {name: self.fleet.submodel[name].weight for name in self.names}
        (before, tuned), data = self.beginning, self.past
        config = {
            **self.fleet.finetune.model_dump(mode="json"),
            **{key: getattr(self.profile, key) for key in ("joint_sampled", "validation_examples")},
            "weights": list(weights.items()), "base": self.base_sha256, "steps": self.steps, "often": self.often,
        }  # fmt: skip

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.warm")
            earlier = module.Earlier(before.folder, tuned.folder)
            return tuned.said | module.warm(
                earlier, data.folder, self.base, self.fleet.finetune, self.profile, weights, out, self.report,
                steps=self.steps, often=self.often,
            )  # fmt: skip

        return self._run("warm", "joint", (data, before, tuned), config, work, *self.model_modules)

    def until(self, verb: str) -> dict[str, Record]:
        """Run the stages up to `verb`; hold the deltas once there are bundles."""
        self.beginning  # noqa: B018 -- a folder that is none is told before the work
        records = super().until(verb)
        if verb == "bundle":
            self.deltas()
        return records

    def deltas(self) -> dict[str, float]:
        """Return the delta from the earlier bundle of each sub-model of the edge, as a part of the archive.

        Raises:
            ShipyardError: one is larger than an update may cost.
        """
        make_delta = importlib.import_module("serve.greengrass.delta").make_delta
        found = {}
        for name in (name for name in self.names if self.fleet.submodel[name].target == "edge"):
            base = self.earlier / name / "bundle" / "bundle"
            if not base.is_dir():
                continue  # devices do not have it yet
            [archive] = (self.bundle(name).folder / "upload").glob("*.zip")
            whole = archive.read_bytes()
            found[name] = len(make_delta(base, whole)) / len(whole)
            if found[name] > MOST_DELTA:
                raise ShipyardError(
                    f"warm: {name}: the delta is too large for an update", value=f"{found[name]:.0%} of the archive",
                    allowed=f"{MOST_DELTA:.0%}", mend="raise --often, or make a full release: shipyard release",
                )  # fmt: skip
        return found


def left(folder: Path) -> Record:
    """Return what a finished stage left in a folder, checked file by file.

    Raises:
        ShipyardError: no stage is there, or a file of it was changed.
    """
    if not (folder / RECORD).is_file():
        raise ShipyardError(f"{folder}: no finished stage", mend="name the build folder of an earlier release")
    document = read_json(folder / RECORD)
    for name, digest in document["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise ShipyardError(f"{folder / name}: changed since it was made", mend="make that release again")
    return Record(folder, document["digest"], document["said"], skipped=True)
