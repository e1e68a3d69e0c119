"""The gateway's routes as OpenAPI describes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve import openapi
from serve.codec import Codec
from serve.feedback import KINDS, MOST_EVENTS


def paths(codec: Codec, sources: Sequence[str], asked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the gateway's paths; `asked` are the sources that each fused route asks."""
    own = {"user": openapi.NO_OR_SHORT_ID, "place": openapi.NO_OR_SHORT_ID}
    found = {}
    for route, names in asked.items():
        body = openapi.request_schema(codec)
        off = openapi.listed({"enum": list(sources)}, len(sources))
        # one at least is left to ask
        off |= {"not": {"allOf": [{"contains": {"const": name}} for name in names]}} if names else {}
        body = body | {"properties": body["properties"] | own | {"without": off}}
        if route != codec.task:
            body = openapi.closed({k: v for k, v in body["properties"].items() if k != "query"})
        answer = openapi.answer_schema(codec) | {"required": ["request_id", "products", "targets", "complete"]}
        found[f"/v1/{route}"] = {"post": openapi.operation("Ask the targets and fuse their answers", answer, body)}
    event = openapi.closed(
        {"item": openapi.SHORT_ID, "kind": {"enum": list(KINDS)}, "quantity": openapi.AMOUNT,
         "value": openapi.AMOUNT, "basket": openapi.NO_OR_SHORT_ID}, ("item", "kind"),
    )  # fmt: skip
    body = openapi.closed(
        {"request_id": {"type": "string", "minLength": 1, "maxLength": 64},
         "user": openapi.SHORT_ID, "place": openapi.NO_OR_SHORT_ID,
         "events": openapi.listed(event, MOST_EVENTS, 1)}, ("request_id", "user", "events"),
    )  # fmt: skip
    described = openapi.operation("Write what a shopper did with an answer", {"type": "object"}, body)
    described["responses"]["202"] = described["responses"].pop("200")
    return found | {"/v1/feedback": {"post": described}}
