"""Swap: let the fleet that is up on this machine serve another shard of fresh items, without an interruption."""

import dataclasses
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

from models.release import Release, trusted_key
from serve.errors import ShipyardError
from serve.files import read_json, sha256_file
from serve.trust import MANIFEST, Keys
from shipyard.fleet import CURRENT, SECONDS, STATE, is_running, last_line, members, note, spawn, wait


def bring(release: Release, keys: Keys, build: Path, bundle: Path, attestation: str) -> str | None:
    """Let the fleet that is up serve another shard of items; return where, None where it is not up.

    A server that runs swaps it in; the first one is started.

    Raises:
        ShipyardError: the server refuses the shard and goes on with the one before, or does not get ready.
    """
    folder = build / "up"
    state = read_json(folder / STATE) if (folder / STATE).is_file() else {}
    running = {one["name"]: one for one in state.get("members", []) if is_running(one)}
    if state.get("version") != release.version or not running:
        return None
    port = int(str(state["members"][0]["url"]).rpartition(":")[2])
    fleet = members(release, build, port)
    member = dataclasses.replace(fleet[-1], bundle=bundle, attestation=attestation)
    end = time.monotonic() + SECONDS
    if member.name not in running:
        process = spawn(member, fleet, trusted_key(release, keys), folder)
        note(state, member, process, folder)
        wait(member, process, folder, end)
        return member.url
    (folder / CURRENT).write_text(json.dumps({"bundle": str(bundle), "attestation": attestation}))
    log = folder / f"{member.name}.log"
    before = log.read_text().count("swapped")
    os.kill(running[member.name]["pid"], signal.SIGHUP)
    while log.read_text().count("swapped") == before and time.monotonic() < end:
        time.sleep(0.05)
    with urllib.request.urlopen(f"{member.url}/metrics", timeout=10) as told:  # noqa: S310 - an address of our own
        if f'manifest="{sha256_file(bundle / MANIFEST)[:16]}"' not in told.read().decode():
            raise ShipyardError(f"{member.name}: {last_line(member, folder)}")
    return member.url
