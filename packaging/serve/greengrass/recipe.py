"""The edge's components: recipes for the runtime (code) and for models (data), valid on the classic nucleus and on lite.

Recipes keep to what both read: capital and small letters as here, strings alone, no braces in scripts but recipe
variables, under 8,000 bytes. @WORDS@ are filled when a stack is synthesized.
"""

from collections.abc import Mapping
from typing import Any

from serve.greengrass.words import ANSWER, ASK, SHADOW

PUBLISHER = "Shipyard"
PLATFORMS = ("amd64", "aarch64")
RUNTIME_COMPONENT = "shipyard.edge-runtime"
TOKEN_EXCHANGE = "aws.greengrass.TokenExchangeService"  # noqa: S105 -- a component's name
PORT = 8180
COMPATIBLE = ">=1.0.0 <2.0.0"
"""Models that this runtime can serve, in the words that lite reads too; a deployment pins one of them exactly."""


def model_component(artifact: str) -> str:
    """Return the name of the component that carries a model."""
    return f"shipyard.{artifact}"


def _recipe(name: str, version: str, description: str, uris: Mapping[str, str], **rest: Any) -> dict[str, Any]:
    lifecycle = rest.pop("Lifecycle", dict[str, Any]())
    return {
        "RecipeFormatVersion": "2020-01-25",
        "ComponentName": name,
        "ComponentVersion": version,
        "ComponentDescription": description,
        "ComponentPublisher": PUBLISHER,
        **rest,
        "Manifests": [
            {
                "Name": f"linux-{architecture}",
                # without a runtime of "*" nucleus lite passes the manifest over
                "Platform": {"os": "linux", "architecture": architecture, "runtime": "*"},
                "Artifacts": [{"Uri": uri, "Unarchive": "ZIP", "Permission": {"Read": "OWNER"}}],
                "Lifecycle": lifecycle.get(architecture, {}),
            }
            for architecture, uri in uris.items()
        ],
    }


def model_recipe(artifact: str, version: str, uri: str) -> dict[str, Any]:
    """Return the recipe of a component that carries a model's bundle and runs nothing."""
    uris = dict.fromkeys(PLATFORMS, uri)
    return _recipe(model_component(artifact), version, f"Model bundle {artifact}", uris)


def archive(architecture: str) -> str:
    """Return the name of the runtime's archive for an architecture, without its ending."""
    return f"edge-runtime-{architecture}"


def runtime_recipe(version: str, prefix: str, models: tuple[str, ...]) -> dict[str, Any]:
    """Return the recipe of the component that serves the models of this device on loopback.

    Below `prefix` (s3://bucket/key/) lies an archive for each architecture; `models` are the artifacts that it serves. The
    deployment sets `models` (component/version/archive/attestation, one a model, with spaces between) and `trustedKey`.
    Every device may speak of its own shadow alone.
    """
    shadow = f"$aws/things/{{iot:thingName}}/shadow/name/{SHADOW}"
    proxy = {
        f"{RUNTIME_COMPONENT}:mqttproxy:1": {
            "policyDescription": "Ask for what is wanted and report what is served",
            "operations": ["aws.greengrass#PublishToIoTCore"],
            "resources": [f"{shadow}/get", f"{shadow}/update"],
        },
        f"{RUNTIME_COMPONENT}:mqttproxy:2": {
            "policyDescription": "Hear what is wanted",
            "operations": ["aws.greengrass#SubscribeToIoTCore"],
            "resources": [f"{shadow}/get/accepted", f"{shadow}/get/rejected", f"{shadow}/update/delta"],
        },
    }
    clients = {
        f"{RUNTIME_COMPONENT}:pubsub:1": {
            "policyDescription": "Hear what local clients ask",
            "operations": ["aws.greengrass#SubscribeToTopic"],
            "resources": [ASK],
        },
        f"{RUNTIME_COMPONENT}:pubsub:2": {
            "policyDescription": "Answer them",
            "operations": ["aws.greengrass#PublishToTopic"],
            "resources": [f"{ANSWER}/*"],
        },
    }
    configuration = {
        "models": "", "trustedKey": "", "store": "s3://@BUCKET@", "port": str(PORT), "budgetMs": "50", "pollSeconds": "3600",
        "accessControl": {"aws.greengrass.ipc.mqttproxy": proxy, "aws.greengrass.ipc.pubsub": clients},
    }  # fmt: skip
    needed = {model_component(name): COMPATIBLE for name in models} | {TOKEN_EXCHANGE: ">=2.0.0 <3.0.0"}
    return _recipe(
        RUNTIME_COMPONENT,
        version,
        "Serves model bundles on loopback after it has verified them",
        {architecture: f"{prefix}{archive(architecture)}.zip" for architecture in PLATFORMS},
        ComponentConfiguration={"DefaultConfiguration": configuration},
        ComponentDependencies={
            name: {"VersionRequirement": version, "DependencyType": "HARD"} for name, version in needed.items()
        },
        Lifecycle={architecture: _lifecycle(architecture, version) for architecture in PLATFORMS},
    )


def _lifecycle(architecture: str, version: str) -> dict[str, Any]:
    """Return install and startup; startup lasts until the self-test has passed and the process says RUNNING."""
    folder = f'"{{artifacts:decompressedPath}}/{archive(architecture)}"'
    words = (
        f'{folder} "{{work:path}}" "{{kernel:rootPath}}/packages/artifacts-unarchived" "{{configuration:/models}}" '
        '"{configuration:/trustedKey}" "{configuration:/port}" "{iot:thingName}" "{configuration:/store}" '
        f'"{{configuration:/budgetMs}}" "{{configuration:/pollSeconds}}" "{version}" ipc'
    )
    script = f'"{{artifacts:decompressedPath}}/{archive(architecture)}'
    return {
        "Setenv": {"ORT_DISABLE_TELEMETRY": "1"},
        "install": {"Timeout": "600", "Script": f'sh {script}/install.sh" {folder} "{{work:path}}"'},
        "startup": {"Timeout": "180", "Script": f'exec sh {script}/run.sh" {words}'},
    }


FIND_PYTHON = """\
python=$(command -v python3.11 || command -v python3) || { echo "error: no Python; allowed: python3.11" >&2; exit 1; }
"""

INSTALL = f"""\
#!/bin/sh
# install.sh CODE WORK: install the wheels of this component; nothing is downloaded.
set -eu
{FIND_PYTHON}exec "$python" -I "$1/serve/greengrass/install.py" "$1" "$2"
"""

RUN = f"""\
#!/bin/sh
# run.sh CODE WORK UNARCHIVED MODELS TRUSTED_KEY PORT THING STORE BUDGET_MS POLL_S VERSION LINK: serve until SIGTERM.
set -eu
{FIND_PYTHON}code=$1 work=$2
site=$("$python" -I "$code/serve/greengrass/install.py" --where "$code" "$work")
export PYTHONPATH="$code:$site" PYTHONPYCACHEPREFIX="$work/pycache" PYTHONUNBUFFERED=1
export ORT_DISABLE_TELEMETRY=1 OMP_WAIT_POLICY=PASSIVE
exec "$python" -m serve.greengrass.device --work "$work" --unarchived "$3" --models "$4" --trusted-key "$5" --port "$6" \\
  --thing "$7" --store "$8" --budget-ms "$9" --poll-s "${{10}}" --version "${{11}}" --link "${{12}}"
"""
