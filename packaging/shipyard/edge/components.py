"""Components: what of a release runs on edge devices, published to Greengrass once and never changed.

A version follows from its content, so what is there already is compared and left.
"""

import base64
import hashlib
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from models.release import Artifact, Release
from serve.errors import ShipyardError
from serve.greengrass.delta import make_delta
from serve.greengrass.words import Delta, Pointer, delta_key
from shipyard.edge.lock import component, edge_artifacts, recipe_of
from shipyard.upload import Store, upload

SECONDS_TO_DEPLOYABLE = 300.0

MEND = "check the region, your credentials and your rights; the same command goes on where it stopped"


def call(work: Callable[..., Any], **arguments: Any) -> Any:
    """Call AWS; say a refusal in one line.

    Raises:
        ShipyardError: it refuses, or does not answer. botocore itself has tried again where that helps.
    """
    try:
        return work(**arguments)
    except (ClientError, BotoCoreError) as fault:
        raise ShipyardError(f"edge: {fault}", mend=MEND) from None


def publish_component(
    greengrass: Any, artifact: Artifact, bucket: str, *, account: str, region: str,
    wait: float = SECONDS_TO_DEPLOYABLE, pause: float = 2.0,
) -> bool:  # fmt: skip
    """Create the version of an artifact's component unless it is there, wait for it, and compare the service's digests.

    Returns:
        Whether it was created.

    Raises:
        ShipyardError: Greengrass refuses it, finds it not deployable, or holds other bytes under this version.
    """
    name, version = component(artifact)
    recipe = recipe_of(artifact, bucket)
    arn = f"arn:aws:greengrass:{region}:{account}:components:{name}:versions:{version}"
    created = True
    try:
        # the same content has the same token, so that a try which was cut off counts once
        token = hashlib.sha256(recipe).hexdigest()
        greengrass.create_component_version(inlineRecipe=recipe, clientToken=token)
    except (ClientError, BotoCoreError) as fault:
        if not isinstance(fault, ClientError) or fault.response["Error"]["Code"] != "ConflictException":
            raise ShipyardError(f"edge: {name} {version}: {fault}", mend=MEND) from None
        created = False
    until = time.monotonic() + wait
    while (status := call(greengrass.describe_component, arn=arn)["status"])["componentState"] != "DEPLOYABLE":
        if status["componentState"] != "REQUESTED" or time.monotonic() > until:
            raise ShipyardError(
                f"edge: {name} {version}: not deployable", value=status["componentState"],
                allowed=f"DEPLOYABLE within {wait:.0f} s", mend=status.get("message") or "see it in the console",
            )  # fmt: skip
        time.sleep(pause)
    _compare(call(greengrass.get_component, arn=arn, recipeOutputFormat="JSON")["recipe"], artifact, bucket)
    return created


def _compare(text: bytes, artifact: Artifact, bucket: str) -> None:
    """Compare the digests that the service computed from the bucket with those of the signed release."""
    name, version = component(artifact)
    wanted = {
        f"s3://{bucket}/{artifact.key}{file.path}": base64.b64encode(bytes.fromhex(file.sha256)).decode()
        for file in artifact.files
    }
    recipe = json.loads(text)
    found = {a.get("Uri", a.get("URI")): a.get("Digest") for m in recipe["Manifests"] for a in m["Artifacts"]}
    if recipe["ComponentVersion"] != version or found != wanted:
        raise ShipyardError(
            f"edge: {name} {version}: Greengrass holds another content", value=str(found)[:300], allowed=str(wanted)[:300],
            mend="whoever made that version did not make it from this release: deprecate it, and release again",
        )  # fmt: skip


def pointer(artifact: Artifact) -> Pointer:
    """Return how a device is told of a model, without a delta."""
    [file] = artifact.files
    return Pointer(component(artifact)[1], artifact.manifest, artifact.attestation, file.sha256, file.bytes)


def publish_deltas(found: Release, others: list[Release], local: Path, store: Store) -> dict[str, dict[str, Delta]]:
    """Make and upload the patches that lead from other releases' models to this one's, where they are the smaller.

    Archives come from `local`, the folder in a bucket's layout where releases were made; a base that is not there any more
    only means that its devices take the full archive.

    Returns:
        The deltas by model and base.
    """
    made: dict[str, dict[str, Delta]] = {}
    for artifact in found.of("greengrass-model"):
        target = local / artifact.key / artifact.files[0].path
        bases = [a for r in others for a in r.of("greengrass-model") if a.name == artifact.name]
        for base in bases:
            archive = local / base.key / base.files[0].path
            if base.manifest == artifact.manifest or not archive.is_file() or not target.is_file():
                continue
            with tempfile.TemporaryDirectory() as folder:
                with zipfile.ZipFile(archive) as stream:
                    stream.extractall(Path(folder, "base"))
                patch = make_delta(Path(folder, "base"), target.read_bytes())
                if len(patch) >= artifact.files[0].bytes:
                    continue
                digest = hashlib.sha256(patch).hexdigest()
                file = Path(folder, "patch")
                file.write_bytes(patch)
                key = delta_key(artifact.name, base.manifest, artifact.manifest)
                if (same := store.holds(key, file, digest)) is None:
                    store.put(key, file, digest, lambda _: None)
                elif not same:
                    # another version of the compressor made it; it leads to the same archive or is not taken
                    continue
            made.setdefault(artifact.name, {})[base.manifest] = Delta(base.manifest, digest, len(patch))
    return made


def _there(store: Store, artifact: Artifact) -> bool:
    """Say whether a store has all files of an artifact, by their sizes; Greengrass' own digests of them are compared yet."""
    sizes = {found.key: found.bytes for found in store.objects(artifact.key)}
    return all(sizes.get(artifact.key + file.path) == file.bytes for file in artifact.files)


def publish_edge(
    found: Release, others: list[Release], local: Path, store: Store, greengrass: Any, bucket: str, *, account: str,
    region: str, progress: Callable[[str, int, int], None], pause: float = 2.0,
) -> tuple[dict[str, Any], dict[str, dict[str, Delta]]]:  # fmt: skip
    """Upload what of a release runs on devices, with its deltas, and publish its components.

    What this machine does not have, as on a way back, has to be in the store already.

    Returns:
        What was done, for machines, and the deltas by model and base.
    """
    sent = sum(
        upload(store, a.model_dump(), local / a.key, progress)
        for a in edge_artifacts(found)
        if (local / a.key).exists() or not _there(store, a)
    )
    deltas = publish_deltas(found, others, local, store)
    created = [
        "@".join(component(artifact))
        for artifact in edge_artifacts(found)
        if publish_component(greengrass, artifact, bucket, account=account, region=region, pause=pause)
    ]
    sizes = {name: {base: delta.bytes for base, delta in bases.items()} for name, bases in deltas.items()}
    return {"version": found.version, "bytes_sent": sent, "created": created, "delta_bytes": sizes}, deltas
