"""GET /openapi.json: this server's own description (OpenAPI 3.1), made from the structs that read requests.

Every route of the table stands in ROUTES; a test holds the two equal, and another sends what the description allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from weft import __version__
from weft.front.anthropic.structs import CountRequest, MessagesRequest
from weft.front.openai.batches import BatchRequest
from weft.front.openai.embeddings import EmbeddingRequest
from weft.front.openai.files import MAX_PAGE as MAX_FILES
from weft.front.openai.files import PURPOSES
from weft.front.openai.response_structs import ResponseRequest
from weft.front.openai.structs import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    TokenizeRequest,
    UnloadRequest,
)
from weft.front.openapi_answers import ANSWERS, INTEGER, STRING, Schema, const, ref
from weft.front.store.batches import Batch

PAGE = {"after": STRING, "limit": {"type": "integer", "minimum": 1, "maximum": 100}}
ORDER = {"order": const("asc", "desc")}
FORM: Schema = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": const(*PURPOSES),
        "expires_after[seconds]": INTEGER,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One method of one path.

    answer: name of the schema; or a media type, of what is no JSON.  body: the struct that reads it.  stream: whether it may
    answer with events.  query: parameters by name.  form: whether it takes a form.  open: whether it asks for no key.
    """

    text: str
    answer: str
    body: type | None = None
    stream: bool = False
    query: dict[str, Schema] | None = None
    form: bool = False
    open: bool = False


ROUTES: dict[tuple[str, str], Described] = {
    ("GET", "/v1/models"): Described(text="What is served", answer="ModelList"),
    ("GET", "/v1/models/{name}"): Described(text="One of them", answer="Model"),
    ("POST", "/v1/completions"): Described(
        text="Continue a prompt", answer="Completion", body=CompletionRequest, stream=True
    ),
    ("POST", "/v1/chat/completions"): Described(
        text="Answer a conversation", answer="ChatCompletion", body=ChatRequest, stream=True
    ),
    ("POST", "/v1/responses"): Described(
        text="Answer, and keep the answer", answer="Response", body=ResponseRequest, stream=True
    ),
    ("GET", "/v1/responses/{id}"): Described(
        text="A stored response", answer="Response", stream=True,
        query={"stream": const("true", "false"), "starting_after": {"type": "integer", "minimum": 0}},
    ),
    ("DELETE", "/v1/responses/{id}"): Described(text="Forget a response", answer="ResponseDeleted"),
    ("POST", "/v1/responses/{id}/cancel"): Described(text="End a background response", answer="Response"),
    ("GET", "/v1/responses/{id}/input_items"): Described(
        text="What a response was asked", answer="ResponseItems", query={**PAGE, **ORDER}
    ),
    ("POST", "/v1/files"): Described(text="Upload a file", answer="File", form=True),
    ("GET", "/v1/files"): Described(
        text="Files, newest first", answer="FileList",
        query={**PAGE, **ORDER, "purpose": STRING, "limit": {"type": "integer", "minimum": 1, "maximum": MAX_FILES}},
    ),
    ("GET", "/v1/files/{id}"): Described(text="One file", answer="File"),
    ("DELETE", "/v1/files/{id}"): Described(text="Delete a file", answer="FileDeleted"),
    ("GET", "/v1/files/{id}/content"): Described(text="Its contents", answer="application/octet-stream"),
    ("POST", "/v1/batches"): Described(text="Answer the lines of a file", answer="Batch", body=BatchRequest),
    ("GET", "/v1/batches"): Described(text="Batches, newest first", answer="BatchList", query=PAGE),
    ("GET", "/v1/batches/{id}"): Described(text="One batch", answer="Batch"),
    ("POST", "/v1/batches/{id}/cancel"): Described(text="Leave off a batch", answer="Batch"),
    ("POST", "/v1/embeddings"): Described(text="Vectors of texts", answer="Embeddings", body=EmbeddingRequest),
    ("POST", "/v1/messages"): Described(
        text="Answer a conversation, in Anthropic's form", answer="AnthropicMessage", body=MessagesRequest, stream=True
    ),
    ("POST", "/v1/messages/count_tokens"): Described(
        text="Tokens of a conversation", answer="TokenCount", body=CountRequest
    ),
    ("POST", "/tokenize"): Described(text="Text or messages to ids", answer="Tokens", body=TokenizeRequest),
    ("POST", "/detokenize"): Described(text="Ids to text", answer="Text", body=DetokenizeRequest),
    ("POST", "/v1/load_lora_adapter"): Described(text="Take in an adapter", answer="text/plain", body=LoadRequest),
    ("POST", "/v1/unload_lora_adapter"): Described(text="Let go of one", answer="text/plain", body=UnloadRequest),
    ("GET", "/openapi.json"): Described(text="This description", answer="application/json"),
    ("GET", "/health"): Described(text="Whether tokens advance", answer="Health", open=True, query={"model": STRING}),
    ("GET", "/ready"): Described(text="Whether requests are taken", answer="Health", open=True, query={"model": STRING}),
    ("GET", "/metrics"): Described(text="Prometheus text", answer="text/plain"),
    ("GET", "/v1/weft/live"): Described(
        text="What the server is at, as server-sent events", answer="text/event-stream", query={"model": STRING}
    ),
    ("GET", "/version"): Described(text="weft's version", answer="Version"),
}  # fmt: skip


@cache
def description() -> dict[str, Any]:
    """The whole document."""
    bodies = [d.body for d in ROUTES.values() if d.body is not None]
    _, schemas = msgspec.json.schema_components([*bodies, Batch], ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), described in ROUTES.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, described)
    return {
        "openapi": "3.1.0",
        "info": {"title": "weft", "version": __version__, "description": "Inference and serving for language models."},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **ANSWERS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _operation(path: str, described: Described) -> dict[str, Any]:
    error = ref("AnthropicError" if path.startswith("/v1/messages") else "Error")
    worse = ref("Health") if described.answer == "Health" else error
    operation: dict[str, Any] = {
        "summary": described.text,
        "parameters": [
            *({"name": n, "in": "path", "required": True, "schema": STRING} for n in _parameters(path)),
            *({"name": n, "in": "query", "schema": s} for n, s in (described.query or {}).items()),
        ],
        "responses": {
            "200": {"description": described.text, "content": _content(described)},
            "4XX": {"description": "The request is wrong", "content": {"application/json": {"schema": error}}},
            "5XX": {"description": "The server cannot answer", "content": {"application/json": {"schema": worse}}},
        },
    }
    if described.body is not None:
        schema = ref(described.body.__name__)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if described.form:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}
    if described.open:
        operation["security"] = []
    return operation


def _content(described: Described) -> dict[str, Any]:
    if "/" in described.answer:
        return {described.answer: {}}
    content: dict[str, Any] = {"application/json": {"schema": ref(described.answer)}}
    if described.stream:
        content["text/event-stream"] = {"schema": STRING}
    return content


def _parameters(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]
