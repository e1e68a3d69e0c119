"""The edge's components: recipes by the rules of both nuclei, installation without a network, the self-test at startup."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_server import PRODUCTS, make_bundle

from serve.errors import ShipyardError
from serve.files import sha256_file
from serve.greengrass import device, install, recipe
from shipyard.bundle import bundle_runtime
from shipyard.edge.wheels import LOCK, ROOTS, download, pins
from shipyard.stage import closure

PHASES = {"bootstrap", "install", "run", "startup"}
VARIABLE = re.compile(
    r"\{(artifacts:(?:path|decompressedPath)|work:path|kernel:rootPath|iot:thingName|configuration:/\w+)\}"
)


# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPES = {
    "model": recipe.model_recipe(
        "edge-recommend", "1.0.7", "s3://bucket/artifacts/edge-recommend/0/edge-recommend.zip"
    ),
    "runtime": recipe.runtime_recipe("1.0.9", "s3://bucket/artifacts/edge-runtime/0/", ("edge-recommend", "intent")),
}


def scripts(document):
    for manifest in document["Manifests"]:
        for phase, body in manifest["Lifecycle"].items():
            if phase != "Setenv":
                yield phase, body["Script"]


@pytest.mark.parametrize("document", RECIPES.values(), ids=RECIPES)
def test_recipes_keep_to_what_both_nuclei_read(document):
    # lite reads a recipe into 8,196 bytes, with a digest added to each artifact
    text = json.dumps(document, separators=(",", ":"))
    assert len(text) + 2 * 120 < 8000
    assert document["RecipeFormatVersion"] == "2020-01-25"
    assert re.fullmatch(r"[a-zA-Z0-9-_.]{1,128}", document["ComponentName"])
    assert not document["ComponentName"].startswith("aws.")
    assert re.fullmatch(r"\d+\.\d+\.\d+", document["ComponentVersion"])
    assert [m["Platform"] for m in document["Manifests"]] == [
        {"os": "linux", "architecture": name, "runtime": "*"} for name in ("amd64", "aarch64")
    ]
    for manifest in document["Manifests"]:
        for artifact in manifest["Artifacts"]:
            # AWS computes the digest; a bucket's name with a dot has no certificate
            assert artifact.keys() == {"Uri", "Unarchive", "Permission"}
            assert re.fullmatch(r"s3://[a-z0-9-]+/.+\.zip", artifact["Uri"])
        lifecycle = dict(manifest["Lifecycle"])
        values = lifecycle.pop("Setenv", {})
        assert all(isinstance(value, str) for value in values.values())
        assert lifecycle.keys() <= PHASES
        assert all(phase.keys() <= {"Script", "Timeout", "RequiresPrivilege"} for phase in lifecycle.values())
        assert all(isinstance(phase["Timeout"], str) for phase in lifecycle.values())


def test_scripts_hold_recipe_variables_and_no_other_brace():
    configured = RECIPES["runtime"]["ComponentConfiguration"]["DefaultConfiguration"]
    found = list(scripts(RECIPES["runtime"]))
    assert {phase for phase, _ in found} == {"install", "startup"}
    for _, script in found:
        assert "{" not in VARIABLE.sub("", script) and "}" not in VARIABLE.sub("", script)
        # a value is escaped for double quotes alone, and a key without a default ends the script
        for variable in VARIABLE.finditer(script):
            before, after = script[: variable.start()], script[variable.end() :]
            assert before.count('"') % 2 == 1 and '"' in after
            if variable[1].startswith("configuration:/"):
                assert variable[1].removeprefix("configuration:/") in configured


def test_runtime_depends_on_its_models_in_words_that_lite_reads():
    wanted = RECIPES["runtime"]["ComponentDependencies"]
    assert wanted.keys() == {"shipyard.edge-recommend", "shipyard.intent", "aws.greengrass.TokenExchangeService"}
    assert all(re.fullmatch(r">=\d\.0\.0 <\d\.0\.0", d["VersionRequirement"]) for d in wanted.values())
    assert all(isinstance(v, str) for k, v in configured().items() if k != "accessControl")


def configured():
    return RECIPES["runtime"]["ComponentConfiguration"]["DefaultConfiguration"]


def test_a_device_may_speak_of_its_own_shadow_alone():
    policies = configured()["accessControl"]["aws.greengrass.ipc.mqttproxy"]
    topics = {topic for policy in policies.values() for topic in policy["resources"]}
    assert all(topic.startswith("$aws/things/{iot:thingName}/shadow/name/shipyard/") for topic in topics)
    clients = configured()["accessControl"]["aws.greengrass.ipc.pubsub"]
    assert {op: policy["resources"] for policy in clients.values() for op in policy["operations"]} == {
        "aws.greengrass#SubscribeToTopic": ["shipyard/ask"], "aws.greengrass#PublishToTopic": ["shipyard/answer/*"],
    }  # fmt: skip
    assert not policies.keys() & clients.keys()
    assert {topic.split("/shipyard/")[1] for topic in topics} == {
        "get", "update", "get/accepted", "get/rejected", "update/delta",
    }  # fmt: skip


# --- what is vendored ------------------------------------------------------------------------------------------------


def locked():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(Requirement(line.split(" ")[0]).name): line for line in lines}


def test_lock_holds_the_pinned_versions_and_a_digest_of_every_wheel():
    found = locked()
    assert {line.split(" ")[0] for line in found.values()} == set(pins())
    for name in ("numpy", "onnxruntime", "cryptography", "cffi", "zstandard", "awscrt"):
        assert found[name].count("--hash=sha256:") == 2  # one an architecture


def test_vendored_packages_are_those_that_the_code_imports():
    modules = ("serve.greengrass.device", "serve.greengrass.download", "serve.greengrass.install")
    _, libraries = closure(modules)
    # botocore comes with boto3
    assert {canonicalize_name(name) for name in libraries} - {"botocore"} <= {canonicalize_name(r) for r in ROOTS}


# --- the component on a machine --------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A folder as the nucleus lays it out, and the rendered scripts of the component's lifecycle."""

    root: Path
    port: int
    words: str = ""
    trusted: str = ""
    link: str = "none"
    more: dict = field(default_factory=dict)

    @property
    def work(self):
        return self.root / "work" / recipe.RUNTIME_COMPONENT

    @property
    def unarchived(self):
        return self.root / "packages" / "artifacts-unarchived"

    @property
    def code(self):
        return self.unarchived / recipe.RUNTIME_COMPONENT / "1.0.9"

    def script(self, phase):
        [body] = {s for p, s in scripts({"Manifests": RECIPES["runtime"]["Manifests"][:1]}) if p == phase}
        values = {
            "artifacts:decompressedPath": self.code, "work:path": self.work, "kernel:rootPath": self.root,
            "iot:thingName": "shipyard-dev-1",
        } | {f"configuration:/{key}": value for key, value in (configured() | self.more).items()}  # fmt: skip
        values |= {
            "configuration:/models": self.words, "configuration:/trustedKey": self.trusted,
            "configuration:/port": self.port,
        }  # fmt: skip
        # without a nucleus there is no socket to speak to
        return VARIABLE.sub(lambda m: str(values[m[1]]), body).removesuffix(" ipc") + f" {self.link}"

    def command(self, phase):
        environment = ["PATH=/usr/bin:/bin", *(f"{k}={v}" for k, v in setenv().items())]
        return ["env", "-i", *environment, "sh", "-c", self.script(phase)]

    def deploy(self, bundle, name="edge-recommend", version="1.0.7", beside=False):
        """Unpack a model as the nucleus would, and name it to the runtime, `beside` those before or alone."""
        folder = self.unarchived / recipe.model_component(name) / version / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle.folder, folder)
        word = f"{recipe.model_component(name)}/{version}/{name}/{bundle.attestation}"
        self.words = f"{self.words} {word}" if beside else word
        self.trusted = bundle.trusted
        return folder


def setenv():
    return RECIPES["runtime"]["Manifests"][0]["Lifecycle"]["Setenv"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, path, document=None, seconds=60):
    """Ask a process that may still be starting."""
    until = time.monotonic() + seconds
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            body = None if document is None else json.dumps(document)
            connection.request("GET" if document is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        finally:
            connection.close()


def edge_bundle(folder, first=0, name="edge-recommend"):
    """A small real bundle that a device trusts as `name`; another `first` product makes another bundle."""
    products = [1000 + 7 * row + first for row in range(1, len(PRODUCTS) + 1)]
    made = make_bundle(folder, catalogue={"products": products, "rows": None, "answers": None})
    return type(made)(made.folder, name, made.key)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The runtime's archive for this machine, with its wheels, as a release holds it."""
    out = tmp_path_factory.mktemp("runtime")
    (out / "wheels" / "aarch64").mkdir(parents=True)
    download(LOCK, "amd64", out / "wheels" / "amd64", "--require-hashes")
    bundle_runtime(("edge-recommend",), out / "wheels", out)
    return out / "upload" / "edge-runtime-amd64.zip"


LIMITED = (os.uname().machine != "x86_64" or os.geteuid() != 0) and "needs root on x86-64, for a network namespace"


@pytest.mark.skipif(bool(LIMITED), reason=str(LIMITED))
def test_archive_installs_and_serves_without_a_network_as_nobody(archive, tmp_path):
    made = edge_bundle(tmp_path / "made")
    search = make_bundle(tmp_path / "search", search=True)
    # nobody has to pass the folders above
    root = Path("/var/tmp") / f"shipyard-edge-{os.getpid()}"
    machine = Machine(root, free_port())
    try:
        machine.work.mkdir(parents=True)
        (machine.code / "edge-runtime-amd64").mkdir(parents=True)
        with zipfile.ZipFile(archive) as stream:
            stream.extractall(machine.code / "edge-runtime-amd64")
        machine.deploy(made)
        machine.deploy(type(made)(search.folder, "local-search", made.key), "local-search", beside=True)
        root.chmod(0o755)
        for path in (root, *root.rglob("*")):
            os.chown(path, 65534, 65534)
        _install_and_serve(machine, tmp_path)
    finally:
        shutil.rmtree(root)


def _install_and_serve(machine, tmp_path):
    """Run the lifecycle in a namespace of its own, where loopback is all the network that there is."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]
    trace = machine.root / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace)]
    within = f'ip link set lo up && {subprocess.list2cmdline(nobody)} "$@"'
    enter = ["unshare", "--net", "sh", "-c", within, "sh"]
    start = time.monotonic()
    done = subprocess.run(
        [*enter, *strace, *machine.command("install")], cwd=machine.work, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 120
    outbound(trace)
    # a second time there is nothing to do: the classic nucleus installs at each start
    again = time.monotonic()
    subprocess.run([*enter, *machine.command("install")], cwd=machine.work, check=True, timeout=60)
    assert time.monotonic() - again < 5
    process = subprocess.Popen(
        [*enter, *strace, *machine.command("startup")], cwd=machine.work, stderr=subprocess.PIPE, text=True
    )
    namespace = Path(f"/proc/{process.pid}/ns/net")
    try:
        while namespace.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        answers = within_namespace(namespace, machine.port)
    finally:
        stop(process)
    # the tokenizer makes token 7 of milk, which this graph adds to row 7
    assert answers == [200, 3, PRODUCTS[6]]
    outbound(trace)
    assert not list(machine.root.rglob("deviceid"))


def within_namespace(namespace, port):
    """Ask from a process that has entered the namespace."""
    code = (
        "import json, sys, time, urllib.request\n"
        "port, until = sys.argv[1], time.monotonic() + 60\n"
        "while True:\n"
        "    try:\n"
        "        ready = urllib.request.urlopen(f'http://127.0.0.1:{port}/readyz').status\n"
        "        break\n"
        "    except OSError:\n"
        "        if time.monotonic() > until: raise\n"
        "        time.sleep(0.1)\n"
        "body = json.dumps({'history': [], 'k': 3}).encode()\n"
        "answer = urllib.request.urlopen(f'http://127.0.0.1:{port}/edge-recommend/v1/recommend', body)\n"
        "body = json.dumps({'query': 'milk', 'k': 1}).encode()\n"
        "found = urllib.request.urlopen(f'http://127.0.0.1:{port}/local-search/v1/search', body)\n"
        "print(json.dumps([ready, len(json.load(answer)['products']), json.load(found)['products'][0]['product']]))\n"
    )
    done = subprocess.run(
        ["nsenter", f"--net={namespace}", sys.executable, "-c", code, str(port)],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outbound(trace):
    """Hold that no call named an address but a socket of this machine or loopback."""
    lines = [line for line in trace.read_text().splitlines() if "sa_family=AF_INET" in line]
    away = [line for line in lines if 'inet_addr("127.0.0.1")' not in line]
    assert away == []


def stop(process):
    """End the innermost of the processes that started one another: the others pass it on or end with it."""
    innermost = process.pid
    while children := Path(f"/proc/{innermost}/task/{innermost}/children").read_text().split():
        innermost = int(children[0])
    os.kill(innermost, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def test_installation_refuses_a_wheel_that_is_not_the_pinned_one(archive, tmp_path):
    code, work = tmp_path / "code", tmp_path / "work"
    (code / "wheels").mkdir(parents=True)
    work.mkdir()
    [line] = [line for line in LOCK.read_text().splitlines() if line.startswith("six==")]
    (code / "requirements.txt").write_text(line + "\n")
    (code / "installed-bytes").write_text("1\n")
    for name in ("six", "pip"):
        [wheel] = archive.parents[1].glob(f"wheels/amd64/{name}-*.whl")
        shutil.copy(wheel, code / "wheels")
    [wheel] = (code / "wheels").glob("six-*.whl")
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit, match="cannot be installed"):
        install.install(code, work)
    assert list(work.glob("*site-*")) == []
    wheel.write_bytes(whole)
    install.install(code, work)
    assert (install.site(code, work) / "six.py").is_file()


def test_installation_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "installed-bytes").write_text(f"{10**15}\n")
    with pytest.raises(SystemExit, match="disk is full"):
        install.install(tmp_path, tmp_path)
    monkeypatch.setattr(install, "PYTHON", (2, 7))
    with pytest.raises(SystemExit, match="Python 3"):
        install.install(tmp_path, tmp_path)


# --- startup ---------------------------------------------------------------------------------------------------------


@dataclass
class Device:
    """The shipped process on a folder of its own."""

    machine: Machine
    process: subprocess.Popen

    def ask(self, path, document=None):
        return ask(self.machine.port, path, document)

    def recommend(self, document, name="edge-recommend"):
        until = time.monotonic() + 60
        while self.ask("/readyz")[0] != 200 and time.monotonic() < until:
            time.sleep(0.05)
        return self.ask(f"/{name}/v1/recommend", document)


@pytest.fixture
def devices():
    """Start the component's process on a machine, and end it."""
    running = []

    def start(machine, *flags, program=("-m", "serve.greengrass.device")):
        machine.work.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, *program, "--work", str(machine.work),
            "--unarchived", str(machine.unarchived), "--models", machine.words, "--trusted-key", machine.trusted,
            "--port", str(machine.port), *flags,
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=(machine.root / "log").open("a"))
        running.append(process)
        return Device(machine, process)

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=30)


def test_a_deployed_model_that_fails_leaves_the_last_good_one_serving(devices, tmp_path):
    good, bad = edge_bundle(tmp_path / "good"), edge_bundle(tmp_path / "bad", first=1)
    bad = type(bad)(bad.folder, bad.name, good.key)
    machine = Machine(tmp_path / "machine", free_port())
    machine.deploy(good)
    first = devices(machine)
    status, answer = first.recommend({"history": [], "k": 2})
    assert status == 200 and [p["product"] for p in answer["products"]] == PRODUCTS[:2]
    first.process.terminate()
    assert first.process.wait(timeout=30) == 0

    # attested and whole, but its golden answers are another machine's
    bad.rewrite(lambda document: document["golden"][0]["answer"]["products"][0].update(score=5.0))
    machine.deploy(bad, version="1.0.8")
    second = devices(machine)
    status, answer = second.recommend({"history": [], "k": 2})
    assert status == 200 and [p["product"] for p in answer["products"]] == PRODUCTS[:2]
    told = second.ask("/status")[1]
    assert told["phase"] == "failed" and "golden answer 0 differs" in told["fault"]


def test_a_model_that_is_too_slow_or_not_whole_is_not_served(devices, tmp_path):
    good = edge_bundle(tmp_path / "good")
    machine = Machine(tmp_path / "machine", free_port())
    folder = machine.deploy(good)
    slow = devices(machine, "--budget-ms", "0.001")
    assert slow.process.wait(timeout=60) == 1
    assert "too slow on this device" in (machine.root / "log").read_text()
    whole = devices(machine)
    assert whole.recommend({"history": [], "k": 2})[0] == 200
    whole.process.terminate()
    assert whole.process.wait(timeout=30) == 0

    # a bit of the installed copy turns: the component's own files are taken again
    [graph] = (machine.work / "models").rglob("model.onnx")
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    mended = devices(machine)
    assert mended.recommend({"history": [], "k": 2})[0] == 200
    assert graph.read_bytes() == (folder / "model.onnx").read_bytes() != bytes(content)


def test_what_a_library_says_of_a_model_is_a_refusal_and_ends_nothing(tmp_path):
    """The tokenizer of a trusted bundle that no library reads: the generation fails, the process does not."""
    made = make_bundle(tmp_path / "search", search=True)
    tokenizer = made.folder / "tokenizer.json"
    tokenizer.write_text('{"version": "9"}')

    def change(document):
        [file] = [file for file in document["files"] if file["path"] == tokenizer.name]
        file |= {"sha256": sha256_file(tokenizer), "bytes": tokenizer.stat().st_size}

    made.rewrite(change)
    store = types.SimpleNamespace(
        folder=lambda *_: made.folder, attestation=lambda *_: made.attestation, keys=made.keys
    )
    with pytest.raises(ShipyardError, match="search: cannot be opened on this device"):
        device.prove(store, "search", "", 1000.0)


HELD = """
import sys, threading, time
from serve.greengrass import agent, device
agent.Agent.run = lambda *_: time.sleep(600)  # as long as an object may be read
join = threading.Thread.join
threading.Thread.join = lambda self, timeout=None: join(self, timeout and min(timeout, 0.1))
sys.exit(device.main())
"""


def test_neither_totals_that_are_no_text_nor_a_download_that_hangs_hold_a_device_up(devices, tmp_path):
    machine = Machine(tmp_path / "machine", free_port())
    machine.deploy(edge_bundle(tmp_path / "good"))
    machine.work.mkdir(parents=True)
    (machine.work / "telemetry.json").write_bytes(b"\xff\xfe\0")
    running = devices(machine, program=("-c", HELD))
    try:
        assert running.recommend({"history": []})[0] == 200
        running.process.terminate()
        assert running.process.wait(timeout=15) == 0
    finally:
        running.process.kill()


def test_local_clients_are_bounded_and_told_what_is_wrong(devices, tmp_path):
    machine = Machine(tmp_path / "machine", free_port())
    machine.deploy(edge_bundle(tmp_path / "good"))
    running = devices(machine)
    status, answers = running.recommend([{"history": [], "k": 1}] * 3)
    assert status == 200 and len(answers) == 3
    assert running.recommend([{"history": []}] * 33)[0] == 400
    assert running.recommend({"histori": []})[1]["error"].startswith("request 0: unknown key")
    assert running.recommend({"history": []}, name="intent")[0] == 404
    assert running.ask("/edge-recommend/v1/search", {})[0] == 404
    held = [socket.create_connection(("127.0.0.1", machine.port)) for _ in range(16)]
    try:
        time.sleep(0.3)
        assert ask(machine.port, "/healthz", seconds=0)[0] == 503
    finally:
        for connection in held:
            connection.close()
    assert running.recommend({"history": []})[0] == 200


def test_words_of_a_deployment():
    found = device.parse_models("shipyard.a/1.0.1/a/k:x+/= shipyard.b/1.0.2/b/k:y", Path("/un"))
    assert found == {
        "a": (Path("/un/shipyard.a/1.0.1/a"), "k:x+/="), "b": (Path("/un/shipyard.b/1.0.2/b"), "k:y"),
    }  # fmt: skip
    for wrong in ("a/b/c", "a/../c/d", "//c/d"):
        with pytest.raises(Exception, match="--models: wrong"):
            device.parse_models(wrong, Path("/un"))
