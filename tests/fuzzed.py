"""A server held to its own OpenAPI description by schemathesis: right requests, and wrong ones."""

import urllib.request

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
          negative_data_rejection, positive_data_acceptance]  # fmt: skip


def fuzz(url, path, examples=25):
    """Post what schemathesis makes of the description of a path, right and wrong; return the statuses by mode.

    Each answer must have a status and a form that are described, and what is wrong must be refused in one line of JSON.
    """
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["POST"]
    seen = {}
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        seen[mode.value] = _statuses(operation, mode, examples)
    assert urllib.request.urlopen(f"{url}/healthz", timeout=20).status == 200
    return seen


def _statuses(operation, mode, examples):
    found = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        if mode is schemathesis.GenerationMode.POSITIVE:
            case.body = whole(case.body)
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400:
            error = answer.json()
            assert error.keys() == {"error"} and error["error"] and "\n" not in error["error"], error
        found.append(answer.status_code)

    run()
    return found


def whole(value):
    """Return a document with whole numbers as such: 3.0 is an integer to JSON Schema, and none to us."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
