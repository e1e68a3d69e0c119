"""Look: into releases and bundles, for people and for machines. It changes nothing but the page that it writes."""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from models.release import Release, read_release
from serve.errors import ShipyardError
from serve.files import read_json
from serve.trust import MANIFEST, load_keys
from shipyard.console import Reporter, print_release, release_markdown
from shipyard.diff import diff, diff_bundles, lines, same
from shipyard.papers.files import BOM, CARD, FIGURES, read_paper, verify_papers
from shipyard.upload import open_store
from shipyard.verify import verify_bundle, verify_store


def look(chosen: argparse.Namespace, reporter: Reporter) -> int:
    """Look into releases and bundles, which changes nothing."""
    if chosen.verb == "diff":
        found = _difference(chosen.old, chosen.new)
        print(json.dumps(found, ensure_ascii=False) if chosen.json else "\n".join(lines(found)))
        return int(chosen.exit_code and not same(found))
    if chosen.verb == "inspect":
        if _is_release(chosen.path):
            release = open_release(chosen.path)
            if chosen.markdown:
                print(release_markdown(release))
                return 0
            return print_found(release, chosen.json)
        module = importlib.import_module("shipyard.inspect")
        told = module.inspect(_bundle(chosen.path))
        print(json.dumps(told, ensure_ascii=False) if chosen.json else "\n".join(module.lines(told)))
        return 0
    release, keys = open_release(chosen.release), load_keys(chosen.release.parent / "keys")
    if chosen.verb in ("sbom", "card"):
        text = read_paper(chosen.release, release, keys, BOM if chosen.verb == "sbom" else CARD)
        print(json.dumps({chosen.verb: text}) if chosen.json and chosen.verb == "card" else text, end="")
        return 0
    done: dict[str, object] = {"version": release.version, "key_id": release.signature.key_id}
    done["papers"] = len(verify_papers(chosen.release, release, keys))
    if chosen.bundle is not None:
        done["bundle"] = verify_bundle(chosen.bundle, release, keys)["name"]
    if chosen.store is not None:
        done["bytes_read"] = verify_store(release, open_store(chosen.store), reporter.progress)
    print(json.dumps(done) if chosen.json else "verified " + ", ".join(f"{k} {v}" for k, v in done.items()))
    return 0


def report(chosen: argparse.Namespace, root: Path, build: Path, reporter: Reporter) -> int:
    """Write the page of a release that is there."""
    found = open_release(chosen.release)
    folders = chosen.release.parent, root / "releases"
    previous = open_release(chosen.previous) if chosen.previous is not None else replaced(found, folders, reporter)
    page = write_page(chosen.release, previous, chosen.cost, chosen.out or build / "reports" / f"{found.version}.html")
    reporter.line(f"report   {page}")
    if chosen.json:
        print(json.dumps({"report": str(page)}))
    return 0


def replaced(found: Release, folders: Sequence[Path], reporter: Reporter) -> Release | None:
    """Return the release that one replaces, where it lies; one that is not trusted any more is told, and ends nothing."""
    for path in (folder / f"{found.replaces}.json" for folder in folders):
        if path.is_file():
            try:
                return open_release(path)
            except ShipyardError as fault:
                reporter.line(f"report   compares with nothing: {fault}")
                return None
    return None


def write_page(release: Path, old: Release | None, cost: Path | None, out: Path) -> Path:
    """Write the page of a release; `old` is what to compare with, `cost` a file of prices, if any."""
    found = open_release(release)
    figures, card = "{}", ""
    if found.papers:
        keys = load_keys(release.parent / "keys")
        figures, card = (read_paper(release, found, keys, name) for name in (FIGURES, CARD))
    record = json.loads(figures) | {"title": f"Release {found.version}", "profile": found.profile}
    prices = None if cost is None else read_json(cost)
    if prices is not None and not str(prices.get("schema")).startswith("shipyard.cost/"):
        raise ShipyardError(f"{cost}: not a cost report", mend="shipyard cost --save FILE writes one")
    out.parent.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module("shipyard.pages.report")  # not at the top: it draws
    page: Path = module.report(record, out, found, old, prices, card)
    return page


def newest(build: Path) -> Path:
    """Return the newest local release."""
    made = sorted((build / "releases").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not made:
        raise ShipyardError(f"{build / 'releases'}: no release", mend="shipyard release")
    return made[-1]


def open_release(path: Path, oldest: int = 0) -> Release:
    """Read and verify a release file with the keys beside it."""
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.json"))) or "none"
        raise ShipyardError(f"{path}: no such release file", allowed=there, mend="name one that is there")
    return read_release(path, load_keys(path.parent / "keys"), oldest)


def print_found(found: Release, as_json: bool) -> int:
    """Print a release, and return the exit code."""
    if as_json:
        print(found.model_dump_json(by_alias=True, exclude_unset=True))
    else:
        print_release(found)
    return 0


def _is_release(path: Path) -> bool:
    return path.suffix == ".json" and path.name != MANIFEST


def _bundle(path: Path) -> Path:
    """Return the folder or zip of a bundle; its bundle.json stands for its folder."""
    return path.parent if path.name == MANIFEST else path


def _difference(old: Path, new: Path) -> dict[str, object]:
    """Compare two releases, or two bundles."""
    kinds = [_is_release(path) for path in (old, new)]
    if all(kinds):
        return diff(open_release(old), open_release(new))
    if any(kinds):
        raise ShipyardError(
            "diff: a release and a bundle", value=f"{old} {new}", allowed="two releases, or two bundles"
        )
    inspect = importlib.import_module("shipyard.inspect").inspect
    return diff_bundles(inspect(_bundle(old)), inspect(_bundle(new)))
