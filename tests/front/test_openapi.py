"""/openapi.json is true: its routes are the table's, and what schemathesis makes of it is answered as it says."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.front.app import Routes
from weft.front.guard import OPEN_PATHS
from weft.front.openapi import ROUTES, description
from weft.front.store import open_store
from weft.front.text import ModelText

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = sorted(ROUTES.keys() - {("GET", "/v1/weft/live")})
"""All but the feed, which has no end; test_live reads it."""


def test_the_routes_are_those_of_the_table() -> None:
    table = Routes(None, 1, 1, 1).table()  # type: ignore[arg-type]
    there = {(m, re.sub(r":\w+\}", "}", r.path)) for r in table for m in (r.methods or set()) - {"HEAD"}}
    assert ROUTES.keys() == there
    listed = {path for _, path in ROUTES}
    assert {path for (_, path), described in ROUTES.items() if described.open} == OPEN_PATHS & listed


def test_every_reference_leads_somewhere() -> None:
    whole = description()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = set(references(whole))
    assert len(found) > 20
    assert {name.rpartition("/")[2] for name in found} <= whole["components"]["schemas"].keys()


@pytest.fixture(scope="module")
def served(text: ModelText, tmp_path_factory: pytest.TempPathFactory, info: Any) -> Iterator[str]:
    """A quick engine: many tokens in a frame."""
    port = ScriptedPort(lambda spec, index: [65] * spec.sampling.max_tokens, info, group=512)
    port.vector = struct.pack("<4f", 1, 2, 3, 4)
    with serving(port, text, store=open_store(tmp_path_factory.mktemp("store"))) as url:
        yield url
    port.close()


@pytest.fixture(scope="module")
def schema(served: str) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{served}/openapi.json").json())


def probe(schema: Any, url: str, method: str, path: str, examples: int) -> int:
    """Send what the description allows, and hold the answers against it; how many were taken."""
    taken = 0

    @given(case=schema[path][method].as_strategy())
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Any) -> None:
        nonlocal taken
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # what it makes up is never served
        answer = case.call(base_url=url, timeout=30)
        taken += answer.status_code == 200
        case.validate_response(answer, checks=CHECKS)

    send()
    return taken


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=map(" ".join, OPERATIONS))
def test_schemathesis(schema: Any, served: str, method: str, path: str) -> None:
    probe(schema, served, method, path, 12)


@pytest.mark.long
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=map(" ".join, OPERATIONS))
def test_schemathesis_at_length(schema: Any, served: str, method: str, path: str) -> None:
    probe(schema, served, method, path, 400)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "logprobs": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a", "return_token_strs": True},
    "/detokenize": {"tokens": [65]},
}


def test_good_requests_are_answered_as_described(schema: Any, served: str) -> None:
    """Random bodies are mostly refused; these are not."""
    for path, body in BODIES.items():
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        answer = case.call(base_url=served)
        assert answer.status_code == 200, answer.text
        case.validate_response(answer, checks=CHECKS)
    made = httpx.post(f"{served}/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": made, "endpoint": "/v1/embeddings"}
    batch = httpx.post(f"{served}/v1/batches", json=body).json()["id"]
    said = httpx.post(f"{served}/v1/responses", json=BODIES["/v1/responses"]).json()["id"]
    for path, id in (
        ("/v1/files/{id}", made), ("/v1/files/{id}/content", made), ("/v1/batches/{id}", batch),
        ("/v1/responses/{id}", said), ("/v1/responses/{id}/input_items", said), ("/v1/models/{name}", MODEL),
    ):  # fmt: skip
        case = schema[path]["GET"].Case(path_parameters={path.rpartition("{")[2].partition("}")[0]: id})
        answer = case.call(base_url=served)
        assert answer.status_code == 200, answer.text
        case.validate_response(answer, checks=CHECKS)
