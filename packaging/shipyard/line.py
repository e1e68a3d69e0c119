"""Line: the stages in the order of the flow, each with what it depends on. A stage is run when its record is asked for."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import submodel
from models.config import Fleet, Profile
from models.submodel import MAX_TOKENS
from serve.errors import ShipyardError
from serve.files import sha256_file
from shipyard.edge.corrections import read_corrections
from shipyard.papers.origin import NOWHERE, Origin
from shipyard.pretrained import base_folder
from shipyard.stage import Record, Stage, digest

VERBS = ("data", "finetune", "evaluate", "split", "export", "quantise", "bundle")
"""The stages that are kept in the build folder, in the order of the flow."""

JUDGED = ("validation_examples", "test_examples", "test_each", "strong_baselines")
"""What of a profile the evaluation depends on."""

RUNTIME = "edge_runtime"
"""Unit of the edge's runtime, which is code and belongs to no sub-model."""

GATEWAY = "gateway"
"""Unit of the gateway: what fuses the sub-models' answers."""

Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """The assembly line of one profile: every stage with what it depends on.

    `root` is the folder of fleet.toml. `watch` runs each stage and may say so; `report` is called with progress inside it.
    """

    fleet: Fleet
    profile_name: str
    root: Path
    build: Path
    report: Report
    watch: Callable[[Stage, Path], Record]
    origin: Origin = NOWHERE

    @property
    def profile(self) -> Profile:
        """The sizes of this run.

        Raises:
            ShipyardError: fleet.toml has no such profile.
        """
        if self.profile_name not in self.fleet.profile:
            raise ShipyardError(
                "--profile: no such profile", value=self.profile_name, allowed=", ".join(self.fleet.profile),
                mend="choose one, or add it to fleet.toml",
            )  # fmt: skip
        return self.fleet.profile[self.profile_name]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The sub-models of the fleet; each has its file."""
        for name in self.fleet.submodel:
            submodel.find(name)
        return tuple(self.fleet.submodel)

    @property
    def base_name(self) -> str:
        """The pretrained text encoder's name and revision."""
        base = self.fleet.base
        return f"{base.package or base.hub} {base.revision}"

    @functools.cached_property
    def base(self) -> Path:
        """The folder of the pretrained text encoder."""
        return base_folder(self.fleet)

    @functools.cached_property
    def base_sha256(self) -> str:
        """The digest of the encoder's weights and tokenizer."""
        files = {
            p.name: sha256_file(p) for p in sorted(self.base.iterdir()) if p.suffix in (".safetensors", ".json", ".txt")
        }
        return digest(files)

    modules = ("shipyard.release", "shipyard.rerank", *(f"shipyard.{verb}" for verb in VERBS))
    """What makes a release, beside the sub-models' own files."""

    @property
    def model_modules(self) -> tuple[str, ...]:
        """The modules of the sub-models themselves."""
        return tuple(f"models.{name}" for name in self.names)

    def _run(
        self, name: str, unit: str, inputs: tuple[Record, ...], config: Mapping[str, Any], work: Callable[..., Any],
        *modules: str,
    ) -> Record:  # fmt: skip
        stage = Stage(name, unit, inputs, config, (f"shipyard.{name}", *modules), work)
        return self.watch(stage, self.build)

    @functools.cached_property
    def data(self) -> Record:
        """Behaviour data, cleaned and split by time."""
        module = importlib.import_module("shipyard.data")
        settings, households = self.fleet.data, self.profile.households
        folder = None if settings.folder is None else self.root / settings.folder
        # where the files lie tells nothing of what is in them
        config = {**as_json(settings), "folder": None, "households": households,
                  "source_sha256": module.source_sha256(settings, folder)}  # fmt: skip

        def work(out: Path) -> Any:
            found = module.data(settings, households, out, folder)
            behaviour = importlib.import_module("models.behaviour")
            for name in behaviour.PERIODS:
                behaviour.pack_market(out, name)
            return found

        return self._run("data", "joint", (), config, work, "models.behaviour")

    @property
    def past(self) -> Record:
        """The data that training and choices may see: a change of the test period changes nothing of it."""
        data = self.data
        known = {name: sha for name, sha in data.said["digests"].items() if name != "test"}
        return dataclasses.replace(data, digest=digest(known))

    @functools.cached_property
    def finetune(self) -> Record:
        """The tuned text tower and the joint model."""
        weights = {name: self.fleet.submodel[name].weight for name in self.names}
        sizes = {
            key: value
            for key, value in as_json(self.profile).items()
            if key.startswith(("mlm", "tower", "joint", "validation"))
        }
        config = {**as_json(self.fleet.finetune), **sizes, "weights": list(weights.items()), "base": self.base_sha256}
        data = self.past

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.finetune")
            return module.finetune(data.folder, self.base, self.fleet.finetune, self.profile, weights, out, self.report)

        return self._run("finetune", "joint", (data,), config, work, *self.model_modules)

    @functools.cached_property
    def evaluate(self) -> Record:
        """The figures of the test period, held to the gates even when they are of an earlier run."""
        data, tuned = self.data, self.finetune

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.evaluate")
            return module.evaluate(
                data.folder, tuned.folder, self.base, self.fleet.finetune, self.profile, self.names, self.report
            )

        sizes = {key: getattr(self.profile, key) for key in JUDGED}
        config = {**sizes, "finetune": as_json(self.fleet.finetune), "names": self.names, "base": self.base_sha256}
        record = self._run("evaluate", "joint", (data, tuned), config, work, *self.model_modules)
        importlib.import_module("shipyard.gates").hold(record.said["submodels"], self.profile)
        return record

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def split(self, name: str) -> Record:
        """A sub-model's stand-alone parameters."""
        data, tuned, _ = self.past, self.finetune, self.evaluate
        # another head's change is none of this sub-model's
        own = dataclasses.replace(tuned, digest=digest([tuned.said["parts"]["trunk"], tuned.said["parts"][name]]))

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.split")
            return module.split(data.folder, tuned.folder, self.base, self.fleet.finetune, self.names, name, out)

        return self._run("split", name, (data, own), {"name": name}, work, f"models.{name}")

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def export(self, name: str) -> Record:
        """A sub-model's graph in fp32."""
        data, alone = self.past, self.split(name)

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.export")
            return module.export(data.folder, alone.folder, self.base, self.fleet.finetune, name, out)

        config = {"name": name, "base": self.base_sha256}
        return self._run("export", name, (data, alone), config, work, f"models.{name}")

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def quantise(self, name: str) -> Record:
        """A sub-model's graph in the precision of its target."""
        data, exported = self.past, self.export(name)
        target = self.fleet.target[self.fleet.submodel[name].target]
        examples = min(200, self.profile.validation_examples)

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.quantise")
            return module.quantise(data.folder, exported.folder, self.base, target, name, examples, out)

        config = {**as_json(target), "name": name, "examples": examples}
        return self._run("quantise", name, (data, exported), config, work, f"models.{name}")

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def rerank(self, name: str) -> Record | None:
        """The cross-encoder of a sub-model that searches, where fleet.toml asks for one and a log can teach it."""
        if not self.profile.rerank_steps or self.split(name).said["task"] != "search":
            return None
        if self.fleet.submodel[name].target == "edge":
            return None  # thirty pairs through a tower are more than a device has time for
        if not all(self.data.said["counts"][period]["queries"] for period in ("train", "validation", "test")):
            return None
        data, tuned, _ = self.data, self.finetune, self.evaluate
        target = self.fleet.target[self.fleet.submodel[name].target]
        keys = ("rerank_steps", "tower_batch", "validation_examples", "test_examples")
        config = {
            **as_json(target), "sizes": {key: getattr(self.profile, key) for key in keys}, "base": self.base_sha256,
            "finetune": as_json(self.fleet.finetune), "names": self.names,
        }  # fmt: skip

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.rerank")
            return module.rerank(
                data.folder, tuned.folder, self.base, self.fleet.finetune, self.profile, target, self.names, name, out,
                self.report,
            )  # fmt: skip

        return self._run("rerank", name, (data, tuned), config, work, *self.model_modules)

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def calibration(self, name: str) -> dict[str, Any]:
        """A sub-model's calibration, with what was merged from devices that serve it."""
        found = self.evaluate.said["submodels"][name]["calibration"]
        plain = {key: found[key] for key in ("method", "x", "y") if key in found}
        merged = read_corrections(self.root / "releases").get(name)
        if merged is None or not plain or self.fleet.submodel[name].target != "edge":
            return plain
        data, tuned, correction = self.data, self.finetune, merged["correction"]

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.edge.correct")
            return module.correct(
                data.folder, tuned.folder, self.fleet.finetune, self.profile, self.names, name, plain, correction
            )

        sizes = {key: getattr(self.profile, key) for key in JUDGED}
        config = {**sizes, "finetune": as_json(self.fleet.finetune), "calibration": plain, "correction": correction}
        corrected: dict[str, Any] = self._run("correct", name, (data, tuned), config, work, *self.model_modules).said[
            "calibration"
        ]
        return corrected

    @functools.cached_property
    def wheels(self) -> Record:
        """The packages that an edge device installs, by the digests of their lock."""
        module = importlib.import_module("shipyard.edge.wheels")
        return self._run("wheels", RUNTIME, (), {"lock": sha256_file(module.LOCK)}, module.wheels)

    @functools.cache  # noqa: B019 - a line lives as long as its command
    def bundle(self, name: str) -> Record:
        """A sub-model's artifact; `RUNTIME` is the edge's code, `GATEWAY` what fuses."""
        if name == GATEWAY:
            return self._gateway()
        if name == RUNTIME:
            models = tuple(n.replace("_", "-") for n in self.names if self.fleet.submodel[n].target == "edge")
            wheels = self.wheels

            def runtime(out: Path) -> Any:
                return importlib.import_module("shipyard.bundle").bundle_runtime(models, wheels.folder, out)

            modules = ("serve.greengrass.device", "serve.greengrass.download", "serve.greengrass.install")
            return self._run("bundle", name, (wheels,), {"models": models}, runtime, *modules)
        data, alone, tuned, quantised = self.past, self.split(name), self.finetune, self.quantise(name)
        crossed = self.rerank(name)
        # one whose word does not count on validation is not shipped
        crossed = crossed if crossed is not None and crossed.said["weight"] > 0 else None
        place = self.fleet.submodel[name].target
        target = self.fleet.target[place]
        scores = self.evaluate.said["submodels"][name]
        facts = {
            "base": self.base_name,
            "base_sha256": self.base_sha256,
            "data_sha256": self.data.digest,
            "max_tokens": MAX_TOKENS,
            "precision": quantised.said["form"]["precision"],
            "metric": scores["after"] | {"name": scores["metric"]},
        }
        if place == "edge":
            facts["calibration"] = self.calibration(name)
        if crossed is not None:
            facts["rerank"] = {key: crossed.said[key] for key in ("depth", "weight", "precision")}

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.bundle")
            return module.bundle(
                data.folder, alone.folder, tuned.folder, quantised.folder, name, target, place, facts, out,
                None if crossed is None else crossed.folder,
            )  # fmt: skip

        config = {**as_json(target), "place": place, "facts": facts}
        # of fine-tuning it takes the tokenizer alone
        words = dataclasses.replace(tuned, digest=tuned.said["tokenizer_sha256"])
        return self._run(
            "bundle",
            name,
            (data, alone, words, quantised, *(() if crossed is None else (crossed,))),
            config,
            work,
            f"models.{name}",
            "serve.server",
            "serve.gateway",
            "serve.score",
            "serve.fetch",
        )

    def _gateway(self) -> Record:
        fusion = {key: self.evaluate.said["fusion"][key] for key in ("method", "sources", "parameters")}
        sources = {name: self.bundle(name) for name in fusion["sources"]}
        places = {name: self.fleet.submodel[name].target for name in sources}
        data, target = self.past, self.fleet.target["cpu"]

        def work(out: Path) -> Any:
            folders = {name: record.folder / "bundle" for name, record in sources.items()}
            reference = importlib.import_module("shipyard.golden").reference(data.folder, folders, fusion)
            module = importlib.import_module("shipyard.bundle")
            return module.bundle_gateway(folders, places, fusion, target, out, reference)

        config = {**as_json(target), "fusion": fusion, "places": places}
        inputs = (data, *sources.values())
        return self._run("bundle", GATEWAY, inputs, config, work, *self.model_modules, "serve.gateway", "serve.fetch")

    def record(self) -> dict[str, Any]:
        """Return what the stages said, for the report page and the papers of a release."""
        return {
            "title": f"{self.fleet.project.name} {self.fleet.project.version}", "profile": self.profile_name,
            "data": self.data.said, "finetune": self.finetune.said, "evaluate": self.evaluate.said,
            "split": {name: self.split(name).said for name in self.names},
            "quantise": {name: self.quantise(name).said for name in self.names},
            "rerank": {name: found.said for name in self.names if (found := self.rerank(name)) is not None},
        }  # fmt: skip

    def page(self, out: Path | None = None) -> Path:
        """Write the page of the figures to the file `out`, or to build/<profile>/report.html."""
        page: Path = importlib.import_module("shipyard.pages.report").report(
            self.record(), out or self.build / "report.html"
        )
        return page

    def compare(self, methods: Sequence[str]) -> tuple[Path, dict[str, Any]]:
        """Tune the text tower by each method; return the page build/<profile>/compare/compare.html and its record."""
        module = importlib.import_module("shipyard.compare")
        found: tuple[Path, dict[str, Any]] = module.compare(
            self.fleet.finetune, self.profile, self.profile_name, self.past, self.base, self.base_sha256, methods,
            self.build, self.watch, self.report,
        )  # fmt: skip
        return found

    def units(self) -> tuple[str, ...]:
        """Everything that is bundled."""
        edge = any(entry.target == "edge" for entry in self.fleet.submodel.values())
        fused = self.evaluate.said.get("fusion") is not None
        return (*self.names, *((RUNTIME,) if edge else ()), *((GATEWAY,) if fused else ()))

    def until(self, verb: str) -> dict[str, Record]:
        """Run the stages up to `verb` and return its records by unit."""
        if verb in ("data", "finetune", "evaluate"):
            return {"joint": getattr(self, verb)}
        units = self.units() if verb == "bundle" else self.names
        return {unit: getattr(self, verb)(unit) for unit in units}


def as_json(settings: Any) -> dict[str, Any]:
    """Return a settings table as JSON values."""
    values: dict[str, Any] = json.loads(settings.model_dump_json())
    return values
