"""What an impression tells of a request and its answer, so that drift can be seen: numbers, no products and no words."""

from collections.abc import Mapping
from typing import Any

from serve.codec import Codec


def observed(codec: Codec, request: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a request that `codec` has let pass, and of its fused answer; what does not apply is left out.

    Of the request: `events` of its history, the `days` since the last of them, the share of its products that the release
    does not know (`unknown`), `offers`, and the `characters` of its query. Of the answer: the fused score of its first
    product (`fused`), and by source (`source NAME`) the score that it gave to its own.
    """
    history = request.get("history", [])
    asked = {event["product"] for event in history}
    found = {"events": len(history), "offers": len(request.get("offers", []))}
    if history:
        found["days"] = min(event["days_ago"] for event in history)
        found["unknown"] = len(codec.unknown(request)) / len(asked)
    if "query" in request:
        found["characters"] = len(request["query"])
    if answer["products"]:
        found["fused"] = answer["products"][0]["score"]
    for source, told in answer["targets"].items():
        if told.get("score") is not None:
            found[f"source {source}"] = told["score"]
    return {name: round(float(value), 6) for name, value in found.items()}
