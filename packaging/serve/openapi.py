"""The OpenAPI 3.1 description of our servers, made of what a bundle takes and answers."""

from collections.abc import Mapping
from typing import Any

from serve.codec import LONGEST_QUERY, MOST_CANDIDATES, MOST_HISTORY, PLURALS, Codec
from serve.history import KINDS, MOST_OFFERS, OFFER

Schema = dict[str, Any]

ID: Schema = {"oneOf": [{"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, {"type": "string"}]}
SHORT_ID: Schema = {"oneOf": [{"type": "integer", "exclusiveMinimum": -(10**18), "exclusiveMaximum": 10**18},
                              {"type": "string", "minLength": 1, "maxLength": 200}]}  # fmt: skip
"""What the data stage takes for an id."""

NO_OR_SHORT_ID: Schema = {"oneOf": [*SHORT_ID["oneOf"], {"type": "null"}]}
AMOUNT: Schema = {"type": "number", "minimum": 0, "maximum": 1e9}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
FAULTS = {
    "400": "the request is wrong; the error says what, where and what is allowed",
    "404": "no such path",
    "405": "no such method",
    "408": "the body did not come in time",
    "411": "no Content-Length",
    "413": "the body is too large",
    "429": "the queue is full; Retry-After says when to come again",
    "431": "the headers are too large",
    "503": "not ready, or the deadline passed before the request was begun",
}


def closed(properties: Schema, required: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object without other keys."""
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


def listed(items: Schema, most: int, least: int = 0) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def request_schema(codec: Codec, *, rank: bool = False) -> Schema:
    """Return the schema of a request, as `Codec.check` holds it."""
    event = {
        "product": ID,
        "days_ago": {"type": "number", "minimum": 0, "maximum": 36_500},
        "kind": {"enum": list(KINDS)},
    }
    most = MOST_CANDIDATES if rank else codec.returned
    properties: Schema = {
        "history": listed(closed(event, ("product", "days_ago")), MOST_HISTORY),
        "k": {"type": "integer", "minimum": 1, "maximum": most},
    }
    required: tuple[str, ...] = ()
    if codec.takes_offers:
        properties["offers"] = listed(closed({"product": ID} | dict.fromkeys(OFFER, SHARE), ("product",)), MOST_OFFERS)
    if codec.manifest["tokenizer"] is not None:
        properties["query"] = {"type": "string", "minLength": 1, "maxLength": LONGEST_QUERY}
        required += ("query",)
    if rank:
        properties["candidates"] = listed(ID, MOST_CANDIDATES, 1)
        required += ("candidates",)
    return closed(properties, required)


def answer_schema(codec: Codec) -> Schema:
    """Return the schema of an answer."""
    one = {"type": "object", "required": [codec.answer_key, "score"],
           "properties": {codec.answer_key: ID, "score": {"type": "number"}}}  # fmt: skip
    plural = PLURALS[codec.answer_key]
    return {"type": "object", "required": [plural, "unknown"],
            "properties": {plural: {"type": "array", "items": one}, "unknown": {"type": "array", "items": ID}}}  # fmt: skip


def operation(
    summary: str, answer: Schema, body: Schema | None = None, more: Mapping[str, str] | None = None
) -> Schema:
    """Return the description of one method of a path; `more` are other statuses with their meaning."""
    faults = FAULTS | dict(more or {}) if body is not None else {"404": FAULTS["404"], "503": FAULTS["503"]}
    found: Schema = {
        "summary": summary,
        "responses": {"200": {"description": "done", "content": {"application/json": {"schema": answer}}}}
        | {
            status: {"description": told, "content": {"application/json": {"schema": ERROR}}}
            for status, told in faults.items()
        },
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def document(title: str, version: str, paths: Mapping[str, Mapping[str, Schema]], prefix: str = "") -> Schema:
    """Return the whole description; `paths` by path and method."""
    status: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
    text = {"description": "metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    health = {
        "/healthz": {"get": operation("Whether the process runs", status)},
        "/readyz": {"get": operation("Whether it takes requests", status)},
        "/metrics": {"get": {"summary": "Metrics in Prometheus' form", "responses": {"200": text}}},
    }
    return {
        "openapi": "3.1.0", "info": {"title": title, "version": version}, "servers": [{"url": prefix or "/"}],
        "paths": {**paths, **health},
    }  # fmt: skip
