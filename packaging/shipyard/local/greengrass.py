"""A Greengrass endpoint on loopback that is driven by botocore's own service model, for moto has none.

Every request is matched to an operation of the model and checked against its shapes, with enumerations, patterns and bounds,
which botocore's client does not check; every answer is checked too. State is what a delivery asks for: versions are
immutable, REQUESTED before DEPLOYABLE, and their digests are computed from the objects in the bucket.
"""

import base64
import datetime
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import botocore.session
import regex
from botocore.validate import ParamValidator

MODEL = botocore.session.get_session().get_service_model("greengrassv2")


def match(method: str, path: str) -> tuple[Any, dict[str, str]]:
    """Return the operation of a request, and the values in its path."""
    for name in MODEL.operation_names:
        operation = MODEL.operation_model(name)
        template = operation.http["requestUri"].partition("?")[0]
        pattern = re.sub(r"\\\{(\w+)\\?\+?\\\}", r"(?P<\1>.+)", re.escape(template))
        if operation.http["method"] == method and (found := re.fullmatch(pattern, path)):
            return operation, {key: urllib.parse.unquote(value) for key, value in found.groupdict().items()}
    raise LookupError(f"{method} {path}")


def check(value: Any, shape: Any, where: str = "") -> None:
    """Name what a value violates of a shape, beyond its type."""
    told = shape.metadata
    if shape.type_name == "structure":
        for key, inner in value.items():
            check(inner, shape.members[key], f"{where}.{key}")
    elif shape.type_name in ("list", "map"):
        items = value if shape.type_name == "list" else value.values()
        assert told.get("min", 0) <= len(items) <= told.get("max", 10**9), where
        for inner in items:
            check(inner, shape.member if shape.type_name == "list" else shape.value, where)
    elif shape.type_name == "string":
        assert not told.get("enum") or value in told["enum"], f"{where}: {value}: not of {told['enum']}"
        assert told.get("min", 0) <= len(value) <= told.get("max", 10**9), f"{where}: length of {value}"
        assert not told.get("pattern") or regex.search(told["pattern"], value), (
            f"{where}: {value}: not {told['pattern']}"
        )
    elif shape.type_name in ("integer", "long", "double", "float"):
        assert told.get("min", value) <= value <= told.get("max", value), f"{where}: {value}"


class Refused(Exception):
    """An error of the service, by its code and HTTP status."""

    def __init__(self, code: str, status: int, message: str = "refused") -> None:
        super().__init__(message)
        self.code, self.status = code, status


class Endpoint(ThreadingHTTPServer):
    """The service of one account and region; `read` reads an object of a bucket, `faults` are answered first, one a request.

    `met` is told each operation and what does it: a rehearsal puts its faults there.
    """

    daemon_threads = True

    def __init__(
        self, read: Callable[[str], bytes | None], account: str = "111111111111", region: str = "us-east-1",
        met: Callable[[str, Callable[[], Any]], Any] = lambda _, work: work(),
    ) -> None:  # fmt: skip
        super().__init__(("127.0.0.1", 0), Handler)
        self.read, self.met = read, met
        self.faults: list[Refused] = []
        self.calls: list[str] = []
        self.versions: dict[str, dict[str, Any]] = {}
        self.deployments: dict[str, dict[str, Any]] = {}
        self.fate = "DEPLOYABLE"
        self.lock = threading.Lock()
        self._arn = f"arn:aws:greengrass:{region}:{account}:components"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def CreateComponentVersion(self, inlineRecipe: str | bytes, clientToken: str | None = None, **_: Any) -> Any:
        """Make a version once, with the digests of its artifacts as they lie in the bucket."""
        recipe = json.loads(inlineRecipe)
        name, version = recipe["ComponentName"], recipe["ComponentVersion"]
        arn = f"{self._arn}:{name}:versions:{version}"
        if arn in self.versions:
            raise Refused("ConflictException", 409, f"Component [{name} : {version}] already exists")
        for manifest in recipe["Manifests"]:
            for artifact in manifest["Artifacts"]:
                content = self.read(artifact["Uri"])
                if content is None:
                    raise Refused("ValidationException", 400, "Specified artifact resource cannot be accessed")
                artifact["Algorithm"] = "SHA-256"
                artifact["Digest"] = base64.b64encode(hashlib.sha256(content).digest()).decode()
        self.versions[arn] = {"recipe": recipe, "asked": 0}
        return {
            "arn": arn, "componentName": name, "componentVersion": version, "creationTimestamp": _now(),
            "status": {"componentState": "REQUESTED"},
        }  # fmt: skip

    def DescribeComponent(self, arn: str) -> Any:
        """Say that a version is requested, and from the second time on what became of it."""
        if arn not in self.versions:
            raise Refused("ResourceNotFoundException", 404)
        self.versions[arn]["asked"] += 1
        ready = self.versions[arn]["asked"] > 1
        return {"arn": arn, "status": {"componentState": self.fate if ready else "REQUESTED", "message": self.fate}}

    def GetComponent(self, arn: str, recipeOutputFormat: str | None = None) -> Any:
        """Return a version's recipe, with its digests."""
        return {"recipeOutputFormat": "JSON", "recipe": json.dumps(self.versions[arn]["recipe"]).encode()}

    def CreateDeployment(
        self, targetArn: str, components: Mapping[str, Any], clientToken: str | None = None, **more: Any
    ) -> Any:
        """Deploy components that are there to a thing group."""
        for name, entry in components.items():
            arn = f"{self._arn}:{name}:versions:{entry['componentVersion']}"
            if not name.startswith("aws.") and arn not in self.versions:
                raise Refused("ValidationException", 400, f"no such component {name}")
        identifier = f"{len(self.deployments):08d}-0000-0000-0000-000000000000"
        for entry in self.deployments.values():
            if entry["targetArn"] == targetArn:
                entry["isLatestForTarget"] = False
        self.deployments[identifier] = {
            "targetArn": targetArn, "deploymentId": identifier, "components": components, "deploymentStatus": "ACTIVE",
            "creationTimestamp": _now() + len(self.deployments), "isLatestForTarget": True, **more,
        }  # fmt: skip
        return {"deploymentId": identifier}

    def GetDeployment(self, deploymentId: str) -> Any:
        """Return a deployment."""
        return self.deployments[deploymentId]

    def ListDeployments(self, targetArn: str | None = None, historyFilter: str | None = None, **_: Any) -> Any:
        """Return the deployments of a thing group, or its latest one alone."""
        found = [d for d in self.deployments.values() if d["targetArn"] == targetArn]
        if historyFilter == "LATEST_ONLY":
            found = [d for d in found if d["isLatestForTarget"]]
        keys = MODEL.shape_for("Deployment").members
        return {"deployments": [{k: v for k, v in d.items() if k in keys} for d in found]}

    def CancelDeployment(self, deploymentId: str) -> Any:
        """End a deployment."""
        self.deployments[deploymentId]["deploymentStatus"] = "CANCELED"
        return {"message": "canceled"}


def _now() -> int:
    return int(datetime.datetime.now(datetime.UTC).timestamp())


class Handler(BaseHTTPRequestHandler):
    """One request, checked against the service's model."""

    server: Endpoint

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code = ""
        try:
            operation, given = self._read(url, body)
            # not under the lock: a fault may hold it for long
            status, document = 200, self.server.met(operation.name, lambda: self._answer(operation, given))
        except Refused as fault:
            status, document, code = fault.status, {"message": str(fault)}, fault.code
        except (AssertionError, LookupError, TypeError) as fault:
            status, document, code = 400, {"message": f"{type(fault).__name__}: {fault}"}, "ValidationException"
        text = json.dumps(document, default=lambda value: base64.b64encode(value).decode()).encode()
        self.send_response(status)
        if status != 200:
            self.send_header("x-amzn-ErrorType", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = do_PUT = _handle

    def _read(self, url: urllib.parse.SplitResult, body: bytes) -> tuple[Any, dict[str, Any]]:
        """Return the operation of a request and its checked input."""
        operation, values = match(self.command, url.path)
        self.server.calls.append(operation.name)
        with self.server.lock:
            if self.server.faults:
                raise self.server.faults.pop(0)
        shape = operation.input_shape
        query = dict(urllib.parse.parse_qsl(url.query))
        given = {**values, **(json.loads(body) if body else {})}
        for name, member in shape.members.items():
            location = member.serialization.get("locationName", name)
            if member.serialization.get("location") == "querystring" and location in query:
                given[name] = query[location]
            if member.type_name == "blob" and name in given:
                given[name] = base64.b64decode(given[name])
        assert given.keys() <= shape.members.keys(), f"unknown: {sorted(given.keys() - shape.members.keys())}"
        assert not (report := ParamValidator().validate(given, shape)).has_errors(), report.generate_report()
        check(given, shape)
        return operation, given

    def _answer(self, operation: Any, given: Mapping[str, Any]) -> Any:
        with self.server.lock:
            answer = getattr(self.server, operation.name)(**given)
        plain = {k: v for k, v in answer.items() if "imestamp" not in k}
        check(plain, operation.output_shape)
        return answer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
