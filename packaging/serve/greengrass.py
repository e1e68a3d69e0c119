"""The edge's components: recipes for the runtime (code) and for models (data), valid on the classic nucleus and on lite.

Recipes keep to what both read: capital and small letters as here, strings alone, no braces in scripts but recipe
variables, under 8,000 bytes. @WORDS@ are filled when a stack is synthesized.
"""

from typing import Any

PUBLISHER = "Shipyard"
PLATFORMS = ("amd64", "aarch64")
RUNTIME_COMPONENT = "shipyard.edge-runtime"
PORT = 8180


def model_component(artifact: str) -> str:
    """Return the name of the component that carries a model."""
    return f"shipyard.{artifact}"


def _recipe(name: str, version: str, description: str, uri: str, **rest: Any) -> dict[str, Any]:
    lifecycle = rest.pop("Lifecycle", {})
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
                "Lifecycle": lifecycle,
            }
            for architecture in PLATFORMS
        ],
    }


def model_recipe(artifact: str, version: str, uri: str) -> dict[str, Any]:
    """Return the recipe of a component that carries a model's bundle and runs nothing."""
    return _recipe(model_component(artifact), version, f"Model bundle {artifact}", uri)


def runtime_recipe(archive: str, version: str, uri: str) -> dict[str, Any]:
    """Return the recipe of the component that serves the models of this device on loopback.

    `archive` is the zip's name without its ending. The deployment sets `models` (component/version/archive/attestation,
    one a model, with spaces between) and `trustedKey`.
    """
    folder = f"{{artifacts:decompressedPath}}/{archive}"
    return _recipe(
        RUNTIME_COMPONENT,
        version,
        "Serves model bundles on loopback after it has verified them",
        uri,
        ComponentConfiguration={"DefaultConfiguration": {"models": "", "trustedKey": "", "port": str(PORT)}},
        Lifecycle={
            "Setenv": {"ORT_DISABLE_TELEMETRY": "1"},
            "install": {"Timeout": "120", "Script": f'sh "{folder}/install.sh"'},
            "run": {
                "Script": f'exec sh "{folder}/run.sh" "{folder}" "{{kernel:rootPath}}/packages/artifacts-unarchived" '
                '"{configuration:/models}" "{configuration:/trustedKey}" "{configuration:/port}"'
            },
        },
    )


INSTALL = """\
#!/bin/sh
# Check what the runtime needs; nothing is downloaded.
set -eu
python3 - <<'PYTHON'
import importlib, sys
if sys.version_info < (3, 11):
    sys.exit("error: Python %d.%d; allowed: 3.11 or newer" % sys.version_info[:2])
for name in ("cryptography", "httptools", "numpy", "onnxruntime", "prometheus_client", "rfc8785", "uvicorn", "uvloop"):
    try:
        importlib.import_module(name)
    except ImportError:
        sys.exit("error: no Python package %s; mend: install it on the device image" % name)
PYTHON
"""

RUN = """\
#!/bin/sh
# run.sh CODE UNARCHIVED MODELS TRUSTED_KEY PORT: serve each model on its own port of loopback, counted from PORT.
set -eu
code=$1 unarchived=$2 models=$3 port=$5
export PYTHONPATH="$code" ORT_DISABLE_TELEMETRY=1 SHIPYARD_TRUSTED_KEY="$4"
test -n "$models" || { echo "error: the deployment names no model; mend: deploy by the stack" >&2; exit 1; }
pids=""
trap 'kill $pids 2>/dev/null; exit 0' TERM INT
for model in $models; do
  component=$(echo "$model" | cut -d/ -f1) version=$(echo "$model" | cut -d/ -f2)
  archive=$(echo "$model" | cut -d/ -f3) attestation=$(echo "$model" | cut -d/ -f4-)
  python3 -m serve.server --bundle "$unarchived/$component/$version/$archive" --artifact "$archive" \\
    --attestation "$attestation" --port "$port" --threads 1 &
  pids="$pids $!"
  port=$((port + 1))
done
# one that ends, ends all: the nucleus then starts the component again
while sleep 1; do
  for pid in $pids; do
    kill -0 "$pid" 2>/dev/null && continue
    wait "$pid" && status=1 || status=$?
    kill $pids 2>/dev/null || true
    exit "$status"
  done
done
"""
