"""The house: who may import whom, what an import may do, what is pinned and what may never be committed."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from serve.greengrass import recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "serve": ROOT / "packaging" / "serve",
    "shipyard": ROOT / "packaging" / "shipyard",
    "models": ROOT / "models",
    "infra": ROOT / "infra",
}
OURS = {*SOURCES, "app", "tests"}
SERVE_MAY_IMPORT = {"serve", "numpy", "onnxruntime", "tokenizers", "cryptography", "rfc8785", "boto3", "botocore"}
SERVE_MAY_IMPORT |= {"uvicorn", "uvloop", "orjson", "prometheus_client", "cachetools", "urllib3"}
SERVE_MAY_IMPORT |= {"awsiot", "paho", "zstandard"}
HEAVY = {"torch", "transformers", "peft", "boto3", "botocore", "numpy", "onnx", "onnxruntime", "pyarrow", "duckdb"}
SERVE = [f"serve.{path.stem}" for path in sorted(SOURCES["serve"].glob("*.py")) if path.stem != "__init__"]
PURE = ["models.config", "models.release", "models.submodel"]
LIGHT = [f"shipyard.{name}" for name in ("stage", "gates", "keys", "upload", "publish", "release", "cli", "console")]


def files(package):
    return sorted(SOURCES[package].rglob("*.py"))


def parametrize_files(*packages):
    found = [path for package in packages for path in files(package)]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.relative_to(ROOT).as_posix())


def is_ours(module):
    top, *rest = module.split(".")
    return top in SOURCES and Path(SOURCES[top], *rest).with_suffix(".py").is_file()


def imported(path):
    """Name the modules that a file imports at any depth; `from package import module` counts as package.module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_ours(name) else node.module for name in whole}
    return found


def tops(path):
    return {name.split(".")[0] for name in imported(path)}


def python(code, *arguments, cwd=ROOT, **environment):
    """Run code in a fresh interpreter with an environment of its own; return what it printed as JSON."""
    surroundings = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# --- who imports whom ------------------------------------------------------------------------------------------------


def test_every_package_has_files():
    assert all(len(files(package)) >= 5 for package in SOURCES)


@parametrize_files("serve")
def test_serve_imports_its_engine_and_itself_alone(path):
    assert tops(path) <= SERVE_MAY_IMPORT | sys.stdlib_module_names


@parametrize_files("models")
def test_models_import_serve_and_never_shipyard_or_infra(path):
    assert tops(path) & OURS <= {"models", "serve"}


@parametrize_files("infra")
def test_infra_imports_configuration_and_release_alone(path):
    ours = {name for name in imported(path) if name.split(".")[0] in OURS}
    assert {name for name in ours if not name.startswith("infra")} <= {"models.config", "models.release"}


@parametrize_files("infra")
def test_infra_asks_neither_aws_nor_git_nor_the_clock(path):
    """The refresh of prices alone asks AWS; no synth and no report imports it."""
    allowed = {"boto3", "botocore"} if path == SOURCES["infra"] / "cost" / "refresh.py" else set()
    forbidden = {"boto3", "botocore", "subprocess", "time", "datetime", "random", "uuid", "socket"}
    assert not tops(path) & (forbidden - allowed)


def test_a_cost_report_needs_neither_boto3_nor_the_cdk():
    code = (
        "import json, sys; from infra.cost.command import main; main(['cost', 'schema'])\n"
        "print('\\n' + json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'packaging'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "infra.cost.report" in loaded
    assert not {"boto3", "botocore", "aws_cdk", "jsii", "torch", "numpy", "shipyard"} & loaded


def test_the_command_line_finds_the_cost_review_by_its_name():
    """shipyard and infra never import each other: cli.py is a composition root, as app.py is (docs/adr/0007)."""
    assert importlib.util.find_spec("infra.cost.command") is not None
    by_name = re.compile(r"""import_module\(\s*["']infra\b""")
    finders = [path.name for path in files("shipyard") if by_name.search(path.read_text(encoding="utf-8"))]
    assert finders == ["cli.py"]


@parametrize_files("shipyard")
def test_shipyard_never_imports_infra(path):
    assert tops(path) & OURS <= {"shipyard", "models", "serve"}


def test_app_imports_infra_and_models_alone():
    assert tops(ROOT / "app.py") & OURS == {"infra", "models"}


@parametrize_files("serve", "models", "shipyard", "infra")
def test_no_import_is_relative(path):
    """A relative import would be missed by the digest of our code that decides whether a stage runs again."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_heavy(module):
    code = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
    loaded = set(python(code, module))
    assert module in loaded
    assert not HEAVY & loaded


# --- what an import does ---------------------------------------------------------------------------------------------

WATCH = """
import importlib, json, sys

seen, now = [], ""
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
CALLS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
         "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}

def watch(event, arguments):
    # urllib3 asks at its import whether this machine has IPv6, by a bind of its own
    bound = event == "socket.bind" and arguments[1] != ("::1", 0)
    written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if bound or written or event in WRITES | CALLS:
        seen.append([now, event, repr(arguments)])

sys.addaudithook(watch)
for now in sys.argv[1:]:
    importlib.import_module(now)
print(json.dumps({"seen": seen, "loaded": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return home, python(WATCH, *SERVE, *PURE, *LIGHT, cwd=home)


def test_imports_write_nothing_start_nothing_and_connect_to_nothing(watched):
    home, found = watched
    assert found["seen"] == []
    assert list(home.rglob("*")) == []


def test_the_watch_sees_a_write_and_a_connection(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import socket\nopen('written', 'w').close()\nsocket.socket().connect_ex(('127.0.0.1', 9))\n"
    )
    found = python(WATCH, "loud", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert {event for _, event, _ in found["seen"]} == {"open", "socket.connect"}


def test_the_command_line_imports_nothing_that_trains(watched):
    _, found = watched
    assert "shipyard.cli" in found["loaded"]
    assert not {"torch", "transformers", "peft", "onnx", "pyarrow", "duckdb"} & set(found["loaded"])


# --- names and folders -----------------------------------------------------------------------------------------------


def test_packaging_is_the_library_and_not_our_folder():
    assert not (ROOT / "packaging" / "__init__.py").exists()
    origin = importlib.util.find_spec("packaging").origin
    code = "import importlib.util, json; print(json.dumps(importlib.util.find_spec('packaging').origin))"
    for found in (origin, python(code), python(code, PYTHONPATH=str(ROOT))):
        assert "site-packages" in Path(found).parts


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_module_has_a_name_that_says_nothing():
    forbidden = re.compile(r"(^|_)(utils?|helpers?|common|base|managers?|misc)$")
    paths = [p for package in SOURCES for p in SOURCES[package].rglob("*")] + list((ROOT / "tests").rglob("*"))
    assert not [p for p in paths if "__pycache__" not in p.parts and forbidden.search(p.stem)]


# --- telemetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["serve", "serve.errors", "serve.runtime", "models.config", "shipyard.stage"])
@pytest.mark.parametrize("caller", [{}, {"ORT_DISABLE_TELEMETRY": "0"}], ids=["unset", "set to 0"])
def test_telemetry_is_off_whoever_imports_us(module, caller):
    code = "import importlib, json, os, sys; importlib.import_module(sys.argv[1])\n"
    assert python(code + "print(json.dumps(os.environ['ORT_DISABLE_TELEMETRY']))", module, **caller) == "1"


def test_telemetry_is_off_in_every_artifact():
    tree = ast.parse((SOURCES["shipyard"] / "bundle.py").read_text(encoding="utf-8"))
    [dockerfile] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "DOCKERFILE"
    ]
    environments = [
        {key.value: ast.unparse(value) for key, value in zip(inner.keys, inner.values, strict=True)}
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, inner in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "environment" and isinstance(inner, ast.Dict)
    ]
    assert re.search(r"^ENV .*\bORT_DISABLE_TELEMETRY=1\b", dockerfile, re.MULTILINE)
    assert len(environments) == 2
    assert {environment["ORT_DISABLE_TELEMETRY"] for environment in environments} == {"'1'"}
    runtime = recipe.runtime_recipe("1.0.0", "s3://bucket/key/", ("edge-recommend",))
    assert {m["Lifecycle"]["Setenv"]["ORT_DISABLE_TELEMETRY"] for m in runtime["Manifests"]} == {"1"}
    assert "ORT_DISABLE_TELEMETRY=1" in recipe.RUN


# --- pins ------------------------------------------------------------------------------------------------------------


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_constraints_pin_every_line_once():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!-]*", line)]
    assert loose == []
    assert len(pins()) == len(lines) > 50


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    groups = {"project": project["project"]["dependencies"], "build": project["build-system"]["requires"], **extras}
    return [pytest.param(Requirement(text), id=f"{group}-{text}") for group, texts in groups.items() for text in texts]


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_is_pinned_to_a_version_that_it_allows(requirement):
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None
    assert requirement.specifier.contains(Version(pin), prereleases=True)


def test_cdk_cli_is_pinned_as_in_its_lock_file():
    wanted = json.loads((ROOT / "package.json").read_text())["dependencies"]["aws-cdk"]
    lock = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", wanted)
    assert lock[""]["dependencies"]["aws-cdk"] == lock["node_modules/aws-cdk"]["version"] == wanted
    assert all(entry.get("integrity", "").startswith("sha512-") for name, entry in lock.items() if name)


# --- what may never be committed -------------------------------------------------------------------------------------

SECRETS = {
    "a path of one machine": re.compile(rb"(?<![\w.@:-])/(?:work|home|Users|root)/\w"),
    "a private key": re.compile(rb"-----BEGIN [A-Z0-9 ]*" + rb"PRIVATE KEY"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
}


def repository():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", SECRETS)
def test_repository_holds_no(what):
    found = repository()
    assert ROOT / "pyproject.toml" in found
    assert [path for path in found if SECRETS[what].search(path.read_bytes())] == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", "see /" + "work/main/x"),
        ("a private key", "-----BEGIN " + "PRIVATE KEY-----"),
        ("an AWS access key", "AKIA" + "IOSFODNN7EXAMPLE"),
    ],
)
def test_the_search_for_secrets_finds(what, text):
    assert SECRETS[what].search(text.encode())
