"""Requests drawn from the server's own OpenAPI document, good and bad ones: none may break it."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.openai.conftest import Running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GET = ("/health", "/version", "/metrics", "/v1/models", "/v1/models/{name}")
POST = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def schema(chat_server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{chat_server.url}/openapi.json")


def test_every_operation_is_drawn(schema: Any) -> None:
    there = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert there == {*(("GET", path) for path in GET), *(("POST", path) for path in POST)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *(("GET", path, GenerationMode.POSITIVE) for path in GET),
        *(("POST", path, mode) for path in POST for mode in GenerationMode),
    ],
)
def test_no_request_breaks_the_server(
    schema: Any, chat_server: Running, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    answered = set()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def draw(case: Any) -> None:
        answered.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    draw()
    if mode.is_negative:
        assert answered and 200 not in answered, "a wrong request was taken"
    elif "{" not in path:
        assert 200 in answered, "no request was right"
    assert chat_server.service.error is None
    assert chat_server.http.get("/health").status_code == 200
