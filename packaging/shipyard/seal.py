"""Seal a bundle: bundle.json names every file with its digest, and its own digest is what is attested."""

import json
from pathlib import Path
from typing import Any

from models.release import File
from serve.files import sha256_file
from serve.trust import MANIFEST, check_bundle


def seal(tree: Path, document: dict[str, Any]) -> str:
    """Write bundle.json with the digests of all other files; return its own digest."""
    document["files"] = [file.model_dump() for file in files_of(tree)]
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    (tree / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    digest = sha256_file(tree / MANIFEST)
    check_bundle(tree, digest)
    return digest


def files_of(tree: Path) -> tuple[File, ...]:
    """Return the files below a folder with their digests, by path."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    return tuple(
        File(path=p.relative_to(tree).as_posix(), sha256=sha256_file(p), bytes=p.stat().st_size) for p in paths
    )
