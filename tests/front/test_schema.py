"""Answers of the real server against OpenAI's own description of its API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.front.scripted import wait_until

MODEL = "weft-tiny"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 5}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
KNOWN = frozenset(
    "type properties required enum items anyOf oneOf allOf $ref nullable additionalProperties minimum maximum const "
    "description title default deprecated example format discriminator maxLength x-oaiMeta x-stainless-const "
    "x-oaiExpandable x-oaiTypeLabel x-oaiSupportedSDKs maxItems minItems maxProperties propertyNames".split()
)


class Description:
    """Schemas of an OpenAPI file, and a check of values against them (the part of JSON Schema that they use)."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self.schemas = schemas

    def faults(self, value: Any, schema: dict[str, Any], where: str = "$") -> Iterator[str]:
        assert set(schema) <= KNOWN, f"{where}: this check does not know {set(schema) - KNOWN}"
        if value is None and schema.get("nullable"):
            return
        if "$ref" in schema:
            yield from self.faults(value, self.schemas[schema["$ref"].rpartition("/")[2]], where)
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(TYPES[kind](value) for kind in kinds):
            yield f"{where} is {value!r}, not of type {kinds}"
            return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is {value!r}, not one of {schema['enum']}"
        for part in schema.get("allOf", []):
            yield from self.faults(value, part, where)
        for word in ("anyOf", "oneOf"):
            if word in schema and all(list(self.faults(value, part, where)) for part in schema[word]):
                yield f"{where} is {value!r}, which is none of {word}"
        if isinstance(value, dict):
            for name in schema.get("required", []):
                if name not in value:
                    yield f"{where}.{name} is missing"
            extra = schema.get("additionalProperties")
            for name, inner in value.items():
                inside = schema.get("properties", {}).get(name, extra if isinstance(extra, dict) else None)
                if inside is not None:
                    yield from self.faults(inner, inside, f"{where}.{name}")
        if isinstance(value, list) and "items" in schema:
            for i, inner in enumerate(value):
                yield from self.faults(inner, schema["items"], f"{where}[{i}]")

    def check(self, value: Any, name: str) -> None:
        assert list(self.faults(value, self.schemas[name])) == []


@pytest.fixture(scope="module")
def api(openai_schemas: dict[str, Any]) -> Description:
    return Description(openai_schemas)


def chunks(answer: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("change", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": True}], ids=str)
def test_chat(http: httpx.Client, api: Description, change: dict[str, Any]) -> None:
    body = {**CHAT, **change}
    api.check(http.post("/v1/chat/completions", json=body).json(), "CreateChatCompletionResponse")
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = chunks(http.post("/v1/chat/completions", json=stream))
    assert len(events) > 3
    for event in events:
        api.check(event, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("change", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True}], ids=str)
def test_completions(http: httpx.Client, api: Description, change: dict[str, Any]) -> None:
    body = {**TEXT, **change}
    api.check(http.post("/v1/completions", json=body).json(), "CreateCompletionResponse")
    for event in chunks(http.post("/v1/completions", json={**body, "stream": True})):
        for choice in event["choices"]:  # the schema is silent about streams, where null means "not yet"
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        api.check(event, "CreateCompletionResponse")


def test_models_and_errors(http: httpx.Client, api: Description) -> None:
    api.check(http.get("/v1/models").json(), "ListModelsResponse")
    api.check(http.get(f"/v1/models/{MODEL}").json(), "Model")
    for answer in (http.get("/nothing"), http.post("/v1/completions", json={}), http.get("/v1/completions")):
        api.check(answer.json(), "ErrorResponse")


def test_the_check_finds_faults(http: httpx.Client, api: Description) -> None:
    good = http.post("/v1/chat/completions", json=CHAT).json()
    bad = [{**good, "object": "chat"}, {**good, "created": 1.5}, {k: v for k, v in good.items() if k != "id"}]
    bad.append({**good, "choices": [{**good["choices"][0], "finish_reason": None}]})
    bad.append(
        {**good, "choices": [{**good["choices"][0], "logprobs": {"content": [{"token": "a"}], "refusal": None}}]}
    )
    for one in bad:
        assert list(api.faults(one, api.schemas["CreateChatCompletionResponse"]))


SAY: dict[str, Any] = {"model": MODEL, "input": "Hi", "max_output_tokens": 5}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"instructions": "Be kind."},
        {"top_logprobs": 2},
        {"background": True},
        {"metadata": {"a": "b"}},
        {"store": False},
    ],
    ids=str,
)
def test_responses(http: httpx.Client, api: Description, change: dict[str, Any]) -> None:
    made = http.post("/v1/responses", json={**SAY, **change}).json()
    api.check(made, "Response")
    if made["store"]:
        api.check(http.get(f"/v1/responses/{made['id']}").json(), "Response")
        api.check(http.get(f"/v1/responses/{made['id']}/input_items").json(), "ResponseItemList")


EVENTS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
}


def test_events_of_responses(http: httpx.Client, api: Description) -> None:
    seen = set()
    for change in ({"top_logprobs": 1, "ignore_eos": True}, {"stop": " ", "max_output_tokens": 200}):
        answer = http.post("/v1/responses", json={**SAY, "stream": True, **change})
        for line in answer.text.splitlines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                api.check(event, EVENTS[event["type"]])
                seen.add(event["type"])
    assert seen == EVENTS.keys()


def test_embeddings(http: httpx.Client, api: Description) -> None:
    api.check(http.post("/v1/embeddings", json={"model": MODEL, "input": ["a", "b"]}).json(), "CreateEmbeddingResponse")


def test_models(http: httpx.Client, api: Description) -> None:
    api.check(http.get("/v1/models").json(), "ListModelsResponse")
    api.check(http.get(f"/v1/models/{MODEL}").json(), "Model")


def test_files_and_batches(http: httpx.Client, api: Description) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": "a"}}
    for data in (json.dumps(line), "no json"):
        form: Any = {
            "files": {"file": ("a.jsonl", data)},
            "data": {"purpose": "batch", "expires_after[seconds]": "3600"},
        }
        file = http.post("/v1/files", **form).json()
        api.check(file, "OpenAIFile")
        body = {
            "input_file_id": file["id"],
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
            "metadata": {"k": "v"},
        }
        made = http.post("/v1/batches", json=body).json()
        api.check(made, "Batch")
        path = f"/v1/batches/{made['id']}"
        assert wait_until(lambda path=path: "finalizing_at" in (b := http.get(path).json()) or "failed_at" in b)
        api.check(http.get(path).json(), "Batch")
    api.check(http.get("/v1/files").json(), "ListFilesResponse")
    api.check(http.get("/v1/batches").json(), "ListBatchesResponse")
    api.check(http.delete(f"/v1/files/{file['id']}").json(), "DeleteFileResponse")


def test_errors(http: httpx.Client, api: Description) -> None:
    for path in ("/v1/responses/resp_x", "/v1/files/file-x", "/v1/batches/batch_x"):
        api.check(http.get(path).json(), "ErrorResponse")
