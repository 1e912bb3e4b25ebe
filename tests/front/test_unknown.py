"""Fields that no route reads: what official clients send is accepted, or refused by name; the rest is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from weft.cli._server import ServerFlags
from weft.errors import ConfigError, RequestError
from weft.front.anthropic import structs as messages
from weft.front.openai import response_structs, structs, unknown
from weft.front.openai.embeddings import EmbeddingRequest
from weft.front.openapi import ROUTES
from weft.front.text import ModelText

OPENAI = {
    "CreateChatCompletionRequest": (structs.ChatRequest, structs.NEUTRAL),
    "CreateCompletionRequest": (structs.CompletionRequest, structs.NEUTRAL),
    "CreateResponse": (response_structs.ResponseRequest, response_structs.NEUTRAL),
    "CreateEmbeddingRequest": (EmbeddingRequest, {}),
}
BASE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [65]},
}
TOMORROW = {"a_field_of_tomorrow": [1, {"a": None}]}


def properties(schemas: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    if "$ref" in schema:
        return properties(schemas, schemas[schema["$ref"].rpartition("/")[2]])
    parts = (properties(schemas, part) for part in schema.get("allOf", ()))
    return set(schema.get("properties", ())).union(*parts)


@pytest.mark.parametrize("name", OPENAI)
def test_every_field_of_openai_is_known(openai_schemas: dict[str, Any], name: str) -> None:
    kind, neutral = OPENAI[name]
    known = {*kind.__struct_fields__, *neutral, *structs.NEVER, *unknown.OPENAI}
    assert properties(openai_schemas, openai_schemas[name]) - known == set()


def test_every_field_of_anthropics_client_is_known() -> None:
    known = {*messages.MessagesRequest.__struct_fields__, *messages.NEUTRAL, *unknown.ANTHROPIC}
    assert MessageCreateParamsBase.__annotations__.keys() - known == set()


def test_every_route_refuses_what_it_does_not_know(http: httpx.Client) -> None:
    read = {path for (_, path), route in ROUTES.items() if route.body is not None}
    assert read - BASE.keys() == {"/v1/batches", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    for path, body in BASE.items():
        assert http.post(path, json=body).status_code == 200, path
        answer = http.post(path, json={**body, **TOMORROW})
        error = answer.json()["error"]
        assert answer.status_code == 400, path
        assert "'a_field_of_tomorrow' is not known" in error["message"]
        if not path.startswith("/v1/messages"):  # whose errors name no field
            assert (error["param"], error["code"]) == ("a_field_of_tomorrow", "unknown_parameter")


def test_options_of_streams(http: httpx.Client) -> None:
    ask = {**BASE["/v1/completions"], "stream": True}
    for options in ({"include_obfuscation": False}, {"include_usage": True, "continuous_usage_stats": True}):
        assert http.post("/v1/completions", json={**ask, "stream_options": options}).status_code == 200
    for path in ("/v1/completions", "/v1/responses"):
        answer = http.post(path, json={**BASE[path], "stream": True, "stream_options": {"include_usag": True}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options")
        assert "include_usag" in answer.json()["error"]["message"]


def test_openais_client(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
    for own, said in (
        ({"regex": "[a-z]+"}, "regex is not supported: use structured_outputs"),
        ({"ebnf": 'root ::= "a"'}, "ebnf is not supported: use structured_outputs"),
        ({"max_token": 9}, "did you mean max_tokens?"),
        ({"max_completion_tokens": 9}, "'max_completion_tokens' is not known here"),
        ({"x" * 9000: 1}, "'" + "x" * 40 + "' is not known here"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**ask, extra_body=own)
        assert said in caught.value.message
    assert client.completions.create(**ask, user="me").choices[0].text
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=2, store=False, metadata={"a": "b"},
        service_tier="auto", prompt_cache_key="a", safety_identifier="b", extra_body={"cache_prompt": True},
    )  # fmt: skip
    assert chat.choices[0].message.content


def test_anthropics_client(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none")
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    assert client.messages.create(**ask, metadata={"user_id": "me"}, service_tier="auto").content
    counted = client.messages.count_tokens(model=MODEL, messages=ask["messages"])
    assert client.messages.count_tokens(model=MODEL, messages=ask["messages"], extra_body={"max_tokens": 2}) == counted
    with pytest.raises(anthropic.BadRequestError, match="'min_p' is not known here"):
        client.messages.create(**ask, extra_body={"min_p": 0.5})


def test_a_chats_own_body_is_tokenized(http: httpx.Client) -> None:
    """Clients send the body of the request that they are about to send."""
    messages = BASE["/v1/chat/completions"]["messages"]
    alone = http.post("/tokenize", json={"messages": messages}).json()
    answer = http.post("/tokenize", json={"messages": messages, "temperature": 0.5, "max_tokens": 4, "stream": True})
    assert answer.json() == alone


def test_a_server_may_be_told_to_ignore_them(
    scripted: Callable[..., ScriptedPort], text: ModelText, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "weft.front")
    with serving(scripted(lambda spec, index: [65] * spec.sampling.max_tokens), text, lenient=True) as url:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
            answer = httpx.post(f"{url}{path}", json={**BASE[path], **TOMORROW})
            assert answer.status_code == 200, answer.text
            assert "'a_field_of_tomorrow'" in caplog.text
            caplog.clear()
        answer = httpx.post(f"{url}/v1/completions", json={**BASE["/v1/completions"], "regex": "a"})
        assert answer.status_code == 400, "what is known to change the answer is refused all the same"


def test_the_flag() -> None:
    assert ServerFlags().speech["lenient"] is False
    ServerFlags(unknown_fields="ignore").check()
    assert ServerFlags(unknown_fields="ignore").speech["lenient"] is True
    with pytest.raises(ConfigError, match="refuse or ignore"):
        ServerFlags(unknown_fields="maybe").check()


def test_what_is_kept_is_read_again() -> None:
    """A response that goes on after a new start is read from what the first reading made of it."""
    kind = response_structs.ResponseRequest
    request = structs.read(b'{"input": "Hi", "user": "me"}', kind, lenient=False)
    assert structs.read(msgspec.json.encode(request), kind, lenient=False) == request
    with pytest.raises(RequestError, match="did you mean stop"):
        structs.read(b'{"input": "Hi", "stopp": "me"}', kind, lenient=False)
