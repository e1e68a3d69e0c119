"""The page of a fleet that is up: ask it, switch sources off, and see what each says."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serve.files import read_json
from serve.fused import FUSION
from serve.trust import MANIFEST

PAGE = Path(__file__).parents[1] / "fleet.html"


def page(bundles: Iterable[Path], build: Path) -> str:
    """Return the page: it knows a few shoppers, those of the bundles' golden requests, and what products are called."""
    shoppers: list[Mapping[str, Any]] = []
    sources: list[str] = []
    for bundle in bundles:
        manifest = read_json(bundle / MANIFEST)
        if (bundle / FUSION).is_file():
            sources = read_json(bundle / FUSION)["sources"]
        elif manifest["task"] == "search":
            shoppers = [golden["request"] for golden in manifest["golden"]]
    data = {
        "shoppers": shoppers,
        "sources": sources,
        "titles": titles(build),
    }
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", told)


def titles(build: Path) -> dict[str, str]:
    """Return what a profile's products are called, by their ids as text; none where its data is not there."""
    path = build / "joint" / "data" / "items.parquet"
    if not path.is_file():
        return {}
    from pyarrow import parquet

    table = parquet.read_table(path)
    text = next((name for name in ("title", "text") if name in table.column_names), None)
    if text is None:
        return {}
    return {str(item): title for item, title in zip(table["item"].to_pylist(), table[text].to_pylist(), strict=True)}
